//! Models on disk: tensors and hyperparameters by name, whatever the file format.
//!
//! [`Checkpoint::open`] takes a GGUF file (any file of a split set will do), or a directory: of a Hugging Face
//! checkpoint (`config.json`, `model*.safetensors`), or with one GGUF model in it. Either way tensors have the
//! names and shapes of a GGUF file of the `deepseek2` architecture. Opening maps files and reads headers only.
//!
//! Input is not trusted: whatever is wrong with a file is a [`SourceError`], and memory stays in proportion to
//! the headers.

mod assemble;
mod cursor;
mod error;
mod fp8;
pub mod gguf;
pub mod gguf_writer;
mod hf_index;
mod hf_names;
mod hf_shards;
mod hugging_face;
mod map;
mod metadata;
mod safetensors;
mod split;
mod value;

pub use backend_api::GgmlType;
pub use error::{Place, SourceError};
pub use graph::WeightBytes;

use backend_api::{DType, HostBytes};
use std::{
    collections::BTreeSet,
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What is known of a tensor without reading it.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its GGUF name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// The format that [`Checkpoint::load`] gives, or the type in the file that Fathom does not compute with.
    pub dtype: Result<DType, StoredType>,
    /// Outermost first: a weight is `[n_out, n_in]`, experts are `[n_experts, n_out, n_in]`.
    pub shape: Vec<usize>,
    /// Bytes that [`Checkpoint::load`] gives; 0 where the type's size is unknown.
    pub bytes: u64,
    /// The file it is in; for stacked experts, the file of the first.
    pub file: Arc<Path>,
    /// Its name in the file, for errors, where that is another one.
    origin: Option<Box<str>>,
}

impl TensorInfo {
    /// The format, as one to compute with.
    ///
    /// # Errors
    /// The tensor, its type and the types that run.
    pub fn runs(&self) -> Result<DType, SourceError> {
        self.dtype.clone().map_err(|stored| {
            let names = DType::WEIGHTS.map(DType::name).join(", ");
            self.invalid(format!("a type that runs ({names})"), format!("{stored}"))
        })
    }

    fn wrong(&self, flaw: error::Flaw) -> SourceError {
        flaw.at(&self.file, self.place())
    }

    /// As whoever looks into the file finds it.
    fn place(&self) -> Place {
        Place::Tensor(self.origin.as_deref().unwrap_or(&self.name).to_owned())
    }

    /// An error about this tensor, for rules that only a caller knows, such as a shape.
    pub fn invalid(&self, expected: impl Into<String>, found: impl Into<String>) -> SourceError {
        SourceError::invalid(&self.file, self.place(), expected, found)
    }
}

/// A type that Fathom does not compute with, as the file names it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoredType {
    /// Of a GGUF file.
    Ggml(GgmlType),
    /// Of a safetensors file.
    SafeTensors(String),
}

impl From<GgmlType> for StoredType {
    fn from(ggml_type: GgmlType) -> Self {
        StoredType::Ggml(ggml_type)
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoredType::Ggml(ggml_type) => write!(f, "{ggml_type:?}"),
            StoredType::SafeTensors(name) => f.write_str(name),
        }
    }
}

/// The hyperparameters, in the form the files have them.
#[derive(Clone, Copy, Debug)]
pub enum Keys<'a> {
    /// Metadata of a GGUF file (the first, of a split set).
    Gguf(&'a gguf::Metadata),
    /// `config.json`.
    HuggingFace(&'a serde_json::Value),
}

/// A model on disk. Loading takes `&self` and may be done from several threads.
pub struct Checkpoint {
    path: PathBuf,
    keys: OwnedKeys,
    tensors: Vec<(TensorInfo, Location)>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<usize>,
    threads: assemble::Threads,
}

enum OwnedKeys {
    Gguf(gguf::Metadata),
    HuggingFace(serde_json::Value),
}

/// How a tensor is loaded.
enum Location {
    /// Its bytes are in the file as they are wanted.
    Mapped(WeightBytes),
    /// It is made of what the files have.
    Made(assemble::Assembly),
}

impl Checkpoint {
    /// Opens a GGUF file, a set of them by any of its files, or a directory. Reads headers only.
    ///
    /// # Errors
    /// What is wrong, with file, key or tensor, what was expected and found.
    pub fn open(path: &Path) -> Result<Checkpoint, SourceError> {
        match Layout::find(path)? {
            Layout::Gguf(file) => Checkpoint::open_gguf(path, &file),
            Layout::HuggingFace(names) => {
                let (config, tensors) = hugging_face::open(path, &names)?;
                Checkpoint::assemble(path, OwnedKeys::HuggingFace(config), tensors)
            }
        }
    }

    /// A GGUF file (not of a split set) that is in memory. `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`open`](Checkpoint::open).
    pub fn from_bytes(name: &Path, bytes: HostBytes) -> Result<Checkpoint, SourceError> {
        let header = gguf::parse(&name.into(), &bytes)?;
        Checkpoint::assemble(name, OwnedKeys::Gguf(header.metadata), mapped(header.tensors, &bytes).collect())
    }

    /// The GGUF file `file` and the others of its set, as the model at `path`.
    fn open_gguf(path: &Path, file: &Path) -> Result<Checkpoint, SourceError> {
        let bytes = map::map(file)?;
        let header = gguf::parse(&file.into(), &bytes)?;
        let Some(files) = split::siblings(file, &header.metadata)? else {
            let tensors = mapped(header.tensors, &bytes).collect();
            return Checkpoint::assemble(path, OwnedKeys::Gguf(header.metadata), tensors);
        };
        let mut first = None;
        let mut tensors = Vec::new();
        for (number, sibling) in files.iter().enumerate() {
            if !sibling.exists() {
                let name = sibling.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(SourceError::missing(file, Place::File(name), "all files of the set beside it"));
            }
            let bytes = map::map(sibling)?;
            let header = gguf::parse(&sibling.as_path().into(), &bytes)?;
            split::check_number(&header.metadata, number, files.len())?;
            tensors.extend(mapped(header.tensors, &bytes));
            first.get_or_insert(header.metadata);
        }
        let metadata = first.unwrap_or(header.metadata);
        split::check_tensors(&metadata, tensors.len())?;
        Checkpoint::assemble(path, OwnedKeys::Gguf(metadata), tensors)
    }

    /// Indexes the tensors by name; a name twice is an error.
    fn assemble(
        path: &Path,
        keys: OwnedKeys,
        tensors: Vec<(TensorInfo, Location)>,
    ) -> Result<Checkpoint, SourceError> {
        let name = |index: usize| tensors[index].0.name.as_str();
        let mut by_name: Vec<usize> = (0..tensors.len()).collect();
        by_name.sort_by(|&a, &b| name(a).cmp(name(b)));
        for pair in by_name.windows(2) {
            if name(pair[0]) == name(pair[1]) {
                let [first, second] = [pair[0], pair[1]].map(|index| &tensors[index].0);
                let found = format!("another in {}", first.file.display());
                return Err(second.invalid("one tensor of that name", found));
            }
        }
        Ok(Checkpoint { path: path.to_owned(), keys, tensors, by_name, threads: Default::default() })
    }

    /// The same, whose tensors are made by at most so many threads (and at least one) where [`load`](Checkpoint::load)
    /// makes them, instead of one for each processor.
    pub fn with_threads(self, threads: usize) -> Checkpoint {
        Checkpoint { threads: assemble::Threads::new(threads), ..self }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The hyperparameters.
    pub fn keys(&self) -> Keys<'_> {
        match &self.keys {
            OwnedKeys::Gguf(metadata) => Keys::Gguf(metadata),
            OwnedKeys::HuggingFace(config) => Keys::HuggingFace(config),
        }
    }

    /// All tensors, in the files' order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter().map(|(info, _)| info)
    }

    /// The tensor of that GGUF name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.find(name).map(|(info, _)| info)
    }

    /// The tensor of that GGUF name, which has to be there.
    ///
    /// # Errors
    /// [`SourceError::Missing`], with the name that the files would have.
    pub fn required(&self, name: &str) -> Result<&TensorInfo, SourceError> {
        self.tensor(name).ok_or_else(|| self.missing(name))
    }

    /// The tensor's values in its [`dtype`](TensorInfo::dtype), little-endian, outermost axis first. From a GGUF
    /// file they are a range of the map; what a Hugging Face directory has in another form (experts apart, FP8,
    /// norms in BF16) is made anew by every call.
    ///
    /// # Errors
    /// A missing tensor, a type that does not run, FP8 whose values are not finite.
    pub fn load(&self, name: &str) -> Result<WeightBytes, SourceError> {
        let (info, location) = self.find(name).ok_or_else(|| self.missing(name))?;
        info.runs()?;
        match location {
            Location::Mapped(weight) => Ok(weight.clone()),
            Location::Made(assembly) => {
                assembly.load(info.bytes as usize, &self.threads).map_err(|flaw| info.wrong(flaw))
            }
        }
    }

    /// What `make` makes out of a tensor's values, by the threads that make tensors.
    pub(crate) fn make<T: Send>(
        &self,
        name: &str,
        make: impl FnOnce(DType, &[u8]) -> T + Send,
    ) -> Result<T, SourceError> {
        let info = self.required(name)?;
        let (dtype, values) = (info.runs()?, self.load(name)?);
        let pool = self.threads.pool().map_err(|flaw| info.wrong(flaw))?;
        Ok(pool.install(|| make(dtype, values.as_slice())))
    }

    /// Bytes of memory that [`load`](Checkpoint::load) takes for the tensor; `None` for one that it gives a range of the
    /// map of, and for one that is not there.
    pub fn made_bytes(&self, name: &str) -> Option<u64> {
        match self.find(name)? {
            (info, Location::Made(_)) => Some(info.bytes),
            _ => None,
        }
    }

    /// Bytes in the files, scales included, of a tensor in FP8, which [`load`](Checkpoint::load) gives in four times
    /// as many; `None` for one of another format.
    pub fn fp8_bytes(&self, name: &str) -> Option<u64> {
        match self.find(name)? {
            (_, Location::Made(assembly)) => assembly.fp8_bytes(),
            _ => None,
        }
    }

    /// Some bytes of a tensor as the files have it, few enough to read for all: two models that are not the same hardly ever
    /// agree in all of them. None of a tensor that is not there.
    pub(crate) fn sample(&self, name: &str, mut see: impl FnMut(&[u8])) {
        const BYTES: usize = 4096;
        let mut edges = |weight: &WeightBytes| {
            let bytes = weight.as_slice();
            see(&bytes[..bytes.len().min(BYTES)]);
            see(&bytes[bytes.len().saturating_sub(BYTES)..]);
        };
        match self.find(name) {
            Some((_, Location::Mapped(weight))) => edges(weight),
            Some((_, Location::Made(assembly))) => {
                for part in [assembly.parts.first(), assembly.parts.last()].into_iter().flatten() {
                    edges(&part.values);
                    part.scales.iter().for_each(&mut edges);
                }
            }
            None => {}
        }
    }

    fn missing(&self, name: &str) -> SourceError {
        // As the files would name it.
        let name = match self.keys {
            OwnedKeys::Gguf(_) => None,
            OwnedKeys::HuggingFace(_) => hf_names::origin(name),
        }
        .unwrap_or_else(|| name.to_owned());
        SourceError::missing(&self.path, Place::Tensor(name), "a tensor of that name")
    }

    fn find(&self, name: &str) -> Option<&(TensorInfo, Location)> {
        let found = self.by_name.binary_search_by(|&index| self.tensors[index].0.name.as_str().cmp(name));
        found.ok().map(|found| &self.tensors[self.by_name[found]])
    }
}

/// What is at a path.
pub(crate) enum Layout {
    /// A GGUF file, or any file of a split set.
    Gguf(PathBuf),
    /// A Hugging Face directory with files of these names.
    HuggingFace(BTreeSet<String>),
}

impl Layout {
    /// Looks at names alone.
    ///
    /// # Errors
    /// A path that leads nowhere, to one file of a directory, or to a directory with no model or several.
    pub(crate) fn find(path: &Path) -> Result<Layout, SourceError> {
        let facts = fs::metadata(path).map_err(|e| SourceError::io(path, "open", e))?;
        if !facts.is_dir() {
            if hugging_face::is_part(path) {
                let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let directory = directory.unwrap_or(Path::new(".")).display();
                let expected = format!("a GGUF file, or the directory `{directory}` as a whole");
                let found = "one file of a Hugging Face directory";
                return Err(SourceError::invalid(path, Place::Header, expected, found));
            }
            return Ok(Layout::Gguf(path.to_owned()));
        }
        let names = file_names(path)?;
        if names.contains(hugging_face::CONFIG) && hugging_face::has_weights(&names) {
            return Ok(Layout::HuggingFace(names));
        }
        let models: Vec<String> = split::models(&names).into_iter().collect();
        match &models[..] {
            [model] => Ok(Layout::Gguf(path.join(model))),
            found => {
                let expected = "config.json with model*.safetensors, or one GGUF model";
                let found = match found.len() {
                    0 => "none of them".to_owned(),
                    n => format!(
                        "{n} GGUF models: {}{}",
                        found[..n.min(8)].join(", "),
                        if n > 8 { ", …" } else { "" }
                    ),
                };
                Err(SourceError::invalid(path, Place::Directory, expected, found))
            }
        }
    }
}

impl graph::WeightSource for Checkpoint {
    fn weight(&self, name: &str) -> Result<WeightBytes, graph::SourceError> {
        Ok(self.load(name)?)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensors = self.tensors.len();
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("tensors", &tensors)
            .finish_non_exhaustive()
    }
}

fn mapped(
    tensors: Vec<(TensorInfo, Range<usize>)>,
    bytes: &HostBytes,
) -> impl Iterator<Item = (TensorInfo, Location)> {
    let location = |range| Location::Mapped(WeightBytes { bytes: bytes.clone(), range });
    tensors.into_iter().map(move |(info, range)| (info, location(range)))
}

/// The names of what is in a directory, as far as they are UTF-8.
fn file_names(directory: &Path) -> Result<BTreeSet<String>, SourceError> {
    let unreadable = |e| SourceError::io(directory, "list", e);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        names.extend(entry.map_err(unreadable)?.file_name().into_string());
    }
    Ok(names)
}

/// Entry points for tests that feed broken bytes: everything a reader could do with them is done.
#[doc(hidden)]
pub mod hostile {
    use super::*;

    /// A GGUF file: opens it, reads every key and the ends of every tensor.
    pub fn open_gguf_bytes(bytes: &[u8]) -> Result<(), SourceError> {
        let checkpoint = Checkpoint::from_bytes(Path::new("hostile.gguf"), Arc::new(bytes.to_vec()))?;
        if let Keys::Gguf(metadata) = checkpoint.keys() {
            for key in metadata.keys() {
                let _ = metadata.get_str(key);
                if let Ok(Some(array)) = metadata.get_array(key) {
                    array.values().for_each(drop);
                    let _ = array.strings().map(|strings| strings.for_each(drop));
                    let _ = array.u32s().map(|numbers| numbers.for_each(drop));
                }
            }
        }
        touch(&checkpoint)
    }

    /// A safetensors file, as the only one of a directory.
    pub fn open_safetensors_bytes(bytes: &[u8]) -> Result<(), SourceError> {
        let file = Path::new("hostile.safetensors");
        let tensors = hugging_face::assemble_bytes(file, Arc::new(bytes.to_vec()))?;
        let checkpoint =
            Checkpoint::assemble(file, OwnedKeys::HuggingFace(serde_json::Value::Null), tensors)?;
        // On every machine the same, as threads take memory.
        touch(&checkpoint.with_threads(2))
    }

    /// An index of safetensors files (and the same bytes as a `config.json`).
    pub fn read_index_bytes(bytes: &[u8]) -> Result<usize, SourceError> {
        hugging_face::check_index_bytes(bytes, Path::new("hostile.json"))
    }

    fn touch(checkpoint: &Checkpoint) -> Result<(), SourceError> {
        for tensor in checkpoint.tensors() {
            // What is not of a type that runs is opened all the same.
            if let Ok(weight) = checkpoint.load(&tensor.name) {
                assert_eq!(weight.as_slice().len() as u64, tensor.bytes, "{}", tensor.name);
            }
        }
        Ok(())
    }
}
