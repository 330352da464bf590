//! Stage 4: along data flow.

use super::{Draft, Facts, Reason};
use crate::devices::DeviceIndex;

/// An open node takes the owner of its first producer that has one. Accelerators expand first, so that the host
/// gets what is left.
pub(super) fn expand_down(facts: &Facts, draft: &mut Draft) {
    let host = facts.host();
    sweep(facts, draft, |device| device != host);
    sweep(facts, draft, |_| true);
}

fn sweep(facts: &Facts, draft: &mut Draft, may: impl Fn(DeviceIndex) -> bool) {
    for (index, node) in facts.nodes.iter().enumerate() {
        if draft.owners[index].is_some() {
            continue;
        }
        let producers = node.reads.iter().filter_map(|read| read.producer);
        let mut owned = producers.filter_map(|p| Some((p, draft.owners[p]?)));
        if let Some((producer, device)) = owned.find(|(_, device)| may(*device)) {
            draft.own(index, device, Reason::ExpandedDown(producer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{CPU, GPU, Sample};
    use super::*;

    /// Data flow counts, not the order of the list; and the accelerator goes first.
    #[test]
    fn producers_hand_on() {
        let mut sample = Sample::new();
        let x = sample.input(8);
        let (a, a_out) = sample.node(&[x], 8);
        let (b, b_out) = sample.node(&[x], 8);
        let (of_a, of_a_out) = sample.node(&[a_out], 8);
        let (of_b, _) = sample.node(&[b_out], 8);
        let (of_both, _) = sample.node(&[of_a_out, b_out], 8);
        let (of_none, _) = sample.node(&[x], 8);
        let mut draft = sample.draft();
        draft.own(a, CPU, Reason::Home);
        draft.own(b, GPU, Reason::Home);
        expand_down(&sample.0, &mut draft);
        assert_eq!((draft.owners[of_a], draft.reasons[of_a]), (Some(CPU), Reason::ExpandedDown(a)));
        assert_eq!((draft.owners[of_b], draft.reasons[of_b]), (Some(GPU), Reason::ExpandedDown(b)));
        assert_eq!((draft.owners[of_both], draft.reasons[of_both]), (Some(GPU), Reason::ExpandedDown(b)));
        assert_eq!(draft.owners[of_none], None);
    }
}
