//! A `tokenizer.json`: read, made a tokenizer, then given a text.
#![no_main]

use model_deepseek::tokenizer::{Special, hostile::read_json};

libfuzzer_sys::fuzz_target!(|json: &str| {
    let Ok(tokenizer) = read_json(json) else { return };
    let ids = tokenizer.encode(json, Special::Parse);
    tokenizer.decode(&ids).expect("ids of its own");
});
