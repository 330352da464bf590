//! The device's own promises: errors instead of foreign memory, and the same bits for any number of threads.

use backend_api::{
    BufferRef, BufferRequest, BufferUsage, Capacity, DType, Device, DeviceError, Discard, Extent, Gating,
    HostBytes, Observer, Op, OpEvent, Place, Precision, ProgramDesc, ProgramOp, ProgramValue, RopeAttributes,
    RouteAttributes, Shape, Step, TensorDesc, format,
};
use backend_cpu::{CpuDevice, CpuError, CpuOptions, Level};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

const CAPACITY: Capacity = Capacity { rows: 24, outputs: 24, kv_len: 64 };

fn device(threads: usize) -> CpuDevice {
    CpuDevice::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).expect("a CPU")
}

fn request(size: usize) -> BufferRequest {
    BufferRequest { name: "test".into(), size, usage: BufferUsage::Scratch }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A program whose values all lie in one buffer, one behind the other.
struct Sketch<'a> {
    device: &'a dyn Device,
    capacity: Capacity,
    values: Vec<ProgramValue>,
    ops: Vec<ProgramOp>,
    end: usize,
}

impl<'a> Sketch<'a> {
    fn new(device: &'a dyn Device) -> Self {
        Self::with(device, CAPACITY)
    }

    fn with(device: &'a dyn Device, capacity: Capacity) -> Self {
        Sketch { device, capacity, values: Vec::new(), ops: Vec::new(), end: 0 }
    }

    fn value(&mut self, desc: TensorDesc) -> usize {
        let place = Place { buffer: 0, offset: self.end };
        self.end = (self.end + desc.span_bytes(&self.capacity.full_step())).next_multiple_of(64);
        self.values.push(ProgramValue { desc, place });
        self.values.len() - 1
    }

    /// Appends an operation and returns its first output.
    fn op(&mut self, op: Op, inputs: &[usize]) -> usize {
        let descs: Vec<TensorDesc> = inputs.iter().map(|&input| self.values[input].desc).collect();
        let outputs = op.infer(&descs).expect("fitting inputs");
        let outputs: Vec<usize> = outputs.into_iter().map(|desc| self.value(desc)).collect();
        self.push(op, inputs, &outputs);
        outputs[0]
    }

    fn push(&mut self, op: Op, inputs: &[usize], outputs: &[usize]) {
        let name = format!("op {}", self.ops.len());
        self.ops.push(ProgramOp { name, op, inputs: inputs.to_vec(), outputs: outputs.to_vec() });
    }

    fn buffer(&self) -> BufferRef {
        self.device.allocate(&request(self.end)).expect("room")
    }

    fn program(&self, buffers: &[BufferRef]) -> ProgramDesc {
        ProgramDesc {
            name: "sketch".into(),
            capacity: self.capacity,
            buffers: buffers.to_vec(),
            values: self.values.clone(),
            ops: self.ops.clone(),
            results: Vec::new(),
        }
    }

    fn write(&self, buffer: &BufferRef, value: usize, bytes: &[u8]) {
        self.device.write(buffer, self.values[value].place.offset, bytes).expect("written");
    }
}

fn f32_rows(rest: &[usize]) -> TensorDesc {
    TensorDesc::new(DType::F32, Shape::rows(rest))
}

/// A layer without its matrix products: every kernel this crate has for single rows and elements.
fn layer(sketch: &mut Sketch<'_>) -> (usize, usize, Vec<usize>) {
    let tokens = sketch.value(TensorDesc::new(DType::I32, Shape::new(&[Extent::Rows])));
    let table = sketch.value(TensorDesc::new(DType::F32, Shape::fixed(&[40, 4 * 640])));
    let weight = sketch.value(TensorDesc::new(DType::F32, Shape::fixed(&[4 * 640])));
    let cache = sketch.value(TensorDesc::new(DType::Q8_0, Shape::fixed(&[64, 4 * 640])));
    let x = sketch.op(Op::EmbedRows, &[table, tokens]);
    let mut y = x;
    for _ in 0..3 {
        let normed = sketch.op(Op::RmsNorm { eps: 1e-6 }, &[y, weight]);
        let heads = sketch.values[normed].place;
        sketch.values.push(ProgramValue { desc: f32_rows(&[4, 640]), place: heads });
        let heads = sketch.values.len() - 1;
        let inverse_frequencies = (0..320).map(|i| 1e4f64.powf(-f64::from(i) / 320.0)).collect();
        let turned = sketch.op(Op::Rope(RopeAttributes { inverse_frequencies, magnitude: 1.0 }), &[heads]);
        let gated = sketch.op(Op::SwiGlu, &[turned, heads]);
        let route = RouteAttributes {
            used: 4,
            gating: Gating::Sigmoid,
            groups: 4,
            groups_used: 2,
            renormalise: true,
            scale: 1.5,
        };
        sketch.op(Op::Route(route), &[normed]);
        let weights = sketch.values.len() - 1;
        let combined = sketch.op(Op::CombineExperts, &[gated, weights]);
        let wide = sketch.op(Op::Concat, &[combined, combined]);
        let wide = sketch.op(Op::Concat, &[wide, wide]);
        sketch.push(Op::Add, &[wide, y], &[wide]);
        sketch.push(Op::KvStore, &[wide], &[cache]);
        y = wide;
    }
    let all = (0..sketch.values.len()).filter(|&value| ![tokens, table, weight].contains(&value)).collect();
    (tokens, table, all)
}

fn fill(sketch: &Sketch<'_>, buffer: &BufferRef, tokens: &[i32]) {
    let numbers = |n: usize| -> Vec<f32> { (0..n).map(|i| ((i * i) as f32 * 0.013).sin()).collect() };
    sketch.write(buffer, 0, &tokens.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>());
    sketch.write(buffer, 1, &bytes_of(&numbers(40 * 4 * 640)));
    sketch.write(buffer, 2, &bytes_of(&numbers(4 * 640)));
}

/// The bytes of all values after feeding 24 tokens in pieces.
fn feed(device: &CpuDevice, pieces: &[usize]) -> Vec<Vec<u8>> {
    let mut sketch = Sketch::new(device);
    let (_, _, results) = layer(&mut sketch);
    let buffer = sketch.buffer();
    feed_sketch(&sketch, &buffer, &results, pieces, |tokens| fill(&sketch, &buffer, tokens))
}

fn feed_sketch(
    sketch: &Sketch<'_>,
    buffer: &BufferRef,
    results: &[usize],
    pieces: &[usize],
    fill: impl Fn(&[i32]),
) -> Vec<Vec<u8>> {
    let device = sketch.device;
    let mut program = device.compile(sketch.program(std::slice::from_ref(buffer))).expect("supported");
    let mut rows: Vec<Vec<u8>> = vec![Vec::new(); results.len()];
    let mut past = 0;
    for &piece in pieces {
        let tokens: Vec<i32> = (past..past + piece).map(|i| (i * 7 % 40) as i32).collect();
        fill(&tokens);
        let step = Step { rows: piece, past, outputs: 0 };
        program.run(&step, &mut Discard).expect("a step");
        for (&value, rows) in results.iter().zip(&mut rows) {
            let ProgramValue { desc, place } = &sketch.values[value];
            let mut bytes = vec![0; desc.span_bytes(&step)];
            device.read(buffer, place.offset, &mut bytes).expect("read");
            if desc.shape.extents()[0] == Extent::Rows {
                rows.extend(bytes);
            } else {
                *rows = bytes;
            }
        }
        past += piece;
    }
    rows
}

#[test]
fn the_same_bits_for_any_threads_and_pieces() {
    let want = feed(&device(1), &[24]);
    assert!(want.iter().all(|bytes| bytes.iter().any(|&byte| byte != 0)));
    for threads in [1, 2, 3, 7] {
        let device = device(threads);
        for pieces in [&[24][..], &[1; 24], &[5, 1, 13, 5]] {
            assert!(feed(&device, pieces) == want, "{threads} threads, {pieces:?}");
        }
    }
}

/// Products of 32-value blocks and K-quants in each precision, experts, and attention over more than a segment.
fn feed_products(device: &CpuDevice, pieces: &[usize]) -> Vec<Vec<u8>> {
    let capacity = Capacity { rows: 300, outputs: 0, kv_len: 300 };
    let mut sketch = Sketch::with(device, capacity);
    let tokens = sketch.value(TensorDesc::new(DType::I32, Shape::new(&[Extent::Rows])));
    let cache = sketch.value(TensorDesc::new(DType::F16, Shape::fixed(&[300, 256])));
    let mut weights = Vec::new();
    let mut weight = |sketch: &mut Sketch<'_>, dtype: DType, extents: &[usize]| {
        let value = sketch.value(TensorDesc::new(dtype, Shape::fixed(extents)));
        weights.push(value);
        value
    };
    let table = weight(&mut sketch, DType::F32, &[40, 512]);
    let (dense, fine) =
        (weight(&mut sketch, DType::Q4_K, &[512, 512]), weight(&mut sketch, DType::Q8_0, &[512, 512]));
    let (router, experts) =
        (weight(&mut sketch, DType::F32, &[8, 512]), weight(&mut sketch, DType::Q5_0, &[8, 512, 512]));
    let (more, kv) =
        (weight(&mut sketch, DType::Q6_K, &[512, 512]), weight(&mut sketch, DType::F16, &[256, 512]));
    let matmul = |precision| Op::MatMul { precision };
    let x = sketch.op(Op::EmbedRows, &[table, tokens]);
    let x = sketch.op(matmul(Precision::Default), &[dense, x]);
    let x = sketch.op(matmul(Precision::Fine), &[fine, x]);
    let x = sketch.op(matmul(Precision::Fine), &[more, x]);
    let scores = sketch.op(matmul(Precision::F32), &[router, x]);
    let route = RouteAttributes {
        used: 2,
        gating: Gating::Softmax,
        groups: 1,
        groups_used: 1,
        renormalise: true,
        scale: 1.0,
    };
    let ids = sketch.op(Op::Route(route), &[scores]);
    let chosen = sketch.values.len() - 1;
    let each = sketch.op(Op::ExpertMatMul { precision: Precision::Default }, &[experts, x, ids]);
    let y = sketch.op(Op::CombineExperts, &[each, chosen]);
    let row = sketch.op(matmul(Precision::Default), &[kv, y]);
    sketch.push(Op::KvStore, &[row], &[cache]);
    let place = sketch.values[y].place;
    sketch.values.push(ProgramValue { desc: f32_rows(&[2, 256]), place });
    let query = sketch.values.len() - 1;
    sketch.op(Op::LatentAttention { scale: 0.1, latent: 192 }, &[query, cache]);
    let buffer = sketch.buffer();
    for (seed, &value) in weights.iter().enumerate() {
        let TensorDesc { dtype, shape, .. } = sketch.values[value].desc;
        let n = shape.fixed_elements().expect("fixed");
        let values: Vec<f32> = (0..n).map(|i| ((i * i + seed) as f32 * 0.013).sin() * 0.1).collect();
        let mut bytes = vec![0; dtype.row_bytes(n)];
        format::encode(dtype, &values, &mut bytes);
        sketch.write(&buffer, value, &bytes);
    }
    let results: Vec<usize> =
        (0..sketch.values.len()).filter(|value| *value != tokens && !weights.contains(value)).collect();
    feed_sketch(&sketch, &buffer, &results, pieces, |ids| {
        sketch.write(&buffer, tokens, &ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>());
    })
}

#[test]
fn products_and_attention_give_the_same_bits_for_any_threads_and_pieces() {
    for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
        let device = |threads| {
            let options = CpuOptions { threads: Some(threads), isa: Some(level), ..CpuOptions::default() };
            CpuDevice::new(options).expect("a CPU")
        };
        let want = feed_products(&device(1), &[300]);
        assert!(want.iter().all(|bytes| bytes.iter().any(|&byte| byte != 0)));
        for (threads, pieces) in
            [(1, vec![1; 300]), (2, vec![300]), (3, vec![7, 1, 250, 42]), (7, vec![299, 1])]
        {
            assert!(
                feed_products(&device(threads), &pieces) == want,
                "{level}, {threads} threads, {pieces:?}"
            );
        }
    }
}

#[test]
fn two_devices_and_two_programs_at_once() {
    let want = feed(&device(1), &[24]);
    let shared = device(2);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| assert!(feed(&shared, &[7, 17]) == want));
            scope.spawn(|| assert!(feed(&device(2), &[20, 4]) == want));
        }
    });
}

#[test]
fn buffers_belong_to_their_device() {
    let (mine, other) = (device(1), device(1));
    let foreign = other.allocate(&request(64)).expect("room");
    let is_foreign = |result| matches!(result, Err(DeviceError::ForeignBuffer { .. }));
    assert!(is_foreign(mine.write(&foreign, 0, &[1])));
    assert!(is_foreign(mine.read(&foreign, 0, &mut [1])));
    let sketch = Sketch::new(&mine);
    assert!(is_foreign(mine.compile(sketch.program(&[foreign])).map(drop)));
}

#[test]
fn reads_and_writes_stay_inside() {
    let cpu = device(1);
    let buffer = cpu.allocate(&request(10)).expect("room");
    cpu.write(&buffer, 3, &[7; 7]).expect("inside");
    let mut bytes = [1; 10];
    cpu.read(&buffer, 0, &mut bytes).expect("inside");
    assert_eq!(bytes, [0, 0, 0, 7, 7, 7, 7, 7, 7, 7]);
    for (offset, len) in [(4, 7), (11, 0), (usize::MAX, 2)] {
        let error = cpu.write(&buffer, offset, &vec![0; len]).expect_err("outside").to_string();
        assert!(error.contains("beyond a buffer of 10 bytes"), "{error}");
        assert!(cpu.read(&buffer, offset, &mut vec![0; len]).is_err());
    }
}

#[test]
fn imported_bytes_are_not_copied_and_not_written() {
    let cpu = device(2);
    let numbers: Vec<f32> = (0..40 * 640).map(|i| i as f32).collect();
    let bytes: HostBytes = Arc::new(bytes_of(&numbers));
    let imported = cpu.import(&bytes).expect("no driver").expect("zero copy");
    assert_eq!((imported.size(), imported.usage()), (40 * 640 * 4, BufferUsage::Weights));
    assert!(cpu.write(&imported, 0, &[1]).expect_err("read only").to_string().contains("only read"));
    let mut back = [0; 8];
    cpu.read(&imported, 4, &mut back).expect("readable");
    assert_eq!(back, (*bytes).as_ref()[4..12]);

    // As a table; and never as an output.
    let mut sketch = Sketch::new(&cpu);
    let table = sketch.value(TensorDesc::new(DType::F32, Shape::fixed(&[4, 640])));
    sketch.end = 0;
    let ids = sketch.value(TensorDesc::new(DType::I32, Shape::new(&[Extent::Rows])));
    let rows = sketch.op(Op::EmbedRows, &[table, ids]);
    for value in [ids, rows] {
        sketch.values[value].place.buffer = 1;
    }
    let buffer = sketch.buffer();
    let buffers = [imported, Arc::clone(&buffer)];
    let mut program = cpu.compile(sketch.program(&buffers)).expect("supported");
    drop(buffers);
    sketch.write(&buffer, ids, &2i32.to_le_bytes());
    program.run(&Step { rows: 1, past: 0, outputs: 0 }, &mut Discard).expect("a step");
    let mut row = vec![0; 640 * 4];
    cpu.read(&buffer, sketch.values[rows].place.offset, &mut row).expect("read");
    assert_eq!(row, bytes_of(&numbers[1280..1920]));

    sketch.values[rows].place = Place { buffer: 0, offset: 0 };
    let imported = cpu.import(&bytes).expect("no driver").expect("zero copy");
    let error =
        cpu.compile(sketch.program(&[imported, buffer])).map(drop).expect_err("read only").to_string();
    assert!(error.contains("imported bytes, which are only read"), "{error}");
}

/// Gives other bytes whenever it is asked.
struct Fickle {
    asked: AtomicUsize,
    bytes: [Vec<u8>; 2],
}

impl AsRef<[u8]> for Fickle {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.asked.fetch_add(1, Ordering::Relaxed) % 2]
    }
}

#[test]
fn imported_bytes_are_asked_for_once() {
    let cpu = device(1);
    let fickle = Fickle { asked: AtomicUsize::new(0), bytes: [vec![1; 8], vec![2; 4096]] };
    let imported = cpu.import(&(Arc::new(fickle) as HostBytes)).expect("no driver").expect("zero copy");
    for _ in 0..2 {
        let mut bytes = [0; 8];
        assert_eq!(imported.size(), 8);
        cpu.read(&imported, 0, &mut bytes).expect("inside");
        assert_eq!(bytes, [1; 8]);
        assert!(cpu.read(&imported, 1, &mut bytes).is_err());
    }
}

#[test]
fn ids_out_of_range_are_an_error_and_the_device_goes_on() {
    for threads in [1, 2] {
        let cpu = device(threads);
        let mut sketch = Sketch::new(&cpu);
        layer(&mut sketch);
        let buffer = sketch.buffer();
        let mut program = cpu.compile(sketch.program(std::slice::from_ref(&buffer))).expect("supported");
        let step = Step { rows: 3, past: 0, outputs: 0 };
        for bad in [-1, 40] {
            fill(&sketch, &buffer, &[1, bad, 2]);
            let error = program.run(&step, &mut Discard).expect_err("a bad id").to_string();
            assert!(error.contains(&format!("embedded id {bad} is not in 0..40")), "{error}");
        }
        fill(&sketch, &buffer, &[1, 39, 2]);
        program.run(&step, &mut Discard).expect("good ids");

        let mut sketch = Sketch::new(&cpu);
        let experts = sketch.value(TensorDesc::new(DType::F32, Shape::fixed(&[3, 4, 4])));
        let x = sketch.value(f32_rows(&[4]));
        let chosen = sketch.value(ids(2));
        sketch.op(Op::ExpertMatMul { precision: Precision::Default }, &[experts, x, chosen]);
        let buffer = sketch.buffer();
        let mut program = cpu.compile(sketch.program(std::slice::from_ref(&buffer))).expect("supported");
        for (bad, fault) in [(2i32, None), (3, Some("expert 3 is not in 0..3")), (-1, Some("expert -1 is"))] {
            let all = [0, 1, bad, 2].map(i32::to_le_bytes).concat();
            sketch.write(&buffer, chosen, &all);
            let outcome = program.run(&Step { rows: 2, past: 0, outputs: 0 }, &mut Discard);
            let error = outcome.err().map(|error| error.to_string());
            assert_eq!(error.is_some(), fault.is_some(), "{error:?}");
            assert!(error.is_none_or(|error| error.contains(fault.unwrap_or_default())));
        }
    }
}

#[test]
fn steps_beyond_the_capacity_are_refused() {
    let cpu = device(1);
    let mut program = cpu.compile(Sketch::new(&cpu).program(&[])).expect("empty programs are programs");
    let at = |rows, past, outputs| Step { rows, past, outputs };
    for step in [at(0, 0, 0), at(24, 40, 24), at(1, 63, 0)] {
        program.run(&step, &mut Discard).expect("inside");
    }
    for step in [at(25, 0, 0), at(1, 64, 0), at(1, 0, 25), at(1, usize::MAX, 0)] {
        let error = program.run(&step, &mut Discard).expect_err("outside").to_string();
        assert!(error.contains("is beyond its Capacity"), "{error}");
    }
}

#[test]
fn programs_that_would_leave_their_buffers_are_refused() {
    let cpu = device(1);
    let sketch = |change: fn(&mut ProgramDesc)| {
        let mut sketch = Sketch::new(&cpu);
        let (a, b) = (sketch.value(f32_rows(&[8])), sketch.value(f32_rows(&[8])));
        sketch.op(Op::SwiGlu, &[a, b]);
        let mut program = sketch.program(&[sketch.buffer()]);
        change(&mut program);
        cpu.compile(program).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(sketch(|_| ()), Ok(()));
    type Change = fn(&mut ProgramDesc);
    let cases: [(Change, &str); 8] = [
        (|program| program.values[2].place.offset += 64, "beyond a buffer"),
        (|program| program.values[0].place.offset = usize::MAX, "beyond a buffer"),
        (|program| program.values[1].place.buffer = 1, "no buffer 1"),
        (|program| program.values[2].place.offset = 32, "overlaps input"),
        (|program| program.values[2].place.offset -= 3, "no multiple of 4"),
        (|program| program.ops[0].inputs[1] = 7, "there is no value 7"),
        // 2⁶⁴ bytes.
        (|program| program.values[0].desc.shape = Shape::fixed(&[1 << 62]), "beyond a buffer"),
        (|program| program.values[0].desc.strides[0] = usize::MAX / 4, "beyond a buffer"),
    ];
    for (change, want) in cases {
        let error = sketch(change).expect_err(want);
        assert!(error.contains(want), "{error}, not {want}");
    }
}

/// What compiling one operation on these values comes to; its outputs lie behind each other unless `lay` says
/// otherwise.
fn compile_one(
    op: Op,
    inputs: &[TensorDesc],
    outputs: &[TensorDesc],
    lay: impl FnOnce(&mut ProgramDesc),
) -> Result<(), String> {
    let cpu = device(1);
    let mut sketch = Sketch::new(&cpu);
    let inputs: Vec<usize> = inputs.iter().map(|desc| sketch.value(*desc)).collect();
    let outputs: Vec<usize> = outputs.iter().map(|desc| sketch.value(*desc)).collect();
    sketch.push(op, &inputs, &outputs);
    let mut program = sketch.program(&[sketch.buffer()]);
    lay(&mut program);
    cpu.compile(program).map(drop).map_err(|error| error.to_string())
}

fn route(used: usize) -> Op {
    let gating = Gating::Sigmoid;
    Op::Route(RouteAttributes { used, gating, groups: 1, groups_used: 1, renormalise: false, scale: 1.0 })
}

fn ids(used: usize) -> TensorDesc {
    TensorDesc::new(DType::I32, Shape::rows(&[used]))
}

#[test]
fn ill_formed_operations_are_refused() {
    let x = f32_rows(&[8]);
    let add = |output| compile_one(Op::Add, &[x, x], &[output], |_| ());
    assert_eq!(add(x), Ok(()));
    let error = add(f32_rows(&[64])).expect_err("wider than its inputs");
    assert!(
        error.contains("cpu cannot run Add: output 0: expected F32[rows, 8], found F32[rows, 64]"),
        "{error}"
    );
    let mut all_in_one = x;
    all_in_one.strides[0] = 0;
    let error = add(all_in_one).expect_err("rows on top of each other");
    assert!(error.contains("found F32[rows, 8] strides [0]"), "{error}");
    let inputs = [TensorDesc::new(DType::F32, Shape::fixed(&[8])), x];
    let error = compile_one(Op::SwiGlu, &inputs[..1], &[x], |_| ()).expect_err("an input short");
    assert!(error.contains("expected 2 inputs, found 1"), "{error}");
}

#[test]
fn caches_hold_what_the_capacity_says() {
    let (row, q) = (f32_rows(&[8]), f32_rows(&[2, 8]));
    let attention = Op::LatentAttention { scale: 1.0, latent: 8 };
    for dtype in [DType::F32, DType::F16, DType::Q8_0] {
        let cache = |rows| TensorDesc::new(dtype, Shape::fixed(&[rows, 8]));
        let both = |rows| {
            let store = compile_one(Op::KvStore, &[row], &[cache(rows)], |_| ());
            [store, compile_one(attention.clone(), &[q, cache(rows)], &[q], |_| ())]
        };
        assert_eq!(both(CAPACITY.kv_len), [Ok(()), Ok(())]);
        for outcome in both(CAPACITY.kv_len - 1) {
            let error = outcome.expect_err("a row short");
            assert!(error.contains("expected a cache of 64 rows or more, found"), "{error}");
        }
    }
}

#[test]
fn outputs_do_not_overlap() {
    let lay = |overlap: usize| {
        compile_one(route(2), &[f32_rows(&[8])], &[ids(2), f32_rows(&[2])], |program| {
            program.values[2].place.offset = program.values[1].place.offset + 24 * 2 * 4 - overlap;
        })
    };
    assert_eq!(lay(0), Ok(()));
    for overlap in [4, 24 * 2 * 4] {
        let error = lay(overlap).expect_err("a byte of two outputs");
        assert!(error.contains("overlaps output I32[rows, 2]"), "{error}");
    }
}

/// Extents whose products wrap around to little: memory between kernels would be too small.
#[test]
fn sizes_beyond_counting_are_out_of_memory() {
    let no_room = |outcome: Result<(), String>| {
        let error = outcome.expect_err("no machine has it");
        assert!(error.starts_with("cpu: no memory for"), "{error}");
    };
    let rope = Op::Rope(RopeAttributes { inverse_frequencies: [0.5; 4].into(), magnitude: 1.0 });
    let none = f32_rows(&[0, 8]);
    no_room(compile_one(rope, &[none], &[none], |program| program.capacity.rows = 1 << 59));

    let mut experts = TensorDesc::new(DType::F32, Shape::fixed(&[usize::MAX / 12 + 1, 1, 1]));
    experts.strides[0] = 0;
    let op = Op::ExpertMatMul { precision: Precision::Default };
    no_room(compile_one(op, &[experts, f32_rows(&[1]), ids(2)], &[f32_rows(&[2, 1])], |_| ()));

    // Not between kernels, but of each thread.
    let mut scores = f32_rows(&[8]);
    scores.shape = Shape::rows(&[1 << 60]);
    let outputs = [ids(2), f32_rows(&[2])];
    no_room(compile_one(route(2), &[f32_rows(&[8])], &outputs, |program| {
        program.capacity.rows = 0;
        program.values[0].desc = scores;
    }));
}

#[test]
fn the_observer_hears_every_operation() {
    #[derive(Default)]
    struct Log(Vec<(String, String, u64, u64)>);
    impl Observer for Log {
        fn wants_ops(&self) -> bool {
            true
        }
        fn op(&mut self, event: OpEvent<'_>) {
            assert!(event.time.is_some());
            self.0.push((event.name.into(), event.op.into(), event.bytes, event.macs));
        }
    }
    for threads in [1, 2] {
        let cpu = device(threads);
        let mut sketch = Sketch::new(&cpu);
        layer(&mut sketch);
        let buffer = sketch.buffer();
        let mut program = cpu.compile(sketch.program(std::slice::from_ref(&buffer))).expect("supported");
        fill(&sketch, &buffer, &[3, 4]);
        let mut log = Log::default();
        program.run(&Step { rows: 2, past: 0, outputs: 0 }, &mut log).expect("a step");
        let names: Vec<&str> = log.0.iter().map(|event| event.1.as_str()).collect();
        let each =
            ["RmsNorm", "Rope", "SwiGlu", "Route", "CombineExperts", "Concat", "Concat", "Add", "KvStore"];
        assert_eq!(names, [&["EmbedRows"][..], &each, &each, &each].concat());
        assert_eq!(log.0[0], ("op 0".into(), "EmbedRows".into(), 2 * 4 * 640 * 4, 0));
        assert_eq!(log.0[5].3, 2 * 4 * 640, "the combination multiplies what it reads");
    }
}

#[test]
fn options_are_validated() {
    let open = |threads| CpuDevice::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() });
    assert!(matches!(open(0), Err(CpuError::Threads { found: 0, .. })));
    assert!(matches!(open(1 << 20), Err(CpuError::Threads { .. })));
    for level in Level::ALL {
        let options = CpuOptions { isa: Some(level), name: "host".into(), threads: Some(2) };
        match CpuDevice::new(options) {
            Ok(cpu) => {
                assert!(level.is_available());
                assert_eq!((cpu.isa(), cpu.threads(), cpu.info().name.as_str()), (level, 2, "host"));
                let description = &cpu.info().description;
                assert!(
                    description.contains(level.name()) && description.contains("2 threads"),
                    "{description}"
                );
                assert!(cpu.info().batch_invariant);
            }
            Err(error) => {
                assert!(!level.is_available());
                assert!(error.to_string().contains(level.name()), "{error}");
            }
        }
    }
}

#[test]
fn too_much_memory_is_an_error_with_its_name() {
    let wish = BufferRequest { name: "the moon".into(), size: usize::MAX / 2, usage: BufferUsage::State };
    let error = device(1).allocate(&wish).expect_err("no machine has it");
    assert!(matches!(&error, DeviceError::OutOfMemory { what, .. } if what == "the moon"), "{error}");
}
