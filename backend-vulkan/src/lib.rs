//! Fathom's Vulkan device.
//!
//! What it does today: finds the Vulkan devices of the machine, opens one and tells what it is. **It has no
//! kernels yet**: [`supports`](backend_api::Device::supports) rejects every operation with that reason, and
//! asking for memory or a program is an error. So a plan can name a real card and its real memory, and nothing
//! pretends to compute.
//!
//! The Vulkan loader is opened at run time: the crate builds and starts on machines that have none, where
//! [`VulkanDevice::enumerate`] answers with a sentence.
//!
//! # Alone
//!
//! ```
//! use backend_vulkan::{VulkanDevice, VulkanError};
//!
//! match VulkanDevice::enumerate() {
//!     Ok(devices) => {
//!         for info in devices {
//!             println!("{}: {}, {} MiB", info.name, info.description, info.memory_total >> 20);
//!         }
//!     }
//!     Err(VulkanError::NoLoader(reason)) => println!("this machine has no Vulkan: {reason}"),
//!     Err(other) => println!("{other}"),
//! }
//! ```

mod device;
mod instance;

pub use device::VulkanDevice;

use thiserror::Error;

/// Why there is no Vulkan device to work with.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VulkanError {
    /// The loader library could not be opened.
    #[error("no Vulkan loader on this machine (Debian: apt install libvulkan1): {0}")]
    NoLoader(String),
    /// The loader is there, but it found no driver, or no driver shows a device.
    #[error("the Vulkan loader found no device (is a driver installed?): {0}")]
    NoDevice(String),
    /// An index past the last device.
    #[error(
        "vulkan{index} does not exist: this machine has {found} Vulkan device(s), vulkan0 being the first"
    )]
    NoSuchDevice {
        /// The index asked for.
        index: usize,
        /// Devices found.
        found: usize,
    },
    /// The device lacks something that Fathom cannot do without.
    #[error("{device} cannot be used: {lacks}")]
    Refused {
        /// The device's name and description.
        device: String,
        /// The missing feature, with what was expected and found.
        lacks: String,
    },
    /// A call into the driver failed.
    #[error("{call} failed: {result}")]
    Call {
        /// The Vulkan function.
        call: &'static str,
        /// What it answered.
        result: String,
    },
}
