//! The suite's own random numbers: the same on every machine, for every run.

use backend_api::{DType, format};
use std::{collections::HashMap, sync::Arc};

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub(crate) struct Random {
    state: u64,
}

impl Random {
    /// Seeded by a name, so that a case draws the same data whichever cases run before it.
    pub(crate) fn named(name: &str) -> Self {
        let fnv = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Random { state: name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv) }
    }

    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// From 0 to 1.
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal, with variance 1: a sum of 6 uniform numbers.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f32 = (0..6).map(|_| self.uniform()).sum();
        (sum - 3.0) * std::f32::consts::SQRT_2
    }

    /// A row of activations: a scale of its own, now and then a value far out or a run of zeros, so that blocks
    /// differ much in their largest value.
    pub(crate) fn activations(&mut self, n: usize) -> Vec<f32> {
        let scale = 4f32.powf(2.0 * self.uniform() - 1.0);
        let mut row: Vec<f32> = (0..n).map(|_| scale * self.normal()).collect();
        for run in row.chunks_mut(32) {
            match self.below(32) {
                0 => run.fill(0.0),
                1 => run[self.below(run.len())] *= 5.0,
                _ => {}
            }
        }
        row
    }
}

/// Encoded weights, drawn block by block from a pool for each format: encoding every weight anew would take most
/// of the suite's time.
#[derive(Default)]
pub(crate) struct Weights {
    pools: HashMap<DType, Arc<Vec<u8>>>,
}

impl Weights {
    /// `n` values of whole blocks.
    pub(crate) fn row(&mut self, dtype: DType, n: usize, random: &mut Random) -> Vec<u8> {
        let pool = Arc::clone(self.pools.entry(dtype).or_insert_with(|| Arc::new(pool(dtype))));
        let size = dtype.block_bytes();
        let blocks = pool.len() / size;
        let mut row = Vec::with_capacity(dtype.row_bytes(n));
        for _ in 0..n / dtype.block_len() {
            let block = random.below(blocks);
            row.extend_from_slice(&pool[block * size..][..size]);
        }
        row
    }
}

/// `n` values of blocks whose bits are random: all quants and group scales that a file may hold, also those that
/// no encoder writes. Only the f16 fields are kept to moderate numbers, of either sign.
pub(crate) fn random_blocks(dtype: DType, n: usize, random: &mut Random) -> Vec<u8> {
    let halves: &[usize] = match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 => unreachable!("{dtype} has no blocks"),
    };
    let mut row: Vec<u8> = (0..dtype.row_bytes(n)).map(|_| random.bits() as u8).collect();
    for block in row.chunks_exact_mut(dtype.block_bytes()) {
        for &offset in halves {
            let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
            let scale = sign * 2f32.powf(-10.0 + 4.0 * random.uniform());
            format::encode(DType::F16, &[scale], &mut block[offset..offset + 2]);
        }
    }
    row
}

/// Blocks of normal values whose scales differ by up to 16, the first of them zeros.
fn pool(dtype: DType) -> Vec<u8> {
    let mut random = Random::named(dtype.name());
    let len = dtype.block_len();
    let blocks = if dtype.is_quantized() { 64.max(4096 / len) } else { 4096 };
    let mut pool = vec![0; dtype.row_bytes(len * blocks)];
    for (block, bytes) in pool.chunks_exact_mut(dtype.block_bytes()).enumerate() {
        let scale = if block == 0 { 0.0 } else { 0.3 * 2f32.powf(-4.0 * random.uniform()) };
        let values: Vec<f32> = (0..len).map(|_| scale * random.normal()).collect();
        format::encode(dtype, &values, bytes);
    }
    pool
}
