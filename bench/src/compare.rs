//! How far logits are from reference logits, and what they say about a text.

use crate::npy::Matrix;
use serde::Serialize;

/// The distance between two sets of logits, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distance {
    /// `mean((a − b)²) / mean(a²)` over all rows, `a` being the reference.
    pub nmse: f64,
    /// The median over rows of the same within a row; one row with a flipped expert does not move it.
    pub median_row_nmse: f64,
    /// The largest `|a − b|`.
    pub max_abs: f64,
    /// The share of rows whose largest logit is at the same token.
    pub argmax_agreement: f64,
}

/// Compares `found`, row after row, with the rows of `reference`.
///
/// # Panics
/// If the lengths differ or there is no row.
pub fn distance(reference: &Matrix, found: &[f32]) -> Distance {
    assert_eq!(reference.values.len(), found.len(), "logits of the same rows");
    assert!(reference.rows > 0 && reference.columns > 0, "at least one logit");
    let (mut error, mut power, mut max_abs, mut agreeing) = (0.0, 0.0, 0.0f64, 0);
    let mut by_row = Vec::with_capacity(reference.rows);
    for (index, row) in found.chunks_exact(reference.columns).enumerate() {
        let expected = reference.row(index);
        let (mut row_error, mut row_power) = (0.0, 0.0);
        for (&a, &b) in expected.iter().zip(row) {
            let difference = f64::from(a) - f64::from(b);
            row_error += difference * difference;
            row_power += f64::from(a) * f64::from(a);
            // Not `f64::max`, which would drop a NaN.
            if difference.abs() > max_abs || difference.is_nan() {
                max_abs = difference.abs();
            }
        }
        by_row.push(row_error / row_power);
        error += row_error;
        power += row_power;
        agreeing += usize::from(argmax(expected) == argmax(row));
    }
    Distance {
        nmse: error / power,
        median_row_nmse: median(&mut by_row),
        max_abs,
        argmax_agreement: agreeing as f64 / reference.rows as f64,
    }
}

/// The index of the largest value; the first of equals.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if value.total_cmp(&values[best]).is_gt() {
            best = index;
        }
    }
    best
}

/// The middle value, or the mean of the middle two. Sorts.
///
/// # Panics
/// If there is none.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// `−ln p(target)` under the softmax of `logits`, in f64.
///
/// # Panics
/// If `target` is not an index of `logits`.
pub fn negative_log_likelihood(logits: &[f32], target: usize) -> f64 {
    let largest = f64::from(logits[argmax(logits)]);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    sum.ln() + largest - f64::from(logits[target])
}

/// Mean, and the standard error of the mean.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = (values.iter().map(|x| x * x).sum::<f64>() / n - mean * mean).max(0.0);
    (mean, (variance / (n - 1.0).max(1.0)).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: &[[f32; 3]]) -> Matrix {
        Matrix { rows: rows.len(), columns: 3, values: rows.concat() }
    }

    #[test]
    fn distance_is_as_defined() {
        let reference = matrix(&[[3.0, 0.0, 4.0], [1.0, 2.0, 2.0]]);
        let same = distance(&reference, &reference.values);
        let expected = Distance { nmse: 0.0, median_row_nmse: 0.0, max_abs: 0.0, argmax_agreement: 1.0 };
        assert_eq!(same, expected);
        let moved = distance(&reference, &[3.0, 0.0, 2.0, 1.0, 2.0, 2.0]);
        assert_eq!((moved.nmse, moved.max_abs, moved.argmax_agreement), (4.0 / 34.0, 2.0, 0.5));
        assert_eq!(moved.median_row_nmse, (4.0 / 25.0) / 2.0);
    }

    #[test]
    fn a_nan_is_seen() {
        let reference = matrix(&[[1.0, 2.0, 3.0]]);
        let found = distance(&reference, &[1.0, f32::NAN, 3.0]);
        assert!(found.nmse.is_nan() && found.max_abs.is_nan());
    }

    #[test]
    fn likelihoods_sum_to_one_and_survive_large_logits() {
        let logits = [1000.0, 998.5, 990.0, 1001.0];
        let sum: f64 = (0..4).map(|i| (-negative_log_likelihood(&logits, i)).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
