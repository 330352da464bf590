//! Which bytes of a storage a view touches, in any step.

use crate::graph::{StorageKind, ValueInfo};
use backend_api::{Extent, Step};
use serde::Serialize;

/// How often a [`Span`] repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Count {
    /// Once.
    One,
    /// For each token of the step.
    Rows,
    /// For each row whose result is wanted.
    Outputs,
    /// For each cached row that the step sees.
    Cached,
}

/// `count` rows of `row` bytes, `pitch` bytes apart, the first at `offset`: everything from the first byte to the
/// last that a view touches, the gaps between included, because copies are made in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Span {
    /// Bytes from the start of the storage.
    pub offset: usize,
    /// Bytes of a row.
    pub row: usize,
    /// Bytes from one row to the next.
    pub pitch: usize,
    /// Rows.
    pub count: Count,
}

impl Span {
    /// `bytes` at `offset`, the same in every step.
    pub fn fixed(offset: usize, bytes: usize) -> Self {
        Span { offset, row: bytes, pitch: 0, count: Count::One }
    }

    /// What a value touches. Of a state, the rows that are cached.
    pub fn of(info: &ValueInfo, kind: StorageKind) -> Self {
        let desc = &info.desc;
        let extents = desc.shape.extents();
        let rank = extents.len();
        // Bytes between the innermost rows of everything below the outermost extent.
        let below: usize = (1..rank.saturating_sub(1))
            .map(|axis| (extents[axis].fixed().unwrap_or(1) - 1) * desc.strides[axis])
            .sum();
        let (row, pitch) = match rank {
            1 => (desc.dtype.row_bytes(1), desc.dtype.row_bytes(1)),
            _ => (below + desc.row_bytes(), desc.strides[0]),
        };
        let count = match (kind, extents[0]) {
            (StorageKind::State, _) => Count::Cached,
            (_, Extent::Rows) => Count::Rows,
            (_, Extent::Outputs) => Count::Outputs,
            (_, Extent::Fixed(n)) => {
                let bytes = if rank == 1 { desc.dtype.row_bytes(n) } else { (n - 1) * pitch + row };
                return Span::fixed(info.offset, bytes);
            }
        };
        Span { offset: info.offset, row, pitch, count }
    }

    /// Bytes from the first to past the last in `step`.
    pub fn bytes(&self, step: &Step) -> usize {
        let rows = match self.count {
            Count::One => 1,
            Count::Rows => step.rows,
            Count::Outputs => step.outputs,
            Count::Cached => step.kv_len(),
        };
        if rows == 0 { 0 } else { (rows - 1) * self.pitch + self.row }
    }

    /// The smallest span around both, if they repeat alike.
    pub fn around(&self, other: &Span) -> Option<Span> {
        if (self.pitch, self.count) != (other.pitch, other.count) {
            return None;
        }
        let offset = self.offset.min(other.offset);
        let end = (self.offset + self.row).max(other.offset + other.row);
        Some(Span { offset, row: end - offset, ..*self })
    }

    /// Whether every byte of `other` is one of these, in every step.
    pub fn covers(&self, other: &Span) -> bool {
        self.around(other) == Some(*self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend_api::{DType, Shape, TensorDesc};

    fn value(desc: TensorDesc, offset: usize) -> ValueInfo {
        ValueInfo { storage: 0, offset, desc, producer: None }
    }

    #[test]
    fn a_span_is_what_the_descriptor_spans() {
        let whole = TensorDesc::new(DType::F32, Shape::rows(&[4, 24]));
        let mut part = TensorDesc { shape: Shape::rows(&[4, 8]), ..whole };
        part.strides = whole.strides;
        let ids = TensorDesc::new(DType::I32, Shape::rows(&[]));
        let weight = TensorDesc::new(DType::Q8_0, Shape::fixed(&[3, 64]));
        let row = TensorDesc::new(DType::F32, Shape::fixed(&[7]));
        for rows in [0, 1, 5] {
            let step = Step { rows, past: 3, outputs: 1 };
            for desc in [whole, part, ids, weight, row] {
                let span = Span::of(&value(desc, 64), StorageKind::Activation);
                assert_eq!(span.bytes(&step), desc.span_bytes(&step), "{desc:?} of {rows} rows");
                assert_eq!(span.offset, 64);
            }
        }
    }

    #[test]
    fn a_state_is_read_up_to_the_step() {
        let cache = TensorDesc::new(DType::F16, Shape::fixed(&[100, 40]));
        let span = Span::of(&value(cache, 0), StorageKind::State);
        assert_eq!(span.bytes(&Step { rows: 2, past: 5, outputs: 1 }), 7 * 80);
    }

    #[test]
    fn neighbours_join_into_the_whole() {
        let a = Span { offset: 0, row: 64, pitch: 96, count: Count::Rows };
        let b = Span { offset: 64, row: 32, ..a };
        let both = a.around(&b).expect("alike");
        assert_eq!(both, Span { row: 96, ..a });
        assert!(both.covers(&a) && both.covers(&b) && !a.covers(&b));
        assert_eq!(a.around(&Span::fixed(0, 64)), None);
    }
}
