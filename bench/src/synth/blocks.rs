//! Random weights, drawn as the bytes of each format: quantised ones are not computed from numbers, but bits are
//! drawn and the scales of the blocks set so that the weights have the wanted size.

use backend_api::{DType, format};
use std::f32::consts::TAU;

/// A small fast generator (SplitMix64, Steele et al., 2014); the same bytes for a seed for ever.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator of its own for each name.
    pub fn new(seed: u64, name: &str) -> Self {
        // FNV-1a; mixed again by every draw.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), |h, b| {
                (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        Random(hash)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        let mut words = out.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.bits().to_le_bytes());
        }
        let rest = words.into_remainder();
        let len = rest.len();
        rest.copy_from_slice(&self.bits().to_le_bytes()[..len]);
    }

    /// A number of the standard normal distribution (Box and Muller, 1958).
    pub fn normal(&mut self) -> f32 {
        let uniform = |bits: u64| ((bits >> 40) as f32 + 0.5) / (1u64 << 24) as f32;
        let (radius, angle) = (uniform(self.bits()), uniform(self.bits()));
        (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
    }
}

/// Draws weights of one format.
pub struct Weights {
    dtype: DType,
    /// Formats of plain numbers: encoded values to draw from. Others: factors of a block, as f16 bits.
    palette: Vec<u8>,
}

/// Values to draw from: as many as 12 bits count.
const PALETTE: usize = 1 << 12;

impl Weights {
    /// Weights of mean `mean` and standard deviation `deviation`. Plain formats are normally distributed;
    /// quantised ones, whose mean has to be 0, are about uniform within a block, with random signs.
    pub fn new(dtype: DType, mean: f32, deviation: f32, random: &mut Random) -> Self {
        if !dtype.is_quantized() {
            // In pairs of opposite sign, so that the palette's own mean is exactly `mean`.
            let pair = |x: f32| [mean + deviation * x, mean - deviation * x];
            let values: Vec<f32> = (0..PALETTE / 2).flat_map(|_| pair(random.normal())).collect();
            let mut palette = vec![0; dtype.row_bytes(PALETTE)];
            format::encode(dtype, &values, &mut palette);
            return Weights { dtype, palette };
        }
        debug_assert_eq!(mean, 0.0, "quantised weights are drawn around 0");
        let scale = deviation / unit_deviation(dtype, random);
        // Blocks differ in size, so that a kernel which takes a neighbour's scale gives other numbers.
        let factors = (0..PALETTE).map(|i| {
            let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
            half::f16::from_f32(sign * scale * (0.75 + 0.5 * (i as f32 / PALETTE as f32)))
        });
        let signed = |factor: half::f16| {
            if takes_sign(dtype) { factor } else { half::f16::from_f32(factor.to_f32().abs()) }
        };
        let palette = factors.flat_map(|factor| signed(factor).to_le_bytes()).collect();
        Weights { dtype, palette }
    }

    /// Fills whole blocks.
    ///
    /// # Panics
    /// If `out` is not a number of whole blocks.
    pub fn fill(&self, out: &mut [u8], random: &mut Random) {
        let block_bytes = self.dtype.block_bytes();
        assert!(out.len().is_multiple_of(block_bytes), "whole blocks of {block_bytes} bytes");
        if !self.dtype.is_quantized() {
            // Five draws of 12 bits from one number.
            for values in out.chunks_mut(5 * block_bytes) {
                let mut bits = random.bits();
                for value in values.chunks_exact_mut(block_bytes) {
                    let index = bits as usize % PALETTE * block_bytes;
                    value.copy_from_slice(&self.palette[index..index + block_bytes]);
                    bits >>= 12;
                }
            }
            return;
        }
        random.fill(out);
        for block in out.chunks_exact_mut(block_bytes) {
            let index = random.bits() as usize % PALETTE * 2;
            let factor = [self.palette[index], self.palette[index + 1]];
            set_scale(self.dtype, block, factor);
        }
    }
}

/// Makes a block of random bits one whose values scatter around 0 in proportion to `factor` (an f16).
///
/// In formats with a minimum, `x = d·s·q − dmin·m`, the minimum is made to lie half a range below: the sub-block
/// minima `m` get the bits of the sub-block scales `s`, and `dmin` is `d` times half the largest `q`.
fn set_scale(dtype: DType, block: &mut [u8], factor: [u8; 2]) {
    let minimum = |half_range: f32| half::f16::from_f32(format::half(factor) * half_range).to_le_bytes();
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => {
            block[..2].copy_from_slice(&factor);
        }
        DType::Q4_1 | DType::Q5_1 => {
            let half_range = if dtype == DType::Q4_1 { -7.5 } else { -15.5 };
            block[..2].copy_from_slice(&factor);
            block[2..4].copy_from_slice(&minimum(half_range));
        }
        DType::Q4_K | DType::Q5_K => {
            let half_range = if dtype == DType::Q4_K { 7.5 } else { 15.5 };
            block[..2].copy_from_slice(&factor);
            block[2..4].copy_from_slice(&minimum(half_range));
            // scales[12]: six bits of scales 0 to 3, of minima 0 to 3, then nibbles of both for 4 to 7, whose
            // upper two bits lie above the six.
            let scales = &mut block[4..16];
            scales.copy_within(0..4, 4);
            for nibbles in &mut scales[8..12] {
                *nibbles = (*nibbles & 15) * 17;
            }
        }
        DType::Q2_K => {
            // A nibble of scale and one of minimum for each 16 values.
            for nibbles in &mut block[..16] {
                *nibbles = (*nibbles & 15) * 17;
            }
            block[80..82].copy_from_slice(&factor);
            block[82..84].copy_from_slice(&minimum(1.5));
        }
        DType::Q3_K => block[108..110].copy_from_slice(&factor),
        DType::Q6_K => block[208..210].copy_from_slice(&factor),
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 => unreachable!("{dtype} has no scales"),
    }
}

/// Whether a block's factor may be negative. In K-quants with a minimum it never is in real files.
fn takes_sign(dtype: DType) -> bool {
    !matches!(dtype, DType::Q2_K | DType::Q4_K | DType::Q5_K)
}

/// The standard deviation of random blocks whose factor is 1.
fn unit_deviation(dtype: DType, random: &mut Random) -> f32 {
    let blocks = 16 * 1024 / dtype.block_len();
    let mut bytes = vec![0; blocks * dtype.block_bytes()];
    random.fill(&mut bytes);
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        set_scale(dtype, block, half::f16::ONE.to_le_bytes());
    }
    let mut values = vec![0.0; blocks * dtype.block_len()];
    format::decode(dtype, &bytes, &mut values);
    let squares: f32 = values.iter().map(|x| x * x).sum();
    (squares / values.len() as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_every_format_have_the_wanted_size() {
        for dtype in DType::WEIGHTS {
            let deviation = 0.02;
            let mut random = Random::new(7, dtype.name());
            let weights = Weights::new(dtype, 0.0, deviation, &mut random);
            let mut values = vec![0.0; 1 << 17];
            let mut bytes = vec![0; dtype.row_bytes(values.len())];
            weights.fill(&mut bytes, &mut random);
            format::decode(dtype, &bytes, &mut values);
            let n = values.len() as f64;
            let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let found = (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n).sqrt();
            assert!((found / f64::from(deviation) - 1.0).abs() < 0.05, "{dtype}: deviation {found}");
            assert!(mean.abs() < 0.03 * f64::from(deviation), "{dtype}: mean {mean}");
        }
    }

    #[test]
    fn a_seed_and_a_name_give_the_same_bytes() {
        let draw = |seed, name| {
            let mut random = Random::new(seed, name);
            let mut bytes = [0; 19];
            random.fill(&mut bytes);
            bytes
        };
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }
}
