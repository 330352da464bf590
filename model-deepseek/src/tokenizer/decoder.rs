use super::{Tokenizer, TokenizerError};

/// Turns a stream of ids into text as it comes. A character may be spread over several tokens: what is not complete
/// is held back. Bytes that can become no character are replaced by U+FFFD, as [`String::from_utf8_lossy`] does it.
#[derive(Clone, Debug)]
pub struct Decoder<'t> {
    tokenizer: &'t Tokenizer,
    /// The start of a character, at most three bytes.
    pending: Vec<u8>,
}

impl<'t> Decoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Decoder<'t> {
        Decoder { tokenizer, pending: Vec::new() }
    }

    /// The text that `id` completes; empty if it only starts a character.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`]; the decoder stays as it was.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.pending.extend_from_slice(self.tokenizer.known_piece(id)?);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(wrong) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[wrong..];
                }
            }
        }
        self.pending = rest.to_vec();
        Ok(text)
    }

    /// What is held back at the end, which is no character: U+FFFD or nothing. The decoder can be used anew.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}
