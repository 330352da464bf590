//! Fathom's CPU device: exact kernels at the machine's limits, in portable code, AVX2 and AVX-512.
//!
//! Results are the same bits for any number of threads and for a prompt fed whole, in pieces or token by token
//! (they differ, within rounding, between instruction sets). Weights are read where they lie in the file's map.
//!
//! ```
//! use backend_api::{BufferRequest, BufferUsage, Device};
//! use backend_cpu::{CpuDevice, CpuOptions};
//!
//! let cpu = CpuDevice::new(CpuOptions { threads: Some(2), ..CpuOptions::from_env()? })?;
//! println!("{}", cpu.info().description);
//! let request = BufferRequest { name: "example".into(), size: 16, usage: BufferUsage::Scratch };
//! let buffer = cpu.allocate(&request)?;
//! cpu.write(&buffer, 4, b"deep")?;
//! let mut bytes = [1; 6];
//! cpu.read(&buffer, 3, &mut bytes)?;
//! assert_eq!(&bytes, b"\0deep\0");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod buffer;
mod builder;
mod device;
mod isa;
mod kernels;
mod memory;
mod ops;
pub mod peak;
mod pool;
mod program;
mod tensor;

pub use buffer::CpuBuffer;
pub use device::{CpuDevice, CpuError, CpuOptions};
pub use isa::Level;
