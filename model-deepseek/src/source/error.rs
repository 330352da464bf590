//! What can be wrong with a model's files.

use std::{
    fmt,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// Why a checkpoint cannot be opened or one of its tensors or keys cannot be used. Every message names the file
/// and what in it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// What was tried, such as `open`.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Something in a file is not what it must be.
    #[error("{}: {place}: expected {expected}, found {found}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// Where in it.
        place: Place,
        /// What is allowed there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A key, tensor or file that has to be there is not.
    #[error("{}: {place} is missing (expected {expected})", file.display())]
    Missing {
        /// The file or directory in which it should be.
        file: PathBuf,
        /// What is missing.
        place: Place,
        /// What it would be.
        expected: String,
    },
}

/// Where in a file something is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The file as a whole, or its header.
    Header,
    /// A metadata key of a GGUF file, or a key of a JSON file.
    Key(String),
    /// A tensor.
    Tensor(String),
    /// Another file, such as a shard.
    File(String),
    /// The directory itself.
    Directory,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Header => f.write_str("header"),
            Place::Key(key) => write!(f, "key `{}`", clipped(key)),
            Place::Tensor(name) => write!(f, "tensor `{}`", clipped(name)),
            Place::File(name) => write!(f, "file `{}`", clipped(name)),
            Place::Directory => f.write_str("directory"),
        }
    }
}

impl SourceError {
    pub(super) fn io(file: &Path, action: &'static str, source: std::io::Error) -> Self {
        SourceError::Io { file: file.to_owned(), action, source }
    }

    pub(super) fn invalid(
        file: &Path,
        place: Place,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Flaw::new(expected, found).at(file, place)
    }

    pub(super) fn missing(file: &Path, place: Place, expected: impl Into<String>) -> Self {
        SourceError::Missing { file: file.to_owned(), place, expected: expected.into() }
    }
}

/// An error of a parser that does not know yet where it is.
#[derive(Debug)]
pub(super) struct Flaw {
    expected: String,
    found: String,
}

impl Flaw {
    pub(super) fn new(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Flaw { expected: expected.into(), found: found.into() }
    }

    pub(super) fn at(self, file: &Path, place: Place) -> SourceError {
        SourceError::Invalid { file: file.to_owned(), place, expected: self.expected, found: self.found }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {}, found {}", self.expected, self.found)
    }
}

/// A name out of a file as a message can show it: control characters escaped, no longer than a line or two.
pub(super) fn clipped(name: &str) -> String {
    const LONGEST: usize = 160;
    let mut shown: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}
