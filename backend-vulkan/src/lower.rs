//! From operations to pieces of work for shaders: what each reads and writes, and the numbers its shader wants.

use crate::{memory::VulkanBuffer, pipelines::Shader, shared::*, tuning::Tuning};
use backend_api::{
    Capacity, DType, Extent, Gating, Op, OpDesc, Operand, Precision, ProgramDesc, RopeAttributes, Step,
    TensorDesc, Unsupported,
};
use std::{any::Any, mem::offset_of, ops::Range};

/// Bytes that a piece touches.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub span: Range<u64>,
    pub write: bool,
    /// For a chain of rows: row `i` touches `size` bytes from `i × stride` on, and nothing else. `None`: any row may
    /// touch anything.
    pub rows: Option<RowSpan>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowSpan {
    pub stride: u64,
    pub size: u64,
}

/// How often something repeats in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Fixed(u32),
    /// So many for each row, divided by the second and rounded up, plus the third, but not more than the product.
    Rows(u32, u32, u32),
    Outputs(u32, u32),
    /// Cached rows, divided and rounded up.
    KvLen(u32),
}

impl Count {
    pub(crate) fn at(self, step: &Step) -> u32 {
        let scaled =
            |n: usize, times: u32, part: u32| (n as u64 * u64::from(times)).div_ceil(u64::from(part));
        let count = match self {
            Count::Fixed(n) => u64::from(n),
            Count::Rows(times, part, more) => {
                (scaled(step.rows, times, part) + u64::from(more)).min(scaled(step.rows, times, 1))
            }
            Count::Outputs(times, part) => scaled(step.outputs, times, part),
            Count::KvLen(part) => scaled(step.kv_len(), 1, part),
        };
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    pub(crate) fn is_fixed(self) -> bool {
        matches!(self, Count::Fixed(_))
    }
}

/// Work, and what it touches.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Index of its operation in the program.
    pub op: usize,
    pub kind: Kind,
    pub accesses: Vec<Access>,
}

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// A link of a chain of operations that work row by row.
    Row { op: RowOp, extent: Extent },
    /// A matrix product, which may share its dispatch with others of the same shader.
    Product { shader: Shader, job: ProductJob, batches: u32, tile_rows: u32, tiles: Count },
    /// A dispatch of its own. One that `helps` prepares or ends what another of its operation does, whose work is that
    /// one's.
    Alone { shader: Shader, push: Vec<u8>, groups: [Count; 3], cut: Cut, helps: bool },
}

/// How a dispatch may come in pieces, by numbers at these bytes of its push constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Never,
    /// By work groups of the first axis.
    Groups {
        first: usize,
    },
    /// By rows of the step, of which there are so many at most.
    Rows {
        first: usize,
        count: usize,
        rows: u32,
    },
}

/// Tables of cosines and sines for the positions of a step.
pub(crate) struct RopeTable {
    pub attributes: RopeAttributes,
    /// Bytes from the start of the step's buffer.
    pub offset: u64,
}

/// What the device has shaders for: all that is well formed, up to limits of shared memory.
///
/// # Errors
/// What is not well formed, or too large.
pub(crate) fn supports(device: &str, op: &OpDesc) -> Result<(), Unsupported> {
    let unsupported = |reason| Unsupported { device: device.to_owned(), op: op.op.kind(), reason };
    op.check().map_err(|error| unsupported(error.problem))?;
    let limit = |what: &str, found: usize, most: usize| match found <= most {
        true => Ok(()),
        false => Err(unsupported(format!("expected at most {most} {what}, found {found}"))),
    };
    let experts = |tensor: &TensorDesc, axis: usize| tensor.shape.extents()[axis].fixed().unwrap_or(0);
    match &op.op {
        Op::Route(_) => limit("experts", op.inputs[0].shape.inner(), MAX_EXPERTS as usize)?,
        Op::ExpertMatMul { .. } => limit("experts", experts(&op.inputs[0], 0), MAX_EXPERTS as usize)?,
        Op::LatentAttention { latent, .. } => limit("latent elements", *latent, MAX_LATENT)?,
        _ => {}
    }
    for tensor in op.inputs.iter().chain(&op.outputs) {
        let extents = tensor.shape.extents();
        let fixed = extents.iter().filter_map(|extent| extent.fixed());
        let largest = fixed.chain(tensor.strides).max().unwrap_or(0);
        limit("elements or bytes between neighbours of an axis", largest, u32::MAX as usize)?;
        let align = alignment(tensor.dtype);
        if let Some(stride) = tensor.strides.iter().find(|stride| !stride.is_multiple_of(align)) {
            return Err(unsupported(format!(
                "expected strides that are multiples of {align}, found {stride}"
            )));
        }
        if tensor.dtype != DType::I32 && tensor.shape.rank() > 4 {
            return Err(unsupported(format!("expected at most 4 axes, found {}", tensor.shape)));
        }
    }
    Ok(())
}

/// What addresses and strides are multiples of: blocks are loaded by words, or by halves where their bytes say so.
fn alignment(dtype: DType) -> usize {
    if dtype.block_bytes().is_multiple_of(4) { 4 } else { 2 }
}

/// Attention keeps its sums in registers.
const MAX_LATENT: usize = 4096;

/// Lowers the operations of one program.
pub(crate) struct Lowering<'a> {
    pub program: &'a ProgramDesc,
    /// Of the steps that it is lowered for.
    capacity: Capacity,
    pub tuning: &'a Tuning,
    pub step: u64,
    pub ropes: &'a [RopeTable],
    pub pieces: Vec<Piece>,
    /// Memory for partial results of attention, which every layer uses anew, then lists. Where it lies and how long its
    /// first part is are known from a first pass.
    pub scratch: Scratch,
    /// Bytes of both parts so far.
    pub partials: u64,
    pub lists: u64,
    /// Lists of grouped pairs.
    groups: Vec<Grouped>,
}

/// Where the memory for what is used within a run lies.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scratch {
    pub address: u64,
    pub partials: u64,
}

/// Pairs of rows and choices by expert, of the ids that lie at `ids`.
#[derive(Clone)]
struct Grouped {
    ids: Range<u64>,
    experts: u32,
    address: u64,
    bytes: u64,
    tiles: u32,
    width: u32,
}

/// A value at its address.
#[derive(Clone, Copy)]
struct Tensor {
    address: u64,
    span: u64,
    desc: TensorDesc,
    writable: bool,
}

impl Tensor {
    fn extent(&self, axis: usize) -> Extent {
        self.desc.shape.extents()[axis]
    }

    fn fixed(&self, axis: usize) -> u32 {
        self.extent(axis).fixed().unwrap_or(0) as u32
    }

    fn width(&self) -> u32 {
        self.desc.shape.inner() as u32
    }

    /// Elements from one index of `axis` to the next.
    fn stride(&self, axis: usize) -> u32 {
        (self.desc.strides[axis] / self.desc.dtype.block_bytes()) as u32
    }

    /// Innermost rows in each index of the outermost axis, and the extent of the last axis but one.
    fn inner(&self) -> (u32, u32) {
        let extents = self.desc.shape.extents();
        let inside = if extents.len() < 2 { &[] } else { &extents[1..extents.len() - 1] };
        let fixed = |extent: &Extent| extent.fixed().unwrap_or(1) as u32;
        (inside.iter().map(fixed).product(), inside.last().map_or(1, fixed))
    }

    /// Elements between neighbours: of the outermost axis, and of two inside.
    fn strides(&self) -> Strides {
        match self.desc.shape.rank() {
            0 | 1 => [0; 3],
            2 => [self.stride(0), 0, 0],
            3 => [self.stride(0), 0, self.stride(1)],
            _ => [self.stride(0), self.stride(1), self.stride(2)],
        }
    }

    /// Whether every row starts at a multiple of so many bytes.
    fn is_aligned(&self, bytes: usize) -> bool {
        let outer = self.desc.shape.rank() - 1;
        self.address.is_multiple_of(bytes as u64)
            && self.desc.strides[..outer].iter().all(|stride| stride.is_multiple_of(bytes))
    }

    /// Whether values, of 32 bits, may be loaded so many at a time.
    fn together(&self, values: u32) -> bool {
        self.is_aligned(4 * values as usize) && self.width().is_multiple_of(values)
    }

    /// Whether weights may be loaded eight bytes at a time: see `WIDE` in `loads.glsl`.
    fn loads_wide(&self) -> bool {
        match self.desc.dtype {
            DType::F32 => self.together(2),
            DType::F16 | DType::BF16 => self.is_aligned(8) && self.width().is_multiple_of(4),
            dtype => !dtype.block_bytes().is_multiple_of(8) || self.is_aligned(8),
        }
    }

    fn whole(&self, write: bool) -> Access {
        Access { span: self.address..self.address + self.span, write, rows: None }
    }

    /// As a chain touches it: row by row.
    fn by_row(&self, write: bool) -> Access {
        let extents = self.desc.shape.extents();
        let stride = if extents.len() < 2 { self.desc.dtype.row_bytes(1) } else { self.desc.strides[0] };
        // From the first byte of a row to its last.
        let mut size = if extents.len() < 2 { stride } else { self.desc.row_bytes() };
        let inside = extents.iter().zip(self.desc.strides).skip(1).take(extents.len().saturating_sub(2));
        for (extent, stride) in inside {
            size += (extent.fixed().unwrap_or(1).max(1) - 1) * stride;
        }
        let rows = Some(RowSpan { stride: stride as u64, size: size as u64 });
        Access { rows, ..self.whole(write) }
    }
}

/// How an extent is told to a shader.
pub(crate) fn extent_words(extent: Extent) -> (u32, u32) {
    match extent {
        Extent::Fixed(n) => (EXTENT_FIXED, n as u32),
        Extent::Rows => (EXTENT_ROWS, 0),
        Extent::Outputs => (EXTENT_OUTPUTS, 0),
    }
}

pub(crate) fn count_of(extent: Extent, times: u32, part: u32) -> Count {
    match extent {
        Extent::Fixed(n) => Count::Fixed((n as u64 * u64::from(times)).div_ceil(u64::from(part)) as u32),
        Extent::Rows => Count::Rows(times, part, 0),
        Extent::Outputs => Count::Outputs(times, part),
    }
}

/// The name of a format in shaders' names.
fn name_of(dtype: DType) -> String {
    dtype.name().to_ascii_lowercase()
}

/// Whether one of these pieces says that it touches all of a value so.
fn touches(pieces: &[Piece], value: &Tensor, write: bool) -> bool {
    let whole = value.whole(write).span;
    let holds = |access: &Access| {
        access.write == write && access.span.start <= whole.start && whole.end <= access.span.end
    };
    pieces.iter().any(|piece| piece.accesses.iter().any(holds))
}

impl<'a> Lowering<'a> {
    pub(crate) fn new(
        program: &'a ProgramDesc,
        capacity: Capacity,
        tuning: &'a Tuning,
        step: u64,
        ropes: &'a [RopeTable],
        scratch: Scratch,
    ) -> Self {
        Lowering {
            program,
            capacity,
            tuning,
            step,
            ropes,
            pieces: Vec::new(),
            scratch,
            partials: 0,
            lists: 0,
            groups: Vec::new(),
        }
    }

    /// Appends the pieces of operation `index`, which is [supported](supports).
    ///
    /// # Errors
    /// What the caller of `compile` owes and did not see to: a shader reaches memory by address, which nothing else
    /// checks.
    pub(crate) fn op(&mut self, index: usize) -> Result<(), String> {
        let program = self.program;
        let op = &program.ops[index];
        let inputs = self.tensors(&op.inputs)?;
        let outputs = self.tensors(&op.outputs)?;
        let operands = |tensors: &[Tensor]| -> Vec<Operand> {
            let operand = |t: &Tensor| Operand { desc: t.desc, address: t.address, writable: t.writable };
            tensors.iter().map(operand).collect()
        };
        program.check_operands(&op.op, &operands(&inputs), &operands(&outputs))?;
        let first = self.pieces.len();
        match &op.op {
            Op::MatMul { precision } | Op::HeadMatMul { precision } | Op::ExpertMatMul { precision } => {
                self.product(index, &inputs, &outputs[0], *precision)
            }
            Op::EmbedRows => self.embed(index, &inputs, &outputs[0]),
            Op::LatentAttention { scale, latent } => {
                self.attention(index, &inputs, &outputs[0], *scale, *latent as u32)
            }
            _ => self.row(index, &op.op, &inputs, &outputs),
        }
        debug_assert!(
            inputs.iter().all(|input| touches(&self.pieces[first..], input, false))
                && outputs.iter().all(|output| touches(&self.pieces[first..], output, true)),
            "{}: an operand that no piece says it touches",
            op.name
        );
        // Ids that are written anew make another list.
        for output in &outputs {
            let end = output.address + output.span;
            self.groups.retain(|list| list.ids.end <= output.address || end <= list.ids.start);
        }
        Ok(())
    }

    fn tensors(&self, values: &[usize]) -> Result<Vec<Tensor>, String> {
        let full = self.capacity.full_step();
        let tensor = |&value: &usize| {
            let found = self.program.values.get(value).ok_or_else(|| format!("there is no value {value}"))?;
            let buffer = self.program.buffers.get(found.place.buffer);
            let buffer = buffer.ok_or_else(|| format!("there is no buffer {}", found.place.buffer))?;
            let any: &dyn Any = buffer.as_any();
            let own = any.downcast_ref::<VulkanBuffer>().ok_or("a buffer of another kind of device")?;
            let span = found.desc.span_bytes(&full);
            let place = own.address(found.place.offset, span);
            let address = place.map_err(|problem| format!("{:?}: {problem}", found.desc))?;
            let align = alignment(found.desc.dtype);
            if !address.is_multiple_of(align as u64) {
                let at = found.place.offset;
                return Err(format!("{:?} starts at byte {at}, no multiple of {align}", found.desc));
            }
            Ok(Tensor { address, span: span as u64, desc: found.desc, writable: own.is_writable() })
        };
        values.iter().map(tensor).collect()
    }

    fn row(&mut self, index: usize, op: &Op, inputs: &[Tensor], outputs: &[Tensor]) {
        let (a, out) = (&inputs[0], &outputs[0]);
        let extent = if *op == Op::KvStore { a.extent(0) } else { out.extent(0) };
        let (inner, inner_extent) = a.inner();
        let mut row = RowOp {
            a: a.address,
            out0: out.address,
            a_strides: a.strides(),
            out_strides: out.strides(),
            width: a.width(),
            inner,
            inner_extent,
            ..RowOp::default()
        };
        let mut accesses = vec![a.by_row(false)];
        if let Some(b) = inputs.get(1) {
            row.b = b.address;
            row.b_strides = b.strides();
        }
        let weight = |accesses: &mut Vec<Access>| accesses.extend(inputs.get(1).map(|b| b.whole(false)));
        let second = |accesses: &mut Vec<Access>| accesses.extend(inputs.get(1).map(|b| b.by_row(false)));
        match op {
            Op::RmsNorm { eps } => {
                (row.kind, row.factor) = (ROW_RMS_NORM, *eps);
                weight(&mut accesses);
            }
            Op::Rope(attributes) => {
                row.kind = ROW_ROPE;
                let table = self.ropes.iter().find(|table| table.attributes == *attributes);
                row.b = self.step + table.map_or(0, |table| table.offset);
            }
            Op::KvStore => {
                row.kind = ROW_KV_STORE;
                row.flags = match out.desc.dtype {
                    DType::F32 => CACHE_F32,
                    DType::F16 => CACHE_F16,
                    _ => CACHE_Q8_0,
                };
                row.out_strides = [out.desc.strides[0] as u32, 0, 0];
            }
            Op::Route(route) => {
                row.kind = ROW_ROUTE;
                row.out1 = outputs[1].address;
                (row.inner, row.inner_extent) = (route.used as u32, 1);
                (row.width_b, row.groups_used) = (route.groups as u32, route.groups_used as u32);
                row.factor = route.scale;
                let flag = |set: bool, bit: u32| if set { bit } else { 0 };
                row.flags = flag(route.gating == Gating::Softmax, ROUTE_SOFTMAX)
                    | flag(route.renormalise, ROUTE_RENORMALISE);
                weight(&mut accesses);
            }
            Op::SwiGlu | Op::Add => {
                row.kind = if *op == Op::Add { ROW_ADD } else { ROW_SWI_GLU };
                second(&mut accesses);
            }
            Op::CombineExperts => {
                row.kind = ROW_COMBINE;
                second(&mut accesses);
            }
            Op::Concat => {
                (row.kind, row.width_b) = (ROW_CONCAT, inputs[1].width());
                second(&mut accesses);
            }
            Op::SelectRows => {
                row.kind = ROW_SELECT;
                (row.flags, row.width_b) = extent_words(a.extent(0));
                accesses = vec![a.whole(false), inputs[1].by_row(false)];
            }
            Op::Cast { .. } => {
                row.kind = ROW_CAST;
                let flag = |tensor: &Tensor, bit: u32| if tensor.desc.dtype == DType::F16 { bit } else { 0 };
                row.flags = flag(a, CAST_FROM_F16) | flag(out, CAST_TO_F16);
                // A vector is one row.
                if a.desc.shape.rank() == 1 {
                    self.pieces.push(Piece {
                        op: index,
                        kind: Kind::Row { op: row, extent: Extent::Fixed(1) },
                        accesses: vec![a.whole(false), out.whole(true)],
                    });
                    return;
                }
            }
            _ => unreachable!("{} does not work row by row", op.kind()),
        }
        for (number, output) in outputs.iter().enumerate() {
            let whole = *op == Op::KvStore && number == 0;
            accesses.push(if whole { output.whole(true) } else { output.by_row(true) });
        }
        self.pieces.push(Piece { op: index, kind: Kind::Row { op: row, extent }, accesses });
    }

    fn embed(&mut self, index: usize, inputs: &[Tensor], out: &Tensor) {
        let (table, ids) = (&inputs[0], &inputs[1]);
        let (extent, fixed_count) = extent_words(out.extent(0));
        let push = EmbedPush {
            step: self.step,
            table: table.address,
            ids: ids.address,
            y: out.address,
            row_bytes: table.desc.strides[0] as u32,
            width: table.width(),
            vocabulary: table.fixed(0),
            extent,
            fixed_count,
            padding: 0,
        };
        let shader = Shader::simple(
            &format!("embed_{}", name_of(table.desc.dtype)),
            self.tuning.row_threads(&self.capacity),
        );
        let groups = [count_of(out.extent(0), 1, 1), Count::Fixed(1), Count::Fixed(1)];
        self.pieces.push(Piece {
            op: index,
            kind: Kind::Alone {
                shader,
                push: bytemuck::bytes_of(&push).to_vec(),
                groups,
                cut: Cut::Never,
                helps: false,
            },
            accesses: vec![table.whole(false), ids.whole(false), out.whole(true)],
        });
    }

    fn product(&mut self, index: usize, inputs: &[Tensor], out: &Tensor, precision: Precision) {
        let (w, x) = (&inputs[0], &inputs[1]);
        let rank = w.desc.shape.rank();
        let (m, k) = (w.fixed(rank - 2), w.width());
        let (extent, fixed_count) = extent_words(out.extent(0));
        let mut job = ProductJob {
            w: w.address,
            x: x.address,
            y: out.address,
            m,
            k,
            w_row: w.desc.strides[rank - 2] as u32,
            w_batch: if rank == 3 { w.desc.strides[0] as u32 } else { 0 },
            x_row: x.stride(0),
            y_row: out.stride(0),
            used: 1,
            matrices: 1,
            extent,
            fixed_count,
            // Not null also where there is none: a driver may load before it knows whether it should.
            ids: self.step,
            order: self.step,
            ..ProductJob::default()
        };
        let full = self.capacity.full_step();
        let mut accesses = vec![w.whole(false), x.whole(false), out.whole(true)];
        let (mut batches, columns) = (1, out.extent(0).at(&full));
        let mut grouped = None;
        if let Some(ids) = inputs.get(2) {
            job.used = ids.fixed(1);
            job.matrices = w.fixed(0);
            job.y_choice = m;
            job.x_choice = if x.desc.shape.rank() == 3 { x.stride(1) } else { 0 };
            let pairs = columns * job.used as usize;
            job.ids = ids.address;
            if full.rows > 1 && pairs >= 8 {
                let list = self.group(index, ids, &job, pairs);
                accesses.push(Access {
                    span: list.address..list.address + list.bytes,
                    write: false,
                    rows: None,
                });
                (job.order, job.order_tiles) = (list.address, list.tiles);
                grouped = Some(list);
            }
            accesses.push(ids.whole(false));
        } else if rank == 3 {
            batches = w.fixed(0);
            job.x_batch = x.stride(1);
            job.y_batch = m;
        }
        let rows = m as usize * batches as usize;
        let (width, tiles) = match grouped {
            Some(list) => match out.extent(0) {
                Extent::Rows => (list.width, Count::Rows(job.used, list.width, job.matrices)),
                _ => (list.width, Count::Fixed(list.tiles)),
            },
            None => {
                // Few pairs seldom meet at an expert: each reads its own.
                let width = if inputs.len() == 2 { self.tuning.columns(columns, rows) } else { 1 };
                (width, count_of(out.extent(0), job.used, width))
            }
        };
        // Beside a float weight activations stay f32; 16 bits are not worth arithmetic of their own.
        let exact = precision != Precision::Default || !w.desc.dtype.is_quantized();
        let mut shape = self.tuning.product(width, tiles.at(&full) as usize, rows, k, exact);
        shape.constants.push(u32::from(x.together(shape.together)));
        let shader = Shader {
            name: format!("product_{}_{}", shape.kernel, name_of(w.desc.dtype)),
            constants: shape.constants,
            wide: self.tuning.loads_wide(w.desc.dtype) && w.loads_wide(),
            whole_subgroups: shape.whole_subgroups,
        };
        let kind = Kind::Product { shader, job, batches, tile_rows: shape.rows, tiles };
        self.pieces.push(Piece { op: index, kind, accesses });
    }

    /// The list of pairs by expert; made once for each value of ids.
    fn group(&mut self, index: usize, ids: &Tensor, job: &ProductJob, pairs: usize) -> Grouped {
        let lies = ids.address..ids.address + ids.span;
        let known = self.groups.iter().find(|list| list.ids == lies && list.experts == job.matrices);
        if let Some(known) = known {
            return known.clone();
        }
        let matrices = job.matrices.max(1) as usize;
        let width = self.tuning.columns(pairs / matrices, matrices * job.m as usize).max(2);
        let tiles = pairs.div_ceil(width as usize) + (job.matrices as usize).min(pairs);
        let bytes = 4 * (1 + 3 * tiles + pairs) as u64;
        let address = self.reserve(bytes);
        let list = Grouped { ids: lies, experts: job.matrices, address, bytes, tiles: tiles as u32, width };
        let push = GroupPush {
            step: self.step,
            ids: ids.address,
            order: list.address,
            used: job.used,
            experts: job.matrices,
            width,
            order_tiles: list.tiles,
            extent: job.extent,
            fixed_count: job.fixed_count,
        };
        let shader = Shader::simple("group", self.tuning.row_threads(&self.capacity));
        self.pieces.push(Piece {
            op: index,
            kind: Kind::Alone {
                shader,
                push: bytemuck::bytes_of(&push).to_vec(),
                groups: [Count::Fixed(1); 3],
                cut: Cut::Never,
                helps: true,
            },
            accesses: vec![
                ids.whole(false),
                Access { span: list.address..list.address + bytes, write: true, rows: None },
            ],
        });
        self.groups.push(list.clone());
        list
    }

    fn attention(&mut self, index: usize, inputs: &[Tensor], out: &Tensor, scale: f32, latent: u32) {
        let (q, cache) = (&inputs[0], &inputs[1]);
        let heads = q.fixed(1);
        let capacity = self.capacity;
        let shape = self.tuning.attention(heads, q.width(), latent, &capacity);
        let chunks = (capacity.kv_len as u64).div_ceil(u64::from(shape.chunk)) as u32;
        let mut push = AttentionPush {
            step: self.step,
            q: q.address,
            cache: cache.address,
            y: out.address,
            q_row: q.stride(0),
            q_head: q.stride(1),
            heads,
            width: q.width(),
            latent,
            cache_row: cache.desc.strides[0] as u32,
            chunk: shape.chunk,
            chunks,
            scale,
            rows: u32::MAX,
            ..AttentionPush::default()
        };
        let mut accesses = vec![q.whole(false), cache.whole(false)];
        let partial = if chunks > 1 {
            let bytes =
                4 * capacity.rows as u64 * u64::from(heads) * u64::from(chunks) * u64::from(latent + 2);
            self.partials = self.partials.max(bytes.next_multiple_of(64));
            push.partial = self.scratch.address;
            Some(push.partial..push.partial + bytes)
        } else {
            None
        };
        match &partial {
            Some(span) => accesses.push(Access { span: span.clone(), write: true, rows: None }),
            None => accesses.push(out.whole(true)),
        }
        let wide = self.tuning.loads_wide(cache.desc.dtype) && cache.loads_wide();
        // Four quants lie together anyhow, as elements are counted from the start of a row.
        let fours = (wide || cache.desc.dtype.is_quantized())
            && latent.is_multiple_of(4)
            && q.width().is_multiple_of(4);
        let mut constants = shape.constants;
        constants.extend([q.together(shape.together), fours].map(u32::from));
        let shader = Shader {
            name: format!("{}_{}", shape.kernel, name_of(cache.desc.dtype)),
            constants,
            wide,
            whole_subgroups: true,
        };
        let across = if chunks > 1 { Count::KvLen(shape.chunk) } else { Count::Fixed(1) };
        let groups = [Count::Fixed(heads.div_ceil(shape.heads)), Count::Rows(1, 1, 0), across];
        self.pieces.push(Piece {
            op: index,
            kind: Kind::Alone {
                shader,
                push: bytemuck::bytes_of(&push).to_vec(),
                groups,
                cut: Cut::Rows {
                    first: offset_of!(AttentionPush, first_row),
                    count: offset_of!(AttentionPush, rows),
                    rows: capacity.rows as u32,
                },
                helps: false,
            },
            accesses,
        });
        let Some(span) = partial else { return };
        let merge = MergePush {
            step: self.step,
            partial: span.start,
            y: out.address,
            heads,
            latent,
            chunk: shape.chunk,
            chunks,
        };
        let shader = Shader::simple("attention_merge", self.tuning.row_threads(&self.capacity));
        let groups = [Count::Rows(heads, 1, 0), Count::Fixed(1), Count::Fixed(1)];
        self.pieces.push(Piece {
            op: index,
            kind: Kind::Alone {
                shader,
                push: bytemuck::bytes_of(&merge).to_vec(),
                groups,
                cut: Cut::Never,
                helps: true,
            },
            accesses: vec![Access { span, write: false, rows: None }, out.whole(true)],
        });
    }

    /// The address of so many bytes for a list.
    fn reserve(&mut self, bytes: u64) -> u64 {
        let start = self.lists;
        self.lists = (start + bytes).next_multiple_of(64);
        self.scratch.address + self.scratch.partials + start
    }
}
