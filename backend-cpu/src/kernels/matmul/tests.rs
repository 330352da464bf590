//! Products of every format and instruction set against float64, and few rows against many.

use super::{
    activations::{Layout, Quantized},
    *,
};
use crate::{
    buffer::Memory,
    isa::Level,
    kernels::{
        Scratch,
        testing::{each_level, numbers},
    },
};
use backend_api::{Capacity, Extent, Shape, Step, TensorDesc, format};

struct Case {
    dtype: DType,
    matrices: usize,
    m: usize,
    k: usize,
}

impl Case {
    /// Encoded weights, and what they decode to.
    fn weights(&self) -> (Vec<u8>, Vec<f32>) {
        let rows = self.matrices * self.m;
        let values = numbers(rows * self.k, 7);
        let row_bytes = self.dtype.row_bytes(self.k);
        let (mut bytes, mut decoded) = (vec![0; rows * row_bytes], vec![0.0; rows * self.k]);
        for row in 0..rows {
            let bytes = &mut bytes[row * row_bytes..][..row_bytes];
            format::encode(self.dtype, &values[row * self.k..][..self.k], bytes);
            format::decode(self.dtype, bytes, &mut decoded[row * self.k..][..self.k]);
        }
        (bytes, decoded)
    }
}

/// Runs what `build` pushed, one task after the other. Returns the memory between kernels.
fn run(level: Level, step: Step, build: impl FnOnce(&mut Builder)) -> Vec<Memory> {
    let mut builder =
        Builder::new("test", level, 2, Capacity { rows: step.rows, outputs: step.rows, kv_len: 64 });
    build(&mut builder);
    let (phases, memory) = builder.finish();
    let mut scratch = Scratch::default();
    for phase in &phases {
        scratch.reserve(phase.kernel.scratch_bytes()).expect("room");
        for task in 0..phase.kernel.tasks(&step) {
            // SAFETY: one thread; the test keeps its tensors alive.
            unsafe { phase.kernel.run(&step, task, &mut scratch) }
        }
    }
    memory
}

fn step(rows: usize) -> Step {
    Step { rows, past: 0, outputs: rows }
}

/// A tensor that is only read.
fn input<T>(data: &[T], dtype: DType, shape: Shape) -> Tensor {
    Tensor::new(data.as_ptr().cast_mut().cast(), TensorDesc::new(dtype, shape))
}

fn output(data: &mut [f32], rest: &[usize]) -> Tensor {
    Tensor::new(data.as_mut_ptr().cast(), TensorDesc::new(DType::F32, Shape::rows(rest)))
}

fn product_of(
    level: Level,
    case: &Case,
    bytes: &[u8],
    x: &[f32],
    rows: usize,
    precision: Precision,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * case.m];
    let w = input(bytes, case.dtype, Shape::fixed(&[case.m, case.k]));
    let (x, y) = (input(x, DType::F32, Shape::rows(&[case.k])), output(&mut out, &[case.m]));
    run(level, step(rows), |builder| matmul(&w, &x, &y, precision, builder));
    out
}

fn nmse(want: &[f64], found: &[f32]) -> f64 {
    let error: f64 = want.iter().zip(found).map(|(w, f)| (w - f64::from(*f)).powi(2)).sum();
    error / want.iter().map(|w| w * w).sum::<f64>()
}

const PRECISIONS: [Precision; 3] = [Precision::Default, Precision::Fine, Precision::F32];

/// Groups that are much smaller than their neighbours keep their digits, and a second part what the first leaves.
#[test]
fn activations_are_rounded_finely() {
    let k = 512;
    let layouts = [Layout::small(k), Layout::k_quants(k, 16), Layout::k_quants(k, 32)];
    let sizes = [1.0, 0.02, 0.3, 0.6];
    let x: Vec<f32> = numbers(2 * k, 5)
        .into_iter()
        .enumerate()
        .map(|(i, x)| x * sizes[i / 16 % 4] * sizes[i / k])
        .collect();
    for (layout, group, block) in [(layouts[0], 16, 16), (layouts[1], 16, 256), (layouts[2], 32, 256)] {
        each_level(|level| {
            let mut quantized = None;
            let tensor = input(&x, DType::F32, Shape::rows(&[k]));
            let memory =
                run(level, step(2), |builder| quantized = Some(Quantized::of(&tensor, layout, 2, builder)));
            let quantized = quantized.expect("built");
            for (row, x) in x.chunks(k).enumerate() {
                let parts = [0, 1].map(|part| quantized.row(row, part));
                let largest = |values: &[f32]| values.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
                for i in 0..k {
                    let near = |size: usize| largest(&x[i / size * size..][..size]);
                    // Beside K-quants a scale is an integer of at most 7.
                    let step =
                        near(group) / 127.0 + if block > group { near(block) / (7.0 * 127.0) } else { 0.0 };
                    // SAFETY: the rows are filled, and `memory` is alive.
                    let [one, two] = parts.map(|part| unsafe {
                        let q = f32::from(*part.quants(i));
                        match block {
                            256 => {
                                let beside = part.k_scales(i / 256);
                                beside.d * beside.scales[i % 256 / group] as f32 * q
                            }
                            _ => part.small(i / 32)[i % 32 / 16] * q,
                        }
                    });
                    assert!((x[i] - one).abs() <= 0.501 * step, "{level}: {i}: {one} for {}, {step}", x[i]);
                    assert!(
                        (x[i] - one - two).abs() <= step / 127.0,
                        "{level}: {i}: {one} + {two}, {}",
                        x[i]
                    );
                }
            }
            drop(memory);
        });
    }
}

/// Inputs may start anywhere.
#[test]
fn activations_may_start_at_an_odd_byte() {
    let case = Case { dtype: DType::Q4_K, matrices: 1, m: 5, k: 256 };
    let (bytes, _) = case.weights();
    let x = numbers(3 * case.k, 3);
    let mut shifted = vec![0u8; 1];
    shifted.extend(x.iter().flat_map(|x| x.to_le_bytes()));
    each_level(|level| {
        for precision in PRECISIONS {
            let mut out = vec![f32::NAN; 3 * case.m];
            let w = input(&bytes, case.dtype, Shape::fixed(&[case.m, case.k]));
            let y = output(&mut out, &[case.m]);
            let x_there = input(&shifted[1..], DType::F32, Shape::rows(&[case.k]));
            run(level, step(3), |builder| matmul(&w, &x_there, &y, precision, builder));
            assert_eq!(out, product_of(level, &case, &bytes, &x, 3, precision), "{level}, {precision:?}");
        }
    });
}

#[test]
fn products_are_right_in_every_format() {
    for dtype in DType::WEIGHTS {
        let lengths: &[usize] = match dtype.block_len() {
            1 => &[1, 15, 16, 17, 120, 576],
            32 => &[32, 64, 96, 256, 288, 544],
            _ => &[256, 512, 768],
        };
        for &k in lengths {
            for m in [1, 15, 16, 17, 40] {
                let case = Case { dtype, matrices: 1, m, k };
                let (bytes, decoded) = case.weights();
                for rows in [1, 2, 5, 9, 16] {
                    let x = numbers(rows * k, 11);
                    let want: Vec<f64> = (0..rows * m)
                        .map(|i| {
                            let (x, w) = (&x[i / m * k..][..k], &decoded[i % m * k..][..k]);
                            x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
                        })
                        .collect();
                    each_level(|level| {
                        for precision in PRECISIONS {
                            let found = product_of(level, &case, &bytes, &x, rows, precision);
                            let bound = match precision {
                                Precision::Default if dtype.is_quantized() => 4e-4,
                                Precision::Fine if dtype.is_quantized() => 4e-9,
                                _ => 1e-11,
                            };
                            let error = nmse(&want, &found);
                            // One output alone may lose all its digits to cancellation.
                            let few = rows * m < 30;
                            assert!(
                                error <= if few { bound * 300.0 } else { bound },
                                "{dtype} [{m}, {k}] × {rows}, {level}, {precision:?}: nmse {error:e}"
                            );
                        }
                    });
                }
            }
        }
    }
}

#[test]
fn a_row_alone_equals_the_row_in_a_batch() {
    for dtype in DType::WEIGHTS {
        let k = if dtype.block_len() == 32 { 288 } else { 512 };
        let case = Case { dtype, matrices: 1, m: 35, k };
        let (bytes, _) = case.weights();
        let rows = 23;
        let x = numbers(rows * k, 5);
        each_level(|level| {
            for precision in PRECISIONS {
                let batch = product_of(level, &case, &bytes, &x, rows, precision);
                for row in 0..rows {
                    let x = &x[row * k..][..k];
                    let alone = product_of(level, &case, &bytes, x, 1, precision);
                    assert!(
                        alone
                            .iter()
                            .map(|y| y.to_bits())
                            .eq(batch[row * 35..][..35].iter().map(|y| y.to_bits())),
                        "{dtype}, {level}, {precision:?}, row {row}"
                    );
                }
            }
        });
    }
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|y| y.to_bits()).collect()
}

#[test]
fn what_is_not_finite_makes_its_row_nan_and_no_other() {
    for dtype in DType::WEIGHTS {
        // The last block of 32 has no pair.
        let k = if dtype.block_len() == 32 { 288 } else { 512 };
        let case = Case { dtype, matrices: 1, m: 20, k };
        let (bytes, _) = case.weights();
        for rows in [2, 9] {
            let clean = numbers(rows * k, 5);
            each_level(|level| {
                for precision in PRECISIONS {
                    let product = |x: &[f32]| product_of(level, &case, &bytes, x, rows, precision);
                    let want = product(&clean);
                    assert!(want.iter().all(|y| y.is_finite()));
                    let check = |odd: f32, places: std::ops::Range<usize>| {
                        let mut x = clean.clone();
                        x[k..2 * k][places.clone()].fill(odd);
                        let found = product(&x);
                        let what =
                            format!("{dtype}, {level}, {precision:?}, {rows} rows, {odd} at {places:?}");
                        assert_eq!(bits(&found[..20]), bits(&want[..20]), "{what}");
                        assert_eq!(bits(&found[40..]), bits(&want[40..]), "{what}");
                        assert!(found[20..40].iter().all(|y| y.is_nan()), "{what}: {:?}", &found[20..40]);
                    };
                    for place in [0, 17, k - 1] {
                        check(f32::NAN, place..place + 1);
                    }
                    check(f32::NAN, 0..k);
                    // In f32 they make infinite sums.
                    if dtype.is_quantized() && precision != Precision::F32 {
                        check(f32::INFINITY, 40..41);
                        check(f32::NEG_INFINITY, 0..k);
                    }
                }
            });
        }
    }
}

/// A scale whose inverse is infinite would make anything of zeros and of what is near them.
#[test]
fn values_too_small_for_a_scale_are_zeros() {
    for dtype in DType::WEIGHTS.into_iter().filter(|dtype| dtype.is_quantized()) {
        let case = Case { dtype, matrices: 1, m: 20, k: 512 };
        let (bytes, _) = case.weights();
        for rows in [1, 8] {
            let of = |level, x: &[f32]| product_of(level, &case, &bytes, x, rows, Precision::Default);
            // All of a row, and the groups beside one that is not small.
            let small: Vec<f32> = numbers(rows * 512, 9).iter().map(|x| x * 1e-38).collect();
            let (mut beside, mut zeros) = (small.clone(), vec![0.0; rows * 512]);
            for (i, x) in numbers(32, 4).into_iter().enumerate() {
                (beside[64 + i], zeros[64 + i]) = (x, x);
            }
            each_level(|level| {
                let found = of(level, &small);
                assert!(found.iter().all(|y| *y == 0.0), "{dtype}, {level}, {rows} rows: {found:?}");
                assert_eq!(of(level, &beside), of(level, &zeros), "{dtype}, {level}, {rows} rows");
            });
        }
    }
}

#[test]
fn a_product_without_rows_is_no_work() {
    let weights = vec![0u8; 4 * DType::Q4_K.row_bytes(256) * 8];
    for precision in PRECISIONS {
        let mut builder =
            Builder::new("test", Level::Portable, 2, Capacity { rows: 8, outputs: 8, kv_len: 8 });
        let mut out = vec![0.0; 8 * 4 * 8];
        let (x, ids) = (vec![0.0f32; 8 * 4 * 256], vec![0i32; 8 * 2]);
        let w = input(&weights, DType::Q4_K, Shape::fixed(&[4, 8, 256]));
        let rows = input(&x, DType::F32, Shape::rows(&[256]));
        let heads = input(&x, DType::F32, Shape::rows(&[4, 256]));
        let ids = input(&ids, DType::I32, Shape::rows(&[2]));
        let matrix = input(&weights, DType::Q4_K, Shape::fixed(&[8, 256]));
        matmul(&matrix, &rows, &output(&mut out, &[8]), precision, &mut builder);
        head_matmul(&w, &heads, &output(&mut out, &[4, 8]), precision, &mut builder);
        expert_matmul(&w, &rows, &ids, &output(&mut out, &[2, 8]), precision, &mut builder);
        let (phases, _memory) = builder.finish();
        let tasks = |rows| phases.iter().map(move |phase| phase.kernel.tasks(&step(rows)));
        assert!(tasks(1).all(|tasks| tasks > 0));
        // Ids are sorted all the same.
        assert!(tasks(0).sum::<usize>() <= 1, "{precision:?}: {:?}", tasks(0).collect::<Vec<_>>());
    }
}

#[test]
fn integer_products_are_the_same_bits_in_all_fused_instruction_sets() {
    if !(Level::Avx2.is_available() && Level::Avx512.is_available()) {
        println!("skipped: this processor lacks AVX2 or AVX-512");
        return;
    }
    for dtype in DType::WEIGHTS {
        // VNNI takes unsigned weights only; what that adds is subtracted in f32 for blocks of 32.
        if matches!(dtype, DType::Q8_0 | DType::IQ4_NL) {
            continue;
        }
        let case = Case { dtype, matrices: 1, m: 20, k: 512 };
        let (bytes, _) = case.weights();
        let x = numbers(8 * 512, 3);
        for rows in [1, 8] {
            let of = |level| product_of(level, &case, &bytes, &x, rows, Precision::Default);
            assert_eq!(of(Level::Avx2), of(Level::Avx512), "{dtype}, {rows} rows");
        }
    }
}

#[test]
fn heads_and_experts_meet_their_matrices() {
    let (matrices, m, k, rows, used) = (5, 18, 256, 11, 3);
    for dtype in [DType::F16, DType::Q8_0, DType::Q4_K] {
        let case = Case { dtype, matrices, m, k };
        let (bytes, _) = case.weights();
        let matrix_bytes = m * dtype.row_bytes(k);
        each_level(|level| {
            // Heads.
            let x = numbers(rows * matrices * k, 13);
            let mut out = vec![f32::NAN; rows * matrices * m];
            let w = input(&bytes, dtype, Shape::fixed(&[matrices, m, k]));
            let tx = input(&x, DType::F32, Shape::rows(&[matrices, k]));
            let ty = output(&mut out, &[matrices, m]);
            run(level, step(rows), |builder| head_matmul(&w, &tx, &ty, Precision::Default, builder));
            let alone = Case { dtype, matrices: 1, m, k };
            for index in 0..rows * matrices {
                let w = &bytes[index % matrices * matrix_bytes..][..matrix_bytes];
                let want = product_of(level, &alone, w, &x[index * k..][..k], 1, Precision::Default);
                assert_eq!(out[index * m..][..m], want, "head {index}");
            }
            // Experts, with a shared row and with one for each choice.
            let ids: Vec<i32> = (0..rows * used).map(|i| [0, 3, 4, 0, 3, 1, 0][i * 5 % 7]).collect();
            for shared in [true, false] {
                let x = numbers(rows * used * k, 17);
                let mut out = vec![f32::NAN; rows * used * m];
                let w = input(&bytes, dtype, Shape::fixed(&[matrices, m, k]));
                let tx =
                    input(&x, DType::F32, if shared { Shape::rows(&[k]) } else { Shape::rows(&[used, k]) });
                let ty = output(&mut out, &[used, m]);
                let shape = Shape::new(&[Extent::Rows, used.into()]);
                let ti = input(&ids, DType::I32, shape);
                run(level, step(rows), |builder| {
                    expert_matmul(&w, &tx, &ti, &ty, Precision::Default, builder)
                });
                for entry in 0..rows * used {
                    let w = &bytes[ids[entry] as usize * matrix_bytes..][..matrix_bytes];
                    let at = if shared { entry / used } else { entry };
                    let want = product_of(level, &alone, w, &x[at * k..][..k], 1, Precision::Default);
                    assert_eq!(out[entry * m..][..m], want, "entry {entry}, shared {shared}");
                }
            }
        });
    }
}
