//! A device that computes nothing and holds nothing, so that planning needs no hardware.

use crate::{
    Buffer, BufferRef, BufferRequest, BufferUsage, Device, DeviceError, DeviceInfo, DeviceKind, HostBytes,
    OpDesc, OpKind, Program, ProgramDesc, Unsupported,
};
use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// A name, a memory size, and the operations it pretends to run.
///
/// ```
/// use backend_api::{BufferRequest, BufferUsage, Device, NullDevice};
///
/// let gpu = NullDevice::new("gpu", 24 << 30);
/// let cache = BufferRequest { name: "cache".into(), size: 20 << 30, usage: BufferUsage::State };
/// let first = gpu.allocate(&cache)?;
/// assert!(gpu.allocate(&cache).unwrap_err().to_string().contains("no memory for cache"));
/// drop(first);
/// gpu.allocate(&cache)?;
/// # Ok::<(), backend_api::DeviceError>(())
/// ```
#[derive(Debug)]
pub struct NullDevice {
    info: DeviceInfo,
    lacks: Vec<OpKind>,
    used: Arc<AtomicU64>,
}

/// A buffer of a [`NullDevice`]: a size, and the room it takes.
#[derive(Debug)]
pub struct NullBuffer {
    size: usize,
    usage: BufferUsage,
    used: Arc<AtomicU64>,
}

impl NullDevice {
    /// A device with `memory` bytes that supports every operation.
    pub fn new(name: impl Into<String>, memory: u64) -> Self {
        let name = name.into();
        let info = DeviceInfo {
            description: format!("a hypothetical device with {memory} bytes"),
            name,
            kind: DeviceKind::Null,
            memory_total: memory,
            memory_free: memory,
            batch_invariant: true,
        };
        NullDevice { info, lacks: Vec::new(), used: Arc::default() }
    }

    /// The same device without these operations.
    pub fn without(mut self, ops: &[OpKind]) -> Self {
        self.lacks.extend_from_slice(ops);
        self
    }
}

impl Device for NullDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        let kind = op.op.kind();
        if self.lacks.contains(&kind) {
            let reason = "it was made without this operation".to_owned();
            return Err(Unsupported { device: self.info.name.clone(), op: kind, reason });
        }
        Ok(())
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        let size = request.size as u64;
        let total = self.info.memory_total;
        let fits = |used: u64| used.checked_add(size).filter(|sum| *sum <= total);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Arc::new(NullBuffer {
                size: request.size,
                usage: request.usage,
                used: Arc::clone(&self.used),
            })),
            Err(used) => Err(DeviceError::OutOfMemory {
                device: self.info.name.clone(),
                what: request.name.clone(),
                requested: size,
                available: total - used,
            }),
        }
    }

    fn import(&self, _bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        Ok(None)
    }

    fn write(&self, _to: &BufferRef, _offset: usize, _bytes: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn read(&self, _from: &BufferRef, _offset: usize, _into: &mut [u8]) -> Result<(), DeviceError> {
        Err(DeviceError::Driver {
            device: self.info.name.clone(),
            reason: "a hypothetical device holds no bytes to read".to_owned(),
        })
    }

    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        Err(DeviceError::Driver {
            device: self.info.name.clone(),
            reason: format!("a hypothetical device cannot run {}; it only plans", program.name),
        })
    }
}

impl Buffer for NullBuffer {
    fn size(&self) -> usize {
        self.size
    }

    fn usage(&self) -> BufferUsage {
        self.usage
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for NullBuffer {
    fn drop(&mut self) {
        self.used.fetch_sub(self.size as u64, Ordering::Relaxed);
    }
}
