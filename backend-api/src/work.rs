//! How much an operation reads and computes.

use crate::{Op, OpDesc, Step};

/// What an operation costs in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Bytes of weights and states read.
    pub bytes: u64,
    /// Multiply-accumulates.
    pub macs: u64,
}

impl OpDesc {
    /// Bytes of weights and states that the operation reads, and its multiply-accumulates, of a description that passes
    /// [`check`](OpDesc::check). Chosen experts are counted as if all choices of a step were different, as far as there are
    /// experts.
    pub fn work(&self, step: &Step) -> Work {
        let input = |index: usize| &self.inputs[index];
        let elements = |index: usize| input(index).shape.elements(step);
        let (bytes, macs) = match &self.op {
            Op::EmbedRows => (elements(1).saturating_mul(input(0).row_bytes()), 0),
            Op::RmsNorm { .. } => (input(1).dense_bytes(step), elements(0).saturating_mul(2)),
            Op::MatMul { .. } | Op::HeadMatMul { .. } => {
                let outputs = self.outputs[0].shape.elements(step);
                (input(0).dense_bytes(step), outputs.saturating_mul(input(0).shape.inner()))
            }
            Op::ExpertMatMul { .. } => {
                let experts = input(0).shape.extents()[0].at(step);
                let outputs = self.outputs[0].shape.elements(step);
                let read = elements(2).min(experts);
                (
                    (input(0).dense_bytes(step) / experts).saturating_mul(read),
                    outputs.saturating_mul(input(0).shape.inner()),
                )
            }
            Op::LatentAttention { latent, .. } => {
                let [rows, heads] = [0, 1].map(|axis| input(0).shape.extents()[axis].at(step));
                let triangle = rows.saturating_mul(rows.saturating_add(1)) / 2;
                let visible = rows.saturating_mul(step.past).saturating_add(triangle);
                let width = input(1).shape.inner().saturating_add(*latent);
                let read = step.kv_len().saturating_mul(input(1).row_bytes());
                (read, visible.saturating_mul(heads).saturating_mul(width))
            }
            Op::Route(_) if self.inputs.len() == 2 => (input(1).dense_bytes(step), 0),
            Op::CombineExperts => (0, elements(0)),
            Op::Rope(_) => (0, elements(0).saturating_mul(2)),
            _ => (0, 0),
        };
        Work { bytes: bytes as u64, macs: macs as u64 }
    }
}
