//! GGUF models in several files: `NAME-00001-of-00003.gguf`, …
//!
//! Each file is a GGUF file with tensors of its own and `split.no` (from 0), `split.count` and
//! `split.tensors.count` (of the set); the hyperparameters are in the first. As llama.cpp's `gguf-split` writes
//! them.

use super::{Place, SourceError, gguf::Metadata};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// The name of a file of a set: `PREFIX-NNNNN-of-NNNNN.gguf`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ShardName<'a> {
    prefix: &'a str,
    /// From 0.
    pub(super) number: usize,
    pub(super) count: usize,
    suffix: &'a str,
}

impl<'a> ShardName<'a> {
    /// The parts of `name`; `None` where it is not one of a set. `suffix` is `.gguf` or `.safetensors`.
    pub(super) fn parse(name: &'a str, suffix: &'a str) -> Option<Self> {
        let (rest, count) = split_number(name.strip_suffix(suffix)?)?;
        let (prefix, number) = split_number(rest.strip_suffix("-of")?)?;
        (1..=count).contains(&number).then(|| ShardName { prefix, number: number - 1, count, suffix })
    }

    /// The name of the file with this number (from 0).
    pub(super) fn sibling(&self, number: usize) -> String {
        shard_name(self.prefix, number, self.count, self.suffix)
    }
}

/// `a-00012` as (`a`, 12).
fn split_number(text: &str) -> Option<(&str, usize)> {
    let (rest, digits) = text.rsplit_once('-')?;
    (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| Some((rest, digits.parse().ok()?)))?
}

/// The name of file `number` (from 0) of `count`.
pub(super) fn shard_name(prefix: &str, number: usize, count: usize, suffix: &str) -> String {
    format!("{prefix}-{:05}-of-{count:05}{suffix}", number + 1)
}

/// All files of the set that `file`, with this metadata, belongs to, in order; `None` if it is alone.
pub(super) fn siblings(file: &Path, metadata: &Metadata) -> Result<Option<Vec<PathBuf>>, SourceError> {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let parsed = ShardName::parse(name, ".gguf");
    let count = metadata.get_u32(COUNT)?.unwrap_or(0) as usize;
    match (parsed, count) {
        (None, 0 | 1) => Ok(None),
        (Some(name), 0 | 1) if name.count == 1 => Ok(None),
        (None, count) => {
            let expected = format!("a file of {count}, named as in MODEL-00001-of-{count:05}.gguf");
            Err(metadata.invalid(COUNT, expected, format!("the name `{name}`")))
        }
        (Some(name), count) if name.count == count => {
            check_number(metadata, name.number, count)?;
            Ok(Some((0..count).map(|number| file.with_file_name(name.sibling(number))).collect()))
        }
        (Some(name), 0) => Err(SourceError::missing(
            file,
            Place::Key(COUNT.into()),
            format!("{}, as its name says", name.count),
        )),
        (Some(name), count) => Err(metadata.invalid(
            COUNT,
            format!("{}, as the file's name says", name.count),
            count.to_string(),
        )),
    }
}

/// The first file of the set that `file` belongs to by its name.
pub(super) fn first(file: &Path) -> Option<PathBuf> {
    let name = ShardName::parse(file.file_name()?.to_str()?, ".gguf")?;
    Some(file.with_file_name(name.sibling(0)))
}

/// The models among these files: for a set the name of its first file.
pub(super) fn models(names: &BTreeSet<String>) -> BTreeSet<String> {
    let models = names.iter().filter(|name| name.ends_with(".gguf"));
    models
        .map(|name| ShardName::parse(name, ".gguf").map_or(name.clone(), |shard| shard.sibling(0)))
        .collect()
}

/// Checks the keys of the file `number` of `count`.
pub(super) fn check_number(metadata: &Metadata, number: usize, count: usize) -> Result<(), SourceError> {
    for (key, expected) in [(NUMBER, number), (COUNT, count)] {
        let found = metadata.required(key, "u32", metadata.get_u32(key)?)?;
        if found as usize != expected {
            let expected = format!("{expected} in file {} of {count}", number + 1);
            return Err(metadata.invalid(key, expected, found.to_string()));
        }
    }
    Ok(())
}

/// Checks that a set has as many tensors as this file of it says.
pub(super) fn check_tensors(metadata: &Metadata, tensors: usize) -> Result<(), SourceError> {
    match metadata.get_u64(TENSORS)? {
        Some(said) if said != tensors as u64 => {
            Err(metadata.invalid(TENSORS, format!("{tensors}, the tensors of all files"), said.to_string()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let name = ShardName::parse("a-b-00002-of-00003.gguf", ".gguf").unwrap();
        assert_eq!((name.prefix, name.number, name.count), ("a-b", 1, 3));
        assert_eq!(name.sibling(0), "a-b-00001-of-00003.gguf");
        for alone in [
            "a.gguf",
            "a-00001-of-00003.bin",
            "a-0001-of-0003.gguf",
            "a-00000-of-00003.gguf",
            "a-00004-of-00003.gguf",
            "a-00001-of-000+3.gguf",
            "00001-of-00003.gguf",
            "a-00001.gguf",
        ] {
            assert_eq!(ShardName::parse(alone, ".gguf"), None, "{alone}");
        }
    }
}
