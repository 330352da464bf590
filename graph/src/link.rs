//! From a plan to what devices understand: buffers, places, programs.

use crate::{
    devices::{DeviceIndex, Devices},
    executor::RunError,
    graph::{NodeIndex, StorageIndex, StorageKind, Value},
    memory::{Content, Slot},
    plan::Plan,
    span::{Count, Span},
    split::Split,
    weights::{Placed, States, Weights},
};
use backend_api::{
    BufferRef, BufferRequest, BufferUsage, Extent, Place, ProgramDesc, ProgramOp, ProgramResult,
    ProgramValue, ValueIndex,
};
use std::{collections::HashMap, sync::Arc};

/// Finds the bytes of everything in a plan.
pub(crate) struct Linker<'a> {
    plan: &'a Plan,
    weights: &'a Weights,
    states: &'a States,
    arenas: &'a [Option<BufferRef>],
    /// The slot of each storage where it is made.
    made: Vec<Option<&'a Slot>>,
    /// The slot of each transfer.
    brought: Vec<Option<&'a Slot>>,
    /// The transfers of each storage.
    transfers: Vec<Vec<usize>>,
}

/// Allocates what a step needs on each device.
///
/// # Errors
/// [`RunError::Device`].
pub(crate) fn arenas(plan: &Plan, devices: &Devices) -> Result<Vec<Option<BufferRef>>, RunError> {
    let allocate = |(device, &size): (DeviceIndex, &u64)| {
        if size == 0 {
            return Ok(None);
        }
        let name = format!("scratch of {}", plan.devices[device]);
        let request = BufferRequest { name: name.clone(), size: size as usize, usage: BufferUsage::Scratch };
        let buffer = devices[device].allocate(&request);
        buffer.map(Some).map_err(|error| RunError::Device { what: name, error })
    };
    plan.memory.arenas.iter().enumerate().map(allocate).collect()
}

impl<'a> Linker<'a> {
    pub(crate) fn new(
        plan: &'a Plan,
        weights: &'a Weights,
        states: &'a States,
        arenas: &'a [Option<BufferRef>],
    ) -> Self {
        let mut made = vec![None; plan.graph().storages().len()];
        let mut brought = vec![None; plan.transfers.len()];
        for slot in &plan.memory.slots {
            match slot.content {
                Content::Storage(storage) => made[storage] = Some(slot),
                Content::Transfer(transfer) => brought[transfer] = Some(slot),
            }
        }
        let mut transfers = vec![Vec::new(); made.len()];
        for (index, transfer) in plan.transfers.iter().enumerate() {
            transfers[transfer.storage].push(index);
        }
        Linker { plan, weights, states, arenas, made, brought, transfers }
    }

    /// The program of a split.
    pub(crate) fn program(&self, index: usize, split: &Split) -> Result<ProgramDesc, RunError> {
        let mut program = Assembly::new(self, split.device);
        for &node in &self.plan.order[split.nodes.clone()] {
            program.node(node)?;
        }
        let results = self.results(split, &program)?;
        Ok(ProgramDesc {
            name: format!("split {index} on {}", self.plan.devices[split.device]),
            capacity: self.plan.capacity,
            buffers: program.buffers,
            values: program.values,
            ops: program.ops,
            results,
        })
    }

    /// What others read of what a split's nodes make.
    fn results(&self, split: &Split, program: &Assembly<'_>) -> Result<Vec<ProgramResult>, RunError> {
        let graph = self.plan.graph();
        let nodes = &self.plan.order[split.nodes.clone()];
        let is_own = |producer: Option<NodeIndex>| producer.is_some_and(|node| nodes.contains(&node));
        let mut results = Vec::new();
        // What several read is brought once.
        let mut add = |result: Option<ProgramResult>| {
            results.extend(result.filter(|result| !results.contains(result)));
        };
        for (index, transfer) in self.plan.transfers.iter().enumerate() {
            if transfer.from == split.device && is_own(transfer.producer) {
                add(self.source(index)?.and_then(|source| program.result(source, &transfer.span)));
            }
        }
        for info in graph.outputs().iter().map(|(_, value)| graph.info(*value)) {
            if is_own(info.producer) {
                let span = Span::of(info, StorageKind::Activation);
                add(self.home(info.storage).and_then(|(_, place)| program.result(place, &span)));
            }
        }
        Ok(results)
    }

    /// Where a transfer's bytes come from, unless they are the caller's.
    pub(crate) fn source(&self, transfer: usize) -> Result<Option<Placed>, RunError> {
        let transfer = &self.plan.transfers[transfer];
        let mut place = match transfer.kind {
            StorageKind::Input => return Ok(None),
            StorageKind::State => self.state(transfer.storage, transfer.from)?,
            StorageKind::Weight => self.weight(transfer.storage, transfer.from)?,
            StorageKind::Activation => self.slot(self.made[transfer.storage])?,
        };
        place.offset += transfer.span.offset;
        Ok(Some(place))
    }

    /// Where a transfer's bytes go.
    pub(crate) fn target(&self, transfer: usize) -> Result<Placed, RunError> {
        self.slot(self.brought[transfer])
    }

    /// Where a storage is that is made on this device.
    pub(crate) fn home(&self, storage: StorageIndex) -> Option<(DeviceIndex, Placed)> {
        let slot = self.made[storage]?;
        Some((slot.device, self.slot(Some(slot)).ok()?))
    }

    /// Where `device` finds a value.
    fn find(&self, value: Value, device: DeviceIndex) -> Result<Placed, RunError> {
        let info = self.plan.graph().info(value);
        let storage = &self.plan.facts().storages[info.storage];
        let at = |mut place: Placed, skipped: usize| {
            place.offset += info.offset - skipped;
            place
        };
        let here = match storage.kind {
            StorageKind::Weight => Some(self.weight(info.storage, device)?),
            StorageKind::State if storage.home == Some(device) => Some(self.state(info.storage, device)?),
            StorageKind::State => None,
            StorageKind::Input | StorageKind::Activation => {
                let slot = self.made[info.storage].filter(|slot| slot.device == device);
                slot.map(|slot| self.slot(Some(slot))).transpose()?
            }
        };
        if let Some(place) = here {
            return Ok(at(place, 0));
        }
        let span = Span::of(info, storage.kind);
        let brought = self.transfers[info.storage].iter().copied().find(|&index| {
            let transfer = &self.plan.transfers[index];
            transfer.to == device && transfer.producer == info.producer && transfer.span.covers(&span)
        });
        match brought {
            Some(index) => Ok(at(self.target(index)?, self.plan.transfers[index].span.offset)),
            None => Err(self.missing("value", info.storage, device)),
        }
    }

    fn slot(&self, slot: Option<&Slot>) -> Result<Placed, RunError> {
        let placed = slot.and_then(|slot| {
            let buffer = self.arenas[slot.device].clone()?;
            Some(Placed { buffer, offset: slot.offset as usize })
        });
        placed.ok_or_else(|| RunError::Step("the plan has no memory for a value".to_owned()))
    }

    fn weight(&self, storage: StorageIndex, device: DeviceIndex) -> Result<Placed, RunError> {
        let name = &self.plan.graph().storages()[storage].name;
        let found = self.weights.find(name, device).cloned();
        found.ok_or_else(|| self.missing("weight", storage, device))
    }

    fn state(&self, storage: StorageIndex, device: DeviceIndex) -> Result<Placed, RunError> {
        let name = &self.plan.graph().storages()[storage].name;
        let found = self.states.find(name, device).cloned();
        let buffer = found.ok_or_else(|| self.missing("state", storage, device))?;
        Ok(Placed { buffer, offset: 0 })
    }

    fn missing(&self, kind: &'static str, storage: StorageIndex, device: DeviceIndex) -> RunError {
        let name = self.plan.graph().storages()[storage].name.clone();
        RunError::NotLoaded { kind, name, device: self.plan.devices[device].clone() }
    }
}

/// A program under construction.
struct Assembly<'a> {
    linker: &'a Linker<'a>,
    device: DeviceIndex,
    buffers: Vec<BufferRef>,
    values: Vec<ProgramValue>,
    ops: Vec<ProgramOp>,
    /// Indices of buffers by address, and of values by the graph's.
    known_buffers: HashMap<usize, usize>,
    known_values: HashMap<Value, ValueIndex>,
}

impl<'a> Assembly<'a> {
    fn new(linker: &'a Linker<'a>, device: DeviceIndex) -> Self {
        Assembly {
            linker,
            device,
            buffers: Vec::new(),
            values: Vec::new(),
            ops: Vec::new(),
            known_buffers: HashMap::new(),
            known_values: HashMap::new(),
        }
    }

    fn node(&mut self, node: NodeIndex) -> Result<(), RunError> {
        let linker = self.linker;
        let node = &linker.plan.graph().nodes()[node];
        let inputs = node.inputs.iter().map(|&v| self.value(v)).collect::<Result<_, _>>()?;
        let outputs = node.outputs.iter().map(|&v| self.value(v)).collect::<Result<_, _>>()?;
        self.ops.push(ProgramOp { name: node.name.clone(), op: node.op.clone(), inputs, outputs });
        Ok(())
    }

    /// Bytes at a place of a buffer that the program uses. Those of caches are not told: there are too many of them to come
    /// along, where they cross at all.
    fn result(&self, placed: Placed, span: &Span) -> Option<ProgramResult> {
        let buffer = *self.known_buffers.get(&address_of(&placed.buffer))?;
        let extent = match span.count {
            Count::One => Extent::Fixed(1),
            Count::Rows => Extent::Rows,
            Count::Outputs => Extent::Outputs,
            Count::Cached => return None,
        };
        let place = Place { buffer, offset: placed.offset };
        Some(ProgramResult { place, extent, row: span.row, pitch: span.pitch })
    }

    fn value(&mut self, value: Value) -> Result<ValueIndex, RunError> {
        if let Some(&index) = self.known_values.get(&value) {
            return Ok(index);
        }
        let Placed { buffer, offset } = self.linker.find(value, self.device)?;
        let buffers = &mut self.buffers;
        let buffer = *self.known_buffers.entry(address_of(&buffer)).or_insert_with(|| {
            buffers.push(buffer);
            buffers.len() - 1
        });
        let desc = self.linker.plan.graph().info(value).desc;
        self.values.push(ProgramValue { desc, place: Place { buffer, offset } });
        self.known_values.insert(value, self.values.len() - 1);
        Ok(self.values.len() - 1)
    }
}

/// What tells buffers apart.
fn address_of(buffer: &BufferRef) -> usize {
    Arc::as_ptr(buffer).cast::<()>() as usize
}
