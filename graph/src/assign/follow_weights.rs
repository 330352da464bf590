//! Stage 3: weights are large and stay where they are loaded, so nodes come to them.

use super::{Draft, Facts, Reason};

/// An open node that reads a weight goes where the weight is; where the largest is, if it reads several.
pub(super) fn follow_weights(facts: &Facts, draft: &mut Draft) {
    for node in 0..facts.nodes.len() {
        if draft.owners[node].is_some() {
            continue;
        }
        if let Some(weight) = facts.largest_weight(node, |_| true) {
            let device = draft.homes[weight].unwrap_or(facts.home(node));
            draft.own(node, device, Reason::FollowsWeight(weight));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{CPU, GPU, Sample};
    use super::*;

    #[test]
    fn the_largest_weight_decides_and_the_first_of_equals() {
        let mut sample = Sample::new();
        let (a, b, c) = (sample.weight(8, GPU), sample.weight(16, CPU), sample.weight(16, GPU));
        let (large, _) = sample.node(&[a, b], 8);
        let (equal, _) = sample.node(&[c, b], 8);
        let mut draft = sample.draft();
        follow_weights(&sample.0, &mut draft);
        assert_eq!((draft.owners[large], draft.reasons[large]), (Some(CPU), Reason::FollowsWeight(b)));
        assert_eq!((draft.owners[equal], draft.reasons[equal]), (Some(GPU), Reason::FollowsWeight(c)));
    }

    #[test]
    fn a_weight_of_many_homes_is_at_the_readers() {
        let mut sample = Sample::new();
        let table = sample.weight(8, GPU);
        sample.0.storages[table].home = None;
        let (host, _) = sample.node(&[table], 8);
        let (gpu, _) = sample.node(&[table], 8);
        sample.0.nodes[gpu].home = Some(GPU);
        let mut draft = sample.draft();
        follow_weights(&sample.0, &mut draft);
        assert_eq!((draft.owners[host], draft.owners[gpu]), (Some(CPU), Some(GPU)));
    }
}
