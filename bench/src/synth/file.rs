//! A shape as a GGUF file.

use super::{
    blocks::{Random, Weights},
    shapes::{ModelShape, Role},
    types::{Context, FileFormat, tensor_type},
};
use model_deepseek::{
    source::gguf_writer::{GgufWriter, NewTensor},
    tokenizer::letter,
};
use std::{
    collections::HashMap,
    io::{self, Write},
    path::Path,
};

/// Bytes drawn and written at a time, about.
const CHUNK: usize = 1 << 20;

/// Token types of GGUF files.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

/// A model file to be: its header, and what its tensors are for.
pub struct SynthFile {
    writer: GgufWriter,
    roles: HashMap<String, Role>,
    seed: u64,
}

impl SynthFile {
    /// The header of a model of `shape`, or of its first `layers` layers.
    ///
    /// # Errors
    /// None that a shape of [`SHAPES`](super::shapes::SHAPES) could cause.
    pub fn new(shape: &ModelShape, layers: Option<usize>, format: FileFormat, seed: u64) -> io::Result<Self> {
        let published = *shape;
        let mut shape = *shape;
        shape.layers = layers.unwrap_or(shape.layers);
        if matches!(shape.layers, 26 | 27) && shape.q_lora > 0 {
            let what = "26 and 27 layers mean DeepSeek-V2-Lite to llama.cpp, which has no query latent";
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("--layers: {what}: take another number"),
            ));
        }
        shape.dense_layers = shape.dense_layers.min(shape.layers);
        let mut writer = GgufWriter::new();
        general_keys(&mut writer, &shape, format)?;
        model_keys(&mut writer, &shape, &published)?;
        tokenizer_keys(&mut writer, &shape)?;
        let context = Context { layers: shape.layers, experts: shape.experts.count };
        let mut roles = HashMap::new();
        for tensor in shape.tensors() {
            let dtype = tensor_type(format, &tensor, context);
            writer.tensor(&tensor.name, dtype.ggml_type(), &tensor.shape)?;
            roles.insert(tensor.name, tensor.role);
        }
        Ok(SynthFile { writer, roles, seed })
    }

    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        self.writer.file_bytes()
    }

    /// Writes a sparse file of the full size that holds the header alone.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_header_only(&self, path: &Path) -> io::Result<()> {
        self.writer.write_sparse(path)
    }

    /// Writes the file, telling `progress` how many bytes each tensor had. It appears under its name only when
    /// it is whole.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write(&self, path: &Path, mut progress: impl FnMut(u64)) -> io::Result<()> {
        self.writer.write_file(path, |tensor, out| {
            self.draw(tensor, out)?;
            progress(tensor.bytes);
            Ok(())
        })
    }

    /// The weights of one tensor: they depend on the seed, its name and its format, on nothing else.
    fn draw(&self, tensor: &NewTensor, out: &mut dyn Write) -> io::Result<()> {
        let dtype =
            tensor.ggml_type.dtype().ok_or_else(|| io::Error::other("a format without an encoder"))?;
        let row_len = tensor.shape.last().copied().unwrap_or(1);
        let (mean, deviation) = match self.roles[&tensor.name] {
            Role::Norm => (1.0, 0.1),
            Role::Bias => (0.0, 0.1),
            // As large as what the layers add to it, so that the text matters.
            Role::Embedding => (0.0, 1.0),
            // A product with a normalised vector is then about 1, and nothing grows from layer to layer.
            Role::Matrix | Role::Router => (0.0, 1.0 / (row_len as f32).sqrt()),
        };
        let mut random = Random::new(self.seed, &tensor.name);
        let weights = Weights::new(dtype, mean, deviation, &mut random);
        let block = dtype.block_bytes();
        let mut chunk = vec![0; CHUNK / block * block];
        let mut left = tensor.bytes as usize;
        while left > 0 {
            let part = &mut chunk[..left.min(CHUNK / block * block)];
            weights.fill(part, &mut random);
            out.write_all(part)?;
            left -= part.len();
        }
        Ok(())
    }
}

fn general_keys(writer: &mut GgufWriter, shape: &ModelShape, format: FileFormat) -> io::Result<()> {
    writer.key("general.architecture", "deepseek2")?;
    writer.key("general.type", "model")?;
    writer.key("general.name", format!("{} with random weights", shape.name))?;
    writer.key("general.file_type", format.file_type())?;
    writer.key("general.quantization_version", 2u32)?;
    Ok(())
}

fn model_keys(writer: &mut GgufWriter, shape: &ModelShape, published: &ModelShape) -> io::Result<()> {
    let experts = &shape.experts;
    let mut key = |name: &str, value: usize| -> io::Result<()> {
        writer.key(&format!("deepseek2.{name}"), value as u32)?;
        Ok(())
    };
    key("vocab_size", shape.vocabulary)?;
    key("context_length", shape.context as usize)?;
    key("embedding_length", shape.embedding)?;
    key("block_count", shape.layers)?;
    key("feed_forward_length", shape.dense_width)?;
    key("attention.head_count", shape.heads)?;
    key("attention.head_count_kv", 1)?;
    key("attention.kv_lora_rank", shape.kv_lora)?;
    key("attention.key_length", shape.kv_lora + shape.rope)?;
    key("attention.value_length", shape.kv_lora)?;
    key("attention.key_length_mla", shape.nope + shape.rope)?;
    key("attention.value_length_mla", shape.value)?;
    key("rope.dimension_count", shape.rope)?;
    key("leading_dense_block_count", shape.dense_layers)?;
    key("expert_count", experts.count)?;
    key("expert_used_count", experts.used)?;
    key("expert_shared_count", experts.shared)?;
    key("expert_feed_forward_length", experts.width)?;
    key("expert_gating_func", if experts.sigmoid { 2 } else { 1 })?;
    if experts.groups.0 > 1 {
        key("expert_group_count", experts.groups.0 as usize)?;
        key("expert_group_used_count", experts.groups.1 as usize)?;
    }
    // Published files without a query latent lack the key; llama.cpp knows them by their number of layers.
    if shape.q_lora > 0 || shape.layers != published.layers {
        key("attention.q_lora_rank", shape.q_lora)?;
    }
    writer.key("deepseek2.attention.layer_norm_rms_epsilon", shape.eps)?;
    writer.key("deepseek2.rope.freq_base", shape.theta)?;
    writer.key("deepseek2.expert_weights_scale", experts.scale)?;
    writer.key("deepseek2.expert_weights_norm", experts.renormalise)?;
    if let Some(yarn) = shape.yarn {
        writer.key("deepseek2.rope.scaling.type", "yarn")?;
        writer.key("deepseek2.rope.scaling.factor", yarn.factor)?;
        writer.key("deepseek2.rope.scaling.original_context_length", yarn.original_context)?;
        writer.key("deepseek2.rope.scaling.yarn_log_multiplier", 0.1 * yarn.mscale_all_dim)?;
    }
    Ok(())
}

/// A vocabulary of the right size: the 256 bytes, a few merges, words that no text contains, and two control
/// tokens.
fn tokenizer_keys(writer: &mut GgufWriter, shape: &ModelShape) -> io::Result<()> {
    let mut tokens: Vec<String> = (0..=255).map(|byte| letter(byte).to_string()).collect();
    let space = letter(b' ');
    let merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d")];
    tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let merges: Vec<String> = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    let controls = match shape.pre {
        "kimi-k2" => ["[BOS]", "[EOS]"],
        "glm4" => ["[gMASK]", "<|endoftext|>"],
        _ => ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    };
    let bos = shape.vocabulary - controls.len();
    tokens.extend((tokens.len()..bos).map(|id| format!("{space}w{id}")));
    tokens.extend(controls.map(str::to_owned));
    let mut types = vec![NORMAL; bos];
    types.resize(shape.vocabulary, CONTROL);
    writer.key("tokenizer.ggml.model", "gpt2")?;
    writer.key("tokenizer.ggml.pre", shape.pre)?;
    writer.key("tokenizer.ggml.tokens", tokens)?;
    writer.key("tokenizer.ggml.token_type", types)?;
    writer.key("tokenizer.ggml.merges", merges)?;
    writer.key("tokenizer.ggml.bos_token_id", bos as u32)?;
    writer.key("tokenizer.ggml.eos_token_id", bos as u32 + 1)?;
    writer.key("tokenizer.ggml.add_bos_token", shape.pre != "glm4")?;
    Ok(())
}
