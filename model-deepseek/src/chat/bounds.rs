//! What a template may make, beyond what the engine itself bounds.
//!
//! The engine's fuel pays for each step and for the bytes and slots that the step makes. It does not see what values
//! share: a list of twice the same list is two slots, and forty such steps are a terabyte for whoever writes the list
//! out, joins or flattens it. So every value that may hold others is measured where a step has made it, what it shares
//! counted as often as it is held. None can then be larger than the bound, and nothing that a step does with its
//! operands can take more than a small multiple of that.

use minijinja::{
    Error, ErrorKind, State, Value,
    machinery::{Instruction, Instructions},
    value::{DynObject, ObjectRepr},
};

/// The tests that [`measured`] puts into a program. No template can say these names.
pub(super) const WITHIN_BOUNDS: &str = "|within-bounds|";
pub(super) const MAY_BE_SET: &str = "|may-be-set|";
pub(super) const NO_NAMESPACE: &str = "|no-namespace|";

/// Values inside each other: more than a JSON text can bring, and few enough for any recursion.
pub(super) const DEEPEST: usize = 160;

/// Bytes that a value counts for, beside those of its text.
const VALUE: u64 = 64;

/// Values that one unit of fuel measures.
const VALUES_PER_FUEL: u64 = 32;

/// Bytes that the engine makes for one unit of fuel.
pub(super) const BYTES_PER_FUEL: u64 = 64;

/// A program that measures what its steps make.
pub(super) fn measured<'s>(program: &Instructions<'s>) -> Instructions<'s> {
    let test = |name| {
        [Instruction::DupTop, Instruction::PerformTest(name, Some(1), NO_SLOT), Instruction::DiscardTop]
    };
    // Without the word there is none.
    let namespaces = program.source().contains("namespace");
    // Where each step of the program goes; jumps may lead behind the last.
    let mut places = Vec::new();
    let mut steps = Vec::new();
    for index in 0.. {
        places.push(steps.len() as u32);
        let Some(step) = program.get(index) else { break };
        if let Instruction::SetAttr(_) = step {
            // the value and the namespace, as a pair to look at, and back
            steps.push((index, Instruction::BuildTuple(Some(2))));
            steps.extend(test(MAY_BE_SET).map(|step| (index, step)));
            steps.extend([Instruction::UnpackList(2), Instruction::Swap].map(|step| (index, step)));
        }
        steps.push((index, step.clone()));
        if makes_a_value(step) {
            steps.extend(test(WITHIN_BOUNDS).map(|step| (index, step)));
        }
        if namespaces && may_be_a_namespace(step) && !looks_into(program, index + 1) {
            steps.extend(test(NO_NAMESPACE).map(|step| (index, step)));
        }
    }
    let mut measured = Instructions::new(program.name(), program.source());
    for (from, mut step) in steps {
        if let Instruction::Iterate(to)
        | Instruction::Jump(to)
        | Instruction::JumpIfFalse(to)
        | Instruction::JumpIfFalseOrPop(to)
        | Instruction::JumpIfTrueOrPop(to)
        | Instruction::BuildMacro(_, to, _) = &mut step
        {
            *to = places[*to as usize];
        }
        match (program.get_span(from), program.get_line(from)) {
            (Some(span), _) => measured.add_with_span(step, span),
            (None, Some(line)) => measured.add_with_line(step, line as u16),
            (None, None) => measured.add(step),
        };
    }
    measured
}

/// A test's place in the engine's cache of them: none.
const NO_SLOT: u8 = u8::MAX;

/// Whether a step leaves a new value on the stack that may hold others.
fn makes_a_value(step: &Instruction<'_>) -> bool {
    matches!(
        step,
        Instruction::BuildList(_)
            | Instruction::BuildTuple(_)
            | Instruction::BuildMap(_)
            | Instruction::Add
            | Instruction::Mul
            | Instruction::Slice
            | Instruction::ApplyFilter(..)
            | Instruction::CallFunction(..)
            | Instruction::CallMethod(..)
            | Instruction::CallObject(_)
    )
}

/// Whether a step may leave a namespace on the stack: none lies in another value.
fn may_be_a_namespace(step: &Instruction<'_>) -> bool {
    matches!(
        step,
        Instruction::Lookup(_)
            | Instruction::CallFunction(..)
            | Instruction::CallMethod(..)
            | Instruction::CallObject(_)
            | Instruction::ApplyFilter(..)
    )
}

/// Whether the steps from `index` on give what is on the stack a name, look at it, or at one attribute: nothing that a
/// namespace is kept in. Filters and methods make views, which show what it is set to later, unmeasured, and themselves.
fn looks_into(program: &Instructions<'_>, index: u32) -> bool {
    match program.get(index) {
        Some(Instruction::LoadConst(_)) => matches!(program.get(index + 1), Some(Instruction::GetItem)),
        Some(
            Instruction::StoreLocal(_)
            | Instruction::GetAttr(_)
            | Instruction::SetAttr(_)
            | Instruction::PerformTest(_, Some(1), _)
            | Instruction::JumpIfFalse(_)
            | Instruction::Not,
        ) => true,
        _ => false,
    }
}

/// Whether an object is of one of the engine's types, which are private.
fn is_a(object: &DynObject, name: &str) -> bool {
    object.type_name().ends_with(name)
}

/// [`NO_NAMESPACE`].
pub(super) fn no_namespace(value: &Value) -> Result<bool, Error> {
    if value.as_object().is_some_and(|object| is_a(object, "::Namespace")) {
        let message = "expected a namespace to be named, or an attribute of one, found one used as a value";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(true)
}

/// How large a value may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    largest: u64,
}

impl Bounds {
    /// For a template that is given `variables`: it may copy and rearrange them.
    pub(super) fn new(variables: &Value) -> Result<Bounds, Error> {
        let mut size = Size::within(Bounds { largest: u64::MAX });
        size.add(variables, 0)?;
        Ok(Bounds { largest: (1 << 20) + 4 * size.bytes })
    }

    /// [`WITHIN_BOUNDS`], for what a step has made.
    pub(super) fn hold(self, state: &State<'_, '_>, value: &Value) -> Result<bool, Error> {
        let mut size = Size::within(self);
        size.add(value, 0)?;
        size.pay(state)
    }

    /// [`MAY_BE_SET`], for a pair: a value, and the namespace that is to have it.
    pub(super) fn set(self, state: &State<'_, '_>, pair: &Value) -> Result<bool, Error> {
        let mut size = Size::within(self);
        for (index, part) in pair.try_iter()?.enumerate() {
            size.add(&part, 1 - index)?;
        }
        size.pay(state)
    }

    /// Pays for a text that `str.format` is about to make: unlike the filter `format`, it does not itself.
    pub(super) fn format(self, state: &State<'_, '_>, format: &str, values: &[Value]) -> Result<(), Error> {
        let mut size = Size::within(self);
        values.iter().try_for_each(|value| size.add(value, 0))?;
        let fields = format.matches('{').count() as u64;
        // any number may be a width or a precision
        let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
        let widths = numbers.map(|digits| digits.parse().unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
        state.consume_fuel(widths.saturating_add(fields.saturating_mul(size.bytes)) / BYTES_PER_FUEL)
    }
}

/// What values come to that are held together.
struct Size {
    bytes: u64,
    values: u64,
    largest: u64,
}

impl Size {
    fn within(bounds: Bounds) -> Size {
        Size { bytes: 0, values: 0, largest: bounds.largest }
    }

    /// Adds a value that lies `depth` deep in others.
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let refused = |message: String| Err(Error::new(ErrorKind::InvalidOperation, message));
        self.values += 1;
        self.bytes += VALUE + value.as_bytes().map_or(0, |text| text.len() as u64);
        if self.bytes > self.largest {
            return refused(format!(
                "expected a value of at most {} bytes, with what it shares counted each time, found a larger one",
                self.largest
            ));
        }
        let Some(object) = value.as_object() else { return Ok(()) };
        if depth > DEEPEST {
            return refused(format!("expected values nested at most {DEEPEST} deep"));
        }
        if depth > 0 && (is_a(object, "::Namespace") || is_a(object, "::Loop")) {
            // It would grow after it was measured.
            return refused("expected a namespace or loop by itself, found one inside another value".into());
        }
        match object.repr() {
            ObjectRepr::Map if !is_a(object, "::Loop") => {
                for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                    self.add(&key, depth + 1)?;
                    self.add(&value, depth + 1)?;
                }
            }
            ObjectRepr::Seq | ObjectRepr::Iterable => {
                object.try_iter().into_iter().flatten().try_for_each(|value| self.add(&value, depth + 1))?;
            }
            _ => (),
        }
        Ok(())
    }

    /// Pays for having looked at the values.
    fn pay(&self, state: &State<'_, '_>) -> Result<bool, Error> {
        state.consume_fuel(self.values / VALUES_PER_FUEL)?;
        Ok(true)
    }
}
