//! Devices whose choice of experts can be seen: each routing is done twice, once to be read.

use crate::common::passes_on;
use backend_api::{
    BufferRef, BufferRequest, BufferUsage, Device, DeviceError, Observer, Op, Place, Program, ProgramDesc,
    ProgramValue, Step, TensorDesc,
};
use graph::Devices;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

/// The experts chosen so far: of each routing node, those of each row, rising.
type Chosen = BTreeMap<String, Vec<Vec<i32>>>;

/// What watched devices chose.
#[derive(Clone, Default)]
pub struct Routes(Arc<Mutex<Chosen>>);

impl Routes {
    /// The same devices, watched.
    pub fn watch(&self, devices: &Devices) -> Devices {
        let watched = |device: &Arc<dyn Device>| -> Arc<dyn Device> {
            Arc::new(Watched { device: Arc::clone(device), routes: self.clone() })
        };
        Devices::new(devices.iter().map(watched).collect())
    }

    /// Rows that some node has chosen for.
    pub fn rows(&self) -> usize {
        self.0.lock().unwrap().values().map(Vec::len).max().unwrap_or(0)
    }

    /// Rows for which some node chose other experts, as far as both have them.
    pub fn differing(&self, other: &Routes) -> Vec<usize> {
        let here = self.0.lock().unwrap().clone();
        // One after the other: they may be the same.
        let there = other.0.lock().unwrap().clone();
        let differs = |row: &usize| {
            here.iter().any(|(node, rows)| match (rows.get(*row), there[node].get(*row)) {
                (Some(here), Some(there)) => here != there,
                _ => false,
            })
        };
        (0..self.rows()).filter(differs).collect()
    }
}

struct Watched {
    device: Arc<dyn Device>,
    routes: Routes,
}

impl Device for Watched {
    passes_on!(device: info supports allocate import write read);
    fn compile(&self, mut program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        const ALIGNMENT: usize = 256;
        let full = program.capacity.full_step();
        let (mut seen, mut size) = (Vec::new(), 0);
        for op in std::mem::take(&mut program.ops) {
            let mut again = op.clone();
            let routes = matches!(op.op, Op::Route(_));
            program.ops.push(op);
            if !routes {
                continue;
            }
            for output in &mut again.outputs {
                let TensorDesc { dtype, shape, .. } = program.values[*output].desc;
                let desc = TensorDesc::new(dtype, shape);
                let place = Place { buffer: program.buffers.len(), offset: size };
                size += desc.dense_bytes(&full).next_multiple_of(ALIGNMENT);
                *output = program.values.len();
                program.values.push(ProgramValue { desc, place });
            }
            // The ids come first.
            let ids = &program.values[again.outputs[0]];
            seen.push((again.name.clone(), ids.desc, ids.place.offset));
            program.ops.push(again);
        }
        if seen.is_empty() {
            return self.device.compile(program);
        }
        let usage = BufferUsage::Scratch;
        let buffer = self.device.allocate(&BufferRequest { name: "choices".to_owned(), size, usage })?;
        program.buffers.push(Arc::clone(&buffer));
        let (device, routes) = (Arc::clone(&self.device), self.routes.clone());
        let program = self.device.compile(program)?;
        Ok(Box::new(WatchedProgram { program, device, routes, buffer, seen }))
    }
}

struct WatchedProgram {
    program: Box<dyn Program>,
    device: Arc<dyn Device>,
    routes: Routes,
    buffer: BufferRef,
    /// Node, ids and where they lie in the buffer.
    seen: Vec<(String, TensorDesc, usize)>,
}

impl Program for WatchedProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        self.program.run(step, observer)?;
        let mut chosen = self.routes.0.lock().unwrap();
        for (node, desc, offset) in &self.seen {
            let mut bytes = vec![0; desc.dense_bytes(step)];
            self.device.read(&self.buffer, *offset, &mut bytes)?;
            let rows = chosen.entry(node.clone()).or_default();
            for row in bytes.chunks_exact(desc.row_bytes()) {
                let ids = row.chunks_exact(4).map(|id| i32::from_ne_bytes(id.try_into().unwrap()));
                let mut ids: Vec<i32> = ids.collect();
                ids.sort_unstable();
                rows.push(ids);
            }
        }
        Ok(())
    }
}
