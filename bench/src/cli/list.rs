//! `--list-devices`: what this machine has, what each of it offers, and what stands in the way of the rest.

use super::{DeviceOptions, Failure, print_json};
use backend_api::{DeviceInfo, DeviceKind};
use clap::Args;
use graph::report::human;
use serde::Serialize;
use std::{
    fmt,
    io::{self, Write},
};

/// Instead of running.
#[derive(Args, Clone, Debug, Default)]
pub struct ListOption {
    /// Print the devices that --device can name, their memory, what they offer, and why one cannot be used; needs no
    /// model
    // Stands in for an input, where the program has a group of that name.
    #[arg(long, group = "input")]
    pub list_devices: bool,
}

/// The answer.
#[derive(Serialize)]
struct Listing {
    devices: Vec<Listed>,
    /// Why there are no more, in sentences.
    missing: Vec<String>,
}

#[derive(Serialize)]
struct Listed {
    name: String,
    description: String,
    kind: &'static str,
    memory_total: u64,
    memory_free: u64,
    offers: Vec<String>,
    /// Why it cannot be used.
    refused: Option<String>,
}

/// Prints the devices of this machine: a table, or one JSON object.
///
/// # Errors
/// Options of the CPU that it does not take; those of standard output. A machine without a device is an answer.
pub fn list_devices(options: &DeviceOptions, json: bool) -> Result<(), Failure> {
    let mut listing = Listing { devices: Vec::new(), missing: Vec::new() };
    listing.add_cpu(options)?;
    listing.add_vulkan();
    if json {
        return print_json(&listing);
    }
    Ok(write!(io::stdout().lock(), "{listing}")?)
}

impl Listing {
    #[allow(dead_code, reason = "which devices there are depends on the features")]
    fn add(&mut self, info: DeviceInfo, offers: Vec<String>, refused: Option<String>) {
        let kind = match info.kind {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Gpu => "gpu",
            DeviceKind::IntegratedGpu => "integrated_gpu",
            DeviceKind::Null => "null",
        };
        let DeviceInfo { name, description, memory_total, memory_free, .. } = info;
        self.devices.push(Listed { name, description, kind, memory_total, memory_free, offers, refused });
    }

    #[cfg(feature = "cpu")]
    fn add_cpu(&mut self, options: &DeviceOptions) -> Result<(), Failure> {
        use backend_cpu::Level;
        let cpu = super::devices::cpu("cpu".to_owned(), options.threads())?;
        let levels =
            Level::ALL.into_iter().filter(|level| level.is_available()).map(|level| level.name().to_owned());
        self.add(cpu.info().clone(), levels.collect(), None);
        Ok(())
    }

    #[cfg(not(feature = "cpu"))]
    fn add_cpu(&mut self, _options: &DeviceOptions) -> Result<(), Failure> {
        self.missing.push(not_built("the CPU", "cpu"));
        Ok(())
    }

    #[cfg(feature = "vulkan")]
    fn add_vulkan(&mut self) {
        match backend_vulkan::VulkanDevice::enumerate() {
            Ok(found) => found.into_iter().for_each(|one| self.add(one.info, one.offers, one.refused)),
            Err(error) => self.missing.push(error.to_string()),
        }
    }

    #[cfg(not(feature = "vulkan"))]
    fn add_vulkan(&mut self) {
        self.missing.push(not_built("Vulkan devices", "vulkan"));
    }
}

#[allow(dead_code, reason = "what is missing depends on the features")]
fn not_built(what: &str, feature: &str) -> String {
    format!("this program was built without {what}; build with `--features {feature}` to have them")
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.devices.iter().map(|device| device.name.len()).max().unwrap_or(0);
        for device in &self.devices {
            let Listed { name, description, offers, refused, .. } = device;
            let [total, free] = [device.memory_total, device.memory_free].map(human);
            writeln!(f, "{name:width$}  {description}")?;
            writeln!(f, "{:width$}  {total} of memory, {free} free", "")?;
            if !offers.is_empty() {
                writeln!(f, "{:width$}  offers {}", "", offers.join(", "))?;
            }
            if let Some(why) = refused {
                writeln!(f, "{:width$}  cannot be used: {why}", "")?;
            }
        }
        self.missing.iter().try_for_each(|sentence| writeln!(f, "{sentence}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_paragraph_and_what_is_missing_a_line() {
        let mut listing = Listing { devices: Vec::new(), missing: vec!["no more".to_owned()] };
        let info = |name: &str, kind| DeviceInfo {
            name: name.to_owned(),
            description: format!("a {name}"),
            kind,
            memory_total: 2 << 30,
            memory_free: 1 << 30,
            batch_invariant: false,
        };
        listing.add(info("cpu", DeviceKind::Cpu), ["portable", "avx2"].map(str::to_owned).to_vec(), None);
        listing.add(info("vulkan0", DeviceKind::Gpu), Vec::new(), Some("it is too old".to_owned()));
        let expected = "\
            cpu      a cpu\n         2.0 GiB of memory, 1.0 GiB free\n         offers portable, avx2\n\
            vulkan0  a vulkan0\n         2.0 GiB of memory, 1.0 GiB free\n         cannot be used: it is too old\n\
            no more\n";
        assert_eq!(listing.to_string(), expected);
    }
}
