//! What the binaries of this package share: see `src/bin` for what people run.
//!
//! * [`cli`]: options, devices, opening a model with progress, errors as one line, what goes to which stream.
//! * [`compare`] and [`npy`]: logits against reference logits.
//! * [`jsonl`]: lines of JSON.
//! * [`synth`]: model files with random weights.
#![forbid(unsafe_code)]

pub mod cli;
pub mod compare;
pub mod jsonl;
pub mod npy;
pub mod synth;
