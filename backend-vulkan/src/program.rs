//! A compiled program: recorded for steps of each size, handed to the queue for every step.

use crate::{
    carry::Down,
    context::{Context, lock},
    form::{Form, Source},
    lower::{self, RopeTable, Scratch},
    memory::{Bytes, Memory, VulkanBuffer},
    staging::Staging,
    tuning::Tuning,
};
use ash::vk;
use backend_api::{
    Capacity, DeviceError, Extent, Observer, Op, OpEvent, Program, ProgramDesc, ProgramResult, ProgramValue,
    Step, Work,
};
use gpu_allocator::MemoryLocation;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// What [`VulkanDevice::compile`](crate::VulkanDevice) makes.
pub(crate) struct VulkanProgram {
    source: Source,
    /// Those for steps of a token, and those of other steps met so far.
    forms: Vec<Form>,
    /// The step's numbers, and tables of positions.
    step: Memory,
    scratch: Scratch,
    /// Where that is, if there is any.
    _shared: Option<Arc<Memory>>,
    /// The submission that last used any of this.
    last: u64,
    /// What is read after it has run.
    down: Arc<Mutex<Down>>,
    staging: Arc<Mutex<Staging>>,
    pool: vk::CommandPool,
    context: Arc<Context>,
}

/// Bytes of the step's numbers.
const HEADER: u64 = 64;

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
        let named = |what: &str| format!("{what} of program {}", program.name);
        let step = Memory::new(context, &named("numbers"), end as usize, MemoryLocation::CpuToGpu)?;
        if step.mapped().is_none() {
            return Err(fault("the numbers of a step lie where the CPU does not see them".to_owned()));
        }
        let mut tuning = Tuning::new(context.class, context.arithmetic, &context.capabilities);
        if let Some(rate) = context.megamacs_per_second {
            tuning.macs_per_second = 1e6 * f64::from(rate);
        }
        let source = Source {
            sizes: tuning.sizes(&program.capacity, has_outputs(&program)),
            ops: program.ops.iter().map(|op| program.describe(op)).collect(),
            tuning,
            step: step.address(),
            ropes,
            desc: program,
        };
        let [partials, lists] = source.scratch(context)?;
        let shared = match partials + lists {
            0 => None,
            bytes => Some(context.scratch(bytes as usize)?),
        };
        let address = shared.as_ref().map_or(0, |memory| memory.address());
        let results = results(context, &source.desc).map_err(|problem| source.fault(context, &problem))?;
        if !results.is_empty() {
            lock(staging).expects_reads();
        }
        let down = |commands| Down::new(results, commands);
        let pool = context.command_pool()?;
        // SAFETY: the pool is new.
        let commands = unsafe { context.command_buffer(pool) }.inspect_err(|_| {
            // SAFETY: nothing uses it.
            unsafe { context.device.destroy_command_pool(pool, None) };
        })?;
        let mut compiled = VulkanProgram {
            source,
            forms: Vec::new(),
            step,
            scratch: Scratch { address, partials },
            _shared: shared,
            last: 0,
            down: Arc::new(Mutex::new(down(commands))),
            staging: Arc::clone(staging),
            pool,
            context: Arc::clone(context),
        };
        compiled.take_forms()?;
        Ok(compiled)
    }

    /// Takes all forms of a token's program, and the first for each number of rows and outputs of any other. Deeper ones of
    /// these use the same pipelines; they come as a prompt gets there.
    fn take_forms(&mut self) -> Result<(), DeviceError> {
        let mut before = None;
        for capacity in self.source.sizes.clone() {
            let kind = Some((capacity.rows, capacity.outputs));
            if capacity.rows == 1 || kind != before {
                self.take_form(capacity)?;
            }
            before = kind;
        }
        Ok(())
    }

    /// The form for steps of a capacity, as an index.
    fn take_form(&mut self, capacity: Capacity) -> Result<usize, DeviceError> {
        if let Some(known) = self.forms.iter().position(|form| form.capacity == capacity) {
            return Ok(known);
        }
        self.forms.push(Form::new(&self.context, &self.source, capacity, self.scratch, self.pool)?);
        Ok(self.forms.len() - 1)
    }

    /// Writes what varies from step to step.
    fn write_step(&self, step: &Step) {
        let write = |offset: u64, bytes: &[u8]| {
            if let Some(pointer) = self.step.mapped() {
                // SAFETY: the offsets below lie in the memory, which was made for them; what was last submitted with it
                // is done.
                unsafe { pointer.add(offset as usize).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
            }
        };
        let numbers = [step.rows, step.past, step.outputs, step.kv_len()].map(|n| n as u32);
        write(0, bytemuck::bytes_of(&numbers));
        for table in &self.source.ropes {
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
}

impl Program for VulkanProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        let (name, capacity) = (&self.source.desc.name, self.source.desc.capacity);
        if !capacity.holds(step) {
            let reason = format!("program {name}: {step:?} is beyond its {capacity:?}");
            return Err(self.context.fault(reason));
        }
        self.context.check()?;
        // Nothing where the last step was waited for, as always but after an error.
        self.context.wait(self.last)?;
        let form = self.take_form(self.source.size_of(step))?;
        self.write_step(step);
        let capabilities = &self.context.capabilities;
        let period = capabilities.timestamp_period.filter(|_| observer.wants_ops());
        let form = &mut self.forms[form];
        form.write_sizes(step, capabilities.largest_count);
        let recording = match period {
            Some(_) => form.timed(&self.context, &self.source.desc.name, self.pool)?,
            None => form.plain(),
        };
        let submissions = recording.len();
        self.last = lock(&self.staging).submit(recording, &self.down, step)?;
        observer.submitted(submissions, form.dispatches());
        self.context.wait(self.last)?;
        if observer.wants_ops() {
            let times = period.map(|period| form.times(&self.context, &self.source.ops, step, period));
            self.tell(step, times.transpose()?.as_deref(), observer);
        }
        Ok(())
    }
}

impl VulkanProgram {
    /// Tells of each operation, with its time where the device measures it.
    fn tell(&self, step: &Step, times: Option<&[Duration]>, observer: &mut dyn Observer) {
        let names = self.source.desc.ops.iter().map(|op| &op.name);
        for (index, (name, desc)) in names.zip(&self.source.ops).enumerate() {
            let Work { bytes, macs } = desc.work(step);
            let kind = desc.op.kind().to_string();
            observer.op(OpEvent { name, op: &kind, bytes, macs, time: times.map(|times| times[index]) });
        }
    }
}

/// Whether a value has a row for each output.
fn has_outputs(program: &ProgramDesc) -> bool {
    let extents = |value: &ProgramValue| value.desc.shape.extents().contains(&Extent::Outputs);
    program.values.iter().any(extents)
}

/// The results in memory that the CPU does not read, or what is wrong with one.
fn results(context: &Context, program: &ProgramDesc) -> Result<Vec<(vk::Buffer, ProgramResult)>, String> {
    let mut hidden = Vec::new();
    for result in &program.results {
        let buffer = program.buffers.get(result.place.buffer);
        let own = buffer.and_then(|buffer| buffer.as_any().downcast_ref::<VulkanBuffer>());
        let own =
            own.ok_or_else(|| format!("a result in buffer {}, which is not there", result.place.buffer))?;
        own.holds(result.place.offset, result.bytes(&program.capacity.full_step()))
            .map_err(|problem| format!("a result: {problem}"))?;
        if let Bytes::Owned(memory) = &own.bytes
            && (context.always_stage || memory.readable().is_none())
        {
            hidden.push((memory.buffer(), *result));
        }
    }
    Ok(hidden)
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
            self.forms.iter().for_each(|form| form.destroy(&self.context));
        }
    }
}
