//! GGUF files: good ones are read as they are, bad ones are errors that say what and where.

mod source_bytes;

use backend_api::{DType, GgmlType};
use model_deepseek::source::{
    Checkpoint, Keys, SourceError,
    gguf::{Metadata, ValueType},
};
use source_bytes::*;
use std::{path::Path, sync::Arc};

const NAME: &str = "dir/bad.gguf";

fn open(bytes: &[u8]) -> Result<Checkpoint, SourceError> {
    Checkpoint::from_bytes(Path::new(NAME), Arc::new(bytes.to_vec()))
}

fn metadata(checkpoint: &Checkpoint) -> &Metadata {
    match checkpoint.keys() {
        Keys::Gguf(metadata) => metadata,
        Keys::HuggingFace(_) => panic!("a GGUF file"),
    }
}

/// The error's text, which has to name the file and all of `fragments`.
fn check_error<T>(result: Result<T, SourceError>, what: &str, fragments: &[&str]) {
    let Err(error) = result else { panic!("{what}: no error") };
    let text = error.to_string();
    for fragment in [NAME].iter().chain(fragments) {
        assert!(text.contains(fragment), "{what}: `{fragment}` is not in `{text}`");
    }
    assert!(text.len() < 1000, "{what}: {text}");
}

#[test]
fn every_type_is_read() {
    let file = open(&rich()).unwrap();
    let keys = metadata(&file);
    assert_eq!(keys.len(), 17);
    assert_eq!(keys.get_str("general.architecture").unwrap(), Some("deepseek2"));
    for (key, value) in [
        ("a.u8", 200),
        ("a.i8", -5),
        ("a.u16", 60_000),
        ("a.i16", -300),
        ("a.u32", 4_000_000_000),
        ("a.i32", -70_000),
        ("a.u64", 1 << 60),
        ("a.i64", -(1i64 << 60)),
    ] {
        assert_eq!(keys.get_u64(key).ok().flatten(), u64::try_from(value).ok(), "{key}");
        assert_eq!(keys.get_u32(key).ok().flatten(), u32::try_from(value).ok(), "{key}");
    }
    assert_eq!(keys.get_f32("a.f32").unwrap(), Some(1.5));
    assert_eq!(keys.get_f32("a.f64").unwrap(), Some(0.1));
    assert_eq!(keys.get_bool("a.bool").unwrap(), Some(true));
    let array = |key| keys.get_array(key).unwrap().unwrap();
    let strings: Vec<_> = array("a.strings").strings().unwrap().map(Result::unwrap).collect();
    assert_eq!(strings, ["one", "zwei", ""]);
    assert_eq!(array("a.numbers").i32s().unwrap().map(Result::unwrap).collect::<Vec<_>>(), [1, -2, 3]);
    let floats: Vec<_> = array("a.floats").values().map(|value| value.unwrap().to_string()).collect();
    assert_eq!(floats, ["f32 0.5", "f32 2"]);
    assert!(array("a.empty").is_empty());
    assert_eq!(array("a.nested").element_type(), ValueType::Array);
    let inner: Vec<_> = array("a.nested").values().map(|value| value.unwrap().to_string()).collect();
    assert_eq!(inner, ["array of 1 u32", "array of 1 string"]);
    assert_eq!(keys.get_u32("a.missing").unwrap(), None);

    let names: Vec<_> = file.tensors().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["token_embd.weight", "blk.0.ffn_gate_exps.weight", "output_norm.weight"]);
    let experts = file.tensor("blk.0.ffn_gate_exps.weight").unwrap();
    assert_eq!(
        (experts.runs().unwrap(), &experts.shape[..], experts.bytes),
        (DType::Q4_K, &[3, 2, 256][..], 864)
    );
    assert_eq!(file.load("output_norm.weight").unwrap().as_slice().len(), 128);
    assert!(file.tensor("output.weight").is_none());
    check_error(file.load("output.weight"), "missing tensor", &["tensor `output.weight`", "missing"]);
}

#[test]
fn version_2_is_read() {
    let mut bytes = rich();
    bytes[4] = 2;
    assert_eq!(open(&bytes).unwrap().tensors().len(), 3);
}

#[test]
fn wrong_types_name_key_and_types() {
    let file = open(&file(
        &[
            key("text", 8, &string("many")),
            key("broken", 8, &string([b'a', 0xff])),
            key("negative", 5, &(-1i32).to_le_bytes()),
            key("wide", 10, &(1u64 << 32).to_le_bytes()),
            key("float", 6, &1f32.to_le_bytes()),
            key("odd.bool", 7, &[7]),
            key("array", 9, &array(8, 2, &[string("ok"), string([0xc3])].concat())),
            key("bools", 9, &array(7, 1, &[1])),
        ],
        &[],
        0,
    ))
    .unwrap();
    let keys = metadata(&file);
    check_error(keys.get_u32("text"), "text", &["key `text`", "expected u32", "found string \"many\""]);
    check_error(keys.get_str("broken"), "bad UTF-8", &["key `broken`", "expected UTF-8", "byte 1"]);
    check_error(keys.get_u32("negative"), "negative", &["key `negative`", "expected u32", "found i32 -1"]);
    check_error(keys.get_u64("negative"), "negative", &["key `negative`", "expected u64"]);
    check_error(keys.get_u32("wide"), "wide", &["key `wide`", "expected u32", "found u64 4294967296"]);
    check_error(keys.get_u32("float"), "float", &["key `float`", "expected u32", "found f32 1"]);
    check_error(keys.get_f32("wide"), "wide", &["key `wide`", "expected f32", "found u64"]);
    check_error(keys.get_bool("odd.bool"), "bool", &["key `odd.bool`", "expected bool", "found bool 7"]);
    check_error(keys.get_bool("float"), "bool", &["key `float`", "expected bool", "found f32"]);
    check_error(keys.get_array("text"), "array", &["key `text`", "expected array", "found string"]);
    check_error(
        keys.get_str("array"),
        "array",
        &["key `array`", "expected string", "found array of 2 string"],
    );
    let array = keys.get_array("array").unwrap().unwrap();
    check_error(array.u32s().map(drop), "array", &["key `array`", "expected array of u32"]);
    let mut strings = array.strings().unwrap();
    assert_eq!(strings.next().unwrap().unwrap(), "ok");
    check_error(strings.next().unwrap(), "bad UTF-8 in an array", &["key `array[1]`", "expected UTF-8"]);
    assert_eq!(array.byte_strings().unwrap().nth(1).unwrap().unwrap(), [0xc3]);
    let bools = keys.get_array("bools").unwrap().unwrap();
    check_error(bools.strings().map(drop), "bools", &["key `bools`", "array of string", "array of 1 bool"]);
    check_error(bools.u32s().map(drop), "bools", &["key `bools`", "array of u32", "array of 1 bool"]);
    let required = keys.required("gone", "u32", keys.get_u32("gone").unwrap());
    check_error(required, "missing key", &["key `gone`", "missing", "u32"]);
}

#[test]
fn bad_files_are_errors_that_say_where() {
    let huge = 1u64 << 63;
    let one = |entry: Vec<u8>| counted(3, 0, 1, &entry);
    let t = |dims: &[u64], type_id, offset| file(&[], &[tensor("the.tensor", dims, type_id, offset)], 4096);
    let aligned = |value: u32| file(&[u32_key("general.alignment", value)], &[], 0);
    let deep = |depth: usize| {
        let outer = array(9, 1, &[]).repeat(depth);
        let value = [outer, array(4, 0, &[])].concat();
        one(key("deep", 9, &value))
    };
    let two = |a: Vec<u8>, b: Vec<u8>| file(&[], &[a, b], 4096);
    let long = "x".repeat(300_000);
    let mut cut_off = t(&[64], 0, 0);
    cut_off.truncate(cut_off.len() - 4096 + 255);
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["header", "bytes"]),
        ("another file", b"PK\x03\x04 and so on".to_vec(), &["GGUF", "PK\\x03\\x04"]),
        ("big-endian magic", b"FUGG0000".to_vec(), &["big-endian"]),
        ("big-endian version", [&b"GGUF\0\0\0\x03"[..], &[0; 64]].concat(), &["big-endian", "version 3"]),
        ("version 0", counted(0, 0, 0, &[]), &["version 2 or 3", "version 0"]),
        ("version 1", counted(1, 0, 0, &[]), &["version 2 or 3", "version 1"]),
        ("version 4", counted(4, 0, 0, &[]), &["version 2 or 3", "version 4"]),
        ("2^63 keys", counted(3, 0, huge, &[0; 64]), &["header", "keys", "9223372036854775808"]),
        ("all keys", counted(3, 0, u64::MAX, &[0; 64]), &["header", "keys"]),
        ("2^63 tensors", counted(3, huge, 0, &[0; 64]), &["header", "tensors", "9223372036854775808"]),
        ("a key more than there is", counted(3, 0, 2, &u32_key("only.key", 1)), &["keys", "found 2"]),
        ("a tensor more than there is", counted(3, 1, 0, &[0; 16]), &["tensors", "found 1"]),
        ("key of 2^63 bytes", one([&huge.to_le_bytes()[..], &[b'k'; 32]].concat()), &["key `#0", "string"]),
        (
            "key of 1 GiB",
            one([&(1u64 << 30).to_le_bytes()[..], &[b'k'; 32]].concat()),
            &["key `#0", "1073741824"],
        ),
        (
            "second key of all bytes",
            counted(3, 0, 2, &[u32_key("first", 1), vec![0xff; 8], vec![0; 16]].concat()),
            &["key `#1, after `first`"],
        ),
        ("empty key", one([u32_key("", 1), vec![0; 8]].concat()), &["key `#0", "not empty"]),
        ("key of bad UTF-8", one(key([b'k', 0xfe, 0xff], 4, &[0; 4])), &["key `#0", "UTF-8"]),
        (
            "duplicate key",
            file(&[u32_key("twice", 1), u32_key("b", 1), u32_key("twice", 1)], &[], 0),
            &["key `twice`", "twice, at bytes"],
        ),
        ("value type 13", one(key("odd.type", 13, &[0; 16])), &["key `odd.type`", "0 to 12", "type 13"]),
        ("value type 2^32-1", one(key("odd.type", u32::MAX, &[0; 16])), &["key `odd.type`", "4294967295"]),
        ("string of 2^63", one(key("long", 8, &huge.to_le_bytes())), &["key `long`", "9223372036854775808"]),
        ("array of 2^63 u8", one(key("wide", 9, &array(0, huge, &[]))), &["key `wide`", "u8"]),
        ("array of 2^61 u64 wraps", one(key("wide", 9, &array(10, 1 << 61, &[]))), &["key `wide`", "u64"]),
        (
            "array of 2^61+1 u64",
            one(key("wide", 9, &array(10, (1 << 61) + 1, &[0; 8]))),
            &["key `wide`", "u64"],
        ),
        ("array of 2^63 strings", one(key("wide", 9, &array(8, huge, &[0; 80]))), &["key `wide`", "string"]),
        ("array of 2^63 arrays", one(key("wide", 9, &array(9, huge, &[0; 80]))), &["key `wide`", "array"]),
        (
            "array one element short",
            one(key("short", 9, &array(4, 3, &[0; 11]))),
            &["key `short`", "found 3"],
        ),
        ("array of type 13", one(key("odd", 9, &array(13, 0, &[]))), &["key `odd`", "0 to 12", "type 13"]),
        (
            "strings with a huge one",
            one(key("s", 9, &array(8, 2, &[string("a"), vec![0xff; 8]].concat()))),
            &["key `s`", "string"],
        ),
        ("arrays 5 deep", deep(4), &["key `deep`", "at most 4 deep"]),
        ("arrays 200,000 deep", deep(200_000), &["key `deep`", "at most 4 deep"]),
        ("alignment 0", aligned(0), &["key `general.alignment`", "multiple of 8", "found 0"]),
        ("alignment 4", aligned(4), &["key `general.alignment`", "multiple of 8", "found 4"]),
        ("alignment 33", aligned(33), &["key `general.alignment`", "found 33"]),
        ("alignment 2^31", aligned(1 << 31), &["key `general.alignment`", "1048576", "found 2147483648"]),
        ("alignment 2^32-8", aligned(u32::MAX - 7), &["key `general.alignment`", "1048576"]),
        (
            "alignment as text",
            file(&[key("general.alignment", 8, &string("32"))], &[], 0),
            &["key `general.alignment`", "string \"32\""],
        ),
        ("no dimensions", t(&[], 0, 0), &["tensor `the.tensor`", "1 to 4 dimensions", "found 0"]),
        ("5 dimensions", t(&[1; 5], 0, 0), &["tensor `the.tensor`", "1 to 4 dimensions", "found 5"]),
        (
            "2^32-1 dimensions",
            counted(3, 1, 0, &[&string("the.tensor")[..], &[0xff; 40]].concat()),
            &["tensor `the.tensor`", "4294967295"],
        ),
        ("dimension 0", t(&[32, 0], 0, 0), &["tensor `the.tensor`", "at least 1", "found 0"]),
        ("dimensions wrap to 0", t(&[1 << 32, 1 << 32], 0, 0), &["tensor `the.tensor`", "2^63"]),
        ("dimensions wrap to 32", t(&[32, (1 << 59) + 1], 0, 0), &["tensor `the.tensor`", "2^63"]),
        ("bytes wrap", t(&[1 << 62], 0, 0), &["tensor `the.tensor`", "2^63"]),
        ("dimension 2^64-1", t(&[u64::MAX], 0, 0), &["tensor `the.tensor`"]),
        ("larger than the file", t(&[1025], 0, 0), &["tensor `the.tensor`", "4100 bytes", "within"]),
        ("cut off", cut_off, &["tensor `the.tensor`", "256 bytes", "within"]),
        ("offset past the end", t(&[8], 0, 4096), &["tensor `the.tensor`", "offset 4096"]),
        ("offset + size wraps", t(&[32], 0, u64::MAX - 31), &["tensor `the.tensor`", "within"]),
        ("offset 2^63", t(&[32], 0, huge), &["tensor `the.tensor`", "within"]),
        ("odd offset", t(&[8], 0, 8), &["tensor `the.tensor`", "multiple of 32", "found 8"]),
        ("part of a block", t(&[255, 2], 12, 0), &["tensor `the.tensor`", "blocks of 256", "[2, 255]"]),
        ("unknown type past the end", t(&[8], 9999, 1 << 40), &["tensor `the.tensor`", "within"]),
        ("type 39 larger than the file", t(&[32, 1000], 39, 0), &["tensor `the.tensor`", "17000 bytes"]),
        (
            "overlap by one block",
            two(tensor("first", &[9], 0, 0), tensor("second", &[8], 0, 32)),
            &["tensor `second`", "within `first`"],
        ),
        (
            "the same bytes",
            two(tensor("first", &[8], 0, 64), tensor("second", &[8], 0, 64)),
            &["tensor `", "within `"],
        ),
        (
            "one inside another, out of order",
            two(tensor("small", &[8], 0, 512), tensor("large", &[1024], 0, 0)),
            &["tensor `small`", "within `large`"],
        ),
        (
            "duplicate tensor",
            two(tensor("same", &[8], 0, 0), tensor("same", &[8], 0, 32)),
            &["tensor `same`", "one tensor of that name"],
        ),
        (
            "empty tensor name",
            t(&[8], 0, 0).replace(b"\x0a\0\0\0\0\0\0\0the.tensor", &[0; 8]),
            &["tensor `#0"],
        ),
        ("tensor name of bad UTF-8", file(&[], &[tensor([0x80], &[8], 0, 0)], 64), &["tensor `#0", "UTF-8"]),
        ("long key", one(key(&long, 99, &[0; 4])), &["key `xxx", "type 99"]),
        ("long tensor name", file(&[], &[tensor(&long, &[0], 0, 0)], 64), &["tensor `xxx", "found 0"]),
    ];
    for (what, bytes, fragments) in cases {
        check_error(open(&bytes), what, fragments);
    }
}

trait Replace {
    fn replace(self, from: &[u8], to: &[u8]) -> Self;
}

impl Replace for Vec<u8> {
    fn replace(mut self, from: &[u8], to: &[u8]) -> Self {
        let at = self.windows(from.len()).position(|window| window == from).expect("to be there");
        self.splice(at..at + from.len(), to.iter().copied());
        self
    }
}

#[test]
fn odd_but_valid_files_are_read() {
    let long = "n".repeat(70_000);
    let cases: Vec<(&str, Vec<u8>, usize)> = vec![
        ("nothing in it", counted(3, 0, 0, &[]), 0),
        ("odd keys", file(&["Upper.Case", "a-b c", "größe", "\u{1}"].map(|k| u32_key(k, 1)), &[], 0), 0),
        ("long names", file(&[u32_key(&long, 1)], &[tensor(&long, &[8], 0, 0)], 64), 1),
        ("alignment 48", file(&[u32_key("general.alignment", 48)], &[tensor("a", &[12], 0, 48)], 4096), 1),
        (
            "alignment 8 as u64",
            file(&[key("general.alignment", 10, &8u64.to_le_bytes())], &[tensor("a", &[2], 0, 8)], 64),
            1,
        ),
        (
            "arrays 4 deep",
            {
                let mut value = array(4, 1, &[0; 4]);
                for _ in 0..3 {
                    value = array(9, 1, &value);
                }
                file(&[key("deep", 9, &value)], &[], 0)
            },
            0,
        ),
        (
            "tensors out of order, a gap",
            file(&[], &[tensor("b", &[8], 0, 1024), tensor("a", &[8], 0, 0)], 2048),
            2,
        ),
        ("last tensor without padding", file(&[], &[tensor("a", &[1], 0, 0)], 4), 1),
    ];
    for (what, bytes, tensors) in cases {
        let file = open(&bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(file.tensors().len(), tensors, "{what}");
        for tensor in file.tensors() {
            file.load(&tensor.name).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
}

/// Types that do not run (39, 40) or are unknown (9999) are an error of the tensor, when it is used.
#[test]
fn tensors_of_other_types_are_refused_when_used() {
    for (id, name, bytes) in
        [(39, "MXFP4", 34), (40, "NVFP4", 36), (17, "IQ2_XS", 0), (9999, "unknown(9999)", 0)]
    {
        let values = if id == 17 { 256 } else { 64 };
        let file = file(&[], &[tensor("odd", &[values], id, 0), tensor("good", &[8], 0, 1024)], 2048);
        let file = open(&file).unwrap();
        assert!(file.load("good").is_ok());
        let odd = file.tensor("odd").unwrap();
        assert_eq!(odd.dtype.clone().unwrap_err().to_string(), GgmlType(id).to_string());
        if bytes > 0 {
            assert_eq!(odd.bytes, bytes, "{name}");
        }
        check_error(file.load("odd"), name, &["tensor `odd`", name, "F16", "Q4_K", "IQ4_XS"]);
    }
}

/// A file cut anywhere before its last byte of data is an error that names the file.
#[test]
fn truncated_files_are_errors() {
    let bytes = rich();
    assert!(open(&bytes).is_ok());
    for len in 0..bytes.len() {
        check_error(open(&bytes[..len]), &format!("{len} bytes"), &[]);
    }
}

/// The start of a file.
struct Start {
    bytes: Arc<Vec<u8>>,
    len: usize,
}

impl AsRef<[u8]> for Start {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[test]
fn all_models_of_the_shared_folder_are_read() {
    let Some(shared) = shared() else { return };
    let mut files = Vec::new();
    for folder in ["models", "models/shapes", "models/tokenizers"] {
        for entry in std::fs::read_dir(shared.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            files.extend(path.extension().is_some_and(|ext| ext == "gguf").then_some(path));
        }
    }
    assert!(files.len() >= 8);
    for path in files {
        let file = Checkpoint::open(&path).unwrap();
        let keys = metadata(&file);
        assert!(keys.keys().all(|key| keys.value(key).is_some()));
        for tensor in file.tensors() {
            let weight = file.load(&tensor.name).unwrap();
            assert_eq!(weight.as_slice().len() as u64, tensor.bytes, "{}", tensor.name);
        }
        // Truncated at 200 places: the header or a tensor is cut, never read past the end.
        let bytes = Arc::new(std::fs::read(&path).unwrap());
        for place in 0..if file.tensors().len() > 0 { 200 } else { 0 } {
            let start = Start { bytes: bytes.clone(), len: bytes.len() * place / 200 };
            check_error(Checkpoint::from_bytes(Path::new(NAME), Arc::new(start)), "truncated", &[]);
        }
    }
}
