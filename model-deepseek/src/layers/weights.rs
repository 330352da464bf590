//! Weights by name: that each is there, has its shape and a format that runs, before a byte of it is read.

use crate::{
    config::AttentionConfig,
    source::{Checkpoint, SourceError, TensorInfo},
};
use backend_api::{DType, Shape, TensorDesc, format};
use graph::{GraphBuilder, Value};
use rayon::prelude::*;
use std::{collections::TryReserveError, ops::Range};

/// The tensors of a checkpoint as weights of a graph.
pub(crate) struct NamedWeights<'a>(pub(crate) &'a Checkpoint);

impl NamedWeights<'_> {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.tensor(name).is_some()
    }

    /// The weight of this name, which must have this shape.
    pub(crate) fn get(
        &self,
        g: &mut GraphBuilder,
        name: &str,
        shape: &[usize],
    ) -> Result<Value, SourceError> {
        let info = self.0.required(name)?;
        Ok(g.weight(name, TensorDesc::new(checked(info, shape)?, Shape::fixed(shape))))
    }

    /// A norm's factors or a bias: one extent, F32.
    pub(crate) fn vector(&self, g: &mut GraphBuilder, name: &str, len: usize) -> Result<Value, SourceError> {
        let info = self.0.required(name)?;
        match checked(info, &[len])? {
            DType::F32 => Ok(g.weight(name, TensorDesc::new(DType::F32, Shape::fixed(&[len])))),
            other => Err(info.invalid("F32, as for every norm and bias", other.name())),
        }
    }

    /// Part of the second axis of a weight `[_, n, _]`, as a view.
    pub(crate) fn slice(
        &self,
        g: &mut GraphBuilder,
        name: &str,
        weight: Value,
        range: Range<usize>,
    ) -> Result<Value, SourceError> {
        let info = self.0.required(name)?;
        g.slice(weight, 1, range)
            .map_err(|error| info.invalid("a tensor that can be sliced", error.to_string()))
    }

    /// The matrices that attention absorbs: `k_b [heads, kv_lora_rank, nope]`, `v_b [heads, value, kv_lora_rank]`.
    ///
    /// Files from before May 2025, and Hugging Face checkpoints, have `kv_b [heads × (nope + value),
    /// kv_lora_rank]` instead: of each head the rows that expand its key, then those that expand its value. There
    /// `v_b` is a view and `k_b`, whose heads have to be transposed, is [derived](derive_k_b) at load.
    pub(crate) fn absorbed(
        &self,
        g: &mut GraphBuilder,
        c: &AttentionConfig,
        layer: usize,
    ) -> Result<(Value, Value), SourceError> {
        let name = |part: &str| format!("blk.{layer}.attn_{part}.weight");
        let k_shape = [c.heads, c.kv_lora_rank, c.nope];
        if !self.is_legacy(layer) {
            let k_b = self.get(g, &name("k_b"), &k_shape)?;
            let v_b = self.get(g, &name("v_b"), &[c.heads, c.value, c.kv_lora_rank])?;
            return Ok((k_b, v_b));
        }
        let rows = c.nope + c.value;
        let info = self.0.required(&name("kv_b"))?;
        let dtype = checked(info, &[c.heads * rows, c.kv_lora_rank])?;
        // The same bytes, one extent more.
        let kv_b =
            g.weight(&name("kv_b"), TensorDesc::new(dtype, Shape::fixed(&[c.heads, rows, c.kv_lora_rank])));
        let v_b = self.slice(g, &name("kv_b"), kv_b, c.nope..rows)?;
        let k_b = g.weight(&name("k_b"), TensorDesc::new(derived_dtype(dtype), Shape::fixed(&k_shape)));
        Ok((k_b, v_b))
    }

    /// Whether this layer has `attn_kv_b` in place of the split pair.
    pub(crate) fn is_legacy(&self, layer: usize) -> bool {
        let has = |part: &str| self.has(&format!("blk.{layer}.attn_{part}.weight"));
        has("kv_b") && !(has("k_b") && has("v_b"))
    }
}

/// The tensor's format, if it runs and the shape is this.
fn checked(info: &TensorInfo, shape: &[usize]) -> Result<DType, SourceError> {
    if info.shape != shape {
        return Err(info.invalid(format!("shape {shape:?}"), format!("shape {:?}", info.shape)));
    }
    info.runs()
}

/// A derived weight is in F16 where that holds every value of its source, in F32 otherwise.
fn derived_dtype(source: DType) -> DType {
    if source == DType::F16 { DType::F16 } else { DType::F32 }
}

/// The bytes of `k_b` out of those of `kv_b`, whose format is `dtype`: the key rows of each head, transposed. Heads are
/// shared among the threads of the pool it runs in.
///
/// # Errors
/// There is no memory for it.
pub(crate) fn derive_k_b(c: &AttentionConfig, dtype: DType, kv_b: &[u8]) -> Result<Vec<u8>, TryReserveError> {
    let (nope, latent) = (c.nope, c.kv_lora_rank);
    let row_bytes = dtype.row_bytes(latent);
    let to = derived_dtype(dtype);
    let made_bytes = to.row_bytes(latent * nope);
    let mut made = Vec::new();
    made.try_reserve_exact(c.heads * made_bytes)?;
    made.resize(c.heads * made_bytes, 0);
    let heads =
        made.par_chunks_exact_mut(made_bytes).zip(kv_b.par_chunks_exact((nope + c.value) * row_bytes));
    let scratch = || (vec![0.0; nope * latent], vec![0.0; nope * latent]);
    heads.for_each_init(scratch, |(keys, transposed), (made, head)| {
        for (row, values) in head.chunks_exact(row_bytes).zip(keys.chunks_exact_mut(latent)) {
            format::decode(dtype, row, values);
        }
        for (i, value) in transposed.iter_mut().enumerate() {
            *value = keys[i % nope * latent + i / nope];
        }
        format::encode(to, transposed, made);
    });
    Ok(made)
}
