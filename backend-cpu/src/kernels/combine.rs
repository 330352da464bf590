//! [`Op::CombineExperts`](backend_api::Op::CombineExperts).

use super::{Kernel, Scratch, cut::Cut};
use crate::{builder::Builder, isa::Isa, tensor::Tensor};
use backend_api::Step;

/// The weighted sum of the chosen experts' outputs, in the order of the choices.
pub(crate) fn combine_experts(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    builder.push(Combine::new(inputs, outputs));
}

struct Combine {
    y: Tensor,
    weights: Tensor,
    out: Tensor,
    used: usize,
    cut: Cut,
}

impl Combine {
    /// Elements read by a task: about 1 µs of work.
    const TASK: usize = 16384;

    fn new(inputs: &[Tensor], outputs: &[Tensor]) -> Self {
        let (weights, out) = (inputs[1], outputs[0]);
        let used = weights.width();
        Combine { y: inputs[0], weights, out, used, cut: Cut::new(out.width(), (Self::TASK / used).max(16)) }
    }
}

impl Kernel for Combine {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let columns = self.cut.columns(task);
        for row in self.cut.rows(task, self.out.rows(step)) {
            let weights = self.weights.row::<f32>(row);
            let out = self.out.row::<f32>(row);
            let mut i = columns.start;
            while i < columns.end {
                let lanes = (columns.end - i).min(16);
                let mut sum = isa.splat(0.0);
                // SAFETY: `lanes` elements from `i` lie inside each row, and those of `out` belong to this task.
                unsafe {
                    for choice in 0..self.used {
                        let weight = isa.splat(weights.add(choice).read_unaligned());
                        let y = self.y.at::<f32>(row, choice).add(i);
                        let y = if lanes == 16 { isa.load(y) } else { isa.load_first(y, lanes) };
                        sum = isa.mul_add(weight, y, sum);
                    }
                    isa.store_first(out.add(i), sum, lanes);
                }
                i += 16;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Rows, assert_close, each_level, rows, run};

    #[test]
    fn agrees_with_f64() {
        each_level(|level| {
            for (n, used, width) in [(1, 1, 1), (1, 8, 7168), (3, 2, 33), (20, 6, 100), (2, 3, 16)] {
                let mut y = Rows::new(&[n, used, width], 2, 3);
                let mut weights = Rows::new(&[n, used], 1, 4);
                let mut out = Rows::poisoned(&[n, width]);
                run(Combine::new(&[y.tensor(), weights.tensor()], &[out.tensor()]), level, &rows(n));
                for row in 0..n {
                    let term = |choice: usize, column: usize| {
                        f64::from(y.row(row * used + choice)[column]) * f64::from(weights.row(row)[choice])
                    };
                    let sum = |column| (0..used).map(|choice| term(choice, column)).sum();
                    let want: Vec<f64> = (0..width).map(sum).collect();
                    assert_close(out.row(row), &want, 1e-6, 3e-6, &format!("{level} {n} {used} {width}"));
                }
            }
        });
    }
}
