//! The suite that every backend passes, on whatever device this machine has, watched by the validation layer.

mod common;

use backend_api::Device;
use backend_vulkan::{Arithmetic, DeviceClass, VulkanDevice, VulkanOptions};
use std::{env, process::Command};

/// Everything is supported, so a case that is not run is a failure too.
fn conform(options: VulkanOptions) {
    let Some((_watch, device)) = common::open(options) else { return };
    let filter = env::var("FATHOM_CASES").unwrap_or_default();
    let report = backend_conformance::run_filtered(&device, &filter);
    assert!(report.unsupported.is_empty(), "not supported: {:?}", report.unsupported);
}

#[test]
fn as_software() {
    conform(VulkanOptions { class: Some(DeviceClass::Software), ..VulkanOptions::default() });
}

/// Cut as for a GPU, with memory that the CPU does not see.
#[test]
fn as_a_gpu() {
    conform(VulkanOptions { class: Some(DeviceClass::Gpu), always_stage: true, ..VulkanOptions::default() });
}

/// Cut into pieces of which each is little, as a slow GPU's watchdog would have it: those of attention have rows of a step
/// each, those of products work groups.
#[test]
fn in_pieces() {
    for class in [DeviceClass::Software, DeviceClass::Gpu] {
        let submissions = [None, Some(1)].map(|megamacs_per_second| {
            let options =
                VulkanOptions { class: Some(class), megamacs_per_second, ..VulkanOptions::default() };
            let (_watch, device) = common::open(options)?;
            for cases in ["LatentAttention*33 rows", "LatentAttention*70 rows", "Mul*Q4_K*F32*70 rows"] {
                backend_conformance::run_filtered(&device, cases);
            }
            Some(device.submissions())
        });
        if let [Some(whole), Some(pieces)] = submissions {
            assert!(pieces > 3 * whole, "{whole} submissions, {pieces} in pieces");
        }
    }
}

/// Whatever counts lanes, with twice as many as this machine has: llvmpipe's subgroups are as wide as its vectors.
#[test]
fn with_subgroups_of_another_size() {
    const CHILD: &str = "FATHOM_SUBGROUPS_OF_16";
    if env::var_os(CHILD).is_none() {
        let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
        if !device.info().description.contains("llvmpipe") {
            return println!("skipped: no llvmpipe");
        }
        let mut child = Command::new(env::current_exe().expect("this program"));
        child.args(["--exact", "with_subgroups_of_another_size"]);
        let status = child.env(CHILD, "1").env("LP_NATIVE_VECTOR_WIDTH", "512").status();
        return assert!(status.expect("it starts").success());
    }
    let listed = VulkanDevice::enumerate().expect("a device");
    assert!(listed[0].offers.iter().any(|offer| offer == "subgroups of 16"), "{listed:?}");
    let of = |class| VulkanOptions { class: Some(class), ..VulkanOptions::default() };
    for class in [DeviceClass::Gpu, DeviceClass::Software] {
        let Some((_watch, device)) = common::open(of(class)) else { return };
        for cases in [
            "MatMul Q4_K F32",
            "ExpertMatMul Q4_K",
            "MatMul F16",
            "MatMul tall Q6_K",
            "LatentAttention F16",
            "Route",
        ] {
            backend_conformance::run_filtered(&device, cases);
        }
    }
    let options = VulkanOptions { arithmetic: Some(Arithmetic::IntegerDots), ..of(DeviceClass::Gpu) };
    let Some((_watch, device)) = common::open(options) else { return };
    backend_conformance::run_filtered(&device, "Mul*Q4_K*Default*33 rows");
}

/// As a GPU that multiplies integers, where the driver can, however slowly.
#[test]
fn with_integer_dots() {
    many_rows(Arithmetic::IntegerDots);
}

/// As a GPU that has them.
#[test]
fn with_cooperative_matrices() {
    many_rows(Arithmetic::CooperativeMatrices);
}

/// Products of many rows beside quantised weights, the only ones that know an arithmetic that is not everywhere.
fn many_rows(arithmetic: Arithmetic) {
    let class = Some(DeviceClass::Gpu);
    let options = VulkanOptions { class, arithmetic: Some(arithmetic), ..VulkanOptions::default() };
    let Some((_watch, device)) = common::open(options) else { return };
    // Enough rows for tiles of every size.
    for rows in ["16 rows", "33 rows", "70 rows"] {
        let report = backend_conformance::run_filtered(&device, &format!("Mul*Q*Default*{rows}"));
        assert!(report.unsupported.is_empty(), "not supported: {:?}", report.unsupported);
    }
}
