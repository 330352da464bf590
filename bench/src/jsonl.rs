//! Lines of JSON from strangers: one value a line, read as far as it can be, and errors that leave it to the
//! caller to say which line it was.

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error, IgnoredAny, Visitor},
};
use std::fmt;

/// A JSON string. Half of a surrogate pair (`"\ud800"`), which JSON can write and no text can hold, is U+FFFD, and so
/// are bytes that are not UTF-8.
///
/// # Errors
/// Why the line is no JSON string.
pub fn text(line: &[u8]) -> Result<String, String> {
    // A string that is read as bytes may hold surrogates, but also control characters, which JSON forbids: a pass
    // that keeps nothing finds those.
    value::<IgnoredAny>(line)?;
    value::<Text>(line).map(|text| text.0)
}

/// A JSON array of token ids.
///
/// # Errors
/// Why the line is none.
pub fn ids(line: &[u8]) -> Result<Vec<u32>, String> {
    value(line)
}

fn value<T: DeserializeOwned>(line: &[u8]) -> Result<T, String> {
    // Without the end of the line, as an error at the end of the input were one in line 2 otherwise.
    let line = String::from_utf8_lossy(line.trim_ascii_end());
    serde_json::from_str(&line).map_err(|error| {
        let text = error.to_string();
        // serde_json counts lines of its own.
        match text.rsplit_once(" at line ") {
            Some((reason, _)) => format!("{reason}, at column {}", error.column()),
            None => text,
        }
    })
}

struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(Text(String::new()))
    }
}

impl Visitor<'_> for Text {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    /// UTF-8, but for surrogates, which serde_json encodes as if they were characters: 0xED and two bytes more, none
    /// of them valid.
    fn visit_bytes<E: Error>(mut self, bytes: &[u8]) -> Result<Text, E> {
        for chunk in bytes.utf8_chunks() {
            self.0.push_str(chunk.valid());
            if chunk.invalid() == [0xed] {
                self.0.push(char::REPLACEMENT_CHARACTER);
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_surrogate_pair_is_one_replacement_character() {
        for (line, expected) in [
            (r#""\ud800""#, "\u{fffd}"),
            (r#""a\udfffb""#, "a\u{fffd}b"),
            (r#""\ud800\ud800\n""#, "\u{fffd}\u{fffd}\n"),
            (r#""\ud83d\ude42\ude42""#, "🙂\u{fffd}"),
            (r#""\ud83d""#, "\u{fffd}"),
            ("\"\u{d7ff}\u{e000}\u{fffd}\u{feff}\"", "\u{d7ff}\u{e000}\u{fffd}\u{feff}"),
            ("  \"plain\"\r\n", "plain"),
            (r#""""#, ""),
        ] {
            assert_eq!(text(line.as_bytes()).as_deref(), Ok(expected), "{line}");
        }
        assert_eq!(text(b"\"\xff\xed\xa0\x80\"").unwrap(), "\u{fffd}".repeat(4));
    }

    #[test]
    fn what_is_no_string_is_told_without_a_line() {
        for (line, expected) in [
            ("[1]\n", "invalid type: sequence, expected a string, at column "),
            ("\"a\n", "EOF while parsing a string, at column 2"),
            ("\"a\tb\"", "control character (\\u0000-\\u001F) found while parsing a string, at column "),
            (r#""\x""#, "invalid escape, at column "),
            (r#""a" "b""#, "trailing characters, at column 5"),
        ] {
            let error = text(line.as_bytes()).unwrap_err();
            assert!(error.starts_with(expected) && !error.contains("line"), "{line}: {error}");
        }
        let error = ids(b"[1, -2]\n").unwrap_err();
        assert!(error.starts_with("invalid value: integer `-2`, expected u32, at column "), "{error}");
        assert_eq!(ids(b"[1, 2]\n"), Ok(vec![1, 2]));
    }
}
