//! What users get wrong: help that answers, errors that say what to do.

mod common;
use common::{austen, keys, run};
use std::fs;

const PROGRAMS: [(&str, &str); 6] = [
    ("generate", env!("CARGO_BIN_EXE_generate")),
    ("perplexity", env!("CARGO_BIN_EXE_perplexity")),
    ("throughput", env!("CARGO_BIN_EXE_throughput")),
    ("placement", env!("CARGO_BIN_EXE_placement")),
    ("tokenize", env!("CARGO_BIN_EXE_tokenize")),
    ("synth", env!("CARGO_BIN_EXE_synth")),
];

#[test]
fn help_names_every_option_of_the_program() {
    let options = [
        "--model --prompt --prompt-file --predict --ctx --threads --temperature --top-k --top-p --min-p \
         --repeat-penalty --seed --cache-type --chat --json --verbose",
        "--model --text --ctx --reference --activations --cache-type --threads --batch --json",
        "--model --prefill --decode --depth --repeat --threads --format --verbose",
        "--model --tokens --kv-len --ctx --format --compare",
        "--model --text --file --jsonl --special --decode --bos --json",
        "--shape --layers --format --out --header-only --seed",
    ];
    let placement = "--list-devices --device --n-gpu-layers --override-tensor --cpu-moe --n-cpu-moe --n-cpu-ffn --no-kv-offload \
                     --kv-layers-on --absorb --strict --ownership-check --fit -ngl -ot -cmoe -ncmoe -nkvo";
    for (index, ((name, program), options)) in PROGRAMS.into_iter().zip(options).enumerate() {
        let help = run(program, &["--help"]).ok();
        let placement = if index < 4 { placement } else { "" };
        for option in options.split_whitespace().chain(placement.split_whitespace()) {
            assert!(help.contains(option), "{name} --help does not mention {option}");
        }
    }
}

#[test]
fn an_unknown_option_is_an_error_of_usage() {
    for (name, program) in PROGRAMS {
        let said = run(program, &["--nonsense"]);
        assert_eq!(said.code, Some(2), "{name}: {said:?}");
        assert!(said.err.contains("--nonsense") && said.out.is_empty(), "{name}: {said:?}");
    }
}

#[test]
fn a_model_that_cannot_be_opened_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let text = folder.path().join("text.gguf");
    fs::write(&text, "It is a truth universally acknowledged").unwrap();
    let text = text.to_str().unwrap();
    for (name, program) in &PROGRAMS[..5] {
        let more: &[&str] = match *name {
            "perplexity" | "tokenize" => &["--text", text],
            _ => &[],
        };
        for path in ["no/such/file.gguf", empty, text] {
            let error = run(program, &[&["--model", path], more].concat()).error();
            assert!(error.contains(path), "{name}: {error}");
        }
    }
}

#[test]
fn a_device_that_does_not_exist_is_named() {
    let model = austen();
    for (name, program) in &PROGRAMS[..4] {
        let more: &[&str] = if *name == "perplexity" { &["--text", &model] } else { &[] };
        let arguments = [&["--model", &model, "--device", "gpu7"], more].concat();
        let said = run(program, &arguments);
        assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{name}: {said:?}");
        let expected =
            "error: invalid value 'gpu7' for '--device <NAME>': no such device: expected cpu, cpu1, vulkan0";
        assert!(said.err.starts_with(expected), "{name}: {}", said.err);
    }
}

#[test]
fn a_device_that_was_not_compiled_in_says_which_feature_brings_it() {
    let error = run(PROGRAMS[0].1, &["--device", "vulkan99"]).error();
    assert!(error.starts_with("error: --device vulkan99: "), "{error}");
    if cfg!(feature = "vulkan") {
        assert!(error.contains("does not exist") || error.contains("Vulkan loader"), "{error}");
    } else {
        assert!(error.contains("--features vulkan"), "{error}");
    }
}

#[test]
fn devices_are_listed_without_a_model() {
    for (name, program) in &PROGRAMS[..4] {
        let json: &[&str] = match *name {
            "generate" | "perplexity" => &["--json"],
            _ => &["--format", "json"],
        };
        let listing = run(program, &[&["--list-devices"], json].concat()).json();
        assert_eq!(keys(&listing), ["devices", "missing"], "{name}");
        let devices = listing["devices"].as_array().unwrap();
        for device in devices {
            let expected =
                ["description", "kind", "memory_free", "memory_total", "name", "offers", "refused"];
            assert_eq!(keys(device), expected, "{name}");
        }
        let table = run(program, &["--list-devices"]).ok();
        let names: Vec<&str> = devices.iter().map(|device| device["name"].as_str().unwrap()).collect();
        for (name, device) in names.iter().zip(devices) {
            let description = device["description"].as_str().unwrap();
            let line = |line: &str| line.starts_with(name) && line.ends_with(description);
            assert!(table.lines().any(line), "{name}: {table}");
        }
        assert_eq!(names.contains(&"cpu"), cfg!(feature = "cpu"), "{table}");
        // What is not there is told, and which feature brings it.
        let has_vulkan = names.iter().any(|name| name.starts_with("vulkan"));
        assert_eq!(table.contains("--features vulkan"), cfg!(not(feature = "vulkan")), "{table}");
        assert_eq!(table.contains("--features cpu"), cfg!(not(feature = "cpu")), "{table}");
        if cfg!(feature = "vulkan") && !has_vulkan {
            assert!(table.contains("Vulkan loader"), "{table}");
        }
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let model = austen();
    let generate = PROGRAMS[0].1;
    let cases: [(&[&str], &str); 7] = [
        (&["--temperature", "-1"], "temperature: expected 0 or more, found -1"),
        (&["--top-p", "0"], "top-p: expected more than 0"),
        (&["--min-p", "2"], "min-p: expected 0 to 1"),
        (&["--repeat-penalty", "NaN"], "repeat-penalty"),
        (&["--ctx", "0"], "context: expected 1 to"),
        (&["--batch", "0"], "batch: expected at least 1"),
        (&["--threads", "0"], "expected 1 to 4096 threads, found 0"),
    ];
    for (arguments, expected) in cases {
        if cfg!(feature = "cpu") {
            let error = run(generate, arguments).error();
            assert!(error.contains(expected), "{arguments:?}: {error}");
        }
    }
    let perplexity = PROGRAMS[1].1;
    let error = run(perplexity, &["--model", &model, "--text", &model, "--ctx", "1"]).error();
    assert!(error.contains("--ctx: expected at least 4, found 1"), "{error}");
}

#[test]
fn one_file_of_a_directory_is_told_to_give_the_directory() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json"] {
        let file = folder.path().join(name);
        fs::write(&file, "{}").unwrap();
        let file = file.to_str().unwrap();
        for (name, program) in &PROGRAMS[..5] {
            let more: &[&str] = match *name {
                "perplexity" | "tokenize" => &["--text", file],
                _ => &[],
            };
            let error = run(program, &[&["--model", file], more].concat()).error();
            let directory = format!("or the directory `{}` as a whole", folder.path().display());
            assert!(error.contains(file) && error.contains(&directory), "{name}: {error}");
        }
    }
}

#[test]
fn a_context_beyond_the_trained_one_is_told_once() {
    if cfg!(not(feature = "cpu")) {
        return;
    }
    let notices = |ctx: &str| {
        let said = run(PROGRAMS[0].1, &["--predict", "1", "--ctx", ctx]);
        let notices: Vec<String> =
            said.err.lines().filter(|line| line.starts_with("notice: ")).map(str::to_owned).collect();
        said.ok();
        notices
    };
    assert_eq!(notices("2048"), [""; 0]);
    assert_eq!(notices("2049"), ["notice: a context of 2049 tokens, but the model was trained for 2048"]);
}
