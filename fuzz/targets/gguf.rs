//! A GGUF file: opened, every key read, every tensor located.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = model_deepseek::source::hostile::open_gguf_bytes(bytes);
});
