//! Contract C2, by counting on all threads: once a session has run a step of a kind, further ones take nothing from
//! the heap. Alone in its file, because every thread of the process is counted.
#![allow(unsafe_code, reason = "a global allocator that counts")]

mod common;

use backend_cpu::CpuOptions;
use common::{embedded, open};
use model_deepseek::{Engine, Options};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

static TAKEN: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator, which keeps the contract; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's layout, as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer is of `alloc`, which is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_take_nothing_from_the_heap() {
    let model = open(&embedded());
    for threads in [1, 2, 3] {
        let devices =
            common::cpu_with(CpuOptions { threads: Some(threads), ..CpuOptions::from_env().unwrap() });
        let options = Options { context: Some(256), batch: 16, ..Options::default() };
        let engine = Engine::new(&model, &devices, &Default::default(), &options).unwrap();
        let mut session = engine.session().unwrap();
        session.feed(&[1; 32]).unwrap();
        session.feed(&[2]).unwrap();
        // A thread that the system starts late takes something from the heap once; what steps take, they take always.
        let mut round = || {
            let before = TAKEN.load(Ordering::Relaxed);
            for _ in 0..20 {
                session.feed(&[3]).unwrap();
            }
            session.feed(&[4; 40]).unwrap();
            session.truncate(33).unwrap();
            TAKEN.load(Ordering::Relaxed) - before
        };
        let taking = (0..50).filter(|_| round() > 0).count();
        assert!(taking <= threads, "allocations in {taking} of 50 rounds with {threads} threads");
    }
}
