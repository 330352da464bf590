//! GGUF files, versions 2 and 3, little-endian.
//!
//! ```text
//! "GGUF"  version: u32  tensors: u64  keys: u64
//! keys ×    { key: string, type: u32, value }
//! tensors × { name: string, rank: u32, dims: u64 × rank (contiguous first), type: u32, offset: u64 }
//! padding to `general.alignment`, then the tensors' data; offsets count from here
//! ```
//! A string is its length (u64) and that many bytes. The format is that of ggml's `docs/gguf.md`.
//!
//! The parser is safe against hostile files: every count is checked against the bytes that are left before
//! anything is allocated, sums and products are checked, nothing recurses deeper than [`MAX_ARRAY_DEPTH`]. It
//! reads the header only and keeps eight bytes for each key and a [`TensorInfo`] for each tensor.
//!
//! Where the format leaves room, the rules are: keys and tensor names are unique, not empty and UTF-8 (any
//! characters, any length); the alignment is a multiple of 8 up to [`MAX_ALIGNMENT`]; a tensor has one to four
//! dimensions, none of them 0; its rows are whole blocks; its data lies within the file, on an aligned offset,
//! and overlaps no other's. A tensor of a type that is unknown here does no harm until it is used.

use super::{
    GgmlType, Place, SourceError, StoredType, TensorInfo,
    cursor::Cursor,
    error::{Flaw, clipped},
    map, split,
    value::{skip_value, text},
};
use backend_api::HostBytes;
use std::{ops::Range, path::Path, sync::Arc};

pub use super::{
    metadata::Metadata,
    value::{Array, MAX_ARRAY_DEPTH, Value, ValueType},
};

/// The largest `general.alignment` accepted. Files have 32.
pub const MAX_ALIGNMENT: u64 = 1 << 20;

/// The most tensors in a file, so that memory stays in proportion to the file. A V3 with every expert apart
/// would have 45 thousand.
pub const MAX_TENSORS: usize = 1 << 17;

/// The alignment of files that do not name one.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// A parsed header.
pub(super) struct Header {
    pub(super) metadata: Metadata,
    /// The tensors in the file's order with the range of their bytes in the file.
    pub(super) tensors: Vec<(TensorInfo, Range<usize>)>,
}

/// Parses the header of the file `bytes`; `file` is its name in errors.
pub(super) fn parse(file: &Arc<Path>, bytes: &HostBytes) -> Result<Header, SourceError> {
    let all: &[u8] = (**bytes).as_ref();
    let mut cursor = Cursor::new(all);
    let (metadata, tensors) = keys(&mut cursor, file, bytes)?;
    let alignment = alignment(&metadata)?;
    let table = tensor_table(&mut cursor, tensors, file)?;
    // At most MAX_ALIGNMENT more than a position in memory: cannot overflow.
    let data = (cursor.position() as u64).next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(table.len());
    for (info, offset) in table {
        let range = place_tensor(&info, offset, data, alignment, all.len())
            .map_err(|flaw| flaw.at(file, Place::Tensor(info.name.clone())))?;
        tensors.push((info, range));
    }
    check_overlaps(&tensors)?;
    Ok(Header { metadata, tensors })
}

/// The keys, and how many tensors are said to follow them, where `cursor` then is.
fn keys(
    cursor: &mut Cursor<'_>,
    file: &Arc<Path>,
    bytes: &HostBytes,
) -> Result<(Metadata, u64), SourceError> {
    let (tensors, keys) = preamble(cursor).map_err(|flaw| flaw.at(file, Place::Header))?;
    let entries = entries(cursor, keys, file)?;
    Ok((Metadata::new(file, bytes, entries)?, tensors))
}

impl Metadata {
    /// The keys of a file alone: what follows them may be cut or broken, and other files of its set be missing. Where
    /// the first file of that set is there, its keys, as it has the model's.
    ///
    /// # Errors
    /// As [`Checkpoint::open`](super::Checkpoint::open), for what is up to the last key.
    pub fn open(file: &Path) -> Result<Metadata, SourceError> {
        let file: Arc<Path> = match split::first(file).filter(|first| first.exists()) {
            Some(first) => first.into(),
            None => file.into(),
        };
        let bytes = map::map(&file)?;
        let (metadata, _) = keys(&mut Cursor::new((*bytes).as_ref()), &file, &bytes)?;
        Ok(metadata)
    }
}

/// Magic, version and the two counts (tensors, keys).
fn preamble(cursor: &mut Cursor<'_>) -> Result<(u64, u64), Flaw> {
    let magic: [u8; 4] = cursor.array()?;
    if magic != MAGIC {
        let mut reversed = magic;
        reversed.reverse();
        if reversed == MAGIC {
            return Err(Flaw::new("a little-endian GGUF file", "a big-endian one"));
        }
        return Err(Flaw::new("\"GGUF\" at the start", format!("\"{}\"", magic.escape_ascii())));
    }
    let version = cursor.u32()?;
    match version {
        2 | 3 => {}
        _ if (1..=0xffff).contains(&version.swap_bytes()) => {
            let found = format!("a big-endian one of version {}", version.swap_bytes());
            return Err(Flaw::new("a little-endian GGUF file", found));
        }
        _ => return Err(Flaw::new("GGUF version 2 or 3", format!("version {version}"))),
    }
    Ok((cursor.u64()?, cursor.u64()?))
}

/// A count against the bytes that are left for it, before anything is allocated.
fn bounded(cursor: &Cursor<'_>, count: u64, least: usize, what: &str) -> Result<usize, Flaw> {
    let most = cursor.rest().len() / least;
    match usize::try_from(count) {
        Ok(count) if count <= most => Ok(count),
        _ => Err(Flaw::new(format!("at most {most} {what} in a file of this size"), count.to_string())),
    }
}

/// The offsets of the keys.
fn entries(cursor: &mut Cursor<'_>, count: u64, file: &Path) -> Result<Vec<usize>, SourceError> {
    // A key of one character with a value of one byte.
    const LEAST: usize = 8 + 1 + 4 + 1;
    let count = bounded(cursor, count, LEAST, "keys").map_err(|flaw| flaw.at(file, Place::Header))?;
    let mut entries = Vec::with_capacity(count);
    let mut last = "";
    for index in 0..count {
        entries.push(cursor.position());
        let key = name(cursor, "key").map_err(|flaw| {
            let place = Place::Key(format!("#{index}, after `{}`", clipped(last)));
            flaw.at(file, place)
        })?;
        last = key;
        let place = || Place::Key(key.to_owned());
        let id = cursor.u32().map_err(|flaw| flaw.at(file, place()))?;
        let Some(value_type) = ValueType::from_id(id) else {
            return Err(SourceError::invalid(
                file,
                place(),
                "a value type from 0 to 12",
                format!("type {id}"),
            ));
        };
        skip_value(cursor, value_type, 0).map_err(|flaw| flaw.at(file, place()))?;
    }
    Ok(entries)
}

fn name<'a>(cursor: &mut Cursor<'a>, what: &str) -> Result<&'a str, Flaw> {
    let name = text(cursor.string()?)?;
    if name.is_empty() {
        return Err(Flaw::new(format!("a {what} that is not empty"), "an empty one"));
    }
    Ok(name)
}

fn alignment(metadata: &Metadata) -> Result<u64, SourceError> {
    let alignment = metadata.get_u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    check_alignment(alignment).map_err(|flaw| flaw.at(metadata.file(), Place::Key(ALIGNMENT_KEY.into())))?;
    Ok(alignment)
}

pub(super) fn check_alignment(alignment: u64) -> Result<(), Flaw> {
    if alignment == 0 || !alignment.is_multiple_of(8) || alignment > MAX_ALIGNMENT {
        let expected = format!("a multiple of 8 from 8 to {MAX_ALIGNMENT}");
        return Err(Flaw::new(expected, alignment.to_string()));
    }
    Ok(())
}

/// The tensors with their offsets in the file's data.
fn tensor_table(
    cursor: &mut Cursor<'_>,
    count: u64,
    file: &Arc<Path>,
) -> Result<Vec<(TensorInfo, u64)>, SourceError> {
    // A name of one character, one dimension.
    const LEAST: usize = 8 + 1 + 4 + 8 + 4 + 8;
    let header = |flaw: Flaw| flaw.at(file, Place::Header);
    let count = bounded(cursor, count, LEAST, "tensors").map_err(header)?;
    if count > MAX_TENSORS {
        return Err(header(Flaw::new(format!("at most {MAX_TENSORS} tensors"), count.to_string())));
    }
    let mut tensors: Vec<(TensorInfo, u64)> = Vec::with_capacity(count);
    for index in 0..count {
        let name = name(cursor, "tensor name").map_err(|flaw| {
            let last = tensors.last().map_or("", |(info, _)| &info.name);
            flaw.at(file, Place::Tensor(format!("#{index}, after `{}`", clipped(last))))
        })?;
        let entry = tensor_entry(cursor, name, file);
        tensors.push(entry.map_err(|flaw| flaw.at(file, Place::Tensor(name.to_owned())))?);
    }
    Ok(tensors)
}

fn tensor_entry(cursor: &mut Cursor<'_>, name: &str, file: &Arc<Path>) -> Result<(TensorInfo, u64), Flaw> {
    let rank = cursor.u32()?;
    if !(1..=4).contains(&rank) {
        return Err(Flaw::new("1 to 4 dimensions", rank.to_string()));
    }
    let mut shape = Vec::with_capacity(rank as usize);
    for _ in 0..rank {
        let dim = cursor.u64()?;
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 => shape.push(dim),
            _ => return Err(Flaw::new("dimensions of at least 1", dim.to_string())),
        }
    }
    shape.reverse();
    let ggml_type = GgmlType(cursor.u32()?);
    let offset = cursor.u64()?;
    let dtype = ggml_type.dtype().ok_or(StoredType::Ggml(ggml_type));
    let bytes = tensor_bytes(ggml_type, &shape)?.unwrap_or(0);
    let info = TensorInfo { name: name.to_owned(), dtype, shape, bytes, file: file.clone(), origin: None };
    Ok((info, offset))
}

/// Bytes of a tensor; `None` for a type whose layout is not known. Both readers of files and the writer use it.
pub(super) fn tensor_bytes(ggml_type: GgmlType, shape: &[usize]) -> Result<Option<u64>, Flaw> {
    let found = || format!("shape {shape:?} of {ggml_type}");
    let too_many = || Flaw::new("a size below 2^63 bytes", found());
    let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
    let elements = elements.filter(|&n| n < 1 << 63).ok_or_else(too_many)?;
    let (Some(len), Some(bytes)) = (ggml_type.block_len(), ggml_type.block_bytes()) else { return Ok(None) };
    if !shape.last().is_none_or(|row| row.is_multiple_of(len)) {
        return Err(Flaw::new(format!("rows of whole blocks of {len} values"), found()));
    }
    (elements / len as u64).checked_mul(bytes as u64).filter(|&n| n < 1 << 63).ok_or_else(too_many).map(Some)
}

/// The tensor's range in the file. `data` is where the file's data starts, `len` the file's length.
fn place_tensor(
    info: &TensorInfo,
    offset: u64,
    data: u64,
    alignment: u64,
    len: usize,
) -> Result<Range<usize>, Flaw> {
    if !offset.is_multiple_of(alignment) {
        return Err(Flaw::new(format!("an offset that is a multiple of {alignment}"), offset.to_string()));
    }
    let start = data.checked_add(offset);
    match (start, start.and_then(|start| start.checked_add(info.bytes))) {
        (Some(start), Some(end)) if end <= len as u64 => Ok(start as usize..end as usize),
        _ => Err(Flaw::new(
            format!("{} bytes (shape {:?}) within the {len} bytes of the file", info.bytes, info.shape),
            format!("them at offset {offset} of the data, which starts at byte {data}"),
        )),
    }
}

fn check_overlaps(tensors: &[(TensorInfo, Range<usize>)]) -> Result<(), SourceError> {
    let mut order: Vec<usize> = (0..tensors.len()).filter(|&i| !tensors[i].1.is_empty()).collect();
    order.sort_unstable_by_key(|&i| tensors[i].1.start);
    for pair in order.windows(2) {
        let ((before, a), (after, b)) = (&tensors[pair[0]], &tensors[pair[1]]);
        if a.end > b.start {
            let found = format!("it at byte {}, within `{}`", b.start, clipped(&before.name));
            return Err(after.invalid("bytes of its own", found));
        }
    }
    Ok(())
}
