//! Building a graph: one method for each operation, views that cost nothing, and regions that say which state
//! a node belongs to.

use crate::graph::{Graph, Node, NodeIndex, Part, Region, Storage, StorageKind, Value, ValueInfo};
use crate::view;
use backend_api::{
    DType, Extent, Op, OpDesc, OpError, Precision, RopeAttributes, RouteAttributes, TensorDesc,
};
use std::{
    collections::HashMap,
    ops::{Deref, DerefMut, Range},
};
use thiserror::Error;

/// A node, or a declaration, that does not fit into its graph.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("{node}: {problem}")]
pub struct BuildError {
    /// The name given to the node, view, weight, state, input or output.
    pub node: String,
    /// What does not fit.
    pub problem: Problem,
}

/// What does not fit.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum Problem {
    /// Attributes or inputs do not fit the operation.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A view that is none without copying.
    #[error("{0}")]
    View(String),
    /// The name is taken.
    #[error("the name is already that of another {0}")]
    Duplicate(&'static str),
    /// A tensor that cannot be: too large to count its bytes, or (an input, weight or state) not dense, or (a weight
    /// or state) of an extent that varies.
    #[error("{0}")]
    Tensor(String),
    /// A value of another graph.
    #[error("value {0} is not of this graph")]
    Foreign(usize),
    /// A region of something that is no state.
    #[error("a region needs a state, found the {found} {name}")]
    NoState {
        /// Name of the value given.
        name: String,
        /// What it is.
        found: &'static str,
    },
    /// A state is read outside of its region.
    #[error("the state {state} is read only by nodes made through its region")]
    OutsideRegion {
        /// Name of the state.
        state: String,
    },
    /// An output that no node makes, or that does not lie in one piece.
    #[error("an output must be a node's whole result, dense: {0}")]
    Output(String),
}

impl Problem {
    fn at(self, node: &str) -> BuildError {
        BuildError { node: node.to_owned(), problem: self }
    }
}

/// Collects nodes in an order that respects data flow; [`GraphBuilder::finish`] makes the [`Graph`].
///
/// Each operation's method takes the node's name, which must be unique, and the inputs that [`Op`] documents. Its
/// errors are a [`BuildError`] with the name and with what [`Op::infer`] found wrong.
#[derive(Debug)]
pub struct GraphBuilder {
    precision: Precision,
    layer: Option<usize>,
    graph: Graph,
    names: HashMap<String, NodeIndex>,
    leaves: HashMap<(StorageKind, String), Value>,
    /// Declarations return a value, not a result; what is wrong with one is told at the next node.
    deferred: Option<BuildError>,
}

impl GraphBuilder {
    /// An empty graph whose matrix products have this precision.
    pub fn new(precision: Precision) -> Self {
        GraphBuilder {
            precision,
            layer: None,
            graph: Graph { storages: Vec::new(), values: Vec::new(), nodes: Vec::new(), outputs: Vec::new() },
            names: HashMap::new(),
            leaves: HashMap::new(),
            deferred: None,
        }
    }

    /// Nodes from here on belong to this layer. The layers of a model are `0..n`, and what follows the last one
    /// (output norm and head) is layer `n`; `None`, the state at the start, is the input side, which lives on the
    /// host.
    pub fn layer(&mut self, layer: Option<usize>) {
        self.layer = layer;
    }

    /// Nodes of `build` have [`Precision::Fine`] where the others have the default.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn finely<T, E>(&mut self, build: impl FnOnce(&mut Self) -> Result<T, E>) -> Result<T, E> {
        let given = self.precision;
        if given == Precision::Default {
            self.precision = Precision::Fine;
        }
        let built = build(self);
        self.precision = given;
        built
    }

    /// Bytes given anew in every step, in the host's memory.
    pub fn input(&mut self, name: &str, desc: TensorDesc) -> Value {
        self.leaf(StorageKind::Input, name, desc)
    }

    /// A tensor that is loaded once, by the name its [`WeightSource`](crate::WeightSource) knows. Asking twice
    /// gives the same value.
    pub fn weight(&mut self, name: &str, desc: TensorDesc) -> Value {
        self.leaf(StorageKind::Weight, name, desc)
    }

    /// A tensor that outlives steps and is owned by one device: a KV cache, `[capacity, width]`.
    pub fn state(&mut self, name: &str, desc: TensorDesc) -> Value {
        self.leaf(StorageKind::State, name, desc)
    }

    fn leaf(&mut self, kind: StorageKind, name: &str, desc: TensorDesc) -> Value {
        if let Some(&value) = self.leaves.get(&(kind, name.to_owned())) {
            if kind != StorageKind::Weight || self.graph.info(value).desc != desc {
                self.deferred.get_or_insert(Problem::Duplicate(kind.word()).at(name));
            }
            return value;
        }
        if let Err(problem) = check_leaf(kind, &desc) {
            self.deferred.get_or_insert(problem.at(name));
        }
        let value = self.storage(name, kind, desc, None);
        self.leaves.insert((kind, name.to_owned()), value);
        value
    }

    fn storage(
        &mut self,
        name: &str,
        kind: StorageKind,
        desc: TensorDesc,
        producer: Option<NodeIndex>,
    ) -> Value {
        let storage = self.graph.storages.len();
        self.graph.storages.push(Storage { name: name.to_owned(), kind, desc });
        self.value(ValueInfo { storage, offset: 0, desc, producer })
    }

    fn value(&mut self, info: ValueInfo) -> Value {
        self.graph.values.push(info);
        Value(self.graph.values.len() as u32 - 1)
    }

    /// Format, shape and strides of a value.
    ///
    /// # Panics
    /// If the value is of another graph and beyond this one's.
    pub fn desc(&self, value: Value) -> &TensorDesc {
        &self.graph.info(value).desc
    }

    /// `Op::EmbedRows`: `(table [vocab, d], ids [n]) → [n, d]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn embed_rows(&mut self, name: &str, table: Value, ids: Value) -> Result<Value, BuildError> {
        self.one(name, Op::EmbedRows, &[table, ids])
    }

    /// `Op::RmsNorm`: `(x […, d], weight [d]) → […, d]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn rms_norm(&mut self, name: &str, x: Value, weight: Value, eps: f32) -> Result<Value, BuildError> {
        self.one(name, Op::RmsNorm { eps }, &[x, weight])
    }

    /// `Op::MatMul`: `(w [m, k], x [n, k]) → [n, m]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn matmul(&mut self, name: &str, w: Value, x: Value) -> Result<Value, BuildError> {
        self.one(name, Op::MatMul { precision: self.precision }, &[w, x])
    }

    /// `Op::HeadMatMul`: `(w [heads, m, k], x [n, heads, k]) → [n, heads, m]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn head_matmul(&mut self, name: &str, w: Value, x: Value) -> Result<Value, BuildError> {
        self.one(name, Op::HeadMatMul { precision: self.precision }, &[w, x])
    }

    /// `Op::Rope`: `(x [rows, …, r]) → [rows, …, r]`, at the positions of the step.
    ///
    /// # Errors
    /// As all operations.
    pub fn rope(&mut self, name: &str, x: Value, attributes: &RopeAttributes) -> Result<Value, BuildError> {
        self.one(name, Op::Rope(attributes.clone()), &[x])
    }

    /// `Op::Route`: `(scores [rows, experts], bias [experts]) → (ids [rows, used], weights [rows, used])`.
    ///
    /// # Errors
    /// As all operations.
    pub fn route(
        &mut self,
        name: &str,
        scores: Value,
        bias: Option<Value>,
        attributes: RouteAttributes,
    ) -> Result<(Value, Value), BuildError> {
        let inputs: Vec<Value> = std::iter::once(scores).chain(bias).collect();
        let outputs = self.node(name, Op::Route(attributes), &inputs, None)?;
        Ok((outputs[0], outputs[1]))
    }

    /// `Op::ExpertMatMul`: `(w [experts, m, k], x [rows, k] or [rows, used, k], ids [rows, used]) →
    /// [rows, used, m]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn expert_matmul(&mut self, name: &str, w: Value, x: Value, ids: Value) -> Result<Value, BuildError> {
        self.one(name, Op::ExpertMatMul { precision: self.precision }, &[w, x, ids])
    }

    /// `Op::SwiGlu`: `(gate, up) → silu(gate) × up`.
    ///
    /// # Errors
    /// As all operations.
    pub fn swi_glu(&mut self, name: &str, gate: Value, up: Value) -> Result<Value, BuildError> {
        self.one(name, Op::SwiGlu, &[gate, up])
    }

    /// `Op::CombineExperts`: `(y [rows, used, d], weights [rows, used]) → [rows, d]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn combine_experts(&mut self, name: &str, y: Value, weights: Value) -> Result<Value, BuildError> {
        self.one(name, Op::CombineExperts, &[y, weights])
    }

    /// `Op::Add`: `(a, b) → a + b`.
    ///
    /// # Errors
    /// As all operations.
    pub fn add(&mut self, name: &str, a: Value, b: Value) -> Result<Value, BuildError> {
        self.one(name, Op::Add, &[a, b])
    }

    /// `Op::Concat`: `(a […, m], b […, n]) → […, m + n]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn concat(&mut self, name: &str, a: Value, b: Value) -> Result<Value, BuildError> {
        self.one(name, Op::Concat, &[a, b])
    }

    /// `Op::SelectRows`: `(x [n, …], ids [outputs]) → [outputs, …]`.
    ///
    /// # Errors
    /// As all operations.
    pub fn select_rows(&mut self, name: &str, x: Value, ids: Value) -> Result<Value, BuildError> {
        self.one(name, Op::SelectRows, &[x, ids])
    }

    /// `Op::Cast`: `x` in another float format.
    ///
    /// # Errors
    /// As all operations.
    pub fn cast(&mut self, name: &str, x: Value, to: DType) -> Result<Value, BuildError> {
        self.one(name, Op::Cast { to }, &[x])
    }

    /// The part `range` of an axis, counted from the outermost: a view.
    ///
    /// # Errors
    /// [`Problem::View`]: the range is empty or too long, cuts a block, or the axis varies from step to step.
    pub fn slice(&mut self, x: Value, axis: usize, range: Range<usize>) -> Result<Value, BuildError> {
        let (name, info) = self.base(x, "slice")?;
        let (skip, desc) =
            view::slice(&info.desc, axis, range).map_err(|why| Problem::View(why).at(&name))?;
        Ok(self.value(ValueInfo { offset: info.offset + skip, desc, ..info }))
    }

    /// The same elements under other extents: a view.
    ///
    /// # Errors
    /// [`Problem::View`]: the numbers of elements differ, or the elements do not lie so that no copy is needed.
    pub fn reshape(&mut self, x: Value, extents: &[Extent]) -> Result<Value, BuildError> {
        let (name, info) = self.base(x, "reshape")?;
        let desc = view::reshape(&info.desc, extents).map_err(|why| Problem::View(why).at(&name))?;
        Ok(self.value(ValueInfo { desc, ..info }))
    }

    /// What a view looks at, and its name for errors. A state is never viewed: its only form is the whole cache.
    fn base(&self, x: Value, what: &str) -> Result<(String, ValueInfo), BuildError> {
        let Some(info) = self.graph.values.get(x.index()) else {
            return Err(Problem::Foreign(x.index()).at(what));
        };
        let storage = &self.graph.storages[info.storage];
        if storage.kind == StorageKind::State {
            return Err(Problem::View(format!("{what} of a state")).at(&storage.name));
        }
        Ok((storage.name.clone(), *info))
    }

    /// Nodes made through the result belong to the owner of this state.
    pub fn region(&mut self, state: Value) -> RegionBuilder<'_> {
        RegionBuilder { builder: self, state }
    }

    /// Names a result that can be read after a step.
    pub fn output(&mut self, name: &str, value: Value) {
        self.graph.outputs.push((name.to_owned(), value));
    }

    /// The graph.
    ///
    /// # Errors
    /// Declarations that clash, and outputs that are no node's whole result.
    pub fn finish(self) -> Result<Graph, BuildError> {
        if let Some(error) = self.deferred {
            return Err(error);
        }
        let graph = self.graph;
        for (index, (name, value)) in graph.outputs.iter().enumerate() {
            if graph.outputs[..index].iter().any(|(other, _)| other == name) {
                return Err(Problem::Duplicate("output").at(name));
            }
            let Some(info) = graph.values.get(value.index()) else {
                return Err(Problem::Foreign(value.index()).at(name));
            };
            let storage = &graph.storages[info.storage];
            if storage.kind != StorageKind::Activation {
                let found = format!("found the {} {}", storage.kind.word(), storage.name);
                return Err(Problem::Output(found).at(name));
            }
            if info.offset != 0 || !info.desc.is_dense() {
                return Err(Problem::Output(format!("found {:?} of {}", info.desc, storage.name)).at(name));
            }
        }
        Ok(graph)
    }

    fn one(&mut self, name: &str, op: Op, inputs: &[Value]) -> Result<Value, BuildError> {
        Ok(self.node(name, op, inputs, None)?[0])
    }

    /// Checks and adds a node. A store's output is its region's state.
    fn node(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[Value],
        region: Option<Region>,
    ) -> Result<Vec<Value>, BuildError> {
        if let Some(error) = self.deferred.take() {
            return Err(error);
        }
        if self.names.contains_key(name) {
            return Err(Problem::Duplicate("node").at(name));
        }
        for input in inputs {
            let Some(info) = self.graph.values.get(input.index()) else {
                return Err(Problem::Foreign(input.index()).at(name));
            };
            let storage = &self.graph.storages[info.storage];
            if storage.kind == StorageKind::State && region.is_none_or(|r| r.state != info.storage) {
                return Err(Problem::OutsideRegion { state: storage.name.clone() }.at(name));
            }
        }
        let descs: Vec<TensorDesc> = inputs.iter().map(|v| self.graph.info(*v).desc).collect();
        let mut made = op.infer(&descs).map_err(|e| Problem::Op(e).at(name))?;
        for desc in &made {
            check_size(desc).map_err(|problem| problem.at(name))?;
        }
        let node = self.graph.nodes.len();
        let outputs = match (&op, region) {
            (Op::KvStore, Some(region)) => {
                let desc = self.graph.storages[region.state].desc;
                let store = OpDesc { op: Op::KvStore, inputs: descs, outputs: vec![desc] };
                store.check().map_err(|e| Problem::Op(e).at(name))?;
                vec![self.value(ValueInfo { storage: region.state, offset: 0, desc, producer: Some(node) })]
            }
            _ => {
                let label = |i: usize| match op {
                    Op::Route(_) => format!("{name}.{}", ["ids", "weights"][i]),
                    _ => name.to_owned(),
                };
                let made = made.drain(..).enumerate();
                made.map(|(i, desc)| self.storage(&label(i), StorageKind::Activation, desc, Some(node)))
                    .collect()
            }
        };
        self.names.insert(name.to_owned(), node);
        self.graph.nodes.push(Node {
            name: name.to_owned(),
            op,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            layer: self.layer,
            region,
        });
        Ok(outputs)
    }
}

/// The builder, inside the region of a state. Its own methods make members of the region; everything else is the
/// builder's, and what lies between two members is drawn in by the assignment.
#[derive(Debug)]
pub struct RegionBuilder<'a> {
    builder: &'a mut GraphBuilder,
    state: Value,
}

impl RegionBuilder<'_> {
    /// An edge of the region: `q_absorb`, `v_absorb`. As [`GraphBuilder::head_matmul`].
    ///
    /// # Errors
    /// As all operations; [`Problem::NoState`].
    pub fn head_matmul(&mut self, name: &str, w: Value, x: Value) -> Result<Value, BuildError> {
        let op = Op::HeadMatMul { precision: self.builder.precision };
        self.member(name, op, &[w, x], Part::Edge)
    }

    /// `Op::KvStore`: `(row [rows, width])`, written at the step's positions. The result is the state after the
    /// store; reading it waits for the store.
    ///
    /// # Errors
    /// As all operations; [`Problem::NoState`].
    pub fn kv_store(&mut self, name: &str, row: Value) -> Result<Value, BuildError> {
        self.member(name, Op::KvStore, &[row], Part::Core)
    }

    /// `Op::LatentAttention`: `(q [rows, heads, width], stored) → [rows, heads, latent]`.
    ///
    /// # Errors
    /// As all operations; [`Problem::NoState`], and [`Problem::OutsideRegion`] if `stored` is another state.
    pub fn attention(
        &mut self,
        name: &str,
        q: Value,
        stored: Value,
        scale: f32,
        latent: usize,
    ) -> Result<Value, BuildError> {
        self.member(name, Op::LatentAttention { scale, latent }, &[q, stored], Part::Core)
    }

    fn member(&mut self, name: &str, op: Op, inputs: &[Value], part: Part) -> Result<Value, BuildError> {
        let Some(info) = self.builder.graph.values.get(self.state.index()) else {
            return Err(Problem::Foreign(self.state.index()).at(name));
        };
        let storage = &self.builder.graph.storages[info.storage];
        if storage.kind != StorageKind::State {
            let problem = Problem::NoState { name: storage.name.clone(), found: storage.kind.word() };
            return Err(problem.at(name));
        }
        let region = Region { state: info.storage, part };
        Ok(self.builder.node(name, op, inputs, Some(region))?[0])
    }
}

impl Deref for RegionBuilder<'_> {
    type Target = GraphBuilder;

    fn deref(&self) -> &GraphBuilder {
        self.builder
    }
}

impl DerefMut for RegionBuilder<'_> {
    fn deref_mut(&mut self) -> &mut GraphBuilder {
        self.builder
    }
}

/// Bytes of the largest tensor, and of the largest row of one that varies from step to step; with as many rows, every
/// sum of a plan's bytes stays far from what 64 bits hold.
const MOST: (u128, u128) = (1 << 46, 1 << 31);

fn check_size(desc: &TensorDesc) -> Result<(), Problem> {
    let extents = desc.shape.extents();
    let count = |e: &Extent| e.fixed().unwrap_or(1) as u128;
    let (outer, inner) = (&extents[..extents.len() - 1], &extents[extents.len() - 1]);
    let rows = outer.iter().try_fold(1u128, |n, e| n.checked_mul(count(e)));
    let blocks = count(inner).div_ceil(desc.dtype.block_len() as u128);
    let bytes = rows.and_then(|rows| rows.checked_mul(blocks * desc.dtype.block_bytes() as u128));
    let varies = extents.iter().any(|e| e.fixed().is_none());
    let most = if varies { MOST.1 } else { MOST.0 };
    match bytes {
        Some(bytes) if bytes <= most => Ok(()),
        _ => {
            Err(Problem::Tensor(format!("expected at most {most} bytes, found {}{}", desc.dtype, desc.shape)))
        }
    }
}

fn check_leaf(kind: StorageKind, desc: &TensorDesc) -> Result<(), Problem> {
    check_size(desc)?;
    if !desc.is_dense() {
        return Err(Problem::Tensor(format!("expected a dense tensor, found {desc:?}")));
    }
    if kind != StorageKind::Input && desc.shape.fixed_elements().is_none() {
        return Err(Problem::Tensor(format!("expected fixed extents, found {}", desc.shape)));
    }
    Ok(())
}
