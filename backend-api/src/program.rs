//! Programs: operations over values that lie at known places.

use crate::{BufferRef, DeviceError, Extent, Observer, Op, OpDesc, TensorDesc};

/// What varies from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Tokens in this step; their positions are `past .. past + rows`.
    pub rows: usize,
    /// Tokens already in the caches.
    pub past: usize,
    /// Rows whose result is wanted.
    pub outputs: usize,
}

impl Step {
    /// Cache rows that the last token of this step sees; `usize::MAX` if they are more.
    pub fn kv_len(&self) -> usize {
        self.past.saturating_add(self.rows)
    }
}

/// The largest values that a program's symbolic extents may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Capacity {
    /// Largest [`Step::rows`].
    pub rows: usize,
    /// Largest [`Step::outputs`].
    pub outputs: usize,
    /// Largest [`Step::kv_len`]: rows in each cache.
    pub kv_len: usize,
}

impl Capacity {
    /// Whether a program of this capacity may run `step`.
    pub fn holds(&self, step: &Step) -> bool {
        let cached = step.past.checked_add(step.rows);
        step.rows <= self.rows && step.outputs <= self.outputs && cached.is_some_and(|n| n <= self.kv_len)
    }

    /// The step that fills the capacity.
    pub fn full_step(&self) -> Step {
        Step { rows: self.rows, past: self.kv_len.saturating_sub(self.rows), outputs: self.outputs }
    }
}

/// Index into [`ProgramDesc::values`].
pub type ValueIndex = usize;

/// Where a value's first byte lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index into [`ProgramDesc::buffers`].
    pub buffer: usize,
    /// Bytes from the start of the buffer.
    pub offset: usize,
}

/// A tensor at a place. Two values may share bytes: views of one base, and scratch that is reused.
#[derive(Clone, Debug)]
pub struct ProgramValue {
    /// Format, shape and strides.
    pub desc: TensorDesc,
    /// Where it lies.
    pub place: Place,
}

/// Bytes that are read after a run: rows of `row` bytes each, `pitch` bytes apart, the first at `place`, and the gaps
/// between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramResult {
    /// Of the first byte.
    pub place: Place,
    /// How many rows.
    pub extent: Extent,
    /// Bytes of a row.
    pub row: usize,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

impl ProgramResult {
    /// Bytes in `step`, from the first to past the last.
    pub fn bytes(&self, step: &Step) -> usize {
        match self.extent.at(step) {
            0 => 0,
            rows => (rows - 1) * self.pitch + self.row,
        }
    }
}

/// One operation of a program.
#[derive(Clone, Debug)]
pub struct ProgramOp {
    /// The node's name in the graph.
    pub name: String,
    /// What it computes.
    pub op: Op,
    /// Its inputs, in the order that [`Op`] documents.
    pub inputs: Vec<ValueIndex>,
    /// Its outputs, likewise.
    pub outputs: Vec<ValueIndex>,
}

/// What a device compiles: operations in order, and everything they touch.
///
/// The caller owes: every operation passes [`OpDesc::check`] and the device's
/// [`supports`](crate::Device::supports); every value lies inside its buffer for every step within `capacity`, and
/// every cache has rows for all of them; an output overlaps no other operand of its operation, except that `Add` may
/// write over either input; every result lies inside its buffer, too.
#[derive(Clone, Debug)]
pub struct ProgramDesc {
    /// For errors and debuggers.
    pub name: String,
    /// Bounds of the symbolic extents.
    pub capacity: Capacity,
    /// Buffers of this device.
    pub buffers: Vec<BufferRef>,
    /// Values in those buffers.
    pub values: Vec<ProgramValue>,
    /// Operations, in an order that respects data flow.
    pub ops: Vec<ProgramOp>,
    /// What is read after each run, so that a device with memory of its own can bring it along. Anything else may be read,
    /// too.
    pub results: Vec<ProgramResult>,
}

impl ProgramDesc {
    /// The operation as [`supports`](crate::Device::supports) sees it.
    ///
    /// # Panics
    /// If it names a value that is not there.
    pub fn describe(&self, op: &ProgramOp) -> OpDesc {
        let desc = |index: &ValueIndex| self.values[*index].desc;
        OpDesc {
            op: op.op.clone(),
            inputs: op.inputs.iter().map(desc).collect(),
            outputs: op.outputs.iter().map(desc).collect(),
        }
    }
}

/// A value of a program in a device's memory.
#[derive(Clone, Debug)]
pub struct Operand {
    /// Format, shape and strides.
    pub desc: TensorDesc,
    /// The address of its first byte; values of all buffers have addresses of one space.
    pub address: u64,
    /// Whether its bytes may be written: those of imported buffers may not.
    pub writable: bool,
}

impl ProgramDesc {
    /// For devices: checks what the caller of [`compile`](crate::Device::compile) owes of an operation and its operands
    /// beyond what [`OpDesc::check`] sees, as kernels rely on it: caches have rows for the whole capacity; outputs are
    /// writable, and apart from each other and from inputs (or, for `Add`, in the place of one).
    ///
    /// # Errors
    /// What was expected and found.
    pub fn check_operands(&self, op: &Op, inputs: &[Operand], outputs: &[Operand]) -> Result<(), String> {
        let full = self.capacity.full_step();
        let cache = match op {
            Op::KvStore => outputs.first(),
            Op::LatentAttention { .. } => inputs.get(1),
            _ => None,
        };
        if let Some(cache) = cache
            && cache.desc.shape.extents()[0].at(&full) < self.capacity.kv_len
        {
            let wanted = self.capacity.kv_len;
            return Err(format!("expected a cache of {wanted} rows or more, found {:?}", cache.desc));
        }
        let apart = |a: &Operand, b: &Operand| {
            let end = |x: &Operand| x.address.saturating_add(x.desc.span_bytes(&full) as u64);
            end(a) <= b.address || end(b) <= a.address
        };
        for (index, output) in outputs.iter().enumerate() {
            if !output.writable {
                return Err("an output lies in imported bytes, which are only read".to_owned());
            }
            for input in inputs {
                let in_place = *op == Op::Add && input.address == output.address && input.desc == output.desc;
                if !in_place && !apart(output, input) {
                    return Err(format!("output {:?} overlaps input {:?}", output.desc, input.desc));
                }
            }
            if let Some(other) = outputs[..index].iter().find(|other| !apart(output, other)) {
                return Err(format!("output {:?} overlaps output {:?}", output.desc, other.desc));
            }
        }
        Ok(())
    }
}

/// A compiled program.
pub trait Program: Send {
    /// Runs all operations for `step` and returns when their results can be read.
    ///
    /// The caller owes a step that the [capacity holds](Capacity::holds), and that nobody else touches the program's buffers meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] and other driver errors.
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capacity_holds_what_it_was_made_for_and_no_more() {
        let capacity = Capacity { rows: 4, outputs: 2, kv_len: 10 };
        let at = |rows, past, outputs| Step { rows, past, outputs };
        for step in [capacity.full_step(), at(0, 0, 0), at(4, 6, 2), at(1, 9, 0), at(0, 10, 2)] {
            assert!(capacity.holds(&step), "{step:?}");
        }
        for step in [at(5, 0, 0), at(1, 10, 0), at(0, 0, 3), at(1, usize::MAX, 0), at(4, usize::MAX - 1, 0)] {
            assert!(!capacity.holds(&step), "{step:?}");
        }
        let endless = Capacity { kv_len: usize::MAX, ..capacity };
        assert!(endless.holds(&at(1, usize::MAX - 1, 0)) && !endless.holds(&at(1, usize::MAX, 0)));
    }
}
