use super::{Rules, TokenizerError};
use crate::source::{
    SourceError,
    gguf::{Array, Metadata},
};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// What a token is for (`llama_token_type`). The numbers are those in `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenType {
    /// 1: text, reached by merges.
    Normal,
    /// 2: stands for what cannot be encoded. Byte-level vocabularies need none; treated as a control token.
    Unknown,
    /// 3: marks structure, such as the end of a turn; recognised in text only on demand.
    Control,
    /// 4: recognised in text always, as a whole.
    UserDefined,
    /// 5: fills a gap in the numbering; never recognised, has no text.
    Unused,
    /// 6: a byte as `<0xNN>`, of other kinds of vocabularies; treated as unused.
    Byte,
}

impl TokenType {
    /// Whether a token of this type stands for anything.
    pub(super) fn is_used(self) -> bool {
        !matches!(self, TokenType::Unused | TokenType::Byte)
    }

    fn from_number(number: i32) -> Option<TokenType> {
        use TokenType::*;
        let all = [Normal, Unknown, Control, UserDefined, Unused, Byte];
        usize::try_from(number).ok()?.checked_sub(1).and_then(|i| all.get(i).copied())
    }
}

/// All that makes a tokenizer, as plain data: read from a file or put together by hand.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// The file it comes from, for messages.
    pub file: PathBuf,
    /// What the names of its keys start with there, for messages: `tokenizer.ggml.` or `model.`.
    pub section: &'static str,
    /// How text is cut and merged.
    pub rules: Rules,
    /// The tokens by id: normal ones in the byte alphabet ([`letter`](super::letter)), the others as they are.
    pub tokens: Vec<String>,
    /// The type of each token. If empty, those that [look like control tokens](looks_like_control) are it and the
    /// others normal.
    pub types: Vec<TokenType>,
    /// Pairs that merge, the first first.
    pub merges: Vec<(String, String)>,
    /// Begin of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
    /// Further tokens that end what a model says; those known by name need not be here.
    pub end_of_generation: Vec<u32>,
    /// Whether a text is to start with `bos`.
    pub add_bos: bool,
    /// The chat template, in Jinja.
    pub chat_template: Option<String>,
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// The most tokens and merges that a file may have: half as many again as the largest vocabularies in use. Each takes many
/// times its bytes of the file once it can be looked up.
pub(super) const MOST_TOKENS: usize = 1 << 18;
pub(super) const MOST_MERGES: usize = 1 << 19;

/// The most bytes of all tokens, and of all merges. Published vocabularies have up to 4 million.
pub(super) const MOST_BYTES: usize = 16 << 20;

/// The most bytes of a chat template as it is copied; [`ChatTemplate`](crate::chat::ChatTemplate) takes fewer.
pub(super) const MOST_TEMPLATE: usize = 1 << 20;

impl Vocabulary {
    /// A vocabulary of `tokens` and `merges`, without special ids and with types judged by text.
    pub fn new(rules: Rules, tokens: Vec<String>, merges: Vec<(String, String)>) -> Vocabulary {
        Vocabulary {
            file: PathBuf::from("(no file)"),
            section: "",
            rules,
            tokens,
            types: Vec::new(),
            merges,
            bos: None,
            eos: None,
            end_of_generation: Vec::new(),
            add_bos: false,
            chat_template: None,
        }
    }

    pub(super) fn invalid(
        &self,
        key: impl fmt::Display,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> TokenizerError {
        TokenizerError::invalid(&self.file, format!("{}{key}", self.section), expected, found)
    }

    /// Reads the keys `tokenizer.*` of a GGUF file.
    ///
    /// # Errors
    /// A key that is missing or of another type, a tokenizer or pre-tokenizer that is not known here (the known ones
    /// are listed), more than 2¹⁸ tokens or 2¹⁹ merges or 16 MiB of either, a token that is not UTF-8, a type that does
    /// not exist, a merge that is not two tokens.
    pub fn from_gguf(metadata: &Metadata) -> Result<Vocabulary, TokenizerError> {
        let model = metadata.required(MODEL, "string", metadata.get_str(MODEL)?)?;
        if model != "gpt2" {
            return Err(metadata.invalid(MODEL, "`gpt2` (byte-level BPE)", format!("`{model}`")).into());
        }
        let pre = metadata.required(PRE, "string", metadata.get_str(PRE)?)?;
        let rules = Rules::named(pre).ok_or_else(|| {
            let known: Vec<&str> = Rules::names().collect();
            metadata.invalid(PRE, format!("one of {}", known.join(", ")), format!("`{pre}`"))
        })?;

        let tokens = metadata.required(TOKENS, "array of strings", metadata.get_array(TOKENS)?)?;
        check_strings(metadata, TOKENS, tokens, MOST_TOKENS)?;
        let tokens =
            tokens.strings()?.map(|token| Ok(token?.to_owned())).collect::<Result<_, TokenizerError>>()?;
        let types = match metadata.get_array(TYPES)? {
            Some(types) => {
                check_count(metadata, TYPES, types, MOST_TOKENS)?;
                types.i32s()?.map(|number| token_type(metadata, number?)).collect::<Result<_, _>>()?
            }
            None => Vec::new(),
        };
        let merges = match metadata.get_array(MERGES)? {
            None if rules.merges_from_ranks => Vec::new(),
            merges => {
                let merges = metadata.required(MERGES, "array of strings", merges)?;
                check_strings(metadata, MERGES, merges, MOST_MERGES)?;
                let merges = merges.strings()?.enumerate();
                merges
                    .map(|(i, merge)| split_merge(metadata.file(), MERGES, i, merge?))
                    .collect::<Result<_, _>>()?
            }
        };

        let mut end_of_generation = Vec::new();
        for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            end_of_generation.extend(metadata.get_u32(key)?);
        }
        Ok(Vocabulary {
            file: metadata.file().to_owned(),
            section: "tokenizer.ggml.",
            rules,
            tokens,
            types,
            merges,
            bos: metadata.get_u32("tokenizer.ggml.bos_token_id")?,
            eos: metadata.get_u32("tokenizer.ggml.eos_token_id")?,
            end_of_generation,
            add_bos: metadata.get_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            chat_template: chat_template(metadata)?.map(str::to_owned),
        })
    }
}

fn check_count(metadata: &Metadata, key: &str, array: Array<'_>, most: usize) -> Result<(), SourceError> {
    match array.len() {
        len if len <= most => Ok(()),
        len => Err(metadata.invalid(key, format!("at most {most} elements"), len.to_string())),
    }
}

/// At most `most` strings of at most [`MOST_BYTES`] in all, before any of them is copied.
fn check_strings(metadata: &Metadata, key: &str, array: Array<'_>, most: usize) -> Result<(), SourceError> {
    check_count(metadata, key, array, most)?;
    let bytes = array.byte_strings()?.try_fold(0, |sum, string| Ok::<_, SourceError>(sum + string?.len()))?;
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    Err(metadata.invalid(key, format!("at most {MOST_BYTES} bytes in all"), bytes.to_string()))
}

fn chat_template(metadata: &Metadata) -> Result<Option<&str>, SourceError> {
    let key = "tokenizer.chat_template";
    match metadata.get_str(key)? {
        Some(template) if template.len() > MOST_TEMPLATE => {
            let expected = format!("at most {MOST_TEMPLATE} bytes");
            Err(metadata.invalid(key, expected, template.len().to_string()))
        }
        template => Ok(template),
    }
}

fn token_type(metadata: &Metadata, number: i32) -> Result<TokenType, TokenizerError> {
    let error = || metadata.invalid(TYPES, "types 1 to 6", number.to_string()).into();
    TokenType::from_number(number).ok_or_else(error)
}

/// A merge is written as its two parts with a space between; in the byte alphabet no part holds one.
pub(super) fn split_merge(
    file: &Path,
    key: &str,
    index: usize,
    merge: &str,
) -> Result<(String, String), TokenizerError> {
    match merge.split_once(' ') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(' ') => Ok((a.into(), b.into())),
        _ => {
            let found = format!("{merge:?}");
            Err(TokenizerError::invalid(
                file,
                format!("{key}[{index}]"),
                "two tokens and a space between",
                found,
            ))
        }
    }
}

/// Whether a token is a control token by its looks. Publishers flag many of them as ordinary; converters to GGUF go
/// by the text, and so do we.
pub fn looks_like_control(text: &str) -> bool {
    let between = |open: &str, close: &str| {
        text.len() >= open.len() + close.len() && text.starts_with(open) && text.ends_with(close)
    };
    between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
        || matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
}

/// Tokens that end what a model says, known by name since files do not say it of all of them. Padding and file
/// separators are among them: once a model writes those, nothing meant for the reader follows. After llama.cpp,
/// `llama_vocab::impl::load`, as far as the models here have them.
const ENDS: &[&str] = &[
    "<｜end▁of▁sentence｜>", // DeepSeek
    "[EOS]",                 // Kimi K2
    "[EOT]",
    "<|im_end|>",
    "[PAD]",
    "<|endoftext|>", // GLM
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<EOT>",
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Tokens for filling in the middle; old files give them a type that would match them in any text.
const FILLS: &[&str] = &[
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|code_prefix|>",
    "<|code_suffix|>",
    "<|code_middle|>",
];

/// Whether a token of this text ends what a model says.
pub(super) fn ends_generation(text: &str) -> bool {
    ENDS.contains(&text)
}

/// The types that a vocabulary's tokens really have: see [`Vocabulary::types`], and what is a control token by name
/// is one whatever the file says.
pub(super) fn settled_type(text: &str, given: Option<TokenType>) -> TokenType {
    let by_name = ENDS.contains(&text) || FILLS.contains(&text);
    match given {
        Some(TokenType::Normal | TokenType::UserDefined) if by_name => TokenType::Control,
        Some(given) => given,
        None if by_name || looks_like_control(text) => TokenType::Control,
        None => TokenType::Normal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types() {
        use TokenType::*;
        for (text, given, expected) in [
            ("abc", None, Normal),
            ("<|", None, Normal),
            ("<|>", None, Normal),
            ("<|User|>", None, Control),
            ("<｜User｜>", None, Control),
            ("<|User|>", Some(UserDefined), UserDefined),
            ("<｜fim▁hole｜>", Some(UserDefined), Control),
            ("[EOT]", Some(Normal), Control),
            ("[EOT]", Some(Unused), Unused),
        ] {
            assert_eq!(settled_type(text, given), expected, "{text} given as {given:?}");
        }
        let numbers: Vec<_> = (-1..8).map(TokenType::from_number).collect();
        assert_eq!(numbers[2..8], [Normal, Unknown, Control, UserDefined, Unused, Byte].map(Some));
        assert_eq!([numbers[0], numbers[1], numbers[8]], [None; 3]);
    }

    #[test]
    fn merges_are_two_tokens() {
        let split = |merge| split_merge(Path::new("f.gguf"), "merges", 7, merge);
        assert_eq!(split("Ġ t").unwrap(), ("Ġ".into(), "t".into()));
        for bad in ["", " ", "a", "a ", " a", "a b c", "a  b"] {
            let message = split(bad).unwrap_err().to_string();
            assert_eq!(
                message,
                format!("f.gguf: merges[7]: expected two tokens and a space between, found {bad:?}")
            );
        }
    }
}
