//! Products of quantised weights and quantised activations.
//!
//! An output is a sum over the weight's blocks, in order, in f32; within a block the dot product is an integer and
//! exact. So [`few`](Dot::few) (weights read once, in place, for one row of activations) and
//! [`many`](Dot::many) (16 rows of weights unpacked and transposed into a panel, then met by all rows of
//! activations) give the same bits.

use super::{
    activations::{KScales, Layout, Quantized, Row},
    pairing::Pairing,
};
use crate::{
    isa::{Isa, scale_lane},
    kernels::{
        Kernel, Scratch,
        formats::{KBlock, SmallBlock},
    },
};
use backend_api::Step;
use std::marker::PhantomData;

/// Rows of activations from which on unpacking weights into panels pays.
const PANEL_ROWS: usize = 6;
/// Rows of weights in a panel, and lanes of a vector.
const LANES: usize = 16;
/// Parts of activations, at most.
const PARTS: usize = 2;
/// Values of a row in a panel.
const PANEL_K: usize = 256;

/// Matrices of weights.
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    pub(crate) base: *const u8,
    /// Bytes from one matrix to the next.
    pub(crate) matrix_stride: usize,
    /// Bytes from one row to the next.
    pub(crate) row_stride: usize,
    /// Rows of a matrix.
    pub(crate) rows: usize,
    /// Values of a row.
    pub(crate) k: usize,
}

// SAFETY: an address; `Kernel::run` is where it is used.
unsafe impl Send for Weights {}
// SAFETY: as above.
unsafe impl Sync for Weights {}

/// How far ahead of its use memory is asked for, in bytes. What a processor foresees by itself are few bytes where each
/// of them is much work. 1.7 to 3 KiB are alike; at 4 and more, what lies beyond the end of a task begins to count.
const AHEAD: usize = 2304;

/// 16 neighbouring rows of a matrix. Where there are fewer, the last stands in for the others.
#[derive(Clone, Copy)]
pub(crate) struct Rows([*const u8; LANES]);

impl Rows {
    #[inline(always)]
    fn new(base: *const u8, stride: usize, count: usize) -> Self {
        let mut rows = [base; LANES];
        for (row, pointer) in rows.iter_mut().enumerate() {
            *pointer = base.wrapping_add(row.min(count - 1) * stride);
        }
        Rows(rows)
    }

    #[inline(always)]
    fn block<B>(&self, row: usize, block: usize) -> *const B {
        self.0[row].cast::<B>().wrapping_add(block)
    }

    /// Asks for what lies [`AHEAD`] of `n` blocks.
    #[inline(always)]
    fn prefetch<S: Isa, B>(&self, s: S, row: usize, block: usize, n: usize) {
        prefetch(s, self.block::<B>(row, block).cast::<u8>().wrapping_add(AHEAD), n * size_of::<B>());
    }

    /// Asks for `n` blocks of each row from `block` on; from `end` on, for the first of the next 16 rows.
    #[inline(always)]
    fn prefetch_panel<S: Isa, B>(&self, s: S, block: usize, end: usize, n: usize) {
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
        together(s, totals)
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
fn together<S: Isa, const P: usize>(s: S, parts: [S::F; P]) -> S::F {
    let mut sum = parts[0];
    for part in &parts[1..] {
        sum = s.add(sum, *part);
    }
    sum
}

/// Formats of 256-value blocks.
pub(crate) struct OfK<B>(PhantomData<B>);
/// Formats of 32-value blocks.
pub(crate) struct OfSmall<B>(PhantomData<B>);

/// What 256 values add to a sum, from `Σ (q + zero) × a × scales` and from minima (or scales) `× a`. The same integers
/// and operations in `few` and `many`.
#[allow(clippy::too_many_arguments, reason = "the factors of two products, and what they are added to")]
#[inline(always)]
fn k_part<S: Isa, B: KBlock>(
    s: S,
    dot: S::I,
    minima: S::I,
    zero: i32,
    d: S::F,
    dmin: S::F,
    a: f32,
    sum: S::F,
) -> S::F {
    let part = if B::MINIMA {
        s.sub(s.mul(d, s.to_f32(dot)), s.mul(dmin, s.to_f32(minima)))
    } else {
        let zero = s.mul_i32(minima, s.splat_i32(zero));
        s.mul(d, s.to_f32(s.sub_i32(dot, zero)))
    };
    s.mul_add(part, s.splat(a), sum)
}

/// `Σ q × a` of the first or second half of 32 values, from `Σ q × a` in units of its scale.
#[inline(always)]
fn small_half<S: Isa>(s: S, half: usize, dot: S::I, a: &[f32; 3], first: S::F) -> S::F {
    match half {
        0 => s.mul(s.to_f32(dot), s.splat(a[0])),
        _ => s.mul_add(s.to_f32(dot), s.splat(a[1]), first),
    }
}

/// What 32 values add to a sum, from `Σ q × a` and the sum of `a`.
#[inline(always)]
fn small_part<S: Isa, B: SmallBlock>(s: S, part: S::F, a: &[f32; 3], d: S::F, m: S::F, sum: S::F) -> S::F {
    if B::MINIMA {
        s.mul_add(m, s.splat(a[2]), s.mul_add(part, d, sum))
    } else {
        let zero = s.splat(B::zero::<S>() as f32 * a[2]);
        s.mul_add(s.sub(part, zero), d, sum)
    }
}

#[inline(always)]
fn dot<S: Isa>(s: S, signed: bool, sum: S::I, q: S::B, a: S::B) -> S::I {
    if signed { s.dot_i8(sum, q, a) } else { s.dot_u7(sum, q, a) }
}

/// A block with each part of its activations. Lanes 0..8 add up to `Σ q × a × scales`, lanes 8..16 to minima (or scales) `× a`.
///
/// # Safety
/// 256 readable values.
#[inline(always)]
unsafe fn k_block<S: Isa, B: KBlock, const P: usize>(
    s: S,
    block: &B,
    a: [*const i8; P],
    beside: [&KScales; P],
) -> [S::I; P] {
    // SAFETY: the caller's.
    unsafe {
        let own = s.widen(block.scales());
        let scales = array!(P, |p| s.mul_w(own, s.load_w(beside[p].lanes.as_ptr())));
        let mut sums = [s.splat_i32(0); P];
        for c in 0..4 {
            let q = block.quants(s, c);
            for p in 0..P {
                let a = s.load_bytes(a[p].add(64 * c).cast());
                let (q, a) = if B::SIGNED { s.magnitudes(q, a) } else { (q, a) };
                sums[p] = match B::GROUP {
                    16 => s.dot_scaled::<16>(sums[p], q, a, scales[p], c),
                    _ => s.dot_scaled::<32>(sums[p], q, a, scales[p], c),
                };
            }
        }
        let minima = if B::GROUP == 16 { s.widen(block.minima()) } else { own };
        array!(P, |p| s.fold_beside(sums[p], minima, s.load_w(beside[p].lane_sums.as_ptr())))
    }
}

impl<B: KBlock> Dot for OfK<B> {
    fn layout(k: usize) -> Layout {
        Layout::k_quants(k, B::GROUP)
    }

    const QUAD: usize = 4;

    #[inline(always)]
    unsafe fn quad<S: Isa, const P: usize>(
        s: S,
        rows: &Rows,
        row: usize,
        a: [Row; P],
        first: usize,
        left: usize,
        scales: &mut [Scales],
    ) -> [S::I; P] {
        rows.prefetch::<S, B>(s, row, first, Self::QUAD);
        let mut four = [[s.splat_i32(0); 4]; P];
        // Without a loop: the sums stay in registers.
        macro_rules! block {
            ($i:literal) => {
                if left > $i {
                    // SAFETY: the caller's.
                    unsafe {
                        let block = &*rows.block::<B>(row, first).wrapping_add($i);
                        scales[$i][0][row] = u16::from_le_bytes(block.d());
                        if B::MINIMA {
                            scales[$i][1][row] = u16::from_le_bytes(block.dmin());
                        }
                        let values = array!(P, |p| a[p].quants(256 * first).wrapping_add(256 * $i));
                        let sums =
                            k_block::<S, B, P>(s, block, values, array!(P, |p| a[p].k_scales(first + $i)));
                        for p in 0..P {
                            four[p][$i] = sums[p];
                        }
                    }
                }
            };
        }
        block!(0);
        block!(1);
        block!(2);
        block!(3);
        array!(P, |p| s.sum_quads(four[p]))
    }

    #[inline(always)]
    unsafe fn add_quad<S: Isa>(
        s: S,
        sums: &Sums,
        part: usize,
        quad: usize,
        a: Row,
        first: usize,
        left: usize,
        mut sum: S::F,
    ) -> S::F {
        let halves = array!(4, |row| s.sum_halves(sums.four(s, part, quad, row)));
        let dots = s.transpose_lanes([halves[0].0, halves[1].0, halves[2].0, halves[3].0]);
        let minima = s.transpose_lanes([halves[0].1, halves[1].1, halves[2].1, halves[3].1]);
        for i in 0..left {
            let (d, dmin) = sums.scales(s, 4 * quad + i);
            // SAFETY: the caller's.
            let a = unsafe { a.k_scales(first + i) }.d;
            sum = k_part::<S, B>(s, dots[i], minima[i], B::ZERO, d, dmin, a, sum);
        }
        sum
    }

    #[inline(always)]
    unsafe fn unpack<S: Isa>(s: S, rows: &Rows, index: usize, layout: Layout, panel: &mut Panel) -> usize {
        let mut blocks: [*const B; LANES] = [std::ptr::null(); LANES];
        let (mut d, mut dmin) = ([0; LANES], [0; LANES]);
        for (row, block) in blocks.iter_mut().enumerate() {
            *block = rows.block::<B>(row, index);
            // SAFETY: the caller's.
            let block = unsafe { &**block };
            d[row] = u16::from_le_bytes(block.d());
            dmin[row] = u16::from_le_bytes(block.dmin());
            let (scales, minima) = (block.scales().to_le_bytes(), block.minima().to_le_bytes());
            for group in 0..256 / B::GROUP {
                let lane = scale_lane(B::GROUP, group);
                let min = if B::GROUP == 16 { minima[lane] } else { scales[lane + 4] };
                panel.scales[group][row] = i32::from(scales[lane] as i8);
                panel.minima[group / 2][row][group % 2] = i16::from(min as i8);
            }
        }
        panel.scale(s, 0, &d, &dmin);
        for chunk in 0..4 {
            // SAFETY: the caller's; a chunk is 1024 of the panel's 4096 bytes.
            unsafe {
                let quants = array!(LANES, |row| (*blocks[row]).quants(s, chunk));
                s.store_transposed(&quants, panel.quants.as_mut_ptr().add(1024 * chunk));
            }
        }
        rows.prefetch_panel::<S, B>(s, index + 1, layout.blocks(), 1);
        256
    }

    #[inline(always)]
    unsafe fn many<S: Isa, const T: usize>(
        s: S,
        panel: &Panel,
        a: [Row; T],
        index: usize,
        _n: usize,
        sums: [S::F; T],
    ) -> [S::F; T] {
        // SAFETY: the caller's; all indices into the panel are constants below its sizes.
        unsafe {
            let beside = array!(T, |t| a[t].k_scales(index));
            let mut total = [s.splat_i32(0); T];
            for group in 0..256 / B::GROUP {
                let mut part = [s.splat_i32(0); T];
                for four in 0..B::GROUP / 4 {
                    let at = group * B::GROUP + 4 * four;
                    let q = s.load_bytes(panel.quants.as_ptr().add(LANES * at));
                    for t in 0..T {
                        part[t] = dot(s, B::SIGNED, part[t], q, s.splat_4(a[t].quants(256 * index + at)));
                    }
                }
                let scale = s.load_i32(panel.scales[group].as_ptr());
                for t in 0..T {
                    let scale = s.mul_i32(scale, s.splat_i32(beside[t].scales[group]));
                    total[t] = s.add_i32(total[t], s.mul_i32(part[t], scale));
                }
            }
            let (d, dmin) = (s.load(panel.d[0].as_ptr()), s.load(panel.m[0].as_ptr()));
            array!(T, |t| {
                let mut minima = s.splat_i32(0);
                if B::MINIMA || B::zero::<S>() != 0 {
                    for pair in 0..128 / B::GROUP {
                        let weights = s.load_bytes(panel.minima[pair].as_ptr().cast());
                        let values = s.splat_4(beside[t].sums.as_ptr().add(2 * pair).cast());
                        minima = s.dot_i16(minima, weights, values);
                    }
                }
                k_part::<S, B>(s, total[t], minima, B::zero::<S>(), d, dmin, beside[t].d, sums[t])
            })
        }
    }
}

impl<B: SmallBlock> Dot for OfSmall<B> {
    fn layout(k: usize) -> Layout {
        Layout::small(k)
    }

    const QUAD: usize = 8;

    #[inline(always)]
    unsafe fn quad<S: Isa, const P: usize>(
        s: S,
        rows: &Rows,
        row: usize,
        a: [Row; P],
        first: usize,
        left: usize,
        scales: &mut [Scales],
    ) -> [S::I; P] {
        rows.prefetch::<S, B>(s, row, first, Self::QUAD);
        let mut four = [[s.splat_i32(0); 4]; P];
        // Without a loop: the sums stay in registers.
        macro_rules! pair {
            ($i:literal) => {
                if left > 2 * $i {
                    // Of an odd last block, the second half is the same block beside zeros.
                    let pair = [2 * $i, if left > 2 * $i + 1 { 2 * $i + 1 } else { 2 * $i }];
                    // SAFETY: the caller's.
                    unsafe {
                        let from = rows.block::<B>(row, first);
                        let blocks = [&*from.wrapping_add(pair[0]), &*from.wrapping_add(pair[1])];
                        for half in 0..2 {
                            scales[2 * $i + half][0][row] = u16::from_le_bytes(blocks[half].d());
                            if B::MINIMA {
                                scales[2 * $i + half][1][row] = u16::from_le_bytes(blocks[half].m());
                            }
                        }
                        let quants = B::quants(s, blocks);
                        for p in 0..P {
                            let values = a[p].quants(32 * first).wrapping_add(64 * $i);
                            let values = s.load_bytes(values.cast());
                            four[p][$i] = dot(s, B::SIGNED, s.splat_i32(0), quants, values);
                        }
                    }
                }
            };
        }
        pair!(0);
        pair!(1);
        pair!(2);
        pair!(3);
        array!(P, |p| s.sum_quads(four[p]))
    }

    #[inline(always)]
    unsafe fn add_quad<S: Isa>(
        s: S,
        sums: &Sums,
        part: usize,
        quad: usize,
        a: Row,
        first: usize,
        left: usize,
        mut sum: S::F,
    ) -> S::F {
        let quarters = array!(4, |row| s.transpose_quads(sums.four(s, part, quad, row)));
        let quarters = array!(4, |q| {
            s.transpose_lanes([quarters[0][q], quarters[1][q], quarters[2][q], quarters[3][q]])
        });
        for b in 0..left {
            let (chunk, half) = (b / 2, 2 * (b % 2));
            // SAFETY: the caller's.
            let a = unsafe { a.small(first + b) };
            let part = small_half(s, 0, quarters[half][chunk], a, s.splat(0.0));
            let part = small_half(s, 1, quarters[half + 1][chunk], a, part);
            let (d, m) = sums.scales(s, 8 * quad + b);
            sum = small_part::<S, B>(s, part, a, d, m, sum);
        }
        sum
    }

    #[inline(always)]
    unsafe fn unpack<S: Isa>(s: S, rows: &Rows, index: usize, layout: Layout, panel: &mut Panel) -> usize {
        let blocks = (layout.blocks() - 8 * index).min(8);
        for b in 0..blocks {
            let (mut d, mut m) = ([0; LANES], [0; LANES]);
            for row in 0..LANES {
                // SAFETY: the caller's.
                let block = unsafe { &*rows.block::<B>(row, 8 * index + b) };
                d[row] = u16::from_le_bytes(block.d());
                m[row] = u16::from_le_bytes(block.m());
            }
            panel.scale(s, b, &d, &m);
        }
        for first in (0..blocks).step_by(2) {
            let second = (first + 1).min(blocks - 1);
            // SAFETY: the caller's; a pair is 1024 of the panel's 4096 bytes.
            unsafe {
                let quants = array!(LANES, |row| {
                    let block = |b: usize| &*rows.block::<B>(row, 8 * index + b);
                    B::quants(s, [block(first), block(second)])
                });
                s.store_transposed(&quants, panel.quants.as_mut_ptr().add(512 * first));
            }
        }
        rows.prefetch_panel::<S, B>(s, 8 * (index + 1), layout.blocks(), 8);
        32 * blocks
    }

    #[inline(always)]
    unsafe fn many<S: Isa, const T: usize>(
        s: S,
        panel: &Panel,
        a: [Row; T],
        index: usize,
        n: usize,
        mut sums: [S::F; T],
    ) -> [S::F; T] {
        // SAFETY: the caller's; `n <= 256`.
        unsafe {
            for b in 0..n / 32 {
                let mut parts = [s.splat(0.0); T];
                for half in 0..2 {
                    let mut dots = [s.splat_i32(0); T];
                    for four in 0..4 {
                        let at = 32 * b + 16 * half + 4 * four;
                        let q = s.load_bytes(panel.quants.as_ptr().add(LANES * at));
                        for t in 0..T {
                            dots[t] = dot(s, B::SIGNED, dots[t], q, s.splat_4(a[t].quants(256 * index + at)));
                        }
                    }
                    for t in 0..T {
                        parts[t] = small_half(s, half, dots[t], a[t].small(8 * index + b), parts[t]);
                    }
                }
                let (d, m) = (s.load(panel.d[b].as_ptr()), s.load(panel.m[b].as_ptr()));
                for t in 0..T {
                    sums[t] = small_part::<S, B>(s, parts[t], a[t].small(8 * index + b), d, m, sums[t]);
                }
            }
            sums
        }
    }
}

/// A product as a kernel: a task is some neighbouring rows of one matrix with all its entries.
pub(crate) struct Product<D> {
    pub(crate) weights: Weights,
    pub(crate) activations: Quantized,
    pub(crate) pairing: Pairing,
    /// Dense `[entries, weights.rows]`.
    pub(crate) output: crate::tensor::Tensor,
    /// Rows of weights in a task, a multiple of 16.
    pub(crate) chunk: usize,
    /// Entries in the largest step.
    pub(crate) capacity: usize,
    pub(crate) format: PhantomData<D>,
}

impl<D: Dot> Product<D> {
    /// The panel, then a sum vector and an activation row for each part of each entry.
    fn panel_bytes(&self) -> usize {
        let rows = self.capacity * self.activations.parts();
        64 + size_of::<Panel>() + rows * (4 * LANES + size_of::<Row>())
    }

    /// # Safety
    /// The output has this entry, and this row is below `weights.rows`.
    #[inline(always)]
    unsafe fn store<S: Isa>(&self, s: S, entry: usize, row: usize, sum: S::F) {
        let n = (self.weights.rows - row).min(LANES);
        // SAFETY: the output has `weights.rows` values at each entry.
        unsafe { s.store_first(self.output.base::<f32>().add(entry * self.weights.rows + row), sum, n) }
    }
}

impl<D: Dot + 'static> Kernel for Product<D> {
    fn scratch_bytes(&self) -> usize {
        self.panel_bytes().max(64 + size_of::<Sums>())
    }

    fn tasks(&self, step: &Step) -> usize {
        self.pairing.problems(self.output.rows(step)) * self.weights.rows.div_ceil(self.chunk)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, s: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let Weights { base, matrix_stride, row_stride, rows, .. } = self.weights;
        let chunks = rows.div_ceil(self.chunk);
        let entries = self.output.rows(step);
        let (layout, parts) = (self.activations.layout(), self.activations.parts());
        // SAFETY: the caller's: buffers live, groups are made, activations are filled; scratch has `panel_bytes`, and no
        // problem has more entries than the capacity.
        unsafe {
            let Some(problem) = self.pairing.problem(task / chunks, entries) else { return };
            let first = task % chunks * self.chunk;
            let matrix = base.add(problem.matrix * matrix_stride);
            let lanes =
                |row: usize| Rows::new(matrix.add(row * row_stride), row_stride, (rows - row).min(LANES));
            let groups = (first..rows.min(first + self.chunk)).step_by(LANES);
            let memory = scratch.as_mut_ptr();
            let memory = memory.add(memory.align_offset(64));
            let met = problem.count * parts;
            if met < PANEL_ROWS {
                let sums = &mut *memory.cast::<Sums>();
                for row in groups {
                    let lanes = lanes(row);
                    for index in 0..problem.count {
                        let entry = problem.output(index);
                        let a = |part: usize| self.activations.row(problem.input(entry), part);
                        let sum = match parts {
                            1 => D::few::<S, 1>(s, &lanes, [a(0)], layout, sums),
                            _ => D::few::<S, 2>(s, &lanes, [a(0), a(1)], layout, sums),
                        };
                        self.store(s, entry, row, sum);
                    }
                }
                return;
            }
            let panel = &mut *memory.cast::<Panel>();
            let sums = memory.add(size_of::<Panel>()).cast::<[f32; LANES]>();
            let a = sums.add(self.capacity * parts).cast::<Row>();
            for index in 0..problem.count {
                let input = problem.input(problem.output(index));
                for part in 0..parts {
                    a.add(index * parts + part).write(self.activations.row(input, part));
                }
            }
            for row in groups {
                for index in 0..met {
                    sums.add(index).write([0.0; LANES]);
                }
                let lanes = lanes(row);
                for part in 0..layout.k().div_ceil(PANEL_K) {
                    let n = D::unpack(s, &lanes, part, layout, panel);
                    let mut index = 0;
                    while index < met {
                        let left = met - index;
                        let at = (a.add(index).cast_const(), sums.add(index));
                        index += match S::PANEL_TOKENS.min(left) {
                            8.. => meet::<S, D, 8>(s, panel, at, part, n),
                            4.. => meet::<S, D, 4>(s, panel, at, part, n),
                            2.. => meet::<S, D, 2>(s, panel, at, part, n),
                            _ => meet::<S, D, 1>(s, panel, at, part, n),
                        };
                    }
                }
                for index in 0..problem.count {
                    let part = |part: usize| s.load(sums.add(index * parts + part).cast());
                    let sum = (1..parts).fold(part(0), |sum, more| s.add(sum, part(more)));
                    self.store(s, problem.output(index), row, sum);
                }
            }
        }
    }
}

/// [`Dot::many`] for `T` neighbouring entries; returns `T`.
///
/// # Safety
/// `T` rows and sums, the rows filled.
#[inline(always)]
unsafe fn meet<S: Isa, D: Dot, const T: usize>(
    s: S,
    panel: &Panel,
    (a, sums): (*const Row, *mut [f32; LANES]),
    part: usize,
    n: usize,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let before = array!(T, |t| s.load(sums.add(t).cast()));
        let after = D::many::<S, T>(s, panel, array!(T, |t| *a.add(t)), part, n, before);
        for (t, sum) in after.into_iter().enumerate() {
            s.store(sums.add(t).cast(), sum);
        }
    }
    T
}
