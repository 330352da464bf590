//! Slices and reshapes: the arithmetic of views, which never touch a byte.

use backend_api::{Extent, Shape, TensorDesc};
use std::ops::Range;

/// The part `range` of `axis`: bytes to skip, and what is left.
pub(crate) fn slice(x: &TensorDesc, axis: usize, range: Range<usize>) -> Result<(usize, TensorDesc), String> {
    let rank = x.shape.rank();
    if axis >= rank {
        return Err(format!("slice along axis {axis} of {}", x.shape));
    }
    let Some(extent) = x.shape.extents()[axis].fixed() else {
        return Err(format!("slice along axis {axis} of {}, which varies from step to step", x.shape));
    };
    if range.start >= range.end || range.end > extent {
        return Err(format!("slice {range:?} of axis {axis} of {}", x.shape));
    }
    let offset = if axis + 1 < rank {
        range.start * x.strides[axis]
    } else {
        // The last slice of a row may end in a padded block, all others at a whole one.
        let block = x.dtype.block_len();
        if !range.start.is_multiple_of(block) || !(range.end.is_multiple_of(block) || range.end == extent) {
            return Err(format!("slice {range:?} cuts blocks of {block} values of {}", x.dtype));
        }
        range.start / block * x.dtype.block_bytes()
    };
    let mut extents = x.shape.extents().to_vec();
    extents[axis] = range.len().into();
    Ok((offset, TensorDesc { shape: Shape::new(&extents), ..*x }))
}

/// The same elements in the same order under other extents, where strides allow it without a copy.
///
/// Axes are matched in groups of equal products, from the outermost: the old axes of a group must lie as one, and
/// the new ones divide what they span. A symbolic extent forms a group alone.
pub(crate) fn reshape(x: &TensorDesc, to: &[Extent]) -> Result<TensorDesc, String> {
    if to.is_empty() || to.len() > Shape::MAX_RANK {
        return Err(format!("reshape of {} to {} extents", x.shape, to.len()));
    }
    let shape = Shape::new(to);
    let from = x.shape.extents();
    let refuse = |why: &str| Err(format!("reshape of {} to {shape}: {why}", x.shape));
    let mut strides = [0; Shape::MAX_RANK];
    let (mut old, mut new) = (0, 0);
    while old < from.len() || new < to.len() {
        let Some((old_end, new_end)) = group(&from[old..], &to[new..]) else {
            return refuse("the numbers of elements differ");
        };
        let (old_end, new_end) = (old + old_end, new + new_end);
        let Some(unit) = joint_stride(x, old..old_end) else {
            return refuse("the elements do not lie in one piece");
        };
        let inner = old_end == from.len();
        let mut bytes = unit;
        for axis in (new..new_end).rev() {
            let extent = to[axis].fixed().unwrap_or(1);
            if inner && axis + 1 == to.len() {
                let block = x.dtype.block_len();
                if !extent.is_multiple_of(block) && new_end - new > 1 && x.shape.inner() != extent {
                    return refuse(&format!("rows would end within blocks of {block} values"));
                }
                bytes = x.dtype.row_bytes(extent);
            } else {
                strides[axis] = bytes;
                bytes *= extent;
            }
        }
        (old, new) = (old_end, new_end);
    }
    Ok(TensorDesc { dtype: x.dtype, shape, strides })
}

/// How many leading extents of each side have the same product; everything that is left, where only ones are.
fn group(old: &[Extent], new: &[Extent]) -> Option<(usize, usize)> {
    let symbolic = |e: Option<&Extent>| e.is_some_and(|e| e.fixed().is_none());
    if symbolic(old.first()) || symbolic(new.first()) {
        return (old.first() == new.first()).then_some((1, 1));
    }
    let number = |e: &Extent| e.fixed();
    let (mut i, mut j) = (1.min(old.len()), 1.min(new.len()));
    let mut a = old.first().map_or(Some(1), number)?;
    let mut b = new.first().map_or(Some(1), number)?;
    while a != b {
        let (side, at, n) = if a < b { (old, &mut i, &mut a) } else { (new, &mut j, &mut b) };
        *n = n.checked_mul(side.get(*at)?.fixed()?)?;
        *at += 1;
    }
    // Extents of 1 at the end have no group of their own to start.
    let ones = |rest: &[Extent]| rest.iter().all(|e| *e == Extent::Fixed(1));
    if ones(&old[i..]) && ones(&new[j..]) {
        return Some((old.len(), new.len()));
    }
    Some((i, j))
}

/// Bytes between neighbours of the innermost of `axes`, if all of them can be walked as one axis.
fn joint_stride(x: &TensorDesc, axes: Range<usize>) -> Option<usize> {
    let extents = x.shape.extents();
    let last = x.shape.rank() - 1;
    let mut wanted = None;
    let mut unit = None;
    for axis in axes.rev() {
        let extent = extents[axis].fixed().unwrap_or(1);
        if axis == last {
            // More rows can follow only whole blocks.
            wanted = Some(x.row_bytes());
            unit = Some(x.row_bytes());
            continue;
        }
        if extent == 1 && extents[axis].fixed().is_some() {
            continue;
        }
        if wanted.is_some_and(|bytes| bytes != x.strides[axis]) {
            return None;
        }
        unit = unit.or(Some(x.strides[axis]));
        wanted = Some(x.strides[axis] * extent);
    }
    Some(unit.unwrap_or(x.row_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use backend_api::{DType, Step};
    use proptest::prelude::*;

    /// Byte offsets of all elements, in order; in blocks, of all blocks.
    fn offsets(x: &TensorDesc) -> Vec<usize> {
        let extents = x.shape.at(&Step { rows: 3, past: 0, outputs: 2 });
        let mut offsets = vec![0];
        for (axis, &extent) in extents.iter().enumerate() {
            let inner = axis + 1 == extents.len();
            let (count, stride) = match inner {
                true => (extent.div_ceil(x.dtype.block_len()), x.dtype.block_bytes()),
                false => (extent, x.strides[axis]),
            };
            offsets = offsets.iter().flat_map(|base| (0..count).map(move |i| base + i * stride)).collect();
        }
        offsets
    }

    fn shape(extents: Vec<usize>, rows: bool) -> Shape {
        match rows {
            true => Shape::rows(&extents),
            false => Shape::fixed(&extents),
        }
    }

    proptest! {
        /// A reshape that is accepted walks the same bytes in the same order.
        #[test]
        fn a_reshape_walks_the_same_elements(
            from in prop::collection::vec(prop::sample::select(vec![1usize, 2, 3, 4, 6]), 1..=3),
            to in prop::collection::vec(prop::sample::select(vec![1usize, 2, 3, 4, 6, 8, 12]), 1..=3),
            rows: bool,
            cut in prop::option::of((0usize..3, 0usize..2, 1usize..3)),
        ) {
            let mut x = TensorDesc::new(DType::F32, shape(from, rows));
            if let Some((axis, start, len)) = cut
                && let Ok((_, part)) = slice(&x, axis, start..start + len)
            {
                x = part;
            }
            let to = shape(to, rows);
            let step = Step { rows: 3, past: 0, outputs: 2 };
            match reshape(&x, to.extents()) {
                Ok(y) => prop_assert_eq!(offsets(&x), offsets(&y)),
                // A dense tensor takes every shape of as many elements.
                Err(_) => prop_assert!(!x.is_dense() || x.shape.elements(&step) != to.elements(&step)),
            }
        }

        /// A slice is the elements between its ends.
        #[test]
        fn a_slice_skips_to_its_start(a in 1usize..4, b in 1usize..4, start in 0usize..4, len in 1usize..4) {
            let x = TensorDesc::new(DType::F32, Shape::fixed(&[a, b]));
            for (axis, extent) in [a, b].into_iter().enumerate() {
                let Ok((skip, part)) = slice(&x, axis, start..start + len) else {
                    prop_assert!(start + len > extent);
                    continue;
                };
                let inside = |index: &usize| {
                    let place = if axis == 0 { index / b } else { index % b };
                    (start..start + len).contains(&place)
                };
                let expected: Vec<usize> = (0..a * b).filter(inside).map(|index| 4 * index).collect();
                let found: Vec<usize> = offsets(&part).into_iter().map(|offset| offset + skip).collect();
                prop_assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn blocks_are_never_cut() {
        let x = TensorDesc::new(DType::Q8_0, Shape::fixed(&[4, 96]));
        assert_eq!(
            slice(&x, 1, 32..96).map(|(skip, part)| (skip, part.shape)),
            Ok((34, Shape::fixed(&[4, 64])))
        );
        assert!(slice(&x, 1, 16..96).is_err() && slice(&x, 1, 0..48).is_err());
        let heads = reshape(&x, &[4.into(), 3.into(), 32.into()]).expect("whole blocks");
        assert_eq!(heads.strides[..2], [102, 34]);
        assert!(reshape(&x, &[8.into(), 48.into()]).is_err());
    }
}
