//! Matrix products, of every format.

use super::{Cases, Outer, ROWS, shape};
use crate::{
    random::random_blocks,
    setup::{Builder, encoded},
};
use backend_api::{DType, Extent, Op, Precision, Shape};

/// Outputs below, at and above what tiles hold.
const WIDTHS: [usize; 8] = [1, 7, 15, 16, 17, 33, 64, 65];

/// Inner extents from one block on; floats need no whole blocks.
fn depths(dtype: DType) -> &'static [usize] {
    match dtype.block_len() {
        1 => &[1, 15, 16, 17, 33, 64, 120, 576],
        32 => &[32, 64, 96, 256, 288, 576],
        _ => &[256, 512, 768],
    }
}

fn precisions(dtype: DType) -> &'static [Precision] {
    // Beside floats there is nothing to round, but the attribute may say either.
    if dtype.is_quantized() {
        &[Precision::Default, Precision::Fine, Precision::F32]
    } else if dtype == DType::F16 {
        &[Precision::Default, Precision::F32]
    } else {
        &[Precision::Default]
    }
}

pub(super) fn add(cases: &mut Cases) {
    for (index, dtype) in DType::WEIGHTS.into_iter().enumerate() {
        for &precision in precisions(dtype) {
            mat_mul(cases, index, dtype, precision);
            head_mat_mul(cases, index, dtype, precision);
            expert_mat_mul(cases, index, dtype, precision);
            // For kernels of few rows, and of many.
            for rows in [5, 16] {
                if dtype.is_quantized() {
                    all_bits(cases, dtype, precision, rows);
                }
                extremes(cases, dtype, precision, rows);
            }
        }
    }
    every_tile(cases);
    let none = "MatMul F16 of no rows, because no outputs are wanted".to_owned();
    cases.add(none, |b| {
        let outer = Outer::Outputs.set(b, 0);
        let w = b.weight(DType::F16, &[17, 33], 0);
        let x = b.activations(shape(outer, &[33]), 0);
        b.op(Op::MatMul { precision: Precision::Default }, &[w, x]);
    });
}

/// A matrix; `gap` blocks between its rows, and `skipped` columns beside those of the activations.
#[derive(Clone, Copy)]
struct Product {
    dtype: DType,
    precision: Precision,
    k: usize,
    m: usize,
    n: usize,
    outer: Outer,
    gap: usize,
    skipped: usize,
}

impl Product {
    fn name(&self) -> String {
        let Product { dtype, precision, k, m, n, outer, gap, skipped } = self;
        format!(
            "{dtype} {precision:?}, k {k}, m {m}, {n} rows ({outer:?}), gap {gap}, columns from {skipped}"
        )
    }

    fn build(&self, b: &mut Builder<'_>) {
        let outer = self.outer.set(b, self.n);
        let w = b.weight(self.dtype, &[self.m, self.k], self.gap);
        let x = b.activations(shape(outer, &[self.k]), self.skipped);
        b.op(Op::MatMul { precision: self.precision }, &[w, x]);
    }
}

/// Each row count with some width and depth, and each width and depth with some row count.
fn mat_mul(cases: &mut Cases, index: usize, dtype: DType, precision: Precision) {
    let depths = depths(dtype);
    for (i, n) in ROWS.into_iter().enumerate() {
        let k = depths[(i + index) % depths.len()];
        let m = WIDTHS[(3 * i + index) % WIDTHS.len()];
        let outer = [Outer::Rows, Outer::Rows, Outer::Outputs, Outer::Fixed][i % 4];
        let (gap, skipped) = ([0, 0, 3][i % 3], [0, 5][i / 2 % 2]);
        let product = Product { dtype, precision, k, m, n, outer, gap, skipped };
        cases.add(format!("MatMul {}", product.name()), move |b| product.build(b));
    }
    // Deeper than what is summed in one go, and as deep as DeepSeek-V3's dense layers.
    for (k, n) in [(8448, 2), (18_432, 1), (8448, 16)] {
        let product = Product { dtype, precision, k, m: 5, n, outer: Outer::Rows, gap: 0, skipped: 0 };
        cases.add(format!("MatMul deep {}", product.name()), move |b| product.build(b));
    }
    let largest = depths[depths.len() - 1];
    let product =
        Product { dtype, precision, k: largest, m: 65, n: 70, outer: Outer::Rows, gap: 0, skipped: 0 };
    cases.add(format!("MatMul large {}", product.name()), move |b| product.build(b));
    // Enough outputs that kernels take the most at once that they ever do, between rows that start where they may be loaded
    // together.
    if precision == Precision::Default {
        let more: &[usize] = if matches!(dtype, DType::F16 | DType::Q4_K) { &[1, 2, 5, 9] } else { &[1, 9] };
        for &n in more {
            let gap = if dtype.block_len() == 1 { 4 } else { 3 };
            let product =
                Product { dtype, precision, k: largest, m: 1040, n, outer: Outer::Rows, gap, skipped: 0 };
            cases.add(format!("MatMul tall {}", product.name()), move |b| product.build(b));
        }
    }
}

/// Blocks of random bits, so that every quant meets every scale.
fn all_bits(cases: &mut Cases, dtype: DType, precision: Precision, rows: usize) {
    cases.add(format!("MatMul bits {dtype} {precision:?}, {rows} rows"), move |b| {
        b.step(rows, 0, 1);
        b.structured();
        let (m, k) = (33, 4 * dtype.block_len());
        let rows: Vec<_> = (0..m).map(|_| random_blocks(dtype, k, &mut b.random)).collect();
        let w = b.weight_rows(dtype, &[m, k], 0, &rows);
        let x = b.activations(Shape::rows(&[k]), 0);
        b.op(Op::MatMul { precision }, &[w, x]);
    });
}

/// The largest quants on both sides, with equal and with alternating signs: what overflows narrow accumulators.
fn extremes(cases: &mut Cases, dtype: DType, precision: Precision, columns: usize) {
    cases.add(format!("MatMul extremes {dtype} {precision:?}, {columns} rows"), move |b| {
        b.step(columns, 0, 1);
        b.structured();
        let k = 2048;
        let pattern = |period: usize, size: f32| -> Vec<f32> {
            (0..k).map(|i| if (i / period).is_multiple_of(2) { size } else { -size }).collect()
        };
        let signs = [pattern(k, 1.0), pattern(k, -1.0), pattern(1, 1.0), pattern(2, 1.0), pattern(64, -1.0)];
        let rows: Vec<_> = signs.iter().map(|row| encoded(dtype, row)).collect();
        let w = b.weight_rows(dtype, &[rows.len(), k], 0, &rows);
        let patterns = [pattern(k, 3.0), pattern(1, -3.0), pattern(2, 1000.0)];
        let x: Vec<_> = patterns.iter().cloned().cycle().take(columns).collect();
        let x = b.values(Shape::rows(&[k]), 0, &x);
        b.op(Op::MatMul { precision }, &[w, x]);
    });
}

/// All row counts with all widths, and one that fills several of the largest tiles, for a format of each kind.
fn every_tile(cases: &mut Cases) {
    for (dtype, k) in
        [(DType::F32, 48), (DType::F16, 40), (DType::Q8_0, 64), (DType::Q4_K, 256), (DType::Q6_K, 256)]
    {
        for m in WIDTHS.into_iter().chain([130]) {
            for n in ROWS {
                let precision = Precision::Default;
                let product = Product { dtype, precision, k, m, n, outer: Outer::Rows, gap: 0, skipped: 0 };
                cases.add(format!("MatMul tile {}", product.name()), move |b| product.build(b));
            }
        }
    }
}

fn head_mat_mul(cases: &mut Cases, index: usize, dtype: DType, precision: Precision) {
    let depths = depths(dtype);
    let shapes = [(1, 1, 1), (3, 17, 2), (5, 16, 9), (2, 65, 33), (16, 7, 5)];
    for (i, (heads, m, n)) in shapes.into_iter().enumerate() {
        let k = depths[(i + index) % depths.len().min(5)];
        let (gap, skipped) = ([0, 2][i % 2], [0, 0, 6][i % 3]);
        let name = format!(
            "HeadMatMul {dtype} {precision:?}, {heads} heads, k {k}, m {m}, {n} rows, gap {gap}, columns from {skipped}"
        );
        cases.add(name, move |b| {
            b.step(n, 0, 1);
            let w = b.weight(dtype, &[heads, m, k], gap);
            let x = b.activations(Shape::rows(&[heads, k]), skipped);
            b.op(Op::HeadMatMul { precision }, &[w, x]);
        });
    }
}

/// Which experts the rows choose.
#[derive(Clone, Copy, Debug)]
enum Choice {
    /// At random.
    Spread,
    /// All the same ones, so that the other experts have no rows.
    Same,
}

fn expert_mat_mul(cases: &mut Cases, index: usize, dtype: DType, precision: Precision) {
    let depths = depths(dtype);
    let shapes = [
        (1, 1, 1, 1, Choice::Same),
        (5, 2, 17, 1, Choice::Spread),
        (9, 3, 16, 9, Choice::Spread),
        (4, 2, 33, 16, Choice::Same),
        (8, 6, 7, 70, Choice::Spread),
    ];
    for (i, (experts, used, m, n, choice)) in shapes.into_iter().enumerate() {
        let k = depths[(i + index) % depths.len().min(4)];
        // One activation for each row, or one for each choice.
        let each = (i + index) % 2 == 1;
        let (gap, skipped) = ([0, 0, 2][i % 3], [0, 3][i % 2]);
        let name = format!(
            "ExpertMatMul {dtype} {precision:?}, {used} of {experts} experts ({choice:?}), k {k}, m {m}, {n} rows, \
             for each choice: {each}, gap {gap}, columns from {skipped}"
        );
        cases.add(name, move |b| {
            b.step(n, 0, 1);
            let w = b.weight(dtype, &[experts, m, k], gap);
            let x = if each { Shape::rows(&[used, k]) } else { Shape::rows(&[k]) };
            let x = b.activations(x, skipped);
            let ids: Vec<i32> = (0..n).flat_map(|_| choose(b, experts, used, choice)).collect();
            let ids = b.ids(Shape::new(&[Extent::Rows, used.into()]), &ids);
            b.op(Op::ExpertMatMul { precision }, &[w, x, ids]);
        });
    }
}

/// Different experts, in any order.
fn choose(b: &mut Builder<'_>, experts: usize, used: usize, choice: Choice) -> Vec<i32> {
    match choice {
        Choice::Same => (0..used as i32).rev().collect(),
        Choice::Spread => {
            let mut left: Vec<i32> = (0..experts as i32).collect();
            (0..used).map(|_| left.swap_remove(b.random.below(left.len()))).collect()
        }
    }
}
