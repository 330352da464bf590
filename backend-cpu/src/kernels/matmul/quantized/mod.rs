//! Products of quantised weights and quantised activations.
//!
//! An output is a sum over the weight's blocks, in order, in f32; of values that share their scales the dot product is an
//! integer and exact. So [`few`](Dot::few) (weights read once, in place, for one row of activations) and
//! [`many`](Dot::many) (16 rows of weights unpacked and transposed into a panel, then met by all rows of
//! activations) give the same bits.

mod k;
mod product;
mod rows;
mod small;

pub(crate) use k::OfK;
pub(crate) use product::{Product, Weights};
pub(crate) use small::OfSmall;

use super::activations::{Layout, Row};
use crate::isa::Isa;
use rows::Rows;

/// Rows of weights in a panel, and lanes of a vector.
const LANES: usize = 16;
/// Parts of activations, at most.
const PARTS: usize = 2;
/// Values of a row in a panel.
const PANEL_K: usize = 256;

/// Quads that [`Dot::few`] reads of each row before it puts sums together: what is kept of them stays in the first
/// cache.
const PIECE: usize = 8;

/// The f16 scales of a block, of each row: `d`, and that of minima.
type Scales = [[u16; LANES]; 2];

/// What [`Dot::few`] keeps of a piece of each row until all 16 rows have come to its end. Weights are read row by
/// row, as they lie in memory, since that is what processors foresee; but lanes are rows when sums are put together.
#[repr(C, align(64))]
pub(crate) struct Sums {
    /// Of each part of the activations, of each row: integer sums of a quad.
    quads: [[[[i32; LANES]; LANES]; PIECE]; PARTS],
    scales: [Scales; 8 * PIECE],
}

impl Sums {
    /// A quad of rows `row`, `4 + row`, `8 + row`, `12 + row`.
    #[inline(always)]
    fn four<S: Isa>(&self, s: S, part: usize, quad: usize, row: usize) -> [S::I; 4] {
        // SAFETY: 16 lanes each.
        array!(4, |g| unsafe { s.load_i32(self.quads[part][quad][4 * g + row].as_ptr()) })
    }

    #[inline(always)]
    fn scales<S: Isa>(&self, s: S, block: usize) -> (S::F, S::F) {
        let [d, m] = &self.scales[block];
        // SAFETY: 16 lanes each.
        unsafe { (s.load_f16(d.as_ptr()), s.load_f16(m.as_ptr())) }
    }
}

/// A panel of 16 rows: quants transposed so that the 4 bytes of lane `i` are row `i`'s.
#[repr(C, align(64))]
pub(crate) struct Panel {
    quants: [u8; LANES * PANEL_K],
    /// Integer scales of each group (K-blocks only).
    scales: [[i32; LANES]; 16],
    /// Integer minima of two neighbouring groups (K-blocks only).
    minima: [[[i16; 2]; LANES]; 8],
    /// Of each block of the panel.
    d: [[f32; LANES]; 8],
    m: [[f32; LANES]; 8],
}

impl Panel {
    /// Takes the f16 scales of a block of each row.
    #[inline(always)]
    fn scale<S: Isa>(&mut self, s: S, block: usize, d: &[u16; LANES], m: &[u16; LANES]) {
        // SAFETY: 16 lanes each.
        unsafe {
            s.store(self.d[block].as_mut_ptr(), s.load_f16(d.as_ptr()));
            s.store(self.m[block].as_mut_ptr(), s.load_f16(m.as_ptr()));
        }
    }
}

/// How 16 rows of a format meet activations.
pub(crate) trait Dot: Send + Sync {
    /// What activations look like beside the format.
    fn layout(k: usize) -> Layout;

    /// Blocks that are summed together in `few`: a quad of vectors.
    const QUAD: usize;

    /// Row `row` of a quad of blocks from `first` on, of which `left` are there, with each part of the activations:
    /// [`Isa::sum_quads`] of four vectors of products. Keeps the blocks' scales.
    ///
    /// # Safety
    /// There are these blocks, `a` is filled.
    unsafe fn quad<S: Isa, const P: usize>(
        s: S,
        rows: &Rows,
        row: usize,
        a: [Row; P],
        first: usize,
        left: usize,
        scales: &mut [Scales],
    ) -> [S::I; P];

    /// Adds what quad `quad` of a piece has to the sums of 16 rows with part `part`, block by block.
    ///
    /// # Safety
    /// As [`Dot::quad`], which has been there for all rows.
    #[allow(clippy::too_many_arguments, reason = "what it adds, from where, to what")]
    unsafe fn add_quad<S: Isa>(
        s: S,
        sums: &Sums,
        part: usize,
        quad: usize,
        a: Row,
        first: usize,
        left: usize,
        sum: S::F,
    ) -> S::F;

    /// 16 rows of weights with the parts of one row of activations.
    ///
    /// # Safety
    /// The rows hold `layout.k` values, and `a` is filled.
    #[inline(always)]
    unsafe fn few<S: Isa, const P: usize>(
        s: S,
        rows: &Rows,
        a: [Row; P],
        layout: Layout,
        sums: &mut Sums,
    ) -> S::F {
        let blocks = layout.blocks();
        let mut totals = [s.splat(0.0); P];
        for piece in (0..blocks).step_by(PIECE * Self::QUAD) {
            let quads = (blocks - piece).div_ceil(Self::QUAD).min(PIECE);
            let blocks_of = |quad: usize| {
                let first = piece + quad * Self::QUAD;
                (first, Self::QUAD.min(blocks - first))
            };
            // SAFETY: the caller's: blocks below `blocks`.
            unsafe {
                for row in 0..LANES {
                    for quad in 0..quads {
                        let (first, left) = blocks_of(quad);
                        let scales = &mut sums.scales[quad * Self::QUAD..][..Self::QUAD];
                        let of_parts = Self::quad::<S, P>(s, rows, row, a, first, left, scales);
                        for (part, of_part) in of_parts.into_iter().enumerate() {
                            s.store_i32(sums.quads[part][quad][row].as_mut_ptr(), of_part);
                        }
                    }
                }
                for quad in 0..quads {
                    let (first, left) = blocks_of(quad);
                    for part in 0..P {
                        totals[part] =
                            Self::add_quad(s, sums, part, quad, a[part], first, left, totals[part]);
                    }
                }
            }
        }
        together(s, P, |part| totals[part])
    }

    /// Fills the panel with the values `256 × index ..` of 16 rows; returns how many there are.
    ///
    /// # Safety
    /// The rows hold `layout.k` values.
    unsafe fn unpack<S: Isa>(s: S, rows: &Rows, index: usize, layout: Layout, panel: &mut Panel) -> usize;

    /// Adds the panel's part to `sums[t]` for each of `T` rows of activations.
    ///
    /// # Safety
    /// The rows are filled and hold values `256 × index .. 256 × index + n`.
    unsafe fn many<S: Isa, const T: usize>(
        s: S,
        panel: &Panel,
        a: [Row; T],
        index: usize,
        n: usize,
        sums: [S::F; T],
    ) -> [S::F; T];
}

/// The sum of a product's parts.
#[inline(always)]
fn together<S: Isa>(s: S, parts: usize, part: impl Fn(usize) -> S::F) -> S::F {
    let mut sum = part(0);
    for more in 1..parts {
        sum = s.add(sum, part(more));
    }
    sum
}

#[inline(always)]
fn dot<S: Isa>(s: S, signed: bool, sum: S::I, q: S::B, a: S::B) -> S::I {
    if signed { s.dot_i8(sum, q, a) } else { s.dot_u7(sum, q, a) }
}
