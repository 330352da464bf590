//! A file as bytes, without reading it.
#![allow(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; this module is the only one that does it"
)]

use super::SourceError;
use backend_api::HostBytes;
use std::{fs::File, io, path::Path, sync::Arc};

/// Maps `file` read-only. Nothing is read until it is touched, so the size does not matter.
///
/// The file must not be cut or rewritten while it is mapped: the system then ends the process (`SIGBUS`) or
/// shows other bytes. Replacing it by renaming is fine.
///
/// # Errors
/// [`SourceError::Io`]; [`SourceError::Invalid`] for an empty file or what is not a regular file.
pub fn map(file: &Path) -> Result<HostBytes, SourceError> {
    // Before it is opened: opening a pipe would wait for a writer.
    let facts = std::fs::metadata(file).map_err(|e| SourceError::io(file, "open", e))?;
    if !facts.is_file() {
        let reason = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(SourceError::io(file, "map", reason));
    }
    if facts.len() == 0 {
        return Err(SourceError::invalid(file, super::Place::Header, "a model file", "an empty file"));
    }
    let handle = File::open(file).map_err(|e| SourceError::io(file, "open", e))?;
    // SAFETY: the map is read-only and private to this process' view; that nobody truncates or rewrites the file
    // meanwhile cannot be checked and is the documented condition. All users see plain bytes (`&[u8]`), for
    // which every bit pattern is valid.
    let map = unsafe { memmap2::Mmap::map(&handle) }.map_err(|e| SourceError::io(file, "map", e))?;
    Ok(Arc::new(map))
}
