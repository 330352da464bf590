//! [`Op::RmsNorm`](backend_api::Op::RmsNorm) (arXiv 1910.07467).

use super::{Kernel, Scratch, cut::Cut};
use crate::{builder::Builder, isa::Isa, tensor::Tensor};
use backend_api::Step;

/// `x / sqrt(mean(x²) + eps) × weight`.
pub(crate) fn rms_norm(eps: f32, inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    builder.push(RmsNorm::new(eps, inputs, outputs));
}

struct RmsNorm {
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: f32,
    cut: Cut,
}

impl RmsNorm {
    /// About 1 µs of work.
    const TASK: usize = 8192;

    fn new(eps: f32, inputs: &[Tensor], outputs: &[Tensor]) -> Self {
        let out = outputs[0];
        let cut = Cut::whole_rows(out.width(), Self::TASK);
        RmsNorm { x: inputs[0], weight: inputs[1], out, eps, cut }
    }
}

impl Kernel for RmsNorm {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let n = self.out.width();
        let weight = self.weight.base::<f32>();
        for row in self.cut.rows(task, self.out.rows(step)) {
            let (x, out) = (self.x.row::<f32>(row), self.out.row::<f32>(row));
            // SAFETY: rows of `n` elements; this one of `out` belongs to this task.
            unsafe {
                let mean = sum_of_squares(isa, x, n) / n as f32;
                let factor = isa.splat(1.0 / (mean + self.eps).sqrt());
                let mut i = 0;
                while i < n {
                    let lanes = (n - i).min(16);
                    if lanes == 16 {
                        let scaled = isa.mul(isa.load(x.add(i)), factor);
                        isa.store(out.add(i), isa.mul(scaled, isa.load(weight.add(i))));
                    } else {
                        let scaled = isa.mul(isa.load_first(x.add(i), lanes), factor);
                        let scaled = isa.mul(scaled, isa.load_first(weight.add(i), lanes));
                        isa.store_first(out.add(i), scaled, lanes);
                    }
                    i += 16;
                }
            }
        }
    }
}

/// Four sums of 16 lanes each, so that additions do not wait for each other; then the four, then the lanes.
///
/// # Safety
/// `n` readable f32 at `x`.
#[inline(always)]
unsafe fn sum_of_squares<S: Isa>(isa: S, x: *const f32, n: usize) -> f32 {
    let mut sums = [isa.splat(0.0); 4];
    let mut i = 0;
    // SAFETY: all loads lie below `n`.
    unsafe {
        while i + 64 <= n {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let x = isa.load(x.add(i + 16 * lane));
                *sum = isa.mul_add(x, x, *sum);
            }
            i += 64;
        }
        let mut lane = 0;
        while i < n {
            let x = isa.load_first(x.add(i), (n - i).min(16));
            sums[lane] = isa.mul_add(x, x, sums[lane]);
            lane += 1;
            i += 16;
        }
    }
    let [a, b, c, d] = sums;
    isa.sum(isa.add(isa.add(a, b), isa.add(c, d)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Rows, assert_close, each_level, fixed, numbers, rows, run};
    use backend_api::DType;

    #[test]
    fn agrees_with_f64() {
        let shapes: [&[usize]; 7] =
            [&[1, 1], &[2, 3, 5], &[3, 63], &[1, 64], &[9, 2, 145], &[40, 512], &[2, 7168]];
        each_level(|level| {
            for (seed, extents) in shapes.into_iter().enumerate() {
                let n = extents[extents.len() - 1];
                let eps = 1e-2;
                let mut x = Rows::new(extents, 5, seed as u32);
                let mut weight = numbers(n, 99);
                let mut out = Rows::poisoned(extents);
                let inputs = [x.tensor(), fixed(&mut weight, DType::F32, &[n])];
                run(RmsNorm::new(eps, &inputs, &[out.tensor()]), level, &rows(extents[0]));
                for row in 0..extents[..extents.len() - 1].iter().product() {
                    let x: Vec<f64> = x.row(row).iter().copied().map(f64::from).collect();
                    let mean = x.iter().map(|x| x * x).sum::<f64>() / n as f64;
                    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
                    let want: Vec<f64> =
                        x.iter().zip(&weight).map(|(x, &w)| x * factor * f64::from(w)).collect();
                    assert_close(out.row(row), &want, 1e-6, 0.0, &format!("{level} {extents:?}"));
                }
            }
        });
    }
}
