//! Who computes what, and why.
//!
//! Assignment sees [`Facts`] only: what each node reads and writes, how many bytes that is, where weights and
//! states live, which region a node belongs to, and which devices can run it. It knows no operation and no name,
//! so that it can be tried on any graph. It runs in stages, one file each, every one a function from facts and the
//! owners so far to more owners:
//!
//! 1. `pin`: what the user placed, and stores;
//! 2. `claim`: states claim the nodes of their regions (the ownership check);
//! 3. `follow_weights`: a node goes where its weight is;
//! 4. `expand_down`: along data flow, what is open goes to its producer's device;
//! 5. `expand_up`: against it, to its consumer's;
//! 6. `settle`: what expansion decided is decided again at borders, by the fewest bytes;
//! 7. `fall_back`: what its owner cannot run goes elsewhere; what that costs is reported.

mod claim;
mod cut;
mod expand_down;
mod expand_up;
mod fall_back;
mod follow_weights;
mod moves;
mod pin;
#[cfg(test)]
mod sample;
mod settle;
mod traffic;

use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, Region, StorageIndex, StorageKind},
    placement::Absorb,
    span::Span,
};
use serde::Serialize;
use thiserror::Error;

pub(crate) use fall_back::recount;
pub use traffic::Traffic;

/// What is known of a graph before anybody owns a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// How many devices; the last is the host, where inputs are.
    pub devices: usize,
    /// Rows of the largest step: activations have so many times the bytes of one.
    pub rows: usize,
    /// Everything that holds bytes.
    pub storages: Vec<StorageFacts>,
    /// In an order that respects data flow.
    pub nodes: Vec<NodeFacts>,
}

/// A storage.
#[derive(Clone, Debug, PartialEq)]
pub struct StorageFacts {
    /// What its bytes are.
    pub kind: StorageKind,
    /// All of them, in the largest step.
    pub bytes: u64,
    /// Where a weight or state is; `None` for a weight that each reader's home has a copy of.
    pub home: Option<DeviceIndex>,
    /// Whether that was said, by the user or for want of room elsewhere, which nobody overrules.
    pub placed_by_user: bool,
    /// Whether it can be read after the step.
    pub output: bool,
}

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeFacts {
    /// What it reads.
    pub reads: Vec<Read>,
    /// The storages it makes, or the state it writes.
    pub writes: Vec<StorageIndex>,
    /// The nodes that must run before it.
    pub after: Vec<NodeIndex>,
    /// Where it would be, if nothing else spoke: its layer's device.
    pub home: Option<DeviceIndex>,
    /// The state whose region it belongs to.
    pub region: Option<Region>,
    /// Which devices can run it.
    pub runs_on: DeviceSet,
}

/// A view that a node reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Of what.
    pub storage: StorageIndex,
    /// Which bytes.
    pub span: Span,
    /// How many, in the largest step.
    pub bytes: u64,
    /// The node that wrote them.
    pub producer: Option<NodeIndex>,
}

/// A set of devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceSet(u64);

impl DeviceSet {
    /// The first `n` devices.
    pub fn first(n: usize) -> Self {
        DeviceSet(if n >= 64 { u64::MAX } else { (1 << n) - 1 })
    }

    /// With this device.
    pub fn with(self, device: DeviceIndex) -> Self {
        DeviceSet(self.0 | 1 << device)
    }

    /// Without this device.
    pub fn without(self, device: DeviceIndex) -> Self {
        DeviceSet(self.0 & !(1 << device))
    }

    /// Whether the device is in it.
    pub fn contains(self, device: DeviceIndex) -> bool {
        self.0 >> device & 1 == 1
    }

    /// In order of priority.
    pub fn iter(self) -> impl Iterator<Item = DeviceIndex> {
        (0..64).filter(move |device| self.contains(*device))
    }
}

/// How the stages behave.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Where the edges of regions run.
    pub absorb: Absorb,
    /// Whether states claim the nodes of their regions.
    pub ownership_check: bool,
    /// Whether a [fall-back](FallBack) is an error.
    pub strict: bool,
}

/// Why a node is where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Reason {
    /// It reads a weight that was placed there, or (with the ownership check off) writes the state there.
    Pinned(StorageIndex),
    /// It belongs to the region of this state, which lives there.
    RegionOf(StorageIndex),
    /// It reads this weight, which lives there.
    FollowsWeight(StorageIndex),
    /// This producer is there.
    ExpandedDown(NodeIndex),
    /// This consumer is there.
    ExpandedUp(NodeIndex),
    /// Nothing that has a place is connected to it: its layer is there.
    Home,
    /// Nowhere do fewer bytes of activations and inputs cross with it.
    FewerBytes,
    /// This device should have it and cannot run it.
    FellBack(DeviceIndex),
}

impl Reason {
    /// Whether only neighbours had a say in the node's place.
    fn is_of_neighbours(self) -> bool {
        use Reason::{ExpandedDown, ExpandedUp, FewerBytes, Home};
        matches!(self, ExpandedDown(_) | ExpandedUp(_) | FewerBytes | Home)
    }
}

/// A node that does not run where it belongs. One that nothing but its neighbours places belongs anywhere where no more
/// bytes cross in the largest step; with three devices and more, such a place may be overlooked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FallBack {
    /// Which.
    pub node: NodeIndex,
    /// Where it belongs.
    pub wanted: DeviceIndex,
    /// Where it runs.
    pub runs_on: DeviceIndex,
    /// Neighbours that went along, which saves bytes, and where they would be without it.
    pub along: Vec<(NodeIndex, DeviceIndex)>,
    /// Bytes that cross for it and `along` in the largest step, more than if all had stayed that fell back after it: less
    /// than nothing, where those before it paid for it. Together, the fall-backs of two devices cost what their plan moves
    /// more than one in which every device runs what it should.
    pub bytes: i64,
    /// Of these, bytes of states.
    pub state_bytes: i64,
    /// Why its device cannot run it.
    pub why: String,
}

/// Why nobody can own a node.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AssignError {
    /// No device runs it.
    #[error("no device runs node {node}")]
    Nobody {
        /// Which.
        node: NodeIndex,
    },
    /// The owner of a state cannot write it.
    #[error("device {device} owns the state that node {node} writes, and cannot run it")]
    Store {
        /// The store.
        node: NodeIndex,
        /// The owner.
        device: DeviceIndex,
    },
    /// A node would fall back, and the user forbade that.
    #[error("device {device} cannot run node {node}, and nothing may fall back")]
    Strict {
        /// Which.
        node: NodeIndex,
        /// Where it belongs.
        device: DeviceIndex,
    },
}

/// The result of the stages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The owner of each node.
    pub owners: Vec<DeviceIndex>,
    /// Why, for each node.
    pub reasons: Vec<Reason>,
    /// Nodes that do not run where they belong; `why` is still empty.
    pub fall_backs: Vec<FallBack>,
}

impl Assignment {
    /// A neighbour that a reason names may have moved since, or fallen back: another that is there takes its place, and
    /// where there is none, the bytes decided.
    fn renew_reasons(&mut self, facts: &Facts) {
        let producers = |node: NodeIndex| facts.nodes[node].reads.iter().filter_map(|read| read.producer);
        let mut consumers = vec![Vec::new(); facts.nodes.len()];
        for node in 0..facts.nodes.len() {
            producers(node).for_each(|producer| consumers[producer].push(node));
        }
        let owners = &self.owners;
        for (node, reason) in self.reasons.iter_mut().enumerate() {
            let owner = owners[node];
            if *reason == Reason::Home && facts.home(node) != owner {
                *reason = Reason::FewerBytes;
            }
            let (Reason::ExpandedDown(named) | Reason::ExpandedUp(named)) = *reason else { continue };
            if owners[named] == owner {
                continue;
            }
            let producer = producers(node).find(|&producer| owners[producer] == owner);
            let consumer = consumers[node].iter().copied().find(|&consumer| owners[consumer] == owner);
            *reason = match (producer, consumer) {
                (Some(producer), _) => Reason::ExpandedDown(producer),
                (None, Some(consumer)) => Reason::ExpandedUp(consumer),
                (None, None) if facts.home(node) == owner => Reason::Home,
                (None, None) => Reason::FewerBytes,
            };
        }
    }
}

/// Owners as far as they are known, while the stages run.
#[derive(Clone, Debug)]
struct Draft {
    owners: Vec<Option<DeviceIndex>>,
    reasons: Vec<Reason>,
    /// Where each weight and state is, once regions have drawn their weights.
    homes: Vec<Option<DeviceIndex>>,
    /// The nodes that read each storage.
    readers: Vec<Vec<NodeIndex>>,
    /// The node that makes each storage; of a state, none.
    makers: Vec<Option<NodeIndex>>,
}

impl Draft {
    fn new(facts: &Facts) -> Self {
        let mut readers = vec![Vec::new(); facts.storages.len()];
        let mut makers = vec![None; facts.storages.len()];
        for (index, node) in facts.nodes.iter().enumerate() {
            for read in &node.reads {
                if readers[read.storage].last() != Some(&index) {
                    readers[read.storage].push(index);
                }
            }
            for &storage in &node.writes {
                if facts.storages[storage].kind == StorageKind::Activation {
                    makers[storage] = Some(index);
                }
            }
        }
        Draft {
            owners: vec![None; facts.nodes.len()],
            reasons: vec![Reason::Home; facts.nodes.len()],
            homes: facts.storages.iter().map(|s| s.home).collect(),
            readers,
            makers,
        }
    }

    fn own(&mut self, node: NodeIndex, device: DeviceIndex, reason: Reason) {
        self.owners[node] = Some(device);
        self.reasons[node] = reason;
    }
}

impl Facts {
    /// The host's index.
    pub fn host(&self) -> DeviceIndex {
        self.devices - 1
    }

    /// The devices that can run a node, in order of priority.
    fn able(&self, node: NodeIndex) -> impl Iterator<Item = DeviceIndex> {
        self.nodes[node].runs_on.iter().take_while(|&device| device < self.devices)
    }

    /// What a node reads and writes.
    fn touched(&self, node: NodeIndex) -> impl Iterator<Item = StorageIndex> {
        let NodeFacts { reads, writes, .. } = &self.nodes[node];
        reads.iter().map(|read| read.storage).chain(writes.iter().copied())
    }

    /// What nodes read and write, each once.
    fn touched_by(&self, nodes: &[NodeIndex]) -> Vec<StorageIndex> {
        let mut touched: Vec<StorageIndex> = nodes.iter().flat_map(|&node| self.touched(node)).collect();
        touched.sort_unstable();
        touched.dedup();
        touched
    }

    /// Where a node would be if nothing else spoke.
    fn home(&self, node: NodeIndex) -> DeviceIndex {
        self.nodes[node].home.unwrap_or(self.host())
    }

    /// The largest weight that a node reads and `wanted` accepts.
    fn largest_weight(
        &self,
        node: NodeIndex,
        wanted: impl Fn(&StorageFacts) -> bool,
    ) -> Option<StorageIndex> {
        let weights = self.nodes[node].reads.iter().map(|read| read.storage).filter(|&s| {
            let storage = &self.storages[s];
            storage.kind == StorageKind::Weight && wanted(storage)
        });
        // The first of equals.
        weights.rev().max_by_key(|&s| self.storages[s].bytes)
    }
}

/// A stage, for those who watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the stages are documented at the module")]
pub enum Stage {
    Pin,
    Claim,
    FollowWeights,
    ExpandDown,
    ExpandUp,
    Settle,
}

/// Is shown a stage, the owners after it, and their reasons.
pub type Watch<'a> = dyn FnMut(Stage, &[Option<DeviceIndex>], &[Reason]) + 'a;

/// Runs all stages.
///
/// # Errors
/// [`AssignError`]: a node that nobody may run.
pub fn assign(facts: &Facts, rules: &Rules) -> Result<Assignment, AssignError> {
    assign_watched(facts, rules, &mut |_, _, _| ())
}

/// Runs all stages, and shows `watch` the owners and their reasons after each but the last, whose work is the
/// result. The reason of a node without an owner means nothing.
///
/// # Errors
/// As [`assign`].
pub fn assign_watched(
    facts: &Facts,
    rules: &Rules,
    watch: &mut Watch<'_>,
) -> Result<Assignment, AssignError> {
    let mut draft = Draft::new(facts);
    pin::pin(facts, rules, &mut draft);
    watch(Stage::Pin, &draft.owners, &draft.reasons);
    if rules.ownership_check {
        claim::claim(facts, rules, &mut draft);
        watch(Stage::Claim, &draft.owners, &draft.reasons);
    }
    follow_weights::follow_weights(facts, &mut draft);
    watch(Stage::FollowWeights, &draft.owners, &draft.reasons);
    expand_down::expand_down(facts, &mut draft);
    watch(Stage::ExpandDown, &draft.owners, &draft.reasons);
    expand_up::expand_up(facts, &mut draft);
    watch(Stage::ExpandUp, &draft.owners, &draft.reasons);
    settle::settle(facts, &mut draft);
    watch(Stage::Settle, &draft.owners, &draft.reasons);
    let mut assignment = fall_back::fall_back(facts, rules, draft)?;
    assignment.renew_reasons(facts);
    Ok(assignment)
}
