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
        // Eight nibbles and eight pairs of bits, each to a byte: halves are moved apart until all are alone.
        let apart = |x: u64, by: u32, mask: u64| (x | x << by) & mask;
        let low = apart(u32::from_le_bytes(self.scales_low).into(), 16, 0x0000_FFFF_0000_FFFF);
        let low = apart(apart(low, 8, 0x00FF_00FF_00FF_00FF), 4, 0x0F0F_0F0F_0F0F_0F0F);
        let high = apart(u16::from_le_bytes(self.scales_high).into(), 24, 0x0000_00FF_0000_00FF);
        let high = apart(apart(high, 12, 0x000F_000F_000F_000F), 6, 0x0303_0303_0303_0303);
        // Twice four, and twice four.
        let scales = less_32((low | high << 4).into());
        let (first, second) = (scales & 0xFFFF_FFFF, scales >> 32 & 0xFFFF_FFFF);
        first | first << 32 | second << 64 | second << 96
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        let pair = [&self.quants[2 * chunk], &self.quants[2 * chunk + 1]];
        s.lookup(&IQ4_VALUES, nibbles(s, pair))
    }
}
