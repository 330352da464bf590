//! Formats against the golden files that `testdata/make_formats.py` makes with the `gguf` Python package.

use backend_api::{DType, GgmlType, format};
use std::{fs, path::PathBuf};

fn golden(file: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../testdata/formats").join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn decoding_gives_the_bits_of_the_gguf_package() {
    for dtype in DType::WEIGHTS {
        let blocks = golden(&format!("{dtype}.blocks"));
        let values: Vec<u32> =
            golden(&format!("{dtype}.values")).as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        assert!(values.len() > 500, "{dtype}: only {} values", values.len());

        let mut decoded = vec![f32::NAN; values.len()];
        format::decode(dtype, &blocks, &mut decoded);
        for (i, (found, expected)) in decoded.iter().zip(&values).enumerate() {
            let expected = f32::from_bits(*expected);
            assert_eq!(found.to_bits(), expected.to_bits(), "{dtype}, value {i}: {found:e} for {expected:e}");
        }
    }
}

#[test]
fn types_are_those_of_the_gguf_package() {
    let table = String::from_utf8(golden("types.tsv")).expect("UTF-8");
    let mut sized: Vec<u32> = Vec::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |i: usize| fields[i].parse::<usize>().expect("a number");
        let id = GgmlType(number(0) as u32);
        let expected = (Some(fields[1]), Some(number(2)), Some(number(3)));
        assert_eq!((id.name(), id.block_len(), id.block_bytes()), expected, "{line}");
        sized.push(id.0);
    }
    // And no id has a size that the package does not know.
    let known: Vec<u32> = (0..1000).filter(|id| GgmlType(*id).block_len().is_some()).collect();
    assert_eq!(known, sized);
}

/// Every weight format, cut anywhere: the first `n` values do not depend on `n`.
#[test]
fn a_shorter_row_is_a_prefix() {
    for dtype in DType::WEIGHTS {
        let blocks = golden(&format!("{dtype}.blocks"));
        let mut whole = vec![0.0; blocks.len() / dtype.block_bytes() * dtype.block_len()];
        format::decode(dtype, &blocks, &mut whole);
        for n in [0, 1, 31, 32, 33, 255, 256, 257, 500] {
            let mut part = vec![0.0; n];
            format::decode(dtype, &blocks[..dtype.row_bytes(n)], &mut part);
            assert_eq!(part, whole[..n], "{dtype}, {n} values");
        }
    }
}
