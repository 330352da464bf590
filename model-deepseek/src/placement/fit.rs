//! Filling what was left open so that it fits.
//!
//! A step is fastest with everything on accelerators. What does not fit goes to the host in this order: routed
//! experts (large, and few of their bytes are read for a token), then whole layers with their caches, then, where
//! layers were said, caches. What came first is filled up again as far as there is room, from the last layer on.
//! Several accelerators share layers in proportion to their memory; where that does not fit, they are filled in turn.

use super::{
    Placed, PlacementOptions,
    resolve::{Share, Wishes, device_called, free_memory},
};
use crate::{Error, Model, Options, Plans, model::layer_and_part};
use graph::{DeviceIndex, Devices, Needs, report::human};
use std::{collections::BTreeSet, fmt};

/// Whether, and into how much memory, things are fitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Whether what is open is filled by what fits. If not, all of it goes to accelerators.
    pub on: bool,
    /// Bytes that may be used, by device name. Not named: an accelerator's free memory less a margin (a sixteenth
    /// of it, at most 1 GiB), and all of the host's. Where a device does not tell its memory, there is no limit.
    pub budgets: Vec<(String, u64)>,
}

/// Fitted into free memory.
impl Default for Fit {
    fn default() -> Self {
        Fit { on: true, budgets: Vec::new() }
    }
}

/// What is too much for a device: the least that the options allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Each device that has too little, what it needs, and the bytes that may be used.
    pub devices: Vec<(String, Needs, u64)>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (device, needs, budget)) in self.devices.iter().enumerate() {
            let Needs { weights, states, scratch } = *needs;
            let separator = if index == 0 { "" } else { "; " };
            write!(
                f,
                "{separator}{device}: {} ({} bytes) needed: {} of weights, {} of caches, {} of scratch memory; {} \
                 ({budget} bytes) may be used",
                human(needs.total()),
                needs.total(),
                human(weights),
                human(states),
                human(scratch),
                human(*budget),
            )?;
        }
        f.write_str("; --cpu-moe, --no-kv-offload, a smaller --n-gpu-layers, --ctx or --batch need less")
    }
}

/// Bytes kept back of a device's free memory, for what the plan does not know of.
fn margin(free: u64) -> u64 {
    (free / 16).min(1 << 30)
}

pub(super) fn place(
    said: &PlacementOptions,
    wishes: &Wishes,
    model: &Model,
    devices: &Devices,
    options: &Options,
) -> Result<Placed, Error> {
    let mut notices = Vec::new();
    let budgets = budgets(&said.fit, devices, &mut notices)?;
    let fitter = Fitter { wishes, model, devices, options, budgets };
    let all = wishes.gpu_layers.unwrap_or(wishes.layers + 1);
    let everything = fitter.share(all, all, usize::MAX);
    let plans = fitter.plan(&everything)?;
    if fitter.short(&plans).next().is_none() {
        return Ok(Placed { plans, notices });
    }
    let share = fitter.fill()?;
    let plans = fitter.plan(&share)?;
    let names = devices.names();
    let short = fitter.short(&plans).map(|(device, needs, budget)| (names[device].clone(), needs, budget));
    let short: Vec<_> = short.collect();
    if !short.is_empty() {
        return Err(Error::Shortage(Shortage { devices: short }));
    }
    notices.push(fitter.moved(&everything, &share));
    Ok(Placed { plans, notices })
}

/// Bytes that may be used on each device; `None`: no limit.
fn budgets(fit: &Fit, devices: &Devices, notices: &mut Vec<String>) -> Result<Vec<Option<u64>>, Error> {
    let mut budgets = vec![None; devices.len()];
    for (name, bytes) in &fit.budgets {
        budgets[device_called("fit", name, devices)?] = Some(*bytes);
    }
    if !fit.on {
        return Ok(vec![None; devices.len()]);
    }
    let names = devices.names();
    for (index, name) in names.iter().enumerate().take(devices.host()) {
        if budgets[index].is_some() {
            continue;
        }
        let Some(free) = free_memory(devices, index) else {
            notices.push(format!("{name} does not tell its free memory, and gets all that is wanted"));
            continue;
        };
        let margin = margin(free);
        budgets[index] = Some(free - margin);
        notices.push(format!("{name}: {} free, of which {} are kept back", human(free), human(margin)));
    }
    Ok(budgets)
}

struct Fitter<'a> {
    wishes: &'a Wishes,
    model: &'a Model,
    devices: &'a Devices,
    options: &'a Options,
    budgets: Vec<Option<u64>>,
}

impl Fitter<'_> {
    fn plan(&self, share: &Share) -> Result<Plans, Error> {
        Plans::new(self.model, self.devices, &self.wishes.placement(share), self.options)
    }

    /// Devices that have too little for the plans, what they need, and what may be used.
    fn short(&self, plans: &Plans) -> impl Iterator<Item = (DeviceIndex, Needs, u64)> {
        let needs = plans.needs().into_iter().zip(&self.budgets).enumerate();
        needs.filter_map(|(device, (needs, budget))| {
            budget.filter(|budget| needs.total() > *budget).map(|budget| (device, needs, budget))
        })
    }

    fn fits(&self, share: &Share) -> Result<bool, Error> {
        // What the host lacks, no accelerator has too much of.
        Ok(self.short(&self.plan(share)?).all(|(device, ..)| device == self.wishes.host))
    }

    /// The last `layers` on accelerators, in proportion to their memory.
    fn share(&self, layers: usize, caches: usize, experts: usize) -> Share {
        let accelerators = self.wishes.host;
        let memory = |device: usize| self.budgets[device].or_else(|| free_memory(self.devices, device));
        let known: Option<Vec<u64>> = (0..accelerators).map(memory).collect();
        let parts: Vec<f64> = match known {
            Some(bytes) if bytes.iter().any(|&bytes| bytes > 0) => {
                bytes.iter().map(|&bytes| bytes as f64).collect()
            }
            // In equal parts, where a device does not tell its memory.
            _ => vec![1.0; accelerators],
        };
        let total: f64 = parts.iter().sum();
        let mut of_layers = Vec::with_capacity(layers);
        let mut sum = 0.0;
        for (device, part) in parts.iter().enumerate() {
            sum += part;
            of_layers.resize((layers as f64 * sum / total).round() as usize, device);
        }
        Share { layers: of_layers, caches, experts: vec![experts; self.devices.len()] }
    }

    /// The last `layers` on accelerators without their experts, if they fit.
    fn arrange(&self, layers: usize, caches: usize) -> Result<Option<Share>, Error> {
        let host = self.wishes.host;
        let share = self.share(layers, caches, 0);
        if self.fits(&share)? {
            return Ok(Some(share));
        }
        if host < 2 {
            return Ok(None);
        }
        // Each in turn gets as many as fit, from the first of them on.
        let mut devices = Vec::with_capacity(layers);
        for device in 0..host {
            let trial = |count: usize| {
                let mut devices = devices.clone();
                devices.resize(devices.len() + count, device);
                devices.resize(layers, host);
                Share { layers: devices, ..share.clone() }
            };
            let count = most(layers - devices.len(), |count| self.fits(&trial(count)))?;
            devices.resize(devices.len() + count, device);
        }
        let share = Share { layers: devices, ..share };
        Ok((share.layers.len() == layers && self.fits(&share)?).then_some(share))
    }

    /// As much as fits; if nothing does, the least that was said.
    fn fill(&self) -> Result<Share, Error> {
        let fits = |layers, caches| Ok::<_, Error>(self.arrange(layers, caches)?.is_some());
        let (layers, caches) = match self.wishes.gpu_layers {
            Some(layers) => (layers, most(layers, |caches| fits(layers, caches))?),
            None => {
                let all = self.wishes.layers + 1;
                let with_caches = most(all, |n| fits(n, n))?;
                let more = most(all - with_caches, |n| fits(with_caches + n, with_caches))?;
                (with_caches + more, with_caches)
            }
        };
        let mut share = match self.arrange(layers, caches)? {
            Some(share) => share,
            None => self.share(layers, caches, 0),
        };
        for device in 0..self.wishes.host {
            share.experts[device] = most(self.wishes.open_experts(), |experts| {
                let mut more = share.clone();
                more.experts[device] = experts;
                self.fits(&more)
            })?;
        }
        Ok(share)
    }

    /// What went to the host for want of room, in words.
    fn moved(&self, wanted: &Share, share: &Share) -> String {
        let [wanted, found] = [wanted, share].map(|share| self.wishes.placement(share));
        let host = self.wishes.host;
        let on_host = |layers: &[DeviceIndex]| layers.iter().filter(|device| **device == host).count();
        let layers = on_host(&found.layers) - on_host(&wanted.layers);
        let moved = found.weights.keys().filter(|name| !wanted.weights.contains_key(*name));
        let layers_of = moved.filter_map(|name| Some(layer_and_part(name)?.0));
        let experts = layers_of.collect::<BTreeSet<_>>().len();
        let caches = found.states.keys().filter(|name| !wanted.states.contains_key(*name)).count();
        let parts = [(layers, "whole layer"), (experts, "layers' experts"), (caches, "layers' caches")];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| match *what {
                "whole layer" if *count > 1 => format!("{count} whole layers"),
                what => format!("{count} {what}"),
            })
            .collect();
        format!("not everything fits: on {} go {}", self.devices.names()[host], parts.join(", "))
    }
}

/// The largest `n` up to `limit` that fits; 0 if none does. What fits for a number fits for smaller ones.
fn most(limit: usize, mut fits: impl FnMut(usize) -> Result<bool, Error>) -> Result<usize, Error> {
    if fits(limit)? {
        return Ok(limit);
    }
    let (mut fit, mut too_many) = (0, limit);
    while too_many - fit > 1 {
        let middle = fit + (too_many - fit) / 2;
        if fits(middle)? { fit = middle } else { too_many = middle }
    }
    Ok(fit)
}
