//! Formats with one scale for 32 values.
//!
//! In the 4-bit and 5-bit formats value `i < 16` has its low four bits in the low half of byte `i`, and value
//! `16 + i` in the high half of the same byte. A fifth bit is bit `i` of a 32-bit word.
#![allow(non_camel_case_types, reason = "the field's names")]

use super::{Block, fit, half, to_half};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// 32 values: `d × (q − 8)`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..18 | `q`, 4 bits each |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Values `i` (low half) and `16 + i` (high half).
    pub quants: [u8; 16],
}

/// 32 values: `d × q + m`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..4 | `m`, f16 |
/// | 4..20 | `q`, 4 bits each |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Offset, f16.
    pub m: [u8; 2],
    /// Values `i` (low half) and `16 + i` (high half).
    pub quants: [u8; 16],
}

/// 32 values: `d × (q − 16)`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..6 | bit 4 of each `q`: bit `i` of a 32-bit word |
/// | 6..22 | bits 0 to 3 of each `q` |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Bit 4 of value `i` is bit `i`.
    pub high: [u8; 4],
    /// Bits 0 to 3 of values `i` (low half) and `16 + i` (high half).
    pub quants: [u8; 16],
}

/// 32 values: `d × q + m`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..4 | `m`, f16 |
/// | 4..8 | bit 4 of each `q`: bit `i` of a 32-bit word |
/// | 8..24 | bits 0 to 3 of each `q` |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Offset, f16.
    pub m: [u8; 2],
    /// Bit 4 of value `i` is bit `i`.
    pub high: [u8; 4],
    /// Bits 0 to 3 of values `i` (low half) and `16 + i` (high half).
    pub quants: [u8; 16],
}

/// 32 values: `d × q`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..34 | `q`, i8 |
///
/// Encoding is fixed to the bit, because every device stores caches in it. In f32, with `max = max |x|`:
/// `d = f16(max / 127)`, at most the largest finite f16; `r = 127 / max`, or 0 where `d` is 0;
/// `q = round(x × r)`, to nearest, ties to even. It takes no clamping: `|x × r|` cannot round above 127. Where an `x`
/// is NaN or infinite, which integers cannot say, `d` is NaN (0x7E00) and every `q` is 0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale, f16.
    pub d: [u8; 2],
    /// The values, two's complement.
    pub quants: [i8; 32],
}

impl Block<32> for BlockQ4_0 {
    fn decode(&self) -> [f32; 32] {
        let d = half(self.d);
        std::array::from_fn(|i| d * (f32::from(nibble(&self.quants, i)) - 8.0))
    }

    fn encode(values: &[f32; 32]) -> Self {
        let d = to_half(fit::scale(values, -8.0, 1.0, |x| x.round_ties_even().clamp(-8.0, 7.0)));
        let levels = levels(values, half(d), -8.0 * half(d), 15.0);
        BlockQ4_0 { d, quants: pack_nibbles(&levels) }
    }
}

impl Block<32> for BlockQ4_1 {
    fn decode(&self) -> [f32; 32] {
        let (d, m) = (half(self.d), half(self.m));
        std::array::from_fn(|i| d * f32::from(nibble(&self.quants, i)) + m)
    }

    fn encode(values: &[f32; 32]) -> Self {
        let (d, m) = fit::affine(values, 15.0, false);
        let (d, m) = (to_half(d), to_half(m));
        let levels = levels(values, half(d), half(m), 15.0);
        BlockQ4_1 { d, m, quants: pack_nibbles(&levels) }
    }
}

impl Block<32> for BlockQ5_0 {
    fn decode(&self) -> [f32; 32] {
        let d = half(self.d);
        std::array::from_fn(|i| d * (f32::from(five_bits(&self.quants, self.high, i)) - 16.0))
    }

    fn encode(values: &[f32; 32]) -> Self {
        let d = to_half(fit::scale(values, -16.0, 1.0, |x| x.round_ties_even().clamp(-16.0, 15.0)));
        let levels = levels(values, half(d), -16.0 * half(d), 31.0);
        BlockQ5_0 { d, high: pack_high(&levels), quants: pack_nibbles(&levels) }
    }
}

impl Block<32> for BlockQ5_1 {
    fn decode(&self) -> [f32; 32] {
        let (d, m) = (half(self.d), half(self.m));
        std::array::from_fn(|i| d * f32::from(five_bits(&self.quants, self.high, i)) + m)
    }

    fn encode(values: &[f32; 32]) -> Self {
        let (d, m) = fit::affine(values, 31.0, false);
        let (d, m) = (to_half(d), to_half(m));
        let levels = levels(values, half(d), half(m), 31.0);
        BlockQ5_1 { d, m, high: pack_high(&levels), quants: pack_nibbles(&levels) }
    }
}

impl Block<32> for BlockQ8_0 {
    fn decode(&self) -> [f32; 32] {
        let d = half(self.d);
        self.quants.map(|q| d * f32::from(q))
    }

    fn encode(values: &[f32; 32]) -> Self {
        // Magnitudes order as their bits do, with infinity and NaN above all numbers.
        let max = f32::from_bits(values.iter().fold(0, |max: u32, x| max.max(x.abs().to_bits())));
        if !max.is_finite() {
            return BlockQ8_0 { d: f16::NAN.to_le_bytes(), quants: [0; 32] };
        }
        let d = to_half(max / 127.0);
        let r = if half(d) == 0.0 { 0.0 } else { 127.0 / max };
        BlockQ8_0 { d, quants: values.map(|x| (x * r).round_ties_even() as i8) }
    }
}

/// The four bits of value `i`.
pub(super) fn nibble(quants: &[u8; 16], i: usize) -> u8 {
    if i < 16 { quants[i] & 15 } else { quants[i - 16] >> 4 }
}

/// The reverse of [`nibble`]; higher bits are left out.
pub(super) fn pack_nibbles(levels: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| levels[i] & 15 | levels[16 + i] << 4)
}

fn five_bits(quants: &[u8; 16], high: [u8; 4], i: usize) -> u8 {
    nibble(quants, i) | (high[i / 8] >> (i % 8) & 1) << 4
}

fn pack_high(levels: &[u8; 32]) -> [u8; 4] {
    std::array::from_fn(|byte| (0..8).fold(0, |bits, bit| bits | (levels[8 * byte + bit] >> 4) << bit))
}

/// The nearest levels for values `step × level + offset`.
fn levels(values: &[f32; 32], step: f32, offset: f32, top: f32) -> [u8; 32] {
    let inverse = fit::inverse(step);
    values.map(|x| ((x - offset) * inverse).round_ties_even().clamp(0.0, top) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_lie_where_the_layout_says() {
        let mut block = BlockQ5_0 { d: to_half(1.0), high: [0; 4], quants: [0; 16] };
        block.quants[3] = 0x5A;
        block.high[2] = 1 << 3; // value 19
        let values = block.decode();
        assert_eq!((values[3], values[19], values[4]), (10.0 - 16.0, 5.0 + 16.0 - 16.0, -16.0));
    }

    #[test]
    fn q8_0_is_fixed_to_the_bit() {
        let mut values = [0.0; 32];
        values[..6].copy_from_slice(&[254.0, 1.0, 3.0, -1.0, -3.0, -254.0]); // r = 1/2, ties everywhere
        let block = BlockQ8_0::encode(&values);
        assert_eq!(half(block.d), 2.0);
        assert_eq!(block.quants[..6], [127, 0, 2, 0, -2, -127]);

        // The quants follow the exact maximum, not the rounded scale.
        let max = 1.0003f32;
        let block = BlockQ8_0::encode(&[max; 32]);
        assert_eq!((block.d, block.quants[0]), (to_half(max / 127.0), 127));
    }

    #[test]
    fn q8_0_scales_that_vanish_or_overflow() {
        let block = BlockQ8_0::encode(&[3e-6; 32]);
        assert_eq!((half(block.d), block.quants), (0.0, [0; 32]));
        let block = BlockQ8_0::encode(&[1e9; 32]);
        assert_eq!((half(block.d), block.quants), (65504.0, [127; 32]));
    }

    #[test]
    fn q8_0_does_not_hide_what_is_not_finite() {
        for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for i in [0, 31] {
                let mut values = [1.0; 32];
                values[i] = odd;
                let block = BlockQ8_0::encode(&values);
                assert_eq!((block.d, block.quants), ([0x00, 0x7E], [0; 32]), "{odd} at {i}");
                assert!(block.decode().iter().all(|x| x.is_nan()));
            }
        }
    }
}
