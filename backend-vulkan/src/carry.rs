//! Small copies without submissions of their own: what is written before a program runs and what is read after it travels
//! with the program. A split of a decode step on a device with memory of its own is so one submission, and not three.
//!
//! Only what the program that was submitted last has brought is kept: what is read later than that, as with several sessions
//! by turns on one device, has a submission of its own.

use crate::{
    context::Context,
    memory::Memory,
    staging::{everything_before, record},
};
use ash::vk;
use backend_api::{Buffer, BufferRef, DeviceError, ProgramResult, Step};
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

/// The results of a program, which every run brings along.
pub(crate) struct Down {
    /// Those in memory that the CPU does not read.
    results: Vec<(vk::Buffer, ProgramResult)>,
    commands: vk::CommandBuffer,
    /// What the commands copy, one after the other in memory.
    brought: Vec<Brought>,
    /// The submission that last brought anything.
    number: u64,
}

struct Brought {
    buffer: vk::Buffer,
    bytes: Range<u64>,
    /// Where it is brought to.
    at: u64,
    /// Brought by the last run, and not written over since.
    fresh: bool,
}

impl Down {
    /// `commands` may be recorded again and again.
    pub(crate) fn new(results: Vec<(vk::Buffer, ProgramResult)>, commands: vk::CommandBuffer) -> Self {
        Down { results, commands, brought: Vec::new(), number: 0 }
    }

    /// The commands that bring the results of a step into `memory`, as far as there is room. The program's last run is
    /// done.
    pub(crate) fn record(
        &mut self,
        context: &Context,
        memory: &Memory,
        step: &Step,
    ) -> Result<Option<vk::CommandBuffer>, DeviceError> {
        let mut wanted = Vec::new();
        let mut at = 0;
        for (buffer, result) in &self.results {
            let (start, len) = (result.place.offset as u64, result.bytes(step));
            if (1..=SMALL).contains(&len) && at as usize + len <= ROOM {
                wanted.push(Brought { buffer: *buffer, bytes: start..start + len as u64, at, fresh: false });
                at += len as u64;
            }
        }
        let place = |brought: &Brought| (brought.buffer, brought.bytes.clone());
        if !wanted.iter().map(place).eq(self.brought.iter().map(place)) {
            // Of half a recording nothing is read.
            self.brought.clear();
            record(context, self.commands, |device, commands| {
                for Brought { buffer, bytes, at, .. } in &wanted {
                    let (src_offset, size) = (bytes.start, bytes.end - bytes.start);
                    let region = [vk::BufferCopy { src_offset, dst_offset: *at, size }];
                    // SAFETY: being recorded; the ranges lie in their buffers, which the program keeps alive.
                    unsafe { device.cmd_copy_buffer(commands, *buffer, memory.buffer(), &region) }
                }
            })?;
            self.brought = wanted;
        }
        Ok((!self.brought.is_empty()).then_some(self.commands))
    }

    /// This submission brings what was recorded.
    pub(crate) fn sent(&mut self, number: u64) {
        self.number = number;
        self.brought.iter_mut().for_each(|brought| brought.fresh = true);
    }

    /// The program is gone: nothing is brought any more.
    pub(crate) fn retire(&mut self) {
        self.results.clear();
        self.brought.clear();
    }

    /// Nothing that was brought holds any more.
    pub(crate) fn spoil_all(&mut self) {
        self.brought.iter_mut().for_each(|brought| brought.fresh = false);
    }

    /// These bytes are being written.
    pub(crate) fn spoil(&mut self, buffer: vk::Buffer, bytes: &Range<u64>) {
        let meets = |brought: &&mut Brought| brought.buffer == buffer && overlap(&brought.bytes, bytes);
        self.brought.iter_mut().filter(meets).for_each(|brought| brought.fresh = false);
    }

    /// Reads these bytes if the last run brought them into `memory`.
    pub(crate) fn read(
        &self,
        context: &Context,
        memory: &Memory,
        buffer: vk::Buffer,
        offset: usize,
        into: &mut [u8],
    ) -> Result<bool, DeviceError> {
        let bytes = offset as u64..(offset + into.len()) as u64;
        let holds = |brought: &&Brought| {
            let Brought { bytes: own, fresh, .. } = brought;
            *fresh && brought.buffer == buffer && own.start <= bytes.start && bytes.end <= own.end
        };
        let (Some(brought), Some(pointer)) = (self.brought.iter().find(holds), memory.mapped()) else {
            return Ok(false);
        };
        context.wait(self.number)?;
        let at = (brought.at + bytes.start - brought.bytes.start) as usize;
        // SAFETY: the range lies in what was brought, and the submission that did is done.
        unsafe { pointer.add(at).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) }
        Ok(true)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
