//! Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

use super::{KBlock, nibble_runs, twice};
use crate::isa::Isa;
use backend_api::format::{BlockQ2_K, BlockQ3_K, BlockQ4_K, BlockQ5_K, BlockQ6_K};

/// Two bits of each value: chunks 0 and 1 are runs of 32 at bits 0, 2, 4, 6 of the first 32 bytes.
#[inline(always)]
fn two_bits<S: Isa>(s: S, quants: &[[u8; 32]; 2], chunk: usize) -> S::B {
    let runs = s.shr_high_half::<2>(twice(s, &quants[chunk / 2]));
    let runs = if chunk.is_multiple_of(2) { runs } else { s.shr::<4>(runs) };
    s.and(runs, s.splat_u8(3))
}

/// One bit of each value, at bit `BIT` of the result: chunk `c` is two runs of 32 at bits `2c` and `2c + 1`.
#[inline(always)]
fn one_bit<S: Isa, const BIT: u32>(s: S, high: &[u8; 32], chunk: usize) -> S::B {
    // Both runs at bit 2c, then moved by BIT - 2c.
    let runs = s.shr_high_half::<1>(twice(s, high));
    let moved = match BIT as i32 - 2 * chunk as i32 {
        4 => s.shl::<4>(runs),
        2 => s.shl::<2>(runs),
        0 => runs,
        -2 => s.shr::<2>(runs),
        _ => s.shr::<4>(runs),
    };
    s.and(moved, s.splat_u8(1 << BIT))
}

const LOW_HALVES: u128 = 0x0F0F_0F0F_0F0F_0F0F_0F0F_0F0F_0F0F_0F0F;

/// `x - 32` of each byte, 0 to 63: bit 5 turned over, and copied to bits 6 and 7.
#[inline(always)]
pub(super) fn less_32(bytes: u128) -> u128 {
    const BIT_5: u128 = 0x2020_2020_2020_2020_2020_2020_2020_2020;
    let turned = bytes ^ BIT_5;
    turned | (turned & BIT_5) << 1 | (turned & BIT_5) << 2
}

/// The scales and minima of [`backend_api::format::k_scales_mins`], four at a time: scales and minima of groups 0
/// to 3, then of groups 4 to 7.
#[inline(always)]
fn scales_minima(packed: &[u8; 12]) -> u128 {
    let [a, b, c, d, e, f, g, h, low @ ..] = *packed;
    let (six, low) = (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::from(u32::from_le_bytes(low)));
    let four = (low | low << 28) & 0x0F0F_0F0F_0F0F_0F0F;
    let first = six & 0x3F3F_3F3F_3F3F_3F3F;
    let second = four | six >> 2 & 0x3030_3030_3030_3030;
    u128::from(first) | u128::from(second) << 64
}

impl KBlock for BlockQ2_K {
    const GROUP: usize = 16;
    const MINIMA: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn dmin(&self) -> [u8; 2] {
        self.dmin
    }

    #[inline(always)]
    fn scales(&self) -> u128 {
        u128::from_le_bytes(self.scales) & LOW_HALVES
    }

    #[inline(always)]
    fn minima(&self) -> u128 {
        u128::from_le_bytes(self.scales) >> 4 & LOW_HALVES
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        two_bits(s, &self.quants, chunk)
    }
}

impl KBlock for BlockQ3_K {
    const GROUP: usize = 16;
    const MINIMA: bool = false;
    const ZERO: i32 = 4;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn scales(&self) -> u128 {
        let word = |i: usize| {
            let p = &self.packed_scales;
            u32::from_le_bytes([p[i], p[i + 1], p[i + 2], p[i + 3]])
        };
        let (low, high) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8));
        let two = |g: u32| u128::from(high >> (2 * g) & 0x0303_0303) << 4 << (32 * g);
        let bits = u128::from(low) & LOW_HALVES | (u128::from(low >> 4) & LOW_HALVES) << 64;
        less_32(bits | two(0) | two(1) | two(2) | two(3))
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        s.or(two_bits(s, &self.quants, chunk), one_bit::<S, 2>(s, &self.high, chunk))
    }
}

impl KBlock for BlockQ4_K {
    const GROUP: usize = 32;
    const MINIMA: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn dmin(&self) -> [u8; 2] {
        self.dmin
    }

    #[inline(always)]
    fn scales(&self) -> u128 {
        scales_minima(&self.scales)
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        nibble_runs(s, &self.quants[chunk])
    }
}

impl KBlock for BlockQ5_K {
    const GROUP: usize = 32;
    const MINIMA: bool = true;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn dmin(&self) -> [u8; 2] {
        self.dmin
    }

    #[inline(always)]
    fn scales(&self) -> u128 {
        scales_minima(&self.scales)
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        s.or(nibble_runs(s, &self.quants[chunk]), one_bit::<S, 4>(s, &self.high, chunk))
    }
}

impl KBlock for BlockQ6_K {
    const GROUP: usize = 16;
    const MINIMA: bool = false;
    const ZERO: i32 = 32;

    #[inline(always)]
    fn d(&self) -> [u8; 2] {
        self.d
    }

    #[inline(always)]
    fn scales(&self) -> u128 {
        u128::from_le_bytes(self.scales.map(|scale| scale as u8))
    }

    #[inline(always)]
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B {
        // SAFETY: 64 bytes.
        let low = unsafe { s.load_bytes(self.quants[chunk / 2].as_ptr()) };
        let high = s.shr_high_half::<2>(twice(s, &self.high[chunk / 2]));
        let (low, high) = match chunk % 2 {
            0 => (s.and(low, s.splat_u8(15)), s.shl::<4>(high)),
            _ => (s.shr::<4>(low), high),
        };
        s.or(low, s.and(high, s.splat_u8(0x30)))
    }
}
