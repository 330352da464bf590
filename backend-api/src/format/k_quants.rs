//! K-quants: blocks of 256 values in groups of 16 or 32, whose scales are themselves quantised.
//!
//! Where a field holds less than 8 bits for each value, neighbouring values lie in neighbouring *bytes*, so that
//! one shift and mask of a vector gives a run of values. "Runs of 32" in the tables below means: value `i` is in
//! byte `i mod 32` of its part, at the bit that its run `i div 32` has there.
#![allow(non_camel_case_types, reason = "the field's names")]

use super::{Block, fit, half};
use bytemuck::{Pod, Zeroable};

/// 256 values in 16 groups of 16: `d × s × q − dmin × m`, each product rounded on its own.
///
/// | bytes | field |
/// |---|---|
/// | 0..16 | `s` (low half) and `m` (high half) of each group |
/// | 16..80 | `q`, 2 bits: 32 bytes for each 128 values, in runs of 32 at bits 0, 2, 4, 6 |
/// | 80..82 | `d`, f16 |
/// | 82..84 | `dmin`, f16 |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2_K {
    /// Scale (low half) and minimum (high half) of each group.
    pub scales: [u8; 16],
    /// Two bits of each value.
    pub quants: [[u8; 32]; 2],
    /// Scale of scales, f16.
    pub d: [u8; 2],
    /// Scale of minima, f16.
    pub dmin: [u8; 2],
}

/// 256 values in 16 groups of 16: `d × s × (q − 4)`.
///
/// | bytes | field |
/// |---|---|
/// | 0..32 | bit 2 of each `q`: runs of 32 at bits 0 to 7 |
/// | 32..96 | bits 0 and 1 of each `q`: 32 bytes for each 128 values, in runs of 32 at bits 0, 2, 4, 6 |
/// | 96..108 | `s + 32`, 6 bits each, see [`BlockQ3_K::scales`] |
/// | 108..110 | `d`, f16 |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3_K {
    /// Bit 2 of each value.
    pub high: [u8; 32],
    /// Bits 0 and 1 of each value.
    pub quants: [[u8; 32]; 2],
    /// Packed scales of the groups.
    pub packed_scales: [u8; 12],
    /// Scale of scales, f16.
    pub d: [u8; 2],
}

/// 256 values in 8 groups of 32: `d × s × q − dmin × m`, each product rounded on its own.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..4 | `dmin`, f16 |
/// | 4..16 | `s` and `m`, 6 bits each, see [`k_scales_mins`] |
/// | 16..144 | `q`, 4 bits: 32 bytes for each 64 values, in runs of 32 at bits 0 and 4 |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_K {
    /// Scale of scales, f16.
    pub d: [u8; 2],
    /// Scale of minima, f16.
    pub dmin: [u8; 2],
    /// Packed scales and minima of the groups.
    pub scales: [u8; 12],
    /// Four bits of each value.
    pub quants: [[u8; 32]; 4],
}

/// 256 values in 8 groups of 32: `d × s × q − dmin × m`, each product rounded on its own.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..4 | `dmin`, f16 |
/// | 4..16 | `s` and `m`, 6 bits each, see [`k_scales_mins`] |
/// | 16..48 | bit 4 of each `q`: runs of 32 at bits 0 to 7 |
/// | 48..176 | bits 0 to 3 of each `q`: 32 bytes for each 64 values, in runs of 32 at bits 0 and 4 |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_K {
    /// Scale of scales, f16.
    pub d: [u8; 2],
    /// Scale of minima, f16.
    pub dmin: [u8; 2],
    /// Packed scales and minima of the groups.
    pub scales: [u8; 12],
    /// Bit 4 of each value.
    pub high: [u8; 32],
    /// Bits 0 to 3 of each value.
    pub quants: [[u8; 32]; 4],
}

/// 256 values in 16 groups of 16: `d × s × (q − 32)`.
///
/// | bytes | field |
/// |---|---|
/// | 0..128 | bits 0 to 3 of each `q`: 64 bytes for each 128 values, in runs of 64 at bits 0 and 4 |
/// | 128..192 | bits 4 and 5 of each `q`: 32 bytes for each 128 values, in runs of 32 at bits 0, 2, 4, 6 |
/// | 192..208 | `s`, i8 |
/// | 208..210 | `d`, f16 |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6_K {
    /// Bits 0 to 3 of each value.
    pub quants: [[u8; 64]; 2],
    /// Bits 4 and 5 of each value.
    pub high: [[u8; 32]; 2],
    /// Scales of the groups.
    pub scales: [i8; 16],
    /// Scale of scales, f16.
    pub d: [u8; 2],
}

/// The scales and minima, 0 to 63, of the 8 groups of a Q4_K or Q5_K block.
///
/// Bytes 0 to 3 hold the scales, and bytes 4 to 7 the minima, of groups 0 to 3 in bits 0 to 5. Bytes 8 to 11
/// hold, for groups 4 to 7, bits 0 to 3 of the scale (low half) and of the minimum (high half); their bits 4 and
/// 5 are bits 6 and 7 of bytes 0 to 3 and 4 to 7.
pub fn k_scales_mins(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for g in 0..4 {
        let (scale, min, low) = (packed[g], packed[4 + g], packed[8 + g]);
        scales[g] = scale & 63;
        mins[g] = min & 63;
        scales[4 + g] = low & 15 | scale >> 6 << 4;
        mins[4 + g] = low >> 4 | min >> 6 << 4;
    }
    (scales, mins)
}

fn pack_k_scales_mins(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for g in 0..4 {
        packed[g] = scales[g] | scales[4 + g] >> 4 << 6;
        packed[4 + g] = mins[g] | mins[4 + g] >> 4 << 6;
        packed[8 + g] = scales[4 + g] & 15 | mins[4 + g] << 4;
    }
    packed
}

impl BlockQ3_K {
    /// The groups' scales, −32 to 31.
    ///
    /// Bits 0 to 3 of `s + 32` of group `g < 8` are the low half of byte `g`, of group `8 + g` its high half.
    /// Bits 4 and 5 of group `g` are bits `2 (g div 4)` and the next of byte `8 + g mod 4`.
    pub fn scales(&self) -> [i8; 16] {
        std::array::from_fn(|g| {
            let low = self.packed_scales[g % 8] >> (4 * (g / 8)) & 15;
            let high = self.packed_scales[8 + g % 4] >> (2 * (g / 4)) & 3;
            (low | high << 4) as i8 - 32
        })
    }

    fn set_scales(&mut self, scales: &[i8; 16]) {
        self.packed_scales = [0; 12];
        for (g, scale) in scales.iter().enumerate() {
            let bits = (scale + 32) as u8;
            self.packed_scales[g % 8] |= (bits & 15) << (4 * (g / 8));
            self.packed_scales[8 + g % 4] |= (bits >> 4) << (2 * (g / 4));
        }
    }
}

impl Block<256> for BlockQ2_K {
    fn decode(&self) -> [f32; 256] {
        let (d, dmin) = (half(self.d), half(self.dmin));
        let scales = self.scales.map(|byte| d * f32::from(byte & 15));
        let mins = self.scales.map(|byte| dmin * f32::from(byte >> 4));
        std::array::from_fn(|i| scales[i / 16] * f32::from(two_bits(&self.quants, i)) - mins[i / 16])
    }

    fn encode(values: &[f32; 256]) -> Self {
        let fitted = Affine::<16>::fit(values, 3, 15);
        let mut block = BlockQ2_K { d: fitted.d, dmin: fitted.dmin, ..Zeroable::zeroed() };
        block.scales = std::array::from_fn(|g| fitted.scales[g] | fitted.mins[g] << 4);
        for (i, level) in fitted.levels.iter().enumerate() {
            set_two_bits(&mut block.quants, i, *level);
        }
        block
    }
}

impl Block<256> for BlockQ3_K {
    fn decode(&self) -> [f32; 256] {
        let d = half(self.d);
        let scales = self.scales().map(|scale| d * f32::from(scale));
        std::array::from_fn(|i| {
            let q = two_bits(&self.quants, i) | one_bit(&self.high, i) << 2;
            scales[i / 16] * (f32::from(q) - 4.0)
        })
    }

    fn encode(values: &[f32; 256]) -> Self {
        let fitted = Symmetric::fit(values, -4, -32);
        let mut block = BlockQ3_K { d: fitted.d, ..Zeroable::zeroed() };
        block.set_scales(&fitted.scales);
        for (i, level) in fitted.levels.iter().enumerate() {
            set_two_bits(&mut block.quants, i, level & 3);
            set_one_bit(&mut block.high, i, level >> 2);
        }
        block
    }
}

impl Block<256> for BlockQ4_K {
    fn decode(&self) -> [f32; 256] {
        let (scales, mins) = decode_scales_mins(self.d, self.dmin, &self.scales);
        std::array::from_fn(|i| scales[i / 32] * f32::from(four_bits(&self.quants, i)) - mins[i / 32])
    }

    fn encode(values: &[f32; 256]) -> Self {
        let fitted = Affine::<8>::fit(values, 15, 63);
        let scales = pack_k_scales_mins(&fitted.scales, &fitted.mins);
        let mut block = BlockQ4_K { d: fitted.d, dmin: fitted.dmin, scales, ..Zeroable::zeroed() };
        for (i, level) in fitted.levels.iter().enumerate() {
            set_four_bits(&mut block.quants, i, *level);
        }
        block
    }
}

impl Block<256> for BlockQ5_K {
    fn decode(&self) -> [f32; 256] {
        let (scales, mins) = decode_scales_mins(self.d, self.dmin, &self.scales);
        std::array::from_fn(|i| {
            let q = four_bits(&self.quants, i) | one_bit(&self.high, i) << 4;
            scales[i / 32] * f32::from(q) - mins[i / 32]
        })
    }

    fn encode(values: &[f32; 256]) -> Self {
        let fitted = Affine::<8>::fit(values, 31, 63);
        let scales = pack_k_scales_mins(&fitted.scales, &fitted.mins);
        let mut block = BlockQ5_K { d: fitted.d, dmin: fitted.dmin, scales, ..Zeroable::zeroed() };
        for (i, level) in fitted.levels.iter().enumerate() {
            set_four_bits(&mut block.quants, i, level & 15);
            set_one_bit(&mut block.high, i, level >> 4);
        }
        block
    }
}

impl Block<256> for BlockQ6_K {
    fn decode(&self) -> [f32; 256] {
        let d = half(self.d);
        let scales = self.scales.map(|scale| d * f32::from(scale));
        std::array::from_fn(|i| {
            let low = self.quants[i / 128][i % 64] >> (i % 128 / 64 * 4) & 15;
            scales[i / 16] * (f32::from(low | two_bits(&self.high, i) << 4) - 32.0)
        })
    }

    fn encode(values: &[f32; 256]) -> Self {
        let fitted = Symmetric::fit(values, -32, -128);
        let mut block = BlockQ6_K { d: fitted.d, scales: fitted.scales, ..Zeroable::zeroed() };
        for (i, level) in fitted.levels.iter().enumerate() {
            block.quants[i / 128][i % 64] |= (level & 15) << (i % 128 / 64 * 4);
            set_two_bits(&mut block.high, i, level >> 4);
        }
        block
    }
}

/// `(d × s, dmin × m)` of each group.
fn decode_scales_mins(d: [u8; 2], dmin: [u8; 2], packed: &[u8; 12]) -> ([f32; 8], [f32; 8]) {
    let (d, dmin) = (half(d), half(dmin));
    let (scales, mins) = k_scales_mins(packed);
    (scales.map(|scale| d * f32::from(scale)), mins.map(|min| dmin * f32::from(min)))
}

/// Runs of 32 at bits 0 to 7.
fn one_bit(bytes: &[u8; 32], i: usize) -> u8 {
    bytes[i % 32] >> (i / 32) & 1
}

fn set_one_bit(bytes: &mut [u8; 32], i: usize, bit: u8) {
    bytes[i % 32] |= bit << (i / 32);
}

/// Runs of 32 at bits 0, 2, 4, 6, in each half of the block.
fn two_bits(bytes: &[[u8; 32]; 2], i: usize) -> u8 {
    bytes[i / 128][i % 32] >> (i % 128 / 32 * 2) & 3
}

fn set_two_bits(bytes: &mut [[u8; 32]; 2], i: usize, bits: u8) {
    bytes[i / 128][i % 32] |= bits << (i % 128 / 32 * 2);
}

/// Runs of 32 at bits 0 and 4, in each quarter of the block.
fn four_bits(bytes: &[[u8; 32]; 4], i: usize) -> u8 {
    bytes[i / 64][i % 32] >> (i % 64 / 32 * 4) & 15
}

fn set_four_bits(bytes: &mut [[u8; 32]; 4], i: usize, bits: u8) {
    bytes[i / 64][i % 32] |= bits << (i % 64 / 32 * 4);
}

/// A block of `GROUPS` groups fitted by `d × scale × level − dmin × min`.
struct Affine<const GROUPS: usize> {
    d: [u8; 2],
    dmin: [u8; 2],
    scales: [u8; GROUPS],
    mins: [u8; GROUPS],
    levels: [u8; 256],
}

impl<const GROUPS: usize> Affine<GROUPS> {
    /// With levels `0..=top` and scales and minima `0..=top_scale`.
    fn fit(values: &[f32; 256], top: u8, top_scale: u8) -> Self {
        let len = 256 / GROUPS;
        let top = f32::from(top);
        let (mut steps, mut below) = ([0.0; GROUPS], [0.0; GROUPS]);
        for (g, group) in values.chunks(len).enumerate() {
            let (step, offset) = fit::affine(group, top, true);
            (steps[g], below[g]) = (step, -offset);
        }
        let (d, scales) = fit::unsigned_scales(&steps, top_scale);
        let (dmin, mins) = fit::unsigned_scales(&below, top_scale);
        let inverses = scales.map(|scale| fit::inverse(half(d) * f32::from(scale)));
        let minima = mins.map(|min| half(dmin) * f32::from(min));
        let level =
            |i: usize| ((values[i] + minima[i / len]) * inverses[i / len]).round_ties_even().clamp(0.0, top);
        Affine { d, dmin, scales, mins, levels: std::array::from_fn(|i| level(i) as u8) }
    }
}

/// A block of 16 groups fitted by `d × scale × (level + low)`.
struct Symmetric {
    d: [u8; 2],
    scales: [i8; 16],
    levels: [u8; 256],
}

impl Symmetric {
    /// With `low..=-low - 1` for `level + low`, and likewise for scales.
    fn fit(values: &[f32; 256], low: i8, low_scale: i16) -> Self {
        let low = f32::from(low);
        let nearest = |x: f32| x.round_ties_even().clamp(low, -low - 1.0);
        let (groups, _) = values.as_chunks::<16>();
        let wanted: [f32; 16] = std::array::from_fn(|g| fit::scale(&groups[g], low, 0.9, nearest));
        let (d, scales) = fit::signed_scales(&wanted, low_scale);
        let inverses = scales.map(|scale| fit::inverse(half(d) * f32::from(scale)));
        let levels = std::array::from_fn(|i| (nearest(values[i] * inverses[i / 16]) - low) as u8);
        Symmetric { d, scales, levels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_survive_packing() {
        for first in 0..64 {
            let scales: [u8; 8] = std::array::from_fn(|g| ((first + 11 * g) % 64) as u8);
            let mins: [u8; 8] = std::array::from_fn(|g| ((3 * first + 17 * g) % 64) as u8);
            assert_eq!(k_scales_mins(&pack_k_scales_mins(&scales, &mins)), (scales, mins));

            let signed: [i8; 16] = std::array::from_fn(|g| ((first + 7 * g) % 64) as i8 - 32);
            let mut block = BlockQ3_K::zeroed();
            block.set_scales(&signed);
            assert_eq!(block.scales(), signed);
        }
    }

    /// Each value's bits lie in a place of their own.
    #[test]
    fn bits_survive_packing() {
        let level = |i: usize, top: usize| (i * 7 + i / 5) % top;
        let (mut one, mut two, mut four) = ([0; 32], [[0; 32]; 2], [[0; 32]; 4]);
        for i in 0..256 {
            set_one_bit(&mut one, i, level(i, 2) as u8);
            set_two_bits(&mut two, i, level(i, 4) as u8);
            set_four_bits(&mut four, i, level(i, 16) as u8);
        }
        for i in 0..256 {
            let found = [one_bit(&one, i), two_bits(&two, i), four_bits(&four, i)];
            assert_eq!(found.map(usize::from), [level(i, 2), level(i, 4), level(i, 16)], "value {i}");
        }
    }
}
