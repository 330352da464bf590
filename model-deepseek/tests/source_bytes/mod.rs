//! GGUF and safetensors files byte by byte, so that they can be as wrong as a test wants.
#![allow(dead_code, reason = "each test uses its part")]

use std::path::PathBuf;

/// `../shared`, or `None` and a word about it.
pub fn shared() -> Option<PathBuf> {
    let shared = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    if shared.is_dir() {
        return Some(shared);
    }
    println!("skipped: ../shared is not there");
    None
}

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// A key with a value of this type id.
pub fn key(name: impl AsRef<[u8]>, type_id: u32, value: &[u8]) -> Vec<u8> {
    [&string(name)[..], &type_id.to_le_bytes(), value].concat()
}

pub fn u32_key(name: &str, value: u32) -> Vec<u8> {
    key(name, 4, &value.to_le_bytes())
}

/// The value of an array: element type, count, elements.
pub fn array(type_id: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&type_id.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

/// A tensor's entry; dims in the file's order (contiguous first).
pub fn tensor(name: impl AsRef<[u8]>, dims: &[u64], type_id: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    let rank = dims.len() as u32;
    let parts: [&[u8]; 5] =
        [&string(name), &rank.to_le_bytes(), &dims_bytes, &type_id.to_le_bytes(), &offset.to_le_bytes()];
    parts.concat()
}

/// A file with counts of its own choice.
pub fn counted(version: u32, tensors: u64, keys: u64, body: &[u8]) -> Vec<u8> {
    [b"GGUF", &version.to_le_bytes()[..], &tensors.to_le_bytes(), &keys.to_le_bytes(), body].concat()
}

/// A file with right counts, padded to 32 and with `data` bytes of data.
pub fn file(keys: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
    let body = [keys.concat(), tensors.concat()].concat();
    let mut bytes = counted(3, tensors.len() as u64, keys.len() as u64, &body);
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

/// One key of every type, arrays and an array of arrays, and three tensors.
pub fn rich() -> Vec<u8> {
    let strings = [string("one"), string("zwei"), string("")].concat();
    let nested = [array(4, 1, &7u32.to_le_bytes()), array(8, 1, &string("in"))].concat();
    let keys = [
        key("general.architecture", 8, &string("deepseek2")),
        key("a.u8", 0, &[200]),
        key("a.i8", 1, &(-5i8).to_le_bytes()),
        key("a.u16", 2, &60_000u16.to_le_bytes()),
        key("a.i16", 3, &(-300i16).to_le_bytes()),
        u32_key("a.u32", 4_000_000_000),
        key("a.i32", 5, &(-70_000i32).to_le_bytes()),
        key("a.f32", 6, &1.5f32.to_le_bytes()),
        key("a.bool", 7, &[1]),
        key("a.strings", 9, &array(8, 3, &strings)),
        key("a.u64", 10, &(1u64 << 60).to_le_bytes()),
        key("a.i64", 11, &(-(1i64 << 60)).to_le_bytes()),
        key("a.f64", 12, &0.1f64.to_le_bytes()),
        key("a.numbers", 9, &array(5, 3, &[1i32, -2, 3].map(i32::to_le_bytes).concat())),
        key("a.floats", 9, &array(6, 2, &[0.5f32, 2.0].map(f32::to_le_bytes).concat())),
        key("a.nested", 9, &array(9, 2, &nested)),
        key("a.empty", 9, &array(8, 0, &[])),
    ];
    let tensors = [
        tensor("token_embd.weight", &[32, 4], 1, 0),
        tensor("blk.0.ffn_gate_exps.weight", &[256, 2, 3], 12, 256),
        tensor("output_norm.weight", &[32], 0, 1120),
    ];
    file(&keys, &tensors, 1120 + 128)
}

/// A safetensors file.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Numbers for tests: splitmix64 from a seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
