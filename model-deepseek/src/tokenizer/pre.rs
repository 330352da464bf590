//! How a text is cut into pieces before any merge: the pre-tokenizers by the names that GGUF files use
//! (`tokenizer.ggml.pre`).
//!
//! A rule set is a list of patterns. Each is applied *inside* the pieces that the one before left; its matches and
//! what lies between them become pieces. So `$` and `\S` see the end of a piece as the end of the text, and
//! one pattern made of all of them would cut otherwise.
//!
//! The patterns are the publishers' (`pre_tokenizer` of their `tokenizer.json`), in the syntax of the regex crates,
//! whose Unicode tables (version 16) decide the categories. All of them run in linear time: their one look-ahead is
//! done by hand, see [`BLANKS`].

use regex_automata::{
    Anchored, Input,
    meta::{BuildError, Regex},
};
use std::ops::Range;
use thiserror::Error;

/// The one place where the patterns look ahead, always at their end: a run of blanks leaves its last one to what
/// follows, unless nothing follows or it is the only one. A regex that cannot look ahead (and so cannot backtrack over
/// a million spaces) matches `\s+` instead, and the last blank is given back afterwards.
const BLANKS: &str = r"|\s+(?!\S)|\s+";

/// The most bytes of the automaton that a pattern is compiled to, as patterns may come out of files. Each takes a few of
/// them: it is also read backwards. The largest of those below takes half.
const MOST_STATES: usize = 1 << 20;

/// How a vocabulary's text is cut and merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The patterns, in the order in which they are applied.
    pub patterns: Vec<String>,
    /// Whether a piece that is itself a token is that token, whatever the merges say (`ignore_merges`).
    pub whole_pieces: bool,
    /// Whether merges that the file lacks follow from the order of the tokens.
    pub merges_from_ranks: bool,
}

impl Rules {
    /// The rules of a pre-tokenizer; `None` if it is none of [`Rules::names`].
    pub fn named(name: &str) -> Option<Rules> {
        TABLE.iter().find(|row| row.names.contains(&name)).map(|row| Rules {
            patterns: row.patterns.iter().map(|&pattern| pattern.into()).collect(),
            whole_pieces: row.whole_pieces,
            merges_from_ranks: row.merges_from_ranks,
        })
    }

    /// The names of all pre-tokenizers known here.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().flat_map(|row| row.names.iter().copied())
    }
}

struct Row {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    whole_pieces: bool,
    merges_from_ranks: bool,
}

/// Every letter that has case, as of the Unicode version that DeepSeek took it from. By number, since some look like
/// others: U+1FBE, U+2126 and U+212A are not ι, Ω and K.
macro_rules! cased {
    () => {
        "A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\
         \u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\
         \u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\
         \u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\
         \u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\
         \u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\
         \u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\
         \u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\
         \u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\
         \u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\
         \u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\
         \u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\
         \u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\
         \u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}"
    };
}

/// Han and whatever else the ranges hold: Hangul, but also every script from U+0800 on.
const EAST: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

const DEEPSEEK_V3: &[&str] = &[
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

/// All that is known of the pre-tokenizers; a further one is a further row.
const TABLE: &[Row] = &[
    // DeepSeek LLM, MoE-16B, V2, V2-Lite, V2.5, Coder-V2
    Row {
        names: &["deepseek-llm"],
        patterns: &[
            r"[\r\n]",
            concat!(r"\s?[", cased!(), "]+"),
            concat!(r"\s?[!-/:-~", "\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+"),
            r"\s+$",
            EAST,
            r"\p{N}",
        ],
        whole_pieces: false,
        merges_from_ranks: false,
    },
    // DeepSeek Coder 1.3B to 33B
    Row {
        names: &["deepseek-coder"],
        patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST, r"\p{N}"],
        whole_pieces: false,
        merges_from_ranks: false,
    },
    // DeepSeek V3, R1, V3.1, V3.2; V4 and JoyAI cut in the same way
    Row {
        names: &["deepseek-v3", "joyai-llm"],
        patterns: DEEPSEEK_V3,
        whole_pieces: false,
        merges_from_ranks: false,
    },
    // GLM-4 and later, GLM-4.7-Flash among them
    Row {
        names: &["glm4", "glm5"],
        patterns: &[concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        whole_pieces: true,
        merges_from_ranks: false,
    },
    // Kimi K2, Moonlight: published as tiktoken ranks
    Row {
        names: &["kimi-k2"],
        patterns: &[concat!(
            r"[\p{Han}]+",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        whole_pieces: true,
        merges_from_ranks: true,
    },
];

/// A pattern that does not compile.
#[derive(Clone, Debug, Error)]
#[error("pattern {pattern:?}: {message}")]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    pub message: String,
}

/// Rules, compiled.
#[derive(Debug)]
pub struct PreTokenizer {
    steps: Vec<Step>,
}

impl PreTokenizer {
    /// Compiles `patterns`.
    ///
    /// # Errors
    /// The pattern that is none, or that needs a look-around other than the one at the end of the rules above.
    pub fn new(patterns: &[String]) -> Result<PreTokenizer, PatternError> {
        let step = |pattern: &String| {
            Step::new(pattern).map_err(|error| {
                let message = match error.size_limit() {
                    Some(most) => format!("it takes more than {most} bytes when it is compiled"),
                    None => error.to_string(),
                };
                PatternError { pattern: pattern.clone(), message }
            })
        };
        Ok(PreTokenizer { steps: patterns.iter().map(step).collect::<Result<_, _>>()? })
    }

    /// The pieces of `text` as ranges of its bytes: in order, none empty, nothing left out.
    pub fn cut(&self, text: &str) -> Vec<Range<usize>> {
        let mut pieces = Vec::from_iter((!text.is_empty()).then_some(0..text.len()));
        for step in &self.steps {
            let mut finer = Vec::with_capacity(pieces.len());
            for piece in pieces {
                step.cut(&text[piece.clone()], |part| {
                    finer.push(piece.start + part.start..piece.start + part.end);
                });
            }
            pieces = finer;
        }
        pieces
    }
}

/// One pattern. If it ended in [`BLANKS`], its regex has a second branch that matches a run of blanks.
#[derive(Debug)]
struct Step {
    regex: Regex,
}

impl Step {
    fn new(pattern: &str) -> Result<Step, Box<BuildError>> {
        let mut builder = Regex::builder();
        builder.configure(Regex::config().nfa_size_limit(Some(MOST_STATES)));
        let regex = match pattern.strip_suffix(BLANKS) {
            Some(others) => builder.build_many(&[others, r"\s+"])?,
            None => builder.build(pattern)?,
        };
        Ok(Step { regex })
    }

    /// Calls `part` with the matches in `text` and what lies between them.
    fn cut(&self, text: &str, mut part: impl FnMut(Range<usize>)) {
        let mut input = Input::new(text).anchored(Anchored::No);
        let mut end = 0;
        while let Some(found) = self.regex.search(&input) {
            let mut matched = found.range();
            if found.pattern().as_usize() == 1 && matched.end < text.len() {
                let (last, _) = text[matched.clone()].char_indices().next_back().unwrap_or_default();
                // one blank alone stays whole: then `\s+` is what matched
                matched.end = if last > 0 { matched.start + last } else { matched.end };
            }
            if matched.is_empty() {
                // a pattern out of a file may match nothing: go on behind the next character
                let Some(next) = text[matched.end..].chars().next() else { break };
                input.set_start(matched.end + next.len_utf8());
                continue;
            }
            if end < matched.start {
                part(end..matched.start);
            }
            end = matched.end;
            input.set_start(end);
            part(matched);
        }
        if end < text.len() {
            part(end..text.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let pre = PreTokenizer::new(&Rules::named(name).unwrap().patterns).unwrap();
        pre.cut(text).into_iter().map(|range| &text[range]).collect()
    }

    #[test]
    fn each_step_sees_only_its_piece() {
        for (name, text, expected) in [
            ("deepseek-llm", "a\r\n b  ", vec!["a", "\r", "\n", " b", "  "]),
            ("deepseek-llm", "x 12 日本ü", vec!["x", " ", "1", "2", " ", "日本", "ü"]),
            // a letter of step 2, and from U+0800 on, so step 5 cuts it off again
            ("deepseek-llm", "x\u{2126} (ok)", vec!["x", "\u{2126}", " (", "ok", ")"]),
            ("deepseek-coder", "a+=b;", vec!["a", "+=", "b", ";"]),
            ("deepseek-v3", "x  1234", vec!["x", "  ", "123", "4"]),
            ("deepseek-v3", "x   y\n\n z  ", vec!["x", "  ", " y", "\n\n", " z", "  "]),
            ("joyai-llm", "日本 _foo(bar)", vec!["日本", " _", "foo", "(bar", ")"]),
            ("glm4", "It'S 12345", vec!["It", "'S", " ", "123", "45"]),
            ("kimi-k2", "iPhone's 東京abc", vec!["i", "Phone's", " ", "東京", "abc"]),
        ] {
            assert_eq!(pieces(name, text), expected, "{name}: {text:?}");
        }
    }

    #[test]
    fn a_run_of_blanks_is_linear() {
        let text = format!("x{}y", " ".repeat(3_000_000));
        for name in Rules::names() {
            let pieces = pieces(name, &text);
            assert_eq!(pieces.concat(), text);
            assert!(pieces.len() < 5, "{name}: {} pieces", pieces.len());
        }
    }

    #[test]
    fn patterns_from_files_may_match_nothing_or_be_wrong() {
        let pre = PreTokenizer::new(&["b*".into()]).unwrap();
        assert_eq!(pre.cut("äbbä"), [0..2, 2..4, 4..6]);
        for bad in ["(", r"(?=x)y", r"\p{Nonsense}", r"\pL{200}"] {
            assert_eq!(PreTokenizer::new(&[bad.into()]).unwrap_err().pattern, bad);
        }
    }
}
