//! The parts of a decoder layer. Each takes its weights by name and builds its nodes, which are named like the
//! weights they read.

mod attention;
mod dense;
mod moe;
mod weights;

pub(crate) use weights::{NamedWeights, derive_k_b};

use crate::{
    config::{Config, FeedForward},
    source::SourceError,
};
use backend_api::RopeAttributes;
use graph::{BuildError, GraphBuilder, Value};
use thiserror::Error;

/// Why a layer cannot be built.
#[derive(Debug, Error)]
pub(crate) enum LayerError {
    /// A weight is missing or not as it must be.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A node's inputs do not fit.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// One decoder layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
///
/// Attention and dense layers are computed finely: what is lost there reaches the choice of experts in all layers above,
/// and another choice is another answer. What experts lose hardly does, and they are most of a deep model's work.
///
/// `x` is `[rows, d]`, `cache` the state of this layer.
pub(crate) fn decoder_layer(
    g: &mut GraphBuilder,
    weights: &NamedWeights<'_>,
    config: &Config,
    rope: &RopeAttributes,
    layer: usize,
    x: Value,
    cache: Value,
) -> Result<Value, LayerError> {
    let (d, eps) = (config.embedding_length, config.norm_eps);
    let name = |part: &str| format!("blk.{layer}.{part}");

    let norm = weights.vector(g, &name("attn_norm.weight"), d)?;
    let y = g.rms_norm(&name("attn_norm"), x, norm, eps)?;
    let w = attention::Weights::named(g, weights, config, layer)?;
    let y = g.finely(|g| attention::build(g, &w, &config.attention, eps, rope, layer, y, cache))?;
    let x = g.add(&name("attn_residual"), x, y)?;

    let norm = weights.vector(g, &name("ffn_norm.weight"), d)?;
    let y = g.rms_norm(&name("ffn_norm"), x, norm, eps)?;
    let y = match &config.feed_forward[layer] {
        FeedForward::Dense { width } => {
            let w = dense::Weights::named(g, weights, layer, "", d, *width)?;
            g.finely(|g| dense::build(g, &w, layer, "", y))?
        }
        FeedForward::Experts(moe) => {
            let w = moe::Weights::named(g, weights, moe, d, layer)?;
            moe::build(g, &w, moe, layer, y)?
        }
    };
    Ok(g.add(&name("ffn_residual"), x, y)?)
}
