//! Loading weights and keeping states: the bytes that outlive steps.

use crate::{devices::Devices, plan::Plan};
use backend_api::{BufferRef, BufferRequest, BufferUsage, DeviceError, HostBytes};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
    sync::Arc,
};
use thiserror::Error;

/// What a source says when it has no such tensor.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Where weights come from.
pub trait WeightSource {
    /// The bytes of a weight, in the format and shape that the graph declared, dense.
    ///
    /// # Errors
    /// The source's own.
    fn weight(&self, name: &str) -> Result<WeightBytes, SourceError>;
}

/// The bytes of one weight, inside bytes that may be a whole mapped file. Ranges of the same [`HostBytes`] (by
/// pointer) are imported by a device once.
#[derive(Clone)]
pub struct WeightBytes {
    /// The map, or a vector.
    pub bytes: HostBytes,
    /// Where the weight is in it.
    pub range: Range<usize>,
}

impl WeightBytes {
    /// The weight's bytes.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for WeightBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightBytes").field("range", &self.range).finish_non_exhaustive()
    }
}

/// Why weights or states are not on their devices.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The source has no such weight, or cannot read it.
    #[error("weight {name}: {source}")]
    Source {
        /// The weight.
        name: String,
        /// What the source says.
        source: SourceError,
    },
    /// The source's bytes are not those of the declared tensor.
    #[error("weight {name}: expected {expected} bytes, found {found}")]
    Size {
        /// The weight.
        name: String,
        /// Bytes of the declared tensor.
        expected: usize,
        /// Bytes of the source.
        found: usize,
    },
    /// The device refused.
    #[error("{name}: {error}")]
    Device {
        /// The weight or state, or the model.
        name: String,
        /// What the device says.
        error: DeviceError,
    },
    /// No state of this name.
    #[error("no state is called {0}")]
    UnknownState(String),
    /// Bytes beyond the end of a state.
    #[error("state {name}: bytes {range:?} of {size}")]
    Range {
        /// The state.
        name: String,
        /// Asked for.
        range: Range<usize>,
        /// Bytes it has.
        size: usize,
    },
}

/// How far loading is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The weight being loaded.
    pub name: &'a str,
    /// Bytes done, of all devices.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Bytes of a device that a program reads.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub buffer: BufferRef,
    pub offset: usize,
}

/// Weights on their devices. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Weights {
    /// By name and device.
    placed: Arc<HashMap<(String, usize), Placed>>,
}

/// Bytes written to a device between two reports of progress.
const CHUNK: usize = 16 << 20;

impl Weights {
    /// Loads the weights that some node of the plan reads, each onto the devices that read it. A device that can
    /// use the source's bytes where they are gets no copy.
    ///
    /// # Errors
    /// [`LoadError`], naming the weight.
    pub fn load(
        plan: &Plan,
        devices: &Devices,
        source: &dyn WeightSource,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self, LoadError> {
        Self::load_for(&[plan], devices, source, progress)
    }

    /// As [`Weights::load`], for plans that share their weights (decode and prefill).
    ///
    /// # Errors
    /// [`LoadError`], naming the weight.
    pub fn load_for(
        plans: &[&Plan],
        devices: &Devices,
        source: &dyn WeightSource,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self, LoadError> {
        Weights { placed: Arc::default() }.load_rest(plans, devices, source, progress)
    }

    /// As [`Weights::load_for`], for other plans on the same devices: what is where they read it is kept, and only the
    /// rest loaded.
    ///
    /// # Errors
    /// [`LoadError`], naming the weight.
    pub fn load_rest(
        &self,
        plans: &[&Plan],
        devices: &Devices,
        source: &dyn WeightSource,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self, LoadError> {
        // In the graph's order, which is about the file's.
        let mut wanted: Vec<(&str, usize, usize)> = Vec::new();
        let mut seen = HashSet::new();
        for plan in plans {
            for place in &plan.weights {
                let name = plan.graph().storages()[place.storage].name.as_str();
                if seen.insert((name, place.device)) {
                    wanted.push((name, place.device, place.bytes as usize));
                }
            }
        }
        let missing = wanted.iter().filter(|(name, device, _)| self.find(name, *device).is_none());
        let total = missing.map(|(_, _, bytes)| *bytes as u64).sum();
        let mut loader = Loader { devices, source, imported: HashMap::new(), done: 0, total, progress };
        let mut placed = HashMap::with_capacity(wanted.len());
        for (name, device, bytes) in wanted {
            let place = match self.find(name, device) {
                Some(kept) => kept.clone(),
                None => loader.load(name, device, bytes)?,
            };
            placed.insert((name.to_owned(), device), place);
        }
        Ok(Weights { placed: Arc::new(placed) })
    }

    pub(crate) fn find(&self, name: &str, device: usize) -> Option<&Placed> {
        self.placed.get(&(name.to_owned(), device))
    }
}

struct Loader<'a> {
    devices: &'a Devices,
    source: &'a dyn WeightSource,
    /// What each device answered for each map, by the map's address.
    imported: HashMap<(usize, usize), Option<BufferRef>>,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Loader<'_> {
    fn load(&mut self, name: &str, device: usize, size: usize) -> Result<Placed, LoadError> {
        let fail = |error| LoadError::Device { name: name.to_owned(), error };
        let found =
            self.source.weight(name).map_err(|source| LoadError::Source { name: name.to_owned(), source })?;
        let whole = (*found.bytes).as_ref();
        let bytes = whole.get(found.range.clone()).unwrap_or_default();
        if bytes.len() != size {
            return Err(LoadError::Size { name: name.to_owned(), expected: size, found: bytes.len() });
        }
        let map = Arc::as_ptr(&found.bytes).cast::<()>() as usize;
        let target = &self.devices[device];
        let import = match self.imported.get(&(map, device)) {
            Some(known) => known.clone(),
            None => {
                let made = target.import(&found.bytes).map_err(fail)?;
                // An address names a map only while the map lives, which an imported one does.
                if made.is_some() {
                    self.imported.insert((map, device), made.clone());
                }
                made
            }
        };
        if let Some(buffer) = import {
            self.report(name, size);
            return Ok(Placed { buffer, offset: found.range.start });
        }
        let request = BufferRequest { name: name.to_owned(), size, usage: BufferUsage::Weights };
        let buffer = target.allocate(&request).map_err(fail)?;
        for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
            target.write(&buffer, index * CHUNK, chunk).map_err(fail)?;
            self.report(name, chunk.len());
        }
        Ok(Placed { buffer, offset: 0 })
    }

    fn report(&mut self, name: &str, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(Progress { name, done: self.done, total: self.total });
    }
}

/// The states of one session, each at its owner. Cloning shares them.
#[derive(Clone, Debug)]
pub struct States {
    devices: Devices,
    states: Arc<Vec<State>>,
}

#[derive(Debug)]
struct State {
    name: String,
    device: usize,
    buffer: BufferRef,
}

impl States {
    /// Zeroed states at their owners.
    ///
    /// # Errors
    /// [`LoadError::Device`], naming the state.
    pub fn allocate(plan: &Plan, devices: &Devices) -> Result<Self, LoadError> {
        let mut states = Vec::with_capacity(plan.states.len());
        for place in &plan.states {
            let name = plan.graph().storages()[place.storage].name.clone();
            let size = place.bytes as usize;
            let request = BufferRequest { name: name.clone(), size, usage: BufferUsage::State };
            let buffer = devices[place.device]
                .allocate(&request)
                .map_err(|error| LoadError::Device { name: name.clone(), error })?;
            states.push(State { name, device: place.device, buffer });
        }
        Ok(States { devices: devices.clone(), states: Arc::new(states) })
    }

    /// Names and sizes in bytes, in the graph's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, usize)> {
        self.states.iter().map(|state| (state.name.as_str(), state.buffer.size()))
    }

    /// Copies bytes from `offset` of a state, to save or to fork. Rows of a cache come in order, so the first `n`
    /// tokens are its first `n` rows.
    ///
    /// # Errors
    /// [`LoadError::UnknownState`], [`LoadError::Range`], [`LoadError::Device`].
    pub fn read(&self, name: &str, offset: usize, into: &mut [u8]) -> Result<(), LoadError> {
        let state = self.checked(name, offset, into.len())?;
        let read = self.devices[state.device].read(&state.buffer, offset, into);
        read.map_err(|error| LoadError::Device { name: name.to_owned(), error })
    }

    /// Copies bytes to `offset` of a state.
    ///
    /// # Errors
    /// As [`States::read`].
    pub fn write(&self, name: &str, offset: usize, bytes: &[u8]) -> Result<(), LoadError> {
        let state = self.checked(name, offset, bytes.len())?;
        let written = self.devices[state.device].write(&state.buffer, offset, bytes);
        written.map_err(|error| LoadError::Device { name: name.to_owned(), error })
    }

    fn checked(&self, name: &str, offset: usize, len: usize) -> Result<&State, LoadError> {
        let state = self.states.iter().find(|state| state.name == name);
        let state = state.ok_or_else(|| LoadError::UnknownState(name.to_owned()))?;
        let size = state.buffer.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(state),
            end => {
                let range = offset..end.unwrap_or(usize::MAX);
                Err(LoadError::Range { name: name.to_owned(), range, size })
            }
        }
    }

    pub(crate) fn find(&self, name: &str, device: usize) -> Option<&BufferRef> {
        let state = self.states.iter().find(|state| state.name == name && state.device == device);
        state.map(|state| &state.buffer)
    }
}
