//! `model.safetensors.index.json` and `config.json`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = model_deepseek::source::hostile::read_index_bytes(bytes);
});
