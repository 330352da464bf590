//! What this machine can do at most, measured, to hold throughput against: matrix times vector is bound by the
//! bytes of the weights, matrix times matrix by 8-bit multiply-accumulates.

use crate::{
    CpuOptions,
    buffer::Memory,
    isa::{Isa, Level},
    kernels::{BoundKernel, Kernel, Scratch, bind},
    memory,
    pool::{Job, Member, Order, Poisoned, Team},
};
use backend_api::Step;
use std::{hint::black_box, sync::Arc, time::Instant};

/// GB/s (10⁹ bytes) that `threads` threads read from memory: the best of several passes over `bytes` (1 GiB is more than
/// caches hold), or a quarter of the free memory if that is less. 0 where the system gives no threads or no memory.
pub fn read_gb_s(threads: usize, bytes: usize) -> f64 {
    let size = match memory::available() {
        0 => bytes,
        free => (free / 4).min(bytes as u64) as usize,
    };
    let bytes = size / Read::TASK * Read::TASK;
    let Some(memory) = Memory::zeroed(bytes) else { return 0.0 };
    let start = memory.pointer() as usize;
    // Pages that were never written are all the same page of zeros.
    let write = Write { start, bytes };
    if best_seconds(threads, 1, write).is_none() {
        return 0.0;
    }
    best_seconds(threads, 5, Read { start, bytes }).map_or(0.0, |seconds| bytes as f64 / seconds / 1e9)
}

/// 10⁹ 8-bit multiply-accumulates per second of `threads` threads, all operands in registers or the first cache, with
/// the widest instruction set. 0 where the system gives no threads.
pub fn int8_gmac_s(threads: usize) -> f64 {
    const TASKS: usize = 64;
    let threads = threads.clamp(1, CpuOptions::MAX_THREADS);
    let macs = (TASKS * threads * Dots::ROUNDS * Dots::sums(Level::best()) * 64) as f64;
    let kernel = Dots { tasks: TASKS * threads };
    best_seconds(threads, 5, kernel).map_or(0.0, |seconds| macs / seconds / 1e9)
}

/// The shortest time of `passes` runs of a kernel.
fn best_seconds(threads: usize, passes: usize, kernel: impl Kernel + 'static) -> Option<f64> {
    let team = Team::new("peak", threads.min(CpuOptions::MAX_THREADS)).ok()?;
    let alone = Arc::new(Alone(bind(kernel, Level::best())));
    let order = Order { step: Step { rows: 0, past: 0, outputs: 0 }, timed_since: None };
    let pass = || {
        let start = Instant::now();
        team.turn().run(&alone, order).ok()?;
        Some(start.elapsed().as_secs_f64())
    };
    (0..passes).map(|_| pass()).try_fold(f64::INFINITY, |best, time| Some(best.min(time?)))
}

/// One kernel as a job.
struct Alone(Box<dyn BoundKernel>);

impl Job for Alone {
    fn work(&self, member: &mut Member<'_>, order: &Order) -> Result<(), Poisoned> {
        // SAFETY: the kernels here touch nothing but memory that outlives the job, each task a part of its own.
        let run = |task, scratch: &mut Scratch| unsafe { self.0.run(&order.step, task, scratch) };
        member.phase(self.0.tasks(&order.step), run, || ())
    }
}

struct Write {
    start: usize,
    bytes: usize,
}

impl Kernel for Write {
    fn tasks(&self, _step: &Step) -> usize {
        self.bytes / Read::TASK
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, _step: &Step, task: usize, _scratch: &mut Scratch) {
        let from = self.start as *mut u8;
        // SAFETY: this task's part of the memory.
        unsafe { from.add(task * Read::TASK).write_bytes(1, Read::TASK) }
    }
}

struct Read {
    start: usize,
    bytes: usize,
}

impl Read {
    const TASK: usize = 1 << 20;
}

impl Kernel for Read {
    fn tasks(&self, _step: &Step) -> usize {
        self.bytes / Self::TASK
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, _step: &Step, task: usize, _scratch: &mut Scratch) {
        let from = self.start as *const u8;
        let mut all = [isa.splat_u8(0); 4];
        let mut out = [0u8; 64];
        // SAFETY: this task's part of the memory, which is a multiple of 256 bytes; 64 bytes of `out`.
        unsafe {
            let from = from.add(task * Self::TASK);
            let mut i = 0;
            while i < Self::TASK {
                for (lane, all) in all.iter_mut().enumerate() {
                    *all = isa.or(*all, isa.load_bytes(from.add(i + 64 * lane)));
                }
                i += 256;
            }
            let [a, b, c, d] = all;
            isa.store_bytes(out.as_mut_ptr(), isa.or(isa.or(a, b), isa.or(c, d)));
        }
        black_box(out);
    }
}

struct Dots {
    tasks: usize,
}

impl Dots {
    const ROUNDS: usize = 20_000;
    /// Vectors of weights that are read over and over, a page of the first cache: with one that never changes, the
    /// compiler multiplies once and only adds.
    const WEIGHTS: usize = 64;

    /// Sums that do not wait for each other, as many as the registers hold.
    const fn sums(level: Level) -> usize {
        match level {
            Level::Avx512 => 12,
            _ => 6,
        }
    }
}

impl Kernel for Dots {
    fn tasks(&self, _step: &Step) -> usize {
        self.tasks
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, _step: &Step, task: usize, _scratch: &mut Scratch) {
        let weights = black_box([(task % 100) as u8; 64 * Self::WEIGHTS]);
        let a = isa.splat_u8(black_box(1));
        let mut sums = [isa.splat_i32(0); 12];
        let sums = &mut sums[..const { Self::sums(S::LEVEL) }];
        for round in 0..Self::ROUNDS {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: 64 bytes of `weights`.
                let q = unsafe { isa.load_bytes(weights.as_ptr().add((round + i) % Self::WEIGHTS * 64)) };
                *sum = isa.dot_u7(*sum, q, a);
            }
        }
        let mut out = [0i32; 16];
        for sum in sums {
            // SAFETY: 16 lanes of `out`.
            unsafe { isa.store_i32(out.as_mut_ptr(), *sum) }
            black_box(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_this_century() {
        let read = read_gb_s(1, 64 << 20);
        assert!((0.1..10_000.0).contains(&read), "{read} GB/s");
        let macs = int8_gmac_s(1);
        assert!((0.05..100_000.0).contains(&macs), "{macs} GMAC/s");
    }
}
