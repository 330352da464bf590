//! What holds for every text, every sequence of ids and every vocabulary.

use model_deepseek::tokenizer::{Rules, Special, TokenType, Tokenizer, Vocabulary, letter};
use proptest::prelude::*;
use std::{collections::HashSet, path::Path, sync::LazyLock};

/// One tokenizer of each kind.
static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/tokenizers");
    ["deepseek-llm", "deepseek-coder", "deepseek-v3", "glm4", "kimi-k2"]
        .map(|name| Tokenizer::from_directory(&folder.join(name)).unwrap())
        .into()
});

/// The control tokens of each: those that a text gives only on demand.
static CONTROLS: LazyLock<Vec<HashSet<u32>>> = LazyLock::new(|| {
    let is_control = |tokenizer: &Tokenizer, id: u32| {
        let text = str::from_utf8(tokenizer.piece(id).unwrap()).unwrap_or_default();
        let gives = |special| tokenizer.encode(text, special) == [id];
        gives(Special::Parse) && !gives(Special::Literal)
    };
    let of = |tokenizer: &Tokenizer| {
        let controls: HashSet<u32> =
            (0..tokenizer.size() as u32).filter(|&id| is_control(tokenizer, id)).collect();
        assert!(controls.len() > 1, "{tokenizer:?}");
        controls
    };
    TOKENIZERS.iter().map(of).collect()
});

/// Texts with whatever pre-tokenizers and special tokens have rules for.
fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<String>(),
        "[ \t\r\n\u{a0}\u{3000}]{1,4}",
        "[a-zA-Z']{1,6}",
        "[0-9²٣]{1,5}",
        "[一-十ぁ-んЀ-џ]{1,4}",
        "[!-/\u{300}-\u{303}üÿ]{1,3}",
        prop::sample::select(vec![
            "<｜User｜>",
            "<｜end▁of▁sentence｜>",
            "<think>",
            "</think>",
            "<|user|>",
            "[EOT]",
            "<|im_user|>",
            "/nothink",
            "<｜",
            "[gMASK]<sop>",
        ])
        .prop_map(String::from),
    ];
    prop::collection::vec(part, 0..8).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_text_comes_back(text in text()) {
        for (tokenizer, controls) in TOKENIZERS.iter().zip(CONTROLS.iter()) {
            for special in [Special::Literal, Special::Parse] {
                let ids = tokenizer.encode(&text, special);
                prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
                prop_assert!(special == Special::Parse || !ids.iter().any(|id| controls.contains(id)));
            }
        }
    }

    #[test]
    fn bytes_come_back_as_characters(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        for tokenizer in TOKENIZERS.iter() {
            let ids = tokenizer.encode_bytes(&bytes, Special::Parse);
            let text = String::from_utf8_lossy(&bytes);
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn a_stream_of_ids_is_the_whole(ids in prop::collection::vec(0u32..716, 0..40)) {
        for tokenizer in TOKENIZERS.iter() {
            let mut decoder = tokenizer.decoder();
            let mut text: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
            text += &decoder.finish();
            let whole = tokenizer.decode(&ids).unwrap();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
            prop_assert_eq!(decoder.finish(), "");
        }
    }

    /// Whatever is in a vocabulary: it is refused or it works.
    #[test]
    fn any_vocabulary(
        tokens in prop::collection::vec("[abĠÀ<|>｜]{0,3}", 0..12),
        types in prop::collection::vec(prop::sample::select(TYPES.to_vec()), 0..12),
        merges in prop::collection::vec(("[abĠ]{0,2}", "[abĠ]{0,2}"), 0..3),
        ids in (prop::option::of(0u32..12), prop::option::of(0u32..12)),
        name in prop::sample::select(Rules::names().collect::<Vec<_>>()),
        text in "[ab <|>｜À]{0,12}",
    ) {
        let mut vocabulary = Vocabulary::new(Rules::named(name).unwrap(), tokens, merges);
        vocabulary.types = types;
        if vocabulary.types.len() > vocabulary.tokens.len() {
            vocabulary.types.truncate(vocabulary.tokens.len());
        }
        (vocabulary.bos, vocabulary.eos) = ids;
        if let Ok(tokenizer) = Tokenizer::new(vocabulary) {
            let ids = tokenizer.encode(&text, Special::Parse);
            prop_assert!(tokenizer.decode(&ids).is_ok());
        }
    }
}

const TYPES: [TokenType; 6] = [
    TokenType::Normal,
    TokenType::Unknown,
    TokenType::Control,
    TokenType::UserDefined,
    TokenType::Unused,
    TokenType::Byte,
];

#[test]
fn empty_and_incomplete_vocabularies() {
    let rules = || Rules::named("deepseek-v3").unwrap();
    let empty = Tokenizer::new(Vocabulary::new(rules(), vec![], vec![])).unwrap();
    assert!(empty.encode("abc", Special::Parse).is_empty());
    assert_eq!(empty.decode(&[]).unwrap(), b"");
    assert_eq!(empty.piece(0), None);
    let message = empty.decode(&[7]).unwrap_err().to_string();
    assert_eq!(message, "token id 7: expected one below 0, the size of the vocabulary");
    // a byte without a token is left out
    let two = Tokenizer::new(Vocabulary::new(rules(), vec!["a".into(), "c".into()], vec![])).unwrap();
    assert_eq!(two.encode("abc", Special::Parse), [0, 1]);
}

#[test]
fn long_texts_take_linear_time() {
    for tokenizer in TOKENIZERS.iter() {
        for unit in ["a", " ", "\n", "中", "1", "<", "é", "!", " \u{3000}"] {
            let text = unit.repeat(200_000);
            let ids = tokenizer.encode(&text, Special::Parse);
            assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
        }
    }
}

#[test]
fn characters_spread_over_tokens() {
    let tokens = (0..=255).map(|byte| letter(byte).to_string()).collect();
    let tokenizer =
        Tokenizer::new(Vocabulary::new(Rules::named("deepseek-v3").unwrap(), tokens, vec![])).unwrap();
    for (bytes, expected) in [
        (&b"a\xE4\xB8\xADb"[..], vec!["a", "", "", "中", "b", ""]),
        (b"\xF0\x9F\x98\x80", vec!["", "", "", "😀", ""]),
        (b"\xE4\xB8", vec!["", "", "\u{fffd}"]),
        (b"\xE4a", vec!["", "\u{fffd}a", ""]),
        (b"\xE4\xE4\xB8\xAD", vec!["", "\u{fffd}", "", "中", ""]),
        (b"\xFF\x80", vec!["\u{fffd}", "\u{fffd}", ""]),
        // a surrogate
        (b"\xED\xA0\x80", vec!["", "\u{fffd}\u{fffd}", "\u{fffd}", ""]),
    ] {
        let mut decoder = tokenizer.decoder();
        let mut texts: Vec<String> = bytes.iter().map(|&byte| decoder.push(byte.into()).unwrap()).collect();
        texts.push(decoder.finish());
        assert_eq!(texts, expected, "{bytes:x?}");
    }
}
