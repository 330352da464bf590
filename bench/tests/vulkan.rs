//! The programs with a Vulkan device: right wherever the work is done, and clear where it cannot be.
//!
//! Where there is no Vulkan device nothing is tried, unless `FATHOM_REQUIRE_VULKAN` is set.
#![cfg(all(feature = "cpu", feature = "vulkan"))]

mod common;

use backend_api::{Device, Discard};
use backend_vulkan::{Arithmetic, DriverCall, Failure, VulkanDevice, VulkanError, VulkanOptions};
use bench::{compare::distance, npy};
use common::{austen, run, run_in, shared_models};
use graph::Devices;
use model_deepseek::{
    CacheType, Engine, Model, Options, PlacementOptions, Sampler, Session, Wanted,
    placement::{Fit, GpuLayers},
};
use serde_json::{Value, json};
use std::{
    env, fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex},
};

const GENERATE: &str = env!("CARGO_BIN_EXE_generate");
const PERPLEXITY: &str = env!("CARGO_BIN_EXE_perplexity");

/// `vulkan0`, or `None`, said aloud, where it is not there and need not be.
fn vulkan() -> Option<VulkanDevice> {
    match VulkanDevice::open(0) {
        Ok(device) => Some(device),
        Err(missing) => {
            assert!(env::var_os("FATHOM_REQUIRE_VULKAN").is_none(), "{missing}");
            common::skipped(missing);
            None
        }
    }
}

/// A model, and float64's logits for it.
struct Case {
    name: String,
    model: PathBuf,
    reference: PathBuf,
}

/// The embedded model (Q4_K_M), and with `../shared` another F16 and Q8_0, and two unlike any other.
fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let embedded = root.join("../testdata/austen-q4_k_m.json");
    let mut cases =
        vec![Case { name: "austen-q4_k_m".to_owned(), model: austen().into(), reference: embedded }];
    if let Some(models) = shared_models() {
        for name in ["austen-f16", "austen-q8_0", "shapes/v2lite-like-f16", "shapes/v3-like-f16"] {
            let file = |kind: &str| models.join(format!("{name}.{kind}"));
            cases.push(Case { name: name.to_owned(), model: file("gguf"), reference: file("json") });
        }
    }
    cases
}

/// The same model in formats that no other case has, with `../shared`.
fn more_formats() -> Vec<Case> {
    let folder = shared_models();
    let case = |name: &str| {
        let file = |kind: &str| folder.as_ref().map(|folder| folder.join(format!("{name}.{kind}")));
        Some(Case { name: name.to_owned(), model: file("gguf")?, reference: file("json")? })
    };
    ["austen-iq4_xs", "austen-q2_k", "austen-q5_1"].into_iter().filter_map(case).collect()
}

/// What of everything goes elsewhere, as it is typed. That each is right with every model, both ways of feeding it, is
/// shown without the program (`vulkan_named.rs` of model-deepseek).
const PLACEMENTS: [&str; 7] = [
    "",
    "--no-kv-offload",
    "--cpu-moe",
    "--n-gpu-layers 2",
    "--override-tensor attn_output=cpu,ffn_(gate|up)_shexp=cpu",
    "--kv-layers-on cpu=1-2",
    "--device vulkan0",
];

impl Case {
    /// What `perplexity` says of it, all on `vulkan0` but for what the options say.
    fn compare(&self, reference: &str, options: &str) -> Value {
        let model = self.model.to_str().unwrap();
        // Nothing goes elsewhere in silence.
        let all = "--device vulkan0 --n-gpu-layers all --fit off --strict --cache-type f32";
        let mut arguments = vec!["--model", model, "--reference", reference];
        arguments.extend(all.split(' ').chain(options.split_whitespace()));
        run(PERPLEXITY, &arguments).json()
    }

    /// The same with fewer tokens: those after them change no logits.
    fn first(&self, tokens: usize, folder: &Path) -> String {
        let mut reference: Value = serde_json::from_slice(&fs::read(&self.reference).unwrap()).unwrap();
        let logits = self.reference.with_file_name(reference["logits"].as_str().unwrap());
        let mut logits = npy::read(&logits).unwrap();
        let part = |key: &str, count: usize| reference[key].as_array().unwrap()[..count].to_vec();
        let rows = reference["rows"].as_array().unwrap();
        let rows = rows.iter().take_while(|row| row.as_u64().unwrap() < tokens as u64).count();
        assert!(rows >= 4, "{}: {rows} rows", self.name);
        let [tokens, kept] = [part("tokens", tokens), part("rows", rows)];
        logits.rows = rows;
        logits.values.truncate(rows * logits.columns);
        let name = self.name.replace('/', "-");
        reference = json!({ "tokens": tokens, "rows": kept, "logits": format!("{name}.npy") });
        common::write_reference(folder, &name, &reference, &logits)
    }
}

#[test]
fn exact_arithmetic_gives_the_float64_references_wherever_the_work_is_done() {
    if vulkan().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut worst = 0.0;
    for (index, case) in cases().into_iter().enumerate() {
        let all = case.reference.to_str().unwrap().to_owned();
        let few = case.first(40, folder.path());
        let mut check = |reference: &str, options: &str| {
            let found = case.compare(reference, &format!("{options} --activations f32"));
            let nmse = found["nmse"].as_f64().unwrap();
            assert!(nmse <= 2e-6, "{} {options}: {found}", case.name);
            worst = f64::max(worst, nmse);
        };
        check(&all, "");
        // A process spends its first second on compiling shaders.
        if index == 0 {
            PLACEMENTS.into_iter().for_each(|placement| check(&few, &format!("{placement} --batch 13")));
        }
    }
    for case in more_formats() {
        let found = case.compare(case.reference.to_str().unwrap(), "--activations f32");
        let nmse = found["nmse"].as_f64().unwrap();
        assert!(nmse <= 2e-6, "{}: {found}", case.name);
        worst = f64::max(worst, nmse);
    }
    println!("nmse at most {worst:.1e}");
}

#[test]
fn default_arithmetic_is_as_near_as_on_the_cpu() {
    if vulkan().is_none() {
        return;
    }
    for case in cases() {
        let reference: Value = serde_json::from_slice(&fs::read(&case.reference).unwrap()).unwrap();
        // The CPU's bar: the median row, which single flipped experts do not move.
        let bound = 1.2 * reference["llama_cpp"]["median_row_nmse"].as_f64().unwrap();
        for options in ["", "--no-kv-offload --cpu-moe"] {
            let found = case.compare(case.reference.to_str().unwrap(), options);
            let median = found["median_row_nmse"].as_f64().unwrap();
            println!("{} {options}: median {median:.1e}, bound {bound:.1e}", case.name);
            assert!(median <= bound, "{} {options}: {found}", case.name);
        }
    }
}

/// What a GPU of each kind does with many rows, work being cut as for one: no driver's choice is left untried.
#[test]
fn each_arithmetic_of_gpus_is_as_near_as_on_the_cpu() {
    if vulkan().is_none() {
        return;
    }
    for arithmetic in [Arithmetic::Floats, Arithmetic::IntegerDots, Arithmetic::CooperativeMatrices] {
        let options = VulkanOptions { arithmetic: Some(arithmetic), ..VulkanOptions::default() };
        let device = match VulkanDevice::open_with(0, &options) {
            Ok(device) => Arc::new(device),
            Err(VulkanError::Refused { lacks, .. }) => {
                println!("skipped: {arithmetic:?}: {lacks}");
                continue;
            }
            Err(other) => panic!("{other}"),
        };
        let quantised = cases().into_iter().filter(|case| !case.name.ends_with("f16"));
        for case in quantised.chain(more_formats()) {
            let reference: Value = serde_json::from_slice(&fs::read(&case.reference).unwrap()).unwrap();
            let numbers = |key: &str| reference[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap());
            let tokens: Vec<u32> = numbers("tokens").map(|token| token as u32).collect();
            let rows: Vec<usize> = numbers("rows").map(|row| row as usize).collect();
            let expected = npy::read(&case.reference.with_file_name(reference["logits"].as_str().unwrap()));
            let options =
                Options { context: Some(tokens.len()), cache: CacheType::F32, ..Options::default() };
            let mut session = session(case.model.to_str().unwrap(), &device, false, &options).unwrap();
            let mut found = Vec::new();
            let mut each = |_, logits: &[f32]| found.extend_from_slice(logits);
            // A few tokens, some and many: three forms of a program.
            let mut fed = 0;
            for end in [5, 50, tokens.len()] {
                let rows: Vec<usize> =
                    rows.iter().filter(|row| (fed..end).contains(*row)).map(|row| row - fed).collect();
                session.feed_with(&tokens[fed..end], Wanted::Rows(&rows), &mut each, &mut Discard).unwrap();
                fed = end;
            }
            let distance = distance(&expected.unwrap(), &found);
            let bound = 1.2 * reference["llama_cpp"]["median_row_nmse"].as_f64().unwrap();
            let median = distance.median_row_nmse;
            println!("{} {arithmetic:?}: median {median:.1e}, bound {bound:.1e}", case.name);
            assert!(median <= bound, "{} {arithmetic:?}: {distance:?}, bound {bound}", case.name);
        }
    }
}

#[test]
fn the_greedy_text_is_that_of_the_cpu() {
    if vulkan().is_none() {
        return;
    }
    // Exact arithmetic, with an F32 cache, where weights are quantised.
    let mut models = vec![(austen(), "--activations f32")];
    models.extend(shared_models().map(|folder| {
        let file = folder.join("austen-f16.gguf");
        (file.to_str().unwrap().to_owned(), "")
    }));
    for (model, more) in &models {
        let write = |options: &str| {
            let prompt = "It is a truth universally acknowledged, that a";
            let mut arguments = vec!["--model", model.as_str(), "--prompt", prompt, "--json"];
            arguments.extend("--temperature 0 --predict 48".split(' '));
            arguments.extend(more.split_whitespace().chain(options.split_whitespace()));
            let json = run(GENERATE, &arguments).json();
            (json["text"].clone(), json["tokens"].clone())
        };
        let text = write("");
        for options in ["", "--no-kv-offload", "--cpu-moe", "--device vulkan0"] {
            assert_eq!(write(&format!("--device vulkan0 {options}")), text, "{model} {options}");
        }
    }
}

/// What a program says where llvmpipe has vectors of so many bits, and so subgroups of so many lanes, if `vulkan0` is that.
fn with_vectors(bits: &str, program: &str, arguments: &[&str]) -> Option<Output> {
    if !vulkan()?.info().description.contains("llvmpipe") {
        println!("skipped: no llvmpipe");
        return None;
    }
    let output = Command::new(program).args(arguments).env("LP_NATIVE_VECTOR_WIDTH", bits).output();
    Some(output.expect("it starts"))
}

#[test]
fn subgroups_of_another_size_give_the_same_logits() {
    let folder = tempfile::tempdir().unwrap();
    let case = cases().remove(0);
    let few = case.first(40, folder.path());
    let model = case.model.to_str().unwrap();
    let arguments = ["--model", model, "--reference", &few, "--device", "vulkan0", "--fit", "off", "--json"];
    let exact = ["--activations", "f32", "--batch", "13"];
    let Some(output) = with_vectors("512", PERPLEXITY, &[&arguments[..], &exact].concat()) else { return };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(found["nmse"].as_f64().unwrap() <= 2e-6, "{found}");
}

#[test]
fn a_driver_that_lacks_something_is_refused_by_its_name() {
    let Some(output) = with_vectors("128", GENERATE, &["--device", "vulkan0"]) else { return };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{text}");
    assert!(text.contains("llvmpipe") && text.contains("lacks subgroups of 8 to 128 invocations"), "{text}");
    let Some(list) = with_vectors("128", GENERATE, &["--list-devices"]) else { return };
    let text = String::from_utf8_lossy(&list.stdout);
    assert!(list.status.success() && text.contains("cannot be used: its driver lacks"), "{text}");
}

/// A loader that is none stands before the system's, if there is one.
#[cfg(target_os = "linux")]
#[test]
fn without_a_loader_a_sentence_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("libvulkan.so.1"), "no library").unwrap();
    let run = |arguments: &[&str]| {
        let output = common::command(GENERATE).args(arguments).env("LD_LIBRARY_PATH", folder.path()).output();
        let output = output.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = run(&["--device", "vulkan0"]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("error: ") && err.contains("no Vulkan loader on this machine"), "{err}");
    let (code, out, err) = run(&["--list-devices"]);
    assert!(code == Some(0) && out.contains("no Vulkan loader on this machine"), "{out}{err}");
    let (code, out, err) = run(&["--predict", "2"]);
    assert!(code == Some(0) && !out.is_empty(), "{err}");
}

#[test]
fn a_device_named_twice_is_opened_twice() {
    if vulkan().is_none() {
        return;
    }
    let arguments = ["--predict", "2", "--seed", "1", "--device", "vulkan0", "--device", "vulkan0"];
    let second = ["--override-tensor", r"blk\.1\.=VULKAN0#2"];
    let said = run(GENERATE, &[&arguments[..], &second].concat());
    assert!(said.err.contains("decode on cpu + vulkan0 + vulkan0#2: "), "{said:?}");
    said.ok();
    let unknown = ["--override-tensor", r"blk\.1\.=vulkan0#3"];
    let error = run(GENERATE, &[&arguments[..], &unknown].concat()).error();
    let expected = "override-tensor: expected one of the devices vulkan0, vulkan0#2, cpu, found `vulkan0#3`";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn too_little_memory_is_worked_around_or_said() {
    if vulkan().is_none() {
        return;
    }
    let arguments = ["--predict", "2", "--seed", "1", "--device", "vulkan0"];
    let fitted = run(GENERATE, &[&arguments[..], &["--fit", "vulkan0=4MiB"]].concat());
    assert!(
        fitted.err.contains("notice: not everything fits: on cpu are 3 layers, the output\n"),
        "{fitted:?}"
    );
    fitted.ok();
    let tight = ["--fit", "vulkan0=64KiB", "--override-tensor", "exps=vulkan0"];
    let error = run(GENERATE, &[&arguments[..], &tight].concat()).error();
    for part in [
        "it does not fit: vulkan0: ",
        "64.0 KiB (65536 bytes) may be used",
        "less is needed there with another --override-tensor",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_damaged_pipeline_cache_is_told_and_made_anew() {
    if vulkan().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let write = || {
        let arguments = ["--predict", "4", "--seed", "1", "--device", "vulkan0"];
        let said = run_in(folder.path(), GENERATE, &arguments, "");
        let is_told = said.err.contains("notice: vulkan0: ignoring the pipeline cache ");
        (said.ok(), is_told)
    };
    let (text, told) = write();
    assert!(!told);
    let files = || fs::read_dir(folder.path().join("fathom")).unwrap().map(|file| file.unwrap().path());
    assert!(files().count() > 0, "there is a cache");
    files().for_each(|file| fs::write(file, "no cache").unwrap());
    assert_eq!(write(), (text.clone(), true));
    assert_eq!(write(), (text, false));
}

/// With all layers on a device, and with caches there or on the host.
fn session(
    model: &str,
    device: &Arc<VulkanDevice>,
    host_caches: bool,
    options: &Options,
) -> Result<Session, model_deepseek::Error> {
    let cpu = backend_cpu::CpuDevice::new(backend_cpu::CpuOptions::default()).unwrap();
    let vulkan: Arc<dyn Device> = Arc::<VulkanDevice>::clone(device);
    let devices = Devices::new(vec![vulkan, Arc::new(cpu)]);
    let model = Arc::new(Model::open(model.as_ref()).unwrap());
    let said = PlacementOptions {
        gpu_layers: Some(GpuLayers::All),
        host_caches,
        fit: Fit { on: false, budgets: Vec::new() },
        ..PlacementOptions::default()
    };
    let plans = said.place(&model, &devices, options).unwrap().plans;
    Engine::load(&model, &devices, plans, &mut |_| ())?.session()
}

#[test]
fn a_session_outlives_the_device_where_its_caches_are_on_the_host() {
    let (Some(first), Some(second)) = (vulkan(), vulkan()) else { return };
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    for (device, host_caches) in [(first, true), (second, false)] {
        let device = Arc::new(device);
        let options = Options { context: Some(64), ..Options::default() };
        let mut session = session(&austen(), &device, host_caches, &options).unwrap();
        session.go_on_without_lost_devices({
            let told = Arc::clone(&told);
            move |error| told.lock().unwrap().push(error.to_string())
        });
        let go_on = |_, _: &str| ControlFlow::Continue(());
        session.feed(&[0, 5, 6, 7]).unwrap();
        session.generate(&mut Sampler::greedy(), 4, go_on).unwrap();
        device.fail(DriverCall::Submit, 0, Failure::Lost);
        match session.generate(&mut Sampler::greedy(), 4, go_on) {
            Ok(_) => assert!(host_caches && session.tokens().len() == 12),
            Err(error) => {
                assert!(!host_caches, "{error}");
                assert_eq!(error.lost_device(), Some("vulkan0"));
                assert!(error.to_string().contains("caches of 3 layers went with it"), "{error}");
            }
        }
    }
    let told = told.lock().unwrap();
    assert!(told.len() == 1 && told[0].contains("vulkan0 was lost"), "{told:?}");
}

/// However many allocations go well before one does not.
#[test]
fn a_failed_allocation_names_what_it_was_for_and_what_would_help() {
    let Some(device) = vulkan() else { return };
    let device = Arc::new(device);
    let mut told = Vec::new();
    for after in 0.. {
        device.fail(DriverCall::Allocate, after, Failure::OutOfMemory);
        match session(&austen(), &device, false, &Options::default()) {
            // What an import is compared through: without it weights are copied.
            Ok(_) if after == 0 => {}
            Ok(_) => break,
            Err(error) => told.push(error.to_string()),
        }
    }
    for text in &told {
        let parts = ["vulkan0: no memory for ", " bytes asked, ", " free", "--fit vulkan0=BYTES"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert!(!text.contains(" 0 free"), "{text}");
    }
    for what in ["cache.2: vulkan0", "scratch of vulkan0", "numbers of program", "tables of program"] {
        assert!(told.iter().any(|text| text.contains(what)), "{what}: {told:#?}");
    }
}
