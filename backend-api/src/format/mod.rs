//! Scalar encoding and decoding of each format: the one definition that kernels and tests are held against.
//!
//! A row is a sequence of blocks, each of which carries its own scales ([`DType::block_len`],
//! [`DType::block_bytes`]). Every block is also a plain struct of bytes (alignment 1), so that a kernel may view
//! a row of a mapped file as `&[BlockQ4_K]` with [`bytemuck::cast_slice`], wherever it starts. All numbers are
//! little-endian.
//!
//! **Decoding** is exact: it gives the bits that the `gguf` Python package gives. Each value is computed in f32
//! by the formula at its block, one rounding per operation, from left to right, never fused.
//!
//! **Encoding** is a search for small squared error, deterministic but not that of any other program. Only
//! Q8_0, which caches are stored in, is fixed to the bit; see [`BlockQ8_0`].
//!
//! ```
//! use backend_api::{DType, format};
//!
//! let row: Vec<f32> = (0..256).map(|i| (i as f32 * 0.1).sin()).collect();
//! let mut bytes = vec![0; DType::Q4_K.row_bytes(row.len())];
//! format::encode(DType::Q4_K, &row, &mut bytes);
//!
//! let mut decoded = vec![0.0; row.len()];
//! format::decode(DType::Q4_K, &bytes, &mut decoded);
//! assert!(row.iter().zip(&decoded).all(|(a, b)| (a - b).abs() < 0.1));
//! ```

mod fit;
mod float;
mod iq4;
mod k_quants;
mod legacy;

pub use iq4::{BlockIQ4_NL, BlockIQ4_XS, IQ4_VALUES};
pub use k_quants::{BlockQ2_K, BlockQ3_K, BlockQ4_K, BlockQ5_K, BlockQ6_K, k_scales_mins};
pub use legacy::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};

use crate::DType;
use bytemuck::Pod;
use half::f16;

/// A block of `LEN` values as it lies in memory.
pub trait Block<const LEN: usize>: Pod {
    /// The values.
    fn decode(&self) -> [f32; LEN];

    /// The block that decodes to about these values. Others than [`BlockQ8_0`] need them to be finite, and do not
    /// show where they are not.
    fn encode(values: &[f32; LEN]) -> Self;
}

/// Decodes the first `out.len()` values of a row; what its last block holds beyond them is dropped.
///
/// # Panics
/// If `bytes` is not [`row_bytes(out.len())`](DType::row_bytes) long, or for I32, which is no number format.
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    check_row(dtype, bytes.len(), out.len());
    match dtype {
        DType::F32 => float::decode_f32(bytes, out),
        DType::F16 => float::decode_f16(bytes, out),
        DType::BF16 => float::decode_bf16(bytes, out),
        DType::Q4_0 => decode_blocks::<BlockQ4_0, _>(bytes, out),
        DType::Q4_1 => decode_blocks::<BlockQ4_1, _>(bytes, out),
        DType::Q5_0 => decode_blocks::<BlockQ5_0, _>(bytes, out),
        DType::Q5_1 => decode_blocks::<BlockQ5_1, _>(bytes, out),
        DType::Q8_0 => decode_blocks::<BlockQ8_0, _>(bytes, out),
        DType::Q2_K => decode_blocks::<BlockQ2_K, _>(bytes, out),
        DType::Q3_K => decode_blocks::<BlockQ3_K, _>(bytes, out),
        DType::Q4_K => decode_blocks::<BlockQ4_K, _>(bytes, out),
        DType::Q5_K => decode_blocks::<BlockQ5_K, _>(bytes, out),
        DType::Q6_K => decode_blocks::<BlockQ6_K, _>(bytes, out),
        DType::IQ4_NL => decode_blocks::<BlockIQ4_NL, _>(bytes, out),
        DType::IQ4_XS => decode_blocks::<BlockIQ4_XS, _>(bytes, out),
        DType::I32 => unreachable!("check_row refuses I32"),
    }
}

/// Encodes one row of values; the last block is padded with zeros. NaN and infinities survive in F32, F16 and BF16,
/// are both NaN in Q8_0, which caches are stored in, and get lost in the searches of other formats.
///
/// # Panics
/// If `out` is not [`row_bytes(values.len())`](DType::row_bytes) long, or for I32, which is no number format.
pub fn encode(dtype: DType, values: &[f32], out: &mut [u8]) {
    check_row(dtype, out.len(), values.len());
    match dtype {
        DType::F32 => float::encode_f32(values, out),
        DType::F16 => float::encode_f16(values, out),
        DType::BF16 => float::encode_bf16(values, out),
        DType::Q4_0 => encode_blocks::<BlockQ4_0, _>(values, out),
        DType::Q4_1 => encode_blocks::<BlockQ4_1, _>(values, out),
        DType::Q5_0 => encode_blocks::<BlockQ5_0, _>(values, out),
        DType::Q5_1 => encode_blocks::<BlockQ5_1, _>(values, out),
        DType::Q8_0 => encode_blocks::<BlockQ8_0, _>(values, out),
        DType::Q2_K => encode_blocks::<BlockQ2_K, _>(values, out),
        DType::Q3_K => encode_blocks::<BlockQ3_K, _>(values, out),
        DType::Q4_K => encode_blocks::<BlockQ4_K, _>(values, out),
        DType::Q5_K => encode_blocks::<BlockQ5_K, _>(values, out),
        DType::Q6_K => encode_blocks::<BlockQ6_K, _>(values, out),
        DType::IQ4_NL => encode_blocks::<BlockIQ4_NL, _>(values, out),
        DType::IQ4_XS => encode_blocks::<BlockIQ4_XS, _>(values, out),
        DType::I32 => unreachable!("check_row refuses I32"),
    }
}

/// The f16 number that a block stores as two bytes.
pub fn half(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

/// The nearest f16 number, ties to even; what is too large becomes the largest finite one, so that no block
/// holds an infinite scale.
fn to_half(value: f32) -> [u8; 2] {
    let largest = f16::MAX.to_f32();
    f16::from_f32(value.clamp(-largest, largest)).to_le_bytes()
}

fn check_row(dtype: DType, bytes: usize, values: usize) {
    assert!(dtype != DType::I32, "I32 is no number format");
    let expected = dtype.row_bytes(values);
    assert!(bytes == expected, "{values} values of {dtype} take {expected} bytes, found {bytes}");
}

fn decode_blocks<B: Block<LEN>, const LEN: usize>(bytes: &[u8], out: &mut [f32]) {
    let blocks: &[B] = bytemuck::cast_slice(bytes);
    for (block, out) in blocks.iter().zip(out.chunks_mut(LEN)) {
        out.copy_from_slice(&block.decode()[..out.len()]);
    }
}

fn encode_blocks<B: Block<LEN>, const LEN: usize>(values: &[f32], out: &mut [u8]) {
    let blocks: &mut [B] = bytemuck::cast_slice_mut(out);
    for (block, values) in blocks.iter_mut().zip(values.chunks(LEN)) {
        let mut padded = [0.0; LEN];
        padded[..values.len()].copy_from_slice(values);
        *block = B::encode(&padded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that look like weights: about normal, with a few outliers.
    fn weights(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..12).map(|_| uniform()).sum()).collect()
    }

    fn round_trip(dtype: DType, values: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0xAA; dtype.row_bytes(values.len())];
        encode(dtype, values, &mut bytes);
        let mut decoded = vec![f32::NAN; values.len()];
        decode(dtype, &bytes, &mut decoded);
        decoded
    }

    fn relative_rms(values: &[f32], decoded: &[f32]) -> f64 {
        let error: f64 = values.iter().zip(decoded).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let power: f64 = values.iter().map(|a| f64::from(*a).powi(2)).sum();
        (error / power).sqrt()
    }

    /// Relative RMS error on normal values: what the searches reached when they were written, and 2 %. For
    /// comparison, the best quantiser of normal values without block scales (Max, 1960) has 0.343 with 4 levels,
    /// 0.186 with 8, 0.097 with 16, 0.050 with 32 and 0.026 with 64.
    const ERRORS: [(DType, f64); 15] = [
        (DType::F32, 0.0),
        (DType::F16, 0.000_22),
        (DType::BF16, 0.001_75),
        (DType::Q4_0, 0.0795),
        (DType::Q4_1, 0.0697),
        (DType::Q5_0, 0.0397),
        (DType::Q5_1, 0.0336),
        (DType::Q8_0, 0.0054),
        (DType::Q2_K, 0.2715),
        (DType::Q3_K, 0.1424),
        (DType::Q4_K, 0.0711),
        (DType::Q5_K, 0.0358),
        (DType::Q6_K, 0.0176),
        (DType::IQ4_NL, 0.0745),
        (DType::IQ4_XS, 0.0753),
    ];

    #[test]
    fn errors_are_near_what_the_levels_allow() {
        for (dtype, bound) in ERRORS {
            for scale in [1.0, 0.02, 3e-3, 500.0] {
                let values: Vec<f32> = weights(8192, 1).iter().map(|v| v * scale).collect();
                let error = relative_rms(&values, &round_trip(dtype, &values));
                assert!(error <= bound, "{dtype} at scale {scale}: relative RMS {error:.4} > {bound}");
            }
        }
    }

    #[test]
    fn every_weight_format_is_bounded() {
        assert_eq!(ERRORS.map(|(dtype, _)| dtype), DType::WEIGHTS);
    }

    #[test]
    fn zeros_stay_zeros() {
        for dtype in DType::WEIGHTS {
            for value in [0.0, -0.0, 1e-30] {
                let decoded = round_trip(dtype, &[value; 256]);
                assert!(decoded.iter().all(|v| v.abs() <= 1e-30), "{dtype}: {value} became {decoded:?}");
            }
        }
    }

    #[test]
    fn constants_spikes_and_extremes_stay_close() {
        let mut spike = [0.0; 256];
        spike[77] = -3.0;
        let ramp: [f32; 256] = std::array::from_fn(|i| i as f32 - 100.0);
        let rows = [[1.0; 256], [-1.0; 256], spike, ramp, [60000.0; 256], [-2e-4; 256]];
        for dtype in DType::WEIGHTS {
            for row in &rows {
                let decoded = round_trip(dtype, row);
                let error = relative_rms(row, &decoded);
                assert!(error < 0.4, "{dtype}: {:?}… became {:?}…, {error}", &row[..2], &decoded[..2]);
            }
        }
    }

    #[test]
    fn huge_values_saturate_to_finite_ones() {
        let mut row = weights(256, 3);
        row[5] = 1e12;
        row[200] = -1e12;
        for dtype in DType::WEIGHTS.into_iter().filter(|dtype| dtype.is_quantized()) {
            assert!(round_trip(dtype, &row).iter().all(|v| v.is_finite()), "{dtype}");
        }
    }

    #[test]
    fn short_rows_are_padded_with_zeros() {
        let values = weights(512, 2);
        for dtype in DType::WEIGHTS {
            for n in [1, 31, 33, 255, 257] {
                let mut padded = values[..n].to_vec();
                padded.resize(n.next_multiple_of(dtype.block_len()), 0.0);
                let whole = round_trip(dtype, &padded);
                assert_eq!(round_trip(dtype, &values[..n]), whole[..n], "{dtype}, {n} values");
            }
        }
    }

    #[test]
    fn struct_sizes_are_those_of_the_table() {
        fn check<B: Block<LEN>, const LEN: usize>(dtype: DType) {
            assert_eq!((size_of::<B>(), LEN, align_of::<B>()), (dtype.block_bytes(), dtype.block_len(), 1));
        }
        check::<BlockQ4_0, _>(DType::Q4_0);
        check::<BlockQ4_1, _>(DType::Q4_1);
        check::<BlockQ5_0, _>(DType::Q5_0);
        check::<BlockQ5_1, _>(DType::Q5_1);
        check::<BlockQ8_0, _>(DType::Q8_0);
        check::<BlockQ2_K, _>(DType::Q2_K);
        check::<BlockQ3_K, _>(DType::Q3_K);
        check::<BlockQ4_K, _>(DType::Q4_K);
        check::<BlockQ5_K, _>(DType::Q5_K);
        check::<BlockQ6_K, _>(DType::Q6_K);
        check::<BlockIQ4_NL, _>(DType::IQ4_NL);
        check::<BlockIQ4_XS, _>(DType::IQ4_XS);
    }

    #[test]
    #[should_panic(expected = "33 values of Q8_0 take 68 bytes, found 34")]
    fn a_wrong_length_is_refused() {
        decode(DType::Q8_0, &[0; 34], &mut [0.0; 33]);
    }
}
