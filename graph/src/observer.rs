//! What a running plan tells about its work.

use crate::{plan::Plan, split::Split, transfer::Transfer};
use backend_api::Discard;
use std::time::Duration;

/// Sees transfers and splits beside the operations that a program tells of. All methods have empty defaults.
///
/// A plain observer of operations becomes one with `impl StepObserver for …{}`.
pub trait StepObserver: backend_api::Observer {
    /// Bytes crossed from one device to another.
    fn transfer(&mut self, plan: &Plan, transfer: &Transfer, bytes: u64, time: Duration) {
        let _ = (plan, transfer, bytes, time);
    }

    /// A split ran; its transfers are not in `time`.
    fn split(&mut self, plan: &Plan, split: &Split, time: Duration) {
        let _ = (plan, split, time);
    }
}

impl StepObserver for Discard {}
