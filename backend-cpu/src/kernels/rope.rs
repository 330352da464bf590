//! [`Op::Rope`](backend_api::Op::Rope): a table of angles for the step, made once, and the rotations.

use super::{Kernel, Scratch, cut::Cut};
use crate::{
    builder::Builder,
    isa::Isa,
    tensor::{Tensor, product},
};
use backend_api::{RopeAttributes, Step};

/// Turns the pairs of each row by its position.
pub(crate) fn rope(
    attributes: &RopeAttributes,
    inputs: &[Tensor],
    outputs: &[Tensor],
    builder: &mut Builder,
) {
    let table = match builder.kept::<Table>(|table| table.attributes == *attributes) {
        Some(table) => table,
        None => {
            let pairs = attributes.inverse_frequencies.len();
            let bytes = product([builder.capacity().rows, pairs, size_of::<Turn>()]);
            let table = Table { attributes: attributes.clone(), turns: builder.lasting(bytes).cast() };
            builder.push(FillTable(table.clone()));
            builder.keep(table.clone());
            table
        }
    };
    builder.push(Rope::new(table, inputs, outputs));
}

/// Cosine and sine of an angle, times the magnitude.
type Turn = [f32; 2];

/// The turns of all pairs in all rows of a step, `[rows, pairs]`: one for all heads, layers and tensors with the
/// same attributes.
#[derive(Clone)]
struct Table {
    attributes: RopeAttributes,
    turns: *mut Turn,
}

// SAFETY: an address; kernels use it one after the other.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

struct FillTable(Table);

impl FillTable {
    /// Rows of a task: some µs of work.
    const ROWS: usize = 4;
}

impl Kernel for FillTable {
    fn tasks(&self, step: &Step) -> usize {
        step.rows.div_ceil(Self::ROWS)
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let RopeAttributes { inverse_frequencies, magnitude } = &self.0.attributes;
        let first = task * Self::ROWS;
        for row in first..(first + Self::ROWS).min(step.rows) {
            let turns = self.0.turns.wrapping_add(row * inverse_frequencies.len());
            let position = (step.past + row) as f64;
            for (pair, frequency) in inverse_frequencies.iter().enumerate() {
                let (sin, cos) = (position * frequency).sin_cos();
                let magnitude = f64::from(*magnitude);
                // SAFETY: the table has room for the capacity's rows; this row is this task's.
                unsafe { turns.add(pair).write([(cos * magnitude) as f32, (sin * magnitude) as f32]) }
            }
        }
    }
}

struct Rope {
    table: Table,
    x: Tensor,
    out: Tensor,
    /// Innermost rows of one position.
    heads: usize,
    cut: Cut,
}

impl Rope {
    /// Elements of a task: about 2 µs of work.
    const TASK: usize = 2048;

    fn new(table: Table, inputs: &[Tensor], outputs: &[Tensor]) -> Self {
        let (x, out) = (inputs[0], outputs[0]);
        Rope { table, x, out, heads: x.inner_rows(), cut: Cut::whole_rows(out.width(), Self::TASK) }
    }
}

impl Kernel for Rope {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, _isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let pairs = self.out.width() / 2;
        for row in self.cut.rows(task, self.out.rows(step)) {
            let turns = self.table.turns.wrapping_add(row / self.heads * pairs);
            let (x, out) = (self.x.row::<[f32; 2]>(row), self.out.row::<[f32; 2]>(row));
            for pair in 0..pairs {
                // SAFETY: `pairs` pairs lie in each row; this row of `out` belongs to this task.
                unsafe {
                    let [cos, sin] = turns.add(pair).read();
                    let [a, b] = x.add(pair).read_unaligned();
                    out.add(pair).write_unaligned([a * cos - b * sin, a * sin + b * cos]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Rows, assert_close, each_level, run};
    use backend_api::Capacity;

    #[test]
    fn agrees_with_f64_far_into_the_context() {
        let capacity = Capacity { rows: 16, outputs: 16, kv_len: 1 << 20 };
        for (extents, past) in
            [(vec![1, 2], 0), (vec![5, 3, 64], 163_835), (vec![16, 6], 7), (vec![3, 40, 2, 10], 4095)]
        {
            let n = extents[extents.len() - 1];
            let frequencies: Vec<f64> =
                (0..n / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / n as f64)).collect();
            let attributes =
                RopeAttributes { inverse_frequencies: frequencies.clone().into(), magnitude: 1.25 };
            each_level(|level| {
                let mut builder = Builder::new("test", level, 1, capacity);
                let table = Table {
                    turns: builder.lasting(16 * n / 2 * size_of::<Turn>()).cast(),
                    attributes: attributes.clone(),
                };
                let step = Step { rows: extents[0], past, outputs: 0 };
                let mut x = Rows::new(&extents, 7, 1);
                let mut out = Rows::poisoned(&extents);
                run(FillTable(table.clone()), level, &step);
                run(Rope::new(table, &[x.tensor()], &[out.tensor()]), level, &step);
                let heads = extents[1..extents.len() - 1].iter().product::<usize>();
                for row in 0..extents[0] * heads {
                    let mut want = Vec::new();
                    for (pair, frequency) in x.row(row).chunks(2).zip(&frequencies) {
                        let (sin, cos) = ((past + row / heads) as f64 * frequency).sin_cos();
                        let [a, b] = [0, 1].map(|i| f64::from(pair[i]));
                        want.extend([1.25 * (a * cos - b * sin), 1.25 * (a * sin + b * cos)]);
                    }
                    assert_close(out.row(row), &want, 0.0, 1e-6, &format!("{level} {extents:?}"));
                }
            });
        }
    }

    #[test]
    fn one_table_for_equal_attributes() {
        let capacity = Capacity { rows: 4, outputs: 4, kv_len: 100 };
        let mut builder = Builder::new("test", crate::isa::Level::Portable, 1, capacity);
        let (mut x, mut out) = (Rows::new(&[4, 8], 0, 1), Rows::poisoned(&[4, 8]));
        let (x, out) = ([x.tensor()], [out.tensor()]);
        for base in [10_000f64, 10_000.0, 500.0, 10_000.0] {
            let inverse_frequencies = (0..4).map(|i| base.powi(-i)).collect();
            rope(&RopeAttributes { inverse_frequencies, magnitude: 1.0 }, &x, &out, &mut builder);
        }
        assert_eq!(builder.finish().0.len(), 4 + 2, "four rotations and two tables");
    }
}
