//! SECURITY.md's bounds on the memory of vocabularies, by counting on all threads.

mod counting;
mod source_bytes;

use counting::Measuring;
use model_deepseek::{
    source::{Checkpoint, Keys},
    tokenizer::{Special, Tokenizer, TokenizerError, Vocabulary, hostile::read_json},
};
use serde_json::json;
use source_bytes::{array, file, key, string};
use std::{fs, path::Path, sync::Arc};

const MIB: usize = 1 << 20;

/// What the largest vocabulary takes that a file may have.
const LARGEST: usize = 192 * MIB;

const USER_DEFINED: i32 = 4;

/// A vocabulary as it lies in a file.
struct Contents {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
}

impl Contents {
    /// As many tokens and merges as there may be, or as many bytes of them: all strings of up to three of 63 units, in all
    /// ways in which two of them make a third, and as many special tokens as that leaves room for.
    fn largest(unit_bytes: usize) -> Self {
        let letters = ('0'..='z').filter(char::is_ascii_alphanumeric).chain(['-']);
        let units: Vec<String> = letters.map(|letter| format!("{letter:.<unit_bytes$}")).collect();
        let mut tokens = units.clone();
        let mut merges = Vec::new();
        for a in &units {
            for b in &units {
                merges.push(format!("{a} {b}"));
                tokens.push(format!("{a}{b}"));
                for c in &units {
                    merges.extend([format!("{a}{b} {c}"), format!("{a} {b}{c}")]);
                    tokens.push(format!("{a}{b}{c}"));
                }
            }
        }
        let mut bytes = 0;
        merges.retain(|merge| {
            bytes += merge.len();
            bytes <= 16 * MIB
        });
        let mut types = vec![1; tokens.len()];
        // 32 bytes each.
        let special = (0..(1 << 18) - tokens.len()).map(|i| format!("<|{i:028x}|>"));
        tokens.extend(special);
        types.resize(tokens.len(), USER_DEFINED);
        assert!(tokens.len() == 1 << 18 && merges.len() <= 1 << 19);
        assert!(tokens.iter().map(String::len).sum::<usize>() <= 16 * MIB);
        Contents { tokens, types, merges }
    }

    fn gguf(&self) -> Checkpoint {
        let strings = |strings: &[String]| {
            let bytes: Vec<u8> = strings.iter().flat_map(string).collect();
            array(8, strings.len() as u64, &bytes)
        };
        let types: Vec<u8> = self.types.iter().flat_map(|of| of.to_le_bytes()).collect();
        let keys = [
            key("tokenizer.ggml.model", 8, &string("gpt2")),
            key("tokenizer.ggml.pre", 8, &string("deepseek-v3")),
            key("tokenizer.ggml.tokens", 9, &strings(&self.tokens)),
            key("tokenizer.ggml.token_type", 9, &array(5, self.types.len() as u64, &types)),
            key("tokenizer.ggml.merges", 9, &strings(&self.merges)),
        ];
        Checkpoint::from_bytes(Path::new("large.gguf"), Arc::new(file(&keys, &[], 0))).unwrap()
    }

    fn json(&self) -> String {
        let tokens = || self.tokens.iter().zip(&self.types).enumerate();
        let vocab: serde_json::Map<_, _> = tokens()
            .filter(|(_, (_, of))| **of != USER_DEFINED)
            .map(|(id, (token, _))| (token.clone(), id.into()))
            .collect();
        let added: Vec<_> = tokens()
            .filter(|(_, (_, of))| **of == USER_DEFINED)
            .map(|(id, (token, _))| json!({ "id": id, "content": token }))
            .collect();
        let merges: Vec<_> = self.merges.iter().map(|merge| merge.split_once(' ')).collect();
        json!({
            "added_tokens": added,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false },
            "model": { "type": "BPE", "vocab": vocab, "merges": merges },
        })
        .to_string()
    }
}

fn of_gguf(checkpoint: &Checkpoint) -> Result<Tokenizer, TokenizerError> {
    let Keys::Gguf(metadata) = checkpoint.keys() else { panic!("a GGUF file has GGUF keys") };
    Tokenizer::from_gguf(metadata)
}

#[test]
fn the_largest_vocabularies() {
    let alone = Measuring::alone();
    for unit_bytes in [1, 21] {
        let contents = Contents::largest(unit_bytes);
        let checkpoint = contents.gguf();
        let (tokenizer, peak) = alone.peak(|| of_gguf(&checkpoint).unwrap());
        let (_, held) = alone.peak(|| drop(tokenizer.encode("a b", Special::Parse)));
        println!("units of {unit_bytes}: {} MiB at the most, then {held} bytes for a text", peak / MIB);
        assert!(peak < LARGEST, "units of {unit_bytes}: {peak} bytes");
        drop((tokenizer, checkpoint));

        let folder = tempfile::tempdir().unwrap();
        let json = contents.json();
        let size = json.len();
        fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        let (vocabulary, peak) = alone.peak(|| Vocabulary::from_directory(folder.path()).unwrap());
        println!("units of {unit_bytes}: {} MiB for {} of JSON", peak / MIB, size / MIB);
        assert!(peak <= 2 * size + 128 * MIB, "units of {unit_bytes}: {peak} bytes for {size} of JSON");
        let (_, peak) = alone.peak(|| Tokenizer::new(vocabulary).unwrap());
        assert!(peak < LARGEST, "units of {unit_bytes}: {peak} bytes");
    }
}

/// An automaton of special tokens could take a kilobyte for each of their bytes.
#[test]
fn special_tokens() {
    let alone = Measuring::alone();
    let open = |special: Vec<String>| {
        let types = vec![USER_DEFINED; special.len()];
        let checkpoint = Contents { tokens: special, types, merges: Vec::new() }.gguf();
        alone.peak(|| of_gguf(&checkpoint))
    };
    let many = |count: usize, len: usize| {
        // All bytes that there are in ASCII, as what an automaton takes may go with their number.
        let ascii: String = ('!'..='~').cycle().take(len - 4).collect();
        (0..count).map(|i| format!("{i:04}{ascii}")).collect::<Vec<_>>()
    };
    // As many beginnings as can be, each with a few ways to go on: states near the start are large.
    let ascii = || (1..=127u8).map(char::from);
    let begin = |a: char| ascii().flat_map(move |b| ['v', 'w', 'x', 'y', 'z'].map(|c| format!("{a}{b}{c}")));
    let wide: Vec<String> = ascii().flat_map(begin).collect();
    for special in [many(1, 1024), many(100, 1024), many(256, 1024), wide] {
        let (last, text) = (special.len() as u32 - 1, special[special.len() - 1].clone());
        let what = format!("{} special tokens of {} bytes", special.len(), text.len());
        let (tokenizer, peak) = open(special);
        assert_eq!(tokenizer.unwrap().encode(&text, Special::Literal), [last], "{what}");
        println!("{what}: {} MiB", peak / MIB);
        assert!(peak < 64 * MIB, "{what}: {peak} bytes");
    }
    for (special, token, expected) in [
        (many(1, 4 * MIB), 0, "a token of at most 16384 bytes, found 4194304 bytes"),
        (many(2, 1025), 0, "a special token of at most 1024 bytes, found 1025 bytes"),
        (
            many(300, 1024),
            256,
            "special tokens of at most 262144 bytes in all, found 263168 bytes up to this one",
        ),
    ] {
        let (tokenizer, peak) = open(special);
        let message = tokenizer.unwrap_err().to_string();
        assert_eq!(message, format!("large.gguf: tokenizer.ggml.tokens[{token}]: expected {expected}"));
        assert!(peak < 32 * MIB, "{peak} bytes until it is refused");
    }
}

/// Sixteen of the largest patterns that there may be, of several kinds, and a text for them.
#[test]
fn patterns() {
    let alone = Measuring::alone();
    let letters = r"\pL".repeat(40);
    let words: Vec<String> = (0..680).map(|i| format!("w{i:04x}")).collect();
    let mut refused = 0;
    for pattern in [
        r"\pL{40}".to_owned(),
        r"(?i:\pL|\pN){1,20}".to_owned(),
        format!("{letters}|[^x]{letters}"),
        words.join("|"),
        format!("(?i:{})", words[..400].join("|")),
        "a?".repeat(2000),
        "(?:a?){5000}".to_owned(),
        "(?:(?:a{1,50}){1,50}){1,50}".to_owned(),
        r"[^a]".repeat(1000),
        format!("({})", "a)(".repeat(1300)),
    ] {
        let split = json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated" });
        let mut steps = vec![split; 16];
        steps.push(json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": false }));
        let json = json!({
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
            "model": { "vocab": { "a": 0 }, "merges": [] },
        });
        let json = json.to_string();
        let (made, peak) = alone.peak(|| {
            let tokenizer = read_json(&json).map_err(|error| error.to_string())?;
            Ok::<_, String>(tokenizer.encode(&"aä中w0001 b1\n".repeat(1000), Special::Literal).len())
        });
        println!("{:.40}: {} MiB, {made:.200?}", pattern, peak / MIB);
        assert!(peak < LARGEST, "{pattern:.40}: {peak} bytes");
        refused += usize::from(made.is_err());
    }
    assert!((1..8).contains(&refused), "{refused}");
}

/// Files that would become many times what they are, if all of it were kept.
#[test]
fn json_takes_memory_in_proportion() {
    const GOOD: &str = r#"{"added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}"#;
    let alone = Measuring::alone();
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, text: String| {
        let size = text.len();
        fs::write(folder.path().join(name), text).unwrap();
        let (vocabulary, peak) = alone.peak(|| Vocabulary::from_directory(folder.path()));
        assert!(peak <= 2 * size + 128 * MIB, "{name}: {peak} bytes for {size}");
        vocabulary.map_err(|error| error.to_string())
    };
    let list = |open: &str, element: &str, close: &str| {
        format!("{open}{}{element}{close}", format!("{element},").repeat(24 * MIB / (element.len() + 1)))
    };
    let zeros = || list("[", "0", "]");
    let numbered: Vec<String> = (0..3_000_000).map(|i| format!(r#""{i:x}":0"#)).collect();
    for (part, with, expected) in [
        (r#""decoder": null"#, format!(r#""decoder": {}"#, zeros()), None),
        (
            r#""decoder": null"#,
            format!(r#""decoder": {}{}"#, "[".repeat(12 * MIB), "]".repeat(12 * MIB)),
            None,
        ),
        (
            r#""normalizer": null"#,
            format!(r#""normalizer": {}"#, zeros()),
            Some("normalizer: expected at most 131072"),
        ),
        (
            r#""post_processor": null"#,
            format!(r#""post_processor": {}"#, zeros()),
            Some("post_processor: expected at most 131072"),
        ),
        (
            r#"{"type": "ByteLevel", "add_prefix_space": false}"#,
            zeros(),
            Some("pre_tokenizer: expected at most 131072"),
        ),
        (
            r#"{"type": "ByteLevel", "add_prefix_space": false}"#,
            "[".repeat(100_000),
            Some("tokenizer.json: "),
        ),
        (
            r#""added_tokens": []"#,
            list(r#""added_tokens": ["#, r#"{"id":0,"content":""}"#, "]"),
            Some("added_tokens: expected at most 262144 entries, found more"),
        ),
        (
            r#"{"a": 0, "b": 1, "ab": 2}"#,
            format!("{{{}}}", numbered.join(",")),
            Some("model.vocab: expected at most 262144 entries, found more"),
        ),
        (
            r#""a": 0"#,
            format!(r#""{}": 0"#, r"\n".repeat(17 * MIB)),
            Some("model.vocab: expected at most 16777216 bytes in all, found more"),
        ),
        (
            r#"["a b"]"#,
            list("[", r#""a b""#, "]"),
            Some("model.merges: expected at most 524288 entries, found more"),
        ),
        (
            r#"["a b"]"#,
            list("[", r#"["a","b"]"#, "]"),
            Some("model.merges: expected at most 524288 entries, found more"),
        ),
        (r#"["a b"]"#, format!("[{}]", zeros()), Some("expected a string")),
        (r#"["a b"]"#, list(r#"[["a","#, r#""b""#, "]]"), Some("tokenizer.json: ")),
    ] {
        assert!(GOOD.contains(part), "{part}");
        let result = read("tokenizer.json", GOOD.replace(part, &with));
        match (result, expected) {
            (Ok(_), None) => {}
            (Err(message), Some(expected)) => assert!(message.contains(expected), "{message:.400}"),
            (result, expected) => panic!("{part}: {expected:?} and {result:?}"),
        }
    }
    read("tokenizer.json", GOOD.to_owned()).unwrap();
    let zeros = format!("[0{}]", ",0".repeat(400_000));
    for (name, text) in [
        ("tokenizer_config.json", format!(r#"{{"chat_template": {zeros}}}"#)),
        ("tokenizer_config.json", format!(r#"{{"added_tokens_decoder": {zeros}}}"#)),
        ("config.json", format!(r#"{{"eos_token_id": {zeros}}}"#)),
        ("generation_config.json", format!(r#"{{"suppress_tokens": {zeros}}}"#)),
    ] {
        read(name, text).unwrap();
    }
}
