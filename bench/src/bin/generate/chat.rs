//! A conversation with the model's own chat template.

use bench::cli::{Failure, Rate, outliving};
use model_deepseek::{
    Engine, Error, Model, Sampler, Session, SessionError, Stop,
    chat::{ChatTemplate, Message},
    tokenizer::{Special, Tokenizer},
};
use rustyline::{DefaultEditor, error::ReadlineError};
use std::{
    io::{self, BufRead, IsTerminal, StdinLock, Write},
    ops::ControlFlow,
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

/// What a program ends with that Ctrl-C ends: 128 and the signal's number, as shells have it.
const INTERRUPTED: i32 = 130;

/// The template that came with a model: better known to be there and right before the weights are loaded.
///
/// # Errors
/// There is none, or it does not parse.
pub fn template(model: &Model) -> Result<ChatTemplate, Failure> {
    let file = model.checkpoint().path().display();
    match ChatTemplate::of(model.tokenizer()?).map_err(|error| format!("--chat: {file}: {error}"))? {
        Some(template) => Ok(template),
        None => Err(format!("--chat: {file} has no chat template").into()),
    }
}

/// Talks until the user has nothing more to say.
pub fn converse(
    engine: &Engine,
    template: ChatTemplate,
    sampler: Sampler,
    predict: usize,
) -> Result<(), Failure> {
    let model: Arc<Model> = Arc::clone(engine.model());
    let tokenizer = model.tokenizer()?;
    let session = outliving(engine.session()?);
    let cancel = session.cancel_flag();
    let answering = Arc::new(AtomicBool::new(false));
    let mut lines = Lines::new()?;
    let mut conversation = Conversation {
        tokenizer,
        template,
        messages: Vec::new(),
        session,
        sampler,
        predict,
        is_watched: matches!(lines, Lines::Editor(_)),
    };
    // At the prompt the editor sees Ctrl-C as a key; everywhere else it is a signal.
    ctrlc::set_handler({
        let (cancel, answering) = (Arc::clone(&cancel), Arc::clone(&answering));
        move || {
            if answering.load(Ordering::SeqCst) {
                cancel.store(true, Ordering::SeqCst);
            } else {
                process::exit(INTERRUPTED);
            }
        }
    })?;
    while let Some(line) = lines.next()? {
        if line.trim().is_empty() {
            continue;
        }
        // A Ctrl-C that came too late for the last answer is none of this one's.
        cancel.store(false, Ordering::SeqCst);
        answering.store(true, Ordering::SeqCst);
        conversation.answer(line)?;
        answering.store(false, Ordering::SeqCst);
    }
    Ok(())
}

struct Conversation<'m> {
    tokenizer: &'m Tokenizer,
    template: ChatTemplate,
    messages: Vec<Message>,
    session: Session,
    sampler: Sampler,
    predict: usize,
    /// By someone at a terminal, who can try again.
    is_watched: bool,
}

impl Conversation<'_> {
    /// Takes a turn of the user's, and writes the model's.
    fn answer(&mut self, line: String) -> Result<(), Failure> {
        let before = self.messages.len();
        self.messages.push(Message::new("user", line));
        let Some((ids, dropped)) = self.prompt()? else { return Ok(()) };
        let start = Instant::now();
        let new = match self.feed(&ids) {
            Ok(new) => new,
            Err(Error::Session(SessionError::Cancelled { .. })) => {
                // The turn did not happen.
                self.messages.truncate(before);
                eprintln!("(stopped)");
                return Ok(());
            }
            Err(other) => return Err(other.into()),
        };
        self.messages.drain(..dropped);
        let prefill = Rate::since(start, new);

        let start = Instant::now();
        let mut answer = String::new();
        let mut written = Ok(());
        let mut out = io::stdout().lock();
        let generated = self.session.generate(&mut self.sampler, self.predict, |_, piece| {
            answer.push_str(piece);
            written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
            if written.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        written?;
        answer.push_str(&generated.tail);
        writeln!(out, "{}", generated.tail)?;
        let decode = Rate::since(start, generated.tokens.len());
        match generated.stop {
            Stop::EndOfGeneration(_) => {}
            Stop::Limit => {
                eprintln!("notice: the answer was cut after {} tokens (give --predict more)", self.predict)
            }
            Stop::Context => {
                let context = self.session.engine().context();
                eprintln!(
                    "notice: the answer was cut: the context of {context} tokens is full (give --ctx more)"
                );
            }
            Stop::Cancelled => eprintln!("(stopped)"),
        }
        eprintln!("prefill: {prefill}; decode: {decode}");
        self.messages.push(Message::new("assistant", answer));
        Ok(())
    }

    /// The conversation as tokens: without what was said before the last message, so many messages, where the context has
    /// no room for all and a token of the answer. `None` where it has none for that message alone, which then counts as
    /// not said.
    fn prompt(&mut self) -> Result<Option<(Vec<u32>, usize)>, Failure> {
        let context = self.session.engine().context();
        let ids = self.encode(&self.messages)?;
        if ids.len() < context {
            return Ok(Some((ids, 0)));
        }
        let before = self.messages.len() - 1;
        let alone = self.encode(&self.messages[before..])?;
        if alone.len() < context {
            let all = ids.len();
            eprintln!(
                "notice: the conversation has {all} tokens, too many for the context of {context}: only your last \
                 message is kept (give --ctx more)"
            );
            return Ok(Some((alone, before)));
        }
        self.messages.truncate(before);
        let (found, least) = (alone.len(), alone.len() + 1);
        let message = format!(
            "the message has {found} tokens, too many for the context of {context}: give --ctx {least} or more"
        );
        if !self.is_watched {
            return Err(message.into());
        }
        eprintln!("notice: {message}");
        Ok(None)
    }

    fn encode(&self, messages: &[Message]) -> Result<Vec<u32>, Failure> {
        let text = self.template.render(messages, true, &serde_json::Value::Null)?;
        Ok(self.tokenizer.with_bos(self.tokenizer.encode(&text, Special::Parse)))
    }

    /// Feeds what differs from what was fed before; how many tokens that were.
    fn feed(&mut self, ids: &[u32]) -> Result<usize, Error> {
        let fed = self.session.tokens();
        let same = fed.iter().zip(ids).take_while(|(a, b)| a == b).count();
        // At least one token is fed, for its logits.
        let kept = same.min(ids.len().saturating_sub(1));
        self.session.truncate(kept)?;
        self.session.feed(&ids[kept..])?;
        Ok(ids.len() - kept)
    }
}

/// What the user says: with an editor at a terminal, else line by line.
enum Lines {
    Editor(Box<DefaultEditor>),
    /// And how many there were.
    Plain(StdinLock<'static>, usize),
}

impl Lines {
    fn new() -> Result<Self, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Lines::Plain(io::stdin().lock(), 0));
        }
        eprintln!("Ctrl-C stops an answer, Ctrl-D ends the conversation.");
        Ok(Lines::Editor(Box::new(DefaultEditor::new()?)))
    }

    /// The next line; `None` at the end.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        match self {
            Lines::Plain(input, count) => {
                *count += 1;
                plain_line(input, *count)
            }
            Lines::Editor(editor) => edited_line(editor),
        }
    }
}

/// The next line of a pipe or file. What is not UTF-8 in it is replaced: a stray byte does not end a conversation.
fn plain_line(input: &mut impl BufRead, number: usize) -> Result<Option<String>, Failure> {
    let mut bytes = Vec::new();
    if input.read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    let line = String::from_utf8(bytes).unwrap_or_else(|error| {
        eprintln!("notice: line {number} is not UTF-8: what is wrong in it is read as U+FFFD");
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    });
    let line = line.strip_suffix('\n').map_or(&*line, |line| line.strip_suffix('\r').unwrap_or(line));
    Ok(Some(line.to_owned()))
}

/// The next line from a terminal. Ctrl-C drops the line that was begun, and twice in a row ends the program.
fn edited_line(editor: &mut DefaultEditor) -> Result<Option<String>, Failure> {
    let mut was_dropped = false;
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                editor.add_history_entry(&line)?;
                return Ok(Some(line));
            }
            Err(ReadlineError::Interrupted) if was_dropped => process::exit(INTERRUPTED),
            Err(ReadlineError::Interrupted) => {
                was_dropped = true;
                eprintln!("(Ctrl-C again ends the program)");
            }
            Err(ReadlineError::Eof) => return Ok(None),
            Err(other) => return Err(other.into()),
        }
    }
}
