//! What the suite found.

use backend_api::Unsupported;
use std::fmt;

/// A class of check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Check {
    /// Outputs are within their bounds of the f64 reference.
    Values,
    /// Nothing outside of the outputs is written: neither around them nor past the rows of the step.
    Fences,
    /// Inputs keep their bytes.
    Inputs,
    /// A second run gives the same bits.
    Repeat,
    /// Rows give the same results in pieces: bitwise, if the device claims so.
    Batch,
    /// A NaN in an input shows in all results that it is part of, and changes no other row.
    Nan,
    /// Operations give the same results in one program as in one each: bitwise, if the device claims so.
    Fusion,
    /// What `supports` accepts compiles; what it rejects does not, and there is a reason.
    Honesty,
    /// Memory is zeroed, and holds what is written to it.
    Buffers,
    /// An observer that asks learns of each operation.
    Observer,
    /// The device reports no error where there is no cause.
    Errors,
    /// The device does not panic.
    Panics,
}

/// Something that a device got wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The case's name.
    pub case: String,
    /// The check that found it.
    pub check: Check,
    /// What was expected and found.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}: {}", self.case, self.check, self.message)
    }
}

/// The failures of one case.
#[derive(Default)]
pub(crate) struct Failures(pub(crate) Vec<(Check, String)>);

impl Failures {
    pub(crate) fn add(&mut self, check: Check, message: String) {
        self.0.push((check, message));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a device did in all cases.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cases that ran and are right.
    pub passed: usize,
    /// Cases that the device honestly says it cannot run, with its reasons.
    pub unsupported: Vec<(String, Unsupported)>,
    /// What is wrong.
    pub failures: Vec<Failure>,
}

impl Report {
    pub(crate) fn fail(&mut self, case: &str, failures: Vec<(Check, String)>) {
        let named = |(check, message)| Failure { case: case.to_owned(), check, message };
        self.failures.extend(failures.into_iter().map(named));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 40;
        let (unsupported, failed) = (self.unsupported.len(), self.failures.len());
        writeln!(f, "{} cases passed, {unsupported} unsupported, {failed} failures", self.passed)?;
        for (case, reason) in self.unsupported.iter().take(SHOWN) {
            writeln!(f, "  unsupported: {case}: {reason}")?;
        }
        for failure in self.failures.iter().take(SHOWN) {
            writeln!(f, "  FAILED: {failure}")?;
        }
        if unsupported.max(failed) > SHOWN {
            writeln!(f, "  … and more")?;
        }
        Ok(())
    }
}
