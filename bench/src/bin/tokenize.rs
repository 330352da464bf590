//! Text to token ids, and back.

use bench::{
    cli::{self, Failure, print_json},
    jsonl,
};
use clap::{Args, Parser};
use model_deepseek::tokenizer::{Special, Tokenizer};
use serde_json::json;
use std::{
    fmt::Display,
    fs,
    io::{self, BufRead, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Print the token ids of a text and the piece of each, or turn ids back into text. Only the tokenizer is read: the
/// file may end after its keys, of a split set the first file will do, the directory need not hold weights.
#[derive(Parser)]
#[command(name = "tokenize", version)]
struct Options {
    /// A GGUF file, or a directory with a `tokenizer.json`
    #[arg(long, value_name = "FILE|DIR")]
    model: PathBuf,
    #[command(flatten)]
    input: Input,
    /// Parse control tokens that are written out in the text, such as `<｜User｜>`
    #[arg(long)]
    special: bool,
    /// Put the token that begins a text in front
    #[arg(long, conflicts_with = "decode")]
    bos: bool,
    /// The other way round: the input is ids (a JSON array, or numbers apart), the output text
    #[arg(long)]
    decode: bool,
    /// Print one JSON object: `ids` and `pieces`, or with --decode `text` (--jsonl prints JSON always)
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// The text
    #[arg(long, value_name = "T", allow_hyphen_values = true)]
    text: Option<String>,
    /// A file with the text; bytes that are not UTF-8 are replaced by U+FFFD
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,
    /// Read one JSON string a line from standard input and answer one JSON array of ids a line; with --decode
    /// the other way round. Blank lines are skipped; half of a surrogate pair, such as "\ud800", is U+FFFD
    #[arg(long)]
    jsonl: bool,
}

fn main() -> ExitCode {
    cli::main(run)
}

fn run(options: Options) -> Result<(), Failure> {
    let tokenizer = Codec::open(&options)?;
    if options.input.jsonl {
        return answer_lines(&tokenizer, options.decode);
    }
    let input = match options.input.file {
        Some(file) => {
            fs::read(&file).map_err(|error| format!("{}: cannot be read: {error}", file.display()))?
        }
        // One is there, as the group asks for it.
        None => options.input.text.unwrap_or_default().into_bytes(),
    };
    if options.decode {
        let bytes = tokenizer.decode(&parse_ids(&input)?)?;
        if options.json {
            return print_json(&json!({ "text": String::from_utf8_lossy(&bytes) }));
        }
        io::stdout().lock().write_all(&bytes)?;
        return Ok(());
    }
    let ids = tokenizer.encode(&input);
    let pieces: Vec<_> = ids.iter().map(|&id| tokenizer.piece(id)).collect();
    if options.json {
        return print_json(&json!({ "ids": ids, "pieces": pieces }));
    }
    let mut out = io::stdout().lock();
    for (id, piece) in ids.iter().zip(pieces) {
        writeln!(out, "{id}\t{}", serde_json::to_string(&piece)?)?;
    }
    Ok(())
}

/// Answers each line of standard input as soon as it comes.
fn answer_lines(tokenizer: &Codec, decode: bool) -> Result<(), Failure> {
    let mut input = io::stdin().lock();
    let mut line = Vec::new();
    for number in 1.. {
        let wrong = |error: &dyn Display| format!("standard input, line {number}: {error}");
        line.clear();
        if input.read_until(b'\n', &mut line).map_err(|error| wrong(&error))? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        if decode {
            let ids = jsonl::ids(&line).map_err(|e| wrong(&format!("expected a JSON array of ids: {e}")))?;
            let bytes = tokenizer.decode(&ids).map_err(|error| wrong(&error))?;
            print_json(&String::from_utf8_lossy(&bytes))?;
        } else {
            let text = jsonl::text(&line).map_err(|e| wrong(&format!("expected a JSON string: {e}")))?;
            print_json(&tokenizer.encode(text.as_bytes()))?;
        }
    }
    Ok(())
}

/// A tokenizer, and how texts are to be encoded.
struct Codec {
    tokenizer: Tokenizer,
    special: Special,
    bos: Option<u32>,
}

impl Codec {
    fn open(options: &Options) -> Result<Self, Failure> {
        let tokenizer = Tokenizer::open(&options.model)?;
        let bos = match (options.bos, tokenizer.bos()) {
            (false, _) => None,
            (true, Some(bos)) => Some(bos),
            (true, None) => {
                let file = options.model.display();
                return Err(format!("--bos: {file} names no token that begins a text").into());
            }
        };
        let special = if options.special { Special::Parse } else { Special::Literal };
        Ok(Codec { tokenizer, special, bos })
    }

    fn encode(&self, text: &[u8]) -> Vec<u32> {
        let ids = self.tokenizer.encode_bytes(text, self.special);
        self.bos.into_iter().chain(ids).collect()
    }

    fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Failure> {
        Ok(self.tokenizer.decode(ids)?)
    }

    fn piece(&self, id: u32) -> String {
        String::from_utf8_lossy(self.tokenizer.piece(id).unwrap_or_default()).into_owned()
    }
}

/// `[1, 2]`, or `1 2`, or `1,2`.
fn parse_ids(text: &[u8]) -> Result<Vec<u32>, Failure> {
    let text = String::from_utf8_lossy(text);
    let is_between = |c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']');
    let id = |word: &str| word.parse().map_err(|_| format!("expected a token id, found {word:?}").into());
    text.split(is_between).filter(|word| !word.is_empty()).map(id).collect()
}
