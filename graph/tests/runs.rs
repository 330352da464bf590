//! Plans that run, on devices of a few lines: wherever the parts lie, the answer is the same, bit for bit.

#[allow(dead_code)]
#[path = "support/device.rs"]
mod device;
#[allow(dead_code)]
#[path = "support/model.rs"]
mod model;

use backend_api::{Capacity, Device, Discard, HostBytes, OpKind, Step};
use device::TestDevice;
use graph::{
    Devices, Executor, Graph, LoadError, Placement, Plan, RunError, SourceError, States, StepObserver,
    StorageKind, WeightBytes, WeightSource, Weights, validate,
};
use model::SMALL;
use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Small numbers from a name, all weights in one map.
struct Source {
    bytes: HostBytes,
    ranges: BTreeMap<String, std::ops::Range<usize>>,
}

impl Source {
    fn new(graph: &Graph) -> Self {
        let mut bytes = Vec::new();
        let mut ranges = BTreeMap::new();
        let mut seed = 7u32;
        for (_, weight) in graph.storages_of(StorageKind::Weight) {
            let start = bytes.len();
            for _ in 0..weight.desc.shape.fixed_elements().expect("fixed") {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (seed >> 8) as f32 / (1 << 24) as f32 - 0.5;
                bytes.extend(x.to_ne_bytes());
            }
            ranges.insert(weight.name.clone(), start..bytes.len());
        }
        Source { bytes: Arc::new(bytes), ranges }
    }
}

impl WeightSource for Source {
    fn weight(&self, name: &str) -> Result<WeightBytes, SourceError> {
        let range = self.ranges.get(name).cloned().ok_or("there is none")?;
        Ok(WeightBytes { bytes: Arc::clone(&self.bytes), range })
    }
}

fn devices(count: usize) -> Devices {
    let name = |i: usize| if i + 1 == count { "cpu".to_owned() } else { format!("cpu{}", i + 1) };
    Devices::new((0..count).map(|i| Arc::new(TestDevice::new(&name(i))) as Arc<dyn Device>).collect())
}

fn ids(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|id| id.to_ne_bytes()).collect()
}

/// A model on devices: a prefill and a decode executor over the same weights and states.
struct Session {
    states: States,
    prefill: Executor,
    decode: Executor,
    past: usize,
}

impl Session {
    fn new(graph: &Graph, placement: &Placement, devices: &Devices) -> Self {
        let capacity = |rows| Capacity { rows, outputs: rows, kv_len: SMALL.capacity };
        let plan = |rows| {
            let plan = Plan::new(graph, placement, devices, capacity(rows)).expect("a plan");
            validate::plan(&plan).expect("a valid plan");
            Arc::new(plan)
        };
        let (prefill, decode) = (plan(8), plan(1));
        let source = Source::new(graph);
        let weights =
            Weights::load_for(&[&prefill, &decode], devices, &source, &mut |_| ()).expect("weights");
        let states = States::allocate(&decode, devices).expect("states");
        let executor = |plan| Executor::new(plan, devices, &weights, &states).expect("an executor");
        Session { prefill: executor(prefill), decode: executor(decode), states, past: 0 }
    }

    /// Logits of every token.
    fn feed(&mut self, tokens: &[i32]) -> Vec<f32> {
        let executor = if tokens.len() == 1 { &mut self.decode } else { &mut self.prefill };
        let step = Step { rows: tokens.len(), past: self.past, outputs: tokens.len() };
        let (tokens, outputs) = (ids(tokens), ids(&(0..tokens.len() as i32).collect::<Vec<_>>()));
        executor.run(&step, &[("tokens", &tokens), ("outputs", &outputs)], &mut Discard).expect("a step");
        let mut logits = vec![0.0; step.outputs * SMALL.vocabulary];
        executor.read("logits", &mut logits).expect("logits");
        self.past += step.rows;
        logits
    }

    fn feed_all(&mut self) -> Vec<f32> {
        let mut logits = Vec::new();
        for tokens in [&[3, 1, 4, 1, 5][..], &[9], &[2], &[6, 5, 3], &[5]] {
            logits.extend(self.feed(tokens));
        }
        logits
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    assert!(logits.iter().all(|x| x.is_finite()), "a value was read that nobody wrote");
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn pieces_do_not_matter() {
    let graph = model::build(&SMALL).expect("a graph");
    let whole = Session::new(&graph, &Placement::default(), &devices(1)).feed_all();
    let mut session = Session::new(&graph, &Placement::default(), &devices(1));
    let single: Vec<f32> =
        [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5].iter().flat_map(|&t| session.feed(&[t])).collect();
    assert_eq!(bits(&whole), bits(&single));
    assert!(whole.iter().any(|x| x.abs() > 1e-3), "the logits are all but zero");
}

/// Contract C6, over random placements of layers, weights and caches.
#[test]
fn placement_never_changes_the_answer() {
    let graph = model::build(&SMALL).expect("a graph");
    let expected = bits(&Session::new(&graph, &Placement::default(), &devices(1)).feed_all());
    let mut random = 1u64;
    let mut draw = |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % n
    };
    for round in 0..300 {
        let count = 2 + round % 2;
        let devices = devices(count);
        let mut placement =
            Placement { layers: (0..=SMALL.layers).map(|_| draw(count)).collect(), ..Placement::default() };
        for (_, weight) in graph.storages_of(StorageKind::Weight) {
            if draw(5) == 0 {
                placement.weights.insert(weight.name.clone(), draw(count));
            }
        }
        for (_, state) in graph.storages_of(StorageKind::State) {
            if draw(2) == 0 {
                placement.states.insert(state.name.clone(), draw(count));
            }
        }
        placement.absorb = [graph::Absorb::Owner, graph::Absorb::Layer][draw(2)].clone();
        placement.ownership_check = draw(4) != 0;
        let found = bits(&Session::new(&graph, &placement, &devices).feed_all());
        assert_eq!(found, expected, "round {round}: {placement:?}");
    }
}

#[test]
fn a_fall_back_computes_the_same() {
    let graph = model::build(&SMALL).expect("a graph");
    let expected = bits(&Session::new(&graph, &Placement::default(), &devices(1)).feed_all());
    for lacks in
        [OpKind::LatentAttention, OpKind::SwiGlu, OpKind::HeadMatMul, OpKind::Rope, OpKind::ExpertMatMul]
    {
        let gpu = Arc::new(TestDevice::new("gpu").without(&[lacks]));
        let devices = Devices::new(vec![gpu, Arc::new(TestDevice::new("cpu"))]);
        let placement = Placement::all_on(0, SMALL.layers + 1);
        let mut session = Session::new(&graph, &placement, &devices);
        assert!(!session.decode.plan().fall_backs.is_empty());
        assert_eq!(bits(&session.feed_all()), expected, "without {lacks}");
    }
}

/// Contract C2: a step makes no buffer and no program.
#[test]
fn a_step_makes_nothing() {
    let graph = model::build(&SMALL).expect("a graph");
    let (gpu, cpu) = (TestDevice::new("gpu"), TestDevice::new("cpu"));
    let made = [Arc::clone(&gpu.made), Arc::clone(&cpu.made)];
    let devices = Devices::new(vec![Arc::new(gpu), Arc::new(cpu)]);
    let states = graph.storages_of(StorageKind::State).map(|(_, state)| (state.name.clone(), 1)).collect();
    let placement = Placement { states, ..Placement::all_on(0, SMALL.layers + 1) };
    let mut session = Session::new(&graph, &placement, &devices);
    let count = || made.iter().map(|made| made.load(Ordering::Relaxed)).collect::<Vec<_>>();
    let before = count();
    session.feed_all();
    assert_eq!(count(), before);
}

/// What the observer is told is what the plan says.
#[test]
fn the_observer_sees_what_the_plan_says() {
    #[derive(Default)]
    struct Count {
        ops: usize,
        splits: usize,
        bytes: u64,
    }
    impl backend_api::Observer for Count {
        fn op(&mut self, _: backend_api::OpEvent<'_>) {
            self.ops += 1;
        }
    }
    impl StepObserver for Count {
        fn transfer(&mut self, _: &Plan, _: &graph::Transfer, bytes: u64, _: Duration) {
            self.bytes += bytes;
        }
        fn split(&mut self, _: &Plan, _: &graph::Split, _: Duration) {
            self.splits += 1;
        }
    }
    let graph = model::build(&SMALL).expect("a graph");
    let devices = devices(2);
    let states = graph.storages_of(StorageKind::State).map(|(_, state)| (state.name.clone(), 1)).collect();
    let placement = Placement { states, ..Placement::all_on(0, SMALL.layers + 1) };
    let mut session = Session::new(&graph, &placement, &devices);
    let step = Step { rows: 3, past: 0, outputs: 1 };
    let (tokens, outputs) = (ids(&[1, 2, 3]), ids(&[2]));
    let mut count = Count::default();
    session.prefill.run(&step, &[("outputs", &outputs), ("tokens", &tokens)], &mut count).expect("a step");
    let plan = session.prefill.plan();
    assert_eq!((count.ops, count.splits), (graph.nodes().len(), plan.splits.len()));
    assert_eq!(count.bytes, plan.traffic(&step).total());
}

#[test]
fn states_are_saved_and_forked() {
    let graph = model::build(&SMALL).expect("a graph");
    let new = || Session::new(&graph, &Placement::default(), &devices(1));
    let (mut one, mut other) = (new(), new());
    one.feed(&[3, 1, 4]);
    for (name, size) in one.states.iter() {
        let mut bytes = vec![0; size];
        one.states.read(name, 0, &mut bytes).expect("bytes");
        other.states.write(name, 0, &bytes).expect("room");
    }
    other.past = one.past;
    assert_eq!(bits(&one.feed(&[1])), bits(&other.feed(&[1])));
    assert!(matches!(one.states.read("no", 0, &mut []), Err(LoadError::UnknownState(name)) if name == "no"));
    assert!(matches!(one.states.write("cache.0", usize::MAX, &[0]), Err(LoadError::Range { .. })));
}

/// A device that can use a map where it is gets it once.
#[test]
fn weights_load_with_progress_and_without_copies() {
    let graph = model::build(&SMALL).expect("a graph");
    let source = Source::new(&graph);
    let capacity = Capacity { rows: 1, outputs: 1, kv_len: 8 };
    for imports in [false, true] {
        let cpu = if imports { TestDevice::new("cpu").importing() } else { TestDevice::new("cpu") };
        let made = Arc::clone(&cpu.made);
        let devices = Devices::new(vec![Arc::new(cpu)]);
        let plan = Plan::new(&graph, &Placement::default(), &devices, capacity).expect("a plan");
        let (mut done, mut total) = (0, 0);
        Weights::load(&plan, &devices, &source, &mut |p| {
            assert!(p.done > done);
            (done, total) = (p.done, p.total);
        })
        .expect("weights");
        let bytes: u64 = plan.weights.iter().map(|place| place.bytes).sum();
        assert_eq!((done, total), (bytes, bytes));
        assert_eq!(made.load(Ordering::Relaxed), if imports { 0 } else { plan.weights.len() });
    }
}

#[test]
fn a_bad_source_is_an_error() {
    struct Short(Source);
    impl WeightSource for Short {
        fn weight(&self, name: &str) -> Result<WeightBytes, SourceError> {
            let mut found = self.0.weight(name)?;
            match name {
                "output.weight" => return Err("it is lost".into()),
                "blk.1.attn_q.weight" => found.range.end -= 4,
                _ => {}
            }
            Ok(found)
        }
    }
    let mut graph = model::build(&SMALL).expect("a graph");
    let capacity = Capacity { rows: 1, outputs: 1, kv_len: 8 };
    let load = |graph: &Graph| {
        let plan = Plan::new(graph, &Placement::default(), &devices(1), capacity).expect("a plan");
        Weights::load(&plan, &devices(1), &Short(Source::new(graph)), &mut |_| ()).unwrap_err().to_string()
    };
    assert_eq!(load(&graph), "weight blk.1.attn_q.weight: expected 1280 bytes, found 1276");
    graph = model::build(&model::Shapes { layers: 1, ..SMALL }).expect("a graph");
    assert_eq!(load(&graph), "weight output.weight: it is lost");
}

#[test]
fn a_bad_step_is_an_error_before_anything_runs() {
    let graph = model::build(&SMALL).expect("a graph");
    let mut session = Session::new(&graph, &Placement::default(), &devices(1));
    let good = Step { rows: 2, past: 0, outputs: 1 };
    let (two, one, none) = (ids(&[1, 2]), ids(&[1]), ids(&[]));
    let mut fails = |step: Step, tokens: Option<&[u8]>, outputs: &[u8], expected: &str| {
        let mut inputs = vec![("outputs", outputs)];
        inputs.extend(tokens.map(|tokens| ("tokens", tokens)));
        let error = session.prefill.run(&step, &inputs, &mut Discard).expect_err(expected);
        assert_eq!(error.to_string(), expected);
    };
    fails(Step { rows: 0, ..good }, Some(&none), &one, "step: rows: expected 1 or more, found 0");
    fails(Step { rows: 9, ..good }, Some(&two), &one, "step: rows: expected at most 8, found 9");
    fails(Step { outputs: 9, ..good }, Some(&two), &one, "step: outputs: expected at most 8, found 9");
    fails(Step { past: 31, ..good }, Some(&two), &one, "step: cached rows: expected at most 32, found 33");
    fails(good, None, &one, "input tokens: it is missing");
    fails(good, Some(&one), &one, "input tokens: expected 8 bytes, found 4");
    fails(good, Some(&ids(&[1, 19])), &one, "input tokens: element 1: expected 0 to 18, found 19");
    fails(good, Some(&ids(&[-1, 0])), &one, "input tokens: element 0: expected 0 to 18, found -1");
    fails(good, Some(&two), &ids(&[2]), "input outputs: element 0: expected 0 to 1, found 2");
    let unread = session.prefill.read("logits", &mut [0.0; 19]).unwrap_err();
    assert_eq!(unread.to_string(), "output logits: no step has run");
    session.prefill.run(&good, &[("tokens", &two), ("outputs", &one)], &mut Discard).expect("a step");
    let short = session.prefill.read("logits", &mut [0.0; 18]).unwrap_err();
    assert_eq!(short.to_string(), "output logits: expected room for 76 bytes, found 72");
    let unknown = session.prefill.read("logit", &mut [0.0; 19]).unwrap_err();
    assert_eq!(unknown.to_string(), "output logit: the graph has none");
}

#[test]
fn a_plan_runs_only_where_it_was_made_for() {
    let graph = model::build(&SMALL).expect("a graph");
    let capacity = Capacity { rows: 1, outputs: 1, kv_len: 8 };
    let (two, one) = (devices(2), devices(1));
    let plan = |placement: &Placement, devices: &Devices| {
        Arc::new(Plan::new(&graph, placement, devices, capacity).expect("a plan"))
    };
    let host = plan(&Placement::default(), &two);
    let weights = Weights::load(&host, &two, &Source::new(&graph), &mut |_| ()).expect("weights");
    let states = States::allocate(&host, &two).expect("states");
    let error = Executor::new(Arc::clone(&host), &one, &weights, &states).unwrap_err();
    assert!(matches!(error, RunError::Devices { .. }), "{error}");
    let other = plan(&Placement::all_on(0, SMALL.layers + 1), &two);
    let error = Executor::new(other, &two, &weights, &states).unwrap_err();
    assert!(error.to_string().ends_with("is not on cpu1, where the plan reads it"), "{error}");
}
