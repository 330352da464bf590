//! Text to token ids and back: the byte-level BPE tokenizers of the DeepSeek line, from the keys of a GGUF file or a
//! Hugging Face directory.
//!
//! A text goes through four stages, each a file here: special tokens are cut out of it (`special.rs`), the rest is
//! cut into pieces by the patterns of the vocabulary's [`Rules`] (`pre.rs`), a piece's bytes are written as
//! [`letter`]s (`alphabet.rs`), and these are merged (by the `tokenizers` crate). Nothing is normalised, so
//! [`Tokenizer::decode`] gives the text back byte for byte.
//!
//! ```
//! use model_deepseek::tokenizer::{Rules, Special, Tokenizer, Vocabulary, letter};
//!
//! // from a model: Vocabulary::from_gguf(metadata), or Tokenizer::from_directory("DeepSeek-V3")
//! let mut tokens: Vec<String> = (0..=255).map(|byte| letter(byte).to_string()).collect();
//! tokens.extend(["th", "the", "Ġthe", "<|end|>"].map(String::from));
//! let merges = [("t", "h"), ("th", "e"), ("Ġ", "the")].map(|(a, b)| (a.into(), b.into()));
//! let rules = Rules::named("deepseek-v3").unwrap();
//! let tokenizer = Tokenizer::new(Vocabulary::new(rules, tokens, merges.into()))?;
//!
//! assert_eq!(tokenizer.encode("the the", Special::Literal), [257, 258]);
//! assert_eq!(tokenizer.encode("the<|end|>", Special::Parse), [257, 259]);
//! assert!(tokenizer.is_end_of_generation(259));
//!
//! let ids = tokenizer.encode("naïve 文", Special::Literal);
//! assert_eq!(tokenizer.decode(&ids)?, "naïve 文".as_bytes());
//! let mut decoder = tokenizer.decoder(); // for ids that come one by one
//! let texts = ids.iter().map(|&id| decoder.push(id)).collect::<Result<Vec<_>, _>>()?;
//! assert_eq!(texts[2..4], ["", "ï"]);
//! # Ok::<(), model_deepseek::tokenizer::TokenizerError>(())
//! ```

mod alphabet;
mod check;
mod decoder;
mod error;
mod hugging_face;
mod json;
mod pre;
mod ranks;
mod special;
mod vocabulary;

pub use alphabet::letter;
pub use decoder::Decoder;
pub use error::TokenizerError;
pub use pre::{PatternError, PreTokenizer, Rules};
pub use vocabulary::{TokenType, Vocabulary, looks_like_control};

use crate::source::{Layout, gguf::Metadata};
use check::{Checked, Token};
use special::{Fragment, SpecialTokens};
use std::{fmt, path::Path};
use tokenizers::{
    Model,
    models::bpe::{BPE, Vocab},
};

/// What is done with control tokens that are written out in a text, such as `<｜User｜>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// They are text like any other. For what users write: nobody ends a turn by typing its mark.
    Literal,
    /// They are the tokens they name. For what a chat template writes.
    Parse,
}

/// A vocabulary, ready to encode and decode. Any number of threads may use it at once.
pub struct Tokenizer {
    pre: PreTokenizer,
    merges: BPE,
    /// What is recognised in any text.
    literal: SpecialTokens,
    /// The same and control tokens.
    parsed: SpecialTokens,
    pieces: Pieces,
    /// Sorted.
    ends: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Checks a vocabulary and makes it ready.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`], naming the key: a token that is there twice, a list of types of another length,
    /// a merge of or into what is no token, a special id that is none, tokens that are too long, a pattern that does not
    /// compile.
    pub fn new(mut vocabulary: Vocabulary) -> Result<Tokenizer, TokenizerError> {
        let mut merges = std::mem::take(&mut vocabulary.merges);
        let checked = Checked::new(&vocabulary)?;
        let of_types = |wanted: &'static [TokenType]| {
            checked.tokens().filter(|token| wanted.contains(&token.of)).map(|token| (token.id, token.text))
        };
        let merged = || of_types(Checked::MERGED);
        if merges.is_empty() && vocabulary.rules.merges_from_ranks {
            merges = ranks::merges(&merged().collect::<Vec<_>>());
        }
        checked.check_merges(&merges)?;
        let merges = BPE::builder()
            .vocab_and_merges(merged().map(|(id, text)| (text.to_owned(), id)).collect::<Vocab>(), merges)
            .ignore_merges(vocabulary.rules.whole_pieces)
            .build()
            .map_err(|error| vocabulary.invalid("merges", "merges of known tokens", error.to_string()))?;

        let pre = PreTokenizer::new(&vocabulary.rules.patterns).map_err(|error| {
            vocabulary.invalid("pre", "small patterns without look-around", error.to_string())
        })?;
        let special = |wanted| {
            SpecialTokens::new(of_types(wanted))
                .map_err(|error| vocabulary.invalid("tokens", "fewer special tokens", error.to_string()))
        };
        Ok(Tokenizer {
            pre,
            merges,
            literal: special(Checked::LITERAL)?,
            parsed: special(Checked::PARSED)?,
            pieces: Pieces::new(checked.tokens()),
            ends: checked.ends(),
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            add_bos: vocabulary.add_bos,
            chat_template: vocabulary.chat_template,
        })
    }

    /// The tokenizer of a GGUF file.
    ///
    /// # Errors
    /// Those of [`Vocabulary::from_gguf`] and [`Tokenizer::new`].
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(Vocabulary::from_gguf(metadata)?)
    }

    /// The tokenizer at `path`: that of a directory with a `tokenizer.json`, or of a GGUF file (or of a directory with one
    /// GGUF model). Nothing but the tokenizer has to be there: no weights, of a GGUF file [its keys](Metadata::open), of
    /// a split set the first file.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_gguf`] and [`Tokenizer::from_directory`]; a path that leads to neither.
    pub fn open(path: &Path) -> Result<Tokenizer, TokenizerError> {
        if path.join(hugging_face::TOKENIZER).is_file() {
            return Tokenizer::from_directory(path);
        }
        match Layout::find(path)? {
            Layout::Gguf(file) => Tokenizer::from_gguf(&Metadata::open(&file)?),
            Layout::HuggingFace(_) => Tokenizer::from_directory(path),
        }
    }

    /// The tokenizer of a Hugging Face directory.
    ///
    /// # Errors
    /// Those of [`Vocabulary::from_directory`] and [`Tokenizer::new`].
    pub fn from_directory(directory: &Path) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(Vocabulary::from_directory(directory)?)
    }

    /// The ids of a text, without BOS ([`Tokenizer::with_bos`] adds it).
    ///
    /// A byte for which the vocabulary has no token is left out, as llama.cpp and Hugging Face do; the published
    /// vocabularies have one for every byte that UTF-8 can hold.
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        let tokens = match special {
            Special::Literal => &self.literal,
            Special::Parse => &self.parsed,
        };
        let mut ids = Vec::new();
        let mut letters = String::new();
        tokens.split(text, |fragment| match fragment {
            Fragment::Token(id) => ids.push(id),
            Fragment::Text(text) => {
                for piece in self.pre.cut(text) {
                    letters.clear();
                    letters.extend(text[piece].bytes().map(letter));
                    // fails only where an unknown token is configured, which here it never is
                    let merged = self.merges.tokenize(&letters).unwrap_or_default();
                    ids.extend(merged.iter().map(|token| token.id));
                }
            }
        });
        ids
    }

    /// The ids of bytes that need not be UTF-8: what is no character becomes U+FFFD, as
    /// [`String::from_utf8_lossy`] does it (strictly: no surrogates, no overlong forms).
    pub fn encode_bytes(&self, bytes: &[u8], special: Special) -> Vec<u32> {
        self.encode(&String::from_utf8_lossy(bytes), special)
    }

    /// Puts BOS in front if the model's texts are to start with it, and do not yet: chat templates write it
    /// themselves.
    pub fn with_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        ids
    }

    /// The bytes of a sequence of tokens, one after the other. They need not be UTF-8: a token may be a part of a
    /// character. Control tokens give the text that names them.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`].
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, TokenizerError> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.known_piece(id)?);
        }
        Ok(bytes)
    }

    /// For tokens that come one at a time.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(self)
    }

    /// The bytes of one token, none for an unused one; `None` if there is no such id.
    pub fn piece(&self, id: u32) -> Option<&[u8]> {
        self.pieces.get(id)
    }

    fn known_piece(&self, id: u32) -> Result<&[u8], TokenizerError> {
        self.piece(id).ok_or(TokenizerError::UnknownId { id, size: self.size() })
    }

    /// How many tokens there are, unused ones included: ids are below it.
    pub fn size(&self) -> usize {
        self.pieces.ends.len()
    }

    /// The token that begins a text, if there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if there is one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a text is to start with BOS.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether a model that writes this token has said what it had to say.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// The chat template that came with the vocabulary; see [`ChatTemplate`](crate::chat::ChatTemplate).
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tokenizer { bos, eos, ends, add_bos, .. } = self;
        write!(
            f,
            "Tokenizer({} tokens, bos {bos:?}, eos {eos:?}, ends {ends:?}, add_bos {add_bos})",
            self.size()
        )
    }
}

/// The bytes of all tokens, in one allocation.
#[derive(Default)]
struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Pieces {
    fn new<'t>(tokens: impl Iterator<Item = Token<'t>>) -> Pieces {
        let mut pieces = Pieces::default();
        for Token { text, of, .. } in tokens {
            match of {
                TokenType::Normal => alphabet::append_bytes(text, &mut pieces.bytes),
                of if of.is_used() => pieces.bytes.extend_from_slice(text.as_bytes()),
                _ => {}
            }
            pieces.ends.push(pieces.bytes.len());
        }
        pieces
    }

    fn get(&self, id: u32) -> Option<&[u8]> {
        let id = usize::try_from(id).ok()?;
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.bytes[start..end])
    }
}

/// For tests that feed broken bytes.
#[doc(hidden)]
pub mod hostile {
    use super::*;

    /// A `tokenizer.json`, and what is made of it.
    pub fn read_json(text: &str) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(hugging_face::vocabulary_of(Path::new("hostile.json"), text)?.0)
    }
}
