//! Standard output for what was asked for, standard error for everything else.

use super::Failure;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::{
    fmt,
    io::{self, Write},
    time::{Duration, Instant},
};

/// Prints one line of JSON.
///
/// # Errors
/// Those of standard output.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    io::stdout().lock().write_all(line.as_bytes())?;
    Ok(())
}

/// A bar on standard error that counts bytes; nothing where that is no terminal.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar that says what is being done.
    pub fn bytes(what: &str, total: u64) -> Self {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes} ({bytes_per_sec})");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(what.to_owned());
        Progress(bar)
    }

    /// `done` bytes of `total`.
    pub fn at(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// `more` bytes than before.
    pub fn add(&self, more: u64) {
        self.0.inc(more);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Tokens in a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    /// How many.
    pub tokens: usize,
    /// In what time.
    pub time: Duration,
}

impl Rate {
    /// So many tokens since then.
    pub fn since(start: Instant, tokens: usize) -> Self {
        Rate { tokens, time: start.elapsed() }
    }

    /// Tokens in a second; 0 if there were none.
    pub fn per_second(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.tokens as f64 / self.time.as_secs_f64().max(1e-9) }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, rate) = (self.time.as_secs_f64(), self.per_second());
        write!(f, "{} tokens in {seconds:.2} s ({rate:.2} tokens/s)", self.tokens)
    }
}
