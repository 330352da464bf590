//! The model that is part of the program, so that a newcomer needs no download: 5.5 million weights of the
//! DeepSeek-V3 architecture, trained on the novels of Jane Austen.

use backend_api::HostBytes;
use model_deepseek::source::{Checkpoint, SourceError};
use std::{path::Path, sync::Arc};

/// Weights are read where they lie, F32 ones in words.
#[repr(C, align(64))]
struct Aligned<T>(T);

const FILE: &[u8] = include_bytes!("../../../assets/austen-q4_k_m.gguf");

static MODEL: Aligned<[u8; FILE.len()]> = Aligned(*include_bytes!("../../../assets/austen-q4_k_m.gguf"));

/// A beginning that the model is good at.
pub const PROMPT: &str = "It was a truth";

/// Opens it.
///
/// # Errors
/// None, unless the asset is broken.
pub fn open() -> Result<Checkpoint, SourceError> {
    let bytes: &'static [u8] = &MODEL.0;
    let bytes: HostBytes = Arc::new(bytes);
    Checkpoint::from_bytes(Path::new("austen-q4_k_m.gguf (embedded)"), bytes)
}
