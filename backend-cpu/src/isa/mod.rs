//! Instruction sets: one vocabulary of vector operations, and a token for each set that proves the processor has it.
//!
//! A kernel is written once, generic over [`Isa`]. Vectors have the same widths everywhere (16 × f32, 16 × i32,
//! 64 bytes), whatever registers hold them: so every sum runs in the same order in every instruction set, and a
//! lane number means the same thing in every test. [`Portable`] is the plain loop that the others are held against.
//!
//! Everything that runs inside [`Isa::run`] must inline into it (`#[inline(always)]`), or intrinsics become calls.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

#[cfg(test)]
pub(crate) mod tests;

use std::fmt;

/// Work to be compiled for each instruction set.
pub(crate) trait Task {
    type Output;
    /// Implementations are `#[inline(always)]`.
    fn eval<S: Isa>(self, isa: S) -> Self::Output;
}

/// Vector operations. Pointers may be unaligned.
///
/// # Safety
/// Methods that take pointers are unsafe: the caller owes that the bytes named in each are readable or writable.
/// All other methods are safe because a value of the implementing type exists only where the processor has the
/// instructions.
pub(crate) trait Isa: Copy + Send + Sync + 'static {
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;
    /// 64 bytes.
    type B: Copy;
    /// 16 × i16.
    type W: Copy;

    /// The level this token proves.
    const LEVEL: Level;
    /// [`dot_i8`](Isa::dot_i8) computes `Σ (w + I8_OFFSET) × a`.
    const I8_OFFSET: i32;
    /// Rows × columns of accumulators that fit the registers in a float matrix product.
    const FLOAT_TILE: usize;
    /// Whether [`load_f16`](Isa::load_f16) costs little more than [`load`](Isa::load).
    const LOADS_F16: bool;
    /// Tokens whose accumulators fit the registers in a quantised matrix product.
    const PANEL_TOKENS: usize;

    /// Runs `task` compiled for this instruction set.
    fn run<T: Task>(self, task: T) -> T::Output;

    // f32
    fn splat(self, x: f32) -> Self::F;
    /// 16 × f32 at `p`.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// The first `n <= 16` × f32 at `p`, zeros in the other lanes.
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::F;
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// The first `n <= 16` lanes.
    unsafe fn store_first(self, p: *mut f32, x: Self::F, n: usize);
    /// 16 × f16 at `p`, widened.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// Rounded to nearest, ties to even.
    unsafe fn store_f16(self, p: *mut u16, x: Self::F);
    /// 16 × bf16 at `p`, widened.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// The second operand where a comparison with NaN decides.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// `a × b + c`; fused where the instruction set fuses (AVX2, AVX-512), rounded twice where not (portable).
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Lane `i` and lane `i + 8`, then `+ 4`, `+ 2`, `+ 1`.
    fn sum(self, a: Self::F) -> f32;
    fn max_lane(self, a: Self::F) -> f32;
    /// To nearest, ties to even.
    fn round_i32(self, a: Self::F) -> Self::I;

    // i32
    fn splat_i32(self, x: i32) -> Self::I;
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn sub_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn to_f32(self, a: Self::I) -> Self::F;
    /// Bits of `a << 23` taken as f32: `2^(a - 127)` for `a` in `1..255`.
    fn exponent(self, a: Self::I) -> Self::F;
    unsafe fn load_i32(self, p: *const i32) -> Self::I;
    /// 16 bytes, with their signs.
    unsafe fn load_i8(self, p: *const i8) -> Self::I;
    unsafe fn store_i32(self, p: *mut i32, x: Self::I);
    /// The low byte of each lane, 16 bytes.
    unsafe fn store_i8(self, p: *mut i8, x: Self::I);

    /// Asks for the cache line of an address, which need not be anybody's.
    fn prefetch(self, _p: *const u8) {}

    // bytes
    fn splat_u8(self, x: u8) -> Self::B;
    unsafe fn load_bytes(self, p: *const u8) -> Self::B;
    unsafe fn store_bytes(self, p: *mut u8, x: Self::B);
    /// 32 bytes at `low`, then 32 bytes at `high`.
    unsafe fn load_halves(self, low: *const u8, high: *const u8) -> Self::B;
    /// 16 bytes at each of four places.
    unsafe fn load_quarters(self, p: [*const u8; 4]) -> Self::B;
    /// 4 bytes at `p`, 16 times.
    unsafe fn splat_4(self, p: *const i8) -> Self::B;
    fn and(self, a: Self::B, b: Self::B) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// Every byte shifted right by `N` bits. With `N = 4` this is the high nibble.
    fn shr<const N: u32>(self, a: Self::B) -> Self::B;
    /// Every byte shifted left by `N` bits.
    fn shl<const N: u32>(self, a: Self::B) -> Self::B;
    /// Bytes 0..32 as they are, bytes 32..64 shifted right by `N` bits (bits of neighbours may come in: mask them).
    fn shr_high_half<const N: u32>(self, a: Self::B) -> Self::B;
    /// Bytes 16..32 and 48..64 shifted right by 4 bits (bits of neighbours may come in), the others as they are.
    fn shr4_odd_quarters(self, a: Self::B) -> Self::B;
    /// `table[b & 15]` for each byte.
    fn lookup(self, table: &[i8; 16], a: Self::B) -> Self::B;
    /// Bit `i` of `bits` as byte `i`: `value` or 0.
    fn bits(self, bits: u64, value: u8) -> Self::B;

    // dot products
    /// Lane `i` gains `Σ q × a` of bytes `4i .. 4i + 4`; `q` is 0 to 128, `a` -127 to 127: sums of two products fit 16 bits.
    fn dot_u7(self, acc: Self::I, q: Self::B, a: Self::B) -> Self::I;
    /// Lane `i` gains `Σ (w + I8_OFFSET) × a` of bytes `4i .. 4i + 4`; `w` any i8, `a` -127 to 127.
    fn dot_i8(self, acc: Self::I, w: Self::B, a: Self::B) -> Self::I;
    /// `|w|`, at most 128, and `a` with its sign turned where `w` is negative: their products are those of `w`, any i8, and
    /// `a`, -127 to 127.
    fn magnitudes(self, w: Self::B, a: Self::B) -> (Self::B, Self::B);
    /// Lane `i` gains the dot product of its two i16: `a[2i] × b[2i] + a[2i + 1] × b[2i + 1]`.
    fn dot_i16(self, acc: Self::I, a: Self::B, b: Self::B) -> Self::I;
    /// 16 × i8, the first in the lowest byte, widened.
    fn widen(self, bytes: u128) -> Self::W;
    unsafe fn load_w(self, p: *const i16) -> Self::W;
    fn mul_w(self, a: Self::W, b: Self::W) -> Self::W;
    /// Lane `i` gains `Σ q × a × s` of bytes `4i .. 4i + 4`, where `s` is the scale of the 16 or 32 bytes they lie
    /// in: lane [`first_scale`]`(SUB, chunk) + 4i / SUB` of `scales`.
    fn dot_scaled<const SUB: usize>(
        self,
        acc: Self::I,
        q: Self::B,
        a: Self::B,
        scales: Self::W,
        chunk: usize,
    ) -> Self::I;
    /// Lanes 0..8: `x`'s lane `i` + lane `i + 8`. Lanes 8..16: `a[2i] × b[2i] + a[2i + 1] × b[2i + 1]`.
    fn fold_beside(self, x: Self::I, a: Self::W, b: Self::W) -> Self::I;
    /// First half of summing 16 vectors at once: for four of them, the sum of each group of four lanes. Lane
    /// `4g + i` of the result is the sum of lanes `4g .. 4g + 4` of `x[i]`.
    fn sum_quads(self, x: [Self::I; 4]) -> Self::I;
    /// Second half, for sums of 16 bytes: lane `4g + i` of result `q` is lane `4q + i` of `x[g]`.
    fn transpose_quads(self, x: [Self::I; 4]) -> [Self::I; 4];
    /// Of four vectors, the lanes of equal place in their groups of four: lane `4g + h` of result `j` is lane `4g + j`
    /// of `x[h]`.
    fn transpose_lanes(self, x: [Self::I; 4]) -> [Self::I; 4];
    /// Second half, for two sums: of four results of `sum_quads`, the sums of lanes 0..8 and of lanes 8..16 of each of the 16
    /// vectors, in their order.
    fn sum_halves(self, x: [Self::I; 4]) -> (Self::I, Self::I);
    /// `rows` are 64 bytes of 16 rows. Writes 1024 bytes: for each group of 4 columns, those 4 bytes of each row.
    unsafe fn store_transposed(self, rows: &[Self::B; 16], to: *mut u8);
}

/// The lane of a group's scale, among those of 256 values in groups of 16 or 32. Scales of groups of 16 lie side by
/// side; of groups of 32, four lanes of something else (the minima) follow each four scales.
pub(crate) const fn scale_lane(sub: usize, group: usize) -> usize {
    if sub == 16 { group } else { group + group / 4 * 4 }
}

/// The lane of the first scale of a chunk of 64 values.
pub(crate) const fn first_scale(sub: usize, chunk: usize) -> usize {
    scale_lane(sub, chunk * (64 / sub))
}

/// An instruction set by name, as `FATHOM_ISA` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// Plain Rust, any processor.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
}

impl Level {
    /// All levels, the widest last.
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::new().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The widest this processor has.
    pub fn best() -> Level {
        Level::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Level::Portable)
    }

    /// The name in options and logs.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    /// The level of this name.
    pub fn from_name(name: &str) -> Option<Level> {
        Level::ALL.into_iter().find(|level| level.name() == name)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
