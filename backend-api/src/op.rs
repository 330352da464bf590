//! The operations of a graph: few, and in the words of the DeepSeek papers.
//!
//! [`Op::infer`] gives the outputs of an operation on given inputs and checks everything that can be checked
//! without data; [`OpDesc::check`] does so for a whole description.

use crate::{DType, Extent, OpError, Shape, TensorDesc};
use std::{fmt, sync::Arc};

/// How a matrix product treats its activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Beside a quantised weight activations are rounded to 8 bits, with a scale for at most 32 values (beside
    /// formats of 32-value blocks) or 256 (beside K-quants and IQ4_XS); devices may be finer. What is not finite
    /// makes every output of its row NaN. Beside a float weight activations stay f32.
    #[default]
    Default,
    /// As the default, but what the rounding leaves is rounded to 8 bits once more and added: about 16 bits. Devices
    /// may be finer.
    Fine,
    /// Weights are decoded on the fly; nothing is rounded below f32.
    F32,
}

/// Rotary position embedding (RoFormer, arXiv 2104.09864) of interleaved pairs: elements `2i` and `2i + 1` turn
/// by `position × inverse_frequencies[i]`. YaRN (arXiv 2309.00071) is already in the frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeAttributes {
    /// Radians per position of each pair; half as many as the input's innermost extent. f64, because a product
    /// with a large position loses whole fractions of a radian in f32.
    pub inverse_frequencies: Arc<[f64]>,
    /// Factor on cosine and sine (YaRN's attention factor; 1 for DeepSeek).
    pub magnitude: f32,
}

/// How expert scores become probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gating {
    /// Softmax over all experts (DeepSeek-V2).
    Softmax,
    /// Sigmoid of each (DeepSeek-V3).
    Sigmoid,
}

/// Choosing experts (DeepSeek-V2, arXiv 2405.04434, and V3, arXiv 2412.19437).
///
/// 1. `p` = gating(scores).
/// 2. `s` = p + bias.
/// 3. With `groups > 1`: the score of a group of neighbouring experts is the sum of its two largest `s` (the
///    largest, where a group has one expert); experts outside of the best `groups_used` groups are not chosen.
/// 4. The `used` experts with the largest `s` are chosen, in falling order. Ties, of groups too, go to the lower
///    index.
/// 5. Their weights are their `p`,
/// 6. divided by their sum (at least 2⁻¹⁴) if `renormalise`,
/// 7. times `scale`.
///
/// A bias of −∞ closes an expert: its `s` is [`CLOSED`](RouteAttributes::CLOSED), so that it is chosen only where
/// too few others are left, and then has its weight. Where a row has an `s` that is NaN or +∞ there is no order to choose
/// in: its experts are the first `used`, and their weights NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteAttributes {
    /// Experts chosen for each row.
    pub used: usize,
    /// Scores to probabilities.
    pub gating: Gating,
    /// Groups of experts; 1 for no grouping. Divides the number of experts.
    pub groups: usize,
    /// Groups that may be chosen from.
    pub groups_used: usize,
    /// Whether the weights of the chosen are made to sum to 1 before scaling.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

impl RouteAttributes {
    /// The `s` of an expert whose bias is −∞, −2¹²⁶: below all others, and two of them sum to a finite score of a
    /// group.
    pub const CLOSED: f32 = -f32::from_bits(0x7e80_0000);
}

/// What to compute. Activations are F32 unless stated; `…` stands for the extents of the input it follows.
/// Activations may be strided views; weights may be strided between their rows; outputs are dense, except where
/// stated.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// `(table [vocab, d] any format, ids [n] I32) → [n, d]`: rows of a table, decoded. Ids out of range, here and wherever
    /// there are ids, are the caller's fault: what comes out is an error or anything, but of no memory outside.
    EmbedRows,
    /// `(x […, d], weight [d] F32) → […, d]`: `x / sqrt(mean(x²) + eps) × weight`.
    RmsNorm {
        /// Added to the mean of squares.
        eps: f32,
    },
    /// `(w [m, k] any format, x [n, k]) → [n, m]`: each output is the dot product of a row of `w` and a row of
    /// `x`.
    MatMul {
        /// Treatment of the activations.
        precision: Precision,
    },
    /// `(w [heads, m, k] any format, x [n, heads, k]) → [n, heads, m]`: one small matrix for each head. The
    /// absorbed products of MLA (`q_absorb`, `v_absorb`).
    HeadMatMul {
        /// Treatment of the activations.
        precision: Precision,
    },
    /// `(x [rows, …, r]) → [rows, …, r]`: row `i` is at position `past + i`.
    Rope(RopeAttributes),
    /// `(row [rows, width]) → (cache [capacity, width] F32, F16 or Q8_0)`: writes rows `past .. past + rows` of
    /// the state. The output *is* the state, whose other rows keep their values. A Q8_0 cache rounds as
    /// [`format::encode`](crate::format::encode) does; its row is padded with zeros to whole blocks.
    KvStore,
    /// `(q [rows, heads, width], cache [capacity, width]) → [rows, heads, latent]`: softmax attention of each
    /// head over the cached rows up to and including its own position. Keys are whole cache rows; values are
    /// their first `latent` elements (MLA's latent cache, DeepSeek-V2, section 2.1).
    LatentAttention {
        /// Factor on the scores.
        scale: f32,
        /// Elements of a cache row that are the value.
        latent: usize,
    },
    /// `(scores [rows, experts], bias [experts] F32, optional) → (ids [rows, used] I32, weights [rows, used])`.
    Route(RouteAttributes),
    /// `(w [experts, m, k] any format, x [rows, k] or [rows, used, k], ids [rows, used] I32) → [rows, used, m]`:
    /// for each row and chosen expert, that expert's matrix times the row (or the row's vector for this choice).
    ExpertMatMul {
        /// Treatment of the activations.
        precision: Precision,
    },
    /// `(gate […, n], up […, n]) → […, n]`: `gate / (1 + exp(-gate)) × up` (arXiv 2002.05202).
    SwiGlu,
    /// `(y [rows, used, d], weights [rows, used]) → [rows, d]`: the weighted sum of the experts' outputs, in the
    /// order of the choices.
    CombineExperts,
    /// `(a, b) → a + b`, of equal shapes.
    Add,
    /// `(a […, m], b […, n]) → […, m + n]`.
    Concat,
    /// `(x [n, …], ids [outputs] I32) → [outputs, …]`.
    SelectRows,
    /// `(x F32 or F16) → F32 or F16`, rounded to nearest, ties to even.
    Cast {
        /// Format of the output.
        to: DType,
    },
}

/// The name of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are documented at `Op`")]
pub enum OpKind {
    EmbedRows,
    RmsNorm,
    MatMul,
    HeadMatMul,
    Rope,
    KvStore,
    LatentAttention,
    Route,
    ExpertMatMul,
    SwiGlu,
    CombineExperts,
    Add,
    Concat,
    SelectRows,
    Cast,
}

impl OpKind {
    /// All of them.
    pub const ALL: [OpKind; 15] = [
        OpKind::EmbedRows,
        OpKind::RmsNorm,
        OpKind::MatMul,
        OpKind::HeadMatMul,
        OpKind::Rope,
        OpKind::KvStore,
        OpKind::LatentAttention,
        OpKind::Route,
        OpKind::ExpertMatMul,
        OpKind::SwiGlu,
        OpKind::CombineExperts,
        OpKind::Add,
        OpKind::Concat,
        OpKind::SelectRows,
        OpKind::Cast,
    ];
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// An operation with the tensors it is applied to.
#[derive(Clone, Debug, PartialEq)]
pub struct OpDesc {
    /// What to compute.
    pub op: Op,
    /// Inputs in the order that [`Op`] documents.
    pub inputs: Vec<TensorDesc>,
    /// Outputs, likewise.
    pub outputs: Vec<TensorDesc>,
}

impl OpDesc {
    /// Checks attributes, inputs and outputs against each other.
    ///
    /// # Errors
    /// The first thing that does not fit, with what was expected and found.
    pub fn check(&self) -> Result<(), OpError> {
        let kind = self.op.kind();
        if self.op == Op::KvStore {
            return check_store(&self.inputs, &self.outputs);
        }
        let expected = self.op.infer(&self.inputs)?;
        if expected.len() != self.outputs.len() {
            let found = self.outputs.len();
            return Err(OpError::new(kind, format!("expected {} outputs, found {found}", expected.len())));
        }
        for (index, (want, found)) in expected.iter().zip(&self.outputs).enumerate() {
            if (want.dtype, want.shape) != (found.dtype, found.shape) || !found.is_dense() {
                let problem = format!("output {index}: expected {want:?}, found {found:?}");
                return Err(OpError::new(kind, problem));
            }
        }
        Ok(())
    }
}

impl Op {
    /// The operation's name.
    pub fn kind(&self) -> OpKind {
        match self {
            Op::EmbedRows => OpKind::EmbedRows,
            Op::RmsNorm { .. } => OpKind::RmsNorm,
            Op::MatMul { .. } => OpKind::MatMul,
            Op::HeadMatMul { .. } => OpKind::HeadMatMul,
            Op::Rope(_) => OpKind::Rope,
            Op::KvStore => OpKind::KvStore,
            Op::LatentAttention { .. } => OpKind::LatentAttention,
            Op::Route(_) => OpKind::Route,
            Op::ExpertMatMul { .. } => OpKind::ExpertMatMul,
            Op::SwiGlu => OpKind::SwiGlu,
            Op::CombineExperts => OpKind::CombineExperts,
            Op::Add => OpKind::Add,
            Op::Concat => OpKind::Concat,
            Op::SelectRows => OpKind::SelectRows,
            Op::Cast { .. } => OpKind::Cast,
        }
    }

    /// The outputs of this operation on `inputs`: formats, shapes, and dense strides.
    ///
    /// [`Op::KvStore`] has none of its own (its output is a state that exists already): the result is empty.
    ///
    /// # Errors
    /// What does not fit, with what was expected and found.
    pub fn infer(&self, inputs: &[TensorDesc]) -> Result<Vec<TensorDesc>, OpError> {
        let check = Check { kind: self.kind(), role: "input", operands: inputs };
        match self {
            Op::EmbedRows => {
                check.count(2..=2)?;
                let table = check.matrix(0)?;
                let ids = check.ids(1, 1)?;
                Ok(vec![f32(&[ids.shape.extents()[0], table.shape.inner().into()])])
            }
            Op::RmsNorm { eps } => {
                check.count(2..=2)?;
                check.that(eps.is_finite() && *eps >= 0.0, || {
                    format!("eps {eps} is not finite and positive")
                })?;
                let x = check.activation(0, None)?;
                check.exactly(1, DType::F32, Shape::fixed(&[x.shape.inner()]))?;
                Ok(vec![f32(x.shape.extents())])
            }
            Op::MatMul { .. } => {
                check.count(2..=2)?;
                let w = check.matrix(0)?;
                let x = check.activation(1, Some(2))?;
                check.same("inner extents", w.shape.inner(), x.shape.inner())?;
                Ok(vec![f32(&[x.shape.extents()[0], w.shape.extents()[0]])])
            }
            Op::HeadMatMul { .. } => {
                check.count(2..=2)?;
                let w = check.weight(0, 3)?;
                let x = check.activation(1, Some(3))?;
                check.same("inner extents", w.shape.inner(), x.shape.inner())?;
                let (we, xe) = (w.shape.extents(), x.shape.extents());
                check.same("heads", we[0], xe[1])?;
                Ok(vec![f32(&[xe[0], xe[1], we[1]])])
            }
            Op::Rope(rope) => {
                check.count(1..=1)?;
                let x = check.activation(0, None)?;
                check.same("twice the frequencies", 2 * rope.inverse_frequencies.len(), x.shape.inner())?;
                check.same("the outer extent", Extent::Rows, x.shape.extents()[0])?;
                Ok(vec![f32(x.shape.extents())])
            }
            Op::KvStore => {
                check.count(1..=1)?;
                check.activation(0, Some(2))?;
                Ok(Vec::new())
            }
            Op::LatentAttention { latent, scale } => {
                check.count(2..=2)?;
                let q = check.activation(0, Some(3))?;
                let cache = check.cache(1)?;
                check.same("inner extents", q.shape.inner(), cache.shape.inner())?;
                check.same("the outer extent of q", Extent::Rows, q.shape.extents()[0])?;
                check.that(scale.is_finite(), || format!("scale {scale} is not finite"))?;
                check.that((1..=q.shape.inner()).contains(latent), || {
                    format!("latent {latent} is not in 1..={}", q.shape.inner())
                })?;
                Ok(vec![f32(&[q.shape.extents()[0], q.shape.extents()[1], (*latent).into()])])
            }
            Op::Route(route) => {
                check.count(1..=2)?;
                let scores = check.activation(0, Some(2))?;
                let experts = scores.shape.inner();
                if inputs.len() == 2 {
                    check.exactly(1, DType::F32, Shape::fixed(&[experts]))?;
                }
                let RouteAttributes { used, groups, groups_used, .. } = *route;
                check.that(groups >= 1 && experts.is_multiple_of(groups), || {
                    format!("{groups} groups do not divide {experts} experts")
                })?;
                check.that((1..=groups).contains(&groups_used), || {
                    format!("{groups_used} groups used is not in 1..={groups}")
                })?;
                let candidates = experts / groups * groups_used;
                check.that((1..=candidates).contains(&used), || {
                    format!("{used} experts used is not in 1..={candidates}")
                })?;
                let extents = [scores.shape.extents()[0], used.into()];
                Ok(vec![TensorDesc::new(DType::I32, Shape::new(&extents)), f32(&extents)])
            }
            Op::ExpertMatMul { .. } => {
                check.count(3..=3)?;
                let w = check.weight(0, 3)?;
                let x = check.activation(1, None)?;
                let ids = check.ids(2, 2)?;
                check.same("inner extents", w.shape.inner(), x.shape.inner())?;
                let (we, xe, ie) = (w.shape.extents(), x.shape.extents(), ids.shape.extents());
                check.same("rows", xe[0], ie[0])?;
                match xe.len() {
                    2 => {}
                    3 => check.same("choices", xe[1], ie[1])?,
                    _ => return Err(check.wrong(1, "[rows, k] or [rows, used, k]", x)),
                }
                Ok(vec![f32(&[ie[0], ie[1], we[1]])])
            }
            Op::SwiGlu | Op::Add => {
                check.count(2..=2)?;
                let (a, b) = (check.activation(0, None)?, check.activation(1, None)?);
                check.same("shapes", a.shape, b.shape)?;
                Ok(vec![f32(a.shape.extents())])
            }
            Op::CombineExperts => {
                check.count(2..=2)?;
                let (y, weights) = (check.activation(0, Some(3))?, check.activation(1, Some(2))?);
                check.same("[rows, used]", &y.shape.extents()[..2], weights.shape.extents())?;
                Ok(vec![f32(&[y.shape.extents()[0], y.shape.extents()[2]])])
            }
            Op::Concat => {
                check.count(2..=2)?;
                let (a, b) = (check.activation(0, None)?, check.activation(1, None)?);
                let outer = a.shape.rank() - 1;
                check.same("ranks", a.shape.rank(), b.shape.rank())?;
                check.same("outer extents", &a.shape.extents()[..outer], &b.shape.extents()[..outer])?;
                let mut extents = a.shape.extents().to_vec();
                extents[outer] = a.shape.inner().saturating_add(b.shape.inner()).into();
                Ok(vec![f32(&extents)])
            }
            Op::SelectRows => {
                check.count(2..=2)?;
                let x = check.activation(0, None)?;
                let ids = check.ids(1, 1)?;
                let mut extents = x.shape.extents().to_vec();
                extents[0] = ids.shape.extents()[0];
                Ok(vec![f32(&extents)])
            }
            Op::Cast { to } => {
                check.count(1..=1)?;
                let x = &inputs[0];
                let float = |dtype| matches!(dtype, DType::F32 | DType::F16);
                check.that(float(x.dtype) && float(*to), || format!("{} to {to} is no cast", x.dtype))?;
                if x.shape.inner() == 0 || !x.shape.is_fixed_inside() {
                    let expected = "extents all but the outermost fixed, the innermost not 0";
                    return Err(check.wrong(0, expected, x));
                }
                Ok(vec![TensorDesc::new(*to, x.shape)])
            }
        }
    }
}

fn f32(extents: &[Extent]) -> TensorDesc {
    TensorDesc::new(DType::F32, Shape::new(extents))
}

fn check_store(inputs: &[TensorDesc], outputs: &[TensorDesc]) -> Result<(), OpError> {
    let kind = OpKind::KvStore;
    Op::KvStore.infer(inputs)?;
    let check = Check { kind, role: "output", operands: outputs };
    check.count(1..=1)?;
    let cache = check.cache(0)?;
    check.same("the outer extent of the row", Extent::Rows, inputs[0].shape.extents()[0])?;
    check.same("inner extents", inputs[0].shape.inner(), cache.shape.inner())
}

/// Checks with the operation's name on every error.
struct Check<'a> {
    kind: OpKind,
    /// What is checked: `input` or `output`.
    role: &'static str,
    operands: &'a [TensorDesc],
}

impl Check<'_> {
    fn that(&self, holds: bool, problem: impl FnOnce() -> String) -> Result<(), OpError> {
        if holds { Ok(()) } else { Err(OpError::new(self.kind, problem())) }
    }

    fn same<T: PartialEq + fmt::Debug>(&self, what: &str, a: T, b: T) -> Result<(), OpError> {
        self.that(a == b, || format!("{what} differ: {a:?} and {b:?}"))
    }

    fn count(&self, expected: std::ops::RangeInclusive<usize>) -> Result<(), OpError> {
        let found = self.operands.len();
        self.that(expected.contains(&found), || {
            let (least, most, role) = (expected.start(), expected.end(), self.role);
            let expected = if least == most { least.to_string() } else { format!("{least} to {most}") };
            format!("expected {expected} {role}s, found {found}")
        })
    }

    fn wrong(&self, index: usize, expected: &str, found: &TensorDesc) -> OpError {
        let role = self.role;
        OpError::new(self.kind, format!("{role} {index}: expected {expected}, found {found:?}"))
    }

    fn exactly(&self, index: usize, dtype: DType, shape: Shape) -> Result<(), OpError> {
        let found = &self.operands[index];
        if (found.dtype, found.shape) == (dtype, shape) && found.is_dense() {
            return Ok(());
        }
        Err(self.wrong(index, &format!("{dtype}{shape}"), found))
    }

    /// F32, of this rank or any; all extents but the outermost fixed, the innermost not 0; strides of whole f32.
    fn activation(&self, index: usize, rank: Option<usize>) -> Result<&TensorDesc, OpError> {
        let x = &self.operands[index];
        let fits = x.dtype == DType::F32
            && rank.is_none_or(|r| r == x.shape.rank())
            && x.shape.rank() >= 2
            && x.shape.inner() > 0
            && x.shape.is_fixed_inside()
            && x.strides.iter().all(|s| s.is_multiple_of(4));
        if fits {
            return Ok(x);
        }
        let expected = match rank {
            Some(rank) => format!("F32 of {rank} extents, all but the outermost fixed"),
            None => "F32 of 2 to 4 extents, all but the outermost fixed".to_owned(),
        };
        Err(self.wrong(index, &expected, x))
    }

    /// A number format of this rank, all extents fixed and not 0, whole blocks in a row.
    fn weight(&self, index: usize, rank: usize) -> Result<&TensorDesc, OpError> {
        let w = &self.operands[index];
        let fits = w.dtype != DType::I32
            && w.shape.rank() == rank
            && w.shape.fixed_elements().is_some_and(|n| n > 0)
            && w.shape.inner().is_multiple_of(w.dtype.block_len());
        if fits {
            return Ok(w);
        }
        let expected = format!("a weight of {rank} fixed extents, rows of whole blocks");
        Err(self.wrong(index, &expected, w))
    }

    fn matrix(&self, index: usize) -> Result<&TensorDesc, OpError> {
        self.weight(index, 2)
    }

    fn cache(&self, index: usize) -> Result<&TensorDesc, OpError> {
        let cache = &self.operands[index];
        let fits = matches!(cache.dtype, DType::F32 | DType::F16 | DType::Q8_0)
            && cache.shape.rank() == 2
            && cache.shape.fixed_elements().is_some_and(|n| n > 0)
            && cache.is_dense();
        if fits {
            return Ok(cache);
        }
        Err(self.wrong(index, "a dense cache [capacity, width] in F32, F16 or Q8_0", cache))
    }

    fn ids(&self, index: usize, rank: usize) -> Result<&TensorDesc, OpError> {
        let ids = &self.operands[index];
        if ids.dtype == DType::I32 && ids.shape.rank() == rank && ids.is_dense() {
            return Ok(ids);
        }
        Err(self.wrong(index, &format!("dense I32 of {rank} extents"), ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: DType, extents: &[Extent]) -> TensorDesc {
        TensorDesc { dtype, shape: Shape::new(extents), strides: [0; Shape::MAX_RANK] }
    }

    fn refused(op: Op, inputs: &[TensorDesc]) -> String {
        op.infer(inputs).expect_err("it does not fit").to_string()
    }

    #[test]
    fn extents_inside_are_fixed() {
        let (rows, two, eight) = (Extent::Rows, Extent::Fixed(2), Extent::Fixed(8));
        let x = tensor(DType::F32, &[two, rows, eight]);
        let w = tensor(DType::F32, &[two, two, eight]);
        let precision = Precision::Default;
        let (rope, scale) = ([0.5; 4].into(), 1.0);
        let cache = TensorDesc::new(DType::F32, Shape::fixed(&[8, 8]));
        let cases = [
            (Op::Add, vec![x, x]),
            (Op::SwiGlu, vec![x, x]),
            (Op::Concat, vec![x, x]),
            (Op::RmsNorm { eps: 0.0 }, vec![x, tensor(DType::F32, &[eight])]),
            (Op::HeadMatMul { precision }, vec![w, x]),
            (Op::Rope(RopeAttributes { inverse_frequencies: rope, magnitude: 1.0 }), vec![x]),
            (Op::LatentAttention { scale, latent: 8 }, vec![tensor(DType::F32, &[rows, rows, eight]), cache]),
            (Op::SelectRows, vec![x, tensor(DType::I32, &[rows])]),
            (Op::CombineExperts, vec![x, tensor(DType::F32, &[two, rows])]),
            (Op::Cast { to: DType::F16 }, vec![x]),
        ];
        for (op, inputs) in cases {
            let error = refused(op, &inputs);
            assert!(error.contains("all but the outermost fixed"), "{error}");
        }
        let row = tensor(DType::F32, &[rows, eight]);
        let ids = tensor(DType::I32, &[rows, rows]);
        let error = refused(Op::ExpertMatMul { precision }, &[w, row, ids]);
        assert!(error.contains("expected dense I32 of 2 extents, found I32[rows, rows]"), "{error}");
    }

    #[test]
    fn a_cast_has_something_to_cast() {
        for extents in [&[Extent::Rows, Extent::Fixed(0)][..], &[Extent::Fixed(0)], &[Extent::Rows]] {
            let error = refused(Op::Cast { to: DType::F32 }, &[tensor(DType::F16, extents)]);
            assert!(error.contains("the innermost not 0"), "{error}");
        }
        Op::Cast { to: DType::F32 }.infer(&[tensor(DType::F16, &[Extent::Fixed(1)])]).expect("it fits");
    }
}
