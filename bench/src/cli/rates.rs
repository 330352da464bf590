//! How fast bytes are read and cross, for `--absorb auto`.

use super::devices::DeviceRates;
use backend_api::{BufferRequest, BufferUsage, DeviceError, DeviceKind};
use graph::{Devices, Rates};
use std::time::Instant;

/// Where a hypothetical device says nothing: a PCIe 4.0 bus with 16 lanes.
const USUAL_BUS: f64 = 25e9;

/// Bytes that are copied to measure a bus.
const PROBE: usize = 64 << 20;

/// Bytes that are read to measure main memory: more than most processors have of caches.
#[cfg(feature = "cpu")]
const READ: usize = 256 << 20;

/// The rates that are known, and measurements for the others: of the CPU's memory, and of copies to devices and back.
/// Between several accelerators and the host, the slowest bus counts.
pub(super) fn measure(devices: &Devices, known: &[DeviceRates], threads: usize) -> Rates {
    if devices.len() == 1 {
        return Rates { bus: f64::INFINITY, memory: Vec::new() };
    }
    let cpu = cpu_memory(threads);
    let mut rates = Rates { bus: f64::INFINITY, memory: Vec::with_capacity(devices.len()) };
    for (index, device) in devices.iter().enumerate() {
        let info = device.info();
        let bus = known[index].bus.or_else(|| match info.kind {
            _ if index == devices.host() => None,
            DeviceKind::Null => Some(USUAL_BUS),
            _ => copies(devices, index).ok(),
        });
        rates.bus = rates.bus.min(bus.unwrap_or(f64::INFINITY));
        let memory = known[index].memory.or((info.kind == DeviceKind::Cpu).then_some(cpu));
        rates.memory.push(memory.unwrap_or(f64::INFINITY));
    }
    rates
}

/// Bytes per second to a device and back.
fn copies(devices: &Devices, index: usize) -> Result<f64, DeviceError> {
    let device = &devices[index];
    let request = BufferRequest { name: "bus probe".to_owned(), size: PROBE, usage: BufferUsage::Scratch };
    let buffer = device.allocate(&request)?;
    let mut bytes = vec![1u8; PROBE];
    let mut best = 0.0f64;
    for _ in 0..3 {
        let start = Instant::now();
        device.write(&buffer, 0, &bytes)?;
        device.read(&buffer, 0, &mut bytes)?;
        best = best.max(2.0 * PROBE as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Measured once for as many threads: two plans of one program should go by the same.
#[cfg(feature = "cpu")]
fn cpu_memory(threads: usize) -> f64 {
    static KNOWN: std::sync::Mutex<Vec<(usize, f64)>> = std::sync::Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, rate)) = known.iter().find(|(of, _)| *of == threads) {
        return *rate;
    }
    let rate = match backend_cpu::peak::read_gb_s(threads, READ) {
        // Where it cannot be measured, it does not count.
        0.0 => f64::INFINITY,
        gb_s => 1e9 * gb_s,
    };
    known.push((threads, rate));
    rate
}

#[cfg(not(feature = "cpu"))]
fn cpu_memory(_threads: usize) -> f64 {
    f64::INFINITY
}
