//! Attention over the latent cache (multi-head latent attention, DeepSeek-V2, section 2.1, in the absorbed form),
//! without a matrix of scores in memory.
//!
//! The cache is cut at absolute positions into *segments*, and those into *chunks*. Within a segment a head keeps
//! the running maximum, sum and weighted values of the online softmax (arXiv 2205.14135), chunk by chunk; segments
//! are merged in order. So the result of a row depends on its own position alone. A step of few rows spreads the
//! segments of a row over tasks; a step of many rows gives each row to one task, which does the same sums.

use super::{
    Kernel, Scratch,
    exp::exp,
    matmul::float::{F16, F32, Float, tile},
};
use crate::{
    builder::Builder,
    isa::Isa,
    tensor::{Tensor, product},
};
use backend_api::{DType, Step, format};
use std::marker::PhantomData;

/// Cache rows whose scores are computed before their values are added: 36 KiB of DeepSeek's f16 cache.
const CHUNK: usize = 32;
/// Cache rows in a segment.
const SEGMENT: usize = 256;
/// Heads of a task: what is read of the cache serves them all.
const HEADS: usize = 8;
/// Rows of a step up to which segments are tasks of their own.
const SPREAD_ROWS: usize = 4;

/// `(q [rows, heads, width], cache [capacity, width]) → [rows, heads, latent]`.
pub(crate) fn latent_attention(
    q: &Tensor,
    cache: &Tensor,
    output: &Tensor,
    scale: f32,
    latent: usize,
    builder: &mut Builder,
) {
    let heads = output.shape().extents()[1].fixed().unwrap_or(1);
    let capacity = builder.capacity();
    let spread_rows = SPREAD_ROWS.min(capacity.rows);
    let segments = capacity.kv_len.div_ceil(SEGMENT);
    let head_bytes = 4 * (2 + latent).next_multiple_of(16);
    let partial = builder.scratch_buffer(product([spread_rows, segments, heads, head_bytes]));
    let plan = Plan {
        q: *q,
        cache: *cache,
        output: *output,
        scale,
        latent,
        heads,
        head_floats: head_bytes / 4,
        segments,
        partial,
    };
    match cache.dtype() {
        DType::F32 => builder.push(Attention::<F32> { plan, cache: PhantomData }),
        DType::F16 => builder.push(Attention::<F16> { plan, cache: PhantomData }),
        _ => builder.push(Attention::<Q8_0> { plan, cache: PhantomData }),
    }
    builder.push(Merge(plan));
}

#[derive(Clone, Copy)]
struct Plan {
    q: Tensor,
    cache: Tensor,
    output: Tensor,
    scale: f32,
    latent: usize,
    heads: usize,
    /// f32 of a head's running state: maximum, sum, `latent` weighted values, padding.
    head_floats: usize,
    /// Segments of the capacity.
    segments: usize,
    /// `[rows, segments, heads]` running states of segments, in a step of few rows.
    partial: *mut u8,
}

// SAFETY: addresses; `Kernel::run` is where they are used.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

/// How rows of a cache are read.
trait Cache: Send + Sync {
    type Format: Float;
    /// Whether chunks are decoded to f32 in scratch memory first.
    fn decodes<S: Isa>() -> bool;
}

impl Cache for F32 {
    type Format = F32;
    fn decodes<S: Isa>() -> bool {
        false
    }
}

impl Cache for F16 {
    type Format = F16;
    /// Where it takes long, as each value is used for several heads.
    fn decodes<S: Isa>() -> bool {
        !S::LOADS_F16
    }
}

struct Q8_0;

impl Cache for Q8_0 {
    type Format = F32;
    fn decodes<S: Isa>() -> bool {
        true
    }
}

impl Plan {
    fn groups(&self) -> usize {
        self.heads.div_ceil(HEADS)
    }

    fn spreads(&self, step: &Step) -> bool {
        step.rows <= SPREAD_ROWS
    }

    /// Segments that the last row of the step sees.
    fn segments_in(&self, step: &Step) -> usize {
        step.kv_len().div_ceil(SEGMENT)
    }

    #[inline(always)]
    fn state(&self, row: usize, segment: usize, head: usize) -> *mut f32 {
        let index = (row * self.segments + segment) * self.heads + head;
        self.partial.cast::<f32>().wrapping_add(index * self.head_floats)
    }
}

struct Attention<C> {
    plan: Plan,
    cache: PhantomData<C>,
}

impl<C: Cache + 'static> Kernel for Attention<C> {
    fn scratch_bytes(&self) -> usize {
        let states = 2 * HEADS * self.plan.head_floats;
        // Kernels do not know yet for which instructions they are.
        let decoded = CHUNK * self.plan.cache.width();
        4 * (states + decoded)
    }

    fn tasks(&self, step: &Step) -> usize {
        let segments = if self.plan.spreads(step) { self.plan.segments_in(step) } else { 1 };
        step.rows * self.plan.groups() * segments
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, s: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let plan = &self.plan;
        let groups = plan.groups();
        let memory = scratch.as_mut_ptr().cast::<f32>();
        let decoded = memory.wrapping_add(2 * HEADS * plan.head_floats);
        let heads = |group: usize| HEADS * group..plan.heads.min(HEADS * (group + 1));
        // SAFETY: the caller's; scratch has `scratch_bytes`; row, segment and heads are within the capacity.
        unsafe {
            if plan.spreads(step) {
                let (row, group) = (task % step.rows, task / step.rows % groups);
                let segment = task / step.rows / groups;
                let states = plan.state(row, segment, HEADS * group);
                self.segment(s, row, step.past + row + 1, segment, heads(group), states, decoded);
                return;
            }
            // The longest rows first.
            let (row, group) = (step.rows - 1 - task / groups, task % groups);
            let visible = step.past + row + 1;
            let heads = heads(group);
            let (total, part) = (memory, memory.add(HEADS * plan.head_floats));
            self.segment(s, row, visible, 0, heads.clone(), total, decoded);
            for segment in 1..visible.div_ceil(SEGMENT) {
                self.segment(s, row, visible, segment, heads.clone(), part, decoded);
                for head in 0..heads.len() {
                    let at = head * plan.head_floats;
                    merge(s, total.add(at), part.add(at), plan.latent);
                }
            }
            for (index, head) in heads.enumerate() {
                finish(s, total.add(index * plan.head_floats), plan.output.at(row, head), plan.latent);
            }
        }
    }
}

impl<C: Cache> Attention<C> {
    /// The running states of some heads of a row over one segment.
    ///
    /// # Safety
    /// Room for the states of the heads, and for `CHUNK × width` decoded values if they are needed; a query for each
    /// head, and a cache filled up to `visible`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "the coordinates of one piece of work")]
    unsafe fn segment<S: Isa>(
        &self,
        s: S,
        row: usize,
        visible: usize,
        segment: usize,
        heads: std::ops::Range<usize>,
        states: *mut f32,
        decoded: *mut f32,
    ) {
        let plan = &self.plan;
        let width = plan.cache.width();
        // SAFETY: the caller's; rows of the segment are below `visible`.
        unsafe {
            for head in 0..heads.len() {
                let state = states.add(head * plan.head_floats);
                *state = f32::NEG_INFINITY;
                for value in 1..plan.head_floats {
                    *state.add(value) = 0.0;
                }
            }
            let q: [*const f32; HEADS] = std::array::from_fn(|head| {
                plan.q.at::<f32>(row, heads.start + head.min(heads.len() - 1)).cast_const()
            });
            let mut first = SEGMENT * segment;
            let end = visible.min(first + SEGMENT);
            while first < end {
                let count = CHUNK.min(end - first);
                // Past the end the last row stands in; its scores are not used.
                let stored = |index: usize| plan.cache.row::<u8>(first + index.min(count - 1)).cast_const();
                if C::decodes::<S>() {
                    let copied = |index: usize| decoded.add(index.min(count - 1) * width);
                    for index in 0..count {
                        decode_row(s, plan.cache.dtype(), stored(index), copied(index), width);
                    }
                    let keys = array!(CHUNK, |index| copied(index).cast_const().cast());
                    self.chunk::<S, F32>(s, &keys, count, &q, heads.len(), states);
                } else {
                    let keys = array!(CHUNK, |index| stored(index));
                    self.chunk::<S, C::Format>(s, &keys, count, &q, heads.len(), states);
                }
                first += count;
            }
        }
    }

    /// Adds `count` cached rows to the running states of the heads.
    ///
    /// # Safety
    /// As for [`segment`](Attention::segment); `width` values of the format at each key.
    #[inline(always)]
    unsafe fn chunk<S: Isa, W: Float>(
        &self,
        s: S,
        keys: &[*const u8; CHUNK],
        count: usize,
        q: &[*const f32; HEADS],
        heads: usize,
        states: *mut f32,
    ) {
        let plan = &self.plan;
        let width = plan.cache.width();
        // SAFETY: the caller's.
        unsafe {
            let mut scores = [[0.0; CHUNK]; HEADS];
            match S::FLOAT_TILE {
                4.. => score::<S, W, 4>(s, keys, count, q, heads, width, &mut scores),
                2.. => score::<S, W, 2>(s, keys, count, q, heads, width, &mut scores),
                _ => score::<S, W, 1>(s, keys, count, q, heads, width, &mut scores),
            }
            let mut decay = [0.0; HEADS];
            for head in 0..heads {
                let state = states.add(head * plan.head_floats);
                decay[head] = soften(s, &mut scores[head], count, plan.scale, state);
            }
            let values = (states.add(2), plan.head_floats);
            let keys = &keys[..count];
            match S::FLOAT_TILE {
                4.. => add_values::<S, W, 4>(s, keys, &scores[..heads], &decay, values, plan.latent),
                _ => add_values::<S, W, 1>(s, keys, &scores[..heads], &decay, values, plan.latent),
            }
        }
    }
}

/// Decodes a cached row of `width` values.
///
/// # Safety
/// A row of the format at `from`, room for its values at `to`.
#[inline(always)]
unsafe fn decode_row<S: Isa>(s: S, dtype: DType, from: *const u8, to: *mut f32, width: usize) {
    // SAFETY: the caller's.
    unsafe {
        let mut at = 0;
        match dtype {
            DType::F16 => {
                while at + 16 <= width {
                    s.store(to.add(at), s.load_f16(from.cast::<u16>().add(at)));
                    at += 16;
                }
            }
            DType::Q8_0 => {
                while at + dtype.block_len() <= width {
                    let block = from.add(dtype.row_bytes(at));
                    let d = s.splat(format::half(block.cast::<[u8; 2]>().read()));
                    for half in [0, 16] {
                        let quants = s.load_i8(block.add(2 + half).cast());
                        s.store(to.add(at + half), s.mul(d, s.to_f32(quants)));
                    }
                    at += dtype.block_len();
                }
            }
            _ => {}
        }
        let rest = std::slice::from_raw_parts(from.add(dtype.row_bytes(at)), dtype.row_bytes(width - at));
        format::decode(dtype, rest, std::slice::from_raw_parts_mut(to.add(at), width - at));
    }
}

/// `scores[head][key] = q · key`.
///
/// # Safety
/// `width` readable values at each key and each query.
#[inline(always)]
unsafe fn score<S: Isa, W: Float, const N: usize>(
    s: S,
    keys: &[*const u8; CHUNK],
    count: usize,
    q: &[*const f32; HEADS],
    heads: usize,
    width: usize,
    scores: &mut [[f32; CHUNK]; HEADS],
) {
    // The queries of all heads and a few keys fit the first cache; all keys do not.
    for key in (0..count).step_by(N) {
        let keys: [*const u8; N] = std::array::from_fn(|n| keys[(key + n).min(CHUNK - 1)]);
        for head in (0..heads).step_by(N) {
            let q: [*const f32; N] = std::array::from_fn(|n| q[(head + n).min(HEADS - 1)]);
            // SAFETY: the caller's.
            let tile = unsafe { tile::<S, W, N, N>(s, keys, q, width) };
            for (i, row) in tile.iter().enumerate().take(count - key) {
                for (j, score) in row.iter().enumerate().take(HEADS - head) {
                    scores[head + j][key + i] = *score;
                }
            }
        }
    }
}

/// Scores become weights `exp(scale × score - maximum)`, zero past `count`; the state takes the new maximum and
/// sum. Returns the factor on what was summed before.
///
/// # Safety
/// A running state.
#[inline(always)]
unsafe fn soften<S: Isa>(s: S, scores: &mut [f32; CHUNK], count: usize, scale: f32, state: *mut f32) -> f32 {
    // SAFETY: the caller's; `CHUNK` is a multiple of 16.
    unsafe {
        let p = scores.as_mut_ptr();
        for i in (0..CHUNK).step_by(16) {
            s.store(p.add(i), s.mul(s.load(p.add(i)), s.splat(scale)));
        }
        // After scaling: a scale of zero or below would make something else of them.
        scores[count..].fill(f32::NEG_INFINITY);
        let p = scores.as_mut_ptr();
        let scaled: [S::F; CHUNK / 16] = array!(CHUNK / 16, |i| s.load(p.add(16 * i)));
        let mut largest = s.splat(*state);
        for x in scaled {
            largest = s.max(x, largest);
        }
        let maximum = s.max_lane(largest);
        let mut sum = s.splat(0.0);
        for (i, x) in scaled.into_iter().enumerate() {
            let weight = exp(s, s.sub(x, s.splat(maximum)));
            sum = s.add(sum, weight);
            s.store(p.add(16 * i), weight);
        }
        let decay = exp_one(s, *state - maximum);
        *state = maximum;
        *state.add(1) = *state.add(1) * decay + s.sum(sum);
        decay
    }
}

#[inline(always)]
fn exp_one<S: Isa>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: 16 lanes.
    unsafe { s.store(lanes.as_mut_ptr(), exp(s, s.splat(x))) };
    lanes[0]
}

/// `values = values × decay + Σ p × key[..latent]` for each head of `p`, `16 × V` values at a time: of all heads, so
/// that what is loaded of the keys is still in the first cache.
///
/// # Safety
/// `latent` readable values at each key, and writable ones of each head, `stride` apart.
#[inline(always)]
unsafe fn add_values<S: Isa, W: Float, const V: usize>(
    s: S,
    keys: &[*const u8],
    p: &[[f32; CHUNK]],
    decay: &[f32],
    (values, stride): (*mut f32, usize),
    latent: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let strip = 16 * V;
        let mut at = 0;
        while at + strip <= latent {
            add_heads::<S, W, V>(s, keys, p, decay, (values.add(at), stride), at);
            at += strip;
        }
        while at + 16 <= latent {
            add_heads::<S, W, 1>(s, keys, p, decay, (values.add(at), stride), at);
            at += 16;
        }
        // The last values one by one, as the lanes of a vector compute them.
        for at in at..latent {
            for (n, p) in p.iter().enumerate() {
                let value = values.add(n * stride + at);
                let mut lanes = s.splat(*value * decay[n]);
                for (key, p) in keys.iter().zip(p) {
                    let mut copy = [0u8; 64];
                    std::ptr::copy_nonoverlapping(key.add(at * W::BYTES), copy.as_mut_ptr(), W::BYTES);
                    lanes = s.mul_add(s.splat(*p), W::load(s, copy.as_ptr()), lanes);
                }
                s.store_first(value, lanes, 1);
            }
        }
    }
}

/// The same for `16 × V` values, from value `at` of the keys on.
///
/// # Safety
/// As many readable values of each key, and writable ones of each head, `stride` apart.
#[inline(always)]
unsafe fn add_heads<S: Isa, W: Float, const V: usize>(
    s: S,
    keys: &[*const u8],
    p: &[[f32; CHUNK]],
    decay: &[f32],
    (values, stride): (*mut f32, usize),
    at: usize,
) {
    let mut head = 0;
    while head < p.len() {
        let (p, decay) = (&p[head..], &decay[head..]);
        // SAFETY: the caller's; as many heads are left.
        head += unsafe {
            let to = (values.add(head * stride), stride);
            match p.len() {
                4.. => add_strip::<S, W, 4, V>(s, keys, p, decay, to, at),
                2.. => add_strip::<S, W, 2, V>(s, keys, p, decay, to, at),
                _ => add_strip::<S, W, 1, V>(s, keys, p, decay, to, at),
            }
        };
    }
}

/// The same for `N` of the heads; returns `N`.
///
/// # Safety
/// As many readable values of each key, and writable ones of each head, `stride` apart.
#[inline(always)]
unsafe fn add_strip<S: Isa, W: Float, const N: usize, const V: usize>(
    s: S,
    keys: &[*const u8],
    p: &[[f32; CHUNK]],
    decay: &[f32],
    (values, stride): (*mut f32, usize),
    at: usize,
) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let mut sums: [[S::F; V]; N] =
            array!(N, |n| array!(V, |v| s.mul(s.load(values.add(n * stride + 16 * v)), s.splat(decay[n]))));
        for (j, key) in keys.iter().enumerate() {
            let key: [S::F; V] = array!(V, |v| W::load(s, key.add((at + 16 * v) * W::BYTES)));
            for n in 0..N {
                let p = s.splat(p[n][j]);
                for v in 0..V {
                    sums[n][v] = s.mul_add(p, key[v], sums[n][v]);
                }
            }
        }
        for (n, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                s.store(values.add(n * stride + 16 * v), sum);
            }
        }
    }
    N
}

/// Adds the running state of a later segment.
///
/// # Safety
/// Two running states of `latent` values.
#[inline(always)]
unsafe fn merge<S: Isa>(s: S, total: *mut f32, part: *const f32, latent: usize) {
    // SAFETY: the caller's; nothing past the `latent` values is touched.
    unsafe {
        let maximum = if *part > *total { *part } else { *total };
        let (old, new) = (exp_one(s, *total - maximum), exp_one(s, *part - maximum));
        *total = maximum;
        *total.add(1) = *total.add(1) * old + *part.add(1) * new;
        for at in (2..2 + latent).step_by(16) {
            let n = (2 + latent - at).min(16);
            let sum = s.mul(s.load_first(total.add(at), n), s.splat(old));
            let sum = s.mul_add(s.load_first(part.add(at), n), s.splat(new), sum);
            s.store_first(total.add(at), sum, n);
        }
    }
}

/// `output = values / sum`.
///
/// # Safety
/// A running state of `latent` values, and as many writable ones.
#[inline(always)]
unsafe fn finish<S: Isa>(s: S, state: *const f32, output: *mut f32, latent: usize) {
    // SAFETY: the caller's.
    unsafe {
        let sum = s.splat(*state.add(1));
        for at in (0..latent).step_by(16) {
            let n = (latent - at).min(16);
            s.store_first(output.add(at), s.div(s.load_first(state.add(2 + at), n), sum), n);
        }
    }
}

/// Merges the segments of each head, where tasks have shared them out.
struct Merge(Plan);

impl Kernel for Merge {
    fn tasks(&self, step: &Step) -> usize {
        if self.0.spreads(step) { step.rows * self.0.heads } else { 0 }
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, s: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let plan = &self.0;
        let (row, head) = (task / plan.heads, task % plan.heads);
        // SAFETY: the caller's: `Attention` has filled the states of all segments the row sees.
        unsafe {
            let total = plan.state(row, 0, head);
            for segment in 1..(step.past + row + 1).div_ceil(SEGMENT) {
                merge(s, total, plan.state(row, segment, head), plan.latent);
            }
            finish(s, total, plan.output.at(row, head), plan.latent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        isa::Level,
        kernels::testing::{Rows, assert_close, each_level, numbers},
    };
    use backend_api::{Capacity, Shape, TensorDesc};

    const HEADS_USED: usize = 11;

    struct Case {
        cache: DType,
        width: usize,
        latent: usize,
    }

    const CASES: [Case; 4] = [
        Case { cache: DType::F32, width: 24, latent: 17 },
        Case { cache: DType::F16, width: 96, latent: 64 },
        Case { cache: DType::F16, width: 176, latent: 150 },
        Case { cache: DType::Q8_0, width: 72, latent: 64 },
    ];

    /// Attention of `rows` rows from `past` on, over a cache whose rows from `past + rows` on are NaN.
    fn attend(level: Level, case: &Case, stored: &[u8], q: &mut Rows, past: usize, rows: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows * HEADS_USED * case.latent];
        let row_bytes = case.cache.row_bytes(case.width);
        let mut cache = stored.to_vec();
        cache[(past + rows) * row_bytes..].fill(0xFF);
        let shape = Shape::fixed(&[stored.len() / row_bytes, case.width]);
        let cache = Tensor::new(cache.as_mut_ptr(), TensorDesc::new(case.cache, shape));
        let shape = Shape::rows(&[HEADS_USED, case.latent]);
        let output = Tensor::new(out.as_mut_ptr().cast(), TensorDesc::new(DType::F32, shape));
        let step = Step { rows, past, outputs: rows };
        let kv_len = cache.shape().extents()[0].fixed().unwrap();
        let mut builder = Builder::new("test", level, 2, Capacity { rows, outputs: rows, kv_len });
        latent_attention(&q.tensor(), &cache, &output, 0.3, case.latent, &mut builder);
        let (phases, _memory) = builder.finish();
        let mut scratch = Scratch::default();
        for phase in &phases {
            scratch.reserve(phase.kernel.scratch_bytes()).expect("room");
            for task in (0..phase.kernel.tasks(&step)).rev() {
                // SAFETY: one thread, and all tensors are alive.
                unsafe { phase.kernel.run(&step, task, &mut scratch) }
            }
        }
        out
    }

    fn stored(case: &Case, len: usize) -> (Vec<u8>, Vec<f32>) {
        let row_bytes = case.cache.row_bytes(case.width);
        let (mut bytes, mut decoded) = (vec![0; len * row_bytes], vec![0.0; len * case.width]);
        let values = numbers(len * case.width, 3);
        for (row, bytes) in bytes.chunks_mut(row_bytes).enumerate() {
            format::encode(case.cache, &values[row * case.width..][..case.width], bytes);
            format::decode(case.cache, bytes, &mut decoded[row * case.width..][..case.width]);
        }
        (bytes, decoded)
    }

    #[test]
    fn agrees_with_f64_and_every_split_gives_the_same_bits() {
        let len = 600;
        for case in &CASES {
            let (bytes, keys) = stored(case, len);
            for (past, rows) in [(0, 1), (0, 70), (30, 3), (255, 2), (256, 5), (500, 40), (598, 1)] {
                each_level(|level| {
                    let mut q = Rows::new(&[rows, HEADS_USED, case.width], 5, 9);
                    let found = attend(level, case, &bytes, &mut q, past, rows);
                    for row in 0..rows {
                        let mut alone = Rows::new(&[1, HEADS_USED, case.width], 0, 9);
                        let width = case.width;
                        for head in 0..HEADS_USED {
                            let values = q.row(row * HEADS_USED + head);
                            alone.data[head * width..][..width].copy_from_slice(values);
                        }
                        let one = attend(level, case, &bytes, &mut alone, past + row, 1);
                        let size = HEADS_USED * case.latent;
                        assert_eq!(
                            one,
                            found[row * size..][..size],
                            "{level}, row {row} of {rows} at {past}"
                        );
                    }
                    for (index, found) in found.chunks(case.latent).enumerate() {
                        let visible = past + index / HEADS_USED + 1;
                        let q = q.row(index);
                        let key = |j: usize| &keys[j * case.width..][..case.width];
                        let dot = |k: &[f32]| -> f64 {
                            q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
                        };
                        let scores: Vec<f64> =
                            (0..visible).map(|j| dot(key(j)) * f64::from(0.3f32)).collect();
                        let max = scores.iter().copied().fold(f64::MIN, f64::max);
                        let weights: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
                        let sum: f64 = weights.iter().sum();
                        let want: Vec<f64> = (0..case.latent)
                            .map(|l| {
                                (0..visible).map(|j| weights[j] * f64::from(key(j)[l])).sum::<f64>() / sum
                            })
                            .collect();
                        assert_close(found, &want, 2e-5, 2e-5, &format!("{level}, head {index} at {past}"));
                    }
                });
            }
        }
    }
}
