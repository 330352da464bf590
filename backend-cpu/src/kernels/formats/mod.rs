//! Quantised formats as vectors: how 64 values of a block become 64 bytes.
//!
//! A format says only this, and where its scales are; the products in [`super::matmul`] are written once. Values
//! come in their natural order. The layouts are documented at the blocks in [`backend_api::format`].

mod iq4;
mod k_quants;
mod legacy;

use crate::isa::Isa;
use bytemuck::Pod;

/// Blocks of 256 values in groups with integer scales `s`: `d × s × q − dmin × m`, or `d × s × (q − zero)`.
pub(crate) trait KBlock: Pod + Send + Sync {
    /// Values in a group: 16 or 32.
    const GROUP: usize;
    /// Whether quants are i8 (they are 0 to 127 otherwise).
    const SIGNED: bool = false;
    /// Whether groups have minima.
    const MINIMA: bool;
    /// What quants are too large by.
    const ZERO: i32 = 0;

    fn d(&self) -> [u8; 2];

    /// Without minima: unused.
    fn dmin(&self) -> [u8; 2] {
        [0; 2]
    }

    /// 16 × i8, the first in the lowest byte. Of groups of 16: their scales. Of groups of 32: scales of groups 0 to
    /// 3, minima of 0 to 3, scales of 4 to 7, minima of 4 to 7.
    ///
    /// Without minima the scales stand in for them, since `zero` weighs with the scales.
    fn scales(&self) -> u128;

    /// Of groups of 16: their minima, likewise.
    fn minima(&self) -> u128 {
        self.scales()
    }

    /// Quants `64 × chunk ..` of the block.
    fn quants<S: Isa>(&self, s: S, chunk: usize) -> S::B;

    /// What dot products of quants are too large by, per unit of activation.
    fn zero<S: Isa>() -> i32 {
        Self::ZERO + if Self::SIGNED { S::I8_OFFSET } else { 0 }
    }
}

/// Blocks of 32 values with one scale: `d × q + m`, or `d × (q − zero)`.
pub(crate) trait SmallBlock: Pod + Send + Sync {
    /// Whether quants are i8 (they are 0 to 127 otherwise).
    const SIGNED: bool = false;
    /// Whether blocks have an `m`.
    const MINIMA: bool = false;
    /// What quants are too large by.
    const ZERO: i32 = 0;

    fn d(&self) -> [u8; 2];

    fn m(&self) -> [u8; 2] {
        [0; 2]
    }

    /// The quants of two blocks.
    fn quants<S: Isa>(s: S, pair: [&Self; 2]) -> S::B;

    /// What dot products of quants are too large by, per unit of activation.
    fn zero<S: Isa>() -> i32 {
        Self::ZERO + if Self::SIGNED { S::I8_OFFSET } else { 0 }
    }
}

/// `$body` with `$block` standing for the block type of a quantised format.
macro_rules! with_block {
    ($dtype:expr, small $small:ident => $on_small:expr, k $k:ident => $on_k:expr, else $other:expr) => {{
        use backend_api::{DType, format::*};
        match $dtype {
            DType::Q4_0 => {
                type $small = BlockQ4_0;
                $on_small
            }
            DType::Q4_1 => {
                type $small = BlockQ4_1;
                $on_small
            }
            DType::Q5_0 => {
                type $small = BlockQ5_0;
                $on_small
            }
            DType::Q5_1 => {
                type $small = BlockQ5_1;
                $on_small
            }
            DType::Q8_0 => {
                type $small = BlockQ8_0;
                $on_small
            }
            DType::IQ4_NL => {
                type $small = BlockIQ4_NL;
                $on_small
            }
            DType::Q2_K => {
                type $k = BlockQ2_K;
                $on_k
            }
            DType::Q3_K => {
                type $k = BlockQ3_K;
                $on_k
            }
            DType::Q4_K => {
                type $k = BlockQ4_K;
                $on_k
            }
            DType::Q5_K => {
                type $k = BlockQ5_K;
                $on_k
            }
            DType::Q6_K => {
                type $k = BlockQ6_K;
                $on_k
            }
            DType::IQ4_XS => {
                type $k = BlockIQ4_XS;
                $on_k
            }
            DType::F32 | DType::F16 | DType::BF16 | DType::I32 => $other,
        }
    }};
}
pub(crate) use with_block;

/// The nibbles of 16 bytes for each of two blocks: low halves are values 0 to 15, high halves 16 to 31.
#[inline(always)]
fn nibbles<S: Isa>(s: S, pair: [&[u8; 16]; 2]) -> S::B {
    let [a, b] = pair.map(|bytes| bytes.as_ptr());
    // SAFETY: 16 bytes at each.
    let bytes = unsafe { s.load_quarters([a, a, b, b]) };
    s.and(s.shr4_odd_quarters(bytes), s.splat_u8(15))
}

/// The nibbles of 32 bytes: low halves are values 0 to 31, high halves 32 to 63.
#[inline(always)]
fn nibble_runs<S: Isa>(s: S, bytes: &[u8; 32]) -> S::B {
    s.and(s.shr_high_half::<4>(twice(s, bytes)), s.splat_u8(15))
}

#[inline(always)]
fn twice<S: Isa>(s: S, bytes: &[u8; 32]) -> S::B {
    // SAFETY: 32 bytes.
    unsafe { s.load_halves(bytes.as_ptr(), bytes.as_ptr()) }
}
