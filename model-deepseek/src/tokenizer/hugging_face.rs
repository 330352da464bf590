//! The tokenizer files of a Hugging Face directory.

use super::{
    Rules, TokenType, TokenizerError, Vocabulary,
    json::{AddedToken, Merge, Model, TokenizerJson},
    looks_like_control,
    vocabulary::{MOST_TEMPLATE, MOST_TOKENS, split_merge},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};
use std::{
    fs,
    io::{self, ErrorKind},
    path::Path,
};

pub(super) const TOKENIZER: &str = "tokenizer.json";

/// Larger files are refused, as memory goes with their size. Published ones have up to 20 MB, and, beside
/// `tokenizer.json`, 200 KB.
const LARGEST_TOKENIZER: usize = 64 << 20;
const LARGEST_CONFIG: usize = 1 << 20;

/// The longest value that is parsed whole, in bytes. Published pre-tokenizers have up to 4,000.
const LONGEST_VALUE: usize = 128 << 10;

/// The most patterns of a pre-tokenizer, and the longest of them in bytes. Published ones have up to 6 and 1,500.
const MOST_PATTERNS: usize = 16;
const LONGEST_PATTERN: usize = 4 << 10;

/// Ids may leave gaps and the model may have more rows than there are tokens, but no more than this: files are not
/// to make us allocate at will. DeepSeek's have some hundreds.
const LARGEST_GAP: usize = 1 << 16;

/// GPT-2's own pattern, which `ByteLevel` stands for where it says `use_regex`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// What matters of a `tokenizer_config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    bos_token: Value,
    eos_token: Value,
    add_bos_token: Value,
    tokenizer_class: Value,
    chat_template: Value,
}

/// What matters of a `config.json` or `generation_config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ModelConfig {
    bos_token_id: Value,
    eos_token_id: Value,
    vocab_size: Value,
}

impl Vocabulary {
    /// Reads a `tokenizer.json`. It names no begin or end of text and has no template: those are in the files beside
    /// it, see [`Vocabulary::from_directory`].
    ///
    /// The types of added tokens are those that converters to GGUF would write, so that both files of a model give
    /// the same ids: control if flagged special or [looking like it](looks_like_control), else user defined.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, or has more than 64 MiB, 2¹⁸ tokens or 2¹⁹ merges; anything in it that
    /// these tokenizers do not have: another model than byte-level BPE, a normalizer, other steps than `Split`,
    /// `Digits` and `ByteLevel`, more than 16 patterns or 4 KiB of one.
    pub fn from_tokenizer_json(file: &Path) -> Result<Vocabulary, TokenizerError> {
        Ok(vocabulary_of(file, &read(file, LARGEST_TOKENIZER)?)?.0)
    }

    /// Reads a model's directory: `tokenizer.json`, and where they are there `tokenizer_config.json` (special tokens,
    /// `add_bos_token`, template), `chat_template.jinja`, `config.json` and `generation_config.json` (ids).
    ///
    /// Where nothing says whether a text starts with BOS, it does if the directory has no `tokenizer_config.json` or
    /// names a Llama tokenizer in it, which is what Hugging Face takes for DeepSeek models.
    ///
    /// # Errors
    /// As [`Vocabulary::from_tokenizer_json`], for each of the files; the others may have 1 MiB.
    pub fn from_directory(directory: &Path) -> Result<Vocabulary, TokenizerError> {
        let file = directory.join(TOKENIZER);
        let (mut vocabulary, post_processor) = vocabulary_of(&file, &read(&file, LARGEST_TOKENIZER)?)?;
        let tokenizer_config: Option<TokenizerConfig> =
            read_if_there(&directory.join("tokenizer_config.json"))?;
        let id_of = |token: &Value| {
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            vocabulary.tokens.iter().position(|token| token == text).map(|id| id as u32)
        };
        let named_bos = tokenizer_config.as_ref().and_then(|config| id_of(&config.bos_token));
        let named_eos = tokenizer_config.as_ref().and_then(|config| id_of(&config.eos_token));

        let config_file = directory.join("config.json");
        let config: ModelConfig = read_if_there(&config_file)?.unwrap_or_default();
        let bos = ids(&config_file, "bos_token_id", &config.bos_token_id)?.first().copied();
        let eos = ids(&config_file, "eos_token_id", &config.eos_token_id)?;
        let generation_file = directory.join("generation_config.json");
        let generation: ModelConfig = read_if_there(&generation_file)?.unwrap_or_default();
        vocabulary.bos = named_bos.or(bos);
        vocabulary.eos = named_eos.or(eos.first().copied());
        vocabulary.end_of_generation = ids(&generation_file, "eos_token_id", &generation.eos_token_id)?;
        vocabulary.end_of_generation.extend(eos);

        if let Some(rows) = config.vocab_size.as_u64().and_then(|rows| usize::try_from(rows).ok()) {
            let most = vocabulary.tokens.len() + LARGEST_GAP;
            if rows > most {
                let expected = format!("at most {most}, for {} tokens", vocabulary.tokens.len());
                return Err(TokenizerError::invalid(&config_file, "vocab_size", expected, rows.to_string()));
            }
            let rows = rows.max(vocabulary.tokens.len());
            vocabulary.tokens.resize(rows, String::new());
            vocabulary.types.resize(rows, TokenType::Unused);
        }

        let starts_with_bos = |config: &TokenizerConfig| {
            config.add_bos_token.as_bool().unwrap_or_else(|| {
                let class = config.tokenizer_class.as_str().unwrap_or_default();
                class.starts_with("Llama")
                    || template_starts_with(&post_processor, &vocabulary, vocabulary.bos)
            })
        };
        vocabulary.add_bos =
            vocabulary.bos.is_some() && tokenizer_config.as_ref().is_none_or(starts_with_bos);
        let template = read_text_if_there(&directory.join("chat_template.jinja"), MOST_TEMPLATE)?;
        vocabulary.chat_template =
            template.or_else(|| default_template(&tokenizer_config?.chat_template).map(str::to_owned));
        Ok(vocabulary)
    }
}

/// The vocabulary of a `tokenizer.json`, and the post-processor, which may say that BOS is added.
pub(super) fn vocabulary_of(file: &Path, json: &str) -> Result<(Vocabulary, Value), TokenizerError> {
    let json: TokenizerJson<'_> = parse(file, json)?;
    check_model(file, &json.model)?;
    check_normalizer(file, json.normalizer)?;
    let rules = Rules {
        patterns: patterns(file, json.pre_tokenizer)?,
        whole_pieces: json.model.ignore_merges,
        merges_from_ranks: false,
    };
    let post_processor = value(file, "post_processor", json.post_processor)?;
    let (tokens, types) = tokens(file, json.model.vocab.0, json.added_tokens.entries)?;
    let merges = json.model.merges.entries.into_iter().enumerate().map(|(i, merge)| match merge {
        Merge::Joined(joined) => split_merge(file, "model.merges", i, &joined),
        Merge::Parts(a, b) => Ok((a, b)),
    });
    let merges = merges.collect::<Result<_, _>>()?;
    let vocabulary = Vocabulary {
        file: file.to_owned(),
        section: "model.",
        types,
        ..Vocabulary::new(rules, tokens, merges)
    };
    Ok((vocabulary, post_processor))
}

fn check_model(file: &Path, model: &Model) -> Result<(), TokenizerError> {
    if let Some(other) = model.of.as_ref().filter(|of| *of != "BPE") {
        return Err(TokenizerError::invalid(file, "model.type", "`BPE`", format!("`{other}`")));
    }
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if model.byte_fallback || affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        let found = "byte_fallback, a prefix or a suffix";
        return Err(TokenizerError::invalid(file, "model", "byte-level BPE", found));
    }
    Ok(())
}

/// There is no normalizer, or it does nothing.
fn check_normalizer(file: &Path, normalizer: Option<&RawValue>) -> Result<(), TokenizerError> {
    let normalizer = value(file, "normalizer", normalizer)?;
    if normalizer.is_null() || normalizer["normalizers"].as_array().is_some_and(Vec::is_empty) {
        return Ok(());
    }
    Err(TokenizerError::invalid(file, "normalizer", "none", normalizer.to_string()))
}

/// The patterns of a pre-tokenizer, which has to end in `ByteLevel`.
fn patterns(file: &Path, pre_tokenizer: Option<&RawValue>) -> Result<Vec<String>, TokenizerError> {
    let key = "pre_tokenizer";
    let invalid = |expected: &str, found: String| TokenizerError::invalid(file, key, expected, found);
    let pre_tokenizer = value(file, key, pre_tokenizer)?;
    let mut patterns = Vec::new();
    let ends_in_bytes = collect_patterns(&pre_tokenizer, &mut patterns)
        .map_err(|(expected, found)| invalid(expected, found))?;
    if !ends_in_bytes {
        return Err(invalid("a last step `ByteLevel`", pre_tokenizer.to_string()));
    }
    if patterns.len() > MOST_PATTERNS {
        return Err(invalid(&format!("at most {MOST_PATTERNS} patterns"), patterns.len().to_string()));
    }
    match patterns.iter().map(String::len).find(|len| *len > LONGEST_PATTERN) {
        Some(len) => {
            Err(invalid(&format!("patterns of at most {LONGEST_PATTERN} bytes"), format!("one of {len}")))
        }
        None => Ok(patterns),
    }
}

/// Adds the patterns of a pre-tokenizer and says whether it ends in `ByteLevel`.
fn collect_patterns(step: &Value, patterns: &mut Vec<String>) -> Result<bool, (&'static str, String)> {
    let set = |key: &str| step[key].as_bool().unwrap_or(false);
    match step["type"].as_str() {
        Some("Sequence") => {
            let mut is_bytes = false;
            for part in step["pretokenizers"].as_array().into_iter().flatten() {
                if is_bytes {
                    return Err(("nothing after `ByteLevel`", part.to_string()));
                }
                is_bytes = collect_patterns(part, patterns)?;
            }
            Ok(is_bytes)
        }
        Some("Split") => match step["pattern"]["Regex"].as_str() {
            Some(pattern) if step["behavior"] == "Isolated" && !set("invert") => {
                patterns.push(pattern.to_owned());
                Ok(false)
            }
            _ => Err(("a `Split` at a `Regex`, `Isolated`, not inverted", step.to_string())),
        },
        Some("Digits") => {
            patterns.push(if set("individual_digits") { r"\p{N}" } else { r"\p{N}+" }.to_owned());
            Ok(false)
        }
        Some("ByteLevel") if !set("add_prefix_space") => {
            if step["use_regex"].as_bool().unwrap_or(true) {
                patterns.push(GPT2.to_owned());
            }
            Ok(true)
        }
        _ => Err(("`Sequence`, `Split`, `Digits` or `ByteLevel` without prefix space", step.to_string())),
    }
}

/// The tokens by id, and what they are for.
fn tokens(
    file: &Path,
    vocab: Vec<(String, u32)>,
    added: Vec<AddedToken>,
) -> Result<(Vec<String>, Vec<TokenType>), TokenizerError> {
    let invalid =
        |key: &str, expected: &str, found: String| TokenizerError::invalid(file, key, expected, found);
    let most = MOST_TOKENS.min(vocab.len() + added.len() + LARGEST_GAP);
    let ids = vocab.iter().map(|(_, id)| *id).chain(added.iter().map(|token| token.id));
    let size = ids.max().map_or(0, |last| last as usize + 1);
    if size > most {
        return Err(invalid("model.vocab", &format!("ids below {most}"), (size - 1).to_string()));
    }
    let mut tokens = vec![String::new(); size];
    let mut types = vec![TokenType::Unused; size];
    for (token, id) in vocab {
        let id = id as usize;
        if types[id] != TokenType::Unused {
            let found = format!("{:?} and {token:?} as {id}", tokens[id]);
            return Err(invalid("model.vocab", "an id for each token", found));
        }
        (tokens[id], types[id]) = (token, TokenType::Normal);
    }
    for token in added {
        if token.lstrip || token.rstrip || token.single_word {
            let expected = "tokens without lstrip, rstrip and single_word";
            return Err(invalid("added_tokens", expected, format!("{:?}", token.content)));
        }
        let control = token.special || looks_like_control(&token.content);
        let id = token.id as usize;
        (tokens[id], types[id]) =
            (token.content, if control { TokenType::Control } else { TokenType::UserDefined });
    }
    Ok((tokens, types))
}

/// Whether a `TemplateProcessing` puts BOS first.
fn template_starts_with(post_processor: &Value, vocabulary: &Vocabulary, bos: Option<u32>) -> bool {
    let steps =
        post_processor["processors"].as_array().map_or(std::slice::from_ref(post_processor), Vec::as_slice);
    let bos = bos.and_then(|id| vocabulary.tokens.get(id as usize));
    steps.iter().any(|step| bos.is_some_and(|bos| step["single"][0]["SpecialToken"]["id"] == bos.as_str()))
}

/// A template alone, or the one named `default` in a list of several.
fn default_template(value: &Value) -> Option<&str> {
    let named = |list: &'_ Value| list.as_array()?.iter().position(|entry| entry["name"] == "default");
    value.as_str().or_else(|| value[named(value)?]["template"].as_str())
}

/// One id, a list of ids, or none.
fn ids(file: &Path, key: &str, value: &Value) -> Result<Vec<u32>, TokenizerError> {
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    list.iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect::<Option<_>>()
        .ok_or_else(|| TokenizerError::invalid(file, key, "a token id or a list of them", value.to_string()))
}

fn read(file: &Path, most: usize) -> Result<String, TokenizerError> {
    let unreadable = |source| TokenizerError::Read { file: file.to_owned(), source };
    // Before it is opened: opening a pipe would wait for a writer, and a device may have no end.
    let facts = fs::metadata(file).map_err(unreadable)?;
    if !facts.is_file() {
        return Err(unreadable(io::Error::new(ErrorKind::InvalidInput, "not a regular file")));
    }
    if facts.len() > most as u64 {
        let expected = format!("at most {most} bytes");
        return Err(TokenizerError::invalid(file, "size", expected, facts.len().to_string()));
    }
    fs::read_to_string(file).map_err(unreadable)
}

fn parse<'j, T: Deserialize<'j>>(file: &Path, json: &'j str) -> Result<T, TokenizerError> {
    serde_json::from_str(json).map_err(|source| TokenizerError::Json { file: file.to_owned(), source })
}

/// A part of a file as a value, which takes many times its bytes; null if it is not there.
fn value(file: &Path, key: &str, part: Option<&RawValue>) -> Result<Value, TokenizerError> {
    let json = part.map_or("null", RawValue::get);
    if json.len() > LONGEST_VALUE {
        let expected = format!("at most {LONGEST_VALUE} bytes");
        return Err(TokenizerError::invalid(file, key, expected, json.len().to_string()));
    }
    // Not the error of the file, as lines and columns count from the part's start.
    serde_json::from_str(json).map_err(|error| TokenizerError::invalid(file, key, "JSON", error.to_string()))
}

fn read_text_if_there(file: &Path, most: usize) -> Result<Option<String>, TokenizerError> {
    match read(file, most) {
        Err(TokenizerError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn read_if_there<T: DeserializeOwned>(file: &Path) -> Result<Option<T>, TokenizerError> {
    read_text_if_there(file, LARGEST_CONFIG)?.map(|text| parse(file, &text)).transpose()
}
