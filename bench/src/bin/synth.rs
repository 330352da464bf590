//! Writes a model file with random weights, to measure with.

use bench::{
    cli::{self, Failure, Progress},
    synth::{file::SynthFile, shapes::ModelShape, types::FileFormat},
};
use clap::Parser;
use std::{path::PathBuf, process::ExitCode, time::Instant};

/// Write a GGUF file of the shape of a published model, with random weights of sane size, the tensor types that
/// llama.cpp's quantizer chooses, and a vocabulary of the real size. The file appears under its name only when
/// it is whole.
#[derive(Parser)]
#[command(name = "synth", version)]
struct Options {
    /// Whose shape
    #[arg(long, value_name = "SHAPE")]
    shape: ModelShape,
    /// Only the first N layers [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    layers: Option<u16>,
    /// Format of the weights
    #[arg(long, value_name = "FORMAT")]
    format: FileFormat,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write a sparse file of the full size that holds the header alone: enough to plan with
    #[arg(long)]
    header_only: bool,
    /// The same seed gives the same weights
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(options: Options) -> Result<(), Failure> {
    let layers = options.layers.map(usize::from);
    let file = SynthFile::new(&options.shape, layers, options.format, options.seed)?;
    let failed = |error: std::io::Error| format!("{}: cannot be written: {error}", options.out.display());
    let start = Instant::now();
    if options.header_only {
        file.write_header_only(&options.out).map_err(failed)?;
    } else {
        let progress = Progress::bytes("writing", file.bytes());
        file.write(&options.out, |bytes| progress.add(bytes)).map_err(failed)?;
    }
    let (gb, seconds) = (file.bytes() as f64 / 1e9, start.elapsed().as_secs_f64());
    eprintln!("{}: {gb:.3} GB in {seconds:.2} s ({:.0} MB/s)", options.out.display(), 1e3 * gb / seconds);
    Ok(())
}
