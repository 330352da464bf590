//! Products as kernels.

use super::{Dot, LANES, PANEL_K, Panel, Sums, rows::Rows, together};
use crate::{
    isa::Isa,
    kernels::{
        Kernel, Scratch,
        matmul::{
            activations::{Quantized, Row},
            pairing::Pairing,
        },
    },
};
use backend_api::Step;
use std::marker::PhantomData;

/// Rows of activations from which on unpacking weights into panels pays.
const PANEL_ROWS: usize = 6;

/// Matrices of weights.
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    pub(crate) base: *const u8,
    /// Bytes from one matrix to the next.
    pub(crate) matrix_stride: usize,
    /// Bytes from one row to the next.
    pub(crate) row_stride: usize,
    /// Rows of a matrix.
    pub(crate) rows: usize,
    /// Values of a row.
    pub(crate) k: usize,
}

// SAFETY: an address; `Kernel::run` is where it is used.
unsafe impl Send for Weights {}
// SAFETY: as above.
unsafe impl Sync for Weights {}

/// A product as a kernel: a task is some neighbouring rows of one matrix with all its entries.
pub(crate) struct Product<D> {
    pub(crate) weights: Weights,
    pub(crate) activations: Quantized,
    pub(crate) pairing: Pairing,
    /// Dense `[entries, weights.rows]`.
    pub(crate) output: crate::tensor::Tensor,
    /// Rows of weights in a task, a multiple of 16.
    pub(crate) chunk: usize,
    /// Entries in the largest step.
    pub(crate) capacity: usize,
    pub(crate) format: PhantomData<D>,
}

impl<D: Dot> Product<D> {
    /// The panel, then a sum vector and an activation row for each part of each entry.
    fn panel_bytes(&self) -> usize {
        let rows = self.capacity * self.activations.parts();
        64 + size_of::<Panel>() + rows * (4 * LANES + size_of::<Row>())
    }

    /// # Safety
    /// The output has this entry, and this row is below `weights.rows`.
    #[inline(always)]
    unsafe fn store<S: Isa>(&self, s: S, entry: usize, row: usize, sum: S::F) {
        let n = (self.weights.rows - row).min(LANES);
        // SAFETY: the output has `weights.rows` values at each entry.
        unsafe { s.store_first(self.output.base::<f32>().add(entry * self.weights.rows + row), sum, n) }
    }
}

impl<D: Dot + 'static> Kernel for Product<D> {
    fn scratch_bytes(&self) -> usize {
        self.panel_bytes().max(64 + size_of::<Sums>())
    }

    fn tasks(&self, step: &Step) -> usize {
        self.pairing.problems(self.output.rows(step)) * self.weights.rows.div_ceil(self.chunk)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, s: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let Weights { base, matrix_stride, row_stride, rows, .. } = self.weights;
        let chunks = rows.div_ceil(self.chunk);
        let entries = self.output.rows(step);
        let (layout, parts) = (self.activations.layout(), self.activations.parts());
        // SAFETY: the caller's: buffers live, groups are made, activations are filled; scratch has `panel_bytes`, and no
        // problem has more entries than the capacity.
        unsafe {
            let Some(problem) = self.pairing.problem(task / chunks, entries) else { return };
            let first = task % chunks * self.chunk;
            let matrix = base.add(problem.matrix * matrix_stride);
            let lanes =
                |row: usize| Rows::new(matrix.add(row * row_stride), row_stride, (rows - row).min(LANES));
            let groups = (first..rows.min(first + self.chunk)).step_by(LANES);
            let memory = scratch.as_mut_ptr();
            let memory = memory.add(memory.align_offset(64));
            let met = problem.count * parts;
            if met < PANEL_ROWS {
                let sums = &mut *memory.cast::<Sums>();
                for row in groups {
                    let lanes = lanes(row);
                    for index in 0..problem.count {
                        let entry = problem.output(index);
                        let a = |part: usize| self.activations.row(problem.input(entry), part);
                        let sum = match parts {
                            1 => D::few::<S, 1>(s, &lanes, [a(0)], layout, sums),
                            _ => D::few::<S, 2>(s, &lanes, [a(0), a(1)], layout, sums),
                        };
                        self.store(s, entry, row, sum);
                    }
                }
                return;
            }
            let panel = &mut *memory.cast::<Panel>();
            let sums = memory.add(size_of::<Panel>()).cast::<[f32; LANES]>();
            let a = sums.add(self.capacity * parts).cast::<Row>();
            for index in 0..problem.count {
                let input = problem.input(problem.output(index));
                for part in 0..parts {
                    a.add(index * parts + part).write(self.activations.row(input, part));
                }
            }
            for row in groups {
                for index in 0..met {
                    sums.add(index).write([0.0; LANES]);
                }
                let lanes = lanes(row);
                for part in 0..layout.k().div_ceil(PANEL_K) {
                    let n = D::unpack(s, &lanes, part, layout, panel);
                    let mut index = 0;
                    while index < met {
                        let left = met - index;
                        let at = (a.add(index).cast_const(), sums.add(index));
                        index += match S::PANEL_TOKENS.min(left) {
                            8.. => meet::<S, D, 8>(s, panel, at, part, n),
                            4.. => meet::<S, D, 4>(s, panel, at, part, n),
                            2.. => meet::<S, D, 2>(s, panel, at, part, n),
                            _ => meet::<S, D, 1>(s, panel, at, part, n),
                        };
                    }
                }
                for index in 0..problem.count {
                    let part = |part: usize| s.load(sums.add(index * parts + part).cast());
                    self.store(s, problem.output(index), row, together(s, parts, part));
                }
            }
        }
    }
}

/// [`Dot::many`] for `T` neighbouring entries; returns `T`.
///
/// # Safety
/// `T` rows and sums, the rows filled.
#[inline(always)]
unsafe fn meet<S: Isa, D: Dot, const T: usize>(
    s: S,
    panel: &Panel,
    (a, sums): (*const Row, *mut [f32; LANES]),
    part: usize,
    n: usize,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let before = array!(T, |t| s.load(sums.add(t).cast()));
        let after = D::many::<S, T>(s, panel, array!(T, |t| *a.add(t)), part, n, before);
        for (t, sum) in after.into_iter().enumerate() {
            s.store(sums.add(t).cast(), sum);
        }
    }
    T
}
