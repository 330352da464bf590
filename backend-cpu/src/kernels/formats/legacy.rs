//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

use super::{SmallBlock, nibbles};
use crate::isa::Isa;
use backend_api::format::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};

impl SmallBlock for BlockQ4_0 {
    const ZERO: i32 = 8;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B {
        nibbles(s, pair.map(|block| &block.quants))
    }
}

impl SmallBlock for BlockQ4_1 {
    const MINIMA: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn m(&self) -> [u8; 2] {
        self.m
    }

    #[inline(always)]
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B {
        nibbles(s, pair.map(|block| &block.quants))
    }
}

/// Bit 4 of the values of two blocks.
#[inline(always)]
fn fifth_bit<S: Isa>(s: S, high: [[u8; 4]; 2]) -> S::B {
    let [a, b] = high.map(u32::from_le_bytes);
    s.bits(u64::from(a) | u64::from(b) << 32, 16)
}

impl SmallBlock for BlockQ5_0 {
    const ZERO: i32 = 16;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B {
        s.or(nibbles(s, pair.map(|block| &block.quants)), fifth_bit(s, pair.map(|block| block.high)))
    }
}

impl SmallBlock for BlockQ5_1 {
    const MINIMA: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn m(&self) -> [u8; 2] {
        self.m
    }

    #[inline(always)]
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B {
        s.or(nibbles(s, pair.map(|block| &block.quants)), fifth_bit(s, pair.map(|block| block.high)))
    }
}

impl SmallBlock for BlockQ8_0 {
    const SIGNED: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B {
        // SAFETY: 32 bytes at each.
        unsafe { s.load_halves(pair[0].quants.as_ptr().cast(), pair[1].quants.as_ptr().cast()) }
    }
}
