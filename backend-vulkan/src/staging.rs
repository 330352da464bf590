//! Copies between main memory and memory that only the device sees: to it through two pieces, one of which is filled while
//! the other is on its way, from it through a third, whose memory is fast to read. Small ones [travel with
//! programs](crate::carry).

use crate::{
    carry::{Down, ROOM, SMALL, Up},
    context::{Context, lock},
    memory::Memory,
};
use ash::vk;
use backend_api::{BufferRef, DeviceError, Step};
use gpu_allocator::MemoryLocation;
use std::sync::{Arc, Mutex};

/// Bytes of a piece.
const PIECE: usize = 8 << 20;

pub(crate) struct Staging {
    context: Arc<Context>,
    pool: vk::CommandPool,
    slots: Vec<Slot>,
    next: usize,
    back: Option<Slot>,
    up: Option<Up>,
    /// Of the program that was submitted last.
    down: Option<Arc<Mutex<Down>>>,
    /// Where that brings what it brings.
    brought: Option<Memory>,
}

struct Slot {
    memory: Memory,
    commands: vk::CommandBuffer,
    /// The submission that last used it.
    busy: u64,
}

impl Staging {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let pool = context.command_pool()?;
        let context = Arc::clone(context);
        let (slots, next, back, up, down, brought) = (Vec::new(), 0, None, None, None, None);
        Ok(Staging { context, pool, slots, next, back, up, down, brought })
    }

    fn commands(&self) -> Result<vk::CommandBuffer, DeviceError> {
        // SAFETY: the pool is ours.
        unsafe { self.context.command_buffer(self.pool) }
    }

    fn slot(&self, location: MemoryLocation) -> Result<Slot, DeviceError> {
        let memory = Memory::new(&self.context, "staging", PIECE, location)?;
        Ok(Slot { memory, commands: self.commands()?, busy: 0 })
    }

    /// Hands a program's command buffers to the queue, each a submission, with the small writes that wait before the
    /// first and what is to be read after the last. The number to wait for.
    pub(crate) fn submit(
        &mut self,
        commands: &[vk::CommandBuffer],
        down: &Arc<Mutex<Down>>,
        step: &Step,
    ) -> Result<u64, DeviceError> {
        let up = self.up.as_mut().map(|up| up.record(&self.context)).transpose()?.flatten();
        let mut own = lock(down);
        // Whatever becomes of it, what the program before brought is about to be written over.
        self.down = None;
        own.spoil_all();
        let back = self.brought.as_ref().map(|memory| own.record(&self.context, memory, step));
        let back = back.transpose()?.flatten();
        let mut submissions: Vec<Vec<vk::CommandBuffer>> = commands.iter().map(|own| vec![*own]).collect();
        if let Some(first) = submissions.first_mut() {
            first.splice(0..0, up);
        }
        if let Some(last) = submissions.last_mut() {
            last.extend(back);
        }
        let number = self.context.submit(&submissions)?;
        if let Some(waiting) = &mut self.up {
            // They went with the first.
            waiting.sent(number + 1 - submissions.len() as u64);
        }
        own.sent(number);
        self.down = Some(Arc::clone(down));
        Ok(number)
    }

    /// There will be results to bring. Without memory for them they are read one by one.
    pub(crate) fn expects_reads(&mut self) {
        if self.brought.is_none() {
            self.brought = Memory::new(&self.context, "small reads", ROOM, MemoryLocation::GpuToCpu).ok();
        }
    }

    /// Sends the small writes that wait.
    pub(crate) fn flush(&mut self) -> Result<(), DeviceError> {
        if let Some(up) = &mut self.up
            && let Some(commands) = up.record(&self.context)?
        {
            up.sent(self.context.submit(&[vec![commands]])?);
        }
        Ok(())
    }

    /// These bytes are being written: what was brought of them holds no more.
    pub(crate) fn spoil(&mut self, buffer: vk::Buffer, offset: usize, len: usize) {
        if let Some(down) = &self.down {
            lock(down).spoil(buffer, &(offset as u64..(offset + len) as u64));
        }
    }

    /// The next slot for writing, free.
    fn next(&mut self) -> Result<&mut Slot, DeviceError> {
        if self.slots.len() < 2 {
            self.slots.push(self.slot(MemoryLocation::CpuToGpu)?);
            self.next = 0;
            let last = self.slots.len() - 1;
            return Ok(&mut self.slots[last]);
        }
        let index = self.next;
        self.next = 1 - self.next;
        self.context.wait(self.slots[index].busy)?;
        Ok(&mut self.slots[index])
    }

    /// Returns before the bytes have arrived; later submissions see them, and where there are few bytes, it is one of
    /// those that tells what went wrong. `to` is of `target`.
    pub(crate) fn write(
        &mut self,
        target: &BufferRef,
        to: vk::Buffer,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        let context = Arc::clone(&self.context);
        if bytes.is_empty() {
            return Ok(());
        }
        self.spoil(to, offset, bytes.len());
        if bytes.len() <= SMALL {
            if self.up.as_ref().is_some_and(|up| !up.has_room(bytes.len())) {
                self.flush()?;
            }
            if self.up.is_none() {
                self.up = Some(Up::new(&context, self.commands()?)?);
            }
            if let Some(up) = &mut self.up {
                up.add(&context, target, to, offset, bytes)?;
            }
            return Ok(());
        }
        self.flush()?;
        for (number, piece) in bytes.chunks(PIECE).enumerate() {
            let slot = self.next()?;
            let pointer = slot.pointer(&context)?;
            // SAFETY: the slot is PIECE bytes and nobody uses it.
            unsafe { pointer.copy_from_nonoverlapping(piece.as_ptr(), piece.len()) }
            let region = [vk::BufferCopy {
                src_offset: 0,
                dst_offset: (offset + number * PIECE) as u64,
                size: piece.len() as u64,
            }];
            slot.send(&context, |device, commands, staging| {
                // SAFETY: the ranges lie in their buffers.
                unsafe { device.cmd_copy_buffer(commands, staging, to, &region) }
            })?;
        }
        Ok(())
    }

    pub(crate) fn read(
        &mut self,
        from: vk::Buffer,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), DeviceError> {
        let context = Arc::clone(&self.context);
        if into.is_empty() {
            return Ok(());
        }
        if let (Some(down), Some(memory)) = (&self.down, &self.brought)
            && lock(down).read(&context, memory, from, offset, into)?
        {
            return Ok(());
        }
        self.flush()?;
        if self.back.is_none() {
            self.back = Some(self.slot(MemoryLocation::GpuToCpu)?);
        }
        let Some(slot) = &mut self.back else { return Ok(()) };
        for (number, piece) in into.chunks_mut(PIECE).enumerate() {
            let region = [vk::BufferCopy {
                src_offset: (offset + number * PIECE) as u64,
                dst_offset: 0,
                size: piece.len() as u64,
            }];
            slot.send(&context, |device, commands, staging| {
                // SAFETY: the ranges lie in their buffers.
                unsafe { device.cmd_copy_buffer(commands, from, staging, &region) }
            })?;
            context.wait(slot.busy)?;
            let pointer = slot.pointer(&context)?;
            // SAFETY: the slot is PIECE bytes and the copy into it is done.
            unsafe { pointer.copy_to_nonoverlapping(piece.as_mut_ptr(), piece.len()) }
        }
        Ok(())
    }

    /// Zeroes a whole buffer; later submissions see it.
    pub(crate) fn clear(&mut self, buffer: vk::Buffer) -> Result<(), DeviceError> {
        let context = Arc::clone(&self.context);
        self.next()?.send(&context, |device, commands, _| {
            // SAFETY: the buffer is alive and may be a transfer's target.
            unsafe { device.cmd_fill_buffer(commands, buffer, 0, vk::WHOLE_SIZE, 0) }
        })
    }
}

impl Slot {
    /// Records `commands` between barriers that order them with everything else on the queue, and submits. The slot's last
    /// submission is done.
    fn send(
        &mut self,
        context: &Context,
        commands: impl Fn(&ash::Device, vk::CommandBuffer, vk::Buffer),
    ) -> Result<(), DeviceError> {
        record(context, self.commands, |device, recorded| commands(device, recorded, self.memory.buffer()))?;
        self.busy = context.submit(&[vec![self.commands]])?;
        Ok(())
    }

    fn pointer(&self, context: &Context) -> Result<*mut u8, DeviceError> {
        let missing = || context.fault("staging memory that the CPU does not see".to_owned());
        self.memory.mapped().ok_or_else(missing)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.context.lets_go() {
            // SAFETY: nothing recorded from the pool runs any more.
            unsafe { self.context.device.destroy_command_pool(self.pool, None) };
        }
    }
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

/// A barrier between everything before and everything after.
///
/// # Safety
/// `commands` is being recorded.
pub(crate) unsafe fn everything_before(device: &ash::Device, commands: vk::CommandBuffer) {
    let access = vk::AccessFlags::MEMORY_READ | vk::AccessFlags::MEMORY_WRITE;
    let barrier = [vk::MemoryBarrier::default().src_access_mask(access).dst_access_mask(access)];
    let stages = vk::PipelineStageFlags::ALL_COMMANDS;
    let (none, host) = (vk::DependencyFlags::empty(), vk::PipelineStageFlags::HOST);
    // SAFETY: as the caller says; the barrier lives through the call.
    unsafe { device.cmd_pipeline_barrier(commands, stages | host, stages | host, none, &barrier, &[], &[]) }
}
