//! The naive device: each operation evaluated in f64, one after the other, on copies.

use crate::reference::{Tensor, evaluate};
use backend_api::{
    Buffer, BufferRef, BufferRequest, BufferUsage, Device, DeviceError, DeviceInfo, DeviceKind, HostBytes,
    Observer, Op, OpDesc, OpEvent, Program, ProgramDesc, ProgramOp, Step, Unsupported, Work,
};
use std::{
    any::Any,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

/// Runs every operation in f64, written only from the definitions; slow, and right to the last bit of f32.
///
/// The suite compares other devices with the same evaluator. As a device it shows that the suite can be passed,
/// and serves where a slow exact answer is wanted.
#[derive(Debug)]
pub struct ReferenceDevice {
    info: DeviceInfo,
}

/// Bytes of a [`ReferenceDevice`].
struct ReferenceBuffer {
    usage: BufferUsage,
    size: usize,
    bytes: Bytes,
}

enum Bytes {
    Own(RwLock<Vec<u8>>),
    Imported(HostBytes),
}

struct ReferenceProgram {
    desc: ProgramDesc,
    buffers: Vec<Arc<ReferenceBuffer>>,
}

impl ReferenceDevice {
    /// The device, named `reference`.
    pub fn new() -> Self {
        ReferenceDevice {
            info: DeviceInfo {
                name: "reference".to_owned(),
                description: "a naive f64 evaluator".to_owned(),
                kind: DeviceKind::Cpu,
                memory_total: u64::MAX,
                memory_free: u64::MAX,
                batch_invariant: true,
            },
        }
    }

    fn buffer(&self, buffer: &BufferRef, what: &str) -> Result<Arc<ReferenceBuffer>, DeviceError> {
        let any: Arc<dyn Any + Send + Sync> = Arc::clone(buffer) as _;
        any.downcast()
            .map_err(|_| DeviceError::ForeignBuffer { device: self.info.name.clone(), what: what.to_owned() })
    }
}

impl Default for ReferenceDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl ReferenceBuffer {
    fn read<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        match &self.bytes {
            Bytes::Own(bytes) => f(&bytes.read().unwrap_or_else(PoisonError::into_inner)),
            Bytes::Imported(bytes) => f((**bytes).as_ref()),
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let Bytes::Own(all) = &self.bytes else {
            let (device, reason) = ("reference".to_owned(), "imported bytes are only read".to_owned());
            return Err(DeviceError::Driver { device, reason });
        };
        let mut all = all.write().unwrap_or_else(PoisonError::into_inner);
        inside(&all, offset, bytes.len())?;
        all[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// # Errors
/// Bytes that are not all there.
fn inside(all: &[u8], offset: usize, len: usize) -> Result<(), DeviceError> {
    if offset.checked_add(len).is_some_and(|end| end <= all.len()) {
        return Ok(());
    }
    let reason = format!("{len} bytes from {offset} on are beyond a buffer of {} bytes", all.len());
    Err(DeviceError::Driver { device: "reference".to_owned(), reason })
}

impl fmt::Debug for ReferenceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes for {:?}", self.size, self.usage)
    }
}

impl Buffer for ReferenceBuffer {
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

impl Device for ReferenceDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        let device = || self.info.name.clone();
        op.check().map_err(|error| Unsupported {
            device: device(),
            op: op.op.kind(),
            reason: error.to_string(),
        })
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(request.size).map_err(|_| DeviceError::OutOfMemory {
            device: self.info.name.clone(),
            what: request.name.clone(),
            requested: request.size as u64,
            available: self.info.memory_free,
        })?;
        bytes.resize(request.size, 0);
        let bytes = Bytes::Own(RwLock::new(bytes));
        Ok(Arc::new(ReferenceBuffer { usage: request.usage, size: request.size, bytes }))
    }

    fn import(&self, bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        let size = (**bytes).as_ref().len();
        let bytes = Bytes::Imported(Arc::clone(bytes));
        Ok(Some(Arc::new(ReferenceBuffer { usage: BufferUsage::Weights, size, bytes })))
    }

    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.buffer(to, "write")?.write(offset, bytes)
    }

    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        self.buffer(from, "read")?.read(|bytes| {
            inside(bytes, offset, into.len())?;
            into.copy_from_slice(&bytes[offset..offset + into.len()]);
            Ok(())
        })
    }

    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        program.ops.iter().try_for_each(|op| self.supports(&program.describe(op)))?;
        let buffers = program.buffers.iter().map(|buffer| self.buffer(buffer, &program.name));
        Ok(Box::new(ReferenceProgram { buffers: buffers.collect::<Result<_, _>>()?, desc: program }))
    }
}

impl ReferenceProgram {
    fn load(&self, value: usize, step: &Step) -> Tensor {
        let value = &self.desc.values[value];
        let buffer = &self.buffers[value.place.buffer];
        buffer.read(|bytes| Tensor::load(&value.desc, &bytes[value.place.offset..], step))
    }

    fn run_op(&self, op: &ProgramOp, step: &Step) -> Result<(), DeviceError> {
        let inputs: Vec<Tensor> = op.inputs.iter().map(|value| self.load(*value, step)).collect();
        let outputs = evaluate(&op.op, &inputs.iter().collect::<Vec<_>>(), step);
        for (index, tensor) in op.outputs.iter().zip(outputs) {
            let value = &self.desc.values[*index];
            let stored_at = if op.op == Op::KvStore { step.past * value.desc.row_bytes() } else { 0 };
            let bytes = tensor.store(value.desc.dtype);
            self.buffers[value.place.buffer].write(value.place.offset + stored_at, &bytes)?;
        }
        Ok(())
    }
}

impl Program for ReferenceProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        for op in &self.desc.ops {
            self.run_op(op, step)?;
            if observer.wants_ops() {
                let kind = op.op.kind().to_string();
                let Work { bytes, macs } = self.desc.describe(op).work(step);
                observer.op(OpEvent { name: &op.name, op: &kind, bytes, macs, time: None });
            }
        }
        Ok(())
    }
}
