//! Every branch of the architecture, on random models, against arithmetic in f64 that goes another way.

mod common;

use backend_api::{DType, Discard};
use common::{Difference, engine, exact, random::Shape};
use model_deepseek::{CacheType, Engine, Model, Options, Wanted, source::Checkpoint};
use std::{path::Path, sync::Arc};

fn shapes() -> Vec<Shape> {
    let base = Shape::default;
    vec![
        base(),
        Shape { name: "legacy", legacy: true, ..base() },
        Shape { name: "legacy, quantised", legacy: true, dtype: DType::Q8_0, ..base() },
        Shape { name: "legacy, f32", legacy: true, dtype: DType::F32, ..base() },
        Shape {
            name: "lite",
            q_lora: 0,
            sigmoid: false,
            bias: false,
            renormalise: false,
            scale: 1.0,
            groups: 1,
            groups_used: 1,
            ..base()
        },
        Shape { name: "v2", sigmoid: false, bias: false, renormalise: false, scale: 16.0, ..base() },
        Shape { name: "no yarn", yarn: None, ..base() },
        Shape { name: "half the growth", yarn: Some((8.0, 32, 0.0707)), ..base() },
        Shape { name: "tied", tied: true, ..base() },
        Shape { name: "fused", fused: true, ..base() },
        Shape { name: "fused, quantised", fused: true, dtype: DType::Q8_0, ..base() },
        Shape { name: "no shared experts", shared: 0, ..base() },
        Shape { name: "no bias", bias: false, ..base() },
        Shape { name: "eight groups", groups: 8, groups_used: 3, used: 5, ..base() },
        Shape { name: "groups of one", groups: 16, groups_used: 5, used: 4, ..base() },
        Shape { name: "one head", heads: 1, ..base() },
        Shape { name: "seven heads", heads: 7, nope: 10, rope: 6, value: 5, kv_lora: 36, ..base() },
        Shape { name: "dense throughout", dense: 3, experts: 0, ..base() },
        Shape { name: "experts throughout", dense: 0, ..base() },
        Shape { name: "f32", dtype: DType::F32, d: 50, width: 33, expert_width: 21, q_lora: 19, ..base() },
    ]
}

#[test]
fn each_shape_computes_what_the_papers_say() {
    // Past the original contexts of YaRN.
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 96).collect();
    for shape in shapes() {
        let checkpoint = shape.file().checkpoint();
        let expected = shape.logits(&checkpoint, &tokens);
        let model = Model::new(checkpoint).unwrap_or_else(|error| panic!("{}: {error}", shape.name));
        assert!(model.notices().is_empty(), "{}: {:?}", shape.name, model.notices());
        let mut session = engine(&Arc::new(model), &exact()).session().unwrap();
        let mut found = Vec::new();
        let mut each = |_, logits: &[f32]| found.extend_from_slice(logits);
        session.feed_with(&tokens, Wanted::All, &mut each, &mut Discard).unwrap();
        let difference = Difference::of(&expected, &found, shape.vocabulary);
        println!("{}: {difference:?}", shape.name);
        assert!(difference.nmse < 1e-10, "{}: {difference:?}", shape.name);
        assert_eq!(difference.agreeing, difference.rows, "{}: {difference:?}", shape.name);
    }
}

/// Beside quantised weights, as by default: the median row is as far as 8-bit activations of experts and of the head take
/// it (3.1e-4 and 2.3e-5 at most), and so no further than where all else is rounded finely.
#[test]
fn each_shape_is_near_in_the_default_mode() {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 96).collect();
    for dtype in [DType::Q8_0, DType::Q4_0] {
        for shape in shapes().into_iter().map(|shape| Shape { dtype, ..shape }) {
            let checkpoint = shape.file().checkpoint();
            let expected = shape.logits(&checkpoint, &tokens);
            let model = Arc::new(Model::new(checkpoint).unwrap());
            let options = Options { cache: CacheType::F32, ..Options::default() };
            let mut session = engine(&model, &options).session().unwrap();
            let mut found = Vec::new();
            let mut each = |_, logits: &[f32]| found.extend_from_slice(logits);
            session.feed_with(&tokens, Wanted::All, &mut each, &mut Discard).unwrap();
            let median = Difference::of(&expected, &found, shape.vocabulary).median_row_nmse;
            let bound = if shape.experts > 0 { 6e-4 } else { 4e-5 };
            assert!(median > 0.0 && median < bound, "{}, {dtype}: {median:e}", shape.name);
        }
    }
}

/// The model of the default shape with one number of an F32 tensor replaced.
fn with_number(tensor: &str, index: usize, number: f32) -> Arc<Model> {
    let mut bytes = Shape::default().file().bytes();
    let name = Path::new("random.gguf");
    let start =
        Checkpoint::from_bytes(name, Arc::new(bytes.clone())).unwrap().load(tensor).unwrap().range.start;
    bytes[start + 4 * index..][..4].copy_from_slice(&number.to_le_bytes());
    Arc::new(Model::new(Checkpoint::from_bytes(name, Arc::new(bytes)).unwrap()).unwrap())
}

#[test]
fn a_bias_of_minus_infinity_closes_an_expert() {
    let logits = |bias: f32| {
        let model = with_number("blk.1.exp_probs_b.bias", 5, bias);
        let mut session = engine(&model, &exact()).session().unwrap();
        let mut bits = Vec::new();
        let mut each = |_, logits: &[f32]| bits.extend(logits.iter().map(|x| x.to_bits()));
        let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 96).collect();
        session.feed_with(&tokens, Wanted::All, &mut each, &mut Discard).unwrap();
        bits
    };
    let closed = logits(f32::NEG_INFINITY);
    assert_eq!(closed, logits(-1e30));
    // It was chosen now and then.
    assert_ne!(closed, logits(0.0));
}

#[test]
fn a_router_without_an_order_is_named() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for (tensor, index, number, expected) in [
        (
            "blk.1.exp_probs_b.bias",
            5,
            nan,
            "expected finite numbers, or -inf for experts that are closed, found NaN of expert 5",
        ),
        ("blk.2.exp_probs_b.bias", 15, inf, "found inf of expert 15"),
        ("blk.1.ffn_gate_inp.weight", 64 * 3 + 7, nan, "expected finite numbers, found NaN at 7 of row 3"),
        ("blk.2.ffn_gate_inp.weight", 64 * 16 - 1, -inf, "found -inf at 63 of row 15"),
    ] {
        let model = with_number(tensor, index, number);
        let error =
            Engine::new(&model, &common::cpu(), &Default::default(), &exact()).unwrap_err().to_string();
        assert!(
            error.contains(tensor) && error.contains("random.gguf") && error.contains(expected),
            "{error}"
        );
    }
}
