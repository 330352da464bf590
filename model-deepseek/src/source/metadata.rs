//! The metadata of a GGUF file: typed values by key.
//!
//! Nothing is copied when a file is opened: an entry is the place of its key in the file, checked once to lie
//! within it. Values are read, and their text checked to be UTF-8, when somebody asks.

use super::{
    SourceError,
    cursor::Cursor,
    error::Flaw,
    value::{Array, Value, ValueType, place, read_value, text},
};
use backend_api::HostBytes;
use std::{fmt, path::Path, sync::Arc};

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
