//! Hyperparameters from the metadata of a `deepseek2` GGUF file.

use super::{
    AttentionConfig, Config, ConfigError, FeedForward, MoeConfig, Rope, RopeScaling, RouterFacts, RouterKeys,
    above, dimension, layer_count, rope::growth, rope_dimension,
};
use crate::source::gguf::{Metadata, Value};
use backend_api::Gating;

/// The architecture whose keys and tensors this crate reads: V2 to R1, Kimi-K2, Moonlight, GLM-4.7-Flash.
const ARCHITECTURE: &str = "deepseek2";

const ROUTER_KEYS: RouterKeys = RouterKeys {
    experts: "deepseek2.expert_count",
    used: "deepseek2.expert_used_count",
    groups: "deepseek2.expert_group_count",
    groups_used: "deepseek2.expert_group_used_count",
    scale: "deepseek2.expert_weights_scale",
};

/// The value that a missing key stands for.
enum Usual {
    Count(usize),
    Number(f64),
    Flag(bool),
    Text(&'static str),
}
use Usual::{Count, Flag, Number, Text};

/// A file's metadata, and which tensors it has.
struct Keys<'a> {
    metadata: &'a Metadata,
    has_tensor: &'a dyn Fn(&str) -> bool,
}

impl Config {
    /// Reads the keys of a GGUF file. A few absent keys of old files are told by which tensors there are.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn from_gguf(metadata: &Metadata, has_tensor: &dyn Fn(&str) -> bool) -> Result<Config, ConfigError> {
        let key = "general.architecture";
        match metadata.get_str(key)? {
            Some(ARCHITECTURE) => {}
            Some(other) => {
                let expected = "GGUF files of `deepseek2`";
                return Err(ConfigError::Architecture { key, found: other.to_owned(), expected });
            }
            None => return Err(ConfigError::missing(key, format!("`{ARCHITECTURE}`"))),
        }
        let keys = Keys { metadata, has_tensor };
        let temperature_scale = keys.number("attention.temperature_scale")?;
        if temperature_scale != 0.0 {
            let expected = "0: scores that depend on the position (Mistral) are not supported";
            return Err(ConfigError::key(&full("attention.temperature_scale"), expected, temperature_scale));
        }
        let layers = keys.layers()?;
        let norm_eps = keys.number("attention.layer_norm_rms_epsilon")?;
        above(0.0, &full("attention.layer_norm_rms_epsilon"), norm_eps)?;
        Ok(Config {
            context_length: keys.dimension("context_length")?,
            embedding_length: keys.dimension("embedding_length")?,
            vocabulary: keys.dimension("vocab_size")?,
            norm_eps: norm_eps as f32,
            attention: keys.attention()?,
            feed_forward: keys.feed_forward(layers)?,
            next_token_layers: keys.integer("nextn_predict_layers")?,
            tied_head: !has_tensor("output.weight"),
            notices: Vec::new(),
        })
    }
}

impl Keys<'_> {
    /// What a missing key means: **the** table of what files, mostly old ones, leave out of their hyperparameters. A
    /// key without a row here must be there. The values are those that llama.cpp takes, unless a comment says
    /// otherwise.
    fn absent(&self, key: &str) -> Result<Option<Usual>, ConfigError> {
        let count = |key| self.integer(key).map(Count);
        Ok(Some(match key {
            "vocab_size" => match self.metadata.get_array("tokenizer.ggml.tokens")? {
                Some(tokens) => Count(tokens.len()),
                None => return Ok(None),
            },
            "nextn_predict_layers" | "leading_dense_block_count" | "expert_count" => Count(0),

            // As many as query heads.
            "attention.head_count_kv" => Count(self.heads()?),
            // Lite models (V2-Lite, Moonlight) have one query matrix and no rank. llama.cpp knows them by their
            // 26, 27 or 48 layers; the tensor says it better.
            "attention.q_lora_rank" if self.has("attn_q.weight") => Count(0),
            // Until k_b and v_b were split (May 2025), the plain lengths were those of the expanded heads. The
            // split form means the latent by them.
            "attention.key_length_mla" if self.is_legacy() => count("attention.key_length")?,
            "attention.value_length_mla" if self.is_legacy() => count("attention.value_length")?,
            "attention.key_length" | "attention.value_length" => {
                Count(self.dimension("embedding_length")? / self.heads()?)
            }
            "attention.temperature_scale" => Number(0.0),

            "rope.freq_base" => Number(10000.0),
            // Does nothing where the factor is 1.
            "rope.scaling.type" => Text("linear"),
            // The name that early files gave it.
            "rope.scaling.factor" => Number(self.number("rope.scale_linear")?),
            "rope.scale_linear" => Number(1.0),
            "rope.scaling.original_context_length" => count("context_length")?,
            "rope.scaling.attn_factor" => Number(1.0),
            // Files made before April 2024; `rope` says what YaRN then does.
            "rope.scaling.yarn_log_multiplier" => Number(0.0),

            "expert_group_count" => Count(0),
            "expert_weights_scale" => Number(0.0),
            "expert_weights_norm" => Flag(false),
            // V2 and V2.5 knew only softmax. The first conversions of GLM-4.7-Flash, which is told by its shape
            // alone, lacked the key too.
            "expert_gating_func" => {
                let glm = matches!(self.layers()?, 47 | 48) && self.integer("vocab_size")? == 154_880;
                Count(if glm { 2 } else { 1 })
            }
            _ => return Ok(None),
        }))
    }

    fn has(&self, tensor_of_layer_0: &str) -> bool {
        (self.has_tensor)(&format!("blk.0.{tensor_of_layer_0}"))
    }

    /// Whether one matrix, `attn_kv_b`, expands keys and values.
    fn is_legacy(&self) -> bool {
        self.has("attn_kv_b.weight") && !self.has("attn_k_b.weight")
    }

    /// Layers that run. Those that predict further tokens stand behind them and are counted with them.
    fn layers(&self) -> Result<usize, ConfigError> {
        let all = layer_count(&full("block_count"), self.integer("block_count")?)?;
        let next = self.integer("nextn_predict_layers")?;
        match all.checked_sub(next) {
            Some(layers) if layers > 0 => Ok(layers),
            _ => {
                let expected = format!("more than the {next} of nextn_predict_layers");
                Err(ConfigError::key(&full("block_count"), expected, all))
            }
        }
    }

    fn heads(&self) -> Result<usize, ConfigError> {
        dimension(&full("attention.head_count"), self.uniform("attention.head_count")?)
    }

    fn attention(&self) -> Result<AttentionConfig, ConfigError> {
        let heads = self.heads()?;
        let kv_heads = self.uniform("attention.head_count_kv")?;
        if kv_heads != 1 && kv_heads != heads {
            let expected = format!("1, or {heads} as there are query heads");
            return Err(ConfigError::key(&full("attention.head_count_kv"), expected, kv_heads));
        }
        let rope_dims = rope_dimension(&full("rope.dimension_count"), self.integer("rope.dimension_count")?)?;
        let key = self.dimension("attention.key_length_mla")?;
        if key <= rope_dims {
            let expected = format!("more than the {rope_dims} of rope.dimension_count");
            return Err(ConfigError::key(&full("attention.key_length_mla"), expected, key));
        }
        // A rank of 0 means that the query is one matrix.
        let q_lora_rank = match self.integer("attention.q_lora_rank")? {
            0 => None,
            _ if self.has("attn_q.weight") => None,
            _ => Some(self.dimension("attention.q_lora_rank")?),
        };
        let (rope, growth) = self.rope(rope_dims)?;
        Ok(AttentionConfig {
            heads,
            q_lora_rank,
            kv_lora_rank: self.dimension("attention.kv_lora_rank")?,
            nope: key - rope_dims,
            value: self.dimension("attention.value_length_mla")?,
            rope,
            scale: growth * growth / (key as f64).sqrt(),
        })
    }

    /// Position, and by how much queries and keys each grow with it: `M` in `scale = M² / sqrt(key)`.
    ///
    /// `yarn_log_multiplier` is a tenth of the `mscale_all_dim` of Hugging Face's configurations, and `mscale`
    /// is taken to equal it. So the rotation keeps its length and only the scores grow. Of a file without that
    /// multiplier YaRN makes both grow, as the paper has it. A linear factor makes the scores grow too: a trait
    /// of llama.cpp, for which such files are made.
    fn rope(&self, dims: usize) -> Result<(Rope, f64), ConfigError> {
        let base = above(1.0, &full("rope.freq_base"), self.number("rope.freq_base")?)?;
        let kind = self.text("rope.scaling.type")?;
        let factor = match self.number("rope.scaling.factor")? {
            _ if kind == "none" => 1.0,
            0.0 => 1.0,
            factor => above(0.0, &full("rope.scaling.factor"), factor)?,
        };
        let attention_factor = self.number("rope.scaling.attn_factor")?;
        above(0.0, &full("rope.scaling.attn_factor"), attention_factor)?;
        let multiplier = self.number("rope.scaling.yarn_log_multiplier")?;
        let grown = growth(0.1, factor);
        let grown_all = growth(multiplier, factor);
        let (scaling, magnitude, growth) = match kind {
            "none" => (RopeScaling::None, 1.0, 1.0),
            "linear" if factor == 1.0 => (RopeScaling::None, 1.0, 1.0),
            "linear" => (RopeScaling::Linear { factor }, 1.0, grown * grown_all),
            "yarn" => {
                let original_context = self.dimension("rope.scaling.original_context_length")? as f64;
                // Files carry yarn_beta_fast and yarn_beta_slow, but this architecture never read them.
                let scaling = RopeScaling::Yarn { factor, original_context, beta_fast: 32.0, beta_slow: 1.0 };
                let magnitude = if multiplier == 0.0 { grown } else { 1.0 };
                (scaling, magnitude, magnitude * grown_all)
            }
            other => {
                let expected = "`none`, `linear` or `yarn`";
                return Err(ConfigError::key(&full("rope.scaling.type"), expected, format!("`{other}`")));
            }
        };
        let rope = Rope { dims, base, scaling, magnitude: attention_factor * magnitude };
        Ok((rope, above(0.0, &full("rope.scaling.yarn_log_multiplier"), attention_factor * growth)?))
    }

    fn feed_forward(&self, layers: usize) -> Result<Vec<FeedForward>, ConfigError> {
        let dense = self.integer("leading_dense_block_count")?.min(layers);
        let mut all = Vec::with_capacity(layers);
        if dense > 0 {
            for (layer, width) in self.per_layer("feed_forward_length", dense)?.into_iter().enumerate() {
                let key = format!("{}[{layer}]", full("feed_forward_length"));
                all.push(FeedForward::Dense { width: dimension(&key, width)? });
            }
        }
        if dense < layers {
            let used = self.per_layer("expert_used_count", layers)?;
            let width = self.per_layer("expert_feed_forward_length", layers)?;
            for layer in dense..layers {
                all.push(FeedForward::Experts(self.experts(used[layer], width[layer])?));
            }
        }
        Ok(all)
    }

    fn experts(&self, used: usize, width: usize) -> Result<MoeConfig, ConfigError> {
        let experts = self.integer("expert_count")?;
        let groups = self.integer("expert_group_count")?.max(1);
        let gating = match self.metadata.get_u32(&full("expert_gating_func"))? {
            None | Some(0) => self.absent_integer("expert_gating_func")?,
            Some(function) => function as usize,
        };
        let facts = RouterFacts {
            experts: if experts == 0 { 0 } else { self.dimension("expert_count")? },
            used,
            groups,
            groups_used: if groups == 1 { 1 } else { self.integer("expert_group_used_count")? },
            gating: match gating {
                1 => Gating::Softmax,
                2 => Gating::Sigmoid,
                other => {
                    let expected = "1 (softmax) or 2 (sigmoid)";
                    return Err(ConfigError::key(&full("expert_gating_func"), expected, other));
                }
            },
            renormalise: self.flag("expert_weights_norm")?,
            scale: match self.number("expert_weights_scale")? {
                0.0 => 1.0,
                scale => scale,
            },
        };
        let width = dimension(&full("expert_feed_forward_length"), width)?;
        let shared_width = match self.integer("expert_shared_count")? {
            0 => 0,
            shared => dimension(&full("expert_shared_count"), shared.saturating_mul(width))?,
        };
        Ok(MoeConfig { experts: facts.experts, width, shared_width, route: facts.check(&ROUTER_KEYS)? })
    }

    fn integer(&self, key: &str) -> Result<usize, ConfigError> {
        match self.metadata.get_u32(&full(key))? {
            Some(value) => Ok(value as usize),
            None => self.absent_integer(key),
        }
    }

    fn absent_integer(&self, key: &str) -> Result<usize, ConfigError> {
        match self.absent(key)? {
            Some(Count(value)) => Ok(value),
            _ => Err(ConfigError::missing(&full(key), "an integer")),
        }
    }

    fn number(&self, key: &str) -> Result<f64, ConfigError> {
        match self.metadata.get_f32(&full(key))? {
            Some(value) if value.is_finite() => Ok(value.into()),
            Some(value) => Err(ConfigError::key(&full(key), "a finite number", value)),
            None => match self.absent(key)? {
                Some(Number(value)) => Ok(value),
                _ => Err(ConfigError::missing(&full(key), "a number")),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match (self.metadata.get_bool(&full(key))?, self.absent(key)?) {
            (Some(value), _) | (None, Some(Flag(value))) => Ok(value),
            _ => Err(ConfigError::missing(&full(key), "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<&str, ConfigError> {
        match (self.metadata.get_str(&full(key))?, self.absent(key)?) {
            (Some(value), _) | (None, Some(Text(value))) => Ok(value),
            _ => Err(ConfigError::missing(&full(key), "a string")),
        }
    }

    fn dimension(&self, key: &str) -> Result<usize, ConfigError> {
        dimension(&full(key), self.integer(key)?)
    }

    /// One value for each of the first `layers` layers; a plain number counts for all.
    fn per_layer(&self, key: &str, layers: usize) -> Result<Vec<usize>, ConfigError> {
        let name = full(key);
        if !matches!(self.metadata.value(&name), Some(Value::Array(_))) {
            return Ok(vec![self.integer(key)?; layers]);
        }
        let Some(array) = self.metadata.get_array(&name)? else { return Ok(Vec::new()) };
        if array.len() < layers {
            let expected = format!("a number, or one for each of the {layers} layers");
            return Err(ConfigError::key(&name, expected, format!("{} numbers", array.len())));
        }
        let values: Result<Vec<u32>, _> = array.u32s()?.take(layers).collect();
        Ok(values?.into_iter().map(|value| value as usize).collect())
    }

    /// A value that must be the same in all layers.
    fn uniform(&self, key: &str) -> Result<usize, ConfigError> {
        let all = self.per_layer(key, self.layers()?)?;
        match all.iter().find(|value| **value != all[0]) {
            None => Ok(all[0]),
            Some(other) => {
                Err(ConfigError::key(&full(key), "the same in all layers", format!("{} and {other}", all[0])))
            }
        }
    }
}

/// The key as it is in the file.
fn full(key: &str) -> String {
    format!("{ARCHITECTURE}.{key}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{Checkpoint, Keys as Source, gguf_writer::GgufWriter};
    use std::{path::Path, sync::Arc};

    /// The keys that are read past the table's getters elsewhere are easily given a default there.
    #[test]
    fn what_may_be_missing_is_in_the_table() {
        let mut writer = GgufWriter::new();
        writer.key(&full("block_count"), 2u32).unwrap();
        writer.key(&full("attention.head_count"), vec![16u32; 2]).unwrap();
        let file = Checkpoint::from_bytes(Path::new("test.gguf"), Arc::new(writer.header())).unwrap();
        let Source::Gguf(metadata) = file.keys() else { panic!("a GGUF file has GGUF keys") };
        let keys = Keys { metadata, has_tensor: &|_| false };
        assert!(matches!(keys.absent("rope.scaling.type"), Ok(Some(Text("linear")))));
        assert!(matches!(keys.absent("expert_weights_norm"), Ok(Some(Flag(false)))));
        assert!(matches!(keys.absent("attention.head_count_kv"), Ok(Some(Count(16)))));
        assert!(matches!(keys.absent("attention.kv_lora_rank"), Ok(None)));
    }
}
