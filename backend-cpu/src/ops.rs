//! Which operations the device runs, and the kernels of each.

use crate::{
    builder::Builder,
    kernels::{attention, combine, elementwise, matmul, norm, rope, route, rows},
    tensor::Tensor,
};
use backend_api::{Extent, Op, OpDesc};

/// Whether [`build`] has kernels for an operation that passes [`OpDesc::check`].
///
/// # Errors
/// The reason why not.
pub(crate) fn supports(op: &OpDesc) -> Result<(), String> {
    let tensors = op.inputs.iter().chain(&op.outputs);
    for desc in tensors {
        let symbolic = |extent: &Extent| extent.fixed().is_none();
        // Rank 1 is for ids, which kernels read one by one, and for the numbers of a row.
        let (from, what) = match desc.shape.rank() {
            1 if desc.dtype == backend_api::DType::I32 => continue,
            1 => (0, "a row"),
            _ => (1, "every extent but the outermost"),
        };
        if desc.shape.extents()[from..].iter().any(symbolic) {
            return Err(format!("{desc:?}: {what} must be of fixed length"));
        }
    }
    Ok(())
}

/// Appends the kernels of a supported operation.
pub(crate) fn build(op: &Op, inputs: &[Tensor], outputs: &[Tensor], builder: &mut Builder) {
    match op {
        Op::EmbedRows => rows::embed_rows(inputs, outputs, builder),
        Op::RmsNorm { eps } => norm::rms_norm(*eps, inputs, outputs, builder),
        Op::Rope(attributes) => rope::rope(attributes, inputs, outputs, builder),
        Op::KvStore => rows::kv_store(inputs, outputs, builder),
        Op::Route(attributes) => route::route(*attributes, inputs, outputs, builder),
        Op::SwiGlu => elementwise::swi_glu(inputs, outputs, builder),
        Op::CombineExperts => combine::combine_experts(inputs, outputs, builder),
        Op::Add => elementwise::add(inputs, outputs, builder),
        Op::Concat => rows::concat(inputs, outputs, builder),
        Op::SelectRows => rows::select_rows(inputs, outputs, builder),
        Op::Cast { .. } => rows::cast(inputs, outputs, builder),
        Op::MatMul { precision } => matmul::matmul(&inputs[0], &inputs[1], &outputs[0], *precision, builder),
        Op::HeadMatMul { precision } => {
            matmul::head_matmul(&inputs[0], &inputs[1], &outputs[0], *precision, builder);
        }
        Op::ExpertMatMul { precision } => {
            matmul::expert_matmul(&inputs[0], &inputs[1], &inputs[2], &outputs[0], *precision, builder);
        }
        Op::LatentAttention { scale, latent } => {
            attention::latent_attention(&inputs[0], &inputs[1], &outputs[0], *scale, *latent, builder);
        }
    }
}
