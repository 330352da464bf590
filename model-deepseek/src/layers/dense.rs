//! The SwiGLU network (arXiv 2002.05202): a dense layer's feed-forward part, and the shared experts.

use super::NamedWeights;
use crate::source::SourceError;
use backend_api::Precision;
use graph::{BuildError, GraphBuilder, Value};

/// Where the network stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// In a layer without experts.
    Dense,
    /// Beside the routed experts, for all tokens.
    Shared,
}

impl Kind {
    /// What follows `ffn_gate` in the names of tensors.
    fn suffix(self) -> &'static str {
        match self {
            Kind::Dense => "",
            Kind::Shared => "_shexp",
        }
    }
}

pub(super) struct Weights {
    /// `[width, d]`.
    gate: Value,
    /// `[width, d]`.
    up: Value,
    /// `[d, width]`.
    down: Value,
}

impl Weights {
    pub(super) fn named(
        g: &mut GraphBuilder,
        weights: &NamedWeights<'_>,
        layer: usize,
        kind: Kind,
        d: usize,
        width: usize,
    ) -> Result<Self, SourceError> {
        let suffix = kind.suffix();
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
    kind: Kind,
    x: Value,
) -> Result<Value, BuildError> {
    let suffix = kind.suffix();
    let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}");
    let gate = g.matmul(&name("gate"), w.gate, x)?;
    let up = g.matmul(&name("up"), w.up, x)?;
    let hidden = g.swi_glu(&name("swiglu"), gate, up)?;
    if kind == Kind::Shared {
        return g.matmul(&name("down"), w.down, hidden);
    }
    // What leaves a SwiGLU has outliers, which 8 bits per block round worst, and what the first layers lose no
    // later one finds again. In f32 here, the squared error of a quantised model's logits falls by a third; dense
    // layers are few (one of 27 in V2-Lite, three of 61 in V3), so it costs 2 to 3 % of a decode step.
    let usual = g.set_precision(Precision::F32);
    let down = g.matmul(&name("down"), w.down, hidden);
    g.set_precision(usual);
    down
}
