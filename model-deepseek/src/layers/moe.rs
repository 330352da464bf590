//! DeepSeekMoE (DeepSeek-V2, arXiv 2405.04434, section 2.2; V3, arXiv 2412.19437, section 2.1.2): each token
//! takes the shared experts and a few routed ones.

use super::{NamedWeights, dense};
use crate::{config::MoeConfig, source::SourceError};
use graph::{BuildError, GraphBuilder, Value};

pub(super) struct Weights {
    /// `[experts, d]`: the experts' centroids.
    router: Value,
    /// `[experts]`: added for the choice alone, to balance the load without a loss (V3).
    bias: Option<Value>,
    /// `[experts, width, d]`.
    gate: Value,
    /// `[experts, width, d]`.
    up: Value,
    /// `[experts, d, width]`.
    down: Value,
    shared: Option<dense::Weights>,
}

impl Weights {
    pub(super) fn named(
        g: &mut GraphBuilder,
        weights: &NamedWeights<'_>,
        c: &MoeConfig,
        d: usize,
        layer: usize,
    ) -> Result<Self, SourceError> {
        let name = |part: &str| format!("blk.{layer}.ffn_{part}.weight");
        let bias = format!("blk.{layer}.exp_probs_b.bias");
        let fused = name("gate_up_exps");
        let (gate, up) = if weights.has(&fused) {
            // Of each expert, the gate's rows and then the up projection's.
            let both = weights.get(g, &fused, &[c.experts, 2 * c.width, d])?;
            (
                weights.slice(g, &fused, both, 0..c.width)?,
                weights.slice(g, &fused, both, c.width..2 * c.width)?,
            )
        } else {
            let shape = [c.experts, c.width, d];
            (weights.get(g, &name("gate_exps"), &shape)?, weights.get(g, &name("up_exps"), &shape)?)
        };
        Ok(Weights {
            router: weights.get(g, &name("gate_inp"), &[c.experts, d])?,
            bias: match weights.has(&bias) {
                true => Some(weights.vector(g, &bias, c.experts)?),
                false => None,
            },
            gate,
            up,
            down: weights.get(g, &name("down_exps"), &[c.experts, d, c.width])?,
            shared: match c.shared_width {
                0 => None,
                width => Some(dense::Weights::named(g, weights, layer, "_shexp", d, width)?),
            },
        })
    }
}

/// `[rows, d] → [rows, d]`.
pub(super) fn build(
    g: &mut GraphBuilder,
    w: &Weights,
    c: &MoeConfig,
    layer: usize,
    x: Value,
) -> Result<Value, BuildError> {
    let name = |part: &str| format!("blk.{layer}.ffn_{part}");
    let scores = g.finely(|g| g.matmul(&name("gate_inp"), w.router, x))?;
    let (experts, weights) = g.route(&name("route"), scores, w.bias, c.route)?;

    let gate = g.expert_matmul(&name("gate_exps"), w.gate, x, experts)?;
    let up = g.expert_matmul(&name("up_exps"), w.up, x, experts)?;
    let hidden = g.swi_glu(&name("swiglu_exps"), gate, up)?;
    let each = g.expert_matmul(&name("down_exps"), w.down, hidden, experts)?;
    let routed = g.combine_experts(&name("combine"), each, weights)?;

    let Some(shared) = &w.shared else { return Ok(routed) };
    let shared = dense::build(g, shared, layer, "_shexp", x)?;
    g.add(&name("out"), routed, shared)
}
