//! Made-up models: whole files, of the types that were asked for, that run.

mod common;
use backend_api::DType;
use common::run;
use model_deepseek::{Model, source::Checkpoint};
use std::{fs, path::Path};

const SYNTH: &str = env!("CARGO_BIN_EXE_synth");

const FORMATS: [(&str, DType); 15] = [
    ("f32", DType::F32),
    ("f16", DType::F16),
    ("bf16", DType::BF16),
    ("q8_0", DType::Q8_0),
    ("q4_0", DType::Q4_0),
    ("q4_1", DType::Q4_1),
    ("q5_0", DType::Q5_0),
    ("q5_1", DType::Q5_1),
    ("q2_k", DType::Q2_K),
    ("q3_k_m", DType::Q3_K),
    ("q4_k_m", DType::Q4_K),
    ("q5_k_m", DType::Q5_K),
    ("q6_k", DType::Q6_K),
    ("iq4_nl", DType::IQ4_NL),
    ("iq4_xs", DType::IQ4_XS),
];

fn make(file: &Path, more: &[&str]) {
    run(SYNTH, &[&["--out", file.to_str().unwrap()], more].concat()).ok();
}

#[test]
fn every_format_makes_a_model_that_writes() {
    let folder = tempfile::tempdir().unwrap();
    for (name, dtype) in FORMATS {
        let file = folder.path().join(format!("{name}.gguf"));
        make(&file, &["--shape", "tiny", "--layers", "2", "--format", name]);
        let model = Model::open(&file).unwrap();
        assert!(model.notices().is_empty(), "{name}: {:?}", model.notices());
        assert_eq!(model.checkpoint().tensor("blk.0.ffn_up.weight").unwrap().runs().unwrap(), dtype);
        if cfg!(feature = "cpu") {
            let model = file.to_str().unwrap();
            let arguments =
                ["--model", model, "--predict", "4", "--temperature", "0", "--prompt", "the band", "--json"];
            let json = run(env!("CARGO_BIN_EXE_generate"), &arguments).json();
            assert_eq!(json["tokens"].as_array().unwrap().len(), 4, "{name}: {json}");
        }
    }
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), FORMATS.len(), "nothing else is left: {left:?}");
}

#[test]
fn layers_that_mean_another_model_to_llama_cpp_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("v3.gguf");
    for layers in ["26", "27"] {
        let arguments = [
            "--out",
            file.to_str().unwrap(),
            "--shape",
            "v3",
            "--format",
            "q4_0",
            "--layers",
            layers,
            "--header-only",
        ];
        let error = run(SYNTH, &arguments).error();
        assert!(error.contains("--layers: 26 and 27 layers mean DeepSeek-V2-Lite"), "{error}");
    }
    assert!(!file.exists());
}

#[test]
fn a_seed_gives_the_same_file_and_layers_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str, more: &[&str]| {
        let file = folder.path().join(name);
        make(&file, &[&["--shape", "tiny", "--format", "q4_k_m"], more].concat());
        file
    };
    let one = make("one.gguf", &[]);
    assert_eq!(fs::read(&one).unwrap(), fs::read(make("same.gguf", &["--seed", "0"])).unwrap());
    assert_ne!(fs::read(&one).unwrap(), fs::read(make("other.gguf", &["--seed", "1"])).unwrap());
    let short = Checkpoint::open(&make("short.gguf", &["--layers", "3"])).unwrap();
    let one = Checkpoint::open(&one).unwrap();
    let name = "blk.1.ffn_gate_exps.weight";
    assert_eq!(one.load(name).unwrap().as_slice(), short.load(name).unwrap().as_slice());
}

#[test]
fn a_header_of_every_shape_is_sparse_and_plans() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("header.gguf");
    let shapes =
        [("v2-lite", 27), ("v2", 60), ("v3", 61), ("kimi-k2", 61), ("moonlight", 27), ("glm-4.7-flash", 47)];
    for (shape, layers) in shapes {
        make(&file, &["--shape", shape, "--format", "q4_k_m", "--header-only"]);
        let metadata = fs::metadata(&file).unwrap();
        assert!(metadata.len() > 5_000_000_000, "{shape}: {} bytes", metadata.len());
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            assert!(metadata.blocks() * 512 < 50_000_000, "{shape}: {} blocks", metadata.blocks());
        }
        let model = Model::open(&file).unwrap();
        assert_eq!(model.config().layers(), layers, "{shape}");
        assert!(model.notices().is_empty(), "{shape}: {:?}", model.notices());
        assert_eq!(model.tokenizer().unwrap().size(), model.config().vocabulary, "{shape}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_named() {
    let error = run(SYNTH, &["--shape", "tiny", "--format", "f16", "--out", "no/such/folder/x.gguf"]).error();
    assert!(error.contains("no/such/folder/x.gguf: cannot be written"), "{error}");
}
