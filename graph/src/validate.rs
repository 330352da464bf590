//! What is true of every plan, checked one by one. Tests run these after every stage; whoever changes a stage, or
//! writes plans of their own, can too.

use crate::{
    assign::{Assignment, Facts, Reason, Rules},
    devices::DeviceIndex,
    graph::{NodeIndex, Part, Region, StorageIndex, StorageKind},
    memory::{ALIGNMENT, Content, Memory, Slot},
    placement::Absorb,
    plan::Plan,
    split::Split,
    transfer::Transfer,
};
use thiserror::Error;

/// Something that must hold and does not.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Violation(String);

type Checked = Result<(), Violation>;

fn check(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Violation(what())) }
}

/// All of them, for a plan.
///
/// # Errors
/// The first violation.
pub fn plan(plan: &Plan) -> Checked {
    let facts = plan.facts();
    let assignment = Assignment {
        owners: plan.owners.clone(),
        reasons: plan.reasons.clone(),
        fall_backs: plan.fall_backs.clone(),
    };
    owners(facts, &plan.placement().rules(), &assignment)?;
    splits(facts, &plan.owners, &plan.order, &plan.splits)?;
    transfers(facts, &assignment, &plan.order, &plan.splits, &plan.transfers)?;
    ownership(&plan.placement().rules(), facts, &assignment, &plan.transfers)?;
    memory(facts, &plan.owners, &plan.order, &plan.splits, &plan.transfers, &plan.memory)
}

/// Facts that stages may rely on: indices in range, producers before readers, states and placed weights at home.
///
/// # Errors
/// The first violation.
pub fn facts(facts: &Facts) -> Checked {
    check(facts.devices > 0, || "there is no host".to_owned())?;
    for (index, storage) in facts.storages.iter().enumerate() {
        check(storage.home.is_none_or(|home| home < facts.devices), || {
            format!("storage {index}: home {storage:?}")
        })?;
        let must = storage.kind == StorageKind::State || storage.placed_by_user;
        check(!must || storage.home.is_some(), || format!("storage {index} has no home"))?;
    }
    for (index, node) in facts.nodes.iter().enumerate() {
        let known = |storage: &StorageIndex| *storage < facts.storages.len();
        check(node.writes.iter().all(known), || format!("node {index} writes what is not there"))?;
        check(node.after.iter().all(|&before| before < index), || {
            format!("node {index} runs before {:?}", node.after)
        })?;
        for read in &node.reads {
            check(known(&read.storage), || format!("node {index} reads what is not there"))?;
            let waits = read.producer.is_none_or(|producer| node.after.contains(&producer));
            check(waits, || format!("node {index} does not wait for what it reads"))?;
            let whole = facts.storages[read.storage].bytes;
            check(read.bytes <= whole, || format!("node {index} reads {} of {whole} bytes", read.bytes))?;
            let apart = storage_kind(facts, read.storage) != StorageKind::State
                || node.region.is_some_and(|region| region.state == read.storage);
            check(apart, || format!("node {index} reads state {} outside of its region", read.storage))?;
            let activation = facts.storages[read.storage].kind == StorageKind::Activation;
            check(!activation || read.producer.is_some(), || {
                format!("node {index} reads what nobody makes")
            })?;
        }
    }
    Ok(())
}

fn storage_kind(facts: &Facts, storage: StorageIndex) -> StorageKind {
    facts.storages[storage].kind
}

/// Between stages: owners are devices; with the check on, whoever touches a state is with it as soon as anything is
/// owned, and no stage after the claims takes a node of a region from its state's owner for a neighbour's sake, nor
/// for that of a weight that nobody placed, unless edges stay with their layers.
///
/// # Errors
/// The first violation.
pub fn draft(facts: &Facts, rules: &Rules, owners: &[Option<DeviceIndex>], reasons: &[Reason]) -> Checked {
    for (index, node) in facts.nodes.iter().enumerate() {
        let Some(owner) = owners[index] else { continue };
        check(owner < facts.devices, || format!("node {index} is on device {owner}"))?;
        if let Some(region) = node.region
            && rules.ownership_check
        {
            check(is_claimed(facts, rules, index, region, owner, reasons[index]), || {
                format!("node {index} is not with its state {}", region.state)
            })?;
        }
    }
    Ok(())
}

/// Whether a node of a region is with its state; or, as its edge, with its weight, where the user placed that or the
/// rules leave edges with their layers.
fn is_claimed(
    facts: &Facts,
    rules: &Rules,
    index: NodeIndex,
    region: Region,
    owner: DeviceIndex,
    reason: Reason,
) -> bool {
    let node = &facts.nodes[index];
    let reads = |storage| node.reads.iter().any(|read| read.storage == storage);
    if facts.storages[region.state].home == Some(owner) {
        return true;
    }
    if region.part == Part::Core || reads(region.state) || node.writes.contains(&region.state) {
        return false;
    }
    let with = |weight: StorageIndex| {
        let is_weight = reads(weight) && storage_kind(facts, weight) == StorageKind::Weight;
        let home = || facts.storages[weight].home.or(node.home).unwrap_or(facts.host());
        is_weight && home() == owner
    };
    match reason {
        Reason::Pinned(weight) => with(weight) && facts.storages[weight].placed_by_user,
        Reason::FollowsWeight(weight) => with(weight) && rules.absorb != Absorb::Owner,
        _ => false,
    }
}

/// Each node is owned once, by a device that can run it; with the check on, regions are at their state's owner
/// unless a reported fall-back says otherwise, or (for edges) a weight: one that the user placed, or any where edges
/// stay with their layers; stores are always.
///
/// # Errors
/// The first violation.
pub fn owners(facts: &Facts, rules: &Rules, assignment: &Assignment) -> Checked {
    let Assignment { owners, reasons, fall_backs } = assignment;
    let count = facts.nodes.len();
    check((owners.len(), reasons.len()) == (count, count), || {
        format!("{} owners of {count} nodes", owners.len())
    })?;
    for (index, node) in facts.nodes.iter().enumerate() {
        let owner = owners[index];
        check(owner < facts.devices, || format!("node {index} is on device {owner}"))?;
        check(node.runs_on.contains(owner), || {
            format!("node {index} is on device {owner}, which cannot run it")
        })?;
        if let Reason::ExpandedDown(named) | Reason::ExpandedUp(named) = reasons[index] {
            check(owners[named] == owner, || {
                format!("node {index} is said to be with {named}, which is elsewhere")
            })?;
        }
        let fell = fall_backs.iter().find(|fall_back| fall_back.node == index);
        check(fell.is_none_or(|f| f.runs_on == owner), || format!("node {index} did not fall back there"))?;
        check(fell.is_none() || !rules.strict, || format!("node {index} fell back in a strict plan"))?;
        let said = if let Reason::FellBack(wanted) = reasons[index] { Some(wanted) } else { None };
        check(said == fell.map(|fell| fell.wanted), || {
            format!("node {index} is said to belong on {said:?}, and its fall-back is {fell:?}")
        })?;
        check(said.is_none_or(|wanted| !node.runs_on.contains(wanted)), || {
            format!("node {index} fell back from a device that can run it")
        })?;
        for &storage in &node.writes {
            let state = &facts.storages[storage];
            let at_home = state.kind != StorageKind::State || state.home == Some(owner);
            check(at_home, || format!("node {index} writes state {storage} from device {owner}"))?;
        }
        if rules.ownership_check
            && fell.is_none()
            && let Some(region) = node.region
        {
            check(is_claimed(facts, rules, index, region, owner, reasons[index]), || {
                format!("node {index} is not with its state {}", region.state)
            })?;
        }
    }
    Ok(())
}

/// Every node once, after all that it waits for; splits are the maximal runs of one owner.
///
/// # Errors
/// The first violation.
pub fn splits(facts: &Facts, owners: &[DeviceIndex], order: &[NodeIndex], splits: &[Split]) -> Checked {
    let positions = positions(facts, order)?;
    for (index, node) in facts.nodes.iter().enumerate() {
        let waits = node.after.iter().all(|&before| positions[before] < positions[index]);
        check(waits, || format!("node {index} runs before one of {:?}", node.after))?;
    }
    let mut end = 0;
    for (index, split) in splits.iter().enumerate() {
        let follows = split.nodes.start == end && split.nodes.end > end && split.nodes.end <= order.len();
        check(follows, || format!("split {index} does not follow the one before"))?;
        let own = order[split.nodes.clone()].iter().all(|&node| owners[node] == split.device);
        check(own, || format!("split {index} has a node of another device"))?;
        let maximal = index == 0 || splits[index - 1].device != split.device;
        check(maximal, || format!("split {index} is on the device of the one before"))?;
        end = split.nodes.end;
    }
    check(end == order.len(), || "the splits do not cover the order".to_owned())
}

fn positions(facts: &Facts, order: &[NodeIndex]) -> Result<Vec<usize>, Violation> {
    let mut positions = vec![usize::MAX; facts.nodes.len()];
    for (position, &node) in order.iter().enumerate() {
        let fresh = positions.get(node) == Some(&usize::MAX);
        check(fresh, || format!("node {node} is twice in the order, or not in the graph"))?;
        positions[node] = position;
    }
    check(order.len() == facts.nodes.len(), || "the order lacks a node".to_owned())?;
    Ok(positions)
}

/// Whatever a node reads from elsewhere has crossed before its split; nothing crosses twice, unread, or before it
/// is made; weights never do.
///
/// # Errors
/// The first violation.
pub fn transfers(
    facts: &Facts,
    assignment: &Assignment,
    order: &[NodeIndex],
    splits: &[Split],
    transfers: &[Transfer],
) -> Checked {
    let owners = &assignment.owners;
    let positions = positions(facts, order)?;
    let mut used = vec![false; transfers.len()];
    let mut end = 0;
    for (index, split) in splits.iter().enumerate() {
        check(split.transfers.start == end, || format!("the transfers of split {index} do not follow"))?;
        end = split.transfers.end;
        check(end <= transfers.len(), || format!("split {index} has transfers that are not there"))?;
        for transfer in &transfers[split.transfers.clone()] {
            let right =
                transfer.before == index && transfer.to == split.device && transfer.from != transfer.to;
            check(right, || format!("{transfer:?} is not for split {index}"))?;
            let made = transfer.producer.is_none_or(|node| positions[node] < split.nodes.start);
            check(made, || format!("{transfer:?} comes before its bytes"))?;
        }
        for &node in &order[split.nodes.clone()] {
            for read in &facts.nodes[node].reads {
                let storage = &facts.storages[read.storage];
                let from = match storage.kind {
                    StorageKind::Weight => continue,
                    StorageKind::Input => Some(facts.host()),
                    StorageKind::State => storage.home,
                    StorageKind::Activation => read.producer.map(|producer| owners[producer]),
                };
                if from == Some(split.device) {
                    continue;
                }
                let brings = |t: &usize| {
                    let t = &transfers[*t];
                    (t.storage, t.producer, Some(t.from), t.to)
                        == (read.storage, read.producer, from, split.device)
                        && t.span.covers(&read.span)
                        && t.before <= index
                };
                let Some(found) = (0..transfers.len()).find(brings) else {
                    return Err(Violation(format!(
                        "node {node} reads storage {}, which has not crossed",
                        read.storage
                    )));
                };
                used[found] = true;
            }
        }
    }
    check(end == transfers.len(), || "a transfer is for no split".to_owned())?;
    for (index, transfer) in transfers.iter().enumerate() {
        check(used[index], || format!("{transfer:?} is not read"))?;
        check(transfer.kind != StorageKind::Weight, || format!("{transfer:?}: a weight crosses"))?;
        let again = transfers[..index].iter().find(|other| {
            (other.storage, other.producer, other.to) == (transfer.storage, transfer.producer, transfer.to)
                && (other.span.covers(&transfer.span) || transfer.span.covers(&other.span))
        });
        check(again.is_none(), || format!("{transfer:?} crosses twice"))?;
    }
    Ok(())
}

/// Contract C5: with the check on, no byte of a state crosses, except to a node whose fall-back is reported.
///
/// # Errors
/// The first violation.
pub fn ownership(rules: &Rules, facts: &Facts, assignment: &Assignment, transfers: &[Transfer]) -> Checked {
    if !rules.ownership_check {
        return Ok(());
    }
    for transfer in transfers.iter().filter(|transfer| transfer.kind == StorageKind::State) {
        let excused = assignment.fall_backs.iter().any(|fall_back| {
            let reads = facts.nodes[fall_back.node].reads.iter().any(|read| read.storage == transfer.storage);
            reads && fall_back.runs_on == transfer.to
        });
        check(excused, || format!("{transfer:?}: a state crosses, and no fall-back says why"))?;
    }
    Ok(())
}

/// Slots lie in their arenas, aligned; two of one device never overlap in bytes and in time; everything that a
/// node or a transfer reads is there when it does; outputs last to the end.
///
/// # Errors
/// The first violation.
pub fn memory(
    facts: &Facts,
    owners: &[DeviceIndex],
    order: &[NodeIndex],
    splits: &[Split],
    transfers: &[Transfer],
    memory: &Memory,
) -> Checked {
    for (index, slot) in memory.slots.iter().enumerate() {
        let arena = memory.arenas.get(slot.device).copied().unwrap_or(0);
        let inside = slot.offset.checked_add(slot.bytes).is_some_and(|end| end <= arena);
        check(inside, || format!("{slot:?} is not in its arena of {arena} bytes"))?;
        check(slot.offset.is_multiple_of(ALIGNMENT), || format!("{slot:?} is not aligned"))?;
        let bytes = match slot.content {
            Content::Storage(storage) => facts.storages.get(storage).map(|storage| storage.bytes),
            Content::Transfer(transfer) => transfers.get(transfer).map(|transfer| transfer.bytes),
        };
        check(bytes == Some(slot.bytes), || format!("{slot:?} is not of the size of what it holds"))?;
        check(slot.opens <= slot.closes, || format!("{slot:?} closes before it opens"))?;
        for other in &memory.slots[..index] {
            let apart = other.device != slot.device
                || other.closes < slot.opens
                || slot.closes < other.opens
                || other.offset + other.bytes <= slot.offset
                || slot.offset + slot.bytes <= other.offset;
            check(apart, || format!("{slot:?} and {other:?} overlap"))?;
        }
    }
    let find = |content: Content| memory.slots.iter().find(|slot| slot.content == content);
    let holds = |slot: Option<&Slot>, position: usize| {
        slot.is_some_and(|slot| slot.opens <= position && position <= slot.closes)
    };
    for (index, transfer) in transfers.iter().enumerate() {
        let start = splits[transfer.before].nodes.start;
        check(holds(find(Content::Transfer(index)), start), || format!("{transfer:?} has no room"))?;
        if transfer.kind == StorageKind::Activation {
            let source = find(Content::Storage(transfer.storage));
            check(holds(source, start), || format!("{transfer:?} fetches bytes that are gone"))?;
        }
    }
    for (position, &node) in order.iter().enumerate() {
        let device = owners[node];
        for &storage in
            facts.nodes[node].writes.iter().filter(|&&s| facts.storages[s].kind == StorageKind::Activation)
        {
            let slot = find(Content::Storage(storage));
            check(holds(slot, position), || format!("node {node} writes where there is no room"))?;
            let end = order.len() - 1;
            check(!facts.storages[storage].output || holds(slot, end), || {
                format!("output {storage} is gone")
            })?;
        }
        for read in &facts.nodes[node].reads {
            let made = find(Content::Storage(read.storage)).filter(|slot| slot.device == device);
            let brought = transfers.iter().enumerate().filter(|(_, t)| {
                (t.storage, t.producer, t.to) == (read.storage, read.producer, device)
                    && t.span.covers(&read.span)
            });
            let mut slots =
                made.into_iter().chain(brought.filter_map(|(index, _)| find(Content::Transfer(index))));
            let kept = match facts.storages[read.storage].kind {
                StorageKind::Weight => true,
                StorageKind::State if facts.storages[read.storage].home == Some(device) => true,
                _ => slots.any(|slot| holds(Some(slot), position)),
            };
            check(kept, || format!("node {node} reads storage {}, which is gone", read.storage))?;
        }
    }
    Ok(())
}
