//! The suite that every backend passes, for each instruction set of this machine and several thread counts.

use backend_cpu::{CpuDevice, CpuOptions, Level};

/// Everything is supported, so a case that is not run is a failure too.
fn conform(isa: Level, threads: usize) {
    if !isa.is_available() {
        println!("skipped: this processor has no {isa}");
        return;
    }
    let options = CpuOptions { threads: Some(threads), isa: Some(isa), name: format!("{isa} × {threads}") };
    let report = backend_conformance::run(&CpuDevice::new(options).expect("an available level"));
    assert!(report.unsupported.is_empty(), "not supported: {:?}", report.unsupported);
}

#[test]
fn portable() {
    conform(Level::Portable, 2);
}

#[test]
fn avx2_one_thread() {
    conform(Level::Avx2, 1);
}

#[test]
fn avx2_two_threads() {
    conform(Level::Avx2, 2);
}

#[test]
fn avx512_one_thread() {
    conform(Level::Avx512, 1);
}

#[test]
fn avx512_two_threads() {
    conform(Level::Avx512, 2);
}

#[test]
fn avx512_three_threads() {
    conform(Level::Avx512, 3);
}

/// The device as users open it, with `FATHOM_ISA` where it is set.
#[test]
fn as_the_environment_says() {
    let options = CpuOptions::from_env().expect("FATHOM_ISA names an instruction set");
    let report = backend_conformance::run(&CpuDevice::new(options).expect("this processor has it"));
    assert!(report.unsupported.is_empty(), "not supported: {:?}", report.unsupported);
}
