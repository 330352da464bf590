//! Hyperparameters from a Hugging Face `config.json`.

use super::{
    AttentionConfig, Config, ConfigError, FeedForward, MoeConfig, Rope, RopeScaling, RouterFacts, RouterKeys,
    above, dimension, layer_count, rope::growth, rope_dimension,
};
use backend_api::{Gating, RouteAttributes};
use serde_json::Value;

const ROUTER_KEYS: RouterKeys = RouterKeys {
    experts: "n_routed_experts",
    used: "num_experts_per_tok",
    groups: "n_group",
    groups_used: "topk_group",
    scale: "routed_scaling_factor",
};

/// What the model types differ in where `config.json` is silent: `(model_type, gating, selection)`.
const MODEL_TYPES: [(&str, Gating, &str); 4] = [
    ("deepseek_v2", Gating::Softmax, "greedy"),
    ("deepseek_v3", Gating::Sigmoid, "noaux_tc"),
    ("kimi_k2", Gating::Sigmoid, "noaux_tc"),
    ("glm4_moe_lite", Gating::Sigmoid, "noaux_tc"),
];

/// Settings that change the computation in ways that are not supported: `(key, the one value that is)`. Absent
/// and null keys are fine.
const FIXED: [(&str, Fixed); 7] = [
    ("attention_bias", Fixed::Bool(false)),
    ("hidden_act", Fixed::Text("silu")),
    ("moe_layer_freq", Fixed::Number(1.0)),
    ("partial_rotary_factor", Fixed::Number(1.0)),
    ("rope_interleave", Fixed::Bool(true)),
    // The lightning indexer of V3.2, which chooses what attention sees.
    ("index_topk", Fixed::Absent),
    ("index_n_heads", Fixed::Absent),
];

enum Fixed {
    Bool(bool),
    Number(f64),
    Text(&'static str),
    Absent,
}

/// A JSON object, and what leads to it.
#[derive(Clone, Copy)]
struct Keys<'a> {
    object: &'a Value,
    prefix: &'static str,
}

impl Config {
    /// Reads a `config.json`. Where it does not say whether the embedding is the output head too, it is if there is no
    /// other, told by the tensors' GGUF names.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn from_hugging_face(
        config: &Value,
        has_tensor: &dyn Fn(&str) -> bool,
    ) -> Result<Config, ConfigError> {
        let keys = Keys { object: config, prefix: "" };
        let Some(found) = keys.text("model_type")? else {
            return Err(ConfigError::missing("model_type", "a string"));
        };
        let Some((_, gating, selection)) = MODEL_TYPES.iter().find(|(name, ..)| *name == found) else {
            let expected = "deepseek_v2, deepseek_v3, kimi_k2 and glm4_moe_lite";
            return Err(ConfigError::Architecture { key: "model_type", found: found.to_owned(), expected });
        };
        for (key, value) in &FIXED {
            keys.check_fixed(key, value)?;
        }
        let mut notices = Vec::new();
        let norm_eps = above(0.0, "rms_norm_eps", keys.required_number("rms_norm_eps")?)?;
        Ok(Config {
            context_length: keys.dimension("max_position_embeddings")?,
            embedding_length: keys.dimension("hidden_size")?,
            vocabulary: keys.dimension("vocab_size")?,
            norm_eps: norm_eps as f32,
            attention: keys.attention()?,
            feed_forward: keys.feed_forward(*gating, selection, &mut notices)?,
            next_token_layers: keys.integer("num_nextn_predict_layers")?.unwrap_or(0),
            tied_head: keys.flag("tie_word_embeddings")?.unwrap_or_else(|| !has_tensor("output.weight")),
            notices,
        })
    }
}

impl<'a> Keys<'a> {
    fn attention(&self) -> Result<AttentionConfig, ConfigError> {
        let heads = self.dimension("num_attention_heads")?;
        if let Some(kv_heads) = self.integer("num_key_value_heads")?.filter(|n| *n != heads) {
            let expected = format!("{heads}, as there are query heads");
            return Err(ConfigError::key("num_key_value_heads", expected, kv_heads));
        }
        let nope = self.dimension("qk_nope_head_dim")?;
        let rope_dims = rope_dimension("qk_rope_head_dim", self.required_integer("qk_rope_head_dim")?)?;
        let key = nope + rope_dims;
        if let Some(found) = self.integer("qk_head_dim")?.filter(|n| *n != key) {
            let expected = format!("{key}, the sum of qk_nope_head_dim and qk_rope_head_dim");
            return Err(ConfigError::key("qk_head_dim", expected, found));
        }
        let q_lora_rank = match self.integer("q_lora_rank")? {
            None | Some(0) => None,
            Some(rank) => Some(dimension("q_lora_rank", rank)?),
        };
        let (rope, growth) = self.rope(rope_dims)?;
        Ok(AttentionConfig {
            heads,
            q_lora_rank,
            kv_lora_rank: self.dimension("kv_lora_rank")?,
            nope,
            value: self.dimension("v_head_dim")?,
            rope,
            scale: growth * growth / (key as f64).sqrt(),
        })
    }

    /// Position, and by how much queries and keys each grow with it. The keys are `rope_theta` and
    /// `rope_scaling`, or, in files of transformers 5, `rope_parameters` with all of them.
    ///
    /// YaRN here has two multipliers. The scores grow by `mscale_all_dim`; cosine and sine by the ratio of
    /// `mscale`'s growth and `mscale_all_dim`'s, which is 1 in all published models.
    fn rope(&self, dims: usize) -> Result<(Rope, f64), ConfigError> {
        let scaling = match (self.object("rope_scaling", "rope_scaling.")?, self.new_rope()?) {
            (Some(scaling), _) | (None, Some(scaling)) => scaling,
            (None, None) => Keys { object: &Value::Null, prefix: "rope_scaling." },
        };
        scaling.check_fixed("partial_rotary_factor", &Fixed::Number(1.0))?;
        let base = match (self.number("rope_theta")?, self.new_rope()?) {
            (Some(base), _) => above(1.0, "rope_theta", base)?,
            (None, Some(rope)) => {
                above(1.0, "rope_parameters.rope_theta", rope.required_number("rope_theta")?)?
            }
            (None, None) => return Err(ConfigError::missing("rope_theta", "a number")),
        };
        let kind = scaling.text("rope_type")?.or(scaling.text("type")?).unwrap_or("default");
        let plain = |scaling, growth| Ok((Rope { dims, base, scaling, magnitude: 1.0 }, growth));
        if kind == "default" {
            return plain(RopeScaling::None, 1.0);
        }
        let factor = above(0.0, &scaling.full("factor"), scaling.required_number("factor")?)?;
        let grown = |mscale: f64| if factor <= 1.0 { 1.0 } else { growth(0.1 * mscale, factor) };
        let mscale_all_dim = scaling.number("mscale_all_dim")?.unwrap_or(0.0);
        match kind {
            "linear" => plain(RopeScaling::Linear { factor }, grown(mscale_all_dim)),
            "yarn" => {
                let original = "original_max_position_embeddings";
                let original_context = scaling.required_number(original)?;
                let beta = |key, usual| above(0.0, &scaling.full(key), scaling.number(key)?.unwrap_or(usual));
                let rope = Rope {
                    dims,
                    base,
                    scaling: RopeScaling::Yarn {
                        factor,
                        original_context: above(0.0, &scaling.full(original), original_context)?,
                        beta_fast: beta("beta_fast", 32.0)?,
                        beta_slow: beta("beta_slow", 1.0)?,
                    },
                    magnitude: grown(scaling.number("mscale")?.unwrap_or(1.0)) / grown(mscale_all_dim),
                };
                Ok((rope, grown(mscale_all_dim)))
            }
            other => {
                let expected = "`default`, `linear` or `yarn`";
                Err(ConfigError::key(&scaling.full("type"), expected, format!("`{other}`")))
            }
        }
    }

    fn new_rope(&self) -> Result<Option<Keys<'a>>, ConfigError> {
        self.object("rope_parameters", "rope_parameters.")
    }

    fn feed_forward(
        &self,
        gating: Gating,
        selection: &str,
        notices: &mut Vec<String>,
    ) -> Result<Vec<FeedForward>, ConfigError> {
        let layers = layer_count("num_hidden_layers", self.dimension("num_hidden_layers")?)?;
        let is_dense = self.dense_layers(layers)?;
        let dense = match is_dense.contains(&true) {
            true => Some(FeedForward::Dense { width: self.dimension("intermediate_size")? }),
            false => None,
        };
        let experts = match is_dense.contains(&false) {
            true => Some(FeedForward::Experts(self.experts(gating, selection, notices)?)),
            false => None,
        };
        let kind_of = |is_dense: &bool| if *is_dense { dense.clone() } else { experts.clone() };
        Ok(is_dense.iter().filter_map(kind_of).collect())
    }

    /// Which layers are dense: the first few, or as a list says.
    fn dense_layers(&self, layers: usize) -> Result<Vec<bool>, ConfigError> {
        let key = "mlp_layer_types";
        if let Some(list) = self.get(key) {
            let expected = format!("`dense` or `sparse` for each of the {layers} layers");
            let wrong = || ConfigError::key(key, &expected, shown(list));
            let list = list.as_array().filter(|list| list.len() == layers).ok_or_else(wrong)?;
            let is_dense = |kind: &Value| match kind.as_str() {
                Some("dense") => Ok(true),
                Some("sparse") => Ok(false),
                _ => Err(ConfigError::key(key, &expected, shown(kind))),
            };
            return list.iter().map(is_dense).collect();
        }
        let dense = match self.integer("n_routed_experts")? {
            None => layers,
            Some(_) => self.required_integer("first_k_dense_replace")?.min(layers),
        };
        Ok((0..layers).map(|layer| layer < dense).collect())
    }

    fn experts(
        &self,
        gating: Gating,
        selection: &str,
        notices: &mut Vec<String>,
    ) -> Result<MoeConfig, ConfigError> {
        let width = self.dimension("moe_intermediate_size")?;
        let shared_width = match self.integer("n_shared_experts")?.unwrap_or(0) {
            0 => 0,
            shared => dimension("n_shared_experts", shared.saturating_mul(width))?,
        };
        let experts = self.dimension("n_routed_experts")?;
        Ok(MoeConfig {
            experts,
            width,
            shared_width,
            route: self.route(experts, gating, selection, notices)?,
        })
    }

    fn route(
        &self,
        experts: usize,
        gating: Gating,
        selection: &str,
        notices: &mut Vec<String>,
    ) -> Result<RouteAttributes, ConfigError> {
        let gating = match self.text("scoring_func")? {
            None => gating,
            Some("softmax") => Gating::Softmax,
            Some("sigmoid") => Gating::Sigmoid,
            Some(other) => {
                let expected = "`softmax` or `sigmoid`";
                return Err(ConfigError::key("scoring_func", expected, format!("`{other}`")));
            }
        };
        let by_group = match self.text("topk_method")?.unwrap_or(selection) {
            "greedy" => false,
            "noaux_tc" => true,
            "group_limited_greedy" => {
                notices.push(
                    "topk_method group_limited_greedy: groups of experts are scored by their two best experts \
                     (as GGUF engines do), not by the best alone"
                        .to_owned(),
                );
                true
            }
            other => {
                let expected = "`greedy`, `group_limited_greedy` or `noaux_tc`";
                return Err(ConfigError::key("topk_method", expected, format!("`{other}`")));
            }
        };
        let groups = self.integer("n_group")?.filter(|_| by_group).unwrap_or(1).max(1);
        let facts = RouterFacts {
            experts,
            used: self.dimension("num_experts_per_tok")?,
            groups,
            groups_used: if groups == 1 { 1 } else { self.required_integer("topk_group")? },
            gating,
            renormalise: self.flag("norm_topk_prob")?.unwrap_or(false),
            scale: self.number("routed_scaling_factor")?.unwrap_or(1.0),
        };
        facts.check(&ROUTER_KEYS)
    }

    /// The value, if it is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || ConfigError::key(&self.full(key), expected, shown(value));
        convert(value).map(Some).ok_or_else(wrong)
    }

    fn integer(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(key, "an integer that is not negative", |v| v.as_u64()?.try_into().ok())
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Keys<'a>>, ConfigError> {
        self.typed(key, "an object", |value| value.is_object().then_some(Keys { object: value, prefix }))
    }

    fn required_integer(&self, key: &str) -> Result<usize, ConfigError> {
        self.integer(key)?.ok_or_else(|| ConfigError::missing(&self.full(key), "an integer"))
    }

    fn required_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?.ok_or_else(|| ConfigError::missing(&self.full(key), "a number"))
    }

    fn dimension(&self, key: &str) -> Result<usize, ConfigError> {
        dimension(&self.full(key), self.required_integer(key)?)
    }

    fn check_fixed(&self, key: &str, fixed: &Fixed) -> Result<(), ConfigError> {
        let Some(found) = self.get(key) else { return Ok(()) };
        let (fits, expected) = match fixed {
            Fixed::Bool(value) => (found.as_bool() == Some(*value), value.to_string()),
            Fixed::Number(value) => (found.as_f64() == Some(*value), value.to_string()),
            Fixed::Text(value) => (found.as_str() == Some(*value), format!("`{value}`")),
            Fixed::Absent => {
                (false, "nothing (it belongs to an architecture that is not supported)".to_owned())
            }
        };
        if fits { Ok(()) } else { Err(ConfigError::key(&self.full(key), expected, shown(found))) }
    }
}

/// A value as a message can show it.
fn shown(value: &Value) -> String {
    let mut text: String = value.to_string().chars().take(100).collect();
    if text.len() < value.to_string().len() {
        text.push('…');
    }
    text
}
