//! What every binary does the same way.
//!
//! * Options are typed structs first (what the user said), resolved ones second (what that means here).
//! * On standard output there is text or JSON and nothing else; rates, notices and progress are on standard error.
//! * An error is one line, `error: …`, with its causes; the exit code is 1. Wrong usage is clap's, with code 2.

mod devices;
mod list;
mod model;
mod options;
mod output;
mod placement;
mod rates;

pub use devices::{DeviceName, DeviceOptions, DeviceRates, OpenDevices};
pub use list::{ListOption, list_devices};
pub use model::{ModelOption, loaded, open, opened, outliving, placed, report, tell, tokenizer};
pub use options::{Activations, CacheChoice, RunOptions, SamplingOptions};
pub use output::{Progress, Rate, print_json};
pub use placement::{AbsorbArg, CacheLayers, FitArg, LayerCount, OverrideArg, PlacementArgs, Switch};

use clap::{Parser, error::ErrorKind};
use std::{
    env,
    error::Error,
    ffi::{OsStr, OsString},
    io,
    process::ExitCode,
};

/// Whatever ends a program early.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Parses the command line, runs the program, and turns a failure into a line and an exit code.
pub fn main<A: Parser>(run: impl FnOnce(A) -> Result<(), Failure>) -> ExitCode {
    main_from(env::args_os(), run)
}

/// As [`main`], for a command line that was changed.
pub fn main_from<A: Parser>(
    args: impl IntoIterator<Item = OsString>,
    run: impl FnOnce(A) -> Result<(), Failure>,
) -> ExitCode {
    exit(run(A::parse_from(placement::long_names(args.into_iter()))))
}

/// What a program ends with; a failure is a line on standard error.
pub fn exit(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough: `generate | head -1`.
        Err(failure) if is_broken_pipe(&*failure) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", with_causes(&*failure));
            ExitCode::FAILURE
        }
    }
}

/// Parses the value of an option that is a command line of its own.
///
/// # Errors
/// The first line of what clap says.
pub fn parse<A: Parser>(option: &str, words: Vec<String>) -> Result<A, Failure> {
    let words = placement::long_names(words.into_iter().map(Into::into));
    A::try_parse_from(words).map_err(|error| {
        let text = error.to_string();
        let line = text.lines().next().unwrap_or_default();
        format!("{option}: {}", line.strip_prefix("error: ").unwrap_or(line)).into()
    })
}

/// Whether a word is an option of that command line, with its value or without.
pub fn is_option<A: Parser>(word: &OsStr) -> bool {
    let parsed = A::try_parse_from(placement::long_names([word.to_owned()].into_iter()));
    let known = parsed.map_or_else(|error| error.kind() != ErrorKind::UnknownArgument, |_| true);
    known && word.to_string_lossy().starts_with('-')
}

/// The message with those of its causes that it does not hold already.
fn with_causes(failure: &(dyn Error + 'static)) -> String {
    let mut line = failure.to_string();
    for cause in causes(failure).skip(1) {
        let text = cause.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    // One line, also where a file's name or key breaks it.
    line.replace('\n', " ")
}

fn causes<'a>(failure: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(failure), |&error| error.source())
}

fn is_broken_pipe(failure: &(dyn Error + 'static)) -> bool {
    let broken = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    causes(failure).any(|error| error.downcast_ref().is_some_and(broken))
}

#[cfg(test)]
mod tests {
    use super::*;
    use thiserror::Error as ThisError;

    #[derive(Debug, ThisError)]
    #[error("{0}")]
    struct Said(&'static str, #[source] Option<Box<Said>>);

    #[test]
    fn a_failure_is_one_line_with_every_cause_once() {
        let cases = [
            (Said("a", None), "a"),
            (Said("a", Some(Box::new(Said("b", Some(Box::new(Said("c", None))))))), "a: b: c"),
            (Said("a: b", Some(Box::new(Said("b", None)))), "a: b"),
            (Said("two\nlines", None), "two lines"),
        ];
        for (failure, expected) in cases {
            assert_eq!(with_causes(&failure), expected);
        }
    }
}
