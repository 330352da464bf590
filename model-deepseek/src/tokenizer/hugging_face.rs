use super::{Rules, TokenType, TokenizerError, Vocabulary, looks_like_control, vocabulary::split_merge};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::{
    collections::HashMap,
    fs,
    io::{self, ErrorKind},
    path::Path,
};

/// The part of a `tokenizer.json` that matters here.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default, rename = "type")]
    of: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

/// Older files write `"a b"`, newer ones `["a", "b"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Joined(String),
    Parts(String, String),
}

/// Ids may leave gaps and the model may have more rows than there are tokens, but no more than this: files are not
/// to make us allocate at will. DeepSeek's have some hundreds.
const LARGEST_GAP: usize = 1 << 16;

/// GPT-2's own pattern, which `ByteLevel` stands for where it says `use_regex`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

impl Vocabulary {
    /// Reads a `tokenizer.json`. It names no begin or end of text and has no template: those are in the files beside
    /// it, see [`Vocabulary::from_directory`].
    ///
    /// The types of added tokens are those that converters to GGUF would write, so that both files of a model give
    /// the same ids: control if flagged special or [looking like it](looks_like_control), else user defined.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, and anything in it that these tokenizers do not have: another model
    /// than byte-level BPE, a normalizer, other steps than `Split`, `Digits` and `ByteLevel`.
    pub fn from_tokenizer_json(file: &Path) -> Result<Vocabulary, TokenizerError> {
        Ok(read_tokenizer_json(file)?.0)
    }

    /// Reads a model's directory: `tokenizer.json`, and where they are there `tokenizer_config.json` (special tokens,
    /// `add_bos_token`, template), `chat_template.jinja`, `config.json` and `generation_config.json` (ids).
    ///
    /// Where nothing says whether a text starts with BOS, it does if the directory has no `tokenizer_config.json` or
    /// names a Llama tokenizer in it, which is what Hugging Face takes for DeepSeek models.
    ///
    /// # Errors
    /// As [`Vocabulary::from_tokenizer_json`], for each of the files.
    pub fn from_directory(directory: &Path) -> Result<Vocabulary, TokenizerError> {
        let (mut vocabulary, post_processor) = read_tokenizer_json(&directory.join("tokenizer.json"))?;
        let tokenizer_config: Option<Value> = read_if_there(&directory.join("tokenizer_config.json"))?;
        let known = |value: &Value| {
            let text = value.as_str().or_else(|| value["content"].as_str())?;
            vocabulary.tokens.iter().position(|token| token == text).map(|id| id as u32)
        };
        let named = |key: &str| tokenizer_config.as_ref().and_then(|config| known(&config[key]));
        let (named_bos, named_eos) = (named("bos_token"), named("eos_token"));

        let config_file = directory.join("config.json");
        let config: Value = read_if_there(&config_file)?.unwrap_or_default();
        let bos = ids(&config_file, &config, "bos_token_id")?.first().copied();
        let eos = ids(&config_file, &config, "eos_token_id")?;
        let generation_file = directory.join("generation_config.json");
        let generation: Value = read_if_there(&generation_file)?.unwrap_or_default();
        vocabulary.bos = named_bos.or(bos);
        vocabulary.eos = named_eos.or(eos.first().copied());
        vocabulary.end_of_generation = ids(&generation_file, &generation, "eos_token_id")?;
        vocabulary.end_of_generation.extend(eos);

        if let Some(rows) = config["vocab_size"].as_u64().and_then(|rows| usize::try_from(rows).ok()) {
            let most = vocabulary.tokens.len() + LARGEST_GAP;
            if rows > most {
                let expected = format!("at most {most}, for {} tokens", vocabulary.tokens.len());
                return Err(TokenizerError::invalid(&config_file, "vocab_size", expected, rows.to_string()));
            }
            let rows = rows.max(vocabulary.tokens.len());
            vocabulary.tokens.resize(rows, String::new());
            vocabulary.types.resize(rows, TokenType::Unused);
        }

        let starts_with_bos = |config: &Value| {
            config["add_bos_token"].as_bool().unwrap_or_else(|| {
                let class = config["tokenizer_class"].as_str().unwrap_or_default();
                class.starts_with("Llama")
                    || template_starts_with(&post_processor, &vocabulary, vocabulary.bos)
            })
        };
        vocabulary.add_bos =
            vocabulary.bos.is_some() && tokenizer_config.as_ref().is_none_or(starts_with_bos);
        let template = read_text_if_there(&directory.join("chat_template.jinja"))?;
        vocabulary.chat_template =
            template.or_else(|| default_template(&tokenizer_config?["chat_template"]).map(str::to_owned));
        Ok(vocabulary)
    }
}

/// The vocabulary and the post-processor, which may say that BOS is added.
fn read_tokenizer_json(file: &Path) -> Result<(Vocabulary, Value), TokenizerError> {
    let json: TokenizerJson = parse(file, &read(file)?)?;
    let Model { of, vocab, merges, ignore_merges, .. } = json.model;
    let invalid =
        |key: &str, expected: &str, found: String| TokenizerError::invalid(file, key, expected, found);
    if let Some(other) = of.filter(|of| of != "BPE") {
        return Err(invalid("model.type", "`BPE`", format!("`{other}`")));
    }
    let affixes = [&json.model.continuing_subword_prefix, &json.model.end_of_word_suffix];
    if json.model.byte_fallback || affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
        return Err(invalid("model", "byte-level BPE", "byte_fallback, a prefix or a suffix".into()));
    }
    let normalizer = &json.normalizer;
    if !normalizer.is_null() && normalizer["normalizers"].as_array().is_none_or(|steps| !steps.is_empty()) {
        return Err(invalid("normalizer", "none", normalizer.to_string()));
    }
    let mut patterns = Vec::new();
    if !collect_patterns(&json.pre_tokenizer, &mut patterns)
        .map_err(|(expected, found)| invalid("pre_tokenizer", expected, found))?
    {
        return Err(invalid("pre_tokenizer", "a last step `ByteLevel`", json.pre_tokenizer.to_string()));
    }

    let most = vocab.len() + json.added_tokens.len() + LARGEST_GAP;
    let added = json.added_tokens.iter().map(|token| token.id);
    let size = vocab.values().copied().chain(added).max().map_or(0, |last| last as usize + 1);
    if size > most {
        return Err(invalid("model.vocab", &format!("ids below {most}"), (size - 1).to_string()));
    }
    let mut tokens = vec![String::new(); size];
    let mut types = vec![TokenType::Unused; size];
    for (token, id) in vocab {
        let id = id as usize;
        if types[id] != TokenType::Unused {
            return Err(invalid(
                "model.vocab",
                "an id for each token",
                format!("{:?} and {token:?} as {id}", tokens[id]),
            ));
        }
        (tokens[id], types[id]) = (token, TokenType::Normal);
    }
    for token in json.added_tokens {
        if token.lstrip || token.rstrip || token.single_word {
            let expected = "tokens without lstrip, rstrip and single_word";
            return Err(invalid("added_tokens", expected, format!("{:?}", token.content)));
        }
        let control = token.special || looks_like_control(&token.content);
        let id = token.id as usize;
        (tokens[id], types[id]) =
            (token.content, if control { TokenType::Control } else { TokenType::UserDefined });
    }
    let merges = merges.into_iter().enumerate().map(|(i, merge)| match merge {
        Merge::Joined(joined) => split_merge(file, "model.merges", i, &joined),
        Merge::Parts(a, b) => Ok((a, b)),
    });
    let merges = merges.collect::<Result<_, _>>()?;
    let rules = Rules { patterns, whole_pieces: ignore_merges, merges_from_ranks: false };
    let vocabulary = Vocabulary {
        file: file.to_owned(),
        section: "model.",
        types,
        ..Vocabulary::new(rules, tokens, merges)
    };
    Ok((vocabulary, json.post_processor))
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
fn ids(file: &Path, config: &Value, key: &str) -> Result<Vec<u32>, TokenizerError> {
    let value = &config[key];
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

/// Larger files are refused, as memory goes with their size. Published ones have up to 20 MB.
const LARGEST_FILE: u64 = 64 << 20;

fn read(file: &Path) -> Result<String, TokenizerError> {
    let unreadable = |source| TokenizerError::Read { file: file.to_owned(), source };
    // Before it is opened: opening a pipe would wait for a writer, and a device may have no end.
    let facts = fs::metadata(file).map_err(unreadable)?;
    if !facts.is_file() {
        return Err(unreadable(io::Error::new(ErrorKind::InvalidInput, "not a regular file")));
    }
    if facts.len() > LARGEST_FILE {
        let expected = format!("at most {LARGEST_FILE} bytes");
        return Err(TokenizerError::invalid(file, "size", expected, facts.len().to_string()));
    }
    fs::read_to_string(file).map_err(unreadable)
}

fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, TokenizerError> {
    serde_json::from_str(text).map_err(|source| TokenizerError::Json { file: file.to_owned(), source })
}

fn read_text_if_there(file: &Path) -> Result<Option<String>, TokenizerError> {
    match read(file) {
        Err(TokenizerError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn read_if_there(file: &Path) -> Result<Option<Value>, TokenizerError> {
    read_text_if_there(file)?.map(|text| parse(file, &text)).transpose()
}
