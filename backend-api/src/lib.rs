//! The vocabulary between Fathom's graph and its devices.
//!
//! This crate holds no algorithm of any backend. It names
//!
//! * the storage [formats](DType) of GGUF files and their block layouts ([`mod@format`] decodes and encodes
//!   each),
//! * [shapes](Shape), of which two extents vary from step to step ([`Extent`]),
//! * the [operations](Op) a graph is made of, with their output shapes and checks,
//! * the traits a backend implements: [`Device`], [`Buffer`], [`Program`],
//! * the [null device](NullDevice), which answers questions and holds nothing.
//!
//! # The contract
//!
//! **Who validates.** The layer above, always. A device may assume that every [`OpDesc`] it is asked to compile
//! passes [`OpDesc::check`] and was accepted by [`Device::supports`]; it reports only what its caller could not
//! foresee (out of memory, device lost). But it must not assume so with memory: a device that would read or write
//! foreign bytes for a careless caller checks again when it compiles, and each step before it runs.
//!
//! **Honest support.** What [`Device::supports`] accepts runs and is right; what it rejects is rejected with a
//! reason.
//!
//! **No silent work.** A program reads only the values it declares and writes only its outputs.
//!
//! # Alone
//!
//! ```
//! use backend_api::{DType, Op, OpDesc, Precision, Shape, TensorDesc, Extent};
//!
//! // x[rows, 512] times a Q4_K matrix with 256 outputs.
//! let weight = TensorDesc::new(DType::Q4_K, Shape::fixed(&[256, 512]));
//! let x = TensorDesc::new(DType::F32, Shape::new(&[Extent::Rows, Extent::Fixed(512)]));
//! let op = Op::MatMul { precision: Precision::Default };
//! let outputs = op.infer(&[weight, x])?;
//! assert_eq!(outputs[0].shape, Shape::new(&[Extent::Rows, Extent::Fixed(256)]));
//! OpDesc { op, inputs: vec![weight, x], outputs }.check()?;
//! # Ok::<(), backend_api::OpError>(())
//! ```
#![forbid(unsafe_code)]

mod device;
mod dtype;
mod error;
pub mod format;
mod null;
mod observer;
mod op;
mod program;
mod shape;
mod work;

pub use device::{Buffer, BufferRef, BufferRequest, BufferUsage, Device, DeviceInfo, DeviceKind, HostBytes};
pub use dtype::{DType, GgmlType};
pub use error::{DeviceError, OpError, Unsupported};
pub use null::{NullBuffer, NullDevice};
pub use observer::{Discard, Observer, OpEvent};
pub use op::{Gating, Op, OpDesc, OpKind, Precision, RopeAttributes, RouteAttributes};
pub use program::{
    Capacity, Operand, Place, Program, ProgramDesc, ProgramOp, ProgramResult, ProgramValue, Step, ValueIndex,
};
pub use shape::{Extent, Shape, TensorDesc};
pub use work::Work;
