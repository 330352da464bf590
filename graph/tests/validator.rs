//! The validator can fail: each way to spoil a valid plan is found, by the check that is meant to find it.

#[allow(dead_code)]
#[path = "support/model.rs"]
mod model;

use backend_api::{Capacity, NullDevice};
use graph::{Absorb, Content, Devices, Memory, Placement, Plan, Reason, StorageKind, validate};
use model::SMALL;
use std::sync::Arc;

/// A plan with caches in main memory and all else on an accelerator.
fn valid() -> Plan {
    planned(|_| ())
}

/// The same with other wishes.
fn planned(wish: impl FnOnce(&mut Placement)) -> Plan {
    let graph = model::build(&SMALL).expect("a graph");
    let device = |name| Arc::new(NullDevice::new(name, 1 << 30));
    let devices = Devices::new(vec![device("gpu"), device("cpu")]);
    let states = graph.storages_of(StorageKind::State).map(|(_, state)| (state.name.clone(), 1)).collect();
    let mut placement = Placement { states, ..Placement::all_on(0, SMALL.layers + 1) };
    wish(&mut placement);
    let capacity = Capacity { rows: 4, outputs: 1, kv_len: SMALL.capacity };
    Plan::new(&graph, &placement, &devices, capacity).expect("a plan")
}

fn node(plan: &Plan, name: &str) -> usize {
    plan.graph().nodes().iter().position(|node| node.name == name).expect("a node")
}

/// The edge of the first layer's region, and the weight that it reads.
fn read_by_edge(plan: &Plan, name: &str) -> (usize, usize) {
    let edge = node(plan, &format!("blk.0.{name}"));
    let mut read = plan.facts().nodes[edge].reads.iter().map(|read| read.storage);
    let weight = read.find(|&storage| plan.facts().storages[storage].kind == StorageKind::Weight);
    (edge, weight.expect("a weight"))
}

/// Two slots of one device that live at the same time.
fn neighbours(memory: &Memory) -> (usize, usize) {
    let slots = &memory.slots;
    let together = |a: usize, b: usize| {
        let (a, b) = (&slots[a], &slots[b]);
        a.device == b.device && a.opens <= b.closes && b.opens <= a.closes
    };
    let pairs = (0..slots.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
    pairs.into_iter().find(|&(a, b)| together(a, b)).expect("neighbours")
}

#[test]
fn a_spoilt_plan_is_found() {
    assert_eq!(validate::plan(&valid()), Ok(()));
    type Spoil = fn(&mut Plan);
    let table: &[(Spoil, &str)] = &[
        (|p| p.owners.truncate(3), "owners of"),
        (|p| p.owners[0] = 7, "is on device 7"),
        (
            |p| {
                let store = node(p, "blk.0.kv_store");
                p.owners[store] = 0;
            },
            "writes state",
        ),
        (
            |p| {
                let attention = node(p, "blk.0.attention");
                p.owners[attention] = 0;
            },
            "is not with its state",
        ),
        (
            |p| {
                let (edge, weight) = read_by_edge(p, "v_absorb");
                (p.owners[edge], p.reasons[edge]) = (0, Reason::FollowsWeight(weight));
            },
            "is not with its state",
        ),
        (|p| p.reasons[0] = Reason::FellBack(0), "is said to belong on"),
        (
            |p| {
                let (node, runs_on) = (0, p.owners[0]);
                let (along, why) = (Vec::new(), String::new());
                p.reasons[0] = Reason::FellBack(0);
                p.fall_backs.push(graph::FallBack {
                    node,
                    wanted: 0,
                    runs_on,
                    along,
                    bytes: 0,
                    state_bytes: 0,
                    why,
                });
            },
            "fell back from a device that can run it",
        ),
        (|p| p.order.swap(0, 5), "runs before"),
        (|p| p.order[0] = p.order[1], "twice in the order"),
        (|p| p.splits[1].nodes.start += 1, "does not follow"),
        (|p| p.splits[1].device = 1, "has a node of another device"),
        (
            |p| {
                let at = p.splits[1].nodes.start + 1;
                let mut second = p.splits[1].clone();
                (p.splits[1].nodes.end, second.nodes.start) = (at, at);
                p.splits.insert(2, second);
            },
            "is on the device of the one before",
        ),
        (
            |p| {
                p.splits.pop();
            },
            "do not cover",
        ),
        (|p| p.transfers[0].before += 1, "is not for split"),
        (|p| p.transfers[0].span.row -= 1, "has not crossed"),
        (|p| p.transfers[1].storage = p.transfers[0].storage, "has not crossed"),
        (
            |p| {
                let again = p.transfers[0].clone();
                p.transfers.insert(0, again);
                for (index, split) in p.splits.iter_mut().enumerate() {
                    split.transfers.end += usize::from(index >= 1);
                    split.transfers.start += usize::from(index >= 2);
                }
            },
            "is not read",
        ),
        (|p| p.memory.arenas[0] -= 64, "is not in its arena"),
        (|p| p.memory.slots[0].bytes -= 4, "is not of the size"),
        (|p| p.memory.slots[0].offset += 4, "is not aligned"),
        (
            |p| {
                let (a, b) = neighbours(&p.memory);
                p.memory.slots[a].offset = p.memory.slots[b].offset;
            },
            "overlap",
        ),
        (|p| p.memory.slots.retain(|slot| !matches!(slot.content, Content::Transfer(_))), "has no room"),
        (
            |p| {
                let crossing =
                    p.transfers.iter().find(|t| t.kind == StorageKind::Activation).expect("one").storage;
                p.memory.slots.retain(|slot| slot.content != Content::Storage(crossing));
            },
            "fetches bytes that are gone",
        ),
        (
            |p| {
                let last = p.order.len() - 1;
                for slot in p.memory.slots.iter_mut().filter(|slot| slot.closes == last) {
                    slot.closes -= usize::from(slot.closes > slot.opens);
                }
            },
            "which is gone",
        ),
    ];
    for (index, (spoil, expected)) in table.iter().enumerate() {
        let mut plan = valid();
        spoil(&mut plan);
        let error = validate::plan(&plan).expect_err(expected).to_string();
        assert!(error.contains(expected), "spoil {index}: expected `{expected}`, found `{error}`");
    }
}

/// The edge of a region may be away from its state where `absorb` or the user says so: with its weight, and nowhere else.
#[test]
fn an_edge_is_where_it_may_be() {
    let owners = |plan: &Plan, rules: &graph::assign::Rules| {
        let assignment = graph::assign::Assignment {
            owners: plan.owners.clone(),
            reasons: plan.reasons.clone(),
            fall_backs: Vec::new(),
        };
        validate::owners(plan.facts(), rules, &assignment)
    };
    let layer = planned(|placement| placement.absorb = Absorb::Layer);
    let (edge, weight) = read_by_edge(&layer, "q_absorb");
    assert_eq!((layer.owners[edge], layer.reasons[edge]), (0, Reason::FollowsWeight(weight)));
    assert_eq!(validate::plan(&layer), Ok(()));
    assert!(owners(&layer, &valid().placement().rules()).is_err(), "edges were to be with their states");
    // A neighbour is no weight, and the state no weight either.
    let region = layer.graph().nodes()[edge].region.expect("a region");
    for reason in [Reason::ExpandedUp(edge), Reason::FewerBytes, Reason::FollowsWeight(region.state)] {
        let mut plan = layer.clone();
        plan.reasons[edge] = reason;
        assert!(owners(&plan, &plan.placement().rules()).is_err(), "{reason:?}");
    }
    let user = planned(|placement| placement.weights = [("blk.0.attn_k_b.weight".to_owned(), 0)].into());
    assert_eq!((user.owners[edge], user.reasons[edge]), (0, Reason::Pinned(weight)));
    assert_eq!(validate::plan(&user), Ok(()));
    let mut spoilt = layer.clone();
    spoilt.reasons[edge] = Reason::Pinned(weight);
    assert!(owners(&spoilt, &spoilt.placement().rules()).is_err(), "the user placed nothing");
}

/// C5: a state that crosses is found, where the check is on.
#[test]
fn a_state_that_crosses_is_found() {
    let plan = valid();
    let off = Placement { ownership_check: false, ..plan.placement().clone() };
    let device = |name| Arc::new(NullDevice::new(name, 1 << 30));
    let devices = Devices::new(vec![device("gpu"), device("cpu")]);
    let crossing = Plan::new(plan.graph(), &off, &devices, plan.capacity).expect("a plan");
    assert_eq!(validate::plan(&crossing), Ok(()));
    let assignment = graph::assign::Assignment {
        owners: crossing.owners.clone(),
        reasons: crossing.reasons.clone(),
        fall_backs: Vec::new(),
    };
    let rules = plan.placement().rules();
    let error = validate::ownership(&rules, crossing.facts(), &assignment, &crossing.transfers).unwrap_err();
    assert!(error.to_string().contains("a state crosses, and no fall-back says why"), "{error}");
    assert!(validate::owners(crossing.facts(), &rules, &assignment).is_err());
}
