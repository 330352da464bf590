//! Placement as people say it: so many layers, the experts, the caches, tensors by name. What they leave open is
//! filled so that it [fits](Fit).
//!
//! [`PlacementOptions`] is what was said, a [`graph::Placement`] what it means for one model on some devices, and
//! [`PlacementOptions::place`] leads from one to the other. The words and their meaning are those of llama.cpp, with
//! these differences: caches and the products beside them have owners (see [`graph`]); a cache can be placed by its
//! layer; fitting does not give up where something was said, but works around it.
//!
//! ```
//! use backend_api::NullDevice;
//! use graph::{Devices, report};
//! use model_deepseek::{Model, Options, PlacementOptions};
//! use std::{path::Path, sync::Arc};
//!
//! let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/assets/austen-q4_k_m.gguf");
//! let model = Model::open(&path)?;
//! let gpu = Arc::new(NullDevice::new("gpu", 24 << 30));
//! let devices = Devices::new(vec![gpu, Arc::new(NullDevice::new("cpu", 64 << 30))]);
//!
//! // Experts and caches in main memory, everything else on the accelerator.
//! let said = PlacementOptions { cpu_moe: true, host_caches: true, ..PlacementOptions::default() };
//! let placed = said.place(&model, &devices, &Options::default())?;
//! let plan = &placed.plans.decode;
//! println!("{}", report::summary(plan, &plan.capacity.full_step()));
//! let traffic = plan.traffic(&plan.capacity.full_step());
//! assert_eq!((traffic.state, traffic.weight), (0, 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod fit;
mod resolve;

pub use fit::{Fit, Short, Shortage};

use crate::{Error, Model, Options, Plans};
use graph::{Absorb, Devices};
use std::ops::Range;

/// Which layers go to accelerators. The output counts as a layer, the last; the embedding is always on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuLayers {
    /// All.
    All,
    /// So many, the last ones.
    Last(usize),
}

/// A device for the tensors whose names match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// A regular expression, searched (not anchored) in the tensor's name in GGUF files, such as
    /// `blk.0.attn_k_b.weight`; also where the model is a Hugging Face directory, or a file that holds `attn_k_b`
    /// and `attn_v_b` as `attn_kv_b`.
    pub pattern: String,
    /// The device's name, in any case.
    pub device: String,
    /// What errors call it by: the option, or whatever else it was read from.
    pub option: &'static str,
}

impl Override {
    /// As the option `override-tensor` has it.
    pub fn new(pattern: impl Into<String>, device: impl Into<String>) -> Self {
        Override { pattern: pattern.into(), device: device.into(), option: "override-tensor" }
    }
}

/// What was said about placement. The default says nothing: everything on accelerators if there are any, as far as
/// it fits.
///
/// Accelerators are all devices but the last, which is the host. Layers are spread over several in proportion to
/// their memory, the first layers on the first.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacementOptions {
    /// Layers on accelerators, with their weights and caches. `None`: all that fit.
    pub gpu_layers: Option<GpuLayers>,
    /// Tensors on devices; of several that match, the first counts. They go before everything that follows.
    pub overrides: Vec<Override>,
    /// The routed experts of all layers on the host (not the shared experts).
    pub cpu_moe: bool,
    /// The routed experts of the first so many layers on the host.
    pub cpu_moe_layers: usize,
    /// The dense feed-forward networks of the first so many layers on the host.
    pub cpu_ffn_layers: usize,
    /// All caches on the host.
    pub host_caches: bool,
    /// The caches of some layers on a device, whatever `host_caches` says; of several, the last counts.
    pub cache_layers: Vec<(Range<usize>, String)>,
    /// Where the products beside a cache run.
    pub absorb: Absorb,
    /// Whether a [fall-back](graph::FallBack) is an error: a node that its device cannot run, unless nothing but its
    /// neighbours places it and no more bytes cross with it elsewhere.
    pub strict: bool,
    /// Whether caches claim the nodes of their regions.
    pub ownership_check: bool,
    /// How what is open is filled.
    pub fit: Fit,
}

impl Default for PlacementOptions {
    fn default() -> Self {
        PlacementOptions {
            gpu_layers: None,
            overrides: Vec::new(),
            cpu_moe: false,
            cpu_moe_layers: 0,
            cpu_ffn_layers: 0,
            host_caches: false,
            cache_layers: Vec::new(),
            absorb: Absorb::default(),
            strict: false,
            ownership_check: true,
            fit: Fit::default(),
        }
    }
}

/// What became of what was said.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The plans; [`graph::Plan::placement`] is what it means.
    pub plans: Plans,
    /// What a user should know: memory kept back, what was moved for want of room, options without effect.
    pub notices: Vec<String>,
}

impl PlacementOptions {
    /// Plans a model on devices. Reads no weight and allocates nothing.
    ///
    /// # Errors
    /// [`Error::Option`] where an option is malformed, names a device or layer that is not there, or matches
    /// nothing; [`Error::Shortage`] where what was said does not fit; those of [`Plans::new`].
    pub fn place(&self, model: &Model, devices: &Devices, options: &Options) -> Result<Placed, Error> {
        let wishes = resolve::Wishes::new(self, model, devices, options)?;
        let mut placed = fit::place(self, &wishes, model, devices, options)?;
        placed.notices.splice(0..0, wishes.notices);
        Ok(placed)
    }
}
