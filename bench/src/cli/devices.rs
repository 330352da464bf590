//! From `--device` and `--threads` to devices.

use super::Failure;
use backend_api::Device;
use clap::Args;
use graph::{Devices, Placement};
use std::{sync::Arc, thread};
use thiserror::Error;

/// Where to run.
#[derive(Args, Clone, Debug, Default)]
pub struct DeviceOptions {
    /// The device to run on: `cpu`, or `vulkan0`, `vulkan1`, … in a build with the cargo feature `vulkan`
    /// [default: cpu]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Threads of the CPU [default: as many as the process may use at once]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Devices, and what goes to which.
pub struct OpenDevices {
    /// The named device, then the host; or the host alone.
    pub devices: Devices,
    /// Threads of the host.
    pub threads: usize,
    on: Option<usize>,
}

/// Why there is no such device.
#[derive(Debug, Error)]
enum DeviceError {
    #[error("--device {name}: no such device: expected cpu, or vulkan and a number")]
    Unknown { name: String },
    #[error(
        "--device {name}: this program was built without it; build with `--features {feature}` to have it"
    )]
    #[allow(dead_code, reason = "which devices are missing depends on the features")]
    NotBuilt { name: String, feature: &'static str },
    #[error("--device {name}")]
    #[allow(dead_code, reason = "which devices can be opened depends on the features")]
    Open { name: String, source: Failure },
}

impl OpenDevices {
    /// Opens the host, and the device that the user named.
    ///
    /// # Errors
    /// A device that does not exist, was not compiled in, or does not open.
    pub fn new(options: &DeviceOptions) -> Result<Self, Failure> {
        let threads =
            options.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, |n| n.get()));
        let name = options.device.as_deref().unwrap_or("cpu");
        let number = |prefix: &str| name.strip_prefix(prefix)?.parse::<usize>().ok();
        let accelerator = match (name, number("vulkan")) {
            ("cpu", _) => None,
            (_, Some(index)) => Some(vulkan(name, index)?),
            _ => return Err(DeviceError::Unknown { name: name.to_owned() }.into()),
        };
        let on = accelerator.is_some().then_some(0);
        let mut all: Vec<_> = accelerator.into_iter().collect();
        all.push(host(threads)?);
        Ok(OpenDevices { devices: Devices::new(all), threads, on })
    }

    /// Everything on the named device.
    pub fn placement(&self, layers: usize) -> Placement {
        match self.on {
            // The output counts as a layer.
            Some(device) => Placement::all_on(device, layers + 1),
            None => Placement::default(),
        }
    }

    /// The device that was named, in words.
    pub fn description(&self) -> &str {
        &self.devices[self.on.unwrap_or(self.devices.host())].info().description
    }
}

#[cfg(feature = "cpu")]
fn host(threads: usize) -> Result<Arc<dyn Device>, Failure> {
    use backend_cpu::{CpuDevice, CpuOptions};
    let open = || Ok(CpuDevice::new(CpuOptions { threads: Some(threads), ..CpuOptions::from_env()? })?);
    let opened = open().map_err(|source: Failure| DeviceError::Open { name: "cpu".to_owned(), source })?;
    Ok(Arc::new(opened))
}

#[cfg(not(feature = "cpu"))]
fn host(_threads: usize) -> Result<Arc<dyn Device>, Failure> {
    Err(DeviceError::NotBuilt { name: "cpu".to_owned(), feature: "cpu" }.into())
}

#[cfg(feature = "vulkan")]
fn vulkan(name: &str, index: usize) -> Result<Arc<dyn Device>, Failure> {
    let open = |source| DeviceError::Open { name: name.to_owned(), source };
    let device = backend_vulkan::VulkanDevice::open(index).map_err(|error| open(error.into()))?;
    Ok(Arc::new(device))
}

#[cfg(not(feature = "vulkan"))]
fn vulkan(name: &str, _index: usize) -> Result<Arc<dyn Device>, Failure> {
    Err(DeviceError::NotBuilt { name: name.to_owned(), feature: "vulkan" }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(name: &str) -> String {
        let options = DeviceOptions { device: Some(name.to_owned()), threads: Some(1) };
        super::super::with_causes(&*OpenDevices::new(&options).err().unwrap())
    }

    #[test]
    fn a_device_that_does_not_exist_is_named() {
        for name in ["gpu", "cuda0", "vulkan", "vulkanx", "", "CPU"] {
            assert_eq!(
                failure(name),
                format!("--device {name}: no such device: expected cpu, or vulkan and a number")
            );
        }
    }

    #[test]
    fn a_device_that_was_not_compiled_in_says_which_feature_brings_it() {
        if cfg!(not(feature = "vulkan")) {
            assert!(failure("vulkan0").contains("`--features vulkan`"));
        } else {
            assert!(failure("vulkan99").starts_with("--device vulkan99: "));
        }
        if cfg!(not(feature = "cpu")) {
            assert!(failure("cpu").contains("`--features cpu`"));
        }
    }
}
