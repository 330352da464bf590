//! The SwiGLU network (arXiv 2002.05202): a dense layer's feed-forward part, and the shared experts.

use super::NamedWeights;
use crate::source::SourceError;
use graph::{BuildError, GraphBuilder, Value};

pub(super) struct Weights {
    /// `[width, d]`.
    gate: Value,
    /// `[width, d]`.
    up: Value,
    /// `[d, width]`.
    down: Value,
}

impl Weights {
    /// `suffix` follows `ffn_gate` in the names of tensors: nothing in a layer without experts, `_shexp` for the
    /// shared experts.
    pub(super) fn named(
        g: &mut GraphBuilder,
        weights: &NamedWeights<'_>,
        layer: usize,
        suffix: &str,
        d: usize,
        width: usize,
    ) -> Result<Self, SourceError> {
        let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}.weight");
        Ok(Weights {
            gate: weights.get(g, &name("gate"), &[width, d])?,
            up: weights.get(g, &name("up"), &[width, d])?,
            down: weights.get(g, &name("down"), &[d, width])?,
        })
    }
}

/// `[rows, d] → [rows, d]`.
pub(super) fn build(
    g: &mut GraphBuilder,
    w: &Weights,
    layer: usize,
    suffix: &str,
    x: Value,
) -> Result<Value, BuildError> {
    let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}");
    let gate = g.matmul(&name("gate"), w.gate, x)?;
    let up = g.matmul(&name("up"), w.up, x)?;
    let hidden = g.swi_glu(&name("swiglu"), gate, up)?;
    g.matmul(&name("down"), w.down, hidden)
}
