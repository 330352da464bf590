//! IQ4_NL and IQ4_XS: nibbles that index a table of i8.

use super::{KBlock, SmallBlock, k_quants::less_32, nibbles};
use crate::isa::Isa;
use backend_api::format::{BlockIQ4_NL, BlockIQ4_XS, IQ4_VALUES};

impl SmallBlock for BlockIQ4_NL {
    const SIGNED: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B {
        s.lookup(&IQ4_VALUES, nibbles(s, pair.map(|block| &block.quants)))
    }
}

impl KBlock for BlockIQ4_XS {
    const GROUP: usize = 32;
    const SIGNED: bool = true;
    const MINIMA: bool = false;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn scales(&self) -> u128 {
        let (low, high) = (u32::from_le_bytes(self.scales_low), u16::from_le_bytes(self.scales_high));
        let mut scales = 0u64;
        for group in 0..8 {
            let scale = u64::from(low >> (4 * group) & 15) | u64::from(high >> (2 * group) & 3) << 4;
            scales |= scale << (8 * group);
        }
        // Twice four, and twice four.
        let scales = less_32(scales.into());
        let (first, second) = (scales & 0xFFFF_FFFF, scales >> 32 & 0xFFFF_FFFF);
        first | first << 32 | second << 64 | second << 96
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        let pair = [&self.quants[2 * chunk], &self.quants[2 * chunk + 1]];
        s.lookup(&IQ4_VALUES, nibbles(s, pair))
    }
}
