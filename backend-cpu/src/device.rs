//! The CPU as a device.

use crate::{
    buffer::{CpuBuffer, Memory},
    isa::Level,
    memory, ops,
    pool::Team,
    program::CpuProgram,
};
use backend_api::{
    BufferRef, BufferRequest, Device, DeviceError, DeviceInfo, DeviceKind, HostBytes, OpDesc, Program,
    ProgramDesc, Unsupported,
};
use std::{
    env, fmt, io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};
use thiserror::Error;

/// The environment variable that names the [instruction set](Level).
const ISA_VARIABLE: &str = "FATHOM_ISA";

/// How to open a [`CpuDevice`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads; as many as the process may use at once, if not given.
    pub threads: Option<usize>,
    /// Instruction set; the widest that the processor has, if not given.
    pub isa: Option<Level>,
    /// The device's name in options and messages.
    pub name: String,
}

/// Why the CPU could not be opened as wished.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CpuError {
    /// `FATHOM_ISA` names no instruction set.
    #[error("{ISA_VARIABLE}: expected one of portable, avx2, avx512; found {found:?}")]
    UnknownIsa {
        /// What it names.
        found: String,
    },
    /// The processor lacks the instruction set that was asked for.
    #[error("{name}: instruction set {asked} was asked for, but this processor has only {best} and below")]
    IsaUnavailable {
        /// The device's name.
        name: String,
        /// What was asked for.
        asked: Level,
        /// The widest the processor has.
        best: Level,
    },
    /// A thread count that makes no sense.
    #[error("{name}: expected 1 to {max} threads, found {found}", max = CpuOptions::MAX_THREADS)]
    Threads {
        /// The device's name.
        name: String,
        /// What was asked for.
        found: usize,
    },
    /// The system gave no threads.
    #[error("{name}: cannot start {threads} threads")]
    Start {
        /// The device's name.
        name: String,
        /// What was asked for.
        threads: usize,
        /// What the system said.
        source: io::Error,
    },
}

impl CpuOptions {
    /// More threads than any machine has use for.
    pub const MAX_THREADS: usize = 4096;

    /// The device `cpu` with the instruction set that the environment variable `FATHOM_ISA` names (`portable`,
    /// `avx2`, `avx512`; unset or empty: the widest).
    ///
    /// # Errors
    /// [`CpuError::UnknownIsa`]. Whether the processor has it is seen when the device is opened.
    pub fn from_env() -> Result<Self, CpuError> {
        let isa = match env::var_os(ISA_VARIABLE) {
            Some(value) => Self::parse_isa(&value.to_string_lossy())?,
            None => None,
        };
        Ok(CpuOptions { isa, ..CpuOptions::default() })
    }

    fn parse_isa(value: &str) -> Result<Option<Level>, CpuError> {
        if value.is_empty() {
            return Ok(None);
        }
        let unknown = || CpuError::UnknownIsa { found: value.to_owned() };
        Level::from_name(value).map(Some).ok_or_else(unknown)
    }
}

/// The device `cpu`, all threads, the widest instruction set. Reads no environment variable.
impl Default for CpuOptions {
    fn default() -> Self {
        CpuOptions { threads: None, isa: None, name: "cpu".to_owned() }
    }
}

/// The CPU as a device: exact, repeatable, and the same bits for any number of threads and rows.
///
/// Devices are independent: each has its own threads and its own buffers. One device runs one program at a time.
pub struct CpuDevice {
    info: DeviceInfo,
    /// Unlike every other device's of this process; buffers remember it.
    id: u64,
    level: Level,
    team: Arc<Team>,
}

impl CpuDevice {
    /// Opens the CPU: chooses the kernels, starts the threads. Memory sizes in its
    /// [info](Device::info) are 0 where the system does not tell (outside of Linux).
    ///
    /// # Errors
    /// [`CpuError`], where options ask for what the machine does not have.
    pub fn new(options: CpuOptions) -> Result<Self, CpuError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let CpuOptions { threads, isa, name } = options;
        let level = isa.unwrap_or_else(Level::best);
        if !level.is_available() {
            return Err(CpuError::IsaUnavailable { name, asked: level, best: Level::best() });
        }
        let threads = threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, |n| n.get()));
        if !(1..=CpuOptions::MAX_THREADS).contains(&threads) {
            return Err(CpuError::Threads { name, found: threads });
        }
        let team = match Team::new(&name, threads) {
            Ok(team) => Arc::new(team),
            Err(source) => return Err(CpuError::Start { name, threads, source }),
        };
        let plural = if threads == 1 { "" } else { "s" };
        let info = DeviceInfo {
            description: format!("{}, {level} kernels, {threads} thread{plural}", memory::processor()),
            name,
            kind: DeviceKind::Cpu,
            memory_total: memory::total(),
            memory_free: memory::available(),
            batch_invariant: true,
        };
        Ok(CpuDevice { info, id: NEXT_ID.fetch_add(1, Ordering::Relaxed), level, team })
    }

    /// The instruction set its kernels are compiled for.
    pub fn isa(&self) -> Level {
        self.level
    }

    /// The number of its threads.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    fn own<'a>(&self, buffer: &'a BufferRef, what: &str) -> Result<&'a CpuBuffer, DeviceError> {
        let own = buffer.as_any().downcast_ref::<CpuBuffer>().filter(|buffer| buffer.device() == self.id);
        own.ok_or_else(|| DeviceError::ForeignBuffer {
            device: self.info.name.clone(),
            what: what.to_owned(),
        })
    }

    fn fault(&self, reason: String) -> DeviceError {
        DeviceError::Driver { device: self.info.name.clone(), reason }
    }

    /// The address of `len` bytes at `offset` of a buffer.
    fn bytes(
        &self,
        buffer: &BufferRef,
        offset: usize,
        len: usize,
        what: &str,
    ) -> Result<*mut u8, DeviceError> {
        let own = self.own(buffer, what)?;
        let size = buffer.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            let reason = format!("{what} of {len} bytes at byte {offset} is beyond a buffer of {size} bytes");
            return Err(self.fault(reason));
        }
        Ok(own.pointer().wrapping_add(offset))
    }
}

impl Device for CpuDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn supports(&self, op: &OpDesc) -> Result<(), Unsupported> {
        ops::supports(&self.info.name, op)
    }

    fn allocate(&self, request: &BufferRequest) -> Result<BufferRef, DeviceError> {
        let memory = Memory::zeroed(request.size).ok_or_else(|| DeviceError::OutOfMemory {
            device: self.info.name.clone(),
            what: request.name.clone(),
            requested: request.size as u64,
            available: memory::available(),
        })?;
        Ok(Arc::new(CpuBuffer::owned(self.id, request.usage, memory)))
    }

    fn import(&self, bytes: &HostBytes) -> Result<Option<BufferRef>, DeviceError> {
        Ok(Some(Arc::new(CpuBuffer::imported(self.id, Arc::clone(bytes)))))
    }

    fn write(&self, to: &BufferRef, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let target = self.bytes(to, offset, bytes.len(), "a write")?;
        if !self.own(to, "a write")?.is_writable() {
            return Err(self.fault("a write to imported bytes, which are only read".to_owned()));
        }
        let _turn = self.team.turn();
        // SAFETY: `target` has room for the bytes, in memory of this device that nobody touches without its turn.
        unsafe { target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
        Ok(())
    }

    fn read(&self, from: &BufferRef, offset: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        let source = self.bytes(from, offset, into.len(), "a read")?;
        let _turn = self.team.turn();
        // SAFETY: as in `write`; imported bytes are written by nobody.
        unsafe { source.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) }
        Ok(())
    }

    fn compile(&self, program: ProgramDesc) -> Result<Box<dyn Program>, DeviceError> {
        for buffer in &program.buffers {
            self.own(buffer, &format!("program {}", program.name))?;
        }
        let compiled = CpuProgram::new(&self.info.name, self.level, Arc::clone(&self.team), program)?;
        Ok(Box::new(compiled))
    }
}

impl fmt::Debug for CpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuDevice").field("info", &self.info).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_sets_by_name() {
        assert_eq!(CpuOptions::parse_isa("").expect("none"), None);
        for level in Level::ALL {
            assert_eq!(CpuOptions::parse_isa(level.name()).expect("known"), Some(level));
        }
        let error = CpuOptions::parse_isa("sse9").expect_err("unknown").to_string();
        assert!(error.contains("FATHOM_ISA") && error.contains("sse9") && error.contains("avx2"), "{error}");
    }
}
