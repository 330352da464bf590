//! A plan in words: as a table, and as JSON that scripts read.

use crate::{
    assign::{Reason, Traffic},
    graph::{NodeIndex, StorageIndex, StorageKind},
    plan::{Needs, Plan},
};
use backend_api::Step;
use serde::Serialize;
use std::{collections::BTreeMap, fmt};

/// Everything a person wants to know about a plan, with names instead of indices.
///
/// Its [`Display`](fmt::Display) is a table; serialised, it is the JSON that `placement` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// In the order in which they run.
    pub splits: Vec<SplitReport>,
    /// Bytes that cross in the step, by kind.
    pub bytes_per_step: Traffic,
    /// What each device must have.
    pub memory: BTreeMap<String, Needs>,
    /// Nodes that do not run where they belong.
    pub fall_backs: Vec<FallBackReport>,
}

/// A run of one owner.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SplitReport {
    /// The owner.
    pub device: String,
    /// In the order in which they run.
    pub nodes: Vec<NodeReport>,
    /// What crosses before.
    pub transfers: Vec<TransferReport>,
}

/// A node, its owner, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeReport {
    /// The node's name.
    pub name: String,
    /// The operation's name.
    pub op: String,
    /// The owner's name.
    pub owner: String,
    /// Why, in words.
    pub reason: String,
}

/// Bytes that cross.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TransferReport {
    /// Of what.
    pub value: String,
    /// What the bytes are.
    pub kind: StorageKind,
    /// Name of the device where they are made.
    pub from: String,
    /// Name of the device where they are read.
    pub to: String,
    /// How many in the step.
    pub bytes: u64,
}

/// A node that does not run where it belongs, and what that costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FallBackReport {
    /// The node's name.
    pub node: String,
    /// Where it belongs.
    pub wanted: String,
    /// Where it runs.
    pub runs_on: String,
    /// Why not where it belongs.
    pub why: String,
    /// Neighbours that went along.
    pub along: Vec<String>,
    /// Bytes that cross more in the step, than if all had stayed that fell back after it.
    pub bytes: i64,
    /// Of these, bytes of states.
    pub state_bytes: i64,
}

impl Report {
    /// The report of a plan, with the bytes of one step.
    pub fn new(plan: &Plan, step: &Step) -> Self {
        let name = |device: usize| plan.devices[device].clone();
        let splits = plan.splits.iter().map(|split| SplitReport {
            device: name(split.device),
            nodes: plan.order[split.nodes.clone()].iter().map(|&node| node_report(plan, node)).collect(),
            transfers: plan.transfers[split.transfers.clone()]
                .iter()
                .map(|transfer| TransferReport {
                    value: storage_name(plan, transfer.storage).to_owned(),
                    kind: transfer.kind,
                    from: name(transfer.from),
                    to: name(transfer.to),
                    bytes: transfer.span.bytes(step) as u64,
                })
                .collect(),
        });
        let fall_backs = plan.fall_backs_in(step).into_iter().map(|fall_back| FallBackReport {
            node: node_name(plan, fall_back.node).to_owned(),
            wanted: name(fall_back.wanted),
            runs_on: name(fall_back.runs_on),
            why: fall_back.why,
            along: fall_back.along.iter().map(|(node, _)| node_name(plan, *node).to_owned()).collect(),
            bytes: fall_back.bytes,
            state_bytes: fall_back.state_bytes,
        });
        Report {
            splits: splits.collect(),
            bytes_per_step: plan.traffic(step),
            memory: plan.devices.iter().cloned().zip(plan.needs()).collect(),
            fall_backs: fall_backs.collect(),
        }
    }
}

fn node_name(plan: &Plan, node: NodeIndex) -> &str {
    &plan.graph().nodes()[node].name
}

fn storage_name(plan: &Plan, storage: StorageIndex) -> &str {
    &plan.graph().storages()[storage].name
}

fn node_report(plan: &Plan, node: NodeIndex) -> NodeReport {
    NodeReport {
        name: node_name(plan, node).to_owned(),
        op: plan.graph().nodes()[node].op.kind().to_string(),
        owner: plan.devices[plan.owners[node]].clone(),
        reason: reason(plan, node),
    }
}

/// Why a node is where it is, in words.
///
/// # Panics
/// If the plan has no such node.
pub fn reason(plan: &Plan, node: NodeIndex) -> String {
    let owner = &plan.devices[plan.owners[node]];
    let for_room = |name: &str| if plan.is_for_room(name) { " for want of room" } else { "" };
    match plan.reasons[node] {
        Reason::Pinned(storage) => {
            let name = storage_name(plan, storage);
            let for_room = for_room(name);
            match plan.graph().storages()[storage].kind {
                StorageKind::State => format!("it writes {name}, which lives on {owner}{for_room}"),
                _ => format!("it reads {name}, which was placed on {owner}{for_room}"),
            }
        }
        Reason::RegionOf(state) => {
            let name = storage_name(plan, state);
            format!("it belongs to {name}, which lives on {owner}{}", for_room(name))
        }
        Reason::FollowsWeight(weight) => {
            let name = storage_name(plan, weight);
            format!("it reads {name}, which is loaded on {owner}{}", for_room(name))
        }
        Reason::ExpandedDown(producer) => format!("it reads {}, made on {owner}", node_name(plan, producer)),
        Reason::ExpandedUp(consumer) => format!("{}, on {owner}, reads it", node_name(plan, consumer)),
        Reason::Home => format!("its layer is on {owner}"),
        Reason::FewerBytes => format!("the fewest bytes of activations cross with it on {owner}"),
        Reason::FellBack(wanted) => {
            let fall_back = plan.fall_backs.iter().find(|fall_back| fall_back.node == node);
            let why = fall_back.map_or("", |fall_back| fall_back.why.as_str());
            format!("it belongs on {}, but {why}", plan.devices[wanted])
        }
    }
}

/// A number of bytes as people read it, such as `1.5 MiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A difference of bytes as people read it, such as `1.5 MiB more`.
pub fn more(bytes: i64) -> String {
    let word = if bytes < 0 { "less" } else { "more" };
    format!("{} {word}", human(bytes.unsigned_abs()))
}

/// One line: devices, splits, bytes per step by kind.
pub fn summary(plan: &Plan, step: &Step) -> String {
    let mut used: Vec<&str> = Vec::new();
    for split in &plan.splits {
        let name = plan.devices[split.device].as_str();
        if !used.contains(&name) {
            used.push(name);
        }
    }
    let splits = plan.splits.len();
    let plural = if splits == 1 { "" } else { "s" };
    let Traffic { activation, state, weight, input } = plan.traffic(step);
    format!(
        "{}: {splits} split{plural}; per step of {} token{}: {} activation, {} state, {} weight, {} input",
        used.join(" + "),
        step.rows,
        if step.rows == 1 { "" } else { "s" },
        human(activation),
        human(state),
        human(weight),
        human(input),
    )
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = || self.splits.iter().flat_map(|split| &split.nodes);
        let name = nodes().map(|node| node.name.len()).max().unwrap_or(0);
        let op = nodes().map(|node| node.op.len()).max().unwrap_or(0);
        for (index, split) in self.splits.iter().enumerate() {
            writeln!(f, "split {index} on {}", split.device)?;
            for TransferReport { value, kind, from, to, bytes } in &split.transfers {
                writeln!(f, "  <- {value}: {} of {} from {from} to {to}", human(*bytes), kind.word())?;
            }
            for node in &split.nodes {
                writeln!(f, "     {:name$}  {:op$}  {}", node.name, node.op, node.reason)?;
            }
        }
        let Traffic { activation, state, weight, input } = self.bytes_per_step;
        writeln!(
            f,
            "per step: {} activation, {} state, {} weight, {} input",
            human(activation),
            human(state),
            human(weight),
            human(input)
        )?;
        for (device, needs) in &self.memory {
            writeln!(
                f,
                "memory of {device}: {} = {} weights + {} states + {} scratch",
                human(needs.total()),
                human(needs.weights),
                human(needs.states),
                human(needs.scratch)
            )?;
        }
        for FallBackReport { node, runs_on, why, along, bytes, state_bytes, .. } in &self.fall_backs {
            let along = if along.is_empty() { String::new() } else { format!(" with {}", along.join(", ")) };
            let states = match state_bytes {
                0 => String::new(),
                _ => format!(" (of states: {})", more(*state_bytes)),
            };
            writeln!(f, "fall-back: {node} runs on {runs_on}{along}: {why}; {} cross{states}", more(*bytes))?;
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Report::new(self, &self.capacity.full_step()).fmt(f)
    }
}
