//! Stage 1: what has one place and no other.

use super::{Draft, Facts, Reason, Rules};
use crate::graph::{Part, StorageKind};

/// Nodes that touch a state as the core of its region go to its owner; without the ownership check, only those
/// that write it. Nodes that read a weight the user placed go to that weight, to the largest of several.
pub(super) fn pin(facts: &Facts, rules: &Rules, draft: &mut Draft) {
    for (index, node) in facts.nodes.iter().enumerate() {
        let written = node.writes.iter().copied().find(|&s| facts.storages[s].kind == StorageKind::State);
        // What reads the state is its core, whatever it is called.
        let reads = |state| node.reads.iter().any(|read| read.storage == state);
        let core = node.region.filter(|region| region.part == Part::Core || reads(region.state));
        let core = core.map(|region| region.state);
        if rules.ownership_check
            && let Some(state) = written.or(core)
        {
            draft.own(index, draft.homes[state].unwrap_or(facts.host()), Reason::RegionOf(state));
        } else if let Some(state) = written {
            draft.own(index, draft.homes[state].unwrap_or(facts.host()), Reason::Pinned(state));
        } else if let Some(weight) = facts.largest_weight(index, |s| s.placed_by_user && s.home.is_some()) {
            draft.own(index, draft.homes[weight].unwrap_or(facts.host()), Reason::Pinned(weight));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{CPU, GPU, RULES, Sample, layer};
    use super::*;

    #[test]
    fn the_core_is_with_its_state() {
        let layer = layer();
        let mut draft = layer.sample.draft();
        pin(&layer.sample.0, &RULES, &mut draft);
        for node in [layer.store, layer.attention] {
            assert_eq!((draft.owners[node], draft.reasons[node]), (Some(CPU), Reason::RegionOf(layer.state)));
        }
        assert_eq!(draft.owners[layer.v_absorb], None);
    }

    #[test]
    fn without_the_check_only_the_store_is() {
        let layer = layer();
        let mut draft = layer.sample.draft();
        pin(&layer.sample.0, &Rules { ownership_check: false, ..RULES }, &mut draft);
        assert_eq!(draft.reasons[layer.store], Reason::Pinned(layer.state));
        assert_eq!(draft.owners[layer.attention], None);
    }

    #[test]
    fn the_largest_weight_of_the_user_decides() {
        let mut sample = Sample::new();
        let (small, large) = (sample.placed_weight(8, GPU), sample.placed_weight(16, CPU));
        let own = sample.weight(99, GPU);
        let (both, _) = sample.node(&[small, large, own], 8);
        let (neither, _) = sample.node(&[own], 8);
        let mut draft = sample.draft();
        pin(&sample.0, &RULES, &mut draft);
        assert_eq!((draft.owners[both], draft.reasons[both]), (Some(CPU), Reason::Pinned(large)));
        assert_eq!(draft.owners[neither], None);
    }
}
