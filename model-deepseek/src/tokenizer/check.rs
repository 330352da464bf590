use super::{
    TokenType, TokenizerError, Vocabulary,
    vocabulary::{ends_generation, settled_type},
};
use std::collections::HashMap;

/// The longest token. Published vocabularies have one of 1024 bytes.
const LONGEST_TOKEN: usize = 16 << 10;

/// The longest special token, and the bytes of all of them together, as an automaton is made of them that takes many times
/// their size. Published vocabularies have up to 48 bytes in one and 40,000 in all.
const LONGEST_SPECIAL: usize = 1 << 10;
const MOST_SPECIAL_BYTES: usize = 256 << 10;

/// A vocabulary whose tokens and special ids are in order.
pub(super) struct Checked<'v> {
    vocabulary: &'v Vocabulary,
    /// One for each token.
    pub(super) types: Vec<TokenType>,
    /// The tokens in use by text.
    index: HashMap<&'v str, Token<'v>>,
}

#[derive(Clone, Copy)]
pub(super) struct Token<'v> {
    pub(super) id: u32,
    pub(super) text: &'v str,
    pub(super) of: TokenType,
}

impl<'v> Checked<'v> {
    /// The types of tokens that merges may reach. (DeepSeek Coder has letters of the alphabet that are user defined.)
    pub(super) const MERGED: &'static [TokenType] = &[TokenType::Normal, TokenType::UserDefined];

    /// The types of tokens that are recognised in any text, and in a text that names control tokens.
    pub(super) const LITERAL: &'static [TokenType] = &[TokenType::UserDefined];
    pub(super) const PARSED: &'static [TokenType] =
        &[TokenType::UserDefined, TokenType::Control, TokenType::Unknown];

    pub(super) fn new(vocabulary: &'v Vocabulary) -> Result<Checked<'v>, TokenizerError> {
        let Vocabulary { tokens, types, .. } = vocabulary;
        if !types.is_empty() && types.len() != tokens.len() {
            let expected = format!("{} types, one for each token", tokens.len());
            return Err(vocabulary.invalid("token_type", expected, types.len().to_string()));
        }
        let given = |id: usize| types.get(id).copied();
        let types = tokens.iter().enumerate().map(|(id, text)| settled_type(text, given(id))).collect();
        let mut checked = Checked { vocabulary, types, index: HashMap::new() };

        let mut index = HashMap::with_capacity(tokens.len());
        for token in checked.tokens().filter(|token| token.of.is_used()) {
            if let Some(Token { id: other, text, .. }) = index.insert(token.text, token) {
                let found = format!("{text:?}, which token {other} is too");
                return Err(vocabulary.invalid(format!("tokens[{}]", token.id), "a token of its own", found));
            }
        }
        checked.index = index;
        checked.check_lengths()?;

        let further = vocabulary.end_of_generation.iter().map(|&id| ("eot_token_id or eom_token_id", id));
        let bos = vocabulary.bos.map(|id| ("bos_token_id", id));
        let eos = vocabulary.eos.map(|id| ("eos_token_id", id));
        for (key, id) in further.chain(bos).chain(eos) {
            if id as usize >= tokens.len() {
                let expected = format!("an id below {}", tokens.len());
                return Err(vocabulary.invalid(key, expected, id.to_string()));
            }
        }
        Ok(checked)
    }

    pub(super) fn tokens(&self) -> impl Iterator<Item = Token<'v>> {
        let texts = self.vocabulary.tokens.iter();
        (0..).zip(texts).zip(&self.types).map(|((id, text), &of)| Token { id, text, of })
    }

    /// No token is too long, nor are all special ones together.
    fn check_lengths(&self) -> Result<(), TokenizerError> {
        let mut special_bytes = 0;
        for Token { id, text, of } in self.tokens() {
            let len = text.len();
            let special = Self::PARSED.contains(&of);
            special_bytes += if special { len } else { 0 };
            let (expected, found) = if len > LONGEST_TOKEN {
                (format!("a token of at most {LONGEST_TOKEN} bytes"), format!("{len} bytes"))
            } else if special && len > LONGEST_SPECIAL {
                (format!("a special token of at most {LONGEST_SPECIAL} bytes"), format!("{len} bytes"))
            } else if special_bytes > MOST_SPECIAL_BYTES {
                let expected = format!("special tokens of at most {MOST_SPECIAL_BYTES} bytes in all");
                (expected, format!("{special_bytes} bytes up to this one"))
            } else {
                continue;
            };
            return Err(self.vocabulary.invalid(format!("tokens[{id}]"), expected, found));
        }
        Ok(())
    }

    /// Every merge is of two tokens and makes a third. `BPE` relies on it: it would panic on some that do not.
    pub(super) fn check_merges(&self, merges: &[(String, String)]) -> Result<(), TokenizerError> {
        let is_merged =
            |text: &str| self.index.get(text).is_some_and(|token| Checked::MERGED.contains(&token.of));
        let mut whole = String::new();
        for (i, (a, b)) in merges.iter().enumerate() {
            whole.clear();
            whole.extend([a.as_str(), b.as_str()]);
            if let Some(missing) = [a, b, &whole].into_iter().find(|text| !is_merged(text)) {
                let found = format!("{a:?} and {b:?}, and {missing:?} is none");
                return Err(self.vocabulary.invalid(
                    format!("merges[{i}]"),
                    "two tokens that make a third",
                    found,
                ));
            }
        }
        Ok(())
    }

    /// The ids of all tokens that end what a model says, sorted.
    pub(super) fn ends(&self) -> Vec<u32> {
        let named = self.index.values().filter(|token| ends_generation(token.text)).map(|token| token.id);
        let further = self.vocabulary.end_of_generation.iter().copied();
        let mut ends: Vec<u32> = named.chain(self.vocabulary.eos).chain(further).collect();
        ends.sort_unstable();
        ends.dedup();
        ends
    }
}
