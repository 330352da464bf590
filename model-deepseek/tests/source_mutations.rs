//! Damaged files by the hundred thousand: no panic, and memory in proportion to the file.
//!
//! This binary counts the allocations of all threads. *Opening* a file of n bytes never takes more than 2 n + 128 MiB
//! (contract C11), checked here with much less beside the 2 n, as the files are small. *Loading* a weight takes the bytes
//! that it is given in: of FP8, which becomes F32, four times those in the file.

mod counting;
mod source_bytes;

use counting::Measuring;
use model_deepseek::source::{
    Checkpoint,
    hostile::{open_gguf_bytes, open_safetensors_bytes, read_index_bytes},
};
use source_bytes::*;

const MIB: usize = 1 << 20;

fn check(alone: &Measuring, bytes: &[u8], open: impl FnOnce(&[u8]) -> bool, allowance: usize) -> bool {
    let (good, peak) = alone.peak(|| open(bytes));
    assert!(peak <= 2 * bytes.len() + allowance, "{peak} bytes for a file of {}", bytes.len());
    good
}

/// One to four changes: bits, bytes, numbers that are often wrong, pieces moved, cut or doubled.
fn damage(random: &mut Random, bytes: &mut Vec<u8>, header: usize) {
    const NUMBERS: [u64; 12] =
        [0, 1, 2, 7, 8, 39, 9999, 1 << 31, u32::MAX as u64, 1 << 61, 1 << 63, u64::MAX];
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.below(header.min(bytes.len()));
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at] = bytes[at].wrapping_add(random.below(3) as u8).wrapping_sub(1),
            3 => {
                let number = NUMBERS[random.below(NUMBERS.len())].wrapping_add(random.below(2) as u64);
                let end = bytes.len().min(at + if random.below(2) == 0 { 4 } else { 8 });
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            4 => bytes.truncate(at),
            5 => {
                let end = (at + random.below(40)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => {
                let end = (at + random.below(40)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                let to = random.below(header.min(bytes.len()));
                bytes.splice(to..to, piece);
            }
            _ => {
                let end = (at + random.below(16)).min(bytes.len());
                bytes[at..end].iter_mut().for_each(|byte| *byte = random.next() as u8);
            }
        }
    }
}

/// Runs `open` on `count` damaged copies and says how many were still good.
fn damaged(count: usize, whole: &[u8], header: usize, open: impl Fn(&[u8]) -> bool) -> usize {
    let alone = Measuring::alone();
    assert!(open(whole));
    let mut random = Random(20_261_124);
    let mut bytes = Vec::new();
    let mut good = 0;
    for _ in 0..count {
        bytes.clear();
        bytes.extend_from_slice(whole);
        damage(&mut random, &mut bytes, header);
        good += usize::from(check(&alone, &bytes, &open, MIB));
    }
    // Neither does every change break the file, nor is nothing ever noticed.
    assert!(good > count / 1000 && good < count * 9 / 10, "{good} of {count}");
    good
}

#[test]
fn damaged_gguf_files() {
    let whole = rich();
    let header = whole.len() - 1248;
    damaged(120_000, &whole, header, |bytes| open_gguf_bytes(bytes).is_ok());
}

fn weights() -> (Vec<u8>, usize) {
    let header = r#"{"__metadata__":{"format":"pt"},
        "model.norm.weight":{"dtype":"BF16","shape":[8],"data_offsets":[0,16]},
        "model.layers.0.self_attn.o_proj.weight":{"dtype":"F8_E4M3","shape":[2,130],"data_offsets":[16,276]},
        "model.layers.0.self_attn.o_proj.weight_scale_inv":{"dtype":"F32","shape":[1,2],"data_offsets":[276,284]},
        "model.layers.1.mlp.experts.0.up_proj.weight":{"dtype":"F16","shape":[2,2],"data_offsets":[284,292]},
        "model.layers.1.mlp.experts.1.up_proj.weight":{"dtype":"F16","shape":[2,2],"data_offsets":[292,300]}}"#;
    (safetensors(header, &[0; 300]), header.len() + 8)
}

#[test]
fn damaged_safetensors_files() {
    let (whole, header) = weights();
    damaged(60_000, &whole, header, |bytes| open_safetensors_bytes(bytes).is_ok());
}

#[test]
fn damaged_indices() {
    let whole = br#"{"metadata":{"total_size":24},"weight_map":{"lm_head.weight":"model-00001-of-00002.safetensors",
        "model.norm.weight":"model-00002-of-00002.safetensors","model.embed_tokens.weight":"m.safetensors"}}"#;
    damaged(60_000, whole, whole.len(), |bytes| read_index_bytes(bytes).is_ok());
}

/// Files of many small things: the most memory for a byte of file that each kind of entry can cost.
#[test]
fn memory_is_in_proportion_to_the_file() {
    let alone = Measuring::alone();
    let key = |i: u32| u32_key(&format!("{i:x}"), 0);
    let keys: Vec<Vec<u8>> = (0..600_000).map(key).collect();
    let tensors: Vec<Vec<u8>> = (0..131_072u64).map(|i| tensor(format!("{i:x}"), &[1], 0, i * 32)).collect();
    let strings = array(8, 1 << 20, &[0; 8 << 20]);
    let arrays: Vec<u8> = array(4, 0, &[]).repeat(1 << 18);
    let cases = [
        ("keys", file(&keys, &[], 0), true),
        ("tensors", file(&[], &tensors, 131_072 * 32), true),
        ("too many tensors", file(&[], &[&tensors[..], &tensors[..1]].concat(), 0), false),
        ("empty strings", file(&[source_bytes::key("s", 9, &strings)], &[], 0), true),
        ("empty arrays", file(&[source_bytes::key("a", 9, &array(9, 1 << 18, &arrays))], &[], 0), true),
    ];
    for (what, bytes, good) in cases {
        // The bytes themselves are held once more by `open_gguf_bytes`, as a map would.
        let opened = check(&alone, &bytes, |bytes| open_gguf_bytes(bytes).is_ok(), 128 * MIB);
        assert_eq!(opened, good, "{what}");
    }

    let entry = |i: usize| format!(r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let entries: Vec<String> = (0..131_072).map(entry).collect();
    let dims = format!(r#"{{"a":{{"dtype":"U8","shape":[0{}]}}}}"#, ",0".repeat(8 << 20));
    let notes: Vec<String> = (0..1_000_000).map(|i| format!(r#""{i:x}":"""#)).collect();
    for header in [
        format!("{{{}}}", entries.join(",")),
        dims,
        format!(r#"{{"__metadata__":{{{}}}}}"#, notes.join(",")),
        format!(r#"{{"a":{{"x":[0{}]}}}}"#, ",0".repeat(8 << 20)),
        " ".repeat(40 << 20),
    ] {
        let bytes = safetensors(&header, &[]);
        check(&alone, &bytes, |bytes| open_safetensors_bytes(bytes).is_ok(), 128 * MIB);
    }

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    let mut size = 0;
    for shard in 0..2 {
        let entry = |i: usize| format!(r#""{shard}{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        let entries: Vec<String> = (0..100_000).map(entry).collect();
        let bytes = safetensors(&format!("{{{}}}", entries.join(",")), &[]);
        size += bytes.len();
        std::fs::write(folder.path().join(format!("model{shard}.safetensors")), bytes).unwrap();
    }
    let (model, peak) = alone.peak(|| Checkpoint::open(folder.path()));
    assert_eq!(model.unwrap().tensors().len(), 200_000);
    // One time the files' size is what the maps may hold.
    assert!(peak <= size + 128 * MIB, "{peak} bytes for files of {size}");

    let entries: Vec<String> = (0..1_000_000).map(|i| format!(r#""{i:x}":"m.safetensors""#)).collect();
    let files: Vec<String> = (0..1_000_000).map(|i| format!(r#""{i:x}":"{i:x}.safetensors""#)).collect();
    for entries in [entries, files] {
        let index = format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(","));
        check(&alone, index.as_bytes(), |bytes| read_index_bytes(bytes).is_ok(), 128 * MIB);
    }
    let config = format!("[0{}]", ",0".repeat((1 << 19) - 2));
    check(&alone, config.as_bytes(), |bytes| read_index_bytes(bytes).is_ok(), 128 * MIB);
}

/// A directory of `experts` FP8 matrices of 1 MiB each, and its bytes.
fn fp8_experts(experts: usize) -> (tempfile::TempDir, usize) {
    let (codes, scales) = (1 << 20, 4 * 64);
    let entry = |expert: usize| {
        let name = format!("model.layers.1.mlp.experts.{expert}.up_proj.weight");
        let start = expert * (codes + scales);
        let (middle, end) = (start + codes, start + codes + scales);
        format!(
            r#""{name}":{{"dtype":"F8_E4M3","shape":[1024,1024],"data_offsets":[{start},{middle}]}},
            "{name}_scale_inv":{{"dtype":"F32","shape":[8,8],"data_offsets":[{middle},{end}]}}"#
        )
    };
    let header = format!("{{{}}}", (0..experts).map(entry).collect::<Vec<_>>().join(","));
    let file = safetensors(&header, &vec![0; experts * (codes + scales)]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    std::fs::write(folder.path().join("model.safetensors"), &file).unwrap();
    (folder, file.len())
}

#[test]
fn loading_takes_what_it_gives() {
    let alone = Measuring::alone();
    let (folder, size) = fp8_experts(16);
    let (model, peak) = alone.peak(|| Checkpoint::open(folder.path()).unwrap().with_threads(4));
    assert!(peak < MIB, "{peak} bytes to open a file of {size}");
    let name = "blk.1.ffn_up_exps.weight";
    let (weight, peak) = alone.peak(|| model.load(name).unwrap());
    assert_eq!(weight.as_slice().len(), 16 * 4 * MIB);
    assert_eq!(model.tensor(name).unwrap().bytes, 16 * 4 * MIB as u64);
    assert!(peak > 4 * 15 * MIB && peak < 4 * size + MIB, "{peak} bytes to load from a file of {size}");
}

/// What threads take is counted, whichever it is.
#[test]
fn other_threads_are_counted() {
    let alone = Measuring::alone();
    let elsewhere = || std::thread::spawn(|| drop(std::hint::black_box(vec![1u8; 8 * MIB]))).join().unwrap();
    let ((), peak) = alone.peak(elsewhere);
    assert!(peak > 7 * MIB, "{peak}");
}
