//! Where every byte of a step lies: lifetimes, and one arena per device.

use crate::{
    assign::Facts,
    devices::DeviceIndex,
    graph::{NodeIndex, StorageIndex, StorageKind},
    split::Split,
    transfer::Transfer,
};
use serde::Serialize;
use std::cmp::Reverse;

/// Every slot starts at a multiple of this: a cache line, and a GPU's usual storage alignment.
pub const ALIGNMENT: u64 = 64;

/// What lies in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Content {
    /// An input or the result of a node, where it is made.
    Storage(StorageIndex),
    /// What a transfer brought, by its index in the plan.
    Transfer(usize),
}

/// A part of a device's arena, for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// What for.
    pub content: Content,
    /// On which device.
    pub device: DeviceIndex,
    /// Bytes from the start of the arena.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// First position in the plan's order at which it is written.
    pub opens: usize,
    /// Last position at which it is read, here or by a transfer; the slot is free after it.
    pub closes: usize,
}

/// The memory of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Bytes of each device's arena.
    pub arenas: Vec<u64>,
    /// All slots.
    pub slots: Vec<Slot>,
}

/// Lays out everything that a step makes or moves.
///
/// A view extends the life of its base. Inputs live over the whole step, outputs to its end. What another device
/// still has to fetch lives until it is fetched. A slot is never reused at the position at which it is read last,
/// so that no operation writes over what it reads.
pub fn memory(
    facts: &Facts,
    owners: &[DeviceIndex],
    order: &[NodeIndex],
    splits: &[Split],
    transfers: &[Transfer],
) -> Memory {
    let mut slots = lifetimes(facts, owners, order, splits, transfers);
    let arenas = (0..facts.devices).map(|device| lay_out(&mut slots, device)).collect();
    Memory { arenas, slots }
}

fn lifetimes(
    facts: &Facts,
    owners: &[DeviceIndex],
    order: &[NodeIndex],
    splits: &[Split],
    transfers: &[Transfer],
) -> Vec<Slot> {
    let end = order.len().saturating_sub(1);
    let mut slots = Vec::new();
    // The slot of each storage where it is made, and of what each transfer brings.
    let mut made: Vec<Option<usize>> = vec![None; facts.storages.len()];
    let mut open = |slots: &mut Vec<Slot>, storage: StorageIndex, device, opens, closes| {
        let bytes = facts.storages[storage].bytes;
        made[storage] = Some(slots.len());
        slots.push(Slot { content: Content::Storage(storage), device, offset: 0, bytes, opens, closes });
    };
    for (position, &node) in order.iter().enumerate() {
        for &storage in &facts.nodes[node].writes {
            if facts.storages[storage].kind == StorageKind::Activation {
                let closes = if facts.storages[storage].output { end } else { position };
                open(&mut slots, storage, owners[node], position, closes);
            }
        }
    }
    // Inputs go from the caller's bytes straight to the devices that read them: only what the host reads is kept.
    for (storage, facts_of) in facts.storages.iter().enumerate() {
        let host = facts.host();
        let read =
            |n: NodeIndex| owners[n] == host && facts.nodes[n].reads.iter().any(|r| r.storage == storage);
        if facts_of.kind == StorageKind::Input && (0..facts.nodes.len()).any(read) {
            open(&mut slots, storage, host, 0, end);
        }
    }
    let arrivals = slots.len();
    for (index, transfer) in transfers.iter().enumerate() {
        let opens = splits[transfer.before].nodes.start;
        if let Some(source) = made[transfer.storage] {
            slots[source].closes = slots[source].closes.max(opens);
        }
        let content = Content::Transfer(index);
        let Transfer { to: device, bytes, .. } = *transfer;
        slots.push(Slot { content, device, offset: 0, bytes, opens, closes: opens });
    }
    // Readers find a value where it is made, or among what was brought.
    let mut brought: Vec<Vec<usize>> = vec![Vec::new(); facts.storages.len()];
    for (index, transfer) in transfers.iter().enumerate() {
        brought[transfer.storage].push(index);
    }
    for (position, &node) in order.iter().enumerate() {
        for read in &facts.nodes[node].reads {
            if let Some(slot) = made[read.storage]
                && slots[slot].device == owners[node]
            {
                slots[slot].closes = slots[slot].closes.max(position);
            }
            for &index in &brought[read.storage] {
                let transfer = &transfers[index];
                if transfer.to == owners[node]
                    && transfer.producer == read.producer
                    && transfer.span.covers(&read.span)
                {
                    let slot = &mut slots[arrivals + index];
                    slot.closes = slot.closes.max(position);
                }
            }
        }
    }
    slots
}

/// Gives the slots of one device their offsets: the largest first, each into the tightest gap between those that
/// live at the same time (greedy by size: Pisarchyk and Lee, arXiv 2001.03288). Returns the size of the arena.
fn lay_out(slots: &mut [Slot], device: DeviceIndex) -> u64 {
    /// Bytes `start..end`, taken from `opens` to `closes`.
    struct Taken {
        opens: usize,
        closes: usize,
        start: u64,
        end: u64,
    }
    let mut waiting: Vec<usize> = (0..slots.len()).filter(|&s| slots[s].device == device).collect();
    waiting.sort_by_key(|&s| (Reverse(slots[s].bytes), slots[s].opens));
    // By start.
    let mut placed: Vec<Taken> = Vec::with_capacity(waiting.len());
    let mut size = 0;
    for index in waiting {
        let Slot { bytes, opens, closes, .. } = slots[index];
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        let mut end = 0;
        let mut best = (u64::MAX, 0);
        for other in &placed {
            if other.closes < opens || closes < other.opens {
                continue;
            }
            if other.start > end {
                let gap = other.start - end;
                if gap >= bytes && gap < best.0 {
                    best = (gap, end);
                }
            }
            end = end.max(other.end);
        }
        let start = if best.0 < u64::MAX { best.1 } else { end };
        slots[index].offset = start;
        size = size.max(start + bytes);
        let at = placed.partition_point(|other| other.start < start);
        placed.insert(at, Taken { opens, closes, start, end: start + bytes });
    }
    size
}
