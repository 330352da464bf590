//! What matters of a `tokenizer.json`, read within bounds that hold while it is read: lists and maps end in an error
//! where they grow too long, other values stay the text that they are until somebody has looked at their length, and
//! what nobody asks for is skipped.

use super::vocabulary::{MOST_BYTES, MOST_MERGES, MOST_TOKENS};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor, value::SeqAccessDeserializer},
};
use serde_json::value::RawValue;
use std::{fmt, marker::PhantomData};

#[derive(Deserialize)]
pub(super) struct TokenizerJson<'j> {
    #[serde(default)]
    pub(super) added_tokens: List<AddedToken>,
    #[serde(borrow, default)]
    pub(super) normalizer: Option<&'j RawValue>,
    #[serde(borrow, default)]
    pub(super) pre_tokenizer: Option<&'j RawValue>,
    #[serde(borrow, default)]
    pub(super) post_processor: Option<&'j RawValue>,
    pub(super) model: Model,
}

#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub(super) id: u32,
    pub(super) content: String,
    #[serde(default)]
    pub(super) special: bool,
    #[serde(default)]
    pub(super) lstrip: bool,
    #[serde(default)]
    pub(super) rstrip: bool,
    #[serde(default)]
    pub(super) single_word: bool,
}

#[derive(Deserialize)]
pub(super) struct Model {
    #[serde(default, rename = "type")]
    pub(super) of: Option<String>,
    pub(super) vocab: Vocab,
    pub(super) merges: List<Merge>,
    #[serde(default)]
    pub(super) ignore_merges: bool,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    #[serde(default)]
    pub(super) continuing_subword_prefix: Option<String>,
    #[serde(default)]
    pub(super) end_of_word_suffix: Option<String>,
}

/// Older files write `"a b"`, newer ones `["a", "b"]`.
pub(super) enum Merge {
    Joined(String),
    Parts(String, String),
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Merge, D::Error> {
        struct Forms;

        impl<'de> Visitor<'de> for Forms {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens, in a list or with a space between")
            }

            fn visit_str<E: Error>(self, joined: &str) -> Result<Merge, E> {
                Ok(Merge::Joined(joined.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Merge, A::Error> {
                let (a, b) = Deserialize::deserialize(SeqAccessDeserializer::new(parts))?;
                Ok(Merge::Parts(a, b))
            }
        }

        deserializer.deserialize_any(Forms)
    }
}

/// What a list of bounded length is made of.
pub(super) trait Entry {
    /// The list's key.
    const KEY: &'static str;
    /// How many there may be.
    const MOST: usize;

    /// The bytes of its text.
    fn bytes(&self) -> usize;
}

impl Entry for AddedToken {
    const KEY: &'static str = "added_tokens";
    const MOST: usize = MOST_TOKENS;

    fn bytes(&self) -> usize {
        self.content.len()
    }
}

impl Entry for Merge {
    const KEY: &'static str = "model.merges";
    const MOST: usize = MOST_MERGES;

    fn bytes(&self) -> usize {
        match self {
            Merge::Joined(joined) => joined.len(),
            Merge::Parts(a, b) => a.len() + b.len(),
        }
    }
}

/// A token and its id.
impl Entry for (String, u32) {
    const KEY: &'static str = "model.vocab";
    const MOST: usize = MOST_TOKENS;

    fn bytes(&self) -> usize {
        self.0.len()
    }
}

/// A list of at most [`Entry::MOST`] entries, of [`MOST_BYTES`] in all.
pub(super) struct List<T> {
    pub(super) entries: Vec<T>,
    bytes: usize,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        List { entries: Vec::new(), bytes: 0 }
    }
}

impl<T: Entry> List<T> {
    fn push<E: Error>(&mut self, entry: T) -> Result<(), E> {
        self.bytes += entry.bytes();
        let (what, most) = match self.entries.len() {
            len if len == T::MOST => ("entries", T::MOST),
            _ if self.bytes > MOST_BYTES => ("bytes in all", MOST_BYTES),
            _ => {
                self.entries.push(entry);
                return Ok(());
            }
        };
        Err(E::custom(format_args!("{}: expected at most {most} {what}, found more", T::KEY)))
    }
}

impl<'de, T: Entry + Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T>(PhantomData<T>);

        impl<'de, T: Entry + Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "the list `{}`", T::KEY)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<List<T>, A::Error> {
                let mut list = List::default();
                while let Some(entry) = elements.next_element()? {
                    list.push(entry)?;
                }
                Ok(list)
            }
        }

        deserializer.deserialize_seq(Elements(PhantomData))
    }
}

/// Tokens and their ids, in the file's order.
pub(super) struct Vocab(pub(super) Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;

        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tokens and their ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut tokens: A) -> Result<Vocab, A::Error> {
                let mut list = List::default();
                while let Some(entry) = tokens.next_entry::<String, u32>()? {
                    list.push(entry)?;
                }
                Ok(Vocab(list.entries))
            }
        }

        deserializer.deserialize_map(Tokens)
    }
}
