//! A conversation with the model's own chat template.

use bench::cli::{Failure, Rate};
use model_deepseek::{
    Engine, Error, Model, Sampler, Session, SessionError,
    chat::{ChatTemplate, Message},
    tokenizer::{Special, Tokenizer},
};
use rustyline::{DefaultEditor, error::ReadlineError};
use std::{
    io::{self, BufRead, IsTerminal, Write},
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

/// Talks until the user has nothing more to say.
pub fn converse(engine: &Engine, sampler: Sampler, predict: usize) -> Result<(), Failure> {
    let model: Arc<Model> = Arc::clone(engine.model());
    let tokenizer = model.tokenizer()?;
    let template = ChatTemplate::of(tokenizer)?;
    let template = template.ok_or_else(|| {
        let file = model.checkpoint().path().display();
        format!("--chat: {file} has no chat template")
    })?;
    let session = engine.session()?;
    let cancel = session.cancel_flag();
    // At the prompt the editor sees Ctrl-C as a key; here it is a signal.
    ctrlc::set_handler(move || cancel.store(true, Ordering::Relaxed))?;
    let mut conversation =
        Conversation { tokenizer, template, messages: Vec::new(), session, sampler, predict };
    let mut lines = Lines::new()?;
    while let Some(line) = lines.next()? {
        if line.trim().is_empty() {
            continue;
        }
        conversation.answer(line)?;
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
}

impl Conversation<'_> {
    /// Takes a turn of the user's, and writes the model's.
    fn answer(&mut self, line: String) -> Result<(), Failure> {
        // A Ctrl-C between two answers is none of this one's.
        self.session.cancel_flag().store(false, Ordering::Relaxed);
        self.messages.push(Message::new("user", line));
        let text = self.template.render(&self.messages, true, &serde_json::Value::Null)?;
        let ids = self.tokenizer.with_bos(self.tokenizer.encode(&text, Special::Parse));
        let start = Instant::now();
        let new = match self.feed(&ids) {
            Ok(new) => new,
            Err(Error::Session(SessionError::Cancelled { .. })) => {
                self.messages.pop();
                eprintln!("(stopped)");
                return Ok(());
            }
            Err(Error::Session(full @ SessionError::ContextFull { .. })) => {
                self.messages.clear();
                eprintln!("error: {full}: the conversation begins anew (give --ctx more)");
                return Ok(());
            }
            Err(other) => return Err(other.into()),
        };
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
        eprintln!("prefill: {prefill}; decode: {decode}");
        self.messages.push(Message::new("assistant", answer));
        Ok(())
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
    Plain(io::Lines<io::StdinLock<'static>>),
}

impl Lines {
    fn new() -> Result<Self, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Lines::Plain(io::stdin().lock().lines()));
        }
        eprintln!("Ctrl-C stops an answer, Ctrl-D ends the conversation.");
        Ok(Lines::Editor(Box::new(DefaultEditor::new()?)))
    }

    /// The next line; `None` at the end.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        let editor = match self {
            Lines::Plain(lines) => return Ok(lines.next().transpose()?),
            Lines::Editor(editor) => editor,
        };
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line)?;
                    return Ok(Some(line));
                }
                // Ctrl-C drops the line that was begun.
                Err(ReadlineError::Interrupted) => {}
                Err(ReadlineError::Eof) => return Ok(None),
                Err(other) => return Err(other.into()),
            }
        }
    }
}
