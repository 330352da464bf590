//! The shapes: hyperparameters of published models, and the tensors that follow from them.

use clap::{ValueEnum, builder::PossibleValue};

/// Position encoding beyond the trained context (YaRN, arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context becomes.
    pub factor: f32,
    /// Context of the pre-training.
    pub original_context: u32,
    /// `mscale_all_dim` of the published `config.json`.
    pub mscale_all_dim: f32,
}

/// Experts and their router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// Routed experts.
    pub count: usize,
    /// Chosen for each token.
    pub used: usize,
    /// Shared experts, each as wide as a routed one.
    pub shared: usize,
    /// Inner width of one.
    pub width: usize,
    /// Groups, and how many of them a token may choose from.
    pub groups: (u32, u32),
    /// Sigmoid gating with a selection bias (V3), else softmax (V2).
    pub sigmoid: bool,
    /// Whether the weights of the chosen sum to 1 before they are scaled.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// Hyperparameters of a `deepseek2` model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelShape {
    /// What `--shape` calls it.
    pub name: &'static str,
    /// Layers.
    pub layers: usize,
    /// Of which this many at the start are dense.
    pub dense_layers: usize,
    /// Width of the residual stream.
    pub embedding: usize,
    /// Query heads.
    pub heads: usize,
    /// Rank of the query's latent; 0 for a single query matrix.
    pub q_lora: usize,
    /// Rank of the cached latent.
    pub kv_lora: usize,
    /// Elements of a head's key without position.
    pub nope: usize,
    /// Elements of a head's key with position.
    pub rope: usize,
    /// Elements of a head's value.
    pub value: usize,
    /// Inner width of the dense layers.
    pub dense_width: usize,
    /// Experts of the other layers.
    pub experts: Experts,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// The pre-tokenizer's name in GGUF files.
    pub pre: &'static str,
    /// Context length.
    pub context: u32,
    /// RMS norm epsilon.
    pub eps: f32,
    /// Base of the rotary frequencies.
    pub theta: f32,
    /// Context extension.
    pub yarn: Option<Yarn>,
}

/// Every shape: the `config.json` that each model was published with.
pub static SHAPES: [ModelShape; 7] = [TINY, V2_LITE, V2, V3, KIMI_K2, MOONLIGHT, GLM_4_7_FLASH];

/// No published model: every kind of tensor, and loaded in an instant.
const TINY: ModelShape = ModelShape {
    name: "tiny",
    layers: 4,
    dense_layers: 1,
    embedding: 256,
    heads: 4,
    q_lora: 128,
    kv_lora: 64,
    nope: 32,
    rope: 32,
    value: 64,
    dense_width: 512,
    experts: Experts { count: 16, used: 4, width: 128, groups: (4, 2), shared: 1, ..V3.experts },
    vocabulary: 1024,
    context: 4096,
    yarn: Some(Yarn { factor: 4.0, original_context: 1024, mscale_all_dim: 1.0 }),
    ..V3
};

/// DeepSeek-V2-Lite.
const V2_LITE: ModelShape = ModelShape {
    name: "v2-lite",
    layers: 27,
    dense_layers: 1,
    embedding: 2048,
    heads: 16,
    q_lora: 0,
    kv_lora: 512,
    nope: 128,
    rope: 64,
    value: 128,
    dense_width: 10944,
    experts: Experts {
        count: 64,
        used: 6,
        shared: 2,
        width: 1408,
        groups: (1, 1),
        sigmoid: false,
        renormalise: false,
        scale: 1.0,
    },
    vocabulary: 102_400,
    pre: "deepseek-llm",
    context: 163_840,
    eps: 1e-6,
    theta: 10_000.0,
    yarn: Some(Yarn { factor: 40.0, original_context: 4096, mscale_all_dim: 0.707 }),
};

/// DeepSeek-V2 and V2.5.
const V2: ModelShape = ModelShape {
    name: "v2",
    layers: 60,
    embedding: 5120,
    heads: 128,
    q_lora: 1536,
    dense_width: 12_288,
    experts: Experts { count: 160, width: 1536, groups: (8, 3), scale: 16.0, ..V2_LITE.experts },
    ..V2_LITE
};

/// DeepSeek-V3, V3.1 and R1.
const V3: ModelShape = ModelShape {
    name: "v3",
    layers: 61,
    dense_layers: 3,
    embedding: 7168,
    heads: 128,
    q_lora: 1536,
    kv_lora: 512,
    nope: 128,
    rope: 64,
    value: 128,
    dense_width: 18_432,
    experts: Experts {
        count: 256,
        used: 8,
        shared: 1,
        width: 2048,
        groups: (8, 4),
        sigmoid: true,
        renormalise: true,
        scale: 2.5,
    },
    vocabulary: 129_280,
    pre: "deepseek-v3",
    context: 163_840,
    eps: 1e-6,
    theta: 10_000.0,
    yarn: Some(Yarn { factor: 40.0, original_context: 4096, mscale_all_dim: 1.0 }),
};

/// Kimi-K2.
const KIMI_K2: ModelShape = ModelShape {
    name: "kimi-k2",
    dense_layers: 1,
    heads: 64,
    experts: Experts { count: 384, groups: (1, 1), scale: 2.827, ..V3.experts },
    vocabulary: 163_840,
    pre: "kimi-k2",
    context: 131_072,
    theta: 50_000.0,
    yarn: Some(Yarn { factor: 32.0, original_context: 4096, mscale_all_dim: 1.0 }),
    ..V3
};

/// Moonlight-16B-A3B.
const MOONLIGHT: ModelShape = ModelShape {
    name: "moonlight",
    dense_width: 11_264,
    experts: Experts { sigmoid: true, renormalise: true, scale: 2.446, ..V2_LITE.experts },
    vocabulary: 163_840,
    pre: "kimi-k2",
    context: 8192,
    eps: 1e-5,
    theta: 50_000.0,
    yarn: None,
    ..V2_LITE
};

/// GLM-4.7-Flash, without its layer for predicting further tokens.
const GLM_4_7_FLASH: ModelShape = ModelShape {
    name: "glm-4.7-flash",
    layers: 47,
    dense_layers: 1,
    embedding: 2048,
    heads: 20,
    q_lora: 768,
    nope: 192,
    value: 256,
    dense_width: 10_240,
    experts: Experts { count: 64, used: 4, width: 1536, groups: (1, 1), scale: 1.8, ..V3.experts },
    vocabulary: 154_880,
    pre: "glm4",
    context: 202_752,
    eps: 1e-5,
    theta: 1_000_000.0,
    yarn: None,
    ..V3
};

/// What the numbers of a tensor are for, which decides how they are stored and drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix, or one for each head or expert.
    Matrix,
    /// The token embedding.
    Embedding,
    /// The router's matrix: always F32.
    Router,
    /// The router's selection bias: always F32.
    Bias,
    /// A norm's weights: always F32.
    Norm,
}

/// A tensor that a model of some shape has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// GGUF name.
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// Its layer; `None` for embedding, last norm and head.
    pub layer: Option<usize>,
}

impl Tensor {
    /// Values in a row.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows, over all outer axes.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }
}

impl ValueEnum for ModelShape {
    fn value_variants<'a>() -> &'a [Self] {
        &SHAPES
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name))
    }
}

impl ModelShape {
    /// The tensors, in the order of the file. The names and shapes are those of `deepseek2` files with split
    /// `attn_k_b` and `attn_v_b`.
    pub fn tensors(&self) -> Vec<Tensor> {
        let d = self.embedding;
        let mut all = vec![Tensor {
            name: "token_embd.weight".to_owned(),
            shape: vec![self.vocabulary, d],
            role: Role::Embedding,
            layer: None,
        }];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize], role: Role| {
                let name = format!("blk.{layer}.{name}");
                all.push(Tensor { name, shape: shape.to_vec(), role, layer: Some(layer) });
            };
            self.attention(&mut add);
            if layer < self.dense_layers {
                add("ffn_norm.weight", &[d], Role::Norm);
                add("ffn_gate.weight", &[self.dense_width, d], Role::Matrix);
                add("ffn_up.weight", &[self.dense_width, d], Role::Matrix);
                add("ffn_down.weight", &[d, self.dense_width], Role::Matrix);
            } else {
                self.mixture(&mut add);
            }
        }
        let mut add = |name: &str, shape: &[usize], role: Role| {
            all.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), role, layer: None });
        };
        add("output_norm.weight", &[d], Role::Norm);
        add("output.weight", &[self.vocabulary, d], Role::Matrix);
        all
    }

    fn attention(&self, add: &mut impl FnMut(&str, &[usize], Role)) {
        let (d, heads, latent) = (self.embedding, self.heads, self.kv_lora);
        let queries = heads * (self.nope + self.rope);
        add("attn_norm.weight", &[d], Role::Norm);
        if self.q_lora == 0 {
            add("attn_q.weight", &[queries, d], Role::Matrix);
        } else {
            add("attn_q_a.weight", &[self.q_lora, d], Role::Matrix);
            add("attn_q_a_norm.weight", &[self.q_lora], Role::Norm);
            add("attn_q_b.weight", &[queries, self.q_lora], Role::Matrix);
        }
        add("attn_kv_a_mqa.weight", &[latent + self.rope, d], Role::Matrix);
        add("attn_kv_a_norm.weight", &[latent], Role::Norm);
        add("attn_k_b.weight", &[heads, latent, self.nope], Role::Matrix);
        add("attn_v_b.weight", &[heads, self.value, latent], Role::Matrix);
        add("attn_output.weight", &[d, heads * self.value], Role::Matrix);
    }

    fn mixture(&self, add: &mut impl FnMut(&str, &[usize], Role)) {
        let (d, Experts { count, width, shared, sigmoid, .. }) = (self.embedding, self.experts);
        add("ffn_norm.weight", &[d], Role::Norm);
        add("ffn_gate_inp.weight", &[count, d], Role::Router);
        if sigmoid {
            add("exp_probs_b.bias", &[count], Role::Bias);
        }
        add("ffn_gate_exps.weight", &[count, width, d], Role::Matrix);
        add("ffn_up_exps.weight", &[count, width, d], Role::Matrix);
        add("ffn_down_exps.weight", &[count, d, width], Role::Matrix);
        let shared = shared * width;
        add("ffn_gate_shexp.weight", &[shared, d], Role::Matrix);
        add("ffn_up_shexp.weight", &[shared, d], Role::Matrix);
        add("ffn_down_shexp.weight", &[d, shared], Role::Matrix);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights as the model's authors count them, in billions.
    #[test]
    fn shapes_have_the_published_number_of_weights() {
        let published = [
            ("v2-lite", 15.7),
            ("v2", 236.0),
            ("v3", 671.0),
            ("kimi-k2", 1026.0),
            ("moonlight", 16.0),
            ("glm-4.7-flash", 30.0),
        ];
        for (name, billions) in published {
            let shape = ModelShape::from_str(name, false).unwrap();
            let weights: usize = shape.tensors().iter().map(|t| t.shape.iter().product::<usize>()).sum();
            let found = weights as f64 / 1e9;
            assert!((found / billions - 1.0).abs() < 0.015, "{name}: expected {billions}, found {found}");
        }
    }
}
