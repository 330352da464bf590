//! From logits to a token.
//!
//! The steps and their order are llama.cpp's: repetition penalty, top-k, top-p, min-p, temperature, draw. All
//! arithmetic is f64 and the generator is this crate's own, so that a seed gives the same text for ever.

use thiserror::Error;

/// How tokens are drawn. The default takes the best token always.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits before the draw. 0: the best token always.
    pub temperature: f32,
    /// Keep this many of the best tokens. 0: all.
    pub top_k: usize,
    /// Keep the fewest best tokens whose probabilities sum to this (nucleus sampling, arXiv 1904.09751). 1: all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the best (arXiv 2407.01082). 0: all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens (CTRL, arXiv 1909.05858). 1: none.
    pub repeat_penalty: f32,
    /// Tokens that count as recent.
    pub repeat_last: usize,
    /// Start of the generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repeat_penalty: 1.0,
            repeat_last: 64,
            seed: 0,
        }
    }
}

/// Why no token can be drawn.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum SamplingError {
    /// An option out of its range.
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// Which.
        option: &'static str,
        /// Its range.
        expected: &'static str,
        /// Its value.
        found: f32,
    },
    /// A logit is NaN: the model's weights are broken.
    #[error("the logit of token {0} is NaN: a weight of the model is broken")]
    Broken(usize),
    /// Every logit is minus infinity.
    #[error("none of the {0} logits is above minus infinity")]
    NoCandidate(usize),
}

/// Draws tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: Sampling,
    state: u64,
    /// Reused from draw to draw.
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    logit: f32,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn new(options: Sampling) -> Result<Self, SamplingError> {
        let Sampling { temperature, top_p, min_p, repeat_penalty, .. } = options;
        let checks = [
            ("temperature", temperature, temperature >= 0.0, "0 or more"),
            ("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "more than 0, at most 1"),
            ("min-p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
            ("repeat-penalty", repeat_penalty, repeat_penalty > 0.0, "more than 0"),
        ];
        for (option, found, holds, expected) in checks {
            if !holds || !found.is_finite() {
                return Err(SamplingError::Option { option, expected, found });
            }
        }
        let state = options.seed;
        Ok(Sampler { options, state, candidates: Vec::new(), weights: Vec::new() })
    }

    /// One that takes the best token always.
    pub fn greedy() -> Self {
        Sampler { options: Sampling::default(), state: 0, candidates: Vec::new(), weights: Vec::new() }
    }

    /// The options it was made with.
    pub fn options(&self) -> &Sampling {
        &self.options
    }

    /// Draws a token. `logits` has one entry for each token of the vocabulary; `tokens` are those so far, of
    /// which the last few count as recent. Of equal logits the lower token is the better.
    ///
    /// # Errors
    /// [`SamplingError::Broken`], [`SamplingError::NoCandidate`].
    pub fn sample(&mut self, logits: &[f32], tokens: &[u32]) -> Result<u32, SamplingError> {
        // Not left out: what else the model says would be no more to be trusted.
        if let Some(token) = logits.iter().position(|logit| logit.is_nan()) {
            return Err(SamplingError::Broken(token));
        }
        self.collect(logits, tokens);
        if self.candidates.is_empty() {
            return Err(SamplingError::NoCandidate(logits.len()));
        }
        if self.options.temperature == 0.0 {
            let best = self.candidates.iter().copied().reduce(|a, b| if b.logit > a.logit { b } else { a });
            return best.map(|best| best.token).ok_or(SamplingError::NoCandidate(logits.len()));
        }
        self.keep_top_k();
        self.keep_top_p();
        self.keep_min_p();
        Ok(self.draw())
    }

    /// All tokens with a logit above minus infinity, penalised, in order of tokens.
    fn collect(&mut self, logits: &[f32], tokens: &[u32]) {
        let all = (0..).zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        self.candidates.clear();
        self.candidates.extend(all.map(|(token, &logit)| Candidate { token, logit: logit.min(f32::MAX) }));
        let penalty = self.options.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut recent = tokens[tokens.len().saturating_sub(self.options.repeat_last)..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        for token in recent {
            if let Ok(at) = self.candidates.binary_search_by_key(&token, |candidate| candidate.token) {
                let logit = &mut self.candidates[at].logit;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Sorts the candidates, the best first, and keeps `top_k`.
    fn keep_top_k(&mut self) {
        let better = |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, better);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(better);
    }

    fn keep_top_p(&mut self) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let wanted = f64::from(self.options.top_p) * self.weigh(1.0);
        let mut sum = 0.0;
        let reaches = |weight: &f64| {
            sum += weight;
            sum >= wanted
        };
        if let Some(last) = self.weights.iter().position(reaches) {
            self.candidates.truncate(last + 1);
        }
    }

    fn keep_min_p(&mut self) {
        if self.options.min_p <= 0.0 {
            return;
        }
        // p >= min_p × p_best, in logits.
        let bound = f64::from(self.candidates[0].logit) + f64::from(self.options.min_p).ln();
        let kept = self.candidates.partition_point(|candidate| f64::from(candidate.logit) >= bound);
        self.candidates.truncate(kept.max(1));
    }

    fn draw(&mut self) -> u32 {
        let sum = self.weigh(f64::from(self.options.temperature));
        let mut left = self.uniform() * sum;
        for (candidate, weight) in self.candidates.iter().zip(&self.weights) {
            left -= weight;
            if left < 0.0 {
                return candidate.token;
            }
        }
        // Rounding may leave a rest; it belongs to the last candidate that has any weight.
        let last = self.weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0);
        self.candidates[last].token
    }

    /// Fills `weights` with the candidates' unnormalised probabilities at a temperature; their sum.
    fn weigh(&mut self, temperature: f64) -> f64 {
        let best = f64::from(self.candidates[0].logit);
        let weight = |candidate: &Candidate| ((f64::from(candidate.logit) - best) / temperature).exp();
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(weight));
        self.weights.iter().sum()
    }

    /// In `[0, 1)`: splitmix64 (Steele, Lea, Flood 2014), the upper 53 bits.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}
