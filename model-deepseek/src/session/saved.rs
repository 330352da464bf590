//! Sessions as bytes.
//!
//! All numbers are little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `fathom`, 0, version 2 |
//! | 8 | fingerprint of the model |
//! | 4 | format of the caches, by its place in [`CACHES`] |
//! | 4 | precision, by its place in [`PRECISIONS`] |
//! | 8, 8 | number of tokens `n`; number of logits (0 or the vocabulary) |
//! | 4 × n | the tokens |
//! | 4 × … | the last token's logits, f32 |
//! | … | of each layer, in order, `n` rows of its cache |
//! | 8 | FNV-1a of all before |

use super::{Session, SessionError, reserved};
use crate::{CacheType, Engine, Error, hash::Fnv, model::cache_name};
use backend_api::Precision;

const MAGIC: [u8; 8] = *b"fathom\0\x02";
const HEADER: usize = 40;
const TRAILER: usize = 8;
const CACHES: [CacheType; 3] = [CacheType::F16, CacheType::F32, CacheType::Q8_0];
const PRECISIONS: [Precision; 3] = [Precision::Default, Precision::F32, Precision::Fine];

impl Session {
    /// The session as bytes. Restored by [`Engine::restore`], it goes on as if it had never ended.
    ///
    /// # Errors
    /// [`Error::Load`] if a device does not give its cache; [`SessionError::Memory`].
    pub fn save(&self) -> Result<Vec<u8>, Error> {
        let layers = self.engine.model().config().layers();
        let rows = self.tokens.len() * self.cache_row_bytes();
        let size = HEADER + 4 * (self.tokens.len() + self.last.len()) + layers * rows + TRAILER;
        let mut bytes = reserved("a session to save", size)?;
        bytes.extend(MAGIC);
        bytes.extend(self.engine.model().fingerprint().to_le_bytes());
        bytes.extend(place(&CACHES, self.engine.cache_type()).to_le_bytes());
        bytes.extend(place(&PRECISIONS, self.engine.precision()).to_le_bytes());
        bytes.extend((self.tokens.len() as u64).to_le_bytes());
        bytes.extend((self.last.len() as u64).to_le_bytes());
        bytes.extend(self.tokens.iter().flat_map(|token| token.to_le_bytes()));
        bytes.extend(self.last.iter().flat_map(|logit| logit.to_le_bytes()));
        for layer in 0..layers {
            let start = bytes.len();
            bytes.resize(start + rows, 0);
            self.states.read(&cache_name(layer), 0, &mut bytes[start..])?;
        }
        bytes.extend(checksum(&bytes).to_le_bytes());
        Ok(bytes)
    }
}

impl Engine {
    /// The session that [`Session::save`] made these bytes of, on the same model with the same cache type and
    /// precision; devices, placement and context may be others, as long as the tokens fit.
    ///
    /// # Errors
    /// [`SessionError::Saved`], saying what does not fit; as [`Engine::session`].
    pub fn restore(&self, bytes: &[u8]) -> Result<Session, Error> {
        let expect = |what, expected: String, found: String| match expected == found {
            true => Ok(()),
            false => Err(SessionError::Saved { what, expected, found }),
        };
        let body = match bytes.len().checked_sub(TRAILER) {
            Some(end) if end >= HEADER => &bytes[..end],
            _ => {
                let expected = format!("at least {} bytes", HEADER + TRAILER);
                return Err(
                    SessionError::Saved { what: "size", expected, found: bytes.len().to_string() }.into()
                );
            }
        };
        expect("header", format!("{MAGIC:?}"), format!("{:?}", &bytes[..8]))?;
        let sum = u64_at(bytes, body.len());
        expect("checksum", format!("{:016x}", checksum(body)), format!("{sum:016x}"))?;
        let fingerprint = self.model().fingerprint();
        expect("model", format!("{fingerprint:016x}"), format!("{:016x}", u64_at(bytes, 8)))?;
        let cache = named(&CACHES.map(|cache| cache.to_string()), u32_at(bytes, 16));
        expect("cache type", self.cache_type().to_string(), cache)?;
        let precision = named(&PRECISIONS.map(|precision| format!("{precision:?}")), u32_at(bytes, 20));
        expect("precision", format!("{:?}", self.precision()), precision)?;

        let config = self.model().config();
        let (tokens, logits) = (u64_at(bytes, 24), u64_at(bytes, 32));
        if tokens > self.context() as u64 {
            let expected = format!("at most {}, the context", self.context());
            return Err(SessionError::Saved { what: "tokens", expected, found: tokens.to_string() }.into());
        }
        if logits != 0 && logits != config.vocabulary as u64 {
            let expected = format!("0 or {}, the vocabulary", config.vocabulary);
            return Err(SessionError::Saved { what: "logits", expected, found: logits.to_string() }.into());
        }
        let (tokens, logits) = (tokens as usize, logits as usize);
        let mut session = self.session()?;
        let rows = tokens * session.cache_row_bytes();
        let size = HEADER + 4 * (tokens + logits) + config.layers() * rows;
        expect("size", size.to_string(), body.len().to_string())?;

        let (words, caches) = body[HEADER..].split_at(4 * (tokens + logits));
        let mut words = words.chunks_exact(4).map(|word| u32_at(word, 0));
        session.tokens.extend(words.by_ref().take(tokens));
        session.last.extend(words.map(f32::from_bits));
        if let Some(&token) = session.tokens.iter().find(|token| **token as usize >= config.vocabulary) {
            return Err(SessionError::UnknownToken { token, vocabulary: config.vocabulary }.into());
        }
        if rows > 0 {
            for (layer, rows) in caches.chunks_exact(rows).enumerate() {
                session.states.write(&cache_name(layer), 0, rows)?;
            }
        }
        Ok(session)
    }
}

/// Where a value stands in its table.
fn place<T: PartialEq>(table: &[T], value: T) -> u32 {
    table.iter().position(|known| *known == value).map_or(u32::MAX, |place| place as u32)
}

fn named(names: &[String], place: u32) -> String {
    names.get(place as usize).cloned().unwrap_or_else(|| format!("number {place}"))
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Fnv::default();
    hash.write(bytes);
    hash.finish()
}

/// Callers have checked that the bytes are there; those that are not count as 0.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    (0..4).map(|i| u32::from(bytes.get(at + i).copied().unwrap_or(0)) << (8 * i)).sum()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
