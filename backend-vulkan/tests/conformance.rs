//! The suite that every backend passes, on whatever device this machine has, watched by the validation layer.

mod common;

use backend_vulkan::{Arithmetic, DeviceClass, VulkanOptions};

/// Everything is supported, so a case that is not run is a failure too.
fn conform(options: VulkanOptions) {
    let Some(device) = common::open(options) else { return };
    let filter = std::env::var("FATHOM_CASES").unwrap_or_default();
    let report = backend_conformance::run_filtered(&device, &filter);
    assert!(report.unsupported.is_empty(), "not supported: {:?}", report.unsupported);
    common::assert_valid(&device);
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
    let Some(device) = common::open(options) else { return };
    // Enough rows for tiles of every size.
    for rows in ["16 rows", "33 rows", "70 rows"] {
        let report = backend_conformance::run_filtered(&device, &format!("Mul*Q*Default*{rows}"));
        assert!(report.unsupported.is_empty(), "not supported: {:?}", report.unsupported);
    }
    common::assert_valid(&device);
}
