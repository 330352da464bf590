//! Writing GGUF files (version 3), of any size: tensor data is streamed.
//!
//! A [`GgufWriter`] collects keys and tensors, which costs no more than the header. Then it writes one file, a set
//! of split files, or a sparse file of the full size that holds the header alone. Files appear under their name
//! only when they are whole.
//!
//! ```
//! use backend_api::DType;
//! use model_deepseek::source::{Checkpoint, gguf_writer::GgufWriter};
//!
//! let folder = tempfile::tempdir()?;
//! let file = folder.path().join("two.gguf");
//! let mut writer = GgufWriter::new();
//! writer.key("general.architecture", "deepseek2")?;
//! writer.tensor("output_norm.weight", DType::F32.ggml_type(), &[2])?;
//! writer.write_file(&file, |_tensor, out| out.write_all(&[0, 0, 128, 63, 0, 0, 0, 64]))?;
//!
//! let two = Checkpoint::open(&file)?;
//! assert_eq!(two.tensor("output_norm.weight").unwrap().shape, [2]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use super::{
    error::Flaw,
    gguf::{
        ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ARRAY_DEPTH, MAX_TENSORS, ValueType, check_alignment,
        tensor_bytes,
    },
    split::shard_name,
};
use backend_api::GgmlType;
use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
};

/// The most bytes of data: far from where sums would overflow.
const MAX_BYTES: u64 = 1 << 62;

/// A value to write: see the `From` conversions for short forms.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "one variant per ValueType")]
pub enum NewValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    /// Elements of one type, which an empty array has too.
    Array(ValueType, Vec<NewValue>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl NewValue {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            NewValue::U8(_) => ValueType::U8,
            NewValue::I8(_) => ValueType::I8,
            NewValue::U16(_) => ValueType::U16,
            NewValue::I16(_) => ValueType::I16,
            NewValue::U32(_) => ValueType::U32,
            NewValue::I32(_) => ValueType::I32,
            NewValue::F32(_) => ValueType::F32,
            NewValue::Bool(_) => ValueType::Bool,
            NewValue::String(_) => ValueType::String,
            NewValue::Array(..) => ValueType::Array,
            NewValue::U64(_) => ValueType::U64,
            NewValue::I64(_) => ValueType::I64,
            NewValue::F64(_) => ValueType::F64,
        }
    }

    fn write(&self, out: &mut Vec<u8>, depth: usize) -> io::Result<()> {
        match self {
            NewValue::U8(v) => out.extend(v.to_le_bytes()),
            NewValue::I8(v) => out.extend(v.to_le_bytes()),
            NewValue::U16(v) => out.extend(v.to_le_bytes()),
            NewValue::I16(v) => out.extend(v.to_le_bytes()),
            NewValue::U32(v) => out.extend(v.to_le_bytes()),
            NewValue::I32(v) => out.extend(v.to_le_bytes()),
            NewValue::F32(v) => out.extend(v.to_le_bytes()),
            NewValue::Bool(v) => out.push((*v).into()),
            NewValue::String(v) => write_string(out, v),
            NewValue::U64(v) => out.extend(v.to_le_bytes()),
            NewValue::I64(v) => out.extend(v.to_le_bytes()),
            NewValue::F64(v) => out.extend(v.to_le_bytes()),
            NewValue::Array(element_type, elements) => {
                if depth == MAX_ARRAY_DEPTH {
                    return Err(refused(format!("arrays more than {MAX_ARRAY_DEPTH} deep")));
                }
                out.extend(element_type.id().to_le_bytes());
                out.extend((elements.len() as u64).to_le_bytes());
                for element in elements {
                    if element.value_type() != *element_type {
                        return Err(refused(format!(
                            "{} in an array of {element_type}",
                            element.value_type()
                        )));
                    }
                    element.write(out, depth + 1)?;
                }
            }
        }
        Ok(())
    }
}

macro_rules! from {
    ($($native:ty => $variant:ident),*) => {$(
        impl From<$native> for NewValue {
            fn from(value: $native) -> Self {
                NewValue::$variant(value.into())
            }
        }
        impl From<Vec<$native>> for NewValue {
            fn from(values: Vec<$native>) -> Self {
                NewValue::Array(ValueType::$variant, values.into_iter().map(NewValue::from).collect())
            }
        }
    )*};
}
from!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool, &str => String,
    String => String, u64 => U64, i64 => I64, f64 => F64);

/// A tensor to write.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Its type.
    pub ggml_type: GgmlType,
    /// Outermost first, as everywhere in Fathom; the file has it reversed.
    pub shape: Vec<usize>,
    /// How many bytes of data it has.
    pub bytes: u64,
}

/// The header of a GGUF file to be; its methods write the file.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    alignment: u64,
    entries: Vec<u8>,
    keys: HashSet<String>,
    tensors: Vec<NewTensor>,
    names: HashSet<String>,
}

impl Default for GgufWriter {
    fn default() -> Self {
        GgufWriter::new()
    }
}

impl GgufWriter {
    /// No keys, no tensors.
    pub fn new() -> Self {
        GgufWriter {
            alignment: DEFAULT_ALIGNMENT,
            entries: Vec::new(),
            keys: HashSet::new(),
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }

    /// Adds a key. `general.alignment` (a u32) also sets the alignment of the tensors.
    ///
    /// # Errors
    /// A key that is empty or there already, an array of mixed types, an alignment that readers refuse.
    pub fn key(&mut self, key: &str, value: impl Into<NewValue>) -> io::Result<&mut Self> {
        let value = value.into();
        let mut entry = Vec::new();
        write_string(&mut entry, key);
        entry.extend(value.value_type().id().to_le_bytes());
        value.write(&mut entry, 0)?;
        if key == ALIGNMENT_KEY {
            let NewValue::U32(alignment) = value else {
                return Err(refused(format!("{ALIGNMENT_KEY} of type {}", value.value_type())));
            };
            check_alignment(alignment.into()).map_err(refused)?;
            self.alignment = alignment.into();
        }
        if key.is_empty() || !self.keys.insert(key.to_owned()) {
            return Err(refused(format!("key `{key}`: empty or there already")));
        }
        self.entries.extend(entry);
        Ok(self)
    }

    /// Adds a tensor; its shape is outermost first. Data is written in the order of these calls.
    ///
    /// # Errors
    /// What readers refuse: an empty name or one that is there already, other than 1 to 4 dimensions, a dimension
    /// of 0, rows that are no whole blocks, a type of unknown size.
    pub fn tensor(&mut self, name: &str, ggml_type: GgmlType, shape: &[usize]) -> io::Result<&mut Self> {
        if !(1..=4).contains(&shape.len()) || shape.contains(&0) {
            return Err(refused(format!("tensor {name} of shape {shape:?}")));
        }
        let bytes = tensor_bytes(ggml_type, shape).map_err(refused)?;
        let bytes = bytes.ok_or_else(|| refused(format!("tensor {name} of type {ggml_type}")))?;
        if bytes > MAX_BYTES - self.data_bytes(0..self.tensors.len()) {
            return Err(refused(format!("tensor {name} of {bytes} bytes: more than 2^62 in all")));
        }
        if name.is_empty() || self.tensors.len() == MAX_TENSORS || !self.names.insert(name.to_owned()) {
            return Err(refused(format!("tensor `{name}`: empty, there already or too many")));
        }
        self.tensors.push(NewTensor { name: name.to_owned(), ggml_type, shape: shape.to_vec(), bytes });
        Ok(self)
    }

    /// The tensors, in order.
    pub fn tensors(&self) -> &[NewTensor] {
        &self.tensors
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.header().len() as u64 + self.data_bytes(0..self.tensors.len())
    }

    /// The header, padded up to the data.
    pub fn header(&self) -> Vec<u8> {
        self.header_of(0..self.tensors.len(), &[self])
    }

    /// Writes the file to `out`. `data` is called for every tensor in order and writes its
    /// [`bytes`](NewTensor::bytes).
    ///
    /// # Errors
    /// Those of `out` and `data`; data of another size.
    pub fn write_to(
        &self,
        out: &mut dyn Write,
        data: impl FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        self.write_part(0..self.tensors.len(), &[self], out, data)
    }

    /// Writes the file `path`, as [`write_to`](GgufWriter::write_to) does. It is called `PATH.part` until it is
    /// whole; what is left of a failed attempt is removed.
    ///
    /// # Errors
    /// As [`write_to`](GgufWriter::write_to).
    pub fn write_file(
        &self,
        path: &Path,
        data: impl FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        when_whole(path, |file| {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            self.write_to(&mut out, data)?;
            out.flush()
        })
    }

    /// Writes a file of the full size that holds the header and takes no more room on disk than that: the data
    /// reads as zeros.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_sparse(&self, path: &Path) -> io::Result<()> {
        when_whole(path, |file| {
            (&*file).write_all(&self.header())?;
            file.set_len(self.file_bytes())
        })
    }

    /// Writes a set of `count` files `PREFIX-00001-of-0000N.gguf`, ... with tensors in order and about the same
    /// number of bytes in each, and returns their paths. Keys are in the first; `split.*` in each.
    ///
    /// # Errors
    /// As [`write_to`](GgufWriter::write_to); a count of 0 or above 65,535.
    pub fn write_split(
        &self,
        prefix: &Path,
        count: usize,
        mut data: impl FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<Vec<PathBuf>> {
        let name = prefix.file_name().and_then(|name| name.to_str());
        let (Some(name), Ok(files @ 1..)) = (name, u16::try_from(count)) else {
            return Err(refused(format!("{count} files called {}-00001-of-…", prefix.display())));
        };
        let mut paths = Vec::new();
        for (number, part) in (0..files).zip(self.parts(count)) {
            let mut own = GgufWriter::new();
            own.key("split.no", number)?.key("split.count", files)?;
            own.key("split.tensors.count", self.tensors.len() as i32)?;
            if let Some(key) = own.keys.intersection(&self.keys).next() {
                return Err(refused(format!("key `{key}`: there already")));
            }
            if number > 0 && self.keys.contains(ALIGNMENT_KEY) {
                own.key(ALIGNMENT_KEY, self.alignment as u32)?;
            }
            let keys: &[&GgufWriter] = if number == 0 { &[self, &own] } else { &[&own] };
            let path = prefix.with_file_name(shard_name(name, number.into(), count, ".gguf"));
            when_whole(&path, |file| {
                let mut out = BufWriter::with_capacity(1 << 20, file);
                self.write_part(part, keys, &mut out, &mut data)?;
                out.flush()
            })?;
            paths.push(path);
        }
        Ok(paths)
    }

    /// The tensors of each of `count` files: a tensor goes to the file in which the middle of its bytes falls.
    fn parts(&self, count: usize) -> Vec<Range<usize>> {
        let total = u128::from(self.data_bytes(0..self.tensors.len())).max(1);
        let mut before = 0u128;
        let mut ends = vec![0; count];
        for (index, tensor) in self.tensors.iter().enumerate() {
            let middle = before + u128::from(tensor.bytes) / 2;
            before += u128::from(tensor.bytes);
            let file = (middle * count as u128 / total).min(count as u128 - 1) as usize;
            ends[file] = index + 1;
        }
        let mut start = 0;
        let part = |end: usize| {
            let range = start..end.max(start);
            start = range.end;
            range
        };
        ends.into_iter().map(part).collect()
    }

    fn write_part(
        &self,
        part: Range<usize>,
        keys: &[&GgufWriter],
        out: &mut dyn Write,
        mut data: impl FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        out.write_all(&self.header_of(part.clone(), keys))?;
        for tensor in &self.tensors[part] {
            let mut exactly = Exactly { out, left: tensor.bytes };
            data(tensor, &mut exactly)?;
            if exactly.left > 0 {
                return Err(refused(format!("tensor {}: data {} bytes short", tensor.name, exactly.left)));
            }
            let padding = tensor.bytes.next_multiple_of(self.alignment) - tensor.bytes;
            io::copy(&mut io::Read::take(io::repeat(0), padding), out)?;
        }
        Ok(())
    }

    /// The header of a file with some of the tensors and the keys of all of `keys`.
    fn header_of(&self, part: Range<usize>, keys: &[&GgufWriter]) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend(MAGIC);
        header.extend(3u32.to_le_bytes());
        header.extend((part.len() as u64).to_le_bytes());
        header.extend(keys.iter().map(|writer| writer.keys.len() as u64).sum::<u64>().to_le_bytes());
        header.extend(keys.iter().flat_map(|writer| &writer.entries));
        let mut offset = 0u64;
        for tensor in &self.tensors[part] {
            write_string(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for &dim in tensor.shape.iter().rev() {
                header.extend((dim as u64).to_le_bytes());
            }
            header.extend(tensor.ggml_type.0.to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += tensor.bytes.next_multiple_of(self.alignment);
        }
        header.resize(header.len().next_multiple_of(self.alignment as usize), 0);
        header
    }

    fn data_bytes(&self, part: Range<usize>) -> u64 {
        self.tensors[part].iter().map(|tensor| tensor.bytes.next_multiple_of(self.alignment)).sum()
    }
}

/// Passes on as many bytes as a tensor has and refuses more.
struct Exactly<'a> {
    out: &'a mut dyn Write,
    left: u64,
}

impl Write for Exactly<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(refused(format!(
                "{} bytes more than the tensor has",
                bytes.len() as u64 - self.left
            )));
        }
        let written = self.out.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Lets `write` fill a file that gets its name when that succeeds.
fn when_whole(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let file = File::create(&part)?;
    let done = write(&file).and_then(|()| fs::rename(&part, path));
    if done.is_err() {
        fs::remove_file(&part).ok();
    }
    done
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn refused(what: impl Into<Refusal>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.into().0)
}

/// Why something is not written.
struct Refusal(String);

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Refusal(what)
    }
}

impl From<Flaw> for Refusal {
    fn from(flaw: Flaw) -> Self {
        Refusal(flaw.to_string())
    }
}
