//! A value of a program as kernels see it: an address, extents and strides.

use backend_api::{Capacity, DType, Shape, Step, TensorDesc};
use std::ops::Range;

/// A tensor at an address. Computing an address is safe; using it is what the `unsafe` of
/// [`Kernel::run`](crate::kernels::Kernel::run) is about.
///
/// Outputs are aligned to 4 bytes. Inputs start anywhere (imported weights lie where the file has them), so their
/// elements are loaded as vectors, which need no alignment, or read unaligned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    base: *mut u8,
    desc: TensorDesc,
}

// SAFETY: a `Tensor` is an address. Whoever dereferences it owes exclusion (see `Kernel::run`).
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Tensor {
    pub(crate) fn new(base: *mut u8, desc: TensorDesc) -> Self {
        Tensor { base, desc }
    }

    pub(crate) fn desc(&self) -> &TensorDesc {
        &self.desc
    }

    pub(crate) fn dtype(&self) -> DType {
        self.desc.dtype
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.desc.shape
    }

    /// The innermost extent.
    pub(crate) fn width(&self) -> usize {
        self.desc.shape.inner()
    }

    /// The value of extent `axis` in `step`.
    pub(crate) fn extent(&self, axis: usize, step: &Step) -> usize {
        self.desc.shape.extents()[axis].at(step)
    }

    /// Bytes between neighbours of `axis`.
    pub(crate) fn stride(&self, axis: usize) -> usize {
        self.desc.strides[axis]
    }

    /// Innermost rows in `step`: the product of all other extents.
    pub(crate) fn rows(&self, step: &Step) -> usize {
        let extents = self.desc.shape.extents();
        product(extents[..extents.len() - 1].iter().map(|extent| extent.at(step)))
    }

    /// Innermost rows of each index of the outermost axis.
    pub(crate) fn inner_rows(&self) -> usize {
        let extents = self.desc.shape.extents();
        product(extents[1..extents.len() - 1].iter().map(|extent| extent.fixed().unwrap_or(1)))
    }

    /// The address of the first element.
    pub(crate) fn base<T>(&self) -> *mut T {
        self.base.cast()
    }

    /// The address of innermost row `index`, counted over all outer axes.
    #[inline(always)]
    pub(crate) fn row<T>(&self, mut index: usize) -> *mut T {
        let extents = self.desc.shape.extents();
        let mut offset = 0;
        // Only the outermost extent may be symbolic here (compile checks it), and it needs no division.
        for axis in (1..extents.len().saturating_sub(1)).rev() {
            let extent = extents[axis].fixed().unwrap_or(1);
            offset += index % extent * self.desc.strides[axis];
            index /= extent;
        }
        offset += index * self.desc.strides[0];
        self.base.wrapping_add(offset).cast()
    }

    /// The address of element `(i, j, 0…)`.
    #[inline(always)]
    pub(crate) fn at<T>(&self, i: usize, j: usize) -> *mut T {
        self.base.wrapping_add(i * self.desc.strides[0] + j * self.desc.strides[1]).cast()
    }

    /// The addresses from its first byte to its last, for the largest step.
    pub(crate) fn span(&self, capacity: &Capacity) -> Range<usize> {
        let start = self.base as usize;
        start..start.saturating_add(self.desc.span_bytes(&capacity.full_step()))
    }
}

/// Whether two spans have no byte in common.
pub(crate) fn apart(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.end <= b.start || b.end <= a.start
}

/// A product of extents, `usize::MAX` if it is more: as a size, one that no allocation has. (Tensors without elements
/// may have any extents.)
pub(crate) fn product(factors: impl IntoIterator<Item = usize>) -> usize {
    factors.into_iter().fold(1, usize::saturating_mul)
}
