//! Tensor names of Hugging Face checkpoints and their GGUF names.
//!
//! The names are those of `modeling_deepseek.py` as published with DeepSeek-V2 and V3; layers past
//! `num_hidden_layers` are multi-token prediction and get `nextn` names.

/// Outside the layers.
const TOP: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// In a layer: after `model.layers.N.` and `blk.N.`.
const LAYER: [(&str, &str); 24] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.q_a_proj.weight", "attn_q_a.weight"),
    ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
    ("self_attn.q_b_proj.weight", "attn_q_b.weight"),
    ("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
    ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
    // The legacy form: key and value halves of each head in one matrix.
    ("self_attn.kv_b_proj.weight", "attn_kv_b.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("mlp.gate.weight", "ffn_gate_inp.weight"),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"),
    ("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
    ("mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight"),
    ("eh_proj.weight", "nextn.eh_proj.weight"),
    ("enorm.weight", "nextn.enorm.weight"),
    ("hnorm.weight", "nextn.hnorm.weight"),
    ("embed_tokens.weight", "nextn.embed_tokens.weight"),
    ("shared_head.head.weight", "nextn.shared_head_head.weight"),
    ("shared_head.norm.weight", "nextn.shared_head_norm.weight"),
];

/// Of an expert: after `model.layers.N.mlp.experts.E.` and `blk.N.`.
const EXPERT: [(&str, &str); 3] = [
    ("gate_proj.weight", "ffn_gate_exps.weight"),
    ("up_proj.weight", "ffn_up_exps.weight"),
    ("down_proj.weight", "ffn_down_exps.weight"),
];

/// Where a tensor belongs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The GGUF name.
    pub(super) name: String,
    /// Which expert of that tensor it is.
    pub(super) expert: Option<usize>,
}

/// The place of a Hugging Face tensor; `None` for one that has no GGUF name, such as `rotary_emb.inv_freq`.
pub(super) fn target(hf_name: &str) -> Option<Target> {
    let look_up = |table: &[(&str, &str)], name: &str| {
        table.iter().find(|(hf, _)| *hf == name).map(|(_, gguf)| (*gguf).to_owned())
    };
    if let Some(name) = look_up(&TOP, hf_name) {
        return Some(Target { name, expert: None });
    }
    let (layer, rest) = number(hf_name.strip_prefix("model.layers.")?)?;
    let (name, expert) = match rest.strip_prefix("mlp.experts.") {
        None => (look_up(&LAYER, rest)?, None),
        Some(rest) => {
            let (expert, rest) = number(rest)?;
            (look_up(&EXPERT, rest)?, Some(expert))
        }
    };
    Some(Target { name: format!("blk.{layer}.{name}"), expert })
}

/// The name, in a Hugging Face directory, of what has this GGUF name; for stacked experts that of the first.
pub(super) fn origin(gguf_name: &str) -> Option<String> {
    let look_up = |table: &[(&'static str, &str)], name: &str| {
        table.iter().find(|(_, gguf)| *gguf == name).map(|(hf, _)| *hf)
    };
    if let Some(name) = look_up(&TOP, gguf_name) {
        return Some(name.to_owned());
    }
    let (layer, part) = number(gguf_name.strip_prefix("blk.")?)?;
    let part = match part {
        // GGUF files have the halves apart.
        "attn_k_b.weight" | "attn_v_b.weight" => "attn_kv_b.weight",
        part => part,
    };
    match look_up(&LAYER, part) {
        Some(name) => Some(format!("model.layers.{layer}.{name}")),
        None => look_up(&EXPERT, part).map(|name| format!("model.layers.{layer}.mlp.experts.0.{name}")),
    }
}

/// Norms, biases and router weights are computed with in f32.
pub(super) fn is_f32(gguf_name: &str) -> bool {
    ["norm.weight", ".bias", "ffn_gate_inp.weight"].iter().any(|end| gguf_name.ends_with(end))
}

/// `12.rest` as (12, `rest`); only the way numbers are usually written, so that no two names mean the same.
fn number(text: &str) -> Option<(usize, &str)> {
    let (digits, rest) = text.split_once('.')?;
    let number: usize = digits.parse().ok()?;
    (number.to_string() == digits).then_some((number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map() {
        for (hf, gguf, expert) in [
            ("lm_head.weight", "output.weight", None),
            ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", None),
            ("model.layers.12.mlp.gate.weight", "blk.12.ffn_gate_inp.weight", None),
            ("model.layers.3.mlp.experts.255.down_proj.weight", "blk.3.ffn_down_exps.weight", Some(255)),
            ("model.layers.61.shared_head.norm.weight", "blk.61.nextn.shared_head_norm.weight", None),
        ] {
            assert_eq!(target(hf), Some(Target { name: gguf.into(), expert }), "{hf}");
            let first = hf.replace("experts.255.", "experts.0.");
            assert_eq!(origin(gguf), Some(first), "{gguf}");
        }
        assert_eq!(origin("blk.2.attn_v_b.weight").unwrap(), "model.layers.2.self_attn.kv_b_proj.weight");
        for unknown in ["", "rope_freqs.weight", "blk.x.attn_norm.weight", "blk.1.attn_norm"] {
            assert_eq!(origin(unknown), None, "{unknown}");
        }
        for unknown in [
            "",
            "model.layers.0",
            "model.layers.00.input_layernorm.weight",
            "model.layers.+1.input_layernorm.weight",
            "model.layers.99999999999999999999.input_layernorm.weight",
            "model.layers.1.mlp.experts.01.up_proj.weight",
            "model.layers.1.mlp.experts.1.up_proj.bias",
            "model.layers.1.self_attn.rotary_emb.inv_freq",
        ] {
            assert_eq!(target(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn no_name_is_in_a_table_twice() {
        for table in [&TOP[..], &LAYER, &EXPERT] {
            for (i, (hf, gguf)) in table.iter().enumerate() {
                assert!(table[..i].iter().all(|(h, g)| h != hf && g != gguf), "{hf} {gguf}");
            }
        }
    }
}
