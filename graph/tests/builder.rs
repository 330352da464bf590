//! What a graph cannot be: each mistake names its node and what is wrong.

use backend_api::{DType, Extent, Precision, RopeAttributes, Shape, TensorDesc};
use graph::{BuildError, GraphBuilder, Problem, Value};

struct Parts {
    g: GraphBuilder,
    ids: Value,
    x: Value,
    matrix: Value,
    heads: Value,
    norm: Value,
    cache: Value,
    other: Value,
}

fn parts() -> Parts {
    let fixed = |extents: &[usize]| TensorDesc::new(DType::F32, Shape::fixed(extents));
    let mut g = GraphBuilder::new(Precision::Default);
    let ids = g.input("ids", TensorDesc::new(DType::I32, Shape::rows(&[])));
    let table = g.weight("table", fixed(&[10, 8]));
    let x = g.embed_rows("embed", table, ids).expect("a node");
    let matrix = g.weight("matrix", fixed(&[6, 8]));
    let heads = g.weight("heads", fixed(&[2, 3, 4]));
    let norm = g.weight("norm", fixed(&[8]));
    let cache = g.state("cache", fixed(&[32, 8]));
    let other = g.state("other", fixed(&[32, 8]));
    Parts { g, ids, x, matrix, heads, norm, cache, other }
}

#[test]
fn a_mistake_names_its_node_and_itself() {
    type Make = fn(&mut Parts) -> Result<Value, BuildError>;
    let table: &[(Make, &str)] = &[
        (
            |p| p.g.matmul("n", p.x, p.matrix),
            "n: MatMul: input 0: expected a weight of 2 fixed extents, rows of whole blocks, found F32[rows, 8]",
        ),
        (
            |p| p.g.matmul("n", p.heads, p.x),
            "n: MatMul: input 0: expected a weight of 2 fixed extents, rows of whole blocks, found F32[2, 3, 4]",
        ),
        (|p| p.g.rms_norm("n", p.x, p.matrix, 1e-6), "n: RmsNorm: input 1: expected F32[8], found F32[6, 8]"),
        (|p| p.g.rms_norm("n", p.x, p.norm, f32::NAN), "n: RmsNorm: eps NaN is not finite and positive"),
        (
            |p| p.g.add("n", p.x, p.ids),
            "n: Add: input 1: expected F32 of 2 to 4 extents, all but the outermost fixed, found I32[rows]",
        ),
        (
            |p| p.g.head_matmul("n", p.heads, p.x),
            "n: HeadMatMul: input 1: expected F32 of 3 extents, all but the outermost fixed, found F32[rows, 8]",
        ),
        (
            |p| p.g.select_rows("n", p.x, p.x),
            "n: SelectRows: input 1: expected dense I32 of 1 extents, found F32[rows, 8]",
        ),
        (
            |p| {
                let rope = RopeAttributes { inverse_frequencies: vec![1.0].into(), magnitude: 1.0 };
                p.g.rope("n", p.x, &rope)
            },
            "n: Rope: twice the frequencies differ: 2 and 8",
        ),
        (|p| p.g.cast("n", p.x, DType::Q8_0), "n: Cast: F32 to Q8_0 is no cast"),
        (|p| p.g.add("embed", p.x, p.x), "embed: the name is already that of another node"),
        (|p| p.g.slice(p.x, 2, 0..1), "embed: slice along axis 2 of [rows, 8]"),
        (
            |p| p.g.slice(p.x, 0, 0..1),
            "embed: slice along axis 0 of [rows, 8], which varies from step to step",
        ),
        (|p| p.g.slice(p.x, 1, 4..9), "embed: slice 4..9 of axis 1 of [rows, 8]"),
        (|p| p.g.slice(p.x, 1, 3..3), "embed: slice 3..3 of axis 1 of [rows, 8]"),
        (
            |p| p.g.reshape(p.x, &[Extent::Rows, 3.into(), 3.into()]),
            "embed: reshape of [rows, 8] to [rows, 3, 3]: the numbers of elements differ",
        ),
        (
            |p| p.g.reshape(p.x, &[Extent::Outputs, 8.into()]),
            "embed: reshape of [rows, 8] to [outputs, 8]: the numbers of elements differ",
        ),
        (|p| p.g.reshape(p.x, &[]), "embed: reshape of [rows, 8] to 0 extents"),
        (|p| p.g.slice(p.cache, 1, 0..4), "cache: slice of a state"),
        (
            |p| {
                let s = p.g.slice(p.matrix, 1, 0..4)?;
                p.g.reshape(s, &[24.into()])
            },
            "matrix: reshape of [6, 4] to [24]: the elements do not lie in one piece",
        ),
        (|p| p.g.region(p.x).kv_store("n", p.x), "n: a region needs a state, found the activation embed"),
        (
            |p| p.g.region(p.cache).attention("n", p.x, p.cache, 1.0, 8),
            "n: LatentAttention: input 0: expected F32 of 3 extents, all but the outermost fixed, found F32[rows, 8]",
        ),
        (
            |p| {
                let q = p.g.reshape(p.x, &[Extent::Rows, 1.into(), 8.into()])?;
                p.g.region(p.cache).attention("n", q, p.other, 1.0, 8)
            },
            "n: the state other is read only by nodes made through its region",
        ),
        (
            |p| p.g.cast("n", p.cache, DType::F16),
            "n: the state cache is read only by nodes made through its region",
        ),
        (
            |p| {
                let y = p.g.matmul("y", p.matrix, p.x)?;
                p.g.region(p.cache).kv_store("n", y)
            },
            "n: KvStore: inner extents differ: 6 and 8",
        ),
        (
            |p| {
                let d = TensorDesc::new(DType::F32, Shape::fixed(&[1]));
                p.g.weight("matrix", d);
                p.g.add("n", p.x, p.x)
            },
            "matrix: the name is already that of another weight",
        ),
        (
            |p| {
                let d = TensorDesc::new(DType::F32, Shape::fixed(&[32, 8]));
                p.g.state("cache", d);
                p.g.add("n", p.x, p.x)
            },
            "cache: the name is already that of another state",
        ),
    ];
    for (make, expected) in table {
        let error = make(&mut parts()).expect_err(expected);
        assert_eq!(error.to_string(), *expected);
    }
}

#[test]
fn a_leaf_that_cannot_be_is_told_at_the_next_node() {
    type Declare = fn(&mut GraphBuilder) -> Value;
    let table: &[(Declare, &str)] = &[
        (
            |g| g.weight("w", TensorDesc::new(DType::F32, Shape::fixed(&[1 << 23, 1 << 22]))),
            "w: expected at most 70368744177664 bytes, found F32[8388608, 4194304]",
        ),
        (
            |g| g.input("i", TensorDesc::new(DType::F32, Shape::rows(&[1 << 30]))),
            "i: expected at most 2147483648 bytes, found F32[rows, 1073741824]",
        ),
        (
            |g| g.weight("w", TensorDesc::new(DType::F32, Shape::rows(&[8]))),
            "w: expected fixed extents, found [rows, 8]",
        ),
        (
            |g| g.state("s", TensorDesc::new(DType::F32, Shape::rows(&[8]))),
            "s: expected fixed extents, found [rows, 8]",
        ),
        (
            |g| {
                let mut desc = TensorDesc::new(DType::F32, Shape::fixed(&[2, 8]));
                desc.strides[0] = 64;
                g.weight("w", desc)
            },
            "w: expected a dense tensor, found F32[2, 8] strides [64]",
        ),
    ];
    for (declare, expected) in table {
        let Parts { mut g, x, .. } = parts();
        declare(&mut g);
        assert_eq!(g.add("n", x, x).expect_err(expected).to_string(), *expected);
        let mut g = GraphBuilder::new(Precision::Default);
        declare(&mut g);
        assert_eq!(g.finish().expect_err(expected).to_string(), *expected);
    }
}

#[test]
fn outputs_are_whole_results() {
    let fails = |declare: fn(&mut Parts), expected: &str| {
        let mut parts = parts();
        declare(&mut parts);
        assert_eq!(parts.g.finish().expect_err(expected).to_string(), expected);
    };
    let dense = "an output must be a node's whole result, dense";
    fails(|p| p.g.output("o", p.matrix), &format!("o: {dense}: found the weight matrix"));
    fails(|p| p.g.output("o", p.ids), &format!("o: {dense}: found the input ids"));
    fails(
        |p| {
            let part = p.g.slice(p.x, 1, 0..4).expect("a view");
            p.g.output("o", part);
        },
        &format!("o: {dense}: found F32[rows, 4] strides [32] of embed"),
    );
    fails(
        |p| {
            p.g.output("o", p.x);
            p.g.output("o", p.x);
        },
        "o: the name is already that of another output",
    );
}

#[test]
fn a_value_of_another_graph_is_foreign() {
    let many = {
        let mut p = parts();
        for i in 0..20 {
            p.x = p.g.add(&format!("n{i}"), p.x, p.x).expect("a node");
        }
        p.x
    };
    let mut p = parts();
    let error = p.g.add("n", p.x, many).unwrap_err();
    assert_eq!(error, BuildError { node: "n".to_owned(), problem: Problem::Foreign(many.index()) });
    assert!(p.g.slice(many, 0, 0..1).is_err() && p.g.region(many).kv_store("n", p.x).is_err());
}

#[test]
fn a_weight_asked_for_twice_is_one() {
    let mut p = parts();
    let again = p.g.weight("matrix", *p.g.desc(p.matrix));
    assert_eq!(again, p.matrix);
}

#[test]
fn views_cost_nothing() {
    let mut p = parts();
    let heads = p.g.reshape(p.x, &[Extent::Rows, 2.into(), 4.into()]).expect("a view");
    let part = p.g.slice(heads, 2, 1..3).expect("a view");
    p.g.output("x", p.x);
    let graph = p.g.finish().expect("a graph");
    assert_eq!(graph.nodes().len(), 1);
    let info = graph.info(part);
    assert_eq!((info.storage, info.offset), (graph.info(p.x).storage, 4));
    assert_eq!(format!("{:?}", info.desc), "F32[rows, 2, 2] strides [32, 16]");
}
