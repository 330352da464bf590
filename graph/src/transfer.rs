//! Which bytes cross, when, and once.

use crate::{
    assign::Facts,
    devices::DeviceIndex,
    graph::{NodeIndex, StorageIndex, StorageKind},
    span::Span,
    split::Split,
};
use serde::Serialize;
use std::collections::BTreeMap;

/// Bytes that cross to a device, before the first split there that reads them; later splits find them there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Transfer {
    /// Of what.
    pub storage: StorageIndex,
    /// Written by which node; none for an input, or a state before its store.
    pub producer: Option<NodeIndex>,
    /// What the bytes are.
    pub kind: StorageKind,
    /// Where they are made.
    pub from: DeviceIndex,
    /// Where they are read.
    pub to: DeviceIndex,
    /// Which bytes.
    pub span: Span,
    /// How many, in the largest step.
    pub bytes: u64,
    /// Before which split, as an index.
    pub before: usize,
}

/// A storage as one device writes it and another reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crossing {
    storage: StorageIndex,
    producer: Option<NodeIndex>,
    from: DeviceIndex,
    to: DeviceIndex,
}

/// A view of it, and the first split that reads it.
#[derive(Clone, Copy, Debug)]
struct View {
    span: Span,
    bytes: u64,
    before: usize,
}

/// All transfers, in the order of their splits, and each split's range of them. Weights never cross: each device
/// loads what it reads.
pub fn transfers(
    facts: &Facts,
    owners: &[DeviceIndex],
    order: &[NodeIndex],
    splits: &mut [Split],
) -> Vec<Transfer> {
    let mut crossings: BTreeMap<Crossing, Vec<View>> = BTreeMap::new();
    for (before, split) in splits.iter().enumerate() {
        for read in order[split.nodes.clone()].iter().flat_map(|&node| &facts.nodes[node].reads) {
            let storage = &facts.storages[read.storage];
            let from = match storage.kind {
                StorageKind::Weight => continue,
                StorageKind::Input => facts.host(),
                StorageKind::State => storage.home.unwrap_or(facts.host()),
                StorageKind::Activation => match read.producer {
                    Some(producer) => owners[producer],
                    None => continue,
                },
            };
            if from == split.device {
                continue;
            }
            let to = split.device;
            let crossing = Crossing { storage: read.storage, producer: read.producer, from, to };
            let views = crossings.entry(crossing).or_default();
            if !views.iter().any(|view| view.span == read.span) {
                views.push(View { span: read.span, bytes: read.bytes, before });
            }
        }
    }
    let mut all = Vec::new();
    for (crossing, views) in crossings {
        let Crossing { storage, producer, from, to } = crossing;
        let facts_of = &facts.storages[storage];
        for View { span, bytes, before } in join(views, facts_of.bytes) {
            all.push(Transfer { storage, producer, kind: facts_of.kind, from, to, span, bytes, before });
        }
    }
    all.sort_by_key(|t: &Transfer| t.before);
    let mut start = 0;
    for (index, split) in splits.iter_mut().enumerate() {
        let count = all[start..].iter().take_while(|t| t.before == index).count();
        split.transfers = start..start + count;
        start += count;
    }
    all
}

/// Joins views where one copy around several is no more bytes than a copy of each.
fn join(mut views: Vec<View>, whole: u64) -> Vec<View> {
    views.sort_by_key(|view| view.span);
    let mut joined: Vec<View> = Vec::new();
    for view in views {
        if let Some(last) = joined.last_mut()
            && let Some(span) = last.span.around(&view.span)
        {
            let bytes = around(last, &view, span).min(whole);
            if bytes <= last.bytes + view.bytes {
                *last = View { span, bytes, before: last.before.min(view.before) };
                continue;
            }
        }
        joined.push(view);
    }
    joined
}

/// Bytes of a span around two views: its rows are longer by a known number of bytes, all else is equal.
fn around(a: &View, b: &View, span: Span) -> u64 {
    let (longer, bytes) = if a.span.row >= b.span.row { (a.span, a.bytes) } else { (b.span, b.bytes) };
    bytes + (span.row - longer.row) as u64
}
