//! Scalar encoding and decoding of each format.

use crate::DType;

/// Decodes one row of `out.len()` values.
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    let _ = (dtype, bytes, out);
    todo!("under construction")
}
