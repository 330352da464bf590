//! Placement never changes the answer: random placements of real models over several devices give the bits of one
//! device, and no byte of a cache crosses (contracts C5 and C6); what has limits keeps to them, or says that it cannot.
//!
//! `FATHOM_PLACEMENTS` sets how many are tried for each model, `FATHOM_SEED` the first seed.

mod common;
mod placing;
mod source_bytes;

use backend_api::{Device, Discard, OpDesc, OpKind, Unsupported};
use backend_cpu::{CpuDevice, CpuOptions};
use common::{embedded, open, passes_on};
use graph::{Absorb, Devices, Plan, PlanError, StepObserver, StorageKind, Traffic};
use model_deepseek::{
    CacheType, Engine, Error, Model, Options, PlacementOptions, Session, Wanted,
    placement::{Fit, GpuLayers, Shortage},
};
use placing::{Crossed, number, random_limits, random_options};
use source_bytes::Random;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A CPU that says it cannot run some operation.
struct Lacking {
    cpu: CpuDevice,
    lacks: OpKind,
}

impl Device for Lacking {
    passes_on!(cpu: info allocate import write read compile);
    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        if op.op.kind() == self.lacks {
            let (device, reason) = (self.info().name.clone(), "the test says so".to_owned());
            return Err(Unsupported { device, op: self.lacks, reason });
        }
        self.cpu.supports(op)
    }
}

/// CPU devices in the part of accelerators, which may lack an operation, and the host.
fn devices(accelerators: usize, lacks: Option<OpKind>) -> Devices {
    let cpu = |name: String| {
        let options = CpuOptions { threads: Some(1), name, ..CpuOptions::from_env().unwrap() };
        CpuDevice::new(options).unwrap()
    };
    let accelerator = |n: usize| -> Arc<dyn Device> {
        let cpu = cpu(format!("cpu{n}"));
        match lacks {
            Some(lacks) => Arc::new(Lacking { cpu, lacks }),
            None => Arc::new(cpu),
        }
    };
    let mut all: Vec<Arc<dyn Device>> = (1..=accelerators).map(accelerator).collect();
    all.push(Arc::new(cpu("cpu".to_owned())));
    Devices::new(all)
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

/// What became of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Answered,
    /// With nodes elsewhere than where they belong.
    FellBack,
    /// It could not fit.
    Short,
    /// Its device could not run a node, and it was to.
    Strict,
}

fn check(model: &Arc<Model>, seed: u64, expected: &[(CacheType, Vec<u32>)]) -> Result<Outcome, String> {
    const LACKS: [OpKind; 8] = [
        OpKind::Concat,
        OpKind::Rope,
        OpKind::LatentAttention,
        OpKind::HeadMatMul,
        OpKind::ExpertMatMul,
        OpKind::SwiGlu,
        OpKind::RmsNorm,
        OpKind::Route,
    ];
    let mut random = Random(seed);
    let accelerators = 1 + random.below(2);
    let lacks = (random.below(4) == 0).then(|| LACKS[random.below(LACKS.len())]);
    let devices = devices(accelerators, lacks);
    let said = random_options(&mut random, &devices, model.config().layers());
    let (cache, expected) = &expected[random.below(expected.len())];
    let options = engine_options(*cache);
    let said =
        random_limits(&mut random, said, model, &devices, &options).map_err(|error| error.to_string())?;
    let failed = |error: Error| format!("{said:?}, without {lacks:?}: {error}");
    let plans = match said.place(model, &devices, &options) {
        Ok(placed) => placed.plans,
        Err(Error::Shortage(shortage)) => return is_short(model, &devices, &said, &options, &shortage),
        Err(Error::Plan(PlanError::Strict { .. })) if said.strict && lacks.is_some() => {
            return Ok(Outcome::Strict);
        }
        Err(error) => return Err(failed(error)),
    };
    for (name, needs) in devices.names().iter().zip(plans.needs()) {
        let budget = said.fit.budgets.iter().find(|(other, _)| other == name);
        if budget.is_some_and(|(_, budget)| needs.total() > *budget) {
            return Err(format!("{said:?}: {name} needs {needs:?}"));
        }
    }
    for plan in [&plans.decode, &plans.prefill] {
        weights_are_in_place(plan).map_err(|error| format!("{said:?}, without {lacks:?}: {error}"))?;
    }
    let fell_back = !(plans.decode.fall_backs.is_empty() && plans.prefill.fall_backs.is_empty());
    if !fell_back && plans.decode.weights != plans.prefill.weights {
        return Err(format!("{said:?}: prompts read weights elsewhere than single tokens"));
    }
    if fell_back && (said.strict || lacks.is_none()) {
        return Err(format!("{said:?}: {:?} fell back", plans.decode.fall_backs));
    }
    let engine = Engine::load(model, &devices, plans.clone(), &mut |_| ()).map_err(failed)?;
    let mut session = engine.session().map_err(failed)?;
    let mut crossed = Crossed::default();
    let found = run(&mut session, &mut crossed);
    if found != *expected {
        let first = found.iter().zip(expected).position(|(a, b)| a != b);
        return Err(format!("{said:?}, without {lacks:?}: logit {first:?} differs from that of one device"));
    }
    let Traffic { state, weight, .. } = crossed.0;
    let (prompt, token) = (&plans.prefill, &plans.decode);
    // Of the steps of `run`: what they should move, and what of caches crosses after all, as fall-backs cost it.
    let (mut planned, mut excused) = (Traffic::default(), 0i64);
    for (plan, rows, past) in [(prompt, 7, 0), (prompt, 3, 7), (token, 1, 10), (token, 1, 11)] {
        let step = backend_api::Step { rows, past, outputs: rows };
        planned += plan.traffic(&step);
        excused += plan.fall_backs_in(&step).iter().map(|fall_back| fall_back.state_bytes).sum::<i64>();
    }
    if said.ownership_check && (state as i64 != excused || weight > 0) {
        return Err(format!(
            "{said:?}: {state} bytes of caches ({excused} excused) and {weight} of weights crossed"
        ));
    }
    if crossed.0 != planned {
        return Err(format!("{said:?}: planned {planned:?}, seen {:?}", crossed.0));
    }
    Ok(if fell_back { Outcome::FellBack } else { Outcome::Answered })
}

/// That each weight is loaded once, where it was placed: by name; if nobody did, beside its cache, if it is one that goes
/// with that; or else with its layer. Where a node fell back, the weights that it reads are with it.
fn weights_are_in_place(plan: &Plan) -> Result<(), String> {
    let (graph, placement, host) = (plan.graph(), plan.placement(), plan.devices.len() - 1);
    let layer_of = |name: &str| name.strip_prefix("blk.")?.split('.').next()?.parse::<usize>().ok();
    let device_of_layer = |layer: usize| placement.layers.get(layer).copied().unwrap_or(host);
    for (storage, weight) in graph.storages_of(StorageKind::Weight) {
        let name = weight.name.as_str();
        let layer = layer_of(name);
        let home = match layer {
            None if name == "token_embd.weight" => host,
            None => device_of_layer(placement.layers.len() - 1),
            Some(layer) => device_of_layer(layer),
        };
        let beside_cache = ["attn_k_b", "attn_v_b", "attn_kv_b"].iter().any(|part| name.contains(part));
        let cache = layer
            .map_or(home, |layer| placement.states.get(&format!("cache.{layer}")).copied().unwrap_or(home));
        let may = match (placement.weights.get(name), &placement.absorb) {
            (Some(&device), _) => vec![device],
            (None, _) if !beside_cache || !placement.ownership_check => vec![home],
            (None, Absorb::Owner) => vec![cache],
            (None, Absorb::Layer) => vec![home],
            (None, Absorb::Auto(_)) => vec![home, cache],
        };
        let fell = |device| {
            let reads = |node: usize| {
                graph.nodes()[node].inputs.iter().any(|&input| graph.info(input).storage == storage)
            };
            plan.fall_backs.iter().any(|fall_back| fall_back.runs_on == device && reads(fall_back.node))
        };
        let places: Vec<usize> =
            plan.weights.iter().filter(|place| place.storage == storage).map(|place| place.device).collect();
        if places.len() != 1 || !may.contains(&places[0]) && !fell(places[0]) {
            return Err(format!("{name} is on devices {places:?}, not on one of {may:?}"));
        }
    }
    Ok(())
}

/// Whether a shortage is one: the least that was said is too much, which for one accelerator is known.
fn is_short(
    model: &Model,
    devices: &Devices,
    said: &PlacementOptions,
    options: &Options,
    shortage: &Shortage,
) -> Result<Outcome, String> {
    let wrong = |what: &str| Err(format!("{said:?}: {what}: {shortage}"));
    for short in &shortage.devices {
        let given = (short.device.clone(), short.budget);
        if !said.fit.on || !said.fit.budgets.contains(&given) || short.needs.total() <= short.budget {
            return wrong("nobody gave it that little");
        }
    }
    if devices.host() == 1 {
        let least = PlacementOptions {
            gpu_layers: said.gpu_layers.or(Some(GpuLayers::Last(0))),
            cpu_moe: true,
            host_caches: true,
            fit: Fit { on: false, budgets: Vec::new() },
            ..said.clone()
        };
        let plans = least.place(model, devices, options).map_err(|error| format!("{said:?}: {error}"))?.plans;
        if plans.needs()[0].total() <= shortage.devices[0].budget {
            return wrong("it could fit");
        }
    }
    Ok(Outcome::Short)
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
    let (first, count) = (number("FATHOM_SEED", 1), number("FATHOM_PLACEMENTS", count));
    let mut outcomes: BTreeMap<Outcome, u64> = BTreeMap::new();
    for seed in first..first + count {
        match check(&model, seed, &expected) {
            Ok(outcome) => *outcomes.entry(outcome).or_default() += 1,
            Err(error) => panic!(
                "{}: seed {seed}: {error}\nrepeat with: FATHOM_SEED={seed} FATHOM_PLACEMENTS=1 cargo test -p \
                 model-deepseek --test placements {test}",
                path.display()
            ),
        }
    }
    println!("{}: {outcomes:?}", path.display());
    // A few need not show everything.
    if count >= 50 {
        let of = |outcome| outcomes.get(&outcome).copied().unwrap_or(0);
        assert!(2 * of(Outcome::Answered) > count, "{outcomes:?}");
        assert_eq!(outcomes.len(), 4, "{outcomes:?}");
    }
}

#[test]
fn the_embedded_model_answers_the_same_anywhere() {
    check_model("the_embedded_model", &embedded(), 420);
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
