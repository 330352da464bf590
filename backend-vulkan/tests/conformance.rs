//! The suite that every backend passes, on whatever device this machine has, watched by the validation layer.

mod common;

use backend_vulkan::{DeviceClass, VulkanOptions};

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
