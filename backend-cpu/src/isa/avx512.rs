//! AVX-512 (F, BW, VL, DQ, VNNI): one register for each vector.

use super::{Isa, Level, Task, first_scale};
use std::arch::x86_64::*;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx512(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn run<T: Task>(isa: Avx512, task: T) -> T::Output {
    task.eval(isa)
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    (1u32 << n).wrapping_sub(1) as __mmask16
}

// SAFETY (of every intrinsic below): a value of `Avx512` exists only where `new` found the features; pointers are
// those that the caller of the method owes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl Isa for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type W = __m256i;

    const LEVEL: Level = Level::Avx512;
    const I8_OFFSET: i32 = 128;
    const FLOAT_TILE: usize = 4;
    const LOADS_F16: bool = true;
    const PANEL_TOKENS: usize = 8;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        unsafe { run(self, task) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(first(n), p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }

    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, x: __m512, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, first(n), x) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: __m512) {
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn round_i32(self, a: __m512) -> __m512i {
        unsafe { _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_sub_epi32(a, b) }
    }

    #[inline(always)]
    fn mul_i32(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_mullo_epi32(a, b) }
    }

    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn exponent(self, a: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(a)) }
    }

    #[inline(always)]
    unsafe fn load_i32(self, p: *const i32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn store_i32(self, p: *mut i32, x: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), x) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, x: __m512i) {
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(x)) }
    }

    #[inline(always)]
    fn splat_u8(self, x: u8) -> __m512i {
        unsafe { _mm512_set1_epi8(x as i8) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a hint, which any address may be.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, x: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), x) }
    }

    #[inline(always)]
    unsafe fn load_halves(self, low: *const u8, high: *const u8) -> __m512i {
        unsafe {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(low.cast()));
            _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(high.cast()))
        }
    }

    #[inline(always)]
    unsafe fn load_quarters(self, p: [*const u8; 4]) -> __m512i {
        unsafe {
            let x = _mm512_castsi128_si512(_mm_loadu_si128(p[0].cast()));
            let x = _mm512_inserti32x4::<1>(x, _mm_loadu_si128(p[1].cast()));
            let x = _mm512_inserti32x4::<2>(x, _mm_loadu_si128(p[2].cast()));
            _mm512_inserti32x4::<3>(x, _mm_loadu_si128(p[3].cast()))
        }
    }

    #[inline(always)]
    unsafe fn splat_4(self, p: *const i8) -> __m512i {
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn shr<const N: u32>(self, a: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<N>(a), _mm512_set1_epi8((0xFFu8 >> N) as i8)) }
    }

    #[inline(always)]
    fn shl<const N: u32>(self, a: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_slli_epi16::<N>(a), _mm512_set1_epi8((0xFFu8 << N) as i8)) }
    }

    #[inline(always)]
    fn shr_high_half<const N: u32>(self, a: __m512i) -> __m512i {
        unsafe { _mm512_mask_srli_epi16::<N>(a, 0xFFFF_0000, a) }
    }

    #[inline(always)]
    fn shr4_odd_quarters(self, a: __m512i) -> __m512i {
        unsafe { _mm512_mask_srli_epi16::<4>(a, 0xFF00_FF00, a) }
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], a: __m512i) -> __m512i {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, _mm512_and_si512(a, _mm512_set1_epi8(15)))
        }
    }

    #[inline(always)]
    fn bits(self, bits: u64, value: u8) -> __m512i {
        unsafe { _mm512_maskz_set1_epi8(bits, value as i8) }
    }

    #[inline(always)]
    fn dot_u7(self, acc: __m512i, q: __m512i, a: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, q, a) }
    }

    #[inline(always)]
    fn dot_i8(self, acc: __m512i, w: __m512i, a: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), a) }
    }

    #[inline(always)]
    fn magnitudes(self, w: __m512i, a: __m512i) -> (__m512i, __m512i) {
        unsafe {
            let negative = _mm512_movepi8_mask(w);
            (_mm512_abs_epi8(w), _mm512_mask_sub_epi8(a, negative, _mm512_setzero_si512(), a))
        }
    }

    #[inline(always)]
    fn dot_i16(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(acc, a, b) }
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
    fn dot_scaled<const SUB: usize>(
        self,
        acc: __m512i,
        q: __m512i,
        a: __m512i,
        scales: __m256i,
        chunk: usize,
    ) -> __m512i {
        unsafe {
            // Lane l of 32 takes the scale of bytes 2l and 2l + 1.
            let each = if SUB == 16 { SPREAD_16.as_ptr() } else { SPREAD_32.as_ptr() };
            let index = _mm512_add_epi16(
                _mm512_loadu_si512(each.cast()),
                _mm512_set1_epi16(first_scale(SUB, chunk) as i16),
            );
            let scales = _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(scales));
            _mm512_dpwssd_epi32(acc, _mm512_maddubs_epi16(q, a), scales)
        }
    }

    #[inline(always)]
    fn fold_beside(self, x: __m512i, a: __m256i, b: __m256i) -> __m512i {
        unsafe {
            let folded = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(folded), _mm256_madd_epi16(a, b))
        }
    }

    #[inline(always)]
    fn sum_quads(self, x: [__m512i; 4]) -> __m512i {
        unsafe {
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
            _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
        }
    }

    #[inline(always)]
    fn transpose_quads(self, x: [__m512i; 4]) -> [__m512i; 4] {
        unsafe {
            let low_01 = _mm512_shuffle_i32x4::<0b01_00_01_00>(x[0], x[1]);
            let high_01 = _mm512_shuffle_i32x4::<0b11_10_11_10>(x[0], x[1]);
            let low_23 = _mm512_shuffle_i32x4::<0b01_00_01_00>(x[2], x[3]);
            let high_23 = _mm512_shuffle_i32x4::<0b11_10_11_10>(x[2], x[3]);
            [
                _mm512_shuffle_i32x4::<0b10_00_10_00>(low_01, low_23),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(low_01, low_23),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(high_01, high_23),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(high_01, high_23),
            ]
        }
    }

    #[inline(always)]
    fn transpose_lanes(self, x: [__m512i; 4]) -> [__m512i; 4] {
        unsafe {
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
            [
                _mm512_unpacklo_epi64(ab_low, cd_low),
                _mm512_unpackhi_epi64(ab_low, cd_low),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ]
        }
    }

    #[inline(always)]
    fn sum_halves(self, x: [__m512i; 4]) -> (__m512i, __m512i) {
        // 0b10_00_10_00 takes the 128-bit lanes 0 and 2 of both operands, 0b11_01_11_01 the lanes 1 and 3.
        unsafe {
            let pair = |a, b| {
                let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                _mm512_add_epi32(even, _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
            };
            let (a, b) = (pair(x[0], x[1]), pair(x[2], x[3]));
            (_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
        }
    }

    #[inline(always)]
    unsafe fn store_transposed(self, rows: &[__m512i; 16], to: *mut u8) {
        // `quads[g][j]` holds, in its 128-bit lane l, column 4l + j of rows 4g .. 4g + 4.
        let quad = |g: usize| self.transpose_lanes([rows[g], rows[g + 1], rows[g + 2], rows[g + 3]]);
        let [a, b, c, d] = [quad(0), quad(4), quad(8), quad(12)];
        for (j, ((a, b), (c, d))) in a.into_iter().zip(b).zip(c.into_iter().zip(d)).enumerate() {
            let columns = self.transpose_quads([a, b, c, d]);
            for (l, column) in columns.into_iter().enumerate() {
                unsafe { _mm512_storeu_si512(to.add((4 * l + j) * 64).cast(), column) }
            }
        }
    }
}

static SPREAD_16: [i16; 32] = spread(8);
static SPREAD_32: [i16; 32] = spread(16);

const fn spread(lanes: usize) -> [i16; 32] {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = (i / lanes) as i16;
        i += 1;
    }
    table
}
