//! How well a model predicts a text, or how far its logits are from reference logits.

use backend_api::Discard;
use bench::{
    cli::{
        self, DeviceOptions, Failure, ListOption, ModelOption, OpenDevices, RunOptions, list_devices, loaded,
        print_json, tokenizer,
    },
    compare::{distance, mean_and_error, negative_log_likelihood},
    npy,
};
use clap::{Args, Parser};
use model_deepseek::{Wanted, tokenizer::Special};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Perplexity of a text as llama-perplexity measures it, or the distance from reference logits.
#[derive(Parser)]
#[command(name = "perplexity", version, args_override_self = true)]
struct Options {
    #[command(flatten)]
    model: ModelOption,
    #[command(flatten)]
    input: Input,
    /// Tokens in a chunk of the text; the second half of each is scored
    #[arg(long, value_name = "N", default_value_t = 512, conflicts_with = "reference")]
    ctx: usize,
    #[command(flatten)]
    run: RunOptions,
    /// Print one JSON object (--reference always does)
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    list: ListOption,
    #[command(flatten)]
    devices: DeviceOptions,
}

#[derive(Args)]
#[group(id = "input", required = true, multiple = false)]
struct Input {
    /// A file with the text
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// A JSON file with `tokens`, the `rows` whose logits are kept in the `.npy` file beside it (`logits`), and
    /// `mean_nll`
    #[arg(long, value_name = "REF.json")]
    reference: Option<PathBuf>,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(options: Options) -> Result<(), Failure> {
    if options.list.list_devices {
        return list_devices(&options.devices, options.json);
    }
    // One is there, as the group asks for it.
    if let Some(text) = &options.input.text {
        perplexity(&options, text)?;
    }
    if let Some(reference) = &options.input.reference {
        compare(&options, reference)?;
    }
    Ok(())
}

/// As llama-perplexity: BOS in front if the model wants it, one final newline dropped, whole chunks of `--ctx`
/// tokens, the first token of a chunk replaced by BOS, positions `ctx/2 .. ctx − 1` scored.
fn perplexity(options: &Options, file: &Path) -> Result<(), Failure> {
    let ctx = options.ctx;
    if ctx < 4 {
        return Err(format!("--ctx: expected at least 4, found {ctx}").into());
    }
    let text = read(file)?;
    let (model, devices) = (options.model.open(&options.devices)?, OpenDevices::new(&options.devices)?);
    let tokenizer = tokenizer(&model)?;
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    let tokens = tokenizer.with_bos(tokenizer.encode_bytes(text, Special::Literal));
    let chunks = tokens.len() / ctx;
    if chunks < 2 {
        let (found, needed) = (tokens.len(), 2 * ctx);
        let file = file.display();
        return Err(
            format!("{file}: expected at least {needed} tokens for --ctx {ctx}, found {found}").into()
        );
    }
    let first = if tokenizer.adds_bos() { tokenizer.bos() } else { None };
    let scored: Vec<usize> = (ctx / 2..ctx - 1).collect();
    let mut losses = Vec::with_capacity(chunks * scored.len());
    let engine = loaded(&model, &devices, &options.run.resolve(Some(ctx)))?;
    let mut session = engine.session()?;
    for (index, chunk) in tokens.chunks_exact(ctx).enumerate() {
        let mut fed = chunk.to_vec();
        fed[0] = first.unwrap_or(fed[0]);
        session.truncate(0)?;
        let mut unusable = None;
        let mut score = |position: usize, logits: &[f32]| {
            if unusable.is_none() {
                unusable = not_numbers(position, logits);
            }
            losses.push(negative_log_likelihood(logits, chunk[position + 1] as usize));
        };
        session.feed_with(&fed, Wanted::Rows(&scored), &mut score, &mut Discard)?;
        if let Some(what) = unusable {
            return Err(format!("chunk {}: {what}", index + 1).into());
        }
        eprint!("[{}]{:.4},", index + 1, mean_and_error(&losses).0.exp());
    }
    eprintln!();
    let (nll, error) = mean_and_error(&losses);
    let perplexity = nll.exp();
    let error = error * perplexity;
    let scored = losses.len();
    if options.json {
        return print_json(&json!({
            "perplexity": perplexity, "error": error, "nll": nll, "chunks": chunks, "ctx": ctx,
            "scored_tokens": scored, "tokens": tokens.len(),
        }));
    }
    let mut out = io::stdout().lock();
    writeln!(out, "PPL = {perplexity:.4} +/- {error:.5} ({scored} tokens scored, {chunks} chunks of {ctx})")?;
    Ok(())
}

/// What a reference file says.
#[derive(Deserialize)]
struct Reference {
    tokens: Vec<u32>,
    rows: Vec<usize>,
    /// The name of the `.npy` file beside it; if not given, the same name.
    logits: Option<PathBuf>,
    mean_nll: Option<f64>,
}

/// What is printed, as [`bench::compare`] defines it; `nll` is that of each next token.
#[derive(Serialize)]
struct Comparison {
    nmse: f64,
    median_row_nmse: f64,
    max_abs: f64,
    mean_nll: f64,
    reference_nll: Option<f64>,
    argmax_agreement: f64,
}

fn compare(options: &Options, file: &Path) -> Result<(), Failure> {
    let reference: Reference =
        serde_json::from_slice(&read(file)?).map_err(|error| format!("{}: {error}", file.display()))?;
    let Reference { tokens, rows, .. } = &reference;
    let wrong = |key: &str, expected: String, found: String| -> Failure {
        format!("{}: key `{key}`: expected {expected}, found {found}", file.display()).into()
    };
    let npy_file = match &reference.logits {
        // A reference may come from anywhere: it opens no file but the one beside it.
        Some(name) if name.file_name() != Some(name.as_os_str()) => {
            let expected = "the name of a file beside it, without a path".to_owned();
            return Err(wrong("logits", expected, format!("{name:?}")));
        }
        Some(name) => file.with_file_name(name),
        None => file.with_extension("npy"),
    };
    let logits = npy::read(&npy_file)?;
    if tokens.len() < 2 {
        return Err(wrong("tokens", "at least 2".to_owned(), tokens.len().to_string()));
    }
    if rows.len() != logits.rows || rows.is_empty() {
        let expected = format!("{} rows, as {} has", logits.rows, npy_file.display());
        return Err(wrong("rows", expected, rows.len().to_string()));
    }
    if let Some(row) = rows.iter().find(|row| **row >= tokens.len()) {
        return Err(wrong("rows", format!("numbers below {}, the tokens", tokens.len()), row.to_string()));
    }
    let (model, devices) = (options.model.open(&options.devices)?, OpenDevices::new(&options.devices)?);
    let vocabulary = model.config().vocabulary;
    if logits.columns != vocabulary {
        let (file, found) = (npy_file.display(), logits.columns);
        return Err(format!("{file}: expected {vocabulary} columns, the vocabulary, found {found}").into());
    }
    let mut kept = vec![0.0; rows.len() * vocabulary];
    let mut losses = Vec::with_capacity(tokens.len());
    let mut unusable = None;
    let mut each = |position: usize, row: &[f32]| {
        if unusable.is_none() {
            unusable = not_numbers(position, row);
        }
        if let Some(&next) = tokens.get(position + 1) {
            losses.push(negative_log_likelihood(row, next as usize));
        }
        let wanted = rows.iter().enumerate().filter(|(_, wanted)| **wanted == position);
        for (index, _) in wanted {
            kept[index * vocabulary..(index + 1) * vocabulary].copy_from_slice(row);
        }
    };
    let engine = loaded(&model, &devices, &options.run.resolve(Some(tokens.len())))?;
    engine.session()?.feed_with(tokens, Wanted::All, &mut each, &mut Discard)?;
    if let Some(what) = unusable {
        return Err(what.into());
    }
    let distance = distance(&logits, &kept);
    print_json(&Comparison {
        nmse: distance.nmse,
        median_row_nmse: distance.median_row_nmse,
        max_abs: distance.max_abs,
        mean_nll: mean_and_error(&losses).0,
        reference_nll: reference.mean_nll,
        argmax_agreement: distance.argmax_agreement,
    })
}

/// What is wrong with logits that say nothing.
fn not_numbers(position: usize, logits: &[f32]) -> Option<String> {
    let token = logits.iter().position(|logit| !logit.is_finite())?;
    let found = logits[token];
    Some(format!(
        "position {position}: the logit of token {token}: expected a finite number, found {found}: a weight of the model \
         is broken"
    ))
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(file).map_err(|error| format!("{}: cannot be read: {error}", file.display()).into())
}
