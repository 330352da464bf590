//! Programs of several operations: what a device may fuse, share or keep between them must not show.

use super::Cases;
use backend_api::{DType, Gating, Op, Precision, RopeAttributes, RouteAttributes, Shape};

pub(super) fn add(cases: &mut Cases) {
    for n in [1, 5, 16, 33] {
        for dtype in [DType::F16, DType::Q8_0, DType::Q4_1, DType::Q4_K, DType::Q6_K] {
            dense(cases, n, dtype, Precision::Default);
            experts(cases, n, dtype, Precision::Default);
        }
        dense(cases, n, DType::Q4_K, Precision::F32);
        experts(cases, n, DType::Q4_K, Precision::F32);
        for cache in [DType::F32, DType::F16, DType::Q8_0] {
            attention(cases, n, cache);
        }
    }
}

/// A dense feed-forward block. Gate and up share their input, whose rounding may be shared too; the last product
/// is at the place of the gate, and the sum at that of the input.
fn dense(cases: &mut Cases, n: usize, dtype: DType, precision: Precision) {
    cases.add(format!("program: dense block, {dtype} {precision:?}, {n} rows"), move |b| {
        b.step(n, 0, 1);
        let (d, hidden) = (256, 512);
        let x = b.activations(Shape::rows(&[d]), 0);
        let norm = b.random.activations(d);
        let norm = b.vector(&norm);
        let [gate, up] = [(); 2].map(|()| b.weight(dtype, &[hidden, d], 0));
        let down = b.weight(dtype, &[d, hidden], 0);

        let normed = b.op(Op::RmsNorm { eps: 1e-6 }, &[x, norm])[0];
        let gated = b.op(Op::MatMul { precision }, &[gate, normed])[0];
        let upped = b.op(Op::MatMul { precision }, &[up, normed])[0];
        let hidden = b.op(Op::SwiGlu, &[gated, upped])[0];
        let out = b.op_over(Op::MatMul { precision }, &[down, hidden], gated);
        b.op_over(Op::Add, &[x, out], x);
    });
}

/// A mixture of experts with a shared one beside it.
fn experts(cases: &mut Cases, n: usize, dtype: DType, precision: Precision) {
    cases.add(format!("program: experts, {dtype} {precision:?}, {n} rows"), move |b| {
        b.step(n, 0, 1);
        let (d, hidden, experts, used) = (256, 256, 8, 3);
        let x = b.activations(Shape::rows(&[d]), 0);
        let router = b.weight(DType::F32, &[experts, d], 0);
        let [gate, up] = [(); 2].map(|()| b.weight(dtype, &[experts, hidden, d], 0));
        let down = b.weight(dtype, &[experts, d, hidden], 0);
        let shared = b.weight(dtype, &[d, d], 0);
        let attributes = RouteAttributes {
            used,
            gating: Gating::Sigmoid,
            groups: 4,
            groups_used: 2,
            renormalise: true,
            scale: 2.5,
        };

        let scores = b.op(Op::MatMul { precision }, &[router, x])[0];
        let [ids, weights] = b.op(Op::Route(attributes), &[scores])[..] else { unreachable!("two outputs") };
        let gated = b.op(Op::ExpertMatMul { precision }, &[gate, x, ids])[0];
        let upped = b.op(Op::ExpertMatMul { precision }, &[up, x, ids])[0];
        let hidden = b.op(Op::SwiGlu, &[gated, upped])[0];
        let each = b.op_over(Op::ExpertMatMul { precision }, &[down, hidden, ids], upped);
        let sum = b.op(Op::CombineExperts, &[each, weights])[0];
        let beside = b.op(Op::MatMul { precision }, &[shared, x])[0];
        b.op_over(Op::Add, &[sum, beside], sum);
    });
}

/// From a query and a latent row to the context, through the cache.
fn attention(cases: &mut Cases, n: usize, cache: DType) {
    cases.add(format!("program: attention, cache {cache}, {n} rows"), move |b| {
        let past = 61;
        b.step(n, past, 1);
        let (heads, nope, rope, latent) = (3, 32, 16, 56);
        let frequencies = (0..rope / 2).map(|pair| 100f64.powf(-(pair as f64) / rope as f64));
        let turn = Op::Rope(RopeAttributes { inverse_frequencies: frequencies.collect(), magnitude: 1.0 });
        let precision = Precision::Default;
        let q_nope = b.activations(Shape::rows(&[heads, nope]), rope / 2);
        let q_rope = b.activations(Shape::rows(&[heads, rope]), nope / 2);
        let row = b.activations(Shape::rows(&[latent]), 0);
        let k_rope = b.activations(Shape::rows(&[rope]), 0);
        let k_b = b.weight(DType::Q8_0, &[heads, latent, nope], 0);
        let v_b = b.weight(DType::F16, &[heads, 24, latent], 0);
        let stored = b.cache(cache, latent + rope, past);

        let absorbed = b.op(Op::HeadMatMul { precision }, &[k_b, q_nope])[0];
        let turned = b.op(turn.clone(), &[q_rope])[0];
        let q = b.op(Op::Concat, &[absorbed, turned])[0];
        let k_rope = b.op(turn, &[k_rope])[0];
        let row = b.op(Op::Concat, &[row, k_rope])[0];
        b.store(row, stored);
        let context = b.op(Op::LatentAttention { scale: 0.1, latent }, &[q, stored])[0];
        b.op(Op::HeadMatMul { precision }, &[v_b, context]);
    });
}
