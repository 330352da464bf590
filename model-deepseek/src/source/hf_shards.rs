//! The safetensors files of a directory, and what becomes of their tensors.

use super::{
    Location, Place, SourceError, StoredType, TensorInfo, WeightBytes,
    assemble::{Assembly, Conversion, Part},
    error::{Flaw, clipped},
    gguf::tensor_bytes,
    hf_index::for_each_entry,
    hf_names::{Target, is_f32, target},
    safetensors::{Stored, parse},
};
use ::safetensors::Dtype;
use backend_api::{DType, HostBytes};
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

/// The most tensors of all files. A Kimi-K2 in FP8 has 140 thousand.
const MAX_TENSORS: usize = 200_000;

/// Ends the name of an FP8 tensor's scales.
const SCALE: &str = "_scale_inv";

/// A tensor and which of the files has it.
struct Source {
    shard: usize,
    stored: Stored,
}

/// The files, opened.
pub(super) struct Shards {
    directory: PathBuf,
    files: Vec<(Arc<Path>, HostBytes)>,
    /// By Hugging Face name.
    tensors: BTreeMap<String, Source>,
    /// Rows and columns that share an FP8 scale.
    block: [usize; 2],
}

impl Shards {
    pub(super) fn new(directory: &Path, block: [usize; 2]) -> Self {
        Shards { directory: directory.to_owned(), files: Vec::new(), tensors: BTreeMap::new(), block }
    }

    /// Adds the tensors of a file.
    pub(super) fn add(&mut self, file: Arc<Path>, bytes: HostBytes) -> Result<(), SourceError> {
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
    pub(super) fn check_index(&self, json: &[u8], path: &Path) -> Result<(), SourceError> {
        let mut left: HashMap<&str, usize> =
            self.tensors.iter().map(|(name, source)| (name.as_str(), source.shard)).collect();
        let name_of = |shard: usize| self.files[shard].0.file_name().unwrap_or_default().to_string_lossy();
        for_each_entry(json, path, |tensor, file| {
            let wrong = |found| {
                let place = Place::Tensor(tensor.to_owned());
                Err(SourceError::invalid(path, place, format!("it in `{}`", clipped(file)), found))
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
    pub(super) fn assemble(
        mut self,
        experts: Option<u64>,
    ) -> Result<Vec<(TensorInfo, Location)>, SourceError> {
        let all = std::mem::take(&mut self.tensors);
        let (scales, tensors): (BTreeMap<_, _>, _) =
            all.into_iter().partition(|(name, _)| name.ends_with(SCALE));
        self.tensors = tensors;
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
        if let Some(orphan) = scales.keys().find(|name| !self.tensors.contains_key(base(name))) {
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
        scales: &BTreeMap<String, Source>,
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
        let origin = match stacked {
            None => (*first_name != name).then(|| first_name.as_str().into()),
            Some(_) => Some(all_experts(first_name).into()),
        };
        let info = TensorInfo { name, dtype, shape, bytes, file: file.clone(), origin };
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
                return Ok((Ok(DType::F32), Conversion::Fp8 { cols, block: self.block }));
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

/// The name that stands for those of all experts: `a.experts.*.b` for `a.experts.0.b`.
fn all_experts(name: &str) -> String {
    let parts = name.split_once(".experts.").and_then(|(a, rest)| Some((a, rest.split_once('.')?.1)));
    parts.map_or_else(|| name.to_owned(), |(before, after)| format!("{before}.experts.*.{after}"))
}

/// The tensor that a scale belongs to.
fn base(scale: &str) -> &str {
    scale.strip_suffix(SCALE).unwrap_or(scale)
}

/// Devices may rely on tensors being aligned; safetensors files need not align anything.
fn aligned(weight: &WeightBytes) -> bool {
    (*weight.bytes).as_ref().as_ptr().addr().wrapping_add(weight.range.start).is_multiple_of(8)
}
