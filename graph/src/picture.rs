//! A plan as a picture: devices side by side, time downwards, splits as boxes on their device, and what crosses as
//! arrows between them. What repeats from layer to layer is drawn once.

use crate::{
    assign::Reason,
    devices::DeviceIndex,
    graph::{NodeIndex, StorageIndex, StorageKind},
    plan::{Needs, Plan},
    report::{human, more, summary},
    split::Split,
};
use backend_api::Step;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

const COLUMN: usize = 560;
const BOX: usize = 500;
const LINE: usize = 17;
/// Characters of 12 pixels that fit into a box.
const CHARACTERS: usize = 72;
/// Lines of a box before it says that there are more.
const LINES: usize = 14;

/// The picture of a plan, with the bytes of one step, as SVG. `needs` is what each device must have:
/// [`Plan::needs`], or what several plans need together.
pub fn svg(plan: &Plan, step: &Step, needs: &[Needs]) -> String {
    let columns = columns(plan);
    let mut canvas = Canvas { body: String::new(), y: 20, columns };
    canvas.text(20, "title", &summary(plan, step));
    canvas.devices(plan, needs);
    let scenes: Vec<Scene> = plan.splits.iter().map(|split| Scene::new(plan, split, step)).collect();
    let mut index = 0;
    while index < scenes.len() {
        let (period, times) = repetition(&scenes[index..]);
        for scene in &scenes[index..index + period] {
            canvas.scene(scene);
        }
        if times > 1 {
            let last = &scenes[index + period * (times - 1)];
            canvas.again(period, times, scenes[index].layer.zip(last.layer));
        }
        index += period * times;
    }
    canvas.legend(plan, step);
    canvas.finish()
}

/// The devices that compute, in order, and the place of each.
fn columns(plan: &Plan) -> BTreeMap<DeviceIndex, usize> {
    let used: BTreeSet<DeviceIndex> = plan.splits.iter().map(|split| split.device).collect();
    used.into_iter().enumerate().map(|(place, device)| (device, place)).collect()
}

/// A split and what crosses before it, in words that are the same for every layer.
#[derive(Debug)]
struct Scene {
    device: DeviceIndex,
    /// The first layer in it.
    layer: Option<usize>,
    nodes: usize,
    lines: Vec<Line>,
    arrows: Vec<Arrow>,
}

#[derive(Debug, PartialEq)]
struct Line {
    class: &'static str,
    text: String,
}

#[derive(Debug, PartialEq)]
struct Arrow {
    from: DeviceIndex,
    to: DeviceIndex,
    kind: StorageKind,
    text: String,
}

impl Scene {
    fn new(plan: &Plan, split: &Split, step: &Step) -> Self {
        let nodes = &plan.order[split.nodes.clone()];
        let arrows = plan.transfers[split.transfers.clone()].iter().map(|transfer| {
            let storage = plan.graph().storages()[transfer.storage].name.as_str();
            // The value's name and not the node's, which may make several.
            let layer = transfer.producer.and_then(|node| plan.graph().nodes()[node].layer);
            let name = without_layer(storage, layer);
            let bytes = human(transfer.span.bytes(step) as u64);
            Arrow {
                from: transfer.from,
                to: transfer.to,
                kind: transfer.kind,
                text: format!("{name}  {bytes}"),
            }
        });
        Scene {
            device: split.device,
            layer: nodes.iter().filter_map(|&node| plan.graph().nodes()[node].layer).min(),
            nodes: nodes.len(),
            lines: lines(plan, nodes),
            arrows: arrows.collect(),
        }
    }

    /// Whether both look alike: everything but the layer.
    fn is_like(&self, other: &Scene) -> bool {
        (self.device, self.nodes) == (other.device, other.nodes)
            && self.lines == other.lines
            && self.arrows == other.arrows
    }
}

/// One entry for each reason: the nodes it put here, each name once for all layers.
fn lines(plan: &Plan, nodes: &[NodeIndex]) -> Vec<Line> {
    let mut groups: Vec<((&'static str, &'static str), Vec<&str>)> = Vec::new();
    for &node in nodes {
        let words = words(plan, node);
        let at = groups.iter().position(|(known, _)| *known == words).unwrap_or_else(|| {
            groups.push((words, Vec::new()));
            groups.len() - 1
        });
        let name = short(plan, node);
        if !groups[at].1.contains(&name) {
            groups[at].1.push(name);
        }
    }
    let mut lines = Vec::new();
    for ((class, reason), names) in groups {
        let mut text = format!("{reason}:");
        for (index, name) in names.iter().enumerate() {
            let comma = if index + 1 < names.len() { "," } else { "" };
            if text.len() + name.len() + 2 > CHARACTERS {
                lines.push(Line { class, text: std::mem::replace(&mut text, "   ".to_owned()) });
            }
            text.push_str(&format!(" {name}{comma}"));
        }
        lines.push(Line { class, text });
    }
    if lines.len() > LINES {
        let more = lines.len() - LINES;
        lines.truncate(LINES);
        lines.push(Line { class: "near", text: format!("… {more} more lines") });
    }
    lines
}

/// A node's name without its layer.
fn short(plan: &Plan, node: NodeIndex) -> &str {
    let node = &plan.graph().nodes()[node];
    without_layer(&node.name, node.layer)
}

/// `attn_q` of `blk.3.attn_q`, and `cache` of `cache.3`, if this is layer 3.
fn without_layer(name: &str, layer: Option<usize>) -> &str {
    let Some(layer) = layer.map(|layer| format!(".{layer}")) else { return name };
    match name.split_once(&layer) {
        Some((first, "")) => first,
        Some((_, rest)) => rest.strip_prefix('.').unwrap_or(name),
        None => name,
    }
}

/// The style and the words of a node's reason.
fn words(plan: &Plan, node: NodeIndex) -> (&'static str, &'static str) {
    let for_room = |storage: StorageIndex| plan.is_for_room(&plan.graph().storages()[storage].name);
    match plan.reasons[node] {
        Reason::RegionOf(state) if for_room(state) => {
            ("region", "belongs to the cache that lives here for want of room")
        }
        Reason::RegionOf(_) => ("region", "belongs to the cache that lives here"),
        Reason::Pinned(storage) if plan.graph().storages()[storage].kind == StorageKind::State => {
            ("region", "writes the cache that lives here")
        }
        Reason::Pinned(weight) | Reason::FollowsWeight(weight) if for_room(weight) => {
            ("weight", "reads a weight that is here for want of room")
        }
        Reason::Pinned(_) => ("user", "reads a weight that was placed here"),
        Reason::FollowsWeight(_) => ("weight", "reads a weight that is loaded here"),
        Reason::ExpandedDown(_) | Reason::ExpandedUp(_) => ("near", "beside its neighbours"),
        Reason::Home => ("near", "its layer is here"),
        Reason::FewerBytes => ("near", "the fewest bytes of activations cross"),
        Reason::FellBack(_) => ("fell", "its device cannot run it"),
    }
}

/// How many scenes from the first on make a pattern that repeats at least three times, and how often; `(1, 1)` if
/// none does.
fn repetition(scenes: &[Scene]) -> (usize, usize) {
    let times = |period: usize| {
        let alike = |start: usize| scenes[..period].iter().zip(&scenes[start..]).all(|(a, b)| a.is_like(b));
        1 + (1..scenes.len() / period).take_while(|round| alike(round * period)).count()
    };
    let periods = (1..=8).filter(|&period| period * 3 <= scenes.len());
    let all = periods.map(|period| (period, times(period))).filter(|(_, times)| *times >= 3);
    // The most covered; of equals, the shortest pattern.
    all.rev().max_by_key(|(period, times)| period * times).unwrap_or((1, 1))
}

struct Canvas {
    body: String,
    y: usize,
    columns: BTreeMap<DeviceIndex, usize>,
}

impl Canvas {
    fn centre(&self, device: DeviceIndex) -> usize {
        // A device that computes nothing gives inputs at most: the host, right of all others.
        self.columns.get(&device).copied().unwrap_or(self.columns.len()) * COLUMN + COLUMN / 2
    }

    fn width(&self) -> usize {
        self.columns.len().max(1) * COLUMN + 40
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.body, "{element}");
    }

    fn text(&mut self, x: usize, class: &str, text: &str) {
        let y = self.y + 12;
        self.put(format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{}</text>", escape(text)));
    }

    fn devices(&mut self, plan: &Plan, needs: &[Needs]) {
        self.y += 34;
        for device in self.columns.keys().copied().collect::<Vec<_>>() {
            let x = self.centre(device) - BOX / 2;
            let y = self.y;
            self.put(format_args!(
                "<rect class=\"device\" x=\"{x}\" y=\"{y}\" width=\"{BOX}\" height=\"50\" rx=\"6\"/>"
            ));
            self.y += 6;
            self.text(x + 12, "name", &plan.devices[device]);
            self.y += 19;
            let of = needs.get(device).copied().unwrap_or_default();
            let parts = [(of.weights, "weights"), (of.states, "caches"), (of.scratch, "scratch")];
            let parts: Vec<String> =
                parts.iter().map(|(bytes, what)| format!("{} {what}", human(*bytes))).collect();
            self.text(x + 12, "small", &parts.join(" + "));
            self.y = y;
        }
        self.y += 66;
    }

    fn scene(&mut self, scene: &Scene) {
        for arrow in &scene.arrows {
            self.arrow(arrow);
        }
        let (x, y) = (self.centre(scene.device) - BOX / 2, self.y);
        let height = (scene.lines.len() + 1) * LINE + 14;
        self.put(format_args!(
            "<rect class=\"split\" x=\"{x}\" y=\"{y}\" width=\"{BOX}\" height=\"{height}\" rx=\"6\"/>"
        ));
        self.y += 5;
        let plural = if scene.nodes == 1 { "" } else { "s" };
        self.text(x + 12, "small", &format!("{} node{plural}", scene.nodes));
        for line in &scene.lines {
            self.y += LINE;
            self.text(x + 12, line.class, &line.text);
        }
        self.y = y + height + 12;
    }

    fn arrow(&mut self, arrow: &Arrow) {
        let (from, to) = (self.centre(arrow.from), self.centre(arrow.to));
        let (middle, y) = ((from + to) / 2, self.y + 18);
        let class = arrow.kind.word();
        let text = escape(&arrow.text);
        let label = self.y + 12;
        self.put(format_args!("<text class=\"{class} label\" x=\"{middle}\" y=\"{label}\">{text}</text>"));
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{from}\" y1=\"{y}\" x2=\"{to}\" y2=\"{y}\" marker-end=\"url(#{class})\"/>"
        ));
        self.y += 28;
    }

    /// A band across all devices: what is above runs so many times.
    fn again(&mut self, period: usize, times: usize, layers: Option<(usize, usize)>) {
        let (y, width) = (self.y, self.width() - 40);
        self.put(format_args!(
            "<rect class=\"again\" x=\"20\" y=\"{y}\" width=\"{width}\" height=\"30\" rx=\"15\"/>"
        ));
        self.y += 8;
        let what = if period == 1 {
            "the split above runs".to_owned()
        } else {
            format!("the {period} splits above run")
        };
        let layers =
            layers.map_or(String::new(), |(first, last)| format!(", for layer {first} to layer {last}"));
        self.text(40, "name", &format!("↻ {what} {times} times{layers}"));
        self.y = y + 48;
    }

    fn legend(&mut self, plan: &Plan, step: &Step) {
        self.y += 10;
        // Each once for all layers.
        let mut told: BTreeMap<(&str, DeviceIndex, String), (usize, i64)> = BTreeMap::new();
        for fall_back in plan.fall_backs_in(step) {
            let entry = told.entry((short(plan, fall_back.node), fall_back.runs_on, fall_back.why));
            let (count, bytes) = entry.or_default();
            (*count, *bytes) = (*count + 1, *bytes + fall_back.bytes);
        }
        for ((node, device, why), (count, bytes)) in told {
            let times = if count == 1 { String::new() } else { format!(" (of {count} layers)") };
            let (device, more) = (&plan.devices[device], more(bytes));
            self.text(20, "fell", &format!("{node}{times} runs on {device}: {why}; {more} cross"));
            self.y += LINE;
        }
        self.text(
            20,
            "small",
            "Time runs downwards. A box is what a device computes in one go; each line says why it is there.",
        );
        self.y += LINE;
        let kinds = [
            ("activation", "an activation crosses"),
            ("input", "an input of the step crosses"),
            ("state", "a cache crosses (with the ownership check on: only for a fall-back)"),
        ];
        for (class, text) in kinds {
            let y = self.y + 8;
            self.put(format_args!(
                "<line class=\"{class}\" x1=\"20\" y1=\"{y}\" x2=\"60\" y2=\"{y}\" marker-end=\"url(#{class})\"/>"
            ));
            self.text(72, class, text);
            self.y += LINE;
        }
        self.y += 14;
    }

    fn finish(self) -> String {
        let (width, height) = (self.width(), self.y);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<style>{STYLE}</style>\n<defs>\n"
        );
        for (class, colour) in COLOURS {
            let _ = writeln!(
                svg,
                "<marker id=\"{class}\" viewBox=\"0 0 10 10\" refX=\"9\" refY=\"5\" markerWidth=\"8\" markerHeight=\"8\" \
                 markerUnits=\"userSpaceOnUse\" orient=\"auto\"><path d=\"M0 0 L10 5 L0 10 z\" fill=\"{colour}\"/></marker>"
            );
        }
        let _ = writeln!(svg, "</defs>\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>");
        for device in self.columns.keys() {
            let x = self.centre(*device);
            let _ = writeln!(
                svg,
                "<line class=\"life\" x1=\"{x}\" y1=\"104\" x2=\"{x}\" y2=\"{}\"/>",
                height - 100
            );
        }
        svg.push_str(&self.body);
        svg.push_str("</svg>\n");
        svg
    }
}

const COLOURS: [(&str, &str); 4] =
    [("activation", "#1f6feb"), ("input", "#6e7781"), ("state", "#cf222e"), ("weight", "#bc4c00")];

const STYLE: &str = "\
    .title{font-size:15px;font-weight:bold} .name{font-size:13px;font-weight:bold} .small{fill:#57606a} \
    .device{fill:#eaeef2;stroke:#57606a} .split{fill:#ffffff;stroke:#57606a} .again{fill:#fff8c5;stroke:#d4a72c} \
    .life{stroke:#d0d7de;stroke-width:2;stroke-dasharray:4 4} .label{text-anchor:middle} \
    text.region{fill:#8250df} text.user{fill:#953800} text.weight{fill:#0a3069} text.near{fill:#57606a} text.fell{fill:#cf222e} \
    line.activation{stroke:#1f6feb;stroke-width:2} line.input{stroke:#6e7781;stroke-width:2} \
    line.state{stroke:#cf222e;stroke-width:4} line.weight{stroke:#bc4c00;stroke-width:4} \
    text.activation{fill:#1f6feb} text.input{fill:#6e7781} text.state{fill:#cf222e}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
