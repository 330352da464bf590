//! Hugging Face directories: `config.json` and `model*.safetensors`, with an index where there are several.
//!
//! Tensors get GGUF names and shapes. Single experts become one tensor `[experts, n_out, n_in]`. F32, F16 and BF16
//! stay as they are, but norms, biases and router weights become F32. FP8 (e4m3) with `weight_scale_inv` becomes
//! F16: the exact product, rounded to nearest. What has no GGUF name keeps its own.

use super::{
    Location, Place, SourceError, StoredType, TensorInfo, WeightBytes,
    assemble::{Assembly, Conversion, Part},
    error::Flaw,
    gguf::tensor_bytes,
    hf_names::{Target, is_f32, target},
    map::map,
    safetensors::{Stored, parse},
    split::ShardName,
};
use ::safetensors::Dtype;
use backend_api::{DType, HostBytes};
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(super) const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SUFFIX: &str = ".safetensors";
const SCALE: &str = "_scale_inv";

/// Larger files of these names are refused, as memory goes with their size. Published ones have 2 KB and 13 MB.
const MAX_CONFIG: usize = 1 << 20;
const MAX_INDEX: usize = 128 << 20;

/// The most files an index may name.
const MAX_FILES: usize = 4096;

/// The most tensors of all files. A Kimi-K2 in FP8 has 140 thousand.
const MAX_TENSORS: usize = 200_000;

/// A tensor of the files, which of them, and what it belongs with.
struct Source {
    shard: usize,
    stored: Stored,
}

/// The files, opened.
struct Shards {
    directory: PathBuf,
    files: Vec<(Arc<Path>, HostBytes)>,
    /// By Hugging Face name.
    tensors: BTreeMap<String, Source>,
    block: [usize; 2],
}

/// Whether `directory` has weights of this kind, by their names.
pub(super) fn has_weights(names: &BTreeSet<String>) -> bool {
    names.contains(INDEX) || names.iter().any(|name| is_weights(name))
}

fn is_weights(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(SUFFIX)
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
    let mut shards =
        Shards { directory: directory.to_owned(), files: Vec::new(), tensors: BTreeMap::new(), block };
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
        _ => Err(Flaw::new("two numbers from 1 to 65535", super::error::clipped(&found.to_string()))),
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

/// The files that an index names.
fn files_of_index(json: &[u8], path: &Path) -> Result<BTreeSet<String>, SourceError> {
    let mut files = BTreeSet::new();
    for_each_entry(json, path, |tensor, file| {
        if files.contains(file) {
            return Ok(());
        }
        let plain = Path::new(file).file_name().is_some_and(|name| name == file) && !file.contains('\\');
        if !plain || !file.ends_with(SUFFIX) {
            let place = Place::Tensor(tensor.to_owned());
            let expected = "the name of a .safetensors file in this directory";
            return Err(Flaw::new(expected, format!("`{}`", super::error::clipped(file))).at(path, place));
        }
        if files.len() == MAX_FILES {
            let expected = format!("at most {MAX_FILES} files");
            return Err(SourceError::invalid(path, Place::Key("weight_map".into()), expected, "more"));
        }
        files.insert(file.to_owned());
        Ok(())
    })?;
    Ok(files)
}

/// Calls `visit` with every tensor and file of an index's `weight_map`, and keeps nothing.
fn for_each_entry(
    json: &[u8],
    path: &Path,
    mut visit: impl FnMut(&str, &str) -> Result<(), SourceError>,
) -> Result<(), SourceError> {
    let mut wrong = None;
    let mut seen = false;
    let walk = Walk { visit: &mut visit, wrong: &mut wrong, seen: &mut seen, inside: false };
    let mut json = serde_json::Deserializer::from_slice(json);
    let result = walk.deserialize(&mut json).and_then(|()| json.end());
    match (result, wrong) {
        (_, Some(error)) => Err(error),
        (Err(e), None) => {
            Err(SourceError::invalid(path, Place::Header, "the JSON of an index", e.to_string()))
        }
        (Ok(()), None) if !seen => {
            Err(SourceError::missing(path, Place::Key("weight_map".into()), "tensors and their files"))
        }
        (Ok(()), None) => Ok(()),
    }
}

/// The walk through an index: the outer object, and inside it `weight_map`.
struct Walk<'a, F> {
    visit: &'a mut F,
    wrong: &'a mut Option<SourceError>,
    seen: &'a mut bool,
    inside: bool,
}

impl<'de, F: FnMut(&str, &str) -> Result<(), SourceError>> DeserializeSeed<'de> for Walk<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, F: FnMut(&str, &str) -> Result<(), SourceError>> Visitor<'de> for Walk<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.inside { "an object of tensors and files" } else { "an object with weight_map" })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Walk { visit, wrong, seen, inside } = self;
        while let Some(key) = map.next_key::<String>()? {
            if inside {
                if let Err(error) = visit(&key, &map.next_value::<String>()?) {
                    *wrong = Some(error);
                    return Err(A::Error::custom("an entry is wrong"));
                }
            } else if key != "weight_map" {
                map.next_value::<IgnoredAny>()?;
            } else if std::mem::replace(seen, true) {
                return Err(A::Error::duplicate_field("weight_map"));
            } else {
                let walk = Walk { visit: &mut *visit, wrong: &mut *wrong, seen: &mut *seen, inside: true };
                map.next_value_seed(walk)?;
            }
        }
        Ok(())
    }
}

impl Shards {
    fn add(&mut self, file: Arc<Path>, bytes: HostBytes) -> Result<(), SourceError> {
        let shard = self.files.len();
        for (name, stored) in parse(&file, &bytes)? {
            if self.tensors.len() == MAX_TENSORS {
                let expected = format!("at most {MAX_TENSORS} tensors");
                return Err(SourceError::invalid(&self.directory, Place::Directory, expected, "more"));
            }
            if let Some(other) = self.tensors.get(&name) {
                let found = format!("another in {}", self.files[other.shard].0.display());
                let place = Place::Tensor(name);
                return Err(SourceError::invalid(&file, place, "one tensor of that name", found));
            }
            self.tensors.insert(name, Source { shard, stored });
        }
        self.files.push((file, bytes));
        Ok(())
    }

    /// Every entry of the index names the file that has the tensor, and every tensor has an entry.
    fn check_index(&self, json: &[u8], path: &Path) -> Result<(), SourceError> {
        let mut left: HashMap<&str, usize> =
            self.tensors.iter().map(|(name, source)| (name.as_str(), source.shard)).collect();
        let name_of = |shard: usize| self.files[shard].0.file_name().unwrap_or_default().to_string_lossy();
        for_each_entry(json, path, |tensor, file| {
            let wrong = |found| {
                let place = Place::Tensor(tensor.to_owned());
                Err(SourceError::invalid(
                    path,
                    place,
                    format!("it in `{}`", super::error::clipped(file)),
                    found,
                ))
            };
            match left.remove(tensor) {
                Some(shard) if name_of(shard) == file => Ok(()),
                Some(shard) => wrong(format!("it in `{}`", name_of(shard))),
                None if self.tensors.contains_key(tensor) => wrong("it in the index twice".to_owned()),
                None => wrong("it in none of the files".to_owned()),
            }
        })?;
        match left.iter().min() {
            Some((tensor, shard)) => {
                let expected = format!("an entry for it, as it is in `{}`", name_of(*shard));
                Err(SourceError::missing(path, Place::Tensor((*tensor).to_owned()), expected))
            }
            None => Ok(()),
        }
    }

    /// Gives tensors their GGUF names. `experts`: how many there have to be, if known.
    fn assemble(mut self, experts: Option<u64>) -> Result<Vec<(TensorInfo, Location)>, SourceError> {
        let scales: HashMap<String, Source> =
            self.tensors.extract_if(.., |name, _| name.ends_with(SCALE)).collect();
        let mut made = Vec::new();
        let mut stacks: BTreeMap<String, BTreeMap<usize, (&String, &Source)>> = BTreeMap::new();
        for (hf_name, source) in &self.tensors {
            match target(hf_name) {
                Some(Target { name, expert: Some(expert) }) => {
                    stacks.entry(name).or_default().insert(expert, (hf_name, source));
                }
                Some(Target { name, expert: None }) => {
                    made.push(self.tensor(name, None, &[(hf_name, source)], &scales)?)
                }
                None => made.push(self.tensor(hf_name.clone(), None, &[(hf_name, source)], &scales)?),
            }
        }
        for (name, stack) in stacks {
            let parts: Vec<_> = stack.values().copied().collect();
            let expected =
                experts.map_or(parts.len(), |experts| usize::try_from(experts).unwrap_or(usize::MAX));
            // The first number that is not there, and the number of another that is.
            let gap =
                (0..).zip(stack.keys()).find(|(number, expert)| number != *expert).map(|(number, _)| number);
            if let Some(missing) = gap.or((parts.len() != expected).then_some(parts.len().min(expected))) {
                let (sample, _) = parts[0];
                let (before, after) = sample.split_once(".experts.").unwrap_or((sample, ""));
                let after = after.split_once('.').map_or("", |(_, after)| after);
                let missing = Place::Tensor(format!("{before}.experts.{missing}.{after}"));
                if parts.len() > expected && gap.is_none() {
                    let expected = format!("{expected} experts, as n_routed_experts says");
                    return Err(SourceError::invalid(&self.directory, missing, expected, "one more"));
                }
                return Err(SourceError::missing(&self.directory, missing, format!("{expected} experts")));
            }
            made.push(self.tensor(name, Some(parts.len()), &parts, &scales)?);
        }
        if let Some(orphan) = scales.keys().filter(|name| !self.tensors.contains_key(base(name))).min() {
            let expected = format!("`{}`, which it scales", base(orphan));
            return Err(SourceError::invalid(
                &self.directory,
                Place::Tensor(orphan.clone()),
                expected,
                "none",
            ));
        }
        Ok(made)
    }

    /// The tensor `name` from its parts: one, or the `stacked` experts.
    fn tensor(
        &self,
        name: String,
        stacked: Option<usize>,
        parts: &[(&String, &Source)],
        scales: &HashMap<String, Source>,
    ) -> Result<(TensorInfo, Location), SourceError> {
        let (first_name, first) = parts[0];
        for (hf_name, other) in parts {
            if (other.stored.dtype, &other.stored.shape) != (first.stored.dtype, &first.stored.shape) {
                let expected =
                    format!("{:?} {:?}, as `{first_name}`", first.stored.dtype, first.stored.shape);
                let found = format!("{:?} {:?}", other.stored.dtype, other.stored.shape);
                return Err(self.invalid(hf_name, other, expected, found));
            }
        }
        let (dtype, conversion) = self
            .conversion(&name, first)
            .map_err(|flaw| flaw.at(&self.files[first.shard].0, Place::Tensor(first_name.clone())))?;
        let mut assembly = Assembly { parts: Vec::with_capacity(parts.len()), conversion };
        for (hf_name, source) in parts {
            let scales = scales.get(&format!("{hf_name}{SCALE}"));
            let scales = self.scales(hf_name, source, scales)?;
            assembly.parts.push(Part { values: self.bytes(source), scales });
        }
        let shape: Vec<usize> = stacked.into_iter().chain(first.stored.shape.iter().copied()).collect();
        let bytes = match &dtype {
            Ok(dtype) => tensor_bytes(dtype.ggml_type(), &shape),
            Err(_) => Ok(None),
        };
        let file = &self.files[first.shard].0;
        let bytes = bytes.map_err(|flaw| flaw.at(file, Place::Tensor(first_name.clone())))?.unwrap_or(0);
        let info = TensorInfo { name, dtype, shape, bytes, file: file.clone() };
        let location = match (&assembly.parts[..], conversion) {
            ([part], Conversion::None) if aligned(&part.values) => Location::Mapped(part.values.clone()),
            _ => Location::Made(assembly),
        };
        Ok((info, location))
    }

    /// The format in which a tensor is given, and how to get there.
    fn conversion(
        &self,
        name: &str,
        source: &Source,
    ) -> Result<(Result<DType, StoredType>, Conversion), Flaw> {
        let dtype = match source.stored.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F8_E4M3 => {
                let [_, cols] = source.stored.shape[..] else {
                    return Err(Flaw::new("a matrix of F8_E4M3", format!("shape {:?}", source.stored.shape)));
                };
                return Ok((Ok(DType::F16), Conversion::Fp8 { cols, block: self.block }));
            }
            other => return Ok((Err(StoredType::SafeTensors(format!("{other:?}"))), Conversion::None)),
        };
        match dtype {
            DType::F16 | DType::BF16 if is_f32(name) => Ok((Ok(DType::F32), Conversion::ToF32(dtype))),
            _ => Ok((Ok(dtype), Conversion::None)),
        }
    }

    /// The scales of an FP8 matrix: there, f32, and one for each block. Others have none.
    fn scales(
        &self,
        hf_name: &str,
        source: &Source,
        scales: Option<&Source>,
    ) -> Result<Option<WeightBytes>, SourceError> {
        let scale_name = format!("{hf_name}{SCALE}");
        match (source.stored.dtype, scales) {
            (Dtype::F8_E4M3, Some(scales)) => {
                let [rows, cols] = self.block;
                let shape = &source.stored.shape;
                let expected = [shape[0].div_ceil(rows), shape[1].div_ceil(cols)];
                if (scales.stored.dtype, &scales.stored.shape[..]) != (Dtype::F32, &expected[..]) {
                    let expected = format!("F32 {expected:?} (blocks of {rows} × {cols})");
                    let found = format!("{:?} {:?}", scales.stored.dtype, scales.stored.shape);
                    return Err(self.invalid(&scale_name, scales, expected, found));
                }
                Ok(Some(self.bytes(scales)))
            }
            (Dtype::F8_E4M3, None) => {
                let expected = format!("the scales of `{hf_name}`");
                Err(SourceError::missing(&self.directory, Place::Tensor(scale_name), expected))
            }
            (other, Some(_)) => Err(self.invalid(
                hf_name,
                source,
                format!("F8_E4M3, as there is {scale_name}"),
                format!("{other:?}"),
            )),
            (_, None) => Ok(None),
        }
    }

    fn bytes(&self, source: &Source) -> WeightBytes {
        WeightBytes { bytes: self.files[source.shard].1.clone(), range: source.stored.range.clone() }
    }

    fn invalid(&self, hf_name: &str, source: &Source, expected: String, found: String) -> SourceError {
        let place = Place::Tensor(hf_name.to_owned());
        SourceError::invalid(&self.files[source.shard].0, place, expected, found)
    }
}

/// The tensor that a scale belongs to.
fn base(scale: &str) -> &str {
    scale.strip_suffix(SCALE).unwrap_or(scale)
}

/// Devices may rely on tensors being aligned; safetensors files need not align anything.
fn aligned(weight: &WeightBytes) -> bool {
    (*weight.bytes).as_ref().as_ptr().addr().wrapping_add(weight.range.start).is_multiple_of(8)
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
    let directory = file.parent().unwrap_or(Path::new("")).to_owned();
    let mut shards = Shards { directory, files: Vec::new(), tensors: BTreeMap::new(), block: [128, 128] };
    shards.add(file.into(), bytes)?;
    shards.assemble(None)
}
