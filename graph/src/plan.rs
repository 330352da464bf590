//! The plan: what runs where, in which order, what crosses, and where every byte lies. A value: it prints,
//! compares and serialises, and never changes while it runs.

use crate::{
    assign::{AssignError, Facts, FallBack, Reason, Rules, Traffic, assign, recount},
    devices::{DeviceIndex, Devices},
    facts::{facts, in_step},
    graph::{Graph, NodeIndex, StorageIndex, StorageKind},
    memory::{Memory, memory},
    placement::Placement,
    split::{Split, split},
    transfer::{Transfer, transfers},
};
use backend_api::{Capacity, Step};
use serde::{Serialize, Serializer, ser::SerializeStruct};
use std::sync::Arc;
use thiserror::Error;

/// Why there is no plan.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum PlanError {
    /// The placement names a device that is not there.
    #[error("{what}: expected a device below {devices}, found {device}")]
    NoDevice {
        /// What was to go there.
        what: String,
        /// The index given.
        device: DeviceIndex,
        /// How many there are.
        devices: usize,
    },
    /// The placement names a weight or state that the graph does not have.
    #[error("the graph has no {what} called {name}")]
    Unknown {
        /// Weight or state.
        what: &'static str,
        /// The name given.
        name: String,
    },
    /// The capacity has no room for a step, or a state has fewer rows.
    #[error("capacity: {0}")]
    Capacity(String),
    /// No device runs this node.
    #[error("no device runs {node}: {}", why.join("; "))]
    Nobody {
        /// The node's name.
        node: String,
        /// What each device says.
        why: Vec<String>,
    },
    /// The owner of a state cannot write it.
    #[error("{node} must run where its state is: {why}; place the state elsewhere")]
    Store {
        /// The store's name.
        node: String,
        /// What the owner says.
        why: String,
    },
    /// A node cannot run where it belongs, and [`Placement::strict`] forbids that it runs elsewhere.
    #[error("{node} must run where it belongs (strict): {why}")]
    Strict {
        /// The node's name.
        node: String,
        /// What the device says.
        why: String,
    },
}

/// A whole storage on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// What.
    pub storage: StorageIndex,
    /// Where.
    pub device: DeviceIndex,
    /// Its bytes.
    pub bytes: u64,
}

/// Bytes that a plan needs on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// Weights.
    pub weights: u64,
    /// States.
    pub states: u64,
    /// What a step makes and moves.
    pub scratch: u64,
}

impl Needs {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.states + self.scratch
    }
}

/// A plan of one graph on some devices, for steps within a capacity.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    graph: Arc<Graph>,
    facts: Facts,
    placement: Placement,
    /// Bounds of the steps.
    pub capacity: Capacity,
    /// Names of the devices; the last is the host.
    pub devices: Vec<String>,
    /// The owner of each node.
    pub owners: Vec<DeviceIndex>,
    /// Why, for each node.
    pub reasons: Vec<Reason>,
    /// Nodes in the order in which they run.
    pub order: Vec<NodeIndex>,
    /// Runs of one owner.
    pub splits: Vec<Split>,
    /// What crosses, in the order of the splits it is for.
    pub transfers: Vec<Transfer>,
    /// Where the bytes of a step lie.
    pub memory: Memory,
    /// The weights that are read, on every device that reads them.
    pub weights: Vec<Place>,
    /// The states, at their owners.
    pub states: Vec<Place>,
    /// Nodes that do not run where they belong.
    pub fall_backs: Vec<FallBack>,
}

impl Plan {
    /// Plans the graph for steps within `capacity`. Asks questions only: nothing is allocated on any device.
    ///
    /// # Errors
    /// [`PlanError`], naming what in the placement, the capacity or the devices stands in the way.
    pub fn new(
        graph: &Graph,
        placement: &Placement,
        devices: &Devices,
        capacity: Capacity,
    ) -> Result<Plan, PlanError> {
        check_capacity(graph, capacity)?;
        let facts = facts(graph, placement, devices, capacity)?;
        let rules = placement.rules();
        let mut assignment =
            assign(&facts, &rules).map_err(|error| in_words(graph, devices, &facts, error))?;
        for fall_back in &mut assignment.fall_backs {
            fall_back.why = why_not(graph, devices, fall_back.node, fall_back.wanted);
        }
        let owners = assignment.owners;
        let (order, mut splits) = split(&facts, &owners);
        let transfers = transfers(&facts, &owners, &order, &mut splits);
        let memory = memory(&facts, &owners, &order, &splits, &transfers);
        let weights = weights(&facts, &owners);
        let states = states(&facts);
        Ok(Plan {
            graph: Arc::new(graph.clone()),
            facts,
            placement: placement.clone(),
            capacity,
            devices: devices.names(),
            owners,
            reasons: assignment.reasons,
            order,
            splits,
            transfers,
            memory,
            weights,
            states,
            fall_backs: assignment.fall_backs,
        })
    }

    /// What is planned.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// What was known of it.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What the user wished.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Whether this weight or state is where it is for want of room elsewhere.
    pub fn is_for_room(&self, name: &str) -> bool {
        self.placement.for_room.contains(name)
    }

    /// Bytes that cross in a step.
    pub fn traffic(&self, step: &Step) -> Traffic {
        let mut sum = Traffic::default();
        for transfer in &self.transfers {
            sum += Traffic::of(transfer.kind, transfer.span.bytes(step) as u64);
        }
        sum
    }

    /// The fall-backs with what they cost in a step, which may be smaller than the largest.
    pub fn fall_backs_in(&self, step: &Step) -> Vec<FallBack> {
        if self.fall_backs.is_empty() {
            return Vec::new();
        }
        recount(&in_step(&self.facts, &self.graph, step), &self.owners, &self.fall_backs)
    }

    /// Bytes that each device must have.
    pub fn needs(&self) -> Vec<Needs> {
        let mut needs = vec![Needs::default(); self.devices.len()];
        for place in &self.weights {
            needs[place.device].weights += place.bytes;
        }
        for place in &self.states {
            needs[place.device].states += place.bytes;
        }
        for (device, arena) in self.memory.arenas.iter().enumerate() {
            needs[device].scratch += arena;
        }
        needs
    }
}

impl Placement {
    /// How assignment behaves under these wishes.
    pub fn rules(&self) -> Rules {
        Rules { absorb: self.absorb.clone(), ownership_check: self.ownership_check, strict: self.strict }
    }
}

/// Token positions are I32 on devices.
const MOST_ROWS: usize = i32::MAX as usize;

fn check_capacity(graph: &Graph, capacity: Capacity) -> Result<(), PlanError> {
    let Capacity { rows, outputs, kv_len } = capacity;
    if let Some(found) = [rows, outputs, kv_len].into_iter().find(|&n| n > MOST_ROWS) {
        return Err(PlanError::Capacity(format!("expected at most {MOST_ROWS}, found {found}")));
    }
    if rows == 0 || kv_len < rows {
        let found = format!("expected 1 row or more, and as many cached, found {rows} and {kv_len}");
        return Err(PlanError::Capacity(found));
    }
    for (_, state) in graph.storages_of(StorageKind::State) {
        let room = state.desc.shape.extents()[0].fixed().unwrap_or(0);
        if room < kv_len {
            let found = format!("state {} has {room} rows, fewer than {kv_len}", state.name);
            return Err(PlanError::Capacity(found));
        }
    }
    Ok(())
}

/// Each device loads what its nodes read.
fn weights(facts: &Facts, owners: &[DeviceIndex]) -> Vec<Place> {
    let mut places = Vec::new();
    for (node, &device) in facts.nodes.iter().zip(owners) {
        for read in &node.reads {
            let storage = &facts.storages[read.storage];
            if storage.kind == StorageKind::Weight {
                places.push(Place { storage: read.storage, device, bytes: storage.bytes });
            }
        }
    }
    places.sort_unstable();
    places.dedup();
    places
}

fn states(facts: &Facts) -> Vec<Place> {
    let all = facts.storages.iter().enumerate().filter(|(_, s)| s.kind == StorageKind::State);
    all.map(|(storage, s)| Place { storage, device: s.home.unwrap_or(facts.host()), bytes: s.bytes })
        .collect()
}

fn why_not(graph: &Graph, devices: &Devices, node: NodeIndex, device: DeviceIndex) -> String {
    match devices[device].supports(&graph.describe(&graph.nodes()[node])) {
        Err(unsupported) => unsupported.to_string(),
        Ok(()) => format!("{} can run it", devices[device].info().name),
    }
}

fn in_words(graph: &Graph, devices: &Devices, facts: &Facts, error: AssignError) -> PlanError {
    let name = |node: NodeIndex| graph.nodes()[node].name.clone();
    let why = |node, device| why_not(graph, devices, node, device);
    match error {
        AssignError::Nobody { node } => {
            let why = (0..facts.devices).map(|device| why(node, device)).collect();
            PlanError::Nobody { node: name(node), why }
        }
        AssignError::Store { node, device } => PlanError::Store { node: name(node), why: why(node, device) },
        AssignError::Strict { node, device } => {
            PlanError::Strict { node: name(node), why: why(node, device) }
        }
    }
}

/// The decisions; the graph is its builder's to keep.
impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Capacity { rows, outputs, kv_len } = self.capacity;
        let mut plan = serializer.serialize_struct("Plan", 11)?;
        plan.serialize_field("capacity", &[("rows", rows), ("outputs", outputs), ("kv_len", kv_len)])?;
        plan.serialize_field("devices", &self.devices)?;
        plan.serialize_field("owners", &self.owners)?;
        plan.serialize_field("reasons", &self.reasons)?;
        plan.serialize_field("order", &self.order)?;
        plan.serialize_field("splits", &self.splits)?;
        plan.serialize_field("transfers", &self.transfers)?;
        plan.serialize_field("memory", &self.memory)?;
        plan.serialize_field("weights", &self.weights)?;
        plan.serialize_field("states", &self.states)?;
        plan.serialize_field("fall_backs", &self.fall_backs)?;
        plan.end()
    }
}
