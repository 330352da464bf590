//! What the tests of whole models share.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod random;

use backend_api::Precision;
use backend_cpu::{CpuDevice, CpuOptions};
use graph::{Devices, Placement};
use model_deepseek::{CacheType, Engine, Model, Options, Session, Wanted};
use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The model that comes with the project.
pub fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/assets/austen-q4_k_m.gguf")
}

pub fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata")
}

/// Models beside the project; `None`, with a word about it, where they are not.
pub fn shared_models() -> Option<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models");
    if models.is_dir() {
        return Some(models);
    }
    skipped("tests of ../shared, which is not there");
    None
}

/// Says once what is not tried, and past the test harness, which shows nothing of tests that pass.
pub fn skipped(why: impl std::fmt::Display) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| drop(writeln!(std::io::stderr(), "skipped: {why}")));
}

/// Two threads, and the instruction set that `FATHOM_ISA` or the processor says.
pub fn cpu() -> Devices {
    cpu_with(CpuOptions { threads: Some(2), ..CpuOptions::from_env().unwrap() })
}

pub fn cpu_with(options: CpuOptions) -> Devices {
    Devices::new(vec![Arc::new(CpuDevice::new(options).unwrap())])
}

pub fn open(path: &Path) -> Arc<Model> {
    Arc::new(Model::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

pub fn engine(model: &Arc<Model>, options: &Options) -> Engine {
    Engine::new(model, &cpu(), &Placement::default(), options).unwrap()
}

/// Nothing below f32.
pub fn exact() -> Options {
    Options { cache: CacheType::F32, precision: Precision::F32, ..Options::default() }
}

/// A `NAME.json` with the `.npy` beside it.
pub struct Reference {
    pub tokens: Vec<u32>,
    pub rows: Vec<usize>,
    /// `[rows, vocabulary]`.
    pub logits: Vec<f32>,
    pub llama_median: Option<f64>,
}

impl Reference {
    pub fn read(json: &Path) -> Self {
        let text = std::fs::read_to_string(json).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let numbers = |key: &str| value[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap());
        Reference {
            tokens: numbers("tokens").map(|n| n as u32).collect(),
            rows: numbers("rows").map(|n| n as usize).collect(),
            logits: read_npy(&json.with_file_name(value["logits"].as_str().unwrap())),
            llama_median: value["llama_cpp"]["median_row_nmse"].as_f64(),
        }
    }

    /// That of the first tokens.
    pub fn first(&self, tokens: usize) -> Self {
        let rows: Vec<usize> = self.rows.iter().copied().filter(|row| *row < tokens).collect();
        let vocabulary = self.logits.len() / self.rows.len();
        Reference {
            tokens: self.tokens[..tokens].to_vec(),
            logits: self.logits[..rows.len() * vocabulary].to_vec(),
            rows,
            llama_median: self.llama_median,
        }
    }

    /// Feeds the tokens; the logits of the rows.
    pub fn feed(&self, session: &mut Session, observer: &mut dyn graph::StepObserver) -> Vec<f32> {
        let mut found = Vec::with_capacity(self.logits.len());
        let mut each = |_, logits: &[f32]| found.extend_from_slice(logits);
        session.feed_with(&self.tokens, Wanted::Rows(&self.rows), &mut each, observer).unwrap();
        found
    }

    /// How logits of the rows compare with those of a reference.
    pub fn difference(&self, reference: &[f32], found: &[f32]) -> Difference {
        Difference::of(reference, found, self.logits.len() / self.rows.len())
    }

    /// Feeds the tokens and compares.
    pub fn compare(&self, session: &mut Session) -> Difference {
        self.difference(&self.logits, &self.feed(session, &mut backend_api::Discard))
    }
}

/// As `perplexity --reference` prints it.
#[derive(Debug)]
pub struct Difference {
    pub nmse: f64,
    pub median_row_nmse: f64,
    pub agreeing: usize,
    pub rows: usize,
}

impl Difference {
    pub fn of(reference: &[f32], found: &[f32], vocabulary: usize) -> Self {
        assert_eq!(reference.len(), found.len());
        let parts = |a: &[f32], b: &[f32]| {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let error: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
            (error, a.iter().map(|a| square(*a)).sum::<f64>())
        };
        let rows = || reference.chunks(vocabulary).zip(found.chunks(vocabulary));
        let (error, power) = parts(reference, found);
        let mut by_row: Vec<f64> =
            rows().map(|(a, b)| parts(a, b)).map(|(error, power)| error / power).collect();
        by_row.sort_by(f64::total_cmp);
        Difference {
            nmse: error / power,
            median_row_nmse: (by_row[(by_row.len() - 1) / 2] + by_row[by_row.len() / 2]) / 2.0,
            agreeing: rows().filter(|(a, b)| argmax(a) == argmax(b)).count(),
            rows: by_row.len(),
        }
    }
}

pub fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// The values of a version 1 `.npy` file of little-endian f32 in C order.
fn read_npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..start]).unwrap();
    assert!(header.contains("'<f4'") && header.contains("'fortran_order': False"), "{header}");
    bytes[start..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Methods of a [`Device`](backend_api::Device) in a test that are those of the one inside it: `passes_on!(cpu: info read)`.
#[allow(unused_macros, reason = "each test uses some of it")]
macro_rules! passes_on {
    ($inner:ident: $($method:ident)+) => {
        $(crate::common::passes_on!(@$method $inner);)+
    };
    (@info $inner:ident) => {
        fn info(&self) -> &backend_api::DeviceInfo {
            self.$inner.info()
        }
    };
    (@supports $inner:ident) => {
        fn supports(&self, op: &backend_api::OpDesc) -> Result<(), backend_api::Unsupported> {
            self.$inner.supports(op)
        }
    };
    (@allocate $inner:ident) => {
        fn allocate(
            &self,
            request: &backend_api::BufferRequest,
        ) -> Result<backend_api::BufferRef, backend_api::DeviceError> {
            self.$inner.allocate(request)
        }
    };
    (@import $inner:ident) => {
        fn import(
            &self,
            bytes: &backend_api::HostBytes,
        ) -> Result<Option<backend_api::BufferRef>, backend_api::DeviceError> {
            self.$inner.import(bytes)
        }
    };
    (@write $inner:ident) => {
        fn write(
            &self,
            to: &backend_api::BufferRef,
            offset: usize,
            bytes: &[u8],
        ) -> Result<(), backend_api::DeviceError> {
            self.$inner.write(to, offset, bytes)
        }
    };
    (@read $inner:ident) => {
        fn read(
            &self,
            from: &backend_api::BufferRef,
            offset: usize,
            into: &mut [u8],
        ) -> Result<(), backend_api::DeviceError> {
            self.$inner.read(from, offset, into)
        }
    };
    (@compile $inner:ident) => {
        fn compile(
            &self,
            program: backend_api::ProgramDesc,
        ) -> Result<Box<dyn backend_api::Program>, backend_api::DeviceError> {
            self.$inner.compile(program)
        }
    };
}
#[allow(unused_imports, reason = "each test uses some of it")]
pub(crate) use passes_on;
