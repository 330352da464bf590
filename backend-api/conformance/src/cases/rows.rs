//! What is done row by row or element by element.

use super::{Cases, Outer, ROWS, shape};
use backend_api::{DType, Extent, Op, Shape};

pub(super) fn add(cases: &mut Cases) {
    super::attention::rms_norm(cases);
    embed_rows(cases);
    swi_glu(cases);
    add_op(cases);
    concat(cases);
    select_rows(cases);
    cast(cases);
}

fn embed_rows(cases: &mut Cases) {
    for (index, dtype) in DType::WEIGHTS.into_iter().enumerate() {
        for (i, n) in [1, 3, 33].into_iter().enumerate() {
            let blocks = [1, 2, 5][(i + index) % 3];
            let d = if dtype.is_quantized() { blocks * dtype.block_len() } else { 17 * blocks };
            let (vocab, gap) = ([1, 300, 40][i], [0, 0, 1][i]);
            let outer = [Outer::Rows, Outer::Outputs, Outer::Rows][i];
            cases.add(
                format!("EmbedRows {dtype} [{vocab}, {d}], {n} ids ({outer:?}), gap {gap}"),
                move |b| {
                    let outer = outer.set(b, n);
                    let table = b.weight(dtype, &[vocab, d], gap);
                    let ids: Vec<i32> = (0..n).map(|_| b.random.below(vocab) as i32).collect();
                    let ids = b.ids(Shape::new(&[outer]), &ids);
                    b.op(Op::EmbedRows, &[table, ids]);
                },
            );
        }
    }
}

/// Extents after the first one, for operations that take any.
const RESTS: [&[usize]; 10] =
    [&[1], &[15], &[3, 16], &[33], &[2, 3, 7], &[64], &[5, 65], &[120], &[576], &[1030]];

fn swi_glu(cases: &mut Cases) {
    for (i, n) in ROWS.into_iter().enumerate() {
        let (rest, skipped) = (RESTS[i], [0, 6][i % 2]);
        let outer = [Outer::Rows, Outer::Fixed, Outer::Outputs][i % 3];
        cases.add(format!("SwiGlu [{n} rows ({outer:?}), {rest:?}], columns from {skipped}"), move |b| {
            let outer = outer.set(b, n);
            let gate = b.activations(shape(outer, rest), skipped);
            let up = b.activations(shape(outer, rest), 2 * skipped);
            b.op(Op::SwiGlu, &[gate, up]);
        });
    }
    cases.add("SwiGlu of gates beyond the range of exp".to_owned(), |b| {
        b.step(1, 0, 1);
        let gates = vec![-1e30, -1000.0, -104.0, -89.0, -88.0, -50.0, -0.0, 0.0, 1e-30, 20.0, 89.0, 1e30];
        let n = gates.len();
        let gate = b.values(Shape::rows(&[n]), 0, &[gates]);
        let up = b.values(Shape::rows(&[n]), 0, &[vec![-1.5; n]]);
        b.op(Op::SwiGlu, &[gate, up]);
    });
}

fn add_op(cases: &mut Cases) {
    for (i, n) in ROWS.into_iter().enumerate() {
        let rest = RESTS[i];
        for over in [None, Some(0), Some(1)] {
            let skipped = if over.is_some() { 0 } else { [0, 3][i % 2] };
            let name = format!("Add [{n} rows, {rest:?}], over input {over:?}, columns from {skipped}");
            cases.add(name, move |b| {
                b.step(n, 0, 1);
                let a = b.activations(Shape::rows(rest), skipped);
                let c = b.activations(Shape::rows(rest), 0);
                match over {
                    Some(input) => _ = b.op_over(Op::Add, &[a, c], [a, c][input]),
                    None => _ = b.op(Op::Add, &[a, c]),
                }
            });
        }
    }
}

fn concat(cases: &mut Cases) {
    for (i, n) in ROWS.into_iter().enumerate() {
        let (rest, other) = (RESTS[i], [1, 64, 33][i % 3]);
        let skipped = [0, 2][i % 2];
        cases.add(format!("Concat [{n} rows, {rest:?}] with {other}, columns from {skipped}"), move |b| {
            b.step(n, 0, 1);
            let a = b.activations(Shape::rows(rest), skipped);
            let c = b.activations(Shape::rows(&[&rest[..rest.len() - 1], &[other]].concat()), 2 * skipped);
            b.op(Op::Concat, &[a, c]);
        });
    }
}

fn select_rows(cases: &mut Cases) {
    let shapes = [(1, 1), (1, 0), (5, 5), (9, 1), (33, 7), (16, 16), (3, 9), (70, 3)];
    for (i, (n, outputs)) in shapes.into_iter().enumerate() {
        let (rest, skipped) = (RESTS[i], [0, 5][i % 2]);
        cases.add(
            format!("SelectRows {outputs} of [{n} rows, {rest:?}], columns from {skipped}"),
            move |b| {
                b.step(n, 0, outputs);
                let x = b.activations(Shape::rows(rest), skipped);
                // Any order, and some more than once.
                let ids: Vec<i32> = (0..outputs).map(|_| b.random.below(n) as i32).collect();
                let ids = b.ids(Shape::new(&[Extent::Outputs]), &ids);
                b.op(Op::SelectRows, &[x, ids]);
            },
        );
    }
}

fn cast(cases: &mut Cases) {
    for (from, to) in [
        (DType::F32, DType::F16),
        (DType::F16, DType::F32),
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
    ] {
        for (i, n) in [1, 5, 33].into_iter().enumerate() {
            let (rest, skipped) = (RESTS[2 * i + 1], [0, 0, 4][i]);
            cases.add(
                format!("Cast {from} to {to}, [{n} rows, {rest:?}], columns from {skipped}"),
                move |b| {
                    b.step(n, 0, 1);
                    let x = match from {
                        DType::F16 => b.halves(Shape::rows(rest), skipped),
                        _ => b.activations(Shape::rows(rest), skipped),
                    };
                    b.op(Op::Cast { to }, &[x]);
                },
            );
        }
    }
    cases.add("Cast of ties, of denormals and of the largest".to_owned(), |b| {
        b.step(1, 0, 1);
        let values = vec![
            1.0 + 0.5 / 1024.0,
            1.0 + 1.5 / 1024.0,
            3e-8,
            2.98e-8,
            6.1e-5,
            65504.0,
            65519.0,
            -0.0,
            1e-40,
        ];
        let x = b.values(Shape::rows(&[values.len()]), 0, &[values]);
        b.op(Op::Cast { to: DType::F16 }, &[x]);
    });
}
