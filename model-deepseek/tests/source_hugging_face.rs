//! Hugging Face directories: the same tensors as the GGUF file of the model, and errors that say what and where.

mod source_bytes;

use backend_api::{DType, format};
use half::{bf16, f16};
use model_deepseek::source::{Checkpoint, Keys, SourceError};
use source_bytes::*;
use std::{fs, path::Path};

/// A tensor to write: name, dtype, shape, bytes.
type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

fn tensor(name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    (name.to_owned(), dtype, shape.to_vec(), bytes)
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn f16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
}

fn read_f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect()
}

/// A tensor of floats, whatever their width.
fn decoded_values(model: &Checkpoint, name: &str) -> Vec<f32> {
    let (info, bytes) = (model.required(name).unwrap(), model.load(name).unwrap());
    let mut values = vec![0.0; info.shape.iter().product()];
    format::decode(info.runs().unwrap(), bytes.as_slice(), &mut values);
    values
}

fn weights(tensors: &[Tensor]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
        data.extend(bytes);
    }
    safetensors(&format!("{{{}}}", entries.join(",")), &data)
}

fn directory(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn config(json: &str) -> (&'static str, Vec<u8>) {
    ("config.json", json.as_bytes().to_vec())
}

fn single(config_json: &str, tensors: &[Tensor]) -> tempfile::TempDir {
    directory(&[config(config_json), ("model.safetensors", weights(tensors))])
}

fn check_error<T>(result: Result<T, SourceError>, what: &str, fragments: &[&str]) {
    let Err(error) = result else { panic!("{what}: no error") };
    let text = error.to_string();
    for fragment in fragments {
        assert!(text.contains(fragment), "{what}: `{fragment}` is not in `{text}`");
    }
}

#[test]
fn norms_and_routers_become_f32_and_the_rest_stays() {
    let values = [1.0, -2.5, 0.15625, 96.0];
    let folder = single(
        "{}",
        &[
            tensor("model.embed_tokens.weight", "BF16", &[2, 2], bf16s(&values)),
            tensor("model.norm.weight", "BF16", &[4], bf16s(&values)),
            tensor("model.layers.0.input_layernorm.weight", "F16", &[4], f16s(&values)),
            tensor("model.layers.0.post_attention_layernorm.weight", "F32", &[4], f32s(&values)),
            tensor("model.layers.0.self_attn.kv_a_layernorm.weight", "BF16", &[4], bf16s(&values)),
            tensor("model.layers.0.self_attn.o_proj.weight", "F16", &[2, 2], f16s(&values)),
            tensor("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[4], f32s(&values)),
            tensor("model.layers.1.mlp.gate.weight", "BF16", &[2, 2], bf16s(&values)),
            tensor("model.layers.1.mlp.gate.e_score_correction_bias", "F16", &[4], f16s(&values)),
            tensor("model.layers.7.shared_head.norm.weight", "BF16", &[4], bf16s(&values)),
        ],
    );
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.tensors().len(), 10);
    for name in [
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
        "blk.0.attn_kv_a_norm.weight",
        "blk.1.ffn_gate_inp.weight",
        "blk.1.exp_probs_b.bias",
        "blk.7.nextn.shared_head_norm.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ] {
        let info = model.required(name).unwrap();
        assert_eq!((info.runs().unwrap(), info.bytes), (DType::F32, 16), "{name}");
        assert_eq!(read_f32s(model.load(name).unwrap().as_slice()), values, "{name}");
    }
    let embedding = model.load("token_embd.weight").unwrap();
    assert_eq!(
        (model.tensor("token_embd.weight").unwrap().runs().unwrap(), embedding.as_slice()),
        (DType::BF16, &bf16s(&values)[..])
    );
    assert!(model.tensors().all(|tensor| model.fp8_bytes(&tensor.name).is_none()), "there is no FP8");
    assert_eq!(model.load("blk.0.attn_output.weight").unwrap().as_slice(), f16s(&values));
}

/// Files need not align anything; what devices get is aligned.
#[test]
fn unaligned_tensors_are_copied() {
    let values = [1.5f32, -3.0];
    let folder = single(
        "{}",
        &[
            tensor("odd", "I8", &[1], vec![1]),
            tensor("model.norm.weight", "F32", &[2], f32s(&values)),
            tensor("lm_head.weight", "F16", &[1, 2], f16s(&values)),
        ],
    );
    let model = Checkpoint::open(folder.path()).unwrap();
    for (name, expected) in [("output_norm.weight", f32s(&values)), ("output.weight", f16s(&values))] {
        let weight = model.load(name).unwrap();
        assert_eq!(weight.as_slice(), expected);
        assert_eq!(weight.as_slice().as_ptr().addr() % 4, 0, "{name}");
    }
    check_error(
        model.load("odd"),
        "a type that does not run",
        &["model.safetensors", "tensor `odd`", "I8", "BF16"],
    );
}

#[test]
fn experts_are_stacked_in_the_order_of_their_numbers() {
    let mut tensors = Vec::new();
    for expert in [10usize, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 11] {
        for (name, shape) in [("gate", [3, 2]), ("up", [3, 2]), ("down", [2, 3])] {
            let name = format!("model.layers.4.mlp.experts.{expert}.{name}_proj.weight");
            tensors.push(tensor(&name, "BF16", &shape, bf16s(&[expert as f32; 6])));
        }
    }
    let folder = single(r#"{"n_routed_experts": 12}"#, &tensors);
    let model = Checkpoint::open(folder.path()).unwrap();
    for (name, shape) in [("gate", [12, 3, 2]), ("up", [12, 3, 2]), ("down", [12, 2, 3])] {
        let name = format!("blk.4.ffn_{name}_exps.weight");
        assert_eq!(model.required(&name).unwrap().shape, shape);
        let expected: Vec<f32> = (0..12).flat_map(|expert| [expert as f32; 6]).collect();
        assert_eq!(model.load(&name).unwrap().as_slice(), bf16s(&expected));
    }
}

#[test]
fn fp8_is_decoded_by_blocks() {
    // Codes 0x38 (1.0) and 0xbc (-1.5); blocks of 2 × 3 over 3 × 4.
    let codes = [0x38, 0xbc, 0x38, 0xbc, 0x38, 0xbc, 0x38, 0xbc, 0x38, 0xbc, 0x38, 0xbc];
    let decoded = |scales: [f32; 4]| {
        let value = |i: usize| if codes[i] == 0x38 { 1.0 } else { -1.5 };
        let scale = |i: usize| scales[i / 4 / 2 * 2 + i % 4 / 3];
        (0..12).map(|i| value(i) * scale(i)).collect::<Vec<f32>>()
    };
    let scales = [[1.0, 2.0, 4.0, 0.5], [8.0, 16.0, 0.25, 3.0]];
    let mut tensors = Vec::new();
    for (index, scales) in scales.iter().enumerate() {
        for name in [
            format!("model.layers.1.mlp.experts.{index}.up_proj"),
            format!("model.layers.{index}.self_attn.q_proj"),
        ] {
            tensors.push(tensor(&format!("{name}.weight"), "F8_E4M3", &[3, 4], codes.to_vec()));
            tensors.push(tensor(&format!("{name}.weight_scale_inv"), "F32", &[2, 2], f32s(scales)));
        }
    }
    let folder = single(r#"{"quantization_config": {"weight_block_size": [2, 3]}}"#, &tensors);
    let model = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(model.tensors().len(), 3);
    for (index, scales) in scales.iter().enumerate() {
        let weight = model.load(&format!("blk.{index}.attn_q.weight")).unwrap();
        assert_eq!(read_f32s(weight.as_slice()), decoded(*scales));
    }
    let experts = model.required("blk.1.ffn_up_exps.weight").unwrap();
    assert_eq!(
        (experts.runs().unwrap(), &experts.shape[..], experts.bytes),
        (DType::F32, &[2, 3, 4][..], 96)
    );
    // 12 codes and 4 scales of each.
    assert_eq!(model.fp8_bytes("blk.1.ffn_up_exps.weight"), Some(2 * (12 + 16)));
    assert_eq!(model.fp8_bytes("blk.0.attn_q.weight"), Some(12 + 16));
    assert_eq!(model.fp8_bytes("no.such.weight"), None);
    let stacked = model.load("blk.1.ffn_up_exps.weight").unwrap();
    assert_eq!(read_f32s(stacked.as_slice()), [decoded(scales[0]), decoded(scales[1])].concat());
}

#[test]
fn bad_directories_are_errors_that_say_where() {
    let norm = || tensor("model.norm.weight", "F32", &[1], f32s(&[1.0]));
    let head = || tensor("lm_head.weight", "F32", &[1], f32s(&[1.0]));
    let expert = |number: usize, dtype: &'static str, shape: &[usize], bytes: usize| {
        tensor(&format!("model.layers.1.mlp.experts.{number}.up_proj.weight"), dtype, shape, vec![0; bytes])
    };
    let fp8 = || tensor("model.layers.0.self_attn.o_proj.weight", "F8_E4M3", &[2, 200], vec![0x38; 400]);
    let scale = |dtype, shape: &[usize], bytes| {
        tensor("model.layers.0.self_attn.o_proj.weight_scale_inv", dtype, shape, vec![0; bytes])
    };
    let index = |json: &str| ("model.safetensors.index.json", json.as_bytes().to_vec());
    let a = || ("model-00001-of-00002.safetensors", weights(&[norm()]));
    let b = || ("model-00002-of-00002.safetensors", weights(&[head()]));
    let map = |entries: &str| {
        index(&format!(r#"{{"metadata": {{"total_size": 8}}, "weight_map": {{{entries}}}}}"#))
    };
    let norm_a = r#""model.norm.weight": "model-00001-of-00002.safetensors""#;
    let head_b = r#""lm_head.weight": "model-00002-of-00002.safetensors""#;
    let one = |tensors: &[Tensor]| vec![config("{}"), ("model.safetensors", weights(tensors))];
    type Files = Vec<(&'static str, Vec<u8>)>;
    let cases: Vec<(&str, Files, &[&str])> = vec![
        ("empty", vec![], &["config.json with model*.safetensors", "GGUF", "none of them"]),
        ("config alone", vec![config("{}")], &["model*.safetensors", "none of them"]),
        ("weights alone", vec![("model.safetensors", weights(&[norm()]))], &["config.json", "none of them"]),
        ("two GGUF models", vec![("a.gguf", rich()), ("b.gguf", rich())], &["2 GGUF models: a.gguf, b.gguf"]),
        ("config no JSON", vec![config("{"), a(), b()], &["config.json", "header", "JSON", "EOF"]),
        ("config a list", vec![config("[]"), a(), b()], &["config.json", "JSON object"]),
        (
            "config of bad UTF-8",
            vec![("config.json", b"{\"a\":\"\xff\"}".to_vec()), a(), b()],
            &["config.json"],
        ),
        (
            "config too large",
            vec![("config.json", vec![b' '; (1 << 20) + 1]), a(), b()],
            &["config.json", "1048576"],
        ),
        (
            "config nested 200,000 deep",
            vec![config(&format!("{}{}", "{\"a\":".repeat(100_000), "[".repeat(100_000))), a(), b()],
            &["config.json", "recursion limit"],
        ),
        (
            "block size",
            vec![config(r#"{"quantization_config": {"weight_block_size": [128, 0]}}"#), a(), b()],
            &["config.json", "weight_block_size", "[128,0]"],
        ),
        (
            "shard missing, no index",
            vec![config("{}"), a()],
            &["file `model-00002-of-00002.safetensors`", "missing"],
        ),
        (
            "shard missing, index",
            vec![config("{}"), a(), map(&format!("{norm_a}, {head_b}"))],
            &["file `model-00002-of-00002.safetensors`", "missing"],
        ),
        ("index no JSON", vec![config("{}"), a(), b(), index("{")], &["index.json", "JSON"]),
        (
            "index without map",
            vec![config("{}"), a(), b(), index("{}")],
            &["index.json", "weight_map", "missing"],
        ),
        ("index map a list", vec![config("{}"), a(), b(), index(r#"{"weight_map": []}"#)], &["index.json"]),
        (
            "index with numbers",
            vec![config("{}"), a(), b(), map(r#""lm_head.weight": 7"#)],
            &["index.json", "integer `7`"],
        ),
        (
            "index leads elsewhere",
            vec![config("{}"), a(), b(), map(r#""lm_head.weight": "../model.safetensors""#)],
            &["index.json", "tensor `lm_head.weight`", "`../model.safetensors`"],
        ),
        (
            "index names another shard",
            vec![
                config("{}"),
                a(),
                b(),
                map(&format!(r#"{norm_a}, "lm_head.weight": "model-00001-of-00002.safetensors""#)),
            ],
            &["index.json", "tensor `lm_head.weight`", "model-00001", "none of the files"],
        ),
        (
            "index swaps shards",
            vec![
                config("{}"),
                a(),
                b(),
                map(
                    r#""model.norm.weight": "model-00002-of-00002.safetensors", "lm_head.weight": "model-00001-of-00002.safetensors""#,
                ),
            ],
            &[
                "index.json",
                "tensor `model.norm.weight`",
                "expected it in `model-00002",
                "found it in `model-00001",
            ],
        ),
        (
            "index with a tensor too many",
            vec![
                config("{}"),
                a(),
                b(),
                map(&format!(r#"{norm_a}, {head_b}, "x": "model-00002-of-00002.safetensors""#)),
            ],
            &["index.json", "tensor `x`", "none of the files"],
        ),
        (
            "index with a tensor twice",
            vec![config("{}"), a(), b(), map(&format!("{norm_a}, {head_b}, {head_b}"))],
            &["index.json", "tensor `lm_head.weight`", "twice"],
        ),
        (
            "index lacks a tensor",
            vec![
                config("{}"),
                a(),
                ("model-00002-of-00002.safetensors", weights(&[head(), tensor("y", "F32", &[0], vec![])])),
                map(&format!("{norm_a}, {head_b}")),
            ],
            &["index.json", "tensor `y`", "missing", "model-00002"],
        ),
        (
            "tensor in two shards",
            vec![config("{}"), a(), ("model-00002-of-00002.safetensors", weights(&[norm()]))],
            &["model-00002", "tensor `model.norm.weight`", "model-00001"],
        ),
        (
            "tensor twice in a file",
            one(&[norm(), norm()]),
            &["model.safetensors", "tensor `model.norm.weight`", "twice"],
        ),
        ("empty file", vec![config("{}"), ("model.safetensors", vec![])], &["model.safetensors", "empty"]),
        (
            "expert missing",
            one(&[expert(0, "F32", &[1, 1], 4), expert(2, "F32", &[1, 1], 4)]),
            &["tensor `model.layers.1.mlp.experts.1.up_proj.weight`", "missing"],
        ),
        (
            "last expert missing",
            vec![
                config(r#"{"n_routed_experts": 3}"#),
                ("model.safetensors", weights(&[expert(0, "F32", &[1, 1], 4), expert(1, "F32", &[1, 1], 4)])),
            ],
            &["tensor `model.layers.1.mlp.experts.2.up_proj.weight`", "missing", "3 experts"],
        ),
        (
            "an expert too many",
            vec![
                config(r#"{"n_routed_experts": 1}"#),
                ("model.safetensors", weights(&[expert(0, "F32", &[1, 1], 4), expert(1, "F32", &[1, 1], 4)])),
            ],
            &["tensor `model.layers.1.mlp.experts.1.up_proj.weight`", "1 experts"],
        ),
        (
            "a huge expert number",
            one(&[expert(0, "F32", &[1, 1], 4), expert(usize::MAX, "F32", &[1, 1], 4)]),
            &["tensor `model.layers.1.mlp.experts.1.up_proj.weight`", "missing"],
        ),
        (
            "experts of two types",
            one(&[expert(0, "F32", &[1, 1], 4), expert(1, "BF16", &[1, 2], 4)]),
            &["tensor `model.layers.1.mlp.experts.1.up_proj.weight`", "F32 [1, 1]", "BF16 [1, 2]"],
        ),
        (
            "experts of two shapes",
            one(&[expert(0, "F32", &[1, 2], 8), expert(1, "F32", &[2, 1], 8)]),
            &["tensor `model.layers.1.mlp.experts.1.up_proj.weight`", "[1, 2]", "[2, 1]"],
        ),
        ("FP8 without scales", one(&[fp8()]), &["o_proj.weight_scale_inv`", "missing"]),
        (
            "FP8 with too few scales",
            one(&[fp8(), scale("F32", &[1, 1], 4)]),
            &["o_proj.weight_scale_inv`", "F32 [1, 2]", "[1, 1]"],
        ),
        (
            "FP8 with BF16 scales",
            one(&[fp8(), scale("BF16", &[1, 2], 4)]),
            &["o_proj.weight_scale_inv`", "F32 [1, 2]", "BF16"],
        ),
        (
            "FP8 of rank 1",
            one(&[tensor("model.norm.weight", "F8_E4M3", &[4], vec![0; 4])]),
            &["tensor `model.norm.weight`", "matrix", "[4]"],
        ),
        (
            "scales of what is not FP8",
            one(&[
                tensor("lm_head.weight", "BF16", &[1, 1], vec![0; 2]),
                tensor("lm_head.weight_scale_inv", "F32", &[1, 1], vec![0; 4]),
            ]),
            &["tensor `lm_head.weight`", "F8_E4M3", "BF16"],
        ),
        ("scales of nothing", one(&[scale("F32", &[1, 2], 8)]), &["o_proj.weight_scale_inv`", "none"]),
    ];
    for (what, files, fragments) in cases {
        let folder = directory(&files);
        let result = Checkpoint::open(folder.path());
        check_error(result, what, &[folder.path().to_str().unwrap()]);
        check_error(Checkpoint::open(folder.path()), what, fragments);
    }
    check_error(Checkpoint::open(Path::new("no/such/model")), "no such path", &["no/such/model", "open"]);
    let folder = single("{}", &[norm()]);
    fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    for name in ["model.safetensors", "config.json", "model.safetensors.index.json"] {
        let (file, directory) =
            (folder.path().join(name), format!("the directory `{}`", folder.path().display()));
        check_error(
            Checkpoint::open(&file),
            "a file of it",
            &[file.to_str().unwrap(), &directory, "one file of"],
        );
    }
}

#[test]
fn fp8_that_does_not_fit_is_an_error_of_the_tensor() {
    for (code, scale) in [(0x7f, 1.0), (0x7e, 1e38), (0x38, f32::NAN), (0x38, f32::INFINITY)] {
        let folder = single(
            "{}",
            &[
                tensor("lm_head.weight", "F8_E4M3", &[1, 1], vec![code]),
                tensor("lm_head.weight_scale_inv", "F32", &[1, 1], f32s(&[scale])),
            ],
        );
        let model = Checkpoint::open(folder.path()).unwrap();
        check_error(
            model.load("output.weight"),
            "overflow",
            &["tensor `lm_head.weight`", "finite values", "[0, 0]"],
        );
    }
}

/// Parts are made at the same time, but which of two flaws is told does not depend on who is faster.
#[test]
fn the_first_of_several_flaws_is_told() {
    let mut tensors = Vec::new();
    for expert in 0..8u8 {
        let name = format!("model.layers.1.mlp.experts.{expert}.up_proj.weight");
        // The first flaw is far down in its expert, the later ones are found at once.
        let mut codes = vec![0x38; 256 * 128];
        if expert >= 2 {
            codes[if expert == 2 { 200 * 128 } else { 0 }] = 0x7f;
        }
        let scales = [1.0, 2.0].map(|scale| scale + f32::from(expert));
        tensors.push(tensor(&name, "F8_E4M3", &[256, 128], codes));
        tensors.push(tensor(&format!("{name}_scale_inv"), "F32", &[2, 1], f32s(&scales)));
    }
    let folder = single("{}", &tensors);
    let model = Checkpoint::open(folder.path()).unwrap();
    for _ in 0..20 {
        let found = "NaN or an overflow in block [1, 0] of scale 4";
        let name = "tensor `model.layers.1.mlp.experts.*.up_proj.weight`";
        check_error(model.load("blk.1.ffn_up_exps.weight"), "flaws", &[name, found]);
    }
}

#[test]
fn bad_safetensors_headers_are_errors_that_say_where() {
    let entry = |text: &str| format!(r#"{{"a":{{{text}}}}}"#);
    let many =
        |n: usize| format!(r#"{{"a":{{"dtype":"F32","shape":[1{}],"data_offsets":[0,4]}}}}"#, ",1".repeat(n));
    let notes: Vec<String> = (0..2000).map(|i| format!(r#""{i}":"""#)).collect();
    let eighth = (1u64 << 61) - 1;
    let wrapping: Vec<String> = (0..8)
        .map(|i| {
            let (start, end) = (i * eighth, (i + 1) * eighth);
            format!(r#""t{i}":{{"dtype":"U8","shape":[{eighth}],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("7 bytes", vec![0; 7], &["at least 8 bytes", "7 bytes"]),
        ("header of 2^63", safetensors("", &[]).splice(0..8, (1u64 << 63).to_le_bytes()).collect(), &[]),
        ("header past the end", [&100u64.to_le_bytes()[..], b"{}"].concat(), &["at most 2 bytes", "100"]),
        ("header of 2^64-1", [&[0xff; 8][..], b"{}"].concat(), &["at most 2 bytes", "18446744073709551615"]),
        ("no JSON", safetensors("{", &[]), &["JSON"]),
        ("bad UTF-8", [&4u64.to_le_bytes()[..], b"{\"\xff\"", &[]].concat(), &["header"]),
        ("a list", safetensors("[]", &[]), &["object of tensors"]),
        ("nested deep", safetensors(&format!("{{\"a\":{}", "[".repeat(200_000)), &[]), &["tensor `a`"]),
        ("a number", safetensors(r#"{"a":1}"#, &[]), &["tensor `a`", "dtype, shape and data_offsets"]),
        (
            "no dtype",
            safetensors(&entry(r#""shape":[],"data_offsets":[0,0]"#), &[]),
            &["tensor `a`", "dtype"],
        ),
        (
            "unknown dtype",
            safetensors(&entry(r#""dtype":"F33","shape":[1],"data_offsets":[0,4]"#), &[0; 4]),
            &["tensor `a`", "F33"],
        ),
        (
            "negative dimension",
            safetensors(&entry(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), &[0; 4]),
            &["tensor `a`", "-1"],
        ),
        ("1,000 dimensions", safetensors(&many(1000), &[0; 4]), &["tensor `a`", "at most 8 dimensions"]),
        (
            "end before start",
            safetensors(&entry(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), &[0; 4]),
            &["tensor `a`", "4 to 0"],
        ),
        (
            "past the end",
            safetensors(&entry(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), &[0; 4]),
            &["tensor `a`", "4 bytes of data", "0 to 8"],
        ),
        (
            "shape wraps",
            safetensors(&entry(r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]"#), &[]),
            &["tensor `a`", "4294967296"],
        ),
        (
            "shape and size differ",
            safetensors(&entry(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), &[0; 8]),
            &["tensor `a`", "[3]", "found 8"],
        ),
        ("offsets sum to 2^64", safetensors(&format!("{{{}}}", wrapping.join(",")), &[]), &["tensor `t0`"]),
        (
            "a gap",
            safetensors(&entry(r#""dtype":"U8","shape":[1],"data_offsets":[1,2]"#), &[0; 2]),
            &["tensor `a`", "a gap or an overlap"],
        ),
        (
            "bytes after the last tensor",
            safetensors(&entry(r#""dtype":"U8","shape":[1],"data_offsets":[0,1]"#), &[0; 2]),
            &["header"],
        ),
        (
            "2,000 notes",
            safetensors(&format!(r#"{{"__metadata__":{{{}}}}}"#, notes.join(",")), &[]),
            &["__metadata__", "1024"],
        ),
    ];
    for (what, bytes, fragments) in cases {
        let folder = directory(&[config("{}"), ("model.safetensors", bytes)]);
        check_error(Checkpoint::open(folder.path()), what, &["model.safetensors"]);
        check_error(Checkpoint::open(folder.path()), what, fragments);
    }
    // Cut anywhere, it is an error.
    let whole = weights(&[tensor("model.norm.weight", "F32", &[50], vec![0; 200])]);
    for len in 0..whole.len() {
        let folder = directory(&[config("{}"), ("model.safetensors", whole[..len].to_vec())]);
        check_error(Checkpoint::open(folder.path()), &format!("{len} bytes"), &["model.safetensors"]);
    }
}

#[test]
fn a_directory_with_one_gguf_model_opens() {
    let folder = directory(&[("model.gguf", rich()), ("config.json", b"{}".to_vec()), ("notes.txt", vec![])]);
    let model = Checkpoint::open(folder.path()).unwrap();
    assert!(matches!(model.keys(), Keys::Gguf(_)));
    assert_eq!(model.tensors().len(), 3);
}

/// `attn_kv_b` of the legacy form from the split form, in whatever two-byte type.
fn kv_b(model: &Checkpoint, layer: usize) -> Vec<u8> {
    let load = |name: &str| {
        let name = format!("blk.{layer}.{name}.weight");
        (model.required(&name).unwrap().shape.clone(), model.load(&name).unwrap())
    };
    let (k_shape, k_b) = load("attn_k_b");
    let (v_shape, v_b) = load("attn_v_b");
    let (heads, latent, nope, value) = (k_shape[0], k_shape[1], k_shape[2], v_shape[1]);
    let (k_b, v_b) = (k_b.as_slice().as_chunks::<2>().0, v_b.as_slice().as_chunks::<2>().0);
    let mut both = Vec::new();
    for head in 0..heads {
        for row in 0..nope {
            both.extend((0..latent).flat_map(|column| k_b[(head * latent + column) * nope + row]));
        }
        both.extend(v_b[head * value * latent..][..value * latent].as_flattened());
    }
    both
}

#[test]
fn the_shared_directory_equals_its_gguf_file() {
    let Some(shared) = shared() else { return };
    let shapes = shared.join("models/shapes");
    let gguf = Checkpoint::open(&shapes.join("v3-like-f16.gguf")).unwrap();
    let hf = Checkpoint::open(&shapes.join("v3-like-hf")).unwrap();
    let Keys::HuggingFace(config) = hf.keys() else { panic!("a Hugging Face directory") };
    assert_eq!(config["num_hidden_layers"], 4);
    let mut compared = 0;
    for tensor in gguf.tensors() {
        if let Some(layer) =
            tensor.name.strip_suffix(".attn_k_b.weight").and_then(|name| name.strip_prefix("blk."))
        {
            let layer: usize = layer.parse().unwrap();
            let legacy = hf.load(&format!("blk.{layer}.attn_kv_b.weight")).unwrap();
            assert!(legacy.as_slice() == kv_b(&gguf, layer), "layer {layer}");
        } else if !tensor.name.ends_with(".attn_v_b.weight") {
            let found = hf.required(&tensor.name).unwrap();
            assert_eq!(
                (found.runs().unwrap(), &found.shape),
                (tensor.runs().unwrap(), &tensor.shape),
                "{}",
                found.name
            );
            let same =
                hf.load(&tensor.name).unwrap().as_slice() == gguf.load(&tensor.name).unwrap().as_slice();
            assert!(same, "{}", tensor.name);
        } else {
            continue;
        }
        compared += 1;
    }
    assert_eq!(compared, hf.tensors().len());
}

/// FP8 has three bits of mantissa and goes down to 2^-9 of a block's scale.
#[test]
fn the_shared_fp8_directory_is_near_its_gguf_file() {
    let Some(shared) = shared() else { return };
    let shapes = shared.join("models/shapes");
    let gguf = Checkpoint::open(&shapes.join("v3-like-f16.gguf")).unwrap();
    let hf = Checkpoint::open(&shapes.join("v3-like-hf-fp8")).unwrap();
    let mut decoded = 0;
    for tensor in hf.tensors() {
        let Some(original) = gguf.tensor(&tensor.name) else {
            assert!(tensor.name.ends_with("attn_kv_b.weight"), "{}", tensor.name);
            continue;
        };
        assert_eq!(tensor.shape, original.shape);
        let exact = original.runs().unwrap() == DType::F32;
        let [original, found] = [&gguf, &hf].map(|model| decoded_values(model, &tensor.name));
        let largest = original.iter().fold(0f32, |most, v| most.max(v.abs()));
        let bound = |v: f32| match tensor.runs().unwrap() {
            _ if exact => 0.0,
            DType::BF16 => v.abs() / 256.0,
            _ => v.abs() / 16.0 + largest / 448.0 / 1024.0 + 1e-7,
        };
        for (&a, &b) in original.iter().zip(&found) {
            assert!((a - b).abs() <= bound(a), "{}: {a} {b}", tensor.name);
        }
        decoded += usize::from(!exact && tensor.runs().unwrap() == DType::F32);
    }
    assert!(decoded > 20, "{decoded}");
}
