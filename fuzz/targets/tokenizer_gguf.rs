//! The tokenizer of a GGUF file: made of its keys, then given a text.
#![no_main]

use model_deepseek::{
    source::{Checkpoint, Keys},
    tokenizer::{Special, Tokenizer},
};
use std::{path::Path, sync::Arc};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let checkpoint = Checkpoint::from_bytes(Path::new("hostile.gguf"), Arc::new(bytes.to_vec()));
    let Ok(Keys::Gguf(metadata)) = checkpoint.as_ref().map(Checkpoint::keys) else { return };
    let Ok(tokenizer) = Tokenizer::from_gguf(metadata) else { return };
    let ids = tokenizer.encode_bytes(bytes, Special::Parse);
    tokenizer.decode(&ids).expect("ids of its own");
});
