//! Memory of the device: its own, or bytes of a file's map that it reads where they are.

use crate::context::{Context, DriverCall, lock};
use ash::vk;
use backend_api::{Buffer, BufferUsage, DeviceError, HostBytes};
use gpu_allocator::{
    AllocationError, MemoryLocation,
    vulkan::{Allocation, AllocationCreateDesc, AllocationScheme},
};
use std::{
    any::Any,
    fmt,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

/// Beyond its size every buffer has room for this many bytes more, so that the last value may be read with its
/// neighbours.
const SLACK: usize = 64;

/// A buffer with memory of its own, and an address.
pub(crate) struct Memory {
    context: Arc<Context>,
    buffer: vk::Buffer,
    /// `None` only while being dropped.
    allocation: Option<Allocation>,
    address: u64,
    /// Bytes counted as taken.
    size: u64,
}

impl Memory {
    /// Not zeroed.
    pub(crate) fn new(
        context: &Arc<Context>,
        name: &str,
        size: usize,
        location: MemoryLocation,
    ) -> Result<Memory, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory {
            device: context.info.name.clone(),
            what: name.to_owned(),
            requested: size as u64,
            available: context.free(),
        };
        let rounded = size.checked_add(SLACK).map(|size| size.next_multiple_of(16) as u64);
        let rounded = rounded.ok_or_else(out_of_memory)?;
        let largest = context.capabilities.largest_buffer;
        if rounded > largest {
            return Err(DeviceError::OutOfMemory {
                device: context.info.name.clone(),
                what: format!("{name} (of which one buffer here may have {largest} bytes)"),
                requested: size as u64,
                available: context.free(),
            });
        }
        let usage = vk::BufferUsageFlags::STORAGE_BUFFER
            | vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS
            | vk::BufferUsageFlags::INDIRECT_BUFFER
            | vk::BufferUsageFlags::TRANSFER_SRC
            | vk::BufferUsageFlags::TRANSFER_DST;
        let create = vk::BufferCreateInfo::default().size(rounded).usage(usage);
        let device = &context.device;
        let failed = |what: &str, result: vk::Result| match result {
            vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY => out_of_memory(),
            other => context.error(&format!("{what} for {name}"), other),
        };
        // SAFETY: `create` lives through the call.
        let buffer =
            unsafe { device.create_buffer(&create, None) }.map_err(|r| failed("vkCreateBuffer", r))?;
        context.name(buffer, name);
        // SAFETY: the buffer is of this device.
        let requirements = unsafe { device.get_buffer_memory_requirements(buffer) };
        let wish = AllocationCreateDesc {
            name,
            requirements,
            location,
            linear: true,
            allocation_scheme: AllocationScheme::GpuAllocatorManaged,
        };
        let allocated = match context.fault_of(DriverCall::Allocate) {
            Some(vk::Result::ERROR_OUT_OF_DEVICE_MEMORY) => Err(AllocationError::OutOfMemory),
            Some(other) => Err(AllocationError::Internal(format!("{other:?}"))),
            None => context.allocator().allocate(&wish),
        };
        let mut memory =
            Memory { context: Arc::clone(context), buffer, allocation: None, address: 0, size: 0 };
        memory.allocation = Some(allocated.map_err(|error| match error {
            AllocationError::OutOfMemory => out_of_memory(),
            AllocationError::Internal(reason) if reason.contains("OUT_OF_HOST_MEMORY") => out_of_memory(),
            AllocationError::Internal(reason) if reason.contains("DEVICE_LOST") => {
                context.error(name, vk::Result::ERROR_DEVICE_LOST)
            }
            other => context.fault(format!("memory for {name}: {other}")),
        })?);
        context.allocated.fetch_add(rounded, Ordering::Relaxed);
        memory.size = rounded;
        if let Some(allocation) = &memory.allocation {
            // SAFETY: the memory was allocated for this buffer's requirements and is bound once.
            unsafe { device.bind_buffer_memory(buffer, allocation.memory(), allocation.offset()) }
                .map_err(|r| failed("vkBindBufferMemory", r))?;
        }
        let info = vk::BufferDeviceAddressInfo::default().buffer(buffer);
        // SAFETY: the buffer is bound, and was created for having an address.
        memory.address = unsafe { device.get_buffer_device_address(&info) };
        Ok(memory)
    }

    pub(crate) fn buffer(&self) -> vk::Buffer {
        self.buffer
    }

    /// Bytes that it has room for.
    pub(crate) fn room(&self) -> usize {
        (self.size as usize).saturating_sub(SLACK)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Where the CPU sees the first byte, if it does, and the device sees what it writes without being told.
    pub(crate) fn mapped(&self) -> Option<*mut u8> {
        self.mapped_with(vk::MemoryPropertyFlags::HOST_COHERENT)
    }

    /// Likewise, where reading is no slower than writing.
    pub(crate) fn readable(&self) -> Option<*mut u8> {
        self.mapped_with(vk::MemoryPropertyFlags::HOST_COHERENT | vk::MemoryPropertyFlags::HOST_CACHED)
    }

    fn mapped_with(&self, properties: vk::MemoryPropertyFlags) -> Option<*mut u8> {
        let allocation = self.allocation.as_ref()?;
        if !allocation.memory_properties().contains(properties) {
            return None;
        }
        allocation.mapped_ptr().map(|pointer| pointer.as_ptr().cast())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.context.allocated.fetch_sub(self.size, Ordering::Relaxed);
        // Copies into it may be under way.
        if !self.context.lets_go() {
            std::mem::forget(self.allocation.take());
            return;
        }
        // SAFETY: nothing that was submitted runs any more, and who has recorded more keeps the buffer alive.
        unsafe { self.context.device.destroy_buffer(self.buffer, None) };
        if let Some(allocation) = self.allocation.take() {
            // The allocator can only fail at this for an allocation that is not its own.
            let _ = self.context.allocator().free(allocation);
        }
    }
}

/// Bytes of main memory that the device reads in place, through windows, as buffers have a largest size. Windows start at
/// multiples of half of it, so that whatever is shorter than that lies whole in one; what is longer, and in none, gets one
/// of its own. Each is made when something in it is first asked for: a driver may count imports as memory.
pub(crate) struct Imported {
    context: Arc<Context>,
    /// Whom `start` is borrowed from.
    owner: HostBytes,
    /// The bytes as they were when asked for: who gives others when asked again changes nothing.
    start: *const u8,
    size: usize,
    /// What windows start and end at multiples of.
    alignment: usize,
    /// The longest window, a multiple of twice `alignment`, and that of the bytes and the rest of their last page.
    longest: usize,
    whole: usize,
    windows: Mutex<Vec<Window>>,
}

// SAFETY: bytes that are only read, of an owner that may be shared between threads.
unsafe impl Send for Imported {}
// SAFETY: as above.
unsafe impl Sync for Imported {}

struct Window {
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    start: usize,
    end: usize,
    address: u64,
}

impl Imported {
    /// `None` where the device cannot, or the bytes do not start at a page.
    pub(crate) fn new(context: &Arc<Context>, bytes: &HostBytes) -> Result<Option<Self>, DeviceError> {
        let (Some(_), Some(alignment)) = (&context.host_import, context.capabilities.import_alignment) else {
            return Ok(None);
        };
        let alignment = alignment as usize;
        let borrowed: &[u8] = (**bytes).as_ref();
        let (start, size) = (borrowed.as_ptr() as usize, borrowed.len());
        // What starts at a page is a map, whose last page is there as a whole.
        if size == 0 || !start.is_multiple_of(alignment) || alignment > 4096 {
            return Ok(None);
        }
        if lock(&context.refused_imports).contains(&(start, size)) {
            return Ok(None);
        }
        let unit = 2 * alignment;
        let longest = (context.capabilities.largest_buffer as usize).min(1 << 40) / unit * unit;
        if longest == 0 {
            return Ok(None);
        }
        let imported = Imported {
            context: Arc::clone(context),
            owner: Arc::clone(bytes),
            start: borrowed.as_ptr(),
            size,
            alignment,
            longest,
            whole: size.next_multiple_of(alignment),
            windows: Mutex::default(),
        };
        // The driver may refuse this kind of memory: then the bytes are copied.
        match imported.window_around(0, 1) {
            Ok(_) => Ok(Some(imported)),
            Err(_) => {
                imported.refuse();
                Ok(None)
            }
        }
    }

    /// These bytes are not asked for again.
    pub(crate) fn refuse(&self) {
        lock(&self.context.refused_imports).insert((self.start as usize, self.size));
    }

    /// The window that every import has, of its first bytes.
    pub(crate) fn first(&self) -> vk::Buffer {
        lock(&self.windows).first().map_or(vk::Buffer::null(), |window| window.buffer)
    }

    /// The address of bytes of which no window has all, through one more.
    fn window_around(&self, offset: usize, end: usize) -> Result<u64, vk::Result> {
        let half = self.longest / 2;
        let mut start = offset / half * half;
        let mut limit = self.whole.min(start + self.longest);
        if end > limit {
            start = offset / self.alignment * self.alignment;
            limit = end.next_multiple_of(self.alignment);
        }
        let address = self.add_window(start, limit)?;
        Ok(address + (offset - start) as u64)
    }

    /// The device's address of one window more.
    fn add_window(&self, start: usize, end: usize) -> Result<u64, vk::Result> {
        let mut windows = lock(&self.windows);
        let window = self.window(start, end)?;
        let address = window.address;
        self.context.name(window.buffer, &format!("weights window {}", windows.len()));
        windows.push(window);
        Ok(address)
    }

    fn window(&self, start: usize, end: usize) -> Result<Window, vk::Result> {
        let handle = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
        let device = &self.context.device;
        let size = (end - start) as u64;
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(handle);
        let create = vk::BufferCreateInfo::default()
            .size(size)
            .usage(
                vk::BufferUsageFlags::STORAGE_BUFFER
                    | vk::BufferUsageFlags::SHADER_DEVICE_ADDRESS
                    | vk::BufferUsageFlags::TRANSFER_SRC,
            )
            .push_next(&mut external);
        let functions = self.context.host_import.as_ref().ok_or(vk::Result::ERROR_EXTENSION_NOT_PRESENT)?;
        if let Some(result) = self.context.fault_of(DriverCall::Import) {
            return Err(result);
        }
        let pointer = self.start.wrapping_add(start).cast_mut().cast::<std::ffi::c_void>();
        let mut properties = vk::MemoryHostPointerPropertiesEXT::default();
        // SAFETY: `pointer` is the address of `size` mapped bytes, aligned as the driver asks.
        unsafe {
            (functions.fp().get_memory_host_pointer_properties_ext)(
                device.handle(),
                handle,
                pointer,
                &mut properties,
            )
        }
        .result()?;
        // SAFETY: `create` lives through the call.
        let buffer = unsafe { device.create_buffer(&create, None) }?;
        // SAFETY: the buffer is of this device.
        let wanted = unsafe { device.get_buffer_memory_requirements(buffer) };
        let kinds = wanted.memory_type_bits & properties.memory_type_bits;
        let bind = || {
            if kinds == 0 || wanted.size > size {
                return Err(vk::Result::ERROR_INVALID_EXTERNAL_HANDLE);
            }
            let mut import =
                vk::ImportMemoryHostPointerInfoEXT::default().handle_type(handle).host_pointer(pointer);
            let mut flags =
                vk::MemoryAllocateFlagsInfo::default().flags(vk::MemoryAllocateFlags::DEVICE_ADDRESS);
            let allocate = vk::MemoryAllocateInfo::default()
                .allocation_size(size)
                .memory_type_index(kinds.trailing_zeros())
                .push_next(&mut import)
                .push_next(&mut flags);
            // SAFETY: the bytes stay mapped as long as their owner, which `self` holds; nothing of ours writes to them through the device.
            let memory = unsafe { device.allocate_memory(&allocate, None) }?;
            // SAFETY: memory and buffer are of this device and fit, and are bound once.
            match unsafe { device.bind_buffer_memory(buffer, memory, 0) } {
                Ok(()) => Ok(memory),
                Err(result) => {
                    // SAFETY: nothing uses it.
                    unsafe { device.free_memory(memory, None) };
                    Err(result)
                }
            }
        };
        match bind() {
            Ok(memory) => {
                let info = vk::BufferDeviceAddressInfo::default().buffer(buffer);
                // SAFETY: the buffer is bound, and was created for having an address.
                let address = unsafe { device.get_buffer_device_address(&info) };
                Ok(Window { buffer, memory, start, end, address })
            }
            Err(result) => {
                // SAFETY: nothing uses it.
                unsafe { device.destroy_buffer(buffer, None) };
                Err(result)
            }
        }
    }

    fn address(&self, offset: usize, len: usize) -> Result<u64, String> {
        let end = offset.saturating_add(len);
        let holds = |window: &&Window| window.start <= offset && end <= window.end;
        if let Some(window) = lock(&self.windows).iter().find(holds) {
            return Ok(window.address + (offset - window.start) as u64);
        }
        if len + self.alignment > self.longest {
            let longest = self.longest - self.alignment;
            return Err(format!("{len} bytes are more than this device reads in place ({longest})"));
        }
        self.window_around(offset, end).map_err(|result| format!("reading {len} bytes in place: {result}"))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes from there were borrowed from the owner, which lives and does not change them.
        unsafe { std::slice::from_raw_parts(self.start, self.size) }
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        if !self.context.lets_go() {
            // The device may still read them: they are never unmapped.
            std::mem::forget(Arc::clone(&self.owner));
            return;
        }
        for window in self.windows.get_mut().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: whoever records commands with the buffer keeps `self` alive until they are done.
            unsafe {
                self.context.device.destroy_buffer(window.buffer, None);
                self.context.device.free_memory(window.memory, None);
            }
        }
    }
}

pub(crate) enum Bytes {
    Owned(Memory),
    Imported(Imported),
}

/// A buffer of a [`VulkanDevice`](crate::VulkanDevice).
pub struct VulkanBuffer {
    pub(crate) context: Arc<Context>,
    pub(crate) size: usize,
    pub(crate) usage: BufferUsage,
    pub(crate) bytes: Bytes,
}

impl VulkanBuffer {
    /// Whether `len` bytes at `offset` lie in it.
    pub(crate) fn holds(&self, offset: usize, len: usize) -> Result<(), String> {
        let size = self.size;
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(format!("{len} bytes at byte {offset} are beyond a buffer of {size} bytes")),
        }
    }

    /// The address of `len` bytes at `offset`, which lie in it.
    pub(crate) fn address(&self, offset: usize, len: usize) -> Result<u64, String> {
        self.holds(offset, len)?;
        match &self.bytes {
            Bytes::Owned(memory) => Ok(memory.address() + offset as u64),
            Bytes::Imported(imported) => imported.address(offset, len),
        }
    }

    pub(crate) fn is_writable(&self) -> bool {
        matches!(self.bytes, Bytes::Owned(_))
    }
}

impl Buffer for VulkanBuffer {
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

impl fmt::Debug for VulkanBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.bytes {
            Bytes::Owned(_) => "owned".to_owned(),
            Bytes::Imported(imported) => {
                format!("imported, {} windows of {}", lock(&imported.windows).len(), imported.size)
            }
        };
        write!(f, "VulkanBuffer({} bytes, {:?}, {kind})", self.size, self.usage)
    }
}
