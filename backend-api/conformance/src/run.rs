//! Runs a case on a device and holds it against everything the contract says.

use crate::{
    random::Random,
    reference::{Tensor, evaluate, row_offsets},
    report::{Check, Failures},
    setup::{Contents, Image, POISONS, Setup, USAGES, varying},
    tolerance::{Tolerance, tolerances},
};
use backend_api::{
    BufferRef, BufferRequest, BufferUsage, DType, Device, DeviceError, Discard, Extent, HostBytes, Observer,
    Op, OpEvent, OpKind, Program, ProgramDesc, ProgramOp, ProgramValue, Shape, Step, TensorDesc, Unsupported,
    Work, format,
};
use std::{ops::Range, sync::Arc};

/// Rows of the pieces that a batch is cut into.
const PIECES: [usize; 5] = [1, 2, 1, 7, 16];

/// What a case came to.
pub(crate) enum Outcome {
    /// The device says, consistently, that it cannot.
    Unsupported(Unsupported),
    Ran(Failures),
}

/// A case on a device.
struct Bench<'a> {
    device: &'a dyn Device,
    setup: &'a Setup,
    name: &'a str,
    values: Vec<ProgramValue>,
    image: Image,
    buffers: Vec<BufferRef>,
    /// Where the device used our bytes in place.
    imported: bool,
}

pub(crate) fn run(device: &dyn Device, setup: &Setup, name: &str) -> Outcome {
    let mut failures = Failures::default();
    for op in &setup.ops {
        let desc = setup.describe(op);
        desc.check().unwrap_or_else(|error| panic!("{name} is not well formed: {error}"));
        if let Err(unsupported) = device.supports(&desc) {
            if unsupported.reason.trim().is_empty() || unsupported.op != desc.op.kind() {
                failures
                    .add(Check::Honesty, format!("rejected without operation and reason: {unsupported:?}"));
            }
            if let Ok(bench) = Bench::new(device, setup, name) {
                rejects(&bench, &mut failures);
            }
            return if failures.is_empty() {
                Outcome::Unsupported(unsupported)
            } else {
                Outcome::Ran(failures)
            };
        }
    }
    if let Err((check, problem)) =
        Bench::new(device, setup, name).and_then(|bench| bench.check(&mut failures))
    {
        failures.add(check, problem);
    }
    Outcome::Ran(failures)
}

/// What `supports` rejects, `compile` must reject.
fn rejects(bench: &Bench<'_>, failures: &mut Failures) {
    match bench.device.compile(bench.program(&bench.setup.ops)) {
        Err(DeviceError::Unsupported(unsupported)) if !unsupported.reason.trim().is_empty() => {}
        Err(error) => failures.add(Check::Honesty, format!("rejected, but compile says: {error}")),
        Ok(_) => failures.add(Check::Honesty, "rejected, but compiles".to_owned()),
    }
}

/// A step that makes going on pointless.
type Abort = (Check, String);

fn device_error(error: DeviceError) -> Abort {
    (Check::Errors, error.to_string())
}

impl<'a> Bench<'a> {
    fn new(device: &'a dyn Device, setup: &'a Setup, name: &'a str) -> Result<Self, Abort> {
        let (values, image) = setup.lay_out();
        let mut bench = Bench { device, setup, name, values, image, buffers: Vec::new(), imported: false };
        for (usage, bytes) in USAGES.into_iter().zip(&bench.image) {
            // Every other case, or about that, offers its weights for use in place.
            if usage == BufferUsage::Weights && name.len() % 2 == 1 {
                let shared: HostBytes = Arc::new(bytes.clone());
                if let Some(buffer) = device.import(&shared).map_err(device_error)? {
                    bench.buffers.push(buffer);
                    bench.imported = true;
                    continue;
                }
            }
            let request = BufferRequest { name: format!("{usage:?} of {name}"), size: bytes.len(), usage };
            bench.buffers.push(device.allocate(&request).map_err(device_error)?);
        }
        Ok(bench)
    }

    fn program(&self, ops: &[ProgramOp]) -> ProgramDesc {
        ProgramDesc {
            name: ops[0].name.clone(),
            capacity: self.setup.capacity,
            buffers: self.buffers.clone(),
            values: self.values.clone(),
            ops: ops.to_vec(),
            results: Vec::new(),
        }
    }

    fn compile(&self, ops: &[ProgramOp]) -> Result<Box<dyn Program>, Abort> {
        let accepted = |error| (Check::Honesty, format!("accepted, but compile says: {error}"));
        self.device.compile(self.program(ops)).map_err(accepted)
    }

    /// Weights need this once; that they keep their bytes is checked.
    fn upload_weights(&self) -> Result<(), Abort> {
        if self.imported {
            return Ok(());
        }
        self.device.write(&self.buffers[0], 0, &self.image[0]).map_err(device_error)
    }

    /// States and scratch.
    fn upload(&self, image: &Image) -> Result<(), Abort> {
        self.device.write(&self.buffers[1], 0, &image[1]).map_err(device_error)?;
        self.device.write(&self.buffers[2], 0, &image[2]).map_err(device_error)
    }

    fn download(&self) -> Result<Image, Abort> {
        Ok([self.download_buffer(0)?, self.download_buffer(1)?, self.download_buffer(2)?])
    }

    fn download_buffer(&self, index: usize) -> Result<Vec<u8>, Abort> {
        let mut bytes = vec![0; self.image[index].len()];
        self.device.read(&self.buffers[index], 0, &mut bytes).map_err(device_error)?;
        Ok(bytes)
    }

    fn written(&self, step: &Step) -> Vec<(usize, Range<usize>)> {
        self.setup.ops.iter().flat_map(|op| self.setup.written(op, &self.values, step)).collect()
    }

    fn check(&self, failures: &mut Failures) -> Result<(), Abort> {
        let step = &self.setup.step;
        let mut program = self.compile(&self.setup.ops)?;

        self.upload_weights()?;
        self.upload(&self.image)?;
        program.run(step, &mut Discard).map_err(device_error)?;
        let first = self.download()?;
        self.check_untouched(&self.image, &first, step, failures);
        let tolerances = match &self.setup.ops[..] {
            [op] => self.check_values(op, &first, failures),
            ops => {
                self.check_fusion(ops, &first, failures)?;
                None
            }
        };

        let poisoned = self.poisoned();
        self.upload(&poisoned)?;
        let mut seen = Recorder::default();
        program.run(step, &mut seen).map_err(device_error)?;
        let second = self.download()?;
        self.check_untouched(&poisoned, &second, step, failures);
        if let Some(difference) = self.difference(&first, &second) {
            failures.add(Check::Repeat, format!("a second run differs: {difference}"));
        }
        self.check_observed(&seen, failures);
        self.check_pieces(program.as_mut(), &first, tolerances.as_ref(), failures)?;
        if let [op] = &self.setup.ops[..] {
            self.check_nan(op, program.as_mut(), &first, failures)?;
        }
        Ok(())
    }

    /// Everything but the outputs is what it was.
    fn check_untouched(&self, before: &Image, after: &Image, step: &Step, failures: &mut Failures) {
        let written = self.written(step);
        for (buffer, (before, after)) in before.iter().zip(after).enumerate() {
            if before == after {
                continue;
            }
            let allowed = |at: usize| written.iter().any(|(b, range)| *b == buffer && range.contains(&at));
            let changed = |at: &usize| before[*at] != after[*at] && !allowed(*at);
            let Some(at) = (0..before.len()).find(changed) else { continue };
            let inside = |index: &usize| {
                let ProgramValue { desc, place } = &self.values[*index];
                let given = matches!(self.setup.operands[*index].contents, Contents::Given { .. });
                given
                    && place.buffer == buffer
                    && (place.offset..place.offset + desc.span_bytes(step)).contains(&at)
            };
            let usage = USAGES[buffer];
            match (0..self.values.len()).find(inside) {
                Some(index) => {
                    let desc = self.values[index].desc;
                    failures.add(Check::Inputs, format!("value {index}, {desc:?}, was changed at byte {at}"));
                }
                None => failures.add(Check::Fences, format!("byte {at} of {usage:?} was written")),
            }
        }
    }

    /// The outputs of the only operation against the reference.
    fn check_values(&self, op: &ProgramOp, found: &Image, failures: &mut Failures) -> Option<Vec<Tolerance>> {
        let step = &self.setup.step;
        let inputs: Vec<Tensor> = op.inputs.iter().map(|index| self.load(*index, &self.image)).collect();
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let expected = evaluate(&op.op, &inputs, step);
        if op.op == Op::KvStore {
            let bytes = expected[0].store(self.values[op.outputs[0]].desc.dtype);
            let (buffer, range) = self.setup.written(op, &self.values, step).remove(0);
            if found[buffer][range] != bytes {
                failures.add(Check::Values, "the stored rows are not those of format::encode".to_owned());
            }
            return None;
        }
        let mut tolerances = tolerances(&self.setup.describe(op), &inputs, &expected, step);
        if self.setup.structured {
            tolerances = tolerances.into_iter().map(Tolerance::worst_case).collect();
        }
        for ((index, expected), tolerance) in op.outputs.iter().zip(&expected).zip(&tolerances) {
            let expected = self.rounded(expected, self.values[*index].desc.dtype);
            if let Err(problem) = tolerance.check(&expected.values, &self.load(*index, found).values) {
                failures.add(Check::Values, problem);
            }
        }
        Some(tolerances)
    }

    fn load(&self, index: usize, image: &Image) -> Tensor {
        let ProgramValue { desc, place } = &self.values[index];
        Tensor::load(desc, &image[place.buffer][place.offset..], &self.setup.step)
    }

    /// What a format that is not F32 can hold of the exact result.
    fn rounded(&self, tensor: &Tensor, dtype: DType) -> Tensor {
        if dtype == DType::F32 || tensor.values.is_empty() {
            return tensor.clone();
        }
        let desc = TensorDesc::new(dtype, Shape::fixed(&tensor.shape));
        Tensor::load(&desc, &tensor.store(dtype), &self.setup.step)
    }

    /// Several operations in one program against the same ones, each in its own.
    fn check_fusion(&self, ops: &[ProgramOp], found: &Image, failures: &mut Failures) -> Result<(), Abort> {
        let step = &self.setup.step;
        self.upload(&self.image)?;
        for op in ops {
            let mut alone = self.compile(std::slice::from_ref(op))?;
            alone.run(step, &mut Discard).map_err(device_error)?;
        }
        let expected = self.download()?;
        if self.device.info().batch_invariant {
            if let Some(difference) = self.difference(&expected, found) {
                failures.add(Check::Fusion, format!("differs from its operations one by one: {difference}"));
            }
            return Ok(());
        }
        // Without the claim there are no bits to agree on: the last output, to the precision of rounded
        // activations.
        let last =
            *ops.last().expect("a program has operations").outputs.last().expect("and they have outputs");
        let (expected, found) = (self.load(last, &expected), self.load(last, found));
        if let Err(problem) = nearly(&expected, &found) {
            failures.add(Check::Fusion, format!("differs from its operations one by one: {problem}"));
        }
        Ok(())
    }

    /// A NaN in each input in turn: it shows where the reference says so, and leaves the rows alone that do not
    /// depend on it.
    fn check_nan(
        &self,
        op: &ProgramOp,
        program: &mut dyn Program,
        clean: &Image,
        failures: &mut Failures,
    ) -> Result<(), Abort> {
        let step = &self.setup.step;
        for &input in &op.inputs {
            let Some(image) = self.with_nan(input) else { continue };
            self.upload(&image)?;
            program.run(step, &mut Discard).map_err(device_error)?;
            let found = self.download()?;
            let inputs: Vec<Tensor> = op.inputs.iter().map(|index| self.load(*index, &image)).collect();
            let expected = evaluate(&op.op, &inputs.iter().collect::<Vec<_>>(), step);
            let outputs = self.setup.written(op, &self.values, step);
            for ((expected, (buffer, range)), &output) in expected.iter().zip(outputs).zip(&op.outputs) {
                let (clean, found) = (&clean[buffer][range.clone()], &found[buffer][range]);
                if let Some(problem) = hides_nan(expected, self.values[output].desc.dtype, clean, found) {
                    failures.add(Check::Nan, format!("with a NaN in value {input}, {problem}"));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The image with a NaN somewhere in an input; `None` if it is a weight, or ids, or empty.
    fn with_nan(&self, input: usize) -> Option<Image> {
        let (operand, value) = (&self.setup.operands[input], &self.values[input]);
        let ProgramValue { desc, place } = value;
        if operand.usage == BufferUsage::Weights || desc.dtype == DType::I32 {
            return None;
        }
        let rows = row_offsets(desc, &self.setup.step);
        // Of a state, those that are seen.
        let seen = if operand.usage == BufferUsage::State { self.setup.step.kv_len() } else { rows.len() };
        if seen == 0 {
            return None;
        }
        let mut random = Random::named(&format!("NaN in value {input} of {}", self.name));
        let mut row = vec![0.0; desc.shape.inner()];
        let mut image = self.image.clone();
        let bytes = &mut image[place.buffer][place.offset + rows[random.below(seen)]..][..desc.row_bytes()];
        format::decode(desc.dtype, bytes, &mut row);
        row[random.below(desc.shape.inner())] = f32::NAN;
        format::encode(desc.dtype, &row, bytes);
        Some(image)
    }

    /// The image with the second poison in the outputs.
    fn poisoned(&self) -> Image {
        let mut image = self.image.clone();
        let full = self.setup.capacity.full_step();
        for (operand, value) in self.setup.operands.iter().zip(&self.values) {
            if matches!(operand.contents, Contents::Output) {
                let start = value.place.offset;
                image[value.place.buffer][start..start + value.desc.span_bytes(&full)].fill(POISONS[1]);
            }
        }
        image
    }

    /// Where the outputs of two runs differ first.
    fn difference(&self, a: &Image, b: &Image) -> Option<String> {
        for op in &self.setup.ops {
            for (buffer, range) in self.setup.written(op, &self.values, &self.setup.step) {
                let (a, b) = (&a[buffer][range.clone()], &b[buffer][range]);
                if let Some(at) = (0..a.len()).find(|at| a[*at] != b[*at]) {
                    return Some(format!("{}, byte {at} of {}", op.name, a.len()));
                }
            }
        }
        None
    }

    fn check_observed(&self, seen: &Recorder, failures: &mut Failures) {
        let known = |event: &&Told| self.setup.ops.iter().any(|op| op.name == event.name);
        let stranger = seen.events.iter().find(|event| !known(event));
        let op = &self.setup.ops[0];
        let told = match &self.setup.ops[..] {
            [_] => {
                let work = self.setup.describe(op).work(&self.setup.step);
                seen.events == [Told { name: op.name.clone(), kind: op.op.kind().to_string(), work }]
            }
            // Fused operations may be told as one.
            _ => !seen.events.is_empty() && stranger.is_none(),
        };
        if !told {
            let work = self.setup.describe(op).work(&self.setup.step);
            let expected = format!("expected an event for {} with {work:?}", op.name);
            failures.add(Check::Observer, format!("{expected}, found {:?}", seen.events));
        }
    }

    /// The same rows in pieces, one after the other: the same bits, where the device claims so, and the same
    /// values everywhere.
    fn check_pieces(
        &self,
        program: &mut dyn Program,
        whole: &Image,
        tolerances: Option<&Vec<Tolerance>>,
        failures: &mut Failures,
    ) -> Result<(), Abort> {
        let inputs = || self.setup.ops.iter().flat_map(|op| &op.inputs);
        let extents: Vec<Extent> = inputs().filter_map(|index| varying(&self.values[*index].desc)).collect();
        let [extent, rest @ ..] = &extents[..] else { return Ok(()) };
        let all = extent.at(&self.setup.step);
        if rest.iter().any(|other| other != extent) || all == 0 {
            return Ok(());
        }
        self.upload(&self.image)?;
        let mut start = 0;
        for len in PIECES.into_iter().cycle() {
            if start == all {
                break;
            }
            let len = len.min(all - start);
            let step = match extent {
                Extent::Outputs => Step { outputs: len, ..self.setup.step },
                _ => Step { rows: len, past: self.setup.step.past + start, ..self.setup.step },
            };
            let scratch = self.piece(&self.image[2], start, &step);
            self.device.write(&self.buffers[2], 0, &scratch).map_err(device_error)?;
            program.run(&step, &mut Discard).map_err(device_error)?;
            // Outputs are scratch; states are compared when they are complete.
            let found = self.download_buffer(2)?;
            let op = self.setup.ops.last().expect("a program has operations");
            if let Some(problem) =
                self.compare_piece(op, whole, &found, start..start + len, &step, tolerances)
            {
                failures.add(Check::Batch, format!("rows {start}..{} of {all} {problem}", start + len));
                return Ok(());
            }
            start += len;
        }
        if self.device.info().batch_invariant && self.download_buffer(1)? != whole[1] {
            failures
                .add(Check::Batch, "a state written in pieces differs from one written at once".to_owned());
        }
        Ok(())
    }

    /// The scratch buffer for a piece: rows from `start` moved to the front of each input.
    fn piece(&self, whole: &[u8], start: usize, step: &Step) -> Vec<u8> {
        let mut scratch = whole.to_vec();
        for (operand, value) in self.setup.operands.iter().zip(&self.values) {
            let Contents::Given { bytes, .. } = &operand.contents else { continue };
            if operand.usage != BufferUsage::Scratch || varying(&value.desc).is_none() {
                continue;
            }
            let offset = value.place.offset;
            let row = start * outer_stride(&value.desc);
            let span = value.desc.span_bytes(step);
            scratch[offset..offset + bytes.len()].copy_from_slice(&crate::setup::fence(bytes.len()));
            scratch[offset..offset + span].copy_from_slice(&whole[offset + row..][..span]);
        }
        scratch
    }

    fn compare_piece(
        &self,
        op: &ProgramOp,
        whole: &Image,
        piece: &[u8],
        rows: Range<usize>,
        step: &Step,
        tolerances: Option<&Vec<Tolerance>>,
    ) -> Option<String> {
        if op.op.kind() == OpKind::KvStore {
            return None;
        }
        for (output, index) in op.outputs.iter().enumerate() {
            let ProgramValue { desc, place } = &self.values[*index];
            let row = outer_stride(desc);
            let expected =
                &whole[place.buffer][place.offset + rows.start * row..place.offset + rows.end * row];
            let found = &piece[place.offset..place.offset + rows.len() * row];
            if self.device.info().batch_invariant {
                if expected != found {
                    return Some("differ in their bits from the same rows in the batch".to_owned());
                }
                continue;
            }
            let at_piece = Step { rows: rows.len(), outputs: rows.len(), ..*step };
            let load = |bytes: &[u8]| Tensor::load(desc, bytes, &at_piece);
            let (expected, found) = (load(expected), load(found));
            let compared = match tolerances {
                // Each is within the tolerance of the exact value, so they are within twice of each other.
                Some(tolerances) => {
                    let per_row = expected.values.len() / rows.len();
                    let part = tolerances[output].part(rows.start * per_row..rows.end * per_row);
                    part.doubled().check(&expected.values, &found.values)
                }
                None => nearly(&expected, &found),
            };
            if let Err(problem) = compared {
                return Some(format!("differ from the same rows in the batch: {problem}"));
            }
        }
        None
    }
}

/// Whether two results of a whole program agree to the precision of rounded activations.
fn nearly(expected: &Tensor, found: &Tensor) -> Result<(), String> {
    let power: f64 = expected.values.iter().map(|v| v * v).sum();
    let error: f64 = expected.values.iter().zip(&found.values).map(|(e, f)| (e - f).powi(2)).sum();
    // Not so with NaN.
    if error <= 1e-3 * power { Ok(()) } else { Err(format!("an NMSE of {:.3e}", error / power)) }
}

/// What is wrong with an output of which these elements should be NaN; `clean` is what it was without.
fn hides_nan(expected: &Tensor, dtype: DType, clean: &[u8], found: &[u8]) -> Option<String> {
    let rows = expected.shape[0];
    if expected.values.is_empty() {
        return None;
    }
    let desc = TensorDesc::new(dtype, Shape::fixed(&expected.shape));
    let values = Tensor::load(&desc, found, &Step { rows: 0, past: 0, outputs: 0 }).values;
    // Which rows are chosen may follow from a NaN, but is none.
    if dtype == DType::I32 {
        return (values != expected.values)
            .then(|| "other ids are chosen than the definition says".to_owned());
    }
    let (elements, bytes) = (values.len() / rows, found.len() / rows);
    for row in 0..rows {
        let expected = &expected.values[row * elements..][..elements];
        let hidden = (0..elements).find(|i| expected[*i].is_nan() && !values[row * elements + i].is_nan());
        if let Some(i) = hidden {
            let found = values[row * elements + i];
            return Some(format!("element {i} of row {row} of {rows} should be NaN, and is {found:e}"));
        }
        let range = row * bytes..(row + 1) * bytes;
        if !expected.iter().any(|v| v.is_nan()) && found[range.clone()] != clean[range] {
            return Some(format!("row {row} of {rows}, which does not depend on it, has other bits"));
        }
    }
    None
}

/// Bytes from one index of the outermost axis to the next.
fn outer_stride(desc: &TensorDesc) -> usize {
    if desc.shape.rank() == 1 { desc.dtype.row_bytes(1) } else { desc.strides[0] }
}

/// Writes down what an observer is told, but for the time.
#[derive(Default)]
struct Recorder {
    events: Vec<Told>,
}

#[derive(Debug, PartialEq)]
struct Told {
    name: String,
    kind: String,
    work: Work,
}

impl Observer for Recorder {
    fn wants_ops(&self) -> bool {
        true
    }

    fn op(&mut self, event: OpEvent<'_>) {
        let OpEvent { name, op, bytes, macs, .. } = event;
        let work = Work { bytes, macs };
        self.events.push(Told { name: name.to_owned(), kind: op.to_owned(), work });
    }
}
