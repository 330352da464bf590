//! AVX2 with FMA and F16C: two registers for each vector.

use super::{Isa, Level, Task, first_scale};
use std::arch::x86_64::*;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run<T: Task>(isa: Avx2, task: T) -> T::Output {
    task.eval(isa)
}

type F = [__m256; 2];
type I = [__m256i; 2];

#[inline(always)]
fn both<A: Copy, B: Copy, C>(a: [A; 2], b: [B; 2], f: impl Fn(A, B) -> C) -> [C; 2] {
    [f(a[0], b[0]), f(a[1], b[1])]
}

/// Lanes below `n` all ones.
///
/// # Safety
/// `n <= 16`, and the processor has AVX2.
#[inline(always)]
unsafe fn first(n: usize) -> I {
    static EDGE: [i32; 32] = {
        let mut edge = [0; 32];
        let mut i = 0;
        while i < 16 {
            edge[i] = -1;
            i += 1;
        }
        edge
    };
    debug_assert!(n <= 16);
    // SAFETY: the caller's; so 16 entries from `16 - n` lie in the table.
    unsafe {
        let p = EDGE.as_ptr().add(16 - n);
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())]
    }
}

/// Dword `j` of each 128-bit lane of four registers, side by side in result `j`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn transpose_4(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> [__m256i; 4] {
    // SAFETY: the caller's.
    unsafe {
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab_low, cd_low),
            _mm256_unpackhi_epi64(ab_low, cd_low),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}

// SAFETY (of every intrinsic below): a value of `Avx2` exists only where `new` found the features; pointers are
// those that the caller of the method owes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl Isa for Avx2 {
    type F = F;
    type I = I;
    type B = I;
    type W = __m256i;

    const LEVEL: Level = Level::Avx2;
    const I8_OFFSET: i32 = 0;
    const FLOAT_TILE: usize = 2;
    const LOADS_F16: bool = true;
    const PANEL_TOKENS: usize = 4;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        unsafe { run(self, task) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> F {
        unsafe {
            let mask = first(n);
            // The second address may lie past the end; masked lanes are not touched.
            [_mm256_maskload_ps(p, mask[0]), _mm256_maskload_ps(p.wrapping_add(8), mask[1])]
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F) {
        unsafe {
            _mm256_storeu_ps(p, x[0]);
            _mm256_storeu_ps(p.add(8), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, x: F, n: usize) {
        unsafe {
            let mask = first(n);
            _mm256_maskstore_ps(p, mask[0], x[0]);
            _mm256_maskstore_ps(p.wrapping_add(8), mask[1], x[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        unsafe {
            let half = |p: *const u16| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            [half(p), half(p.add(8))]
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: F) {
        unsafe {
            let half = |p: *mut u16, x| {
                _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
            };
            half(p, x[0]);
            half(p.add(8), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F {
        unsafe {
            let half = |p: *const u16| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            [half(p), half(p.add(8))]
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        both(a, b, |a, b| unsafe { _mm256_add_ps(a, b) })
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        both(a, b, |a, b| unsafe { _mm256_sub_ps(a, b) })
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both(a, b, |a, b| unsafe { _mm256_mul_ps(a, b) })
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        both(a, b, |a, b| unsafe { _mm256_div_ps(a, b) })
    }

    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        both(a, b, |a, b| unsafe { _mm256_max_ps(a, b) })
    }

    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        both(a, b, |a, b| unsafe { _mm256_min_ps(a, b) })
    }

    #[inline(always)]
    fn abs(self, a: F) -> F {
        a.map(|a| unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) })
    }

    #[inline(always)]
    fn mul_add(self, a: F, b: F, c: F) -> F {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn round_i32(self, a: F) -> I {
        // The default rounding mode is to nearest, ties to even, and Rust does not change it.
        a.map(|a| unsafe { _mm256_cvtps_epi32(a) })
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> I {
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn add_i32(self, a: I, b: I) -> I {
        both(a, b, |a, b| unsafe { _mm256_add_epi32(a, b) })
    }

    #[inline(always)]
    fn sub_i32(self, a: I, b: I) -> I {
        both(a, b, |a, b| unsafe { _mm256_sub_epi32(a, b) })
    }

    #[inline(always)]
    fn mul_i32(self, a: I, b: I) -> I {
        both(a, b, |a, b| unsafe { _mm256_mullo_epi32(a, b) })
    }

    #[inline(always)]
    fn to_f32(self, a: I) -> F {
        a.map(|a| unsafe { _mm256_cvtepi32_ps(a) })
    }

    #[inline(always)]
    fn exponent(self, a: I) -> F {
        a.map(|a| unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(a)) })
    }

    #[inline(always)]
    unsafe fn load_i32(self, p: *const i32) -> I {
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())] }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> I {
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))]
        }
    }

    #[inline(always)]
    unsafe fn store_i32(self, p: *mut i32, x: I) {
        unsafe {
            _mm256_storeu_si256(p.cast(), x[0]);
            _mm256_storeu_si256(p.add(8).cast(), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, x: I) {
        unsafe {
            // Low bytes of each dword gathered in each 128-bit lane, then the four lanes' dwords put together.
            let pick = _mm256_setr_epi8(
                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1,
                -1, -1, -1, -1, -1, -1, -1,
            );
            for (half, x) in x.into_iter().enumerate() {
                let bytes = _mm256_shuffle_epi8(x, pick);
                let low = _mm_cvtsi128_si32(_mm256_castsi256_si128(bytes));
                let high = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(bytes));
                p.add(8 * half).cast::<[i32; 2]>().write_unaligned([low, high]);
            }
        }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> I {
        unsafe { [_mm256_set1_epi8(x as i8); 2] }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a hint, which any address may be.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> I {
        unsafe { self.load_halves(p, p.add(32)) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, x: I) {
        unsafe { self.store_i32(p.cast(), x) }
    }

    #[inline(always)]
    unsafe fn load_halves(self, low: *const u8, high: *const u8) -> I {
        unsafe { [_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(high.cast())] }
    }

    #[inline(always)]
    unsafe fn load_quarters(self, p: [*const u8; 4]) -> I {
        unsafe {
            let half = |low: *const u8, high: *const u8| {
                _mm256_inserti128_si256::<1>(
                    _mm256_castsi128_si256(_mm_loadu_si128(low.cast())),
                    _mm_loadu_si128(high.cast()),
                )
            };
            [half(p[0], p[1]), half(p[2], p[3])]
        }
    }

    #[inline(always)]
    unsafe fn splat_4(self, p: *const i8) -> I {
        unsafe { [_mm256_set1_epi32(p.cast::<i32>().read_unaligned()); 2] }
    }

    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        both(a, b, |a, b| unsafe { _mm256_and_si256(a, b) })
    }

    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        both(a, b, |a, b| unsafe { _mm256_or_si256(a, b) })
    }

    #[inline(always)]
    fn shr<const N: u32>(self, a: I) -> I {
        a.map(|a| unsafe {
            let shifted = _mm256_srl_epi16(a, _mm_cvtsi32_si128(N as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8((0xFFu8 >> N) as i8))
        })
    }

    #[inline(always)]
    fn shl<const N: u32>(self, a: I) -> I {
        a.map(|a| unsafe {
            let shifted = _mm256_sll_epi16(a, _mm_cvtsi32_si128(N as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8((0xFFu8 << N) as i8))
        })
    }

    #[inline(always)]
    fn shr_high_half<const N: u32>(self, a: I) -> I {
        unsafe { [a[0], _mm256_srl_epi16(a[1], _mm_cvtsi32_si128(N as i32))] }
    }

    #[inline(always)]
    fn shr4_odd_quarters(self, a: I) -> I {
        a.map(|a| unsafe { _mm256_blend_epi32::<0b1111_0000>(a, _mm256_srli_epi16::<4>(a)) })
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: I) -> I {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            a.map(|a| _mm256_shuffle_epi8(table, _mm256_and_si256(a, _mm256_set1_epi8(15))))
        }
    }

    #[inline(always)]
    fn bits(self, bits: u64, value: u8) -> I {
        unsafe {
            // Byte i of a half takes byte i / 8 of the half's 32 bits, and of it bit i % 8.
            let take = _mm256_setr_epi8(
                0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3,
                3,
            );
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let half = |bits: i32| {
                let set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), take), bit);
                _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(value as i8))
            };
            [half(bits as i32), half((bits >> 32) as i32)]
        }
    }

    #[inline(always)]
    fn dot_u7(self, acc: I, q: I, a: I) -> I {
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let dot = both(q, a, |q, a| _mm256_madd_epi16(_mm256_maddubs_epi16(q, a), ones));
            self.add_i32(acc, dot)
        }
    }

    #[inline(always)]
    fn dot_i8(self, acc: I, w: I, a: I) -> I {
        // |w| <= 128 and |a| <= 127, so that no pair of products leaves 16 bits.
        let (magnitude, signed) = self.magnitudes(w, a);
        self.dot_u7(acc, magnitude, signed)
    }

    #[inline(always)]
    fn magnitudes(self, w: I, a: I) -> (I, I) {
        let magnitude = w.map(|w| unsafe { _mm256_abs_epi8(w) });
        (magnitude, both(a, w, |a, w| unsafe { _mm256_sign_epi8(a, w) }))
    }

    #[inline(always)]
    fn dot_i16(self, acc: I, a: I, b: I) -> I {
        self.add_i32(acc, both(a, b, |a, b| unsafe { _mm256_madd_epi16(a, b) }))
    }

    #[inline(always)]
    fn widen(self, bytes: u128) -> __m256i {
        unsafe { _mm256_cvtepi8_epi16(_mm_set_epi64x((bytes >> 64) as i64, bytes as i64)) }
    }

    #[inline(always)]
    unsafe fn load_w(self, p: *const i16) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    fn mul_w(self, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_mullo_epi16(a, b) }
    }

    #[inline(always)]
    fn dot_scaled<const SUB: usize>(self, acc: I, q: I, a: I, scales: __m256i, chunk: usize) -> I {
        unsafe {
            // The 128-bit half of the scales that this chunk uses, in both lanes; then each 16-bit lane of the
            // products picks its scale: `at` scales into that half.
            let first = first_scale(SUB, chunk);
            let half = if first < 8 {
                _mm256_permute2x128_si256::<0x00>(scales, scales)
            } else {
                _mm256_permute2x128_si256::<0x11>(scales, scales)
            };
            let at = |scale: usize| {
                let low = (2 * (first % 8 + scale)) as i16;
                low | (low + 1) << 8
            };
            let pick = |h: usize| {
                // SUB = 16: 16 products (8 lanes) a scale, two in a register; SUB = 32: one a register.
                let low = _mm256_set1_epi16(at(h * 32 / SUB));
                let high = _mm256_set1_epi16(at((h * 32 + 16) / SUB));
                _mm256_shuffle_epi8(half, _mm256_permute2x128_si256::<0x20>(low, high))
            };
            let products = both(q, a, |q, a| _mm256_maddubs_epi16(q, a));
            let dot = both(products, [pick(0), pick(1)], |p, s| _mm256_madd_epi16(p, s));
            self.add_i32(acc, dot)
        }
    }

    #[inline(always)]
    fn fold_beside(self, x: I, a: __m256i, b: __m256i) -> I {
        unsafe { [_mm256_add_epi32(x[0], x[1]), _mm256_madd_epi16(a, b)] }
    }

    #[inline(always)]
    fn sum_quads(self, x: [I; 4]) -> I {
        let half = |h: usize| unsafe {
            let (a, b, c, d) = (x[0][h], x[1][h], x[2][h], x[3][h]);
            let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
        };
        [half(0), half(1)]
    }

    #[inline(always)]
    fn transpose_quads(self, x: [I; 4]) -> [I; 4] {
        unsafe {
            let even = |h: usize, a: usize| _mm256_permute2x128_si256::<0x20>(x[a][h], x[a + 1][h]);
            let odd = |h: usize, a: usize| _mm256_permute2x128_si256::<0x31>(x[a][h], x[a + 1][h]);
            [
                [even(0, 0), even(0, 2)],
                [odd(0, 0), odd(0, 2)],
                [even(1, 0), even(1, 2)],
                [odd(1, 0), odd(1, 2)],
            ]
        }
    }

    #[inline(always)]
    fn transpose_lanes(self, x: [I; 4]) -> [I; 4] {
        let half = |h: usize| unsafe { transpose_4(x[0][h], x[1][h], x[2][h], x[3][h]) };
        let (low, high) = (half(0), half(1));
        [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
    }

    #[inline(always)]
    fn sum_halves(self, x: [I; 4]) -> (I, I) {
        let half = |h: usize| {
            let pair = |a: __m256i, b: __m256i| unsafe {
                let low = _mm256_permute2x128_si256::<0x20>(a, b);
                _mm256_add_epi32(low, _mm256_permute2x128_si256::<0x31>(a, b))
            };
            [pair(x[0][h], x[1][h]), pair(x[2][h], x[3][h])]
        };
        (half(0), half(1))
    }

    #[inline(always)]
    unsafe fn store_transposed(self, rows: &[I; 16], to: *mut u8) {
        // Eight rows × eight dwords at a time.
        for side in 0..2 {
            for h in [0, 1] {
                unsafe {
                    let r = |i: usize| rows[8 * side + i][h];
                    let top = transpose_4(r(0), r(1), r(2), r(3));
                    let bottom = transpose_4(r(4), r(5), r(6), r(7));
                    for j in 0..4 {
                        let low = _mm256_permute2x128_si256::<0x20>(top[j], bottom[j]);
                        let high = _mm256_permute2x128_si256::<0x31>(top[j], bottom[j]);
                        let at = |group: usize| to.add(group * 64 + side * 32).cast::<__m256i>();
                        _mm256_storeu_si256(at(8 * h + j), low);
                        _mm256_storeu_si256(at(8 * h + 4 + j), high);
                    }
                }
            }
        }
    }
}
