//! Running a plan: the splits in order, each after the bytes it needs have crossed.

use crate::{
    devices::{DeviceIndex, Devices},
    graph::{StorageIndex, StorageKind, ValueInfo},
    link::{self, Linker},
    observer::StepObserver,
    plan::Plan,
    span::Span,
    transfer::Transfer,
    weights::{Placed, States, Weights},
};
use backend_api::{BufferRef, DType, DeviceError, Extent, Op, Program, Step};
use std::{fmt, sync::Arc, time::Instant};
use thiserror::Error;

/// Why a plan cannot be run, or a step did not.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// The devices are not those of the plan.
    #[error("the plan is for the devices {expected:?}, found {found:?}")]
    Devices {
        /// Names in the plan.
        expected: Vec<String>,
        /// Names given.
        found: Vec<String>,
    },
    /// A weight or state is not on the device where the plan reads it: it was loaded for another plan.
    #[error("{kind} {name} is not on {device}, where the plan reads it")]
    NotLoaded {
        /// Weight or state.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The device's name.
        device: String,
    },
    /// The step is beyond the plan's capacity.
    #[error("step: {0}")]
    Step(String),
    /// An input is missing or not what the graph declares.
    #[error("input {name}: {problem}")]
    Input {
        /// The input's name.
        name: String,
        /// What was expected and found.
        problem: String,
    },
    /// An output is read that the graph or the last step does not have.
    #[error("output {name}: {problem}")]
    Output {
        /// The name given.
        name: String,
        /// What was expected and found.
        problem: String,
    },
    /// A device refused or failed.
    #[error("{what}: {error}")]
    Device {
        /// What was being done.
        what: String,
        /// What the device says.
        error: DeviceError,
    },
}

/// A plan that is compiled on its devices. Running a step plans and allocates nothing; what a device may still compile is
/// what the largest steps want otherwise than others.
pub struct Executor {
    plan: Arc<Plan>,
    devices: Devices,
    /// One per device that has something to keep within a step.
    arenas: Vec<Option<BufferRef>>,
    /// One per split.
    programs: Vec<Box<dyn Program>>,
    /// One per transfer.
    routes: Vec<Route>,
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    /// Bytes on their way through the host.
    staging: Vec<u8>,
    last: Option<Step>,
}

/// Where a transfer's bytes come from (the caller, if nothing else) and go to.
struct Route {
    from: Option<Placed>,
    to: Placed,
}

struct Input {
    storage: StorageIndex,
    span: Span,
    /// Where the host keeps it, if its own nodes read it.
    place: Option<Placed>,
    /// Each element must be below all of these: it picks rows of a table or of an activation.
    bounds: Vec<Extent>,
}

struct Output {
    device: DeviceIndex,
    place: Placed,
    dtype: DType,
    span: Span,
}

/// The largest piece in which bytes pass through the host.
const STAGING: usize = 8 << 20;

impl Executor {
    /// Allocates one arena per device and compiles one program per split.
    ///
    /// # Errors
    /// [`RunError::Devices`], [`RunError::NotLoaded`], [`RunError::Device`].
    pub fn new(
        plan: Arc<Plan>,
        devices: &Devices,
        weights: &Weights,
        states: &States,
    ) -> Result<Executor, RunError> {
        if plan.devices != devices.names() {
            return Err(RunError::Devices { expected: plan.devices.clone(), found: devices.names() });
        }
        let arenas = link::arenas(&plan, devices)?;
        let linker = Linker::new(&plan, weights, states, &arenas);
        let mut programs = Vec::with_capacity(plan.splits.len());
        for (index, split) in plan.splits.iter().enumerate() {
            let desc = linker.program(index, split)?;
            let what = desc.name.clone();
            let program = devices[split.device].compile(desc);
            programs.push(program.map_err(|error| RunError::Device { what, error })?);
        }
        let mut routes = Vec::with_capacity(plan.transfers.len());
        for transfer in 0..plan.transfers.len() {
            routes.push(Route { from: linker.source(transfer)?, to: linker.target(transfer)? });
        }
        let inputs = inputs(&plan, &linker);
        let outputs = outputs(&plan, &linker)?;
        let largest = plan.transfers.iter().map(|transfer| transfer.bytes as usize).max().unwrap_or(0);
        let staging = vec![0; largest.min(STAGING)];
        let devices = devices.clone();
        Ok(Executor { plan, devices, arenas, programs, routes, inputs, outputs, staging, last: None })
    }

    /// The plan being run.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Bytes of the arenas, by device.
    pub fn scratch(&self) -> impl Iterator<Item = usize> {
        self.arenas.iter().map(|arena| arena.as_ref().map_or(0, |buffer| buffer.size()))
    }

    /// Runs one step. `inputs` are the bytes of every input by name: dense, of the step's extents, ids as I32 in
    /// the machine's byte order. After a device's error the states may hold rows of the failed step.
    ///
    /// # Errors
    /// [`RunError::Step`], [`RunError::Input`], before anything runs; [`RunError::Device`].
    pub fn run(
        &mut self,
        step: &Step,
        inputs: &[(&str, &[u8])],
        observer: &mut dyn StepObserver,
    ) -> Result<(), RunError> {
        check_step(&self.plan, step)?;
        for input in &self.inputs {
            input.check(&self.plan, step, inputs)?;
        }
        self.last = None;
        self.write_inputs(inputs)?;
        for index in 0..self.programs.len() {
            for transfer in self.plan.splits[index].transfers.clone() {
                let start = Instant::now();
                let bytes = self.copy(transfer, step, inputs)?;
                let transfer = &self.plan.transfers[transfer];
                observer.transfer(&self.plan, transfer, bytes as u64, start.elapsed());
            }
            let start = Instant::now();
            if let Err(error) = self.programs[index].run(step, observer) {
                let device = &self.plan.devices[self.plan.splits[index].device];
                return Err(RunError::Device { what: format!("split {index} on {device}"), error });
            }
            observer.split(&self.plan, &self.plan.splits[index], start.elapsed());
        }
        self.last = Some(*step);
        Ok(())
    }

    /// What the host's own nodes read is kept in its arena.
    fn write_inputs(&self, inputs: &[(&str, &[u8])]) -> Result<(), RunError> {
        let host = &self.devices[self.devices.host()];
        for input in &self.inputs {
            let name = self.plan.graph().storages()[input.storage].name.as_str();
            if let Some(place) = &input.place
                && let Some(bytes) = bytes_of(name, inputs)
            {
                let written = host.write(&place.buffer, place.offset, bytes);
                written.map_err(|error| RunError::Device { what: format!("input {name}"), error })?;
            }
        }
        Ok(())
    }

    /// Copies a transfer's bytes; returns how many.
    fn copy(&mut self, index: usize, step: &Step, inputs: &[(&str, &[u8])]) -> Result<usize, RunError> {
        let transfer = &self.plan.transfers[index];
        let Route { from, to } = &self.routes[index];
        let bytes = transfer.span.bytes(step);
        let (source, target) = (&self.devices[transfer.from], &self.devices[transfer.to]);
        let fail = |error| RunError::Device { what: crossing(&self.plan, transfer), error };
        let Some(from) = from else {
            let name = self.plan.graph().storages()[transfer.storage].name.as_str();
            let all = bytes_of(name, inputs).unwrap_or_default();
            let part = all.get(transfer.span.offset..transfer.span.offset + bytes).unwrap_or_default();
            target.write(&to.buffer, to.offset, part).map_err(fail)?;
            return Ok(bytes);
        };
        let mut done = 0;
        while done < bytes {
            let piece = (bytes - done).min(self.staging.len());
            let staging = &mut self.staging[..piece];
            source.read(&from.buffer, from.offset + done, staging).map_err(fail)?;
            target.write(&to.buffer, to.offset + done, staging).map_err(fail)?;
            done += piece;
        }
        Ok(bytes)
    }

    /// Copies an F32 output of the last step, whole.
    ///
    /// # Errors
    /// [`RunError::Output`]: no such output, no step has run, another format, or `into` has another length;
    /// [`RunError::Device`].
    pub fn read(&self, output: &str, into: &mut [f32]) -> Result<(), RunError> {
        let found = self.output(output)?;
        if found.dtype != DType::F32 {
            let problem = format!("expected F32, found {}", found.dtype);
            return Err(RunError::Output { name: output.to_owned(), problem });
        }
        self.read_bytes(output, bytemuck::cast_slice_mut(into))
    }

    /// Copies the bytes of an output of the last step, whole.
    ///
    /// # Errors
    /// As [`Executor::read`].
    pub fn read_bytes(&self, output: &str, into: &mut [u8]) -> Result<(), RunError> {
        let found = self.output(output)?;
        let wrong = |problem| RunError::Output { name: output.to_owned(), problem };
        let step = self.last.ok_or_else(|| wrong("no step has run".to_owned()))?;
        let bytes = found.span.bytes(&step);
        if into.len() != bytes {
            return Err(wrong(format!("expected room for {bytes} bytes, found {}", into.len())));
        }
        let read = self.devices[found.device].read(&found.place.buffer, found.place.offset, into);
        read.map_err(|error| RunError::Device { what: format!("output {output}"), error })
    }

    fn output(&self, name: &str) -> Result<&Output, RunError> {
        let index = self.plan.graph().outputs().iter().position(|(other, _)| other == name);
        let unknown = || RunError::Output { name: name.to_owned(), problem: "the graph has none".to_owned() };
        index.map(|index| &self.outputs[index]).ok_or_else(unknown)
    }
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor")
            .field("devices", &self.devices)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

fn crossing(plan: &Plan, transfer: &Transfer) -> String {
    let name = &plan.graph().storages()[transfer.storage].name;
    format!("{name} from {} to {}", plan.devices[transfer.from], plan.devices[transfer.to])
}

fn check_step(plan: &Plan, step: &Step) -> Result<(), RunError> {
    let capacity = plan.capacity;
    let check = |what, found: usize, limit: usize| match found <= limit {
        true => Ok(()),
        false => Err(RunError::Step(format!("{what}: expected at most {limit}, found {found}"))),
    };
    if step.rows == 0 {
        return Err(RunError::Step("rows: expected 1 or more, found 0".to_owned()));
    }
    check("rows", step.rows, capacity.rows)?;
    check("outputs", step.outputs, capacity.outputs)?;
    check("cached rows", step.kv_len(), capacity.kv_len)
}

fn bytes_of<'a>(name: &str, inputs: &[(&str, &'a [u8])]) -> Option<&'a [u8]> {
    inputs.iter().find(|(other, _)| *other == name).map(|(_, bytes)| *bytes)
}

fn inputs(plan: &Plan, linker: &Linker<'_>) -> Vec<Input> {
    let graph = plan.graph();
    let mut all = Vec::new();
    for (storage, declared) in graph.storages_of(StorageKind::Input) {
        let whole = ValueInfo { storage, offset: 0, desc: declared.desc, producer: None };
        let place = linker.home(storage).map(|(_, place)| place);
        let mut bounds = Vec::new();
        for node in graph.nodes() {
            if let Op::EmbedRows | Op::SelectRows = node.op
                && graph.info(node.inputs[1]).storage == storage
            {
                bounds.push(graph.info(node.inputs[0]).desc.shape.extents()[0]);
            }
        }
        bounds.sort_unstable();
        bounds.dedup();
        all.push(Input { storage, span: Span::of(&whole, StorageKind::Input), place, bounds });
    }
    all
}

impl Input {
    fn check(&self, plan: &Plan, step: &Step, inputs: &[(&str, &[u8])]) -> Result<(), RunError> {
        let name = plan.graph().storages()[self.storage].name.as_str();
        let wrong = |problem| RunError::Input { name: name.to_owned(), problem };
        let bytes = bytes_of(name, inputs).ok_or_else(|| wrong("it is missing".to_owned()))?;
        let expected = self.span.bytes(step);
        if bytes.len() != expected {
            return Err(wrong(format!("expected {expected} bytes, found {}", bytes.len())));
        }
        let Some(bound) = self.bounds.iter().map(|bound| bound.at(step)).min() else { return Ok(()) };
        for (index, id) in bytes.chunks_exact(4).enumerate() {
            let id = i32::from_ne_bytes([id[0], id[1], id[2], id[3]]);
            if usize::try_from(id).is_ok_and(|id| id < bound) {
                continue;
            }
            return Err(wrong(format!("element {index}: expected 0 to {}, found {id}", bound as i64 - 1)));
        }
        Ok(())
    }
}

fn outputs(plan: &Plan, linker: &Linker<'_>) -> Result<Vec<Output>, RunError> {
    let graph = plan.graph();
    let find = |(name, value): &(String, _)| {
        let info = graph.info(*value);
        let missing = || RunError::Output { name: name.clone(), problem: "the plan has none".to_owned() };
        let (device, place) = linker.home(info.storage).ok_or_else(missing)?;
        Ok(Output { device, place, dtype: info.desc.dtype, span: Span::of(info, StorageKind::Activation) })
    };
    graph.outputs().iter().map(find).collect()
}
