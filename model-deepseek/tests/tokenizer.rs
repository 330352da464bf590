//! Ids, pieces and special ids against those of Hugging Face `tokenizers`, tiktoken and llama.cpp: small vocabularies
//! in `testdata/tokenizers`, and the published ones where `../shared` is there.

use model_deepseek::{
    source::{Checkpoint, Keys},
    tokenizer::{PreTokenizer, Rules, Special, Tokenizer, Vocabulary},
};
use serde::Deserialize;
use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

#[derive(Deserialize)]
struct Vectors {
    n_tokens: usize,
    info: Info,
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct Info {
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    eog: Vec<u32>,
}

#[derive(Deserialize)]
struct Vector {
    text: String,
    ids: Vec<u32>,
    ids_special: Vec<u32>,
}

#[derive(Deserialize)]
struct Pieces {
    pre: String,
    rows: Vec<PieceRow>,
}

#[derive(Deserialize)]
struct PieceRow {
    text: String,
    /// Lengths in characters.
    n: Vec<usize>,
}

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/tokenizers")
}

/// A folder of `../shared/models`, or `None` and a word about it.
fn shared(folder: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models").join(folder);
    if !path.exists() {
        println!("skipped: ../shared is not there");
    }
    path.exists().then_some(path)
}

fn json<T: for<'d> Deserialize<'d>>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The vocabulary of a GGUF file, packed or not.
fn vocabulary(path: &Path) -> Vocabulary {
    let mut bytes = std::fs::read(path).unwrap();
    if path.extension().is_some_and(|extension| extension == "gz") {
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut unpacked).unwrap();
        bytes = unpacked;
    }
    let checkpoint = Checkpoint::from_bytes(path, Arc::new(bytes)).unwrap();
    let Keys::Gguf(metadata) = checkpoint.keys() else { panic!("{}: no GGUF", path.display()) };
    Vocabulary::from_gguf(metadata).unwrap()
}

/// Every text gives exactly the expected ids and comes back from them.
fn check_vectors(name: &str, tokenizer: &Tokenizer, vectors: &Vectors) {
    let mut wrong = Vec::new();
    for Vector { text, ids, ids_special } in &vectors.vectors {
        for (special, expected) in [(Special::Literal, ids), (Special::Parse, ids_special)] {
            let found = tokenizer.encode(text, special);
            if &found != expected {
                wrong.push(format!("{text:?} {special:?}: expected {expected:?}, found {found:?}"));
            }
            assert_eq!(
                tokenizer.decode(&found).unwrap(),
                text.as_bytes(),
                "{name}: {text:?} came back changed"
            );
        }
    }
    assert!(wrong.is_empty(), "{name}: {} texts:\n{}", wrong.len(), wrong.join("\n"));
    println!("{name}: {} texts", vectors.vectors.len());
}

fn check_info(name: &str, tokenizer: &Tokenizer, vectors: &Vectors) {
    let Info { bos, eos, add_bos, eog } = &vectors.info;
    assert_eq!(tokenizer.size(), vectors.n_tokens, "{name}");
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.adds_bos()), (*bos, *eos, *add_bos), "{name}");
    let all = 0..tokenizer.size() as u32;
    let ends: Vec<u32> = all.filter(|&id| tokenizer.is_end_of_generation(id)).collect();
    assert_eq!(&ends, eog, "{name}");
    // Nobody ends a turn by typing its mark.
    for id in ends {
        let text = str::from_utf8(tokenizer.piece(id).unwrap()).unwrap();
        assert_eq!(tokenizer.encode(text, Special::Parse), [id], "{name}: {text}");
        assert_ne!(tokenizer.encode(text, Special::Literal), [id], "{name}: {text}");
    }
}

fn check_published(name: &str, vocabulary_file: &str, texts: usize) {
    let Some(folder) = shared("tokenizers") else { return };
    let tokenizer = Tokenizer::new(vocabulary(&folder.join(vocabulary_file))).unwrap();
    let vectors: Vectors = json(&folder.join(format!("vectors-{name}.json")));
    assert_eq!(vectors.vectors.len(), texts);
    check_vectors(name, &tokenizer, &vectors);
    check_info(name, &tokenizer, &vectors);
}

#[test]
fn published_deepseek_llm() {
    check_published("deepseek-llm", "vocab-deepseek-llm.gguf", 1121);
}

#[test]
fn published_deepseek_coder() {
    check_published("deepseek-coder", "vocab-deepseek-coder.gguf", 1121);
}

#[test]
fn published_deepseek_v3() {
    check_published("deepseek-v3", "vocab-deepseek-v3.gguf.gz", 1121);
}

#[test]
fn published_joyai_llm() {
    check_published("joyai-llm", "vocab-joyai-llm.gguf.gz", 1121);
}

#[test]
fn published_glm4() {
    check_published("glm4", "vocab-glm4.gguf.gz", 1121);
}

#[test]
fn published_kimi_k2_standin() {
    check_published("kimi-k2-standin", "vocab-kimi-k2-standin.gguf", 1121);
}

#[test]
fn merges_derived_from_ranks_are_those_of_the_file() {
    let Some(folder) = shared("tokenizers") else { return };
    let mut vocabulary = vocabulary(&folder.join("vocab-kimi-k2-standin.gguf"));
    assert!(!vocabulary.merges.is_empty());
    vocabulary.merges.clear();
    let vectors: Vectors = json(&folder.join("vectors-kimi-k2-standin.json"));
    check_vectors("kimi-k2 without merges", &Tokenizer::new(vocabulary).unwrap(), &vectors);
}

#[test]
fn published_pieces() {
    let Some(folder) = shared("tokenizers") else { return };
    for name in ["deepseek-llm", "deepseek-coder", "deepseek-v3", "glm4", "kimi-k2"] {
        let Pieces { pre, rows } = json(&folder.join(format!("pieces-{name}.json")));
        let cutter = PreTokenizer::new(&Rules::named(&pre).unwrap().patterns).unwrap();
        for PieceRow { text, n } in &rows {
            let lengths: Vec<usize> =
                cutter.cut(text).into_iter().map(|piece| text[piece].chars().count()).collect();
            assert_eq!(&lengths, n, "{pre}: {text:?}");
        }
        println!("{pre}: {} texts", rows.len());
    }
}

const SMALL: [&str; 5] = ["deepseek-llm", "deepseek-coder", "deepseek-v3", "glm4", "kimi-k2"];

#[test]
fn small_vocabularies() {
    for name in SMALL {
        let tokenizer = Tokenizer::new(vocabulary(&testdata().join(format!("vocab-{name}.gguf")))).unwrap();
        let vectors: Vectors = json(&testdata().join(format!("vectors-{name}.json")));
        check_vectors(name, &tokenizer, &vectors);
        check_info(name, &tokenizer, &vectors);
    }
}

#[test]
fn small_hugging_face_directories() {
    for name in SMALL {
        let tokenizer = Tokenizer::from_directory(&testdata().join(name)).unwrap();
        let vectors: Vectors = json(&testdata().join(format!("vectors-{name}.json")));
        check_vectors(name, &tokenizer, &vectors);
        check_info(name, &tokenizer, &vectors);
        assert_eq!(tokenizer.chat_template(), Some("{{ bos_token }}"));
    }
}

/// The tokenizer.json of a model directory without any other tokenizer file, and the same vocabulary in GGUF.
#[test]
fn shared_hugging_face_directory() {
    let Some(folder) = shared("shapes") else { return };
    let gguf = Tokenizer::new(vocabulary(&folder.join("../austen-f16.gguf"))).unwrap();
    let text = std::fs::read_to_string(folder.join("../austen-heldout.txt")).unwrap();
    for name in ["v3-like-hf", "v3-like-hf-fp8"] {
        let directory = Tokenizer::from_directory(&folder.join(name)).unwrap();
        let ids = directory.encode(&text, Special::Literal);
        assert_eq!(directory.decode(&ids).unwrap(), text.as_bytes());
        assert_eq!(ids, gguf.encode(&text, Special::Literal));
        assert_eq!((directory.bos(), directory.eos(), directory.adds_bos()), (Some(0), Some(1), true));
        assert_eq!(directory.with_bos(vec![5]), [0, 5]);
    }
}

/// llama.cpp's own test file for deepseek-coder. (That for deepseek-llm is of another vocabulary of this name.)
#[test]
fn upstream_deepseek_coder() {
    let Some(folder) = shared("tokenizers") else { return };
    let tokenizer = Tokenizer::new(vocabulary(&folder.join("vocab-deepseek-coder.gguf"))).unwrap();
    let read = |end: &str| {
        std::fs::read_to_string(folder.join(format!("upstream/ggml-vocab-deepseek-coder.gguf.{end}")))
            .unwrap()
    };
    let (texts, ids) = (read("inp"), read("out"));
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    for (text, line) in texts.iter().zip(ids.lines()) {
        let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(tokenizer.encode(text, Special::Literal), expected, "{text:?}");
    }
    assert!(ids.lines().count() > 40);
}

/// llama.cpp replaces bad bytes one by one and lets surrogates and overlong forms through (beyond U+10FFFF it gives up);
/// here what is no character is replaced, by maximal parts. These are the texts that this makes a difference for.
const OTHERWISE: [&str; 13] = [
    // beginnings of characters, of two and three bytes
    "e282",
    "61e28262",
    "e4b8",
    "68656c6c6f20e4b820776f726c64",
    "f09f98",
    "f09f982078",
    // overlong forms
    "c080",
    "c1bf",
    // surrogates
    "eda080",
    "edbfbf",
    "eda0bdedb880",
    // beyond U+10FFFF
    "f4908080",
    "f5808080",
];

#[test]
fn bytes_that_are_not_utf8() {
    #[derive(Deserialize)]
    struct Row {
        hex: String,
        ids: Option<Vec<u32>>,
    }
    let Some(folder) = shared("tokenizers") else { return };
    let rows: std::collections::BTreeMap<String, Vec<Row>> = json(&folder.join("invalid-utf8.json"));
    for (name, rows) in rows {
        let path = ["gguf", "gguf.gz"].map(|end| folder.join(format!("vocab-{name}.{end}")));
        let tokenizer = Tokenizer::new(vocabulary(path.iter().find(|path| path.exists()).unwrap())).unwrap();
        assert_eq!(rows.len(), OTHERWISE.len() + 15);
        for Row { hex, ids } in rows {
            let bytes: Vec<u8> =
                (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
            let found = tokenizer.encode_bytes(&bytes, Special::Parse);
            assert_eq!(
                tokenizer.decode(&found).unwrap(),
                String::from_utf8_lossy(&bytes).as_bytes(),
                "{hex}"
            );
            assert_eq!(Some(found) != ids, OTHERWISE.contains(&hex.as_str()), "{name}: {hex}, {ids:?}");
        }
    }
}

#[test]
fn threads_share_a_tokenizer() {
    let tokenizer = Tokenizer::from_directory(&testdata().join("deepseek-v3")).unwrap();
    let text = "It is a truth universally acknowledged";
    let expected = tokenizer.encode(text, Special::Literal);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(tokenizer.encode(text, Special::Literal), expected));
        }
    });
}
