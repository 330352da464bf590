//! What each filter keeps, that draws follow the probabilities, and that a seed is a seed.

use model_deepseek::{Sampler, Sampling, SamplingError};
use std::collections::BTreeMap;

/// How often each token is drawn.
fn draws(options: Sampling, logits: &[f32], tokens: &[u32], n: usize) -> BTreeMap<u32, usize> {
    let mut sampler = Sampler::new(options).unwrap();
    let mut counts = BTreeMap::new();
    for _ in 0..n {
        *counts.entry(sampler.sample(logits, tokens).unwrap()).or_default() += 1;
    }
    counts
}

fn hot() -> Sampling {
    Sampling { temperature: 1.0, ..Sampling::default() }
}

/// Logits of these probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

/// Probabilities 0.05, 0.5, 0.15, 0.3: which tokens each filter leaves.
#[test]
fn filters_keep_what_they_say() {
    let logits = logits(&[0.05, 0.5, 0.15, 0.3]);
    let table: [(Sampling, &[u32]); 14] = [
        (hot(), &[0, 1, 2, 3]),
        (Sampling { top_k: 1, ..hot() }, &[1]),
        (Sampling { top_k: 2, ..hot() }, &[1, 3]),
        (Sampling { top_k: 9, ..hot() }, &[0, 1, 2, 3]),
        (Sampling { top_p: 0.49, ..hot() }, &[1]),
        (Sampling { top_p: 0.7, ..hot() }, &[1, 3]),
        (Sampling { top_p: 0.9, ..hot() }, &[1, 2, 3]),
        (Sampling { min_p: 0.61, ..hot() }, &[1]),
        (Sampling { min_p: 0.59, ..hot() }, &[1, 3]),
        (Sampling { min_p: 1.0, ..hot() }, &[1]),
        // The order: top-p sums what top-k left, 0.5 and 0.3 of 0.8.
        (Sampling { top_k: 2, top_p: 0.6, ..hot() }, &[1]),
        (Sampling { top_k: 2, top_p: 0.63, ..hot() }, &[1, 3]),
        // Temperature comes last: it does not change what is kept.
        (Sampling { temperature: 5.0, top_p: 0.7, ..hot() }, &[1, 3]),
        (Sampling { temperature: 0.0, ..hot() }, &[1]),
    ];
    for (options, kept) in table {
        let counts = draws(options.clone(), &logits, &[], 2000);
        assert_eq!(counts.keys().copied().collect::<Vec<_>>(), kept, "{options:?}");
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let p = [0.05f32, 0.5, 0.15, 0.3];
    for temperature in [0.5f32, 1.0, 2.0] {
        let n = 40_000;
        let counts = draws(Sampling { temperature, seed: 7, ..hot() }, &logits(&p), &[], n);
        let powers = p.map(|p| f64::from(p).powf(1.0 / f64::from(temperature)));
        let sum: f64 = powers.iter().sum();
        let mut chi_square = 0.0;
        for (token, power) in powers.iter().enumerate() {
            let expected = power / sum * n as f64;
            let found = counts.get(&(token as u32)).copied().unwrap_or(0) as f64;
            chi_square += (found - expected).powi(2) / expected;
        }
        // 99.9 % of samples of this distribution (three degrees of freedom) stay below 16.3.
        assert!(chi_square < 16.3, "temperature {temperature}: {chi_square}, {counts:?}");
    }
}

/// These tokens were drawn once and must be drawn for ever: saved seeds depend on it.
#[test]
fn a_seed_gives_the_same_tokens_for_ever() {
    let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 100) as f32 / 20.0).collect();
    let sequence = |seed| {
        let mut sampler = Sampler::new(Sampling { top_k: 40, seed, ..hot() }).unwrap();
        (0..8).map(|_| sampler.sample(&logits, &[]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(sequence(0), sequence(0));
    assert_ne!(sequence(0), sequence(1));
    assert_eq!(sequence(42), SEED_42);
}

const SEED_42: [u32; 8] = [67, 81, 62, 16, 27, 56, 35, 48];

#[test]
fn the_penalty_weighs_recent_tokens() {
    let greedy = |penalty, last, logits: &[f32], tokens: &[u32]| {
        let options = Sampling { repeat_penalty: penalty, repeat_last: last, ..Sampling::default() };
        Sampler::new(options).unwrap().sample(logits, tokens).unwrap()
    };
    let positive = [4.0, 3.0, 1.0];
    let negative = [-1.0, -1.5, -4.0];
    assert_eq!(greedy(1.0, 64, &positive, &[0]), 0);
    assert_eq!(greedy(2.0, 64, &positive, &[0]), 1, "4 / 2 < 3");
    assert_eq!(greedy(2.0, 64, &positive, &[0, 0, 0, 1]), 0, "once for each token: 2 and 1.5");
    assert_eq!(greedy(2.0, 64, &negative, &[0]), 1, "-1 × 2 < -1.5");
    assert_eq!(greedy(2.0, 1, &positive, &[0, 2]), 0, "0 is not recent");
    assert_eq!(greedy(2.0, 0, &positive, &[0]), 0, "nothing is recent");
    assert_eq!(greedy(2.0, 64, &positive, &[0, 99]), 1, "a token beyond the logits is no candidate");
}

#[test]
fn ties_go_to_the_lower_token() {
    let logits = [1.0, 3.0, 3.0, 3.0, 0.0];
    assert_eq!(Sampler::greedy().sample(&logits, &[]).unwrap(), 1);
    let counts = draws(Sampling { top_k: 2, ..hot() }, &logits, &[], 1000);
    assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn minus_infinity_is_no_candidate_and_nan_an_error() {
    let nan = f32::NAN;
    let inf = f32::INFINITY;
    for options in [Sampling::default(), hot(), Sampling { top_p: 0.9, min_p: 0.1, ..hot() }] {
        let sample = |logits: &[f32]| Sampler::new(options.clone()).unwrap().sample(logits, &[]);
        assert_eq!(sample(&[-inf, -inf, 1.0, -inf]), Ok(2), "{options:?}");
        assert_eq!(sample(&[0.0, inf, 1.0]), Ok(1), "{options:?}");
        assert_eq!(sample(&[-inf, -inf]), Err(SamplingError::NoCandidate(2)), "{options:?}");
        assert_eq!(sample(&[0.0, 9.0, nan]), Err(SamplingError::Broken(2)), "{options:?}");
        assert_eq!(sample(&[]), Err(SamplingError::NoCandidate(0)), "{options:?}");
    }
    // A temperature so low that all but the best weigh nothing.
    let cold = Sampling { temperature: 1e-30, ..hot() };
    assert_eq!(draws(cold, &[1.0, 1.1, 0.9], &[], 100).into_keys().collect::<Vec<_>>(), [1]);
}

#[test]
fn options_out_of_range_are_named() {
    let table = [
        (Sampling { temperature: -1.0, ..hot() }, "temperature"),
        (Sampling { temperature: f32::NAN, ..hot() }, "temperature"),
        (Sampling { temperature: f32::INFINITY, ..hot() }, "temperature"),
        (Sampling { top_p: 0.0, ..hot() }, "top-p"),
        (Sampling { top_p: 1.1, ..hot() }, "top-p"),
        (Sampling { min_p: -0.1, ..hot() }, "min-p"),
        (Sampling { min_p: 1.1, ..hot() }, "min-p"),
        (Sampling { repeat_penalty: 0.0, ..hot() }, "repeat-penalty"),
    ];
    for (options, name) in table {
        let error = Sampler::new(options.clone()).unwrap_err().to_string();
        assert!(error.starts_with(name), "{options:?}: {error}");
    }
}
