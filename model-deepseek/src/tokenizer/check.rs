use super::{
    TokenType, TokenizerError, Vocabulary,
    vocabulary::{ends_generation, settled_type},
};
use std::collections::HashMap;

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
