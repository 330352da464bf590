//! The metadata of a GGUF file: typed values by key.
//!
//! Nothing is copied when a file is opened: an entry is the place of its key in the file, checked once to lie
//! within it. Values are read, and their text checked to be UTF-8, when somebody asks.

use super::{
    Place, SourceError,
    cursor::Cursor,
    error::{Flaw, clipped},
};
use backend_api::HostBytes;
use std::{fmt, path::Path, sync::Arc};

/// Arrays of arrays may be this deep. No known file has any.
pub const MAX_ARRAY_DEPTH: usize = 4;

/// The value types of GGUF (`gguf_metadata_value_type`), with their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the format's own names")]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type with this id.
    pub fn from_id(id: u32) -> Option<ValueType> {
        Self::ALL.get(id as usize).copied()
    }

    /// The id in a file.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name, as in `u32`, `string`.
    pub const fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }

    /// Bytes of a value; `None` for strings and arrays, whose length is in the file.
    pub const fn size(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A value, read from the file. Strings are bytes until somebody wants text.
#[derive(Clone, Copy)]
#[allow(missing_docs, reason = "one variant per ValueType")]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    /// True for any byte but 0 and 1 would hide a broken file, so the byte is kept.
    Bool(u8),
    String(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value<'_> {
    /// The value's type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// An integer of any width, none other.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    fn to_integer<T: TryFrom<i128>>(self, expected: &'static str) -> Result<T, Flaw> {
        let value = self.integer().and_then(|v| T::try_from(v).ok());
        value.ok_or_else(|| Flaw::new(expected, self.to_string()))
    }

    fn to_f32(self) -> Result<f32, Flaw> {
        match self {
            Value::F32(v) => Ok(v),
            Value::F64(v) => Ok(v as f32),
            other => Err(Flaw::new("f32", other.to_string())),
        }
    }

    fn to_bool(self) -> Result<bool, Flaw> {
        match self {
            Value::Bool(0) => Ok(false),
            Value::Bool(1) => Ok(true),
            other => Err(Flaw::new("bool (0 or 1)", other.to_string())),
        }
    }
}

/// For messages: the type, and the value where it is short.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.value_type().name();
        match self {
            Value::F32(v) => write!(f, "{name} {v}"),
            Value::F64(v) => write!(f, "{name} {v}"),
            Value::Bool(v) => write!(f, "{name} {v}"),
            Value::String(v) => write!(f, "{name} \"{}\"", clipped(&String::from_utf8_lossy(v))),
            Value::Array(v) => write!(f, "{name} of {} {}", v.len, v.element_type),
            _ => write!(f, "{name} {}", self.integer().unwrap_or_default()),
        }
    }
}

/// An array in the file, its elements not read yet.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    file: &'a Path,
    key: &'a str,
    element_type: ValueType,
    len: usize,
    /// From the first element on; more may follow after the last one.
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The type of every element.
    pub fn element_type(&self) -> ValueType {
        self.element_type
    }

    /// How many elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, one after the other.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Result<Value<'a>, SourceError>> + use<'a> {
        let Array { file, key, element_type, bytes, .. } = *self;
        let mut cursor = Cursor::new(bytes);
        let mut next = move || {
            let mut after = cursor;
            let value = read_value(&mut cursor, element_type, file, key)?;
            if element_type == ValueType::Array {
                skip_value(&mut after, element_type, 0)?;
                cursor = after;
            }
            Ok(value)
        };
        (0..self.len).map(move |_| next().map_err(|flaw: Flaw| flaw.at(file, place(key))))
    }

    /// The elements as text.
    ///
    /// # Errors
    /// At once if they are no strings; by element where one is not UTF-8, with its index.
    pub fn strings(
        &self,
    ) -> Result<impl ExactSizeIterator<Item = Result<&'a str, SourceError>> + use<'a>, SourceError> {
        let (file, key) = (self.file, self.key);
        Ok(self.byte_strings()?.enumerate().map(move |(index, bytes)| {
            text(bytes?).map_err(|flaw| flaw.at(file, Place::Key(format!("{key}[{index}]"))))
        }))
    }

    /// The elements as the bytes of strings that need not be UTF-8.
    ///
    /// # Errors
    /// At once if they are no strings.
    pub fn byte_strings(
        &self,
    ) -> Result<impl ExactSizeIterator<Item = Result<&'a [u8], SourceError>> + use<'a>, SourceError> {
        self.require(self.element_type == ValueType::String, "array of string")?;
        let (file, key) = (self.file, self.key);
        Ok(self.values().map(move |value| match value? {
            Value::String(bytes) => Ok(bytes),
            other => Err(SourceError::invalid(file, place(key), "string", other.to_string())),
        }))
    }

    /// The elements as u32; every integer type will do whose values fit.
    ///
    /// # Errors
    /// At once if they are no integers; by element where one does not fit.
    pub fn u32s(
        &self,
    ) -> Result<impl ExactSizeIterator<Item = Result<u32, SourceError>> + use<'a>, SourceError> {
        self.integers("array of u32", |value| value.to_integer("u32"))
    }

    /// The elements as i32; every integer type will do whose values fit.
    ///
    /// # Errors
    /// At once if they are no integers; by element where one does not fit.
    pub fn i32s(
        &self,
    ) -> Result<impl ExactSizeIterator<Item = Result<i32, SourceError>> + use<'a>, SourceError> {
        self.integers("array of i32", |value| value.to_integer("i32"))
    }

    /// The elements as f32 (f64 is rounded).
    ///
    /// # Errors
    /// At once if they are no floats.
    pub fn f32s(
        &self,
    ) -> Result<impl ExactSizeIterator<Item = Result<f32, SourceError>> + use<'a>, SourceError> {
        let float = matches!(self.element_type, ValueType::F32 | ValueType::F64);
        self.require(float, "array of f32")?;
        let (file, key) = (self.file, self.key);
        Ok(self.values().map(move |value| value?.to_f32().map_err(|flaw| flaw.at(file, place(key)))))
    }

    fn integers<T: 'a>(
        &self,
        expected: &'static str,
        convert: fn(Value<'a>) -> Result<T, Flaw>,
    ) -> Result<impl ExactSizeIterator<Item = Result<T, SourceError>> + use<'a, T>, SourceError> {
        use ValueType::{Array, Bool, F32, F64, String};
        self.require(!matches!(self.element_type, Array | Bool | F32 | F64 | String), expected)?;
        let (file, key) = (self.file, self.key);
        Ok(self.values().enumerate().map(move |(index, value)| {
            convert(value?).map_err(|flaw| flaw.at(file, Place::Key(format!("{key}[{index}]"))))
        }))
    }

    fn require(&self, holds: bool, expected: &str) -> Result<(), SourceError> {
        if holds {
            return Ok(());
        }
        Err(SourceError::invalid(self.file, place(self.key), expected, Value::Array(*self).to_string()))
    }
}

/// The keys and values of a GGUF file. Cheap to clone.
///
/// The typed getters answer `Ok(None)` where the key is not there and an error where its type is another.
/// Integers may be of any width and signedness as long as the value fits: converters differ in that.
#[derive(Clone)]
pub struct Metadata {
    file: Arc<Path>,
    bytes: HostBytes,
    /// Where each key starts, sorted by key: eight bytes for an entry that takes at least fourteen in the file.
    entries: Arc<[usize]>,
}

impl Metadata {
    /// Sorts and checks the entries found by the parser: each is the offset of a key (its length first) whose
    /// type and value were checked to lie in `bytes`.
    pub(super) fn new(
        file: &Arc<Path>,
        bytes: &HostBytes,
        mut entries: Vec<usize>,
    ) -> Result<Metadata, SourceError> {
        let all = (**bytes).as_ref();
        entries.sort_unstable_by_key(|&at| key_at(all, at));
        for pair in entries.windows(2) {
            let key = key_at(all, pair[0]);
            if key == key_at(all, pair[1]) {
                let found = format!("it twice, at bytes {} and {}", pair[0], pair[1]);
                return Err(SourceError::invalid(file, place(key), "each key once", found));
            }
        }
        Ok(Metadata { file: file.clone(), bytes: bytes.clone(), entries: entries.into() })
    }

    /// The file that holds it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// How many keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|&at| key_at(self.all(), at))
    }

    /// The value of `key`, whatever its type.
    pub fn value(&self, key: &str) -> Option<Value<'_>> {
        let at = self.find(key)?;
        let mut cursor = Cursor::at(self.all(), at);
        // The parser has read this once, so none of it fails.
        let key = cursor.string().and_then(|bytes| text(bytes)).ok()?;
        let value_type = ValueType::from_id(cursor.u32().ok()?)?;
        read_value(&mut cursor, value_type, &self.file, key).ok()
    }

    /// An unsigned number.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type, or a value that does not fit.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>, SourceError> {
        self.get(key, |value| value.to_integer("u32"))
    }

    /// An unsigned number, up to 64 bits.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type, or a negative value.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>, SourceError> {
        self.get(key, |value| value.to_integer("u64"))
    }

    /// A signed number.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type, or a value that does not fit.
    pub fn get_i32(&self, key: &str) -> Result<Option<i32>, SourceError> {
        self.get(key, |value| value.to_integer("i32"))
    }

    /// A float; an f64 is rounded.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, SourceError> {
        self.get(key, Value::to_f32)
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type, or a byte that is neither 0 nor 1.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, SourceError> {
        self.get(key, Value::to_bool)
    }

    /// Text.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type, or text that is not UTF-8.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, SourceError> {
        self.get(key, |value| match value {
            Value::String(bytes) => text(bytes),
            other => Err(Flaw::new("string", other.to_string())),
        })
    }

    /// An array of any element type.
    ///
    /// # Errors
    /// [`SourceError::Invalid`] for another type.
    pub fn get_array(&self, key: &str) -> Result<Option<Array<'_>>, SourceError> {
        self.get(key, |value| match value {
            Value::Array(array) => Ok(array),
            other => Err(Flaw::new("array", other.to_string())),
        })
    }

    /// The value, or the error for a key that has to be there: `m.required(key, "u32", m.get_u32(key)?)?`.
    ///
    /// # Errors
    /// [`SourceError::Missing`] for `None`.
    pub fn required<T>(&self, key: &str, expected: &str, value: Option<T>) -> Result<T, SourceError> {
        value.ok_or_else(|| SourceError::missing(&self.file, place(key), expected))
    }

    /// An error about the value of `key`, for rules that only a caller knows.
    pub fn invalid(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> SourceError {
        SourceError::invalid(&self.file, place(key), expected, found)
    }

    /// The bytes of an entry: key, type and value, as they are in the file.
    pub(super) fn raw_entry(&self, key: &str) -> Option<&[u8]> {
        let start = self.find(key)?;
        let mut cursor = Cursor::at(self.all(), start);
        cursor.string().ok()?;
        let value_type = ValueType::from_id(cursor.u32().ok()?)?;
        skip_value(&mut cursor, value_type, 0).ok()?;
        self.all().get(start..cursor.position())
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        convert: impl FnOnce(Value<'a>) -> Result<T, Flaw>,
    ) -> Result<Option<T>, SourceError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).map_err(|flaw| flaw.at(&self.file, place(key)))
    }

    fn find(&self, key: &str) -> Option<usize> {
        let all = self.all();
        let index = self.entries.binary_search_by(|&at| key_at(all, at).cmp(key)).ok()?;
        Some(self.entries[index])
    }

    fn all(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |key| self.value(key).map(|value| value.to_string());
        f.debug_map().entries(self.keys().map(|key| (key, shown(key)))).finish()
    }
}

/// The key whose length is at `at`. The parser has checked that it is there and UTF-8.
fn key_at(all: &[u8], at: usize) -> &str {
    Cursor::at(all, at).string().ok().and_then(|bytes| str::from_utf8(bytes).ok()).unwrap_or_default()
}

fn place(key: &str) -> Place {
    Place::Key(key.to_owned())
}

/// UTF-8, or where it stops to be.
pub(super) fn text(bytes: &[u8]) -> Result<&str, Flaw> {
    str::from_utf8(bytes).map_err(|e| {
        let shown = clipped(&String::from_utf8_lossy(bytes));
        Flaw::new("UTF-8", format!("\"{shown}\", broken at its byte {}", e.valid_up_to()))
    })
}

/// Checks that a value lies in the file and moves past it.
pub(super) fn skip_value(cursor: &mut Cursor<'_>, value_type: ValueType, depth: usize) -> Result<(), Flaw> {
    match value_type {
        ValueType::String => cursor.string().map(drop),
        ValueType::Array => {
            if depth == MAX_ARRAY_DEPTH {
                return Err(Flaw::new(format!("arrays at most {MAX_ARRAY_DEPTH} deep"), "deeper ones"));
            }
            let (element_type, len) = array_header(cursor)?;
            match element_type.size() {
                // `array_header` has checked the product.
                Some(size) => cursor.take(len * size, "elements").map(drop),
                None => (0..len).try_for_each(|_| skip_value(cursor, element_type, depth + 1)),
            }
        }
        plain => cursor.take(plain.size().unwrap_or_default(), plain.name()).map(drop),
    }
}

/// The element type and count of an array, the count checked against the bytes that are left.
fn array_header(cursor: &mut Cursor<'_>) -> Result<(ValueType, usize), Flaw> {
    let id = cursor.u32()?;
    let Some(element_type) = ValueType::from_id(id) else {
        return Err(Flaw::new("an array with elements of type 0 to 12", format!("type {id}")));
    };
    // A string is at least its length, an array its type and count.
    let least = element_type.size().unwrap_or(if element_type == ValueType::String { 8 } else { 12 });
    let len = cursor.count(least, element_type.name())?;
    Ok((element_type, len))
}

/// Reads a value; of an array only its header: then the cursor ends at the first element.
fn read_value<'a>(
    cursor: &mut Cursor<'a>,
    value_type: ValueType,
    file: &'a Path,
    key: &'a str,
) -> Result<Value<'a>, Flaw> {
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array()?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array()?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array()?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array()?)),
        ValueType::U32 => Value::U32(cursor.u32()?),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array()?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array()?)),
        ValueType::Bool => Value::Bool(u8::from_le_bytes(cursor.array()?)),
        ValueType::String => Value::String(cursor.string()?),
        ValueType::U64 => Value::U64(cursor.u64()?),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array()?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array()?)),
        ValueType::Array => {
            let (element_type, len) = array_header(cursor)?;
            Value::Array(Array { file, key, element_type, len, bytes: cursor.rest() })
        }
    })
}
