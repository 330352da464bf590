//! `SUPPORT.md` says which operations run in which formats; it is written from what the device answers.

mod common;

use backend_api::{
    DType, Device, Extent, Gating, Op, OpDesc, OpKind, Precision, RopeAttributes, RouteAttributes, Shape,
    TensorDesc,
};
use backend_vulkan::VulkanOptions;
use std::{env, fs, path::Path};

/// An operation whose formatted operand (weight, table, cache) is in this format, if it may be.
fn sample(kind: OpKind, dtype: DType) -> Option<OpDesc> {
    let precision = Precision::Default;
    let rows = |rest: &[usize]| TensorDesc::new(DType::F32, Shape::rows(rest));
    let weight = |extents: &[usize]| TensorDesc::new(dtype, Shape::fixed(extents));
    let ids = |extents: &[Extent]| TensorDesc::new(DType::I32, Shape::new(extents));
    let (k, used) = (256, Extent::Fixed(2));
    let cache = matches!(dtype, DType::F32 | DType::F16 | DType::Q8_0);
    let plain = dtype == DType::F32;
    let (op, inputs) = match kind {
        OpKind::EmbedRows => (Op::EmbedRows, vec![weight(&[8, k]), ids(&[Extent::Rows])]),
        OpKind::MatMul => (Op::MatMul { precision }, vec![weight(&[8, k]), rows(&[k])]),
        OpKind::HeadMatMul => (Op::HeadMatMul { precision }, vec![weight(&[4, 8, k]), rows(&[4, k])]),
        OpKind::ExpertMatMul => {
            let inputs = vec![weight(&[4, 8, k]), rows(&[k]), ids(&[Extent::Rows, used])];
            (Op::ExpertMatMul { precision }, inputs)
        }
        OpKind::KvStore if cache => (Op::KvStore, vec![rows(&[96])]),
        OpKind::LatentAttention if cache => {
            (Op::LatentAttention { scale: 1.0, latent: 64 }, vec![rows(&[4, 96]), weight(&[16, 96])])
        }
        OpKind::Cast if matches!(dtype, DType::F32 | DType::F16) => {
            (Op::Cast { to: dtype }, vec![rows(&[k])])
        }
        OpKind::RmsNorm if plain => (Op::RmsNorm { eps: 1e-6 }, vec![rows(&[k]), weight(&[k])]),
        OpKind::Rope if plain => {
            let rope = RopeAttributes { inverse_frequencies: [1.0; 16].into(), magnitude: 1.0 };
            (Op::Rope(rope), vec![rows(&[4, 32])])
        }
        OpKind::Route if plain => {
            let route = RouteAttributes {
                used: 2,
                gating: Gating::Sigmoid,
                groups: 2,
                groups_used: 1,
                renormalise: true,
                scale: 1.0,
            };
            (Op::Route(route), vec![rows(&[8]), weight(&[8])])
        }
        OpKind::SwiGlu if plain => (Op::SwiGlu, vec![rows(&[k]), rows(&[k])]),
        OpKind::Add if plain => (Op::Add, vec![rows(&[k]), rows(&[k])]),
        OpKind::Concat if plain => (Op::Concat, vec![rows(&[k]), rows(&[4])]),
        OpKind::CombineExperts if plain => (Op::CombineExperts, vec![rows(&[2, k]), rows(&[2])]),
        OpKind::SelectRows if plain => (Op::SelectRows, vec![rows(&[k]), ids(&[Extent::Outputs])]),
        _ => return None,
    };
    let outputs = match kind {
        OpKind::KvStore => vec![weight(&[16, 96])],
        _ => op.infer(&inputs).expect("a well-formed sample"),
    };
    Some(OpDesc { op, inputs, outputs })
}

fn matrix(device: &dyn Device) -> String {
    let mut text = String::from(
        "# What the Vulkan device runs\n\nWritten by `tests/support.rs` from what the device answers: yes, or no, or nothing \
         where the operation has no operand of that format.\n\n| |",
    );
    let names: Vec<String> = DType::WEIGHTS.iter().map(|dtype| format!(" {dtype} |")).collect();
    text += &format!("{}\n|---|{}\n", names.concat(), "---|".repeat(names.len()));
    for kind in OpKind::ALL {
        text += &format!("| {kind} |");
        for dtype in DType::WEIGHTS {
            let answer = sample(kind, dtype).map(|desc| device.supports(&desc).is_ok());
            text += match answer {
                Some(true) => " yes |",
                Some(false) => " no |",
                None => " |",
            };
        }
        text += "\n";
    }
    text += "\nLimits: 1,024 experts; 4,096 latent elements; fewer than 2³² elements or bytes between neighbours of an axis.\n";
    text
}

#[test]
fn the_matrix_in_the_tree_is_true() {
    let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("SUPPORT.md");
    let found = matrix(&device);
    if env::var_os("FATHOM_UPDATE").is_some() {
        fs::write(&path, &found).expect("a writable checkout");
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == found,
        "SUPPORT.md is not what the device answers; run this test with FATHOM_UPDATE=1"
    );
}

#[test]
fn what_is_too_large_is_refused_with_the_limit() {
    let Some((_watch, device)) = common::open(VulkanOptions::default()) else { return };
    let precision = Precision::Default;
    let inputs = vec![
        TensorDesc::new(DType::F16, Shape::fixed(&[1025, 4, 32])),
        TensorDesc::new(DType::F32, Shape::rows(&[32])),
        TensorDesc::new(DType::I32, Shape::new(&[Extent::Rows, Extent::Fixed(2)])),
    ];
    let op = Op::ExpertMatMul { precision };
    let outputs = op.infer(&inputs).expect("well formed");
    let refused = device.supports(&OpDesc { op, inputs, outputs }).expect_err("too many").to_string();
    assert_eq!(refused, "vulkan0 cannot run ExpertMatMul: expected at most 1024 experts, found 1025");
}
