//! Figures that others compare: perplexity, distance from a reference, throughput.
#![cfg(feature = "cpu")]

mod common;
use bench::npy::Matrix;
use common::{austen, keys, run, shared_models};
use model_deepseek::{Engine, Model, Options, Wanted};
use serde_json::{Value, json};
use std::{fs, path::Path, sync::Arc};

const PERPLEXITY: &str = env!("CARGO_BIN_EXE_perplexity");
const THROUGHPUT: &str = env!("CARGO_BIN_EXE_throughput");

/// Writes a reference whose logits are those of the library, so that the program's distance from it is zero.
fn write_reference(folder: &Path, tokens: &[u32], rows: &[usize]) -> String {
    let model = Arc::new(Model::open(austen().as_ref()).unwrap());
    let cpu = backend_cpu::CpuDevice::new(backend_cpu::CpuOptions::default()).unwrap();
    let devices = graph::Devices::new(vec![Arc::new(cpu)]);
    let engine = Engine::new(&model, &devices, &graph::Placement::default(), &Options::default()).unwrap();
    let mut values = Vec::new();
    let mut keep = |_: usize, logits: &[f32]| values.extend_from_slice(logits);
    let mut session = engine.session().unwrap();
    session.feed_with(tokens, Wanted::Rows(rows), &mut keep, &mut backend_api::Discard).unwrap();
    let logits = Matrix { rows: rows.len(), columns: model.config().vocabulary, values };
    let reference = json!({ "tokens": tokens, "rows": rows, "logits": "logits.npy", "mean_nll": 1.5 });
    common::write_reference(folder, "reference", &reference, &logits)
}

#[test]
fn the_distance_from_its_own_logits_is_zero_however_the_tokens_are_fed() {
    let folder = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..20).map(|i| i * 97 % 2048).collect();
    let reference = write_reference(folder.path(), &tokens, &[0, 3, 4, 19]);
    for batch in ["512", "7", "1"] {
        let json =
            run(PERPLEXITY, &["--model", &austen(), "--reference", &reference, "--batch", batch]).json();
        let expected =
            ["argmax_agreement", "max_abs", "mean_nll", "median_row_nmse", "nmse", "reference_nll"];
        assert_eq!(keys(&json), expected);
        assert_eq!((&json["nmse"], &json["max_abs"]), (&json!(0.0), &json!(0.0)), "--batch {batch}");
        assert_eq!((&json["argmax_agreement"], &json["reference_nll"]), (&json!(1.0), &json!(1.5)));
        assert!(json["mean_nll"].as_f64().unwrap() > 1.0);
    }
    // f32 activations are something else.
    let arguments = ["--model", &austen(), "--reference", &reference, "--activations", "f32"];
    assert!(run(PERPLEXITY, &arguments).json()["nmse"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_reference_that_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_reference(folder.path(), &[1, 2, 3, 4], &[1, 3]);
    let good: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let cases = [
        ("tokens", json!([1]), "key `tokens`: expected at least 2, found 1"),
        ("tokens", json!([1, 2]), "key `rows`: expected numbers below 2, the tokens, found 3"),
        ("tokens", json!([1, 2, 3, 5000]), "token 5000"),
        ("tokens", json!("text"), "invalid type"),
        ("rows", json!([1]), "key `rows`: expected 2 rows"),
        ("logits", json!("other.npy"), "other.npy: cannot be read"),
        ("logits", json!("reference.json"), "expected a .npy file"),
        ("logits", json!("../logits.npy"), "key `logits`: expected the name of a file beside it"),
        ("logits", json!("./logits.npy"), "found \"./logits.npy\""),
        ("logits", json!("/dev/null"), "found \"/dev/null\""),
        ("logits", json!(".."), "found \"..\""),
        ("logits", json!(""), "found \"\""),
    ];
    for (key, value, expected) in cases {
        let mut bad = good.clone();
        bad[key] = value;
        fs::write(&file, bad.to_string()).unwrap();
        let error = run(PERPLEXITY, &["--model", &austen(), "--reference", &file]).error();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_text_has_a_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text");
    fs::write(&file, "She was very much pleased with the house, and said so to her sister. ".repeat(8))
        .unwrap();
    let file = file.to_str().unwrap();
    let arguments = ["--model", &austen(), "--text", file, "--ctx", "32"];
    let json = run(PERPLEXITY, &[&arguments[..], &["--json"]].concat()).json();
    let expected = ["chunks", "ctx", "error", "nll", "perplexity", "scored_tokens", "tokens"];
    assert_eq!(keys(&json), expected);
    let number = |key: &str| json[key].as_f64().unwrap();
    assert_eq!(number("scored_tokens"), 15.0 * number("chunks"));
    assert!((number("nll").exp() / number("perplexity") - 1.0).abs() < 1e-9);
    assert!((1.5..100.0).contains(&number("perplexity")), "{json}");
    let text = run(PERPLEXITY, &arguments).ok();
    assert!(text.starts_with(&format!("PPL = {:.4} +/- ", number("perplexity"))), "{text}");
    let error = run(PERPLEXITY, &["--model", &austen(), "--text", file, "--ctx", "1024"]).error();
    assert!(error.contains("expected at least 2048 tokens for --ctx 1024"), "{error}");
}

/// A figure of logits that are no numbers would say nothing, and JSON would have it as null.
#[test]
fn logits_that_are_no_numbers_have_no_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let reference = write_reference(folder.path(), &[1, 2, 3, 4], &[1, 3]);
    let mut file = fs::read(austen()).unwrap();
    let norm = Model::open(austen().as_ref()).unwrap().checkpoint().load("output_norm.weight").unwrap().range;
    file[norm.start..norm.start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let (model, text) = (folder.path().join("broken.gguf"), folder.path().join("text"));
    fs::write(&model, file).unwrap();
    fs::write(&text, "She was very much pleased with the house. ".repeat(8)).unwrap();
    let [model, text] = [&model, &text].map(|path| path.to_str().unwrap());
    let expected = "position 0: the logit of token 0: expected a finite number, found NaN";
    let error = run(PERPLEXITY, &["--model", model, "--reference", &reference]).error();
    assert!(error.contains(expected), "{error}");
    let error = run(PERPLEXITY, &["--model", model, "--text", text, "--ctx", "32", "--json"]).error();
    assert!(
        error.contains("chunk 1: position 16: the logit of token 0: expected a finite number"),
        "{error}"
    );
}

/// A passage of Jane Austen's Emma (volume III, chapter 18) that the embedded model was not trained on, against what
/// float64 arithmetic of the unabsorbed form gives for it, the method of the references beside the shared models. No
/// choice of experts is nearer to a tie than 5e-4, so that rounding to f32 flips none.
#[test]
fn the_embedded_model_predicts_emma_as_float64_does() {
    const NLL: f64 = 3.409_600_256_17;
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/emma.txt");
    let measure = |more: &[&str]| {
        let model = austen();
        let arguments = ["--model", &model, "--text", text, "--ctx", "256", "--json"];
        run(PERPLEXITY, &[&arguments[..], more].concat()).json()
    };
    let exact = measure(&["--activations", "f32", "--cache-type", "f32"]);
    let nll = exact["nll"].as_f64().unwrap();
    assert!((nll - NLL).abs() < 1e-7, "expected {NLL}, found {exact}");
    assert_eq!(
        (&exact["chunks"], &exact["tokens"], &exact["scored_tokens"]),
        (&json!(4), &json!(1144), &json!(508))
    );

    let default = measure(&[]);
    let deviation = default["perplexity"].as_f64().unwrap() / NLL.exp() - 1.0;
    assert!(deviation.abs() < 0.005, "{deviation}: {default}");
    assert_eq!(measure(&["--batch", "77", "--threads", "1"]), default);
}

/// What llama.cpp gives for a format: a row of the table in the README.md beside the models.
fn llama_perplexity(readme: &str, format: &str) -> f64 {
    let (_, table) = readme.split_once("## Perplexity of the held-out text, ctx 256").unwrap();
    let rows = table.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let row =
        rows.into_iter().find(|cells| cells.get(1).is_some_and(|name| name.eq_ignore_ascii_case(format)));
    row.unwrap_or_else(|| panic!("no row for {format}"))[3].parse().unwrap()
}

#[test]
fn perplexity_is_that_of_llama_cpp() {
    let Some(models) = shared_models() else { return };
    let readme = fs::read_to_string(models.join("README.md")).unwrap();
    let text = models.join("austen-heldout.txt");
    for format in ["f16", "q8_0", "q5_1", "q4_k_m", "q2_k", "iq4_xs"] {
        let model = models.join(format!("austen-{format}.gguf"));
        let [model, text] = [&model, &text].map(|path| path.to_str().unwrap());
        let json = run(PERPLEXITY, &["--model", model, "--text", text, "--ctx", "256", "--json"]).json();
        let (found, expected) = (json["perplexity"].as_f64().unwrap(), llama_perplexity(&readme, format));
        let deviation = found / expected - 1.0;
        println!("{format}: {found:.4}, llama.cpp {expected:.4}: {:+.3} %", 100.0 * deviation);
        let bound = if format == "f16" { 0.001 } else { 0.005 };
        assert!(deviation.abs() < bound, "{format}: {json}, llama.cpp {expected}");
        assert_eq!(json["chunks"], json!(47), "{format}");
    }
}

#[test]
fn exact_arithmetic_gives_the_float64_references() {
    let Some(models) = shared_models() else { return };
    let cases = [
        ("austen-f16", 1e-9),
        ("austen-q4_k_m", 1e-6),
        ("austen-q2_k", 1e-6),
        ("austen-iq4_xs", 1e-6),
        ("shapes/v2lite-like-f16", 1e-9),
        ("shapes/v3-like-f16", 1e-9),
    ];
    for (name, bound) in cases {
        let (model, reference) = (models.join(format!("{name}.gguf")), models.join(format!("{name}.json")));
        let paths = ["--model", model.to_str().unwrap(), "--reference", reference.to_str().unwrap()];
        let exact = ["--activations", "f32", "--cache-type", "f32"];
        let json = run(PERPLEXITY, &[&paths[..], &exact].concat()).json();
        assert!(json["nmse"].as_f64().unwrap() <= bound, "{name}: {json}");
        assert_eq!(json["argmax_agreement"], json!(1.0), "{name}");
    }
}

#[test]
fn a_hugging_face_directory_gives_the_logits_of_the_gguf_file() {
    let Some(models) = shared_models() else { return };
    let reference = models.join("shapes/v3-like-f16.json");
    let compare = |model: &str| {
        let model = models.join(model);
        let arguments = ["--model", model.to_str().unwrap(), "--reference", reference.to_str().unwrap()];
        run(PERPLEXITY, &arguments).json()
    };
    assert_eq!(compare("shapes/v3-like-hf"), compare("shapes/v3-like-f16.gguf"));
}

#[test]
fn throughput_says_what_was_measured() {
    let arguments =
        ["--model", &austen(), "--prefill", "8,16", "--decode", "4", "--depth", "0,32", "--repeat", "2"];
    let json = run(THROUGHPUT, &[&arguments[..], &["--format", "json", "--threads", "1"]].concat()).json();
    assert_eq!(keys(&json), ["model", "roofline", "tests", "threads"]);
    assert_eq!(keys(&json["roofline"]), ["int8_gmac_s", "read_gb_s"]);
    assert_eq!(json["threads"], json!(1));
    let tests = json["tests"].as_array().unwrap();
    let names: Vec<_> = tests
        .iter()
        .map(|test| (test["test"].as_str().unwrap(), test["tokens"].as_u64(), test["depth"].as_u64()))
        .collect();
    let of = |kind, tokens, depth| (kind, Some(tokens), Some(depth));
    let one = |depth| [of("prefill", 8, depth), of("prefill", 16, depth), of("decode", 4, depth)];
    assert_eq!(names, [one(0), one(32)].concat());
    for test in tests {
        let expected = [
            "all",
            "depth",
            "dispatches",
            "gb_s",
            "median_tok_s",
            "share_of_limit",
            "share_outside",
            "submissions",
            "test",
            "tokens",
        ];
        assert_eq!(keys(test), expected);
        assert_eq!(test["all"].as_array().unwrap().len(), 2);
        let outside = test["share_outside"].as_f64().unwrap();
        assert!(
            (0.0..1.0).contains(&outside),
            "{outside}: operations take some of the time, and no more than all"
        );
        assert!(
            test["median_tok_s"].as_f64().unwrap() > 0.0 && test["gb_s"].as_f64().unwrap() > 0.0,
            "{test}"
        );
    }
}

#[test]
fn one_of_prefill_and_decode_leaves_the_other_out() {
    let table = |which: &str| run(THROUGHPUT, &["--model", &austen(), which, "4", "--repeat", "1"]).ok();
    let prefill = table("--prefill");
    assert!(prefill.contains("| pp4 |") && !prefill.contains("| tg"), "{prefill}");
    let decode = table("--decode");
    assert!(decode.contains("| tg4 |") && !decode.contains("| pp"), "{decode}");
}
