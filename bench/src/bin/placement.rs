//! What a model would do on some devices, and why: without its weights, and without the devices.

use backend_api::Step;
use bench::cli::{
    self, DeviceOptions, Failure, ListOption, ModelOption, OpenDevices, RunOptions, list_devices, placed,
    print_json, report,
};
use clap::{Parser, ValueEnum};
use graph::{Comparison, Needs, Plan, picture};
use model_deepseek::Model;
use std::{
    env,
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
};

/// Show what runs where and why, what crosses between devices, and what memory that takes. Reads a model's header
/// only, and no device need be there: name a hypothetical one with --device null:gpu:24GiB.
#[derive(Parser)]
#[command(name = "placement", version, args_override_self = true)]
struct Options {
    #[command(flatten)]
    model: ModelOption,
    /// Tokens in the step: 1 to decode, more to read a prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Rows of the caches that the step reads, with its own [default: all of --ctx]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    kv_len: Option<u32>,
    /// Tokens that the caches hold [default: what the model was trained for, at most 4096]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    /// Show two placements side by side: this one, and the same with further options, such as
    /// `--compare="--cpu-moe -nkvo"` [without a value: with --ownership-check off]
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true,
          default_missing_value = "--ownership-check off")]
    compare: Option<String>,
    /// What to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    #[command(flatten)]
    run: RunOptions,
    #[command(flatten)]
    list: ListOption,
    #[command(flatten)]
    devices: DeviceOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Splits, nodes, transfers, memory
    Table,
    /// The same as one JSON object
    Json,
    /// A picture (of one placement)
    Svg,
}

/// The options after `--compare`.
#[derive(Parser)]
#[command(name = "--compare", no_binary_name = true, disable_help_flag = true)]
struct Second {
    #[command(flatten)]
    devices: DeviceOptions,
}

/// A plan, the step it is shown for, and what each device must have.
type Planned = (Arc<Plan>, Step, Vec<Needs>);

fn main() -> ExitCode {
    match with_equals(env::args_os()) {
        Ok(args) => cli::main_from(args, run),
        Err(failure) => cli::exit(Err(failure)),
    }
}

/// Options in quotes after `--compare` are its value, also where no `=` says so.
///
/// # Errors
/// A single option there, which may be its value, from which the shell has taken the quotes, or not.
fn with_equals(args: impl Iterator<Item = OsString>) -> Result<Vec<OsString>, Failure> {
    let mut joined: Vec<OsString> = Vec::new();
    for arg in args {
        let text = arg.to_string_lossy();
        match joined.last_mut() {
            Some(last) if last == "--compare" && text.contains(char::is_whitespace) => {
                last.push("=");
                last.push(arg);
            }
            Some(last) if last == "--compare" && cli::is_option::<Second>(&arg) => {
                return Err(format!(
                    "--compare: is {text} of the second placement or of both? Write --compare=\"{text} …\", or put \
                     --compare last"
                )
                .into());
            }
            _ => joined.push(arg),
        }
    }
    Ok(joined)
}

fn run(options: Options) -> Result<(), Failure> {
    if options.list.list_devices {
        return list_devices(&options.devices, options.format == Format::Json);
    }
    let second = options.second()?;
    let model = options.model.open(&options.devices)?;
    let (plan, step, needs) = options.plan(&model, &options.devices)?;
    let first = report(&plan, &step, &needs);
    let Some(second) = second else {
        return match options.format {
            Format::Table => print(&first),
            Format::Json => print_json(&first),
            Format::Svg => print(&picture::svg(&plan, &step, &needs)),
        };
    };
    let (plan, step, needs) = options.plan(&model, &second)?;
    let comparison = Comparison::new(first, report(&plan, &step, &needs));
    match options.format {
        Format::Json => print_json(&comparison),
        _ => print(&comparison),
    }
}

/// Everything at once: a reader that leaves early is no failure.
fn print(what: &impl Display) -> Result<(), Failure> {
    Ok(write!(io::stdout().lock(), "{what}")?)
}

impl Options {
    /// The devices and wishes that `--compare` asks for.
    fn second(&self) -> Result<Option<DeviceOptions>, Failure> {
        let Some(more) = &self.compare else { return Ok(None) };
        if self.format == Format::Svg {
            return Err(
                "--compare: expected --format table or json, found svg, which shows one placement".into()
            );
        }
        let words = shlex::split(more).ok_or_else(|| format!("--compare: a quote is open in `{more}`"))?;
        let second = cli::parse::<Second>("--compare", words)?;
        Ok(Some(second.devices.over(&self.devices)))
    }

    /// The plan of the step that is asked for, and what each device must have to run the model: for single tokens and for
    /// prompts.
    fn plan(&self, model: &Arc<Model>, devices: &DeviceOptions) -> Result<Planned, Failure> {
        let devices = OpenDevices::new(devices)?;
        let rows = self.tokens as usize;
        let run = self.run.resolve(self.ctx);
        // The step has room, whatever prompts are cut into; none at all is an error, here as elsewhere.
        let batch = if run.batch == 0 { 0 } else { run.batch.max(rows) };
        let plans = placed(model, &devices, &model_deepseek::Options { batch, ..run })?;
        let needs = plans.needs();
        let plan = if rows == 1 { plans.decode } else { plans.prefill };
        let context = plan.capacity.kv_len;
        if rows > context {
            return Err(format!("--tokens {rows}: expected at most the context of {context} tokens").into());
        }
        let kv_len = self.kv_len.map_or(context, |n| n as usize);
        if kv_len < rows || kv_len > context {
            return Err(format!(
                "--kv-len: expected {rows} to {context} rows (--tokens to --ctx), found {kv_len}"
            )
            .into());
        }
        let outputs = plan.capacity.outputs.min(1);
        Ok((plan, Step { rows, past: kv_len - rows, outputs }, needs))
    }
}
