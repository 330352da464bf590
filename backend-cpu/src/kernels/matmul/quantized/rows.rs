//! Rows of weights where they lie, and asking for them ahead.

use super::LANES;
use crate::isa::Isa;

/// How far ahead of its use memory is asked for, in bytes. What a processor foresees by itself are few bytes where each
/// of them is much work. 1.7 to 3 KiB are alike; at 4 and more, what lies beyond the end of a task begins to count.
const AHEAD: usize = 2304;

/// 16 neighbouring rows of a matrix. Where there are fewer, the last stands in for the others.
#[derive(Clone, Copy)]
pub(crate) struct Rows([*const u8; LANES]);

impl Rows {
    #[inline(always)]
    pub(super) fn new(base: *const u8, stride: usize, count: usize) -> Self {
        let mut rows = [base; LANES];
        for (row, pointer) in rows.iter_mut().enumerate() {
            *pointer = base.wrapping_add(row.min(count - 1) * stride);
        }
        Rows(rows)
    }

    #[inline(always)]
    pub(super) fn block<B>(&self, row: usize, block: usize) -> *const B {
        self.0[row].cast::<B>().wrapping_add(block)
    }

    /// Asks for what lies [`AHEAD`] of `n` blocks.
    #[inline(always)]
    pub(super) fn prefetch<S: Isa, B>(&self, s: S, row: usize, block: usize, n: usize) {
        prefetch(s, self.block::<B>(row, block).cast::<u8>().wrapping_add(AHEAD), n * size_of::<B>());
    }

    /// Asks for `n` blocks of each row from `block` on; from `end` on, for the first of the next 16 rows.
    #[inline(always)]
    pub(super) fn prefetch_panel<S: Isa, B>(&self, s: S, block: usize, end: usize, n: usize) {
        let below = LANES * (self.0[1] as usize - self.0[0] as usize);
        let ahead = if block < end { block * size_of::<B>() } else { below };
        for row in self.0 {
            prefetch(s, row.wrapping_add(ahead), n * size_of::<B>());
        }
    }
}

/// Asks for the cache lines of `bytes` from `first` on, which may lie anywhere.
#[inline(always)]
fn prefetch<S: Isa>(s: S, first: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        s.prefetch(first.wrapping_add(64 * line));
    }
}
