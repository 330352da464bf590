//! The searches that encoders share: scales with small squared error.
//!
//! Each tries some grids around the obvious one, rounds the values to each, and solves for the scale (and
//! offset) that is best for the levels so found: a step of least squares from each of several starts.

use super::{half, to_half};

/// Below this a value is lost in any block: far smaller than the smallest f16 scale.
const NOTHING: f32 = 1e-15;

/// Starts tried on either side of the obvious one.
const STARTS: i32 = 6;

/// The value of largest magnitude, with its sign.
pub(super) fn peak(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |peak: f32, &v| if v.abs() > peak.abs() { v } else { peak })
}

/// The `scale` of either sign for which `scale × level` is near `values`.
///
/// `reach` is the level of largest magnitude, onto which the peak falls at first; the other starts differ by up
/// to `spread` levels. `nearest` rounds to a level.
pub(super) fn scale(values: &[f32], reach: f32, spread: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let peak = peak(values);
    if peak.abs() < NOTHING {
        return 0.0;
    }
    let mut best = (0.0, 0.0);
    for start in -STARTS..=STARTS {
        let inverse = (reach + spread * start as f32 / STARTS as f32) / peak;
        let (mut xl, mut ll) = (0.0f64, 0.0f64);
        for &x in values {
            let level = f64::from(nearest(x * inverse));
            xl += f64::from(x) * level;
            ll += level * level;
        }
        // With the best scale xl / ll the error is Σx² − xl² / ll.
        if ll > 0.0 && xl * xl / ll > best.0 {
            best = (xl * xl / ll, xl / ll);
        }
    }
    best.1 as f32
}

/// `(scale ≥ 0, offset)` for which `scale × level + offset` is near `values`, with levels `0..=top`.
///
/// With `below_zero`, the offset is at most 0.
pub(super) fn affine(values: &[f32], top: f32, below_zero: bool) -> (f32, f32) {
    let limit = if below_zero { 0.0 } else { f32::INFINITY };
    let low = values.iter().copied().fold(limit, f32::min);
    let high = values.iter().copied().fold(low, f32::max);
    if high - low < NOTHING {
        return (0.0, low);
    }
    let n = values.len() as f64;
    let mut best = (f64::INFINITY, 0.0, f64::from(low));
    for start in -STARTS..=STARTS {
        let inverse = (top + start as f32 / STARTS as f32) / (high - low);
        let level = |x: f32| f64::from(((x - low) * inverse).round_ties_even().clamp(0.0, top));
        let (mut x1, mut l1, mut xl, mut ll) = (0.0, 0.0, 0.0, 0.0);
        for &x in values {
            let (x, l) = (f64::from(x), level(x));
            x1 += x;
            l1 += l;
            xl += x * l;
            ll += l * l;
        }
        let determinant = n * ll - l1 * l1;
        let mut scale = (n * xl - l1 * x1) / determinant;
        let mut offset = (ll * x1 - l1 * xl) / determinant;
        // Equal levels leave the offset undetermined; then, as with one that is not allowed, there is none.
        if below_zero && (determinant == 0.0 || offset > 0.0) {
            (scale, offset) = (xl / ll, 0.0);
        }
        let error: f64 = values.iter().map(|&x| (f64::from(x) - scale * level(x) - offset).powi(2)).sum();
        if scale >= 0.0 && error < best.0 {
            best = (error, scale, offset);
        }
    }
    (best.1 as f32, best.2 as f32)
}

/// `(d as f16, integers)` for which `d × integer` is near the scales of a block's groups, with integers
/// `low..=-low - 1`. The largest scale falls onto `low`, which the encoding reaches and `-low` it does not.
pub(super) fn signed_scales<const N: usize>(wanted: &[f32; N], low: i16) -> ([u8; 2], [i8; N]) {
    let low = f32::from(low);
    let d = to_half(peak(wanted) / low);
    let inverse = inverse(half(d));
    (d, wanted.map(|scale| (scale * inverse).round_ties_even().clamp(low, -low - 1.0) as i8))
}

/// The same for scales of at least 0 and integers `0..=top`.
pub(super) fn unsigned_scales<const N: usize>(wanted: &[f32; N], top: u8) -> ([u8; 2], [u8; N]) {
    let top = f32::from(top);
    let d = to_half(peak(wanted) / top);
    let inverse = inverse(half(d));
    (d, wanted.map(|scale| (scale * inverse).round_ties_even().clamp(0.0, top) as u8))
}

/// `1 / step`, or 0 where there is no step: everything then falls onto level 0.
pub(super) fn inverse(step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { 1.0 / step }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_on_a_grid_are_found_exactly() {
        let levels = [-8.0, 3.0, 7.0, 0.0, -1.0, 5.0];
        for step in [0.25, -0.25] {
            let values = levels.map(|level| level * step);
            let found = scale(&values, -8.0, 1.0, |x| x.round_ties_even().clamp(-8.0, 7.0));
            assert!((found - step).abs() < 1e-6, "{step}: {found}");
        }
        let values = [0.0, 15.0, 3.0, 9.0].map(|level| level * 0.5 - 2.0);
        let (step, offset) = affine(&values, 15.0, true);
        assert!((step - 0.5).abs() < 1e-6 && (offset + 2.0).abs() < 1e-6, "{step} {offset}");
    }

    #[test]
    fn the_offset_stays_below_zero() {
        let values = [5.0, 6.0, 7.0, 8.0];
        let (step, offset) = affine(&values, 3.0, true);
        assert_eq!(offset, 0.0);
        assert!(step > 2.0);
        let (step, offset) = affine(&values, 3.0, false);
        assert!((step - 1.0).abs() < 1e-6 && (offset - 5.0).abs() < 1e-6);
    }
}
