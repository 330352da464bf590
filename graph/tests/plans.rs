//! Plans of whole models over hypothetical devices.

#[allow(dead_code)]
#[path = "support/model.rs"]
mod model;

use backend_api::{Capacity, Device, NullDevice, OpKind, Step};
use graph::{
    Devices, Graph, Needs, Placement, Plan, PlanError, Reason, Report, StorageKind, picture, report, validate,
};
use model::{SMALL, V3};
use std::{collections::BTreeMap, sync::Arc};

fn devices(names: &[&str]) -> Devices {
    Devices::new(
        names.iter().map(|name| Arc::new(NullDevice::new(*name, 1 << 40)) as Arc<dyn Device>).collect(),
    )
}

fn capacity(rows: usize) -> Capacity {
    Capacity { rows, outputs: 1, kv_len: 4096 }
}

fn small() -> Graph {
    model::build(&model::Shapes { capacity: 4096, ..SMALL }).expect("a graph")
}

fn states(graph: &Graph, device: usize) -> BTreeMap<String, usize> {
    graph.storages_of(StorageKind::State).map(|(_, state)| (state.name.clone(), device)).collect()
}

/// Weights whose names contain this.
fn weights(graph: &Graph, part: &str, device: usize) -> BTreeMap<String, usize> {
    let all = graph.storages_of(StorageKind::Weight).map(|(_, weight)| weight.name.clone());
    all.filter(|name| name.contains(part)).map(|name| (name, device)).collect()
}

fn plan(graph: &Graph, placement: &Placement, devices: &Devices, rows: usize) -> Plan {
    let plan = Plan::new(graph, placement, devices, capacity(rows)).expect("a plan");
    validate::facts(plan.facts()).expect("facts");
    validate::plan(&plan).expect("a valid plan");
    plan
}

/// Caches in main memory, all else on the accelerator: two crossings a layer, and neither state nor weight.
#[test]
fn no_kv_offload() {
    let devices = devices(&["gpu", "cpu"]);
    for (graph, layers) in [(small(), SMALL.layers), (model::build(&V3).expect("a graph"), V3.layers)] {
        let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, layers + 1) };
        for rows in [1, 512] {
            let plan = plan(&graph, &placement, &devices, rows);
            assert_eq!(plan.splits.len(), 2 * layers + 2, "{rows} rows");
            let traffic = plan.traffic(&plan.capacity.full_step());
            assert_eq!((traffic.state, traffic.weight), (0, 0));
            for (index, node) in graph.nodes().iter().enumerate() {
                if let Some(region) = node.region {
                    assert_eq!(plan.owners[index], 1, "{}", node.name);
                    assert_eq!(plan.reasons[index], Reason::RegionOf(region.state), "{}", node.name);
                }
            }
        }
    }
}

/// On V3, an owner's region takes 166 KB per layer and token across the bus.
#[test]
fn what_crosses_for_v3() {
    let graph = model::build(&V3).expect("a graph");
    let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, V3.layers + 1) };
    let plan = plan(&graph, &placement, &devices(&["gpu", "cpu"]), 1);
    let embedding = 4 * V3.width as u64;
    let query = 4 * (V3.heads * (V3.nope + V3.rope)) as u64;
    let row = 4 * (V3.latent + V3.rope) as u64;
    let values = 4 * (V3.heads * V3.value) as u64;
    let traffic = plan.traffic(&plan.capacity.full_step());
    assert_eq!(traffic.activation, embedding + V3.layers as u64 * (query + row + values));
}

/// Routed experts in main memory: down go the normed row and the routing, up comes one row per token.
#[test]
fn cpu_moe() {
    let devices = devices(&["gpu", "cpu"]);
    let graph = small();
    let all = Placement::all_on(0, SMALL.layers + 1);
    let placement = Placement { weights: weights(&graph, "_exps", 1), ..all };
    for rows in [1, 64] {
        let plan = plan(&graph, &placement, &devices, rows);
        let moe = SMALL.layers - SMALL.dense;
        assert_eq!(plan.splits.len(), 2 * moe + 2);
        let traffic = plan.traffic(&plan.capacity.full_step());
        assert_eq!((traffic.state, traffic.weight), (0, 0));
        let row = 4 * SMALL.width;
        let per_layer = row + 2 * 4 * SMALL.used + row;
        assert_eq!(traffic.activation, (rows * (row + moe * per_layer)) as u64);
    }
}

/// The commonest setup of people with one small GPU. Down for the region, up, down for the experts, up; but the
/// dense layer has no experts.
#[test]
fn cpu_moe_without_kv_offload() {
    let devices = devices(&["gpu", "cpu"]);
    let graph = small();
    let all = Placement::all_on(0, SMALL.layers + 1);
    let placement = Placement { weights: weights(&graph, "_exps", 1), states: states(&graph, 1), ..all };
    let plan = plan(&graph, &placement, &devices, 1);
    let traffic = plan.traffic(&plan.capacity.full_step());
    assert_eq!((traffic.state, traffic.weight), (0, 0));
    assert_eq!(plan.splits.len(), 2 + 2 * SMALL.layers + 2 * (SMALL.layers - SMALL.dense));
}

#[test]
fn one_device_is_one_split() {
    let plan = plan(&small(), &Placement::default(), &devices(&["cpu"]), 3);
    assert_eq!(plan.splits.len(), 1);
    assert!(plan.transfers.is_empty());
}

/// Without the check the attention follows the weight after it, and the caches cross.
#[test]
fn the_check_is_what_keeps_the_caches() {
    let graph = small();
    let all = Placement::all_on(0, SMALL.layers + 1);
    let placement = Placement { states: states(&graph, 1), ownership_check: false, ..all };
    let plan = plan(&graph, &placement, &devices(&["gpu", "cpu"]), 1);
    let row = 4 * (SMALL.latent + SMALL.rope) as u64;
    assert_eq!(plan.traffic(&plan.capacity.full_step()).state, SMALL.layers as u64 * 4096 * row);
}

/// A tied head: each device that reads the table loads it.
#[test]
fn a_weight_is_loaded_where_it_is_read() {
    let graph = small();
    let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, SMALL.layers + 1) };
    let plan = plan(&graph, &placement, &devices(&["gpu", "cpu"]), 1);
    for place in &plan.weights {
        let name = &graph.storages()[place.storage].name;
        let absorbed = name.contains("attn_k_b") || name.contains("attn_v_b");
        assert_eq!(place.device, usize::from(absorbed || name == "token_embd.weight"), "{name}");
    }
}

#[test]
fn absorbed_products_go_where_the_user_says() {
    let graph = small();
    let devices = devices(&["gpu", "cpu"]);
    let base = Placement { states: states(&graph, 1), ..Placement::all_on(0, SMALL.layers + 1) };
    let owner_of = |plan: &Plan, name: &str| {
        plan.owners[graph.nodes().iter().position(|node| node.name == name).expect("a node")]
    };
    let layer = plan(&graph, &Placement { absorb: graph::Absorb::Layer, ..base.clone() }, &devices, 1);
    assert_eq!((owner_of(&layer, "blk.1.q_absorb"), owner_of(&layer, "blk.1.attention")), (0, 1));
    let weights = weights(&graph, "blk.1.attn_v_b", 0);
    let user = plan(&graph, &Placement { weights, ..base.clone() }, &devices, 1);
    assert_eq!((owner_of(&user, "blk.1.v_absorb"), owner_of(&user, "blk.2.v_absorb")), (0, 1));
    let rates = |bus, memory: [f64; 2]| graph::Absorb::Auto(graph::Rates { bus, memory: memory.to_vec() });
    let slow_bus = plan(&graph, &Placement { absorb: rates(1e6, [1e12, 1e11]), ..base.clone() }, &devices, 1);
    assert_eq!(owner_of(&slow_bus, "blk.1.v_absorb"), 1);
    let slow_host = plan(&graph, &Placement { absorb: rates(1e12, [1e12, 1e6]), ..base }, &devices, 1);
    assert_eq!(owner_of(&slow_host, "blk.1.v_absorb"), 0);
}

/// A device that lacks an operation: only that node leaves, and the plan says so and what it costs.
#[test]
fn fall_backs_are_told() {
    let graph = small();
    let gpu = NullDevice::new("gpu", 1 << 40).without(&[OpKind::LatentAttention]);
    let devices = Devices::new(vec![Arc::new(gpu), Arc::new(NullDevice::new("cpu", 1 << 40))]);
    let placement = Placement::all_on(0, SMALL.layers + 1);
    let found = plan(&graph, &placement, &devices, 1);
    assert_eq!(found.fall_backs.len(), SMALL.layers);
    let row = 4 * (SMALL.latent + SMALL.rope) as u64;
    assert_eq!(found.fall_backs[0].state_bytes as u64, 4096 * row);
    let text = found.to_string();
    assert!(
        text.contains("fall-back: blk.0.attention runs on cpu: gpu cannot run LatentAttention"),
        "{text}"
    );
    // A smaller step costs less; what crosses in it, for states, is what its fall-backs cost.
    let prompt = plan(&graph, &placement, &devices, 8);
    assert_eq!(prompt.fall_backs_in(&prompt.capacity.full_step()), prompt.fall_backs);
    for (rows, past) in [(1, 9), (3, 0), (8, 100)] {
        let step = Step { rows, past, outputs: 1 };
        let report = Report::new(&prompt, &step);
        assert_eq!(report.fall_backs[0].state_bytes as u64, (rows + past) as u64 * row);
        let queries = 4 * (SMALL.heads * (SMALL.latent + SMALL.rope + SMALL.latent)) as u64;
        let others = report.fall_backs[0].bytes - report.fall_backs[0].state_bytes;
        assert_eq!(others as u64, rows as u64 * queries);
        let states: i64 = report.fall_backs.iter().map(|fall_back| fall_back.state_bytes).sum();
        assert_eq!(states as u64, report.bytes_per_step.state);
    }
    let strict = Placement { strict: true, ..placement.clone() };
    let error = Plan::new(&graph, &strict, &devices, capacity(1)).unwrap_err().to_string();
    assert!(error.contains("blk.0.attention must run where it belongs"), "{error}");
    let none = NullDevice::new("cpu", 1 << 40).without(&[OpKind::SwiGlu]);
    let error = Plan::new(&graph, &Placement::default(), &Devices::new(vec![Arc::new(none)]), capacity(1));
    let error = error.unwrap_err();
    assert!(matches!(&error, PlanError::Nobody { node, .. } if node == "blk.0.ffn_act"), "{error}");
    let none = NullDevice::new("gpu", 1 << 40).without(&[OpKind::KvStore]);
    let devices = Devices::new(vec![Arc::new(none), Arc::new(NullDevice::new("cpu", 1 << 40))]);
    let error = Plan::new(&graph, &placement, &devices, capacity(1)).unwrap_err();
    assert!(matches!(&error, PlanError::Store { node, .. } if node == "blk.0.kv_store"), "{error}");
}

/// A strict plan is refused only where a byte more would cross; and what falls back takes neighbours along, if that
/// saves any.
#[test]
fn what_costs_nothing_is_no_fall_back() {
    let graph = small();
    let with = |lacking: &[OpKind]| {
        let gpu = NullDevice::new("gpu", 1 << 40).without(lacking);
        Devices::new(vec![Arc::new(gpu), Arc::new(NullDevice::new("cpu", 1 << 40))])
    };
    let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, SMALL.layers + 1) };
    let whole = plan(&graph, &placement, &with(&[]), 1);
    // The row that is stored is put together on either side of the border, for the same bytes.
    let strict = Placement { strict: true, ..placement.clone() };
    let without = plan(&graph, &strict, &with(&[OpKind::Concat]), 1);
    assert!(without.fall_backs.is_empty());
    let step = whole.capacity.full_step();
    assert_eq!(without.traffic(&step), whole.traffic(&step));
    // What falls back tells its bytes and those of the neighbours that go along, and together they are all that cross more.
    let placement = Placement::all_on(0, SMALL.layers + 1);
    for (lacking, fallen) in [
        (OpKind::Rope, 2 * SMALL.layers),
        (OpKind::Add, 3 * SMALL.layers - 1),
        (OpKind::SwiGlu, 2 * SMALL.layers - 1),
        (OpKind::ExpertMatMul, 3 * (SMALL.layers - 1)),
        (OpKind::LatentAttention, SMALL.layers),
    ] {
        for rows in [1, 8] {
            let [whole, without] =
                [&[][..], &[lacking]].map(|lacks| plan(&graph, &placement, &with(lacks), rows));
            let step = whole.capacity.full_step();
            let more = without.traffic(&step).total() as i64 - whole.traffic(&step).total() as i64;
            let told: i64 = without.fall_backs.iter().map(|fall_back| fall_back.bytes).sum();
            assert_eq!((told, without.fall_backs.len()), (more, fallen), "{lacking} of {rows} rows");
        }
    }
    // The rows of experts stay where they are made until they are one.
    let moe = plan(&graph, &placement, &with(&[OpKind::ExpertMatMul]), 1);
    let combine =
        moe.graph().nodes().iter().position(|node| node.op.kind() == OpKind::CombineExperts).expect("one");
    assert_eq!((moe.owners[combine], moe.reasons[combine]), (1, Reason::FewerBytes));
}

#[test]
fn what_a_plan_cannot_be() {
    let graph = small();
    let devices = devices(&["gpu", "cpu"]);
    let fails = |placement: Placement, capacity: Capacity, expected: &str| {
        let error = Plan::new(&graph, &placement, &devices, capacity).expect_err(expected).to_string();
        assert_eq!(error, expected);
    };
    let two = |name: &str| BTreeMap::from([(name.to_owned(), 2)]);
    let none = Placement::default;
    fails(Placement::all_on(2, 1), capacity(1), "layer 0: expected a device below 2, found 2");
    let placement = Placement { weights: two("output.weight"), ..none() };
    fails(placement, capacity(1), "weight output.weight: expected a device below 2, found 2");
    let placement = Placement { states: two("cache.1"), ..none() };
    fails(placement, capacity(1), "state cache.1: expected a device below 2, found 2");
    fails(Placement { weights: two("no"), ..none() }, capacity(1), "the graph has no weight called no");
    fails(Placement { states: two("no"), ..none() }, capacity(1), "the graph has no state called no");
    let capacity = |rows, kv_len| Capacity { rows, outputs: 1, kv_len };
    fails(none(), capacity(0, 8), "capacity: expected 1 row or more, and as many cached, found 0 and 8");
    fails(none(), capacity(9, 8), "capacity: expected 1 row or more, and as many cached, found 9 and 8");
    fails(
        none(),
        capacity(1, usize::MAX),
        &format!("capacity: expected at most 2147483647, found {}", usize::MAX),
    );
    fails(none(), capacity(1, 4097), "capacity: state cache.0 has 4096 rows, fewer than 4097");
}

#[test]
fn devices_of_one_name_are_told_apart() {
    let plan = plan(&small(), &Placement::default(), &devices(&["cpu", "cpu", "cpu"]), 1);
    assert_eq!(plan.devices, ["cpu", "cpu#2", "cpu#3"]);
}

#[test]
fn a_plan_is_a_value() {
    let graph = small();
    let devices = devices(&["gpu", "cpu"]);
    let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, SMALL.layers + 1) };
    let (one, other) = (plan(&graph, &placement, &devices, 4), plan(&graph, &placement, &devices, 4));
    assert_eq!(one, other);
    assert_ne!(one, plan(&graph, &placement, &devices, 5));
    let json = serde_json::to_value(&one).expect("JSON");
    assert_eq!(json["splits"].as_array().map(Vec::len), Some(one.splits.len()));
    let step = one.capacity.full_step();
    let report = serde_json::to_value(Report::new(&one, &step)).expect("JSON");
    assert_eq!(report["splits"][2]["nodes"][0]["owner"], "cpu");
    assert_eq!(report["bytes_per_step"]["state"], 0);
    assert_eq!(report["splits"][1]["transfers"][0]["kind"], "activation");
    let line = report::summary(&one, &step);
    assert!(line.starts_with("cpu + gpu: 8 splits; per step of 4 tokens: "), "{line}");
}

/// Arenas are close to what is alive at the fullest moment.
#[test]
fn arenas_are_tight() {
    for (graph, layers) in [(small(), SMALL.layers), (model::build(&V3).expect("a graph"), V3.layers)] {
        let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, layers + 1) };
        let plan = plan(&graph, &placement, &devices(&["gpu", "cpu"]), 64);
        for device in 0..2 {
            let slots = || plan.memory.slots.iter().filter(|slot| slot.device == device);
            let alive = |at: usize| {
                let alive = slots().filter(|slot| slot.opens <= at && at <= slot.closes);
                alive.map(|slot| slot.bytes.next_multiple_of(64)).sum::<u64>()
            };
            let fullest = (0..plan.order.len()).map(alive).max().unwrap_or(0);
            let arena = plan.memory.arenas[device];
            println!("device {device}: arena {arena}, fullest moment {fullest}");
            assert!(arena <= fullest * 5 / 4, "device {device}: {arena} for {fullest}");
        }
    }
}

/// The arrows beside each other carry different things, and say so; memory is what one is told.
#[test]
fn a_picture_tells_what_crosses() {
    let graph = model::build(&V3).expect("a graph");
    let placement = Placement { weights: weights(&graph, "_exps", 1), ..Placement::all_on(0, V3.layers + 1) };
    let plan = plan(&graph, &placement, &devices(&["gpu", "cpu"]), 1);
    let needs = vec![Needs { weights: 3 << 20, states: 5 << 20, scratch: 7 << 20 }; 2];
    let svg = picture::svg(&plan, &plan.capacity.full_step(), &needs);
    assert!(svg.contains("3.0 MiB weights + 5.0 MiB caches + 7.0 MiB scratch"), "{svg}");
    let labels: Vec<&str> = svg.lines().filter(|line| line.contains(" label\"")).collect();
    let with = |word: &str| labels.iter().filter(|label| label.contains(word)).count();
    assert_eq!(with("ffn_route.ids  "), with("ffn_route.weights  "));
    assert!(with("ffn_route.ids  ") > 0 && with("ffn_route  ") == 0, "{labels:?}");
}

/// The picture of a plan says each thing once, whatever the number of layers.
#[test]
fn a_picture_repeats_nothing() {
    let graph = model::build(&V3).expect("a graph");
    let placement = Placement { states: states(&graph, 1), ..Placement::all_on(0, V3.layers + 1) };
    let plan = plan(&graph, &placement, &devices(&["gpu", "<cpu>"]), 1);
    let step = plan.capacity.full_step();
    let svg = picture::svg(&plan, &step, &plan.needs());
    if let Ok(path) = std::env::var("FATHOM_PICTURE") {
        std::fs::write(path, &svg).expect("a file");
    }
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("&lt;cpu&gt;") && !svg.contains("<cpu>"));
    assert!(svg.contains("belongs to the cache that lives here: q_absorb, q, kv_store, attention,"), "{svg}");
    assert!(svg.contains("the 2 splits above run 57 times, for layer 3 to layer 59"), "{svg}");
    let off = Placement { ownership_check: false, ..placement.clone() };
    let crossing = self::plan(&graph, &off, &devices(&["gpu", "cpu"]), 1);
    let crossing = picture::svg(&crossing, &step, &crossing.needs());
    assert!(crossing.contains("<line class=\"state\" x1=\"840\""), "{crossing}");
    assert!(!svg.contains("<line class=\"state\" x1=\"840\""));
    if let Ok(path) = std::env::var("FATHOM_PICTURE") {
        std::fs::write(path + ".off.svg", &crossing).expect("a file");
    }
    for svg in [&svg, &crossing] {
        let boxes = svg.matches("class=\"split\"").count();
        assert!(boxes <= 16, "{boxes} boxes");
    }
}
