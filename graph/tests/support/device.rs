//! A device of a few lines: F32 alone, one loop per operation, in the words of `backend_api::Op`. It is one source of
//! truth for what a graph computes, whichever way it is cut.

use backend_api::{
    Buffer, BufferRef, BufferRequest, BufferUsage, DType, Device, DeviceError, DeviceInfo, DeviceKind,
    Gating, HostBytes, Observer, Op, OpDesc, OpEvent, OpKind, Program, ProgramDesc, ProgramOp, Step,
    Unsupported,
};
use std::{
    any::Any,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

pub struct TestDevice {
    info: DeviceInfo,
    lacks: Vec<OpKind>,
    imports: bool,
    /// How often memory was asked for, or a program.
    pub made: Arc<AtomicUsize>,
}

impl TestDevice {
    pub fn new(name: &str) -> Self {
        let info = DeviceInfo {
            name: name.to_owned(),
            description: "a test device".to_owned(),
            kind: DeviceKind::Cpu,
            memory_total: 1 << 30,
            memory_free: 1 << 30,
            batch_invariant: true,
        };
        TestDevice { info, lacks: Vec::new(), imports: false, made: Arc::default() }
    }

    pub fn without(mut self, ops: &[OpKind]) -> Self {
        self.lacks.extend(ops);
        self
    }

    pub fn importing(mut self) -> Self {
        self.imports = true;
        self
    }
}

pub struct TestBuffer {
    bytes: Mutex<Vec<u8>>,
    usage: BufferUsage,
    pub imported: bool,
}

impl fmt::Debug for TestBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} bytes", self.usage, self.size())
    }
}

impl Buffer for TestBuffer {
    fn size(&self) -> usize {
        self.bytes.lock().expect("no panic").len()
    }

    fn usage(&self) -> BufferUsage {
        self.usage
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn open(buffer: &BufferRef) -> &TestBuffer {
    buffer.as_any().downcast_ref().expect("a buffer of a test device")
}

impl Device for TestDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        let kind = op.op.kind();
        let tensors = || op.inputs.iter().chain(&op.outputs);
        let no = |reason: &str| {
            Err(Unsupported { device: self.info.name.clone(), op: kind, reason: reason.to_owned() })
        };
        if self.lacks.contains(&kind) {
            return no("it was made without");
        }
        if tensors().any(|tensor| !matches!(tensor.dtype, DType::F32 | DType::I32)) {
            return no("it knows F32 only");
        }
        Ok(())
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        self.made.fetch_add(1, Ordering::Relaxed);
        // Scratch that nobody wrote is NaN when it is read.
        let fill = if request.usage == BufferUsage::Scratch { 0xff } else { 0 };
        let bytes = Mutex::new(vec![fill; request.size]);
        Ok(Arc::new(TestBuffer { bytes, usage: request.usage, imported: false }))
    }

    fn import(&self, bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        if !self.imports {
            return Ok(None);
        }
        let bytes = Mutex::new((**bytes).as_ref().to_vec());
        Ok(Some(Arc::new(TestBuffer { bytes, usage: BufferUsage::Weights, imported: true })))
    }

    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        open(to).bytes.lock().expect("no panic")[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        into.copy_from_slice(&open(from).bytes.lock().expect("no panic")[offset..offset + into.len()]);
        Ok(())
    }

    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        self.made.fetch_add(1, Ordering::Relaxed);
        for op in &program.ops {
            let desc = program.describe(op);
            desc.check().expect("the caller owes checked operations");
            self.supports(&desc)?;
        }
        Ok(Box::new(TestProgram { program }))
    }
}

struct TestProgram {
    program: ProgramDesc,
}

impl Program for TestProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        for op in &self.program.ops {
            self.apply(op, step);
            let name = op.name.as_str();
            observer.op(OpEvent { name, op: "", bytes: 0, macs: 0, time: None });
        }
        Ok(())
    }
}

/// A tensor's extents and elements, ids as floats.
#[derive(Clone)]
struct Tensor {
    extents: Vec<usize>,
    data: Vec<f32>,
}

impl Tensor {
    fn inner(&self) -> usize {
        *self.extents.last().expect("an extent")
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.inner())
    }
}

impl TestProgram {
    /// Offsets of all elements of a value, in order.
    fn offsets(&self, value: usize, step: &Step) -> (Vec<usize>, Vec<usize>) {
        let value = &self.program.values[value];
        let extents = value.desc.shape.at(step);
        let mut offsets = vec![value.place.offset];
        for (axis, &extent) in extents.iter().enumerate() {
            let stride = if axis + 1 == extents.len() { 4 } else { value.desc.strides[axis] };
            offsets = offsets.iter().flat_map(|base| (0..extent).map(move |i| base + i * stride)).collect();
        }
        (extents, offsets)
    }

    fn read(&self, value: usize, step: &Step) -> Tensor {
        let (extents, offsets) = self.offsets(value, step);
        let ProgramValueParts { buffer, integer } = self.parts(value);
        let bytes = buffer.bytes.lock().expect("no panic");
        let data = offsets.iter().map(|&at| {
            let word = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
            if integer { i32::from_ne_bytes(word) as f32 } else { f32::from_ne_bytes(word) }
        });
        Tensor { extents, data: data.collect() }
    }

    fn write(&self, value: usize, step: &Step, data: &[f32]) {
        let (_, offsets) = self.offsets(value, step);
        let ProgramValueParts { buffer, integer } = self.parts(value);
        assert_eq!(offsets.len(), data.len());
        let mut bytes = buffer.bytes.lock().expect("no panic");
        for (at, x) in offsets.into_iter().zip(data) {
            let word = if integer { (*x as i32).to_ne_bytes() } else { x.to_ne_bytes() };
            bytes[at..at + 4].copy_from_slice(&word);
        }
    }

    fn parts(&self, value: usize) -> ProgramValueParts<'_> {
        let value = &self.program.values[value];
        let buffer = open(&self.program.buffers[value.place.buffer]);
        ProgramValueParts { buffer, integer: value.desc.dtype == DType::I32 }
    }

    fn apply(&self, op: &ProgramOp, step: &Step) {
        if let Op::KvStore = op.op {
            let row = self.read(op.inputs[0], step);
            let width = row.inner() * 4;
            let place = self.program.values[op.outputs[0]].place;
            let mut bytes = open(&self.program.buffers[place.buffer]).bytes.lock().expect("no panic");
            for (i, x) in row.data.iter().enumerate() {
                let at = place.offset + step.past * width + i * 4;
                bytes[at..at + 4].copy_from_slice(&x.to_ne_bytes());
            }
            return;
        }
        let inputs: Vec<Tensor> = op.inputs.iter().map(|&v| self.read(v, step)).collect();
        let outputs = compute(&op.op, &inputs, step);
        for (value, data) in op.outputs.iter().zip(outputs) {
            self.write(*value, step, &data);
        }
    }
}

struct ProgramValueParts<'a> {
    buffer: &'a TestBuffer,
    integer: bool,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn compute(op: &Op, x: &[Tensor], step: &Step) -> Vec<Vec<f32>> {
    let rows = |tensor: &Tensor| tensor.rows().map(<[f32]>::to_vec).collect::<Vec<_>>();
    match op {
        Op::EmbedRows | Op::SelectRows => {
            let (table, ids) = (&x[0], &x[1]);
            let row = table.data.len() / table.extents[0];
            vec![ids.data.iter().flat_map(|&id| table.data[id as usize * row..][..row].to_vec()).collect()]
        }
        Op::RmsNorm { eps } => {
            let norm = |row: &[f32]| {
                let scale = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
                row.iter().zip(&x[1].data).map(|(a, w)| a * scale * w).collect::<Vec<_>>()
            };
            vec![x[0].rows().flat_map(norm).collect()]
        }
        Op::MatMul { .. } => {
            vec![x[1].rows().flat_map(|row| x[0].rows().map(|w| dot(w, row)).collect::<Vec<_>>()).collect()]
        }
        Op::HeadMatMul { .. } => {
            let (heads, m) = (x[0].extents[0], x[0].extents[1]);
            let w = rows(&x[0]);
            let one = |(i, row): (usize, &[f32])| {
                let head = i % heads;
                w[head * m..(head + 1) * m].iter().map(|w| dot(w, row)).collect::<Vec<_>>()
            };
            vec![x[1].rows().enumerate().flat_map(one).collect()]
        }
        Op::Rope(rope) => {
            let per_row = x[0].data.len() / x[0].extents[0].max(1) / x[0].inner();
            let turn = |(i, row): (usize, &[f32])| {
                let position = (step.past + i / per_row) as f64;
                let pairs = row.chunks_exact(2).zip(rope.inverse_frequencies.iter());
                let turned = pairs.flat_map(|(pair, frequency)| {
                    let (sin, cos) = (position * frequency).sin_cos();
                    let (sin, cos) = (sin as f32 * rope.magnitude, cos as f32 * rope.magnitude);
                    [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos]
                });
                turned.collect::<Vec<_>>()
            };
            vec![x[0].rows().enumerate().flat_map(turn).collect()]
        }
        Op::LatentAttention { scale, latent } => {
            let heads = x[0].extents[1];
            let cache = rows(&x[1]);
            let attend = |(i, q): (usize, &[f32])| {
                let seen = &cache[..step.past + i / heads + 1];
                let scores: Vec<f32> = seen.iter().map(|k| dot(q, k) * scale).collect();
                let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|s| (s - top).exp()).collect();
                let sum: f32 = weights.iter().sum();
                (0..*latent)
                    .map(|j| weights.iter().zip(seen).map(|(w, v)| w * v[j]).sum::<f32>() / sum)
                    .collect::<Vec<_>>()
            };
            vec![x[0].rows().enumerate().flat_map(attend).collect()]
        }
        Op::Route(route) => {
            let (mut ids, mut weights) = (Vec::new(), Vec::new());
            for row in x[0].rows() {
                let p: Vec<f32> = match route.gating {
                    Gating::Sigmoid => row.iter().map(|s| 1.0 / (1.0 + (-s).exp())).collect(),
                    Gating::Softmax => {
                        let sum: f32 = row.iter().map(|s| s.exp()).sum();
                        row.iter().map(|s| s.exp() / sum).collect()
                    }
                };
                let biased = |i: usize| p[i] + x.get(1).map_or(0.0, |bias| bias.data[i]);
                let mut best: Vec<usize> = (0..p.len()).collect();
                best.sort_by(|&a, &b| biased(b).total_cmp(&biased(a)).then(a.cmp(&b)));
                best.truncate(route.used);
                let sum: f32 = if route.renormalise { best.iter().map(|&i| p[i]).sum() } else { 1.0 };
                weights.extend(best.iter().map(|&i| p[i] / sum * route.scale));
                ids.extend(best.iter().map(|&i| i as f32));
            }
            vec![ids, weights]
        }
        Op::ExpertMatMul { .. } => {
            let (m, used) = (x[0].extents[1], x[2].inner());
            let (w, inputs) = (rows(&x[0]), rows(&x[1]));
            let one = |(i, &id): (usize, &f32)| {
                let row = if x[1].extents.len() == 3 { &inputs[i] } else { &inputs[i / used] };
                let id = id as usize;
                w[id * m..(id + 1) * m].iter().map(|w| dot(w, row)).collect::<Vec<_>>()
            };
            vec![x[2].data.iter().enumerate().flat_map(one).collect()]
        }
        Op::SwiGlu => {
            let one = |(gate, up): (&f32, &f32)| gate / (1.0 + (-gate).exp()) * up;
            vec![x[0].data.iter().zip(&x[1].data).map(one).collect()]
        }
        Op::CombineExperts => {
            let (used, d) = (x[0].extents[1], x[0].extents[2]);
            let y = rows(&x[0]);
            let one = |(i, weights): (usize, &[f32])| {
                (0..d).map(|j| (0..used).map(|k| y[i * used + k][j] * weights[k]).sum()).collect::<Vec<f32>>()
            };
            vec![x[1].rows().enumerate().flat_map(one).collect()]
        }
        Op::Add => vec![x[0].data.iter().zip(&x[1].data).map(|(a, b)| a + b).collect()],
        Op::Concat => vec![x[0].rows().zip(x[1].rows()).flat_map(|(a, b)| [a, b].concat()).collect()],
        Op::Cast { .. } => vec![x[0].data.clone()],
        Op::KvStore => unreachable!("handled before"),
    }
}
