//! Bytes that cross under a given assignment.

use super::{DeviceSet, Facts, Read};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, StorageIndex, StorageKind},
    span::Span,
};
use serde::Serialize;
use std::ops::AddAssign;

/// Bytes per step, by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Traffic {
    /// Results of nodes.
    pub activation: u64,
    /// Caches.
    pub state: u64,
    /// Weights.
    pub weight: u64,
    /// Inputs of the step.
    pub input: u64,
}

impl Traffic {
    /// Bytes of one kind.
    pub fn of(kind: StorageKind, bytes: u64) -> Self {
        let mut traffic = Traffic::default();
        match kind {
            StorageKind::Activation => traffic.activation = bytes,
            StorageKind::State => traffic.state = bytes,
            StorageKind::Weight => traffic.weight = bytes,
            StorageKind::Input => traffic.input = bytes,
        }
        traffic
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.activation + self.state + self.weight + self.input
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        self.activation += other.activation;
        self.state += other.state;
        self.weight += other.weight;
        self.input += other.input;
    }
}

/// Where the bytes of a storage are made, if anywhere alone: weights are loaded where they are read.
pub(super) fn origin(
    facts: &Facts,
    storage: StorageIndex,
    maker: Option<NodeIndex>,
    homes: &[Option<DeviceIndex>],
    owner: impl Fn(NodeIndex) -> DeviceIndex,
) -> Option<DeviceIndex> {
    match facts.storages[storage].kind {
        StorageKind::Weight => None,
        StorageKind::State => homes[storage],
        StorageKind::Input => Some(facts.host()),
        StorageKind::Activation => maker.map(owner),
    }
}

/// Bytes and number of crossings of one storage: to every other device that reads it, the bytes read there, each
/// once.
pub(super) fn crossing(
    facts: &Facts,
    storage: StorageIndex,
    from: DeviceIndex,
    readers: &[NodeIndex],
    owner: impl Fn(NodeIndex) -> DeviceIndex,
) -> (u64, u32) {
    let mut there = DeviceSet::default();
    for &reader in readers {
        there = there.with(owner(reader));
    }
    let there = there.without(from);
    let (mut bytes, mut crossings) = (0, 0);
    let mut views: Vec<Read> = Vec::new();
    for device in there.iter() {
        views.clear();
        for &reader in readers.iter().filter(|&&reader| owner(reader) == device) {
            views.extend(facts.nodes[reader].reads.iter().filter(|read| read.storage == storage));
        }
        bytes += union(&mut views, facts.storages[storage].bytes);
        crossings += 1;
    }
    (bytes, crossings)
}

/// Whether a view is its bytes from first to last, with no rows that others could lie between.
pub(super) fn is_plain(read: &Read) -> bool {
    read.bytes == read.span.row as u64
}

/// Bytes of several views of one storage, each byte once. Where views have gaps, copies around them overlap: then
/// the sum, but never more than the whole.
fn union(views: &mut Vec<Read>, whole: u64) -> u64 {
    views.sort_unstable_by_key(|read| read.span);
    views.dedup_by_key(|read| read.span);
    if !views.iter().all(is_plain) {
        return views.iter().map(|read| read.bytes).sum::<u64>().min(whole);
    }
    let (mut bytes, mut end) = (0, 0);
    for Span { offset, row, .. } in views.iter().map(|read| read.span) {
        bytes += (offset + row).saturating_sub(end.max(offset));
        end = end.max(offset + row);
    }
    bytes as u64
}
