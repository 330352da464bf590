//! Activations rounded to 8 bits, beside quantised weights.
//!
//! Beside weights in blocks of 32, each 16 values become `d × q` with `d = max |x| / 127` in f32. Beside K-quants,
//! each group of 16 or 32 values (as long as the weights' groups) becomes `d × s × q`, where `d` is one f32 for the
//! block of 256 and `s` an integer from 1 to 7: so the whole block is still one integer dot product, and a group of
//! small values keeps more of its digits than the block's largest value would leave it. Both are finer than the one
//! scale for 32 or 256 values that the formats were made for.
//!
//! For [`Precision::Fine`](backend_api::Precision::Fine) what that leaves, `x − d × q`, is rounded likewise into a second
//! part: another row, which meets the same weights.
//!
//! `q` is rounded to nearest, ties to even. Weighted sums of `q` are kept beside it: they meet the weights' minima
//! and zero points.
//!
//! Integers know no NaN, and no infinity: in a row that has one, the first `d` is NaN, and so is every product with it.
//! Values so small that their scale is no normal number (below 1.5e-36) become zeros.

use crate::{
    builder::Builder,
    isa::{Isa, scale_lane},
    kernels::{Kernel, Scratch},
    tensor::{Tensor, product},
};
use backend_api::Step;

/// Largest integer scale of a group: sums over a block stay below 2³¹ for every format.
const LARGEST: i32 = 7;

/// Smallest scale of a group. The inverse of a smaller one may be infinite.
const SMALLEST: f32 = f32::MIN_POSITIVE;

/// Values that share a scale beside weights in blocks of 32.
const SMALL_GROUP: usize = 16;

/// Where things lie in a row of quantised activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    /// Values in a row.
    k: usize,
    /// Values in a block of the weights: 32 or 256.
    block: usize,
    /// Values that share a scale.
    group: usize,
}

/// What a block of 256 has beside its quants.
#[repr(C)]
pub(crate) struct KScales {
    /// `s` and `s × Σ q` of each group in the lanes of [`KBlock::scales`](crate::kernels::formats::KBlock::scales):
    /// `s` beside scales, zero beside minima; and the other way round.
    pub(crate) lanes: [i16; 16],
    pub(crate) lane_sums: [i16; 16],
    /// `s × Σ q` of each group.
    pub(crate) sums: [i16; 16],
    /// `s` of each group.
    pub(crate) scales: [i32; 16],
    pub(crate) d: f32,
}

impl Layout {
    /// Beside blocks of 32.
    pub(crate) fn small(k: usize) -> Self {
        Layout { k, block: 32, group: SMALL_GROUP }
    }

    /// Beside blocks of 256 in groups of 16 or 32.
    pub(crate) fn k_quants(k: usize, group: usize) -> Self {
        Layout { k, block: 256, group }
    }

    /// Values in a row.
    pub(crate) fn k(self) -> usize {
        self.k
    }

    pub(crate) fn blocks(self) -> usize {
        self.k / self.block
    }

    /// Quants come first, padded with zeros to whole vectors.
    fn padded(self) -> usize {
        self.k.next_multiple_of(64)
    }

    /// Bytes of what a block has beside its quants.
    fn beside(self) -> usize {
        if self.block == 256 { size_of::<KScales>() } else { size_of::<[f32; 3]>() }
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(self) -> usize {
        (self.padded() + self.blocks() * self.beside()).next_multiple_of(64)
    }
}

/// A row of quantised activations.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    quants: *const i8,
    beside: *const u8,
}

impl Row {
    #[inline(always)]
    fn new(base: *const u8, layout: Layout) -> Self {
        Row { quants: base.cast(), beside: base.wrapping_add(layout.padded()) }
    }

    /// Quants from value `index` on.
    #[inline(always)]
    pub(crate) fn quants(self, index: usize) -> *const i8 {
        self.quants.wrapping_add(index)
    }

    /// # Safety
    /// The row is filled, and has this block of 256.
    #[inline(always)]
    pub(crate) unsafe fn k_scales<'a>(self, block: usize) -> &'a KScales {
        // SAFETY: the caller's.
        unsafe { &*self.beside.cast::<KScales>().add(block) }
    }

    /// Of a block of 32: `d` of its halves, and the sum of its values.
    ///
    /// # Safety
    /// The row is filled, and has this block of 32.
    #[inline(always)]
    pub(crate) unsafe fn small<'a>(self, block: usize) -> &'a [f32; 3] {
        // SAFETY: the caller's.
        unsafe { &*self.beside.cast::<[f32; 3]>().add(block) }
    }
}

/// Rows of quantised activations, one for each innermost row of a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Quantized {
    base: *mut u8,
    layout: Layout,
    /// 1, or 2 with what the first leaves.
    parts: usize,
}

// SAFETY: an address; `Kernel::run` is where it is used.
unsafe impl Send for Quantized {}
// SAFETY: as above.
unsafe impl Sync for Quantized {}

impl Quantized {
    /// `x` in this layout and so many parts: quantised once for all products of a program that use it.
    pub(crate) fn of(x: &Tensor, layout: Layout, parts: usize, builder: &mut Builder) -> Self {
        let variant = (layout.block + layout.group) << 1 | (parts - 1);
        builder.shared(x, variant as u64, |builder| {
            let rows = x.rows(&builder.capacity().full_step());
            let base = builder.scratch_buffer(product([rows, parts, layout.row_bytes()]));
            let quantized = Quantized { base, layout, parts };
            builder.push(Quantize { x: *x, to: quantized });
            quantized
        })
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    pub(crate) fn parts(&self) -> usize {
        self.parts
    }

    #[inline(always)]
    pub(crate) fn row(&self, index: usize, part: usize) -> Row {
        let row = (index * self.parts + part) * self.layout.row_bytes();
        Row::new(self.base.wrapping_add(row), self.layout)
    }
}

struct Quantize {
    x: Tensor,
    to: Quantized,
}

impl Kernel for Quantize {
    fn scratch_bytes(&self) -> usize {
        if self.to.parts > 1 { 64 + 4 * self.to.layout.k } else { 0 }
    }

    fn tasks(&self, step: &Step) -> usize {
        self.x.rows(step)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, s: S, _step: &Step, task: usize, scratch: &mut Scratch) {
        let Quantized { base, layout, parts } = self.to;
        // SAFETY: the row of `x` has `k` values, and so has the scratch memory if it is needed; each part at `base` has
        // room for the layout.
        unsafe {
            let x = self.x.row::<f32>(task).cast_const();
            let to = base.add(task * parts * layout.row_bytes());
            round(s, layout, x, to);
            if parts > 1 {
                let rest = scratch.as_mut_ptr();
                let rest = rest.add(rest.align_offset(64)).cast::<f32>();
                leave(layout, x, Row::new(to, layout), rest);
                round(s, layout, rest, to.add(layout.row_bytes()));
            }
        }
    }
}

/// Rounds a row.
///
/// # Safety
/// `k` readable values; room for the layout.
#[inline(always)]
unsafe fn round<S: Isa>(s: S, layout: Layout, from: *const f32, to: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        for index in layout.k..layout.padded() {
            *to.add(index) = 0;
        }
        let beside = to.add(layout.padded());
        let mut odd = s.splat(0.0);
        for block in 0..layout.blocks() {
            let at = block * layout.block;
            let (x, q) = (from.add(at), to.add(at).cast());
            if layout.block == 256 {
                *beside.cast::<KScales>().add(block) = match layout.group {
                    16 => k_block::<S, 16>(s, x, q, &mut odd),
                    _ => k_block::<S, 32>(s, x, q, &mut odd),
                };
            } else {
                *beside.cast::<[f32; 3]>().add(block) = small_block(s, x, q, &mut odd);
            }
        }
        let d = match layout.block {
            256 => &mut (*beside.cast::<KScales>()).d,
            _ => &mut (*beside.cast::<[f32; 3]>())[0],
        };
        *d += s.sum(odd);
    }
}

/// What rounding left: `x − d × q`.
///
/// # Safety
/// `k` readable values; the row is filled from them; room for as many.
#[inline(always)]
unsafe fn leave(layout: Layout, x: *const f32, row: Row, to: *mut f32) {
    // SAFETY: the caller's; groups lie in blocks, and blocks in the row.
    unsafe {
        for first in (0..layout.blocks() * layout.block).step_by(layout.group) {
            let (block, group) = (first / layout.block, first % layout.block / layout.group);
            let step = if layout.block == 256 {
                let beside = row.k_scales(block);
                beside.d * beside.scales[group] as f32
            } else {
                row.small(block)[group]
            };
            for i in first..first + layout.group {
                *to.add(i) = x.add(i).read_unaligned() - step * f32::from(*row.quants(i));
            }
        }
    }
}

/// Rounds 32 values. To `odd` it adds zeros, or NaN where a value is not finite.
///
/// # Safety
/// 32 readable values and writable bytes.
#[inline(always)]
unsafe fn small_block<S: Isa>(s: S, x: *const f32, q: *mut i8, odd: &mut S::F) -> [f32; 3] {
    // SAFETY: the caller's.
    unsafe {
        let mut d = [0.0; 2];
        let mut sum = 0.0;
        for (half, d) in d.iter_mut().enumerate() {
            let at = SMALL_GROUP * half;
            let x = s.load(x.add(at));
            *odd = s.mul_add(x, s.splat(0.0), *odd);
            let largest = s.max_lane(s.abs(x));
            let inverse = if largest >= 127.0 * SMALLEST { 127.0 / largest } else { 0.0 };
            *d = largest / 127.0;
            s.store_i8(q.add(at), s.round_i32(s.mul(x, s.splat(inverse))));
            sum += *d * sum_of(q.add(at), SMALL_GROUP) as f32;
        }
        [d[0], d[1], sum]
    }
}

/// Rounds 256 values in groups. To `odd` it adds zeros, or NaN where a value is not finite.
///
/// # Safety
/// 256 readable values and writable bytes.
#[inline(always)]
unsafe fn k_block<S: Isa, const GROUP: usize>(s: S, x: *const f32, q: *mut i8, odd: &mut S::F) -> KScales {
    // SAFETY: the caller's.
    unsafe {
        let mut largest = [0.0f32; 16];
        let mut overall = 0.0f32;
        for (group, largest) in largest.iter_mut().enumerate().take(256 / GROUP) {
            let mut lanes = s.splat(0.0);
            for i in (0..GROUP).step_by(16) {
                let x = s.load(x.add(GROUP * group + i));
                *odd = s.mul_add(x, s.splat(0.0), *odd);
                lanes = s.max(s.abs(x), lanes);
            }
            *largest = s.max_lane(lanes);
            overall = if *largest > overall { *largest } else { overall };
        }
        let d = overall / (127 * LARGEST) as f32;
        let mut to = KScales { lanes: [0; 16], lane_sums: [0; 16], sums: [0; 16], scales: [0; 16], d };
        for (group, largest) in largest.into_iter().enumerate().take(256 / GROUP) {
            // The smallest integer with which the group's largest value still fits (a hair's excess is cut off
            // below); 1 for a group of zeros, and where the largest value is not finite.
            let scale = ((largest / overall * LARGEST as f32).ceil() as i32).clamp(1, LARGEST);
            let step = d * scale as f32;
            let inverse = s.splat(if step >= SMALLEST { 1.0 / step } else { 0.0 });
            for i in (GROUP * group..GROUP * (group + 1)).step_by(16) {
                let scaled = s.mul(s.load(x.add(i)), inverse);
                let scaled = s.max(s.min(scaled, s.splat(127.0)), s.splat(-127.0));
                s.store_i8(q.add(i), s.round_i32(scaled));
            }
            let sum = (scale * sum_of(q.add(GROUP * group), GROUP)) as i16;
            let lane = scale_lane(GROUP, group);
            to.lanes[lane] = scale as i16;
            to.lane_sums[if GROUP == 16 { lane } else { lane + 4 }] = sum;
            to.sums[group] = sum;
            to.scales[group] = scale;
        }
        to
    }
}

/// # Safety
/// `n` readable bytes.
#[inline(always)]
unsafe fn sum_of(q: *const i8, n: usize) -> i32 {
    // SAFETY: the caller's.
    (0..n).map(|i| i32::from(unsafe { *q.add(i) })).sum()
}
