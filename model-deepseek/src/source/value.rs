//! The values of a GGUF file's metadata, read where they lie.

use super::{
    Place, SourceError,
    cursor::Cursor,
    error::{Flaw, clipped},
};
use std::{fmt, path::Path};

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

    pub(super) fn to_integer<T: TryFrom<i128>>(self, expected: &'static str) -> Result<T, Flaw> {
        let value = self.integer().and_then(|v| T::try_from(v).ok());
        value.ok_or_else(|| Flaw::new(expected, self.to_string()))
    }

    pub(super) fn to_f32(self) -> Result<f32, Flaw> {
        match self {
            Value::F32(v) => Ok(v),
            Value::F64(v) => Ok(v as f32),
            other => Err(Flaw::new("f32", other.to_string())),
        }
    }

    pub(super) fn to_bool(self) -> Result<bool, Flaw> {
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

pub(super) fn place(key: &str) -> Place {
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
pub(super) fn read_value<'a>(
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
