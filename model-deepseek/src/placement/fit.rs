//! Filling what was left open so that it fits.
//!
//! A step is fastest with everything on accelerators. What does not fit goes to the host in this order: routed
//! experts (large, and few of their bytes are read for a token), then whole layers with their caches, then, where
//! layers were said, caches. What came first is filled up again as far as there is room, from the last layer on.
//! Several accelerators share layers in proportion to their memory; where that does not fit, they are filled in turn.

use super::{
    GpuLayers, Placed, PlacementOptions,
    resolve::{Share, Wishes, device_called},
};
use crate::{Error, Model, Options, Plans, model::layer_and_part};
use backend_api::DeviceInfo;
use graph::{DeviceIndex, Devices, Needs, Placement, report::human};
use std::{collections::BTreeSet, fmt, ops::Range};

/// Whether, and into how much memory, things are fitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Whether what is open is filled by what fits. If not, all of it goes to accelerators.
    pub on: bool,
    /// Bytes that may be used, by device name: at most what the device has, and a notice tells where that is more
    /// than it has free. Not named: an accelerator's free memory less a margin (a sixteenth of it, at most 1 GiB), and
    /// all of the host's. Where a device does not tell its memory, there is no limit.
    ///
    /// Devices that share a memory, because one was opened twice or because they are processors, share what is free of
    /// it, and what they need together must fit.
    pub budgets: Vec<(String, u64)>,
}

/// Fitted into free memory.
impl Default for Fit {
    fn default() -> Self {
        Fit { on: true, budgets: Vec::new() }
    }
}

/// What is too much for devices: the least that the options allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Each device that has too little.
    pub devices: Vec<Short>,
}

/// A device that has too little.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Short {
    /// Its name; several, joined by ` + `, where they share one memory.
    pub device: String,
    /// What it needs.
    pub needs: Needs,
    /// The bytes that may be used.
    pub budget: u64,
    /// Further bytes that are free, and kept back.
    pub kept_back: u64,
    /// What makes its needs smaller, in words, such as `a smaller --ctx`, if anything does.
    pub advice: Vec<&'static str>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Short { device, needs, budget, kept_back, advice }) in self.devices.iter().enumerate() {
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
            if *kept_back > 0 {
                write!(f, " ({} more are free, and kept back)", human(*kept_back))?;
            }
            if !advice.is_empty() {
                write!(f, "; less is needed there with {}", advice.join(" or "))?;
            }
        }
        Ok(())
    }
}

/// What makes the needs of the host smaller: less of what was said to be there, and fewer tokens, unless the weights alone
/// are too much.
fn advice_on_host(said: &PlacementOptions, alone: bool, needs: &Needs, budget: u64) -> Vec<&'static str> {
    let table = [
        (matches!(said.gpu_layers, Some(GpuLayers::Last(_))), "a larger --n-gpu-layers"),
        (said.cpu_moe, "no --cpu-moe"),
        (said.cpu_moe_layers > 0, "a smaller --n-cpu-moe"),
        (said.cpu_ffn_layers > 0, "a smaller --n-cpu-ffn"),
        (said.host_caches, "no --no-kv-offload"),
        (!said.overrides.is_empty(), "another --override-tensor"),
        (!said.cache_layers.is_empty(), "another --kv-layers-on"),
    ];
    let of_placement = table.iter().filter(|(helps, _)| *helps && !alone).map(|(_, what)| *what);
    let of_tokens = [(needs.states > 0, "a smaller --ctx"), (needs.scratch > 0, "a smaller --batch")];
    let of_tokens = of_tokens.iter().filter(|(helps, _)| *helps && needs.weights < budget);
    of_placement.chain(of_tokens.map(|(_, what)| *what)).collect()
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
    let given = given(&said.fit, devices, &mut notices)?;
    let (budgets, kept_back) = (vec![None; devices.len()], vec![0; devices.len()]);
    let mut fitter = Fitter { wishes, model, devices, options, budgets, kept_back, main: None };
    if said.fit.on {
        fitter.main = main_memory(devices, &given);
        fitter.budget(given, &mut notices);
    }
    let all = wishes.gpu_layers.unwrap_or(wishes.layers + 1);
    let everything = fitter.share(all, all, usize::MAX);
    let plans = fitter.plan(&everything)?;
    if fitter.shortage(said, &plans).is_none() {
        return Ok(Placed { plans, notices });
    }
    let share = fitter.fill()?;
    let plans = fitter.plan(&share)?;
    if let Some(shortage) = fitter.shortage(said, &plans) {
        return Err(Error::Shortage(shortage));
    }
    notices.extend(fitter.moved(&everything, &share));
    Ok(Placed { plans, notices })
}

/// The bytes that were given for each device.
fn given(fit: &Fit, devices: &Devices, notices: &mut Vec<String>) -> Result<Vec<Option<u64>>, Error> {
    let mut given = vec![None; devices.len()];
    for (name, bytes) in &fit.budgets {
        given[device_called("fit", name, devices)?] = Some(*bytes);
    }
    // Each device alone, and those that share a memory together.
    let named = (0..devices.len()).filter(|&index| given[index].is_some());
    let sets = named.flat_map(|index| {
        let together: Vec<DeviceIndex> =
            sharing(devices, index).filter(|&device| given[device].is_some()).collect();
        let first = together.len() > 1 && together[0] == index;
        [vec![index]].into_iter().chain(first.then_some(together))
    });
    let names = devices.names();
    for set in sets {
        let most = |of: fn(&DeviceInfo) -> u64| set.iter().map(|&device| of(devices[device].info())).max();
        let (total, free) = (most(|info| info.memory_total), most(|info| info.memory_free));
        let (bytes, name) = (sum_of(&given, &set), joined(&names, &set));
        // Zero is what a device has that does not tell.
        if let Some(total) = total.filter(|&total| total > 0 && bytes > total) {
            let expected = format!("at most the {} ({total} bytes) of {name}", human(total));
            return Err(Error::Option {
                option: "fit",
                expected,
                found: format!("{} ({bytes} bytes)", human(bytes)),
            });
        }
        if let Some(free) = free.filter(|&free| fit.on && free > 0 && bytes > free) {
            let [bytes, free] = [bytes, free].map(human);
            notices.push(format!("{name}: {bytes} may be used, but only {free} are free now"));
        }
    }
    Ok(given)
}

/// An accelerator's part of the free memory, where it tells: equal parts of what is not given to others, if several
/// share it.
fn free_memory(devices: &Devices, given: &[Option<u64>], index: DeviceIndex) -> Option<u64> {
    let free = Some(devices[index].info().memory_free).filter(|&free| free > 0)?;
    let sharing: Vec<DeviceIndex> = sharing(devices, index).collect();
    let open = sharing.iter().filter(|&&device| device != devices.host() && given[device].is_none()).count();
    Some(free.saturating_sub(sum_of(given, &sharing)) / open.max(1) as u64)
}

/// The processors, and what may be used of main memory in all: where accelerators are among them, the host's needs
/// come out of the same memory.
fn main_memory(devices: &Devices, given: &[Option<u64>]) -> Option<(Vec<DeviceIndex>, u64, u64)> {
    let sharing: Vec<DeviceIndex> = sharing(devices, devices.host()).collect();
    let free = devices[devices.host()].info().memory_free;
    let bytes = (free - margin(free)).max(sum_of(given, &sharing));
    (sharing.len() > 1 && free > 0).then_some((sharing, bytes, free.saturating_sub(bytes)))
}

/// The devices that have one memory with this one, itself among them: it may have been opened more than once, and
/// processors and the GPUs beside them work in main memory.
fn sharing(devices: &Devices, index: DeviceIndex) -> impl Iterator<Item = DeviceIndex> {
    let this = devices[index].info();
    let one = |other: &DeviceInfo| {
        other.name == this.name || this.kind.shares_main_memory() && other.kind.shares_main_memory()
    };
    devices.iter().enumerate().filter(move |(_, device)| one(device.info())).map(|(index, _)| index)
}

fn sum_of(given: &[Option<u64>], devices: &[DeviceIndex]) -> u64 {
    devices.iter().filter_map(|&device| given[device]).fold(0, u64::saturating_add)
}

fn joined(names: &[String], devices: &[DeviceIndex]) -> String {
    let names: Vec<&str> = devices.iter().map(|&device| names[device].as_str()).collect();
    names.join(" + ")
}

struct Fitter<'a> {
    wishes: &'a Wishes,
    model: &'a Model,
    devices: &'a Devices,
    options: &'a Options,
    /// Bytes that may be used on each device; `None`: no limit.
    budgets: Vec<Option<u64>>,
    /// Bytes beside these that are free.
    kept_back: Vec<u64>,
    /// Devices that share main memory with the host, what they may use together, and what is kept back.
    main: Option<(Vec<DeviceIndex>, u64, u64)>,
}

impl Fitter<'_> {
    /// What may be used of each accelerator: what was given, or what is free of it less a margin.
    fn budget(&mut self, given: Vec<Option<u64>>, notices: &mut Vec<String>) {
        self.budgets.clone_from(&given);
        let names = self.devices.names();
        for index in (0..self.devices.host()).filter(|index| given[*index].is_none()) {
            let name = &names[index];
            let Some(free) = free_memory(self.devices, &given, index) else {
                notices.push(format!("{name} does not tell its free memory, and gets all that is wanted"));
                continue;
            };
            let margin = margin(free);
            (self.budgets[index], self.kept_back[index]) = (Some(free - margin), margin);
            notices.push(format!("{name}: {} free, of which {} are kept back", human(free), human(margin)));
        }
    }

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

    /// Who has too little for the plans, if anybody.
    fn shortage(&self, said: &PlacementOptions, plans: &Plans) -> Option<Shortage> {
        let (names, host) = (self.devices.names(), self.wishes.host);
        let mut short: Vec<Short> = Vec::new();
        for (device, needs, budget) in self.short(plans) {
            let advice = match device == host {
                true => advice_on_host(said, host == 0, &needs, budget),
                false => self.advice_on(device, said, &needs, budget),
            };
            let (device, kept_back) = (names[device].clone(), self.kept_back[device]);
            short.push(Short { device, needs, budget, kept_back, advice });
        }
        if let Some((sharing, budget, kept_back)) = &self.main {
            let needs = plans.needs();
            let needs = sharing.iter().fold(Needs::default(), |sum, &device| Needs {
                weights: sum.weights + needs[device].weights,
                states: sum.states + needs[device].states,
                scratch: sum.scratch + needs[device].scratch,
            });
            if needs.total() > *budget {
                let (budget, kept_back) = (*budget, *kept_back);
                let alone = sharing.len() == self.devices.len();
                let advice = advice_on_host(said, alone, &needs, budget);
                short.push(Short { device: joined(&names, sharing), needs, budget, kept_back, advice });
            }
        }
        (!short.is_empty()).then_some(Shortage { devices: short })
    }

    /// What makes the needs of an accelerator smaller: what does when it is planned anew. What was left open is on the
    /// host already, as far as it can be, and only what was said can keep something there.
    fn advice_on(
        &self,
        device: DeviceIndex,
        said: &PlacementOptions,
        needs: &Needs,
        budget: u64,
    ) -> Vec<&'static str> {
        let less = |said: &PlacementOptions, options: &Options| {
            self.least(said, options).is_ok_and(|all| all[device].total() < needs.total())
        };
        let with = |change: fn(&mut PlacementOptions)| {
            let mut said = said.clone();
            change(&mut said);
            less(&said, self.options)
        };
        let tokens = |change: fn(&mut Options)| {
            let mut options = self.options.clone();
            change(&mut options);
            needs.weights < budget && less(said, &options)
        };
        let all: [(&'static str, bool); 5] = [
            (
                "a smaller --n-gpu-layers",
                said.gpu_layers.is_some() && with(|said| said.gpu_layers = Some(GpuLayers::Last(0))),
            ),
            ("another --override-tensor", !said.overrides.is_empty() && with(|said| said.overrides.clear())),
            (
                "another --kv-layers-on",
                !said.cache_layers.is_empty() && with(|said| said.cache_layers.clear()),
            ),
            ("a smaller --ctx", tokens(|options| options.context = Some(options.batch))),
            ("a smaller --batch", tokens(|options| options.batch = 1)),
        ];
        all.into_iter().filter(|(_, helps)| *helps).map(|(what, _)| what).collect()
    }

    /// The least that each device needs by other options.
    fn least(&self, said: &PlacementOptions, options: &Options) -> Result<Vec<Needs>, Error> {
        let wishes = &Wishes::new(said, self.model, self.devices, options)?;
        let Fitter { model, devices, .. } = *self;
        let (budgets, kept_back, main) = (self.budgets.clone(), self.kept_back.clone(), None);
        let fitter = Fitter { wishes, model, devices, options, budgets, kept_back, main };
        Ok(fitter.plan(&fitter.share(wishes.gpu_layers.unwrap_or(0), 0, 0))?.needs())
    }

    fn fits(&self, share: &Share) -> Result<bool, Error> {
        // What the host lacks, no accelerator has too much of; nor is main memory less full for it.
        Ok(self.short(&self.plan(share)?).all(|(device, ..)| device == self.wishes.host))
    }

    /// The last `layers` on accelerators, in proportion to their memory.
    fn share(&self, layers: usize, caches: usize, experts: usize) -> Share {
        let accelerators = self.wishes.host;
        let memory =
            |device: usize| self.budgets[device].or_else(|| free_memory(self.devices, &self.budgets, device));
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

    /// What went to the host for want of room, in words; nothing, if the accelerators share it otherwise.
    fn moved(&self, wanted: &Share, share: &Share) -> Option<String> {
        let [wanted, found] = [wanted, share].map(|share| self.wishes.placement(share));
        let (host, layers) = (self.wishes.host, self.wishes.layers);
        let left = |range: Range<usize>| {
            let there = |placement: &Placement| {
                placement.layers[range.clone()].iter().filter(|device| **device == host).count()
            };
            there(&found).saturating_sub(there(&wanted))
        };
        // The output comes after the layers.
        let (whole, output) = (left(0..layers), left(layers..layers + 1));
        let moved = found.weights.keys().filter(|name| !wanted.weights.contains_key(*name));
        let layers_of = moved.filter_map(|name| Some(layer_and_part(name)?.0));
        let experts = layers_of.collect::<BTreeSet<_>>().len();
        let on_host = |placement: &Placement, name: &String| placement.states.get(name) == Some(&host);
        let caches =
            found.states.keys().filter(|name| on_host(&found, name) && !on_host(&wanted, name)).count();
        let parts = [(whole, ""), (experts, "the experts of "), (caches, "the caches of ")];
        let parts = parts.into_iter().filter(|(count, _)| *count > 0);
        let parts = parts.map(|(count, what)| match count {
            1 => format!("{what}1 layer"),
            _ => format!("{what}{count} layers"),
        });
        let parts: Vec<String> = parts.chain((output > 0).then(|| "the output".to_owned())).collect();
        let name = &self.devices.names()[host];
        (!parts.is_empty()).then(|| format!("not everything fits: on {name} are {}", parts.join(", ")))
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
