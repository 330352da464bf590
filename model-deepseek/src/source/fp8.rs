//! FP8 weights with block scales, as the DeepSeek-V3 checkpoints have them: e4m3 values ("fn": no infinities), and
//! one f32 factor (`weight_scale_inv`) for each block of 128 × 128.

use super::error::Flaw;
use half::f16;

/// The value of an e4m3 code: a sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN.
pub(super) fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The f16 nearest to the exact product `value * scale`, ties to even.
///
/// The product has at most 28 significant bits and is exact in f64. Rounding it to f32 on the way could make a tie
/// where there was none; so that step cuts instead, and keeps in the last bit that something was cut off.
fn nearest_f16(value: f32, scale: f32) -> f16 {
    let exact = f64::from(value) * f64::from(scale);
    let near = exact as f32;
    let cut = near.to_bits() - u32::from(f64::from(near).abs() > exact.abs());
    let lost = f64::from(f32::from_bits(cut)) != exact;
    f16::from_f32(f32::from_bits(cut | u32::from(lost)))
}

/// A matrix in FP8.
pub(super) struct Fp8<'a> {
    /// `[rows, cols]`
    pub(super) codes: &'a [u8],
    pub(super) cols: usize,
    /// f32, little-endian, `[rows / block rows, cols / block cols]`, both rounded up.
    pub(super) scales: &'a [u8],
    /// Rows and columns that share a scale.
    pub(super) block: [usize; 2],
}

impl Fp8<'_> {
    /// Writes the values as little-endian f16 to `out` (two bytes a value): the exact product of code and scale,
    /// rounded to the nearest f16. That is far finer than the three bits of mantissa of the codes.
    ///
    /// # Errors
    /// A value that is no finite f16.
    pub(super) fn to_f16(&self, out: &mut [u8]) -> Result<(), Flaw> {
        let [block_rows, block_cols] = self.block;
        let band = self.cols * block_rows;
        let scale_row = self.cols.div_ceil(block_cols) * 4;
        let bands = self.codes.chunks(band).zip(out.chunks_mut(2 * band)).zip(self.scales.chunks(scale_row));
        for (index, ((codes, out), scales)) in bands.enumerate() {
            for (block, scale) in scales.as_chunks().0.iter().enumerate() {
                let scale = f32::from_le_bytes(*scale);
                // 256 products for up to 16,384 values.
                let table: [f16; 256] = std::array::from_fn(|code| nearest_f16(e4m3(code as u8), scale));
                let columns = block * block_cols..self.cols.min((block + 1) * block_cols);
                let mut finite = true;
                for (codes, out) in codes.chunks(self.cols).zip(out.chunks_mut(2 * self.cols)) {
                    let out = out[2 * columns.start..2 * columns.end].as_chunks_mut::<2>().0;
                    for (&code, out) in codes[columns.clone()].iter().zip(out) {
                        let value = table[usize::from(code)];
                        finite &= value.is_finite();
                        *out = value.to_le_bytes();
                    }
                }
                if !finite {
                    let found = format!("NaN or an overflow in block [{index}, {block}] of scale {scale}");
                    return Err(Flaw::new("values that fit in f16", found));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_their_values() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!(e4m3(0x80).to_bits(), (-0f32).to_bits());
        let rising: Vec<f32> = (0..0x7f).map(e4m3).collect();
        assert!(rising.windows(2).all(|pair| pair[0] < pair[1]));
    }

    /// Of the two f16 around the exact product none is nearer than the one chosen, and ties go to even.
    #[test]
    fn products_are_rounded_once() {
        let mut state = 1u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let value = e4m3((state >> 56) as u8 & 0x7e);
            let scale =
                f32::from_bits(((state >> 20) as u32 & 0x007f_ffff) | (105 + (state as u32 >> 28)) << 23);
            let exact = f64::from(value) * f64::from(scale);
            let chosen = nearest_f16(value, scale);
            let distance = |bits: u16| (f16::from_bits(bits).to_f64() - exact).abs();
            let bits = chosen.to_bits();
            for other in [bits.saturating_sub(1), bits + 1] {
                if f16::from_bits(other).is_finite() && other != bits {
                    assert!(distance(bits) <= distance(other), "{value} * {scale} = {exact}: {chosen}");
                    assert!(distance(bits) < distance(other) || bits & 1 == 0, "{value} * {scale}: a tie");
                }
            }
        }
    }

    /// An exact tie of f16, plus one bit that f32 cannot hold, is no tie.
    #[test]
    fn double_rounding_does_not_happen() {
        let scale = f32::from_bits(0x3f80_0000 | (1 << 12) | 1); // 1 + 2^-11 + 2^-23
        assert_eq!(nearest_f16(1.0, scale).to_bits(), 0x3c01);
        assert_eq!(nearest_f16(1.0, f32::from_bits(0x3f80_0000 | (1 << 12))).to_bits(), 0x3c00);
        let wide = 1.875 * f64::from(f32::from_bits(0x3f80_0fff));
        let chosen = nearest_f16(1.875, f32::from_bits(0x3f80_0fff)).to_f64();
        assert!((chosen - wide).abs() <= 2f64.powi(-11));
    }

    #[test]
    fn blocks_use_their_scales_and_bad_values_are_refused() {
        let codes = [0x38u8; 3 * 5];
        let scales: Vec<u8> = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = [0; 30];
        Fp8 { codes: &codes, cols: 5, scales: &scales, block: [2, 2] }.to_f16(&mut out).unwrap();
        let values: Vec<f32> =
            out.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect();
        assert_eq!(values, [1., 1., 2., 2., 3., 1., 1., 2., 2., 3., 4., 4., 5., 5., 6.]);
        for (code, scale) in [(0x7f, 1f32), (0xff, 1.0), (0x7e, 1000.0), (0x38, f32::NAN)] {
            let scales = scale.to_le_bytes();
            let wrong = Fp8 { codes: &[code], cols: 1, scales: &scales, block: [128, 128] };
            assert!(wrong.to_f16(&mut [0; 2]).is_err(), "{code:#x} * {scale}");
        }
        Fp8 { codes: &[0x7e], cols: 1, scales: &0f32.to_le_bytes(), block: [128, 128] }
            .to_f16(&mut [0; 2])
            .unwrap();
    }
}
