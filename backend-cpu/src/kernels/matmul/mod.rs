//! Matrix products: MatMul, HeadMatMul, ExpertMatMul.
//!
//! The three differ only in which rows meet which matrix ([`pairing`]). Beside a quantised weight activations are
//! rounded ([`activations`]) and multiplied as integers ([`quantized`]); everything else is [`float`].

pub(crate) mod activations;
pub(crate) mod float;
pub(crate) mod pairing;
pub(crate) mod quantized;

#[cfg(test)]
mod tests;

use super::formats::with_block;
use crate::{builder::Builder, tensor::Tensor};
use activations::Quantized;
use backend_api::{DType, Precision};
use float::{Decoded, FloatProduct, Stored};
use pairing::{Groups, Pairing};
use quantized::{Dot, OfK, OfSmall, Product, Weights};
use std::marker::PhantomData;

/// Bytes of weights that a task reads at least, if the matrix has as many.
const TASK_BYTES: usize = 24 << 10;

/// `(w [m, k], x [n, k]) → [n, m]`.
pub(crate) fn matmul(w: &Tensor, x: &Tensor, output: &Tensor, precision: Precision, builder: &mut Builder) {
    let weights = weights(w, 0);
    product(weights, w.dtype(), x, Pairing::Rows, output, precision, builder);
}

/// `(w [heads, m, k], x [n, heads, k]) → [n, heads, m]`.
pub(crate) fn head_matmul(
    w: &Tensor,
    x: &Tensor,
    output: &Tensor,
    precision: Precision,
    builder: &mut Builder,
) {
    let heads = w.shape().extents()[0].fixed().unwrap_or(1);
    product(weights(w, 1), w.dtype(), x, Pairing::Heads(heads), output, precision, builder);
}

/// `(w [experts, m, k], x [rows, k] or [rows, used, k], ids [rows, used]) → [rows, used, m]`.
pub(crate) fn expert_matmul(
    w: &Tensor,
    x: &Tensor,
    ids: &Tensor,
    output: &Tensor,
    precision: Precision,
    builder: &mut Builder,
) {
    let experts = w.shape().extents()[0].fixed().unwrap_or(1);
    let share = if x.shape().rank() == 2 { ids.width() } else { 1 };
    let groups = Groups::of(ids, experts, builder);
    let pairing = Pairing::Experts { groups, share };
    product(weights(w, 1), w.dtype(), x, pairing, output, precision, builder);
}

/// `w` with its rows along `axis`; the axis before it, if any, counts matrices.
fn weights(w: &Tensor, axis: usize) -> Weights {
    Weights {
        base: w.base(),
        matrix_stride: if axis == 0 { 0 } else { w.stride(axis - 1) },
        row_stride: w.stride(axis),
        rows: w.shape().extents()[axis].fixed().unwrap_or(0),
        k: w.width(),
    }
}

fn product(
    weights: Weights,
    dtype: DType,
    x: &Tensor,
    pairing: Pairing,
    output: &Tensor,
    precision: Precision,
    builder: &mut Builder,
) {
    // A few tasks for each thread, but none so small that handing it out is felt.
    let least = TASK_BYTES / dtype.row_bytes(weights.k);
    let chunk = (weights.rows / (8 * builder.threads())).clamp(16, 128).max(least).next_multiple_of(16);
    let (x, output) = (*x, *output);
    macro_rules! float {
        ($source:ty) => {{
            let source = PhantomData::<$source>;
            builder.push(FloatProduct { weights, dtype, x, pairing, output, chunk, source })
        }};
    }
    macro_rules! quantized {
        ($dot:ty) => {{
            let parts = if precision == Precision::Fine { 2 } else { 1 };
            let activations = Quantized::of(&x, <$dot>::layout(x.width()), parts, builder);
            let capacity = output.rows(&builder.capacity().full_step());
            let format = PhantomData::<$dot>;
            builder.push(Product { weights, activations, pairing, output, chunk, capacity, format })
        }};
    }
    match (dtype, precision) {
        (DType::F32, _) => float!(Stored<float::F32>),
        (DType::F16, _) => float!(Stored<float::F16>),
        (DType::BF16, _) => float!(Stored<float::BF16>),
        (_, Precision::F32) => float!(Decoded),
        (_, Precision::Default | Precision::Fine) => with_block!(
            dtype,
            small B => quantized!(OfSmall<B>),
            k B => quantized!(OfK<B>),
            else unreachable!("float formats are above, and no weight is I32")
        ),
    }
}
