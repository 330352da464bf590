//! How fast a model runs, and how near that is to what the machine could do.

use backend_api::{Observer, OpEvent};
use bench::{
    cli::{
        self, DeviceOptions, Failure, ListOption, ModelOption, OpenDevices, RunOptions, list_devices, loaded,
        print_json, tell,
    },
    compare::median,
    synth::blocks::Random,
};
use clap::{Parser, ValueEnum};
use graph::{Plan, StepObserver, Transfer};
use model_deepseek::{Engine, Session, Wanted};
use serde::Serialize;
use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

/// Measure the speed of reading a prompt (prefill) and of writing tokens one at a time (decode), on random
/// tokens, as llama-bench does; and compare it with rates measured in the same run: of reading memory, which
/// bounds decode, and of 8-bit multiply-accumulates, which bound prefill.
#[derive(Parser)]
#[command(name = "throughput", version, args_override_self = true)]
struct Options {
    #[command(flatten)]
    model: ModelOption,
    /// Tokens of the prompts to measure [default: 512, unless only --decode is given]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    prefill: Vec<u32>,
    /// Tokens to decode [default: 64, unless only --prefill is given]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    decode: Vec<u32>,
    /// Tokens in the cache before each test
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    depth: Vec<u32>,
    /// Times each test is run
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    #[command(flatten)]
    run: RunOptions,
    /// Tell the whole plan: every node with its reason, and what crosses
    #[arg(long)]
    verbose: bool,
    /// What to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    #[command(flatten)]
    list: ListOption,
    #[command(flatten)]
    devices: DeviceOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A Markdown table with llama-bench's columns
    Table,
    /// One JSON object
    Json,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Prefill,
    Decode,
}

#[derive(Clone, Copy)]
struct Test {
    kind: Kind,
    tokens: usize,
    depth: usize,
}

#[derive(Serialize)]
struct Report {
    model: String,
    threads: usize,
    roofline: Roofline,
    tests: Vec<Outcome>,
}

/// What the machine can do at most, with the same threads.
#[derive(Clone, Copy, Serialize)]
struct Roofline {
    /// 10⁹ bytes read per second.
    read_gb_s: f64,
    /// 10⁹ 8-bit multiply-accumulates per second.
    int8_gmac_s: f64,
}

#[derive(Serialize)]
struct Outcome {
    test: Kind,
    tokens: usize,
    depth: usize,
    median_tok_s: f64,
    /// Of every repeat.
    all: Vec<f64>,
    /// 10⁹ bytes of weights and caches read per second.
    gb_s: f64,
    /// Of the reading rate for decode, of the multiply-accumulate rate for prefill.
    share_of_limit: f64,
    /// Of the time, what went neither into operations nor into copies between devices, in a run beside the timed ones;
    /// `null` where a device does not tell the time of operations.
    share_outside: Option<f64>,
    /// What was handed to queues of devices in that run, and of how many dispatches, for each of its steps.
    submissions: f64,
    dispatches: f64,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(options: Options) -> Result<(), Failure> {
    if options.list.list_devices {
        return list_devices(&options.devices, options.format == Format::Json);
    }
    let tests = options.tests();
    let context = tests.iter().map(|test| test.depth + test.tokens).max();
    let model = options.model.open(&options.devices)?;
    let devices = OpenDevices::new(&options.devices)?;
    let engine = loaded(&model, &devices, &options.run.resolve(context))?;
    eprintln!("{}", devices.description());
    tell(engine.plans(), options.verbose);
    let roofline = roofline(devices.threads);
    let mut outcomes = Vec::with_capacity(tests.len());
    for test in tests {
        eprintln!("measuring {} …", test.name());
        outcomes.push(measure(&engine, test, options.repeat, roofline)?);
    }
    let name = options.model.path()?.display().to_string();
    let report = Report { model: name, threads: devices.threads, roofline, tests: outcomes };
    match options.format {
        Format::Json => print_json(&report),
        Format::Table => Ok(print_table(&report, &engine, &devices.description())?),
    }
}

impl Options {
    fn tests(&self) -> Vec<Test> {
        let (mut prefill, mut decode) = (self.prefill.clone(), self.decode.clone());
        if prefill.is_empty() && decode.is_empty() {
            (prefill, decode) = (vec![512], vec![64]);
        }
        let at = |depth: u32| {
            let test =
                move |kind, tokens: &u32| Test { kind, tokens: *tokens as usize, depth: depth as usize };
            let prefill = prefill.iter().map(move |tokens| test(Kind::Prefill, tokens));
            prefill.chain(decode.iter().map(move |tokens| test(Kind::Decode, tokens)))
        };
        self.depth.iter().copied().flat_map(at).collect()
    }
}

impl Test {
    /// As llama-bench names it.
    fn name(&self) -> String {
        named(self.kind, self.tokens, self.depth)
    }
}

fn named(kind: Kind, tokens: usize, depth: usize) -> String {
    let kind = if kind == Kind::Prefill { "pp" } else { "tg" };
    let depth = if depth == 0 { String::new() } else { format!(" @ d{depth}") };
    format!("{kind}{tokens}{depth}")
}

#[cfg(feature = "cpu")]
fn roofline(threads: usize) -> Roofline {
    use backend_cpu::peak;
    Roofline { read_gb_s: peak::read_gb_s(threads, 1 << 30), int8_gmac_s: peak::int8_gmac_s(threads) }
}

/// A build without the CPU device has no host, and ends before it measures.
#[cfg(not(feature = "cpu"))]
fn roofline(_threads: usize) -> Roofline {
    Roofline { read_gb_s: f64::NAN, int8_gmac_s: f64::NAN }
}

/// Sums up what the devices say they did.
#[derive(Default)]
struct Work {
    bytes: u64,
    macs: u64,
    /// In operations and copies.
    time: Duration,
    /// Whether the time of an operation is not known.
    untimed: bool,
    submissions: usize,
    dispatches: usize,
}

impl Observer for Work {
    fn wants_ops(&self) -> bool {
        true
    }

    fn op(&mut self, event: OpEvent<'_>) {
        self.bytes += event.bytes;
        self.macs += event.macs;
        self.time += event.time.unwrap_or_default();
        self.untimed |= event.time.is_none();
    }

    fn submitted(&mut self, submissions: usize, dispatches: usize) {
        self.submissions += submissions;
        self.dispatches += dispatches;
    }
}

impl StepObserver for Work {
    fn transfer(&mut self, _: &Plan, _: &Transfer, _: u64, time: Duration) {
        self.time += time;
    }
}

fn measure(engine: &Engine, test: Test, repeat: u32, roofline: Roofline) -> Result<Outcome, Failure> {
    let mut session = engine.session()?;
    let mut tokens =
        RandomTokens { random: Random::new(0, "tokens"), size: engine.model().config().vocabulary };
    if test.depth > 0 {
        session.feed(&tokens.draw(test.depth))?;
    }
    // The first run warms caches up and counts the work; it is not timed.
    let mut work = Work::default();
    let seconds = run_once(&mut session, test, &mut tokens, &mut work)?;
    let share_outside = (!work.untimed).then(|| 1.0 - work.time.as_secs_f64() / seconds);
    let mut rates = Vec::with_capacity(repeat as usize);
    for _ in 0..repeat {
        let seconds = run_once(&mut session, test, &mut tokens, &mut backend_api::Discard)?;
        rates.push(test.tokens as f64 / seconds);
    }
    let median_tok_s = median(&mut rates.clone());
    let median_seconds = test.tokens as f64 / median_tok_s;
    let gb_s = work.bytes as f64 / median_seconds / 1e9;
    let share_of_limit = match test.kind {
        Kind::Prefill => work.macs as f64 / median_seconds / 1e9 / roofline.int8_gmac_s,
        Kind::Decode => gb_s / roofline.read_gb_s,
    };
    let Test { kind, tokens, depth } = test;
    let steps = match kind {
        Kind::Prefill => tokens.div_ceil(engine.plans().prefill.capacity.rows),
        Kind::Decode => tokens,
    };
    let [submissions, dispatches] = [work.submissions, work.dispatches].map(|n| n as f64 / steps as f64);
    Ok(Outcome {
        test: kind,
        tokens,
        depth,
        median_tok_s,
        all: rates,
        gb_s,
        share_of_limit,
        share_outside,
        submissions,
        dispatches,
    })
}

/// Seconds that a test took; the session is cut back to the test's depth.
fn run_once(
    session: &mut Session,
    test: Test,
    tokens: &mut RandomTokens,
    observer: &mut dyn StepObserver,
) -> Result<f64, Failure> {
    let tokens = tokens.draw(test.tokens);
    let step = match test.kind {
        Kind::Prefill => tokens.len(),
        Kind::Decode => 1,
    };
    let start = Instant::now();
    for step in tokens.chunks(step) {
        session.feed_with(step, Wanted::Last, &mut |_, _| (), observer)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    session.truncate(test.depth)?;
    Ok(seconds)
}

struct RandomTokens {
    random: Random,
    size: usize,
}

impl RandomTokens {
    fn draw(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| (self.random.bits() % self.size as u64) as u32).collect()
    }
}

fn print_table(report: &Report, engine: &Engine, device: &str) -> io::Result<()> {
    let Roofline { read_gb_s, int8_gmac_s } = report.roofline;
    let bytes: u64 = engine.model().checkpoint().tensors().map(|tensor| tensor.bytes).sum();
    let file = engine.model().checkpoint().path().file_name().unwrap_or_default().to_string_lossy();
    let size = bytes as f64 / (1u64 << 30) as f64;
    let threads = report.threads;
    let mut out = io::stdout().lock();
    writeln!(out, "{device}; reads {read_gb_s:.1} GB/s, {int8_gmac_s:.0} int8 GMAC/s\n")?;
    writeln!(out, "| model | size | threads | test | t/s | GB/s | of limit |")?;
    writeln!(out, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for outcome in &report.tests {
        let name = named(outcome.test, outcome.tokens, outcome.depth);
        let (mean, deviation) = mean_and_deviation(&outcome.all);
        let (gb_s, share) = (outcome.gb_s, 100.0 * outcome.share_of_limit);
        let rate = format!("{mean:.2} ± {deviation:.2}");
        writeln!(out, "| {file} | {size:.2} GiB | {threads} | {name} | {rate} | {gb_s:.2} | {share:.0} % |")?;
    }
    Ok(())
}

/// Mean and standard deviation of a sample, as llama-bench prints them.
fn mean_and_deviation(rates: &[f64]) -> (f64, f64) {
    let n = rates.len() as f64;
    let mean = rates.iter().sum::<f64>() / n;
    let squares: f64 = rates.iter().map(|rate| (rate - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0)).sqrt())
}
