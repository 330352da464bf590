//! Fathom's Vulkan device: the operations of the CPU device, in every format, on whatever GPU a driver shows.
//!
//! # How it is made
//!
//! * A program is *lowered* to pieces of work, *scheduled* into dispatches (chains of row-wise operations and products
//!   that wait for nothing share one) and recorded, once for each of some sizes of steps. A step writes a few numbers and
//!   submits: one submission for each program of a decode step; a long prefill is cut, so that no driver's watchdog takes
//!   it for dead.
//! * Shaders reach memory by address. What they may touch is checked when a program is compiled, as nothing checks it
//!   later.
//! * Shaders are GLSL under `shaders/`, checked in as SPIR-V under `spirv/`: building needs no shader compiler. The
//!   package `shaders/compiler` makes them.
//!
//! # What it promises
//!
//! Repeating a step gives the same bits. One row alone and the same row in a batch agree within the bound of their
//! operation, not to the bit. [`Precision::F32`](backend_api::Precision::F32) is f32 throughout, and
//! so is [`Precision::Fine`](backend_api::Precision::Fine). In the default one products of few rows are too; those of many
//! are computed with what the device is fastest at ([`Arithmetic`]).
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
//!         for device in devices {
//!             println!("{}: {}, {} MiB", device.info.name, device.info.description, device.info.memory_total >> 20);
//!         }
//!     }
//!     Err(VulkanError::NoLoader(reason)) => println!("this machine has no Vulkan: {reason}"),
//!     Err(other) => println!("{other}"),
//! }
//! ```

mod capabilities;
mod carry;
mod context;
mod device;
mod form;
mod instance;
mod lower;
mod memory;
mod pipelines;
mod program;
mod schedule;
mod shared;
mod staging;
mod tuning;

pub use context::{DriverCall, Failure};
pub use device::VulkanDevice;
pub use memory::VulkanBuffer;
pub use tuning::{Arithmetic, DeviceClass};

use backend_api::DeviceInfo;
use std::path::PathBuf;
use thiserror::Error;

/// How to open a [`VulkanDevice`]. The default is what users want; the rest is for tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VulkanOptions {
    /// Watched by the validation layer, with synchronization validation.
    pub validation: bool,
    /// Copies go through staging memory also where the CPU sees the device's, and nothing is imported.
    pub always_stage: bool,
    /// How work is cut; by the device's kind, if not given.
    pub class: Option<DeviceClass>,
    /// How products of many columns are computed where they need not be exact; the best that the device has instructions
    /// for, if not given. One that the device does not offer is refused.
    pub arithmetic: Option<Arithmetic>,
    /// No buffer is larger than this.
    pub largest_buffer: Option<u64>,
    /// What the device computes in a second, about, in millions of multiply-accumulates: what prompts are cut by.
    pub megamacs_per_second: Option<u32>,
    /// Where compiled shaders are kept; `fathom` in the user's cache folder, if not given.
    pub cache_folder: Option<PathBuf>,
}

/// A Vulkan device of this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Listing {
    /// Facts.
    pub info: DeviceInfo,
    /// What it offers beyond what it must, in words.
    pub offers: Vec<String>,
    /// Why it cannot be opened, if it cannot.
    pub refused: Option<String>,
}

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
    /// The validation layer was asked for and is not there.
    #[error("no Vulkan validation layer on this machine (Debian: apt install vulkan-validationlayers): {0}")]
    NoValidation(String),
    /// A call into the driver failed.
    #[error("{call} failed: {result}")]
    Call {
        /// The Vulkan function.
        call: &'static str,
        /// What it answered.
        result: String,
    },
}
