//! Formats of 256-value blocks.

use super::{Dot, LANES, Panel, Scales, Sums, dot, rows::Rows};
use crate::{
    isa::{Isa, scale_lane},
    kernels::{
        formats::KBlock,
        matmul::activations::{KScales, Layout, Row},
    },
};
use std::marker::PhantomData;

/// Formats of 256-value blocks.
pub(crate) struct OfK<B>(PhantomData<B>);

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
