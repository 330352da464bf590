//! A model as it lies on disk: hyperparameters, vocabulary, weights by name, and the graph that they make.

use crate::{
    Error,
    config::Config,
    engine::CacheType,
    layers::{LayerError, NamedWeights, decoder_layer, derive_k_b},
    source::{Checkpoint, Keys, SourceError, TensorInfo},
    tokenizer::Tokenizer,
};
use backend_api::{DType, Extent, HostBytes, Precision, RopeAttributes, Shape, TensorDesc, format};
use graph::{Graph, GraphBuilder, StorageKind, WeightBytes, WeightSource, report::human};
use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, OnceLock},
};

/// A checkpoint whose header makes a model. Holds no weights: their bytes are read when devices ask for them.
pub struct Model {
    checkpoint: Checkpoint,
    config: Config,
    notices: Vec<String>,
    tokenizer: OnceLock<Tokenizer>,
}

impl Model {
    /// Opens a GGUF file (of a split set, any of its files) or a Hugging Face directory. Reads headers, and
    /// checks every key and every tensor that a step needs.
    ///
    /// # Errors
    /// What is wrong with the checkpoint: file, key or tensor, what was expected and found.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::new(Checkpoint::open(path)?)
    }

    /// As [`Model::open`], for a checkpoint that is open already.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn new(checkpoint: Checkpoint) -> Result<Self, Error> {
        let config = Config::read(&checkpoint).map_err(|error| Error::config(checkpoint.path(), error))?;
        let notices = config.notices.clone();
        let mut model = Model { checkpoint, config, notices, tokenizer: OnceLock::new() };
        // Building the graph asks for every weight by name and shape: which tensors a model needs is written
        // nowhere else.
        let graph = model.graph(1, CacheType::default(), Precision::default())?;
        model.notices.extend(skipped(&model, &graph)?);
        model.notices.extend(made(&model, &graph));
        Ok(model)
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What a user should know: tensors that are not used, weights that grow, and how odd keys were taken.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The vocabulary. Read on the first call, as planning and measuring do without.
    ///
    /// # Errors
    /// A tokenizer that is missing, malformed or not supported, by name.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(tokenizer);
        }
        let tokenizer = match self.checkpoint.keys() {
            Keys::Gguf(metadata) => Tokenizer::from_gguf(metadata)?,
            Keys::HuggingFace(_) => Tokenizer::from_directory(self.checkpoint.path())?,
        };
        Ok(self.tokenizer.get_or_init(|| tokenizer))
    }

    /// What a user should know about the vocabulary: tokens that the embedding has no row for. Texts without them
    /// are fed as ever, one with them is [`SessionError::UnknownToken`](crate::SessionError::UnknownToken).
    ///
    /// # Errors
    /// As [`Model::tokenizer`].
    pub fn vocabulary_notice(&self) -> Result<Option<String>, Error> {
        let (tokenizer, rows) = (self.tokenizer()?, self.config.vocabulary);
        // Unused ids have no text, so that no text has them.
        let piece = |id: usize| tokenizer.piece(id.try_into().ok()?).filter(|piece| !piece.is_empty());
        let mut beyond = (rows..tokenizer.size()).filter_map(|id| Some((id, piece(id)?)));
        let Some((first, text)) = beyond.next() else { return Ok(None) };
        let count = 1 + beyond.count();
        let text: String = String::from_utf8_lossy(text).chars().take(40).collect();
        Ok(Some(format!(
            "the embedding's {rows} rows are too few for {count} of the tokens, from {text:?} ({first}) on: a text \
             that has one is an error"
        )))
    }

    /// The computation of a step: inputs `tokens` I32 `[rows]` and `outputs` I32 `[outputs]` (the rows whose
    /// logits are wanted), states `cache.N` `[context, kv_lora_rank + rope]`, one for each layer, and the output
    /// `logits` F32 `[outputs, vocabulary]`.
    ///
    /// # Errors
    /// A tensor that is missing, or has the wrong shape or a format that does not run.
    pub fn graph(&self, context: usize, cache: CacheType, precision: Precision) -> Result<Graph, Error> {
        let config = &self.config;
        let (d, vocabulary) = (config.embedding_length, config.vocabulary);
        let rope = RopeAttributes {
            inverse_frequencies: config.attention.rope.inverse_frequencies().into(),
            magnitude: config.attention.rope.magnitude as f32,
        };
        let cache = TensorDesc::new(cache.dtype(), Shape::fixed(&[context, config.attention.cache_width()]));
        let rows = |extent| TensorDesc::new(DType::I32, Shape::new(&[extent]));
        let weights = NamedWeights(&self.checkpoint);

        let mut g = GraphBuilder::new(precision);
        let tokens = g.input("tokens", rows(Extent::Rows));
        let outputs = g.input("outputs", rows(Extent::Outputs));
        let embedding = weights.get(&mut g, "token_embd.weight", &[vocabulary, d])?;
        let mut x = g.embed_rows("token_embd", embedding, tokens).map_err(self.unfit())?;
        for layer in 0..config.layers() {
            g.layer(Some(layer));
            let cache = g.state(&cache_name(layer), cache);
            x = decoder_layer(&mut g, &weights, config, &rope, layer, x, cache).map_err(self.unfit())?;
        }

        g.layer(Some(config.layers()));
        let norm = weights.vector(&mut g, "output_norm.weight", d)?;
        let head = match config.tied_head {
            true => embedding,
            false => weights.get(&mut g, "output.weight", &[vocabulary, d])?,
        };
        let head = |g: &mut GraphBuilder| {
            let x = g.select_rows("select_outputs", x, outputs)?;
            let x = g.rms_norm("output_norm", x, norm, config.norm_eps)?;
            g.matmul("output", head, x)
        };
        let logits = head(&mut g).map_err(self.unfit())?;
        g.output("logits", logits);
        g.finish().map_err(self.unfit())
    }

    fn unfit<E: Into<LayerError>>(&self) -> impl Fn(E) -> Error + '_ {
        |error| match error.into() {
            LayerError::Source(error) => Error::Source(error),
            LayerError::Build(error) => {
                Error::Graph { path: self.checkpoint.path().to_owned(), error: error.into() }
            }
        }
    }

    /// Tells models apart that have the same shapes: a hash of hyperparameters, and of where each tensor begins and ends.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut hash = crate::hash::Fnv::default();
        let Config { attention, feed_forward, norm_eps, .. } = &self.config;
        hash.write(format!("{attention:?}{feed_forward:?}{norm_eps:?}").as_bytes());
        for info in self.checkpoint.tensors() {
            hash.write(format!("{}{:?}{:?}", info.name, info.dtype, info.shape).as_bytes());
            self.checkpoint.sample(&info.name, |bytes| hash.write(bytes));
        }
        hash.finish()
    }
}

/// The state that a layer's rows are kept in.
pub(crate) fn cache_name(layer: usize) -> String {
    format!("cache.{layer}")
}

/// Whether a state or weight of this name is a cache.
pub(crate) fn is_cache(name: &str) -> bool {
    name.strip_prefix("cache.").is_some_and(|layer| layer.parse::<usize>().is_ok())
}

/// Parts of a layer that files may have and nothing needs: tables that follow from the keys.
const SPARE: [&str; 3] = ["rope_freqs.weight", "attn_rot_embd.weight", "rotary_emb.inv_freq"];

/// One notice for the layers that predict further tokens, one for tensors that follow from others.
///
/// # Errors
/// Any other tensor that no step needs: without it the file's model is another.
fn skipped(model: &Model, graph: &Graph) -> Result<Vec<String>, SourceError> {
    let (config, checkpoint) = (&model.config, &model.checkpoint);
    let used: HashSet<&str> =
        graph.storages_of(StorageKind::Weight).map(|(_, storage)| storage.name.as_str()).collect();
    let decoders = config.layers();
    let parts = checkpoint.tensors().filter_map(|info| layer_and_part(&info.name));
    let told: HashSet<usize> =
        parts.filter(|(_, part)| part.starts_with("nextn.")).map(|(layer, _)| layer).collect();
    // Whether the keys say so or the tensors.
    let predicts = |layer: usize| {
        layer >= decoders && (layer - decoders < config.next_token_layers || told.contains(&layer))
    };
    let (mut next, mut spare) = (0, Vec::new());
    for info in checkpoint.tensors() {
        let (layer, part) = match layer_and_part(&info.name) {
            Some((layer, part)) => (Some(layer), part),
            None => (None, info.name.as_str()),
        };
        // Files of a time between have the matrices that attention absorbs, and what they were made of. One of the two
        // alone is derived with the other.
        let is_derived = matches!(part, "attn_k_b.weight" | "attn_v_b.weight")
            && layer.is_some_and(|layer| NamedWeights(checkpoint).is_legacy(layer));
        if used.contains(info.name.as_str()) && !is_derived {
            continue;
        }
        let is_spare = SPARE.iter().any(|spare| part.ends_with(spare))
            || is_derived
            || part == "attn_kv_b.weight"
            || (config.tied_head && part == "output.weight");
        match layer {
            Some(layer) if predicts(layer) => next += 1,
            Some(layer) if layer >= decoders => {
                let expected = format!("layers 0 to {}, as the keys say", decoders - 1);
                return Err(info.invalid(expected, format!("a tensor of layer {layer}")));
            }
            _ if is_spare => spare.push(info.name.as_str()),
            _ => return Err(info.invalid("only tensors that this model computes with", "one more")),
        }
    }
    let mut notices = Vec::new();
    if next > 0 {
        notices.push(format!(
            "{next} tensors of layers that predict further tokens (from layer {decoders} on) are skipped"
        ));
    }
    if !spare.is_empty() {
        let shown = spare[..spare.len().min(4)].join(", ");
        let more = if spare.len() > 4 { ", …" } else { "" };
        notices.push(format!("{} tensors are not used: {shown}{more}", spare.len()));
    }
    Ok(notices)
}

/// A notice each if weights take more memory than their files, and if they are copied where a GGUF file would be used in
/// place.
fn made(model: &Model, graph: &Graph) -> Vec<String> {
    let checkpoint = &model.checkpoint;
    let (mut files, mut memory, mut copied) = (0, 0, 0);
    for (_, storage) in graph.storages_of(StorageKind::Weight) {
        let Some(made) = checkpoint.made_bytes(&storage.name) else { continue };
        match checkpoint.fp8_bytes(&storage.name) {
            Some(stored) => {
                files += stored;
                memory += made;
            }
            None if layer_and_part(&storage.name).is_some_and(|(_, part)| is_experts(part)) => copied += made,
            None => {}
        }
    }
    let [files, memory, copied] = [files, memory, copied].map(|bytes| (bytes > 0).then(|| human(bytes)));
    let copied = copied.map(|copied| {
        format!(
            "experts, which the files have one by one, are put together: {copied} of their device's memory"
        )
    });
    let decoded = files.zip(memory).map(|(files, memory)| {
        format!(
            "weights in FP8 become F32, which holds their values: {memory} of memory for {files} of the files"
        )
    });
    copied.into_iter().chain(decoded).collect()
}

impl Model {
    /// Whether a weight's bytes are made when it is loaded, and not those of a file.
    pub(crate) fn is_made(&self, name: &str) -> bool {
        self.derived_k_b(name).is_some() || self.checkpoint.made_bytes(name).is_some()
    }

    /// The layer of a `k_b` that is derived, if the name is that of one.
    fn derived_k_b(&self, name: &str) -> Option<usize> {
        layer_of_k_b(name).filter(|layer| NamedWeights(&self.checkpoint).is_legacy(*layer))
    }
}

impl WeightSource for Model {
    fn weight(&self, name: &str) -> Result<WeightBytes, graph::SourceError> {
        if let Some(layer) = self.derived_k_b(name) {
            let kv_b = format!("blk.{layer}.attn_kv_b.weight");
            let derive = |dtype, kv_b: &[u8]| derive_k_b(&self.config.attention, dtype, kv_b);
            let bytes = self.checkpoint.make(&kv_b, derive)?.map_err(|error| {
                let from = self
                    .checkpoint
                    .required(&kv_b)
                    .map(|info| info.invalid("memory for attn_k_b", error.to_string()));
                from.unwrap_or_else(|missing| missing)
            })?;
            let range = 0..bytes.len();
            let bytes: HostBytes = Arc::new(bytes);
            return Ok(WeightBytes { bytes, range });
        }
        let weight = self.checkpoint.load(name)?;
        if layer_and_part(name).is_some_and(|(_, part)| is_router(part)) {
            check_router(self.checkpoint.required(name)?, weight.as_slice())?;
        }
        Ok(weight)
    }
}

/// Whether a layer's tensor has a part in the choice of experts.
fn is_router(part: &str) -> bool {
    part == "ffn_gate_inp.weight" || part == ROUTING_BIAS
}

/// Looks for what leaves no order to choose experts in. In any other weight it shows in the logits, and here too, but
/// a router is small enough to say where.
///
/// # Errors
/// The tensor, and where in it.
fn check_router(info: &TensorInfo, bytes: &[u8]) -> Result<(), SourceError> {
    let dtype = info.runs()?;
    let inner = info.shape.last().copied().unwrap_or(1);
    let may_close = info.name.ends_with(ROUTING_BIAS);
    let mut row = vec![0.0; inner];
    for (index, bytes) in bytes.chunks_exact(dtype.row_bytes(inner)).enumerate() {
        format::decode(dtype, bytes, &mut row);
        let right = |value: &f32| value.is_finite() || (may_close && *value == f32::NEG_INFINITY);
        if let Some(column) = row.iter().position(|value| !right(value)) {
            let (expected, place) = match may_close {
                true => {
                    ("finite numbers, or -inf for experts that are closed", format!("of expert {column}"))
                }
                false => ("finite numbers", format!("at {column} of row {index}")),
            };
            return Err(info.invalid(expected, format!("{} {place}", row[column])));
        }
    }
    Ok(())
}

/// Added to the scores of experts for the choice alone, in files whose models have such a bias.
const ROUTING_BIAS: &str = "exp_probs_b.bias";

fn layer_of_k_b(name: &str) -> Option<usize> {
    layer_and_part(name).filter(|(_, part)| *part == "attn_k_b.weight").map(|(layer, _)| layer)
}

/// 3 and `ffn_up.weight` of `blk.3.ffn_up.weight`.
pub(crate) fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let layers = name.strip_prefix("blk.").or_else(|| name.strip_prefix("model.layers."))?;
    let (layer, part) = layers.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// Whether a layer's tensor is its routed experts, in all ways that files have them.
pub(crate) fn is_experts(part: &str) -> bool {
    let which = part.strip_prefix("ffn_").and_then(|part| part.strip_suffix("_exps.weight"));
    which.is_some_and(|which| matches!(which, "gate" | "up" | "down" | "gate_up"))
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.checkpoint.path())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
