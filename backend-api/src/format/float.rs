//! F32, F16 and BF16: no blocks, no scales. Encoding rounds to nearest, ties to even; NaN stays NaN.

use half::{bf16, f16};

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    decode(bytes, out, f32::from_le_bytes);
}

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    decode(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32());
}

pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    decode(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32());
}

pub(super) fn encode_f32(values: &[f32], out: &mut [u8]) {
    encode(values, out, f32::to_le_bytes);
}

pub(super) fn encode_f16(values: &[f32], out: &mut [u8]) {
    encode(values, out, |value| f16::from_f32(value).to_le_bytes());
}

pub(super) fn encode_bf16(values: &[f32], out: &mut [u8]) {
    encode(values, out, |value| bf16::from_f32(value).to_le_bytes());
}

fn decode<const BYTES: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; BYTES]) -> f32) {
    let (elements, _) = bytes.as_chunks();
    for (element, value) in elements.iter().zip(out) {
        *value = read(*element);
    }
}

fn encode<const BYTES: usize>(values: &[f32], out: &mut [u8], write: impl Fn(f32) -> [u8; BYTES]) {
    let (elements, _) = out.as_chunks_mut();
    for (element, value) in elements.iter_mut().zip(values) {
        *element = write(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_even() {
        let f16_of = |value: f32| {
            let mut bytes = [0; 2];
            encode_f16(&[value], &mut bytes);
            u16::from_le_bytes(bytes)
        };
        let bf16_of = |value: f32| {
            let mut bytes = [0; 2];
            encode_bf16(&[value], &mut bytes);
            u16::from_le_bytes(bytes)
        };
        // 1 + half a step goes down to the even 1; 1 + 1.5 steps goes up to the even 1 + 2 steps.
        assert_eq!([f16_of(1.0 + 0.5 / 1024.0), f16_of(1.0 + 1.5 / 1024.0)], [0x3C00, 0x3C02]);
        assert_eq!([bf16_of(1.0 + 0.5 / 128.0), bf16_of(1.0 + 1.5 / 128.0)], [0x3F80, 0x3F82]);
    }

    #[test]
    fn f16_survives_the_way_through_f32() {
        for bits in 0..=u16::MAX {
            let mut value = [0.0];
            decode_f16(&bits.to_le_bytes(), &mut value);
            let mut back = [0; 2];
            encode_f16(&value, &mut back);
            if value[0].is_nan() {
                assert!(f16::from_le_bytes(back).is_nan());
            } else {
                assert_eq!(u16::from_le_bytes(back), bits);
            }
        }
    }
}
