//! The GGUF writer: what it writes is read back, by our reader and by another one.

mod source_bytes;

use backend_api::{DType, GgmlType};
use gguf_rs_lib::{format::metadata::MetadataValue, reader::GGUFFileReader};
use model_deepseek::source::{
    Checkpoint, Keys,
    gguf::{Metadata, Value, ValueType},
    gguf_writer::{GgufWriter, NewTensor, NewValue},
};
use proptest::{collection, prelude::*};
use source_bytes::*;
use std::{
    io::{self, Cursor, Write},
    path::Path,
    sync::Arc,
};

fn metadata(checkpoint: &Checkpoint) -> &Metadata {
    match checkpoint.keys() {
        Keys::Gguf(metadata) => metadata,
        Keys::HuggingFace(_) => panic!("a GGUF file"),
    }
}

/// Bytes that differ by tensor and place.
fn fill(tensor: &NewTensor, out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&content(&tensor.name, tensor.bytes))
}

fn content(name: &str, bytes: u64) -> Vec<u8> {
    let seed = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    let mut random = Random(seed);
    (0..bytes).map(|_| random.next() as u8).collect()
}

fn check_content(file: &Checkpoint) {
    for tensor in file.tensors() {
        let weight = file.load(&tensor.name).unwrap();
        assert!(weight.as_slice() == content(&tensor.name, tensor.bytes), "{}", tensor.name);
    }
}

fn is(ours: Value<'_>, new: &NewValue) -> bool {
    match (ours, new) {
        (Value::U8(a), NewValue::U8(b)) => a == *b,
        (Value::I8(a), NewValue::I8(b)) => a == *b,
        (Value::U16(a), NewValue::U16(b)) => a == *b,
        (Value::I16(a), NewValue::I16(b)) => a == *b,
        (Value::U32(a), NewValue::U32(b)) => a == *b,
        (Value::I32(a), NewValue::I32(b)) => a == *b,
        (Value::U64(a), NewValue::U64(b)) => a == *b,
        (Value::I64(a), NewValue::I64(b)) => a == *b,
        (Value::F32(a), NewValue::F32(b)) => a.to_bits() == b.to_bits(),
        (Value::F64(a), NewValue::F64(b)) => a.to_bits() == b.to_bits(),
        (Value::Bool(a), NewValue::Bool(b)) => a == u8::from(*b),
        (Value::String(a), NewValue::String(b)) => a == b.as_bytes(),
        (Value::Array(a), NewValue::Array(element_type, b)) => {
            a.element_type() == *element_type
                && a.len() == b.len()
                && a.values().zip(b).all(|(a, b)| is(a.unwrap(), b))
        }
        _ => false,
    }
}

/// The other reader's value as one of ours to write.
fn theirs(value: &MetadataValue) -> NewValue {
    match value {
        MetadataValue::U8(v) => NewValue::U8(*v),
        MetadataValue::I8(v) => NewValue::I8(*v),
        MetadataValue::U16(v) => NewValue::U16(*v),
        MetadataValue::I16(v) => NewValue::I16(*v),
        MetadataValue::U32(v) => NewValue::U32(*v),
        MetadataValue::I32(v) => NewValue::I32(*v),
        MetadataValue::U64(v) => NewValue::U64(*v),
        MetadataValue::I64(v) => NewValue::I64(*v),
        MetadataValue::F32(v) => NewValue::F32(*v),
        MetadataValue::F64(v) => NewValue::F64(*v),
        MetadataValue::Bool(v) => NewValue::Bool(*v),
        MetadataValue::String(v) => NewValue::String(v.clone()),
        MetadataValue::Array(array) => {
            let element_type = ValueType::from_id(array.element_type as u32).unwrap();
            NewValue::Array(element_type, array.values.iter().map(theirs).collect())
        }
    }
}

/// Our reader and gguf-rs-lib see the same keys, values, tensors and data.
fn check_against_the_other_reader(bytes: Vec<u8>) {
    let ours = Checkpoint::from_bytes(Path::new("oracle.gguf"), Arc::new(bytes.clone())).unwrap();
    let mut other = GGUFFileReader::new(Cursor::new(bytes)).unwrap();
    let keys = metadata(&ours);
    assert_eq!(keys.len(), other.metadata().len());
    for (key, value) in other.metadata().iter() {
        assert!(is(keys.value(key).unwrap(), &theirs(value)), "{key}");
    }
    assert_eq!(ours.tensors().len(), other.tensor_count());
    for tensor in ours.tensors() {
        let info = other.get_tensor_info(&tensor.name).unwrap();
        let shape: Vec<usize> = info.shape().dims().iter().rev().map(|&dim| dim as usize).collect();
        assert_eq!(tensor.shape, shape, "{}", tensor.name);
        assert_eq!(tensor.runs().unwrap().ggml_type().0, info.tensor_type() as u32, "{}", tensor.name);
        let data = other.load_tensor_data(&tensor.name).unwrap().unwrap();
        assert!(ours.load(&tensor.name).unwrap().as_slice() == data.as_slice(), "{}", tensor.name);
    }
}

fn leaf(value_type: ValueType) -> BoxedStrategy<NewValue> {
    match value_type {
        ValueType::U8 => any::<u8>().prop_map(NewValue::from).boxed(),
        ValueType::I8 => any::<i8>().prop_map(NewValue::from).boxed(),
        ValueType::U16 => any::<u16>().prop_map(NewValue::from).boxed(),
        ValueType::I16 => any::<i16>().prop_map(NewValue::from).boxed(),
        ValueType::U32 => any::<u32>().prop_map(NewValue::from).boxed(),
        ValueType::I32 => any::<i32>().prop_map(NewValue::from).boxed(),
        ValueType::F32 => any::<f32>().prop_map(NewValue::from).boxed(),
        ValueType::Bool => any::<bool>().prop_map(NewValue::from).boxed(),
        ValueType::U64 => any::<u64>().prop_map(NewValue::from).boxed(),
        ValueType::I64 => any::<i64>().prop_map(NewValue::from).boxed(),
        ValueType::F64 => any::<f64>().prop_map(NewValue::from).boxed(),
        ValueType::String | ValueType::Array => ".{0,20}".prop_map(NewValue::from).boxed(),
    }
}

fn array(of: impl Fn() -> BoxedStrategy<NewValue> + Clone) -> BoxedStrategy<NewValue> {
    let elements = collection::vec(of(), 0..6);
    let wrap = |elements: Vec<NewValue>| {
        NewValue::Array(elements.first().map_or(ValueType::U32, NewValue::value_type), elements)
    };
    elements.prop_map(wrap).boxed()
}

fn value() -> impl Strategy<Value = NewValue> {
    let types = (0u32..13).prop_map(|id| ValueType::from_id(id).unwrap());
    types.prop_flat_map(|value_type| {
        let of = move || leaf(value_type);
        prop_oneof![leaf(value_type), array(of), array(move || array(of))]
    })
}

/// Any type that has a layout, and a shape with whole rows.
fn tensor() -> impl Strategy<Value = (GgmlType, Vec<usize>)> {
    let types = (0..DType::WEIGHTS.len()).prop_map(|index| DType::WEIGHTS[index]);
    (types, collection::vec(1usize..4, 1..5)).prop_map(|(dtype, mut shape)| {
        *shape.last_mut().unwrap() *= dtype.block_len();
        (dtype.ggml_type(), shape)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Keys the other reader accepts too, so that one test serves both.
    #[test]
    fn what_is_written_is_read(
        keys in collection::btree_map("[a-z]{1,6}\\.[a-z]{1,4}_[a-z]{1,4}", value(), 0..8),
        tensors in collection::btree_map("[a-z]{1,4}\\.[0-9]{1,2}\\.[a-z]{1,8}", tensor(), 0..6),
        alignment in prop_oneof![Just(None), (3u32..9).prop_map(|log| Some(1u32 << log))],
    ) {
        let mut writer = GgufWriter::new();
        if let Some(alignment) = alignment {
            writer.key("general.alignment", alignment).unwrap();
        }
        for (key, value) in &keys {
            writer.key(key, value.clone()).unwrap();
        }
        for (name, (ggml_type, shape)) in &tensors {
            writer.tensor(name, *ggml_type, shape).unwrap();
        }
        let mut bytes = Vec::new();
        writer.write_to(&mut bytes, fill).unwrap();
        prop_assert_eq!(bytes.len() as u64, writer.file_bytes());

        let file = Checkpoint::from_bytes(Path::new("written.gguf"), Arc::new(bytes.clone())).unwrap();
        prop_assert_eq!(metadata(&file).len(), keys.len() + usize::from(alignment.is_some()));
        for (key, value) in &keys {
            prop_assert!(is(metadata(&file).value(key).unwrap(), value), "{}", key);
        }
        for (name, (ggml_type, shape)) in &tensors {
            let found = file.tensor(name).unwrap();
            prop_assert_eq!((found.runs().unwrap().ggml_type(), &found.shape), (*ggml_type, shape));
        }
        check_content(&file);
        check_against_the_other_reader(bytes);
    }
}

#[test]
fn shared_models_look_the_same_to_the_other_reader() {
    let Some(shared) = shared() else { return };
    for name in
        ["austen-q4_k_m", "austen-iq4_xs", "austen-q5_1", "shapes/v2lite-like-f16", "shapes/v3-like-f16"]
    {
        check_against_the_other_reader(std::fs::read(shared.join(format!("models/{name}.gguf"))).unwrap());
    }
}

#[test]
fn bad_requests_are_refused() {
    let f32 = DType::F32.ggml_type();
    let mut writer = GgufWriter::new();
    writer.key("a", 1u32).unwrap().tensor("t", f32, &[4]).unwrap();
    assert!(writer.key("a", 2u32).is_err());
    assert!(writer.key("", 2u32).is_err());
    for alignment in [0u32, 4, 33, 1 << 31] {
        assert!(writer.key("general.alignment", alignment).is_err(), "{alignment}");
    }
    assert!(writer.key("general.alignment", "32").is_err());
    assert!(writer.key("mixed", NewValue::Array(ValueType::U32, vec![1u32.into(), 1i32.into()])).is_err());
    let deep = (0..5).fold(NewValue::from(1u8), |inner, _| NewValue::Array(inner.value_type(), vec![inner]));
    assert!(writer.key("deep", deep).is_err());
    for (name, ggml_type, shape) in [
        ("t", f32, &[4][..]),
        ("", f32, &[4]),
        ("none", f32, &[]),
        ("five", f32, &[1; 5]),
        ("zero", f32, &[4, 0]),
        ("block", DType::Q4_K.ggml_type(), &[255]),
        ("unknown", GgmlType(9999), &[4]),
        ("huge", f32, &[1 << 61]),
        ("wraps", f32, &[1 << 40, 1 << 40]),
    ] {
        assert!(writer.tensor(name, ggml_type, shape).is_err(), "{name}");
    }
    // What was refused has left nothing behind.
    let file = Checkpoint::from_bytes(Path::new("w.gguf"), Arc::new([writer.header(), vec![0; 32]].concat()));
    let file = file.unwrap();
    assert_eq!((metadata(&file).len(), file.tensors().len()), (1, 1));
}

#[test]
fn a_file_has_its_name_only_when_it_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut writer = GgufWriter::new();
    writer.tensor("a", DType::F32.ggml_type(), &[4]).unwrap();
    for wrong in [15usize, 17] {
        let result = writer.write_file(&path, |_, out| {
            assert!(!path.exists());
            out.write_all(&vec![0; wrong])
        });
        assert!(result.is_err(), "{wrong} bytes of 16");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
    writer.write_file(&path, fill).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    check_content(&Checkpoint::open(&path).unwrap());
}

/// The header of a model of 367 GB costs no disk, and opening it is a matter of its header.
#[test]
fn sparse_files_have_the_full_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.gguf");
    let mut writer = GgufWriter::new();
    writer.key("general.architecture", "deepseek2").unwrap();
    let tokens: Vec<String> = (0..129_280).map(|i| format!("token{i}")).collect();
    writer.key("tokenizer.ggml.tokens", tokens).unwrap();
    for layer in 0..58 {
        for name in ["gate", "up", "down"] {
            let name = format!("blk.{layer}.ffn_{name}_exps.weight");
            writer.tensor(&name, DType::Q4_K.ggml_type(), &[256, 2048, 7168]).unwrap();
        }
    }
    writer.write_sparse(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), writer.file_bytes());
    assert!(writer.file_bytes() > 340 << 30);
    let started = std::time::Instant::now();
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(file.tensors().len(), 174);
    assert_eq!(metadata(&file).get_array("tokenizer.ggml.tokens").unwrap().unwrap().len(), 129_280);
    assert!(started.elapsed().as_secs() < 2, "{:?}", started.elapsed());
    assert!(file.load("blk.57.ffn_down_exps.weight").unwrap().as_slice()[1 << 30..][..64] == [0; 64]);
}

fn split_model(folder: &Path, alignment: Option<u32>) -> (GgufWriter, Vec<std::path::PathBuf>) {
    let mut writer = GgufWriter::new();
    writer.key("general.architecture", "deepseek2").unwrap();
    if let Some(alignment) = alignment {
        writer.key("general.alignment", alignment).unwrap();
    }
    for index in 0..9 {
        writer.tensor(&format!("t{index}"), DType::F16.ggml_type(), &[index + 1, 24]).unwrap();
    }
    let files = writer.write_split(&folder.join("model"), 3, fill).unwrap();
    (writer, files)
}

#[test]
fn split_files_are_one_model_by_any_of_them() {
    for alignment in [None, Some(64)] {
        let folder = tempfile::tempdir().unwrap();
        let (writer, files) = split_model(folder.path(), alignment);
        let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(
            files.iter().map(|path| name(path)).collect::<Vec<_>>(),
            ["model-00001-of-00003.gguf", "model-00002-of-00003.gguf", "model-00003-of-00003.gguf",]
        );
        // By each file, and by the directory.
        for path in files.iter().map(|path| path.as_path()).chain([folder.path()]) {
            let model = Checkpoint::open(path).unwrap();
            assert_eq!(metadata(&model).get_str("general.architecture").unwrap(), Some("deepseek2"));
            let names: Vec<_> = model.tensors().map(|tensor| tensor.name.clone()).collect();
            assert_eq!(names, writer.tensors().iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>());
            let used: std::collections::BTreeSet<_> = model.tensors().map(|tensor| &tensor.file).collect();
            assert_eq!(used.len(), 3);
            check_content(&model);
        }
    }
}

#[test]
fn more_files_than_tensors_and_one_file_are_sets_too() {
    for (tensors, count) in [(1, 3), (0, 2), (3, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = GgufWriter::new();
        for index in 0..tensors {
            writer.tensor(&format!("t{index}"), DType::F32.ggml_type(), &[3]).unwrap();
        }
        writer.write_split(&folder.path().join("m"), count, fill).unwrap();
        let model = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(model.tensors().len(), tensors);
        check_content(&model);
    }
    assert!(GgufWriter::new().write_split(Path::new("m"), 0, fill).is_err());
}

#[test]
fn bad_sets_are_errors_that_say_where() {
    let write = |path: &Path, keys: &[(&str, u32)], tensor: &str| {
        let mut writer = GgufWriter::new();
        for (key, value) in keys {
            writer.key(key, *value).unwrap();
        }
        writer.tensor(tensor, DType::F32.ggml_type(), &[4]).unwrap();
        writer.write_file(path, fill).unwrap();
    };
    type Spoil<'a> = &'a dyn Fn(&Path);
    let second = |folder: &Path| folder.join("model-00002-of-00003.gguf");
    let cases: [(&str, Spoil<'_>, &[&str]); 8] = [
        (
            "missing",
            &|folder| std::fs::remove_file(second(folder)).unwrap(),
            &["file `model-00002-of-00003.gguf`"],
        ),
        (
            "wrong number",
            &|folder| write(&second(folder), &[("split.no", 2), ("split.count", 3)], "x"),
            &["model-00002", "key `split.no`", "expected 1", "found 2"],
        ),
        (
            "wrong count",
            &|folder| write(&second(folder), &[("split.no", 1), ("split.count", 4)], "x"),
            &["model-00002", "key `split.count`", "expected 3", "found 4"],
        ),
        (
            "no number",
            &|folder| write(&second(folder), &[("split.count", 3)], "x"),
            &["model-00002", "key `split.no`", "missing"],
        ),
        (
            "tensor twice",
            &|folder| write(&second(folder), &[("split.no", 1), ("split.count", 3)], "t0"),
            &["tensor", "model-0000"],
        ),
        (
            "tensor count",
            &|folder| write(&second(folder), &[("split.no", 1), ("split.count", 3)], "x"),
            &["key `split.tensors.count`", "found 9"],
        ),
        ("empty shard", &|folder| std::fs::write(second(folder), []).unwrap(), &["model-00002", "empty"]),
        (
            "a directory instead",
            &|folder| {
                std::fs::remove_file(second(folder)).unwrap();
                std::fs::create_dir(second(folder)).unwrap();
            },
            &["model-00002"],
        ),
    ];
    for (what, spoil, fragments) in cases {
        let folder = tempfile::tempdir().unwrap();
        let (_, files) = split_model(folder.path(), None);
        spoil(folder.path());
        let text = Checkpoint::open(&files[0]).expect_err(what).to_string();
        for fragment in fragments {
            assert!(text.contains(fragment), "{what}: `{fragment}` is not in `{text}`");
        }
    }
    // Renamed files: the name and the keys have to agree.
    let folder = tempfile::tempdir().unwrap();
    let (_, files) = split_model(folder.path(), None);
    for (name, fragment) in
        [("other.gguf", "MODEL-00001-of-00003.gguf"), ("m-00001-of-00004.gguf", "expected 4")]
    {
        let renamed = folder.path().join(name);
        std::fs::copy(&files[0], &renamed).unwrap();
        let text = Checkpoint::open(&renamed).unwrap_err().to_string();
        assert!(text.contains(fragment) && text.contains("split.count"), "{text}");
    }
    let alone = folder.path().join("alone-00001-of-00002.gguf");
    write(&alone, &[], "x");
    let text = Checkpoint::open(&alone).unwrap_err().to_string();
    assert!(text.contains("split.count") && text.contains("missing"), "{text}");
}
