//! What the operations compute, each generic over the instruction set.
//!
//! A [`Kernel`] is one phase of a program: tasks that may run in any order on any thread, between two barriers.
//! Every output element is computed by one task, as the same sum in the same order, whatever the number of rows,
//! tasks and threads (contract C7).

use crate::isa::{Isa, Level, Portable, Task};
use backend_api::Step;
use std::collections::TryReserveError;

/// `[value(0), …, value(n - 1)]` as a loop in place: a closure would not inline with the instruction set, and
/// intrinsics would become calls.
macro_rules! array {
    ($n:expr, |$i:ident| $value:expr) => {{
        let mut array = [const { std::mem::MaybeUninit::uninit() }; $n];
        for $i in 0..$n {
            array[$i].write($value);
        }
        // SAFETY: the loop has written every element.
        #[allow(unused_unsafe, reason = "some callers are in unsafe blocks")]
        unsafe {
            $crate::kernels::all_written(array)
        }
    }};
}

/// # Safety
/// All elements are initialised.
#[inline(always)]
unsafe fn all_written<T: Copy, const N: usize>(array: [std::mem::MaybeUninit<T>; N]) -> [T; N] {
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, and the caller owes initialised elements.
    unsafe { (&raw const array).cast::<[T; N]>().read() }
}

pub(crate) mod attention;
pub(crate) mod combine;
mod cut;
pub(crate) mod elementwise;
pub(crate) mod exp;
pub(crate) mod formats;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod route;
pub(crate) mod rows;
#[cfg(test)]
pub(crate) mod testing;

/// Memory of one thread while it runs tasks. Grown when a program is compiled, never during a step.
#[derive(Default)]
pub(crate) struct Scratch {
    bytes: Vec<u64>,
    /// What a task found that its caller owed otherwise.
    fault: Option<String>,
}

impl Scratch {
    /// # Errors
    /// There is no room; the scratch is what it was.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<(), TryReserveError> {
        let words = bytes.div_ceil(8);
        if let Some(more) = words.checked_sub(self.bytes.len()) {
            self.bytes.try_reserve_exact(more)?;
            self.bytes.resize(words, 0);
        }
        Ok(())
    }

    /// Makes the run an error, once it is over. What it leaves in its outputs, and there has to be something, does not
    /// matter.
    #[cold]
    pub(crate) fn fail(&mut self, fault: impl FnOnce() -> String) {
        self.fault.get_or_insert_with(fault);
    }

    pub(crate) fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }

    /// At least as many bytes as were reserved, aligned to 8.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr().cast()
    }
}

/// One phase of a program.
pub(crate) trait Kernel: Send + Sync {
    /// Bytes of [`Scratch`] that a task needs.
    fn scratch_bytes(&self) -> usize {
        0
    }

    /// Number of tasks in `step`. Depends on nothing else: it is asked before earlier kernels have run.
    fn tasks(&self, step: &Step) -> usize;

    /// Runs a task: `#[inline(always)]` in implementations.
    ///
    /// # Safety
    /// The buffers that the kernel's pointers name are alive, `step` is within the capacity it was built for, no
    /// other thread runs the same task, and no other kernel runs that touches what this one writes.
    unsafe fn run<S: Isa>(&self, isa: S, step: &Step, task: usize, scratch: &mut Scratch);
}

/// A kernel with its instruction set chosen.
pub(crate) trait BoundKernel: Send + Sync {
    fn scratch_bytes(&self) -> usize;
    fn tasks(&self, step: &Step) -> usize;
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run(&self, step: &Step, task: usize, scratch: &mut Scratch);
}

struct Bound<K, S>(K, S);

impl<K: Kernel, S: Isa> BoundKernel for Bound<K, S> {
    fn scratch_bytes(&self) -> usize {
        self.0.scratch_bytes()
    }

    fn tasks(&self, step: &Step) -> usize {
        self.0.tasks(step)
    }

    unsafe fn run(&self, step: &Step, task: usize, scratch: &mut Scratch) {
        struct Run<'a, K>(&'a K, &'a Step, usize, &'a mut Scratch);
        impl<K: Kernel> Task for Run<'_, K> {
            type Output = ();
            #[inline(always)]
            fn eval<S: Isa>(self, isa: S) {
                // SAFETY: the caller of `BoundKernel::run` owes what `Kernel::run` needs.
                unsafe { self.0.run(isa, self.1, self.2, self.3) }
            }
        }
        self.1.run(Run(&self.0, step, task, scratch));
    }
}

/// Chooses the instruction set of a kernel.
///
/// # Panics
/// If the processor lacks `level`, which whoever chose it has checked.
pub(crate) fn bind<K: Kernel + 'static>(kernel: K, level: Level) -> Box<dyn BoundKernel> {
    const HAS: &str = "the level was checked when the device was opened";
    match level {
        Level::Portable => Box::new(Bound(kernel, Portable)),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Box::new(Bound(kernel, crate::isa::Avx2::new().expect(HAS))),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => Box::new(Bound(kernel, crate::isa::Avx512::new().expect(HAS))),
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("{HAS}"),
    }
}
