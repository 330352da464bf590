//! Hyperparameters, read from GGUF keys or a Hugging Face `config.json`, checked before anything else is.
//!
//! Everything is decided by keys and tensors, never by a model's name. `gguf.rs` and `hugging_face.rs` each read one
//! kind of source; what they give is the same [`Config`].

mod error;
mod gguf;
mod hugging_face;
mod rope;

pub use error::ConfigError;
pub use rope::{Rope, RopeScaling};

use crate::source::{Checkpoint, Keys};
use backend_api::{Gating, RouteAttributes};

/// The most layers that a file may ask for. Published models have up to about a hundred; without a bound, eight
/// bytes of a hostile header would ask for gigabytes.
const MAX_LAYERS: usize = 4096;

/// The largest of any other dimension, for the same reason.
const MAX_DIMENSION: usize = 1 << 24;

/// The most elements that turn with the position: each pair's frequency is computed before any tensor shows that there
/// are so many. All published models have 64.
const MAX_ROPE_DIMENSION: usize = 4096;

/// What a DeepSeek model is made of: the symbols of the papers (DeepSeek-V2, arXiv 2405.04434, and V3,
/// arXiv 2412.19437).
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Tokens the model was trained to see, after any extension of its context.
    pub context_length: usize,
    /// Width of the residual stream, `d`.
    pub embedding_length: usize,
    /// Rows of the embedding and of the output head.
    pub vocabulary: usize,
    /// Added to the mean of squares in every RMS norm.
    pub norm_eps: f32,
    /// Multi-head latent attention; the same in each layer.
    pub attention: AttentionConfig,
    /// The feed-forward part of each layer, in order: as many as the model has layers.
    pub feed_forward: Vec<FeedForward>,
    /// Layers after these that predict further tokens (MTP, V3 section 2.2); they are not run.
    pub next_token_layers: usize,
    /// Whether the embedding is also the output head.
    pub tied_head: bool,
    /// What a user should know about how the source was read.
    pub notices: Vec<String>,
}

/// Multi-head latent attention (V2, section 2.1).
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads, `n_h`.
    pub heads: usize,
    /// Width of the query's latent, `d'_c`; `None` where the query is one matrix (V2-Lite).
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that is cached for keys and values, `d_c`.
    pub kv_lora_rank: usize,
    /// Elements of a head's query and key without position, `d_h`.
    pub nope: usize,
    /// Elements of a head's value.
    pub value: usize,
    /// Position, for the decoupled part of queries and keys; [`Rope::dims`] is `d_h^R`.
    pub rope: Rope,
    /// Factor on the scores: `1 / sqrt(d_h + d_h^R)`, times YaRN's growth of the scores.
    pub scale: f64,
}

impl AttentionConfig {
    /// Elements of a cached row: the latent, then the rotated key that all heads share.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.rope.dims
    }

    /// Elements of a head's query and (expanded) key.
    pub fn key(&self) -> usize {
        self.nope + self.rope.dims
    }
}

/// The second half of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// One SwiGLU network.
    Dense {
        /// Its inner width.
        width: usize,
    },
    /// DeepSeekMoE: shared experts and routed ones (V2, section 2.2).
    Experts(MoeConfig),
}

/// A layer's mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Routed experts, `N_r`.
    pub experts: usize,
    /// Inner width of each routed expert.
    pub width: usize,
    /// Inner width of the shared experts, `N_s` of them side by side; 0 for none.
    pub shared_width: usize,
    /// How a token chooses its experts.
    pub route: RouteAttributes,
}

impl Config {
    /// Reads the hyperparameters of a checkpoint.
    ///
    /// # Errors
    /// The first key that is missing, of a wrong type, out of range or at odds with another, with what was
    /// expected and found; an architecture that is not supported, by name.
    pub fn read(checkpoint: &Checkpoint) -> Result<Config, ConfigError> {
        let has_tensor = &|name: &str| checkpoint.tensor(name).is_some();
        match checkpoint.keys() {
            Keys::Gguf(metadata) => Self::from_gguf(metadata, has_tensor),
            Keys::HuggingFace(json) => Self::from_hugging_face(json, has_tensor),
        }
    }

    /// Number of layers that run.
    pub fn layers(&self) -> usize {
        self.feed_forward.len()
    }
}

/// The facts of a router, before they are known to fit together.
struct RouterFacts {
    experts: usize,
    used: usize,
    groups: usize,
    groups_used: usize,
    gating: Gating,
    renormalise: bool,
    scale: f64,
}

/// The keys of those facts in a source, for errors.
struct RouterKeys {
    experts: &'static str,
    used: &'static str,
    groups: &'static str,
    groups_used: &'static str,
    scale: &'static str,
}

impl RouterFacts {
    fn check(self, keys: &RouterKeys) -> Result<RouteAttributes, ConfigError> {
        let RouterFacts { experts, used, groups, groups_used, gating, renormalise, scale } = self;
        if experts == 0 {
            return Err(ConfigError::key(keys.experts, "at least 1 for the layers that are not dense", 0));
        }
        if !experts.is_multiple_of(groups) {
            return Err(ConfigError::key(keys.groups, format!("a divisor of the {experts} experts"), groups));
        }
        if !(1..=groups).contains(&groups_used) {
            return Err(ConfigError::key(keys.groups_used, format!("1 to {groups}"), groups_used));
        }
        let candidates = experts / groups * groups_used;
        if !(1..=candidates).contains(&used) {
            let expected = format!("1 to {candidates}, the experts that can be chosen from");
            return Err(ConfigError::key(keys.used, expected, used));
        }
        let scale = scale as f32;
        if !scale.is_finite() {
            return Err(ConfigError::key(keys.scale, "a finite number", scale));
        }
        Ok(RouteAttributes { used, gating, groups, groups_used, renormalise, scale })
    }
}

/// `value`, if it can be a dimension.
fn dimension(key: &str, value: usize) -> Result<usize, ConfigError> {
    if (1..=MAX_DIMENSION).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::key(key, format!("1 to {MAX_DIMENSION}"), value))
}

/// `value`, if it can be a number of layers.
fn layer_count(key: &str, value: usize) -> Result<usize, ConfigError> {
    if (1..=MAX_LAYERS).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::key(key, format!("1 to {MAX_LAYERS} layers"), value))
}

/// `value`, if it can be the number of rotated elements: they turn in pairs.
fn rope_dimension(key: &str, value: usize) -> Result<usize, ConfigError> {
    if (2..=MAX_ROPE_DIMENSION).contains(&value) && value.is_multiple_of(2) {
        return Ok(value);
    }
    Err(ConfigError::key(key, format!("an even number from 2 to {MAX_ROPE_DIMENSION}"), value))
}

/// `value`, if it is finite and more than `bound`.
fn above(bound: f64, key: &str, value: f64) -> Result<f64, ConfigError> {
    if value.is_finite() && value > bound {
        return Ok(value);
    }
    Err(ConfigError::key(key, format!("a finite number above {bound}"), value))
}
