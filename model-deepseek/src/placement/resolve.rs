//! From what was said to names of the graph and indices of devices; and what was left open.

use super::{GpuLayers, PlacementOptions};
use crate::{
    Error, Model, Options,
    model::{cache_name, is_experts, layer_and_part},
};
use graph::{DeviceIndex, Devices, Placement, StorageKind};
use regex_automata::meta::Regex;
use std::collections::BTreeMap;

/// What was said, for one model and its devices.
pub(super) struct Wishes {
    /// As said, except for layers, weights and states.
    base: Placement,
    /// Layers of the model; the output comes after them.
    pub(super) layers: usize,
    /// Layers to put on accelerators, with the output; `None`: open.
    pub(super) gpu_layers: Option<usize>,
    /// Weights that were placed.
    weights: BTreeMap<String, DeviceIndex>,
    /// The device of each layer's cache; `None`: open.
    caches: Vec<Option<DeviceIndex>>,
    /// The routed experts of each layer, if there are any and none was placed.
    experts: Vec<Vec<String>>,
    /// The weights of each layer (with the output) that nobody placed.
    open_weights: Vec<Vec<String>>,
    pub(super) host: DeviceIndex,
    pub(super) notices: Vec<String>,
}

/// How much of what is open goes to accelerators, with the last layers first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// The device of each of the last layers (with the output), from the first of them on.
    pub(super) layers: Vec<DeviceIndex>,
    /// Of how many of the last layers (with the output, which has none) the caches go with their layer.
    pub(super) caches: usize,
    /// Of how many of each device's layers the experts go with their layer.
    pub(super) experts: Vec<usize>,
}

impl Wishes {
    pub(super) fn new(
        said: &PlacementOptions,
        model: &Model,
        devices: &Devices,
        options: &Options,
    ) -> Result<Self, Error> {
        check_names(devices)?;
        let layers = model.config().layers();
        let host = devices.host();
        let graph = model.graph(1, options.cache, options.precision)?;
        let names: Vec<&str> =
            graph.storages_of(StorageKind::Weight).map(|(_, weight)| weight.name.as_str()).collect();

        let mut notices = Vec::new();
        let mut weights = overridden(said, model, &names, devices, &mut notices)?;
        let on_host = |name: &str| {
            let Some((layer, part)) = layer_and_part(name) else { return false };
            let experts = is_experts(part) && (said.cpu_moe || layer < said.cpu_moe_layers);
            let ffn = matches!(part, "ffn_gate.weight" | "ffn_up.weight" | "ffn_down.weight");
            experts || ffn && layer < said.cpu_ffn_layers
        };
        for name in names.iter().filter(|name| on_host(name)) {
            weights.entry((*name).to_owned()).or_insert(host);
        }

        let mut caches = vec![said.host_caches.then_some(host); layers];
        for (range, device) in &said.cache_layers {
            if range.is_empty() || range.end > layers {
                let expected = format!("layers from 0 to {}", layers - 1);
                let found = match range.len() {
                    1 => range.start.to_string(),
                    _ => format!("{}-{}", range.start, range.end.saturating_sub(1)),
                };
                return Err(Error::Option { option: "kv-layers-on", expected, found });
            }
            caches[range.clone()].fill(Some(device_called("kv-layers-on", device, devices)?));
        }

        // What the user placed is not moved; the layer's other experts may be.
        let (mut experts, mut open_weights) = (vec![Vec::new(); layers], vec![Vec::new(); layers + 1]);
        for name in names.iter().filter(|name| !weights.contains_key(**name)) {
            match layer_and_part(name) {
                Some((layer, part)) if layer < layers => {
                    open_weights[layer].push((*name).to_owned());
                    if is_experts(part) {
                        experts[layer].push((*name).to_owned());
                    }
                }
                _ if name.starts_with("output") => open_weights[layers].push((*name).to_owned()),
                _ => {}
            }
        }

        let mut gpu_layers = said.gpu_layers.map(|said| match said {
            GpuLayers::All => layers + 1,
            GpuLayers::Last(n) => n.min(layers + 1),
        });
        if host == 0 && gpu_layers.replace(0).is_some_and(|n| n > 0) {
            notices.push(
                "layers were wanted on accelerators: there is no accelerator, and all are on the host"
                    .to_owned(),
            );
        }
        let base = Placement {
            absorb: said.absorb.clone(),
            strict: said.strict,
            ownership_check: said.ownership_check,
            ..Placement::default()
        };
        Ok(Wishes { base, layers, gpu_layers, weights, caches, experts, open_weights, host, notices })
    }

    /// What it means if accelerators get so much.
    pub(super) fn placement(&self, share: &Share) -> Placement {
        let Wishes { base, layers, gpu_layers, weights, caches, experts, open_weights, host, .. } = self;
        let mut placement = Placement { weights: weights.clone(), ..base.clone() };
        let first = layers + 1 - share.layers.len();
        placement.layers = vec![*host; first];
        placement.layers.extend(&share.layers);
        // Layers that were to be on accelerators, as many as were said, and have no room there.
        let wanted = layers + 1 - gpu_layers.unwrap_or(layers + 1);
        for layer in (wanted..=*layers).filter(|&layer| placement.layers[layer] == *host && *host > 0) {
            placement.for_room.extend(open_weights[layer].iter().cloned());
            if caches.get(layer).is_some_and(Option::is_none) {
                placement.for_room.insert(cache_name(layer));
            }
        }
        for (layer, cache) in caches.iter().enumerate() {
            let home = placement.layers[layer];
            let open = if layer + share.caches > *layers { home } else { *host };
            let device = cache.unwrap_or(open);
            if device != home {
                placement.states.insert(cache_name(layer), device);
                if cache.is_none() {
                    placement.for_room.insert(cache_name(layer));
                }
            }
        }
        let mut left = share.experts.clone();
        for layer in (first..*layers).rev().filter(|layer| !experts[*layer].is_empty()) {
            let left = &mut left[placement.layers[layer]];
            if *left > 0 {
                *left -= 1;
                continue;
            }
            placement.weights.extend(experts[layer].iter().map(|name| (name.clone(), *host)));
            placement.for_room.extend(experts[layer].iter().cloned());
        }
        placement
    }

    /// Layers whose experts are open.
    pub(super) fn open_experts(&self) -> usize {
        self.experts.iter().filter(|names| !names.is_empty()).count()
    }
}

/// The weights that overrides name.
fn overridden(
    said: &PlacementOptions,
    model: &Model,
    names: &[&str],
    devices: &Devices,
    notices: &mut Vec<String>,
) -> Result<BTreeMap<String, DeviceIndex>, Error> {
    let mut weights = BTreeMap::new();
    for entry in &said.overrides {
        let pattern = Regex::new(&entry.pattern).map_err(|error| Error::Option {
            option: entry.option,
            expected: "a regular expression".to_owned(),
            found: format!("`{}` ({})", entry.pattern, in_one_line(&error)),
        })?;
        let device = device_called(entry.option, &entry.device, devices)?;
        let mut matched = false;
        let is_meant = |name: &&&str| {
            let other = other_name(name, names);
            pattern.is_match(name.as_bytes()) || other.is_some_and(|other| pattern.is_match(other.as_bytes()))
        };
        for name in names.iter().filter(is_meant) {
            matched = true;
            weights.entry((*name).to_owned()).or_insert(device);
        }
        if matched {
            continue;
        }
        // A file may have layers that predict further tokens, which rules for whole files name too.
        let is_meant = |name: &str| pattern.is_match(name.as_bytes());
        match model.checkpoint().tensors().filter(|tensor| is_meant(&tensor.name)).count() {
            0 => {
                return Err(Error::Option {
                    option: entry.option,
                    expected: "a pattern that a tensor's name matches, such as `ffn_up_exps`".to_owned(),
                    found: format!("`{}`, which matches none of {}", entry.pattern, names.len()),
                });
            }
            skipped => notices.push(format!(
                "{} `{}` has no effect: it matches {skipped} tensors, which are skipped",
                entry.option, entry.pattern
            )),
        }
    }
    Ok(weights)
}

/// Where a file has `attn_kv_b`, its second half is the product's `attn_v_b`, and `attn_k_b` is made of the first: both
/// answer to both names.
fn other_name(name: &str, names: &[&str]) -> Option<String> {
    let (layer, part) = layer_and_part(name)?;
    let whole = format!("blk.{layer}.attn_kv_b.weight");
    match part {
        "attn_kv_b.weight" => Some(format!("blk.{layer}.attn_v_b.weight")),
        "attn_k_b.weight" if names.contains(&whole.as_str()) => Some(whole),
        _ => None,
    }
}

fn in_one_line(error: &regex_automata::meta::BuildError) -> String {
    let whole = match error.syntax_error() {
        Some(error) => error.to_string(),
        None => error.to_string(),
    };
    // The parser draws the place below the pattern; its last line says what is wrong.
    let last = whole.lines().last().unwrap_or_default();
    last.trim().trim_start_matches("error: ").to_owned()
}

/// Devices are found by their names in any case, so these must differ in more than that. One that was opened twice has
/// the same name twice, and is told apart by a number.
fn check_names(devices: &Devices) -> Result<(), Error> {
    let names: Vec<&str> = devices.iter().map(|device| device.info().name.as_str()).collect();
    for (index, &name) in names.iter().enumerate() {
        let alike = |other: &&str| *other != name && other.eq_ignore_ascii_case(name);
        if let Some(other) = names[..index].iter().copied().find(alike) {
            return Err(Error::Option {
                option: "device",
                expected: "names that differ in more than case".to_owned(),
                found: format!("`{other}` and `{name}`"),
            });
        }
    }
    Ok(())
}

/// The device of that name, in any case.
pub(super) fn device_called(
    option: &'static str,
    name: &str,
    devices: &Devices,
) -> Result<DeviceIndex, Error> {
    let names = devices.names();
    names.iter().position(|known| known.eq_ignore_ascii_case(name)).ok_or_else(|| Error::Option {
        option,
        expected: format!("one of the devices {}", names.join(", ")),
        found: format!("`{name}`"),
    })
}
