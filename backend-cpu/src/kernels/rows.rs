//! Kernels that move rows: `EmbedRows`, `KvStore`, `Concat`, `SelectRows` and `Cast` of
//! [`Op`](backend_api::Op).

use super::{Kernel, Scratch, cut::Cut};
use crate::{builder::Builder, isa::Isa, tensor::Tensor};
use backend_api::{DType, Step, format};
use half::f16;
use std::{ptr, slice};

/// Elements of a task: about 1 µs of copying.
const TASK: usize = 8192;
/// Elements of a task: some µs of scalar decoding or encoding.
const CODEC_TASK: usize = 4096;

/// Decoded rows of a table.
pub(crate) fn embed_rows(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    let cut = Cut::whole_rows(outputs[0].width(), CODEC_TASK);
    builder.push(EmbedRows { table: inputs[0], ids: inputs[1], out: outputs[0], cut });
}

/// Rows into a cache, from row `past`.
pub(crate) fn kv_store(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    let cut = Cut::whole_rows(inputs[0].width(), CODEC_TASK);
    builder.push(KvStore { row: inputs[0], cache: outputs[0], cut });
}

/// Rows beside rows.
pub(crate) fn concat(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    let cut = Cut::whole_rows(outputs[0].width(), TASK);
    builder.push(Concat { a: inputs[0], b: inputs[1], out: outputs[0], cut });
}

/// Chosen rows.
pub(crate) fn select_rows(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    builder.push(SelectRows::new(inputs, outputs));
}

/// Another float format.
pub(crate) fn cast(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    let cut = Cut::new(outputs[0].width(), TASK);
    builder.push(Cast { x: inputs[0], out: outputs[0], cut });
}

/// Element `index` of ids, which have to be below `bound`. The caller of a program owes that; for others it gets an error,
/// not foreign memory.
///
/// # Safety
/// It is readable.
#[inline(always)]
pub(crate) unsafe fn read_id(
    ids: &Tensor,
    index: usize,
    bound: usize,
    what: &str,
    scratch: &mut Scratch,
) -> Option<usize> {
    // SAFETY: the caller's.
    let id = unsafe { ids.base::<i32>().add(index).read_unaligned() };
    let inside = usize::try_from(id).ok().filter(|id| *id < bound);
    if inside.is_none() {
        scratch.fail(|| format!("{what} {id} is not in 0..{bound}"));
    }
    inside
}

struct EmbedRows {
    table: Tensor,
    ids: Tensor,
    out: Tensor,
    cut: Cut,
}

impl Kernel for EmbedRows {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let (width, vocab) = (self.out.width(), self.table.extent(0, step));
        for row in self.cut.rows(task, self.out.rows(step)) {
            // SAFETY: the id is inside the table; outputs are aligned; this row belongs to this task.
            unsafe {
                let Some(id) = read_id(&self.ids, row, vocab, "embedded id", scratch) else { continue };
                let bytes = slice::from_raw_parts(self.table.row::<u8>(id), self.table.desc().row_bytes());
                let out = slice::from_raw_parts_mut(self.out.row::<f32>(row), width);
                format::decode(self.table.dtype(), bytes, out);
            }
        }
    }
}

struct KvStore {
    row: Tensor,
    cache: Tensor,
    cut: Cut,
}

impl Kernel for KvStore {
    fn scratch_bytes(&self) -> usize {
        if self.cache.dtype() == DType::Q8_0 { 4 * self.row.width() } else { 0 }
    }

    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(step.rows)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let n = self.row.width();
        for row in self.cut.rows(task, step.rows) {
            let (from, to) = (self.row.row::<f32>(row), self.cache.row::<u8>(step.past + row));
            // SAFETY: both rows hold `n` elements; this cache row belongs to this task. Beside a quantised cache the
            // scratch has room for as many.
            unsafe {
                match self.cache.dtype() {
                    DType::F32 => ptr::copy_nonoverlapping(from.cast(), to, 4 * n),
                    DType::F16 => to_f16(isa, from, to.cast(), n),
                    dtype => {
                        let aligned = scratch.as_mut_ptr().cast::<f32>();
                        ptr::copy_nonoverlapping(from.cast::<u8>(), aligned.cast(), 4 * n);
                        let bytes = slice::from_raw_parts_mut(to, self.cache.desc().row_bytes());
                        format::encode(dtype, slice::from_raw_parts(aligned, n), bytes);
                    }
                }
            }
        }
    }
}

struct Concat {
    a: Tensor,
    b: Tensor,
    out: Tensor,
    cut: Cut,
}

impl Kernel for Concat {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let (a, b) = (self.a.desc().row_bytes(), self.b.desc().row_bytes());
        for row in self.cut.rows(task, self.out.rows(step)) {
            let out = self.out.row::<u8>(row);
            // SAFETY: a row of `out` has room for both, and belongs to this task.
            unsafe {
                ptr::copy_nonoverlapping(self.a.row::<u8>(row), out, a);
                ptr::copy_nonoverlapping(self.b.row::<u8>(row), out.add(a), b);
            }
        }
    }
}

struct SelectRows {
    x: Tensor,
    ids: Tensor,
    out: Tensor,
    /// Innermost rows of one selected row.
    inner: usize,
    cut: Cut,
}

impl SelectRows {
    fn new(inputs: &[Tensor], outputs: &[Tensor]) -> Self {
        let out = outputs[0];
        let cut = Cut::whole_rows(out.width(), TASK);
        SelectRows { x: inputs[0], ids: inputs[1], out, inner: out.inner_rows(), cut }
    }
}

impl Kernel for SelectRows {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, step: &Step, task: usize, scratch: &mut Scratch) {
        let (bytes, bound) = (self.out.desc().row_bytes(), self.x.extent(0, step));
        for row in self.cut.rows(task, self.out.rows(step)) {
            // SAFETY: the id is a row of `x`; this row of `out` belongs to this task.
            unsafe {
                let id = read_id(&self.ids, row / self.inner, bound, "selected row", scratch);
                let Some(id) = id else { continue };
                let from = self.x.row::<u8>(id * self.inner + row % self.inner);
                ptr::copy_nonoverlapping(from, self.out.row::<u8>(row), bytes);
            }
        }
    }
}

struct Cast {
    x: Tensor,
    out: Tensor,
    cut: Cut,
}

impl Kernel for Cast {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let columns = self.cut.columns(task);
        let size = |tensor: &Tensor| tensor.dtype().block_bytes();
        for row in self.cut.rows(task, self.out.rows(step)) {
            let from = self.x.row::<u8>(row).wrapping_add(columns.start * size(&self.x));
            let to = self.out.row::<u8>(row).wrapping_add(columns.start * size(&self.out));
            // SAFETY: `columns` lie inside both rows, and those of `out` belong to this task.
            unsafe {
                match (self.x.dtype(), self.out.dtype()) {
                    (DType::F32, DType::F16) => to_f16(isa, from.cast(), to.cast(), columns.len()),
                    (DType::F16, DType::F32) => to_f32(isa, from.cast(), to.cast(), columns.len()),
                    _ => ptr::copy_nonoverlapping(from, to, columns.len() * size(&self.x)),
                }
            }
        }
    }
}

/// # Safety
/// `n` elements at both, apart.
#[inline(always)]
unsafe fn to_f16<S: Isa>(isa: S, from: *const f32, to: *mut u16, n: usize) {
    let whole = n / 16 * 16;
    let mut i = 0;
    // SAFETY: the caller's.
    unsafe {
        while i < whole {
            isa.store_f16(to.add(i), isa.load(from.add(i)));
            i += 16;
        }
        while i < n {
            to.add(i).write_unaligned(f16::from_f32(from.add(i).read_unaligned()).to_bits());
            i += 1;
        }
    }
}

/// # Safety
/// `n` elements at both, apart.
#[inline(always)]
unsafe fn to_f32<S: Isa>(isa: S, from: *const u16, to: *mut f32, n: usize) {
    let whole = n / 16 * 16;
    let mut i = 0;
    // SAFETY: the caller's.
    unsafe {
        while i < whole {
            isa.store(to.add(i), isa.load_f16(from.add(i)));
            i += 16;
        }
        while i < n {
            to.add(i).write_unaligned(f16::from_bits(from.add(i).read_unaligned()).to_f32());
            i += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Rows, each_level, fixed, numbers, rows, run};
    use backend_api::{Extent, Shape, TensorDesc};

    fn ids(data: &mut [i32]) -> Tensor {
        Tensor::new(data.as_mut_ptr().cast(), TensorDesc::new(DType::I32, Shape::new(&[Extent::Rows])))
    }

    #[test]
    fn embed_rows_decodes() {
        each_level(|level| {
            for dtype in [DType::F32, DType::F16, DType::Q8_0, DType::Q4_K] {
                let (vocab, width) = (7, 512);
                let values = numbers(vocab * width, 5);
                let row_bytes = dtype.row_bytes(width);
                // One byte in front: a table may start anywhere.
                let mut bytes = vec![0; 1 + vocab * row_bytes];
                for (row, values) in bytes[1..].chunks_mut(row_bytes).zip(values.chunks(width)) {
                    format::encode(dtype, values, row);
                }
                let want: Vec<Vec<f32>> = bytes[1..]
                    .chunks(row_bytes)
                    .map(|row| {
                        let mut out = vec![0.0; width];
                        format::decode(dtype, row, &mut out);
                        out
                    })
                    .collect();
                let mut chosen: Vec<i32> = (0..30).map(|i| i * 5 % 7).collect();
                let mut out = Rows::poisoned(&[30, width]);
                embed(level, fixed(&mut bytes[1..], dtype, &[vocab, width]), ids(&mut chosen), out.tensor());
                for (row, &id) in chosen.iter().enumerate() {
                    assert_eq!(out.row(row), want[id as usize], "{level} {dtype}");
                }
            }
        });
    }

    fn embed(level: crate::Level, table: Tensor, ids: Tensor, out: Tensor) {
        let cut = Cut::whole_rows(out.width(), CODEC_TASK);
        run(EmbedRows { table, ids, out, cut }, level, &rows(30));
    }

    #[test]
    fn kv_store_rounds_as_the_format_and_leaves_other_rows() {
        each_level(|level| {
            for dtype in [DType::F32, DType::F16, DType::Q8_0] {
                for (n, width) in [(1, 1), (3, 31), (2, 576), (25, 40)] {
                    let (capacity, past) = (30, 4);
                    let row_bytes = dtype.row_bytes(width);
                    let mut cache = vec![0xa5u8; capacity * row_bytes];
                    let mut want = cache.clone();
                    let mut row = Rows::new(&[n, width], 4, 8);
                    for i in 0..n {
                        format::encode(dtype, row.row(i), &mut want[(past + i) * row_bytes..][..row_bytes]);
                    }
                    let cut = Cut::whole_rows(width, 64);
                    let cache_tensor = fixed(&mut cache, dtype, &[capacity, width]);
                    let kernel = KvStore { row: row.tensor(), cache: cache_tensor, cut };
                    run(kernel, level, &Step { rows: n, past, outputs: 0 });
                    assert_eq!(cache, want, "{level} {dtype} {n} {width}");
                }
            }
        });
    }

    #[test]
    fn concat_puts_rows_beside_rows() {
        each_level(|level| {
            for (outer, a, b) in [(vec![1], 1, 1), (vec![3, 5], 512, 64), (vec![9], 3, 8190)] {
                let extents = |width| [outer.as_slice(), &[width]].concat();
                let (mut x, mut y) = (Rows::new(&extents(a), 2, 1), Rows::new(&extents(b), 0, 2));
                let mut out = Rows::poisoned(&extents(a + b));
                let cut = Cut::whole_rows(a + b, TASK);
                let kernel = Concat { a: x.tensor(), b: y.tensor(), out: out.tensor(), cut };
                run(kernel, level, &rows(outer[0]));
                for row in 0..outer.iter().product() {
                    assert_eq!(out.row(row), [x.row(row), y.row(row)].concat(), "{level}");
                }
            }
        });
    }

    #[test]
    fn select_rows_copies() {
        each_level(|level| {
            for inner in [vec![33], vec![2, 5], vec![3, 2, 4]] {
                let extents = |n| [&[n], inner.as_slice()].concat();
                let mut x = Rows::new(&extents(6), 3, 1);
                let mut chosen = [5, 0, 3, 3];
                let mut out = Rows::poisoned(&extents(4));
                let (from, ids, to) = (x.tensor(), ids(&mut chosen), out.tensor());
                // Six rows to choose from, four outputs.
                let step = Step { rows: 6, past: 0, outputs: 4 };
                let mut desc = *to.desc();
                let all: Vec<Extent> =
                    std::iter::once(Extent::Outputs).chain(inner.iter().map(|&n| Extent::Fixed(n))).collect();
                desc.shape = Shape::new(&all);
                let to = Tensor::new(to.base(), desc);
                run(SelectRows::new(&[from, ids], &[to]), level, &step);
                let heads = inner[..inner.len() - 1].iter().product::<usize>();
                for (i, &id) in chosen.iter().enumerate() {
                    for head in 0..heads {
                        assert_eq!(out.row(i * heads + head), x.row(id as usize * heads + head), "{level}");
                    }
                }
            }
        });
    }

    #[test]
    fn casts_round_to_nearest_even() {
        each_level(|level| {
            for (n, width) in [(1, 1), (3, 17), (2, 9000)] {
                let mut x = Rows::new(&[n, width], 1, 3);
                x.data[0] = 1.0 + 0.5f32.powi(11);
                let mut halves = vec![0u16; n * width];
                let mut back = Rows::poisoned(&[n, width]);
                let narrow = Tensor::new(
                    halves.as_mut_ptr().cast(),
                    TensorDesc::new(DType::F16, Shape::rows(&[width])),
                );
                let (wide, again) = (x.tensor(), back.tensor());
                let cut = Cut::new(width, 64);
                run(Cast { x: wide, out: narrow, cut }, level, &rows(n));
                run(Cast { x: narrow, out: again, cut }, level, &rows(n));
                for row in 0..n {
                    let want: Vec<f32> = x.row(row).iter().map(|&x| f16::from_f32(x).to_f32()).collect();
                    assert_eq!(back.row(row), want, "{level}");
                }
                assert_eq!(back.data[0], 1.0, "a tie goes to the even neighbour");
            }
        });
    }
}
