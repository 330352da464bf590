//! What the tests of kernels share: every instruction set of this machine, and tensors in vectors.

use super::{Kernel, Scratch, bind};
use crate::{
    isa::{Isa, Level, Portable, Task},
    tensor::Tensor,
};
use backend_api::{DType, Shape, Step, TensorDesc};

/// An instruction set, to run tasks on.
pub(crate) enum AnyIsa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(crate::isa::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(crate::isa::Avx512),
}

impl AnyIsa {
    pub(crate) fn run<T: Task>(&self, task: T) -> T::Output {
        match self {
            AnyIsa::Portable => Portable.run(task),
            #[cfg(target_arch = "x86_64")]
            AnyIsa::Avx2(isa) => isa.run(task),
            #[cfg(target_arch = "x86_64")]
            AnyIsa::Avx512(isa) => isa.run(task),
        }
    }
}

/// Calls `test` with each instruction set that this machine has.
pub(crate) fn each_isa(test: impl Fn(Level, &AnyIsa)) {
    test(Level::Portable, &AnyIsa::Portable);
    #[cfg(target_arch = "x86_64")]
    {
        crate::isa::Avx2::new().into_iter().for_each(|isa| test(Level::Avx2, &AnyIsa::Avx2(isa)));
        crate::isa::Avx512::new().into_iter().for_each(|isa| test(Level::Avx512, &AnyIsa::Avx512(isa)));
    }
}

/// Calls `test` with each level that this machine has.
pub(crate) fn each_level(test: impl Fn(Level)) {
    Level::ALL.into_iter().filter(|level| level.is_available()).for_each(test);
}

/// Runs all tasks of a kernel, the last first (their order must not matter).
pub(crate) fn run(kernel: impl Kernel + 'static, level: Level, step: &Step) {
    let kernel = bind(kernel, level);
    let mut scratch = Scratch::default();
    scratch.reserve(kernel.scratch_bytes()).expect("room");
    for task in (0..kernel.tasks(step)).rev() {
        // SAFETY: tests run on one thread, with tensors that are alive.
        unsafe { kernel.run(step, task, &mut scratch) }
    }
}

/// A step of `rows` rows at the start.
pub(crate) fn rows(rows: usize) -> Step {
    Step { rows, past: 0, outputs: rows }
}

/// Numbers between -2 and 2, the same for the same seed.
pub(crate) fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..n).map(|_| next()).collect()
}

/// F32 rows of a shape inside a vector, with `gap` unused elements between innermost rows.
pub(crate) struct Rows {
    pub(crate) data: Vec<f32>,
    extents: Vec<usize>,
    gap: usize,
}

impl Rows {
    /// Rows of numbers; the gaps hold NaN.
    pub(crate) fn new(extents: &[usize], gap: usize, seed: u32) -> Self {
        let width = extents[extents.len() - 1];
        let count = extents[..extents.len() - 1].iter().product::<usize>();
        let values = numbers(count * width, seed);
        let mut data = vec![f32::NAN; count * (width + gap)];
        for (row, values) in data.chunks_mut(width + gap).zip(values.chunks(width)) {
            row[..width].copy_from_slice(values);
        }
        Rows { data, extents: extents.to_vec(), gap }
    }

    /// Dense rows of NaN.
    pub(crate) fn poisoned(extents: &[usize]) -> Self {
        Rows { data: vec![f32::NAN; extents.iter().product()], extents: extents.to_vec(), gap: 0 }
    }

    /// Innermost row `index`.
    pub(crate) fn row(&self, index: usize) -> &[f32] {
        let width = self.extents[self.extents.len() - 1];
        &self.data[index * (width + self.gap)..][..width]
    }

    /// As a tensor whose outermost extent is `Rows`.
    pub(crate) fn tensor(&mut self) -> Tensor {
        let mut desc = TensorDesc::new(DType::F32, Shape::rows(&self.extents[1..]));
        let rank = self.extents.len();
        let mut stride = 4 * (self.extents[rank - 1] + self.gap);
        for axis in (0..rank - 1).rev() {
            desc.strides[axis] = stride;
            stride *= self.extents[axis];
        }
        Tensor::new(self.data.as_mut_ptr().cast(), desc)
    }
}

/// A tensor of fixed extents in a vector.
pub(crate) fn fixed<T>(data: &mut [T], dtype: DType, extents: &[usize]) -> Tensor {
    Tensor::new(data.as_mut_ptr().cast(), TensorDesc::new(dtype, Shape::fixed(extents)))
}

/// Fails where a value is further from `want` than `relative` of it and `absolute`.
pub(crate) fn assert_close(found: &[f32], want: &[f64], relative: f64, absolute: f64, what: &str) {
    assert_eq!(found.len(), want.len(), "{what}");
    for (i, (&found, &want)) in found.iter().zip(want).enumerate() {
        let error = (f64::from(found) - want).abs();
        assert!(error <= relative * want.abs() + absolute, "{what}: element {i} is {found}, not {want}");
    }
}
