//! Reading little-endian values from bytes, each read checked.

use super::error::Flaw;

/// A position in a slice that never passes its end.
#[derive(Clone, Copy)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor::at(bytes, 0)
    }

    /// Past the end is as good as at the end.
    pub(super) fn at(bytes: &'a [u8], position: usize) -> Self {
        Cursor { bytes, position: position.min(bytes.len()) }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.position..]
    }

    /// The next `n` bytes.
    pub(super) fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], Flaw> {
        let rest = self.rest();
        let Some(taken) = rest.get(..n) else {
            let expected = format!("{n} bytes of {what} at byte {}", self.position);
            return Err(Flaw::new(expected, format!("{} bytes to the end of the file", rest.len())));
        };
        self.position += n;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Flaw> {
        let mut value = [0; N];
        value.copy_from_slice(self.take(N, "a number")?);
        Ok(value)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Flaw> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Flaw> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least` bytes each, checked against what is left: so it may size
    /// memory, and times `least` cannot overflow.
    pub(super) fn count(&mut self, least: usize, what: &str) -> Result<usize, Flaw> {
        let count = self.u64()?;
        let most = self.rest().len() / least;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(Flaw::new(
                format!("at most {most} × {what} in the {} bytes that are left", self.rest().len()),
                count.to_string(),
            )),
        }
    }

    /// A string: its length in bytes, then the bytes.
    pub(super) fn string(&mut self) -> Result<&'a [u8], Flaw> {
        let len = self.count(1, "bytes of a string")?;
        self.take(len, "a string")
    }
}
