//! Fitting: what a plan says it needs is what is allocated, within what may be used; what was said is a constraint.

mod common;

use backend_api::{
    BufferRef, BufferRequest, Device, DeviceError, DeviceInfo, DeviceKind, HostBytes, NullDevice,
};
use backend_cpu::{CpuDevice, CpuOptions};
use common::{embedded, open, passes_on};
use graph::{Devices, Needs, report::human};
use model_deepseek::{
    CacheType, Engine, Error, Model, Options, Placed, PlacementOptions,
    placement::{Fit, GpuLayers, Override, Short},
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A CPU with memory of its own: nothing is imported, and every byte is counted.
struct Counting {
    info: DeviceInfo,
    cpu: CpuDevice,
    bytes: Arc<AtomicUsize>,
}

impl Device for Counting {
    passes_on!(cpu: supports write read compile);
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        self.bytes.fetch_add(request.size, Ordering::Relaxed);
        self.cpu.allocate(request)
    }
    fn import(&self, _: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        Ok(None)
    }
}

fn cpu(name: &str) -> CpuDevice {
    let options = CpuOptions { threads: Some(1), name: name.to_owned(), ..CpuOptions::from_env().unwrap() };
    CpuDevice::new(options).unwrap()
}

/// An accelerator `gpu` that counts, and the host.
fn counted() -> (Devices, Arc<AtomicUsize>) {
    let bytes = Arc::default();
    let cpu = cpu("gpu");
    let info = DeviceInfo { kind: DeviceKind::Gpu, ..cpu.info().clone() };
    let gpu = Counting { info, cpu, bytes: Arc::clone(&bytes) };
    (Devices::new(vec![Arc::new(gpu), Arc::new(self::cpu("cpu"))]), bytes)
}

/// A device that says so of itself.
fn stated(name: &str, kind: DeviceKind, memory_total: u64, memory_free: u64) -> Arc<dyn Device> {
    let cpu = cpu(name);
    let info = DeviceInfo { kind, memory_total, memory_free, ..cpu.info().clone() };
    Arc::new(Counting { info, cpu, bytes: Arc::default() })
}

fn into_bytes(bytes: u64) -> Fit {
    Fit { budgets: vec![("gpu".to_owned(), bytes)], ..Fit::default() }
}

fn options() -> Options {
    Options { context: Some(256), batch: 16, cache: CacheType::F32, ..Options::default() }
}

fn gpu_needs(placed: &Placed) -> Needs {
    placed.plans.needs()[0]
}

#[test]
fn what_is_planned_is_what_is_allocated() {
    let mut tried = 0;
    let mut paths = vec![embedded()];
    if let Some(models) = common::shared_models() {
        paths.push(models.join("shapes/v3-like-f16.gguf"));
        paths.push(models.join("austen-q2_k.gguf"));
    }
    for path in paths {
        let model = open(&path);
        let (devices, _) = counted();
        let no_limit =
            PlacementOptions { fit: Fit { on: false, budgets: Vec::new() }, ..PlacementOptions::default() };
        let all = gpu_needs(&no_limit.place(&model, &devices, &options()).unwrap()).total();
        for (tenths, said) in (1..=10).flat_map(|tenths| {
            let said = PlacementOptions::default();
            let caches = PlacementOptions { host_caches: true, ..said.clone() };
            let overrides = vec![Override::new("attn_output", "cpu")];
            [(tenths, said.clone()), (tenths, caches), (tenths, PlacementOptions { overrides, ..said })]
        }) {
            let budget = all * tenths / 10;
            let said = PlacementOptions { fit: into_bytes(budget), ..said };
            let (devices, bytes) = counted();
            let placed = said.place(&model, &devices, &options()).unwrap();
            let planned = gpu_needs(&placed).total();
            assert!(planned <= budget, "{said:?}: {planned} of {budget} bytes");
            let engine = Engine::load(&model, &devices, placed.plans, &mut |_| ()).unwrap();
            let mut session = engine.session().unwrap();
            session.feed(&[1, 2, 3]).unwrap();
            session.feed(&[4]).unwrap();
            let allocated = bytes.load(Ordering::Relaxed) as f64;
            let planned = planned as f64;
            assert!(
                (allocated - planned).abs() <= 0.05 * planned,
                "{said:?}: {allocated}, planned {planned}"
            );
            tried += 1;
        }
    }
    assert!(tried >= 30);
}

#[test]
fn more_room_is_used() {
    let model = open(&embedded());
    let (devices, _) = counted();
    let mut last = 0;
    let mut kinds = std::collections::BTreeSet::new();
    for budget in (0..40).map(|n| n * 100_000) {
        let said = PlacementOptions { fit: into_bytes(budget), ..PlacementOptions::default() };
        let placed = said.place(&model, &devices, &options()).unwrap();
        let used = gpu_needs(&placed).total();
        assert!(used <= budget && used >= last, "{budget}: {used} after {last}");
        last = used;
        kinds.insert(used);
    }
    assert!(kinds.len() >= 4, "in steps: {kinds:?}");
}

/// Which device owns each node whose name holds `part`.
fn owners(placed: &Placed, part: &str) -> Vec<usize> {
    let plan = &placed.plans.decode;
    let nodes = plan.graph().nodes().iter().zip(&plan.owners);
    nodes.filter(|(node, _)| node.name.contains(part)).map(|(_, owner)| *owner).collect()
}

#[test]
fn what_went_to_the_host_is_told() {
    let model = open(&embedded());
    let (devices, _) = counted();
    let notice = |said: PlacementOptions| {
        let mut notices = said.place(&model, &devices, &options()).unwrap().notices;
        assert_eq!(notices.len(), 1, "{notices:?}");
        notices.remove(0)
    };
    let room = |bytes| PlacementOptions { fit: into_bytes(bytes), ..PlacementOptions::default() };
    assert_eq!(notice(room(0)), "not everything fits: on cpu are 3 layers, the output");
    // Layers that stay, without experts (layer 0 has none) and then without caches.
    let no_limit =
        PlacementOptions { fit: Fit { on: false, ..into_bytes(0) }, ..PlacementOptions::default() };
    let needs = gpu_needs(&no_limit.place(&model, &devices, &options()).unwrap());
    assert_eq!(notice(room(needs.total() - 1)), "not everything fits: on cpu are the experts of 1 layer");
    let said = |bytes| PlacementOptions { gpu_layers: Some(GpuLayers::All), cpu_moe: true, ..room(bytes) };
    let no_limit = PlacementOptions { fit: Fit { on: false, ..into_bytes(0) }, ..said(0) };
    let needs = gpu_needs(&no_limit.place(&model, &devices, &options()).unwrap());
    assert_eq!(notice(said(needs.total() - 1)), "not everything fits: on cpu are the caches of 1 layer");
}

#[test]
fn what_was_said_is_a_constraint() {
    let model = open(&embedded());
    let (devices, _) = counted();
    let layers = model.config().layers();
    let place = |said: PlacementOptions| said.place(&model, &devices, &options());
    let everything = place(PlacementOptions {
        fit: Fit { on: false, budgets: Vec::new() },
        ..PlacementOptions::default()
    });
    let all = gpu_needs(&everything.unwrap()).total();

    // Room for a half: layers that were said stay, the experts go.
    let placed = place(PlacementOptions {
        gpu_layers: Some(GpuLayers::All),
        fit: into_bytes(all * 6 / 10),
        ..PlacementOptions::default()
    })
    .unwrap();
    assert!(owners(&placed, "attn_output").iter().all(|owner| *owner == 0));
    assert!(owners(&placed, "ffn_down_exps").contains(&1));
    assert!(placed.notices.iter().any(|notice| notice.contains("experts")), "{:?}", placed.notices);

    // An override holds, and something else makes room for it.
    let exps = |device: &str| vec![Override::new(r"blk\.1\.ffn_.*_exps", device)];
    let said = PlacementOptions {
        overrides: exps("gpu"),
        fit: into_bytes(all * 6 / 10),
        ..PlacementOptions::default()
    };
    let placed = place(said).unwrap();
    assert_eq!(owners(&placed, "blk.1.ffn_down_exps"), [0]);
    assert!(gpu_needs(&placed).total() <= all * 6 / 10);

    // Caches that were said to be on the accelerator are there, whatever else is.
    let said = PlacementOptions {
        cache_layers: vec![(0..layers, "gpu".to_owned())],
        fit: into_bytes(all / 2),
        ..PlacementOptions::default()
    };
    assert!(owners(&place(said).unwrap(), "kv_store").iter().all(|owner| *owner == 0));
}

#[test]
fn what_cannot_fit_says_so() {
    let model = open(&embedded());
    let (devices, _) = counted();
    let said = PlacementOptions {
        gpu_layers: Some(GpuLayers::All),
        overrides: vec![Override::new("exps", "GPU")],
        fit: into_bytes(1 << 20),
        ..PlacementOptions::default()
    };
    let error = said.place(&model, &devices, &options()).unwrap_err();
    let Error::Shortage(shortage) = &error else { panic!("{error}") };
    let [Short { device, needs, budget, .. }] = shortage.devices.as_slice() else { panic!("{error}") };
    assert_eq!((device.as_str(), *budget), ("gpu", 1 << 20));
    assert!(needs.total() > *budget);
    let text = error.to_string();
    for part in [
        "gpu: ",
        "needed",
        "of weights",
        "of caches",
        "of scratch memory",
        "1.0 MiB (1048576 bytes) may be used",
        "less is needed there with a smaller --n-gpu-layers or another --override-tensor",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // What was left open is not there, and keeping it away changes nothing; nor do fewer tokens, beside so many weights.
    for useless in ["--cpu-moe", "--no-kv-offload", "--ctx", "--batch"] {
        assert!(!text.contains(useless), "{useless}: {text}");
    }
    // Nor does what was said beside what keeps everything there.
    let said = PlacementOptions { overrides: vec![Override::new(".", "gpu")], ..said };
    let error = said.place(&model, &devices, &options()).unwrap_err().to_string();
    assert!(error.ends_with("less is needed there with another --override-tensor"), "{error}");
    // Fewer tokens do, beside weights that fit.
    let caches = PlacementOptions {
        overrides: Vec::new(),
        cache_layers: vec![(0..3, "gpu".to_owned())],
        gpu_layers: Some(GpuLayers::Last(0)),
        fit: into_bytes(100 << 10),
        ..said
    };
    let error = caches.place(&model, &devices, &options()).unwrap_err().to_string();
    assert!(error.contains("less is needed there with another --kv-layers-on or a smaller --ctx"), "{error}");
    // The host is asked too, where its bytes are given.
    let said = PlacementOptions {
        fit: Fit { on: true, budgets: vec![("cpu".to_owned(), 1000)] },
        ..PlacementOptions::default()
    };
    let error = said.place(&model, &devices, &options()).unwrap_err().to_string();
    assert!(error.contains("cpu: ") && error.ends_with("(1000 bytes) may be used"), "{error}");
    // And other things help it than an accelerator.
    let said =
        PlacementOptions { cpu_moe: true, gpu_layers: Some(GpuLayers::Last(1)), host_caches: true, ..said };
    let error = said.place(&model, &devices, &options()).unwrap_err().to_string();
    assert!(error.ends_with("with a larger --n-gpu-layers or no --cpu-moe or no --no-kv-offload"), "{error}");
}

#[test]
fn no_more_is_given_than_there_is() {
    let model = open(&embedded());
    let gpu = || stated("gpu", DeviceKind::Gpu, 64 << 20, 16 << 20);
    let cpu = || stated("cpu", DeviceKind::Cpu, 96 << 20, 80 << 20);
    let place = |devices: Vec<Arc<dyn Device>>, budgets: &[(&str, u64)]| {
        let budgets = budgets.iter().map(|(name, mib)| ((*name).to_owned(), mib << 20)).collect();
        let said = PlacementOptions { fit: Fit { on: true, budgets }, ..PlacementOptions::default() };
        said.place(&model, &Devices::new(devices), &options())
    };
    let error = place(vec![gpu(), cpu()], &[("gpu", 65)]).unwrap_err().to_string();
    assert_eq!(
        error,
        "fit: expected at most the 64.0 MiB (67108864 bytes) of gpu, found 65.0 MiB (68157440 bytes)"
    );
    let error = place(vec![gpu(), gpu(), cpu()], &[("gpu", 33), ("gpu#2", 32)]).unwrap_err().to_string();
    assert!(error.contains("64.0 MiB (67108864 bytes) of gpu + gpu#2, found 65.0 MiB"), "{error}");
    assert!(
        place(vec![gpu(), cpu()], &[("cpu", 97)]).unwrap_err().to_string().contains("of cpu, found 97.0 MiB")
    );
    // What is not free now may be by then.
    let notices = place(vec![gpu(), cpu()], &[("gpu", 64)]).unwrap().notices;
    assert_eq!(notices, ["gpu: 64.0 MiB may be used, but only 16.0 MiB are free now"]);
    assert_eq!(place(vec![gpu(), cpu()], &[("gpu", 16)]).unwrap().notices, [""; 0]);
    // What one of two was given, the other does not get again.
    let notices = place(vec![gpu(), gpu(), cpu()], &[("gpu", 12)]).unwrap().notices;
    assert!(
        notices.contains(&"gpu#2: 4.0 MiB free, of which 256.0 KiB are kept back".to_owned()),
        "{notices:?}"
    );
}

#[test]
fn processors_share_main_memory() {
    let model = open(&embedded());
    let needs = {
        let devices = Devices::new(vec![Arc::new(cpu("cpu"))]);
        PlacementOptions::default().place(&model, &devices, &options()).unwrap().plans.needs()[0].total()
    };
    let said = PlacementOptions::default();
    // As does a GPU beside them.
    let place = |kind: DeviceKind, free: u64, said: &PlacementOptions| {
        let stated = |name, kind| stated(name, kind, 1 << 30, free);
        let [first, second, host] = [("cpu1", DeviceKind::Cpu), ("cpu2", kind), ("cpu", DeviceKind::Cpu)]
            .map(|(name, kind)| stated(name, kind));
        said.place(&model, &Devices::new(vec![first, second, host]), &options())
    };
    for kind in [DeviceKind::Cpu, DeviceKind::IntegratedGpu] {
        // Twice as much is enough for what each device has of its own beside its part.
        let placed = place(kind, 2 * needs, &said).unwrap();
        let half = human(needs);
        for name in ["cpu1", "cpu2"] {
            let start = format!("{name}: {half} free, of which ");
            assert!(placed.notices.iter().any(|notice| notice.starts_with(&start)), "{:?}", placed.notices);
        }
        let sum: u64 = placed.plans.needs().iter().map(Needs::total).sum();
        assert!(sum <= 2 * needs, "{sum} of {}", 2 * needs);
        // With room for less than the weights, there is no way to have them.
        let error = place(kind, needs / 2, &said).unwrap_err().to_string();
        assert!(error.starts_with("it does not fit: cpu1 + cpu2 + cpu: "), "{error}");
        assert!(error.ends_with("more are free, and kept back)"), "{error}");
        // With room for these and little else, there is.
        let error = place(kind, needs, &said).unwrap_err().to_string();
        assert!(error.ends_with("less is needed there with a smaller --ctx or a smaller --batch"), "{error}");
    }
    // What is kept back is told where it would have helped.
    let gpu = stated("gpu", DeviceKind::Gpu, 1 << 30, 1 << 20);
    let devices = Devices::new(vec![gpu, Arc::new(cpu("cpu"))]);
    let all = PlacementOptions { gpu_layers: Some(GpuLayers::All), ..said.clone() };
    let error = all.place(&model, &devices, &options()).unwrap_err().to_string();
    assert!(error.contains("may be used (64.0 KiB more are free, and kept back); less is"), "{error}");
    // Without fitting nobody asks.
    let off = PlacementOptions { fit: Fit { on: false, budgets: Vec::new() }, ..said };
    assert!(place(DeviceKind::Cpu, needs / 2, &off).is_ok());
}

/// Loading and running as said, with so many bytes on the first of two devices.
fn fail_with(memory: u64, said: &PlacementOptions, accelerator: bool) -> String {
    let model = open(&embedded());
    let small = Arc::new(NullDevice::new("small", memory));
    let devices = match accelerator {
        true => Devices::new(vec![small, Arc::new(NullDevice::new("cpu", 8 << 30))]),
        false => Devices::new(vec![small]),
    };
    let said = PlacementOptions { fit: Fit { on: false, budgets: Vec::new() }, ..said.clone() };
    let plans = said.place(&model, &devices, &options()).unwrap().plans;
    let error = match Engine::load(&model, &devices, plans, &mut |_| ()) {
        Ok(engine) => engine.session().unwrap_err(),
        Err(error) => error,
    };
    error.to_string()
}

#[test]
fn who_has_no_room_says_for_what_and_what_would_help() {
    let everything = PlacementOptions::default();
    let experts = PlacementOptions {
        gpu_layers: Some(GpuLayers::Last(0)),
        overrides: vec![Override::new("exps", "small")],
        ..PlacementOptions::default()
    };
    let needs = {
        let devices = Devices::new(vec![
            Arc::new(NullDevice::new("small", 8 << 30)),
            Arc::new(NullDevice::new("cpu", 8 << 30)),
        ]);
        gpu_needs(&everything.place(&open(&embedded()), &devices, &options()).unwrap())
    };
    let cases = [
        (needs.weights - 1, &everything, "output.weight", "--n-gpu-layers"),
        (100, &experts, "blk.1.ffn_gate_exps.weight", "--cpu-moe or --n-cpu-moe"),
        (needs.weights + needs.states - 1, &everything, "cache.2", "--no-kv-offload"),
        (needs.weights + needs.states + 1, &everything, "scratch of small", "--batch or --ctx"),
    ];
    for (memory, said, what, option) in cases {
        let error = fail_with(memory, said, true);
        let start = format!("{what}: small: no memory for {what}: ");
        assert!(error.starts_with(&start) && error.contains(" bytes asked, "), "{error}");
        for option in [option, "--fit small=BYTES"] {
            assert!(error.contains(option), "{option}: {error}");
        }
    }
    // Where there is nothing but the host, nothing can go elsewhere.
    let error = fail_with(100, &PlacementOptions::default(), false);
    assert!(error.contains("no memory for token_embd.weight") && !error.contains("--"), "{error}");
}

#[test]
fn several_accelerators_share_in_proportion() {
    let model = open(&embedded());
    let devices = Devices::new(vec![
        Arc::new(NullDevice::new("big", 3 << 30)),
        Arc::new(NullDevice::new("small", 1 << 30)),
        Arc::new(NullDevice::new("cpu", 8 << 30)),
    ]);
    let placed = PlacementOptions::default().place(&model, &devices, &options()).unwrap();
    // Three layers and the output: three to one.
    assert_eq!(placed.plans.decode.placement().layers, [0, 0, 0, 1]);
    let tight = |big, small| PlacementOptions {
        fit: Fit { on: true, budgets: vec![("big".to_owned(), big), ("small".to_owned(), small)] },
        ..PlacementOptions::default()
    };
    let all = placed.plans.needs();
    let (big, small) = (all[0].total(), all[1].total());
    for (big, small) in [(big / 2, small), (big, small / 2), (big / 3, small / 3), (0, 0)] {
        let placed = tight(big, small).place(&model, &devices, &options()).unwrap();
        let needs = placed.plans.needs();
        assert!(needs[0].total() <= big && needs[1].total() <= small, "{needs:?} of {big} and {small}");
        let nothing = |notice: &String| notice.starts_with("not everything") && notice.ends_with("are ");
        assert!(!placed.notices.iter().any(nothing), "{:?}", placed.notices);
    }
}

#[test]
fn a_device_that_is_opened_twice_has_its_memory_once() {
    let model = open(&embedded());
    let gpu = || Arc::new(NullDevice::new("gpu", 4 << 20));
    let devices = Devices::new(vec![gpu(), gpu(), Arc::new(NullDevice::new("cpu", 8 << 30))]);
    let placed = PlacementOptions::default().place(&model, &devices, &options()).unwrap();
    let needs = placed.plans.needs();
    assert!(needs[0].total() <= 2 << 20 && needs[1].total() <= 2 << 20, "{needs:?}");
    for name in ["gpu", "gpu#2"] {
        let notice = format!("{name}: 2.0 MiB free, of which 128.0 KiB are kept back");
        assert!(placed.notices.contains(&notice), "{:?}", placed.notices);
    }
}

#[test]
fn another_accelerator_never_moves_more_to_the_host() {
    let model = open(&embedded());
    let on_host = |budgets: &[(String, u64)]| {
        let mut all: Vec<Arc<dyn Device>> = Vec::new();
        for (name, _) in budgets {
            all.push(Arc::new(NullDevice::new(name, 8 << 30)));
        }
        all.push(Arc::new(NullDevice::new("cpu", 8 << 30)));
        let devices = Devices::new(all);
        let fit = Fit { on: true, budgets: budgets.to_vec() };
        let said = PlacementOptions { fit, ..PlacementOptions::default() };
        let placed = said.place(&model, &devices, &options()).unwrap();
        let layers = &placed.plans.decode.placement().layers;
        layers.iter().filter(|device| **device == devices.host()).count()
    };
    for first in (1..12).map(|n| n * 300_000) {
        let alone = vec![("a".to_owned(), first)];
        let without = on_host(&alone);
        for more in [0, 1, 100_000, 500_000, 3_000_000] {
            let both = [alone.clone(), vec![("b".to_owned(), more)]].concat();
            let with = on_host(&both);
            assert!(with <= without, "{both:?}: {with} layers on the host, without b {without}");
        }
    }
}

#[test]
fn mistakes_name_the_option() {
    let model = open(&embedded());
    let (devices, _) = counted();
    let said = PlacementOptions::default;
    let entry = |pattern: &str, device: &str| Override::new(pattern, device);
    let cases = [
        (
            PlacementOptions { overrides: vec![entry("exps(", "gpu")], ..said() },
            ["override-tensor", "regular expression"],
        ),
        (
            PlacementOptions {
                overrides: vec![Override { option: "VARIABLE", ..entry("nowhere", "gpu") }],
                ..said()
            },
            ["VARIABLE: expected a pattern", "`nowhere`, which matches none"],
        ),
        (
            PlacementOptions { overrides: vec![entry("exps", "tpu")], ..said() },
            ["override-tensor", "gpu, cpu, found `tpu`"],
        ),
        (
            PlacementOptions { overrides: vec![entry("nowhere", "gpu")], ..said() },
            ["override-tensor", "`nowhere`, which matches none"],
        ),
        (
            PlacementOptions { cache_layers: vec![(0..4, "cpu".to_owned())], ..said() },
            ["kv-layers-on", "layers from 0 to 2, found 0-3"],
        ),
        (
            PlacementOptions { cache_layers: vec![(7..8, "cpu".to_owned())], ..said() },
            ["kv-layers-on", "found 7"],
        ),
        (
            PlacementOptions { cache_layers: vec![(0..1, "x".to_owned())], ..said() },
            ["kv-layers-on", "found `x`"],
        ),
        (
            PlacementOptions { fit: Fit { on: true, budgets: vec![("x".to_owned(), 1)] }, ..said() },
            ["fit", "found `x`"],
        ),
    ];
    for (said, parts) in cases {
        let error = said.place(&model, &devices, &options()).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    // No accelerator: a word, and no error.
    let host = Devices::new(vec![Arc::new(cpu("cpu"))]);
    let said = PlacementOptions { gpu_layers: Some(GpuLayers::All), ..said() };
    let placed = said.place(&Model::open(&embedded()).unwrap(), &host, &options()).unwrap();
    assert!(placed.notices.iter().any(|notice| notice.contains("no accelerator")), "{:?}", placed.notices);
}
