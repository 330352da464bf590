//! What surrounds a latent cache: turning, storing, attending.

use super::{Cases, Outer, ROWS, shape};
use backend_api::{DType, Op, RopeAttributes, Shape};

const CACHES: [DType; 3] = [DType::F32, DType::F16, DType::Q8_0];

pub(super) fn add(cases: &mut Cases) {
    rope(cases);
    kv_store(cases);
    latent_attention(cases);
}

/// The frequencies of RoFormer for `n` elements, and a factor such as YaRN's.
fn attributes(n: usize, magnitude: f32) -> RopeAttributes {
    let frequency = |pair: usize| 10000f64.powf(-2.0 * pair as f64 / n as f64);
    RopeAttributes { inverse_frequencies: (0..n / 2).map(frequency).collect(), magnitude }
}

fn rope(cases: &mut Cases) {
    let pasts = [0, 1, 63, 4095, 163_000];
    for (i, n) in ROWS.into_iter().enumerate() {
        let past = pasts[i % pasts.len()];
        let inner = [64, 2, 6, 34, 32][i % 5];
        let rest: &'static [usize] = [&[][..], &[1], &[3], &[16], &[2, 3]][i % 5];
        let skipped = [0, 7, 128][i % 3];
        let magnitude = [1.0, 1.2][i % 2];
        let name = format!(
            "Rope [{n} rows, {rest:?}, {inner}] after {past}, magnitude {magnitude}, columns from {skipped}"
        );
        cases.add(name, move |b| {
            b.step(n, past, 1);
            let x = b.activations(Shape::rows(&[rest, &[inner]].concat()), skipped);
            b.op(Op::Rope(attributes(inner, magnitude)), &[x]);
        });
    }
}

fn kv_store(cases: &mut Cases) {
    let pasts = [0, 1, 63, 64, 65];
    for dtype in CACHES {
        for (i, n) in ROWS.into_iter().enumerate() {
            let (past, skipped) = (pasts[i % pasts.len()], [0, 5][i % 2]);
            let width = [1, 31, 32, 40, 72, 576][i % 6];
            let name = format!("KvStore {dtype}, {n} rows of {width} after {past}, columns from {skipped}");
            cases.add(name, move |b| {
                b.step(n, past, 1);
                let row = b.activations(Shape::rows(&[width]), skipped);
                let cache = b.cache(dtype, width, past);
                b.store(row, cache);
            });
        }
    }
}

fn latent_attention(cases: &mut Cases) {
    // heads, width, latent, rows, past, scale
    let shapes = [
        (1, 1, 1, 1, 0, 1.0),
        (3, 40, 32, 1, 0, 0.3),
        (2, 72, 64, 1, 1, 0.1),
        (5, 72, 40, 2, 63, 0.1),
        (1, 96, 64, 1, 64, 0.1),
        (7, 40, 33, 5, 62, 0.2),
        (16, 96, 96, 3, 65, 0.1),
        (3, 72, 64, 9, 127, 0.1),
        (2, 40, 32, 33, 0, 0.2),
        (4, 33, 17, 70, 0, 0.2),
        (2, 72, 64, 70, 130, 0.1),
        (1, 576, 512, 1, 600, 0.05),
        (3, 576, 512, 4, 255, 0.05),
        (17, 40, 32, 8, 256, 0.2),
        (2, 40, 32, 2, 1025, 0.2),
        // One row, beside more of a cache than a device may want in one piece.
        (2, 40, 32, 1, 1100, 0.2),
        // Scores of hundreds, whose exponentials are beyond f32, and of nothing.
        (2, 72, 64, 5, 70, 12.0),
        (2, 72, 64, 5, 70, 0.0),
        (2, 72, 64, 5, 70, -12.0),
    ];
    for dtype in CACHES {
        for (i, (heads, width, latent, n, past, scale)) in shapes.into_iter().enumerate() {
            let skipped = [0, 0, 9][i % 3];
            let name = format!(
                "LatentAttention {dtype}, {heads} heads, width {width}, latent {latent}, {n} rows after {past}, \
                 scale {scale}, columns from {skipped}"
            );
            cases.add(name, move |b| {
                b.step(n, past, 1);
                let q = b.activations(Shape::rows(&[heads, width]), skipped);
                let cache = b.cache(dtype, width, past + n);
                b.op(Op::LatentAttention { scale, latent }, &[q, cache]);
            });
        }
    }
}

/// Norms stand here because they are the rest of what an attention layer does row by row.
pub(super) fn rms_norm(cases: &mut Cases) {
    for (i, n) in ROWS.into_iter().enumerate() {
        let d = [1, 15, 32, 33, 64, 120, 512, 576, 1536, 7][i];
        let outer = [Outer::Rows, Outer::Outputs, Outer::Fixed][i % 3];
        let rest: &'static [usize] = [&[][..], &[3]][i / 3 % 2];
        let (eps, skipped) = ([1e-6, 1e-5, 0.1][i % 3], [0, 4][i / 2 % 2]);
        let name =
            format!("RmsNorm [{n} rows ({outer:?}), {rest:?}, {d}], eps {eps}, columns from {skipped}");
        cases.add(name, move |b| {
            let outer = outer.set(b, n);
            let x = b.activations(shape(outer, &[rest, &[d]].concat()), skipped);
            let weight = b.random.activations(d);
            let weight = b.vector(&weight);
            b.op(Op::RmsNorm { eps }, &[x, weight]);
        });
    }
    cases.add("RmsNorm of zeros and of large and small values".to_owned(), |b| {
        b.step(4, 0, 1);
        let rows = [vec![0.0; 96], vec![1e-12; 96], vec![1e15; 96], vec![-1e-3; 96]];
        let x = b.values(Shape::rows(&[96]), 0, &rows);
        let weight = b.random.activations(96);
        let weight = b.vector(&weight);
        b.op(Op::RmsNorm { eps: 1e-6 }, &[x, weight]);
    });
}
