//! Shapes with symbolic extents, and tensors as devices see them.

use crate::{DType, Step};
use std::fmt;

/// One dimension of a [`Shape`].
///
/// Graphs are built and compiled once; the symbolic extents get their values from the [`Step`] of each run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Extent {
    /// The same in every step.
    Fixed(usize),
    /// The tokens fed in this step, [`Step::rows`].
    Rows,
    /// The rows whose result is wanted in this step, [`Step::outputs`].
    Outputs,
}

impl Extent {
    /// The value of this extent in `step`.
    pub fn at(self, step: &Step) -> usize {
        match self {
            Extent::Fixed(n) => n,
            Extent::Rows => step.rows,
            Extent::Outputs => step.outputs,
        }
    }

    /// The value, if it is the same in every step.
    pub fn fixed(self) -> Option<usize> {
        match self {
            Extent::Fixed(n) => Some(n),
            _ => None,
        }
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Extent::Fixed(n) => write!(f, "{n}"),
            Extent::Rows => f.write_str("rows"),
            Extent::Outputs => f.write_str("outputs"),
        }
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<usize> for Extent {
    fn from(n: usize) -> Self {
        Extent::Fixed(n)
    }
}

/// Extents from the outermost to the innermost (the reverse of GGUF's `ne` order). At least one, at most four.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    extents: [Extent; Shape::MAX_RANK],
    rank: u8,
}

impl Shape {
    /// The largest rank a shape can have.
    pub const MAX_RANK: usize = 4;

    /// A shape with these extents, outermost first.
    ///
    /// # Panics
    /// If there are none or more than [`Shape::MAX_RANK`].
    pub fn new(extents: &[Extent]) -> Self {
        assert!((1..=Self::MAX_RANK).contains(&extents.len()), "a shape has 1 to 4 extents: {extents:?}");
        let mut all = [Extent::Fixed(1); Self::MAX_RANK];
        all[..extents.len()].copy_from_slice(extents);
        Shape { extents: all, rank: extents.len() as u8 }
    }

    /// A shape without symbolic extents.
    ///
    /// # Panics
    /// As [`Shape::new`].
    pub fn fixed(extents: &[usize]) -> Self {
        let all: Vec<Extent> = extents.iter().map(|&n| Extent::Fixed(n)).collect();
        Self::new(&all)
    }

    /// `[rows, rest…]`.
    pub fn rows(rest: &[usize]) -> Self {
        let all: Vec<Extent> =
            std::iter::once(Extent::Rows).chain(rest.iter().map(|&n| Extent::Fixed(n))).collect();
        Self::new(&all)
    }

    /// The extents, outermost first.
    pub fn extents(&self) -> &[Extent] {
        &self.extents[..self.rank as usize]
    }

    /// Number of extents.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// The innermost extent, which no operation lets vary.
    pub fn inner(&self) -> usize {
        self.extents()[self.rank() - 1].fixed().unwrap_or(0)
    }

    /// Whether no extent but the outermost varies from step to step: only then can a tensor be dense.
    pub fn is_fixed_inside(&self) -> bool {
        self.extents()[1..].iter().all(|extent| extent.fixed().is_some())
    }

    /// The values of all extents in `step`.
    pub fn at(&self, step: &Step) -> Vec<usize> {
        self.extents().iter().map(|e| e.at(step)).collect()
    }

    /// Number of elements in `step`; `usize::MAX` if there are more.
    pub fn elements(&self, step: &Step) -> usize {
        self.extents().iter().fold(1, |n: usize, e| n.saturating_mul(e.at(step)))
    }

    /// Number of elements, if no extent is symbolic.
    pub fn fixed_elements(&self) -> Option<usize> {
        self.extents().iter().try_fold(1usize, |n, e| n.checked_mul(e.fixed()?))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, e) in self.extents().iter().enumerate() {
            write!(f, "{}{e}", if i == 0 { "" } else { ", " })?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a tensor is, wherever it lies: format, shape, and the bytes between neighbours of each outer axis.
///
/// The innermost axis is always contiguous: `row_bytes(inner)` bytes of whole blocks. A view (slice, reshape)
/// differs from its base only in shape, strides and the offset of its [`Place`](crate::Place).
///
/// No extent is too large to ask about: byte counts that no `usize` holds are `usize::MAX`, for which no buffer is
/// large enough.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorDesc {
    /// Storage format of the elements.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Shape,
    /// `strides[i]`: bytes from one index of axis `i` to the next, for every axis but the innermost (whose
    /// entry, like those past the rank, is 0).
    pub strides: [usize; Shape::MAX_RANK],
}

impl TensorDesc {
    /// A dense tensor.
    ///
    /// # Panics
    /// Unless its shape is [fixed inside](Shape::is_fixed_inside).
    pub fn new(dtype: DType, shape: Shape) -> Self {
        assert!(shape.is_fixed_inside(), "only the outermost extent of a dense tensor may vary: {shape}");
        let mut strides = [0; Shape::MAX_RANK];
        let mut bytes = dtype.row_bytes(shape.inner());
        for axis in (0..shape.rank() - 1).rev() {
            strides[axis] = bytes;
            bytes = bytes.saturating_mul(shape.extents()[axis].fixed().unwrap_or(1));
        }
        TensorDesc { dtype, shape, strides }
    }

    /// Bytes of one innermost row.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.shape.inner())
    }

    /// Whether the strides are those of [`TensorDesc::new`].
    pub fn is_dense(&self) -> bool {
        let outer = self.shape.rank() - 1;
        self.shape.is_fixed_inside()
            && self.strides[..outer] == TensorDesc::new(self.dtype, self.shape).strides[..outer]
    }

    /// Bytes from the first element to one past the last in `step`; 0 if empty.
    pub fn span_bytes(&self, step: &Step) -> usize {
        let extents = self.shape.at(step);
        if extents.contains(&0) {
            return 0;
        }
        let outer = extents[..extents.len() - 1].iter().zip(&self.strides);
        outer.fold(self.inner_bytes(&extents), |bytes, (n, stride)| {
            bytes.saturating_add((n - 1).saturating_mul(*stride))
        })
    }

    /// Bytes of the elements themselves in `step` (without gaps between strided rows).
    pub fn dense_bytes(&self, step: &Step) -> usize {
        let extents = self.shape.at(step);
        let outer = &extents[..extents.len() - 1];
        outer.iter().fold(self.inner_bytes(&extents), |bytes, n| bytes.saturating_mul(*n))
    }

    /// Bytes of an innermost row; the only row of a vector may have a symbolic extent.
    fn inner_bytes(&self, extents: &[usize]) -> usize {
        self.dtype.row_bytes(extents[extents.len() - 1])
    }
}

impl fmt::Debug for TensorDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)?;
        if !self.is_dense() {
            write!(f, " strides {:?}", &self.strides[..self.shape.rank() - 1])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_follow_the_step() {
        let step = Step { rows: 3, past: 0, outputs: 2 };
        let ids = TensorDesc::new(DType::I32, Shape::new(&[Extent::Rows]));
        assert_eq!((ids.span_bytes(&step), ids.dense_bytes(&step)), (12, 12));

        // Columns of rows that are 10 values wide.
        let mut view = TensorDesc::new(DType::F32, Shape::rows(&[4]));
        view.strides[0] = 40;
        assert_eq!((view.span_bytes(&step), view.dense_bytes(&step)), (2 * 40 + 16, 3 * 16));
        assert_eq!(view.span_bytes(&Step { rows: 0, ..step }), 0);

        let blocks = TensorDesc::new(DType::Q8_0, Shape::fixed(&[2, 40]));
        assert_eq!(blocks.span_bytes(&step), 2 * 2 * 34);
    }

    #[test]
    fn bytes_beyond_counting_are_the_most_there_can_be() {
        let step = Step { rows: usize::MAX, past: 0, outputs: 0 };
        let fixed = |extents: &[usize]| TensorDesc::new(DType::F32, Shape::fixed(extents));
        // Each but the last would be nothing, or little, modulo 2⁶⁴.
        for desc in [
            fixed(&[1 << 60, 4]),
            fixed(&[1 << 62]),
            fixed(&[2, 1 << 61, 4]),
            fixed(&[3, 1 << 31, 1 << 31, 2]),
            TensorDesc::new(DType::Q8_0, Shape::fixed(&[usize::MAX])),
            TensorDesc::new(DType::F32, Shape::rows(&[16])),
        ] {
            assert_eq!(
                (desc.span_bytes(&step), desc.dense_bytes(&step)),
                (usize::MAX, usize::MAX),
                "{desc:?}"
            );
        }
        let mut repeated = fixed(&[1 << 62, 4]);
        repeated.strides[0] = 0;
        assert_eq!((repeated.span_bytes(&step), repeated.dense_bytes(&step)), (16, usize::MAX));
    }
}
