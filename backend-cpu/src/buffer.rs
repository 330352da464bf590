//! Memory of the CPU device: its own, or bytes of somebody else's that are only read.

use backend_api::{Buffer, BufferUsage, HostBytes};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    any::Any,
    fmt,
    ptr::NonNull,
};

/// Owned bytes that start zeroed, aligned to [`Memory::ALIGN`].
pub(crate) struct Memory {
    block: NonNull<u8>,
    layout: Layout,
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: a `Memory` only gives out an address; whoever uses it owes exclusion.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// A cache line, and the widest vector.
    pub(crate) const ALIGN: usize = 64;

    /// `None` where there is no room.
    pub(crate) fn zeroed(size: usize) -> Option<Memory> {
        // Aligned by hand: with an alignment beyond malloc's, `alloc_zeroed` would write the zeros itself and
        // so touch every page of a cache that may never fill.
        let layout = Layout::from_size_align(size.checked_add(Self::ALIGN)?, 16).ok()?;
        // SAFETY: the layout is not empty.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let padding = block.align_offset(Self::ALIGN);
        // SAFETY: `padding < ALIGN`, and the block has ALIGN bytes beyond `size`.
        let start = unsafe { block.add(padding) };
        Some(Memory { block, layout, start, size })
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.block.as_ptr(), self.layout) }
    }
}

/// Somebody else's bytes, as they were when asked for: who gives others when asked again changes nothing.
struct Imported {
    start: *const u8,
    size: usize,
    /// Whom `start` is borrowed from.
    _owner: HostBytes,
}

// SAFETY: bytes that are only read, of an owner that may be shared between threads.
unsafe impl Send for Imported {}
// SAFETY: as above.
unsafe impl Sync for Imported {}

enum Bytes {
    Owned(Memory),
    Imported(Imported),
}

/// A buffer of a [`CpuDevice`](crate::CpuDevice). Its bytes are touched by nobody but that device, under the
/// device's lock.
pub struct CpuBuffer {
    device: u64,
    usage: BufferUsage,
    bytes: Bytes,
}

impl CpuBuffer {
    pub(crate) fn owned(device: u64, usage: BufferUsage, memory: Memory) -> Self {
        CpuBuffer { device, usage, bytes: Bytes::Owned(memory) }
    }

    pub(crate) fn imported(device: u64, bytes: HostBytes) -> Self {
        let borrowed: &[u8] = (*bytes).as_ref();
        let (start, size) = (borrowed.as_ptr(), borrowed.len());
        let imported = Imported { start, size, _owner: bytes };
        CpuBuffer { device, usage: BufferUsage::Weights, bytes: Bytes::Imported(imported) }
    }

    /// The device that made it.
    pub(crate) fn device(&self) -> u64 {
        self.device
    }

    /// Whether a program may write to it.
    pub(crate) fn is_writable(&self) -> bool {
        matches!(self.bytes, Bytes::Owned(_))
    }

    /// Its first byte; only to be read unless [`CpuBuffer::is_writable`].
    pub(crate) fn pointer(&self) -> *mut u8 {
        match &self.bytes {
            Bytes::Owned(memory) => memory.pointer(),
            Bytes::Imported(imported) => imported.start.cast_mut(),
        }
    }
}

impl Buffer for CpuBuffer {
    fn size(&self) -> usize {
        match &self.bytes {
            Bytes::Owned(memory) => memory.size(),
            Bytes::Imported(imported) => imported.size,
        }
    }

    fn usage(&self) -> BufferUsage {
        self.usage
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl fmt::Debug for CpuBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_writable() { "owned" } else { "imported" };
        write!(f, "CpuBuffer({} bytes, {:?}, {kind})", self.size(), self.usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_bounded() {
        for size in [0, 1, 63, 64, 65, 4096, 1 << 20] {
            let memory = Memory::zeroed(size).expect("room");
            assert_eq!(memory.pointer() as usize % Memory::ALIGN, 0);
            assert_eq!(memory.size(), size);
            // SAFETY: `size` bytes from `pointer` belong to `memory`, and nobody else has it.
            let bytes = unsafe { std::slice::from_raw_parts_mut(memory.pointer(), size) };
            assert!(bytes.iter().all(|&byte| byte == 0));
            bytes.fill(0xa5);
        }
        assert!(Memory::zeroed(usize::MAX).is_none());
        assert!(Memory::zeroed(isize::MAX as usize - 8).is_none());
    }
}
