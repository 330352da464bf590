//! Tensors that are not in the files as they are wanted: made at load, by several threads.

use super::{WeightBytes, error::Flaw, fp8::Fp8};
use backend_api::DType;
use half::{bf16, f16};
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder, iter::repeat_n, prelude::*};
use std::{
    num::NonZero,
    sync::{Arc, OnceLock},
    thread,
};

/// The threads that make a checkpoint's tensors. They start with the first one. A pool of our own, as the one that
/// rayon makes by itself reads the environment and panics where it gets no threads.
pub(super) struct Threads {
    most: usize,
    pool: OnceLock<Result<ThreadPool, ThreadPoolBuildError>>,
}

impl Threads {
    /// At most so many, and at least one.
    pub(super) fn new(most: usize) -> Self {
        // 0 would be rayon's own choice.
        Threads { most: most.max(1), pool: OnceLock::new() }
    }

    pub(super) fn pool(&self) -> Result<&ThreadPool, Flaw> {
        let start = || {
            let mut threads = self.most;
            loop {
                let name = |index| format!("load-{index}");
                match ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build() {
                    // The system may give fewer than are wanted.
                    Err(_) if threads > 1 => threads /= 2,
                    pool => return pool,
                }
            }
        };
        let pool = self.pool.get_or_init(start).as_ref();
        pool.map_err(|error| Flaw::new("threads to make it", error.to_string()))
    }
}

impl Default for Threads {
    /// One for each processor.
    fn default() -> Self {
        Threads::new(thread::available_parallelism().map_or(1, NonZero::get))
    }
}

/// How to make a tensor: its parts, one after the other, each converted.
pub(super) struct Assembly {
    /// The whole tensor, or one for each expert, all of one size.
    pub(super) parts: Vec<Part>,
    pub(super) conversion: Conversion,
}

/// A matrix as a file has it.
pub(super) struct Part {
    pub(super) values: WeightBytes,
    /// Of FP8: its scales.
    pub(super) scales: Option<WeightBytes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conversion {
    /// The bytes as they are.
    None,
    /// F16 or BF16 to F32.
    ToF32(DType),
    /// FP8 with block scales to F32.
    Fp8 { cols: usize, block: [usize; 2] },
}

impl Assembly {
    /// Bytes of the parts and their scales, if they are in FP8.
    pub(super) fn fp8_bytes(&self) -> Option<u64> {
        let weights = self.parts.iter().flat_map(|part| [Some(&part.values), part.scales.as_ref()]).flatten();
        let bytes = weights.map(|weight| weight.range.len() as u64).sum();
        matches!(self.conversion, Conversion::Fp8 { .. }).then_some(bytes)
    }

    /// Makes the tensor, of `bytes` bytes in all.
    pub(super) fn load(&self, bytes: usize, threads: &Threads) -> Result<WeightBytes, Flaw> {
        let made = threads.pool()?.install(|| {
            let mut made = Words::zeroed(bytes)?;
            let size = bytes / self.parts.len().max(1);
            let parts = self.parts.par_iter().zip(made.as_mut().par_chunks_exact_mut(size.max(1)));
            // The first flaw there is, not the first to be found.
            match parts.find_map_first(|(part, out)| convert(part, self.conversion, out).err()) {
                Some(flaw) => Err(flaw),
                None => Ok(made),
            }
        })?;
        Ok(WeightBytes { bytes: Arc::new(made), range: 0..bytes })
    }
}

fn convert(part: &Part, conversion: Conversion, out: &mut [u8]) -> Result<(), Flaw> {
    let values = part.values.as_slice();
    match (conversion, &part.scales) {
        (Conversion::ToF32(DType::F16), _) => widen(values, out, |v| f16::from_le_bytes(v).to_f32()),
        (Conversion::ToF32(DType::BF16), _) => widen(values, out, |v| bf16::from_le_bytes(v).to_f32()),
        (Conversion::Fp8 { cols, block }, Some(scales)) => {
            Fp8 { codes: values, cols, scales: scales.as_slice(), block }.to_f32(out)?;
        }
        _ => out.copy_from_slice(values),
    }
    Ok(())
}

fn widen(from: &[u8], to: &mut [u8], convert: impl Fn([u8; 2]) -> f32) {
    for (from, to) in from.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
        *to = convert(*from).to_le_bytes();
    }
}

/// Bytes of our own, aligned for every format.
struct Words {
    words: Vec<u64>,
    bytes: usize,
}

impl Words {
    fn zeroed(bytes: usize) -> Result<Self, Flaw> {
        let mut words = Vec::new();
        words
            .try_reserve_exact(bytes.div_ceil(8))
            .map_err(|_| Flaw::new(format!("memory for {bytes} bytes"), "none left"))?;
        // The system hands out pages at the first touch, which takes as long as the conversion.
        words.par_extend(repeat_n(0, bytes.div_ceil(8)));
        Ok(Words { words, bytes })
    }
}

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

impl AsMut<[u8]> for Words {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_made_by_as_many_threads_as_are_given() {
        for (given, expected) in [(0, 1), (1, 1), (3, 3)] {
            let threads = Threads::new(given);
            assert!(threads.pool.get().is_none(), "none starts before there is work");
            let values = WeightBytes { bytes: Arc::new(vec![0, 0x3c, 0, 0xc0]), range: 0..4 };
            let parts = vec![Part { values, scales: None }];
            let half = Assembly { parts, conversion: Conversion::ToF32(DType::F16) };
            let made = half.load(8, &threads).unwrap();
            assert_eq!(made.as_slice(), [1.0f32, -2.0].map(f32::to_le_bytes).as_flattened());
            assert_eq!(threads.pool().unwrap().current_num_threads(), expected);
        }
    }
}
