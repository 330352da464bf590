//! Vocabularies that are wrong: each error names the file and the key, and says what was expected and what is there.

use model_deepseek::{
    source::{Checkpoint, Keys},
    tokenizer::{Special, Tokenizer, TokenizerError, Vocabulary},
};
use std::{path::Path, sync::Arc};

/// A value of a GGUF file.
#[derive(Clone)]
enum Value {
    Text(&'static str),
    Number(u32),
    Texts(Vec<&'static [u8]>),
    Numbers(Vec<i32>),
}
use Value::{Number, Numbers, Text, Texts};

/// A GGUF file (version 3) of metadata alone.
fn gguf(entries: &[(&str, Value)]) -> Vec<u8> {
    let string = |out: &mut Vec<u8>, text: &[u8]| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text);
    };
    let mut out = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        string(&mut out, key.as_bytes());
        match value {
            Text(text) => {
                out.extend(8u32.to_le_bytes());
                string(&mut out, text.as_bytes());
            }
            Number(number) => {
                out.extend(4u32.to_le_bytes());
                out.extend(number.to_le_bytes());
            }
            Texts(texts) => {
                out.extend([9, 8].map(u32::to_le_bytes).concat());
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| string(&mut out, text));
            }
            Numbers(numbers) => {
                out.extend([9, 5].map(u32::to_le_bytes).concat());
                out.extend((numbers.len() as u64).to_le_bytes());
                numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
            }
        }
    }
    out
}

/// A file that is as it should be.
fn good() -> Vec<(&'static str, Value)> {
    vec![
        ("tokenizer.ggml.model", Text("gpt2")),
        ("tokenizer.ggml.pre", Text("deepseek-v3")),
        ("tokenizer.ggml.tokens", Texts(vec![b"a", b"b", b"ab", b"<x>", b"[PAD4]"])),
        ("tokenizer.ggml.token_type", Numbers(vec![1, 1, 1, 3, 5])),
        ("tokenizer.ggml.merges", Texts(vec![b"a b"])),
        ("tokenizer.ggml.bos_token_id", Number(3)),
    ]
}

/// What becomes of the good file with one key replaced, added or (`None`) left out.
fn open(key: &str, value: Option<Value>) -> Result<Tokenizer, TokenizerError> {
    let mut entries: Vec<(&str, Value)> = good().into_iter().filter(|(name, _)| *name != key).collect();
    entries.extend(value.map(|value| (key, value)));
    let checkpoint = Checkpoint::from_bytes(Path::new("bad.gguf"), Arc::new(gguf(&entries))).unwrap();
    let Keys::Gguf(metadata) = checkpoint.keys() else { unreachable!("a GGUF file") };
    Tokenizer::from_gguf(metadata)
}

#[test]
fn gguf_files() {
    assert!(open("unrelated", None).is_ok());
    let long: &[u8] = vec![b'x'; (16 << 20) + 1].leak();
    for (key, value, words) in [
        ("model", None, vec!["missing"]),
        ("model", Some(Text("llama")), vec!["gpt2", "llama"]),
        ("model", Some(Number(1)), vec!["string", "u32"]),
        ("pre", None, vec!["missing"]),
        ("pre", Some(Text("mystery")), vec!["deepseek-llm", "kimi-k2", "`mystery`"]),
        ("tokens", None, vec!["missing"]),
        ("tokens", Some(Numbers(vec![1])), vec!["string", "i32"]),
        ("tokens", Some(Texts(vec![b"a", b"b", b"ab", b"\xff", b""])), vec!["UTF-8"]),
        (
            "tokens",
            Some(Texts(vec![b"a", b"b", b"ab", b"a", b""])),
            vec!["tokens[3]", "\"a\", which token 0 is too"],
        ),
        ("tokens", Some(Texts(vec![b""; (1 << 18) + 1])), vec!["at most 262144", "found 262145"]),
        ("token_type", Some(Numbers(vec![1; (1 << 18) + 1])), vec!["at most 262144", "found 262145"]),
        ("merges", Some(Texts(vec![b"a b"; (1 << 19) + 1])), vec!["at most 524288", "found 524289"]),
        ("token_type", Some(Numbers(vec![1, 1])), vec!["5 types", "found 2"]),
        ("token_type", Some(Numbers(vec![1, 1, 1, 9, 5])), vec!["1 to 6", "9"]),
        ("merges", None, vec!["missing"]),
        ("merges", Some(Texts(vec![b"a b", b"ab"])), vec!["merges[1]", "two tokens", "\"ab\""]),
        ("merges", Some(Texts(vec![b"a b", b"b a"])), vec!["merges[1]", "\"ba\" is none"]),
        ("merges", Some(Texts(vec![b"a zzzzzzzzzzzzzzzzzzzz"])), vec!["merges[0]", "zzz"]),
        ("merges", Some(Texts(vec![b"a <x>"])), vec!["merges[0]", "\"<x>\" is none"]),
        ("bos_token_id", Some(Number(5)), vec!["an id below 5", "found 5"]),
        ("eos_token_id", Some(Number(u32::MAX)), vec!["an id below 5", "4294967295"]),
        ("eos_token_id", Some(Text("a")), vec!["string"]),
        ("eot_token_id", Some(Number(77)), vec!["an id below 5", "77"]),
        (
            "tokens",
            Some(Texts(vec![b"a", b"b", b"ab", &[b'x'; 1025], b""])),
            vec!["tokens[3]", "a special token of at most 1024 bytes, found 1025 bytes"],
        ),
        ("tokens", Some(Texts(vec![long])), vec!["at most 16777216 bytes in all", "16777217"]),
        ("merges", Some(Texts(vec![long])), vec!["at most 16777216 bytes in all", "16777217"]),
        ("add_bos_token", Some(Number(1)), vec!["bool", "u32"]),
    ] {
        let key = format!("tokenizer.ggml.{key}");
        let message = open(&key, value).unwrap_err().to_string();
        for word in words.into_iter().chain(["bad.gguf", &key]) {
            assert!(message.contains(word), "{key}: {message:?} lacks {word:?}");
        }
    }
    let template = Text("x".repeat((1 << 20) + 1).leak());
    let message = open("tokenizer.chat_template", Some(template)).unwrap_err().to_string();
    assert!(message.contains("tokenizer.chat_template`: expected at most 1048576 bytes"), "{message}");
    // unused tokens need not differ, and a file without types is judged by the texts
    assert!(open("tokenizer.ggml.token_type", Some(Numbers(vec![1, 1, 1, 5, 5]))).is_ok());
    let encode = |tokenizer: Tokenizer, special| tokenizer.encode("<x>", special);
    assert_eq!(encode(open("unrelated", None).unwrap(), Special::Parse), [3], "a control token");
    assert_eq!(
        encode(open("tokenizer.ggml.token_type", None).unwrap(), Special::Parse),
        [0u32; 0],
        "a normal one"
    );
}

#[test]
fn hugging_face_directories() {
    const TOKENIZER: &str = r#"{"added_tokens": [{"id": 3, "content": "<｜x｜>", "special": false}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}"#;
    let folder = tempfile::tempdir().unwrap();
    let with = |from: &str, to: &str| {
        assert!(TOKENIZER.contains(from), "{from}");
        std::fs::write(folder.path().join("tokenizer.json"), TOKENIZER.replace(from, to)).unwrap();
        Tokenizer::from_directory(folder.path())
    };
    assert_eq!(with("", "").unwrap().encode("<｜x｜>", Special::Parse), [3]);
    assert_eq!(with("", "").unwrap().encode("<｜x｜>", Special::Literal), [0u32; 0]);
    for (from, to, words) in [
        (TOKENIZER, "", vec!["line 1"]),
        (TOKENIZER, "{}", vec!["model"]),
        ("BPE", "Unigram", vec!["model.type", "`BPE`", "`Unigram`"]),
        (r#""type": "BPE""#, r#""byte_fallback": true"#, vec!["model", "byte-level BPE"]),
        (r#"{"added"#, r#"{"normalizer": {"type": "NFC"}, "added"#, vec!["normalizer", "none", "NFC"]),
        ("ByteLevel", "Whitespace", vec!["pre_tokenizer", "`ByteLevel`", "Whitespace"]),
        ("\"add_prefix_space\": false", "\"add_prefix_space\": true", vec!["pre_tokenizer"]),
        (
            r#"{"type": "ByteLevel", "add_prefix_space": false}"#,
            r#"{"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}"#,
            vec!["pre_tokenizer", "a last step `ByteLevel`"],
        ),
        (
            r#"{"type": "ByteLevel", "add_prefix_space": false}"#,
            r#"{"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?<=x)y"},
                "behavior": "Isolated"}, {"type": "ByteLevel", "add_prefix_space": false}]}"#,
            vec!["pre", "look-around", "(?<=x)y"],
        ),
        (r#"["a b"]"#, r#"["a"]"#, vec!["model.merges[0]", "\"a\""]),
        (r#"["a b"]"#, r#"[["b", "a"]]"#, vec!["model.merges[0]", "\"ba\""]),
        ("\"ab\": 2", "\"ab\": 4000000000", vec!["model.vocab", "ids below", "4000000000"]),
        ("\"ab\": 2", "\"ab\": 1", vec!["model.vocab", "as 1"]),
        ("\"special\"", "\"rstrip\": true, \"special\"", vec!["added_tokens", "rstrip", "<｜x｜>"]),
    ] {
        let message = with(from, to).unwrap_err().to_string();
        for word in words.into_iter().chain(["tokenizer.json"]) {
            assert!(message.contains(word), "{from} -> {to}: {message:?} lacks {word:?}");
        }
    }
    // How many patterns, of what length, and what they are compiled to.
    let split = |pattern: &str, times: usize| {
        let split =
            format!(r#"{{"type": "Split", "pattern": {{"Regex": "{pattern}"}}, "behavior": "Isolated"}},"#);
        let bytes = r#"{"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}"#;
        let steps = format!(r#"{{"type": "Sequence", "pretokenizers": [{}{bytes}]}}"#, split.repeat(times));
        with(r#"{"type": "ByteLevel", "add_prefix_space": false}"#, &steps)
    };
    assert!(split("x", 16).is_ok() && split(&"x".repeat(4096), 1).is_ok());
    for (pattern, times, words) in [
        ("x".to_owned(), 17, vec!["pre_tokenizer", "at most 16 patterns", "found 17"]),
        ("x".repeat(4097), 1, vec!["pre_tokenizer", "patterns of at most 4096 bytes", "found one of 4097"]),
        ("x".repeat(1 << 17), 1, vec!["pre_tokenizer", "at most 131072 bytes", "found 131"]),
        (r"\\pL{200}".to_owned(), 1, vec!["pre", "small patterns", "pL{200}", "more than 1048576 bytes"]),
    ] {
        let message = split(&pattern, times).unwrap_err().to_string();
        for word in words.into_iter().chain(["tokenizer.json"]) {
            assert!(message.contains(word), "{message:?} lacks {word:?}");
        }
    }
    with("", "").unwrap();
    for (file, text, words) in [
        ("config.json", r#"{"eos_token_id": "two"}"#, vec!["eos_token_id", "\"two\""]),
        ("config.json", r#"{"eos_token_id": [1, -1]}"#, vec!["eos_token_id", "-1"]),
        ("config.json", r#"{"vocab_size": 4000000000}"#, vec!["vocab_size", "4000000000"]),
        ("config.json", "{", vec!["line 1"]),
        ("generation_config.json", r#"{"eos_token_id": {}}"#, vec!["eos_token_id"]),
        ("tokenizer_config.json", "[", vec!["line 1"]),
    ] {
        std::fs::write(folder.path().join(file), text).unwrap();
        let message = Tokenizer::from_directory(folder.path()).unwrap_err().to_string();
        std::fs::remove_file(folder.path().join(file)).unwrap();
        for word in words.into_iter().chain([file]) {
            assert!(message.contains(word), "{text}: {message:?} lacks {word:?}");
        }
    }
    for file in ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"] {
        let path = folder.path().join(file);
        std::fs::write(&path, format!("{{}}{}", " ".repeat((1 << 20) - 2))).unwrap();
        assert!(Tokenizer::from_directory(folder.path()).is_ok(), "{file}");
        std::fs::write(&path, format!("{{}}{}", " ".repeat((1 << 20) - 1))).unwrap();
        let message = Tokenizer::from_directory(folder.path()).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        let expected = format!("{file}: size: expected at most 1048576 bytes, found 1048577");
        assert!(message.ends_with(&expected), "{message}");
    }
    // What would take any amount of memory, or never end.
    let file = folder.path().join("tokenizer.json");
    std::fs::File::create(&file).unwrap().set_len((64 << 20) + 1).unwrap();
    let message = Tokenizer::from_directory(folder.path()).unwrap_err().to_string();
    assert!(message.contains("size: expected at most 67108864 bytes, found 67108865"), "{message}");
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let message = Tokenizer::from_directory(folder.path()).unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
    // Nor is all of what is wrong repeated.
    let long = "x".repeat(100_000);
    std::fs::remove_dir(&file).unwrap();
    let normalizer = format!(r#"{{"normalizer": "{long}", "added"#);
    let message = with(r#"{"added"#, &normalizer).unwrap_err().to_string();
    assert!(message.contains("normalizer: expected none, found") && message.len() < 1000, "{message}");
    let message = Tokenizer::from_directory(&folder.path().join("nowhere")).unwrap_err().to_string();
    assert!(message.contains("nowhere") && message.contains("tokenizer.json"), "{message}");
}

#[test]
fn what_a_hugging_face_directory_says_of_special_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| std::fs::write(folder.path().join(file), text).unwrap();
    write(
        "tokenizer.json",
        r#"{"added_tokens": [{"id": 1, "content": "<s>", "special": true}, {"id": 2, "content": "</s>", "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
            "model": {"vocab": {"a": 0}, "merges": []}}"#,
    );
    write("config.json", r#"{"bos_token_id": 1, "eos_token_id": [2, 0], "vocab_size": 9}"#);
    let read = || Vocabulary::from_directory(folder.path()).unwrap();
    let v = read();
    assert_eq!((v.bos, v.eos, v.add_bos, v.tokens.len()), (Some(1), Some(2), true, 9));
    let tokenizer = Tokenizer::new(v).unwrap();
    assert_eq!([0, 1, 2, 3].map(|id| tokenizer.is_end_of_generation(id)), [true, false, true, false]);
    for (config, bos, add_bos, template) in [
        ("{}", Some(1), false, None),
        (r#"{"tokenizer_class": "LlamaTokenizerFast"}"#, Some(1), true, None),
        (r#"{"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": false}"#, Some(1), false, None),
        (r#"{"add_bos_token": true, "bos_token": {"content": "</s>"}}"#, Some(2), true, None),
        (r#"{"chat_template": "x"}"#, Some(1), false, Some("x")),
        (
            r#"{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}"#,
            Some(1),
            false,
            Some("d"),
        ),
    ] {
        write("tokenizer_config.json", config);
        let v = read();
        assert_eq!((v.bos, v.add_bos, v.chat_template.as_deref()), (bos, add_bos, template), "{config}");
    }
    write("chat_template.jinja", "file");
    assert_eq!(read().chat_template.as_deref(), Some("file"));
}
