//! A program as it is cut for steps of about one size: lowered, scheduled, recorded.
//!
//! A prompt of five tokens wants kernels other than one of five hundred, and how attention is cut depends on how much it sees.
//! So a program has a form for each of some sizes.

use crate::{
    context::Context,
    lower::{self, Count, Cut, Lowering, RopeTable, Scratch},
    memory::Memory,
    pipelines::Shader,
    schedule::{Launch, Task, schedule, unordered},
    shared::{ProductPush, RowsPush},
    staging::everything_before,
    tuning::Tuning,
};
use ash::vk;
use backend_api::{Capacity, DeviceError, OpDesc, ProgramDesc, Step};
use gpu_allocator::MemoryLocation;
use std::{mem::offset_of, sync::Arc, time::Duration};

/// What every form of a program is made from.
pub(crate) struct Source {
    pub desc: ProgramDesc,
    /// The operations of `desc`.
    pub ops: Vec<OpDesc>,
    pub ropes: Vec<RopeTable>,
    pub tuning: Tuning,
    /// The capacities of its forms, the smaller before those that hold what they hold.
    pub sizes: Vec<Capacity>,
    /// Where the numbers of a step lie.
    pub step: u64,
}

/// A form.
pub(crate) struct Form {
    /// The steps that it is for.
    pub capacity: Capacity,
    dispatches: Vec<Dispatch>,
    counts: Vec<[Count; 3]>,
    plain: Recording,
    /// With timestamps; recorded when first wanted.
    timed: Option<(Recording, vk::QueryPool)>,
    /// The sizes of dispatches that follow from the step, as many as there are `counts`.
    sizes: Option<Memory>,
    _tables: Option<Memory>,
}

/// Command buffers, each a submission.
pub(crate) type Recording = Vec<vk::CommandBuffer>;

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

/// Bytes of the three sizes of a dispatch.
const COUNT_BYTES: usize = size_of::<vk::DispatchIndirectCommand>();

/// Work that one submission may hold, in seconds: a driver's watchdog kills what takes several.
const SUBMISSION: f64 = 0.1;

impl Source {
    pub(crate) fn fault(&self, context: &Context, reason: &str) -> DeviceError {
        context.fault(format!("program {}: {reason}", self.desc.name))
    }

    fn lowered(
        &self,
        context: &Context,
        capacity: Capacity,
        scratch: Scratch,
    ) -> Result<Lowering<'_>, DeviceError> {
        let mut lowering = Lowering::new(&self.desc, capacity, &self.tuning, self.step, &self.ropes, scratch);
        for (index, op) in self.desc.ops.iter().enumerate() {
            let fault = |problem| self.fault(context, &format!("{}: {problem}", op.name));
            lowering.op(index).map_err(fault)?;
        }
        Ok(lowering)
    }

    /// The capacity of the form for a step, which the program's holds.
    pub(crate) fn size_of(&self, step: &Step) -> Capacity {
        self.sizes.iter().copied().find(|size| size.holds(step)).unwrap_or(self.desc.capacity)
    }

    /// Bytes for partial results and for lists, that are enough for every form.
    pub(crate) fn scratch(&self, context: &Context) -> Result<[u64; 2], DeviceError> {
        let mut most = [0; 2];
        for capacity in &self.sizes {
            let lowering = self.lowered(context, *capacity, Scratch::default())?;
            most = [most[0].max(lowering.partials), most[1].max(lowering.lists)];
        }
        Ok(most)
    }
}

impl Form {
    /// Command buffers are of `pool`.
    pub(crate) fn new(
        context: &Arc<Context>,
        source: &Source,
        capacity: Capacity,
        scratch: Scratch,
        pool: vk::CommandPool,
    ) -> Result<Self, DeviceError> {
        let Source { tuning, step, .. } = source;
        let named = |what: &str| format!("{what} of program {}", source.desc.name);
        let pieces = source.lowered(context, capacity, scratch)?.pieces;
        let launches = schedule(pieces, &capacity);
        debug_assert_eq!(
            unordered(&launches, &capacity),
            None,
            "two dispatches clash without a barrier between them"
        );

        let (offsets, bytes) = tables_of(&launches);
        let tables = match bytes.len() {
            0 => None,
            size => {
                let memory = Memory::new(context, &named("tables"), size, MemoryLocation::CpuToGpu)?;
                let hidden = || source.fault(context, "its tables lie where the CPU does not see them");
                let pointer = memory.mapped().ok_or_else(hidden)?;
                // SAFETY: the memory is that long, and nobody else has it.
                unsafe { pointer.copy_from_nonoverlapping(bytes.as_ptr(), size) }
                Some(memory)
            }
        };
        let table = tables.as_ref().map_or(0, Memory::address);
        let mut dispatches = Vec::with_capacity(launches.len());
        let mut counts = Vec::new();
        let (mut seconds, full) = (0.0, capacity.full_step());
        let is_cut = capacity.rows > 1;
        for (launch, offset) in launches.into_iter().zip(offsets) {
            // What an operation costs is charged once.
            let work: u64 = match launch.helps {
                true => 0,
                false => launch.ops.iter().map(|op| source.ops[*op].work(&full).macs).sum(),
            };
            let whole = dispatch(&launch.task, tuning.row_threads(&capacity), *step, table + offset);
            let named = |pipeline| context.name(pipeline, &whole.shader.name);
            let pipeline = context.pipelines.get(&context.device, &whole.shader, named);
            let pipeline =
                pipeline.map_err(|result| context.error(&format!("shader {}", whole.shader.name), result))?;
            let seconds_whole = work as f64 / tuning.macs_per_second;
            let largest = context.capabilities.largest_count;
            let pieces = whole.pieces(if is_cut { seconds_whole } else { 0.0 }, largest);
            let own = seconds_whole / pieces.len() as f64;
            for (number, (push, sizes)) in pieces.into_iter().enumerate() {
                let cut = is_cut && seconds > 0.0 && seconds + own > SUBMISSION;
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
            return Err(source.fault(context, "the sizes of dispatches lie where the CPU does not see them"));
        }
        let (plain, timed) = (Vec::new(), None);
        let mut form = Form { capacity, dispatches, counts, plain, timed, sizes, _tables: tables };
        form.plain = form.record(context, &source.desc.name, pool, None)?;
        context.pipelines.keep(&context.device);
        Ok(form)
    }

    /// Records all dispatches, each between two timestamps if there is a pool for them.
    fn record(
        &self,
        context: &Context,
        name: &str,
        pool: vk::CommandPool,
        queries: Option<vk::QueryPool>,
    ) -> Result<Recording, DeviceError> {
        let device = &context.device;
        let failed = |result| context.error(&format!("recording program {name}"), result);
        let submissions = 1 + self.dispatches.iter().filter(|dispatch| dispatch.cut).count();
        let create = vk::CommandBufferAllocateInfo::default()
            .command_pool(pool)
            .command_buffer_count(submissions as u32);
        // SAFETY: the pool is the program's; commands are recorded in order, one buffer at a time, with handles and
        // ranges that it and `self` keep alive.
        unsafe {
            let commands = device.allocate_command_buffers(&create).map_err(failed)?;
            commands.iter().for_each(|buffer| context.name(*buffer, name));
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
            Ok(commands)
        }
    }

    /// Writes the sizes of dispatches that follow from the step. What was last submitted is done.
    pub(crate) fn write_sizes(&self, step: &Step, largest: u32) {
        let Some(pointer) = self.sizes.as_ref().and_then(Memory::mapped) else { return };
        for (index, counts) in self.counts.iter().enumerate() {
            let sizes = counts.map(|count| count.at(step).min(largest));
            let bytes: &[u8] = bytemuck::bytes_of(&sizes);
            // SAFETY: there is room for as many as there are counts.
            unsafe { pointer.add(index * COUNT_BYTES).copy_from_nonoverlapping(bytes.as_ptr(), COUNT_BYTES) }
        }
    }

    pub(crate) fn dispatches(&self) -> usize {
        self.dispatches.len()
    }

    /// What to submit.
    pub(crate) fn plain(&self) -> &Recording {
        &self.plain
    }

    /// What to submit for the [times](Form::times) of operations.
    pub(crate) fn timed(
        &mut self,
        context: &Context,
        name: &str,
        pool: vk::CommandPool,
    ) -> Result<&Recording, DeviceError> {
        let timed = match self.timed.take() {
            Some(timed) => timed,
            None => {
                let create = vk::QueryPoolCreateInfo::default()
                    .query_type(vk::QueryType::TIMESTAMP)
                    .query_count(2 * self.dispatches.len().max(1) as u32);
                // SAFETY: `create` lives through the call.
                let queries = unsafe { context.device.create_query_pool(&create, None) }
                    .map_err(|result| context.error("vkCreateQueryPool", result))?;
                let recording = self.record(context, name, pool, Some(queries)).inspect_err(|_| {
                    // SAFETY: what was recorded with it is never submitted.
                    unsafe { context.device.destroy_query_pool(queries, None) };
                })?;
                (recording, queries)
            }
        };
        Ok(&self.timed.insert(timed).0)
    }

    /// Time of each operation in the last timed run. That of a dispatch of several is shared among them by their work.
    pub(crate) fn times(
        &self,
        context: &Context,
        ops: &[OpDesc],
        step: &Step,
        period: f32,
    ) -> Result<Vec<Duration>, DeviceError> {
        let mut nanoseconds = vec![0.0; ops.len()];
        let mut stamps = vec![0u64; 2 * self.dispatches.len()];
        if let Some((_, queries)) = self.timed.as_ref().filter(|_| !stamps.is_empty()) {
            let flags = vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT;
            // SAFETY: the pool has that many queries, which the submissions just done have written.
            unsafe { context.device.get_query_pool_results(*queries, 0, &mut stamps, flags) }
                .map_err(|result| context.error("vkGetQueryPoolResults", result))?;
        }
        for (dispatch, stamps) in self.dispatches.iter().zip(stamps.as_chunks::<2>().0) {
            let whole = stamps[1].saturating_sub(stamps[0]) as f64 * f64::from(period);
            let weight = |op: &usize| ops[*op].work(step).macs as f64 + 1.0;
            let all: f64 = dispatch.ops.iter().map(weight).sum();
            for op in &dispatch.ops {
                nanoseconds[*op] += whole * weight(op) / all;
            }
        }
        Ok(nanoseconds.into_iter().map(|n| Duration::from_nanos(n as u64)).collect())
    }

    /// # Safety
    /// Nothing that was submitted runs any more.
    pub(crate) unsafe fn destroy(&self, context: &Context) {
        if let Some((_, queries)) = &self.timed {
            // SAFETY: as the caller says.
            unsafe { context.device.destroy_query_pool(*queries, None) };
        }
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
fn dispatch(task: &Task, row_threads: u32, step: u64, table: u64) -> Whole {
    match task {
        Task::Rows { ops, extent } => {
            let (kind, fixed_count) = lower::extent_words(*extent);
            let count = lower::count_of(*extent, 1, 1);
            let push = RowsPush { step, table, extent: kind, fixed_count };
            let kinds = ops.iter().map(|op| op.kind);
            let shader = Shader {
                constants: [row_threads, ops.len() as u32].into_iter().chain(kinds).collect(),
                ..Shader::simple("rows", row_threads)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(push: &[u8]) -> Vec<u32> {
        push.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
    }

    #[test]
    fn pieces_are_the_whole_and_none_is_too_large() {
        let shader = || Shader::simple("p", 8);
        let fixed = Count::Fixed(3);
        for groups in [0, 1, 2, 7, 100, 65_535, 65_536, 200_000] {
            for (seconds, largest) in
                [(0.0, 65_535), (0.05, 65_535), (0.35, 65_535), (1e9, 65_535), (0.35, 4)]
            {
                let whole = Whole {
                    shader: shader(),
                    push: vec![0; 8],
                    sizes: [Count::Fixed(groups), fixed, fixed],
                    cut: Cut::Groups { first: 4 },
                };
                let pieces = whole.pieces(seconds, largest);
                let mut next = 0;
                for (push, [x, y, z]) in &pieces {
                    let (Count::Fixed(own), [0, first]) = (x, &numbers(push)[..]) else {
                        panic!("{x:?} {push:?}")
                    };
                    assert!((*first, *y, *z) == (next, fixed, fixed) && (1..=largest).contains(own));
                    next += own;
                }
                assert_eq!(next, groups);
                let wanted = (seconds / SUBMISSION).ceil().min(f64::from(groups)) as usize;
                assert!(pieces.len() >= wanted, "{groups} groups of {seconds} s in {} pieces", pieces.len());
            }
        }
        for (rows, seconds, expected) in [(512, 0.05, 1), (512, 0.35, 4), (5, 1e9, 5), (1, 1e9, 1)] {
            let whole = Whole {
                shader: shader(),
                push: vec![255; 12],
                sizes: [fixed, Count::Rows(1, 1, 0), fixed],
                cut: Cut::Rows { first: 4, count: 8, rows },
            };
            let pieces = whole.pieces(seconds, 65_535);
            assert_eq!(pieces.len(), expected);
            let mut next = 0;
            for (push, [x, y, z]) in &pieces {
                assert_eq!((*x, *z), (fixed, fixed));
                if expected == 1 {
                    assert_eq!((push, *y), (&vec![255; 12], Count::Rows(1, 1, 0)));
                    continue;
                }
                let [u32::MAX, first, count] = numbers(push)[..] else { panic!("{push:?}") };
                assert_eq!((first, *y), (next, Count::Fixed(count)));
                next += count;
            }
            assert!(expected == 1 || next == rows);
        }
    }
}
