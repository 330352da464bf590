//! One model in every form it is published in: the same bits come out.

mod common;

use backend_api::{DType, Device, DeviceInfo, Discard, format};
use backend_cpu::{CpuDevice, CpuOptions};
use common::{
    embedded, engine, open, passes_on,
    random::{File, Shape},
    shared_models,
};
use graph::{Devices, Placement};
use model_deepseek::{
    Engine, Model, Options, PlacementOptions, Wanted,
    placement::Override,
    source::{
        Checkpoint, Keys,
        gguf::{Metadata, Value},
        gguf_writer::{GgufWriter, NewTensor, NewValue},
    },
    tokenizer,
};
use safetensors::{Dtype, tensor::TensorView};
use std::{collections::BTreeMap, path::Path, sync::Arc};

const TOKENS: u32 = 20;

/// Logits of a few tokens, and the tokens that then follow greedily, as bits.
fn run(model: Model) -> (Vec<u32>, Vec<u32>) {
    let vocabulary = model.config().vocabulary as u32;
    let mut session = engine(&Arc::new(model), &Options::default()).session().unwrap();
    let prompt: Vec<u32> = (0..TOKENS).map(|i| (i * 37 + 5) % vocabulary).collect();
    let mut bits = Vec::new();
    let mut each = |_, logits: &[f32]| bits.extend(logits.iter().map(|x| x.to_bits()));
    session.feed_with(&prompt, Wanted::All, &mut each, &mut Discard).unwrap();
    for _ in 0..20 {
        let best = common::argmax(session.logits().unwrap()) as u32;
        session.feed(&[best]).unwrap();
    }
    (bits, session.tokens()[TOKENS as usize..].to_vec())
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let info = checkpoint.required(name).unwrap();
    let (dtype, inner) = (info.runs().unwrap(), *info.shape.last().unwrap());
    let mut values = vec![0.0; info.shape.iter().product()];
    let bytes = checkpoint.load(name).unwrap();
    for (row, out) in bytes.as_slice().chunks(dtype.row_bytes(inner)).zip(values.chunks_mut(inner)) {
        format::decode(dtype, row, out);
    }
    values
}

/// `attn_kv_b` of a layer out of the split pair: of each head `nope` key rows, then the value rows.
fn kv_b(checkpoint: &Checkpoint, layer: usize, heads: usize) -> (Vec<f32>, [usize; 2]) {
    let name = |part: &str| format!("blk.{layer}.attn_{part}.weight");
    let (k_b, v_b) = (values(checkpoint, &name("k_b")), values(checkpoint, &name("v_b")));
    let latent = checkpoint.required(&name("k_b")).unwrap().shape[1];
    let (nope, value) = (k_b.len() / heads / latent, v_b.len() / heads / latent);
    let mut out = Vec::new();
    for head in 0..heads {
        let k = &k_b[head * latent * nope..][..latent * nope];
        out.extend((0..nope).flat_map(|i| (0..latent).map(move |l| k[l * nope + i])));
        out.extend(&v_b[head * value * latent..][..value * latent]);
    }
    (out, [heads * (nope + value), latent])
}

/// The keys of a file that another is to have too.
fn copy_keys(from: &Metadata, to: &mut GgufWriter, keep: impl Fn(&str) -> bool) {
    fn copy(value: Value<'_>) -> NewValue {
        match value {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::F32(v) => v.into(),
            Value::Bool(v) => (v != 0).into(),
            Value::String(v) => str::from_utf8(v).unwrap().into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            Value::F64(v) => v.into(),
            Value::Array(v) => {
                NewValue::Array(v.element_type(), v.values().map(|value| copy(value.unwrap())).collect())
            }
        }
    }
    for key in from.keys().filter(|key| keep(key)) {
        to.key(key, copy(from.value(key).unwrap())).unwrap();
    }
}

/// The same model as a file from before May 2025.
fn as_legacy(checkpoint: &Checkpoint, heads: usize) -> Checkpoint {
    let Keys::Gguf(metadata) = checkpoint.keys() else { panic!("a GGUF file has GGUF keys") };
    let mut file = File::default();
    let dropped = |key: &str| {
        ["_mla", "key_length", "value_length", "head_count_kv"].iter().any(|end| key.ends_with(end))
    };
    copy_keys(metadata, &mut file.writer, |key| !dropped(key));
    let length = |key: &str| metadata.get_u32(&format!("deepseek2.attention.{key}")).unwrap().unwrap();
    file.key("deepseek2.attention.key_length", length("key_length_mla"));
    file.key("deepseek2.attention.value_length", length("value_length_mla"));
    file.key("deepseek2.attention.head_count_kv", heads as u32);
    for info in checkpoint.tensors() {
        let layer = info.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match layer {
            Some(layer) if info.name.ends_with("attn_k_b.weight") => {
                let (values, shape) = kv_b(checkpoint, layer, heads);
                file.tensor(&format!("blk.{layer}.attn_kv_b.weight"), info.runs().unwrap(), &shape, &values);
            }
            Some(_) if info.name.ends_with("attn_v_b.weight") => {}
            _ => file.tensor(&info.name, info.runs().unwrap(), &info.shape, &values(checkpoint, &info.name)),
        }
    }
    file.checkpoint()
}

/// The same model as Hugging Face publishes DeepSeek-V3. Of tensors whose names end in `fp8` there are ones in FP8.
fn as_hugging_face(model: &Model, directory: &Path, fp8: Option<&str>) {
    let (checkpoint, config) = (model.checkpoint(), model.config());
    let heads = config.attention.heads;
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut put = |name: String, dtype: DType, shape: &[usize], values: &[f32]| {
        if fp8.is_some_and(|end| name.ends_with(end)) {
            let scales = shape.iter().map(|extent| extent.div_ceil(128)).collect::<Vec<_>>();
            let ones = 1f32.to_le_bytes().repeat(scales.iter().product());
            tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, scales, ones));
            tensors.insert(name, (Dtype::F8_E4M3, shape.to_vec(), vec![0x38; values.len()]));
            return;
        }
        let mut bytes = vec![0; dtype.row_bytes(values.len())];
        format::encode(dtype, values, &mut bytes);
        let dtype = if dtype == DType::F16 { Dtype::F16 } else { Dtype::F32 };
        tensors.insert(name, (dtype, shape.to_vec(), bytes));
    };
    for info in checkpoint.tensors() {
        let (dtype, data) = (info.runs().unwrap(), values(checkpoint, &info.name));
        let Some(rest) = info.name.strip_prefix("blk.") else {
            let name = match info.name.as_str() {
                "token_embd.weight" => "model.embed_tokens.weight",
                "output_norm.weight" => "model.norm.weight",
                _ => "lm_head.weight",
            };
            put(name.to_owned(), dtype, &info.shape, &data);
            continue;
        };
        let (layer, part) = rest.split_once('.').unwrap();
        let (of, name) = match part.trim_end_matches(".weight") {
            "attn_norm" => ("", "input_layernorm.weight"),
            "ffn_norm" => ("", "post_attention_layernorm.weight"),
            "attn_q" => ("self_attn.", "q_proj.weight"),
            "attn_q_a" => ("self_attn.", "q_a_proj.weight"),
            "attn_q_a_norm" => ("self_attn.", "q_a_layernorm.weight"),
            "attn_q_b" => ("self_attn.", "q_b_proj.weight"),
            "attn_kv_a_mqa" => ("self_attn.", "kv_a_proj_with_mqa.weight"),
            "attn_kv_a_norm" => ("self_attn.", "kv_a_layernorm.weight"),
            "attn_k_b" => {
                let (data, shape) = kv_b(checkpoint, layer.parse().unwrap(), heads);
                put(format!("model.layers.{layer}.self_attn.kv_b_proj.weight"), dtype, &shape, &data);
                continue;
            }
            "attn_v_b" => continue,
            "attn_output" => ("self_attn.", "o_proj.weight"),
            "ffn_gate_inp" => ("mlp.", "gate.weight"),
            "exp_probs_b.bias" => ("mlp.", "gate.e_score_correction_bias"),
            other => {
                let (kind, of) = match other.strip_prefix("ffn_").unwrap() {
                    exps if exps.ends_with("_exps") => (exps.trim_end_matches("_exps"), None),
                    shared if shared.ends_with("_shexp") => {
                        (shared.trim_end_matches("_shexp"), Some("mlp.shared_experts."))
                    }
                    dense => (dense, Some("mlp.")),
                };
                let Some(of) = of else {
                    let size = data.len() / info.shape[0];
                    for (expert, data) in data.chunks(size).enumerate() {
                        let name = format!("model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight");
                        put(name, dtype, &info.shape[1..], data);
                    }
                    continue;
                };
                put(format!("model.layers.{layer}.{of}{kind}_proj.weight"), dtype, &info.shape, &data);
                continue;
            }
        };
        put(format!("model.layers.{layer}.{of}{name}"), dtype, &info.shape, &data);
    }
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();

    let a = &config.attention;
    let model_deepseek::config::FeedForward::Experts(moe) = config.feed_forward.last().unwrap() else {
        panic!("the last layer has experts")
    };
    let model_deepseek::config::FeedForward::Dense { width } = config.feed_forward[0] else {
        panic!("the first layer is dense")
    };
    let json = serde_json::json!({
        "model_type": "deepseek_v3", "vocab_size": config.vocabulary, "hidden_size": config.embedding_length,
        "num_hidden_layers": config.layers(), "first_k_dense_replace": 1, "intermediate_size": width,
        "moe_intermediate_size": moe.width, "num_attention_heads": heads, "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank, "qk_nope_head_dim": a.nope, "qk_rope_head_dim": a.rope.dims,
        "v_head_dim": a.value, "n_routed_experts": moe.experts, "num_experts_per_tok": moe.route.used,
        "n_shared_experts": moe.shared_width / moe.width, "n_group": moe.route.groups,
        "topk_group": moe.route.groups_used, "norm_topk_prob": moe.route.renormalise,
        "routed_scaling_factor": moe.route.scale, "rms_norm_eps": config.norm_eps, "rope_theta": a.rope.base,
        "max_position_embeddings": config.context_length,
    });
    std::fs::write(directory.join("config.json"), json.to_string()).unwrap();
}

/// Writes the model in all forms and compares.
fn check(modern: Checkpoint) {
    let name = modern.path().to_owned();
    let model = Model::new(modern).unwrap();
    let heads = model.config().attention.heads;
    let directory = tempfile::tempdir().unwrap();

    let Keys::Gguf(metadata) = model.checkpoint().keys() else { panic!("a GGUF file has GGUF keys") };
    let mut writer = GgufWriter::new();
    copy_keys(metadata, &mut writer, |_| true);
    for info in model.checkpoint().tensors() {
        writer.tensor(&info.name, common::random::ggml_type(info.runs().unwrap()), &info.shape).unwrap();
    }
    let copy = |tensor: &NewTensor, out: &mut dyn std::io::Write| {
        out.write_all(model.checkpoint().load(&tensor.name).unwrap().as_slice())
    };
    let parts = writer.write_split(&directory.path().join("split"), 3, copy).unwrap();
    let split = Model::open(&parts[1]).unwrap();
    let legacy = Model::new(as_legacy(model.checkpoint(), heads)).unwrap();
    let safetensors = tempfile::tempdir().unwrap();
    as_hugging_face(&model, safetensors.path(), None);
    let hugging_face = Model::open(safetensors.path()).unwrap();
    assert_eq!(hugging_face.config().attention, model.config().attention);

    let expected = run(model);
    for (form, model) in [("split", split), ("legacy", legacy), ("safetensors", hugging_face)] {
        match model.notices() {
            [] => assert_ne!(form, "safetensors"),
            [only] => assert!(form == "safetensors" && only.contains("are put together: "), "{form}: {only}"),
            more => panic!("{form}: {more:?}"),
        }
        assert!(run(model) == expected, "{}: {form}", name.display());
    }
}

#[test]
fn a_random_model() {
    let shape = Shape { yarn: None, ..Shape::default() };
    check(shape.file().checkpoint());
}

/// No form says that the head is the embedding: there is no other.
#[test]
fn a_tied_head() {
    check(Shape { yarn: None, tied: true, ..Shape::default() }.file().checkpoint());
}

#[test]
fn what_a_directory_lacks_is_named_as_it_would_be_there() {
    let model = Model::new(Shape { yarn: None, tied: true, ..Shape::default() }.file().checkpoint()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    as_hugging_face(&model, directory.path(), None);
    let file = directory.path().join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (key, value, name) in [
        ("tie_word_embeddings", false.into(), "lm_head.weight"),
        ("num_hidden_layers", 4.into(), "model.layers.3.input_layernorm.weight"),
        ("first_k_dense_replace", 2.into(), "model.layers.1.mlp.gate_proj.weight"),
    ] {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(&file, config.to_string()).unwrap();
        let error = Model::open(directory.path()).err().unwrap().to_string();
        let path = directory.path().display();
        assert_eq!(error, format!("{path}: tensor `{name}` is missing (expected a tensor of that name)"));
    }
}

/// As what is there and does not fit.
#[test]
fn what_does_not_fit_in_a_directory_is_named_as_it_is_there() {
    let model = Model::new(Shape { yarn: None, ..Shape::default() }.file().checkpoint()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    as_hugging_face(&model, directory.path(), None);
    let file = directory.path().join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (key, value, rest) in [
        ("vocab_size", 97, "`model.embed_tokens.weight`: expected shape [97, 64], found shape [96, 64]"),
        (
            "moe_intermediate_size",
            16,
            "`model.layers.1.mlp.experts.*.gate_proj.weight`: expected shape [16, 16, 64], found shape [16, 32, 64]",
        ),
    ] {
        let mut config = config.clone();
        config[key] = value.into();
        std::fs::write(&file, config.to_string()).unwrap();
        let error = Model::open(directory.path()).err().unwrap().to_string();
        let path = directory.path().join("model.safetensors");
        assert_eq!(error, format!("{}: tensor {rest}", path.display()));
    }
}

/// Errors of keys name the file, whichever of the two kinds they are, and once.
#[test]
fn errors_of_keys_name_the_file_once() {
    for (key, value, rest) in [
        (
            "deepseek2.attention.q_lora_rank",
            NewValue::from("some"),
            "key `deepseek2.attention.q_lora_rank`: expected u32, found string \"some\"",
        ),
        (
            "deepseek2.attention.temperature_scale",
            NewValue::from(f32::NAN),
            "deepseek2.attention.temperature_scale: expected a finite number, found NaN",
        ),
    ] {
        let mut file = Shape { q_lora: 0, ..Shape::default() }.keys();
        file.key(key, value);
        let error = Model::new(file.checkpoint()).err().unwrap().to_string();
        assert_eq!(error, format!("random.gguf: {rest}"));
    }
}

#[test]
fn austen() {
    let Some(models) = shared_models() else { return };
    check(Checkpoint::open(&models.join("austen-f16.gguf")).unwrap());
}

#[test]
fn what_fp8_takes_in_memory_is_told() {
    let model = Model::new(Shape { yarn: None, ..Shape::default() }.file().checkpoint()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    as_hugging_face(&model, directory.path(), Some("o_proj.weight"));
    // 3 layers of 64 × 72 codes, and a scale for each.
    let notices = Model::open(directory.path()).unwrap().notices().join("\n");
    assert!(notices.ends_with("54.0 KiB of memory for 13.5 KiB of the files"), "{notices}");
}

/// A host that has no room for what has to be made of the files says so before it tries.
#[test]
fn what_does_not_fit_main_memory_is_refused() {
    struct Small {
        cpu: CpuDevice,
        info: DeviceInfo,
    }
    impl Device for Small {
        passes_on!(cpu: supports allocate import write read compile);
        fn info(&self) -> &DeviceInfo {
            &self.info
        }
    }
    let model = Model::new(Shape { yarn: None, ..Shape::default() }.file().checkpoint()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    as_hugging_face(&model, directory.path(), None);
    let model = open(directory.path());
    let open = |memory_free: u64| {
        let cpu = CpuDevice::new(CpuOptions::default()).unwrap();
        let info = DeviceInfo { memory_free, ..cpu.info().clone() };
        let devices = Devices::new(vec![Arc::new(Small { cpu, info })]);
        Engine::new(&model, &devices, &Placement::default(), &Options::default()).map(|_| ())
    };
    let error = open(300_000).unwrap_err().to_string();
    let expected = "cpu: no memory for weights that are made of what the files have: ";
    assert!(error.contains(expected) && error.contains("300000 free"), "{error}");
    open(0).unwrap();
    open(1 << 30).unwrap();
}

/// Tokens that have no row in the embedding are told of, if a text can have them.
#[test]
fn a_vocabulary_that_the_embedding_is_too_small_for_is_told() {
    let notice = |unused: bool| {
        let rows = 96;
        let mut file = Shape { vocabulary: rows, ..Shape::default() }.file();
        let mut tokens: Vec<String> = (0..=255).map(|byte| tokenizer::letter(byte).to_string()).collect();
        tokens.truncate(rows);
        tokens.extend(["<pad>", "<more>"].map(String::from));
        let mut types = vec![1; rows];
        types.extend([5, if unused { 5 } else { 3 }]);
        file.key("tokenizer.ggml.model", "gpt2");
        file.key("tokenizer.ggml.pre", "deepseek-v3");
        file.key("tokenizer.ggml.tokens", tokens);
        file.key("tokenizer.ggml.token_type", types);
        file.key("tokenizer.ggml.merges", Vec::<String>::new());
        let model = Arc::new(Model::new(file.checkpoint()).unwrap());
        let id = model.tokenizer().unwrap().size() as u32 - 1;
        let error = engine(&model, &Options::default()).session().unwrap().feed(&[id]).unwrap_err();
        assert!(error.to_string().contains("token 97: expected one below 96"), "{error}");
        model.vocabulary_notice().unwrap()
    };
    assert_eq!(notice(true), None);
    let notice = notice(false).unwrap();
    assert!(
        notice.contains("96 rows") && notice.contains("1 of the tokens, from \"<more>\" (97) on"),
        "{notice}"
    );
}

/// What is not needed is named, what is needed and missing or wrong is an error before any weight is read.
#[test]
fn tensors_are_checked_at_open() {
    let open = |change: &dyn Fn(&mut Shape), extra: &[(&str, &[usize])]| {
        let mut shape = Shape::default();
        change(&mut shape);
        let mut file = shape.file();
        for (name, extents) in extra {
            file.tensor(name, DType::F32, extents, &vec![0.0; extents.iter().product()]);
        }
        Model::new(file.checkpoint())
    };
    let model =
        open(&|_| (), &[("rope_freqs.weight", &[4]), ("blk.3.nextn.eh_proj.weight", &[64, 128])]).unwrap();
    let notices = model.notices().join("\n");
    assert!(notices.contains("1 tensors are not used: rope_freqs.weight"), "{notices}");
    assert!(notices.contains("predict further tokens (from layer 3 on)"), "{notices}");
    let made = |shape: &mut Shape| shape.legacy = true;
    let half = open(&made, &[("blk.0.attn_v_b.weight", &[3, 24, 32]), ("model.rotary_emb.inv_freq", &[4])]);
    let notices = half.unwrap().notices().join("\n");
    assert!(notices.contains("not used: blk.0.attn_v_b.weight, model.rotary_emb.inv_freq"), "{notices}");
    // What is there and not computed with would be another model.
    for (extra, found) in [
        ("blk.0.attn_q_a.bias", "only tensors that this model computes with"),
        ("output.bias", "only tensors that this model computes with"),
        ("model.layers.0.self_attn.o_proj.bias", "only tensors that this model computes with"),
        ("blk.3.attn_norm.weight", "expected layers 0 to 2, as the keys say, found a tensor of layer 3"),
    ] {
        let error = open(&|_| (), &[(extra, &[64])]).err().unwrap().to_string();
        assert!(error.contains(&format!("`{extra}`")) && error.contains(found), "{error}");
    }
    // A rule for them is no mistake.
    let said = PlacementOptions {
        overrides: vec![Override::new("nextn", "cpu"), Override::new(r"blk\.[0-9]+\.nextn|attn_q", "cpu")],
        ..PlacementOptions::default()
    };
    let placed = said.place(&model, &common::cpu(), &Options::default()).unwrap();
    assert_eq!(
        placed.notices,
        ["override-tensor `nextn` has no effect: it matches 1 tensors, which are skipped"]
    );

    // A file whose keys say one thing and whose tensors another.
    let wrong = |keys: Shape, tensors: Shape, words: &[&str]| {
        let (from, mut file) = (tensors.file().checkpoint(), keys.keys());
        for info in from.tensors() {
            file.tensor(&info.name, info.runs().unwrap(), &info.shape, &values(&from, &info.name));
        }
        let error = Model::new(file.checkpoint()).err().unwrap().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let base = Shape::default;
    wrong(Shape { value: 25, ..base() }, base(), &["blk.0.attn_v_b.weight", "[3, 25, 32]", "[3, 24, 32]"]);
    wrong(Shape { layers: 4, ..base() }, base(), &["blk.3.attn_norm.weight", "missing"]);
    wrong(Shape { layers: 2, ..base() }, base(), &["`blk.2.", "layers 0 to 1, as the keys say"]);
    wrong(Shape { vocabulary: 97, ..base() }, base(), &["token_embd.weight", "[97, 64]", "[96, 64]"]);
    wrong(Shape { experts: 32, ..base() }, base(), &["blk.1.", "[16, "]);
    wrong(base(), Shape { shared: 0, ..base() }, &["blk.1.ffn_gate_shexp.weight", "missing"]);

    // A type that has a name but does not run.
    let file = Shape::default().file();
    let mut bytes = file.bytes();
    let name = b"blk.1.attn_output.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    let type_id = at + 4 + 2 * 8;
    assert_eq!(bytes[type_id], 1, "F16");
    bytes[type_id] = 24; // I8, half as long
    let checkpoint = Checkpoint::from_bytes(Path::new("random.gguf"), Arc::new(bytes)).unwrap();
    let error = Model::new(checkpoint).err().unwrap().to_string();
    assert!(["blk.1.attn_output.weight", "I8", "Q4_K"].iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn the_embedded_model_opens_without_a_word() {
    let model = open(&embedded());
    assert!(model.notices().is_empty(), "{:?}", model.notices());
    assert_eq!(model.config().layers(), 3);
    assert!(model.tokenizer().unwrap().chat_template().is_some());
}
