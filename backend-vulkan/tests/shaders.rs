//! The SPIR-V that is checked in is that of the sources beside it.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of the crate");
    let mut files: Vec<_> =
        entries.map(|entry| entry.expect("an entry").path()).filter(|p| p.is_file()).collect();
    files.sort();
    files
}

fn name(path: &Path) -> String {
    path.file_name().expect("a file").to_string_lossy().into_owned()
}

/// As `shaders/compiler` computes it: FNV-1a over the names and bytes of all sources.
fn sources() -> u64 {
    let shaders = folder("shaders");
    let mut all: Vec<_> = [files(&shaders), files(&shaders.join("include"))].concat();
    all.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for path in all {
        let bytes = fs::read(&path).expect("a source");
        for byte in name(&path).into_bytes().into_iter().chain([0]).chain(bytes) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash
}

/// Needs no compiler: the manifest says from which sources the SPIR-V was made. `shader-compiler --check` compares the
/// bytes themselves.
#[test]
fn the_spirv_is_of_these_sources() {
    let manifest = fs::read_to_string(folder("spirv").join("manifest.txt")).expect("a manifest");
    let expected = format!("sources {:016x}\n", sources());
    assert!(
        manifest == expected,
        "shaders were changed: run `cargo run --release` in backend-vulkan/shaders/compiler"
    );
}

#[test]
fn every_variant_is_there_and_used() {
    let list = fs::read_to_string(folder("shaders").join("variants.txt")).expect("a list");
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut variants: Vec<String> =
        lines.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect();
    let mut found: Vec<String> = files(&folder("spirv"))
        .iter()
        .filter_map(|path| name(path).strip_suffix(".spv").map(str::to_owned))
        .collect();
    variants.sort();
    found.sort();
    assert_eq!(variants, found);
    let pipelines = fs::read_to_string(folder("src").join("pipelines.rs")).expect("a source");
    let missing: Vec<_> = found.iter().filter(|name| !pipelines.contains(&format!("\"{name}\""))).collect();
    assert!(missing.is_empty(), "no pipeline is made of {missing:?}");
}

/// Whatever reaches memory by address says whether it reads or writes.
#[test]
fn every_reference_is_read_only_or_write_only() {
    let shaders = folder("shaders");
    for path in [files(&shaders), files(&shaders.join("include"))].concat() {
        let text = fs::read_to_string(&path).unwrap_or_default();
        for line in text.lines().filter(|line| line.contains("buffer_reference,")) {
            assert!(line.contains("readonly") || line.contains("writeonly"), "{}: {line}", path.display());
        }
    }
}
