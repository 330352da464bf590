//! What a running program tells about its work.

use std::time::Duration;

/// One operation that a program ran.
#[derive(Clone, Copy, Debug)]
pub struct OpEvent<'a> {
    /// The node's name in the graph, such as `blk.3.attn_output`.
    pub name: &'a str,
    /// The operation's name, such as `MatMul`.
    pub op: &'a str,
    /// Bytes of weights and states read.
    pub bytes: u64,
    /// Multiply-accumulates.
    pub macs: u64,
    /// Time on the device, where the device measured it.
    pub time: Option<Duration>,
}

/// Sees the operations of a program as it runs. All methods have empty defaults.
pub trait Observer {
    /// Whether [`Observer::op`] is of interest; devices skip the measuring otherwise.
    fn wants_ops(&self) -> bool {
        false
    }

    /// The program handed its work to its device's queue: in one submission, unless it had to be cut, of so many
    /// dispatches. Devices without a queue say nothing.
    fn submitted(&mut self, submissions: usize, dispatches: usize) {
        let _ = (submissions, dispatches);
    }

    /// An operation ran.
    fn op(&mut self, event: OpEvent<'_>) {
        let _ = event;
    }
}

/// Looks away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard;

impl Observer for Discard {}
