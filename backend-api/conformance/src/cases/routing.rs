//! Choosing experts and summing what they give.

use super::{Cases, ROWS};
use crate::setup::Builder;
use backend_api::{Gating, Op, RouteAttributes, Shape};

pub(super) fn add(cases: &mut Cases) {
    route(cases);
    closed(cases);
    ties(cases);
    combine(cases);
}

/// What models use, and small and odd ones: experts, used, groups, groups used.
const SHAPES: [(usize, usize, usize, usize); 10] = [
    (1, 1, 1, 1),
    (7, 3, 1, 1),
    (64, 6, 1, 1),
    (64, 4, 1, 1),
    (160, 6, 8, 3),
    (256, 8, 8, 4),
    (384, 8, 1, 1),
    (12, 2, 12, 5), // groups of one expert
    (12, 4, 3, 1),
    (12, 12, 3, 3),
];

fn route(cases: &mut Cases) {
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for (i, (experts, used, groups, groups_used)) in SHAPES.into_iter().enumerate() {
            let (n, biased, renormalise) = (ROWS[i], i % 2 == 1, i / 2 % 2 == 0);
            let (scale, skipped) = ([1.0, 2.5, 16.0][i % 3], [0, 3][i / 3 % 2]);
            let attributes = RouteAttributes { used, gating, groups, groups_used, renormalise, scale };
            let name = format!(
                "Route {gating:?}, {used} of {experts} in {groups_used} of {groups} groups, {n} rows, \
                 bias: {biased}, renormalise: {renormalise}, scale {scale}, columns from {skipped}"
            );
            cases.add(name, move |b| {
                b.step(n, 0, 1);
                let bias: Vec<f32> = (0..experts).map(|_| 0.2 * b.random.normal()).collect();
                let rows: Vec<_> =
                    (0..n).map(|_| clear_scores(b, &attributes, experts, biased.then_some(&bias))).collect();
                let mut inputs = vec![b.values(Shape::rows(&[experts]), skipped, &rows)];
                if biased {
                    inputs.push(b.vector(&bias));
                }
                b.op(Op::Route(attributes), &inputs);
            });
        }
    }
    cases.add("Route Sigmoid, weights that nearly vanish are divided by 2⁻¹⁴".to_owned(), |b| {
        b.step(3, 0, 1);
        let row = |top: f32| (0..8).map(|i| top - 2.0 * i as f32).collect::<Vec<f32>>();
        let scores = b.values(Shape::rows(&[8]), 0, &[row(-12.0), row(-30.0), row(0.0)]);
        b.op(
            Op::Route(RouteAttributes {
                used: 3,
                gating: Gating::Sigmoid,
                groups: 1,
                groups_used: 1,
                renormalise: true,
                scale: 1.0,
            }),
            &[scores],
        );
    });
}

/// Experts whose bias is −∞: one, whole groups, all but fewer than are used.
fn closed(cases: &mut Cases) {
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for (experts, used, groups, groups_used, open) in
            [(7, 3, 1, 1, 6), (64, 6, 1, 1, 20), (64, 8, 8, 3, 30), (37, 9, 1, 1, 4), (12, 4, 6, 4, 5)]
        {
            let attributes =
                RouteAttributes { used, gating, groups, groups_used, renormalise: false, scale: 1.0 };
            let name = format!(
                "Route {gating:?}, {used} of {experts} in {groups_used} of {groups} groups, bias closes all but {open}"
            );
            cases.add(name, move |b| {
                b.step(5, 0, 1);
                let mut bias: Vec<f32> = (0..experts).map(|_| 0.2 * b.random.normal()).collect();
                // Whole groups of them, and part of one.
                bias.iter_mut().rev().skip(open).for_each(|bias| *bias = f32::NEG_INFINITY);
                let rows: Vec<_> =
                    (0..5).map(|_| clear_scores(b, &attributes, experts, Some(&bias))).collect();
                let inputs = [b.values(Shape::rows(&[experts]), 0, &rows), b.vector(&bias)];
                b.op(Op::Route(attributes), &inputs);
            });
        }
    }
}

/// Scores whose probabilities, biased or not, and whose groups' sums all differ by far more than f32 rounds, so
/// that every right device chooses alike.
fn clear_scores(
    b: &mut Builder<'_>,
    attributes: &RouteAttributes,
    experts: usize,
    bias: Option<&Vec<f32>>,
) -> Vec<f32> {
    loop {
        let scores: Vec<f32> = (0..experts).map(|_| 1.5 * b.random.normal()).collect();
        if is_clear(&scores, bias, attributes) {
            return scores;
        }
    }
}

fn is_clear(scores: &[f32], bias: Option<&Vec<f32>>, attributes: &RouteAttributes) -> bool {
    let p: Vec<f64> = match attributes.gating {
        Gating::Sigmoid => scores.iter().map(|s| 1.0 / (1.0 + f64::from(-s).exp())).collect(),
        Gating::Softmax => {
            let sum: f64 = scores.iter().map(|s| f64::from(*s).exp()).sum();
            scores.iter().map(|s| f64::from(*s).exp() / sum).collect()
        }
    };
    let closed = f64::from(RouteAttributes::CLOSED);
    let s = |(i, p): (usize, &f64)| (p + bias.map_or(0.0, |b| f64::from(b[i]))).max(closed);
    let s: Vec<f64> = p.iter().enumerate().map(s).collect();
    let sorted = |values: &[f64]| {
        let mut sorted = values.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted
    };
    let apart = |values: &[f64]| {
        // What is closed is equal to the bit.
        let apart = |a: f64, b: f64| a <= closed || a - b > 1e-6 * (a.abs() + 0.01);
        sorted(values).windows(2).all(|pair| apart(pair[0], pair[1]))
    };
    let group_sums: Vec<f64> =
        s.chunks(s.len() / attributes.groups).map(|group| sorted(group).iter().take(2).sum()).collect();
    apart(&s) && apart(&group_sums)
}

/// Equal scores, of which the lower indices win. Their few values are far apart, and so are the sums of groups.
fn ties(cases: &mut Cases) {
    for gating in [Gating::Softmax, Gating::Sigmoid] {
        for (experts, used, groups, groups_used) in
            [(7, 3, 1, 1), (64, 6, 1, 1), (64, 8, 8, 3), (37, 9, 1, 1), (12, 4, 6, 4)]
        {
            let attributes =
                RouteAttributes { used, gating, groups, groups_used, renormalise: false, scale: 1.0 };
            let name =
                format!("Route {gating:?}, ties, {used} of {experts} in {groups_used} of {groups} groups");
            cases.add(name, move |b| {
                b.step(5, 0, 1);
                let mut rows: Vec<Vec<f32>> =
                    (0..4).map(|_| (0..experts).map(|_| b.random.below(3) as f32).collect()).collect();
                rows.push(vec![0.5; experts]);
                let scores = b.values(Shape::rows(&[experts]), 0, &rows);
                b.op(Op::Route(attributes), &[scores]);
            });
        }
    }
}

fn combine(cases: &mut Cases) {
    for (i, n) in ROWS.into_iter().enumerate() {
        let (used, d, skipped) = ([1, 2, 6, 8, 9][i % 5], [1, 15, 64, 33, 576, 7][i % 6], [0, 5][i % 2]);
        cases.add(format!("CombineExperts {used} of {d}, {n} rows, columns from {skipped}"), move |b| {
            b.step(n, 0, 1);
            let y = b.activations(Shape::rows(&[used, d]), skipped);
            let weights = b.activations(Shape::rows(&[used]), skipped);
            b.op(Op::CombineExperts, &[y, weights]);
        });
    }
}
