//! Random placements of models over the CPU and a Vulkan device: the logits of the CPU alone within the devices' bounds,
//! the same greedy text until two tokens are closer than the error of their logits, what crosses as planned, and no byte of a
//! cache.
//!
//! `FATHOM_PLACEMENTS` sets how many are tried, `FATHOM_SEED` the first seed. Where there is no Vulkan device nothing is
//! tried, unless `FATHOM_REQUIRE_VULKAN` is set.

mod common;
mod placing;
mod routes;
mod source_bytes;

use backend_api::{Device, Observer, Precision, Step};
use backend_cpu::{CpuDevice, CpuOptions};
use backend_vulkan::{DeviceClass, VulkanDevice, VulkanOptions};
use common::{Difference, argmax, embedded, open, random::Shape};
use graph::{Devices, Plan, StepObserver, Traffic, Transfer};
use model_deepseek::{CacheType, Engine, Model, Options, PlacementOptions, Plans, Wanted};
use placing::{Crossed, number, random_options};
use routes::Routes;
use source_bytes::Random;
use std::{sync::Arc, time::Duration};

/// Of the median row of a placement.
const BOUND: f64 = 1e-5;

/// Rows that are further off than rounding takes them: some expert is another, here or earlier.
const ROUNDING: f64 = 1e-8;

/// A prompt in steps of many tokens and of one, and what follows greedily.
const PROMPT: [usize; 4] = [7, 3, 1, 1];
const GREEDY: usize = 6;

fn options() -> Options {
    // Exact arithmetic: of prefills beside quantised weights, the default one is coarser.
    Options {
        context: Some(24),
        batch: 8,
        cache: CacheType::F32,
        precision: Precision::F32,
        ..Options::default()
    }
}

/// Models of float weights, and one whose weights are decoded, which exact arithmetic makes as good.
fn models() -> Vec<(String, Arc<Model>)> {
    let random = |shape: Shape| {
        let name = format!("random {}", shape.name);
        (name, Arc::new(Model::new(shape.file().checkpoint()).unwrap()))
    };
    let mut models = vec![
        random(Shape::default()),
        random(Shape { name: "legacy, fused", legacy: true, fused: true, ..Shape::default() }),
        ("the embedded model".to_owned(), open(&embedded())),
    ];
    if let Some(folder) = common::shared_models() {
        for name in ["austen-f16", "shapes/v2lite-like-f16", "shapes/v3-like-f16"] {
            models.push((name.to_owned(), open(&folder.join(format!("{name}.gguf")))));
        }
    }
    models
}

/// `vulkan0`, opened twice, the second with its work cut as for a GPU and as if its memory were its own; nothing, said aloud,
/// where it is not there and need not be.
fn vulkan() -> Option<[Arc<dyn Device>; 2]> {
    Some(opened()?.map(|device| -> Arc<dyn Device> { device }))
}

fn opened() -> Option<[Arc<VulkanDevice>; 2]> {
    let open = |options: VulkanOptions| VulkanDevice::open_with(0, &options);
    let class = Some(DeviceClass::Gpu);
    let second = VulkanOptions { class, always_stage: true, ..VulkanOptions::default() };
    match open(VulkanOptions::default()).and_then(|first| Ok([first, open(second)?])) {
        Ok(devices) => Some(devices.map(Arc::new)),
        Err(missing) => {
            assert!(std::env::var_os("FATHOM_REQUIRE_VULKAN").is_none(), "{missing}");
            common::skipped(missing);
            None
        }
    }
}

fn cpu(name: &str) -> Arc<dyn Device> {
    let options = CpuOptions { threads: Some(2), name: name.to_owned(), ..CpuOptions::from_env().unwrap() };
    Arc::new(CpuDevice::new(options).unwrap())
}

/// One Vulkan device or the other or both, sometimes a CPU in the part of another, and the host.
fn devices(random: &mut Random, vulkan: &[Arc<dyn Device>; 2]) -> Devices {
    let mut all = [&vulkan[..1], &vulkan[1..], &vulkan[..]][random.below(3)].to_vec();
    if random.below(4) == 0 {
        all.insert(random.below(all.len() + 1), cpu("cpu1"));
    }
    all.push(cpu("cpu"));
    Devices::new(all)
}

/// What a model answers: the logits after each token, and the tokens that were not in the prompt.
struct Answer {
    rows: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

/// What crossed, and how often work was handed to a queue.
#[derive(Default)]
struct Seen {
    crossed: Crossed,
    /// The most for a program that was run.
    submissions: usize,
}

impl Observer for Seen {
    fn submitted(&mut self, submissions: usize, _dispatches: usize) {
        self.submissions = self.submissions.max(submissions);
    }
}

impl StepObserver for Seen {
    fn transfer(&mut self, plan: &Plan, transfer: &Transfer, bytes: u64, time: Duration) {
        self.crossed.transfer(plan, transfer, bytes, time);
    }
}

fn answer(engine: &Engine, observer: &mut dyn StepObserver) -> Result<Answer, model_deepseek::Error> {
    let mut session = engine.session()?;
    let vocabulary = engine.model().config().vocabulary as u32;
    let mut tokens: Vec<u32> = (0..12).map(|i| (i * 37 + 11) % vocabulary).collect();
    let mut answer = Answer { rows: Vec::new(), greedy: Vec::new() };
    let mut feed = |tokens: &[u32], rows: &mut Vec<Vec<f32>>| {
        session.feed_with(tokens, Wanted::All, &mut |_, logits| rows.push(logits.to_vec()), observer)
    };
    for count in PROMPT {
        let rest = tokens.split_off(count);
        feed(&tokens, &mut answer.rows)?;
        tokens = rest;
    }
    while answer.greedy.len() < GREEDY {
        let best = argmax(&answer.rows[answer.rows.len() - 1]) as u32;
        answer.greedy.push(best);
        feed(&[best], &mut answer.rows)?;
    }
    Ok(answer)
}

/// Bytes that the plans say cross for an answer.
fn planned(plans: &Plans) -> Traffic {
    let mut sum = Traffic::default();
    let mut past = 0;
    for rows in PROMPT.into_iter().chain([1; GREEDY]) {
        let plan = if rows == 1 { &plans.decode } else { &plans.prefill };
        sum += plan.traffic(&Step { rows, past, outputs: rows });
        past += rows;
    }
    sum
}

/// How an answer compares with the CPU's.
#[derive(Debug, Default)]
struct Outcome {
    median: f64,
    /// Rows further off than rounding explains.
    far: Vec<usize>,
    /// Where the texts part.
    parting: Option<Parting>,
}

/// Two tokens of which one device takes one, and the other the other.
#[derive(Clone, Copy, Debug)]
struct Parting {
    /// By how much the CPU's token is better on the CPU.
    gap: f32,
    /// The most that a logit of that row differs.
    error: f32,
    /// Whether the row differs no more than rounding explains.
    rounding: bool,
}

/// How the texts part at two rows whose best tokens differ.
fn parting(of_cpu: &[f32], of_both: &[f32], taken: [u32; 2]) -> Result<Parting, String> {
    let [best, other] = taken.map(|token| token as usize);
    let gap = of_cpu[best] - of_cpu[other];
    let error = of_cpu.iter().zip(of_both).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let rounding = Difference::of(of_cpu, of_both, of_cpu.len()).nmse <= ROUNDING;
    // What rounding may move a logit by, which each of the two may be off; in a row with other experts, what moved it.
    let rms = (of_cpu.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / of_cpu.len() as f64).sqrt();
    let limit = if rounding { 10.0 * ROUNDING.sqrt() * rms } else { f64::from(error) };
    if !(0.0..=2.0 * limit).contains(&f64::from(gap)) {
        return Err(format!(
            "the texts part at tokens {best} and {other}, {gap:e} apart, where a logit is off by {limit:e} at most"
        ));
    }
    Ok(Parting { gap, error, rounding })
}

fn compare(expected: &Answer, found: &Answer) -> Result<Outcome, String> {
    let same = expected.greedy.iter().zip(&found.greedy).take_while(|(a, b)| a == b).count();
    // What follows another token is another question.
    let rows = expected.rows.len() - GREEDY + same;
    let vocabulary = expected.rows[0].len();
    let (of_cpu, of_both) = (&expected.rows[..rows], &found.rows[..rows]);
    let difference = Difference::of(&of_cpu.concat(), &of_both.concat(), vocabulary);
    if difference.median_row_nmse.is_nan() || difference.median_row_nmse > BOUND {
        return Err(format!("expected a median error of rows of at most {BOUND:e}, found {difference:?}"));
    }
    let pairs = of_cpu.iter().zip(of_both);
    let is_far =
        |(_, (a, b)): &(usize, (&Vec<f32>, &Vec<f32>))| Difference::of(a, b, vocabulary).nmse > ROUNDING;
    let far = pairs.enumerate().filter(is_far).map(|(row, _)| row).collect();
    // The last row before the texts part is the one that both draw from.
    let parting = match (expected.greedy.get(same), found.greedy.get(same)) {
        (Some(a), Some(b)) => Some(parting(&of_cpu[rows - 1], &of_both[rows - 1], [*a, *b])?),
        _ => None,
    };
    Ok(Outcome { median: difference.median_row_nmse, far, parting })
}

fn check(
    model: &Arc<Model>,
    devices: &Devices,
    said: &PlacementOptions,
    expected: &(Answer, Routes),
) -> Result<(Outcome, usize), String> {
    let placed = said.place(model, devices, &options()).map_err(|error| error.to_string())?;
    let run = |devices: &Devices, observer: &mut dyn StepObserver| {
        let engine = Engine::load(model, devices, placed.plans.clone(), &mut |_| ());
        engine.and_then(|engine| answer(&engine, observer)).map_err(|error| error.to_string())
    };
    let mut seen = Seen::default();
    let outcome = compare(&expected.0, &run(devices, &mut seen)?)?;
    let crossed = seen.crossed.0;
    if said.ownership_check && (crossed.state, crossed.weight) != (0, 0) {
        return Err(format!("bytes of caches or weights crossed: {crossed:?}"));
    }
    if crossed != planned(&placed.plans) {
        return Err(format!("planned {:?}, seen {crossed:?}", planned(&placed.plans)));
    }
    if seen.submissions > 1 {
        return Err(format!("expected one submission for a split, found {}", seen.submissions));
    }
    if outcome.far.is_empty() {
        return Ok((outcome, 0));
    }
    // Which experts were it? The same again, with an eye on them.
    let routes = Routes::default();
    run(&routes.watch(devices), &mut backend_api::Discard)?;
    let differing = routes.differing(&expected.1);
    // What a row's experts put into the caches, later rows see.
    let unexplained = outcome.far.iter().find(|far| differing.iter().all(|row| row > far));
    if let Some(row) = unexplained {
        return Err(format!("row {row} is far off, and all up to it chose the same experts"));
    }
    Ok((outcome, differing.len()))
}

#[test]
fn vulkan_and_cpu_answer_as_the_cpu_alone() {
    let Some(vulkan) = vulkan() else { return };
    let expected = |(name, model): (String, Arc<Model>)| {
        let routes = Routes::default();
        let devices = routes.watch(&Devices::new(vec![cpu("cpu")]));
        let engine = Engine::new(&model, &devices, &Default::default(), &options()).unwrap();
        let answer = answer(&engine, &mut backend_api::Discard).unwrap();
        (name, model, (answer, routes))
    };
    let models: Vec<_> = models().into_iter().map(expected).collect();
    let first = number("FATHOM_SEED", 1);
    let count = number("FATHOM_PLACEMENTS", 100);
    let (mut worst, mut differing, mut far, mut partings) = (0.0, 0, 0, [0; 2]);
    for seed in first..first + count {
        let (name, model, expected) = &models[seed as usize % models.len()];
        let mut random = Random(seed);
        let devices = devices(&mut random, &vulkan);
        let said = random_options(&mut random, &devices, model.config().layers());
        match check(model, &devices, &said, expected) {
            Ok((outcome, rows)) => {
                worst = f64::max(worst, outcome.median);
                (differing, far) = (differing + rows, far + outcome.far.len());
                if let Some(parting) = outcome.parting {
                    let Parting { gap, error, rounding } = parting;
                    println!(
                        "seed {seed}: {name} parts at tokens {gap:.1e} apart, logits off by {error:.1e} at most"
                    );
                    partings[usize::from(!rounding)] += 1;
                }
            }
            Err(error) => panic!(
                "{name} on {devices:?}: seed {seed}: {said:?}: {error}\nrepeat with: FATHOM_SEED={seed} \
                 FATHOM_PLACEMENTS=1 cargo test -p model-deepseek --test vulkan_placements"
            ),
        }
    }
    println!(
        "{count} placements of {} models: median error of rows at most {worst:.1e}; {far} rows further off than \
         {ROUNDING:e}, {differing} with other experts; {} texts part at a tie to rounding, {} in rows further off",
        models.len(),
        partings[0],
        partings[1]
    );
}

/// Whatever crosses, and however memory is reached, nothing but the splits is handed to a queue for a token.
#[test]
fn a_split_of_a_token_is_one_submission() {
    let Some(opened) = opened() else { return };
    let model = open(&embedded());
    for vulkan in opened {
        let devices = Devices::new(vec![vulkan.clone(), cpu("cpu")]);
        for (host_caches, cpu_moe) in [(false, false), (true, false), (false, true), (true, true)] {
            let said = PlacementOptions { host_caches, cpu_moe, ..PlacementOptions::default() };
            let plans = said.place(&model, &devices, &options()).unwrap().plans;
            let splits = plans.decode.splits.iter().filter(|split| split.device == 0).count() as u64;
            assert!(splits > 0);
            let mut session = Engine::load(&model, &devices, plans, &mut |_| ()).unwrap().session().unwrap();
            session.feed(&[1, 2, 3]).unwrap();
            for token in 4..8 {
                let before = vulkan.submissions();
                session.feed(&[token]).unwrap();
                assert_eq!(vulkan.submissions() - before, splits, "{said:?}");
            }
        }
    }
}

#[test]
fn texts_part_where_their_logits_say_so() {
    let tie = parting(&[1.0, 0.99999, 0.0], &[0.99999, 1.0, 0.0], [0, 1]).unwrap();
    assert!(tie.rounding && tie.gap <= 2.0 * tie.error, "{tie:?}");
    let other = parting(&[1.0, 0.5, 0.0], &[0.4, 0.5, 0.0], [0, 1]).unwrap();
    assert!(!other.rounding, "{other:?}");
    // Neither a row off by more than its two tokens are apart, nor one off by nothing.
    for of_both in [[0.9, 0.5, 0.0], [1.0, 0.5, 0.0]] {
        let error = parting(&[1.0, 0.5, 0.0], &of_both, [0, 1]).unwrap_err();
        assert!(error.contains("tokens 0 and 1, 5e-1 apart"), "{error}");
    }
    assert!(parting(&[f32::NAN, 0.5, 0.0], &[0.9, 0.5, 0.0], [0, 1]).is_err());
}

/// The count of differing experts is worth something only if it can be other than zero.
#[test]
fn other_tokens_choose_other_experts() {
    let model = open(&embedded());
    let routed = |tokens: &[u32]| {
        let routes = Routes::default();
        let devices = routes.watch(&Devices::new(vec![cpu("cpu")]));
        let engine = Engine::new(&model, &devices, &Default::default(), &options()).unwrap();
        engine.session().unwrap().feed(tokens).unwrap();
        routes
    };
    let [a, b, c] = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 700, 4]].map(|tokens| routed(&tokens));
    assert_eq!(a.rows(), 4);
    assert!(a.differing(&b).is_empty());
    let differing = a.differing(&c);
    assert!(matches!(differing[..], [2] | [2, 3]), "the third row, and perhaps the fourth: {differing:?}");
}

/// A watched program is what it was, and what it chose beside it.
#[test]
fn watching_changes_no_bit() {
    let model = open(&embedded());
    let mut all = vec![Devices::new(vec![cpu("cpu")])];
    all.extend(vulkan().map(|[vulkan, _]| Devices::new(vec![vulkan, cpu("cpu")])));
    let chosen = all.iter().map(|devices| {
        let run = |devices: &Devices| {
            let plans = PlacementOptions::default().place(&model, devices, &options()).unwrap().plans;
            let engine = Engine::load(&model, devices, plans, &mut |_| ()).unwrap();
            answer(&engine, &mut backend_api::Discard).unwrap().rows
        };
        let routes = Routes::default();
        assert!(run(&routes.watch(devices)) == run(devices), "{devices:?}");
        assert_eq!(routes.rows(), 12 + GREEDY);
        routes
    });
    let chosen: Vec<Routes> = chosen.collect();
    assert!(chosen.iter().all(|routes| routes.differing(&chosen[0]).is_empty()));
}
