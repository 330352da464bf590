//! The SPIR-V that is checked in is that of the sources beside it.

use sha2::{Digest, Sha256};
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

/// Needs no compiler: the manifest has the sums of the sources and of the SPIR-V that was made of them.
/// `shader-compiler --check` compiles them anew.
#[test]
fn the_spirv_is_of_these_sources() {
    let manifest = fs::read_to_string(folder("spirv").join("manifest.txt")).expect("a manifest");
    let mut listed = Vec::new();
    for line in manifest.lines() {
        let (sum, name) = line.split_once("  ").expect("SUM  NAME");
        let bytes = fs::read(folder(name)).unwrap_or_default();
        assert_eq!(
            format!("{:x}", Sha256::digest(bytes)),
            sum,
            "{name} was changed: run `cargo run --release` in backend-vulkan/shaders/compiler"
        );
        listed.push(folder(name));
    }
    listed.sort();
    let mut all = ["shaders", "shaders/include", "spirv"].map(|name| files(&folder(name))).concat();
    all.extend(["Cargo.lock", "src/main.rs"].map(|name| folder("shaders/compiler").join(name)));
    all.retain(|path| name(path) != "manifest.txt");
    all.sort();
    assert_eq!(listed, all, "what the manifest lists, and what is there");
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
