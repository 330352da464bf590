//! Which operations the device runs, and the kernels of each.

use crate::{
    builder::Builder,
    kernels::{attention, combine, elementwise, matmul, norm, rope, route, rows},
    tensor::Tensor,
};
use backend_api::{Op, OpDesc, Unsupported};

/// Whether [`build`] has kernels for an operation: it has for all that are well formed. Kernels trust a description
/// with memory, so that the word of a caller is not enough.
///
/// # Errors
/// What is not well formed.
pub(crate) fn supports(device: &str, op: &OpDesc) -> Result<(), Unsupported> {
    let unsupported = |reason| Unsupported { device: device.to_owned(), op: op.op.kind(), reason };
    op.check().map_err(|error| unsupported(error.problem))
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
