//! Devices that are lost in the middle of a text: who has its caches elsewhere goes on, with the same bits.

mod common;

use backend_api::{
    BufferRef, BufferRequest, BufferUsage, Device, DeviceError, HostBytes, Observer, Program, ProgramDesc,
    Step,
};
use backend_cpu::{CpuDevice, CpuOptions};
use common::{embedded, open, passes_on};
use graph::Devices;
use model_deepseek::{
    CacheType, Engine, Error, Options, PlacementOptions, Sampler, Session,
    placement::{Fit, GpuLayers},
};
use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// A CPU with memory of its own, which is lost after so many program runs.
struct Fragile {
    cpu: CpuDevice,
    fate: Arc<Fate>,
}

struct Fate {
    name: String,
    /// Program runs until it is lost.
    runs: AtomicUsize,
    /// Weights that it was given.
    weights: AtomicUsize,
}

struct FragileProgram {
    program: Box<dyn Program>,
    fate: Arc<Fate>,
}

impl Fate {
    fn check(&self) -> Result<(), DeviceError> {
        match self.runs.load(Ordering::Relaxed) {
            0 => {
                Err(DeviceError::Lost { device: self.name.clone(), reason: "it fell off the bus".to_owned() })
            }
            _ => Ok(()),
        }
    }
}

impl Device for Fragile {
    passes_on!(cpu: info supports);
    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        self.fate.check()?;
        if request.usage == BufferUsage::Weights {
            self.fate.weights.fetch_add(1, Ordering::Relaxed);
        }
        self.cpu.allocate(request)
    }
    fn import(&self, _: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        Ok(None)
    }
    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.fate.check()?;
        self.cpu.write(to, offset, bytes)
    }
    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        self.fate.check()?;
        self.cpu.read(from, offset, into)
    }
    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        self.fate.check()?;
        let program = self.cpu.compile(program)?;
        Ok(Box::new(FragileProgram { program, fate: Arc::clone(&self.fate) }))
    }
}

impl Program for FragileProgram {
    fn run(&mut self, step: &Step, observer: &mut dyn Observer) -> Result<(), DeviceError> {
        self.fate.check()?;
        self.program.run(step, observer)?;
        // The run that it is lost in has written something already.
        self.fate.runs.fetch_sub(1, Ordering::Relaxed);
        self.fate.check()
    }
}

fn cpu(name: &str) -> CpuDevice {
    let options = CpuOptions { threads: Some(1), name: name.to_owned(), ..CpuOptions::from_env().unwrap() };
    CpuDevice::new(options).unwrap()
}

/// Accelerators of these names, each with the program runs that it lives for, and the host.
fn devices(accelerators: &[(&str, usize)]) -> (Devices, Vec<Arc<Fate>>) {
    let mut all: Vec<Arc<dyn Device>> = Vec::new();
    let mut fates = Vec::new();
    for (name, runs) in accelerators {
        let fate = Fate { name: (*name).to_owned(), runs: (*runs).into(), weights: 0.into() };
        let fate = Arc::new(fate);
        all.push(Arc::new(Fragile { cpu: cpu(name), fate: Arc::clone(&fate) }));
        fates.push(fate);
    }
    all.push(Arc::new(cpu("cpu")));
    (Devices::new(all), fates)
}

const FOREVER: usize = usize::MAX;

/// All layers on accelerators, as many caches on the host.
fn session(devices: &Devices, host_caches: usize) -> Session {
    let said = PlacementOptions {
        gpu_layers: Some(GpuLayers::All),
        cache_layers: (0..host_caches).map(|layer| (layer..layer + 1, "cpu".to_owned())).collect(),
        fit: Fit { on: false, budgets: Vec::new() },
        ..PlacementOptions::default()
    };
    let options = Options { context: Some(64), batch: 5, cache: CacheType::F32, ..Options::default() };
    let model = open(&embedded());
    let plans = said.place(&model, devices, &options).unwrap().plans;
    Engine::load(&model, devices, plans, &mut |_| ()).unwrap().session().unwrap()
}

/// The session goes on where it can; what it was told.
fn told(session: &mut Session) -> Arc<Mutex<Vec<String>>> {
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    session.go_on_without_lost_devices({
        let told = Arc::clone(&told);
        move |error| told.lock().unwrap().push(error.to_string())
    });
    told
}

/// A prompt in three steps and ten tokens more: the tokens, and the bits of the last logits.
fn write(session: &mut Session) -> Result<(Vec<u32>, Vec<u32>), Error> {
    let prompt: Vec<u32> = (0..12).map(|i| i * 37 + 11).collect();
    session.feed(&prompt)?;
    session.generate(&mut Sampler::greedy(), 10, |_, _| ControlFlow::Continue(()))?;
    let logits = session.logits().unwrap().iter().map(|x| x.to_bits()).collect();
    Ok((session.tokens().to_vec(), logits))
}

#[test]
fn a_text_goes_on_to_the_bit_where_its_caches_are_on_the_host() {
    let (healthy, _) = devices(&[("gpu", FOREVER)]);
    let expected = write(&mut session(&healthy, 3)).unwrap();
    // In the prompt and in the text, in the first and in later splits of a step.
    for runs in [1, 2, 4, 5, 9, 12, 13, 14, 15, 17, 30] {
        let (devices, fates) = devices(&[("gpu", runs)]);
        let mut session = session(&devices, 3);
        let told = told(&mut session);
        assert_eq!(write(&mut session).unwrap(), expected, "lost after {runs} runs");
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].ends_with("on gpu: gpu was lost: it fell off the bus"), "{told:?}");
        assert!(fates[0].runs.load(Ordering::Relaxed) == 0, "the test reaches the loss");
        let plans = session.engine().plans();
        assert!(plans.decode.owners.iter().chain(&plans.prefill.owners).all(|owner| *owner == 1));
    }
}

#[test]
fn caches_that_are_lost_end_a_session() {
    for host_caches in [0, 2] {
        let (devices, _) = devices(&[("gpu", 12)]);
        let mut session = session(&devices, host_caches);
        let told = told(&mut session);
        let error = write(&mut session).unwrap_err();
        assert_eq!(error.lost_device(), Some("gpu"));
        let error = error.to_string();
        let lost = 3 - host_caches;
        for part in
            ["gpu was lost: it fell off the bus", &format!("caches of {lost} layers"), "--no-kv-offload"]
        {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(told.lock().unwrap().is_empty());
    }
}

#[test]
fn nothing_goes_on_unasked() {
    let (devices, _) = devices(&[("gpu", 12)]);
    let mut session = session(&devices, 3);
    let error = write(&mut session).unwrap_err();
    assert_eq!(error.lost_device(), Some("gpu"));
    // What was in before is in, and goes on when it is asked to; forks, too.
    let fed = session.tokens().len();
    assert!(fed > 0);
    let told = told(&mut session);
    session.feed(&[5]).unwrap();
    assert_eq!(session.tokens().len(), fed + 1);
    session.fork().unwrap().feed(&[6]).unwrap();
    assert_eq!(told.lock().unwrap().len(), 1);
}

#[test]
fn other_accelerators_keep_what_they_have() {
    let (healthy, _) = devices(&[("a", FOREVER), ("b", FOREVER)]);
    // Of three layers and the output two are on each.
    let expected = write(&mut session(&healthy, 2)).unwrap();
    let (devices, fates) = devices(&[("a", 7), ("b", FOREVER)]);
    let mut session = session(&devices, 2);
    let told = told(&mut session);
    let weights = fates[1].weights.load(Ordering::Relaxed);
    assert_eq!(write(&mut session).unwrap(), expected);
    assert_eq!(told.lock().unwrap().len(), 1);
    assert_eq!(fates[1].weights.load(Ordering::Relaxed), weights, "nothing is loaded twice");
    let owners = &session.engine().plans().decode.owners;
    assert!(!owners.contains(&0) && owners.contains(&1));
    // The second has a cache, and cannot be gone on without.
    fates[1].runs.store(1, Ordering::Relaxed);
    let error = session.feed(&[5, 6, 7]).map(|_| ()).unwrap_err();
    assert_eq!(error.lost_device(), Some("b"));
    assert!(error.to_string().contains("caches of 1 layers"), "{error}");
}

#[test]
fn one_loss_after_another_leaves_the_host() {
    let (healthy, _) = devices(&[("a", FOREVER), ("b", FOREVER)]);
    let expected = write(&mut session(&healthy, 3)).unwrap();
    for (a, b) in [(9, 9), (9, 10), (3, 15), (15, 3)] {
        let (devices, _) = devices(&[("a", a), ("b", b)]);
        let mut session = session(&devices, 3);
        let told = told(&mut session);
        assert_eq!(write(&mut session).unwrap(), expected, "{a} and {b} runs");
        assert_eq!(told.lock().unwrap().len(), 2);
    }
}

#[test]
fn a_card_that_is_opened_twice_is_lost_once() {
    let (devices, fates) = devices(&[("gpu", 9), ("gpu", FOREVER)]);
    let mut session = session(&devices, 3);
    let told = told(&mut session);
    write(&mut session).unwrap();
    assert_eq!(told.lock().unwrap().len(), 1);
    let owners = &session.engine().plans().decode.owners;
    assert!(owners.iter().all(|owner| *owner == 2), "{owners:?}");
    assert!(fates[1].runs.load(Ordering::Relaxed) > 0);
}
