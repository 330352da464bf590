//! A saved session: restored from the bytes as they are, and from a good one with changes (a place in two bytes, then
//! what to write there) whose checksum is mended, as nobody finds it by chance.
#![no_main]

use backend_cpu::{CpuDevice, CpuOptions};
use graph::{Devices, Placement};
use model_deepseek::{Engine, Model, Options};
use std::{path::Path, sync::Arc};

thread_local! {
    /// An engine, and what one of its sessions is saved as.
    static GOOD: (Engine, Vec<u8>) = {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/assets/austen-q4_k_m.gguf");
        let model = Arc::new(Model::open(&path).expect("the model that comes with the project"));
        let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
        let devices = Devices::new(vec![Arc::new(CpuDevice::new(options).expect("a processor"))]);
        let options = Options { context: Some(8), batch: 4, ..Options::default() };
        let engine = Engine::new(&model, &devices, &Placement::default(), &options).expect("an engine");
        let mut session = engine.session().expect("a session");
        session.feed(&[1, 2, 3]).expect("three tokens");
        let saved = session.save().expect("a saved session");
        drop(session);
        (engine, saved)
    };
}

/// FNV-1a, with which sessions end.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    GOOD.with(|(engine, saved)| {
        let _ = engine.restore(bytes);
        let mut changed = saved.clone();
        let end = changed.len() - 8;
        for change in bytes.chunks_exact(3) {
            changed[usize::from(u16::from_le_bytes([change[0], change[1]])) % end] = change[2];
        }
        let sum = checksum(&changed[..end]);
        changed[end..].copy_from_slice(&sum.to_le_bytes());
        if let Ok(mut session) = engine.restore(&changed) {
            // Whatever the cache holds: an answer or an error.
            let _ = session.feed(&[4]);
        }
    });
});
