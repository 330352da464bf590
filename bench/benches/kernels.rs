//! Matrix products of the CPU device, each a program of one operation: `cargo bench -p bench --bench kernels`.
//!
//! One row is decode (bytes of weights per second are the figure), many rows are prefill (elements are
//! multiply-accumulates). The matrices, 2048 × 2048 for each format, do not all fit into a cache; one alone does.

use backend_api::{
    BufferRequest, BufferUsage, Capacity, DType, Device, Discard, Extent, Op, Place, Precision, Program,
    ProgramDesc, ProgramOp, ProgramValue, Shape, Step, TensorDesc,
};
use backend_cpu::{CpuDevice, CpuOptions};
use bench::synth::blocks::{Random, Weights};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const OUTPUTS: usize = 2048;
const INPUTS: usize = 2048;
const MATRICES: usize = 32;
const ROWS: usize = 256;

/// A program that multiplies the same rows with each of several matrices.
fn program(device: &CpuDevice, dtype: DType) -> Box<dyn Program> {
    let mut random = Random::new(0, dtype.name());
    let weights = Weights::new(dtype, 0.0, 0.02, &mut random);
    let w = TensorDesc::new(dtype, Shape::fixed(&[OUTPUTS, INPUTS]));
    let x = TensorDesc::new(DType::F32, Shape::new(&[Extent::Rows, INPUTS.into()]));
    let y = TensorDesc::new(DType::F32, Shape::new(&[Extent::Rows, OUTPUTS.into()]));
    let full = Step { rows: ROWS, past: 0, outputs: 0 };
    let mut buffers = Vec::new();
    let mut values = Vec::new();
    let mut add = |desc: TensorDesc, name: &str, usage: BufferUsage, bytes: Option<&[u8]>| {
        let size = desc.span_bytes(&full);
        let buffer = device.allocate(&BufferRequest { name: name.to_owned(), size, usage }).unwrap();
        if let Some(bytes) = bytes {
            device.write(&buffer, 0, bytes).unwrap();
        }
        buffers.push(buffer);
        values.push(ProgramValue { desc, place: Place { buffer: buffers.len() - 1, offset: 0 } });
        values.len() - 1
    };
    let rows: Vec<u8> = (0..ROWS * INPUTS).flat_map(|_| random.normal().to_le_bytes()).collect();
    let x = add(x, "x", BufferUsage::Scratch, Some(&rows));
    let y = add(y, "y", BufferUsage::Scratch, None);
    let mut bytes = vec![0; w.span_bytes(&full)];
    let ops = (0..MATRICES)
        .map(|index| {
            weights.fill(&mut bytes, &mut random);
            let w = add(w, "w", BufferUsage::Weights, Some(&bytes));
            let op = Op::MatMul { precision: Precision::Default };
            ProgramOp { name: format!("matmul {index}"), op, inputs: vec![w, x], outputs: vec![y] }
        })
        .collect();
    let capacity = Capacity { rows: ROWS, outputs: 0, kv_len: ROWS };
    let name = dtype.name().to_owned();
    device.compile(ProgramDesc { name, capacity, buffers, values, ops }).unwrap()
}

fn matmul(criterion: &mut Criterion) {
    let device = CpuDevice::new(CpuOptions::from_env().unwrap()).unwrap();
    println!("{}", device.info().description);
    for rows in [1, ROWS] {
        let mut group = criterion.benchmark_group(format!("matmul, {rows} rows"));
        group.sample_size(10);
        for dtype in DType::WEIGHTS {
            let mut program = program(&device, dtype);
            let step = Step { rows, past: 0, outputs: 0 };
            group.throughput(if rows == 1 {
                Throughput::Bytes((MATRICES * OUTPUTS * dtype.row_bytes(INPUTS)) as u64)
            } else {
                Throughput::Elements((MATRICES * OUTPUTS * INPUTS * rows) as u64)
            });
            group.bench_function(BenchmarkId::from_parameter(dtype), |bencher| {
                bencher.iter(|| program.run(black_box(&step), &mut Discard).unwrap());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, matmul);
criterion_main!(benches);
