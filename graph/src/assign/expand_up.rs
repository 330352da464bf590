//! Stage 5: against data flow, for what nothing above has a place.

use super::{Draft, Facts, Reason};
use crate::devices::DeviceIndex;

/// An open node takes the owner of its first consumer that has one, accelerators first; a node that is connected
/// to nothing that has a place goes home.
pub(super) fn expand_up(facts: &Facts, draft: &mut Draft) {
    let host = facts.host();
    sweep(facts, draft, |device| device != host);
    sweep(facts, draft, |_| true);
    for node in 0..facts.nodes.len() {
        if draft.owners[node].is_none() {
            draft.own(node, facts.home(node), Reason::Home);
        }
    }
}

fn sweep(facts: &Facts, draft: &mut Draft, may: impl Fn(DeviceIndex) -> bool) {
    for index in (0..facts.nodes.len()).rev() {
        if draft.owners[index].is_some() {
            continue;
        }
        let made = facts.nodes[index].writes.iter();
        let consumers = made.flat_map(|&storage| draft.readers[storage].iter().copied());
        let mut owned = consumers.filter_map(|c| Some((c, draft.owners[c]?)));
        if let Some((consumer, device)) = owned.find(|(_, device)| may(*device)) {
            draft.own(index, device, Reason::ExpandedUp(consumer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{CPU, GPU, Sample};
    use super::*;

    #[test]
    fn consumers_draw_and_the_rest_goes_home() {
        let mut sample = Sample::new();
        let x = sample.input(8);
        let (first, first_out) = sample.node(&[x], 8);
        let (second, second_out) = sample.node(&[first_out], 8);
        let (host, _) = sample.node(&[second_out], 8);
        let (gpu, _) = sample.node(&[second_out], 8);
        let (alone, _) = sample.node(&[x], 8);
        let mut draft = sample.draft();
        draft.own(host, CPU, Reason::Pinned(0));
        draft.own(gpu, GPU, Reason::Pinned(0));
        expand_up(&sample.0, &mut draft);
        assert_eq!((draft.owners[second], draft.reasons[second]), (Some(GPU), Reason::ExpandedUp(gpu)));
        assert_eq!((draft.owners[first], draft.reasons[first]), (Some(GPU), Reason::ExpandedUp(second)));
        assert_eq!((draft.owners[alone], draft.reasons[alone]), (Some(CPU), Reason::Home));
    }
}
