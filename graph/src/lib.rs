//! Graphs of semantic operations, assigned to devices by who owns the state.
//!
//! A model says *what* is computed with a [`GraphBuilder`]; a [`Placement`] says what the user wants where; a [`Plan`]
//! says who computes what and why, in which order, which bytes cross and where every byte lies; an [`Executor`] runs
//! it, step after step.
//!
//! # The contract
//!
//! **A state has one owner.** A KV cache is declared as a [state](GraphBuilder::state) and lives on one device. The
//! nodes that touch it, and the small products beside it, are made through its [region](GraphBuilder::region) and run
//! there. No byte of a state crosses between devices, except where a [fall-back](FallBack) is reported, or where
//! [`Placement::ownership_check`] is off.
//!
//! **Weights never cross.** Each device loads what its nodes read; the weights that only a region reads are loaded
//! at its owner, unless the user placed them.
//!
//! **Every node has a reason.** [`Reason`] is why a node is where it is, and [`report`] says it in words. A node that
//! its device cannot run goes elsewhere, and what that costs is [told](FallBack); what only its neighbours place, and no
//! more bytes cross with elsewhere, belongs there.
//!
//! **Placement never changes the answer.** Any placement gives the same bits on devices of the same kind.
//!
//! **A step plans nothing.** Extents that vary from step to step are symbols; a plan is made and compiled for a
//! [capacity](backend_api::Capacity), and a step within it allocates nothing. Steps of one token and steps of many are
//! two plans over the same [`Weights`] and [`States`].
//!
//! **A plan is a value.** It prints, compares and serialises, and [`validate`] knows what is true of every one. Making
//! one asks devices questions and allocates nothing on them, so that it works on [null devices](backend_api::NullDevice).
//!
//! # Alone
//!
//! A cache in main memory, everything else on an accelerator: the attention stays with its cache, and so does the
//! product after it, whose weight would draw it away.
//!
//! ```
//! use backend_api::{Capacity, DType, Extent, NullDevice, Precision, Shape, TensorDesc};
//! use graph::{Devices, GraphBuilder, Placement, Plan};
//! use std::{collections::BTreeMap, sync::Arc};
//!
//! // Two heads of 32 latent values, cached for 4096 tokens.
//! let mut g = GraphBuilder::new(Precision::Default);
//! let tokens = g.input("tokens", TensorDesc::new(DType::I32, Shape::rows(&[])));
//! let table = g.weight("embd", TensorDesc::new(DType::F16, Shape::fixed(&[1000, 64])));
//! let w_kv = g.weight("kv", TensorDesc::new(DType::F16, Shape::fixed(&[32, 64])));
//! let v_b = g.weight("v_b", TensorDesc::new(DType::F16, Shape::fixed(&[2, 32, 32])));
//! let w_out = g.weight("out", TensorDesc::new(DType::F16, Shape::fixed(&[1000, 64])));
//! let cache = g.state("cache", TensorDesc::new(DType::F16, Shape::fixed(&[4096, 32])));
//!
//! let x = g.embed_rows("embed", table, tokens)?;
//! g.layer(Some(0));
//! let q = g.reshape(x, &[Extent::Rows, 2.into(), 32.into()])?;
//! let row = g.matmul("latent", w_kv, x)?;
//! let mut region = g.region(cache);
//! let stored = region.kv_store("store", row)?;
//! let context = region.attention("attention", q, stored, 0.25, 32)?;
//! let values = region.head_matmul("v_absorb", v_b, context)?;
//! let values = g.reshape(values, &[Extent::Rows, 64.into()])?;
//! let sum = g.add("add", x, values)?;
//! let logits = g.matmul("head", w_out, sum)?;
//! g.output("logits", logits);
//! let graph = g.finish()?;
//!
//! let gpu = Arc::new(NullDevice::new("gpu", 24 << 30));
//! let cpu = Arc::new(NullDevice::new("cpu", 64 << 30));
//! let devices = Devices::new(vec![gpu, cpu]);
//! let mut placement = Placement::all_on(0, 1);
//! placement.states = BTreeMap::from([("cache".to_owned(), 1)]);
//! let capacity = Capacity { rows: 1, outputs: 1, kv_len: 4096 };
//! let plan = Plan::new(&graph, &placement, &devices, capacity)?;
//!
//! for (node, at) in graph.nodes().iter().zip(0..) {
//!     println!("{:10} on {}: {}", node.name, plan.devices[plan.owners[at]], graph::report::reason(&plan, at));
//! }
//! // embed      on cpu: it reads embd, which is loaded on cpu
//! // latent     on gpu: it reads kv, which is loaded on gpu
//! // store      on cpu: it belongs to cache, which lives on cpu
//! // attention  on cpu: it belongs to cache, which lives on cpu
//! // v_absorb   on cpu: it belongs to cache, which lives on cpu
//! // add        on gpu: its layer is on gpu
//! // head       on gpu: it reads out, which is loaded on gpu
//! assert_eq!(graph::report::reason(&plan, 4), "it belongs to cache, which lives on cpu");
//! let traffic = plan.traffic(&capacity.full_step());
//! assert_eq!((traffic.state, traffic.weight), (0, 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod assign;
mod builder;
pub mod compare;
mod devices;
mod executor;
mod facts;
mod graph;
mod link;
mod memory;
mod observer;
pub mod picture;
mod placement;
mod plan;
pub mod report;
mod span;
mod split;
mod transfer;
pub mod validate;
mod view;
mod weights;

pub use assign::{FallBack, Reason, Traffic};
pub use builder::{BuildError, GraphBuilder, Problem, RegionBuilder};
pub use compare::Comparison;
pub use devices::{DeviceIndex, Devices};
pub use executor::{Executor, RunError};
pub use graph::{Graph, Node, NodeIndex, Part, Region, Storage, StorageIndex, StorageKind, Value, ValueInfo};
pub use memory::{ALIGNMENT, Content, Memory, Slot, memory};
pub use observer::StepObserver;
pub use placement::{Absorb, Placement, Rates};
pub use plan::{Needs, Place, Plan, PlanError};
pub use report::Report;
pub use span::{Count, Span};
pub use split::{Split, split};
pub use transfer::{Transfer, transfers};
pub use weights::{LoadError, Progress, SourceError, States, WeightBytes, WeightSource, Weights};
