//! Text to ids and back, through the program.

mod common;
use common::{austen, keys, run, run_with, shared_models};
use std::fs;

const TOKENIZE: &str = env!("CARGO_BIN_EXE_tokenize");
const PLACEMENT: &str = env!("CARGO_BIN_EXE_placement");

const TEXTS: [&str; 7] = [
    "Emma Woodhouse, handsome, clever, and rich",
    "  leading and trailing  ",
    "naïve 文字 🙂\u{200d}🙂",
    "line\nbreaks\r\n\tand tabs",
    "<｜end▁of▁sentence｜>",
    "12345 + 67.8",
    "",
];

#[test]
fn lines_of_json_come_back_as_they_went() {
    let model = austen();
    let input: String = TEXTS.iter().map(|text| serde_json::to_string(text).unwrap() + "\n").collect();
    for special in [&[][..], &["--special"]] {
        let arguments = [&["--model", &model, "--jsonl"], special].concat();
        let ids = run_with(TOKENIZE, &arguments, &input).ok();
        assert_eq!(ids.lines().count(), TEXTS.len());
        let texts = run_with(TOKENIZE, &["--model", &model, "--jsonl", "--decode"], &ids).ok();
        let texts: Vec<String> = texts.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(texts, TEXTS);
    }
}

#[test]
fn control_tokens_are_parsed_only_on_request() {
    let model = austen();
    let ids = |more: &[&str]| {
        let arguments = [&["--model", &model, "--json", "--text", "a<｜end▁of▁sentence｜>"], more].concat();
        run(TOKENIZE, &arguments).json()["ids"].as_array().unwrap().len()
    };
    assert_eq!(ids(&["--special"]), 2);
    assert!(ids(&[]) > 2);
    assert_eq!(ids(&["--special", "--bos"]), 3);
}

#[test]
fn every_form_of_input_and_output_agrees() {
    let model = austen();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text");
    fs::write(&file, TEXTS[0]).unwrap();
    let file = file.to_str().unwrap();

    let json = run(TOKENIZE, &["--model", &model, "--text", TEXTS[0], "--json"]).json();
    assert_eq!(keys(&json), ["ids", "pieces"]);
    let pieces: String =
        json["pieces"].as_array().unwrap().iter().map(|piece| piece.as_str().unwrap()).collect();
    assert_eq!(pieces, TEXTS[0]);
    assert_eq!(run(TOKENIZE, &["--model", &model, "--file", file, "--json"]).json(), json);

    let lines = run(TOKENIZE, &["--model", &model, "--file", file]).ok();
    let ids: Vec<&str> = lines.lines().map(|line| line.split_once('\t').unwrap().0).collect();
    assert_eq!(format!("[{}]", ids.join(",")), json["ids"].to_string());
    assert_eq!(run(TOKENIZE, &["--model", &model, "--decode", "--text", &ids.join(" ")]).ok(), TEXTS[0]);
    let text =
        run(TOKENIZE, &["--model", &model, "--decode", "--json", "--text", &json["ids"].to_string()]).json();
    assert_eq!(text["text"], TEXTS[0]);
}

#[test]
fn bytes_that_are_no_text_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bytes");
    fs::write(&file, b"a\xff\xc3(\xe2\x82 b").unwrap();
    let json = run(TOKENIZE, &["--model", &austen(), "--json", "--file", file.to_str().unwrap()]).json();
    let ids = json["ids"].to_string();
    let text = run(TOKENIZE, &["--model", &austen(), "--decode", "--text", &ids]).ok();
    assert_eq!(text, "a\u{fffd}\u{fffd}(\u{fffd} b");
}

#[test]
fn half_a_surrogate_pair_does_not_end_the_stream() {
    let model = austen();
    let input = "\"a\\ud800b\"\n\"\\udfff\"\n\"\\ud83d\\ude42\"\n\"end\"\n";
    let ids = run_with(TOKENIZE, &["--model", &model, "--jsonl"], input).ok();
    let texts = run_with(TOKENIZE, &["--model", &model, "--jsonl", "--decode"], &ids).ok();
    let texts: Vec<String> = texts.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(texts, ["a\u{fffd}b", "\u{fffd}", "🙂", "end"]);
}

#[test]
fn blank_lines_are_skipped_and_counted() {
    let model = austen();
    let said = run_with(TOKENIZE, &["--model", &model, "--jsonl"], "\n\"one\"\n \t\r\n\"two\"\nthree\n");
    assert_eq!(said.out.lines().count(), 2, "{said:?}");
    assert!(said.err.contains("standard input, line 5: "), "{said:?}");
    let said = run_with(TOKENIZE, &["--model", &model, "--jsonl", "--decode"], "\n[1]\n\n").ok();
    assert_eq!(said.lines().count(), 1, "{said:?}");
}

#[test]
fn every_error_names_its_line_once() {
    let model = austen();
    let lines = |more: &[&str], good: &str, bad: &str, expected: &str| {
        let arguments = [&["--model", &model, "--jsonl"], more].concat();
        let said = run_with(TOKENIZE, &arguments, format!("{good}\n{bad}\n{good}\n"));
        assert_eq!((said.code, said.out.lines().count()), (Some(1), 1), "{said:?}");
        assert!(said.err.contains(&format!("error: standard input, line 2: {expected}")), "{said:?}");
        assert_eq!(said.err.matches("line ").count(), 1, "{said:?}");
    };
    let text = |bad, expected| lines(&[], "\"fine\"", bad, expected);
    text("[1]", "expected a JSON string: invalid type: sequence");
    text("\"open", "expected a JSON string: EOF while parsing a string, at column 5");
    text("\"\\x\"", "expected a JSON string: invalid escape, at column ");
    text("\"a\tb\"", "expected a JSON string: control character");
    let ids = |bad, expected| lines(&["--decode"], "[1]", bad, expected);
    ids("\"text\"", "expected a JSON array of ids: invalid type: string \"text\"");
    ids("[1, -2]", "expected a JSON array of ids: invalid value: integer `-2`");
    ids("[1, 2", "expected a JSON array of ids: EOF while parsing a list, at column 5");
    ids("[999999]", "token id 999999: expected one below 2048, the size of the vocabulary");
}

#[test]
fn what_is_wrong_in_the_input_is_named() {
    let model = austen();
    let error = run(TOKENIZE, &["--model", &model, "--decode", "--text", "1 x 2"]).error();
    assert!(error.contains("expected a token id, found \"x\""), "{error}");
    let error = run(TOKENIZE, &["--model", &model, "--decode", "--text", "999999"]).error();
    assert!(error.contains("999999") && error.contains("2048"), "{error}");
    let error = run(TOKENIZE, &["--model", &model, "--file", "no/such/text"]).error();
    assert!(error.contains("no/such/text: cannot be read"), "{error}");
}

#[test]
fn a_file_without_tensors_will_do() {
    let Some(models) = shared_models() else { return };
    let model = models.join("tokenizers/vocab-deepseek-llm.gguf");
    let json = run(TOKENIZE, &["--model", model.to_str().unwrap(), "--text", "Hello world", "--json"]).json();
    assert_eq!(json["pieces"], serde_json::json!(["Hello", " world"]));
}

/// A file that was cut after its keys, and the first of nine files without the others: no model, but a tokenizer.
#[test]
fn keys_alone_will_do() {
    let whole = fs::read(austen()).unwrap();
    let expected = run(TOKENIZE, &["--model", &austen(), "--text", TEXTS[0]]).ok();
    // Two more keys (u16), in front.
    let key = |name: &str, value: u16| {
        let parts =
            [&name.len().to_le_bytes()[..], name.as_bytes(), &2u32.to_le_bytes(), &value.to_le_bytes()];
        parts.concat()
    };
    let keys = u64::from_le_bytes(whole[16..24].try_into().unwrap()) + 2;
    let split = [key("split.no", 0), key("split.count", 9)].concat();
    let split = [&whole[..16], &keys.to_le_bytes(), &split, &whole[24..], &[0; 64]].concat();
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.gguf");
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let set = folder.path().join("set");
    fs::create_dir(&set).unwrap();
    let first = set.join("m-00001-of-00009.gguf");
    fs::write(&first, &split).unwrap();
    // Another one has no keys of the model.
    let other = set.join("m-00003-of-00009.gguf");
    fs::write(&other, [&whole[..8], &[0; 16]].concat()).unwrap();
    for model in [&cut, &first, &set, &other] {
        let model = model.to_str().unwrap();
        assert_eq!(run(TOKENIZE, &["--model", model, "--text", TEXTS[0]]).ok(), expected, "{model}");
    }
    // To run, a model has to be whole.
    for (model, words) in [(&cut, "within the"), (&first, "file `m-00002-of-00009.gguf` is missing")] {
        let error =
            run(PLACEMENT, &["--model", model.to_str().unwrap(), "--device", "null:gpu:1GiB"]).error();
        assert!(error.contains(words), "{error}");
    }
    // The others alone have no tokenizer, and a file cut within its keys has not all of them.
    fs::remove_file(&first).unwrap();
    let error = run(TOKENIZE, &["--model", other.to_str().unwrap(), "--text", ""]).error();
    assert!(error.contains("m-00003-of-00009.gguf: key `tokenizer.ggml.model` is missing"), "{error}");
    fs::write(&cut, &whole[..5000]).unwrap();
    let error = run(TOKENIZE, &["--model", cut.to_str().unwrap(), "--text", ""]).error();
    assert!(error.contains("cut.gguf: key `"), "{error}");
}
