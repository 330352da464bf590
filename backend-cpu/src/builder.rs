//! Turning operations into kernels: what the constructor of a kernel may ask for.

use crate::{
    buffer::Memory,
    isa::Level,
    kernels::{BoundKernel, Kernel, bind},
    tensor::{Tensor, apart},
};
use backend_api::{Capacity, DeviceError, TensorDesc};
use std::{
    any::{Any, TypeId},
    collections::HashMap,
    ops::Range,
};

/// One kernel and the operation it belongs to.
pub(crate) struct Phase {
    pub(crate) op: usize,
    pub(crate) kernel: Box<dyn BoundKernel>,
    /// Whether it may run at the same time as the phase before it, and those that may with that.
    pub(crate) beside: bool,
}

/// What the phases that may run at the same time read and write, as addresses.
#[derive(Default)]
struct Together {
    reads: Vec<Range<usize>>,
    writes: Vec<Range<usize>>,
}

impl Together {
    fn allows(&self, other: &Together) -> bool {
        let all_apart = |these: &[Range<usize>], those: &[Range<usize>]| {
            these.iter().all(|this| those.iter().all(|that| apart(this, that)))
        };
        all_apart(&self.writes, &other.writes)
            && all_apart(&self.writes, &other.reads)
            && all_apart(&self.reads, &other.writes)
    }
}

/// Collects the kernels of a program and the memory between them.
///
/// Memory is recycled within a program, because kernels run in order: a block asked for while building an
/// operation is free again when the operation ends; one asked for inside [`Builder::shared`], when the input it
/// was made from is overwritten; one from [`Builder::lasting`], never.
pub(crate) struct Builder {
    /// The device's name, for errors.
    device: String,
    level: Level,
    threads: usize,
    capacity: Capacity,
    phases: Vec<Phase>,
    op: usize,
    /// Phases before this operation.
    earlier: usize,
    /// Whether this operation has asked for memory that an earlier one may be using.
    recycles: bool,
    /// The operations whose last phases may run at the same time.
    together: Together,
    /// All memory, in use or not. Indices are stable.
    memory: Vec<Memory>,
    free: Vec<usize>,
    /// Blocks of the operation or shared thing being built.
    held: Vec<usize>,
    shared: HashMap<Key, Shared>,
    lasting: Vec<Box<dyn Any>>,
    failure: Option<DeviceError>,
}

/// A thing made from an input: what kind of thing, in which layout, from which tensor.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    made: TypeId,
    layout: u64,
    address: usize,
    desc: TensorDesc,
}

struct Shared {
    thing: Box<dyn Any>,
    blocks: Vec<usize>,
    span: Range<usize>,
}

impl Builder {
    pub(crate) fn new(device: &str, level: Level, threads: usize, capacity: Capacity) -> Self {
        Builder {
            device: device.to_owned(),
            level,
            threads,
            capacity,
            phases: Vec::new(),
            op: 0,
            earlier: 0,
            recycles: false,
            together: Together::default(),
            memory: Vec::new(),
            free: Vec::new(),
            held: Vec::new(),
            shared: HashMap::new(),
            lasting: Vec::new(),
            failure: None,
        }
    }

    /// Threads that will run the kernels.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// The largest step.
    pub(crate) fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Appends a phase.
    pub(crate) fn push(&mut self, kernel: impl Kernel + 'static) {
        self.phases.push(Phase { op: self.op, kernel: bind(kernel, self.level), beside: false });
    }

    /// Memory of at least `bytes` bytes, aligned to 64, for kernels of this operation (or, inside
    /// [`Builder::shared`], of all operations that share the thing). Its contents are whatever an earlier user
    /// left; an allocation that fails makes the whole compilation fail, after this operation.
    pub(crate) fn scratch_buffer(&mut self, bytes: usize) -> *mut u8 {
        let fits = |memory: &Memory| memory.size() >= bytes;
        let best = (0..self.free.len())
            .filter(|&slot| fits(&self.memory[self.free[slot]]))
            .min_by_key(|&slot| self.memory[self.free[slot]].size());
        let index = match best {
            Some(slot) => self.free.swap_remove(slot),
            None => match self.allocate(bytes) {
                Some(index) => index,
                None => return std::ptr::null_mut(),
            },
        };
        self.held.push(index);
        self.recycles = true;
        self.memory[index].pointer()
    }

    /// The `T` that `make` built from `input` in this `layout` (any number that tells variants of `T` apart):
    /// built once, shared by later operations for as long as no operation writes over the input.
    pub(crate) fn shared<T: Clone + 'static>(
        &mut self,
        input: &Tensor,
        layout: u64,
        make: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let made = TypeId::of::<T>();
        let key = Key { made, layout, address: input.base::<u8>() as usize, desc: *input.desc() };
        if let Some(thing) = self.shared.get(&key).and_then(|shared| shared.thing.downcast_ref::<T>()) {
            return thing.clone();
        }
        let outside = std::mem::take(&mut self.held);
        let thing = make(self);
        let blocks = std::mem::replace(&mut self.held, outside);
        let span = input.span(&self.capacity);
        self.shared.insert(key, Shared { thing: Box::new(thing.clone()), blocks, span });
        thing
    }

    /// The first `T` that [`Builder::keep`] was given and `fits`.
    pub(crate) fn kept<T: Clone + 'static>(&self, fits: impl Fn(&T) -> bool) -> Option<T> {
        self.lasting.iter().filter_map(|thing| thing.downcast_ref::<T>()).find(|thing| fits(thing)).cloned()
    }

    /// Keeps a thing for the other operations of the program: one that depends on no tensor, only on the step.
    pub(crate) fn keep<T: Clone + 'static>(&mut self, thing: T) {
        self.lasting.push(Box::new(thing));
    }

    /// Zeroed memory aligned to 64 that belongs to the program as long as it lives.
    pub(crate) fn lasting(&mut self, bytes: usize) -> *mut u8 {
        self.allocate(bytes).map_or(std::ptr::null_mut(), |index| self.memory[index].pointer())
    }

    /// Ends an operation: memory of its own is free again, and so are things made from what it wrote.
    pub(crate) fn end_op(&mut self, inputs: &[Tensor], outputs: &[Tensor]) -> Result<(), DeviceError> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        self.op += 1;
        self.place_beside(inputs, outputs);
        self.free.append(&mut self.held);
        for written in outputs.iter().map(|output| output.span(&self.capacity)) {
            let free = &mut self.free;
            self.shared.retain(|_, shared| {
                let lives = apart(&shared.span, &written);
                if !lives {
                    free.append(&mut shared.blocks);
                }
                lives
            });
        }
        Ok(())
    }

    /// Lets an operation of one phase run beside those before it, where neither needs what the other writes.
    fn place_beside(&mut self, inputs: &[Tensor], outputs: &[Tensor]) {
        let spans = |tensors: &[Tensor]| tensors.iter().map(|tensor| tensor.span(&self.capacity)).collect();
        let mut own = Together { reads: spans(inputs), writes: spans(outputs) };
        let alone = self.phases.len() != self.earlier + 1 || self.recycles;
        if !alone && self.earlier > 0 && self.together.allows(&own) {
            self.phases[self.earlier].beside = true;
            self.together.reads.append(&mut own.reads);
            self.together.writes.append(&mut own.writes);
        } else {
            self.together = own;
        }
        self.earlier = self.phases.len();
        self.recycles = false;
    }

    /// The kernels, and the memory that must live as long as they do.
    pub(crate) fn finish(self) -> (Vec<Phase>, Vec<Memory>) {
        (self.phases, self.memory)
    }

    fn allocate(&mut self, bytes: usize) -> Option<usize> {
        match Memory::zeroed(bytes) {
            Some(memory) => {
                self.memory.push(memory);
                Some(self.memory.len() - 1)
            }
            None => {
                // Who called gets a null pointer into a kernel that never runs.
                self.failure.get_or_insert(DeviceError::OutOfMemory {
                    device: self.device.clone(),
                    what: "memory between kernels".to_owned(),
                    requested: bytes as u64,
                    available: crate::memory::available(),
                });
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{isa::Isa, kernels::Scratch};
    use backend_api::{DType, Shape, Step};

    const CAPACITY: Capacity = Capacity { rows: 4, outputs: 4, kv_len: 64 };

    /// Four rows of 16 from row `first` of `memory`.
    fn tensor(memory: &Memory, first: usize) -> Tensor {
        Tensor::new(
            memory.pointer().wrapping_add(first * 64),
            TensorDesc::new(DType::F32, Shape::rows(&[16])),
        )
    }

    #[derive(Clone, Copy, PartialEq, Debug)]
    struct Quantised(*mut u8);

    fn quantised(builder: &mut Builder, input: &Tensor, layout: u64) -> Quantised {
        builder.shared(input, layout, |builder| Quantised(builder.scratch_buffer(100)))
    }

    #[test]
    fn shared_things_last_until_their_input_is_overwritten() {
        let memory = Memory::zeroed(64 * 64).expect("room");
        let (x, y) = (tensor(&memory, 0), tensor(&memory, 8));
        let mut builder = Builder::new("test", Level::Portable, 1, CAPACITY);
        let first = quantised(&mut builder, &x, 0);
        let other_layout = quantised(&mut builder, &x, 1);
        let other_input = quantised(&mut builder, &y, 0);
        builder.end_op(&[], &[tensor(&memory, 4)]).expect("room");
        assert_eq!(quantised(&mut builder, &x, 0), first, "row 4 is behind the four of x");
        assert_eq!(quantised(&mut builder, &x, 1), other_layout);
        assert!(first != other_layout && first != other_input && other_layout != other_input);
        // Overlaps the last row of x only.
        builder.end_op(&[], &[tensor(&memory, 3)]).expect("room");
        let again = [quantised(&mut builder, &x, 0), quantised(&mut builder, &x, 1)];
        assert!(again.contains(&first) && again.contains(&other_layout), "made anew in the same memory");
        assert_eq!(quantised(&mut builder, &y, 0), other_input);
        assert_eq!(builder.finish().1.len(), 3);
    }

    #[test]
    fn a_thing_in_use_is_not_recycled_within_the_operation_that_ends_it() {
        let memory = Memory::zeroed(64 * 64).expect("room");
        let x = tensor(&memory, 0);
        let mut builder = Builder::new("test", Level::Portable, 1, CAPACITY);
        let thing = quantised(&mut builder, &x, 0);
        let own = builder.scratch_buffer(100);
        assert_ne!(thing.0, own);
        builder.end_op(&[], &[x]).expect("room");
        let reused = [builder.scratch_buffer(100), builder.scratch_buffer(100)];
        assert!(reused.contains(&thing.0) && reused.contains(&own));
    }

    #[test]
    fn the_smallest_block_that_fits_is_reused() {
        let mut builder = Builder::new("test", Level::Portable, 1, CAPACITY);
        let blocks = [1000, 10, 100].map(|bytes| builder.scratch_buffer(bytes));
        builder.end_op(&[], &[]).expect("room");
        assert_eq!(
            [90, 5, 101].map(|bytes| builder.scratch_buffer(bytes)),
            [blocks[2], blocks[1], blocks[0]]
        );
    }

    #[test]
    fn no_room_is_an_error_of_the_operation() {
        let mut builder = Builder::new("test", Level::Portable, 1, CAPACITY);
        builder.scratch_buffer(usize::MAX / 2 + 1);
        let error = builder.end_op(&[], &[]).expect_err("no machine has it").to_string();
        assert!(error.starts_with("test: no memory for memory between kernels"), "{error}");
    }

    struct Nothing;

    impl Kernel for Nothing {
        fn tasks(&self, _: &Step) -> usize {
            1
        }
        unsafe fn run<S: Isa>(&self, _: S, _: &Step, _: usize, _: &mut Scratch) {}
    }

    #[test]
    fn what_needs_nothing_of_its_neighbours_runs_beside_them() {
        let memory = Memory::zeroed(64 * 64).expect("room");
        let [x, a, b, c] = [0, 8, 16, 24].map(|row| tensor(&memory, row));
        let mut builder = Builder::new("cpu", Level::Portable, 1, CAPACITY);
        let mut op = |phases: usize, scratch: bool, inputs: &[Tensor], output: Tensor| {
            (0..phases).for_each(|_| builder.push(Nothing));
            if scratch {
                builder.scratch_buffer(64);
            }
            builder.end_op(inputs, &[output]).expect("room");
        };
        op(2, false, &[x], a); // Its own phases follow each other.
        op(1, false, &[x], b); // As two products of the same rows.
        op(1, false, &[x], c); // A third.
        op(1, false, &[a, b], x); // Needs them, and overwrites what they read.
        op(1, true, &[c], a); // Its memory may be in use.
        op(1, false, &[c], b);
        op(2, false, &[c], tensor(&memory, 32));
        op(1, false, &[], b); // Writes what nobody beside it reads: the phase before is of the last operation only.
        op(1, false, &[], b); // Writes what its neighbour writes.
        let beside: Vec<bool> = builder.finish().0.iter().map(|phase| phase.beside).collect();
        let expected = [false, false, true, true, false, false, true, false, false, true, false];
        assert_eq!(beside, expected);
    }
}
