//! Reading `.npy` files: the one kind that reference logits are stored in, little-endian f32 in two dimensions.
//!
//! Format: NumPy enhancement proposal 1 (NEP 1), versions 1.0 to 3.0.

use std::{
    fs, io,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// A matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub columns: usize,
    /// Row after row.
    pub values: Vec<f32>,
}

impl Matrix {
    /// Row `index`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.columns..(index + 1) * self.columns]
    }
}

/// Why a file is no such matrix.
#[derive(Debug, Error)]
pub enum NpyError {
    /// It could not be read.
    #[error("{}: cannot be read", .0.display())]
    Io(PathBuf, #[source] io::Error),
    /// It is something else.
    #[error("{}: expected {expected}, found {found}", .file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// What a matrix of f32 has there.
        expected: String,
        /// What the file has.
        found: String,
    },
}

/// Reads a `.npy` file of dtype `<f4`, C order and two dimensions.
///
/// # Errors
/// [`NpyError`]: whatever else the file holds.
pub fn read(file: &Path) -> Result<Matrix, NpyError> {
    let bytes = fs::read(file).map_err(|error| NpyError::Io(file.to_owned(), error))?;
    parse(&bytes).map_err(|(expected, found)| NpyError::Invalid { file: file.to_owned(), expected, found })
}

type Mismatch = (String, String);

fn parse(bytes: &[u8]) -> Result<Matrix, Mismatch> {
    let mismatch = |expected: &str, found: String| (expected.to_owned(), found);
    let truncated = || mismatch("a whole .npy header", format!("{} bytes", bytes.len()));
    let Some(rest) = bytes.strip_prefix(b"\x93NUMPY") else {
        return Err(mismatch("a .npy file (\\x93NUMPY at the start)", "other bytes".to_owned()));
    };
    let (header_len, body) = match rest {
        [1, _, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        [version, ..] if *version > 3 => {
            return Err(mismatch(".npy version 1 to 3", format!("version {version}")));
        }
        _ => return Err(truncated()),
    };
    let header = body.get(..header_len).ok_or_else(truncated)?;
    let data = &body[header_len..];
    let header = String::from_utf8_lossy(header);
    let dtype = entry(&header, "descr").unwrap_or("nothing");
    if dtype.trim_matches(['\'', '"']) != "<f4" {
        return Err(mismatch("dtype '<f4'", dtype.to_owned()));
    }
    let order = entry(&header, "fortran_order").unwrap_or("nothing");
    if order != "False" {
        return Err(mismatch("fortran_order False", order.to_owned()));
    }
    let shape = entry(&header, "shape").unwrap_or("nothing");
    let extents: Option<Vec<usize>> = shape
        .trim_matches(['(', ')'])
        .split(',')
        .map(str::trim)
        .filter(|extent| !extent.is_empty())
        .map(|extent| extent.parse().ok())
        .collect();
    let Some([rows, columns]) = extents.as_deref() else {
        return Err(mismatch("a shape of two dimensions", shape.to_owned()));
    };
    let (rows, columns) = (*rows, *columns);
    let size = rows.checked_mul(columns).and_then(|n| n.checked_mul(4));
    if size != Some(data.len()) {
        return Err(mismatch(
            &format!("[{rows}, {columns}] values of 4 bytes"),
            format!("{} bytes", data.len()),
        ));
    }
    let value = |four: &[u8]| f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    Ok(Matrix { rows, columns, values: data.chunks_exact(4).map(value).collect() })
}

/// The value of a key in the header, a Python dictionary such as
/// `{'descr': '<f4', 'fortran_order': False, 'shape': (48, 2048), }`.
fn entry<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let (_, after) = header.split_once(&format!("'{key}'"))?;
    let value = after.trim_start().strip_prefix(':')?.trim_start();
    let end = if value.starts_with('(') { value.find(')')? + 1 } else { value.find([',', '}'])? };
    Some(value[..end].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        let len = header.len() as u32;
        bytes.extend(if version == 1 {
            (len as u16).to_le_bytes().to_vec()
        } else {
            len.to_le_bytes().to_vec()
        });
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    const HEADER: &str = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }          \n";

    #[test]
    fn a_matrix_of_any_version_is_read() {
        let values = [1.0f32, 2.0, 3.0, -4.0, 0.5, f32::INFINITY];
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for version in 1..=3 {
            let matrix = parse(&npy(version, HEADER, &data)).unwrap();
            assert_eq!((matrix.rows, matrix.columns), (2, 3));
            assert_eq!(matrix.row(1), &values[3..]);
        }
    }

    #[test]
    fn anything_else_is_an_error_that_says_what_was_found() {
        let data = [0; 24];
        let cases: [(Vec<u8>, &str); 8] = [
            (b"GGUF".to_vec(), "other bytes"),
            (b"\x93NUMPY\x01\x00".to_vec(), "8 bytes"),
            (npy(1, HEADER, &data)[..30].to_vec(), "30 bytes"),
            (npy(9, HEADER, &data), "version 9"),
            (npy(1, &HEADER.replace("<f4", "<f8"), &data), "<f8"),
            (npy(1, &HEADER.replace("False", "True"), &data), "True"),
            (npy(1, &HEADER.replace("(2, 3)", "(6,)"), &data), "(6,)"),
            (npy(1, &HEADER.replace("(2, 3)", "(18446744073709551615, 3)"), &data), "24 bytes"),
        ];
        for (bytes, expected) in cases {
            let (_, found) = parse(&bytes).unwrap_err();
            assert!(found.contains(expected), "expected {expected}, found {found}");
        }
    }
}
