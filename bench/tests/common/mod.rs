//! Running the real programs.
#![allow(dead_code, reason = "each test file uses a part")]

use bench::npy::Matrix;
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What a program said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    /// What is on standard output of a program that went well.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// The one line of a program that failed.
    #[track_caller]
    pub fn error(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.out, "", "a failure says nothing on standard output");
        let lines: Vec<&str> = self.err.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(lines.len(), 1, "{self:?}");
        lines[0].to_owned()
    }

    /// JSON on standard output, one line.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let out = self.ok();
        assert_eq!(out.lines().count(), 1, "{out}");
        serde_json::from_str(&out).unwrap()
    }
}

/// Says once what is not tried, and past the test harness, which shows nothing of tests that pass.
pub fn skipped(why: impl std::fmt::Display) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| drop(writeln!(std::io::stderr(), "skipped: {why}")));
}

/// Runs a program without input.
pub fn run(program: &str, arguments: &[&str]) -> Said {
    run_with(program, arguments, "")
}

/// Runs a program with this on its standard input.
pub fn run_with(program: &str, arguments: &[&str], input: impl AsRef<[u8]>) -> Said {
    run_in(&std::env::temp_dir().join("fathom-tests"), program, arguments, input)
}

/// A program on which no variable of this environment has a say.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    for variable in ["N_GPU_LAYERS", "OVERRIDE_TENSOR", "CPU_MOE", "N_CPU_MOE", "NO_KV_OFFLOAD"] {
        command.env_remove(format!("LLAMA_ARG_{variable}"));
    }
    command.env_remove("FATHOM_ISA");
    command
}

/// Runs a program that keeps what it keeps for the next time in this folder.
pub fn run_in(cache: &Path, program: &str, arguments: &[&str], input: impl AsRef<[u8]>) -> Said {
    let mut child = command(program)
        .args(arguments)
        .env("XDG_CACHE_HOME", cache)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Small enough for a pipe; a program that ended already does not read it.
    let _ = child.stdin.take().unwrap().write_all(input.as_ref());
    let output = child.wait_with_output().unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The embedded model, as a file.
pub fn austen() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/austen-q4_k_m.gguf");
    file.to_str().unwrap().to_owned()
}

/// The folder of bigger models, where it is there; said aloud where not.
pub fn shared_models() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models");
    if folder.is_dir() {
        return Some(folder);
    }
    skipped("tests of ../shared, which is not there");
    None
}

/// Writes a reference as `perplexity --reference` reads it: `NAME.json` in a folder, and the logits beside it.
pub fn write_reference(folder: &Path, name: &str, reference: &serde_json::Value, logits: &Matrix) -> String {
    let shape = (logits.rows, logits.columns);
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape:?}, }}");
    let mut npy = b"\x93NUMPY\x01\x00".to_vec();
    npy.extend((header.len() as u16).to_le_bytes());
    npy.extend(header.as_bytes());
    npy.extend(logits.values.iter().flat_map(|x| x.to_le_bytes()));
    let file = folder.join(name).with_extension("json");
    fs::write(folder.join(reference["logits"].as_str().unwrap()), npy).unwrap();
    fs::write(&file, reference.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

/// The keys of a JSON object.
pub fn keys(value: &serde_json::Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}
