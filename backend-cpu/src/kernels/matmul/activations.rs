//! Activations rounded to 8 bits per block, beside quantised weights.
//!
//! A block of 32 or 256 values (as long as the weights' blocks) becomes `d × q` with `d = max |x| / 127` in f32 and
//! `q` rounded to nearest, ties to even. Sums of `q` are kept beside them: they weigh the weights' minima and
//! zero points.

use crate::{
    builder::Builder,
    isa::Isa,
    kernels::{Kernel, Scratch},
    tensor::Tensor,
};
use backend_api::{DType, Step};

/// Where things lie in a row of quantised activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    /// Values in a row.
    k: usize,
    /// Values in a block.
    block: usize,
}

/// i16 sums kept for a block of 256: 16 of 16 values, 8 of 32 values, 8 zeros.
const K_SUMS: usize = 32;

impl Layout {
    pub(crate) fn new(k: usize, weights: DType) -> Self {
        Layout { k, block: weights.block_len() }
    }

    /// Values in a row.
    pub(crate) fn k(self) -> usize {
        self.k
    }

    pub(crate) fn blocks(self) -> usize {
        self.k / self.block
    }

    /// Quants come first, padded with zeros to whole vectors.
    fn padded(self) -> usize {
        self.k.next_multiple_of(64)
    }

    fn scales_at(self) -> usize {
        self.padded()
    }

    fn sums_at(self) -> usize {
        self.scales_at() + (4 * self.blocks()).next_multiple_of(64)
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(self) -> usize {
        let sums = if self.block == 256 { 2 * K_SUMS } else { 4 };
        self.sums_at() + (sums * self.blocks()).next_multiple_of(64)
    }
}

/// A row of quantised activations.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    base: *const u8,
    scales: *const f32,
    sums: *const u8,
}

impl Row {
    #[inline(always)]
    pub(crate) fn new(base: *const u8, layout: Layout) -> Self {
        let scales = base.wrapping_add(layout.scales_at()).cast();
        Row { base, scales, sums: base.wrapping_add(layout.sums_at()) }
    }

    /// Quants from value `index` on.
    #[inline(always)]
    pub(crate) fn quants(self, index: usize) -> *const i8 {
        self.base.wrapping_add(index).cast()
    }

    /// # Safety
    /// The row is filled, and has this block.
    #[inline(always)]
    pub(crate) unsafe fn scale(self, block: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe { *self.scales.add(block) }
    }

    /// The 16 sums of a block of 256 for groups of 16 or 32 (then 8 are zero).
    #[inline(always)]
    pub(crate) fn group_sums(self, block: usize, group: usize) -> *const i16 {
        self.sums.cast::<i16>().wrapping_add(K_SUMS * block + if group == 32 { 16 } else { 0 })
    }

    /// # Safety
    /// The row is filled, and has this block of 32.
    #[inline(always)]
    pub(crate) unsafe fn sum(self, block: usize) -> i32 {
        // SAFETY: the caller's.
        unsafe { *self.sums.cast::<i32>().add(block) }
    }
}

/// Rows of quantised activations, one for each innermost row of a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Quantized {
    base: *mut u8,
    layout: Layout,
}

// SAFETY: an address; `Kernel::run` is where it is used.
unsafe impl Send for Quantized {}
// SAFETY: as above.
unsafe impl Sync for Quantized {}

impl Quantized {
    /// `x` beside weights of this format: quantised once for all products of a program that use it.
    pub(crate) fn of(x: &Tensor, weights: DType, builder: &mut Builder) -> Self {
        let layout = Layout::new(x.width(), weights);
        builder.shared(x, layout.block as u64, |builder| {
            let rows = x.rows(&builder.capacity().full_step());
            let base = builder.scratch_buffer(rows * layout.row_bytes());
            let quantized = Quantized { base, layout };
            builder.push(Quantize { x: *x, to: quantized });
            quantized
        })
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    #[inline(always)]
    pub(crate) fn row(&self, index: usize) -> Row {
        Row::new(self.base.wrapping_add(index * self.layout.row_bytes()), self.layout)
    }
}

struct Quantize {
    x: Tensor,
    to: Quantized,
}

impl Kernel for Quantize {
    fn tasks(&self, step: &Step) -> usize {
        self.x.rows(step)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, _step: &Step, task: usize, _scratch: &mut Scratch) {
        let layout = self.to.layout;
        // SAFETY: the row of `x` has `k` values; the row at `to` has room for the layout.
        unsafe {
            let from = self.x.row::<f32>(task);
            let to = self.to.base.add(task * layout.row_bytes());
            for index in layout.k..layout.padded() {
                *to.add(index) = 0;
            }
            let sums = to.add(layout.sums_at());
            for block in 0..layout.blocks() {
                let (x, q) = (from.add(block * layout.block), to.add(block * layout.block).cast::<i8>());
                let d = match layout.block {
                    32 => quantize::<S, 2>(isa, x, q),
                    _ => quantize::<S, 16>(isa, x, q),
                };
                *to.add(layout.scales_at()).cast::<f32>().add(block) = d;
                if layout.block == 32 {
                    *sums.cast::<i32>().add(block) = (0..32).map(|i| i32::from(*q.add(i))).sum();
                } else {
                    let sums = sums.cast::<i16>().add(K_SUMS * block);
                    for group in 0..16 {
                        *sums.add(group) = (0..16).map(|i| i16::from(*q.add(16 * group + i))).sum();
                    }
                    for group in 0..8 {
                        *sums.add(16 + group) = *sums.add(2 * group) + *sums.add(2 * group + 1);
                        *sums.add(24 + group) = 0;
                    }
                }
            }
        }
    }
}

/// Rounds `16 × N` values and returns their scale.
#[inline(always)]
unsafe fn quantize<S: Isa, const N: usize>(s: S, x: *const f32, q: *mut i8) -> f32 {
    // SAFETY: the caller owes `16 × N` readable values and writable bytes.
    unsafe {
        let mut largest = s.splat(0.0);
        for i in 0..N {
            largest = s.max(s.abs(s.load(x.add(16 * i))), largest);
        }
        let largest = s.max_lane(largest);
        let inverse = s.splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
        for i in 0..N {
            s.store_i8(q.add(16 * i), s.round_i32(s.mul(s.load(x.add(16 * i)), inverse)));
        }
        largest / 127.0
    }
}
