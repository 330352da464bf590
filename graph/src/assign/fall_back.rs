//! Stage 7: what its owner cannot run goes elsewhere, and what that costs is reported.
//!
//! What a weight, a state or the user placed goes alone, to the device for which the fewest bytes cross. What only
//! neighbours placed is [settled](super::settle) again among the devices that can run it: it may take neighbours along,
//! and where no more bytes cross than before, nothing has fallen back.

use super::{
    AssignError, Assignment, Draft, Facts, FallBack, Reason, Rules, Traffic,
    moves::{moves, traffic},
    settle::{Reach, place},
};
use crate::{
    devices::DeviceIndex,
    graph::{NodeIndex, StorageKind},
};

/// Moves what its owner cannot run.
///
/// # Errors
/// A node that nobody runs; a store, which cannot leave its state; any that would fall back, if the rules are strict.
pub(super) fn fall_back(facts: &Facts, rules: &Rules, draft: Draft) -> Result<Assignment, AssignError> {
    let wanted: Vec<DeviceIndex> = draft.owners.iter().map(|o| o.unwrap_or(facts.host())).collect();
    let is_unable = |node: NodeIndex| !facts.nodes[node].runs_on.contains(wanted[node]);
    let unable: Vec<NodeIndex> = (0..wanted.len()).filter(|&node| is_unable(node)).collect();
    let mut assignment =
        Assignment { owners: wanted.clone(), reasons: draft.reasons.clone(), fall_backs: Vec::new() };
    if unable.is_empty() {
        return Ok(assignment);
    }
    may_leave(facts, &wanted, &unable)?;
    let placed = elsewhere(facts, &draft, &wanted, &unable);
    for nodes in moves(facts, &draft, &wanted, &placed) {
        let fallen = || nodes.iter().copied().filter(|&node| is_unable(node));
        // As good as where they were, and no more.
        let Some(first) = fallen().next() else { continue };
        nodes.iter().for_each(|&node| assignment.owners[node] = placed[node]);
        let had_a_say = fallen().find(|&node| !draft.reasons[node].is_of_neighbours());
        let [before, after] = [&wanted, &placed].map(|owners| traffic(facts, &draft, owners, &nodes).total());
        if had_a_say.is_none() && after <= before {
            continue;
        }
        if rules.strict {
            let node = had_a_say.unwrap_or(first);
            return Err(AssignError::Strict { node, device: wanted[node] });
        }
        for &node in &nodes {
            let reason = if is_unable(node) { Reason::FellBack(wanted[node]) } else { Reason::FewerBytes };
            assignment.reasons[node] = reason;
        }
        let mut fall_backs: Vec<FallBack> =
            fallen().map(|node| new(node, wanted[node], placed[node])).collect();
        let with: Vec<NodeIndex> = nodes.iter().copied().filter(|&node| !is_unable(node)).collect();
        for (node, fallen) in nearest(facts, &with, &fallen().collect::<Vec<_>>()) {
            fall_backs[fallen].along.push((node, wanted[node]));
        }
        assignment.fall_backs.append(&mut fall_backs);
    }
    assignment.fall_backs.sort_by_key(|fall_back| fall_back.node);
    count(facts, &draft, &assignment.owners, &mut assignment.fall_backs);
    Ok(assignment)
}

fn new(node: NodeIndex, wanted: DeviceIndex, runs_on: DeviceIndex) -> FallBack {
    FallBack { node, wanted, runs_on, along: Vec::new(), bytes: 0, state_bytes: 0, why: String::new() }
}

/// Of the nodes `with`, in their order, which of the `fallen` each is next to: over the fewest values.
fn nearest(facts: &Facts, with: &[NodeIndex], fallen: &[NodeIndex]) -> Vec<(NodeIndex, usize)> {
    let mut of_value: Vec<Option<usize>> = vec![None; facts.storages.len()];
    for (index, &node) in fallen.iter().enumerate() {
        facts.touched(node).for_each(|value| of_value[value] = of_value[value].or(Some(index)));
    }
    let mut found: Vec<Option<usize>> = vec![None; with.len()];
    while let Some(unknown) = found.iter().position(Option::is_none) {
        let next: Vec<(usize, usize)> = (unknown..with.len())
            .filter(|&at| found[at].is_none())
            .filter_map(|at| Some((at, facts.touched(with[at]).find_map(|value| of_value[value])?)))
            .collect();
        // A move hangs together; should it not, the first pays.
        let next = if next.is_empty() { vec![(unknown, 0)] } else { next };
        for (at, index) in next {
            found[at] = Some(index);
            facts.touched(with[at]).for_each(|value| of_value[value] = of_value[value].or(Some(index)));
        }
    }
    with.iter().copied().zip(found.into_iter().flatten()).collect()
}

fn may_leave(facts: &Facts, wanted: &[DeviceIndex], unable: &[NodeIndex]) -> Result<(), AssignError> {
    for &node in unable {
        if facts.able(node).next().is_none() {
            return Err(AssignError::Nobody { node });
        }
        if facts.nodes[node].writes.iter().any(|&s| facts.storages[s].kind == StorageKind::State) {
            return Err(AssignError::Store { node, device: wanted[node] });
        }
    }
    Ok(())
}

/// Where everything goes so that all can run. Those who had a say go first and their neighbours follow; then once more,
/// as the first of them did not know where others would go. The better counts.
fn elsewhere(facts: &Facts, draft: &Draft, wanted: &[DeviceIndex], unable: &[NodeIndex]) -> Vec<DeviceIndex> {
    let had_a_say: Vec<NodeIndex> =
        unable.iter().copied().filter(|&node| !draft.reasons[node].is_of_neighbours()).collect();
    let around = |others: &[DeviceIndex]| {
        let mut others = others.to_vec();
        let mut owners = wanted.to_vec();
        for &node in &had_a_say {
            let cost = |device: &DeviceIndex| {
                others[node] = *device;
                traffic(facts, draft, &others, &[node]).total()
            };
            let best = facts.able(node).min_by_key(cost).unwrap_or(wanted[node]);
            (others[node], owners[node]) = (best, best);
        }
        place(facts, draft, &owners, Reach::Able)
    };
    let first = around(wanted);
    if had_a_say.is_empty() {
        return first;
    }
    let second = around(&first);
    let everything: Vec<NodeIndex> = (0..wanted.len()).collect();
    let [costs, less] = [&first, &second].map(|owners| traffic(facts, draft, owners, &everything).total());
    if less < costs { second } else { first }
}

/// What each costs, one after the other from where all are that every device should have.
fn count(facts: &Facts, draft: &Draft, owners: &[DeviceIndex], fall_backs: &mut [FallBack]) {
    let mut now = owners.to_vec();
    for FallBack { node, wanted, along, .. } in fall_backs.iter() {
        now[*node] = *wanted;
        along.iter().for_each(|&(node, wanted)| now[node] = wanted);
    }
    for fall_back in fall_backs {
        let nodes: Vec<NodeIndex> =
            [fall_back.node].into_iter().chain(fall_back.along.iter().map(|(node, _)| *node)).collect();
        let stayed = traffic(facts, draft, &now, &nodes);
        nodes.iter().for_each(|&node| now[node] = owners[node]);
        let moved = traffic(facts, draft, &now, &nodes);
        let more = |of: fn(&Traffic) -> u64| of(&moved) as i64 - of(&stayed) as i64;
        fall_back.bytes = more(Traffic::total);
        fall_back.state_bytes = more(|traffic| traffic.state);
    }
}

/// The same fall-backs with what they cost by other facts: those of a smaller step.
pub(crate) fn recount(facts: &Facts, owners: &[DeviceIndex], fall_backs: &[FallBack]) -> Vec<FallBack> {
    let mut fall_backs = fall_backs.to_vec();
    count(facts, &Draft::new(facts), owners, &mut fall_backs);
    fall_backs
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
        for strict in [false, true] {
            let error = fall_back(&layer.sample.0, &Rules { strict, ..RULES }, layer.sample.draft());
            assert_eq!(error, Err(AssignError::Nobody { node: 0 }));
        }
    }

    /// Neighbours go along where that saves bytes, whoever placed what falls back; the cost is that of all of them.
    #[test]
    fn neighbours_go_along() {
        for placed in [true, false] {
            let mut sample = Sample::new();
            let x = sample.input(8);
            let (before, before_out) = sample.node(&[x], 100);
            let (lacking, lacking_out) = sample.node(&[before_out], 900);
            let (along, along_out) = sample.node(&[lacking_out], 10);
            let (after, _) = sample.node(&[along_out], 100);
            sample.0.nodes[lacking].runs_on = DeviceSet::default().with(CPU);
            let mut draft = sample.draft();
            for node in [before, after] {
                draft.own(node, GPU, Reason::Pinned(0));
            }
            draft.own(lacking, GPU, if placed { Reason::Pinned(0) } else { Reason::ExpandedDown(before) });
            draft.own(along, GPU, Reason::ExpandedDown(lacking));
            let found = fall_back(&sample.0, &RULES, draft).expect("the host runs it");
            assert_eq!(found.owners, [GPU, CPU, CPU, GPU]);
            assert_eq!(found.reasons[lacking..=along], [Reason::FellBack(GPU), Reason::FewerBytes]);
            let FallBack { node, bytes, along: ref moved, .. } = found.fall_backs[0];
            assert_eq!((node, bytes, &moved[..]), (lacking, 110, &[(along, GPU)][..]));
        }
    }

    /// Nothing has fallen back where another place is as good, whatever has elsewhere among its neighbours' neighbours.
    #[test]
    fn an_equal_place_is_no_fall_back() {
        let mut sample = Sample::new();
        let x = sample.input(8);
        let (before, before_out) = sample.node(&[x], 100);
        let (open, open_out) = sample.node(&[before_out], 100);
        let (after, after_out) = sample.node(&[open_out], 100);
        let (costly, costly_out) = sample.node(&[after_out, before_out], 100);
        let (last, _) = sample.node(&[costly_out], 8);
        for node in [open, costly] {
            sample.0.nodes[node].runs_on = DeviceSet::default().with(CPU);
        }
        let mut draft = sample.draft();
        for (node, device) in [(before, GPU), (after, CPU), (last, GPU)] {
            draft.own(node, device, Reason::Pinned(0));
        }
        for node in [open, costly] {
            draft.own(node, GPU, Reason::ExpandedDown(before));
        }
        let found = fall_back(&sample.0, &RULES, draft.clone()).expect("the host runs it");
        assert_eq!(found.owners, [GPU, CPU, CPU, CPU, GPU]);
        // The value before both crosses already, for the first of them.
        assert!(found.fall_backs.is_empty(), "{:?}", found.fall_backs);
        let strict = Rules { strict: true, ..RULES };
        assert!(fall_back(&sample.0, &strict, draft).is_ok());
    }

    /// Of two that cannot run, the second decides where the first is better off.
    #[test]
    fn the_first_learns_where_others_went() {
        let mut sample = Sample::new();
        sample.0.devices = 3;
        let (first, second, host) = (0, 1, 2);
        let x = sample.input(8);
        let (before, before_out) = sample.node(&[x], 100);
        let (weighed, weighed_out) = sample.node(&[before_out], 100);
        let (open, open_out) = sample.node(&[weighed_out], 8);
        let (after, _) = sample.node(&[open_out], 8);
        let on =
            |devices: &[DeviceIndex]| devices.iter().copied().fold(DeviceSet::default(), DeviceSet::with);
        sample.0.nodes[weighed].runs_on = on(&[second, host]);
        sample.0.nodes[open].runs_on = on(&[host]);
        let mut draft = sample.draft();
        draft.own(before, first, Reason::Pinned(0));
        draft.own(weighed, first, Reason::FollowsWeight(0));
        draft.own(open, first, Reason::ExpandedDown(weighed));
        draft.own(after, host, Reason::Pinned(0));
        let found = fall_back(&sample.0, &RULES, draft).expect("the host runs both");
        assert_eq!(found.owners, [first, host, host, host]);
    }
}
