//! The exponential function in vector operations.

use crate::isa::Isa;

/// `exp(x)` of 16 lanes, within 2 ulp where the result is a normal number. 0 below about -104 and at -∞, ∞ above
/// about 88.72, NaN at NaN.
///
/// `exp(x) = 2ⁿ × exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`, where `exp(r) = 1 + r + r² q(r)`.
#[inline(always)]
pub(crate) fn exp<S: Isa>(isa: S, x: S::F) -> S::F {
    /// Minimax coefficients of q for the relative error of `1 + r + r² q(r)`, 3e-9.
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_454];
    /// ln 2 in two parts; the product of n with the first is exact.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];

    // A NaN passes both: `max` and `min` take the second operand then.
    let x = isa.min(isa.splat(89.0), isa.max(isa.splat(-104.5), x));
    let n = isa.round_i32(isa.mul(x, isa.splat(std::f32::consts::LOG2_E)));
    let whole = isa.to_f32(n);
    let r = isa.mul_add(whole, isa.splat(-LN_2[0]), x);
    let r = isa.mul_add(whole, isa.splat(-LN_2[1]), r);
    let mut q = isa.splat(Q[4]);
    q = isa.mul_add(q, r, isa.splat(Q[3]));
    q = isa.mul_add(q, r, isa.splat(Q[2]));
    q = isa.mul_add(q, r, isa.splat(Q[1]));
    q = isa.mul_add(q, r, isa.splat(Q[0]));
    let tail = isa.mul_add(isa.mul(r, r), q, r);
    let result = isa.add(tail, isa.splat(1.0));
    // 2ⁿ in two factors: n reaches from -151 to 128, beyond the exponents of f32 on both sides.
    let half = isa.round_i32(isa.mul(whole, isa.splat(0.5)));
    let bias = isa.splat_i32(127);
    let first = isa.exponent(isa.add_i32(half, bias));
    let second = isa.exponent(isa.add_i32(isa.sub_i32(n, half), bias));
    isa.mul(isa.mul(result, first), second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{isa::Task, kernels::testing::each_isa};

    struct Exp<'a>(&'a [f32], &'a mut [f32]);
    impl Task for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn eval<S: Isa>(self, isa: S) {
            for (x, y) in self.0.chunks(16).zip(self.1.chunks_mut(16)) {
                // SAFETY: the chunks are as long as stated.
                unsafe {
                    let x = isa.load_first(x.as_ptr(), x.len());
                    isa.store_first(y.as_mut_ptr(), exp(isa, x), y.len());
                }
            }
        }
    }

    fn all_levels(x: &[f32], check: impl Fn(&str, f32, f32)) {
        each_isa(|level, run| {
            let mut y = vec![f32::NAN; x.len()];
            run.run(Exp(x, &mut y));
            x.iter().zip(&y).for_each(|(&x, &y)| check(level.name(), x, y));
        });
    }

    #[test]
    fn within_two_ulp() {
        let n = 400_000;
        let x: Vec<f32> = (0..=n).map(|i| -88.0 + 176.7 * i as f32 / n as f32).collect();
        all_levels(&x, |level, x, y| {
            let exact = f64::from(x).exp();
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            let ulps = (f64::from(y) - exact).abs() / ulp;
            assert!(ulps < 2.0, "{level}: exp({x}) = {y}, {ulps} ulp off");
        });
    }

    #[test]
    fn small_arguments_are_near_one() {
        all_levels(&[0.0, -0.0, 1e-30, -1e-30, 1e-8], |level, x, y| assert_eq!(y, 1.0, "{level}: {x}"));
    }

    #[test]
    fn limits() {
        let inf = f32::INFINITY;
        let cases =
            [(-inf, 0.0), (inf, inf), (-1e30, 0.0), (-104.5, 0.0), (88.73, inf), (89.0, inf), (1e30, inf)];
        let (x, want): (Vec<f32>, Vec<f32>) = cases.into_iter().unzip();
        all_levels(&x, |level, x, y| {
            let place = cases.iter().position(|case| case.0 == x).expect("one of the cases");
            assert_eq!(y, want[place], "{level}: exp({x})");
        });
        all_levels(&[f32::NAN, -f32::NAN], |level, _, y| assert!(y.is_nan(), "{level}: exp(NaN) = {y}"));
        all_levels(&[88.722_83, 88.7], |level, x, y| assert!(y.is_finite(), "{level}: exp({x}) = {y}"));
        // Subnormal results lose bits, but not their size.
        all_levels(&[-88.0, -95.0, -103.0], |level, x, y| {
            let exact = f64::from(x).exp();
            assert!((f64::from(y) - exact).abs() <= 1.5e-45, "{level}: exp({x}) = {y:e}, not {exact:e}");
        });
    }
}
