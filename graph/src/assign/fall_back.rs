//! Stage 7: what an owner cannot run goes elsewhere, alone, and is reported. Of what only neighbours had a say in, the
//! stage before has decided where it goes, and left word in its reason.

use super::{
    AssignError, Assignment, Draft, Facts, FallBack, Reason, Rules, Traffic,
    traffic::{crossing, origin},
};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, StorageKind},
};

/// Moves each node that its owner cannot run to the device that can and for which the fewest bytes cross.
///
/// # Errors
/// A node that nobody runs; a store, which cannot leave its state; any, if the rules are strict.
pub(super) fn fall_back(facts: &Facts, rules: &Rules, mut draft: Draft) -> Result<Assignment, AssignError> {
    let mut owners: Vec<DeviceIndex> = draft.owners.iter().map(|o| o.unwrap_or(facts.host())).collect();
    // Each moves from where it belongs, one after the other, so that each has its own cost.
    let mut settled = vec![None; owners.len()];
    for (index, reason) in draft.reasons.iter().enumerate() {
        if let Reason::FellBack(wanted) = *reason {
            settled[index] = Some(std::mem::replace(&mut owners[index], wanted));
        }
    }
    let mut fall_backs = Vec::new();
    for (index, node) in facts.nodes.iter().enumerate() {
        let wanted = owners[index];
        if node.runs_on.contains(wanted) {
            continue;
        }
        if node.writes.iter().any(|&s| facts.storages[s].kind == StorageKind::State) {
            return Err(AssignError::Store { node: index, device: wanted });
        }
        if rules.strict {
            return Err(AssignError::Strict { node: index, device: wanted });
        }
        let stayed = traffic(facts, &draft, &owners, index, wanted);
        let may = |&device: &DeviceIndex| settled[index].is_none_or(|settled| settled == device);
        let candidates = node.runs_on.iter().take_while(|&device| device < facts.devices).filter(may);
        let costs = candidates.map(|device| (device, traffic(facts, &draft, &owners, index, device)));
        let Some((device, moved)) = costs.min_by_key(|(_, traffic)| traffic.total()) else {
            return Err(AssignError::Nobody { node: index });
        };
        owners[index] = device;
        draft.reasons[index] = Reason::FellBack(wanted);
        let (bytes, state_bytes) = more(moved, stayed);
        let why = String::new();
        fall_backs.push(FallBack { node: index, wanted, runs_on: device, bytes, state_bytes, why });
    }
    Ok(Assignment { owners, reasons: draft.reasons, fall_backs })
}

fn more(moved: Traffic, stayed: Traffic) -> (u64, u64) {
    (moved.total().saturating_sub(stayed.total()), moved.state.saturating_sub(stayed.state))
}

/// The same fall-backs with what they cost by other facts: those of a smaller step.
pub(crate) fn recount(facts: &Facts, owners: &[DeviceIndex], fall_backs: &[FallBack]) -> Vec<FallBack> {
    let draft = Draft::new(facts);
    let mut owners = owners.to_vec();
    for fall_back in fall_backs {
        owners[fall_back.node] = fall_back.wanted;
    }
    // One after the other, as they were found.
    let of_each = fall_backs.iter().map(|fall_back| {
        let FallBack { node, wanted, runs_on, .. } = *fall_back;
        let [stayed, moved] = [wanted, runs_on].map(|device| traffic(facts, &draft, &owners, node, device));
        owners[node] = runs_on;
        let (bytes, state_bytes) = more(moved, stayed);
        FallBack { bytes, state_bytes, ..fall_back.clone() }
    });
    of_each.collect()
}

/// Bytes that cross of everything a node reads and makes, if it were on `device`.
fn traffic(
    facts: &Facts,
    draft: &Draft,
    owners: &[DeviceIndex],
    node: NodeIndex,
    device: DeviceIndex,
) -> Traffic {
    let owner = |n: NodeIndex| if n == node { device } else { owners[n] };
    let facts_of = &facts.nodes[node];
    let mut touched: Vec<_> = facts_of.reads.iter().map(|read| read.storage).collect();
    touched.extend(&facts_of.writes);
    touched.sort_unstable();
    touched.dedup();
    let mut sum = Traffic::default();
    for storage in touched {
        if let Some(from) = origin(facts, storage, draft.makers[storage], &draft.homes, owner) {
            let (bytes, _) = crossing(facts, storage, from, &draft.readers[storage], owner);
            sum += Traffic::of(facts.storages[storage].kind, bytes);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::super::{
        DeviceSet,
        sample::{CPU, GPU, RULES, Sample, layer},
    };
    use super::*;

    #[test]
    fn a_node_leaves_alone_and_its_bytes_are_told() {
        let mut sample = Sample::new();
        let x = sample.input(8);
        let (before, before_out) = sample.node(&[x], 100);
        let (lacking, lacking_out) = sample.node(&[before_out], 60);
        let (after, _) = sample.node(&[lacking_out], 8);
        sample.0.nodes[lacking].runs_on = DeviceSet::default().with(CPU);
        let mut draft = sample.draft();
        for node in [before, lacking, after] {
            draft.own(node, GPU, Reason::Pinned(0));
        }
        let found = fall_back(&sample.0, &RULES, draft.clone()).expect("the host runs it");
        assert_eq!(found.owners, [GPU, CPU, GPU]);
        assert_eq!(found.reasons[lacking], Reason::FellBack(GPU));
        let FallBack { node, wanted, runs_on, bytes, state_bytes, .. } = found.fall_backs[0];
        assert_eq!((node, wanted, runs_on, bytes, state_bytes), (lacking, GPU, CPU, 160, 0));
        let strict = Rules { strict: true, ..RULES };
        let error = fall_back(&sample.0, &strict, draft);
        assert_eq!(error, Err(AssignError::Strict { node: lacking, device: GPU }));
    }

    #[test]
    fn a_store_cannot_leave_and_nobody_is_nobody() {
        let mut layer = layer();
        layer.sample.0.nodes[layer.store].runs_on = DeviceSet::default().with(GPU);
        let draft = layer.sample.draft();
        let error = fall_back(&layer.sample.0, &RULES, draft);
        assert_eq!(error, Err(AssignError::Store { node: layer.store, device: CPU }));
        layer.sample.0.nodes[0].runs_on = DeviceSet::default();
        let error = fall_back(&layer.sample.0, &RULES, layer.sample.draft());
        assert_eq!(error, Err(AssignError::Nobody { node: 0 }));
    }
}
