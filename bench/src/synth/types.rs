//! Which format each tensor of a quantised file gets: the rules of llama.cpp's own quantizer (without an
//! importance matrix), found out by quantising made-up models of many layers and row lengths with it.
//! `llama-cpp-types.txt` holds what it chose; the test holds the rules against every line of it.

use super::shapes::{Role, Tensor};
use backend_api::DType;
use clap::ValueEnum;

/// What a whole file is called; most of its matrices have the format of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types, missing_docs, reason = "the field's names")]
pub enum FileFormat {
    #[value(name = "f32")]
    F32,
    #[value(name = "f16")]
    F16,
    #[value(name = "bf16")]
    BF16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_1")]
    Q4_1,
    #[value(name = "q5_0")]
    Q5_0,
    #[value(name = "q5_1")]
    Q5_1,
    #[value(name = "q2_k")]
    Q2_K,
    #[value(name = "q3_k_m")]
    Q3_K_M,
    #[value(name = "q4_k_m")]
    Q4_K_M,
    #[value(name = "q5_k_m")]
    Q5_K_M,
    #[value(name = "q6_k")]
    Q6_K,
    #[value(name = "iq4_nl")]
    IQ4_NL,
    #[value(name = "iq4_xs")]
    IQ4_XS,
}

impl FileFormat {
    /// The format of most matrices.
    pub fn dtype(self) -> DType {
        match self {
            FileFormat::F32 => DType::F32,
            FileFormat::F16 => DType::F16,
            FileFormat::BF16 => DType::BF16,
            FileFormat::Q8_0 => DType::Q8_0,
            FileFormat::Q4_0 => DType::Q4_0,
            FileFormat::Q4_1 => DType::Q4_1,
            FileFormat::Q5_0 => DType::Q5_0,
            FileFormat::Q5_1 => DType::Q5_1,
            FileFormat::Q2_K => DType::Q2_K,
            FileFormat::Q3_K_M => DType::Q3_K,
            FileFormat::Q4_K_M => DType::Q4_K,
            FileFormat::Q5_K_M => DType::Q5_K,
            FileFormat::Q6_K => DType::Q6_K,
            FileFormat::IQ4_NL => DType::IQ4_NL,
            FileFormat::IQ4_XS => DType::IQ4_XS,
        }
    }

    /// The file's `general.file_type`.
    pub fn file_type(self) -> u32 {
        match self {
            FileFormat::F32 => 0,
            FileFormat::F16 => 1,
            FileFormat::Q4_0 => 2,
            FileFormat::Q4_1 => 3,
            FileFormat::Q8_0 => 7,
            FileFormat::Q5_0 => 8,
            FileFormat::Q5_1 => 9,
            FileFormat::Q2_K => 10,
            FileFormat::Q3_K_M => 12,
            FileFormat::Q4_K_M => 15,
            FileFormat::Q5_K_M => 17,
            FileFormat::Q6_K => 18,
            FileFormat::IQ4_NL => 25,
            FileFormat::IQ4_XS => 30,
            FileFormat::BF16 => 32,
        }
    }
}

/// What the rules look at besides the tensor itself.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Layers of the model.
    pub layers: usize,
    /// Routed experts in each.
    pub experts: usize,
}

/// The format that `tensor` gets in a file of format `file`.
pub fn tensor_type(file: FileFormat, tensor: &Tensor, context: Context) -> DType {
    match tensor.role {
        Role::Norm | Role::Bias | Role::Router => DType::F32,
        Role::Embedding | Role::Matrix if !file.dtype().is_quantized() => file.dtype(),
        Role::Embedding | Role::Matrix => fitting(wish(file, tensor, context), tensor.row_len()),
    }
}

/// The format by the tensor's part in the model.
fn wish(file: FileFormat, tensor: &Tensor, context: Context) -> DType {
    use FileFormat::*;
    let part = tensor.name.rsplit('.').nth(1).unwrap_or_default();
    let layer = tensor.layer.unwrap_or(0);
    let layers = context.layers;
    match part {
        "output" if file != Q8_0 && tensor.row_len().is_multiple_of(file.dtype().block_len()) => DType::Q6_K,
        "output" => DType::Q8_0,
        "attn_output" if context.experts == 8 => match file {
            Q2_K | Q3_K_M | Q4_K_M | IQ4_NL | IQ4_XS => DType::Q5_K,
            _ => file.dtype(),
        },
        "attn_output" => match file {
            Q2_K => DType::Q3_K,
            Q3_K_M => DType::Q4_K,
            _ => file.dtype(),
        },
        "ffn_down" | "ffn_down_exps" | "ffn_down_shexp" => match file {
            Q2_K => DType::Q3_K,
            Q3_K_M if layer < layers / 16 => DType::Q5_K,
            Q3_K_M => DType::Q4_K,
            Q4_K_M | Q5_K_M if gets_more_bits(layer, layers) => DType::Q6_K,
            IQ4_NL | IQ4_XS if layer < layers / 8 => DType::Q5_K,
            _ => file.dtype(),
        },
        _ => file.dtype(),
    }
}

/// The first and the last eighth of the layers, and every third between.
fn gets_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// `wish`, or its substitute where rows of `row_len` values are no whole blocks of it.
fn fitting(wish: DType, row_len: usize) -> DType {
    let fits = |dtype: DType| row_len.is_multiple_of(dtype.block_len());
    if fits(wish) {
        return wish;
    }
    let substitute = match wish {
        DType::Q2_K | DType::Q3_K => DType::Q4_0,
        DType::IQ4_XS => DType::IQ4_NL,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    };
    if fits(substitute) { substitute } else { DType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> usize {
        text.parse().unwrap()
    }

    /// Layers of a list such as `1-3,5`; `-` stands for no layer.
    fn layers(list: &str) -> Vec<Option<usize>> {
        if list == "-" {
            return vec![None];
        }
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            number(first)..=number(last)
        };
        list.split(',').flat_map(range).map(Some).collect()
    }

    #[test]
    fn types_are_those_that_llama_cpp_chose() {
        let mut context = Context { layers: 0, experts: 0 };
        let mut file = FileFormat::F32;
        let mut checked = 0;
        for line in include_str!("llama-cpp-types.txt").lines() {
            match *line.split(' ').collect::<Vec<_>>() {
                ["model", experts, layers] => {
                    let value = |text: &str| number(text.split_once('=').unwrap().1);
                    context = Context { experts: value(experts), layers: value(layers) };
                }
                ["format", name] => file = FileFormat::from_str(name, false).unwrap(),
                [part, row_len, expected, list] => {
                    for layer in layers(list) {
                        let name = match layer {
                            Some(layer) => format!("blk.{layer}.{part}.weight"),
                            None => format!("{part}.weight"),
                        };
                        let role = if part == "token_embd" { Role::Embedding } else { Role::Matrix };
                        let tensor = Tensor { name, shape: vec![1, number(row_len)], role, layer };
                        let found = tensor_type(file, &tensor, context);
                        assert_eq!(found.name(), expected, "{context:?} {file:?} {tensor:?}");
                        checked += 1;
                    }
                }
                _ => panic!("{line}"),
            }
        }
        assert!(checked > 10_000, "only {checked} tensors");
    }
}
