//! What can go wrong between a path and a text.

use crate::{
    config::ConfigError, placement::Shortage, sampling::SamplingError, session::SessionError,
    source::SourceError,
};
use graph::{BuildError, LoadError, PlanError, RunError};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Any error of this crate. Each names what it is about: file, key, tensor, device or option, with what was
/// expected and found.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is missing, malformed or lacks a tensor.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Hyperparameters that cannot be used.
    #[error("{}: {error}", path.display())]
    Config {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong.
        error: Box<ConfigError>,
    },
    /// Weights that do not fit together.
    #[error("{}: {error}", path.display())]
    Graph {
        /// The checkpoint.
        path: PathBuf,
        /// The node and why it cannot be built.
        error: Box<BuildError>,
    },
    /// A vocabulary that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::TokenizerError),
    /// Devices and wishes do not go together.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Weights or caches could not be put on their devices.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A device failed in a step.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A device had no room, or was lost with what cannot be had again: what it said, and which options would have
    /// helped.
    #[error("{error}; {advice}")]
    Advised {
        /// The error of loading or running.
        error: Box<Error>,
        /// What to do about it.
        advice: String,
    },
    /// A session was asked for something it cannot do.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Sampling options, or logits that cannot be sampled.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// What was asked for does not fit.
    #[error("it does not fit: {0}")]
    Shortage(Shortage),
    /// An option of [`Options`](crate::Options) or [`PlacementOptions`](crate::PlacementOptions).
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// Which.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl Error {
    /// An error of hyperparameters in the checkpoint at `path`; one of a key's type has its file already.
    pub(crate) fn config(path: &Path, error: ConfigError) -> Error {
        match error {
            ConfigError::Source(error) => Error::Source(error),
            error => Error::Config { path: path.to_owned(), error: error.into() },
        }
    }
}
