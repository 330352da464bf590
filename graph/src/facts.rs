//! From a graph, a placement and devices to the facts that assignment sees.

use crate::{
    assign::{DeviceSet, Facts, NodeFacts, Read, StorageFacts},
    devices::{DeviceIndex, Devices},
    graph::{Graph, NodeIndex, StorageIndex, StorageKind},
    placement::Placement,
    plan::PlanError,
    span::Span,
};
use backend_api::{Capacity, Step};
use std::collections::{BTreeMap, HashSet};

/// The facts of a graph, for the largest step.
pub(crate) fn facts(
    graph: &Graph,
    placement: &Placement,
    devices: &Devices,
    capacity: Capacity,
) -> Result<Facts, PlanError> {
    check_names(graph, placement)?;
    check_devices(placement, devices)?;
    let step = capacity.full_step();
    let host = devices.host();
    let home = |node: NodeIndex| {
        let layer = graph.nodes()[node].layer;
        layer.and_then(|layer| placement.layers.get(layer).copied()).unwrap_or(host)
    };
    let mut storages: Vec<StorageFacts> = Vec::with_capacity(graph.storages().len());
    for storage in graph.storages() {
        storages.push(StorageFacts {
            kind: storage.kind,
            bytes: storage.desc.span_bytes(&step) as u64,
            home: None,
            placed_by_user: false,
            output: false,
        });
    }
    for (_, value) in graph.outputs() {
        storages[graph.info(*value).storage].output = true;
    }
    let nodes = nodes(graph, devices, &step, &storages, home);
    give_homes(graph, placement, &nodes, &mut storages, host);
    Ok(Facts { devices: devices.len(), rows: capacity.rows, storages, nodes })
}

/// The same facts with the bytes of a step.
pub(crate) fn in_step(facts: &Facts, graph: &Graph, step: &Step) -> Facts {
    let mut facts = Facts { rows: step.rows, ..facts.clone() };
    for (storage, known) in facts.storages.iter_mut().zip(graph.storages()) {
        storage.bytes = known.desc.span_bytes(step) as u64;
    }
    for read in facts.nodes.iter_mut().flat_map(|node| &mut node.reads) {
        read.bytes = read.span.bytes(step) as u64;
    }
    facts
}

fn nodes(
    graph: &Graph,
    devices: &Devices,
    step: &Step,
    storages: &[StorageFacts],
    home: impl Fn(NodeIndex) -> DeviceIndex,
) -> Vec<NodeFacts> {
    let mut order =
        StateOrder { stored: vec![None; storages.len()], readers: vec![Vec::new(); storages.len()] };
    let mut nodes = Vec::with_capacity(graph.nodes().len());
    for (index, node) in graph.nodes().iter().enumerate() {
        let mut reads = Vec::with_capacity(node.inputs.len());
        let mut after = Vec::with_capacity(node.inputs.len());
        for &input in &node.inputs {
            let info = graph.info(input);
            let kind = storages[info.storage].kind;
            let span = Span::of(info, kind);
            let bytes = span.bytes(step) as u64;
            reads.push(Read { storage: info.storage, span, bytes, producer: info.producer });
            after.extend(info.producer);
            if kind == StorageKind::State {
                order.read(info.storage, index, &mut after);
            }
        }
        let writes: Vec<StorageIndex> = node.outputs.iter().map(|&v| graph.info(v).storage).collect();
        for &storage in writes.iter().filter(|&&s| storages[s].kind == StorageKind::State) {
            order.write(storage, index, &mut after);
        }
        after.sort_unstable();
        after.dedup();
        let desc = graph.describe(node);
        let mut runs_on = DeviceSet::default();
        for (device, known) in devices.iter().enumerate() {
            if known.supports(&desc).is_ok() {
                runs_on = runs_on.with(device);
            }
        }
        nodes.push(NodeFacts { reads, writes, after, home: Some(home(index)), region: node.region, runs_on });
    }
    nodes
}

/// Stores and readers of each state stay in the builder's order.
struct StateOrder {
    stored: Vec<Option<NodeIndex>>,
    readers: Vec<Vec<NodeIndex>>,
}

impl StateOrder {
    fn read(&mut self, state: StorageIndex, node: NodeIndex, after: &mut Vec<NodeIndex>) {
        after.extend(self.stored[state]);
        self.readers[state].push(node);
    }

    fn write(&mut self, state: StorageIndex, node: NodeIndex, after: &mut Vec<NodeIndex>) {
        after.extend(self.stored[state].replace(node));
        after.extend(self.readers[state].drain(..).filter(|&reader| reader != node));
    }
}

/// Weights and states are where the user put them, else with the layer that uses them. A weight that layers of
/// different devices read has no home of its own: each reader's home has it.
fn give_homes(
    graph: &Graph,
    placement: &Placement,
    nodes: &[NodeFacts],
    storages: &mut [StorageFacts],
    host: DeviceIndex,
) {
    let mut users: Vec<Vec<DeviceIndex>> = vec![Vec::new(); storages.len()];
    for node in nodes {
        let touched = node.reads.iter().map(|read| read.storage).chain(node.writes.iter().copied());
        for storage in touched {
            users[storage].extend(node.home);
        }
    }
    for (index, storage) in graph.storages().iter().enumerate() {
        let facts = &mut storages[index];
        let (wish, of_layer) = match storage.kind {
            StorageKind::Weight => {
                let first = users[index].first().copied();
                let same = users[index].iter().all(|user| Some(*user) == first);
                (placement.weights.get(&storage.name), first.filter(|_| same))
            }
            StorageKind::State => {
                (placement.states.get(&storage.name), Some(users[index].first().copied().unwrap_or(host)))
            }
            StorageKind::Input | StorageKind::Activation => continue,
        };
        facts.placed_by_user = wish.is_some();
        facts.home = wish.copied().or(of_layer);
    }
}

fn check_names(graph: &Graph, placement: &Placement) -> Result<(), PlanError> {
    let missing = |kind, names: &BTreeMap<String, DeviceIndex>| {
        let known: HashSet<&str> =
            graph.storages_of(kind).map(|(_, storage)| storage.name.as_str()).collect();
        names.keys().find(|name| !known.contains(name.as_str())).cloned()
    };
    if let Some(name) = missing(StorageKind::Weight, &placement.weights) {
        return Err(PlanError::Unknown { what: "weight", name });
    }
    match missing(StorageKind::State, &placement.states) {
        Some(name) => Err(PlanError::Unknown { what: "state", name }),
        None => Ok(()),
    }
}

fn check_devices(placement: &Placement, devices: &Devices) -> Result<(), PlanError> {
    let layers =
        placement.layers.iter().enumerate().map(|(layer, &device)| (format!("layer {layer}"), device));
    let weights = placement.weights.iter().map(|(name, &device)| (format!("weight {name}"), device));
    let states = placement.states.iter().map(|(name, &device)| (format!("state {name}"), device));
    match layers.chain(weights).chain(states).find(|(_, device)| *device >= devices.len()) {
        Some((what, device)) => Err(PlanError::NoDevice { what, device, devices: devices.len() }),
        None => Ok(()),
    }
}
