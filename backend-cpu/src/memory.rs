//! Facts about main memory and the processor, as far as the system tells.

use std::fs;

/// Bytes of main memory; 0 where the system does not say (outside of Linux).
pub(crate) fn total() -> u64 {
    meminfo("MemTotal:")
}

/// Bytes that can be had without swapping; 0 where the system does not say (outside of Linux).
pub(crate) fn available() -> u64 {
    meminfo("MemAvailable:")
}

/// The processor's name; its architecture where the system does not say (outside of Linux).
pub(crate) fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// A line of `/proc/meminfo` (proc(5)): a key, and KiB.
fn meminfo(key: &str) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = info.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB"));
    value.and_then(|kib| kib.trim().parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}
