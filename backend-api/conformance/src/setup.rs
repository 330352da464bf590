//! What a case runs: a program, its tensors, and the bytes around them.

use crate::{
    random::{Random, Weights},
    reference::row_offsets,
};
use backend_api::{
    BufferUsage, Capacity, DType, Extent, Op, OpDesc, OpKind, Place, ProgramOp, ProgramValue, Shape, Step,
    TensorDesc, ValueIndex,
};
use std::ops::Range;

/// What lies around and between the values: NaN, whether read as f32 or as f16, and no valid id.
const FENCE: [u8; 2] = [0xFD, 0xFF];

/// Bytes of fence between neighbours.
const FENCE_BYTES: usize = 192;

/// Before the first run outputs are NaN, before the second they are huge: what is not written shows, and so does
/// what is added instead of written.
pub(crate) const POISONS: [u8; 2] = [0xFF, 0x7F];

pub(crate) const USAGES: [BufferUsage; 3] = [BufferUsage::Weights, BufferUsage::State, BufferUsage::Scratch];

/// Bytes of fence.
pub(crate) fn fence(size: usize) -> Vec<u8> {
    (0..size).map(|i| FENCE[i % 2]).collect()
}

/// A tensor of the program.
pub(crate) struct Operand {
    pub(crate) desc: TensorDesc,
    pub(crate) usage: BufferUsage,
    pub(crate) contents: Contents,
}

pub(crate) enum Contents {
    /// Its bytes, with fence between the rows, after so many bytes of a wider tensor.
    Given { bytes: Vec<u8>, lead: usize },
    /// Written by the program.
    Output,
    /// Written by the program, at the place of this operand.
    Over(ValueIndex),
}

/// A program and its data.
pub(crate) struct Setup {
    pub(crate) step: Step,
    pub(crate) capacity: Capacity,
    pub(crate) operands: Vec<Operand>,
    pub(crate) ops: Vec<ProgramOp>,
    /// Whether the data have a structure that makes errors add up: only their worst case bounds them then.
    pub(crate) structured: bool,
}

/// The bytes of one buffer for each of [`USAGES`].
pub(crate) type Image = [Vec<u8>; 3];

impl Setup {
    /// The operands at their places, and the buffers before a run.
    pub(crate) fn lay_out(&self) -> (Vec<ProgramValue>, Image) {
        let mut values: Vec<ProgramValue> = Vec::new();
        let mut image: Image = Default::default();
        for operand in &self.operands {
            let buffer = USAGES.iter().position(|usage| *usage == operand.usage).expect("a listed usage");
            let bytes = &mut image[buffer];
            let place = match &operand.contents {
                Contents::Over(other) => values[*other].place,
                Contents::Given { bytes: given, lead } => {
                    bytes.extend(fence(FENCE_BYTES + lead));
                    let offset = bytes.len();
                    bytes.extend(given);
                    Place { buffer, offset }
                }
                Contents::Output => {
                    bytes.extend(fence(FENCE_BYTES));
                    let offset = bytes.len();
                    bytes.resize(offset + operand.desc.span_bytes(&self.capacity.full_step()), POISONS[0]);
                    Place { buffer, offset }
                }
            };
            values.push(ProgramValue { desc: operand.desc, place });
            // Places are at multiples of 64, but for the lead of views.
            let aligned = bytes.len().next_multiple_of(64);
            bytes.extend(&fence(2 * aligned)[bytes.len()..aligned]);
        }
        image.iter_mut().for_each(|bytes| bytes.extend(fence(FENCE_BYTES)));
        (values, image)
    }

    pub(crate) fn describe(&self, op: &ProgramOp) -> OpDesc {
        let desc = |index: &ValueIndex| self.operands[*index].desc;
        OpDesc {
            op: op.op.clone(),
            inputs: op.inputs.iter().map(desc).collect(),
            outputs: op.outputs.iter().map(desc).collect(),
        }
    }

    /// The bytes of `op`'s outputs that it writes in `step`, from the start of each one's buffer.
    pub(crate) fn written(
        &self,
        op: &ProgramOp,
        values: &[ProgramValue],
        step: &Step,
    ) -> Vec<(usize, Range<usize>)> {
        let ranges = op.outputs.iter().map(|index| {
            let ProgramValue { desc, place } = &values[*index];
            let range = match op.op.kind() {
                OpKind::KvStore => desc.strides[0] * step.past..desc.strides[0] * step.kv_len(),
                _ => 0..desc.dense_bytes(step),
            };
            (place.buffer, place.offset + range.start..place.offset + range.end)
        });
        ranges.collect()
    }
}

/// Builds a [`Setup`], tensor by tensor.
pub(crate) struct Builder<'a> {
    setup: Setup,
    pub(crate) random: Random,
    weights: &'a mut Weights,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(name: &str, weights: &'a mut Weights) -> Self {
        let step = Step { rows: 1, past: 0, outputs: 1 };
        let capacity = Capacity { rows: 1, outputs: 1, kv_len: 1 };
        let setup = Setup { step, capacity, operands: Vec::new(), ops: Vec::new(), structured: false };
        Builder { setup, random: Random::named(name), weights }
    }

    pub(crate) fn finish(self) -> Setup {
        self.setup
    }

    /// The step of the case; the program is compiled for as much or a little more. To be called first.
    pub(crate) fn step(&mut self, rows: usize, past: usize, outputs: usize) {
        let rows_capacity = rows + self.random.below(3);
        self.setup.step = Step { rows, past, outputs };
        self.setup.capacity = Capacity {
            rows: rows_capacity,
            outputs: (outputs + self.random.below(2)).max(1),
            kv_len: past + rows_capacity + self.random.below(3),
        };
    }

    /// Says that the data of the case are [structured](Setup::structured).
    pub(crate) fn structured(&mut self) {
        self.setup.structured = true;
    }

    fn given(&mut self, desc: TensorDesc, usage: BufferUsage, lead: usize, rows: &[Vec<u8>]) -> ValueIndex {
        let mut bytes = fence(desc.span_bytes(&self.setup.capacity.full_step()));
        for (offset, row) in row_offsets(&desc, &self.setup.step).into_iter().zip(rows) {
            bytes[offset..offset + row.len()].copy_from_slice(row);
        }
        self.setup.operands.push(Operand { desc, usage, contents: Contents::Given { bytes, lead } });
        self.setup.operands.len() - 1
    }

    /// A weight `shape` of random blocks; the rows of its last two axes are `gap` blocks further apart than
    /// dense ones, and its outermost axis, if it has three, another `gap` rows.
    pub(crate) fn weight(&mut self, dtype: DType, shape: &[usize], gap: usize) -> ValueIndex {
        let inner = shape[shape.len() - 1];
        let rows: Vec<_> = (0..shape[..shape.len() - 1].iter().product())
            .map(|_| self.weights.row(dtype, inner, &mut self.random))
            .collect();
        self.weight_rows(dtype, shape, gap, &rows)
    }

    /// A weight of these encoded rows.
    pub(crate) fn weight_rows(
        &mut self,
        dtype: DType,
        shape: &[usize],
        gap: usize,
        rows: &[Vec<u8>],
    ) -> ValueIndex {
        let shape = Shape::fixed(shape);
        let mut desc = TensorDesc::new(dtype, shape);
        let extents = shape.extents();
        if shape.rank() >= 2 && gap > 0 {
            let rank = shape.rank();
            desc.strides[rank - 2] += gap * dtype.block_bytes();
            if rank == 3 {
                let rows = extents[1].fixed().expect("weights have fixed extents");
                desc.strides[0] = (rows + gap) * desc.strides[1];
            }
        }
        self.given(desc, BufferUsage::Weights, 0, rows)
    }

    /// Weights in F32 with these values.
    pub(crate) fn vector(&mut self, values: &[f32]) -> ValueIndex {
        let desc = TensorDesc::new(DType::F32, Shape::fixed(&[values.len()]));
        self.given(desc, BufferUsage::Weights, 0, &[to_bytes(values)])
    }

    /// Random activations: the innermost columns after the first `skipped` of rows that are `2 × skipped` wider.
    pub(crate) fn activations(&mut self, shape: Shape, skipped: usize) -> ValueIndex {
        let count = shape.elements(&self.setup.step) / shape.inner();
        let rows: Vec<_> = (0..count).map(|_| self.random.activations(shape.inner())).collect();
        self.values(shape, skipped, &rows)
    }

    /// Activations with these rows.
    pub(crate) fn values(&mut self, shape: Shape, skipped: usize, rows: &[Vec<f32>]) -> ValueIndex {
        let bytes: Vec<_> = rows.iter().map(|row| to_bytes(row)).collect();
        self.given(columns(DType::F32, shape, skipped), BufferUsage::Scratch, 4 * skipped, &bytes)
    }

    /// Random activations in F16.
    pub(crate) fn halves(&mut self, shape: Shape, skipped: usize) -> ValueIndex {
        let desc = columns(DType::F16, shape, skipped);
        let count = shape.elements(&self.setup.step) / shape.inner();
        let rows: Vec<_> =
            (0..count).map(|_| encoded(DType::F16, &self.random.activations(shape.inner()))).collect();
        self.given(desc, BufferUsage::Scratch, 2 * skipped, &rows)
    }

    /// Ids, in rows of the innermost extent.
    pub(crate) fn ids(&mut self, shape: Shape, ids: &[i32]) -> ValueIndex {
        let rows: Vec<_> = ids
            .chunks(if shape.rank() == 1 { ids.len().max(1) } else { shape.inner() })
            .map(|row| row.iter().flat_map(|id| id.to_le_bytes()).collect())
            .collect();
        self.given(TensorDesc::new(DType::I32, shape), BufferUsage::Scratch, 0, &rows)
    }

    /// A cache whose first `filled` rows are random and the others NaN.
    pub(crate) fn cache(&mut self, dtype: DType, width: usize, filled: usize) -> ValueIndex {
        let desc = TensorDesc::new(dtype, Shape::fixed(&[self.setup.capacity.kv_len, width]));
        let rows: Vec<_> = (0..filled)
            .map(|_| encoded(dtype, &(0..width).map(|_| self.random.normal()).collect::<Vec<_>>()))
            .collect();
        self.given(desc, BufferUsage::State, 0, &rows)
    }

    /// An operation with outputs of its own.
    pub(crate) fn op(&mut self, op: Op, inputs: &[ValueIndex]) -> Vec<ValueIndex> {
        let descs: Vec<_> = inputs.iter().map(|index| self.setup.operands[*index].desc).collect();
        let outputs = op.infer(&descs).unwrap_or_else(|error| panic!("a case is not well formed: {error}"));
        let first = self.setup.operands.len();
        for desc in outputs {
            let contents = Contents::Output;
            self.setup.operands.push(Operand { desc, usage: BufferUsage::Scratch, contents });
        }
        let outputs: Vec<_> = (first..self.setup.operands.len()).collect();
        self.push(op, inputs, &outputs);
        outputs
    }

    /// An operation with one output, at the place of `place`, which it may read or which is read no more.
    pub(crate) fn op_over(&mut self, op: Op, inputs: &[ValueIndex], place: ValueIndex) -> ValueIndex {
        let output = self.op(op, inputs)[0];
        self.setup.operands[output].contents = Contents::Over(place);
        output
    }

    /// A store into a cache.
    pub(crate) fn store(&mut self, row: ValueIndex, cache: ValueIndex) {
        self.push(Op::KvStore, &[row], &[cache]);
    }

    fn push(&mut self, op: Op, inputs: &[ValueIndex], outputs: &[ValueIndex]) {
        let name = format!("node.{}.{}", self.setup.ops.len(), op.kind());
        self.setup.ops.push(ProgramOp { name, op, inputs: inputs.to_vec(), outputs: outputs.to_vec() });
    }
}

/// A view of some columns of a wider tensor.
fn columns(dtype: DType, shape: Shape, skipped: usize) -> TensorDesc {
    let mut wide = shape.extents().to_vec();
    *wide.last_mut().expect("a shape has extents") = (shape.inner() + 2 * skipped).into();
    TensorDesc { shape, ..TensorDesc::new(dtype, Shape::new(&wide)) }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// One row.
pub(crate) fn encoded(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(values.len())];
    backend_api::format::encode(dtype, values, &mut bytes);
    bytes
}

/// The outermost extent, if it varies from step to step.
pub(crate) fn varying(desc: &TensorDesc) -> Option<Extent> {
    Some(desc.shape.extents()[0]).filter(|extent| extent.fixed().is_none())
}
