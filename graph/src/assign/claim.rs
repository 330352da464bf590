//! Stage 2: the ownership check.
//!
//! A node that belongs to a state's region goes to the state's owner and to nobody else, before any neighbour or
//! weight can take it. This is what the reference engine lacked: there, a weight below the attention drew the
//! attention after it, and the cache had to follow, layer by layer, in every step.

use super::{Draft, Facts, Reason, Rules};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, Part, StorageIndex, StorageKind},
    placement::{Absorb, Rates},
};

/// Claims the edges of all regions, the weights that only they read, and what lies between members.
pub(super) fn claim(facts: &Facts, rules: &Rules, draft: &mut Draft) {
    let edges: Vec<NodeIndex> = (0..facts.nodes.len())
        .filter(|&n| draft.owners[n].is_none())
        .filter(|&n| facts.nodes[n].region.is_some_and(|region| region.part == Part::Edge))
        .filter(|&n| goes_to_owner(facts, &rules.absorb, draft, n))
        .collect();
    for node in edges {
        if let Some(region) = facts.nodes[node].region {
            let owner = owner(facts, draft, region.state);
            draft.own(node, owner, Reason::RegionOf(region.state));
        }
    }
    draw_weights(facts, draft);
    claim_between(facts, draft);
}

fn owner(facts: &Facts, draft: &Draft, state: StorageIndex) -> DeviceIndex {
    draft.homes[state].unwrap_or(facts.host())
}

/// An edge without a weight has nothing that would draw it elsewhere.
fn goes_to_owner(facts: &Facts, absorb: &Absorb, draft: &Draft, node: NodeIndex) -> bool {
    let has_weight = facts.largest_weight(node, |_| true).is_some();
    !has_weight
        || match absorb {
            Absorb::Owner => true,
            Absorb::Layer => false,
            Absorb::Auto(rates) => seconds_saved(facts, rates, draft, node) >= 0.0,
        }
}

/// Seconds per step that an edge saves at the owner of its state, compared with its layer's device.
///
/// Between the layer and the core of the region lies the edge: at the owner its far side crosses, with the layer
/// its near side does. Its weight is read from the memory of the one or the other. The step is that of one token, so that
/// plans of all sizes decide alike and the weight is loaded once.
fn seconds_saved(facts: &Facts, rates: &Rates, draft: &Draft, node: NodeIndex) -> f64 {
    let Some(region) = facts.nodes[node].region else { return 0.0 };
    let (at_owner, at_layer) = (owner(facts, draft, region.state), facts.home(node));
    if at_owner == at_layer {
        return 0.0;
    }
    let member = |n: NodeIndex| facts.nodes[n].region.is_some_and(|r| r.state == region.state);
    let (mut inputs, mut weights, mut below_core) = (0, 0, false);
    for read in &facts.nodes[node].reads {
        match facts.storages[read.storage].kind {
            StorageKind::Weight => weights += read.bytes,
            _ => inputs += read.span.row as u64,
        }
        below_core |= read.producer.is_some_and(member);
    }
    let row_of = |&made: &StorageIndex| facts.storages[made].bytes / facts.rows as u64;
    let outputs: u64 = facts.nodes[node].writes.iter().map(row_of).sum();
    let (crosses_owner, crosses_layer) = if below_core { (outputs, inputs) } else { (inputs, outputs) };
    let memory = |device: DeviceIndex| rates.memory.get(device).copied().unwrap_or(rates.bus);
    let seconds = |bytes: u64, rate: f64| bytes as f64 / rate;
    let with_layer = seconds(crosses_layer, rates.bus) + seconds(weights, memory(at_layer));
    let with_owner = seconds(crosses_owner, rates.bus) + seconds(weights, memory(at_owner));
    with_layer - with_owner
}

/// Weights that nobody placed, and that only nodes claimed by one owner read, are loaded there: a product that is
/// pinned while its weight stays behind moves the weight in every step.
fn draw_weights(facts: &Facts, draft: &mut Draft) {
    for (index, storage) in facts.storages.iter().enumerate() {
        if storage.kind != StorageKind::Weight || storage.placed_by_user {
            continue;
        }
        let claimed = |n: NodeIndex| match draft.reasons[n] {
            Reason::RegionOf(_) => draft.owners[n],
            _ => None,
        };
        let mut owners = draft.readers[index].iter().map(|&n| claimed(n));
        if let Some(Some(first)) = owners.next()
            && owners.all(|other| other == Some(first))
        {
            draft.homes[index] = Some(first);
        }
    }
}

/// Nodes on a path from one member of a region to another belong to it too, unless a weight has a say in them.
fn claim_between(facts: &Facts, draft: &mut Draft) {
    let count = facts.nodes.len();
    let mut members: Vec<Vec<NodeIndex>> = vec![Vec::new(); facts.storages.len()];
    for (index, node) in facts.nodes.iter().enumerate() {
        if let Some(region) = node.region {
            members[region.state].push(index);
        }
    }
    // Which region last reached the node from above, as 1 + its state; the walk from below is local to it.
    let mut below = vec![0usize; count];
    for (state, members) in members.iter().enumerate() {
        let (Some(&first), Some(&last)) = (members.first(), members.last()) else { continue };
        let stamp = state + 1;
        for node in first..=last {
            let member = facts.nodes[node].region.is_some_and(|r| r.state == state);
            if member || facts.nodes[node].after.iter().any(|&n| below[n] == stamp) {
                below[node] = stamp;
            }
        }
        let mut above = vec![false; last - first + 1];
        for node in (first..=last).rev() {
            let member = facts.nodes[node].region.is_some_and(|r| r.state == state);
            if !member && !above[node - first] {
                continue;
            }
            for &before in &facts.nodes[node].after {
                if before >= first {
                    above[before - first] = true;
                }
            }
            let open = draft.owners[node].is_none() && below[node] == stamp;
            if open && !member && facts.largest_weight(node, |_| true).is_none() {
                draft.own(node, owner(facts, draft, state), Reason::RegionOf(state));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        pin::pin,
        sample::{CPU, GPU, Layer, RULES, layer},
    };
    use super::*;

    fn claimed(layer: &Layer, absorb: Absorb) -> Draft {
        let rules = Rules { absorb, ..RULES };
        let mut draft = layer.sample.draft();
        pin(&layer.sample.0, &rules, &mut draft);
        claim(&layer.sample.0, &rules, &mut draft);
        draft
    }

    #[test]
    fn edges_and_their_weights_are_at_the_owner() {
        let layer = layer();
        let draft = claimed(&layer, Absorb::Owner);
        for node in [layer.q_absorb, layer.concat, layer.v_absorb] {
            assert_eq!((draft.owners[node], draft.reasons[node]), (Some(CPU), Reason::RegionOf(layer.state)));
        }
        assert_eq!((draft.homes[layer.k_b], draft.homes[layer.v_b]), (Some(CPU), Some(CPU)));
        assert_eq!(draft.owners[layer.out], None);
    }

    #[test]
    fn edges_can_stay_with_their_layer() {
        let layer = layer();
        let draft = claimed(&layer, Absorb::Layer);
        assert_eq!((draft.owners[layer.q_absorb], draft.homes[layer.k_b]), (None, Some(GPU)));
        // What lies between two members has no weight, and belongs to the region either way.
        assert_eq!(draft.owners[layer.concat], Some(CPU));
    }

    /// At the owner 80 bytes cross for each product, with the layer 160; its weight has 500.
    #[test]
    fn rates_decide() {
        let mut layer = layer();
        for node in &mut layer.sample.0.nodes {
            node.home = Some(GPU);
        }
        let auto = |bus, memory: [f64; 2]| Absorb::Auto(Rates { bus, memory: memory.to_vec() });
        let at_owner = |absorb| claimed(&layer, absorb).owners[layer.v_absorb] == Some(CPU);
        assert!(at_owner(auto(1.0, [100.0, 10.0])), "80 s of bus against 45 s of memory");
        assert!(!at_owner(auto(1.0, [100.0, 5.0])), "80 s of bus against 95 s of memory");
    }

    /// Nothing would draw it anywhere, whatever the bus.
    #[test]
    fn an_edge_without_a_weight_is_at_the_owner() {
        let mut layer = layer();
        let Facts { nodes, storages, .. } = &mut layer.sample.0;
        nodes[layer.v_absorb].reads.retain(|read| read.storage != layer.v_b);
        let made = nodes[layer.v_absorb].writes[0];
        storages[made].bytes = 1000;
        for node in nodes {
            node.home = Some(GPU);
        }
        for absorb in [Absorb::Owner, Absorb::Layer, Absorb::Auto(Rates { bus: 1.0, memory: vec![] })] {
            assert_eq!(claimed(&layer, absorb).owners[layer.v_absorb], Some(CPU));
        }
    }

    #[test]
    fn a_weight_that_others_read_stays() {
        let mut layer = layer();
        layer.sample.node(&[layer.v_b], 8);
        let draft = claimed(&layer, Absorb::Owner);
        assert_eq!((draft.owners[layer.v_absorb], draft.homes[layer.v_b]), (Some(CPU), Some(GPU)));
    }

    #[test]
    fn the_user_is_obeyed() {
        let mut layer = layer();
        layer.sample.0.storages[layer.v_b].placed_by_user = true;
        let draft = claimed(&layer, Absorb::Owner);
        assert_eq!(draft.owners[layer.v_absorb], Some(GPU));
        assert_eq!(draft.homes[layer.v_b], Some(GPU));
        assert_eq!(draft.owners[layer.attention], Some(CPU));
    }
}
