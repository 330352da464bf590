//! A safetensors file, as the only one of a Hugging Face directory: opened, every tensor made.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = model_deepseek::source::hostile::open_safetensors_bytes(bytes);
});
