//! A compiled program: kernels in order, and the buffers they point into.

use crate::{
    buffer::{CpuBuffer, Memory},
    builder::{Builder, Phase},
    isa::Level,
    kernels::Scratch,
    memory, ops,
    pool::{Job, Member, Order, Poisoned, Team},
    tensor::Tensor,
};
use backend_api::{
    BufferRef, Capacity, DeviceError, Observer, OpDesc, OpEvent, Operand, Program, ProgramDesc, ProgramOp,
    Step, Work,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// What [`CpuDevice::compile`](crate::CpuDevice) makes.
pub(crate) struct CpuProgram {
    device: String,
    name: String,
    capacity: Capacity,
    team: Arc<Team>,
    kernels: Arc<Kernels>,
}

/// What the members of a team work on together.
struct Kernels {
    phases: Vec<Phase>,
    ops: Vec<OpRecord>,
    /// Nanoseconds from the start of a timed run to the end of the last phase, whoever ended it.
    last_end: AtomicU64,
    /// Kernels point into these.
    _memory: Vec<Memory>,
    _buffers: Vec<BufferRef>,
}

/// What the observer hears of an operation.
struct OpRecord {
    name: String,
    desc: OpDesc,
    nanoseconds: AtomicU64,
}

impl CpuProgram {
    /// Buffers must be of this device. Whatever else kernels trust with memory is checked here, once: what a caller
    /// of safe functions owes must not decide about it.
    pub(crate) fn new(
        device: &str,
        level: Level,
        team: Arc<Team>,
        program: ProgramDesc,
    ) -> Result<Self, DeviceError> {
        let fault = |reason: String| DeviceError::Driver {
            device: device.to_owned(),
            reason: format!("program {}: {reason}", program.name),
        };
        let mut builder = Builder::new(device, level, team.threads(), program.capacity);
        let mut records = Vec::with_capacity(program.ops.len());
        for op in &program.ops {
            let fault = |reason: String| fault(format!("{}: {reason}", op.name));
            let tensor = |&value: &usize| place(&program, value).map_err(fault);
            let inputs = op.inputs.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
            let outputs = op.outputs.iter().map(tensor).collect::<Result<Vec<_>, _>>()?;
            let desc = program.describe(op);
            ops::supports(device, &desc)?;
            check(&program, op, &inputs, &outputs).map_err(fault)?;
            ops::build(&op.op, &inputs, &outputs, &mut builder);
            builder.end_op(&inputs, &outputs)?;
            records.push(OpRecord { name: op.name.clone(), desc, nanoseconds: AtomicU64::new(0) });
        }
        let (phases, memory) = builder.finish();
        let scratch = phases.iter().map(|phase| phase.kernel.scratch_bytes()).max().unwrap_or(0);
        team.reserve(scratch).map_err(|_| DeviceError::OutOfMemory {
            device: device.to_owned(),
            what: format!("scratch of {} threads", team.threads()),
            requested: (scratch as u64).saturating_mul(team.threads() as u64),
            available: memory::available(),
        })?;
        Ok(CpuProgram {
            device: device.to_owned(),
            capacity: program.capacity,
            team,
            kernels: Arc::new(Kernels {
                phases,
                ops: records,
                last_end: AtomicU64::new(0),
                _memory: memory,
                _buffers: program.buffers,
            }),
            name: program.name,
        })
    }

    fn fault(&self, reason: String) -> DeviceError {
        DeviceError::Driver {
            device: self.device.clone(),
            reason: format!("program {}: {reason}", self.name),
        }
    }
}

impl Job for Kernels {
    /// In a timed run, operations are kept apart.
    fn work(&self, member: &mut Member<'_>, order: &Order) -> Result<(), Poisoned> {
        let Order { step, timed_since } = order;
        let mut phases = self.phases.as_slice();
        while let Some(first) = phases.first() {
            // Kernels that may run at the same time do.
            let mut count = 1;
            let mut tasks = first.kernel.tasks(step);
            while let Some(phase) = phases.get(count).filter(|phase| phase.beside && timed_since.is_none()) {
                count += 1;
                tasks += phase.kernel.tasks(step);
            }
            // Kernels of one task that follow each other are one task: nothing to wait for between.
            let alike = |phase: &&Phase| {
                phase.kernel.tasks(step) <= 1 && (timed_since.is_none() || phase.op == first.op)
            };
            if tasks <= 1 {
                count = phases.iter().take_while(alike).count();
            }
            let (now, later) = phases.split_at(count);
            let finish = || {
                if let Some(start) = timed_since {
                    let now = start.elapsed().as_nanos() as u64;
                    let lap = now.saturating_sub(self.last_end.swap(now, Ordering::Relaxed));
                    self.ops[first.op].nanoseconds.fetch_add(lap, Ordering::Relaxed);
                }
            };
            if tasks > 1 {
                let run = |mut task, scratch: &mut Scratch| {
                    for phase in now {
                        let tasks = phase.kernel.tasks(step);
                        if task < tasks {
                            // SAFETY: `run` holds the team's turn, so that no kernel of the device runs but those of
                            // this phase, which do not touch what each other writes, and has checked the step;
                            // `phase` gives each task to one thread and ends when all are done.
                            unsafe { phase.kernel.run(step, task, scratch) }
                            return;
                        }
                        task -= tasks;
                    }
                };
                member.phase(tasks, run, finish)?;
            } else {
                let run = |_, scratch: &mut Scratch| {
                    for phase in now.iter().filter(|phase| phase.kernel.tasks(step) == 1) {
                        // SAFETY: as above; the kernels of this task run one after the other.
                        unsafe { phase.kernel.run(step, 0, scratch) }
                    }
                };
                member.phase(1, run, finish)?;
            }
            phases = later;
        }
        Ok(())
    }
}

impl Program for CpuProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        if !self.capacity.holds(step) {
            return Err(self.fault(format!("{step:?} is beyond its {:?}", self.capacity)));
        }
        let kernels = &self.kernels;
        let turn = self.team.turn();
        let timed_since = observer.wants_ops().then(|| {
            kernels.last_end.store(0, Ordering::Relaxed);
            kernels.ops.iter().for_each(|op| op.nanoseconds.store(0, Ordering::Relaxed));
            Instant::now()
        });
        turn.run(kernels, Order { step: *step, timed_since })
            .map_err(|panic| self.fault(format!("a kernel failed: {panic}")))?;
        drop(turn);
        if timed_since.is_some() {
            for op in &kernels.ops {
                let Work { bytes, macs } = op.desc.work(step);
                let time = Duration::from_nanos(op.nanoseconds.load(Ordering::Relaxed));
                let kind = op.desc.op.kind().to_string();
                observer.op(OpEvent { name: &op.name, op: &kind, bytes, macs, time: Some(time) });
            }
        }
        Ok(())
    }
}

/// The address of a value, which must lie inside its buffer in every step.
fn place(program: &ProgramDesc, value: usize) -> Result<Tensor, String> {
    let value = program.values.get(value).ok_or_else(|| format!("there is no value {value}"))?;
    let buffer = program.buffers.get(value.place.buffer).and_then(|buffer| {
        let any: &dyn std::any::Any = buffer.as_any();
        any.downcast_ref::<CpuBuffer>().map(|cpu| (cpu, buffer.size()))
    });
    let (buffer, size) = buffer.ok_or_else(|| format!("there is no buffer {}", value.place.buffer))?;
    let (offset, span) = (value.place.offset, value.desc.span_bytes(&program.capacity.full_step()));
    if offset.checked_add(span).is_none_or(|end| end > size) {
        return Err(format!("{:?} at byte {offset} is beyond a buffer of {size} bytes", value.desc));
    }
    Ok(Tensor::new(buffer.pointer().wrapping_add(offset), value.desc))
}

/// What kernels rely on.
fn check(program: &ProgramDesc, op: &ProgramOp, inputs: &[Tensor], outputs: &[Tensor]) -> Result<(), String> {
    let operand = |(&value, tensor): (&usize, &Tensor)| {
        let buffer = &program.buffers[program.values[value].place.buffer];
        let own = buffer.as_any().downcast_ref::<CpuBuffer>();
        Operand {
            desc: *tensor.desc(),
            address: tensor.base::<u8>() as u64,
            writable: own.is_some_and(CpuBuffer::is_writable),
        }
    };
    let operands = |values: &[usize], tensors: &[Tensor]| -> Vec<Operand> {
        values.iter().zip(tensors).map(operand).collect()
    };
    let (inputs, outputs) = (operands(&op.inputs, inputs), operands(&op.outputs, outputs));
    if let Some((_, &value)) =
        outputs.iter().zip(&op.outputs).find(|(output, _)| !output.address.is_multiple_of(4))
    {
        let at = program.values[value].place.offset;
        return Err(format!("an output starts at byte {at}, no multiple of 4"));
    }
    program.check_operands(&op.op, &inputs, &outputs)
}
