//! One opened device, which so far only tells what it is.

use crate::{
    VulkanError,
    instance::{Instance, OLDEST_VERSION},
};
use ash::vk;
use backend_api::{
    BufferRef, BufferRequest, Device, DeviceError, DeviceInfo, HostBytes, OpDesc, Program, ProgramDesc,
    Unsupported,
};
use std::{fmt, sync::Arc};

/// A Vulkan device: `vulkan0` is the loader's first.
pub struct VulkanDevice {
    info: DeviceInfo,
    device: ash::Device,
    // After `device`: fields are dropped in this order, and `drop` below has destroyed the device before.
    _instance: Arc<Instance>,
}

impl VulkanDevice {
    /// Facts about every Vulkan device of this machine, also of those that [`open`](VulkanDevice::open) refuses.
    ///
    /// # Errors
    /// [`VulkanError::NoLoader`], [`VulkanError::NoDevice`], failed driver calls.
    pub fn enumerate() -> Result<Vec<DeviceInfo>, VulkanError> {
        let instance = Instance::open()?;
        let found = instance.physical_devices()?;
        Ok(found.iter().enumerate().map(|(index, device)| instance.describe(index, *device)).collect())
    }

    /// Opens device number `index` with one compute queue.
    ///
    /// # Errors
    /// Those of [`enumerate`](VulkanDevice::enumerate); [`VulkanError::NoSuchDevice`];
    /// [`VulkanError::Refused`] for a device older than Vulkan 1.2 or without a compute queue.
    pub fn open(index: usize) -> Result<Self, VulkanError> {
        let instance = Arc::new(Instance::open()?);
        let found = instance.physical_devices()?;
        let Some(physical) = found.get(index).copied() else {
            return Err(VulkanError::NoSuchDevice { index, found: found.len() });
        };
        let info = instance.describe(index, physical);
        let refused = |lacks: String| VulkanError::Refused {
            device: format!("{} ({})", info.name, info.description),
            lacks,
        };
        let functions = instance.functions();
        // SAFETY: `physical` comes from this instance, which is alive.
        let version = unsafe { functions.get_physical_device_properties(physical) }.api_version;
        if version < OLDEST_VERSION {
            return Err(refused("expected Vulkan 1.2 or newer".to_owned()));
        }
        // SAFETY: as above.
        let families = unsafe { functions.get_physical_device_queue_family_properties(physical) };
        let computes =
            |family: &vk::QueueFamilyProperties| family.queue_flags.contains(vk::QueueFlags::COMPUTE);
        let Some(family) = families.iter().position(computes) else {
            return Err(refused(format!("none of its {} queue families computes", families.len())));
        };
        let queue =
            [vk::DeviceQueueCreateInfo::default().queue_family_index(family as u32).queue_priorities(&[1.0])];
        let create = vk::DeviceCreateInfo::default().queue_create_infos(&queue);
        // SAFETY: `physical` comes from this instance; `create` and what it points to live through the call; the
        // family index is one of the device's.
        let device = unsafe { functions.create_device(physical, &create, None) };
        let device = device
            .map_err(|result| VulkanError::Call { call: "vkCreateDevice", result: result.to_string() })?;
        Ok(VulkanDevice { info, device, _instance: instance })
    }

    fn cannot(&self, what: impl fmt::Display) -> DeviceError {
        DeviceError::Driver { device: self.info.name.clone(), reason: format!("{what}: {NO_KERNELS}") }
    }
}

const NO_KERNELS: &str = "no Vulkan kernels yet";

impl Device for VulkanDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        let device = self.info.name.clone();
        Err(Unsupported { device, op: op.op.kind(), reason: NO_KERNELS.to_owned() })
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        Err(self.cannot(format_args!("cannot allocate {} ({} bytes)", request.name, request.size)))
    }

    fn import(&self, _bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        Ok(None)
    }

    fn write(&self, _to: &BufferRef, _offset: usize, _bytes: &[u8]) -> Result<(), DeviceError> {
        Err(self.cannot("cannot write"))
    }

    fn read(&self, _from: &BufferRef, _offset: usize, _into: &mut [u8]) -> Result<(), DeviceError> {
        Err(self.cannot("cannot read"))
    }

    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        Err(self.cannot(format_args!("cannot compile {}", program.name)))
    }
}

impl fmt::Debug for VulkanDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanDevice").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Drop for VulkanDevice {
    fn drop(&mut self) {
        // SAFETY: nothing was made from the device, and nobody else holds it.
        unsafe { self.device.destroy_device(None) };
    }
}
