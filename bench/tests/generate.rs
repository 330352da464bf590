//! From a prompt to a text.
#![cfg(feature = "cpu")]

mod common;
use common::{austen, keys, run, run_with};
use std::fs;

const GENERATE: &str = env!("CARGO_BIN_EXE_generate");

#[test]
fn without_any_option_a_paragraph_is_written() {
    let said = run(GENERATE, &[]);
    let rates = said.err.clone();
    let text = said.ok();
    assert!(text.starts_with("It was a truth") && text.ends_with('\n'), "{text}");
    assert!(text.split_whitespace().count() > 60, "{text}");
    assert!(rates.contains("prefill: ") && rates.contains(" tokens/s)"), "{rates}");
    assert!(rates.contains("seed "), "a seed from the clock is told: {rates}");
}

#[test]
fn a_seed_gives_the_same_text_with_any_threads_and_pieces_of_the_prompt() {
    let prompt = "Mr. Knightley, who had been walking about the room for some time, at last said";
    let write = |more: &[&str]| {
        let arguments = ["--seed", "7", "--predict", "30", "--prompt", prompt];
        run(GENERATE, &[&arguments, more].concat()).ok()
    };
    let text = write(&[]);
    for more in [["--threads", "1"], ["--threads", "3"], ["--batch", "1"], ["--batch", "7"]] {
        assert_eq!(write(&more), text, "{more:?}");
    }
    assert_ne!(run(GENERATE, &["--seed", "8", "--predict", "30", "--prompt", prompt]).ok(), text);
}

#[test]
fn the_embedded_model_is_that_of_the_file() {
    let arguments = ["--seed", "3", "--predict", "20"];
    let model = austen();
    let embedded = run(GENERATE, &arguments).ok();
    assert_eq!(run(GENERATE, &[&arguments[..], &["--model", &model]].concat()).ok(), embedded);
}

#[test]
fn json_has_the_text_its_tokens_and_the_rates() {
    let arguments = ["--prompt", "Emma", "--predict", "12", "--temperature", "0"];
    let json = run(GENERATE, &[&arguments[..], &["--json"]].concat()).json();
    assert_eq!(keys(&json), ["decode_tok_s", "prefill_tok_s", "text", "tokens"]);
    assert_eq!(json["tokens"].as_array().unwrap().len(), 12);
    assert!(json["prefill_tok_s"].as_f64().unwrap() > 0.0 && json["decode_tok_s"].as_f64().unwrap() > 0.0);
    let plain = run(GENERATE, &arguments).ok();
    assert_eq!(plain, format!("{}\n", json["text"].as_str().unwrap()));
}

#[test]
fn a_prompt_may_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "Emma").unwrap();
    let more = ["--predict", "8", "--temperature", "0"];
    let from_file = run(GENERATE, &[&["--prompt-file", file.to_str().unwrap()], &more[..]].concat()).ok();
    assert_eq!(run(GENERATE, &[&["--prompt", "Emma"], &more[..]].concat()).ok(), from_file);
    let error = run(GENERATE, &["--prompt-file", "no/such/prompt"]).error();
    assert!(error.contains("no/such/prompt: cannot be read"), "{error}");
}

#[test]
fn an_empty_prompt_is_an_error() {
    assert_eq!(run(GENERATE, &["--prompt", ""]).error(), "error: the prompt is empty");
}

#[test]
fn a_prompt_longer_than_the_context_is_an_error() {
    let prompt = "word ".repeat(100);
    let error = run(GENERATE, &["--ctx", "16", "--prompt", &prompt]).error();
    assert!(error.contains("the context 16: give --ctx more"), "{error}");
}

#[test]
fn a_full_context_ends_the_text() {
    let arguments = ["--ctx", "16", "--predict", "100", "--prompt", "Emma", "--temperature", "0", "--json"];
    let json = run(GENERATE, &arguments).json();
    let tokens = json["tokens"].as_array().unwrap().len();
    assert!((4..=16).contains(&tokens), "{json}");
}

#[test]
fn every_cache_type_writes_text() {
    for cache in ["f16", "f32", "q8_0"] {
        let text = run(GENERATE, &["--seed", "1", "--predict", "10", "--cache-type", cache]).ok();
        assert!(text.split_whitespace().count() > 4, "{cache}: {text}");
    }
}

#[test]
fn a_conversation_answers_every_line() {
    let arguments = ["--chat", "--predict", "10", "--temperature", "0"];
    let said = run_with(GENERATE, &arguments, "How do you do?\n\nAnd your mother?\n");
    let rates = said.err.lines().filter(|line| line.starts_with("prefill: ")).count();
    let text = said.ok();
    assert_eq!(rates, 2, "an empty line asks nothing");
    assert!(text.lines().count() >= 2, "{text}");
}
