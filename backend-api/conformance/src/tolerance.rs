//! How far from the f64 result a device may be: bounds that follow from the definitions of the operations.
//!
//! Each output is held against two of them. *Each* element has a worst case, which holds for any order of sums.
//! And each has a *likely* squared error; the mean over all elements of what was found, in these units, must be
//! near 1. That is far tighter, and catches a wrong scale or a lost block that hides within the worst case.

use crate::reference::{Tensor, evaluate, softmax};
use backend_api::{DType, Op, OpDesc, Precision, Step};
use std::ops::Range;

/// Half a unit in the last place of an f32, relative.
const EPS: f64 = 1.0 / (1u64 << 24) as f64;

/// The same of an f16: scales of rounded activations may be stored in it.
const F16_EPS: f64 = 1.0 / 2048.0;

/// Relative squared error that f32 arithmetic stays below in any reasonable order of sums.
const F32_NMSE: f64 = 1e-10;

/// Smaller differences never matter; they are those of flushed denormals.
const TINY: f64 = 1e-30;

/// A bound on the difference between two tensors.
#[derive(Debug)]
pub(crate) enum Tolerance {
    /// The f32 (or i32, or stored) value that is nearest.
    Exact,
    /// Worst case, and likely square, of each element's error.
    Within { each: Vec<f64>, likely: Vec<f64> },
}

impl Tolerance {
    /// # Errors
    /// What is wrong, in words.
    pub(crate) fn check(&self, expected: &[f64], found: &[f64]) -> Result<(), String> {
        let Tolerance::Within { each, likely } = self else {
            let wrong = |(e, f): (&f64, &f64)| *e as f32 != *f as f32;
            return report(expected, found, expected.iter().zip(found).position(wrong), "exactly");
        };
        // Not so with NaN.
        let near = |i: usize| (expected[i] - found[i]).abs() <= each[i] + TINY;
        if let Some(i) = (0..expected.len()).find(|i| !near(*i)) {
            return report(expected, found, Some(i), &format!("within {:.3e}", each[i]));
        }
        let squares = expected.iter().zip(found).map(|(e, f)| (e - f).powi(2));
        let n = expected.len().max(1) as f64;
        let mean =
            squares.zip(likely).map(|(square, likely)| square / (likely + TINY * TINY)).sum::<f64>() / n;
        // The mean of n squares of normal numbers is 1 ± √(2/n). Rounding errors are not quite normal, nor quite
        // independent, so there is room: a wrong device is off by factors.
        let limit = 1.5 + 10.0 * (2.0 / n).sqrt();
        if mean > limit {
            return Err(format!("squared errors are {mean:.3} times what is likely, above {limit:.3}"));
        }
        Ok(())
    }

    /// For two results that are each within this of the same value.
    pub(crate) fn doubled(self) -> Self {
        match self {
            Tolerance::Exact => Tolerance::Exact,
            Tolerance::Within { each, likely } => Tolerance::Within {
                each: each.iter().map(|bound| 2.0 * bound).collect(),
                likely: likely.iter().map(|square| 4.0 * square).collect(),
            },
        }
    }

    /// Nothing but the worst case.
    pub(crate) fn worst_case(self) -> Self {
        match self {
            Tolerance::Exact => Tolerance::Exact,
            Tolerance::Within { each, .. } => {
                Tolerance::Within { likely: vec![f64::INFINITY; each.len()], each }
            }
        }
    }

    /// That of some elements.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        match self {
            Tolerance::Exact => Tolerance::Exact,
            Tolerance::Within { each, likely } => {
                Tolerance::Within { each: each[range.clone()].to_vec(), likely: likely[range].to_vec() }
            }
        }
    }
}

fn report(expected: &[f64], found: &[f64], wrong: Option<usize>, how: &str) -> Result<(), String> {
    let Some(i) = wrong else { return Ok(()) };
    let n = expected.len();
    Err(format!("element {i} of {n}: expected {:e} {how}, found {:e}", expected[i], found[i]))
}

/// The bound of each output of an operation.
pub(crate) fn tolerances(
    desc: &OpDesc,
    inputs: &[&Tensor],
    outputs: &[Tensor],
    step: &Step,
) -> Vec<Tolerance> {
    let first = &outputs[0];
    match &desc.op {
        Op::EmbedRows | Op::KvStore | Op::Add | Op::Concat | Op::SelectRows | Op::Cast { .. } => {
            vec![Tolerance::Exact]
        }
        Op::RmsNorm { .. } | Op::SwiGlu => vec![relative(first)],
        Op::Route(_) => vec![Tolerance::Exact, relative(&outputs[1])],
        Op::Rope(_) => vec![turned(first)],
        Op::CombineExperts => vec![combined(desc, inputs, step)],
        Op::LatentAttention { scale, latent } => {
            vec![attended(inputs[0], inputs[1], f64::from(*scale), *latent, step)]
        }
        Op::MatMul { precision } | Op::HeadMatMul { precision } | Op::ExpertMatMul { precision } => {
            vec![product(desc, inputs, *precision, step)]
        }
    }
}

fn relative(output: &Tensor) -> Tolerance {
    let each = output.values.iter().map(|v| v.abs() * F32_NMSE.sqrt()).collect();
    Tolerance::Within { each, likely: output.values.iter().map(|v| F32_NMSE * v * v).collect() }
}

/// Relative to the length of the pair, which turning keeps.
fn turned(output: &Tensor) -> Tolerance {
    let lengths = output.values.as_chunks::<2>().0.iter().map(|pair| pair[0].hypot(pair[1]));
    let each: Vec<f64> = lengths.flat_map(|length| [1e-6 * length; 2]).collect();
    Tolerance::Within { likely: each.iter().map(|error| error * error / 4.0).collect(), each }
}

fn combined(desc: &OpDesc, inputs: &[&Tensor], step: &Step) -> Tolerance {
    let sum = |f: fn(f64) -> f64| {
        let inputs = [inputs[0].map(f), inputs[1].map(f)];
        evaluate(&desc.op, &inputs.each_ref(), step).remove(0)
    };
    let terms = inputs[1].inner() as f64 + 2.0;
    let each = sum(f64::abs).map(|sum| terms * EPS * sum).values;
    Tolerance::Within { each, likely: sum(|v| v * v).map(|sum| F32_NMSE * sum).values }
}

/// An error in a score makes a relative error in its weight; sums and divisions add their own.
fn attended(q: &Tensor, cache: &Tensor, scale: f64, latent: usize, step: &Step) -> Tolerance {
    let heads = q.shape[1];
    let (mut each, mut likely) = (Vec::new(), Vec::new());
    for (index, q) in q.rows().enumerate() {
        let seen = step.past + index / heads + 1;
        let (mut scores, mut largest_score, mut largest_sum) = (Vec::new(), 0.0f64, 0.0f64);
        for j in 0..seen {
            let terms = || q.iter().zip(cache.row(j)).map(|(q, k)| q * k * scale);
            scores.push(terms().sum());
            largest_score = largest_score.max(f64::abs(scores[j]));
            largest_sum = largest_sum.max(terms().map(f64::abs).sum());
        }
        let weights = softmax(&scores);
        let score_error = (q.len() as f64 + 4.0) * EPS * largest_sum;
        let worst_weight = 4.0 * score_error + (seen as f64 + 32.0) * EPS;
        let likely_weight = F32_NMSE.sqrt() + 8.0 * EPS * largest_score;
        for i in 0..latent {
            let values = || weights.iter().enumerate().map(|(j, weight)| weight * cache.row(j)[i]);
            each.push(worst_weight * values().map(f64::abs).sum::<f64>());
            likely.push(likely_weight * likely_weight * values().map(|v| v * v).sum::<f64>());
        }
    }
    Tolerance::Within { each, likely }
}

/// Products are linear in weights and activations, so the same product of their magnitudes and errors bounds the
/// error of the result; of their squares it gives the expected square, as errors are independent.
fn product(desc: &OpDesc, inputs: &[&Tensor], precision: Precision, step: &Step) -> Tolerance {
    let (w, x) = (inputs[0], inputs[1]);
    let dtype = desc.inputs[0].dtype;
    let evaluated = |w: &Tensor, x: &Tensor| {
        let inputs: Vec<&Tensor> = [w, x].into_iter().chain(inputs.get(2).copied()).collect();
        evaluate(&desc.op, &inputs, step).remove(0).values
    };
    let float_error = (x.inner() as f64 + 8.0) * EPS;
    let mut each = evaluated(&addends(w, dtype), &x.map(|v| float_error * v.abs()));
    let mut variance = x.map(|v| F32_NMSE * v * v);
    if precision != Precision::F32 && dtype.is_quantized() {
        // What 8 bits leave is at most half a step, and rounded in 127 steps to the largest.
        let (finer, f16) = match precision {
            Precision::Fine => (254.0, 0.0),
            _ => (1.0, F16_EPS),
        };
        let steps = rounding_steps(x, dtype.block_len()).map(|step| step / finer);
        let zipped = |f: &dyn Fn(f64, f64) -> f64| {
            let pairs = x.values.iter().zip(&steps.values);
            Tensor::new(&x.shape, pairs.map(|(x, step)| f(*x, *step)).collect())
        };
        let worst = zipped(&|x, step| 0.5 * step + f16 * x.abs());
        let rounding = evaluated(&w.map(f64::abs), &worst);
        each.iter_mut().zip(rounding).for_each(|(each, rounding)| *each += rounding);
        variance = zipped(&|x, step| step * step / 12.0 + (f16 * x).powi(2) / 3.0 + F32_NMSE * x * x);
    }
    Tolerance::Within { each, likely: evaluated(&w.map(|w| w * w), &variance) }
}

/// Bounds on what a quantised weight is the sum of: with an offset, the terms may be larger than the weight, but
/// not than twice the largest weight near it.
fn addends(w: &Tensor, dtype: DType) -> Tensor {
    if !dtype.is_quantized() {
        return w.map(f64::abs);
    }
    let group = |group: &[f64]| {
        let largest = group.iter().fold(0.0f64, |largest, w| largest.max(w.abs()));
        vec![2.0 * largest; group.len()]
    };
    Tensor::new(&w.shape, w.values.chunks(32).flat_map(group).collect())
}

/// The step of 8-bit rounding at each value: 127 steps to the largest magnitude in its block.
fn rounding_steps(x: &Tensor, block_len: usize) -> Tensor {
    let steps = x.rows().flat_map(|row| row.chunks(block_len)).flat_map(|block| {
        let largest = block.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
        vec![largest / 127.0; block.len()]
    });
    Tensor::new(&x.shape, steps.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bounds_bite() {
        let within = Tolerance::Within { each: vec![0.1; 800], likely: vec![0.001; 800] };
        let expected = vec![1.0; 800];
        let one_off = |error: f64| {
            let mut found = expected.clone();
            found[7] += error;
            within.check(&expected, &found)
        };
        let all_off = |error: f64| within.check(&expected, &vec![1.0 + error; 800]);
        assert!(one_off(0.09).is_ok() && all_off(0.03).is_ok());
        assert!(one_off(0.11).unwrap_err().contains("element 7 of 800"));
        assert!(all_off(0.06).unwrap_err().contains("3.600 times what is likely"));
        assert!(one_off(f64::NAN).is_err());
        assert!(Tolerance::Exact.check(&[1.0], &[1.0 + 1e-6]).is_err());
        assert!(Tolerance::Exact.check(&[1.0], &[f64::NAN]).is_err());
        assert!(Tolerance::Exact.check(&[1.0], &[1.0]).is_ok());
    }
}
