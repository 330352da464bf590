//! Cutting the graph into runs of one owner.

use crate::{assign::Facts, devices::DeviceIndex, graph::NodeIndex};
use serde::Serialize;
use std::{cmp::Reverse, collections::BinaryHeap, ops::Range};

/// Consecutive nodes of one device, and what it needs from others before they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// Whose.
    pub device: DeviceIndex,
    /// Which nodes, as a range of the plan's order.
    pub nodes: Range<usize>,
    /// What crosses before they run, as a range of the plan's transfers.
    pub transfers: Range<usize>,
}

/// Nodes in an order that respects data flow, and its maximal runs of one owner.
///
/// Each run takes everything its device can do by then. With two devices that gives the fewest runs for a given
/// first device, and each is tried; with more devices, one that would gain nothing by waiting goes first.
pub fn split(facts: &Facts, owners: &[DeviceIndex]) -> (Vec<NodeIndex>, Vec<Split>) {
    let dependencies = Dependencies::new(facts);
    let starts = (0..facts.devices).filter(|device| owners.contains(device));
    let orders = starts.filter_map(|first| dependencies.run(owners, facts.devices, first));
    orders.min_by_key(|(_, splits)| splits.len()).unwrap_or_default()
}

struct Dependencies {
    /// How many distinct nodes each waits for.
    waits: Vec<usize>,
    /// Which nodes wait for each.
    next: Vec<Vec<NodeIndex>>,
}

impl Dependencies {
    fn new(facts: &Facts) -> Self {
        let mut next = vec![Vec::new(); facts.nodes.len()];
        let mut waits = vec![0; facts.nodes.len()];
        for (index, node) in facts.nodes.iter().enumerate() {
            let mut before = node.after.clone();
            before.sort_unstable();
            before.dedup();
            waits[index] = before.len();
            for other in before {
                next[other].push(index);
            }
        }
        Dependencies { waits, next }
    }

    /// The order that starts on this device; `None` if it has nothing to start with.
    fn run(
        &self,
        owners: &[DeviceIndex],
        devices: usize,
        first: DeviceIndex,
    ) -> Option<(Vec<NodeIndex>, Vec<Split>)> {
        let mut waits = self.waits.clone();
        // The lowest node first: the builder's order, where nothing speaks against it.
        let mut ready: Vec<BinaryHeap<Reverse<NodeIndex>>> = vec![BinaryHeap::new(); devices];
        for (node, &count) in waits.iter().enumerate() {
            if count == 0 {
                ready[owners[node]].push(Reverse(node));
            }
        }
        let mut order = Vec::with_capacity(owners.len());
        let mut splits = Vec::new();
        let mut device = first;
        loop {
            let start = order.len();
            while let Some(Reverse(node)) = ready[device].pop() {
                order.push(node);
                for &next in &self.next[node] {
                    waits[next] -= 1;
                    if waits[next] == 0 {
                        ready[owners[next]].push(Reverse(next));
                    }
                }
            }
            if start == order.len() {
                return None;
            }
            splits.push(Split { device, nodes: start..order.len(), transfers: 0..0 });
            match self.choose(owners, &waits, &ready) {
                Some(next) => device = next,
                None => return Some((order, splits)),
            }
        }
    }

    /// Of the devices that have something to do, the first that would have no more if all others ran before it;
    /// else the one with the earliest node. `None` when all is done.
    fn choose(
        &self,
        owners: &[DeviceIndex],
        waits: &[usize],
        ready: &[BinaryHeap<Reverse<NodeIndex>>],
    ) -> Option<DeviceIndex> {
        let mut candidates = (0..ready.len()).filter(|&device| !ready[device].is_empty());
        let first = candidates.next()?;
        let mut candidates: Vec<DeviceIndex> = std::iter::once(first).chain(candidates).collect();
        if candidates.len() == 1 {
            return Some(first);
        }
        candidates.sort_by_key(|&device| Reverse(ready[device].peek().copied()));
        let patient = candidates.iter().find(|&&device| !self.gains(owners, waits, ready, device));
        Some(*patient.unwrap_or(&candidates[0]))
    }

    /// Whether a device could run more nodes after all others have run what they can.
    fn gains(
        &self,
        owners: &[DeviceIndex],
        waits: &[usize],
        ready: &[BinaryHeap<Reverse<NodeIndex>>],
        device: DeviceIndex,
    ) -> bool {
        let mut waits = waits.to_vec();
        let others = ready.iter().enumerate().filter(|(other, _)| *other != device);
        let mut work: Vec<NodeIndex> = others.flat_map(|(_, heap)| heap.iter().map(|n| n.0)).collect();
        while let Some(node) = work.pop() {
            for &next in &self.next[node] {
                waits[next] -= 1;
                if waits[next] == 0 {
                    if owners[next] == device {
                        return true;
                    }
                    work.push(next);
                }
            }
        }
        false
    }
}
