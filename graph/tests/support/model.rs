//! A small model of the shape that matters: latent attention with a cache, a dense layer, then routed experts with a
//! shared one.

use backend_api::{DType, Extent, Gating, Precision, RopeAttributes, RouteAttributes, Shape, TensorDesc};
use graph::{BuildError, Graph, GraphBuilder, Value};

/// Hyperparameters.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    pub layers: usize,
    pub dense: usize,
    pub vocabulary: usize,
    pub width: usize,
    pub heads: usize,
    pub latent: usize,
    pub rope: usize,
    pub nope: usize,
    pub value: usize,
    pub experts: usize,
    pub used: usize,
    pub hidden: usize,
    pub capacity: usize,
    pub weights: DType,
    pub cache: DType,
}

pub const SMALL: Shapes = Shapes {
    layers: 3,
    dense: 1,
    vocabulary: 19,
    width: 16,
    heads: 2,
    latent: 8,
    rope: 4,
    nope: 6,
    value: 5,
    experts: 4,
    used: 2,
    hidden: 12,
    capacity: 32,
    weights: DType::F32,
    cache: DType::F32,
};

/// DeepSeek-V3's.
pub const V3: Shapes = Shapes {
    layers: 61,
    dense: 3,
    vocabulary: 129_280,
    width: 7168,
    heads: 128,
    latent: 512,
    rope: 64,
    nope: 128,
    value: 128,
    experts: 256,
    used: 8,
    hidden: 2048,
    capacity: 8192,
    weights: DType::Q8_0,
    cache: DType::F16,
};

pub fn build(s: &Shapes) -> Result<Graph, BuildError> {
    let mut g = GraphBuilder::new(Precision::Default);
    let ids = |extent| TensorDesc::new(DType::I32, Shape::new(&[extent]));
    let tokens = g.input("tokens", ids(Extent::Rows));
    let wanted = g.input("outputs", ids(Extent::Outputs));
    let table = weight(&mut g, s, "token_embd.weight", &[s.vocabulary, s.width]);
    let mut x = g.embed_rows("embed", table, tokens)?;
    for layer in 0..s.layers {
        g.layer(Some(layer));
        let attention = attention(&mut g, s, layer, x)?;
        x = g.add(&format!("blk.{layer}.attn_add"), x, attention)?;
        let norm = norm(&mut g, &format!("blk.{layer}.ffn_norm"), s.width, x)?;
        let ffn =
            if layer < s.dense { dense(&mut g, s, layer, norm)? } else { experts(&mut g, s, layer, norm)? };
        x = g.add(&format!("blk.{layer}.out"), x, ffn)?;
    }
    g.layer(Some(s.layers));
    let last = g.select_rows("last", x, wanted)?;
    let last = norm(&mut g, "output_norm", s.width, last)?;
    let head = weight(&mut g, s, "output.weight", &[s.vocabulary, s.width]);
    let logits = g.matmul("logits", head, last)?;
    g.output("logits", logits);
    g.finish()
}

fn weight(g: &mut GraphBuilder, s: &Shapes, name: &str, extents: &[usize]) -> Value {
    g.weight(name, TensorDesc::new(s.weights, Shape::fixed(extents)))
}

fn norm(g: &mut GraphBuilder, name: &str, width: usize, x: Value) -> Result<Value, BuildError> {
    let w = g.weight(&format!("{name}.weight"), TensorDesc::new(DType::F32, Shape::fixed(&[width])));
    g.rms_norm(name, x, w, 1e-6)
}

fn attention(g: &mut GraphBuilder, s: &Shapes, layer: usize, x: Value) -> Result<Value, BuildError> {
    let name = |what: &str| format!("blk.{layer}.{what}");
    let row = s.latent + s.rope;
    let frequencies = (0..s.rope / 2).map(|i| 1.0 / 10f64.powi(i as i32)).collect();
    let rope = RopeAttributes { inverse_frequencies: frequencies, magnitude: 1.0 };
    let cache =
        g.state(&format!("cache.{layer}"), TensorDesc::new(s.cache, Shape::fixed(&[s.capacity, row])));
    let x = norm(g, &name("attn_norm"), s.width, x)?;
    let w = weight(g, s, &name("attn_q.weight"), &[s.heads * (s.nope + s.rope), s.width]);
    let q = g.matmul(&name("attn_q"), w, x)?;
    let q = g.reshape(q, &[Extent::Rows, s.heads.into(), (s.nope + s.rope).into()])?;
    let (q_nope, q_rope) = (g.slice(q, 2, 0..s.nope)?, g.slice(q, 2, s.nope..s.nope + s.rope)?);
    let q_rope = g.rope(&name("q_rope"), q_rope, &rope)?;
    let w = weight(g, s, &name("attn_kv_a_mqa.weight"), &[row, s.width]);
    let kv = g.matmul(&name("attn_kv_a"), w, x)?;
    let (latent, k_rope) = (g.slice(kv, 1, 0..s.latent)?, g.slice(kv, 1, s.latent..row)?);
    let latent = norm(g, &name("attn_kv_a_norm"), s.latent, latent)?;
    let k_rope = g.rope(&name("k_rope"), k_rope, &rope)?;
    let row = g.concat(&name("kv_row"), latent, k_rope)?;
    let k_b = weight(g, s, &name("attn_k_b.weight"), &[s.heads, s.latent, s.nope]);
    let v_b = weight(g, s, &name("attn_v_b.weight"), &[s.heads, s.value, s.latent]);
    let mut region = g.region(cache);
    let q_latent = region.head_matmul(&name("q_absorb"), k_b, q_nope)?;
    let q = region.concat(&name("q"), q_latent, q_rope)?;
    let stored = region.kv_store(&name("kv_store"), row)?;
    let context = region.attention(&name("attention"), q, stored, 0.3, s.latent)?;
    let values = region.head_matmul(&name("v_absorb"), v_b, context)?;
    let values = g.reshape(values, &[Extent::Rows, (s.heads * s.value).into()])?;
    let w = weight(g, s, &name("attn_output.weight"), &[s.width, s.heads * s.value]);
    g.matmul(&name("attn_output"), w, values)
}

fn dense(g: &mut GraphBuilder, s: &Shapes, layer: usize, x: Value) -> Result<Value, BuildError> {
    gated(g, s, &format!("blk.{layer}.ffn"), "", x)
}

fn gated(g: &mut GraphBuilder, s: &Shapes, name: &str, suffix: &str, x: Value) -> Result<Value, BuildError> {
    let gate = weight(g, s, &format!("{name}_gate{suffix}.weight"), &[s.hidden, s.width]);
    let up = weight(g, s, &format!("{name}_up{suffix}.weight"), &[s.hidden, s.width]);
    let down = weight(g, s, &format!("{name}_down{suffix}.weight"), &[s.width, s.hidden]);
    let gate = g.matmul(&format!("{name}_gate{suffix}"), gate, x)?;
    let up = g.matmul(&format!("{name}_up{suffix}"), up, x)?;
    let act = g.swi_glu(&format!("{name}_act{suffix}"), gate, up)?;
    g.matmul(&format!("{name}_down{suffix}"), down, act)
}

fn experts(g: &mut GraphBuilder, s: &Shapes, layer: usize, x: Value) -> Result<Value, BuildError> {
    let name = |what: &str| format!("blk.{layer}.{what}");
    let router = g.weight(
        &name("ffn_gate_inp.weight"),
        TensorDesc::new(DType::F32, Shape::fixed(&[s.experts, s.width])),
    );
    let scores = g.matmul(&name("ffn_gate_inp"), router, x)?;
    let attributes = RouteAttributes {
        used: s.used,
        gating: Gating::Sigmoid,
        groups: 1,
        groups_used: 1,
        renormalise: true,
        scale: 1.5,
    };
    let (ids, weights) = g.route(&name("ffn_route"), scores, None, attributes)?;
    let gate = weight(g, s, &name("ffn_gate_exps.weight"), &[s.experts, s.hidden, s.width]);
    let up = weight(g, s, &name("ffn_up_exps.weight"), &[s.experts, s.hidden, s.width]);
    let down = weight(g, s, &name("ffn_down_exps.weight"), &[s.experts, s.width, s.hidden]);
    let gate = g.expert_matmul(&name("ffn_gate_exps"), gate, x, ids)?;
    let up = g.expert_matmul(&name("ffn_up_exps"), up, x, ids)?;
    let act = g.swi_glu(&name("ffn_act_exps"), gate, up)?;
    let down = g.expert_matmul(&name("ffn_down_exps"), down, act, ids)?;
    let routed = g.combine_experts(&name("ffn_moe"), down, weights)?;
    let shared = gated(g, s, &name("ffn"), "_shexp", x)?;
    g.add(&name("ffn_sum"), routed, shared)
}
