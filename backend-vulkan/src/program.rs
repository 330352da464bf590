//! A compiled program: recorded once, handed to the queue for every step.

use crate::{
    carry::Down,
    context::{Context, lock},
    lower::{self, Count, Cut, Lowering, RopeTable, Scratch},
    memory::{Bytes, Memory, VulkanBuffer},
    pipelines::Shader,
    schedule::{Launch, Task, schedule},
    shared::{ProductPush, RowsPush},
    staging::{Staging, everything_before},
    tuning::Tuning,
};
use ash::vk;
use backend_api::{
    BufferRef, BufferUsage, Capacity, DeviceError, Observer, Op, OpDesc, OpEvent, Program, ProgramDesc, Step,
    Work,
};
use gpu_allocator::MemoryLocation;
use std::{
    mem::offset_of,
    sync::{Arc, Mutex},
    time::Duration,
};

/// What [`VulkanDevice::compile`](crate::VulkanDevice) makes.
pub(crate) struct VulkanProgram {
    name: String,
    capacity: Capacity,
    ops: Vec<OpRecord>,
    dispatches: Vec<Dispatch>,
    counts: Vec<[Count; 3]>,
    ropes: Vec<RopeTable>,
    plain: Recording,
    /// With timestamps; recorded when first wanted.
    timed: Option<(Recording, vk::QueryPool)>,
    /// The step's numbers, and tables of positions.
    step: Memory,
    /// The sizes of dispatches that follow from the step, as many as there are `counts`.
    sizes: Option<Memory>,
    /// The submission that last used any of this.
    last: u64,
    /// What is read after it has run.
    down: Arc<Mutex<Down>>,
    staging: Arc<Mutex<Staging>>,
    pool: vk::CommandPool,
    /// What commands use.
    _tables: Option<Memory>,
    _scratch: Option<Memory>,
    _buffers: Vec<BufferRef>,
    context: Arc<Context>,
}

struct OpRecord {
    name: String,
    desc: OpDesc,
}

/// Command buffers, each a submission.
struct Recording {
    commands: Vec<vk::CommandBuffer>,
}

/// A dispatch as it is recorded.
struct Dispatch {
    pipeline: vk::Pipeline,
    push: Vec<u8>,
    /// Index of its sizes among those that follow from the step, or its sizes.
    groups: Groups,
    waits: bool,
    /// Operations it is of.
    ops: Vec<usize>,
    /// A submission ends before it.
    cut: bool,
}

enum Groups {
    Fixed([u32; 3]),
    Counted(usize),
}

/// Bytes of the step's numbers.
const HEADER: u64 = 64;

/// Bytes of the three sizes of a dispatch.
const COUNT_BYTES: usize = size_of::<vk::DispatchIndirectCommand>();

/// Work that one submission may hold, in seconds: a driver's watchdog kills what takes several.
const SUBMISSION: f64 = 0.1;

impl VulkanProgram {
    /// Buffers must be of this device.
    pub(crate) fn new(
        context: &Arc<Context>,
        staging: &Arc<Mutex<Staging>>,
        program: ProgramDesc,
    ) -> Result<Self, DeviceError> {
        let device = &context.info.name;
        let fault = |reason: String| context.fault(format!("program {}: {reason}", program.name));
        let mut ropes: Vec<RopeTable> = Vec::new();
        let mut end = HEADER;
        for op in &program.ops {
            let known = |index: &usize| *index < program.values.len();
            if !op.inputs.iter().chain(&op.outputs).all(known) {
                return Err(fault(format!("{}: a value that is not there", op.name)));
            }
            lower::supports(device, &program.describe(op))?;
            if let Op::Rope(attributes) = &op.op
                && !ropes.iter().any(|table| table.attributes == *attributes)
            {
                ropes.push(RopeTable { attributes: attributes.clone(), offset: end });
                end += (8 * attributes.inverse_frequencies.len() * program.capacity.rows) as u64;
                end = end.next_multiple_of(64);
            }
        }
        let tuning = Tuning::new(context.class, context.arithmetic, &context.capabilities);
        let named = |what: &str| format!("{what} of program {}", program.name);
        let step = Memory::new(context, &named("numbers"), end as usize, MemoryLocation::CpuToGpu)?;
        if step.mapped().is_none() {
            return Err(fault("the numbers of a step lie where the CPU does not see them".to_owned()));
        }
        let lowered = |scratch: Scratch| {
            let mut lowering = Lowering::new(&program, &tuning, step.address(), &ropes, scratch);
            for (index, op) in program.ops.iter().enumerate() {
                lowering.op(index).map_err(|problem| fault(format!("{}: {problem}", op.name)))?;
            }
            Ok::<_, DeviceError>((lowering.pieces, lowering.partials, lowering.lists))
        };
        let (_, partials, lists) = lowered(Scratch::default())?;
        let scratch = match partials + lists {
            0 => None,
            bytes => Some(Memory::new(context, &named("scratch"), bytes as usize, MemoryLocation::GpuOnly)?),
        };
        let address = scratch.as_ref().map_or(0, Memory::address);
        let (pieces, ..) = lowered(Scratch { address, partials })?;
        let launches = schedule(pieces, &program.capacity);

        let (tables, bytes) = tables_of(&launches);
        let tables_memory = match bytes.len() {
            0 => None,
            size => {
                let memory = Memory::new(context, &named("tables"), size, MemoryLocation::CpuToGpu)?;
                let Some(pointer) = memory.mapped() else {
                    return Err(fault("its tables lie where the CPU does not see them".to_owned()));
                };
                // SAFETY: the memory is that long, and nobody else has it.
                unsafe { pointer.copy_from_nonoverlapping(bytes.as_ptr(), size) }
                Some(memory)
            }
        };
        let table = tables_memory.as_ref().map_or(0, Memory::address);
        let descs: Vec<OpDesc> = program.ops.iter().map(|op| program.describe(op)).collect();
        let mut dispatches = Vec::with_capacity(launches.len());
        let mut counts = Vec::new();
        let (mut seconds, full) = (0.0, program.capacity.full_step());
        for (launch, offset) in launches.into_iter().zip(tables) {
            // What an operation costs is charged once.
            let work: u64 = match launch.helps {
                true => 0,
                false => launch.ops.iter().map(|op| descs[*op].work(&full).macs).sum(),
            };
            let whole = dispatch(&launch.task, &tuning, step.address(), table + offset);
            let named = |pipeline| context.name(pipeline, &whole.shader.name);
            let pipeline = context.pipelines.get(&context.device, &whole.shader, named);
            let pipeline =
                pipeline.map_err(|result| context.error(&format!("shader {}", whole.shader.name), result))?;
            let seconds_whole = work as f64 / tuning.macs_per_second;
            let largest = context.capabilities.largest_count;
            let pieces = whole.pieces(if program.capacity.rows > 1 { seconds_whole } else { 0.0 }, largest);
            let own = seconds_whole / pieces.len() as f64;
            for (number, (push, sizes)) in pieces.into_iter().enumerate() {
                let cut = program.capacity.rows > 1 && seconds > 0.0 && seconds + own > SUBMISSION;
                seconds = if cut { own } else { seconds + own };
                let groups = if sizes.iter().all(|count| count.is_fixed()) {
                    Groups::Fixed(sizes.map(|count| count.at(&full).min(largest)))
                } else {
                    counts.push(sizes);
                    Groups::Counted(counts.len() - 1)
                };
                let waits = launch.waits && number == 0;
                dispatches.push(Dispatch { pipeline, push, groups, waits, ops: launch.ops.clone(), cut });
            }
        }
        let sizes = match counts.len() {
            0 => None,
            n => Some(Memory::new(context, &named("sizes"), n * COUNT_BYTES, MemoryLocation::CpuToGpu)?),
        };
        if sizes.as_ref().is_some_and(|sizes| sizes.mapped().is_none()) {
            return Err(fault("the sizes of dispatches lie where the CPU does not see them".to_owned()));
        }
        let pool = context.command_pool()?;
        // SAFETY: the pool is new.
        let commands = unsafe { context.command_buffer(pool) }.inspect_err(|_| {
            // SAFETY: nothing uses it.
            unsafe { context.device.destroy_command_pool(pool, None) };
        })?;
        let down = Down::new(within_steps(&program.buffers), commands);
        let records =
            program.ops.iter().zip(descs).map(|(op, desc)| OpRecord { name: op.name.clone(), desc });
        let mut compiled = VulkanProgram {
            ops: records.collect(),
            name: program.name,
            capacity: program.capacity,
            dispatches,
            counts,
            ropes,
            plain: Recording { commands: Vec::new() },
            timed: None,
            step,
            sizes,
            last: 0,
            down: Arc::new(Mutex::new(down)),
            staging: Arc::clone(staging),
            pool,
            _tables: tables_memory,
            _scratch: scratch,
            _buffers: program.buffers,
            context: Arc::clone(context),
        };
        compiled.plain = compiled.record(None)?;
        context.pipelines.keep(&context.device);
        Ok(compiled)
    }

    /// Records all dispatches, each between two timestamps if there is a pool for them.
    fn record(&self, queries: Option<vk::QueryPool>) -> Result<Recording, DeviceError> {
        let (context, device) = (&self.context, &self.context.device);
        let failed = |result| context.error(&format!("recording program {}", self.name), result);
        let submissions = 1 + self.dispatches.iter().filter(|dispatch| dispatch.cut).count();
        let create = vk::CommandBufferAllocateInfo::default()
            .command_pool(self.pool)
            .command_buffer_count(submissions as u32);
        // SAFETY: the pool is ours; commands are recorded in order, one buffer at a time, with handles and ranges that
        // `self` keeps alive.
        unsafe {
            let commands = device.allocate_command_buffers(&create).map_err(failed)?;
            commands.iter().for_each(|buffer| context.name(*buffer, &self.name));
            let mut current = 0;
            let begin = vk::CommandBufferBeginInfo::default();
            device.begin_command_buffer(commands[0], &begin).map_err(failed)?;
            if let Some(queries) = queries {
                device.cmd_reset_query_pool(commands[0], queries, 0, 2 * self.dispatches.len() as u32);
            }
            everything_before(device, commands[0]);
            let mut bound = vk::Pipeline::null();
            for (index, dispatch) in self.dispatches.iter().enumerate() {
                if dispatch.cut {
                    device.end_command_buffer(commands[current]).map_err(failed)?;
                    current += 1;
                    bound = vk::Pipeline::null();
                    device.begin_command_buffer(commands[current], &begin).map_err(failed)?;
                    everything_before(device, commands[current]);
                } else if dispatch.waits {
                    between_dispatches(device, commands[current]);
                }
                let now = commands[current];
                if bound != dispatch.pipeline {
                    bound = dispatch.pipeline;
                    device.cmd_bind_pipeline(now, vk::PipelineBindPoint::COMPUTE, bound);
                }
                let (layout, stage) = (context.pipelines.layout, vk::ShaderStageFlags::COMPUTE);
                device.cmd_push_constants(now, layout, stage, 0, &dispatch.push);
                if let Some(queries) = queries {
                    let top = vk::PipelineStageFlags::TOP_OF_PIPE;
                    device.cmd_write_timestamp(now, top, queries, 2 * index as u32);
                }
                match dispatch.groups {
                    Groups::Fixed([x, y, z]) => device.cmd_dispatch(now, x, y, z),
                    Groups::Counted(at) => {
                        if let Some(sizes) = &self.sizes {
                            let offset = (at * COUNT_BYTES) as u64;
                            device.cmd_dispatch_indirect(now, sizes.buffer(), offset);
                        }
                    }
                }
                if let Some(queries) = queries {
                    let bottom = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
                    device.cmd_write_timestamp(now, bottom, queries, 2 * index as u32 + 1);
                }
            }
            everything_before(device, commands[current]);
            device.end_command_buffer(commands[current]).map_err(failed)?;
            Ok(Recording { commands })
        }
    }

    /// Writes what varies from step to step.
    fn write_step(&self, step: &Step) {
        let write_to = |memory: &Memory, offset: u64, bytes: &[u8]| {
            if let Some(pointer) = memory.mapped() {
                // SAFETY: the offsets below lie in their memory, which was made for them; what was last submitted with it
                // is done.
                unsafe { pointer.add(offset as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
            }
        };
        let write = |offset: u64, bytes: &[u8]| write_to(&self.step, offset, bytes);
        let numbers = [step.rows, step.past, step.outputs, step.kv_len()].map(|n| n as u32);
        write(0, bytemuck::bytes_of(&numbers));
        let largest = self.context.capabilities.largest_count;
        for (index, counts) in self.counts.iter().enumerate() {
            let sizes = counts.map(|count| count.at(step).min(largest));
            if let Some(memory) = &self.sizes {
                write_to(memory, (index * COUNT_BYTES) as u64, bytemuck::bytes_of(&sizes));
            }
        }
        for table in &self.ropes {
            let frequencies = &table.attributes.inverse_frequencies;
            let magnitude = f64::from(table.attributes.magnitude);
            for row in 0..step.rows {
                let position = (step.past + row) as f64;
                let start = table.offset + (8 * frequencies.len() * row) as u64;
                for (pair, frequency) in frequencies.iter().enumerate() {
                    let (sine, cosine) = (position * frequency).sin_cos();
                    let turned = [(cosine * magnitude) as f32, (sine * magnitude) as f32];
                    write(start + 8 * pair as u64, bytemuck::bytes_of(&turned));
                }
            }
        }
    }

    /// The recording with timestamps.
    fn record_timed(&mut self) -> Result<(), DeviceError> {
        if self.timed.is_none() {
            let create = vk::QueryPoolCreateInfo::default()
                .query_type(vk::QueryType::TIMESTAMP)
                .query_count(2 * self.dispatches.len().max(1) as u32);
            // SAFETY: `create` lives through the call.
            let queries = unsafe { self.context.device.create_query_pool(&create, None) }
                .map_err(|result| self.context.error("vkCreateQueryPool", result))?;
            let recording = self.record(Some(queries)).inspect_err(|_| {
                // SAFETY: what was recorded with it is never submitted.
                unsafe { self.context.device.destroy_query_pool(queries, None) };
            })?;
            self.timed = Some((recording, queries));
        }
        Ok(())
    }

    /// Time of each operation, where the device tells. That of a dispatch of several is shared among them by their work.
    fn times(&self, step: &Step, queries: vk::QueryPool, period: f32) -> Result<Vec<Duration>, DeviceError> {
        let mut stamps = vec![0u64; 2 * self.dispatches.len()];
        let flags = vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT;
        // SAFETY: the pool has that many queries, which the submissions just done have written.
        unsafe { self.context.device.get_query_pool_results(queries, 0, &mut stamps, flags) }
            .map_err(|result| self.context.error("vkGetQueryPoolResults", result))?;
        let mut nanoseconds = vec![0.0; self.ops.len()];
        for (dispatch, stamps) in self.dispatches.iter().zip(stamps.as_chunks::<2>().0) {
            let whole = stamps[1].saturating_sub(stamps[0]) as f64 * f64::from(period);
            let weight = |op: &usize| self.ops[*op].desc.work(step).macs as f64 + 1.0;
            let all: f64 = dispatch.ops.iter().map(weight).sum();
            for op in &dispatch.ops {
                nanoseconds[*op] += whole * weight(op) / all;
            }
        }
        Ok(nanoseconds.into_iter().map(|n| Duration::from_nanos(n as u64)).collect())
    }
}

/// A dispatch before it is cut.
struct Whole {
    shader: Shader,
    push: Vec<u8>,
    sizes: [Count; 3],
    cut: Cut,
}

impl Whole {
    /// Push constants and sizes of its pieces, none of which takes much longer than a submission may, or has more work
    /// groups than the device's `largest` count.
    fn pieces(self, seconds: f64, largest: u32) -> Vec<(Vec<u8>, [Count; 3])> {
        let [x, y, z] = self.sizes;
        let wanted = (seconds / SUBMISSION).ceil().max(1.0) as u32;
        let with = |numbers: &[(usize, u32)]| {
            let mut push = self.push.clone();
            for (at, number) in numbers {
                push[*at..*at + 4].copy_from_slice(&number.to_le_bytes());
            }
            push
        };
        match (self.cut, x) {
            (Cut::Groups { first }, Count::Fixed(groups)) => {
                let each = groups.div_ceil(wanted.max(groups.div_ceil(largest)).min(groups.max(1))).max(1);
                let piece =
                    |start: u32| (with(&[(first, start)]), [Count::Fixed(each.min(groups - start)), y, z]);
                (0..groups).step_by(each as usize).map(piece).collect()
            }
            // Rows past those of a step have nothing to do.
            (Cut::Rows { first, count, rows }, _) if wanted > 1 && rows > 1 => {
                let each = rows.div_ceil(wanted.min(rows));
                let piece = |start: u32| {
                    let own = each.min(rows - start);
                    (with(&[(first, start), (count, own)]), [x, Count::Fixed(own), z])
                };
                (0..rows).step_by(each as usize).map(piece).collect()
            }
            _ => vec![(self.push, self.sizes)],
        }
    }
}

/// What a task is as a dispatch.
fn dispatch(task: &Task, tuning: &Tuning, step: u64, table: u64) -> Whole {
    match task {
        Task::Rows { ops, extent } => {
            let (kind, fixed_count) = lower::extent_words(*extent);
            let count = lower::count_of(*extent, 1, 1);
            let push = RowsPush { step, table, extent: kind, fixed_count };
            let kinds = ops.iter().map(|op| op.kind);
            let shader = Shader {
                constants: [tuning.row_threads, ops.len() as u32].into_iter().chain(kinds).collect(),
                ..Shader::simple("rows", tuning.row_threads)
            };
            let push = bytemuck::bytes_of(&push).to_vec();
            Whole { shader, push, sizes: [count, Count::Fixed(1), Count::Fixed(1)], cut: Cut::Never }
        }
        Task::Products { shader, jobs, groups, tiles } => {
            let push = ProductPush { step, table, jobs: jobs.len() as u32, first_group: 0 };
            Whole {
                shader: shader.clone(),
                push: bytemuck::bytes_of(&push).to_vec(),
                sizes: [Count::Fixed(*groups), most(tiles), Count::Fixed(1)],
                cut: Cut::Groups { first: offset_of!(ProductPush, first_group) },
            }
        }
        Task::Alone { shader, push, groups, cut } => {
            Whole { shader: shader.clone(), push: push.clone(), sizes: *groups, cut: *cut }
        }
    }
}

/// A count that is enough for all: exact where all are alike, else one that grows as fast as any.
fn most(all: &[Count]) -> Count {
    let first = all[0];
    if all.iter().all(|count| *count == first) {
        return first;
    }
    let large = |count: &Count| match *count {
        Count::Fixed(n) => u64::from(n),
        Count::Rows(times, part, more) => 1000 * u64::from(times) / u64::from(part) + u64::from(more),
        Count::Outputs(times, part) => 1000 * u64::from(times) / u64::from(part),
        Count::KvLen(_) => 0,
    };
    all.iter().copied().max_by_key(large).unwrap_or(first)
}

/// The offset of each launch's table, and all bytes.
fn tables_of(launches: &[Launch]) -> (Vec<u64>, Vec<u8>) {
    let mut bytes: Vec<u8> = Vec::new();
    let mut offsets = Vec::with_capacity(launches.len());
    for launch in launches {
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        offsets.push(bytes.len() as u64);
        match &launch.task {
            Task::Rows { ops, .. } => bytes.extend(bytemuck::cast_slice::<_, u8>(ops)),
            Task::Products { jobs, .. } => bytes.extend(bytemuck::cast_slice::<_, u8>(jobs)),
            Task::Alone { .. } => {}
        }
    }
    (offsets, bytes)
}

/// A barrier between what shaders wrote and what they read or write next.
///
/// # Safety
/// `commands` is being recorded.
unsafe fn between_dispatches(device: &ash::Device, commands: vk::CommandBuffer) {
    let (write, read) = (vk::AccessFlags::SHADER_WRITE, vk::AccessFlags::SHADER_READ);
    let barrier = [vk::MemoryBarrier::default().src_access_mask(write).dst_access_mask(read | write)];
    let (compute, none) = (vk::PipelineStageFlags::COMPUTE_SHADER, vk::DependencyFlags::empty());
    // SAFETY: as the caller says; the barrier lives through the call.
    unsafe { device.cmd_pipeline_barrier(commands, compute, compute, none, &barrier, &[], &[]) }
}

impl Program for VulkanProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        if !self.capacity.holds(step) {
            let reason = format!("program {}: {step:?} is beyond its {:?}", self.name, self.capacity);
            return Err(self.context.fault(reason));
        }
        // Nothing where the last step was waited for, as always but after an error.
        self.context.wait(self.last)?;
        self.write_step(step);
        if !observer.wants_ops() {
            return self.finish(Timed::No, observer);
        }
        let mut times = None;
        match self.context.capabilities.timestamp_period.filter(|_| !self.dispatches.is_empty()) {
            Some(period) => {
                self.record_timed()?;
                self.finish(Timed::Yes, observer)?;
                if let Some((_, queries)) = &self.timed {
                    times = Some(self.times(step, *queries, period)?);
                }
            }
            None => self.finish(Timed::No, observer)?,
        }
        for (index, op) in self.ops.iter().enumerate() {
            let Work { bytes, macs } = op.desc.work(step);
            let kind = op.desc.op.kind().to_string();
            let time = times.as_ref().map(|times| times[index]);
            observer.op(OpEvent { name: &op.name, op: &kind, bytes, macs, time });
        }
        Ok(())
    }
}

/// Which recording to run.
#[derive(Clone, Copy, PartialEq)]
enum Timed {
    No,
    Yes,
}

impl VulkanProgram {
    /// Submits a recording and waits for it.
    fn finish(&mut self, timed: Timed, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        let recording = match &self.timed {
            Some((recording, _)) if timed == Timed::Yes => recording,
            _ => &self.plain,
        };
        let mut staging = lock(&self.staging);
        self.last = staging.submit(&recording.commands, &self.down)?;
        drop(staging);
        observer.submitted(recording.commands.len(), self.dispatches.len());
        self.context.wait(self.last)
    }
}

/// The buffers whose bytes live within a step: what is read of them is read after each.
fn within_steps(buffers: &[BufferRef]) -> Vec<vk::Buffer> {
    let own = buffers.iter().filter_map(|buffer| buffer.as_any().downcast_ref::<VulkanBuffer>());
    let scratch = own.filter(|buffer| buffer.usage == BufferUsage::Scratch);
    let buffer = |buffer: &VulkanBuffer| match &buffer.bytes {
        Bytes::Owned(memory) => Some(memory.buffer()),
        Bytes::Imported(_) => None,
    };
    scratch.filter_map(buffer).collect()
}

impl Drop for VulkanProgram {
    fn drop(&mut self) {
        // Others may soon be called as its buffers were.
        lock(&self.down).retire();
        if !self.context.lets_go() {
            return;
        }
        // SAFETY: nothing that was submitted runs any more.
        unsafe {
            self.context.device.destroy_command_pool(self.pool, None);
            if let Some((_, queries)) = &self.timed {
                self.context.device.destroy_query_pool(*queries, None);
            }
        }
    }
}
