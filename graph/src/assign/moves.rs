//! What a change of owners moves, and what crosses for it.

use super::{
    Draft, Facts, Traffic,
    traffic::{crossing, origin},
};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, StorageIndex, StorageKind},
};

/// Members that share a storage that counts, directly or through others, in groups.
pub(super) fn groups(
    draft: &Draft,
    member: impl Fn(NodeIndex) -> bool,
    counts: impl Fn(StorageIndex) -> bool,
) -> Vec<Vec<NodeIndex>> {
    let nodes = draft.owners.len();
    let mut parent: Vec<NodeIndex> = (0..nodes).collect();
    fn root(parent: &mut [NodeIndex], mut node: NodeIndex) -> NodeIndex {
        while parent[node] != node {
            parent[node] = parent[parent[node]];
            node = parent[node];
        }
        node
    }
    for (storage, readers) in draft.readers.iter().enumerate() {
        if !counts(storage) {
            continue;
        }
        let touching = draft.makers[storage].into_iter().chain(readers.iter().copied());
        let mut touching = touching.filter(|&node| member(node));
        let Some(first) = touching.next() else { continue };
        for other in touching {
            let (a, b) = (root(&mut parent, first), root(&mut parent, other));
            parent[a.max(b)] = a.min(b);
        }
    }
    let mut members: Vec<Vec<NodeIndex>> = vec![Vec::new(); nodes];
    for node in (0..nodes).filter(|&node| member(node)) {
        members[root(&mut parent, node)].push(node);
    }
    members.retain(|group| !group.is_empty());
    members
}

/// The nodes that are elsewhere than before, in groups that move independently of each other: no value is of two.
pub(super) fn moves(
    facts: &Facts,
    draft: &Draft,
    before: &[DeviceIndex],
    after: &[DeviceIndex],
) -> Vec<Vec<NodeIndex>> {
    let crosses = |storage: StorageIndex| facts.storages[storage].kind != StorageKind::Weight;
    groups(draft, |node| before[node] != after[node], crosses)
}

/// Bytes that cross of everything that these nodes read and make.
pub(super) fn traffic(facts: &Facts, draft: &Draft, owners: &[DeviceIndex], nodes: &[NodeIndex]) -> Traffic {
    let owner = |node: NodeIndex| owners[node];
    let mut sum = Traffic::default();
    for storage in facts.touched_by(nodes) {
        if let Some(from) = origin(facts, storage, draft.makers[storage], &draft.homes, owner) {
            let (bytes, _) = crossing(facts, storage, from, &draft.readers[storage], owner);
            sum += Traffic::of(facts.storages[storage].kind, bytes);
        }
    }
    sum
}
