//! Small copies without submissions of their own: what is written before a program runs and what is read after it travels
//! with the program. A split of a decode step on a device with memory of its own is so one submission, and not three.

use crate::{context::Context, memory::Memory, staging::everything_before};
use ash::vk;
use backend_api::{BufferRef, DeviceError};
use gpu_allocator::MemoryLocation;
use std::{ops::Range, sync::Arc};

/// Bytes that a copy may have to travel so.
pub(crate) const SMALL: usize = 1 << 20;

/// Bytes that may travel with one submission, in each direction.
const ROOM: usize = 2 << 20;

/// Bytes on their way to the device, which the next submission takes along.
pub(crate) struct Up {
    memory: Memory,
    commands: vk::CommandBuffer,
    copies: Vec<Copy>,
    filled: usize,
    /// The submission that last took any.
    busy: u64,
}

struct Copy {
    /// Alive until it is submitted; from then on it waits before it goes.
    _target: BufferRef,
    to: vk::Buffer,
    region: vk::BufferCopy,
}

impl Up {
    /// `commands` may be recorded again and again.
    pub(crate) fn new(context: &Arc<Context>, commands: vk::CommandBuffer) -> Result<Self, DeviceError> {
        let memory = Memory::new(context, "small writes", ROOM, MemoryLocation::CpuToGpu)?;
        Ok(Up { memory, commands, copies: Vec::new(), filled: 0, busy: 0 })
    }

    pub(crate) fn has_room(&self, len: usize) -> bool {
        self.filled + len <= ROOM
    }

    /// Takes bytes, for which there is room.
    pub(crate) fn add(
        &mut self,
        context: &Context,
        target: &BufferRef,
        to: vk::Buffer,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        if self.copies.is_empty() {
            context.wait(self.busy)?;
        }
        let missing = || context.fault("staging memory that the CPU does not see".to_owned());
        let pointer = self.memory.mapped().ok_or_else(missing)?;
        // SAFETY: there is room, and what was submitted with earlier bytes is done.
        unsafe { pointer.add(self.filled).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
        let region = vk::BufferCopy {
            src_offset: self.filled as u64,
            dst_offset: offset as u64,
            size: bytes.len() as u64,
        };
        self.copies.push(Copy { _target: Arc::clone(target), to, region });
        self.filled += bytes.len();
        Ok(())
    }

    /// The commands that copy all that waits, if anything does.
    pub(crate) fn record(&self, context: &Context) -> Result<Option<vk::CommandBuffer>, DeviceError> {
        if self.copies.is_empty() {
            return Ok(None);
        }
        let copies = |device: &ash::Device, commands| {
            let mut unordered: Vec<(vk::Buffer, Range<u64>)> = Vec::new();
            for Copy { to, region, .. } in &self.copies {
                let bytes = region.dst_offset..region.dst_offset + region.size;
                let meets = |(other, range): &(vk::Buffer, Range<u64>)| other == to && overlap(range, &bytes);
                // SAFETY: being recorded, and the ranges lie in their buffers.
                unsafe {
                    if unordered.iter().any(meets) {
                        unordered.clear();
                        everything_before(device, commands);
                    }
                    device.cmd_copy_buffer(commands, self.memory.buffer(), *to, &[*region]);
                }
                unordered.push((*to, bytes));
            }
        };
        record(context, self.commands, copies)?;
        Ok(Some(self.commands))
    }

    /// All that waited went with this submission.
    pub(crate) fn sent(&mut self, number: u64) {
        self.copies.clear();
        (self.filled, self.busy) = (0, number);
    }
}

/// What was read after a program's last runs, which its next ones bring along.
pub(crate) struct Down {
    /// The program's buffers that live within a step.
    buffers: Vec<vk::Buffer>,
    commands: vk::CommandBuffer,
    memory: Option<Memory>,
    wanted: Vec<Wanted>,
    /// Whether the commands are those of what is wanted now.
    recorded: bool,
    /// The submission that last brought anything.
    number: u64,
}

struct Wanted {
    buffer: vk::Buffer,
    bytes: Range<u64>,
    /// Where it is in our memory.
    at: usize,
    /// Brought by the last run, and not written over since.
    fresh: bool,
}

impl Down {
    /// `commands` may be recorded again and again.
    pub(crate) fn new(buffers: Vec<vk::Buffer>, commands: vk::CommandBuffer) -> Self {
        Down { buffers, commands, memory: None, wanted: Vec::new(), recorded: true, number: 0 }
    }

    /// A run of the program is done and these bytes were read: from now on they are brought along, where there is room.
    pub(crate) fn want(&mut self, buffer: vk::Buffer, bytes: Range<u64>) {
        let len = (bytes.end - bytes.start) as usize;
        if len > SMALL || !self.buffers.contains(&buffer) {
            return;
        }
        let within = |wanted: &Wanted| {
            wanted.buffer == buffer && bytes.start <= wanted.bytes.start && wanted.bytes.end <= bytes.end
        };
        self.wanted.retain(|wanted| !within(wanted));
        let mut at = 0;
        for wanted in &mut self.wanted {
            wanted.at = at;
            // What is laid out anew is not there yet.
            wanted.fresh = false;
            at += (wanted.bytes.end - wanted.bytes.start) as usize;
        }
        if at + len <= ROOM {
            self.wanted.push(Wanted { buffer, bytes, at, fresh: false });
        }
        self.recorded = false;
    }

    /// The commands that bring what is wanted, if anything is. The program's last run is done.
    pub(crate) fn record(
        &mut self,
        context: &Arc<Context>,
    ) -> Result<Option<vk::CommandBuffer>, DeviceError> {
        if self.wanted.is_empty() {
            return Ok(None);
        }
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => Memory::new(context, "small reads", ROOM, MemoryLocation::GpuToCpu)?,
        };
        let memory = self.memory.insert(memory);
        if !self.recorded {
            let copies = |device: &ash::Device, commands| {
                for Wanted { buffer, bytes, at, .. } in &self.wanted {
                    let region = [vk::BufferCopy {
                        src_offset: bytes.start,
                        dst_offset: *at as u64,
                        size: bytes.end - bytes.start,
                    }];
                    // SAFETY: being recorded; the ranges lie in their buffers, which the program keeps alive.
                    unsafe { device.cmd_copy_buffer(commands, *buffer, memory.buffer(), &region) }
                }
            };
            record(context, self.commands, copies)?;
            self.recorded = true;
        }
        Ok(Some(self.commands))
    }

    /// This submission brings what was recorded.
    pub(crate) fn sent(&mut self, number: u64) {
        self.number = number;
        self.wanted.iter_mut().for_each(|wanted| wanted.fresh = true);
    }

    /// The program is gone: nothing is brought any more.
    pub(crate) fn retire(&mut self) {
        self.wanted.clear();
        self.buffers.clear();
    }

    /// Nothing that was brought holds any more.
    pub(crate) fn spoil_all(&mut self) {
        self.wanted.iter_mut().for_each(|wanted| wanted.fresh = false);
    }

    /// These bytes are being written.
    pub(crate) fn spoil(&mut self, buffer: vk::Buffer, bytes: &Range<u64>) {
        let meets = |wanted: &&mut Wanted| wanted.buffer == buffer && overlap(&wanted.bytes, bytes);
        self.wanted.iter_mut().filter(meets).for_each(|wanted| wanted.fresh = false);
    }

    /// Reads these bytes if the last run brought them.
    pub(crate) fn read(
        &self,
        context: &Context,
        buffer: vk::Buffer,
        offset: usize,
        into: &mut [u8],
    ) -> Result<bool, DeviceError> {
        let (start, end) = (offset as u64, (offset + into.len()) as u64);
        let holds = |wanted: &&Wanted| {
            wanted.fresh && wanted.buffer == buffer && wanted.bytes.start <= start && end <= wanted.bytes.end
        };
        let Some(wanted) = self.wanted.iter().find(holds) else { return Ok(false) };
        let Some(pointer) = self.memory.as_ref().and_then(Memory::mapped) else { return Ok(false) };
        context.wait(self.number)?;
        let at = wanted.at + (start - wanted.bytes.start) as usize;
        // SAFETY: the range lies in what was brought, and the submission that did is done.
        unsafe { pointer.add(at).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) }
        Ok(true)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Records copies between barriers that order them with everything else on the queue. What was last submitted with
/// `commands` is done.
pub(crate) fn record(
    context: &Context,
    commands: vk::CommandBuffer,
    copies: impl FnOnce(&ash::Device, vk::CommandBuffer),
) -> Result<(), DeviceError> {
    let device = &context.device;
    let begin = vk::CommandBufferBeginInfo::default();
    let record = || {
        // SAFETY: the caller's: the commands are not running, and may be recorded anew.
        unsafe {
            device.begin_command_buffer(commands, &begin)?;
            everything_before(device, commands);
            copies(device, commands);
            everything_before(device, commands);
            device.end_command_buffer(commands)
        }
    };
    record().map_err(|result| {
        // SAFETY: as above. What was half recorded is dropped.
        let _ = unsafe { device.reset_command_buffer(commands, vk::CommandBufferResetFlags::empty()) };
        context.error("recording a copy", result)
    })
}
