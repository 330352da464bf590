//! The user's wishes as data: which device has which layer, weight and state. Options are typed and parsed
//! elsewhere; what arrives here is resolved to names of the graph and indices of devices.

use crate::devices::DeviceIndex;
use std::collections::{BTreeMap, BTreeSet};

/// Where the products beside a cache (`q_absorb`, `v_absorb`) run, and their weights are loaded.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Absorb {
    /// At the owner of the cache: neither state nor weight crosses, and the fewest activation bytes.
    #[default]
    Owner,
    /// With their layer: more activation bytes cross, the owner reads fewer weights from its memory.
    Layer,
    /// Each where it takes less time by these rates.
    Auto(Rates),
}

/// Measured rates, in bytes per second.
#[derive(Clone, Debug, PartialEq)]
pub struct Rates {
    /// Across the bus between two devices.
    pub bus: f64,
    /// Of each device's own memory, by [`DeviceIndex`]; a missing one is taken to be as fast as the bus.
    pub memory: Vec<f64>,
}

/// What the user wants. The default has everything on the host, and the check on.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// The device of each [layer](crate::GraphBuilder::layer); those past the end, and nodes without a layer, are
    /// on the host. A layer's nodes, weights and states go to its device unless something else claims them.
    pub layers: Vec<DeviceIndex>,
    /// Weights that were placed, by name: obeyed always.
    pub weights: BTreeMap<String, DeviceIndex>,
    /// Owners of states, by name, where they are not their layer's device.
    pub states: BTreeMap<String, DeviceIndex>,
    /// Names of weights and states that are where they are for want of room elsewhere, and not because the user said so.
    /// They change no owner, only the words of reasons.
    pub for_room: BTreeSet<String>,
    /// Where the edges of regions run.
    pub absorb: Absorb,
    /// Whether states claim the nodes of their regions. Off, only the store stays with its state: the defect this
    /// project is about, for measuring.
    pub ownership_check: bool,
    /// Whether a [fall-back](crate::FallBack) is an error: a node that its device cannot run, unless nothing but its
    /// neighbours places it and no more bytes cross with it elsewhere.
    pub strict: bool,
}

impl Default for Placement {
    fn default() -> Self {
        Placement {
            layers: Vec::new(),
            weights: BTreeMap::new(),
            states: BTreeMap::new(),
            for_room: BTreeSet::new(),
            absorb: Absorb::Owner,
            ownership_check: true,
            strict: false,
        }
    }
}

impl Placement {
    /// All `layers` (with the output, which counts as one) on one device.
    pub fn all_on(device: DeviceIndex, layers: usize) -> Self {
        Placement { layers: vec![device; layers], ..Self::default() }
    }
}
