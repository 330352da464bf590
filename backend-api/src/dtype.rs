//! Storage formats: names, GGUF ids, block layouts.

use std::fmt;

/// A format that Fathom computes with. Names are those of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs, reason = "the field's names; layouts are documented in `format`")]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    /// Token ids, row and expert indices; never a weight.
    I32,
}

impl DType {
    /// All formats a weight may have.
    pub const WEIGHTS: [DType; 15] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::IQ4_NL,
        DType::IQ4_XS,
    ];

    /// Values in a block; 1 for plain formats.
    pub const fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 | DType::IQ4_NL => 32,
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K | DType::IQ4_XS => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 | DType::IQ4_NL => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2_K => 84,
            DType::Q3_K => 110,
            DType::Q4_K => 144,
            DType::Q5_K => 176,
            DType::Q6_K => 210,
            DType::IQ4_XS => 136,
        }
    }

    /// Bytes of a row of `n` values; the last block may be in part padding. `usize::MAX` if they are more.
    pub const fn row_bytes(self, n: usize) -> usize {
        n.div_ceil(self.block_len()).saturating_mul(self.block_bytes())
    }

    /// Whether values are stored in blocks with shared scales.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// GGUF's name, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q5_0 => "Q5_0",
            DType::Q5_1 => "Q5_1",
            DType::Q8_0 => "Q8_0",
            DType::Q2_K => "Q2_K",
            DType::Q3_K => "Q3_K",
            DType::Q4_K => "Q4_K",
            DType::Q5_K => "Q5_K",
            DType::Q6_K => "Q6_K",
            DType::IQ4_NL => "IQ4_NL",
            DType::IQ4_XS => "IQ4_XS",
            DType::I32 => "I32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor type id of a GGUF file (`ggml_type`), known by name and size also where Fathom does not compute
/// with it.
///
/// ```
/// use backend_api::{DType, GgmlType};
///
/// assert_eq!(GgmlType(12).dtype(), Some(DType::Q4_K));
/// assert_eq!(GgmlType(17).to_string(), "IQ2_XS");
/// assert_eq!(GgmlType(17).dtype(), None);
/// assert_eq!(GgmlType(999).to_string(), "unknown(999)");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GgmlType(pub u32);

/// What is known of one type id.
struct TypeRow {
    id: u32,
    name: &'static str,
    /// `None` for ids that GGUF once used and no longer does; their layouts are not described anywhere stable.
    block: Option<(usize, usize)>,
}

const fn row(id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> TypeRow {
    TypeRow { id, name, block: Some((block_len, block_bytes)) }
}

const fn removed(id: u32, name: &'static str) -> TypeRow {
    TypeRow { id, name, block: None }
}

/// All type ids, in order. `testdata/make_formats.py` writes the table that a test compares this one with.
const TYPES: [TypeRow; 42] = [
    row(0, "F32", 1, 4),
    row(1, "F16", 1, 2),
    row(2, "Q4_0", 32, 18),
    row(3, "Q4_1", 32, 20),
    removed(4, "Q4_2"),
    removed(5, "Q4_3"),
    row(6, "Q5_0", 32, 22),
    row(7, "Q5_1", 32, 24),
    row(8, "Q8_0", 32, 34),
    row(9, "Q8_1", 32, 40),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    row(12, "Q4_K", 256, 144),
    row(13, "Q5_K", 256, 176),
    row(14, "Q6_K", 256, 210),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    row(30, "BF16", 1, 2),
    removed(31, "Q4_0_4_4"),
    removed(32, "Q4_0_4_8"),
    removed(33, "Q4_0_8_8"),
    row(34, "TQ1_0", 256, 54),
    row(35, "TQ2_0", 256, 66),
    removed(36, "IQ4_NL_4_4"),
    removed(37, "IQ4_NL_4_8"),
    removed(38, "IQ4_NL_8_8"),
    row(39, "MXFP4", 32, 17),
    row(40, "NVFP4", 64, 36),
    row(41, "Q1_0", 128, 18),
];

impl GgmlType {
    fn row(self) -> Option<&'static TypeRow> {
        TYPES.get(usize::try_from(self.0).ok()?)
    }

    /// GGUF's name; `None` for an id that is not known.
    pub fn name(self) -> Option<&'static str> {
        Some(self.row()?.name)
    }

    /// Values in a block; `None` for an id that is not known or no longer used.
    pub fn block_len(self) -> Option<usize> {
        Some(self.row()?.block?.0)
    }

    /// Bytes of a block; `None` as for [`GgmlType::block_len`].
    pub fn block_bytes(self) -> Option<usize> {
        Some(self.row()?.block?.1)
    }

    /// The format, if Fathom computes with it.
    pub fn dtype(self) -> Option<DType> {
        let name = self.name()?;
        DType::WEIGHTS.into_iter().chain([DType::I32]).find(|dtype| dtype.name() == name)
    }
}

impl DType {
    /// GGUF's id of this format.
    pub fn ggml_type(self) -> GgmlType {
        let found = TYPES.iter().find(|row| row.name == self.name());
        GgmlType(found.expect("every format is a GGUF type").id)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "unknown({})", self.0),
        }
    }
}

impl fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_indices() {
        assert!(TYPES.iter().enumerate().all(|(index, row)| row.id == index as u32));
    }

    #[test]
    fn formats_and_ids_agree() {
        for dtype in DType::WEIGHTS.into_iter().chain([DType::I32]) {
            let id = dtype.ggml_type();
            assert_eq!(id.dtype(), Some(dtype));
            assert_eq!(id.to_string(), dtype.to_string());
            assert_eq!(id.block_len(), Some(dtype.block_len()), "{dtype}");
            assert_eq!(id.block_bytes(), Some(dtype.block_bytes()), "{dtype}");
        }
    }

    #[test]
    fn unknown_and_removed_types_have_no_size() {
        for (id, name) in
            [(4, "Q4_2"), (38, "IQ4_NL_8_8"), (42, "unknown(42)"), (u32::MAX, "unknown(4294967295)")]
        {
            let id = GgmlType(id);
            assert_eq!(format!("{id} {id:?}"), format!("{name} {name}"));
            assert_eq!((id.block_len(), id.block_bytes(), id.dtype()), (None, None, None));
        }
    }
}
