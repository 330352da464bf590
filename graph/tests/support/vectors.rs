//! Loads `vectors.json` into the facts that assignment sees. Its graphs are those of another engine, with
//! operations this one does not have: assignment must not mind.

use graph::{
    Count, Part, Region, Span, StorageKind,
    assign::{DeviceSet, Facts, NodeFacts, Read, StorageFacts},
};
use serde_json::Value;
use std::collections::HashMap;

/// A vector: facts, and what to compare with.
pub struct Vector {
    pub id: String,
    pub title: String,
    pub facts: Facts,
    /// Names of the nodes of `facts`.
    pub nodes: Vec<String>,
    pub devices: Vec<String>,
    /// The vector as it stands in the file.
    pub json: Value,
}

impl Vector {
    pub fn device(&self, name: &str) -> usize {
        self.devices.iter().position(|device| device == name).expect("a device of the vector")
    }

    pub fn node(&self, name: &str) -> usize {
        self.nodes.iter().position(|node| node == name).expect("a node of the vector")
    }
}

pub fn load() -> Vec<Vector> {
    let file: Value = serde_json::from_str(include_str!("../vectors.json")).expect("JSON");
    file["vectors"].as_array().expect("vectors").iter().map(vector).collect()
}

fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn bytes(tensor: &Value) -> u64 {
    let element = match tensor["type"].as_str().expect("a type") {
        "f16" => 2,
        "f32" | "i32" => 4,
        "i64" => 8,
        other => panic!("type {other}"),
    };
    list(&tensor["shape"]).iter().map(|n| n.as_u64().expect("an extent")).product::<u64>() * element
}

/// What a name of the file stands for.
#[derive(Clone, Copy)]
struct Seen {
    storage: usize,
    span: Span,
}

fn vector(json: &Value) -> Vector {
    let devices: Vec<String> = list(&json["devices"]).iter().map(text).collect();
    let device = |name: &Value| devices.iter().position(|d| Some(d.as_str()) == name.as_str());
    let mut facts = Facts { devices: devices.len(), rows: 1, storages: Vec::new(), nodes: Vec::new() };
    let mut known: HashMap<String, Seen> = HashMap::new();
    // The node that wrote each storage last, and where the next view of it begins.
    let mut written: Vec<Option<usize>> = Vec::new();
    let mut viewed: Vec<usize> = Vec::new();
    let mut names = Vec::new();
    for tensor in list(&json["tensors"]) {
        let kind = match tensor["kind"].as_str().expect("a kind") {
            "weight" => StorageKind::Weight,
            "state" => StorageKind::State,
            "input" => StorageKind::Input,
            other => panic!("kind {other}"),
        };
        let home = (kind != StorageKind::Input).then(|| device(&tensor["device"]).expect("a device"));
        let placed_by_user = tensor["pinned_by_user"] == true;
        let storage = StorageFacts { kind, bytes: bytes(tensor), home, placed_by_user, output: false };
        let span = Span::fixed(0, storage.bytes as usize);
        known.insert(text(&tensor["id"]), Seen { storage: facts.storages.len(), span });
        facts.storages.push(storage);
        written.push(None);
        viewed.push(0);
    }
    for node in list(&json["nodes"]) {
        let (id, op) = (text(&node["id"]), node["op"].as_str().expect("an op"));
        if matches!(op, "VIEW" | "RESHAPE" | "PERMUTE" | "TRANSPOSE") {
            let base = known[node["alias_of"].as_str().expect("a base")];
            let size = bytes(node) as usize;
            let whole = facts.storages[base.storage].bytes as usize;
            // The file has strides but no offsets: views of a value are taken to follow each other.
            let start = viewed[base.storage];
            let fits = facts.storages[base.storage].kind == StorageKind::Activation && start + size <= whole;
            viewed[base.storage] += if fits { size } else { 0 };
            known.insert(id, Seen { span: Span::fixed(if fits { start } else { 0 }, size), ..base });
            continue;
        }
        let index = facts.nodes.len();
        let state = node["region"].as_str().map(|state| known[state].storage);
        let store = node["role"] == "kv_store";
        let mut reads = Vec::new();
        for input in list(&node["inputs"]) {
            let Seen { storage, span } = known[input.as_str().expect("a name")];
            if store && Some(storage) == state {
                continue;
            }
            assert_eq!(span.count, Count::One);
            reads.push(Read { storage, span, bytes: span.row as u64, producer: written[storage] });
        }
        let part = match node["role"].as_str() {
            Some("kv_store" | "attention") => Some(Part::Core),
            Some("q_absorb" | "v_absorb") => Some(Part::Edge),
            Some(other) => panic!("role {other}"),
            None => None,
        };
        let region = part.map(|part| Region { state: state.expect("a region"), part });
        let mut runs_on = DeviceSet::first(devices.len());
        for (name, ops) in json["cannot_run"].as_object().expect("a map") {
            if list(ops).iter().any(|other| other == op) {
                runs_on = runs_on.without(devices.iter().position(|d| d == name).expect("a device"));
            }
        }
        let after = reads.iter().filter_map(|read: &Read| read.producer).collect();
        let writes = if store {
            let state = state.expect("a state");
            written[state] = Some(index);
            vec![state]
        } else {
            let kind = StorageKind::Activation;
            let bytes = bytes(node);
            let storage = StorageFacts { kind, bytes, home: None, placed_by_user: false, output: false };
            known.insert(
                id.clone(),
                Seen { storage: facts.storages.len(), span: Span::fixed(0, bytes as usize) },
            );
            facts.storages.push(storage);
            written.push(Some(index));
            viewed.push(0);
            vec![facts.storages.len() - 1]
        };
        facts.nodes.push(NodeFacts { reads, writes, after, home: device(&node["home"]), region, runs_on });
        names.push(id);
    }
    let (id, title) = (text(&json["id"]), text(&json["title"]));
    Vector { id, title, facts, nodes: names, devices, json: json.clone() }
}
