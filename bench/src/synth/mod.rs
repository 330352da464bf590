//! Model files with random weights: the shapes of published models, to measure speed and memory with.
//!
//! [`shapes`] knows the hyperparameters, [`types`] which format each tensor gets, [`blocks`] draws the bytes,
//! [`mod@file`] writes them down.

pub mod blocks;
pub mod file;
pub mod shapes;
pub mod types;
