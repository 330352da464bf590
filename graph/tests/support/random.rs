//! Random graphs as assignment sees them: values read whole or by halves, weights placed by the user or not, states
//! with regions, and devices that cannot run everything.

use graph::{
    Part, Region, Span, StorageKind,
    assign::{DeviceSet, Facts, NodeFacts, Read, StorageFacts},
};
use proptest::prelude::*;

/// What a random node is made from; picks are taken modulo what there is.
#[derive(Clone, Debug)]
pub struct Recipe {
    kind: u8,
    inputs: Vec<(usize, u8)>,
    bytes: u64,
    weight: u64,
    device: usize,
    by_user: bool,
    home: usize,
    lacks: Option<usize>,
    output: bool,
}

#[derive(Clone, Debug)]
pub struct Recipes {
    devices: usize,
    states: Vec<(u64, usize)>,
    nodes: Vec<Recipe>,
}

/// Chances, in hundredths, of what a graph has.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    pub devices: (usize, usize),
    pub nodes: usize,
    pub lacks: u32,
    pub states: usize,
}

pub fn recipes(mix: Mix) -> impl Strategy<Value = Recipes> {
    let lacks = prop_oneof![
        (100 - mix.lacks) => Just(None),
        mix.lacks => (0usize..4).prop_map(Some),
    ];
    let node = (
        0u8..10,
        prop::collection::vec((0usize..64, 0u8..4), 1..4),
        1u64..40,
        1u64..200,
        0usize..8,
        prop::bool::weighted(0.3),
        0usize..8,
        lacks,
        prop::bool::weighted(0.1),
    );
    let node = node.prop_map(|(kind, inputs, bytes, weight, device, by_user, home, lacks, output)| Recipe {
        kind,
        inputs,
        bytes: bytes * 8,
        weight: weight * 8,
        device,
        by_user,
        home,
        lacks,
        output,
    });
    let states = prop::collection::vec((1u64..500, 0usize..8), 0..=mix.states);
    (mix.devices.0..=mix.devices.1, states, prop::collection::vec(node, 1..=mix.nodes))
        .prop_map(|(devices, states, nodes)| Recipes { devices, states, nodes })
}

impl Recipes {
    pub fn facts(&self) -> Facts {
        let devices = self.devices;
        let mut facts = Facts { devices, rows: 1, storages: Vec::new(), nodes: Vec::new() };
        let plain =
            |kind, bytes| StorageFacts { kind, bytes, home: None, placed_by_user: false, output: false };
        facts.storages.push(plain(StorageKind::Input, 64));
        for &(bytes, home) in &self.states {
            let home = Some(home % devices);
            facts.storages.push(StorageFacts { home, ..plain(StorageKind::State, bytes * 8) });
        }
        let states = self.states.len();
        // Values that nodes can read, with their makers; the order of touches of each state.
        let mut values: Vec<(usize, Option<usize>)> = vec![(0, None)];
        let mut stored: Vec<Option<usize>> = vec![None; states];
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); states];
        for recipe in &self.nodes {
            let index = facts.nodes.len();
            let (mut reads, mut after) = (Vec::new(), Vec::new());
            for &(pick, part) in &recipe.inputs {
                let (storage, producer) = values[pick % values.len()];
                let whole = facts.storages[storage].bytes as usize;
                let span = match part {
                    0 => Span::fixed(0, whole / 2),
                    1 => Span::fixed(whole / 2, whole - whole / 2),
                    _ => Span::fixed(0, whole),
                };
                reads.push(Read { storage, span, bytes: span.row as u64, producer });
                after.extend(producer);
            }
            let mut region = None;
            let state = recipe.device % states.max(1);
            let mut store = false;
            match recipe.kind {
                // A weight of its own.
                0..=2 => weigh(&mut facts, recipe, &mut reads),
                3 if states > 0 => {
                    store = true;
                    region = Some(Region { state: 1 + state, part: Part::Core });
                    after.extend(stored[state].replace(index));
                    after.append(&mut readers[state]);
                }
                4 if states > 0 => {
                    region = Some(Region { state: 1 + state, part: Part::Core });
                    let bytes = facts.storages[1 + state].bytes;
                    let span = Span::fixed(0, bytes as usize);
                    reads.push(Read { storage: 1 + state, span, bytes, producer: stored[state] });
                    after.extend(stored[state]);
                    readers[state].push(index);
                }
                5 if states > 0 => {
                    region = Some(Region { state: 1 + state, part: Part::Edge });
                    weigh(&mut facts, recipe, &mut reads);
                }
                6 if states > 0 => region = Some(Region { state: 1 + state, part: Part::Edge }),
                _ => {}
            }
            after.retain(|&before| before != index);
            let writes = if store {
                vec![1 + state]
            } else {
                let made = plain(StorageKind::Activation, recipe.bytes);
                facts.storages.push(StorageFacts { output: recipe.output, ..made });
                values.push((facts.storages.len() - 1, Some(index)));
                vec![facts.storages.len() - 1]
            };
            let all = DeviceSet::first(devices);
            let runs_on = recipe.lacks.map_or(all, |device| all.without(device % devices));
            let home = Some(recipe.home % devices);
            facts.nodes.push(NodeFacts { reads, writes, after, home, region, runs_on });
        }
        facts
    }
}

fn weigh(facts: &mut Facts, recipe: &Recipe, reads: &mut Vec<Read>) {
    let bytes = recipe.weight;
    let home = Some(recipe.device % facts.devices);
    let (kind, placed_by_user) = (StorageKind::Weight, recipe.by_user);
    let span = Span::fixed(0, bytes as usize);
    reads.push(Read { storage: facts.storages.len(), span, bytes, producer: None });
    facts.storages.push(StorageFacts { kind, bytes, home, placed_by_user, output: false });
}
