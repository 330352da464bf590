//! Small graphs for the stages' tests. Device 0 is an accelerator, 1 the host.

use super::{DeviceSet, Draft, Facts, NodeFacts, Read, Rules, StorageFacts};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, Part, Region, StorageIndex, StorageKind},
    placement::Absorb,
    span::Span,
};

pub(super) const GPU: DeviceIndex = 0;
pub(super) const CPU: DeviceIndex = 1;

pub(super) const RULES: Rules = Rules { absorb: Absorb::Owner, ownership_check: true, strict: false };

pub(super) struct Sample(pub Facts);

impl Sample {
    pub fn new() -> Self {
        Sample(Facts { devices: 2, rows: 1, storages: Vec::new(), nodes: Vec::new() })
    }

    fn storage(
        &mut self,
        kind: StorageKind,
        bytes: u64,
        home: Option<DeviceIndex>,
        by_user: bool,
    ) -> StorageIndex {
        self.0.storages.push(StorageFacts { kind, bytes, home, placed_by_user: by_user, output: false });
        self.0.storages.len() - 1
    }

    pub fn input(&mut self, bytes: u64) -> StorageIndex {
        self.storage(StorageKind::Input, bytes, None, false)
    }

    pub fn weight(&mut self, bytes: u64, home: DeviceIndex) -> StorageIndex {
        self.storage(StorageKind::Weight, bytes, Some(home), false)
    }

    pub fn placed_weight(&mut self, bytes: u64, home: DeviceIndex) -> StorageIndex {
        self.storage(StorageKind::Weight, bytes, Some(home), true)
    }

    pub fn state(&mut self, bytes: u64, home: DeviceIndex) -> StorageIndex {
        self.storage(StorageKind::State, bytes, Some(home), false)
    }

    /// A node that reads these whole and makes so many bytes: its index and what it makes.
    pub fn node(&mut self, reads: &[StorageIndex], bytes: u64) -> (NodeIndex, StorageIndex) {
        let index = self.0.nodes.len();
        let made = self.storage(StorageKind::Activation, bytes, None, false);
        let read = |&storage: &StorageIndex| {
            let producer = self.0.nodes.iter().position(|node| node.writes.contains(&storage));
            let bytes = self.0.storages[storage].bytes;
            Read { storage, span: Span::fixed(0, bytes as usize), bytes, producer }
        };
        let reads: Vec<Read> = reads.iter().map(read).collect();
        let after = reads.iter().filter_map(|read| read.producer).collect();
        let runs_on = DeviceSet::first(self.0.devices);
        let home = None;
        self.0.nodes.push(NodeFacts { reads, writes: vec![made], after, home, region: None, runs_on });
        (index, made)
    }

    /// The node belongs to the region of a state.
    pub fn member(&mut self, node: NodeIndex, state: StorageIndex, part: Part) {
        self.0.nodes[node].region = Some(Region { state, part });
    }

    /// A node that writes a state.
    pub fn store(&mut self, reads: &[StorageIndex], state: StorageIndex) -> NodeIndex {
        let (node, _) = self.node(reads, 0);
        self.0.nodes[node].writes = vec![state];
        self.member(node, state, Part::Core);
        node
    }

    pub fn draft(&self) -> Draft {
        Draft::new(&self.0)
    }
}

/// Weights around a cache, as in an attention layer: everything on the accelerator but the cache.
pub(super) struct Layer {
    pub sample: Sample,
    pub state: StorageIndex,
    pub q_absorb: NodeIndex,
    pub concat: NodeIndex,
    pub store: NodeIndex,
    pub attention: NodeIndex,
    pub v_absorb: NodeIndex,
    pub out: NodeIndex,
    pub k_b: StorageIndex,
    pub v_b: StorageIndex,
}

pub(super) fn layer() -> Layer {
    let mut sample = Sample::new();
    let state = sample.state(4096, CPU);
    let (w, k_b, v_b) = (sample.weight(900, GPU), sample.weight(500, GPU), sample.weight(500, GPU));
    let x = sample.input(8);
    let (_, q) = sample.node(&[w, x], 80);
    let (_, row) = sample.node(&[w, x], 40);
    let (q_absorb, latent) = sample.node(&[k_b, q], 160);
    sample.member(q_absorb, state, Part::Edge);
    let (concat, query) = sample.node(&[latent, q], 200);
    let store = sample.store(&[row], state);
    let (attention, context) = sample.node(&[query, state], 160);
    sample.member(attention, state, Part::Core);
    let (v_absorb, values) = sample.node(&[v_b, context], 80);
    sample.member(v_absorb, state, Part::Edge);
    let (out, _) = sample.node(&[w, values], 64);
    Layer { sample, state, q_absorb, concat, store, attention, v_absorb, out, k_b, v_b }
}
