//! FP8 weights with block scales, as the DeepSeek-V3 checkpoints have them: e4m3 values ("fn": no infinities), and
//! one f32 factor (`weight_scale_inv`) for each block of 128 × 128.

use super::error::Flaw;
use rayon::prelude::*;

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
    /// Writes the values as little-endian f32 to `out` (four bytes a value): the product of code and scale, rounded
    /// once. A narrower format would round what the checkpoint says.
    ///
    /// # Errors
    /// A value that is not finite.
    pub(super) fn to_f32(&self, out: &mut [u8]) -> Result<(), Flaw> {
        let [block_rows, block_cols] = self.block;
        let band = self.cols * block_rows;
        let scale_row = self.cols.div_ceil(block_cols) * 4;
        let bands = self.codes.par_chunks(band).zip(out.par_chunks_mut(4 * band));
        let bands = bands.zip(self.scales.par_chunks(scale_row)).enumerate();
        // The first flaw there is, not the first to be found.
        let flaw = bands.find_map_first(|(index, ((codes, out), scales))| {
            for (block, scale) in scales.as_chunks().0.iter().enumerate() {
                let scale = f32::from_le_bytes(*scale);
                // 256 products for up to 16,384 values.
                let table: [f32; 256] = std::array::from_fn(|code| e4m3(code as u8) * scale);
                let columns = block * block_cols..self.cols.min((block + 1) * block_cols);
                let mut finite = true;
                for (codes, out) in codes.chunks(self.cols).zip(out.chunks_mut(4 * self.cols)) {
                    let out = out[4 * columns.start..4 * columns.end].as_chunks_mut().0;
                    for (&code, out) in codes[columns.clone()].iter().zip(out) {
                        let value = table[usize::from(code)];
                        finite &= value.is_finite();
                        *out = value.to_le_bytes();
                    }
                }
                if !finite {
                    let found = format!("NaN or an overflow in block [{index}, {block}] of scale {scale}");
                    return Some(Flaw::new("finite values", found));
                }
            }
            None
        });
        flaw.map_or(Ok(()), Err)
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

    #[test]
    fn blocks_use_their_scales_and_bad_values_are_refused() {
        let codes = [0x38u8; 3 * 5];
        let scales: Vec<u8> = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = [0; 60];
        Fp8 { codes: &codes, cols: 5, scales: &scales, block: [2, 2] }.to_f32(&mut out).unwrap();
        let values: Vec<f32> = out.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert_eq!(values, [1., 1., 2., 2., 3., 1., 1., 2., 2., 3., 4., 4., 5., 5., 6.]);
        for (code, scale) in [(0x7f, 1f32), (0xff, 1.0), (0x7e, 1e38), (0x38, f32::NAN)] {
            let scales = scale.to_le_bytes();
            let wrong = Fp8 { codes: &[code], cols: 1, scales: &scales, block: [128, 128] };
            assert!(wrong.to_f32(&mut [0; 4]).is_err(), "{code:#x} * {scale}");
        }
        Fp8 { codes: &[0x7e], cols: 1, scales: &0f32.to_le_bytes(), block: [128, 128] }
            .to_f32(&mut [0; 4])
            .unwrap();
    }
}
