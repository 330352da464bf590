//! A session: one sequence of tokens, its caches, and what can be done with it.

mod saved;

use crate::{Engine, Error, model::cache_name, sampling::Sampler};
use backend_api::{Discard, Step};
use graph::{Executor, Plan, States, StepObserver};
use std::{
    fmt,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use thiserror::Error;

/// What a session cannot do.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionError {
    /// More tokens than the caches hold.
    #[error("{new} tokens after {past} are more than the context of {context} tokens")]
    ContextFull {
        /// Tokens to be fed.
        new: usize,
        /// Tokens fed before.
        past: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// Nothing to feed, or nothing fed to go on from.
    #[error("there are no tokens to go on from: the prompt is empty")]
    Empty,
    /// A token that the embedding has no row for.
    #[error("token {token}: expected one below {vocabulary}, the size of the vocabulary")]
    UnknownToken {
        /// The token.
        token: u32,
        /// How many there are.
        vocabulary: usize,
    },
    /// Rows for which logits are wanted, but not in rising order below the number of tokens.
    #[error("rows wanted: expected rising numbers below {tokens}, found {row}")]
    Rows {
        /// The first that is wrong.
        row: usize,
        /// Tokens to be fed.
        tokens: usize,
    },
    /// A session cannot be cut to more tokens than it has.
    #[error("cannot keep {wanted} tokens of {found}")]
    Truncate {
        /// Tokens to keep.
        wanted: usize,
        /// Tokens there are.
        found: usize,
    },
    /// The [cancel flag](Session::cancel_flag) was raised. What was fed before stays fed.
    #[error("cancelled after {fed} of {tokens} tokens")]
    Cancelled {
        /// Tokens that were fed.
        fed: usize,
        /// Tokens that were to be.
        tokens: usize,
    },
    /// The system has no memory for it.
    #[error("{what}: expected memory for {bytes} bytes, found none")]
    Memory {
        /// For what.
        what: &'static str,
        /// How much it takes.
        bytes: usize,
    },
    /// Bytes that no session of this engine was saved as.
    #[error("saved session: {what}: expected {expected}, found {found}")]
    Saved {
        /// What in it.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
}

/// The rows of a feed whose logits are wanted: each costs a row of the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// None.
    Nothing,
    /// Of the last token, as generating needs.
    Last,
    /// Of these, as indices into the tokens fed, rising.
    Rows(&'a [usize]),
    /// Of all.
    All,
}

/// Why generating ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model drew this token, which ends what it has to say. It was not fed.
    EndOfGeneration(u32),
    /// As many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
    /// The callback broke off, or the [cancel flag](Session::cancel_flag) was raised.
    Cancelled,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The tokens that the callback saw.
    pub tokens: Vec<u32>,
    /// What the callback did not see, because the last tokens began a character that no token completed: U+FFFD, or
    /// nothing.
    pub tail: String,
    /// Why there are no more.
    pub stop: Stop,
}

/// One sequence: the tokens fed so far and a latent row for each of them in every layer's cache.
pub struct Session {
    engine: Engine,
    states: States,
    decode: Executor,
    /// Compiled when the first step of several tokens comes.
    prefill: Option<Executor>,
    tokens: Vec<u32>,
    /// Of the last token; empty where they were not wanted.
    last: Vec<f32>,
    cancel: Arc<AtomicBool>,
    step: StepBuffers,
    /// Hears of lost devices, if the session is to go on without them.
    on_loss: Option<OnLoss>,
}

type OnLoss = Arc<dyn Fn(&Error) + Send + Sync>;

/// Bytes of a step, kept so that steps allocate nothing.
#[derive(Default)]
struct StepBuffers {
    tokens: Vec<i32>,
    outputs: Vec<i32>,
    logits: Vec<f32>,
}

impl Session {
    pub(crate) fn new(engine: &Engine) -> Result<Session, Error> {
        let (plan, devices) = (&engine.plans().decode, engine.devices());
        let states = States::allocate(plan, devices).map_err(|error| Error::from(error).advised(devices))?;
        let decode = executor(engine, plan, &states)?;
        Ok(Session {
            engine: engine.clone(),
            states,
            decode,
            prefill: None,
            tokens: reserved("the tokens of a session", engine.context())?,
            last: Vec::new(),
            cancel: Arc::default(),
            step: StepBuffers::default(),
            on_loss: None,
        })
    }

    /// From now on a device that is lost in a step is gone on without, as [`Engine::without`] has it, and the step runs
    /// again: `told` hears of it first. Only where the device had a cache, the step fails, as all do without this call.
    /// Holds for forks, too.
    pub fn go_on_without_lost_devices(&mut self, told: impl Fn(&Error) + Send + Sync + 'static) {
        self.on_loss = Some(Arc::new(told));
    }

    /// The engine it runs on.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tokens fed so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that still fit.
    pub fn room(&self) -> usize {
        self.engine.context() - self.tokens.len()
    }

    /// The logits after the last token, `[vocabulary]`; `None` if they were not wanted of it, or the session was
    /// cut since.
    pub fn logits(&self) -> Option<&[f32]> {
        (!self.last.is_empty()).then_some(&self.last)
    }

    /// Raise it, from any thread, to end a running feed before its next step, or generating before its next
    /// token. It falls when it was obeyed.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancel)
    }

    /// Feeds tokens, in steps of at most a batch; the logits after the last one.
    ///
    /// # Errors
    /// [`SessionError::Empty`], [`SessionError::UnknownToken`] and [`SessionError::ContextFull`] before anything
    /// is fed; [`SessionError::Cancelled`] and [`Error::Run`] (as [`Error::Advised`] where a device that is lost took
    /// caches with it) between two steps: then [`Session::tokens`] says what is in.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], Error> {
        self.feed_with(tokens, Wanted::Last, &mut |_, _| (), &mut Discard)?;
        Ok(&self.last)
    }

    /// As [`Session::feed`], for any rows: `each` gets the index into `tokens` and the logits. An observer sees
    /// what devices do.
    ///
    /// # Errors
    /// As [`Session::feed`]; [`SessionError::Rows`].
    pub fn feed_with(
        &mut self,
        tokens: &[u32],
        wanted: Wanted<'_>,
        each: &mut dyn FnMut(usize, &[f32]),
        observer: &mut dyn StepObserver,
    ) -> Result<(), Error> {
        self.check(tokens, wanted)?;
        let vocabulary = self.engine.model().config().vocabulary;
        let mut fed = 0;
        while fed < tokens.len() {
            if self.cancel.swap(false, Ordering::Relaxed) {
                return Err(SessionError::Cancelled { fed, tokens: tokens.len() }.into());
            }
            let rows = self.select_rows(fed, tokens.len(), wanted);
            self.run(&tokens[fed..fed + rows], observer)?;
            let logits = self.step.logits.chunks_exact(vocabulary);
            for (row, logits) in self.step.outputs.iter().zip(logits) {
                each(fed + *row as usize, logits);
            }
            fed += rows;
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32], wanted: Wanted<'_>) -> Result<(), SessionError> {
        let (new, past, context) = (tokens.len(), self.tokens.len(), self.engine.context());
        let vocabulary = self.engine.model().config().vocabulary;
        if tokens.is_empty() {
            return Err(SessionError::Empty);
        }
        if new > context - past {
            return Err(SessionError::ContextFull { new, past, context });
        }
        if let Some(&token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(SessionError::UnknownToken { token, vocabulary });
        }
        if let Wanted::Rows(rows) = wanted {
            let rising = |i: usize| rows[i] < new && (i == 0 || rows[i - 1] < rows[i]);
            if let Some(wrong) = (0..rows.len()).find(|i| !rising(*i)) {
                return Err(SessionError::Rows { row: rows[wrong], tokens: new });
            }
        }
        Ok(())
    }

    /// Rows of the next step: no more than a batch, and no more wanted ones than a step gives logits of. Leaves
    /// the wanted ones in the step's buffers.
    fn select_rows(&mut self, fed: usize, tokens: usize, wanted: Wanted<'_>) -> usize {
        let capacity = self.engine.prefill_capacity();
        let mut rows = capacity.rows.min(tokens - fed);
        let outputs = &mut self.step.outputs;
        outputs.clear();
        match wanted {
            Wanted::Nothing => {}
            Wanted::Last => outputs.extend((fed + rows == tokens).then_some(rows as i32 - 1)),
            Wanted::All => {
                rows = rows.min(capacity.outputs);
                outputs.extend(0..rows as i32);
            }
            Wanted::Rows(all) => {
                let ahead = &all[all.partition_point(|row| *row < fed)..];
                // A wanted row that does not fit any more begins the next step.
                if let Some(first_left) = ahead.get(capacity.outputs) {
                    rows = rows.min(first_left - fed);
                }
                let local = ahead.iter().map(|row| row - fed).take_while(|row| *row < rows);
                outputs.extend(local.map(|row| row as i32));
            }
        }
        rows
    }

    /// Runs one step for the wanted rows in the step's buffers, reads their logits and keeps the last token's: again, as
    /// long as devices that are lost in it can be gone on without.
    fn run(&mut self, tokens: &[u32], observer: &mut dyn StepObserver) -> Result<(), Error> {
        while let Err(error) = self.try_to_run(tokens, observer) {
            self.recover(error)?;
        }
        self.tokens.extend_from_slice(tokens);
        self.last.clear();
        if self.step.outputs.last() == Some(&(tokens.len() as i32 - 1)) {
            let vocabulary = self.engine.model().config().vocabulary;
            self.last.extend_from_slice(&self.step.logits[self.step.logits.len() - vocabulary..]);
        }
        Ok(())
    }

    /// Feeds a token for its logits, whoever wants to stop.
    fn feed_one(&mut self, token: u32) -> Result<(), Error> {
        self.step.outputs.clear();
        self.step.outputs.push(0);
        self.run(&[token], &mut Discard)
    }

    /// Leaves the device behind whose loss is the error, or returns the error.
    fn recover(&mut self, error: Error) -> Result<(), Error> {
        let (Some(told), Some(device)) = (&self.on_loss, error.lost_device()) else { return Err(error) };
        let lost = self.engine.called(device);
        // Rows of the failed step may be in the caches already: they are written before they count.
        let caches = self.engine.plans().decode.states.iter().filter(|place| lost.contains(&place.device));
        let caches = caches.count();
        if caches > 0 {
            let advice = format!(
                "the caches of {caches} layers went with it, and the session cannot go on; with --no-kv-offload it can"
            );
            return Err(Error::Advised { error: error.into(), advice });
        }
        if !self.engine.plans().use_any(&lost) {
            return Err(error);
        }
        told(&error);
        let engine = self.engine.without(device, &mut |_| ())?;
        if engine.plans().use_any(&lost) {
            return Err(error);
        }
        self.decode = executor(&engine, &engine.plans().decode, &self.states)?;
        self.prefill = None;
        self.engine = engine;
        Ok(())
    }

    fn try_to_run(&mut self, tokens: &[u32], observer: &mut dyn StepObserver) -> Result<(), Error> {
        let executor = if tokens.len() == 1 {
            &mut self.decode
        } else {
            if self.prefill.is_none() {
                self.prefill = Some(executor(&self.engine, &self.engine.plans().prefill, &self.states)?);
            }
            match &mut self.prefill {
                Some(prefill) => prefill,
                None => &mut self.decode,
            }
        };
        let StepBuffers { tokens: ids, outputs, logits } = &mut self.step;
        ids.clear();
        ids.extend(tokens.iter().map(|token| *token as i32));
        let step = Step { rows: tokens.len(), past: self.tokens.len(), outputs: outputs.len() };
        let inputs = [("tokens", bytemuck::cast_slice(ids)), ("outputs", bytemuck::cast_slice(outputs))];
        let ran = executor.run(&step, &inputs, observer);
        ran.map_err(|error| Error::from(error).advised(self.engine.devices()))?;
        logits.resize(outputs.len() * self.engine.model().config().vocabulary, 0.0);
        if !outputs.is_empty() {
            executor.read("logits", logits)?;
        }
        Ok(())
    }

    /// Draws up to `limit` tokens, each after what is in the session, and feeds them. The callback sees each token
    /// before it is fed, with the text that it completes (a character may take several tokens), and may break; what it
    /// has seen is fed all the same, so that the session goes on where its reader is.
    ///
    /// # Errors
    /// [`SessionError::Empty`] if nothing was fed; [`Error::Tokenizer`], [`Error::Sampling`], [`Error::Run`].
    pub fn generate(
        &mut self,
        sampler: &mut Sampler,
        limit: usize,
        mut each: impl FnMut(u32, &str) -> ControlFlow<()>,
    ) -> Result<Generated, Error> {
        let model = Arc::clone(self.engine.model());
        let tokenizer = model.tokenizer()?;
        // Rows of the head beyond the vocabulary are padding.
        let vocabulary = tokenizer.size().min(model.config().vocabulary);
        let mut decoder = tokenizer.decoder();
        let mut tokens = Vec::new();
        self.recall_logits()?;
        let stop = loop {
            if self.cancel.swap(false, Ordering::Relaxed) {
                break Stop::Cancelled;
            }
            if tokens.len() == limit {
                break Stop::Limit;
            }
            if self.room() == 0 {
                break Stop::Context;
            }
            let token = sampler.sample(&self.last[..vocabulary], &self.tokens)?;
            if tokenizer.is_end_of_generation(token) {
                break Stop::EndOfGeneration(token);
            }
            tokens.push(token);
            let flow = each(token, &decoder.push(token)?);
            self.feed_one(token)?;
            if flow.is_break() {
                self.cancel.store(false, Ordering::Relaxed);
                break Stop::Cancelled;
            }
        };
        Ok(Generated { tokens, tail: decoder.finish(), stop })
    }

    /// Feeds the last token again if its logits are not known.
    fn recall_logits(&mut self) -> Result<(), Error> {
        if !self.last.is_empty() {
            return Ok(());
        }
        let token = self.tokens.pop().ok_or(SessionError::Empty)?;
        let fed = self.feed_one(token);
        if fed.is_err() {
            // Its rows are still in the caches.
            self.tokens.push(token);
        }
        fed
    }

    /// Keeps the first `tokens` tokens and forgets the rest.
    ///
    /// # Errors
    /// [`SessionError::Truncate`].
    pub fn truncate(&mut self, tokens: usize) -> Result<(), Error> {
        let found = self.tokens.len();
        if tokens > found {
            return Err(SessionError::Truncate { wanted: tokens, found }.into());
        }
        if tokens < found {
            // Rows past the end are never read, and are written before they count again.
            self.tokens.truncate(tokens);
            self.last.clear();
        }
        Ok(())
    }

    /// A second session with the same past, which then goes its own way. Weights are shared, caches copied.
    ///
    /// # Errors
    /// As [`Engine::session`]; [`SessionError::Memory`].
    pub fn fork(&self) -> Result<Session, Error> {
        let mut fork = Session::new(&self.engine)?;
        let size = self.tokens.len() * self.cache_row_bytes();
        let mut rows = reserved("a layer's cache to fork", size)?;
        rows.resize(size, 0);
        for layer in 0..self.engine.model().config().layers() {
            self.states.read(&cache_name(layer), 0, &mut rows)?;
            fork.states.write(&cache_name(layer), 0, &rows)?;
        }
        fork.tokens.extend_from_slice(&self.tokens);
        fork.last.clone_from(&self.last);
        fork.on_loss.clone_from(&self.on_loss);
        Ok(fork)
    }

    fn cache_row_bytes(&self) -> usize {
        let width = self.engine.model().config().attention.cache_width();
        self.engine.cache_type().dtype().row_bytes(width)
    }
}

fn executor(engine: &Engine, plan: &Arc<Plan>, states: &States) -> Result<Executor, Error> {
    let (devices, weights) = (engine.devices(), engine.weights());
    let executor = Executor::new(Arc::clone(plan), devices, weights, states);
    executor.map_err(|error| Error::from(error).advised(devices))
}

/// An empty vector with room for `count` values: a long context makes them many, and a server that is asked for one
/// has other sessions to go on with.
fn reserved<T>(what: &'static str, count: usize) -> Result<Vec<T>, SessionError> {
    let mut values = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    values.try_reserve_exact(count).map_err(|_| SessionError::Memory { what, bytes })?;
    Ok(values)
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("engine", &self.engine)
            .field("tokens", &self.tokens.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        assert!(reserved::<u8>("the past", 100).unwrap().capacity() >= 100);
        for count in [usize::MAX, usize::MAX / 8, 1 << 60] {
            let error = reserved::<u32>("the past", count).unwrap_err();
            assert_eq!(error, SessionError::Memory { what: "the past", bytes: count.saturating_mul(4) });
            assert!(error.to_string().starts_with("the past: expected memory for "), "{error}");
        }
    }
}
