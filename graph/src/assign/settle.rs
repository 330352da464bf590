//! Stage 6: nodes that only neighbours had a say in are placed by what crosses.
//!
//! Expansion stops at whatever it meets, so a border between two devices lies anywhere on the open path between
//! what they own. Here it moves to where the fewest bytes cross: a sum of expert rows crosses after it is summed,
//! not before. Between two devices that is a minimum cut, which is exact; with more, devices are taken in pairs
//! until no pair finds anything better (the swap moves of Boykov, Veksler and Zabih 2001).
//!
//! State bytes have no weight here: with the ownership check on, no node that reads a state is open; with it off,
//! a state claims nothing.

use super::{
    DeviceSet, Draft, Facts, Read, Reason,
    cut::{NEVER, Network, SINK, SOURCE},
    moves::{groups, moves, traffic},
    traffic::{crossing, is_plain, origin},
};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, StorageIndex, StorageKind},
};

/// Rounds over all pairs of devices; two are enough in practice, and the bound keeps odd graphs cheap.
const ROUNDS: usize = 8;

/// What a placement of a few nodes costs, the first difference deciding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// Nodes whose device cannot run them, where that counts.
    unable: u64,
    bytes: u64,
    crossings: u64,
    /// Nodes that are not on their layer's device.
    away: u64,
    /// Nodes that are not where their first input is made.
    strange: u64,
}

impl Cost {
    /// One number of the same order, as long as there are fewer than 2¹⁶ nodes, of what devices are able to run.
    const fn weight(self) -> u128 {
        ((self.bytes as u128) << 48)
            + ((self.crossings as u128) << 32)
            + ((self.away as u128) << 16)
            + self.strange as u128
    }
}

pub(super) fn settle(facts: &Facts, draft: &mut Draft) {
    let before: Vec<DeviceIndex> = draft.owners.iter().map(|o| o.unwrap_or(facts.host())).collect();
    let after = place(facts, draft, &before, Reach::Any);
    for nodes in moves(facts, draft, &before, &after) {
        let [before, crosses] = [&before, &after].map(|owners| traffic(facts, draft, owners, &nodes).total());
        for node in nodes {
            let at_home = facts.home(node) == after[node] && crosses == before;
            draft.own(node, after[node], if at_home { Reason::Home } else { Reason::FewerBytes });
        }
    }
}

/// Where nodes may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Anywhere.
    Any,
    /// To devices that can run them.
    Able,
}

/// The cheapest places of all open nodes that are found from these owners; all others stay.
pub(super) fn place(facts: &Facts, draft: &Draft, owners: &[DeviceIndex], reach: Reach) -> Vec<DeviceIndex> {
    let open: Vec<bool> = draft.reasons.iter().map(|reason| reason.is_of_neighbours()).collect();
    let mut owners = owners.to_vec();
    for group in groups(draft, |node| open[node], |storage| counts(facts, storage)) {
        owners = Border::new(facts, draft, &open, group, &owners, reach).best(&owners);
    }
    owners
}

fn counts(facts: &Facts, storage: StorageIndex) -> bool {
    matches!(facts.storages[storage].kind, StorageKind::Activation | StorageKind::Input)
}

/// Open nodes and everything they share values with.
struct Border<'a> {
    facts: &'a Facts,
    draft: &'a Draft,
    nodes: Vec<NodeIndex>,
    /// Values that an open node makes or reads.
    storages: Vec<StorageIndex>,
    /// Where any of these may go: the devices of their neighbours.
    devices: DeviceSet,
    reach: Reach,
}

impl<'a> Border<'a> {
    fn new(
        facts: &'a Facts,
        draft: &'a Draft,
        open: &[bool],
        nodes: Vec<NodeIndex>,
        owners: &[DeviceIndex],
        reach: Reach,
    ) -> Self {
        let mut storages = facts.touched_by(&nodes);
        storages.retain(|&storage| counts(facts, storage));
        let mut devices = DeviceSet::default();
        for &storage in &storages {
            let maker = draft.makers[storage];
            if let Some(from) = origin(facts, storage, maker, &draft.homes, |n| owners[n]) {
                devices = devices.with(from);
            }
            for &reader in draft.readers[storage].iter().filter(|&&reader| !open[reader]) {
                devices = devices.with(owners[reader]);
            }
        }
        let mut border = Border { facts, draft, nodes, storages, devices, reach };
        // What cannot run where it is may go to all that can run it.
        let able = |&&node: &&NodeIndex| border.is_able(node, owners[node]);
        for &node in border.nodes.iter().filter(|node| !able(node)) {
            devices = facts.able(node).fold(devices.with(owners[node]), DeviceSet::with);
        }
        border.devices = devices;
        border
    }

    fn is_able(&self, node: NodeIndex, device: DeviceIndex) -> bool {
        self.reach == Reach::Any || self.facts.nodes[node].runs_on.contains(device)
    }

    /// The cheapest placement that is found from this one.
    fn best(&self, owners: &[DeviceIndex]) -> Vec<DeviceIndex> {
        let devices: Vec<DeviceIndex> = self.devices.iter().collect();
        let (mut owners, mut best) = (owners.to_vec(), self.cost(owners));
        if devices.len() < 2 {
            return owners;
        }
        for _ in 0..ROUNDS {
            let start = best;
            for (index, &a) in devices.iter().enumerate() {
                for &b in &devices[index + 1..] {
                    let candidate = self.swap(&owners, a, b);
                    let cost = self.cost(&candidate);
                    if cost < best {
                        (owners, best) = (candidate, cost);
                    }
                }
            }
            if best == start || devices.len() == 2 {
                break;
            }
        }
        owners
    }

    fn origin(&self, storage: StorageIndex, owners: &[DeviceIndex]) -> DeviceIndex {
        let maker = self.draft.makers[storage];
        origin(self.facts, storage, maker, &self.draft.homes, |n| owners[n]).unwrap_or(self.facts.host())
    }

    fn cost(&self, owners: &[DeviceIndex]) -> Cost {
        let mut cost = Cost::default();
        for &storage in &self.storages {
            let from = self.origin(storage, owners);
            let readers = &self.draft.readers[storage];
            let (bytes, crossings) = crossing(self.facts, storage, from, readers, |n| owners[n]);
            cost.bytes += bytes;
            cost.crossings += u64::from(crossings);
        }
        for &node in &self.nodes {
            cost.unable += u64::from(!self.is_able(node, owners[node]));
            cost.away += u64::from(self.facts.nodes[node].home.is_some_and(|home| home != owners[node]));
            let first = self.first_input(node);
            cost.strange += u64::from(first.is_some_and(|s| self.origin(s, owners) != owners[node]));
        }
        cost
    }

    fn first_input(&self, node: NodeIndex) -> Option<StorageIndex> {
        self.facts.nodes[node].reads.iter().map(|read| read.storage).find(|&s| counts(self.facts, s))
    }

    /// The cheapest division of the nodes that `a` and `b` have between the two; all others stay.
    fn swap(&self, owners: &[DeviceIndex], a: DeviceIndex, b: DeviceIndex) -> Vec<DeviceIndex> {
        let movable: Vec<NodeIndex> =
            self.nodes.iter().copied().filter(|&node| owners[node] == a || owners[node] == b).collect();
        let mut cut = Cut { network: Network::new(movable.len()), movable: &movable, owners, a, b };
        for &storage in &self.storages {
            for (readers, bytes) in self.views(storage) {
                let cost = Cost { bytes, crossings: 1, ..Cost::default() }.weight();
                let maker = self.draft.makers[storage].and_then(|maker| cut.vertex(maker));
                match maker {
                    Some(maker) => cut.made_by(maker, &readers, cost),
                    None => cut.made_at(self.origin(storage, owners), &readers, cost),
                }
            }
        }
        for (index, &node) in movable.iter().enumerate() {
            let vertex = index + 2;
            match [a, b].map(|device| self.is_able(node, device)) {
                [true, false] => cut.prefer(vertex, a, NEVER),
                [false, true] => cut.prefer(vertex, b, NEVER),
                _ => {}
            }
            if let Some(home) = self.facts.nodes[node].home {
                cut.prefer(vertex, home, Cost { away: 1, ..Cost::default() }.weight());
            }
            if let Some(first) = self.first_input(node) {
                let cost = Cost { strange: 1, ..Cost::default() }.weight();
                match self.draft.makers[first].and_then(|maker| cut.vertex(maker)) {
                    Some(maker) => {
                        cut.network.edge(maker, vertex, cost);
                        cut.network.edge(vertex, maker, cost);
                    }
                    None => cut.prefer(vertex, self.origin(first, owners), cost),
                }
            }
        }
        let sides = cut.network.cut();
        let mut owners = owners.to_vec();
        for (index, &node) in movable.iter().enumerate() {
            owners[node] = if sides[index + 2] { a } else { b };
        }
        owners
    }

    /// Who reads which bytes of a storage. Plain views are taken apart where they overlap; views with gaps, whose
    /// copies are nearly the whole, are taken as the whole.
    fn views(&self, storage: StorageIndex) -> Vec<(Vec<NodeIndex>, u64)> {
        let readers = &self.draft.readers[storage];
        let of_reader = |&reader: &NodeIndex| {
            let reads = self.facts.nodes[reader].reads.iter();
            reads.filter(|read| read.storage == storage).map(move |read| (reader, read))
        };
        let reads: Vec<(NodeIndex, &Read)> = readers.iter().flat_map(of_reader).collect();
        let alike = reads.iter().all(|(_, read)| read.span == reads[0].1.span);
        if alike || !reads.iter().all(|(_, read)| is_plain(read)) {
            let all = reads.iter().map(|(_, read)| read.bytes).max().unwrap_or(0);
            let bytes = if alike { all } else { self.facts.storages[storage].bytes };
            return vec![(readers.clone(), bytes)];
        }
        let mut ends: Vec<usize> =
            reads.iter().flat_map(|(_, read)| [read.span.offset, read.span.offset + read.span.row]).collect();
        ends.sort_unstable();
        ends.dedup();
        let piece = |ends: &[usize]| {
            let within =
                |read: &Read| read.span.offset <= ends[0] && ends[1] <= read.span.offset + read.span.row;
            let mut readers: Vec<NodeIndex> =
                reads.iter().filter(|(_, read)| within(read)).map(|(reader, _)| *reader).collect();
            readers.dedup();
            (readers, (ends[1] - ends[0]) as u64)
        };
        ends.windows(2).map(piece).filter(|(readers, _)| !readers.is_empty()).collect()
    }
}

/// A division under construction: `a` is the side of the source.
struct Cut<'a> {
    network: Network,
    movable: &'a [NodeIndex],
    owners: &'a [DeviceIndex],
    a: DeviceIndex,
    b: DeviceIndex,
}

impl Cut<'_> {
    /// The network's number of a node that may move.
    fn vertex(&self, node: NodeIndex) -> Option<usize> {
        self.movable.binary_search(&node).ok().map(|index| index + 2)
    }

    /// Whether a reader that stays is on this device.
    fn stays_on(&self, readers: &[NodeIndex], device: DeviceIndex) -> bool {
        readers.iter().any(|&reader| self.owners[reader] == device && self.vertex(reader).is_none())
    }

    /// A value made where it stays: it crosses to `a` or `b` if any reader goes there.
    fn made_at(&mut self, from: DeviceIndex, readers: &[NodeIndex], cost: u128) {
        if from != self.b && !self.stays_on(readers, self.b) {
            let any = self.network.add();
            self.network.edge(SOURCE, any, cost);
            self.each(readers, |network, reader| network.edge(any, reader, NEVER));
        }
        if from != self.a && !self.stays_on(readers, self.a) {
            let any = self.network.add();
            self.network.edge(any, SINK, cost);
            self.each(readers, |network, reader| network.edge(reader, any, NEVER));
        }
    }

    /// A value made by a node that may move: it crosses if any reader is on the other side.
    fn made_by(&mut self, maker: usize, readers: &[NodeIndex], cost: u128) {
        if self.stays_on(readers, self.b) {
            self.network.edge(maker, SINK, cost);
        } else {
            let any = self.network.add();
            self.network.edge(maker, any, cost);
            self.each(readers, |network, reader| network.edge(any, reader, NEVER));
        }
        if self.stays_on(readers, self.a) {
            self.network.edge(SOURCE, maker, cost);
        } else {
            let any = self.network.add();
            self.network.edge(any, maker, cost);
            self.each(readers, |network, reader| network.edge(reader, any, NEVER));
        }
    }

    fn each(&mut self, readers: &[NodeIndex], mut edge: impl FnMut(&mut Network, usize)) {
        for &reader in readers {
            if let Some(vertex) = self.vertex(reader) {
                edge(&mut self.network, vertex);
            }
        }
    }

    /// Costs `cost` if the node is not on this device.
    fn prefer(&mut self, vertex: usize, device: DeviceIndex, cost: u128) {
        if device == self.a {
            self.network.edge(SOURCE, vertex, cost);
        } else if device == self.b {
            self.network.edge(vertex, SINK, cost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{CPU, GPU, Sample};
    use super::*;

    /// A sum of expert rows crosses after it is summed, not before.
    #[test]
    fn the_narrow_place_is_cut() {
        let mut sample = Sample::new();
        let x = sample.input(8);
        let (experts, rows) = sample.node(&[x], 800);
        let (scaled, scaled_out) = sample.node(&[rows], 800);
        let (summed, sum) = sample.node(&[scaled_out], 100);
        let (rest, _) = sample.node(&[sum], 100);
        let mut draft = sample.draft();
        draft.own(experts, CPU, Reason::Pinned(0));
        draft.own(rest, GPU, Reason::Pinned(0));
        for node in [scaled, summed] {
            draft.own(node, GPU, Reason::ExpandedUp(rest));
        }
        settle(&sample.0, &mut draft);
        for node in [scaled, summed] {
            assert_eq!((draft.owners[node], draft.reasons[node]), (Some(CPU), Reason::FewerBytes));
        }
    }

    #[test]
    fn equal_bytes_go_home() {
        let mut sample = Sample::new();
        let x = sample.input(8);
        let (a, a_out) = sample.node(&[x], 100);
        let (open, open_out) = sample.node(&[a_out], 100);
        let (b, _) = sample.node(&[open_out], 100);
        sample.0.nodes[open].home = Some(GPU);
        let mut draft = sample.draft();
        draft.own(a, CPU, Reason::Pinned(0));
        draft.own(b, GPU, Reason::Pinned(0));
        draft.own(open, CPU, Reason::ExpandedDown(a));
        settle(&sample.0, &mut draft);
        assert_eq!((draft.owners[open], draft.reasons[open]), (Some(GPU), Reason::Home));
    }
}
