//! What tests of random placements share.
#![allow(dead_code, reason = "each test uses its part")]

use crate::source_bytes::Random;
use backend_api::Observer;
use graph::{Absorb, Devices, Plan, Rates, StepObserver, Traffic, Transfer};
use model_deepseek::{
    Error, Model, Options, PlacementOptions,
    placement::{Fit, GpuLayers, Override},
};
use std::time::Duration;

/// Anything that can be said about these devices and so many layers.
pub fn random_options(random: &mut Random, devices: &Devices, layers: usize) -> PlacementOptions {
    const PATTERNS: [&str; 14] = [
        "attn_k_b",
        "attn_v_b",
        "attn_kv_a",
        "attn_q",
        "attn_output",
        "attn_norm",
        "ffn_(gate|up|down)_exps",
        "ffn_down_exps",
        "ffn_.*_shexp",
        "ffn_gate_inp",
        r"blk\.1\.",
        "output",
        "token_embd",
        "norm",
    ];
    let names = devices.names();
    let device = |random: &mut Random| names[random.below(names.len())].clone();
    let overrides =
        (0..random.below(4)).map(|_| Override::new(PATTERNS[random.below(PATTERNS.len())], device(random)));
    let overrides = overrides.collect();
    let cache_layers = (0..random.below(3)).map(|_| {
        let first = random.below(layers);
        (first..first + 1 + random.below(layers - first), device(random))
    });
    let cache_layers = cache_layers.collect();
    PlacementOptions {
        gpu_layers: match random.below(4) {
            0 => None,
            1 => Some(GpuLayers::All),
            _ => Some(GpuLayers::Last(random.below(layers + 2))),
        },
        overrides,
        cpu_moe: random.below(4) == 0,
        cpu_moe_layers: if random.below(4) == 0 { random.below(layers + 1) } else { 0 },
        cpu_ffn_layers: if random.below(4) == 0 { random.below(layers + 1) } else { 0 },
        host_caches: random.below(3) == 0,
        cache_layers,
        absorb: match random.below(4) {
            0 => Absorb::Layer,
            1 => Absorb::Auto(Rates {
                bus: 1e9,
                memory: (0..names.len()).map(|_| 1e9 * (1 + random.below(40)) as f64).collect(),
            }),
            _ => Absorb::Owner,
        },
        ownership_check: random.below(8) != 0,
        fit: Fit { on: random.below(2) == 0, ..Fit::default() },
        ..PlacementOptions::default()
    }
}

/// The same with limits: sometimes strict, and where it is fitted, into some of the bytes that all of it takes.
///
/// # Errors
/// Those of planning it without limits.
pub fn random_limits(
    random: &mut Random,
    said: PlacementOptions,
    model: &Model,
    devices: &Devices,
    options: &Options,
) -> Result<PlacementOptions, Error> {
    let without = PlacementOptions { fit: Fit { on: false, budgets: Vec::new() }, ..said.clone() };
    let needs = without.place(model, devices, options)?.plans.needs();
    let mut said = PlacementOptions { strict: random.below(3) == 0, ..said };
    for (name, needs) in devices.names().into_iter().zip(needs).take(devices.host()) {
        if said.fit.on && random.below(4) != 0 {
            said.fit.budgets.push((name, needs.total() * random.below(13) as u64 / 12));
        }
    }
    Ok(said)
}

/// Bytes that crossed, and whether it was as planned.
#[derive(Default)]
pub struct Crossed(pub Traffic);

impl Observer for Crossed {}

impl StepObserver for Crossed {
    fn transfer(&mut self, _: &Plan, transfer: &Transfer, bytes: u64, _: Duration) {
        self.0 += Traffic::of(transfer.kind, bytes);
    }
}

/// A number that the environment may set.
pub fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}: expected a number, found {text}")),
        Err(_) => otherwise,
    }
}
