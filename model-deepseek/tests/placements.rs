//! Placement never changes the answer: random placements of real models over several devices give the bits of one
//! device, and no byte of a cache crosses (contracts C5 and C6).
//!
//! `FATHOM_PLACEMENTS` sets how many are tried for each model, `FATHOM_SEED` the first seed.

mod common;
mod placing;
mod source_bytes;

use backend_api::Discard;
use backend_cpu::{CpuDevice, CpuOptions};
use common::{embedded, open};
use graph::{Devices, StepObserver, Traffic};
use model_deepseek::{CacheType, Model, Options, Session, Wanted};
use placing::{Crossed, number, random_options};
use source_bytes::Random;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// CPU devices in the part of accelerators, and the host.
fn devices(accelerators: usize) -> Devices {
    let cpu = |name: String| -> Arc<dyn backend_api::Device> {
        let options = CpuOptions { threads: Some(1), name, ..CpuOptions::from_env().unwrap() };
        Arc::new(CpuDevice::new(options).unwrap())
    };
    let names = (1..=accelerators).map(|n| format!("cpu{n}")).chain(["cpu".to_owned()]);
    Devices::new(names.map(cpu).collect())
}

/// A prompt in two steps, then single tokens: the bits of all logits.
fn run(session: &mut Session, observer: &mut dyn StepObserver) -> Vec<u32> {
    let vocabulary = session.engine().model().config().vocabulary;
    let tokens: Vec<u32> = (0..12).map(|i| (i * 37 + 11) % vocabulary as u32).collect();
    let mut bits = Vec::new();
    for step in [&tokens[..7], &tokens[7..10], &tokens[10..11], &tokens[11..]] {
        let mut each = |_, logits: &[f32]| bits.extend(logits.iter().map(|x| x.to_bits()));
        session.feed_with(step, Wanted::All, &mut each, observer).unwrap();
    }
    bits
}

fn engine_options(cache: CacheType) -> Options {
    Options { context: Some(16), batch: 8, cache, ..Options::default() }
}

fn check(model: &Arc<Model>, seed: u64, expected: &[(CacheType, Vec<u32>)]) -> Result<(), String> {
    let mut random = Random(seed);
    let devices = devices(1 + random.below(2));
    let said = random_options(&mut random, &devices, model.config().layers());
    let (cache, expected) = &expected[random.below(expected.len())];
    let placed =
        said.place(model, &devices, &engine_options(*cache)).map_err(|error| format!("{said:?}: {error}"))?;
    let plans = placed.plans;
    let engine = model_deepseek::Engine::load(model, &devices, plans.clone(), &mut |_| ())
        .map_err(|error| format!("{said:?}: {error}"))?;
    let mut session = engine.session().map_err(|error| format!("{said:?}: {error}"))?;
    let mut crossed = Crossed::default();
    let found = run(&mut session, &mut crossed);
    if found != *expected {
        let first = found.iter().zip(expected).position(|(a, b)| a != b);
        return Err(format!("{said:?}: logit {first:?} differs from that of one device"));
    }
    let Traffic { state, weight, .. } = crossed.0;
    if said.ownership_check && (state, weight) != (0, 0) {
        return Err(format!("{said:?}: {state} bytes of caches and {weight} of weights crossed"));
    }
    // The observer saw what the plan said: seven rows and three, then one and one.
    let step = |rows, past| backend_api::Step { rows, past, outputs: rows };
    let mut planned = plans.prefill.traffic(&step(7, 0));
    planned += plans.prefill.traffic(&step(3, 7));
    planned += plans.decode.traffic(&step(1, 10));
    planned += plans.decode.traffic(&step(1, 11));
    if crossed.0 != planned {
        return Err(format!("{said:?}: planned {planned:?}, seen {:?}", crossed.0));
    }
    Ok(())
}

fn check_model(test: &str, path: &Path, count: u64) {
    let model = open(path);
    let expected: Vec<(CacheType, Vec<u32>)> = [CacheType::F16, CacheType::F32, CacheType::Q8_0]
        .into_iter()
        .map(|cache| {
            let engine = common::engine(&model, &engine_options(cache));
            (cache, run(&mut engine.session().unwrap(), &mut Discard))
        })
        .collect();
    let first = number("FATHOM_SEED", 1);
    for seed in first..first + number("FATHOM_PLACEMENTS", count) {
        if let Err(error) = check(&model, seed, &expected) {
            panic!(
                "{}: seed {seed}: {error}\nrepeat with: FATHOM_SEED={seed} FATHOM_PLACEMENTS=1 cargo test -p \
                 model-deepseek --test placements {test}",
                path.display()
            );
        }
    }
}

#[test]
fn the_embedded_model_answers_the_same_anywhere() {
    check_model("the_embedded_model", &embedded(), 300);
}

#[test]
fn shared_models_answer_the_same_anywhere() {
    let Some(models) = common::shared_models() else { return };
    let paths: [PathBuf; 5] = [
        "austen-f16.gguf",
        "austen-q8_0.gguf",
        "shapes/v2lite-like-f16.gguf",
        "shapes/v3-like-f16.gguf",
        "shapes/v3-like-hf",
    ]
    .map(|name| models.join(name));
    for path in paths {
        check_model("shared_models", &path, 60);
    }
}
