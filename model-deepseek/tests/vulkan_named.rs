//! The placements that people ask for by name, over the CPU and Vulkan devices: float64's logits whichever way tokens come,
//! what crosses as planned, and the CPU's greedy text.
//!
//! Where there is no Vulkan device nothing is tried, unless `FATHOM_REQUIRE_VULKAN` is set.

mod common;
mod placing;
mod source_bytes;

use backend_api::Device;
use backend_cpu::{CpuDevice, CpuOptions};
use backend_vulkan::{DeviceClass, VulkanDevice, VulkanOptions};
use common::{Difference, Reference, embedded, exact, open, shared_models, testdata};
use graph::{Devices, Traffic};
use model_deepseek::{
    CacheType, Engine, Model, Options, PlacementOptions, Plans, Sampler, Session,
    placement::{Fit, GpuLayers, Override},
};
use placing::Crossed;
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Tokens fed in one step, and one by one.
const BATCHES: [usize; 2] = [512, 1];

/// Every placement with the shaders that this device gets; with those of a GPU, of which exact arithmetic uses one set, the
/// first ones.
const CLASSES: [(Option<DeviceClass>, usize); 2] = [(None, usize::MAX), (Some(DeviceClass::Gpu), 3)];

struct Case {
    name: &'static str,
    file: PathBuf,
    reference: Reference,
    /// That of half of the tokens, which will do where they come one by one.
    half: Reference,
}

impl Case {
    fn new(name: &'static str, file: PathBuf, reference: &Path) -> Self {
        let reference = Reference::read(reference);
        Case { name, file, half: reference.first(reference.tokens.len() / 2), reference }
    }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![Case::new("austen-q4_k_m", embedded(), &testdata().join("austen-q4_k_m.json"))];
    if let Some(models) = shared_models() {
        for name in ["austen-f16", "austen-q8_0", "shapes/v2lite-like-f16", "shapes/v3-like-f16"] {
            let file = |kind: &str| models.join(format!("{name}.{kind}"));
            cases.push(Case::new(name, file("gguf"), &file("json")));
        }
    }
    cases
}

/// The same device opened twice, cut as its kind is or as a class says, the second time as if its memory were its own.
fn vulkan(class: Option<DeviceClass>) -> Option<[Arc<dyn Device>; 2]> {
    let open = |always_stage| {
        let options = VulkanOptions { class, always_stage, ..VulkanOptions::default() };
        VulkanDevice::open_with(0, &options).map(|device| -> Arc<dyn Device> { Arc::new(device) })
    };
    match open(false).and_then(|first| Ok([first, open(true)?])) {
        Ok(devices) => Some(devices),
        Err(missing) => {
            assert!(std::env::var_os("FATHOM_REQUIRE_VULKAN").is_none(), "{missing}");
            common::skipped(missing);
            None
        }
    }
}

/// Everything on the first device, or on both, but for what a placement says.
fn placements(vulkan: &[Arc<dyn Device>; 2]) -> Vec<(&'static str, Devices, PlacementOptions)> {
    let cpu: Arc<dyn Device> = {
        let options = CpuOptions { threads: Some(2), ..CpuOptions::from_env().unwrap() };
        Arc::new(CpuDevice::new(options).unwrap())
    };
    let one = |index: usize| Devices::new(vec![Arc::clone(&vulkan[index]), Arc::clone(&cpu)]);
    let both = Devices::new(vulkan.iter().chain([&cpu]).map(Arc::clone).collect());
    let all = PlacementOptions {
        gpu_layers: Some(GpuLayers::All),
        fit: Fit { on: false, budgets: Vec::new() },
        strict: true,
        ..PlacementOptions::default()
    };
    let on_cpu = |pattern: &str| Override::new(pattern, "cpu".to_owned());
    let overrides = vec![on_cpu("attn_output"), on_cpu("ffn_(gate|up)_shexp")];
    let with = |change: fn(&mut PlacementOptions)| {
        let mut said = all.clone();
        change(&mut said);
        said
    };
    vec![
        ("all", one(0), all.clone()),
        ("all, with memory of its own", one(1), all.clone()),
        ("--no-kv-offload", one(1), with(|said| said.host_caches = true)),
        ("--cpu-moe", one(1), with(|said| said.cpu_moe = true)),
        ("--n-gpu-layers 2", one(0), with(|said| said.gpu_layers = Some(GpuLayers::Last(2)))),
        ("--override-tensor", one(0), PlacementOptions { overrides, ..all.clone() }),
        ("--kv-layers-on", one(0), with(|said| said.cache_layers = vec![(1..3, "cpu".to_owned())])),
        ("two devices", both, all.clone()),
    ]
}

fn load(
    model: &Arc<Model>,
    devices: &Devices,
    said: &PlacementOptions,
    options: &Options,
) -> (Plans, Session) {
    let plans = said.place(model, devices, options).unwrap().plans;
    let engine = Engine::load(model, devices, plans.clone(), &mut |_| ()).unwrap();
    (plans, engine.session().unwrap())
}

/// Feeds a reference's tokens and compares; what crosses, and what should.
fn feed(
    reference: &Reference,
    session: &mut Session,
    plans: &Plans,
    batch: usize,
) -> (Difference, [Traffic; 2]) {
    let Reference { tokens, rows, logits, .. } = reference;
    let mut seen = Crossed::default();
    let found = reference.feed(session, &mut seen);
    let mut planned = Traffic::default();
    for past in (0..tokens.len()).step_by(batch) {
        let end = tokens.len().min(past + batch);
        let outputs = rows.iter().filter(|row| (past..end).contains(row)).count();
        let plan = if end - past == 1 { &plans.decode } else { &plans.prefill };
        planned += plan.traffic(&backend_api::Step { rows: end - past, past, outputs });
    }
    (reference.difference(logits, &found), [seen.0, planned])
}

fn context(case: &Case) -> Option<usize> {
    Some(case.reference.tokens.len())
}

#[test]
fn exact_arithmetic_gives_the_float64_references_and_crosses_as_planned() {
    let mut worst = 0.0;
    for (class, only) in CLASSES {
        let Some(vulkan) = vulkan(class) else { return };
        for case in cases() {
            let model = open(&case.file);
            for (name, devices, said) in placements(&vulkan).into_iter().take(only) {
                for (batch, reference) in BATCHES.into_iter().zip([&case.reference, &case.half]) {
                    let options = Options { context: context(&case), batch, ..exact() };
                    let (plans, mut session) = load(&model, &devices, &said, &options);
                    let (found, [seen, planned]) = feed(reference, &mut session, &plans, batch);
                    let what = format!("{} {name}, {batch} at once, {class:?}", case.name);
                    assert!(found.nmse <= 2e-6, "{what}: {found:?}");
                    assert_eq!(seen, planned, "{what}");
                    assert_eq!((seen.state, seen.weight), (0, 0), "{what}");
                    worst = f64::max(worst, found.nmse);
                }
            }
        }
    }
    println!("nmse at most {worst:.1e}");
}

/// The CPU's bar: the median row, which single flipped experts do not move.
#[test]
fn default_arithmetic_is_as_near_as_on_the_cpu() {
    let Some(vulkan) = vulkan(None) else { return };
    for case in cases() {
        let model = open(&case.file);
        let bound = 1.2 * case.reference.llama_median.expect("llama.cpp's figure");
        for (name, devices, said) in placements(&vulkan) {
            for (batch, reference) in BATCHES.into_iter().zip([&case.reference, &case.half]) {
                let options =
                    Options { context: context(&case), batch, cache: CacheType::F32, ..Options::default() };
                let (plans, mut session) = load(&model, &devices, &said, &options);
                let found = feed(reference, &mut session, &plans, batch).0;
                let what = format!("{} {name}, {batch} at once", case.name);
                assert!(found.median_row_nmse <= bound, "{what}: {found:?}, bound {bound:.1e}");
            }
        }
    }
}

/// Caches that round, as the CPU rounds them.
#[test]
fn each_cache_gives_the_logits_of_the_cpu() {
    for class in [DeviceClass::Software, DeviceClass::Gpu] {
        let Some(vulkan) = vulkan(Some(class)) else { return };
        for case in cases() {
            let model = open(&case.file);
            for cache in [CacheType::F16, CacheType::Q8_0] {
                let options = Options { context: context(&case), cache, ..exact() };
                let logits = |mut session| case.reference.feed(&mut session, &mut backend_api::Discard);
                let expected = logits(common::engine(&model, &options).session().unwrap());
                let (_, devices, said) = placements(&vulkan).swap_remove(0);
                let found = logits(load(&model, &devices, &said, &options).1);
                let found = case.reference.difference(&expected, &found);
                println!("{} {cache:?} {class:?}: {:.1e}", case.name, found.median_row_nmse);
                assert!(found.median_row_nmse <= 1e-5, "{} {cache:?} {class:?}: {found:?}", case.name);
            }
        }
    }
}

#[test]
fn the_greedy_text_is_that_of_the_cpu() {
    for (class, only) in CLASSES {
        let Some(vulkan) = vulkan(class) else { return };
        for case in cases().into_iter().filter(|case| case.name.ends_with("f16")) {
            let model = open(&case.file);
            let options = Options { context: Some(96), ..Options::default() };
            let write = |mut session: Session| {
                session.feed(&case.reference.tokens[..24]).unwrap();
                session.generate(&mut Sampler::greedy(), 32, |_, _| ControlFlow::Continue(())).unwrap();
                session.tokens().to_vec()
            };
            let expected = write(common::engine(&model, &options).session().unwrap());
            assert!(expected.len() > 24 + 8, "{}: {expected:?}", case.name);
            for (name, devices, said) in placements(&vulkan).into_iter().take(only) {
                let found = write(load(&model, &devices, &said, &options).1);
                assert_eq!(found, expected, "{} {name} {class:?}", case.name);
            }
        }
    }
}
