//! DeepSeek-architecture language models (MLA attention, mixture of experts): from a file to text.
#![deny(unsafe_code)]

pub mod chat;
pub mod config;
mod engine;
mod error;
mod hash;
mod layers;
mod model;
pub mod sampling;
mod session;
pub mod source;
pub mod tokenizer;

pub use config::Config;
pub use engine::{CacheType, Engine, Options, Plans};
pub use error::Error;
pub use model::Model;
pub use sampling::{Sampler, Sampling, SamplingError};
pub use session::{Generated, Session, SessionError, Stop, Wanted};
