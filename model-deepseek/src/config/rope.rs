//! Rotary position embedding and the two ways of stretching it to longer contexts.

use std::f64::consts::TAU;

/// Rotary position embedding (RoFormer, arXiv 2104.09864) of interleaved pairs, as all DeepSeek models have it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Elements that turn, in pairs; even.
    pub dims: usize,
    /// `θ` of the papers: pair `i` turns by `base^(-2i / dims)` radians a position.
    pub base: f64,
    /// How the frequencies were changed for longer contexts.
    pub scaling: RopeScaling,
    /// Factor on cosine and sine. 1 for all published DeepSeek models.
    pub magnitude: f64,
}

/// How frequencies were changed for contexts longer than the first training's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// By how much the context grew.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071), "NTK by parts": slow pairs are interpolated, fast ones stay, those between are
    /// mixed.
    Yarn {
        /// By how much the context grew.
        factor: f64,
        /// Tokens of the first training.
        original_context: f64,
        /// Pairs that make more turns than this within the original context stay.
        beta_fast: f64,
        /// Pairs that make fewer turns than this within the original context are interpolated.
        beta_slow: f64,
    },
}

impl Rope {
    /// Radians per position of each pair: `dims / 2` values.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let dims = self.dims as f64;
        let plain = (0..self.dims / 2).map(|pair| self.base.powf(-2.0 * pair as f64 / dims));
        match self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|theta| theta / factor).collect(),
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow } => {
                // The (fractional) pair that makes this many turns within the original context.
                let turning =
                    |turns: f64| dims * (original_context / (TAU * turns)).ln() / (2.0 * self.base.ln());
                let low = turning(beta_fast).floor().max(0.0);
                // A bound in elements for a number of pairs: as the models were trained.
                let high = turning(beta_slow).ceil().min(dims - 1.0);
                plain
                    .enumerate()
                    .map(|(pair, theta)| {
                        let keep = 1.0 - ((pair as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                        theta / factor * (1.0 - keep) + theta * keep
                    })
                    .collect()
            }
        }
    }
}

/// YaRN's attention factor for a context that grew by `factor`: `1 + multiplier × ln(factor)`. The paper's
/// multiplier is 0.1.
pub(super) fn growth(multiplier: f64, factor: f64) -> f64 {
    1.0 + multiplier * factor.ln()
}
