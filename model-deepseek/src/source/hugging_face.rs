//! Hugging Face directories: `config.json` and `model*.safetensors`, with an index where there are several.
//!
//! Tensors get GGUF names and shapes. Single experts become one tensor `[experts, n_out, n_in]`. F32, F16 and BF16
//! stay as they are, but norms, biases and router weights become F32. FP8 (e4m3) with `weight_scale_inv` becomes
//! F32, since a narrower format would round it. What has no GGUF name keeps its own.

use super::{
    Location, Place, SourceError, TensorInfo,
    error::{Flaw, clipped},
    hf_index::{MAX_FILES, files_of_index},
    hf_shards::Shards,
    map::map,
    split::ShardName,
};
use backend_api::HostBytes;
use serde_json::Value;
use std::{collections::BTreeSet, path::Path};

pub(super) const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SUFFIX: &str = ".safetensors";

/// Larger files of these names are refused, as memory goes with their size. Published ones have 2 KB and 13 MB.
const MAX_CONFIG: usize = 1 << 20;
const MAX_INDEX: usize = 128 << 20;

/// Whether `directory` has weights of this kind, by their names.
pub(super) fn has_weights(names: &BTreeSet<String>) -> bool {
    names.contains(INDEX) || names.iter().any(|name| is_weights(name))
}

fn is_weights(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(SUFFIX)
}

/// Whether `file`, by its name, is one of a directory's: weights, index, configuration or tokenizer.
pub(super) fn is_part(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "safetensors" || extension == "json")
}

/// Opens a directory with the files `names`.
pub(super) fn open(
    directory: &Path,
    names: &BTreeSet<String>,
) -> Result<(Value, Vec<(TensorInfo, Location)>), SourceError> {
    let config = read_config(&directory.join(CONFIG))?;
    let index = directory.join(INDEX);
    let index = if names.contains(INDEX) { Some((map_small(&index, MAX_INDEX)?, index)) } else { None };
    let files = match &index {
        Some((bytes, path)) => files_of_index((**bytes).as_ref(), path)?,
        None => files_by_name(directory, names)?,
    };
    let block = block_size(&config).map_err(|flaw| {
        flaw.at(&directory.join(CONFIG), Place::Key("quantization_config.weight_block_size".into()))
    })?;
    let mut shards = Shards::new(directory, block);
    for name in &files {
        let path = directory.join(name);
        if !names.contains(name) {
            let expected = format!("one of {} files of the model", files.len());
            return Err(SourceError::missing(directory, Place::File(name.clone()), expected));
        }
        shards.add(path.as_path().into(), map(&path)?)?;
    }
    if let Some((bytes, path)) = &index {
        shards.check_index((**bytes).as_ref(), path)?;
    }
    let experts = config.get("n_routed_experts").and_then(Value::as_u64);
    Ok((config, shards.assemble(experts)?))
}

fn map_small(path: &Path, most: usize) -> Result<HostBytes, SourceError> {
    let bytes = map(path)?;
    let len = (*bytes).as_ref().len();
    if len > most {
        let expected = format!("a file of at most {most} bytes");
        return Err(SourceError::invalid(path, Place::Header, expected, format!("{len}")));
    }
    Ok(bytes)
}

fn read_config(path: &Path) -> Result<Value, SourceError> {
    let bytes = map_small(path, MAX_CONFIG)?;
    parse_config((*bytes).as_ref()).map_err(|flaw| flaw.at(path, Place::Header))
}

fn parse_config(bytes: &[u8]) -> Result<Value, Flaw> {
    let config: Value = serde_json::from_slice(bytes).map_err(|e| Flaw::new("JSON", e.to_string()))?;
    if !config.is_object() {
        return Err(Flaw::new("a JSON object", "another JSON value"));
    }
    Ok(config)
}

/// Rows and columns that share an FP8 scale.
fn block_size(config: &Value) -> Result<[usize; 2], Flaw> {
    let Some(found) = config.get("quantization_config").and_then(|q| q.get("weight_block_size")) else {
        return Ok([128, 128]);
    };
    let sides: Vec<usize> =
        found.as_array().into_iter().flatten().filter_map(|side| side.as_u64()?.try_into().ok()).collect();
    match sides[..] {
        // Bounded so that products with dimensions of tensors cannot overflow.
        [rows @ 1..=0xffff, cols @ 1..=0xffff] if found.as_array().is_some_and(|all| all.len() == 2) => {
            Ok([rows, cols])
        }
        _ => Err(Flaw::new("two numbers from 1 to 65535", clipped(&found.to_string()))),
    }
}

/// The weight files where there is no index: all of a numbered set, or all there are.
fn files_by_name(directory: &Path, names: &BTreeSet<String>) -> Result<BTreeSet<String>, SourceError> {
    let files: BTreeSet<String> = names.iter().filter(|name| is_weights(name)).cloned().collect();
    let numbered = files.iter().find_map(|name| ShardName::parse(name, SUFFIX));
    match numbered {
        Some(one) if one.count <= MAX_FILES => Ok((0..one.count).map(|number| one.sibling(number)).collect()),
        Some(one) => {
            let found = format!("{} by their names", one.count);
            Err(SourceError::invalid(
                directory,
                Place::Directory,
                format!("at most {MAX_FILES} files"),
                found,
            ))
        }
        None => Ok(files),
    }
}

/// Checks an index alone, for tests with bad ones.
pub(super) fn check_index_bytes(json: &[u8], path: &Path) -> Result<usize, SourceError> {
    if json.len() <= MAX_CONFIG {
        let _ = parse_config(json).map(|config| block_size(&config).is_ok());
    }
    files_of_index(json, path).map(|files| files.len())
}

/// Names the tensors of one file as a directory with that file would.
pub(super) fn assemble_bytes(
    file: &Path,
    bytes: HostBytes,
) -> Result<Vec<(TensorInfo, Location)>, SourceError> {
    let mut shards = Shards::new(file.parent().unwrap_or(Path::new("")), [128, 128]);
    shards.add(file.into(), bytes)?;
    shards.assemble(None)
}
