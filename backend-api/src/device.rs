//! The device traits, split by lifetime: a device answers questions and makes things, a buffer holds bytes and
//! says what for, a [program](crate::Program) runs.

use crate::{DeviceError, OpDesc, Program, ProgramDesc, Unsupported};
use std::{any::Any, fmt, sync::Arc};

/// What kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// A processor working in main memory.
    Cpu,
    /// A device with memory of its own.
    Gpu,
    /// A device that shares main memory with the CPU.
    IntegratedGpu,
    /// A device that only plans.
    Null,
}

impl DeviceKind {
    /// Whether its memory is main memory.
    pub fn shares_main_memory(self) -> bool {
        matches!(self, DeviceKind::Cpu | DeviceKind::IntegratedGpu)
    }
}

/// Facts about a device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// The short name that options use, such as `cpu` or `vulkan0`.
    pub name: String,
    /// What it is, in words: the processor or card, and the kernels or driver used.
    pub description: String,
    /// What kind of device it is.
    pub kind: DeviceKind,
    /// Bytes of its memory, in all.
    pub memory_total: u64,
    /// Bytes free when the device was opened.
    pub memory_free: u64,
    /// Contract C7: results do not depend on the number of rows in a step, bit for bit. Repeating a step gives
    /// the same bits on every device.
    pub batch_invariant: bool,
}

/// What a buffer's bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BufferUsage {
    /// Written once, then only read.
    Weights,
    /// Outlives steps: a KV cache. Has one owner and never moves.
    State,
    /// Lives within a step, or holds a step's inputs and outputs.
    Scratch,
}

/// A wish for memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufferRequest {
    /// For errors and debuggers, such as `KV cache of layer 3`.
    pub name: String,
    /// Bytes.
    pub size: usize,
    /// What for.
    pub usage: BufferUsage,
}

/// Bytes in main memory that stay where they are: a mapped file, or a vector.
pub type HostBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Memory of a device. Dropping the last reference frees it.
pub trait Buffer: Any + Send + Sync + fmt::Debug {
    /// Bytes.
    fn size(&self) -> usize;
    /// What for.
    fn usage(&self) -> BufferUsage;
    /// For the device that made it.
    fn as_any(&self) -> &dyn Any;
}

/// A shared buffer.
pub type BufferRef = Arc<dyn Buffer>;

/// Answers questions and makes things.
pub trait Device: Send + Sync {
    /// Facts.
    fn info(&self) -> &DeviceInfo;

    /// Whether the device runs this operation on tensors of these formats, shapes and strides.
    ///
    /// # Errors
    /// The reason why not.
    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported>;

    /// Memory of `request.size` bytes, zeroed, aligned for every format.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError>;

    /// Uses bytes of main memory as weights without copying them. `None` where the device cannot; then
    /// [`allocate`](Device::allocate) and [`write`](Device::write).
    ///
    /// # Errors
    /// Driver errors.
    fn import(&self, bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError>;

    /// Copies `bytes` to `offset` of a buffer of this device. Not while a program that uses it runs.
    ///
    /// # Errors
    /// [`DeviceError::ForeignBuffer`], driver errors.
    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Copies `into.len()` bytes from `offset` of a buffer of this device.
    ///
    /// # Errors
    /// [`DeviceError::ForeignBuffer`], driver errors.
    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError>;

    /// Makes a program ready to run many times.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for the first operation that [`supports`](Device::supports) rejects.
    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError>;
}
