//! Small copies without submissions of their own: what is written before a program runs and what is read after it travels
//! with the program. A split of a decode step on a device with memory of its own is so one submission, and not three.
//!
//! Only what the program that was submitted last has brought is kept: with several sessions by turns on one device, reads
//! have submissions of their own again.

use crate::{
    context::Context,
    memory::Memory,
    staging::{everything_before, record},
};
use ash::vk;
use backend_api::{Buffer, BufferRef, DeviceError};
use gpu_allocator::MemoryLocation;
use std::{
    ops::Range,
    sync::{Arc, Weak},
};

/// Bytes that a copy may have to travel so.
pub(crate) const SMALL: usize = 1 << 20;

/// Bytes that may travel with one submission, in each direction.
pub(crate) const ROOM: usize = 2 << 20;

/// Writes that may.
const COPIES: usize = 256;

/// Runs after which what nobody reads is no longer brought along.
const PATIENCE: u32 = 8;

/// Bytes on their way to the device, which the next submission takes along.
pub(crate) struct Up {
    memory: Memory,
    commands: vk::CommandBuffer,
    copies: Vec<Copy>,
    /// Alive while they are being submitted; from then on they wait before they go.
    targets: Vec<BufferRef>,
    filled: usize,
    /// The submission that last took any.
    busy: u64,
}

struct Copy {
    /// What is dropped before it is submitted needs no bytes.
    target: Weak<dyn Buffer>,
    to: vk::Buffer,
    region: vk::BufferCopy,
}

impl Up {
    /// `commands` may be recorded again and again.
    pub(crate) fn new(context: &Arc<Context>, commands: vk::CommandBuffer) -> Result<Self, DeviceError> {
        let memory = Memory::new(context, "small writes", ROOM, MemoryLocation::CpuToGpu)?;
        Ok(Up { memory, commands, copies: Vec::new(), targets: Vec::new(), filled: 0, busy: 0 })
    }

    pub(crate) fn has_room(&self, len: usize) -> bool {
        self.copies.len() < COPIES && self.filled + len <= ROOM
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
        self.copies.push(Copy { target: Arc::downgrade(target), to, region });
        self.filled += bytes.len();
        Ok(())
    }

    /// The commands that copy all that waits, if anything does.
    pub(crate) fn record(&mut self, context: &Context) -> Result<Option<vk::CommandBuffer>, DeviceError> {
        self.targets.clear();
        let targets = &mut self.targets;
        self.copies.retain(|copy| {
            copy.target.upgrade().is_some_and(|target| {
                targets.push(target);
                true
            })
        });
        if self.copies.is_empty() {
            self.filled = 0;
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
        self.targets.clear();
    }
}

/// What was read after a program's last runs, which its next ones bring along.
pub(crate) struct Down {
    /// The program's buffers that live within a step.
    buffers: Vec<vk::Buffer>,
    commands: vk::CommandBuffer,
    /// One after the other in memory.
    wanted: Vec<Wanted>,
    /// Whether the commands are those of what is wanted now.
    recorded: bool,
    /// The submission that last brought anything.
    number: u64,
}

struct Wanted {
    buffer: vk::Buffer,
    bytes: Range<u64>,
    /// Brought by the last run, and not written over since.
    fresh: bool,
    /// Runs since it was read.
    idle: u32,
}

impl Wanted {
    fn len(&self) -> usize {
        (self.bytes.end - self.bytes.start) as usize
    }

    fn holds(&self, buffer: vk::Buffer, bytes: &Range<u64>) -> bool {
        self.buffer == buffer && self.bytes.start <= bytes.start && bytes.end <= self.bytes.end
    }
}

impl Down {
    /// `commands` may be recorded again and again.
    pub(crate) fn new(buffers: Vec<vk::Buffer>, commands: vk::CommandBuffer) -> Self {
        Down { buffers, commands, wanted: Vec::new(), recorded: true, number: 0 }
    }

    /// A run of the program is done and these bytes were read: from now on they are brought along, where there is room.
    pub(crate) fn want(&mut self, buffer: vk::Buffer, bytes: Range<u64>) {
        let wanted = Wanted { buffer, bytes, fresh: false, idle: 0 };
        let known = self.wanted.iter().any(|other| other.holds(buffer, &wanted.bytes));
        let all: usize = self.wanted.iter().map(Wanted::len).sum();
        let room = wanted.len() <= SMALL && all + wanted.len() <= ROOM;
        if !known && room && self.buffers.contains(&buffer) {
            self.wanted.push(wanted);
            self.recorded = false;
        }
    }

    /// The commands that bring what is wanted into `memory`, if anything is. The program's last run is done.
    pub(crate) fn record(
        &mut self,
        context: &Context,
        memory: &Memory,
    ) -> Result<Option<vk::CommandBuffer>, DeviceError> {
        if self.wanted.iter().any(|wanted| wanted.idle > PATIENCE) {
            self.wanted.retain(|wanted| wanted.idle <= PATIENCE);
            self.recorded = false;
        }
        if self.wanted.is_empty() {
            return Ok(None);
        }
        if !self.recorded {
            let copies = |device: &ash::Device, commands| {
                let mut at = 0;
                for wanted in &self.wanted {
                    let region = [vk::BufferCopy {
                        src_offset: wanted.bytes.start,
                        dst_offset: at,
                        size: wanted.len() as u64,
                    }];
                    // SAFETY: being recorded; the ranges lie in their buffers, which the program keeps alive.
                    unsafe { device.cmd_copy_buffer(commands, wanted.buffer, memory.buffer(), &region) }
                    at += wanted.len() as u64;
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
        for wanted in &mut self.wanted {
            wanted.fresh = true;
            wanted.idle += 1;
        }
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

    /// Reads these bytes if the last run brought them into `memory`.
    pub(crate) fn read(
        &mut self,
        context: &Context,
        memory: &Memory,
        buffer: vk::Buffer,
        offset: usize,
        into: &mut [u8],
    ) -> Result<bool, DeviceError> {
        let bytes = offset as u64..(offset + into.len()) as u64;
        let holds = |wanted: &Wanted| wanted.fresh && wanted.holds(buffer, &bytes);
        let Some(index) = self.wanted.iter().position(holds) else { return Ok(false) };
        let Some(pointer) = memory.mapped() else { return Ok(false) };
        context.wait(self.number)?;
        let before: usize = self.wanted[..index].iter().map(Wanted::len).sum();
        let wanted = &mut self.wanted[index];
        wanted.idle = 0;
        let at = before + (bytes.start - wanted.bytes.start) as usize;
        // SAFETY: the range lies in what was brought, and the submission that did is done.
        unsafe { pointer.add(at).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) }
        Ok(true)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
