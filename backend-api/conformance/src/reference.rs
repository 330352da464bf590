//! What each operation computes, in f64, written from the definitions at [`Op`] and nothing else: no blocks, no
//! tiles, no order of sums that a kernel could be tempted to share.

use backend_api::{DType, Gating, Op, RopeAttributes, RouteAttributes, Step, TensorDesc, format};
use std::cmp::Ordering;

/// A dense tensor of f64. Ids are exact in it too.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Tensor {
    pub(crate) fn new(shape: &[usize], values: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "shape {shape:?}");
        Tensor { shape: shape.to_vec(), values }
    }

    /// Decodes the tensor that starts at `bytes`, leaving out what lies between its rows.
    pub(crate) fn load(desc: &TensorDesc, bytes: &[u8], step: &Step) -> Self {
        let shape = desc.shape.at(step);
        let inner = *shape.last().expect("a shape has extents");
        let mut values = Vec::with_capacity(shape.iter().product());
        let mut row = vec![0.0f32; inner];
        for offset in row_offsets(desc, step) {
            let bytes = &bytes[offset..][..desc.dtype.row_bytes(inner)];
            if desc.dtype == DType::I32 {
                values.extend(bytes.as_chunks().0.iter().map(|id| f64::from(i32::from_le_bytes(*id))));
            } else {
                format::decode(desc.dtype, bytes, &mut row);
                values.extend(row.iter().map(|v| f64::from(*v)));
            }
        }
        Tensor { shape, values }
    }

    /// The tensor as a device stores it, dense.
    pub(crate) fn store(&self, dtype: DType) -> Vec<u8> {
        if dtype == DType::I32 {
            return self.values.iter().flat_map(|id| (*id as i32).to_le_bytes()).collect();
        }
        let row_bytes = dtype.row_bytes(self.inner());
        let mut bytes = vec![0; self.rows().count() * row_bytes];
        for (row, bytes) in self.rows().zip(bytes.chunks_exact_mut(row_bytes)) {
            let row: Vec<f32> = row.iter().map(|v| *v as f32).collect();
            format::encode(dtype, &row, bytes);
        }
        bytes
    }

    pub(crate) fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Tensor { shape: self.shape.clone(), values: self.values.iter().map(|v| f(*v)).collect() }
    }

    pub(crate) fn inner(&self) -> usize {
        *self.shape.last().expect("a shape has extents")
    }

    /// The innermost rows.
    pub(crate) fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.values.chunks_exact(self.inner())
    }

    /// The innermost row with this index among all.
    pub(crate) fn row(&self, index: usize) -> &[f64] {
        &self.values[index * self.inner()..][..self.inner()]
    }
}

/// The byte offset of each innermost row, in order.
pub(crate) fn row_offsets(desc: &TensorDesc, step: &Step) -> Vec<usize> {
    let shape = desc.shape.at(step);
    let outer = &shape[..shape.len() - 1];
    let mut offsets = vec![0];
    if let [only] = shape[..] {
        return if only == 0 { Vec::new() } else { offsets };
    }
    for (extent, stride) in outer.iter().zip(&desc.strides) {
        offsets = offsets.iter().flat_map(|base| (0..*extent).map(move |i| base + i * stride)).collect();
    }
    offsets
}

/// The outputs of `op`. That of a [`Op::KvStore`] is the rows it writes.
pub(crate) fn evaluate(op: &Op, inputs: &[&Tensor], step: &Step) -> Vec<Tensor> {
    let one = |tensor| vec![tensor];
    match (op, inputs) {
        (Op::EmbedRows | Op::SelectRows, [x, ids]) => one(gather(x, ids)),
        (Op::RmsNorm { eps }, [x, weight]) => one(rms_norm(x, weight, f64::from(*eps))),
        (Op::MatMul { .. }, [w, x]) => one(mat_mul(w, x)),
        (Op::HeadMatMul { .. }, [w, x]) => one(head_mat_mul(w, x)),
        (Op::ExpertMatMul { .. }, [w, x, ids]) => one(expert_mat_mul(w, x, ids)),
        (Op::Rope(rope), [x]) => one(turn(x, rope, step)),
        (Op::KvStore | Op::Cast { .. }, [x]) => one((*x).clone()),
        (Op::LatentAttention { scale, latent }, [q, cache]) => {
            one(attention(q, cache, f64::from(*scale), *latent, step))
        }
        (Op::Route(attributes), [scores]) => route(scores, None, attributes),
        (Op::Route(attributes), [scores, bias]) => route(scores, Some(bias), attributes),
        (Op::SwiGlu, [gate, up]) => one(zip(gate, up, |g, u| g / (1.0 + (-g).exp()) * u)),
        (Op::CombineExperts, [y, weights]) => one(combine(y, weights)),
        (Op::Add, [a, b]) => one(zip(a, b, |a, b| a + b)),
        (Op::Concat, [a, b]) => one(concat(a, b)),
        _ => unreachable!("{} takes no {} inputs", op.kind(), inputs.len()),
    }
}

fn zip(a: &Tensor, b: &Tensor, f: impl Fn(f64, f64) -> f64) -> Tensor {
    Tensor::new(&a.shape, a.values.iter().zip(&b.values).map(|(a, b)| f(*a, *b)).collect())
}

fn gather(x: &Tensor, ids: &Tensor) -> Tensor {
    let slice: usize = x.shape[1..].iter().product();
    let values = ids.values.iter().flat_map(|id| &x.values[*id as usize * slice..][..slice]).copied();
    let mut shape = x.shape.clone();
    shape[0] = ids.values.len();
    Tensor::new(&shape, values.collect())
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let norm = |row: &[f64]| {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + eps).sqrt();
        row.iter().zip(&weight.values).map(|(v, w)| v * factor * w).collect::<Vec<f64>>()
    };
    Tensor::new(&x.shape, x.rows().flat_map(norm).collect())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn mat_mul(w: &Tensor, x: &Tensor) -> Tensor {
    let values = x.rows().flat_map(|x| w.rows().map(|w| dot(w, x))).collect();
    Tensor::new(&[x.shape[0], w.shape[0]], values)
}

fn head_mat_mul(w: &Tensor, x: &Tensor) -> Tensor {
    let (heads, m) = (w.shape[0], w.shape[1]);
    let product = |(index, x)| (0..m).map(move |i| dot(w.row(index % heads * m + i), x));
    Tensor::new(&[x.shape[0], heads, m], x.rows().enumerate().flat_map(product).collect())
}

fn expert_mat_mul(w: &Tensor, x: &Tensor, ids: &Tensor) -> Tensor {
    let (m, used) = (w.shape[1], ids.shape[1]);
    let mut values = Vec::new();
    for (index, id) in ids.values.iter().enumerate() {
        let x = x.row(if x.shape.len() == 2 { index / used } else { index });
        values.extend((0..m).map(|i| dot(w.row(*id as usize * m + i), x)));
    }
    Tensor::new(&[ids.shape[0], used, m], values)
}

fn turn(x: &Tensor, rope: &RopeAttributes, step: &Step) -> Tensor {
    let rows_per_token: usize = x.shape[1..x.shape.len() - 1].iter().product();
    let mut values = Vec::with_capacity(x.values.len());
    for (index, row) in x.rows().enumerate() {
        let position = (step.past + index / rows_per_token) as f64;
        for (pair, frequency) in row.as_chunks::<2>().0.iter().zip(rope.inverse_frequencies.iter()) {
            let (sin, cos) = (position * frequency).sin_cos();
            let (sin, cos) = (sin * f64::from(rope.magnitude), cos * f64::from(rope.magnitude));
            values.extend([pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos]);
        }
    }
    Tensor::new(&x.shape, values)
}

/// Softmax; all NaN if a score is.
pub(crate) fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|p| p / sum).collect()
}

fn attention(q: &Tensor, cache: &Tensor, scale: f64, latent: usize, step: &Step) -> Tensor {
    let heads = q.shape[1];
    let mut values = Vec::new();
    for (index, q) in q.rows().enumerate() {
        let seen = step.past + index / heads + 1;
        let scores: Vec<f64> = (0..seen).map(|j| scale * dot(q, cache.row(j))).collect();
        let weights = softmax(&scores);
        let mut sum = vec![0.0; latent];
        for (j, weight) in weights.iter().enumerate() {
            sum.iter_mut().zip(cache.row(j)).for_each(|(sum, v)| *sum += weight * v);
        }
        values.extend(sum);
    }
    Tensor::new(&[q.shape[0], heads, latent], values)
}

fn route(scores: &Tensor, bias: Option<&Tensor>, attributes: &RouteAttributes) -> Vec<Tensor> {
    let RouteAttributes { used, gating, groups, groups_used, renormalise, scale } = *attributes;
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for row in scores.rows() {
        let p = match gating {
            Gating::Softmax => softmax(row),
            Gating::Sigmoid => row.iter().map(|s| 1.0 / (1.0 + (-s).exp())).collect(),
        };
        let s: Vec<f64> = match bias {
            Some(bias) => p.iter().zip(&bias.values).map(|(p, b)| p + b).collect(),
            None => p.clone(),
        };
        let open = |s: f64| if s == f64::NEG_INFINITY { f64::from(RouteAttributes::CLOSED) } else { s };
        let s: Vec<f64> = s.into_iter().map(open).collect();
        if !s.iter().all(|s| s.is_finite()) {
            ids.extend((0..used).map(|expert| expert as f64));
            weights.extend(vec![f64::NAN; used]);
            continue;
        }
        let group_len = s.len() / groups;
        let group_scores: Vec<f64> = s
            .chunks_exact(group_len)
            .map(|group| largest(group).iter().take(2).map(|i| group[*i]).sum())
            .collect();
        let open = &largest(&group_scores)[..groups_used];
        let chosen: Vec<usize> = largest(&s)
            .into_iter()
            .filter(|expert| open.contains(&(expert / group_len)))
            .take(used)
            .collect();

        let sum: f64 = chosen.iter().map(|expert| p[*expert]).sum();
        let divisor = if renormalise { sum.max(1.0 / 16384.0) } else { 1.0 };
        weights.extend(chosen.iter().map(|expert| p[*expert] / divisor * f64::from(scale)));
        ids.extend(chosen.iter().map(|expert| *expert as f64));
    }
    let shape = [scores.shape[0], used];
    vec![Tensor::new(&shape, ids), Tensor::new(&shape, weights)]
}

/// Indices in falling order of their values, equal ones in rising order of index.
fn largest(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].partial_cmp(&values[*a]).unwrap_or(Ordering::Equal));
    order
}

fn combine(y: &Tensor, weights: &Tensor) -> Tensor {
    let (used, d) = (y.shape[1], y.shape[2]);
    let mut values = vec![0.0; y.shape[0] * d];
    for (row, sum) in values.chunks_exact_mut(d).enumerate() {
        for choice in row * used..(row + 1) * used {
            let weight = weights.values[choice];
            sum.iter_mut().zip(y.row(choice)).for_each(|(sum, y)| *sum += weight * y);
        }
    }
    Tensor::new(&[y.shape[0], d], values)
}

fn concat(a: &Tensor, b: &Tensor) -> Tensor {
    let mut shape = a.shape.clone();
    *shape.last_mut().expect("a shape has extents") += b.inner();
    Tensor::new(&shape, a.rows().zip(b.rows()).flat_map(|(a, b)| [a, b].concat()).collect())
}

/// Small examples that can be checked by hand.
#[cfg(test)]
mod tests {
    use super::*;
    use backend_api::{Extent, Precision, Shape};

    const STEP: Step = Step { rows: 1, past: 0, outputs: 1 };

    fn tensor<const N: usize>(shape: &[usize], values: [f64; N]) -> Tensor {
        Tensor::new(shape, values.to_vec())
    }

    /// One output, equal to `expected` but for the rounding of f64.
    fn check<const N: usize>(op: Op, inputs: &[Tensor], step: Step, shape: &[usize], expected: [f64; N]) {
        let found = evaluate(&op, &inputs.iter().collect::<Vec<_>>(), &step).remove(0);
        assert_eq!(found.shape, shape, "{}", op.kind());
        let near = found.values.iter().zip(&expected).all(|(f, e)| (f - e).abs() < 1e-6);
        assert!(near, "{}: {:?} for {expected:?}", op.kind(), found.values);
    }

    #[test]
    fn products() {
        let precision = Precision::Default;
        let w = tensor(&[2, 3], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let x = tensor(&[2, 3], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        check(Op::MatMul { precision }, &[w, x], STEP, &[2, 2], [1.0, 4.0, 6.0, 15.0]);

        let w = tensor(&[2, 1, 2], [1.0, 2.0, 3.0, 4.0]);
        let x = tensor(&[2, 2, 2], [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
        check(Op::HeadMatMul { precision }, &[w.clone(), x.clone()], STEP, &[2, 2, 1], [3.0, 7.0, 1.0, 4.0]);

        let ids = tensor(&[2, 2], [1.0, 0.0, 1.0, 1.0]);
        check(
            Op::ExpertMatMul { precision },
            &[w.clone(), x, ids.clone()],
            STEP,
            &[2, 2, 1],
            [7.0, 3.0, 3.0, 4.0],
        );
        let x = tensor(&[2, 2], [1.0, 0.0, 0.0, 1.0]);
        check(Op::ExpertMatMul { precision }, &[w, x, ids], STEP, &[2, 2, 1], [3.0, 1.0, 4.0, 4.0]);
    }

    #[test]
    fn rows_and_elements() {
        let x = tensor(&[2, 2], [3.0, 4.0, 0.0, 0.0]);
        let rms = 12.5f64.sqrt();
        let weight = tensor(&[2], [1.0, 2.0]);
        check(
            Op::RmsNorm { eps: 0.0 },
            &[tensor(&[1, 2], [3.0, 4.0]), weight.clone()],
            STEP,
            &[1, 2],
            [3.0 / rms, 8.0 / rms],
        );
        check(Op::RmsNorm { eps: 1.0 }, &[tensor(&[1, 2], [0.0, 0.0]), weight], STEP, &[1, 2], [0.0, 0.0]);
        let ids = tensor(&[3], [1.0, 0.0, 0.0]);
        check(Op::SelectRows, &[x.clone(), ids.clone()], STEP, &[3, 2], [0.0, 0.0, 3.0, 4.0, 3.0, 4.0]);
        check(Op::EmbedRows, &[x.clone(), ids], STEP, &[3, 2], [0.0, 0.0, 3.0, 4.0, 3.0, 4.0]);
        check(Op::Add, &[x.clone(), x.clone()], STEP, &[2, 2], [6.0, 8.0, 0.0, 0.0]);
        let one = tensor(&[2, 1], [7.0, 8.0]);
        check(Op::Concat, &[x.clone(), one], STEP, &[2, 3], [3.0, 4.0, 7.0, 0.0, 0.0, 8.0]);
        check(Op::Cast { to: DType::F16 }, std::slice::from_ref(&x), STEP, &[2, 2], [3.0, 4.0, 0.0, 0.0]);
        check(Op::KvStore, &[x], STEP, &[2, 2], [3.0, 4.0, 0.0, 0.0]);
        // silu(1) = 0.731058…
        let (gate, up) = (tensor(&[1, 2], [1.0, 0.0]), tensor(&[1, 2], [2.0, 5.0]));
        check(Op::SwiGlu, &[gate, up], STEP, &[1, 2], [2.0 * 0.731_058_578_63, 0.0]);
        let (y, weights) = (tensor(&[1, 2, 2], [1.0, 2.0, 3.0, 4.0]), tensor(&[1, 2], [10.0, 1.0]));
        check(Op::CombineExperts, &[y, weights], STEP, &[1, 2], [13.0, 24.0]);
    }

    #[test]
    fn positions_turn_pairs() {
        // A quarter turn for each position; the first row is at position 1.
        let quarter = std::f64::consts::FRAC_PI_2;
        let rope = RopeAttributes { inverse_frequencies: [quarter].into(), magnitude: 2.0 };
        let x = tensor(&[2, 2, 2], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
        let step = Step { rows: 2, past: 1, outputs: 1 };
        check(Op::Rope(rope), &[x], step, &[2, 2, 2], [0.0, 2.0, -2.0, 0.0, -2.0, 0.0, 0.0, -2.0]);
    }

    #[test]
    fn attention_sees_the_past_and_itself() {
        let cache = tensor(&[4, 2], [1.0, 0.0, 3.0, 0.0, 5.0, 1e3, f64::NAN, f64::NAN]);
        let op = Op::LatentAttention { scale: 1.0, latent: 1 };
        // The second element is key alone: the first query does not see row 2, the second sees nothing else.
        let q = tensor(&[2, 1, 2], [0.0, 1.0, 0.0, 1.0]);
        let step = Step { rows: 2, past: 1, outputs: 1 };
        check(op.clone(), &[q, cache.clone()], step, &[2, 1, 1], [2.0, 5.0]);
        // Scores 0 and ln 3 weigh 1 : 3.
        let q = tensor(&[1, 1, 2], [3f64.ln() / 2.0, 0.0]);
        check(op, &[q, cache], Step { rows: 1, ..step }, &[1, 1, 1], [0.25 + 0.75 * 3.0]);
    }

    #[test]
    fn routing() {
        let base = RouteAttributes {
            used: 2,
            gating: Gating::Sigmoid,
            groups: 1,
            groups_used: 1,
            renormalise: false,
            scale: 1.0,
        };
        let logit = |p: f64| (p / (1.0 - p)).ln();
        let scores = tensor(&[1, 4], [0.5, 0.75, 0.25, 0.5].map(logit));
        let case = |attributes: RouteAttributes, bias: Option<[f64; 4]>, ids: [f64; 2], weights: [f64; 2]| {
            let bias = bias.map(|bias| tensor(&[4], bias));
            let inputs: Vec<&Tensor> = std::iter::once(&scores).chain(&bias).collect();
            let found = evaluate(&Op::Route(attributes), &inputs, &STEP);
            assert_eq!(found[0].values, ids, "{attributes:?}");
            let near = found[1].values.iter().zip(weights).all(|(f, w)| (f - w).abs() < 1e-9);
            assert!(near, "{attributes:?}: {:?} for {weights:?}", found[1].values);
        };
        // The tie of experts 0 and 3 goes to 0.
        case(base, None, [1.0, 0.0], [0.75, 0.5]);
        case(RouteAttributes { renormalise: true, scale: 10.0, ..base }, None, [1.0, 0.0], [6.0, 4.0]);
        // The bias chooses but does not weigh.
        case(base, Some([0.0, 0.0, 2.0, 0.0]), [2.0, 1.0], [0.25, 0.75]);
        // Groups {0, 1} and {2, 3}: 1.25 against 0.75, or with a bias on 2 against 1.25 + 0.6.
        let grouped = RouteAttributes { groups: 2, ..base };
        case(grouped, None, [1.0, 0.0], [0.75, 0.5]);
        case(grouped, Some([0.0, 0.0, 0.6, 0.0]), [2.0, 3.0], [0.25, 0.5]);
        // Groups of one expert are worth that expert.
        case(RouteAttributes { groups: 4, groups_used: 2, ..base }, None, [1.0, 0.0], [0.75, 0.5]);
        // What is closed is not chosen while there are others, nor a group that has less that is open.
        let closed = f64::NEG_INFINITY;
        case(base, Some([0.0, closed, 0.0, closed]), [0.0, 2.0], [0.5, 0.25]);
        case(base, Some([closed, closed, 0.0, closed]), [2.0, 0.0], [0.25, 0.5]);
        case(base, Some([closed; 4]), [0.0, 1.0], [0.5, 0.75]);
        case(grouped, Some([0.0, closed, 0.0, 0.0]), [3.0, 2.0], [0.5, 0.25]);
        case(grouped, Some([closed, closed, 0.0, closed]), [2.0, 3.0], [0.25, 0.5]);
        // Without an order there are no weights.
        for bias in [[0.0, f64::NAN, 0.0, 0.0], [0.0, 0.0, 0.0, f64::INFINITY]] {
            let bias = tensor(&[4], bias);
            let found = evaluate(&Op::Route(base), &[&scores, &bias], &STEP);
            assert_eq!(found[0].values, [0.0, 1.0]);
            assert!(found[1].values.iter().all(|weight| weight.is_nan()), "{:?}", found[1].values);
        }
        // Softmax: odds 1 : 3 : 1/3 : 1.
        case(RouteAttributes { gating: Gating::Softmax, ..base }, None, [1.0, 0.0], [9.0 / 16.0, 3.0 / 16.0]);
    }

    #[test]
    fn views_are_loaded_row_by_row() {
        // Two heads of two elements, of rows of three floats, tokens 7 floats apart.
        let shape = Shape::new(&[Extent::Rows, Extent::Fixed(2), Extent::Fixed(2)]);
        let desc = TensorDesc { dtype: DType::F32, shape, strides: [28, 12, 0, 0] };
        let bytes: Vec<u8> = (0..16).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let found = Tensor::load(&desc, &bytes, &Step { rows: 2, ..STEP });
        assert_eq!(found.values, [0.0, 1.0, 3.0, 4.0, 7.0, 8.0, 10.0, 11.0]);
        let none = Tensor::load(&desc, &[], &Step { rows: 0, ..STEP });
        assert_eq!((none.shape, none.values), (vec![0, 2, 2], vec![]));
    }
}
