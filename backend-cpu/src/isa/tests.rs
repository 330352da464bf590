//! Every vector operation of every instruction set at hand against [`Portable`].

use super::*;

/// A small deterministic generator (splitmix64): tests need no distribution, only variety.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// In -1 to 1.
    pub(crate) fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

struct Everything {
    seed: u64,
}

impl Task for Everything {
    type Output = Vec<u32>;

    #[inline(always)]
    fn eval<S: Isa>(self, s: S) -> Vec<u32> {
        let mut random = Random(self.seed);
        let mut out: Vec<u32> = Vec::new();
        let floats: Vec<f32> = (0..48).map(|_| random.f32() * 100.0).collect();
        let any: Vec<u8> = (0..1024).map(|_| random.next() as u8).collect();
        let acts: Vec<i8> = (0..256).map(|_| (random.next() % 255) as i8).map(|x| x.max(-127)).collect();
        let table: [i8; 16] = std::array::from_fn(|_| random.next() as i8);
        let words: [i16; 32] = std::array::from_fn(|_| (random.next() % 4000) as i16 - 2000);
        // SAFETY: every pointer stays inside the arrays above, or inside the local outputs.
        unsafe {
            let f = |out: &mut Vec<u32>, x: S::F| {
                let mut lanes = [0f32; 16];
                s.store(lanes.as_mut_ptr(), x);
                out.extend(lanes.map(f32::to_bits));
            };
            let i = |out: &mut Vec<u32>, x: S::I| {
                let mut lanes = [0i32; 16];
                s.store_i32(lanes.as_mut_ptr(), x);
                out.extend(lanes.map(|x| x as u32));
            };
            let b = |out: &mut Vec<u32>, x: S::B| {
                let mut bytes = [0u8; 64];
                s.store_bytes(bytes.as_mut_ptr(), x);
                out.extend(bytes.map(u32::from));
            };
            let (x, y) = (s.load(floats.as_ptr()), s.load(floats.as_ptr().add(17)));
            for v in [s.add(x, y), s.sub(x, y), s.mul(x, y), s.div(x, y), s.max(x, y), s.min(x, y), s.abs(x)]
            {
                f(&mut out, v);
            }
            f(&mut out, s.splat(1.5));
            out.extend([s.sum(x), s.max_lane(x)].map(f32::to_bits));
            for n in 0..=16 {
                f(&mut out, s.load_first(floats.as_ptr(), n));
                let mut lanes = [7f32; 16];
                s.store_first(lanes.as_mut_ptr(), y, n);
                out.extend(lanes.map(f32::to_bits));
            }
            let mut halves = [0u16; 16];
            s.store_f16(halves.as_mut_ptr(), x);
            out.extend(halves.map(u32::from));
            f(&mut out, s.load_f16(halves.as_ptr()));
            f(&mut out, s.load_bf16(halves.as_ptr()));
            let (p, q) = (s.round_i32(x), s.round_i32(y));
            for v in [p, s.add_i32(p, q), s.sub_i32(p, q), s.mul_i32(p, q), s.splat_i32(-3)] {
                i(&mut out, v);
                f(&mut out, s.to_f32(v));
            }
            // Fused or not: of whole numbers, to the bit.
            f(&mut out, s.mul_add(s.to_f32(p), s.to_f32(q), s.to_f32(s.sub_i32(p, q))));
            let ramp: [i32; 16] = std::array::from_fn(|i| 120 + i as i32);
            f(&mut out, s.exponent(s.load_i32(ramp.as_ptr())));
            let mut low = [0i8; 16];
            s.store_i8(low.as_mut_ptr(), p);
            i(&mut out, s.load_i8(acts.as_ptr().add(3)));
            out.extend(low.map(|x| x as u32));
            let (u, v) = (s.load_bytes(any.as_ptr()), s.load_bytes(any.as_ptr().add(33)));
            let at = |n: usize| any.as_ptr().add(n);
            for w in [
                u,
                s.and(u, v),
                s.or(u, v),
                s.shr::<4>(u),
                s.shr::<2>(u),
                s.shl::<4>(u),
                s.shl::<1>(u),
                s.and(s.shr_high_half::<4>(u), s.splat_u8(15)),
                s.and(s.shr_high_half::<1>(u), s.splat_u8(16)),
                s.and(s.shr4_odd_quarters(u), s.splat_u8(15)),
                s.lookup(&table, u),
                s.bits(0x8123_4567_89AB_CDEF, 16),
                s.load_halves(at(5), at(99)),
                s.load_quarters([at(1), at(50), at(3), at(200)]),
                s.splat_4(acts.as_ptr()),
            ] {
                b(&mut out, w);
            }
            let a = s.load_bytes(acts.as_ptr().cast());
            let q7 = s.and(u, s.splat_u8(127));
            i(&mut out, s.dot_u7(p, q7, a));
            // Without the offset that an instruction set may add.
            let ones = s.dot_u7(s.splat_i32(0), s.splat_u8(1), a);
            let offset = s.mul_i32(ones, s.splat_i32(S::I8_OFFSET));
            i(&mut out, s.sub_i32(s.dot_i8(p, u, a), offset));
            // Where a weight is zero, either sign may stand beside it.
            let (magnitude, signed) = s.magnitudes(s.lookup(&table, u), a);
            b(&mut out, magnitude);
            i(&mut out, s.dot_u7(p, magnitude, signed));
            i(&mut out, s.dot_i16(p, u, v));
            let (w0, w1) = (s.load_w(words.as_ptr()), s.widen(u128::from_le_bytes(table.map(|x| x as u8))));
            for chunk in 0..4 {
                i(&mut out, s.dot_scaled::<16>(p, q7, a, w1, chunk));
                i(&mut out, s.dot_scaled::<32>(p, q7, a, w1, chunk));
            }
            i(&mut out, s.fold_beside(p, w0, s.load_w(words.as_ptr().add(16))));
            let quads = s.sum_quads([p, q, s.add_i32(p, q), s.sub_i32(p, q)]);
            i(&mut out, quads);
            for v in s.transpose_lanes([quads, p, q, s.splat_i32(1)]) {
                i(&mut out, v);
            }
            for v in s.transpose_quads([quads, p, q, s.splat_i32(1)]) {
                i(&mut out, v);
            }
            i(&mut out, s.dot_scaled::<16>(p, q7, a, s.mul_w(w1, s.load_w([3; 16].as_ptr())), 1));
            let (low, high) = s.sum_halves([quads, p, q, s.splat_i32(1)]);
            i(&mut out, low);
            i(&mut out, high);
            let rows: [S::B; 16] = std::array::from_fn(|r| s.load_bytes(at(r * 50)));
            let mut panel = [0u8; 1024];
            s.store_transposed(&rows, panel.as_mut_ptr());
            out.extend(panel.map(u32::from));
        }
        out
    }
}

/// What random numbers do not meet: ties, denormals, zeros of either sign, overflow, and what is no number.
struct Oddities;

impl Task for Oddities {
    type Output = Vec<u32>;

    #[inline(always)]
    fn eval<S: Isa>(self, s: S) -> Vec<u32> {
        let ties: [f32; 16] = std::array::from_fn(|i| i as f32 - 7.5);
        let odd = [
            0.0,
            -0.0,
            1.0,
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            // Of f16: the largest, two that round to it and beyond it, the smallest, half of it and a bit more, two ties.
            65504.0,
            65519.9,
            65520.0,
            5.960_464_5e-8,
            2.980_232_2e-8,
            2.980_233e-8,
            1.000_488_3,
            1.001_464_8,
            f32::MIN_POSITIVE,
            1e-40,
        ];
        // Which NaN it is does not matter.
        let same = |bits: u32| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
        let mut out = Vec::new();
        // SAFETY: every pointer is to 16 lanes.
        unsafe {
            let (ties, odd) = (s.load(ties.as_ptr()), s.load(odd.as_ptr()));
            let mut rounded = [0i32; 16];
            s.store_i32(rounded.as_mut_ptr(), s.round_i32(ties));
            out.extend(rounded.map(|lane| lane as u32));
            for other in [s.splat(0.0), s.splat(-0.0), s.splat(f32::NAN), s.splat(1.0), ties] {
                let both = [(odd, other), (other, odd)];
                for v in both.map(|(a, b)| [s.max(a, b), s.min(a, b), s.mul_add(a, b, odd)]).concat() {
                    let mut lanes = [0f32; 16];
                    s.store(lanes.as_mut_ptr(), v);
                    out.extend(lanes.map(|lane| same(lane.to_bits())));
                }
            }
            let mut halves = [0u16; 16];
            s.store_f16(halves.as_mut_ptr(), odd);
            let mut back = [0f32; 16];
            s.store(back.as_mut_ptr(), s.load_f16(halves.as_ptr()));
            out.extend(back.map(|lane| same(lane.to_bits())));
        }
        out
    }
}

#[test]
fn odd_numbers_are_treated_alike() {
    let expected = Portable.run(Oddities);
    let rounded: [i32; 16] = std::array::from_fn(|lane| expected[lane] as i32);
    assert_eq!(rounded, [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8], "ties to even");
    let halves = &expected[expected.len() - 16..];
    let largest = 65504f32.to_bits();
    assert_eq!(halves[6..9], [largest, largest, f32::INFINITY.to_bits()]);
    assert_eq!(halves[9..12], [2f32.powi(-24), 0.0, 2f32.powi(-24)].map(f32::to_bits));
    assert_eq!(halves[12..14], [1.0, 1.001_953_1].map(f32::to_bits), "ties to even");
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(isa) = Avx2::new() {
            assert_eq!(isa.run(Oddities), expected, "avx2");
        }
        if let Some(isa) = Avx512::new() {
            assert_eq!(isa.run(Oddities), expected, "avx512");
        }
    }
}

#[test]
fn every_operation_equals_the_portable_one() {
    for seed in 0..50 {
        let expected = Portable.run(Everything { seed });
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(isa) = Avx2::new() {
                assert_eq!(isa.run(Everything { seed }), expected, "avx2, seed {seed}");
            }
            if let Some(isa) = Avx512::new() {
                assert_eq!(isa.run(Everything { seed }), expected, "avx512, seed {seed}");
            }
        }
    }
}
