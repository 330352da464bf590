//! Formats whose four bits are an index into a table of 16 values, denser near zero than at the ends.
#![allow(non_camel_case_types, reason = "the field's names")]

use super::{Block, fit, half, legacy, to_half};
use bytemuck::{Pod, Zeroable};

/// The table of IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// 32 values: `d × IQ4_VALUES[q]`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..18 | `q`, 4 bits each: value `i < 16` in the low half of byte `i`, value `16 + i` in its high half |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4_NL {
    /// Scale, f16.
    pub d: [u8; 2],
    /// Indices of values `i` (low half) and `16 + i` (high half).
    pub quants: [u8; 16],
}

/// 256 values in 8 groups of 32: `d × s × IQ4_VALUES[q]`.
///
/// | bytes | field |
/// |---|---|
/// | 0..2 | `d`, f16 |
/// | 2..4 | bits 4 and 5 of each `s + 32`: bits `2g` and `2g + 1` of a 16-bit word |
/// | 4..8 | bits 0 to 3 of each `s + 32`: even groups in low halves, odd ones in high halves |
/// | 8..136 | `q`, 16 bytes for each group, laid out as in IQ4_NL |
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4_XS {
    /// Scale of scales, f16.
    pub d: [u8; 2],
    /// High bits of the groups' scales.
    pub scales_high: [u8; 2],
    /// Low bits of the groups' scales.
    pub scales_low: [u8; 4],
    /// Indices, group by group.
    pub quants: [[u8; 16]; 8],
}

impl Block<32> for BlockIQ4_NL {
    fn decode(&self) -> [f32; 32] {
        group(half(self.d), &self.quants)
    }

    fn encode(values: &[f32; 32]) -> Self {
        let d = to_half(group_scale(values));
        BlockIQ4_NL { d, quants: group_quants(values, half(d)) }
    }
}

impl BlockIQ4_XS {
    /// The groups' scales, −32 to 31.
    pub fn scales(&self) -> [i8; 8] {
        let high = u16::from_le_bytes(self.scales_high);
        std::array::from_fn(|g| {
            let low = self.scales_low[g / 2] >> (4 * (g % 2)) & 15;
            let high = (high >> (2 * g) & 3) as u8;
            (low | high << 4) as i8 - 32
        })
    }

    fn set_scales(&mut self, scales: &[i8; 8]) {
        let mut high = 0;
        for (g, scale) in scales.iter().enumerate() {
            let bits = (scale + 32) as u8;
            self.scales_low[g / 2] |= (bits & 15) << (4 * (g % 2));
            high |= u16::from(bits >> 4) << (2 * g);
        }
        self.scales_high = high.to_le_bytes();
    }
}

impl Block<256> for BlockIQ4_XS {
    fn decode(&self) -> [f32; 256] {
        let (d, scales) = (half(self.d), self.scales());
        let mut values = [0.0; 256];
        for (g, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            *values = group(d * f32::from(scales[g]), &self.quants[g]);
        }
        values
    }

    fn encode(values: &[f32; 256]) -> Self {
        let (groups, _) = values.as_chunks::<32>();
        let wanted: [f32; 8] = std::array::from_fn(|g| group_scale(&groups[g]));
        let (d, scales) = fit::signed_scales(&wanted, -32);
        let mut block = BlockIQ4_XS { d, ..Zeroable::zeroed() };
        block.set_scales(&scales);
        for (g, group) in groups.iter().enumerate() {
            block.quants[g] = group_quants(group, half(block.d) * f32::from(scales[g]));
        }
        block
    }
}

fn group(scale: f32, quants: &[u8; 16]) -> [f32; 32] {
    std::array::from_fn(|i| scale * f32::from(IQ4_VALUES[usize::from(legacy::nibble(quants, i))]))
}

fn group_scale(values: &[f32; 32]) -> f32 {
    fit::scale(values, -127.0, 20.0, |x| f32::from(IQ4_VALUES[nearest(x)]))
}

fn group_quants(values: &[f32; 32], scale: f32) -> [u8; 16] {
    let inverse = fit::inverse(scale);
    legacy::pack_nibbles(&values.map(|x| nearest(x * inverse) as u8))
}

/// The index of the nearest value of the table.
fn nearest(x: f32) -> usize {
    IQ4_VALUES.windows(2).filter(|pair| 2.0 * x > f32::from(pair[0]) + f32::from(pair[1])).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_value_is_found() {
        for x in -140..=140 {
            let distance = |value: i8| (i32::from(value) - x).abs();
            let found = distance(IQ4_VALUES[nearest(x as f32)]);
            assert_eq!(found, IQ4_VALUES.iter().map(|v| distance(*v)).min().unwrap_or(0), "{x}");
        }
    }

    #[test]
    fn scales_survive_packing() {
        for first in -32..=24 {
            let scales: [i8; 8] = std::array::from_fn(|g| (first + 5 * g as i8 + 32).rem_euclid(64) - 32);
            let mut block = BlockIQ4_XS::zeroed();
            block.set_scales(&scales);
            assert_eq!(block.scales(), scales);
        }
    }
}
