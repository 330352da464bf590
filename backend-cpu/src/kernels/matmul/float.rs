//! Products in f32: float weights, and quantised weights decoded on the fly (`Precision::F32`).
//!
//! An output is the sum of 16 lanes, lane `i` the sum over `k ≡ i (mod 16)` in rising order: the same whatever the
//! tile it is computed in.

use super::{pairing::Pairing, quantized::Weights};
use crate::{
    isa::Isa,
    kernels::{Kernel, Scratch},
    tensor::Tensor,
};
use backend_api::{DType, Step, format};
use std::marker::PhantomData;

/// Rows of weights met by a single row of activations at once: enough chains of additions to hide their latency.
const SINGLE_ROWS: usize = 8;

/// A format whose values load as f32.
pub(crate) trait Float: Send + Sync {
    const BYTES: usize;
    /// # Safety
    /// 16 readable values.
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load(p.cast()) }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_f16(p.cast()) }
    }
}

impl Float for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Isa>(s: S, p: *const u8) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_bf16(p.cast()) }
    }
}

/// The first `n < 16` values, zeros in the other lanes.
///
/// # Safety
/// `n` readable values.
#[inline(always)]
unsafe fn load_first<S: Isa, W: Float>(s: S, p: *const u8, n: usize) -> S::F {
    let mut copy = [0u8; 64];
    // SAFETY: the caller's; 16 values of at most 4 bytes fit the copy.
    unsafe {
        std::ptr::copy_nonoverlapping(p, copy.as_mut_ptr(), n * W::BYTES);
        W::load(s, copy.as_ptr())
    }
}

/// `M` rows of weights with `N` rows of activations.
///
/// # Safety
/// `k` readable values in each row.
#[inline(always)]
pub(crate) unsafe fn tile<S: Isa, W: Float, const M: usize, const N: usize>(
    s: S,
    w: [*const u8; M],
    x: [*const f32; N],
    k: usize,
) -> [[f32; N]; M] {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[s.splat(0.0); N]; M];
        let whole = k - k % 16;
        let mut at = 0;
        while at < whole {
            let values: [S::F; N] = array!(N, |n| s.load(x[n].add(at)));
            for m in 0..M {
                let weights = W::load(s, w[m].add(at * W::BYTES));
                for n in 0..N {
                    sums[m][n] = s.mul_add(weights, values[n], sums[m][n]);
                }
            }
            at += 16;
        }
        if whole < k {
            let values: [S::F; N] = array!(N, |n| s.load_first(x[n].add(whole), k - whole));
            for m in 0..M {
                let weights = load_first::<S, W>(s, w[m].add(whole * W::BYTES), k - whole);
                for n in 0..N {
                    sums[m][n] = s.mul_add(weights, values[n], sums[m][n]);
                }
            }
        }
        array!(M, |m| array!(N, |n| s.sum(sums[m][n])))
    }
}

/// Where a product's weights come from.
pub(crate) trait Source: Send + Sync {
    type Format: Float;
    /// Whether rows are decoded into scratch memory first.
    const DECODED: bool;
}

/// Weights as they are.
pub(crate) struct Stored<W>(PhantomData<W>);
/// Weights decoded by the scalar definition of their format.
pub(crate) struct Decoded;

impl<W: Float> Source for Stored<W> {
    type Format = W;
    const DECODED: bool = false;
}

impl Source for Decoded {
    type Format = F32;
    const DECODED: bool = true;
}

/// A product as a kernel: a task is some neighbouring rows of one matrix with all its entries.
pub(crate) struct FloatProduct<W> {
    pub(crate) weights: Weights,
    pub(crate) dtype: DType,
    pub(crate) x: Tensor,
    pub(crate) pairing: Pairing,
    /// Dense `[entries, weights.rows]`.
    pub(crate) output: Tensor,
    /// Rows of weights in a task.
    pub(crate) chunk: usize,
    pub(crate) source: PhantomData<W>,
}

impl<W: Source + 'static> Kernel for FloatProduct<W> {
    fn scratch_bytes(&self) -> usize {
        if W::DECODED { 4 * SINGLE_ROWS * self.weights.k } else { 0 }
    }

    fn tasks(&self, step: &Step) -> usize {
        self.pairing.problems(self.output.rows(step)) * self.weights.rows.div_ceil(self.chunk)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, s: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let chunks = self.weights.rows.div_ceil(self.chunk);
        // SAFETY: the caller's.
        unsafe {
            let Some(problem) = self.pairing.problem(task / chunks, self.output.rows(step)) else { return };
            let first = task % chunks * self.chunk;
            let rows = first..self.weights.rows.min(first + self.chunk);
            let decoded = scratch.as_mut_ptr().cast();
            match (problem.count, S::FLOAT_TILE) {
                (1, _) => self.tiles::<S, SINGLE_ROWS, 1>(s, &problem, rows, decoded),
                (_, 4..) => self.tiles::<S, 4, 4>(s, &problem, rows, decoded),
                (_, 2..) => self.tiles::<S, 2, 2>(s, &problem, rows, decoded),
                _ => self.tiles::<S, 1, 1>(s, &problem, rows, decoded),
            }
        }
    }
}

impl<W: Source> FloatProduct<W> {
    /// Some rows of a matrix with all entries of a problem.
    ///
    /// # Safety
    /// As [`Kernel::run`]; the problem and its rows are there, and `decoded` has room for `M` rows if they are needed.
    #[inline(always)]
    unsafe fn tiles<S: Isa, const M: usize, const N: usize>(
        &self,
        s: S,
        problem: &super::pairing::Problem,
        rows: std::ops::Range<usize>,
        decoded: *mut f32,
    ) {
        let Weights { base, matrix_stride, row_stride, rows: width, k } = self.weights;
        // SAFETY: the caller's.
        unsafe {
            let matrix = base.add(problem.matrix * matrix_stride);
            for row in rows.clone().step_by(M) {
                // Past the end the last row stands in; what it gives is not stored.
                let mut w: [*const u8; M] =
                    std::array::from_fn(|m| matrix.add((row + m).min(rows.end - 1) * row_stride));
                if W::DECODED {
                    for (m, w) in w.iter_mut().enumerate() {
                        let to = decoded.add(m * k);
                        let bytes = std::slice::from_raw_parts(*w, self.dtype.row_bytes(k));
                        format::decode(self.dtype, bytes, std::slice::from_raw_parts_mut(to, k));
                        *w = to.cast();
                    }
                }
                for index in (0..problem.count).step_by(N) {
                    let entries: [usize; N] =
                        std::array::from_fn(|n| problem.output((index + n).min(problem.count - 1)));
                    let x = entries.map(|entry| self.x.row::<f32>(problem.input(entry)).cast_const());
                    let sums = tile::<S, W::Format, M, N>(s, w, x, k);
                    for (n, entry) in entries.into_iter().enumerate().take(problem.count - index) {
                        let to = self.output.base::<f32>().add(entry * width + row);
                        for (m, sums) in sums.iter().enumerate().take(rows.end - row) {
                            *to.add(m) = sums[n];
                        }
                    }
                }
            }
        }
    }
}
