//! The device's own promises: errors instead of foreign memory, the same bits whatever way bytes take, one submission for
//! a decode step, and a lost device that is an error.

mod common;

use backend_api::{
    BufferRef, BufferRequest, BufferUsage, Capacity, DType, Device, DeviceError, Discard, Extent, HostBytes,
    Observer, Op, Place, Precision, Program, ProgramDesc, ProgramOp, ProgramResult, ProgramValue, Shape,
    Step, TensorDesc, format,
};
use backend_vulkan::{DriverCall, Failure, VulkanDevice, VulkanError, VulkanOptions};
use std::{fs, sync::Arc};

const K: usize = 256;
const M: usize = 40;

fn request(name: &str, size: usize, usage: BufferUsage) -> BufferRequest {
    BufferRequest { name: name.to_owned(), size, usage }
}

/// Values that no two places have alike.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 50.0 - 1.0).collect()
}

fn encoded(dtype: DType, rows: usize) -> Vec<u8> {
    let row_bytes = dtype.row_bytes(K);
    let mut bytes = vec![0; rows * row_bytes];
    for (row, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
        format::encode(dtype, &numbers(K, row), out);
    }
    bytes
}

fn weights(device: &dyn Device) -> BufferRef {
    let bytes = encoded(DType::Q4_K, M);
    let weights = device.allocate(&request("weights", bytes.len(), BufferUsage::Weights)).expect("room");
    device.write(&weights, 0, &bytes).expect("written");
    weights
}

/// `y = W x`, and `z = y + y` after it.
fn product(device: &dyn Device, weights: BufferRef, scratch: BufferRef, rows: usize) -> Box<dyn Program> {
    compile(device, weights, scratch, rows, rows, 0).expect("a program")
}

fn compile(
    device: &dyn Device,
    weights: BufferRef,
    scratch: BufferRef,
    rows: usize,
    capacity: usize,
    offset: usize,
) -> Result<Box<dyn Program>, DeviceError> {
    let value = |buffer, offset, dtype, shape| ProgramValue {
        desc: TensorDesc::new(dtype, shape),
        place: Place { buffer, offset },
    };
    let y = 4 * rows * K;
    let result = |offset| {
        let place = Place { buffer: 1, offset };
        ProgramResult { place, extent: Extent::Rows, row: 4 * M, pitch: 4 * M }
    };
    let program = ProgramDesc {
        name: "test".to_owned(),
        capacity: Capacity { rows: capacity, outputs: 1, kv_len: 64 },
        buffers: vec![weights, scratch],
        values: vec![
            value(0, offset, DType::Q4_K, Shape::fixed(&[M, K])),
            value(1, 0, DType::F32, Shape::rows(&[K])),
            value(1, y, DType::F32, Shape::rows(&[M])),
            value(1, y + 4 * rows * M, DType::F32, Shape::rows(&[M])),
        ],
        ops: vec![
            ProgramOp {
                name: "y".to_owned(),
                op: Op::MatMul { precision: Precision::Default },
                inputs: vec![0, 1],
                outputs: vec![2],
            },
            ProgramOp { name: "z".to_owned(), op: Op::Add, inputs: vec![2, 2], outputs: vec![3] },
        ],
        results: [y, y + 4 * rows * M].map(result).to_vec(),
    };
    device.compile(program)
}

fn scratch(device: &dyn Device, rows: usize) -> BufferRef {
    let size = 4 * rows * (K + 2 * M);
    device.allocate(&request("scratch", size, BufferUsage::Scratch)).expect("room")
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[derive(Default)]
struct Counter {
    submissions: Vec<usize>,
}

impl Observer for Counter {
    fn submitted(&mut self, submissions: usize, _dispatches: usize) {
        self.submissions.push(submissions);
    }
}

/// The bits of `z` for a batch, with weights copied or imported.
fn run(device: &dyn Device, import: bool, counter: &mut Counter) -> Vec<u8> {
    let bytes = encoded(DType::Q4_K, M);
    let rows = 3;
    let shared: HostBytes = Arc::new(PageAligned::new(&bytes));
    let imported = if import { device.import(&shared).expect("an answer") } else { None };
    let weights = imported.unwrap_or_else(|| {
        let buffer = device.allocate(&request("weights", bytes.len(), BufferUsage::Weights)).expect("room");
        device.write(&buffer, 0, &bytes).expect("written");
        buffer
    });
    let scratch = scratch(device, rows);
    device.write(&scratch, 0, &bytes_of(&numbers(rows * K, 5))).expect("written");
    let mut program = product(device, weights, scratch.clone(), rows);
    for _ in 0..2 {
        program.run(&Step { rows, past: 0, outputs: 1 }, counter).expect("it runs");
    }
    let mut found = vec![0; 4 * rows * M];
    device.read(&scratch, 4 * rows * (K + M), &mut found).expect("read");
    found
}

/// Bytes that start at a page, as those of a file's map do.
struct PageAligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl PageAligned {
    fn new(content: &[u8]) -> Self {
        // The page that the last byte lies in is whole, too.
        let mut bytes = vec![0; content.len() + 3 * 4096];
        let start = bytes.as_ptr().align_offset(4096);
        bytes[start..start + content.len()].copy_from_slice(content);
        PageAligned { bytes, start, len: content.len() }
    }
}

impl AsRef<[u8]> for PageAligned {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

#[test]
fn bytes_are_the_same_whatever_way_they_take() {
    let Some((_watch, direct)) = common::open(VulkanOptions::default()) else { return };
    let (_staged, staged) =
        common::open(VulkanOptions { always_stage: true, ..VulkanOptions::default() }).expect("as before");
    let mut counter = Counter::default();
    let results = [
        run(&direct, false, &mut counter),
        run(&direct, true, &mut counter),
        run(&staged, false, &mut counter),
        run(&staged, true, &mut counter),
    ];
    assert!(results.iter().all(|bits| *bits == results[0] && bits.iter().any(|byte| *byte != 0)));
    // One submission for each run of a program.
    assert_eq!(counter.submissions, [1; 8]);
}

/// So that whoever asked copies it. Nor is it asked for again.
#[test]
fn what_a_driver_refuses_to_import_is_not_imported() {
    let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
    let page = || -> HostBytes { Arc::new(PageAligned::new(&[1; 4096])) };
    let [taken, refused] = [page(), page()];
    if device.import(&taken).expect("an answer").is_none() {
        return println!("skipped: nothing is imported");
    }
    device.fail(DriverCall::Import, 0, Failure::OutOfMemory);
    for _ in 0..2 {
        assert!(device.import(&refused).expect("an answer").is_none());
    }
    assert!(device.import(&taken).expect("an answer").is_some(), "that was one failure");
}

/// Where memory is the device's own, a step's inputs and outputs travel with the program that they are for.
#[test]
fn small_copies_take_no_submission() {
    let Some((_watch, device)) =
        common::open(VulkanOptions { always_stage: true, ..VulkanOptions::default() })
    else {
        return;
    };
    let weights = weights(&device);
    let scratch = scratch(&device, 1);
    let programs = [0, 1].map(|_| product(&device, weights.clone(), scratch.clone(), 1));
    let [mut program, mut other] = programs;
    let step = Step { rows: 1, past: 0, outputs: 1 };
    let input = |seed| bytes_of(&numbers(K, seed));
    let (y, z) = (4 * K, 4 * (K + M));
    let read = |at: usize| {
        let mut found = vec![0; 4 * M];
        device.read(&scratch, at, &mut found).expect("read");
        found
    };
    let first = device.submissions();
    let mut results = Vec::new();
    for seed in 0..4 {
        // Written over before it is read: the later of two writes counts.
        device.write(&scratch, 0, &input(seed + 100)).expect("written");
        device.write(&scratch, 4, &input(seed)[4..]).expect("written");
        device.write(&scratch, 0, &input(seed)[..8]).expect("written");
        program.run(&step, &mut Discard).expect("it runs");
        results.push((read(y), read(z)));
        assert_eq!((read(y), read(z)), results[seed], "what was brought can be read again");
    }
    assert_eq!(device.submissions() - first, 4);
    let twice = |y: &[u8], z: &[u8]| floats(y).iter().zip(floats(z)).all(|(y, z)| y + y == z && *y != 0.0);
    assert!(results.iter().all(|(y, z)| twice(y, z)));
    assert!((1..4).all(|seed| results[seed] != results[seed - 1]));
    // What is written over what was brought counts, and so does what another program makes there.
    device.write(&scratch, y + 4, &[7; 4]).expect("written");
    assert_eq!(read(y)[..12], [&results[3].0[..4], &[7; 4], &results[3].0[8..12]].concat());
    device.write(&scratch, 0, &input(0)).expect("written");
    other.run(&step, &mut Discard).expect("it runs");
    assert_eq!((read(y), read(z)), results[0]);
    device.write(&scratch, 0, &input(1)).expect("written");
    program.run(&step, &mut Discard).expect("it runs");
    let brought = device.submissions();
    assert_eq!(
        (read(y), read(z), device.submissions()),
        (results[1].0.clone(), results[1].1.clone(), brought)
    );
    device.read(&scratch, y, &mut []).expect("nothing is read");
    // What is no result is read all the same.
    let mut found = vec![0; 4 * K];
    device.read(&scratch, 0, &mut found).expect("read");
    assert_eq!((found, device.submissions()), (input(1), brought + 1));
    // Once the program is gone, its buffers' names may be others'.
    drop((program, other));
    drop(scratch);
    let again = self::scratch(&device, 1);
    let mut found = vec![1; 4 * M];
    device.read(&again, z, &mut found).expect("read");
    assert!(found.iter().all(|byte| *byte == 0), "a new buffer is zero");
}

/// Writes that wait for a submission keep no buffer, and there may be any number of them.
#[test]
fn small_writes_wait_in_order() {
    let Some((_watch, device)) =
        common::open(VulkanOptions { always_stage: true, ..VulkanOptions::default() })
    else {
        return;
    };
    let size = 3 << 20;
    let buffer = device.allocate(&request("buffer", size, BufferUsage::Scratch)).expect("room");
    let mut expected = vec![0u8; size];
    let mut write = |at: usize, len: usize, value: u8| {
        expected[at..at + len].fill(value);
        device.write(&buffer, at, &vec![value; len]).expect("written");
    };
    // More of them than travel together, in number and in bytes, around a large one; many over each other.
    (0..600).for_each(|i| write(5 * i, 7, i as u8));
    (0..5).for_each(|i| write(400_000 * i, 900_000, 100 + i as u8));
    write(1000, 2 << 20, 77);
    (0..3).for_each(|i| write(999_000 * i, 999_999, 200 + i as u8));
    let gone = device.allocate(&request("gone", 64, BufferUsage::Scratch)).expect("room");
    device.write(&gone, 0, &[1; 64]).expect("written");
    let kept = Arc::downgrade(&gone);
    drop(gone);
    assert!(kept.upgrade().is_none(), "what waits to be written keeps no buffer");
    let mut found = vec![0; size];
    device.read(&buffer, 0, &mut found).expect("read");
    assert!(found == expected);
}

#[test]
fn large_copies_go_through_staging_in_pieces() {
    let Some((_watch, device)) =
        common::open(VulkanOptions { always_stage: true, ..VulkanOptions::default() })
    else {
        return;
    };
    let size = (20 << 20) + 12_345;
    let buffer = device.allocate(&request("large", size, BufferUsage::Weights)).expect("room");
    let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    device.write(&buffer, 0, &bytes).expect("written");
    device.write(&buffer, 9 << 20, &[7; 1000]).expect("written over");
    let mut found = vec![0; size];
    device.read(&buffer, 0, &mut found).expect("read");
    let expected = |i: usize| if (9 << 20..(9 << 20) + 1000).contains(&i) { 7 } else { bytes[i] };
    assert!((0..size).all(|i| found[i] == expected(i)));
}

#[test]
fn a_long_prefill_is_cut_and_a_decode_step_is_not() {
    for always_stage in [false, true] {
        // Half a second of work, on paper.
        let options =
            VulkanOptions { always_stage, megamacs_per_second: Some(4000), ..VulkanOptions::default() };
        let Some((_watch, device)) = common::open(options) else { return };
        a_long_prefill_is_cut(&device);
    }
}

fn a_long_prefill_is_cut(device: &VulkanDevice) {
    let weights = weights(device);
    let many = 200_000;
    let large = scratch(device, many);
    let step = Step { rows: 1, past: 0, outputs: 1 };
    let result = |capacity: usize| {
        let mut counter = Counter::default();
        let compiled = compile(device, weights.clone(), large.clone(), many, capacity, 0);
        let mut program = compiled.expect("a program");
        let mut found = [vec![0; 4 * M], vec![0; 4 * M]];
        // The second time, what is read comes with the last piece, and what is written goes with the first.
        for (found, seed) in found.iter_mut().zip([3, 4]) {
            device.write(&large, 0, &bytes_of(&numbers(K, seed))).expect("written");
            program.run(&step, &mut counter).expect("it runs");
            device.read(&large, 4 * many * (K + M), found).expect("read");
            device.write(&large, 4 * many * (K + M), &[0; 4 * M]).expect("cleared");
        }
        assert_ne!(found[0], found[1]);
        (counter.submissions[0], found.concat())
    };
    let (whole, expected) = result(1);
    let (pieces, found) = result(many);
    assert_eq!(whole, 1);
    assert!((6..=7).contains(&pieces), "{pieces} submissions of 0.1 s for 0.51 s and an addition");
    let near = floats(&expected).iter().zip(floats(&found)).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(near && floats(&found).iter().any(|v| *v != 0.0), "other numbers in pieces");
}

/// Rows of a table that is too long for the windows through which a file's map is read, but not for one of its own.
#[test]
fn what_crosses_windows_is_read_in_place() {
    let options = VulkanOptions { largest_buffer: Some(16 << 20), ..VulkanOptions::default() };
    let Some((_watch, device)) = common::open(options) else { return };
    let bytes: Vec<u8> = (0..5u32 << 20).flat_map(|i| (0x3f80_0000 | i).to_le_bytes()).collect();
    let map: HostBytes = Arc::new(PageAligned::new(&bytes));
    let Some(imported) = device.import(&map).expect("an answer") else {
        println!("skipped: nothing is imported");
        return;
    };
    let (offset, n) = ((3 << 19) + 1024, 15 << 10);
    let embed = |rows: usize| {
        let ids = [0, 1, n as u32 - 1];
        let scratch = device.allocate(&request("scratch", 4096, BufferUsage::Scratch)).expect("room");
        device.write(&scratch, 0, &ids.map(u32::to_le_bytes).concat()).expect("written");
        let value = |buffer, offset, dtype, shape| ProgramValue {
            desc: TensorDesc::new(dtype, shape),
            place: Place { buffer, offset },
        };
        let mut program = device.compile(ProgramDesc {
            name: "rows of a table".to_owned(),
            capacity: Capacity { rows: 3, outputs: 1, kv_len: 3 },
            buffers: vec![imported.clone(), scratch.clone()],
            values: vec![
                value(0, offset, DType::F32, Shape::fixed(&[rows, K])),
                value(1, 0, DType::I32, Shape::rows(&[])),
                value(1, 64, DType::F32, Shape::rows(&[K])),
            ],
            ops: vec![ProgramOp {
                name: "rows".to_owned(),
                op: Op::EmbedRows,
                inputs: vec![0, 1],
                outputs: vec![2],
            }],
            results: Vec::new(),
        })?;
        program.run(&Step { rows: 3, past: 0, outputs: 1 }, &mut Discard)?;
        let mut found = vec![0; 3 * 4 * K];
        device.read(&scratch, 64, &mut found)?;
        for (id, found) in ids.iter().zip(found.chunks(4 * K)) {
            let row = offset + 4 * K * *id as usize;
            assert!(found == &bytes[row..row + 4 * K], "row {id}");
        }
        Ok::<_, DeviceError>(())
    };
    embed(n).expect("15 MiB");
    let error = embed(n + 1024).expect_err("16 MiB, and not from a page on").to_string();
    assert!(error.contains("more than this device reads in place (16773120)"), "{error}");
}

/// Denormals, which scales of blocks often are, and what is no number too: drivers may flush the first where they convert.
#[test]
fn every_half_is_what_its_bits_say() {
    let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
    let n = 256;
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let table = device.allocate(&request("table", halves.len(), BufferUsage::Weights)).expect("room");
    device.write(&table, 0, &halves).expect("written");
    let (ids, cast, embedded) = (2 * n * n, 2 * n * n + 4 * n, 6 * n * n + 4 * n);
    let scratch =
        device.allocate(&request("scratch", embedded + 4 * n * n, BufferUsage::Scratch)).expect("room");
    device.write(&scratch, 0, &halves).expect("written");
    let all: Vec<u8> = (0..n as u32).flat_map(u32::to_le_bytes).collect();
    device.write(&scratch, ids, &all).expect("written");
    let value = |buffer, offset, dtype, shape| ProgramValue {
        desc: TensorDesc::new(dtype, shape),
        place: Place { buffer, offset },
    };
    let op = |op, inputs: &[usize], output| ProgramOp {
        name: "halves".to_owned(),
        op,
        inputs: inputs.to_vec(),
        outputs: vec![output],
    };
    let mut program = device
        .compile(ProgramDesc {
            name: "halves".to_owned(),
            capacity: Capacity { rows: n, outputs: 1, kv_len: n },
            buffers: vec![table, scratch.clone()],
            values: vec![
                value(0, 0, DType::F16, Shape::fixed(&[n, n])),
                value(1, ids, DType::I32, Shape::rows(&[])),
                value(1, embedded, DType::F32, Shape::rows(&[n])),
                value(1, 0, DType::F16, Shape::rows(&[n])),
                value(1, cast, DType::F32, Shape::rows(&[n])),
            ],
            ops: vec![op(Op::EmbedRows, &[0, 1], 2), op(Op::Cast { to: DType::F32 }, &[3], 4)],
            results: Vec::new(),
        })
        .expect("a program");
    program.run(&Step { rows: n, past: 0, outputs: 1 }, &mut Discard).expect("it runs");
    for offset in [embedded, cast] {
        let mut found = vec![0; 4 * n * n];
        device.read(&scratch, offset, &mut found).expect("read");
        for (bits, found) in (0..=u16::MAX).zip(floats(&found)) {
            let expected = format::half(bits.to_le_bytes());
            let same = if expected.is_nan() { found.is_nan() } else { expected.to_bits() == found.to_bits() };
            // Embedding adds an offset of nothing, to which a zero has no sign.
            assert!(
                same || (expected == 0.0 && found == 0.0),
                "{bits:04x}: expected {expected:e}, found {found:e}"
            );
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
}

#[test]
fn what_a_caller_owes_is_checked_before_a_shader_reaches_for_it() {
    let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
    let (_other, other) = common::open(VulkanOptions::default()).expect("as before");
    let size = M * DType::Q4_K.row_bytes(K);
    let weights = |device: &VulkanDevice, size| {
        device.allocate(&request("w", size, BufferUsage::Weights)).expect("room")
    };
    let own = scratch(&device, 2);
    let error = |weights, scratch, rows, capacity, offset| {
        let compiled = compile(&device, weights, scratch, rows, capacity, offset);
        compiled.err().expect("a refusal").to_string()
    };
    let found = error(weights(&device, size - 1), own.clone(), 2, 2, 0);
    assert!(found.contains("are beyond a buffer of 5759 bytes"), "{found}");
    let found = error(weights(&device, size + 8), own.clone(), 2, 2, 2);
    assert!(found.contains("starts at byte 2, no multiple of 4"), "{found}");
    let found = error(weights(&device, size), own.clone(), 2, 3, 0);
    assert!(found.contains("overlaps") || found.contains("beyond a buffer"), "{found}");
    let found = error(weights(&other, size), own.clone(), 2, 2, 0);
    assert!(found.contains("a buffer of another device was passed"), "{found}");
    let mut program = compile(&device, weights(&device, size), own.clone(), 2, 2, 0).expect("a program");
    let beyond =
        program.run(&Step { rows: 3, past: 0, outputs: 1 }, &mut Discard).expect_err("too many rows");
    assert!(beyond.to_string().contains("is beyond its Capacity"), "{beyond}");
    let mut outside = [0; 8];
    let error = device.read(&own, own.size() - 4, &mut outside).expect_err("outside").to_string();
    assert!(error.contains("beyond a buffer"), "{error}");
    assert!(device.write(&own, usize::MAX, &outside).is_err());
}

#[test]
fn no_memory_names_what_it_was_for() {
    let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
    let refused = |size: usize| {
        let allocated = device.allocate(&request("blk.3.ffn_up", size, BufferUsage::Weights));
        match allocated.expect_err("no room") {
            DeviceError::OutOfMemory { what, requested, available, .. } => {
                assert!(what.contains("blk.3.ffn_up") && requested == size as u64, "{what}: {requested}");
                available
            }
            other => panic!("{other}"),
        }
    };
    for size in [usize::MAX, isize::MAX as usize, 1 << 45] {
        refused(size);
    }
    // As the driver says it.
    device.fail(DriverCall::Allocate, 0, Failure::OutOfMemory);
    assert!(refused(1000) > 0);
    device.allocate(&request("blk.3.ffn_up", 1000, BufferUsage::Weights)).expect("room");
}

/// However it is lost: it is told once by who meets it first, then everything says so, and nothing hangs or is left behind.
#[test]
fn a_lost_device_is_an_error_from_then_on() {
    for always_stage in [false, true] {
        for (call, failure) in [
            (DriverCall::Submit, Failure::Lost),
            (DriverCall::Wait, Failure::Lost),
            (DriverCall::Wait, Failure::Timeout),
        ] {
            let options = VulkanOptions { always_stage, ..VulkanOptions::default() };
            let Some((_watch, device)) = common::open(options) else { return };
            a_lost_device_is_an_error(&device, call, failure);
        }
    }
}

fn a_lost_device_is_an_error(device: &VulkanDevice, call: DriverCall, failure: Failure) {
    let weights =
        device.allocate(&request("w", M * DType::Q4_K.row_bytes(K), BufferUsage::Weights)).expect("room");
    let scratch = scratch(device, 1);
    let mut program = product(device, weights, scratch.clone(), 1);
    let step = Step { rows: 1, past: 0, outputs: 1 };
    program.run(&step, &mut Discard).expect("it runs");
    // The first wait is for the run before, which is done.
    device.fail(call, usize::from(call == DriverCall::Wait), failure);
    let lost = |result: Result<(), DeviceError>| matches!(result, Err(DeviceError::Lost { .. }));
    assert!(lost(program.run(&step, &mut Discard)), "{call:?} {failure:?}");
    assert!(lost(program.run(&step, &mut Discard)), "{call:?} {failure:?}, again");
    assert!(lost(device.read(&scratch, 0, &mut [0; 4])));
    assert!(lost(device.write(&scratch, 0, &[0; 4])));
    assert!(lost(device.allocate(&request("more", 4, BufferUsage::Scratch)).map(|_| ())));
    assert!(lost(compile(device, scratch.clone(), scratch, 1, 1, 0).map(|_| ())));
}

/// A submission that fails, although the device is there, is an error of its run alone.
#[test]
fn a_submission_that_fails_leaves_the_device_as_it_was() {
    for always_stage in [false, true] {
        let options =
            VulkanOptions { always_stage, megamacs_per_second: Some(1), ..VulkanOptions::default() };
        let Some((_watch, device)) = common::open(options) else { return };
        a_submission_that_fails(&device);
    }
}

fn a_submission_that_fails(device: &VulkanDevice) {
    let weights = weights(device);
    let rows = 64;
    let scratch = scratch(device, rows);
    let mut program = product(device, weights, scratch.clone(), rows);
    let step = Step { rows, past: 0, outputs: 1 };
    let mut run = |seed: usize| {
        // Where it goes along with the first piece, it has to be there when that is tried again.
        device.write(&scratch, 0, &bytes_of(&numbers(rows * K, seed))).expect("written");
        let result = program.run(&step, &mut Discard);
        let mut found = vec![0; 4 * rows * M];
        device.read(&scratch, 4 * rows * (K + M), &mut found).expect("read");
        result.map(|()| found)
    };
    let expected = [5, 6].map(|seed| run(seed).expect("it runs"));
    assert_ne!(expected[0], expected[1]);
    // The first of several pieces, or a later one.
    for after in 0..6 {
        device.fail(DriverCall::Submit, after, Failure::OutOfMemory);
        let error = run(5).expect_err("a failed piece").to_string();
        assert!(error.contains("vkQueueSubmit"), "{error}");
        let seed = 5 + after % 2;
        assert_eq!(run(seed).expect("it runs again"), expected[seed - 5]);
    }
}

#[test]
fn a_damaged_pipeline_cache_is_ignored_with_a_notice() {
    let folder = std::env::temp_dir().join(format!("fathom-damaged-{}", std::process::id()));
    let options = VulkanOptions { cache_folder: Some(folder.clone()), ..VulkanOptions::default() };
    let open = || VulkanDevice::open_with(0, &options);
    let device = match open() {
        Ok(device) => device,
        Err(error) => return common::skip(&error),
    };
    assert_eq!(device.notice(), None);
    let mut counter = Counter::default();
    let expected = run(&device, false, &mut counter);
    drop(device);
    let files: Vec<_> =
        fs::read_dir(&folder).expect("a cache").map(|entry| entry.expect("an entry").path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    fs::write(&files[0], b"not what was written").expect("a writable folder");
    let device = open().expect("as before");
    assert!(device.notice().is_some_and(|notice| notice.contains("damaged")), "{:?}", device.notice());
    assert_eq!(run(&device, false, &mut counter), expected);
    drop(device);
    assert_eq!(open().expect("as before").notice(), None, "it was written anew");
    fs::remove_dir_all(&folder).expect("a folder of ours");
}

#[test]
fn every_device_opens_as_it_was_listed() {
    let listed = match VulkanDevice::enumerate() {
        Ok(listed) => listed,
        Err(missing @ (VulkanError::NoLoader(_) | VulkanError::NoDevice(_))) => {
            return common::skip(&missing);
        }
        Err(other) => panic!("{other}"),
    };
    for (index, listing) in listed.iter().enumerate() {
        match (VulkanDevice::open(index), &listing.refused) {
            (Ok(device), None) => {
                let info = device.info();
                assert_eq!(info.name, format!("vulkan{index}"));
                assert_eq!((&info.name, &info.description), (&listing.info.name, &listing.info.description));
                assert!(info.memory_total > 0 && info.memory_free <= info.memory_total);
            }
            (Err(VulkanError::Refused { lacks, .. }), Some(listed)) => assert_eq!(lacks, *listed),
            (opened, refused) => panic!("{opened:?}, listed as refused: {refused:?}"),
        }
    }
    let past = VulkanDevice::open(1000).expect_err("no such device").to_string();
    assert!(past.contains(&format!("this machine has {} Vulkan device(s)", listed.len())), "{past}");
}
