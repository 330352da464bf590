//! A model on devices: planned, then loaded, then shared by any number of sessions.

use crate::{Error, Model, Session};
use backend_api::{Capacity, DType, DeviceError, Precision};
use graph::{DeviceIndex, Devices, LoadError, Needs, Placement, Plan, Progress, Weights};
use std::{collections::HashSet, fmt, str::FromStr, sync::Arc};

/// The context that is used unless one is asked for, where the model was trained for more.
const USUAL_CONTEXT: usize = 4096;

/// Bytes that a step's logits may take unless more rows of them are asked for.
const USUAL_LOGITS: usize = 64 << 20;

/// Storage format of the latent cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// Two bytes a value.
    #[default]
    F16,
    /// Four bytes a value; nothing is rounded.
    F32,
    /// 34 bytes for 32 values.
    Q8_0,
}

impl CacheType {
    /// As a format of tensors.
    pub fn dtype(self) -> DType {
        match self {
            CacheType::F16 => DType::F16,
            CacheType::F32 => DType::F32,
            CacheType::Q8_0 => DType::Q8_0,
        }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CacheType::F16 => "f16",
            CacheType::F32 => "f32",
            CacheType::Q8_0 => "q8_0",
        })
    }
}

impl FromStr for CacheType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "f16" => Ok(CacheType::F16),
            "f32" => Ok(CacheType::F32),
            "q8_0" => Ok(CacheType::Q8_0),
            other => Err(option("cache-type", "f16, f32 or q8_0", format!("`{other}`"))),
        }
    }
}

/// How a model is to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Tokens that a session can hold. `None`: as the model was trained for, at most 4096.
    pub context: Option<usize>,
    /// Tokens in one step of a prompt.
    pub batch: usize,
    /// Rows of a step whose logits can be had. `None`: as many as 64 MiB hold, at most `batch`.
    pub logit_rows: Option<usize>,
    /// Format of the caches.
    pub cache: CacheType,
    /// Treatment of activations beside quantised weights. With the default, products of attention and of dense layers are
    /// [`Precision::Fine`].
    pub precision: Precision,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            context: None,
            batch: 512,
            logit_rows: None,
            cache: CacheType::default(),
            precision: Precision::default(),
        }
    }
}

/// What a model would do on devices: one plan for single tokens, one for prompts. Planning reads and allocates
/// nothing, so that it can be had for devices that are not there.
#[derive(Clone, Debug)]
pub struct Plans {
    /// Steps of one token.
    pub decode: Arc<Plan>,
    /// Steps of up to [`Options::batch`] tokens.
    pub prefill: Arc<Plan>,
    prefill_capacity: Capacity,
    cache: CacheType,
    precision: Precision,
}

impl Plans {
    /// Plans for a model.
    ///
    /// # Errors
    /// [`Error::Option`]; [`Error::Plan`] if devices and placement do not go together.
    pub fn new(
        model: &Model,
        devices: &Devices,
        placement: &Placement,
        options: &Options,
    ) -> Result<Plans, Error> {
        let config = model.config();
        let context = options.context.unwrap_or(config.context_length.min(USUAL_CONTEXT));
        // Token positions and ids are I32 on devices.
        if !(1..=i32::MAX as usize).contains(&context) {
            return Err(option("context", "1 to 2147483647 tokens", context));
        }
        let batch = options.batch.min(context);
        if batch == 0 {
            return Err(option("batch", "at least 1 token", batch));
        }
        let usual = USUAL_LOGITS / (size_of::<f32>() * config.vocabulary);
        let outputs = options.logit_rows.unwrap_or(usual.max(1)).min(batch);
        if outputs == 0 {
            return Err(option("logit rows", "at least 1", outputs));
        }
        let graph = model.graph(context, options.cache, options.precision)?;
        let plan = |capacity| Ok::<_, Error>(Arc::new(Plan::new(&graph, placement, devices, capacity)?));
        let prefill_capacity = Capacity { rows: batch, outputs, kv_len: context };
        Ok(Plans {
            decode: plan(Capacity { rows: 1, outputs: 1, kv_len: context })?,
            prefill: plan(prefill_capacity)?,
            prefill_capacity,
            cache: options.cache,
            precision: options.precision,
        })
    }

    /// The same without these devices: what they had to do is the host's.
    fn without(&self, lost: &[DeviceIndex], devices: &Devices) -> Result<Plans, Error> {
        let again = |plan: &Plan| {
            let mut placement = plan.placement().clone();
            let Placement { layers, weights, states, .. } = &mut placement;
            let homes = layers.iter_mut().chain(weights.values_mut()).chain(states.values_mut());
            homes.filter(|home| lost.contains(home)).for_each(|home| *home = devices.host());
            Ok::<_, Error>(Arc::new(Plan::new(plan.graph(), &placement, devices, plan.capacity)?))
        };
        Ok(Plans { decode: again(&self.decode)?, prefill: again(&self.prefill)?, ..self.clone() })
    }

    /// Whether one of these devices has anything to do.
    pub(crate) fn use_any(&self, devices: &[DeviceIndex]) -> bool {
        let mut owners = self.decode.owners.iter().chain(&self.prefill.owners);
        owners.any(|owner| devices.contains(owner))
    }

    /// Bytes that each device must have for weights and one session: both plans' weights, each once, the caches, and
    /// the scratch memory of both.
    pub fn needs(&self) -> Vec<Needs> {
        let mut needs = self.decode.needs();
        for (needs, prefill) in needs.iter_mut().zip(self.prefill.needs()) {
            needs.scratch += prefill.scratch;
        }
        for place in self.prefill.weights.iter().filter(|place| !self.decode.weights.contains(place)) {
            needs[place.device].weights += place.bytes;
        }
        needs
    }
}

/// A model whose weights are on their devices. Cloning shares them.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    model: Arc<Model>,
    devices: Devices,
    plans: Plans,
    weights: Weights,
}

/// Weights that lie in a file's map are read as they are needed; for those that have to be made the host needs memory, and
/// a system that hands out more than it has ends the process. Swap does not count: experts are read with every token.
fn check_memory(model: &Model, devices: &Devices, plans: &Plans) -> Result<(), Error> {
    let is_host = |device: DeviceIndex| devices[device].info().kind.shares_main_memory();
    let mut made: HashSet<(&str, DeviceIndex)> = HashSet::new();
    let mut requested = 0;
    for plan in [&plans.decode, &plans.prefill] {
        for place in plan.weights.iter().filter(|place| is_host(place.device)) {
            let name = plan.graph().storages()[place.storage].name.as_str();
            if model.is_made(name) && made.insert((name, place.device)) {
                requested += place.bytes;
            }
        }
    }
    let info = devices[devices.host()].info();
    // 0 where the system does not tell.
    if info.memory_free == 0 || requested <= info.memory_free {
        return Ok(());
    }
    let error = DeviceError::OutOfMemory {
        device: info.name.clone(),
        what: "weights that are made of what the files have".to_owned(),
        requested,
        available: info.memory_free,
    };
    Err(LoadError::Device { name: model.checkpoint().path().display().to_string(), error }.into())
}

impl Engine {
    /// Plans, and loads the weights.
    ///
    /// # Errors
    /// As [`Plans::new`] and [`Engine::load`].
    pub fn new(
        model: &Arc<Model>,
        devices: &Devices,
        placement: &Placement,
        options: &Options,
    ) -> Result<Engine, Error> {
        let plans = Plans::new(model, devices, placement, options)?;
        Self::load(model, devices, plans, &mut |_| ())
    }

    /// Loads the weights as the plans have it, telling how far it is.
    ///
    /// # Errors
    /// [`Error::Load`], naming the weight, or if main memory has no room for all that have to be made of what the files
    /// have; [`Error::Advised`] for one that an accelerator has no room for.
    pub fn load(
        model: &Arc<Model>,
        devices: &Devices,
        plans: Plans,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Engine, Error> {
        check_memory(model, devices, &plans)?;
        let weights = Weights::load_for(&[&plans.decode, &plans.prefill], devices, &**model, progress);
        let weights = weights.map_err(|error| Error::from(error).advised(devices))?;
        let shared = Shared { model: Arc::clone(model), devices: devices.clone(), plans, weights };
        Ok(Engine { shared: Arc::new(shared) })
    }

    /// The same model without the devices of this name, when they are lost: what they had to do is the host's, which
    /// loads the weights for it. All others keep what they have.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn without(&self, device: &str, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Engine, Error> {
        let Shared { model, devices, plans, weights } = &*self.shared;
        let plans = plans.without(&self.called(device), devices)?;
        check_memory(model, devices, &plans)?;
        let weights = weights.load_rest(&[&plans.decode, &plans.prefill], devices, &**model, progress);
        let weights = weights.map_err(|error| Error::from(error).advised(devices))?;
        let shared = Shared { model: Arc::clone(model), devices: devices.clone(), plans, weights };
        Ok(Engine { shared: Arc::new(shared) })
    }

    /// The accelerators of this name: several, where one was opened more than once.
    pub(crate) fn called(&self, device: &str) -> Vec<DeviceIndex> {
        let devices = &self.shared.devices;
        (0..devices.host()).filter(|index| devices[*index].info().name == device).collect()
    }

    /// A session with empty caches.
    ///
    /// # Errors
    /// [`Error::Load`] if a device has no room for its caches, [`Error::Run`] if not for the work (as
    /// [`Error::Advised`] where it is an accelerator), [`SessionError::Memory`](crate::SessionError::Memory) if there is none for the tokens.
    pub fn session(&self) -> Result<Session, Error> {
        Session::new(self)
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.shared.model
    }

    /// The devices.
    pub fn devices(&self) -> &Devices {
        &self.shared.devices
    }

    /// The plans that steps follow.
    pub fn plans(&self) -> &Plans {
        &self.shared.plans
    }

    /// Tokens that a session can hold.
    pub fn context(&self) -> usize {
        self.shared.plans.prefill_capacity.kv_len
    }

    /// Format of the caches.
    pub fn cache_type(&self) -> CacheType {
        self.shared.plans.cache
    }

    pub(crate) fn precision(&self) -> Precision {
        self.shared.plans.precision
    }

    pub(crate) fn prefill_capacity(&self) -> Capacity {
        self.shared.plans.prefill_capacity
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.shared.weights
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("model", &self.shared.model)
            .field("devices", &self.shared.devices)
            .finish_non_exhaustive()
    }
}

fn option(option: &'static str, expected: impl Into<String>, found: impl fmt::Display) -> Error {
    Error::Option { option, expected: expected.into(), found: found.to_string() }
}
