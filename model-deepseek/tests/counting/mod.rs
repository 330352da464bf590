//! An allocator that counts the bytes that all threads have, for tests of how much something takes at the most.
#![allow(unsafe_code, reason = "a global allocator that counts")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// What ends the test rather than the machine that it runs on.
const ENOUGH: usize = 2 << 30;

struct Counting;

// SAFETY: everything is passed on to the system's allocator, which keeps the contract; a null pointer means that there
// is no memory; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let taken = TAKEN.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(taken, Ordering::Relaxed);
        if taken > ENOUGH {
            return ptr::null_mut();
        }
        // SAFETY: the caller's layout, as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer is of `alloc`, which is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A test that measures: the only one at a time in its process, as what the others take would be counted too.
pub struct Measuring(#[allow(dead_code, reason = "held, not read")] MutexGuard<'static, ()>);

impl Measuring {
    /// Waits for the other tests of this kind.
    pub fn alone() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        Measuring(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The result of `work`, and the most bytes that it had at a time.
    pub fn peak<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        let before = TAKEN.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        let result = work();
        // Others' memory that is freed meanwhile may bring the peak below what was there before.
        (result, MOST.load(Ordering::Relaxed).saturating_sub(before))
    }
}
