//! DeepSeek-architecture language models (MLA attention, mixture of experts): from a file to text.
//!
//! Under construction.

pub mod chat;
pub mod source;
pub mod tokenizer;
