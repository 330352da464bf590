//! Single operations on each device that is compiled in and there, each a program of its own: `cargo bench -p bench
//! --bench kernels --features vulkan -- 'vulkan0.*attention'` (what follows `--` picks some by their names).
//!
//! Matrix products: one row is decode (bytes of weights per second are the figure), many rows are prefill (elements
//! are multiply-accumulates). The matrices, 2048 × 2048 for each format, do not all fit into a cache; one alone does.
//! Attention: at the shape of DeepSeek-V2-Lite, over a cache of [`CACHED`] rows (elements are multiply-accumulates).

use backend_api::{
    BufferRequest, BufferUsage, Capacity, DType, Device, Discard, Extent, Op, Place, Precision, Program,
    ProgramDesc, ProgramOp, ProgramValue, Shape, Step, TensorDesc,
};
use bench::synth::blocks::{Random, Weights};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::{hint::black_box, sync::Arc};

const OUTPUTS: usize = 2048;
const INPUTS: usize = 2048;
const MATRICES: usize = 32;
const ROWS: usize = 256;

const HEADS: usize = 16;
const WIDTH: usize = 576;
const LATENT: usize = 512;
const CACHED: usize = 1024;

fn devices() -> Vec<Arc<dyn Device>> {
    #[allow(unused_mut, reason = "without features")]
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    #[cfg(feature = "cpu")]
    {
        let options = backend_cpu::CpuOptions::from_env().unwrap();
        devices.push(Arc::new(backend_cpu::CpuDevice::new(options).unwrap()));
    }
    #[cfg(feature = "vulkan")]
    match backend_vulkan::VulkanDevice::open(0) {
        Ok(device) => devices.push(Arc::new(device)),
        Err(error) => println!("without vulkan0: {error}"),
    }
    for device in &devices {
        println!("{}: {}", device.info().name, device.info().description);
    }
    devices
}

/// A program in the making.
struct Builder<'a> {
    device: &'a dyn Device,
    capacity: Capacity,
    random: Random,
    desc: ProgramDesc,
}

impl<'a> Builder<'a> {
    fn new(device: &'a dyn Device, capacity: Capacity) -> Self {
        let desc = ProgramDesc {
            name: "bench".to_owned(),
            capacity,
            buffers: Vec::new(),
            values: Vec::new(),
            ops: Vec::new(),
            results: Vec::new(),
        };
        Builder { device, capacity, random: Random::new(0, "kernels"), desc }
    }

    /// A tensor of random numbers, in a buffer of its own.
    fn tensor(&mut self, dtype: DType, shape: Shape, usage: BufferUsage) -> usize {
        let desc = TensorDesc::new(dtype, shape);
        let capacity = self.capacity;
        let full = Step { rows: capacity.rows, past: capacity.kv_len - capacity.rows, outputs: 0 };
        let size = desc.span_bytes(&full);
        let name = format!("tensor {}", self.desc.values.len());
        let buffer = self.device.allocate(&BufferRequest { name, size, usage }).unwrap();
        let mut bytes = vec![0; size];
        Weights::new(dtype, 0.0, 0.02, &mut self.random).fill(&mut bytes, &mut self.random);
        self.device.write(&buffer, 0, &bytes).unwrap();
        self.desc.buffers.push(buffer);
        let place = Place { buffer: self.desc.buffers.len() - 1, offset: 0 };
        self.desc.values.push(ProgramValue { desc, place });
        self.desc.values.len() - 1
    }

    fn op(&mut self, op: Op, inputs: Vec<usize>, output: usize) {
        let name = format!("{} {}", op.kind(), self.desc.ops.len());
        self.desc.ops.push(ProgramOp { name, op, inputs, outputs: vec![output] });
    }

    fn compile(self) -> Box<dyn Program> {
        self.device.compile(self.desc).unwrap()
    }
}

/// A program that multiplies the same rows with each of several matrices.
fn products(device: &dyn Device, dtype: DType) -> Box<dyn Program> {
    let mut builder = Builder::new(device, Capacity { rows: ROWS, outputs: 0, kv_len: ROWS });
    let x = Shape::new(&[Extent::Rows, INPUTS.into()]);
    let y = Shape::new(&[Extent::Rows, OUTPUTS.into()]);
    let x = builder.tensor(DType::F32, x, BufferUsage::Scratch);
    let y = builder.tensor(DType::F32, y, BufferUsage::Scratch);
    for _ in 0..MATRICES {
        let w = builder.tensor(dtype, Shape::fixed(&[OUTPUTS, INPUTS]), BufferUsage::Weights);
        builder.op(Op::MatMul { precision: Precision::Default }, vec![w, x], y);
    }
    builder.compile()
}

fn attention(device: &dyn Device, cache: DType, rows: usize) -> Box<dyn Program> {
    let mut builder = Builder::new(device, Capacity { rows, outputs: 0, kv_len: CACHED });
    let q = Shape::new(&[Extent::Rows, HEADS.into(), WIDTH.into()]);
    let y = Shape::new(&[Extent::Rows, HEADS.into(), LATENT.into()]);
    let q = builder.tensor(DType::F32, q, BufferUsage::Scratch);
    let y = builder.tensor(DType::F32, y, BufferUsage::Scratch);
    let cache = builder.tensor(cache, Shape::fixed(&[CACHED, WIDTH]), BufferUsage::State);
    let scale = 1.0 / (WIDTH as f32).sqrt();
    builder.op(Op::LatentAttention { scale, latent: LATENT }, vec![q, cache], y);
    builder.compile()
}

/// Times a program, which is built only if its name was picked.
fn time(
    criterion: &mut Criterion,
    group: String,
    id: DType,
    throughput: Throughput,
    step: Step,
    program: impl Fn() -> Box<dyn Program>,
) {
    let mut group = criterion.benchmark_group(group);
    group.sample_size(10);
    group.throughput(throughput);
    group.bench_function(BenchmarkId::from_parameter(id), |bencher| {
        let mut program = program();
        bencher.iter(|| program.run(black_box(&step), &mut Discard).unwrap());
    });
    group.finish();
}

fn kernels(criterion: &mut Criterion) {
    for device in devices() {
        let name = &device.info().name;
        for rows in [1, ROWS] {
            for dtype in DType::WEIGHTS {
                let throughput = if rows == 1 {
                    Throughput::Bytes((MATRICES * OUTPUTS * dtype.row_bytes(INPUTS)) as u64)
                } else {
                    Throughput::Elements((MATRICES * OUTPUTS * INPUTS * rows) as u64)
                };
                let step = Step { rows, past: 0, outputs: 0 };
                let group = format!("{name}, matmul, {rows} rows");
                time(criterion, group, dtype, throughput, step, || products(&*device, dtype));
            }
        }
        for rows in [1, 32] {
            for cache in [DType::F32, DType::F16, DType::Q8_0] {
                let past = CACHED - rows;
                let seen: usize = (0..rows).map(|row| past + row + 1).sum();
                let throughput = Throughput::Elements((seen * HEADS * (WIDTH + LATENT)) as u64);
                let step = Step { rows, past, outputs: 0 };
                let group = format!("{name}, attention, {rows} rows");
                time(criterion, group, cache, throughput, step, || attention(&*device, cache, rows));
            }
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
