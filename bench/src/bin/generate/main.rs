//! Text from a model.

mod chat;
mod embedded;

use bench::cli::{
    self, DeviceOptions, Failure, ListOption, OpenDevices, Rate, RunOptions, SamplingOptions, list_devices,
    loaded, open, opened, outliving, print_json, tell, tokenizer,
};
use clap::Parser;
use model_deepseek::{Engine, Model, Sampler, Stop, tokenizer::Special};
use serde::Serialize;
use std::{
    fs,
    io::{self, Write},
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

/// Write text with a DeepSeek model. Without --model, the program's own small model writes in the manner of Jane
/// Austen. Standard output gets the text (after the prompt, if that is the program's own) or the JSON; rates and
/// progress go to standard error.
#[derive(Parser)]
#[command(name = "generate", version, args_override_self = true)]
struct Options {
    /// A GGUF file (of a split set, any of its files) or a Hugging Face directory [default: the program's own]
    #[arg(long, value_name = "FILE|DIR")]
    model: Option<PathBuf>,
    /// What the text begins with; control tokens in it, such as `<｜User｜>`, are parsed
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A file with what the text begins with
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The most tokens to write (in a chat, in each answer)
    #[arg(long, value_name = "N", default_value_t = 200)]
    predict: usize,
    /// Tokens that prompt and text may have together [default: what the model was trained for, at most 4096]
    #[arg(long, value_name = "N")]
    ctx: Option<usize>,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    run: RunOptions,
    /// Tell the whole plan: every node with its reason, and what crosses
    #[arg(long)]
    verbose: bool,
    /// Have a conversation, with the model's own chat template; Ctrl-C stops an answer and, between answers, the
    /// program; Ctrl-D ends it
    #[arg(long, conflicts_with_all = ["prompt", "prompt_file", "json"])]
    chat: bool,
    /// Print one JSON object: `text`, `tokens`, `prefill_tok_s`, `decode_tok_s`
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    list: ListOption,
    #[command(flatten)]
    devices: DeviceOptions,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(options: Options) -> Result<(), Failure> {
    if options.list.list_devices {
        return list_devices(&options.devices, options.json);
    }
    // What the user typed is checked before anything is loaded.
    let sampler = Sampler::new(options.sampling.resolve()).map_err(|error| format!("--{error}"))?;
    let prompt = options.prompt()?;
    let devices = OpenDevices::new(&options.devices)?;
    let model = match &options.model {
        Some(path) => open(path, &options.devices)?,
        None => opened(Model::new(embedded::open()?)?),
    };
    tokenizer(&model)?;
    let template = if options.chat { Some(chat::template(&model)?) } else { None };
    let engine = loaded(&model, &devices, &options.run.resolve(options.ctx))?;
    eprintln!("{}; seed {}", devices.description(), sampler.options().seed);
    tell(engine.plans(), options.verbose);
    if let Some(template) = template {
        return chat::converse(&engine, template, sampler, options.predict);
    }
    write(&options, &engine, sampler, &prompt)
}

/// What the text begins with.
struct Prompt {
    text: String,
    /// Whether the program and not the user chose it.
    own: bool,
}

impl Options {
    fn prompt(&self) -> Result<Prompt, Failure> {
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(file)) => {
                let bytes = fs::read(file);
                let bytes = bytes.map_err(|error| format!("{}: cannot be read: {error}", file.display()))?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
            (None, None) => return Ok(Prompt { text: embedded::PROMPT.to_owned(), own: true }),
        };
        if text.is_empty() {
            return Err("the prompt is empty".into());
        }
        Ok(Prompt { text, own: false })
    }
}

/// The answer of `--json`.
#[derive(Serialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    prefill_tok_s: f64,
    decode_tok_s: f64,
}

fn write(options: &Options, engine: &Engine, mut sampler: Sampler, prompt: &Prompt) -> Result<(), Failure> {
    let model: &Arc<Model> = engine.model();
    let tokenizer = model.tokenizer()?;
    let ids = tokenizer.with_bos(tokenizer.encode(&prompt.text, Special::Parse));
    if ids.len() > engine.context() {
        let (found, context) = (ids.len(), engine.context());
        return Err(format!("the prompt has {found} tokens, the context {context}: give --ctx more").into());
    }
    let mut session = outliving(engine.session()?);
    let mut stream = Stream { out: io::stdout().lock(), silent: options.json };
    if prompt.own {
        stream.say(&prompt.text)?;
    }
    let start = Instant::now();
    session.feed(&ids)?;
    let prefill = Rate::since(start, ids.len());

    let start = Instant::now();
    let mut text = String::new();
    let mut said = Ok(());
    let generated = session.generate(&mut sampler, options.predict, |_, piece| {
        text.push_str(piece);
        said = stream.say(piece);
        if said.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    said?;
    text.push_str(&generated.tail);
    stream.say(&generated.tail)?;
    let decode = Rate::since(start, generated.tokens.len());
    stream.say("\n")?;
    if options.json {
        let (prefill_tok_s, decode_tok_s) = (prefill.per_second(), decode.per_second());
        print_json(&Answer { text, tokens: generated.tokens, prefill_tok_s, decode_tok_s })?;
    }
    if generated.stop == Stop::Context {
        eprintln!("notice: the context of {} tokens is full: give --ctx more", engine.context());
    }
    eprintln!("prefill: {prefill}; decode: {decode}");
    Ok(())
}

/// Standard output as the text comes.
struct Stream<'a> {
    out: io::StdoutLock<'a>,
    silent: bool,
}

impl Stream<'_> {
    fn say(&mut self, text: &str) -> io::Result<()> {
        if self.silent {
            return Ok(());
        }
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}
