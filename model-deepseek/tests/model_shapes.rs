//! Every branch of the architecture, on random models, against arithmetic in f64 that goes another way.

mod common;

use backend_api::{DType, Discard};
use common::{Difference, engine, exact, random::Shape};
use model_deepseek::{Model, Wanted};
use std::sync::Arc;

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
