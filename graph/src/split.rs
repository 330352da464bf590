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
/// Each run takes everything its device can do by then, as waiting gains nothing. With two devices that gives the fewest
/// runs for a given first device, and each is tried. With more, the next device is a choice: one that would gain nothing
/// by waiting goes first, and a few other choices are followed beside it, all of them in small graphs.
pub fn split(facts: &Facts, owners: &[DeviceIndex]) -> (Vec<NodeIndex>, Vec<Split>) {
    let dependencies = Dependencies::new(facts);
    let starts = (0..facts.devices).filter(|device| owners.contains(device));
    let orders = starts.clone().filter_map(|first| dependencies.run(owners, facts.devices, first));
    let best = orders.min_by_key(|(_, splits)| splits.len()).unwrap_or_default();
    if starts.count() <= 2 {
        return best;
    }
    let width = (WORK / owners.len().max(1)).clamp(2, 128);
    dependencies.search(owners, facts.devices, width, best.1.len()).unwrap_or(best)
}

/// Nodes that are looked at for each run of a search.
const WORK: usize = 8192;

/// A way to have begun.
#[derive(Clone)]
struct Begun {
    done: Vec<bool>,
    waits: Vec<usize>,
    ready: Vec<BinaryHeap<Reverse<NodeIndex>>>,
    order: Vec<NodeIndex>,
    splits: Vec<Split>,
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

    /// An order with fewer than `limit` runs, if one is found: run by run, the `width` ways that have done most are
    /// followed.
    fn search(
        &self,
        owners: &[DeviceIndex],
        devices: usize,
        width: usize,
        limit: usize,
    ) -> Option<(Vec<NodeIndex>, Vec<Split>)> {
        let mut ways = vec![self.begin(owners, devices)];
        for _ in 1..limit {
            let mut next: Vec<Begun> = Vec::new();
            for way in &ways {
                for device in (0..devices).filter(|&device| !way.ready[device].is_empty()) {
                    let mut way = way.clone();
                    self.advance(owners, device, &mut way);
                    if way.order.len() == owners.len() {
                        return Some((way.order, way.splits));
                    }
                    // Ways that have done the same go on alike.
                    if !next.iter().any(|other| other.done == way.done) {
                        next.push(way);
                    }
                }
            }
            next.sort_by_key(|way| Reverse(way.order.len()));
            next.truncate(width);
            ways = next;
        }
        None
    }

    /// Nothing done. The lowest node first: the builder's order, where nothing speaks against it.
    fn begin(&self, owners: &[DeviceIndex], devices: usize) -> Begun {
        let mut ready: Vec<BinaryHeap<Reverse<NodeIndex>>> = vec![BinaryHeap::new(); devices];
        for (node, _) in self.waits.iter().enumerate().filter(|(_, count)| **count == 0) {
            ready[owners[node]].push(Reverse(node));
        }
        let done = vec![false; owners.len()];
        Begun { done, waits: self.waits.clone(), ready, order: Vec::new(), splits: Vec::new() }
    }

    /// Runs everything that a device can do now.
    fn advance(&self, owners: &[DeviceIndex], device: DeviceIndex, way: &mut Begun) {
        let start = way.order.len();
        while let Some(Reverse(node)) = way.ready[device].pop() {
            way.order.push(node);
            way.done[node] = true;
            for &next in &self.next[node] {
                way.waits[next] -= 1;
                if way.waits[next] == 0 {
                    way.ready[owners[next]].push(Reverse(next));
                }
            }
        }
        way.splits.push(Split { device, nodes: start..way.order.len(), transfers: 0..0 });
    }

    /// The order that starts on this device; `None` if it has nothing to start with.
    fn run(
        &self,
        owners: &[DeviceIndex],
        devices: usize,
        first: DeviceIndex,
    ) -> Option<(Vec<NodeIndex>, Vec<Split>)> {
        let mut way = self.begin(owners, devices);
        let mut device = first;
        loop {
            if way.ready[device].is_empty() {
                return None;
            }
            self.advance(owners, device, &mut way);
            match self.choose(owners, &way.waits, &way.ready) {
                Some(next) => device = next,
                None => return Some((way.order, way.splits)),
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
