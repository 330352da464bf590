use std::collections::HashMap;

/// The merges that a vocabulary implies whose tokens are numbered in the order in which they were learned
/// (tiktoken's ranks; Kimi K2 is published so, and its GGUF files may come without merges).
///
/// A token was once made of two others: those that are left of its letters when every merge of a lower rank has been
/// done. Tokens for which that does not leave two parts can never be reached and get no merge.
///
/// `tokens` are pairs of rank and letters, lowest rank first; the merges come out in the same order.
pub(super) fn merges(tokens: &[(u32, &str)]) -> Vec<(String, String)> {
    let ranks: HashMap<&str, u32> = tokens.iter().map(|&(rank, token)| (token, rank)).collect();
    tokens
        .iter()
        .filter_map(|&(rank, token)| match parts(&ranks, token, rank)[..] {
            [a, b] => Some((a.to_owned(), b.to_owned())),
            _ => None,
        })
        .collect()
}

/// What is left of `token` after all merges into tokens of a rank below `limit`, lowest first, leftmost on a tie.
fn parts<'t>(ranks: &HashMap<&str, u32>, token: &'t str, limit: u32) -> Vec<&'t str> {
    // part i is token[starts[i]..starts[i + 1]]
    let mut starts: Vec<usize> = token.char_indices().map(|(at, _)| at).chain([token.len()]).collect();
    loop {
        let lowest = starts
            .windows(3)
            .enumerate()
            .filter_map(|(i, w)| ranks.get(&token[w[0]..w[2]]).map(|&rank| (rank, i)))
            .filter(|&(rank, _)| rank < limit)
            .min();
        match lowest {
            Some((_, i)) => starts.remove(i + 1),
            None => return starts.windows(2).map(|w| &token[w[0]..w[1]]).collect(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_comes_from_its_two_parts() {
        // `abc` from `ab` and `c`, as `ab` is older than `bc`; `xyz` is out of reach: no two letters of it merge
        let tokens = ["a", "b", "c", "x", "y", "z", "ab", "bc", "abc", "xyz", "abcbc"];
        let ranked: Vec<(u32, &str)> = (0..).zip(tokens).collect();
        let merges = merges(&ranked);
        let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        assert_eq!(merges, ["a b", "b c", "ab c", "abc bc"]);
    }
}
