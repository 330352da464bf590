//! Formats of 32-value blocks.

use super::{Dot, LANES, Panel, Scales, Sums, dot, rows::Rows};
use crate::{
    isa::Isa,
    kernels::{
        formats::SmallBlock,
        matmul::activations::{Layout, Row},
    },
};
use std::marker::PhantomData;

/// Formats of 32-value blocks.
pub(crate) struct OfSmall<B>(PhantomData<B>);

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
