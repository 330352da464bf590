//! The instruction set that every processor has: plain loops over arrays. The oracle of the others.

use super::{Isa, Level, Task, first_scale};
use half::{bf16, f16};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; 16];
type I = [i32; 16];
type B = [u8; 64];
type W = [i16; 16];

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn map_bytes(a: B, f: impl Fn(u8) -> u8) -> B {
    std::array::from_fn(|i| f(a[i]))
}

impl Isa for Portable {
    type F = F;
    type I = I;
    type B = B;
    type W = W;

    const LEVEL: Level = Level::Portable;
    const I8_OFFSET: i32 = 0;
    const FLOAT_TILE: usize = 1;
    const LOADS_F16: bool = false;
    const PANEL_TOKENS: usize = 1;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        task.eval(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 16]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: the caller owes 16 readable f32.
        unsafe { p.cast::<F>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> F {
        // SAFETY: the caller owes `n` readable f32.
        std::array::from_fn(|i| if i < n { unsafe { p.add(i).read_unaligned() } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F) {
        // SAFETY: the caller owes 16 writable f32.
        unsafe { p.cast::<F>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, x: F, n: usize) {
        for (i, x) in x.into_iter().enumerate().take(n) {
            // SAFETY: the caller owes `n` writable f32.
            unsafe { p.add(i).write_unaligned(x) }
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        // SAFETY: the caller owes 16 readable f16.
        std::array::from_fn(|i| f16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32())
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: F) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: the caller owes 16 writable f16.
            unsafe { p.add(i).write_unaligned(f16::from_f32(x).to_bits()) }
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F {
        // SAFETY: the caller owes 16 readable bf16.
        std::array::from_fn(|i| bf16::from_bits(unsafe { p.add(i).read_unaligned() }).to_f32())
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn sum(self, mut a: F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }

    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        a.into_iter().reduce(|a, b| if a > b { a } else { b }).unwrap_or(f32::NEG_INFINITY)
    }

    #[inline(always)]
    fn round_i32(self, a: F) -> I {
        a.map(|x| x.round_ties_even() as i32)
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> I {
        [x; 16]
    }

    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    fn sub_i32(self, a: I, b: I) -> I {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    fn mul_i32(self, a: I, b: I) -> I {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }

    #[inline(always)]
    fn to_f32(self, a: I) -> F {
        a.map(|x| x as f32)
    }

    #[inline(always)]
    fn exponent(self, a: I) -> F {
        a.map(|x| f32::from_bits((x as u32) << 23))
    }

    #[inline(always)]
    unsafe fn load_i32(self, p: *const i32) -> I {
        // SAFETY: the caller owes 16 readable i32.
        unsafe { p.cast::<I>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> I {
        // SAFETY: the caller owes 16 readable i8.
        unsafe { p.cast::<[i8; 16]>().read_unaligned().map(i32::from) }
    }

    #[inline(always)]
    unsafe fn store_i32(self, p: *mut i32, x: I) {
        // SAFETY: the caller owes 16 writable i32.
        unsafe { p.cast::<I>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, x: I) {
        // SAFETY: the caller owes 16 writable bytes.
        unsafe { p.cast::<[i8; 16]>().write_unaligned(x.map(|x| x as i8)) }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> B {
        [x; 64]
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> B {
        // SAFETY: the caller owes 64 readable bytes.
        unsafe { p.cast::<B>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, x: B) {
        // SAFETY: the caller owes 64 writable bytes.
        unsafe { p.cast::<B>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn load_halves(self, low: *const u8, high: *const u8) -> B {
        // SAFETY: the caller owes 32 readable bytes at each.
        std::array::from_fn(|i| unsafe { if i < 32 { *low.add(i) } else { *high.add(i - 32) } })
    }

    #[inline(always)]
    unsafe fn load_quarters(self, p: [*const u8; 4]) -> B {
        // SAFETY: the caller owes 16 readable bytes at each.
        std::array::from_fn(|i| unsafe { *p[i / 16].add(i % 16) })
    }

    #[inline(always)]
    unsafe fn splat_4(self, p: *const i8) -> B {
        // SAFETY: the caller owes 4 readable bytes.
        let four = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
        std::array::from_fn(|i| four[i % 4])
    }

    #[inline(always)]
    fn and(self, a: B, b: B) -> B {
        std::array::from_fn(|i| a[i] & b[i])
    }

    #[inline(always)]
    fn or(self, a: B, b: B) -> B {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn shr<const N: u32>(self, a: B) -> B {
        map_bytes(a, |a| a >> N)
    }

    #[inline(always)]
    fn shl<const N: u32>(self, a: B) -> B {
        map_bytes(a, |a| a << N)
    }

    #[inline(always)]
    fn shr_high_half<const N: u32>(self, a: B) -> B {
        std::array::from_fn(|i| if i < 32 { a[i] } else { a[i] >> N })
    }

    #[inline(always)]
    fn shr4_odd_quarters(self, a: B) -> B {
        std::array::from_fn(|i| if i / 16 % 2 == 0 { a[i] } else { a[i] >> 4 })
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: B) -> B {
        map_bytes(a, |a| table[(a & 15) as usize] as u8)
    }

    #[inline(always)]
    fn bits(self, bits: u64, value: u8) -> B {
        std::array::from_fn(|i| if bits >> i & 1 == 1 { value } else { 0 })
    }

    #[inline(always)]
    fn dot_u7(self, acc: I, q: B, a: B) -> I {
        std::array::from_fn(|i| {
            acc[i] + (4 * i..4 * i + 4).map(|j| i32::from(q[j]) * i32::from(a[j] as i8)).sum::<i32>()
        })
    }

    #[inline(always)]
    fn dot_i8(self, acc: I, w: B, a: B) -> I {
        std::array::from_fn(|i| {
            acc[i] + (4 * i..4 * i + 4).map(|j| i32::from(w[j] as i8) * i32::from(a[j] as i8)).sum::<i32>()
        })
    }

    #[inline(always)]
    fn magnitudes(self, w: B, a: B) -> (B, B) {
        let signed = |i: usize| if (w[i] as i8) < 0 { a[i].wrapping_neg() } else { a[i] };
        (w.map(|w| (w as i8).unsigned_abs()), std::array::from_fn(signed))
    }

    #[inline(always)]
    fn dot_i16(self, acc: I, a: B, b: B) -> I {
        let at = |x: &B, j: usize| i32::from(i16::from_le_bytes([x[2 * j], x[2 * j + 1]]));
        std::array::from_fn(|i| acc[i] + (2 * i..2 * i + 2).map(|j| at(&a, j) * at(&b, j)).sum::<i32>())
    }

    #[inline(always)]
    fn widen(self, bytes: u128) -> W {
        bytes.to_le_bytes().map(|byte| i16::from(byte as i8))
    }

    #[inline(always)]
    unsafe fn load_w(self, p: *const i16) -> W {
        // SAFETY: the caller owes 16 readable i16.
        unsafe { p.cast::<W>().read_unaligned() }
    }

    #[inline(always)]
    fn mul_w(self, a: W, b: W) -> W {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }

    #[inline(always)]
    fn dot_scaled<const SUB: usize>(self, acc: I, q: B, a: B, scales: W, chunk: usize) -> I {
        let dot = self.dot_u7([0; 16], q, a);
        let scale = |i: usize| i32::from(scales[first_scale(SUB, chunk) + 4 * i / SUB]);
        std::array::from_fn(|i| acc[i] + dot[i] * scale(i))
    }

    #[inline(always)]
    fn fold_beside(self, x: I, a: W, b: W) -> I {
        std::array::from_fn(|i| match i {
            0..8 => x[i] + x[i + 8],
            _ => (2 * (i - 8)..2 * (i - 7)).map(|j| i32::from(a[j]) * i32::from(b[j])).sum(),
        })
    }

    #[inline(always)]
    fn sum_quads(self, x: [I; 4]) -> I {
        std::array::from_fn(|i| x[i % 4][i / 4 * 4..i / 4 * 4 + 4].iter().sum())
    }

    #[inline(always)]
    fn transpose_quads(self, x: [I; 4]) -> [I; 4] {
        std::array::from_fn(|q| std::array::from_fn(|i| x[i / 4][4 * q + i % 4]))
    }

    #[inline(always)]
    fn transpose_lanes(self, x: [I; 4]) -> [I; 4] {
        std::array::from_fn(|j| std::array::from_fn(|i| x[i % 4][i / 4 * 4 + j]))
    }

    #[inline(always)]
    fn sum_halves(self, x: [I; 4]) -> (I, I) {
        let half = |at: usize| std::array::from_fn(|i| x[i / 4][at + i % 4] + x[i / 4][at + 4 + i % 4]);
        (half(0), half(8))
    }

    #[inline(always)]
    unsafe fn store_transposed(self, rows: &[B; 16], to: *mut u8) {
        for group in 0..16 {
            for (row, bytes) in rows.iter().enumerate() {
                for j in 0..4 {
                    // SAFETY: the caller owes 1024 writable bytes; the largest index is 15 × 64 + 15 × 4 + 3.
                    unsafe { *to.add(group * 64 + row * 4 + j) = bytes[group * 4 + j] }
                }
            }
        }
    }
}
