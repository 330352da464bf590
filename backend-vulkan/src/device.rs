//! One opened device.

use crate::{
    Listing, VulkanError, VulkanOptions,
    capabilities::Capabilities,
    context::{self, Context, DriverCall, Failure, lock},
    instance::Instance,
    lower,
    memory::{Bytes, Imported, Memory, VulkanBuffer},
    program::VulkanProgram,
    staging::Staging,
};
use backend_api::{
    BufferRef, BufferRequest, BufferUsage, Device, DeviceError, DeviceInfo, HostBytes, OpDesc, Program,
    ProgramDesc, Unsupported,
};
use gpu_allocator::MemoryLocation;
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

/// A Vulkan device: `vulkan0` is the loader's first.
///
/// Devices are independent: one opened twice has two queues and two memories.
pub struct VulkanDevice {
    // Dropped before the context that it copies for.
    staging: Arc<Mutex<Staging>>,
    context: Arc<Context>,
}

/// Bytes of imported memory, no more than a page, that are compared with what the device sees there.
const TRIED: usize = 4096;

impl VulkanDevice {
    /// Every Vulkan device of this machine, also those that [`open`](VulkanDevice::open) refuses.
    ///
    /// # Errors
    /// [`VulkanError::NoLoader`], [`VulkanError::NoDevice`], failed driver calls.
    pub fn enumerate() -> Result<Vec<Listing>, VulkanError> {
        let instance = Instance::open(false)?;
        let found = instance.physical_devices()?;
        let listing = |(index, device): (usize, &ash::vk::PhysicalDevice)| {
            let info = instance.describe(index, *device);
            match context::usable(&instance, *device) {
                Ok(family) => {
                    let offers = Capabilities::of(&instance, *device, family).offers();
                    Listing { info, offers, refused: None }
                }
                Err(lacks) => Listing { info, offers: Vec::new(), refused: Some(lacks) },
            }
        };
        Ok(found.iter().enumerate().map(listing).collect())
    }

    /// Opens device number `index` with one compute queue.
    ///
    /// # Errors
    /// Those of [`enumerate`](VulkanDevice::enumerate); [`VulkanError::NoSuchDevice`];
    /// [`VulkanError::Refused`] for a device older than Vulkan 1.2, without a compute queue, or without a feature that
    /// every shader needs.
    pub fn open(index: usize) -> Result<Self, VulkanError> {
        Self::open_with(index, &VulkanOptions::default())
    }

    /// As [`open`](VulkanDevice::open), with options.
    ///
    /// # Errors
    /// As [`open`](VulkanDevice::open); [`VulkanError::NoValidation`].
    pub fn open_with(index: usize, options: &VulkanOptions) -> Result<Self, VulkanError> {
        let context = Context::open(index, options)?;
        let staging = Staging::new(&context)
            .map_err(|error| VulkanError::Call { call: "vkCreateCommandPool", result: error.to_string() })?;
        Ok(VulkanDevice { staging: Arc::new(Mutex::new(staging)), context })
    }

    /// What the user should know that is no error: a cache on disk that was ignored.
    pub fn notice(&self) -> Option<&str> {
        self.context.pipelines.notice()
    }

    /// What the validation layer complains about, also when the device is gone; empty unless it was
    /// [asked for](VulkanOptions::validation).
    pub fn validation_messages(&self) -> Arc<Mutex<Vec<String>>> {
        self.context.complaints()
    }

    /// How often something was handed to its queue: once for each run of a program that is not cut; and where memory is
    /// the device's own, for each allocation, for large copies, and for reads of what is no [result](ProgramDesc::results);
    /// and for each import.
    pub fn submissions(&self) -> u64 {
        self.context.submissions()
    }

    /// From now on one such call, after so many that go well, fails. For tests of what happens then.
    pub fn fail(&self, call: DriverCall, after: usize, failure: Failure) {
        self.context.fail(call, after, failure);
    }

    fn own<'a>(&self, buffer: &'a BufferRef, what: &str) -> Result<&'a VulkanBuffer, DeviceError> {
        let own = buffer.as_any().downcast_ref::<VulkanBuffer>();
        own.filter(|buffer| buffer.context.id == self.context.id).ok_or_else(|| DeviceError::ForeignBuffer {
            device: self.context.info.name.clone(),
            what: what.to_owned(),
        })
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        lock(&self.staging)
    }
}

impl Device for VulkanDevice {
    fn info(&self) -> &DeviceInfo {
        &self.context.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        lower::supports(&self.context.info.name, op)
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        self.context.check()?;
        let memory = Memory::new(&self.context, &request.name, request.size, MemoryLocation::GpuOnly)?;
        match memory.mapped().filter(|_| !self.context.always_stage) {
            // SAFETY: so many bytes of the buffer, which nobody uses yet.
            Some(pointer) => unsafe { pointer.write_bytes(0, request.size) },
            None => self.staging().clear(memory.buffer())?,
        }
        Ok(Arc::new(VulkanBuffer {
            context: Arc::clone(&self.context),
            size: request.size,
            usage: request.usage,
            bytes: Bytes::Owned(memory),
        }))
    }

    fn import(&self, bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        if self.context.always_stage {
            return Ok(None);
        }
        self.context.check()?;
        let Some(imported) = Imported::new(&self.context, bytes)? else { return Ok(None) };
        // What a driver took is not yet what its device sees.
        let start = &imported.bytes()[..imported.size().min(TRIED)];
        let mut seen = [0; TRIED];
        let seen = &mut seen[..start.len()];
        match self.staging().read(imported.first(), 0, seen) {
            Ok(()) if seen == start => {}
            Err(lost @ DeviceError::Lost { .. }) => return Err(lost),
            _ => {
                imported.refuse();
                return Ok(None);
            }
        }
        Ok(Some(Arc::new(VulkanBuffer {
            context: Arc::clone(&self.context),
            size: imported.size(),
            usage: BufferUsage::Weights,
            bytes: Bytes::Imported(imported),
        })))
    }

    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.context.check()?;
        let own = self.own(to, "a write")?;
        own.holds(offset, bytes.len())
            .map_err(|problem| self.context.fault(format!("a write: {problem}")))?;
        let Bytes::Owned(memory) = &own.bytes else {
            return Err(self.context.fault("a write to imported bytes, which are only read".to_owned()));
        };
        let mut staging = self.staging();
        match memory.mapped().filter(|_| !self.context.always_stage) {
            Some(pointer) => {
                self.context.settle()?;
                staging.spoil(memory.buffer(), offset, bytes.len());
                // SAFETY: the range lies in the buffer, which the CPU sees; nothing that was submitted runs any more, and
                // who holds `staging` is the only one who writes so.
                unsafe { pointer.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
                Ok(())
            }
            None => staging.write(to, memory.buffer(), offset, bytes),
        }
    }

    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        self.context.check()?;
        let own = self.own(from, "a read")?;
        own.holds(offset, into.len()).map_err(|problem| self.context.fault(format!("a read: {problem}")))?;
        match &own.bytes {
            Bytes::Imported(imported) => {
                into.copy_from_slice(&imported.bytes()[offset..offset + into.len()]);
                Ok(())
            }
            Bytes::Owned(memory) => {
                let mut staging = self.staging();
                match memory.readable().filter(|_| !self.context.always_stage) {
                    Some(pointer) => {
                        self.context.settle()?;
                        // SAFETY: as in `write`.
                        unsafe { pointer.add(offset).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) }
                        Ok(())
                    }
                    None => staging.read(memory.buffer(), offset, into),
                }
            }
        }
    }

    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        self.context.check()?;
        for buffer in &program.buffers {
            self.own(buffer, &format!("program {}", program.name))?;
        }
        Ok(Box::new(VulkanProgram::new(&self.context, &self.staging, program)?))
    }
}

impl fmt::Debug for VulkanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanDevice").field("info", &self.context.info).finish_non_exhaustive()
    }
}
