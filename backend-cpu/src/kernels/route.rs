//! [`Op::Route`](backend_api::Op::Route): scores to chosen experts and their weights.

use super::{Kernel, Scratch};
use crate::{
    builder::Builder,
    isa::Isa,
    tensor::{Tensor, product},
};
use backend_api::{Gating, RouteAttributes, Step};
use std::slice;

/// Chooses experts for each row.
pub(crate) fn route(
    attributes: RouteAttributes,
    inputs: &[Tensor],
    outputs: &[Tensor],
    builder: &mut Builder,
) {
    builder.push(Route::new(attributes, inputs, outputs));
}

struct Route {
    attributes: RouteAttributes,
    scores: Tensor,
    bias: Option<Tensor>,
    ids: Tensor,
    weights: Tensor,
}

impl Route {
    fn new(attributes: RouteAttributes, inputs: &[Tensor], outputs: &[Tensor]) -> Self {
        let bias = inputs.get(1).copied();
        Route { attributes, scores: inputs[0], bias, ids: outputs[0], weights: outputs[1] }
    }
}

impl Kernel for Route {
    /// Probabilities and selection scores of the experts, and scores of the groups, of which there are no more.
    fn scratch_bytes(&self) -> usize {
        product([4, 3, self.scores.width()])
    }

    /// One row is some µs of work.
    fn tasks(&self, step: &Step) -> usize {
        self.scores.rows(step)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, _step: &Step, row: usize, scratch: &mut Scratch) {
        let RouteAttributes { used, gating, groups, .. } = self.attributes;
        let experts = self.scores.width();
        // SAFETY: the scratch has room; inputs are rows of `experts` elements; the output rows belong to this
        // task, and outputs are aligned.
        let (p, s, group_scores, ids, weights) = unsafe {
            let scratch = scratch.as_mut_ptr().cast::<f32>();
            (0..2 * experts + groups).for_each(|i| scratch.add(i).write(0.0));
            let p = slice::from_raw_parts_mut(scratch, experts);
            let scores = self.scores.row::<f32>(row);
            p.iter_mut().enumerate().for_each(|(i, p)| *p = scores.add(i).read_unaligned());
            gate(gating, p);
            let s = slice::from_raw_parts_mut(scratch.add(experts), experts);
            s.copy_from_slice(p);
            if let Some(bias) = self.bias {
                let bias = bias.base::<f32>();
                s.iter_mut().enumerate().for_each(|(i, s)| *s += bias.add(i).read_unaligned());
                // Not `NO`: where nothing else is left they are chosen.
                s.iter_mut().filter(|s| **s == f32::NEG_INFINITY).for_each(|s| *s = RouteAttributes::CLOSED);
            }
            (
                p,
                s,
                slice::from_raw_parts_mut(scratch.add(2 * experts), groups),
                slice::from_raw_parts_mut(self.ids.row::<i32>(row), used),
                slice::from_raw_parts_mut(self.weights.row::<f32>(row), used),
            )
        };
        // All of them, without a branch for each.
        if s.iter().fold(true, |finite, s| finite & s.is_finite()) {
            choose(&self.attributes, s, group_scores, ids);
            weigh(&self.attributes, p, ids, weights);
        } else {
            ids.iter_mut().enumerate().for_each(|(index, id)| *id = index as i32);
            weights.fill(f32::NAN);
        }
    }
}

/// Scores to probabilities: exponentials in f64, since they cost little here and decide near ties.
fn gate(gating: Gating, p: &mut [f32]) {
    let exp = |x: f32| f64::from(x).exp();
    match gating {
        Gating::Sigmoid => p.iter_mut().for_each(|p| *p = (1.0 / (1.0 + exp(-*p))) as f32),
        Gating::Softmax => {
            let largest = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = p.iter().map(|&score| exp(score - largest)).sum();
            p.iter_mut().for_each(|p| *p = (exp(*p - largest) / sum) as f32);
        }
    }
}

/// What is not, or no longer, to be chosen. All scores are finite.
const NO: f32 = f32::NEG_INFINITY;

/// The experts with the largest `s` in the best groups, in falling order. Takes the chosen out of `s`.
fn choose(attributes: &RouteAttributes, s: &mut [f32], group_scores: &mut [f32], ids: &mut [i32]) {
    let RouteAttributes { groups, groups_used, .. } = *attributes;
    if groups_used < groups {
        let size = s.len() / groups;
        for (score, group) in group_scores.iter_mut().zip(s.chunks(size)) {
            let (mut first, mut second) = (NO, NO);
            for &s in group {
                (first, second) = if s > first { (s, first) } else { (first, second.max(s)) };
            }
            *score = if size == 1 { first } else { first + second };
        }
        for _ in groups_used..groups {
            // Of equal groups the later goes.
            let worst =
                (0..groups).filter(|&g| group_scores[g] != f32::INFINITY).fold(
                    None,
                    |worst, g| match worst {
                        Some(w) if group_scores[w] < group_scores[g] => Some(w),
                        _ => Some(g),
                    },
                );
            let worst = worst.unwrap_or(0);
            group_scores[worst] = f32::INFINITY;
            s[worst * size..][..size].fill(NO);
        }
    }
    for id in ids {
        let best = (0..s.len()).fold(0, |best, i| if s[i] > s[best] { i } else { best });
        s[best] = NO;
        *id = best as i32;
    }
}

/// The probabilities of the chosen, made to sum to 1 if wanted, and scaled.
fn weigh(attributes: &RouteAttributes, p: &[f32], ids: &[i32], weights: &mut [f32]) {
    weights.iter_mut().zip(ids).for_each(|(weight, &id)| *weight = p[id as usize]);
    if attributes.renormalise {
        /// The smallest normal f16.
        const LEAST: f32 = 1.0 / 16384.0;
        let sum = weights.iter().sum::<f32>().max(LEAST);
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    weights.iter_mut().for_each(|weight| *weight *= attributes.scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Rows, each_level, fixed, numbers, rows, run};
    use backend_api::{DType, Shape, TensorDesc};

    /// The documented steps with sorted lists, in f64.
    fn expected(attributes: &RouteAttributes, scores: &[f32], bias: Option<&[f32]>) -> (Vec<i32>, Vec<f64>) {
        let exp: Vec<f64> = scores.iter().map(|&score| f64::from(score).exp()).collect();
        let p: Vec<f64> = match attributes.gating {
            Gating::Softmax => exp.iter().map(|e| e / exp.iter().sum::<f64>()).collect(),
            Gating::Sigmoid => exp.iter().map(|e| e / (1.0 + e)).collect(),
        };
        let s = |i: usize| p[i] + bias.map_or(0.0, |bias| f64::from(bias[i]));
        let s: Vec<f64> = (0..p.len()).map(|i| s(i).max(RouteAttributes::CLOSED.into())).collect();
        let falling = |scores: &[f64]| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order
        };
        let size = p.len() / attributes.groups;
        let group_score = |group: &[f64]| falling(group).iter().take(2).map(|&i| group[i]).sum();
        let group_scores: Vec<f64> = s.chunks(size).map(group_score).collect();
        let groups = &falling(&group_scores)[..attributes.groups_used];
        let candidates = falling(&s).into_iter().filter(|i| groups.contains(&(i / size)));
        let chosen: Vec<usize> = candidates.take(attributes.used).collect();
        let sum = chosen.iter().map(|&i| p[i]).sum::<f64>().max(0.5f64.powi(14));
        let divisor = if attributes.renormalise { sum } else { 1.0 };
        let weights = chosen.iter().map(|&i| p[i] / divisor * f64::from(attributes.scale)).collect();
        (chosen.into_iter().map(|i| i as i32).collect(), weights)
    }

    fn check(attributes: RouteAttributes, experts: usize, n: usize, scores: Option<&[f32]>, biased: bool) {
        check_closed(attributes, experts, n, scores, biased, |_| false);
    }

    /// With a bias that closes some of the experts.
    fn check_closed(
        attributes: RouteAttributes,
        experts: usize,
        n: usize,
        scores: Option<&[f32]>,
        biased: bool,
        closed: impl Fn(usize) -> bool,
    ) {
        each_level(|level| {
            let mut input = Rows::new(&[n, experts], 3, experts as u32);
            if let Some(scores) = scores {
                input.data[..experts].copy_from_slice(scores);
            }
            let mut bias = numbers(experts, 77);
            (0..experts).filter(|i| closed(*i)).for_each(|i| bias[i] = f32::NEG_INFINITY);
            let mut inputs = vec![input.tensor()];
            if biased {
                inputs.push(fixed(&mut bias, DType::F32, &[experts]));
            }
            let mut ids = vec![-1; n * attributes.used];
            let mut weights = Rows::poisoned(&[n, attributes.used]);
            let ids_desc = TensorDesc::new(DType::I32, Shape::rows(&[attributes.used]));
            let outputs = [Tensor::new(ids.as_mut_ptr().cast(), ids_desc), weights.tensor()];
            run(Route::new(attributes, &inputs, &outputs), level, &rows(n));
            for row in 0..n {
                let what = format!("{level}, {attributes:?}, {experts} experts, row {row}");
                let (want_ids, want) = expected(&attributes, input.row(row), biased.then_some(&bias));
                assert_eq!(&ids[row * attributes.used..][..attributes.used], want_ids, "{what}");
                crate::kernels::testing::assert_close(weights.row(row), &want, 1e-6, 1e-12, &what);
            }
        });
    }

    #[test]
    fn agrees_with_sorting() {
        for (experts, groups, groups_used, used) in [
            (1, 1, 1, 1),
            (4, 1, 1, 4),
            (64, 1, 1, 6),
            (160, 8, 3, 6),
            (256, 8, 4, 8),
            (6, 6, 2, 2),
            (12, 4, 4, 5),
        ] {
            for (gating, renormalise, biased) in [
                (Gating::Softmax, false, false),
                (Gating::Softmax, true, true),
                (Gating::Sigmoid, true, true),
                (Gating::Sigmoid, false, false),
            ] {
                let attributes =
                    RouteAttributes { used, gating, groups, groups_used, renormalise, scale: 2.5 };
                check(attributes, experts, 5, None, biased);
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let attributes = RouteAttributes {
            used: 3,
            gating: Gating::Sigmoid,
            groups: 4,
            groups_used: 2,
            renormalise: true,
            scale: 1.0,
        };
        check(attributes, 8, 1, Some(&[0.5; 8]), false);
        check(attributes, 8, 1, Some(&[0.0, 1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 2.0]), false);
    }

    #[test]
    fn closed_experts_are_the_last_to_be_chosen() {
        for gating in [Gating::Softmax, Gating::Sigmoid] {
            for (groups, groups_used) in [(1, 1), (4, 2), (4, 4), (16, 6)] {
                let attributes =
                    RouteAttributes { used: 5, gating, groups, groups_used, renormalise: false, scale: 1.0 };
                // one, a group and more, all but two, all
                check_closed(attributes, 16, 3, None, true, |i| i == 9);
                check_closed(attributes, 16, 3, None, true, |i| i < 6);
                check_closed(attributes, 16, 3, None, true, |i| i != 3 && i != 14);
                check_closed(attributes, 16, 3, None, true, |_| true);
            }
        }
    }

    #[test]
    fn a_row_without_an_order_has_no_weights() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let run_with = |gating, odd: f32, biased: bool| {
            let attributes =
                RouteAttributes { used: 2, gating, groups: 2, groups_used: 1, renormalise: true, scale: 2.5 };
            each_level(|level| {
                let mut scores = Rows::new(&[3, 8], 0, 1);
                let mut bias = numbers(8, 2);
                let mut odd_rows = [false, true, false];
                if biased {
                    bias[5] = odd;
                    odd_rows = [true; 3];
                } else {
                    scores.data[8 + 5] = odd;
                }
                let inputs = [scores.tensor(), fixed(&mut bias, DType::F32, &[8])];
                let mut ids = vec![-1; 6];
                let mut weights = Rows::poisoned(&[3, 2]);
                let desc = TensorDesc::new(DType::I32, Shape::rows(&[2]));
                let outputs = [Tensor::new(ids.as_mut_ptr().cast(), desc), weights.tensor()];
                run(Route::new(attributes, &inputs, &outputs), level, &rows(3));
                for (row, is_odd) in odd_rows.into_iter().enumerate() {
                    let (ids, weights) = (&ids[2 * row..][..2], weights.row(row));
                    let what = format!("{level}, {gating:?}, {odd}, row {row}: {ids:?}, {weights:?}");
                    assert!(weights.iter().all(|weight| weight.is_nan() == is_odd), "{what}");
                    assert!(!is_odd || *ids == [0, 1], "{what}");
                    assert!(ids.iter().all(|id| (0..8).contains(id)), "{what}");
                }
            });
        };
        for gating in [Gating::Sigmoid, Gating::Softmax] {
            run_with(gating, nan, false);
            for odd in [nan, inf] {
                run_with(gating, odd, true);
            }
        }
        // A sigmoid has limits; the sum of a softmax has none.
        run_with(Gating::Softmax, inf, false);
    }

    #[test]
    fn tiny_probabilities_are_divided_by_no_less_than_an_f16() {
        let attributes = RouteAttributes {
            used: 2,
            gating: Gating::Sigmoid,
            groups: 1,
            groups_used: 1,
            renormalise: true,
            scale: 1.0,
        };
        check(attributes, 3, 1, Some(&[-20.0, -21.0, -22.0]), false);
    }
}
