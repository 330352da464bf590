use crate::source::SourceError;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a vocabulary cannot be used, or an id not be turned into text.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key of the vocabulary is not what it must be.
    #[error("{}: {key}: expected {expected}, found {found}", file.display())]
    Invalid {
        /// The file, as given in [`Vocabulary::file`](super::Vocabulary::file).
        file: PathBuf,
        /// The key and, for an array, which element.
        key: String,
        /// What is allowed there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file of a Hugging Face directory cannot be read.
    #[error("{}: cannot read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A JSON file does not parse, or lacks a field.
    #[error("{}: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// A key of a GGUF file is missing or has another type.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An id to be turned into text is in no vocabulary of this size.
    #[error("token id {id}: expected one below {size}, the size of the vocabulary")]
    UnknownId {
        /// The id.
        id: u32,
        /// How many tokens there are.
        size: usize,
    },
}

impl TokenizerError {
    pub(super) fn invalid(
        file: &Path,
        key: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> TokenizerError {
        TokenizerError::Invalid {
            file: file.to_owned(),
            key: key.into(),
            expected: expected.into(),
            found: shortened(found.into()),
        }
    }
}

/// What is found may be a whole file.
fn shortened(mut found: String) -> String {
    const LONGEST: usize = 400;
    if let Some((end, _)) = found.char_indices().nth(LONGEST) {
        found.truncate(end);
        found.push('…');
    }
    found
}
