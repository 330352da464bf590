//! safetensors files: a JSON header that names the tensors, then their data.
//!
//! The `safetensors` crate parses the header. Before that, a pass over the JSON that keeps nothing but the names
//! checks what the crate leaves open or does not name in its errors: a name twice, sizes and offsets against the
//! file, and limits that keep memory in proportion to the header.

use super::{Place, SourceError, error::Flaw};
use backend_api::HostBytes;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::{collections::HashSet, fmt, ops::Range, path::Path};

/// The largest header accepted. That of a V3 in one file would have 25 MB.
const MAX_HEADER: usize = 32 << 20;

/// The most tensors of one file.
const MAX_TENSORS: usize = 1 << 17;

/// The most `__metadata__` entries.
const MAX_NOTES: usize = 1024;

const MAX_RANK: usize = 8;

/// A tensor as a file has it.
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) range: Range<usize>,
}

/// The tensors of a file by name, in the order of their data.
pub(super) fn parse(file: &Path, bytes: &HostBytes) -> Result<Vec<(String, Stored)>, SourceError> {
    let all: &[u8] = (**bytes).as_ref();
    let header = header(all).map_err(|flaw| flaw.at(file, Place::Header))?;
    check(header, all.len() - 8 - header.len(), file)?;
    let (len, metadata) = SafeTensors::read_metadata(all).map_err(|e| named(e, file))?;
    let stored = |name: String| {
        let info = metadata.info(&name)?;
        let (start, end) = info.data_offsets;
        let range = 8 + len + start..8 + len + end;
        Some((name, Stored { dtype: info.dtype, shape: info.shape.clone(), range }))
    };
    Ok(metadata.offset_keys().into_iter().filter_map(stored).collect())
}

/// The header's JSON.
fn header(all: &[u8]) -> Result<&[u8], Flaw> {
    let Some((len, rest)) = all.split_first_chunk::<8>() else {
        return Err(Flaw::new("a safetensors file, of at least 8 bytes", format!("{} bytes", all.len())));
    };
    let len = u64::from_le_bytes(*len);
    let most = rest.len().min(MAX_HEADER);
    match usize::try_from(len) {
        Ok(len) if len <= most => Ok(&rest[..len]),
        _ => Err(Flaw::new(format!("a header of at most {most} bytes"), format!("{len}"))),
    }
}

fn named(error: SafeTensorError, file: &Path) -> SourceError {
    match error {
        SafeTensorError::InvalidOffset(name) => SourceError::invalid(
            file,
            Place::Tensor(name),
            "bytes that follow those of the tensor before it",
            "a gap or an overlap",
        ),
        other => SourceError::invalid(file, Place::Header, "a safetensors header", other.to_string()),
    }
}

/// Checks the entries one by one. `data` is how many bytes follow the header.
fn check(json: &[u8], data: usize, file: &Path) -> Result<(), SourceError> {
    let mut check = Check { data: data as u64, names: HashSet::new(), wrong: None };
    let mut json = serde_json::Deserializer::from_slice(json);
    let result = (&mut check).deserialize(&mut json).and_then(|()| json.end());
    match (result, check.wrong) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some((name, flaw))) => Err(flaw.at(file, Place::Tensor(name))),
        (Err(error), None) => Err(SourceError::invalid(file, Place::Header, "JSON", error.to_string())),
    }
}

struct Check {
    data: u64,
    names: HashSet<String>,
    /// The first tensor that is wrong, as serde's errors are text.
    wrong: Option<(String, Flaw)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Dims,
    data_offsets: (u64, u64),
}

impl Check {
    fn entry(&self, entry: &Entry) -> Result<(), Flaw> {
        let (start, end) = entry.data_offsets;
        if start > end || end > self.data {
            let expected = format!("offsets within the {} bytes of data", self.data);
            return Err(Flaw::new(expected, format!("{start} to {end}")));
        }
        let bits = entry.shape.0.iter().try_fold(entry.dtype.bitsize() as u64, |n, &dim| n.checked_mul(dim));
        if bits.map(|bits| (bits / 8, bits % 8)) != Some((end - start, 0)) {
            let expected = format!("the bytes of shape {:?} of {:?}", entry.shape.0, entry.dtype);
            return Err(Flaw::new(expected, (end - start).to_string()));
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut Check {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Check {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<Notes>()?;
                continue;
            }
            let flaw = if self.names.len() == MAX_TENSORS {
                Some(Flaw::new(format!("at most {MAX_TENSORS} tensors"), "one more"))
            } else if self.names.contains(&name) {
                Some(Flaw::new("each name once", "it twice"))
            } else {
                match map.next_value::<Entry>() {
                    Ok(entry) => self.entry(&entry).err(),
                    Err(e) => Some(Flaw::new("dtype, shape and data_offsets", e.to_string())),
                }
            };
            if let Some(flaw) = flaw {
                self.wrong = Some((name, flaw));
                return Err(A::Error::custom("a tensor is wrong"));
            }
            self.names.insert(name);
        }
        Ok(())
    }
}

/// A shape of few dimensions.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(DimsVisitor)
    }
}

struct DimsVisitor;

impl<'de> Visitor<'de> for DimsVisitor {
    type Value = Dims;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX_RANK} dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
        let mut dims = Vec::new();
        while let Some(dim) = seq.next_element()? {
            if dims.len() == MAX_RANK {
                return Err(A::Error::invalid_length(MAX_RANK + 1, &self));
            }
            dims.push(dim);
        }
        Ok(Dims(dims))
    }
}

/// `__metadata__`, of which only the number of entries matters.
struct Notes;

impl<'de> Deserialize<'de> for Notes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Notes)
    }
}

impl<'de> Visitor<'de> for Notes {
    type Value = Notes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "__metadata__ of at most {MAX_NOTES} entries")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Notes, A::Error> {
        let mut count = 0;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            count += 1;
            if count > MAX_NOTES {
                return Err(A::Error::invalid_length(count, &self));
            }
        }
        Ok(Notes)
    }
}
