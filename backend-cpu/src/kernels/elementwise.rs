//! Kernels on pairs of elements: [`Op::Add`](backend_api::Op::Add) and [`Op::SwiGlu`](backend_api::Op::SwiGlu).

use super::{Kernel, Scratch, cut::Cut, exp::exp};
use crate::{builder::Builder, isa::Isa, tensor::Tensor};
use backend_api::Step;

/// `out = a + b`, where `out` may lie where one of them does.
pub(crate) fn add(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    builder.push(Pairwise::new(Sum, inputs, outputs));
}

/// `gate / (1 + exp(-gate)) × up`.
pub(crate) fn swi_glu(inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    builder.push(Pairwise::new(Gate, inputs, outputs));
}

trait Pair: Send + Sync {
    /// Elements of a task: about 1 µs of work.
    const TASK: usize;
    fn eval<S: Isa>(isa: S, a: S::F, b: S::F) -> S::F;
}

struct Sum;

impl Pair for Sum {
    const TASK: usize = 8192;
    #[inline(always)]
    fn eval<S: Isa>(isa: S, a: S::F, b: S::F) -> S::F {
        isa.add(a, b)
    }
}

struct Gate;

impl Pair for Gate {
    const TASK: usize = 2048;
    #[inline(always)]
    fn eval<S: Isa>(isa: S, gate: S::F, up: S::F) -> S::F {
        let negative = isa.sub(isa.splat(0.0), gate);
        let divisor = isa.add(isa.splat(1.0), exp(isa, negative));
        isa.mul(isa.div(gate, divisor), up)
    }
}

struct Pairwise<P> {
    _pair: P,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    cut: Cut,
}

impl<P: Pair> Pairwise<P> {
    fn new(pair: P, inputs: &[Tensor], outputs: &[Tensor]) -> Self {
        let out = outputs[0];
        Pairwise { _pair: pair, a: inputs[0], b: inputs[1], out, cut: Cut::new(out.width(), P::TASK) }
    }
}

impl<P: Pair> Kernel for Pairwise<P> {
    fn tasks(&self, step: &Step) -> usize {
        self.cut.tasks(self.out.rows(step))
    }

    #[inline(always)]
    unsafe fn run<S: Isa>(&self, isa: S, step: &Step, task: usize, _scratch: &mut Scratch) {
        let columns = self.cut.columns(task);
        let n = columns.len();
        for row in self.cut.rows(task, self.out.rows(step)) {
            let a = self.a.row::<f32>(row).wrapping_add(columns.start);
            let b = self.b.row::<f32>(row).wrapping_add(columns.start);
            let out = self.out.row::<f32>(row).wrapping_add(columns.start);
            let mut i = 0;
            // SAFETY: `n` elements of this row belong to each tensor, and these of `out` to this task.
            unsafe {
                while i + 16 <= n {
                    let pair = P::eval(isa, isa.load(a.add(i)), isa.load(b.add(i)));
                    isa.store(out.add(i), pair);
                    i += 16;
                }
                if i < n {
                    let rest = n - i;
                    let pair = P::eval(isa, isa.load_first(a.add(i), rest), isa.load_first(b.add(i), rest));
                    isa.store_first(out.add(i), pair, rest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{Rows, assert_close, each_level, rows, run};

    const SHAPES: [&[usize]; 6] = [&[1, 1], &[3, 15], &[2, 3, 33], &[1, 20_000], &[70, 2, 48], &[2, 2, 2, 5]];

    fn check<P: Pair + 'static>(pair: fn() -> P, exact: fn(f64, f64) -> f64, tolerance: f64) {
        each_level(|level| {
            for (seed, extents) in SHAPES.into_iter().enumerate() {
                let mut a = Rows::new(extents, 3, seed as u32);
                let mut b = Rows::new(extents, 0, seed as u32 + 100);
                let mut out = Rows::poisoned(extents);
                let kernel = Pairwise::new(pair(), &[a.tensor(), b.tensor()], &[out.tensor()]);
                run(kernel, level, &rows(extents[0]));
                for row in 0..extents[..extents.len() - 1].iter().product() {
                    let pairs = a.row(row).iter().zip(b.row(row));
                    let want: Vec<f64> = pairs.map(|(&a, &b)| exact(f64::from(a), f64::from(b))).collect();
                    assert_close(out.row(row), &want, tolerance, 1e-30, &format!("{level} {extents:?}"));
                }
            }
        });
    }

    #[test]
    fn add_is_rounded_once() {
        check(|| Sum, |a, b| f64::from(a as f32 + b as f32), 0.0);
    }

    #[test]
    fn swi_glu_is_within_rounding() {
        check(|| Gate, |gate, up| gate / (1.0 + (-gate).exp()) * up, 5e-7);
    }

    #[test]
    fn add_in_place() {
        each_level(|level| {
            let extents = [5, 100];
            let (mut a, mut b) = (Rows::new(&extents, 0, 1), Rows::new(&extents, 0, 2));
            let want: Vec<f32> = a.data.iter().zip(&b.data).map(|(a, b)| a + b).collect();
            let place = b.tensor();
            run(Pairwise::new(Sum, &[a.tensor(), place], &[place]), level, &rows(5));
            assert_eq!(b.data, want);
        });
    }

    #[test]
    fn swi_glu_far_out() {
        each_level(|level| {
            let mut gate = Rows::new(&[1, 4], 0, 0);
            gate.data.copy_from_slice(&[-1000.0, 1000.0, -90.0, 90.0]);
            let mut up = Rows::new(&[1, 4], 0, 0);
            up.data.fill(2.0);
            let mut out = Rows::poisoned(&[1, 4]);
            run(Pairwise::new(Gate, &[gate.tensor(), up.tensor()], &[out.tensor()]), level, &rows(1));
            assert_close(&out.data, &[0.0, 2000.0, 0.0, 180.0], 1e-6, 1e-36, level.name());
        });
    }
}
