use aho_corasick::{AhoCorasick, AhoCorasickKind, BuildError, MatchKind};

/// A part of a text: a token that stands in it as a whole, or what is between two such tokens.
#[derive(Debug, PartialEq)]
pub(super) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

/// Tokens that are cut out of a text before anything else: the leftmost first, of those the longest.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

impl SpecialTokens {
    /// `tokens` are ids and texts. Empty texts are left out: they would be everywhere.
    ///
    /// Never a DFA, which the crate would choose for a few tokens: it takes a kilobyte for each byte of them. Nor has any
    /// state but the first a table of all bytes. So there are about eighty bytes for each of a token while this is made.
    pub(super) fn new<'t>(tokens: impl Iterator<Item = (u32, &'t str)>) -> Result<Self, BuildError> {
        let (ids, texts): (Vec<u32>, Vec<&str>) = tokens.filter(|(_, text)| !text.is_empty()).unzip();
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .dense_depth(1)
            .build(texts)?;
        Ok(SpecialTokens { automaton, ids })
    }

    /// Calls `fragment` with the parts of `text` in order; none of them is empty.
    pub(super) fn split<'t>(&self, text: &'t str, mut fragment: impl FnMut(Fragment<'t>)) {
        let mut end = 0;
        for found in self.automaton.find_iter(text) {
            if end < found.start() {
                fragment(Fragment::Text(&text[end..found.start()]));
            }
            fragment(Fragment::Token(self.ids[found.pattern().as_usize()]));
            end = found.end();
        }
        if end < text.len() {
            fragment(Fragment::Text(&text[end..]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftmost_then_longest() {
        let tokens = [(1, "<a>"), (2, "<a>b"), (3, ""), (4, "b<c>"), (5, "ü")];
        let special = SpecialTokens::new(tokens.into_iter()).unwrap();
        for (text, expected) in [
            ("", vec![]),
            ("x", vec![Fragment::Text("x")]),
            ("<a>b<c>", vec![Fragment::Token(2), Fragment::Text("<c>")]),
            ("<a><a>", vec![Fragment::Token(1), Fragment::Token(1)]),
            (
                "über b<c> ",
                vec![Fragment::Token(5), Fragment::Text("ber "), Fragment::Token(4), Fragment::Text(" ")],
            ),
        ] {
            let mut fragments = vec![];
            special.split(text, |f| fragments.push(f));
            assert_eq!(fragments, expected, "{text:?}");
        }
    }
}
