//! Conversations as the text a model was trained on: the chat template that comes with it, a Jinja program, rendered
//! as Hugging Face's `apply_chat_template` does it.
//!
//! ```
//! use model_deepseek::chat::{ChatTemplate, Message};
//!
//! // from a model: ChatTemplate::of(&tokenizer)
//! let source = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
//!               {% if add_generation_prompt %}<assistant>{% endif %}";
//! let template = ChatTemplate::new(source, "<s>", "</s>")?;
//! let text = template.render(&[Message::new("user", "Hello!")], true, &serde_json::Value::Null)?;
//! assert_eq!(text, "<s><user>Hello!<assistant>");
//! # Ok::<(), model_deepseek::chat::ChatError>(())
//! ```
//!
//! What users write goes through a template as it is. A user who types `<｜User｜>` thus forges a turn, in every
//! engine that encodes the whole text with [`Special::Parse`](crate::tokenizer::Special::Parse).

mod bounds;
mod python;

use crate::tokenizer::Tokenizer;
use bounds::Bounds;
use minijinja::{
    Environment, Error, ErrorKind, State, UndefinedBehavior, Value, escape_formatter, machinery,
    syntax::SyntaxConfig, value::Serde,
};
use minijinja_contrib::pycompat;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt, thread,
    time::{SystemTime, UNIX_EPOCH},
};
use thiserror::Error as ThisError;

/// Steps that a template may take for a conversation: several times what the published ones need. One that loops
/// without end is then an error rather than a hang. Bytes that it makes are paid with the same, see [`bounds`].
fn fuel(messages: usize, bytes: usize) -> u64 {
    20_000 + 1_000 * messages as u64 + bytes as u64 / 8
}

/// Bytes of a template; published ones have up to 20,000.
const LONGEST_SOURCE: usize = 128 << 10;

/// Bytes of address space; memory is taken as far as it is used.
const STACK: usize = 512 << 20;

/// One turn of a conversation. It serialises to, and from, the objects that chat APIs use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`, or what else the template knows.
    pub role: String,
    /// What is said. `None` for an assistant that only calls tools.
    #[serde(default)]
    pub content: Option<String>,
    /// Further fields that the template may read, such as `tool_calls` or `reasoning_content`.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A turn of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: Some(content.into()), more: serde_json::Map::new() }
    }
}

/// Why a template cannot be used or a conversation not be rendered.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum ChatError {
    /// The template refuses the conversation (`raise_exception`); the message is its own.
    #[error("the chat template refuses: {0}")]
    Raised(String),
    /// The template does not parse or fails.
    #[error("chat template{}: {message}", line.map_or(String::new(), |line| format!(", line {line}")))]
    Template {
        /// What is wrong.
        message: String,
        /// Where, counted from 1.
        line: Option<usize>,
    },
    /// The further variables are no object.
    #[error("chat template variables: expected a JSON object or null, found {0}")]
    Variables(String),
}

impl From<Error> for ChatError {
    fn from(error: Error) -> ChatError {
        let mut cause = error.source();
        while let Some(inner) = cause {
            if let Some(Raised(message)) = inner.downcast_ref() {
                return ChatError::Raised(message.clone());
            }
            cause = inner.source();
        }
        let message = match error.detail() {
            None if error.kind() == ErrorKind::OutOfFuel => {
                "out of fuel: it takes more steps, or makes more text, than a conversation of this length may"
                    .into()
            }
            Some(detail) => format!("{}: {detail}", error.kind()),
            None => error.kind().to_string(),
        };
        ChatError::Template { message, line: error.line() }
    }
}

/// What a template gave to `raise_exception`, on its way through the engine's own error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// A chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of those tokens, empty if there are none.
    ///
    /// The environment is Hugging Face's: `trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`,
    /// `strftime_now` (in UTC), the methods of Python's strings, lists and dictionaries, and a `tojson` that writes
    /// what Python's `json.dumps` does.
    ///
    /// # Errors
    /// [`ChatError::Template`] for a source that does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, ChatError> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        // It writes a value's debug form, which Jinja has no function for.
        environment.remove_global("debug");
        environment.set_debug(false);
        environment.set_formatter(|output, state, value| match python::literal(value) {
            Some(text) => Ok(output.write_str(text)?),
            None => escape_formatter(output, state, value),
        });
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
        });
        environment.add_function("strftime_now", |format: &str| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            python::strftime(format, now.as_secs())
        });
        if source.len() > LONGEST_SOURCE {
            let message = format!("expected at most {LONGEST_SOURCE} bytes, found {}", source.len());
            return Err(ChatError::Template { message, line: None });
        }
        let environment = aside(move || {
            environment.add_template_owned(NAME, source.to_owned())?;
            Ok(environment)
        })?;
        Ok(ChatTemplate { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The template that came with a tokenizer; `None` if none did.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, ChatError> {
        let text = |id: Option<u32>| {
            let piece = id.and_then(|id| tokenizer.piece(id)).unwrap_or_default();
            String::from_utf8_lossy(piece).into_owned()
        };
        let new = |source| ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()));
        tokenizer.chat_template().map(new).transpose()
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant is to speak. `extra` are
    /// further variables that the template knows, such as `{"tools": [..], "enable_thinking": false}`, or null.
    ///
    /// # Errors
    /// What the template raises or where it fails; `extra` that is no object.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &serde_json::Value,
    ) -> Result<String, ChatError> {
        let own = serde_json::json!({
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
        });
        let mut variables = match extra {
            serde_json::Value::Null => serde_json::Map::new(),
            serde_json::Value::Object(extra) => extra.clone(),
            other => return Err(ChatError::Variables(other.to_string())),
        };
        variables.extend(own.as_object().cloned().unwrap_or_default());
        let bytes = variables.values().map(|value| value.to_string().len()).sum();
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel(messages.len(), bytes)));
        aside(move || {
            let variables = Value::from(Serde(variables));
            let bounds = Bounds::new(&variables)?;
            environment.add_test(bounds::WITHIN_BOUNDS, move |state: &State<'_, '_>, value: &Value| {
                bounds.hold(state, value)
            });
            environment.add_test(bounds::MAY_BE_SET, move |state: &State<'_, '_>, pair: &Value| {
                bounds.set(state, pair)
            });
            environment.add_test(bounds::NO_NAMESPACE, bounds::no_namespace);
            environment.set_unknown_method_callback(move |state, value, method, arguments| {
                if let ("format", Some(format)) = (method, value.as_str()) {
                    bounds.format(state, format, arguments)?;
                }
                pycompat::unknown_method_callback(state, value, method, arguments)
            });
            Ok(run(&environment, variables)?)
        })
    }
}

/// Renders the template, with its steps [measured](bounds::measured).
fn run(environment: &Environment<'_>, variables: Value) -> Result<String, Error> {
    let template = environment.get_template(NAME)?;
    let compiled = machinery::get_compiled_template(&template);
    let program = bounds::measured(&compiled.instructions);
    let blocks: BTreeMap<_, _> =
        compiled.blocks.iter().map(|(name, block)| (*name, bounds::measured(block))).collect();
    let escape = compiled.initial_auto_escape.clone();
    let mut text = String::new();
    let mut output = machinery::make_string_output(&mut text);
    machinery::eval(environment, &program, variables, &blocks, &mut output, escape)?;
    Ok(text)
}

/// Does what a template wants on a thread of its own, whose stack holds the deepest nesting that
/// [`LONGEST_SOURCE`] bytes can express, and where a panic of the template engine ends in an error.
fn aside<T: Send>(work: impl FnOnce() -> Result<T, ChatError> + Send) -> Result<T, ChatError> {
    let failed = |message: String| ChatError::Template { message, line: None };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("chat template".to_owned()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, work);
        let thread = thread.map_err(|error| failed(format!("no thread to render it: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(failed("the template engine gave up on it".to_owned())))
    })
}

/// No file extension: nothing is escaped for HTML.
const NAME: &str = "chat";
