//! Options that several binaries have.

use backend_api::Precision;
use clap::{Args, ValueEnum};
use model_deepseek::{CacheType, Options, sampling::Sampling};
use std::time::{SystemTime, UNIX_EPOCH};

/// Format of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheChoice {
    /// Two bytes a value
    F16,
    /// Four bytes a value: nothing is rounded
    F32,
    /// 34 bytes for 32 values
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<CacheChoice> for CacheType {
    fn from(choice: CacheChoice) -> Self {
        match choice {
            CacheChoice::F16 => CacheType::F16,
            CacheChoice::F32 => CacheType::F32,
            CacheChoice::Q8_0 => CacheType::Q8_0,
        }
    }
}

/// Treatment of activations beside quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// Rounded to 8 bits beside the weights of experts and of the head, to 16 bits beside all others
    #[default]
    Q8,
    /// Rounded to 16 bits beside all weights
    Q16,
    /// Weights are decoded on the fly and nothing is rounded below f32: exact, and slow
    F32,
}

impl From<Activations> for Precision {
    fn from(activations: Activations) -> Self {
        match activations {
            Activations::Q8 => Precision::Default,
            Activations::Q16 => Precision::Fine,
            Activations::F32 => Precision::F32,
        }
    }
}

/// How to run the model.
#[derive(Args, Clone, Debug)]
pub struct RunOptions {
    /// Format of the KV cache [default: f16; with --activations f32: f32]
    #[arg(long, value_name = "TYPE")]
    pub cache_type: Option<CacheChoice>,
    /// Activations beside quantised weights
    #[arg(long, value_name = "TYPE", default_value = "q8")]
    pub activations: Activations,
    /// Tokens in one step of a prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub batch: usize,
}

impl RunOptions {
    /// For a context of so many tokens; `None`: what suits the model.
    pub fn resolve(&self, context: Option<usize>) -> Options {
        let suitable = match self.activations {
            Activations::Q8 | Activations::Q16 => CacheChoice::F16,
            Activations::F32 => CacheChoice::F32,
        };
        Options {
            context,
            batch: self.batch,
            cache: self.cache_type.unwrap_or(suitable).into(),
            precision: self.activations.into(),
            ..Options::default()
        }
    }
}

/// How tokens are drawn.
#[derive(Args, Clone, Debug)]
pub struct SamplingOptions {
    /// Divides the logits before the draw; 0 takes the best token always
    #[arg(long, value_name = "T", default_value_t = 0.7, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Draw from the K best tokens; 0: from all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Draw from the fewest tokens whose probabilities sum to P
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Draw from tokens at least P times as likely as the best
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Makes recent tokens less likely; 1: does not
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repeat_penalty: f32,
    /// The same seed gives the same text [default: taken from the clock, and told]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
}

impl SamplingOptions {
    /// With a seed in any case.
    pub fn resolve(&self) -> Sampling {
        let clock =
            || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos().into());
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed.unwrap_or_else(clock),
            ..Sampling::default()
        }
    }
}
