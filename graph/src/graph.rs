//! A finished graph: operations over values, and the storages the values lie in.

use backend_api::{Op, OpDesc, TensorDesc};

/// A tensor of a graph: an input, a weight, a state, the result of a node, or a view of one of these. Small and
/// copyable; it means something only together with the builder or graph it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub(crate) u32);

impl Value {
    /// Index into [`Graph::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Index into [`Graph::nodes`].
pub type NodeIndex = usize;

/// Index into [`Graph::storages`].
pub type StorageIndex = usize;

/// What the bytes of a storage are, which decides how long they live and who may move them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageKind {
    /// Given anew in every step, in the host's memory.
    Input,
    /// Loaded once, then only read.
    Weight,
    /// Outlives steps, written only by its `KvStore`, read only by nodes of its region: a KV cache.
    State,
    /// The result of a node.
    Activation,
}

impl StorageKind {
    /// In one word, such as `state`.
    pub const fn word(self) -> &'static str {
        match self {
            StorageKind::Input => "input",
            StorageKind::Weight => "weight",
            StorageKind::State => "state",
            StorageKind::Activation => "activation",
        }
    }
}

/// Bytes that have one place on each device that holds them. Views share the storage of their base.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    /// The name given to the builder; for an activation, that of its node.
    pub name: String,
    /// What the bytes are.
    pub kind: StorageKind,
    /// The whole tensor.
    pub desc: TensorDesc,
}

/// A tensor inside a storage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValueInfo {
    /// Where its bytes are.
    pub storage: StorageIndex,
    /// Bytes from the start of the storage to the first element, in every step the same.
    pub offset: usize,
    /// Format, shape and strides.
    pub desc: TensorDesc,
    /// The node whose result this is (or is a view of); for a state, the store that precedes the reading.
    pub producer: Option<NodeIndex>,
}

/// A node's part in the region of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum Part {
    /// Touches the state itself (store, attention): runs where the state is.
    Core,
    /// The product beside it (`q_absorb`, `v_absorb`): runs there too, unless the user says otherwise.
    Edge,
}

/// Membership in the region of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// The state's storage.
    pub state: StorageIndex,
    /// Which part of the region.
    pub part: Part,
}

/// An operation applied to values.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Unique in its graph, such as `blk.3.attn_q`.
    pub name: String,
    /// What it computes.
    pub op: Op,
    /// In the order that [`Op`] documents.
    pub inputs: Vec<Value>,
    /// Likewise.
    pub outputs: Vec<Value>,
    /// The layer it belongs to; `None` for the input side of a model, which lives on the host.
    pub layer: Option<usize>,
    /// The region it belongs to.
    pub region: Option<Region>,
}

/// Nodes in an order that respects data flow, made by a [`GraphBuilder`](crate::GraphBuilder). Immutable.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    pub(crate) storages: Vec<Storage>,
    pub(crate) values: Vec<ValueInfo>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) outputs: Vec<(String, Value)>,
}

impl Graph {
    /// All storages.
    pub fn storages(&self) -> &[Storage] {
        &self.storages
    }

    /// All values, by [`Value::index`].
    pub fn values(&self) -> &[ValueInfo] {
        &self.values
    }

    /// All nodes; each comes after those it depends on.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The named results, in the order they were declared.
    pub fn outputs(&self) -> &[(String, Value)] {
        &self.outputs
    }

    /// What is known about a value of this graph.
    pub fn info(&self, value: Value) -> &ValueInfo {
        &self.values[value.index()]
    }

    /// The storage of this kind and name.
    pub fn find(&self, kind: StorageKind, name: &str) -> Option<StorageIndex> {
        self.storages.iter().position(|s| s.kind == kind && s.name == name)
    }

    /// Indices and descriptions of all storages of a kind.
    pub fn storages_of(&self, kind: StorageKind) -> impl Iterator<Item = (StorageIndex, &Storage)> {
        self.storages.iter().enumerate().filter(move |(_, s)| s.kind == kind)
    }

    /// The node as [`backend_api::Device::supports`] sees it.
    pub fn describe(&self, node: &Node) -> OpDesc {
        let desc = |value: &Value| self.info(*value).desc;
        OpDesc {
            op: node.op.clone(),
            inputs: node.inputs.iter().map(desc).collect(),
            outputs: node.outputs.iter().map(desc).collect(),
        }
    }
}
