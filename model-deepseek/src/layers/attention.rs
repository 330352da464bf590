//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its absorbed form.
//!
//! Keys and values of all heads are two linear maps of one latent row, `k_b` and `v_b`. Only that row is cached,
//! beside the rotated key that all heads share. Instead of expanding cached rows, `k_b` is applied to the query
//! and `v_b` to what attention returns: attention itself sees one key and one value for all heads, and the value
//! is the key's first `kv_lora_rank` elements.

use super::NamedWeights;
use crate::{
    config::{AttentionConfig, Config},
    source::SourceError,
};
use backend_api::{Extent, RopeAttributes};
use graph::{BuildError, GraphBuilder, Value};

pub(super) struct Weights {
    query: Query,
    /// `[kv_lora_rank + rope, d]`: hidden state to latent and shared key.
    kv_a: Value,
    kv_a_norm: Value,
    /// `[heads, kv_lora_rank, nope]`: a head's query to the latent's space.
    k_b: Value,
    /// `[heads, value, kv_lora_rank]`: a latent to a head's value.
    v_b: Value,
    /// `[d, heads × value]`.
    output: Value,
}

enum Query {
    /// `[heads × (nope + rope), d]`.
    Whole(Value),
    /// `[q_lora_rank, d]`, a norm, and `[heads × (nope + rope), q_lora_rank]`.
    LowRank { a: Value, norm: Value, b: Value },
}

impl Weights {
    pub(super) fn named(
        g: &mut GraphBuilder,
        weights: &NamedWeights<'_>,
        config: &Config,
        layer: usize,
    ) -> Result<Self, SourceError> {
        let (d, c) = (config.embedding_length, &config.attention);
        let queries = c.heads * c.key();
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let query = match c.q_lora_rank {
            None => Query::Whole(weights.get(g, &name("attn_q"), &[queries, d])?),
            Some(rank) => Query::LowRank {
                a: weights.get(g, &name("attn_q_a"), &[rank, d])?,
                norm: weights.vector(g, &name("attn_q_a_norm"), rank)?,
                b: weights.get(g, &name("attn_q_b"), &[queries, rank])?,
            },
        };
        let (k_b, v_b) = weights.absorbed(g, c, layer)?;
        Ok(Weights {
            query,
            kv_a: weights.get(g, &name("attn_kv_a_mqa"), &[c.cache_width(), d])?,
            kv_a_norm: weights.vector(g, &name("attn_kv_a_norm"), c.kv_lora_rank)?,
            k_b,
            v_b,
            output: weights.get(g, &name("attn_output"), &[d, c.heads * c.value])?,
        })
    }
}

/// `[rows, d] → [rows, d]`.
#[allow(clippy::too_many_arguments, reason = "a layer is a function of these")]
pub(super) fn build(
    g: &mut GraphBuilder,
    w: &Weights,
    c: &AttentionConfig,
    eps: f32,
    rope: &RopeAttributes,
    layer: usize,
    x: Value,
    cache: Value,
) -> Result<Value, BuildError> {
    let name = |part: &str| format!("blk.{layer}.{part}");

    // Queries: of each head, `nope` elements without position, then `rope` elements that are rotated.
    let q = match w.query {
        Query::Whole(q) => g.matmul(&name("attn_q"), q, x)?,
        Query::LowRank { a, norm, b } => {
            let latent = g.matmul(&name("attn_q_a"), a, x)?;
            let latent = g.rms_norm(&name("attn_q_a_norm"), latent, norm, eps)?;
            g.matmul(&name("attn_q_b"), b, latent)?
        }
    };
    let q = g.reshape(q, &[Extent::Rows, c.heads.into(), c.key().into()])?;
    let q_nope = g.slice(q, 2, 0..c.nope)?;
    let q_rope = g.slice(q, 2, c.nope..c.key())?;
    let q_rope = g.rope(&name("q_rope"), q_rope, rope)?;

    // The row to cache: the latent, then the key that all heads share.
    let kv = g.matmul(&name("attn_kv_a_mqa"), w.kv_a, x)?;
    let latent = g.slice(kv, 1, 0..c.kv_lora_rank)?;
    let latent = g.rms_norm(&name("attn_kv_a_norm"), latent, w.kv_a_norm, eps)?;
    let k_rope = g.slice(kv, 1, c.kv_lora_rank..c.cache_width())?;
    let k_rope = g.rope(&name("k_rope"), k_rope, rope)?;
    let row = g.concat(&name("kv"), latent, k_rope)?;

    // Everything from here to `values` belongs to the cache's owner.
    let mut region = g.region(cache);
    let q_latent = region.head_matmul(&name("q_absorb"), w.k_b, q_nope)?;
    let q = region.concat(&name("q"), q_latent, q_rope)?;
    let stored = region.kv_store(&name("kv_store"), row)?;
    let context = region.attention(&name("attention"), q, stored, c.scale as f32, c.kv_lora_rank)?;
    let values = region.head_matmul(&name("v_absorb"), w.v_b, context)?;

    let values = g.reshape(values, &[Extent::Rows, (c.heads * c.value).into()])?;
    g.matmul(&name("attn_output"), w.output, values)
}
