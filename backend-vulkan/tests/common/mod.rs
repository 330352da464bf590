//! Opening the first device as tests want it.
#![allow(dead_code, reason = "each test uses some of it")]

use backend_vulkan::{Arithmetic, VulkanDevice, VulkanError, VulkanOptions};
use std::{
    io::Write,
    sync::{Arc, Mutex, Once},
};

/// `vulkan0`, with the validation layer where there is one. `None`, said aloud, where this machine has no Vulkan, unless
/// `FATHOM_REQUIRE_VULKAN` says that it must.
///
/// The first of the two has to outlive all that is made from the device: it then fails if the validation layer has
/// complained, of what was left behind, too.
pub fn open(options: VulkanOptions) -> Option<(Watch, VulkanDevice)> {
    let required = required();
    let folder = std::env::temp_dir().join("fathom-test-pipelines");
    let options = VulkanOptions { validation: true, cache_folder: Some(folder), ..options };
    let opened = match VulkanDevice::open_with(0, &options) {
        Err(VulkanError::NoValidation(missing)) if !required => {
            println!("without validation: {missing}");
            VulkanDevice::open_with(0, &VulkanOptions { validation: false, ..options.clone() })
        }
        other => other,
    };
    match opened {
        Ok(device) => Some((Watch(device.validation_messages()), device)),
        // What was asked for beyond what every device must have.
        Err(VulkanError::Refused { lacks, .. })
            if options.arithmetic == Some(Arithmetic::CooperativeMatrices)
                && lacks.contains("cooperative matrices") =>
        {
            println!("skipped: {lacks}");
            None
        }
        Err(error) => {
            skip(&error);
            None
        }
    }
}

fn required() -> bool {
    std::env::var_os("FATHOM_REQUIRE_VULKAN").is_some()
}

/// Says once that tests are skipped, and past the test harness, which shows nothing of tests that pass; or fails where `FATHOM_REQUIRE_VULKAN` says that none may be.
pub fn skip(missing: &VulkanError) {
    static SAID: Once = Once::new();
    assert!(!required(), "{missing}");
    SAID.call_once(|| drop(writeln!(std::io::stderr(), "skipped: {missing}")));
}

/// What the validation layer complains about, which is nothing.
pub struct Watch(Arc<Mutex<Vec<String>>>);

impl Drop for Watch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let messages = self.0.lock().expect("nobody panicked with it");
            assert!(messages.is_empty(), "{} complaints, first {}", messages.len(), messages[0]);
        }
    }
}
