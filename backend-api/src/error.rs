//! Errors of operations and devices.

use crate::OpKind;
use thiserror::Error;

/// An operation whose attributes, inputs or outputs do not fit together.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("{op}: {problem}")]
pub struct OpError {
    /// The operation.
    pub op: OpKind,
    /// What was expected and what was found.
    pub problem: String,
}

/// Why a device cannot run an operation.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{device} cannot run {op}: {reason}")]
pub struct Unsupported {
    /// The device's name.
    pub device: String,
    /// The operation.
    pub op: OpKind,
    /// What it lacks.
    pub reason: String,
}

/// What went wrong on a device: only things its caller could not foresee.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device has no room.
    #[error("{device}: no memory for {what}: {requested} bytes asked, {available} free")]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// What the bytes were for.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free, as far as the device knows.
        available: u64,
    },
    /// The device is gone; its buffers are lost.
    #[error("{device} was lost: {reason}")]
    Lost {
        /// The device's name.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// The device cannot run this operation.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// A buffer of another device was passed.
    #[error("{device}: a buffer of another device was passed for {what}")]
    ForeignBuffer {
        /// The device's name.
        device: String,
        /// What the buffer was passed for.
        what: String,
    },
    /// Anything else the driver reports.
    #[error("{device}: {reason}")]
    Driver {
        /// The device's name.
        device: String,
        /// What the driver said.
        reason: String,
    },
}

impl OpError {
    pub(crate) fn new(op: OpKind, problem: impl Into<String>) -> Self {
        OpError { op, problem: problem.into() }
    }
}
