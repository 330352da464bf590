//! A device with a fault of choice: each is caught, and by the check that is there for it.

use backend_api::{
    BufferRef, BufferRequest, DType, Device, DeviceError, DeviceInfo, HostBytes, Observer, Op, OpDesc,
    OpEvent, OpKind, Precision, Program, ProgramDesc, ProgramValue, Step, Unsupported, format,
};
use backend_conformance::{Check, Failure, ReferenceDevice, Report, examine, run_filtered};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// No fault: beside quantised weights, activations are rounded to 8 bits, as the precision allows.
    RoundsToEightBits,
    /// They are rounded to 7 bits.
    RoundsToSevenBits,
    /// One element of the output is far off.
    WrongValue,
    /// All elements are 3 % off, as with a wrong scale: each within the worst case of 8-bit activations.
    WrongScale,
    /// The last element is left as it was.
    LeavesOneOut,
    /// The result is added to what was there.
    Accumulates,
    WritesBeforeItsOutput,
    WritesBehindItsOutput,
    /// A zero multiple of what lies behind the first input is added to the output.
    ReadsBehindItsInput,
    ChangesItsInput,
    /// Every second run differs in one bit.
    ForgetsWhatItSaid,
    /// Steps of several rows differ in one bit from those of one.
    DependsOnTheBatch,
    /// Only the first run computes; later ones give its result.
    KeepsTheFirstResult,
    /// What is NaN becomes 0.
    HidesNan,
    /// Where one element is NaN, all are.
    SpreadsNan,
    /// Programs of several operations differ in one bit from the same ones alone.
    FusesWrongly,
    /// A store goes on behind its rows.
    StoresTooMuch,
    RejectsWithoutReason,
    RejectsButCompiles,
    AcceptsButFails,
    AcceptsButCannotRun,
    Panics,
    DoesNotZero,
    TellsNothing,
    TellsNoWork,
    TellsTwice,
    ReadsBeyondBuffers,
}

struct Broken {
    inner: Arc<ReferenceDevice>,
    fault: Fault,
    /// Where the device does not claim batch invariance.
    info: DeviceInfo,
}

struct BrokenProgram {
    inner: Box<dyn Program>,
    device: Arc<ReferenceDevice>,
    desc: ProgramDesc,
    fault: Fault,
    runs: usize,
    kept: Vec<u8>,
}

impl Broken {
    fn new(fault: Fault, batch_invariant: bool) -> Self {
        let inner = Arc::new(ReferenceDevice::new());
        let info = DeviceInfo { batch_invariant, ..inner.info().clone() };
        Broken { inner, fault, info }
    }

    fn unsupported(&self, op: OpKind) -> Unsupported {
        let reason = match self.fault {
            Fault::RejectsWithoutReason => "",
            _ => "it is broken",
        };
        Unsupported { device: "broken".to_owned(), op, reason: reason.to_owned() }
    }
}

impl Device for Broken {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        match self.fault {
            Fault::RejectsWithoutReason | Fault::RejectsButCompiles => Err(self.unsupported(op.op.kind())),
            _ => Ok(()),
        }
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        let buffer = self.inner.allocate(request)?;
        if self.fault == Fault::DoesNotZero {
            self.inner.write(&buffer, request.size - 1, &[1])?;
        }
        Ok(buffer)
    }

    fn import(&self, bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        match self.fault {
            // What it imports it could not change.
            Fault::ChangesItsInput => Ok(None),
            _ => self.inner.import(bytes),
        }
    }

    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.inner.write(to, offset, bytes)
    }

    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        if self.fault == Fault::ReadsBeyondBuffers && offset >= from.size() {
            return Ok(());
        }
        self.inner.read(from, offset, into)
    }

    fn compile(&self, desc: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        let kind = desc.ops[0].op.kind();
        if matches!(self.fault, Fault::AcceptsButFails | Fault::RejectsWithoutReason) {
            return Err(self.unsupported(kind).into());
        }
        let inner = self.inner.compile(desc.clone())?;
        let device = Arc::clone(&self.inner);
        Ok(Box::new(BrokenProgram { inner, device, desc, fault: self.fault, runs: 0, kept: Vec::new() }))
    }
}

/// Passes events on without what they cost.
struct NoWork<'a>(&'a mut dyn Observer);

impl Observer for NoWork<'_> {
    fn wants_ops(&self) -> bool {
        self.0.wants_ops()
    }

    fn op(&mut self, event: OpEvent<'_>) {
        self.0.op(OpEvent { bytes: 0, macs: 0, ..event });
    }
}

impl BrokenProgram {
    fn value(&self, index: usize) -> ProgramValue {
        self.desc.values[index].clone()
    }

    fn read(&self, value: &ProgramValue, offset: isize, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let at = value.place.offset.checked_add_signed(offset).expect("inside of the buffer");
        self.device.read(&self.desc.buffers[value.place.buffer], at, &mut bytes).expect("reads");
        bytes
    }

    fn write(&self, value: &ProgramValue, offset: isize, bytes: &[u8]) {
        let at = value.place.offset.checked_add_signed(offset).expect("inside of the buffer");
        self.device.write(&self.desc.buffers[value.place.buffer], at, bytes).expect("writes");
    }

    fn change(&self, value: &ProgramValue, offset: usize, f: impl Fn(f32) -> f32) {
        let bytes = self.read(value, offset as isize, 4);
        let old = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        self.write(value, offset as isize, &f(old).to_le_bytes());
    }

    fn flip_a_bit(&self, value: &ProgramValue) {
        self.change(value, 0, |old| f32::from_bits(old.to_bits() ^ 1));
    }
}

/// Rounds blocks of `len` to `levels` steps on either side of 0; scales of short blocks are f16.
fn round_blocks(bytes: &mut [u8], len: usize, levels: f32) {
    for block in bytes.chunks_mut(4 * len) {
        let values: Vec<f32> = block.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let max = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        let scale = if len == 32 { f16_of(max / levels) } else { max / levels };
        let inverse = if max == 0.0 { 0.0 } else { levels / max };
        for (value, bytes) in values.iter().zip(block.as_chunks_mut().0) {
            *bytes = ((value * inverse).round() * scale).to_le_bytes();
        }
    }
}

fn f16_of(value: f32) -> f32 {
    let mut bytes = [0; 2];
    format::encode(DType::F16, &[value], &mut bytes);
    format::half(bytes)
}

impl BrokenProgram {
    /// Runs a product on rounded activations, and puts the exact ones back.
    fn run_rounded(
        &mut self,
        step: &Step,
        observer: &mut dyn Observer,
        levels: f32,
    ) -> Result<(), DeviceError> {
        let op = self.desc.ops[0].clone();
        let (weight, x) = (self.value(op.inputs[0]).desc.dtype, self.value(op.inputs[1]));
        let span = x.desc.span_bytes(step);
        let exact = self.read(&x, 0, span);
        let mut rounded = exact.clone();
        let extents = x.desc.shape.at(step);
        let rows: usize = extents[..extents.len() - 1].iter().product();
        let stride = x.desc.strides[extents.len() - 2];
        for row in 0..rows {
            // In the cases used here, neighbouring rows are equally far apart on all axes.
            let start = row * stride;
            round_blocks(&mut rounded[start..start + x.desc.row_bytes()], weight.block_len(), levels);
        }
        self.write(&x, 0, &rounded);
        let result = self.inner.run(step, observer);
        self.write(&x, 0, &exact);
        result
    }
}

impl Program for BrokenProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        let op = self.desc.ops.last().expect("operations").clone();
        let (input, output) = (self.value(op.inputs[0]), self.value(op.outputs[0]));
        let size = output.desc.dense_bytes(step);
        let before = self.read(&output, 0, size);
        match self.fault {
            Fault::RoundsToEightBits => self.run_rounded(step, observer, 127.0)?,
            Fault::RoundsToSevenBits => self.run_rounded(step, observer, 63.0)?,
            Fault::TellsNothing => self.inner.run(step, &mut backend_api::Discard)?,
            Fault::TellsNoWork => self.inner.run(step, &mut NoWork(observer))?,
            Fault::TellsTwice => {
                self.inner.run(step, observer)?;
                self.inner.run(step, observer)?;
            }
            Fault::AcceptsButCannotRun => {
                let (device, reason) = ("broken".to_owned(), "it cannot".to_owned());
                return Err(DeviceError::Driver { device, reason });
            }
            Fault::Panics => panic!("the broken device panics"),
            _ => self.inner.run(step, observer)?,
        }
        self.runs += 1;
        if op.op == Op::KvStore {
            if self.fault == Fault::StoresTooMuch {
                self.write(&output, (output.desc.row_bytes() * step.kv_len()) as isize, &[0]);
            }
            return Ok(());
        }
        if size == 0 {
            return Ok(());
        }
        match self.fault {
            Fault::WrongValue => self.change(&output, size / 8 * 4, |old| old + 2.0),
            Fault::WrongScale => {
                (0..size).step_by(4).for_each(|at| self.change(&output, at, |old| old * 1.03))
            }
            Fault::LeavesOneOut => self.write(&output, size as isize - 4, &before[size - 4..]),
            Fault::Accumulates => {
                for (at, old) in before.as_chunks().0.iter().enumerate() {
                    self.change(&output, 4 * at, |new| new + f32::from_le_bytes(*old));
                }
            }
            Fault::WritesBeforeItsOutput => self.write(&output, -1, &[0]),
            Fault::WritesBehindItsOutput => self.write(&output, size as isize, &[0]),
            Fault::ReadsBehindItsInput => {
                let bytes = self.read(&input, input.desc.span_bytes(step) as isize, 4);
                let behind = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
                self.change(&output, 0, |old| old + 0.0 * behind);
            }
            Fault::ChangesItsInput => self.write(&input, 0, &[0x55]),
            Fault::ForgetsWhatItSaid if self.runs.is_multiple_of(2) => self.flip_a_bit(&output),
            Fault::DependsOnTheBatch if step.rows > 1 => self.flip_a_bit(&output),
            Fault::KeepsTheFirstResult if self.runs == 1 => self.kept = self.read(&output, 0, size),
            Fault::KeepsTheFirstResult => self.write(&output, 0, &self.kept[..size]),
            Fault::HidesNan => {
                let hide = |old: f32| if old.is_nan() { 0.0 } else { old };
                (0..size).step_by(4).for_each(|at| self.change(&output, at, hide));
            }
            Fault::SpreadsNan => {
                let bytes = self.read(&output, 0, size);
                if bytes.as_chunks().0.iter().any(|bytes| f32::from_le_bytes(*bytes).is_nan()) {
                    (0..size).step_by(4).for_each(|at| self.change(&output, at, |_| f32::NAN));
                }
            }
            Fault::FusesWrongly if self.desc.ops.len() > 1 => self.flip_a_bit(&output),
            _ => {}
        }
        Ok(())
    }
}

/// Cases in which every fault can show, but few, as each fault runs them all.
const CASES: &str = "MatMul Q8_0 Default";

fn found(fault: Fault, cases: &str) -> Report {
    let report = examine(&Broken::new(fault, true), cases);
    println!("{fault:?}: {report}");
    report
}

/// Cases fail, and what is found first in each is this. (Other checks may then see the same fault.)
fn caught(fault: Fault, cases: &str, check: Check) {
    let report = found(fault, cases);
    assert!(!report.failures.is_empty(), "{fault:?} was not caught");
    for failures in report.failures.chunk_by(|a, b| a.case == b.case) {
        assert_eq!(failures[0].check, check, "{fault:?} was taken for something else: {}", failures[0]);
    }
}

#[test]
fn without_a_fault_it_passes() {
    for batch_invariant in [true, false] {
        let report = run_filtered(&Broken::new(Fault::None, batch_invariant), CASES);
        assert!(report.passed > 10);
    }
}

#[test]
fn activations_of_eight_bits_pass_and_of_seven_do_not() {
    for dtype in DType::WEIGHTS.into_iter().filter(|dtype| dtype.is_quantized()) {
        let cases = format!("MatMul {dtype} {:?}", Precision::Default);
        let report = found(Fault::RoundsToEightBits, &cases);
        assert!(report.failures.is_empty() && report.passed > 10, "{dtype}: {report}");
        let report = found(Fault::RoundsToSevenBits, &cases);
        assert!(report.failures.len() > 2 * report.passed, "{dtype}: {report}");
    }
}

#[test]
fn a_wrong_value() {
    caught(Fault::WrongValue, CASES, Check::Values);
    caught(Fault::WrongValue, "RmsNorm ", Check::Values);
    caught(Fault::WrongValue, "LatentAttention F16", Check::Values);
}

#[test]
fn a_wrong_scale() {
    for dtype in DType::WEIGHTS {
        let cases = format!("MatMul {dtype} {:?}", Precision::Default);
        let report = found(Fault::WrongScale, &cases);
        // Some outputs of a single element pass by luck.
        let failed = report.failures.iter().filter(|failure| failure.check == Check::Values).count();
        assert!(failed > 4 * report.passed, "{dtype}: only {failed} failed");
    }
}

#[test]
fn an_output_left_out() {
    caught(Fault::LeavesOneOut, CASES, Check::Values);
}

#[test]
fn adding_to_what_was_there() {
    caught(Fault::Accumulates, CASES, Check::Values);
}

#[test]
fn writing_out_of_bounds() {
    caught(Fault::WritesBeforeItsOutput, CASES, Check::Fences);
    caught(Fault::WritesBehindItsOutput, CASES, Check::Fences);
}

#[test]
fn storing_out_of_bounds() {
    // Where the cache has rows left, they are what the store must keep; where it is full, there is a fence.
    let report = found(Fault::StoresTooMuch, "KvStore ");
    assert!(report.passed == 0 && report.failures.len() > 20, "{report}");
    let bounds = |failure: &Failure| [Check::Inputs, Check::Fences].contains(&failure.check);
    assert!(report.failures.iter().all(bounds), "{report}");
}

#[test]
fn reading_what_was_not_declared() {
    caught(Fault::ReadsBehindItsInput, CASES, Check::Values);
}

#[test]
fn changing_an_input() {
    caught(Fault::ChangesItsInput, CASES, Check::Inputs);
}

#[test]
fn runs_that_differ() {
    caught(Fault::ForgetsWhatItSaid, "Rope ", Check::Repeat);
}

#[test]
fn depending_on_the_batch() {
    caught(Fault::DependsOnTheBatch, CASES, Check::Batch);
    // Without the claim one bit is nothing…
    let report = examine(&Broken::new(Fault::DependsOnTheBatch, false), CASES);
    assert!(report.failures.is_empty(), "{report}");
    // …but other rows are.
    let report = examine(&Broken::new(Fault::KeepsTheFirstResult, false), CASES);
    assert!(report.failures.iter().any(|failure| failure.check == Check::Batch), "{report}");
}

#[test]
fn keeping_the_first_result() {
    let report = found(Fault::KeepsTheFirstResult, CASES);
    // Several rows differ in pieces. A single row shows no change but that to NaN.
    let of = |check| report.failures.iter().filter(|failure| failure.check == check).count();
    assert!(report.passed == 0 && of(Check::Batch) > 10, "{report}");
    assert_eq!(of(Check::Batch) + of(Check::Nan), report.failures.len(), "{report}");
}

#[test]
fn hiding_nan() {
    for cases in [CASES, "MatMul Q4_K Default", "RmsNorm ", "SwiGlu ", "Add ", "LatentAttention F32"] {
        caught(Fault::HidesNan, cases, Check::Nan);
    }
}

#[test]
fn spreading_nan() {
    caught(Fault::SpreadsNan, CASES, Check::Nan);
}

#[test]
fn fusing_wrongly() {
    caught(Fault::FusesWrongly, "program: attention", Check::Fusion);
}

#[test]
fn rejecting_dishonestly() {
    caught(Fault::RejectsWithoutReason, CASES, Check::Honesty);
    caught(Fault::RejectsButCompiles, CASES, Check::Honesty);
}

#[test]
fn accepting_dishonestly() {
    caught(Fault::AcceptsButFails, CASES, Check::Honesty);
    caught(Fault::AcceptsButCannotRun, CASES, Check::Errors);
}

#[test]
fn panicking() {
    caught(Fault::Panics, "MatMul Q8_0 Default, k 32", Check::Panics);
}

#[test]
fn memory_that_is_not_zeroed_or_has_no_end() {
    caught(Fault::DoesNotZero, "memory", Check::Buffers);
    caught(Fault::ReadsBeyondBuffers, "memory", Check::Buffers);
}

#[test]
fn telling_the_observer_wrongly() {
    caught(Fault::TellsNothing, CASES, Check::Observer);
    caught(Fault::TellsNoWork, CASES, Check::Observer);
    caught(Fault::TellsTwice, CASES, Check::Observer);
}

#[test]
#[should_panic(expected = "Values: element")]
fn run_panics_with_what_is_wrong() {
    run_filtered(&Broken::new(Fault::WrongValue, true), CASES);
}
