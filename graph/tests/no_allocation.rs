//! Contract C2, by counting: a step takes nothing from the heap, in the executor's part of the work.
#![allow(unsafe_code, reason = "a global allocator that counts")]

#[allow(dead_code)]
#[path = "support/model.rs"]
mod model;

use backend_api::{
    Buffer, BufferRef, BufferRequest, BufferUsage, Capacity, Device, DeviceError, DeviceInfo, Discard,
    HostBytes, NullDevice, Observer, OpDesc, Program, ProgramDesc, Step, Unsupported,
};
use graph::{
    Devices, Executor, Placement, Plan, SourceError, States, StorageKind, WeightBytes, WeightSource, Weights,
};
use model::SMALL;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    any::Any,
    cell::Cell,
    sync::Arc,
};

thread_local! {
    /// Allocations of this thread.
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator, which keeps the contract; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = TAKEN.try_with(|taken| taken.set(taken.get() + 1));
        // SAFETY: the caller's layout, as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer is of `alloc`, which is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs nothing, quietly.
struct Idle(NullDevice);

#[derive(Debug)]
struct IdleBuffer(usize);

struct IdleProgram;

impl Buffer for IdleBuffer {
    fn size(&self) -> usize {
        self.0
    }
    fn usage(&self) -> BufferUsage {
        BufferUsage::Scratch
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Program for IdleProgram {
    fn run(&mut self, _: &Step, _: &mut dyn Observer) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Device for Idle {
    fn info(&self) -> &DeviceInfo {
        self.0.info()
    }
    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        self.0.supports(op)
    }
    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        Ok(Arc::new(IdleBuffer(request.size)))
    }
    fn import(&self, _: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        Ok(None)
    }
    fn write(&self, _: &BufferRef, _: usize, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
    fn read(&self, _: &BufferRef, _: usize, _: &mut [u8]) -> Result<(), DeviceError> {
        Ok(())
    }
    fn compile(&self, _: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(IdleProgram))
    }
}

struct Zeros(graph::Graph);

impl WeightSource for Zeros {
    fn weight(&self, name: &str) -> Result<WeightBytes, SourceError> {
        let storage = self.0.find(StorageKind::Weight, name).ok_or("there is none")?;
        let size = self.0.storages()[storage].desc.span_bytes(&Step { rows: 1, past: 0, outputs: 1 });
        Ok(WeightBytes { bytes: Arc::new(vec![0u8; size]), range: 0..size })
    }
}

#[test]
fn a_step_takes_nothing_from_the_heap() {
    let graph = model::build(&SMALL).expect("a graph");
    let devices = Devices::new(vec![
        Arc::new(Idle(NullDevice::new("gpu", 1 << 30))),
        Arc::new(Idle(NullDevice::new("cpu", 1 << 30))),
    ]);
    let states = graph.storages_of(StorageKind::State).map(|(_, state)| (state.name.clone(), 1)).collect();
    let placement = Placement { states, ..Placement::all_on(0, SMALL.layers + 1) };
    let capacity = Capacity { rows: 4, outputs: 1, kv_len: SMALL.capacity };
    let plan = Arc::new(Plan::new(&graph, &placement, &devices, capacity).expect("a plan"));
    let weights = Weights::load(&plan, &devices, &Zeros(graph), &mut |_| ()).expect("weights");
    let states = States::allocate(&plan, &devices).expect("states");
    let mut executor = Executor::new(plan, &devices, &weights, &states).expect("an executor");
    let tokens: Vec<u8> = [1i32, 2, 3].iter().flat_map(|id| id.to_ne_bytes()).collect();
    let outputs = 2i32.to_ne_bytes();
    let inputs: [(&str, &[u8]); 2] = [("tokens", &tokens), ("outputs", &outputs)];
    let mut logits = [0.0; SMALL.vocabulary];
    let before = TAKEN.get();
    for past in 0..5 {
        executor.run(&Step { rows: 3, past, outputs: 1 }, &inputs, &mut Discard).expect("a step");
        executor.read("logits", &mut logits).expect("logits");
    }
    assert_eq!(TAKEN.get() - before, 0, "allocations in five steps");
}
