//! DeepSeek-architecture language models, from a file to text: multi-head latent attention (DeepSeek-V2,
//! arXiv 2405.04434) and mixtures of experts (V3, arXiv 2412.19437).
//!
//! For programs that want such a model inside them. The crate reads V2-Lite, V2, V3, R1, Kimi-K2, Moonlight and
//! GLM-4.7-Flash, from GGUF files or Hugging Face directories, writes their layers as a [`graph`], and runs it on
//! whatever [`backend_api::Device`]s it is given. It knows no device itself.
//!
//! ```
//! use backend_cpu::{CpuDevice, CpuOptions};
//! use graph::{Devices, Placement};
//! use model_deepseek::{Engine, Model, Options, Sampler, Sampling, tokenizer::Special};
//! use std::{ops::ControlFlow, path::Path, sync::Arc};
//!
//! // A file (here the model that comes with the project), devices, and which does what: all on the host.
//! let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/assets/austen-q4_k_m.gguf");
//! let model = Arc::new(Model::open(&path)?);
//! let devices = Devices::new(vec![Arc::new(CpuDevice::new(CpuOptions::from_env()?)?)]);
//! let engine = Engine::new(&model, &devices, &Placement::default(), &Options::default())?;
//!
//! // A sequence, fed a prompt.
//! let tokenizer = model.tokenizer()?;
//! let prompt = tokenizer.with_bos(tokenizer.encode("It is a truth universally", Special::Literal));
//! let mut session = engine.session()?;
//! session.feed(&prompt)?;
//!
//! // Text, as it comes. Breaking, or raising `session.cancel_flag()` from another thread, ends it.
//! let mut text = String::new();
//! let mut sampler = Sampler::new(Sampling { temperature: 0.7, top_k: 40, ..Sampling::default() })?;
//! session.generate(&mut sampler, 16, |_token, piece| {
//!     text.push_str(piece);
//!     ControlFlow::Continue(())
//! })?;
//! println!("{text}");
//!
//! // Another ending: back to the prompt, or from a copy, or from bytes that were saved.
//! session.truncate(prompt.len())?;
//! let fork = session.fork()?;
//! let restored = engine.restore(&session.save()?)?;
//! assert_eq!(fork.tokens(), restored.tokens());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The contract
//!
//! * **Everything is decided by keys and tensors**, never by a model's name. What a file lacks is taken from one
//!   table (in `config/gguf.rs`); what is odd and harmless is told by [`Model::notices`]; what would change the
//!   computation in ways that are not supported is an error.
//! * **Files are not trusted.** Each key, shape, offset and string is checked before use; [`Model::open`] checks
//!   all that a step needs and reads no weight. Errors name file, key or tensor, what was expected and found.
//! * **The cache is the latent one**: per token and layer one row of `kv_lora_rank + rope` values, keys and values
//!   in one, as f16, f32 or q8_0 ([`CacheType`]).
//! * **One answer.** On devices that are batch-invariant ([`backend_api::DeviceInfo::batch_invariant`], as the CPU
//!   is) the logits are the same bits whether a prompt is fed whole, in pieces or token by token, and whether a
//!   session ran straight, was cut back, forked, or saved and restored. On others they agree within the
//!   devices' bounds.
//! * **A lost device is an error**, and no more than that where its work can be done elsewhere: a session whose caches
//!   are on other devices [goes on](Session::go_on_without_lost_devices), if it is asked to.
//! * **Steps build and plan nothing** beyond the first of their kind. One [`Engine`] holds the weights; each [`Session`]
//!   is one sequence with caches of its own.
//!
//! # Where to read
//!
//! `layers/attention.rs` is the attention as its paper has it, `layers/moe.rs` the experts, `config/` the
//! hyperparameters, `model.rs` the layers in order, `session.rs` what happens with tokens. [`source`] reads files,
//! [`tokenizer`] text, [`chat`] templates; [`sampling`] draws.
//!
//! Not here: layers that predict further tokens (their tensors are skipped, with a notice), the lightning indexer
//! of V3.2, Mistral's position-dependent scores, several sequences in one step.
#![deny(unsafe_code)]

mod advice;
pub mod chat;
pub mod config;
mod engine;
mod error;
mod hash;
mod layers;
mod model;
pub mod placement;
pub mod sampling;
mod session;
pub mod source;
pub mod tokenizer;

pub use config::Config;
pub use engine::{CacheType, Engine, Options, Plans};
pub use error::Error;
pub use model::Model;
pub use placement::{Placed, PlacementOptions};
pub use sampling::{Sampler, Sampling, SamplingError};
pub use session::{Generated, Session, SessionError, Stop, Wanted};
