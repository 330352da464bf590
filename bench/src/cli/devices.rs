//! From names of devices to devices.
//!
//! `cpu` is the host and always there. Every other device named is an accelerator, in order of priority.

use super::{Failure, PlacementArgs};
use backend_api::{Device, NullDevice};
use clap::Args;
use graph::Devices;
use model_deepseek::PlacementOptions;
use std::{str::FromStr, sync::Arc, thread};
use thiserror::Error;

/// Where to run, and what goes where.
#[derive(Args, Clone, Debug, Default)]
pub struct DeviceOptions {
    /// A device to run on (repeatable). `cpu` is the host and always there; every other one is an accelerator, in
    /// order of priority, and naming one puts all layers on it that fit: `vulkan0`, `vulkan1`, … in a build with the
    /// cargo feature `vulkan` (see --list-devices); `cpu1`, `cpu2`, … for the CPU in the part of one; for planning only,
    /// a hypothetical one: `null:NAME:24GiB`, with rates of its bus and memory if wanted
    /// (`null:NAME:24GiB:BUS_GB_S:MEMORY_GB_S`), called NAME everywhere else. One named twice is opened twice, the second
    /// time as `NAME#2` [default: cpu]
    #[arg(long, value_name = "NAME")]
    pub device: Vec<DeviceName>,
    /// Threads of each CPU device [default: as many as the process may use at once]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// What goes where.
    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// A device as it is named.
#[derive(Clone, Debug, PartialEq)]
pub enum DeviceName {
    /// The CPU, as host (0) or in the part of an accelerator.
    Cpu(usize),
    /// A Vulkan device.
    Vulkan(usize),
    /// One that only plans.
    Null {
        /// What it is called.
        name: String,
        /// Its bytes.
        memory: u64,
        /// Bytes per second across its bus and in its memory.
        rates: DeviceRates,
    },
}

/// Bytes per second, where they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceRates {
    /// Between the device and the host.
    pub bus: Option<f64>,
    /// Of its own memory.
    pub memory: Option<f64>,
}

/// Devices, and what goes to which.
pub struct OpenDevices {
    /// Accelerators in order of priority, then the host.
    pub devices: Devices,
    /// Threads of each CPU device.
    pub threads: usize,
    /// What was said about placement.
    pub placement: PlacementOptions,
}

/// Why there is no such device.
#[derive(Debug, Error)]
enum DeviceError {
    #[error(
        "--device {name}: this program was built without it; build with `--features {feature}` to have it"
    )]
    #[allow(dead_code, reason = "which devices are missing depends on the features")]
    NotBuilt { name: String, feature: &'static str },
    #[error("--device {name}")]
    #[allow(dead_code, reason = "which devices can be opened depends on the features")]
    Open { name: String, source: Failure },
    #[error("--device null:{name}: expected the same memory and rates each time that it is named")]
    Differs { name: String },
    #[error("--device: expected at most {max} devices, found {found}", max = Devices::MAX)]
    TooMany { found: usize },
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let number = |prefix: &str| {
            let digits = name.strip_prefix(prefix).filter(|digits| !digits.starts_with(['+', '-']))?;
            digits.parse::<usize>().ok()
        };
        if name == "cpu" {
            return Ok(DeviceName::Cpu(0));
        }
        if let Some(index) = number("cpu").filter(|&index| index > 0) {
            return Ok(DeviceName::Cpu(index));
        }
        if let Some(index) = number("vulkan") {
            return Ok(DeviceName::Vulkan(index));
        }
        match name.strip_prefix("null:") {
            Some(rest) => null(rest),
            None => {
                Err("no such device: expected cpu, cpu1, vulkan0 (or another number), or null:NAME:24GiB"
                    .to_owned())
            }
        }
    }
}

/// What follows `null:`.
fn null(rest: &str) -> Result<DeviceName, String> {
    let mut parts = rest.split(':');
    let name = parts.next().unwrap_or_default();
    // Names are found in any case.
    let reserved = DeviceName::from_str(&name.to_ascii_lowercase()).is_ok();
    if name.is_empty() || name.contains(['=', ',', '#']) || name.contains(char::is_control) || reserved {
        return Err(format!(
            "expected a name that no other device has, without `=`, `,`, `#` and line breaks, found {name:?}"
        ));
    }
    let memory = parts.next().ok_or("expected null:NAME:SIZE, such as null:gpu:24GiB")?;
    let memory = match size(memory)? {
        0 => return Err("expected a device with memory, found 0 bytes".to_owned()),
        memory => memory,
    };
    let mut rate = || match parts.next() {
        None | Some("") => Ok(None),
        Some(text) => match text.parse::<f64>() {
            Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Some(rate * 1e9)),
            _ => Err(format!("expected a rate in GB/s, found `{text}`")),
        },
    };
    let rates = DeviceRates { bus: rate()?, memory: rate()? };
    if let Some(more) = parts.next() {
        return Err(format!("expected null:NAME:SIZE:BUS_GB_S:MEMORY_GB_S, found `:{more}` after it"));
    }
    Ok(DeviceName::Null { name: name.to_owned(), memory, rates })
}

/// A number of bytes, such as `24GiB`.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("expected a size such as 24GiB, 512MiB, 100KiB or a number of bytes, found `{text}`");
    let units = [("KiB", 1u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40), ("B", 1)];
    let (number, unit) =
        units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).unwrap_or((text, 1));
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * unit as f64;
    if !bytes.is_finite() || bytes < 0.0 || bytes > u64::MAX as f64 {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

impl DeviceOptions {
    /// These, and where they say nothing, what `base` says.
    pub fn over(&self, base: &DeviceOptions) -> DeviceOptions {
        let device = if self.device.is_empty() { &base.device } else { &self.device };
        DeviceOptions {
            device: device.clone(),
            threads: self.threads.or(base.threads),
            placement: self.placement.over(&base.placement),
        }
    }

    /// Of each CPU device.
    pub(super) fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, |n| n.get()))
    }
}

/// A hypothetical device that is named twice is one, and has one memory.
fn check_sizes(names: &[DeviceName]) -> Result<(), DeviceError> {
    for (index, device) in names.iter().enumerate() {
        let DeviceName::Null { name, .. } = device else { continue };
        let other = |other: &DeviceName| {
            matches!(other, DeviceName::Null { name: n, .. } if n == name) && other != device
        };
        if names[..index].iter().any(other) {
            return Err(DeviceError::Differs { name: name.clone() });
        }
    }
    Ok(())
}

impl OpenDevices {
    /// Opens the host, and the devices that the user named.
    ///
    /// # Errors
    /// A device that does not exist, was not compiled in, or does not open.
    pub fn new(options: &DeviceOptions) -> Result<Self, Failure> {
        check_sizes(&options.device)?;
        let threads = options.threads();
        let mut all = Vec::new();
        let mut rates = Vec::new();
        for name in options.device.iter().filter(|name| **name != DeviceName::Cpu(0)) {
            let (device, known) = open(name, threads)?;
            all.push(device);
            rates.push(known);
        }
        all.push(open(&DeviceName::Cpu(0), threads)?.0);
        rates.push(DeviceRates::default());
        if all.len() > Devices::MAX {
            return Err(DeviceError::TooMany { found: all.len() }.into());
        }
        let devices = Devices::new(all);
        let said = options.placement.over(&PlacementArgs::from_env()?);
        let placement = said.resolve(|| super::rates::measure(&devices, &rates, threads));
        Ok(OpenDevices { devices, threads, placement })
    }

    /// The devices in words, in order of priority.
    pub fn description(&self) -> String {
        let descriptions: Vec<&str> =
            self.devices.iter().map(|device| device.info().description.as_str()).collect();
        descriptions.join(" + ")
    }
}

fn open(name: &DeviceName, threads: usize) -> Result<(Arc<dyn Device>, DeviceRates), Failure> {
    let device: Arc<dyn Device> = match name {
        DeviceName::Cpu(0) => cpu("cpu".to_owned(), threads)?,
        DeviceName::Cpu(index) => cpu(format!("cpu{index}"), threads)?,
        DeviceName::Vulkan(index) => vulkan(&format!("vulkan{index}"), *index)?,
        DeviceName::Null { name, memory, rates } => {
            return Ok((Arc::new(NullDevice::new(name, *memory)), *rates));
        }
    };
    Ok((device, DeviceRates::default()))
}

#[cfg(feature = "cpu")]
pub(super) fn cpu(name: String, threads: usize) -> Result<Arc<dyn Device>, Failure> {
    use backend_cpu::{CpuDevice, CpuOptions};
    let options = |name: String| Ok(CpuOptions { threads: Some(threads), name, ..CpuOptions::from_env()? });
    let opened = options(name.clone()).and_then(|options| Ok(CpuDevice::new(options)?));
    Ok(Arc::new(opened.map_err(|source: Failure| DeviceError::Open { name, source })?))
}

#[cfg(not(feature = "cpu"))]
fn cpu(name: String, _threads: usize) -> Result<Arc<dyn Device>, Failure> {
    Err(DeviceError::NotBuilt { name, feature: "cpu" }.into())
}

#[cfg(feature = "vulkan")]
fn vulkan(name: &str, index: usize) -> Result<Arc<dyn Device>, Failure> {
    let open = |source| DeviceError::Open { name: name.to_owned(), source };
    let device = backend_vulkan::VulkanDevice::open(index).map_err(|error| open(error.into()))?;
    if let Some(notice) = device.notice() {
        eprintln!("notice: {name}: {notice}");
    }
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
        let options = DeviceOptions {
            device: vec![name.parse().expect("a name")],
            threads: Some(1),
            ..DeviceOptions::default()
        };
        super::super::with_causes(&*OpenDevices::new(&options).err().unwrap())
    }

    #[test]
    fn names_of_devices() {
        let null = |name: &str, memory, bus, memory_rate| DeviceName::Null {
            name: name.to_owned(),
            memory,
            rates: DeviceRates { bus, memory: memory_rate },
        };
        let good = [
            ("cpu", DeviceName::Cpu(0)),
            ("cpu1", DeviceName::Cpu(1)),
            ("vulkan12", DeviceName::Vulkan(12)),
            ("null:gpu:24GiB", null("gpu", 24 << 30, None, None)),
            ("null:gpu:1.5GiB:25", null("gpu", 3 << 29, Some(25e9), None)),
            ("null:g:100KiB:25:800.5", null("g", 100 << 10, Some(25e9), Some(800.5e9))),
            ("null:g:4096::800", null("g", 4096, None, Some(800e9))),
        ];
        for (text, name) in good {
            assert_eq!(text.parse(), Ok(name), "{text}");
        }
        let bad = [
            ("gpu", "no such device"),
            ("cuda0", "no such device"),
            ("cpu0", "no such device"),
            ("cpu-1", "no such device"),
            ("vulkan", "no such device"),
            ("vulkan+1", "no such device"),
            ("", "no such device"),
            ("CPU", "no such device"),
            ("null:gpu", "null:NAME:SIZE"),
            ("null::1GiB", "expected a name"),
            ("null:cpu:1GiB", "expected a name"),
            ("null:CPU:1GiB", "expected a name"),
            ("null:gpu:0", "found 0 bytes"),
            ("null:a=b:1GiB", "expected a name"),
            ("null:a\nb:1GiB", r#"found "a\nb""#),
            ("null:\u{1b}[31m:1GiB", "expected a name"),
            ("null:gpu:much", "expected a size"),
            ("null:gpu:-1GiB", "expected a size"),
            ("null:gpu:1GB", "expected a size"),
            ("null:gpu:NaNGiB", "expected a size"),
            ("null:gpu:1GiB:fast", "expected a rate"),
            ("null:gpu:1GiB:0", "expected a rate"),
            ("null:gpu:1GiB:1:2:3", "after it"),
        ];
        for (text, message) in bad {
            let error = text.parse::<DeviceName>().expect_err(text);
            assert!(error.contains(message), "{text}: {error}");
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
