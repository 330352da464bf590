//! The tests every Fathom backend must pass.
//!
//! [`run`] takes any [`Device`] through a table of seeded cases, for every operation × format × shape, from
//! below to above every block and tile, and panics with a list of what is wrong. A backend's conformance test is
//! one line:
//!
//! ```no_run
//! # let device = backend_conformance::ReferenceDevice::new();
//! backend_conformance::run(&device);
//! ```
//!
//! [`names`] lists the cases, [`run_filtered`] runs some of them, and [`examine`] gives a [`Report`] instead of
//! a panic.
//!
//! ```
//! # let device = backend_conformance::ReferenceDevice::new();
//! let report = backend_conformance::examine(&device, "Concat ");
//! assert!(report.passed > 0 && report.failures.is_empty());
//! ```
//!
//! # What is checked
//!
//! Results are held against a naive f64 evaluator, written only from the definitions at [`backend_api::Op`],
//! within bounds that follow from the formats: the worst case of each element, and the mean of the squared
//! errors in units of the likely ones, such as those of 8-bit activations. Beyond values, each [`Check`] has its
//! means:
//!
//! * Outputs are poisoned before each run. All bytes around them, between strided rows, in unused rows of caches
//!   and past the rows of the step are NaN; reading one shows in the result, writing one in the bytes.
//! * Each case runs twice, then in pieces of 1, 2, 7 and 16 rows, against the batch: bitwise on a device that
//!   [claims](backend_api::DeviceInfo::batch_invariant) batch invariance, within the bounds on others.
//! * Each operation runs once more for each input that is no weight, with a NaN in a random place of it. What the
//!   reference says is NaN must be: a model with a broken weight should not go on in plausible words. Rows that do
//!   not depend on it keep their bits.
//! * Programs of several operations, which share inputs and reuse scratch, are held against their operations one
//!   by one. That includes values between operations: a device cannot know who else reads them, so it may fuse
//!   operations but not leave out what they write.
//! * `supports`, `compile`, and the reasons they give, must agree.
//!
//! What no case can show is absent here: speed, thread counts (a backend runs the suite once for each), and
//! errors of drivers.
#![forbid(unsafe_code)]

mod cases;
mod device;
mod memory;
mod random;
mod reference;
mod report;
mod run;
mod setup;
mod tolerance;

pub use device::ReferenceDevice;
pub use report::{Check, Failure, Report};

use backend_api::Device;
use random::Weights;
use run::Outcome;
use setup::Builder;
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs all cases, and prints which ones the device does not support.
///
/// # Panics
/// With a list of failures, if there are any.
pub fn run(device: &dyn Device) -> Report {
    run_filtered(device, "")
}

/// Runs the cases whose names contain `filter`, or where it has stars, the parts between them one after the other:
/// `MatMul*Default*16 rows`.
///
/// # Panics
/// As [`run`], and if no name is meant.
pub fn run_filtered(device: &dyn Device, filter: &str) -> Report {
    let report = examine(device, filter);
    let count = report.passed + report.unsupported.len() + report.failures.len();
    assert!(count > 0, "no case's name has {filter:?}");
    assert!(report.failures.is_empty(), "{}: {report}", device.info().name);
    print!("{}: {report}", device.info().name);
    report
}

/// Runs the cases that [`run_filtered`] does, and says what is wrong instead of panicking.
pub fn examine(device: &dyn Device, filter: &str) -> Report {
    let mut report = Report::default();
    if is_meant(memory::NAME, filter) {
        match memory::check(device) {
            Ok(()) => report.passed += 1,
            Err(message) => report.fail(memory::NAME, vec![(Check::Buffers, message)]),
        }
    }
    let mut weights = Weights::default();
    for case in cases::all().into_iter().filter(|case| is_meant(&case.name, filter)) {
        let mut builder = Builder::new(&case.name, &mut weights);
        (case.build)(&mut builder);
        let setup = builder.finish();
        match catch_unwind(AssertUnwindSafe(|| run::run(device, &setup, &case.name))) {
            Ok(Outcome::Unsupported(reason)) => report.unsupported.push((case.name, reason)),
            Ok(Outcome::Ran(failures)) if failures.is_empty() => report.passed += 1,
            Ok(Outcome::Ran(failures)) => report.fail(&case.name, failures.0),
            Err(panic) => report.fail(&case.name, vec![(Check::Panics, panic_message(&*panic))]),
        }
    }
    report
}

/// Whether a name has all parts of a filter.
fn is_meant(name: &str, filter: &str) -> bool {
    let mut rest = name;
    filter.split('*').all(|part| match rest.split_once(part) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".to_owned())
}

/// The names of all cases.
pub fn names() -> Vec<String> {
    std::iter::once(memory::NAME.to_owned()).chain(cases::all().into_iter().map(|case| case.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::is_meant;

    #[test]
    fn the_parts_of_a_filter_follow_each_other() {
        let name = "MatMul Q4_K Default, k 256, 16 rows";
        for filter in ["", "Mat", "Mul*Default", "*16 rows", "MatMul*Q*Default*16 rows"] {
            assert!(is_meant(name, filter), "{filter}");
        }
        for filter in ["mat", "Default*Mul", "16 rows*16 rows", "Mul*F32"] {
            assert!(!is_meant(name, filter), "{filter}");
        }
    }
}
