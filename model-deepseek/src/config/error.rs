use crate::source::SourceError;
use std::fmt;
use thiserror::Error;

/// Hyperparameters that are missing, wrong or not supported.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The model is of a family that this crate does not run.
    #[error("{key}: the architecture `{found}` is not supported; {expected} are")]
    Architecture {
        /// The key that names it.
        key: &'static str,
        /// The name.
        found: String,
        /// The names that are supported.
        expected: &'static str,
    },
    /// A key whose value cannot be used.
    #[error("{key}: expected {expected}, found {found}")]
    Key {
        /// The key, as in the source.
        key: String,
        /// What it may be.
        expected: String,
        /// What it is; `nothing` if it is missing.
        found: String,
    },
    /// A key of a wrong type.
    #[error(transparent)]
    Source(#[from] SourceError),
}

impl ConfigError {
    pub(super) fn key(key: &str, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        ConfigError::Key { key: key.to_owned(), expected: expected.to_string(), found: found.to_string() }
    }

    pub(super) fn missing(key: &str, expected: impl fmt::Display) -> Self {
        Self::key(key, expected, "nothing")
    }
}
