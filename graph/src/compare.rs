//! Two plans side by side.

use crate::{
    assign::Traffic,
    report::{NodeReport, Report, human},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Two reports of the same graph, and the nodes that they have in different places.
///
/// Its [`Display`](fmt::Display) is a table of two columns and what differs; serialised, both reports are whole.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// One.
    pub first: Report,
    /// The other.
    pub second: Report,
    /// In the first's order.
    pub differences: Vec<Difference>,
}

/// A node with two owners.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The node's name.
    pub node: String,
    /// Its owner in the first plan, and why.
    pub first: Owner,
    /// Its owner in the second plan, and why.
    pub second: Owner,
}

/// A device that owns a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// The device's name.
    pub device: String,
    /// In words.
    pub reason: String,
}

impl Comparison {
    /// Compares two reports.
    pub fn new(first: Report, second: Report) -> Self {
        let owner = |node: &NodeReport| Owner { device: node.owner.clone(), reason: node.reason.clone() };
        let others: BTreeMap<&str, &NodeReport> =
            nodes(&second).map(|node| (node.name.as_str(), node)).collect();
        let pairs = nodes(&first).filter_map(|node| Some((node, *others.get(node.name.as_str())?)));
        let differences = pairs.filter(|(one, other)| one.owner != other.owner).map(|(one, other)| {
            Difference { node: one.name.clone(), first: owner(one), second: owner(other) }
        });
        let differences = differences.collect();
        Comparison { first, second, differences }
    }
}

fn nodes(report: &Report) -> impl Iterator<Item = &NodeReport> {
    report.splits.iter().flat_map(|split| &split.nodes)
}

/// The same names for every layer: `blk.*.attention` of `blk.3.attention`.
fn any_layer(text: &str) -> String {
    let part = |part: &str| if part.parse::<usize>().is_ok() { "*".to_owned() } else { part.to_owned() };
    let word = |word: &str| {
        let (word, end) = match word.strip_suffix(',') {
            Some(word) => (word, ","),
            None => (word, ""),
        };
        word.split('.').map(part).collect::<Vec<_>>().join(".") + end
    };
    text.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let both = [&self.first, &self.second];
        let row = |f: &mut fmt::Formatter<'_>, what: &str, [a, b]: [String; 2]| {
            let mark = if a == b { "" } else { "  <>" };
            writeln!(f, "{what:32} {a:>14} {b:>14}{mark}")
        };
        writeln!(f, "{:32} {:>14} {:>14}", "", "first", "second")?;
        row(f, "splits", both.map(|report| report.splits.len().to_string()))?;
        let bytes = both.map(|report| {
            let Traffic { activation, state, weight, input } = report.bytes_per_step;
            [activation, state, weight, input].map(human)
        });
        for (kind, (a, b)) in
            ["activation", "state", "weight", "input"].iter().zip(bytes[0].iter().zip(&bytes[1]))
        {
            row(f, &format!("{kind} bytes per step"), [a.clone(), b.clone()])?;
        }
        let devices: BTreeSet<&String> = both.iter().flat_map(|report| report.memory.keys()).collect();
        for device in devices {
            let parts = |report: &Report| report.memory.get(device).copied().unwrap_or_default();
            row(f, &format!("weights on {device}"), both.map(|report| human(parts(report).weights)))?;
            row(f, &format!("states on {device}"), both.map(|report| human(parts(report).states)))?;
            row(f, &format!("scratch on {device}"), both.map(|report| human(parts(report).scratch)))?;
        }
        row(f, "fall-backs", both.map(|report| report.fall_backs.len().to_string()))?;

        writeln!(f)?;
        if self.differences.is_empty() {
            return writeln!(f, "every node has the same owner");
        }
        // What differs in every layer alike is told once.
        let mut groups: Vec<(String, [String; 2], usize)> = Vec::new();
        for Difference { node, first, second } in &self.differences {
            let owner = |owner: &Owner| format!("{}: {}", owner.device, any_layer(&owner.reason));
            let (node, owners) = (any_layer(node), [owner(first), owner(second)]);
            match groups.iter_mut().find(|(known, of, _)| *known == node && *of == owners) {
                Some((.., count)) => *count += 1,
                None => groups.push((node, owners, 1)),
            }
        }
        for (node, [first, second], count) in groups {
            let times = if count == 1 { String::new() } else { format!(" ({count} times)") };
            writeln!(f, "{node}{times}\n    first   {first}\n    second  {second}")?;
        }
        Ok(())
    }
}
