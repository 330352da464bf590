//! What a device owes about memory, before any program runs.

use backend_api::{BufferRequest, BufferUsage, Device, DeviceError, HostBytes, NullDevice};
use std::sync::Arc;

pub(crate) const NAME: &str = "memory: allocate, write, read, import";

/// # Errors
/// What is wrong, in words.
pub(crate) fn check(device: &dyn Device) -> Result<(), String> {
    let failed = |error: DeviceError| error.to_string();
    for usage in crate::setup::USAGES {
        for size in [1, 4, 63, 1000, 70_000] {
            let request = BufferRequest { name: "memory check".to_owned(), size, usage };
            let buffer = device.allocate(&request).map_err(failed)?;
            if (buffer.size(), buffer.usage()) != (size, usage) {
                return Err(format!("{size} bytes for {usage:?} became {buffer:?}"));
            }
            let mut bytes = vec![0xAA; size];
            device.read(&buffer, 0, &mut bytes).map_err(failed)?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Err(format!("{size} bytes for {usage:?} are not zeroed"));
            }
            // From an odd place to an odd place.
            let part = size / 3..size - size / 5;
            let written: Vec<u8> = part.clone().map(|i| (i % 251) as u8 + 1).collect();
            device.write(&buffer, part.start, &written).map_err(failed)?;
            let mut found = vec![0; size];
            device.read(&buffer, 0, &mut found).map_err(failed)?;
            bytes[part.clone()].copy_from_slice(&written);
            if found != bytes {
                return Err(format!("writing {part:?} of {size} bytes does not read back"));
            }
            let mut found = vec![0; part.len() / 2];
            device.read(&buffer, part.start, &mut found).map_err(failed)?;
            if found != written[..part.len() / 2] {
                return Err(format!("reading from {} of {size} bytes gives others", part.start));
            }
            for (offset, len) in [(0, size + 1), (size, 1), (size + 1, 0), (usize::MAX, 2)] {
                let outside = [
                    device.read(&buffer, offset, &mut vec![0; len]),
                    device.write(&buffer, offset, &vec![0; len]),
                ];
                if outside.iter().any(Result::is_ok) {
                    return Err(format!("{len} bytes from {offset} on of {size} bytes are no error"));
                }
            }
        }
    }
    let request = BufferRequest { name: "stranger".to_owned(), size: 64, usage: BufferUsage::Scratch };
    let stranger = NullDevice::new("another", 64).allocate(&request).map_err(failed)?;
    for outcome in [device.read(&stranger, 0, &mut [0]), device.write(&stranger, 0, &[0])] {
        if !matches!(outcome, Err(DeviceError::ForeignBuffer { .. })) {
            return Err(format!("a buffer of another device gives {outcome:?}"));
        }
    }
    let bytes: Vec<u8> = (0..5000).map(|i| (i % 253) as u8).collect();
    let host: HostBytes = Arc::new(bytes.clone());
    if let Some(buffer) = device.import(&host).map_err(failed)? {
        let mut found = vec![0; bytes.len()];
        device.read(&buffer, 0, &mut found).map_err(failed)?;
        if found != bytes || buffer.size() != bytes.len() || buffer.usage() != BufferUsage::Weights {
            return Err(format!("an import of {} bytes became {buffer:?} with other bytes", bytes.len()));
        }
    }
    Ok(())
}
