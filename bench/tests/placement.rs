//! The placement program on real headers: what crosses, how often, and what fits.
#![cfg(feature = "cpu")]

mod common;

use common::run;
use graph::report::human;
use serde_json::Value;
use std::{path::Path, sync::OnceLock};

const PLACEMENT: &str = env!("CARGO_BIN_EXE_placement");

/// A model, its layers, and those of them with experts.
struct Header {
    path: String,
    layers: usize,
    moe: usize,
}

/// The embedded model, and headers of real ones.
fn headers() -> &'static [Header] {
    static HEADERS: OnceLock<(tempfile::TempDir, Vec<Header>)> = OnceLock::new();
    let (_, headers) = HEADERS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let made = |shape: &str, layers, moe| {
            let path = folder.path().join(format!("{shape}.gguf")).to_str().unwrap().to_owned();
            let arguments = ["--shape", shape, "--format", "q4_k_m", "--header-only", "--out", &path];
            run(env!("CARGO_BIN_EXE_synth"), &arguments).ok();
            Header { path, layers, moe }
        };
        let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/austen-q4_k_m.gguf");
        let embedded = Header { path: embedded.to_str().unwrap().to_owned(), layers: 3, moe: 2 };
        let headers = vec![embedded, made("v2-lite", 27, 26), made("v3", 61, 58), made("kimi-k2", 61, 60)];
        (folder, headers)
    });
    headers
}

fn place(header: &Header, options: &str) -> common::Said {
    let mut arguments = vec!["--model", header.path.as_str()];
    arguments.extend(options.split_whitespace());
    run(PLACEMENT, &arguments)
}

fn report(header: &Header, options: &str) -> Value {
    place(header, &format!("{options} --format json")).json()
}

/// Of each node: name, owner and reason.
fn nodes(report: &Value) -> impl Iterator<Item = (&str, &str, &str)> {
    let splits = report["splits"].as_array().unwrap();
    splits.iter().flat_map(|split| split["nodes"].as_array().unwrap()).map(|node| {
        let word = |key: &str| node[key].as_str().unwrap();
        (word("name"), word("owner"), word("reason"))
    })
}

fn transfers(report: &Value) -> impl Iterator<Item = &Value> {
    let splits = report["splits"].as_array().unwrap();
    splits.iter().flat_map(|split| split["transfers"].as_array().unwrap())
}

fn splits(report: &Value) -> usize {
    report["splits"].as_array().unwrap().len()
}

#[track_caller]
fn check_nothing_kept_crosses(report: &Value, what: &str) {
    let bytes = &report["bytes_per_step"];
    assert_eq!((bytes["state"].as_u64(), bytes["weight"].as_u64()), (Some(0), Some(0)), "{what}");
    let kept = |transfer: &&Value| transfer["kind"] == "state" || transfer["kind"] == "weight";
    assert_eq!(transfers(report).find(kept), None, "{what}");
    let sum: u64 = transfers(report).map(|transfer| transfer["bytes"].as_u64().unwrap()).sum();
    assert_eq!(bytes["activation"].as_u64().unwrap() + bytes["input"].as_u64().unwrap(), sum, "{what}");
}

const ALL: &str = "--device null:gpu:9000GiB --n-gpu-layers all";

#[test]
fn caches_in_main_memory_keep_their_regions_there() {
    for header in headers() {
        for tokens in [1, 512] {
            let what = format!("{} {tokens}", header.path);
            let report = report(header, &format!("{ALL} --no-kv-offload --ctx 1024 --tokens {tokens}"));
            check_nothing_kept_crosses(&report, &what);
            assert_eq!(splits(&report), 2 * header.layers + 2, "{what}");
            for layer in 0..header.layers {
                for part in ["q_absorb", "kv_store", "attention", "v_absorb"] {
                    let name = format!("blk.{layer}.{part}");
                    let (_, owner, reason) = nodes(&report)
                        .find(|(node, ..)| *node == name)
                        .unwrap_or_else(|| panic!("{what}: {name}"));
                    assert_eq!(owner, "cpu", "{what}: {name}");
                    assert_eq!(reason, format!("it belongs to cache.{layer}, which lives on cpu"), "{what}");
                }
            }
        }
    }
}

#[test]
fn caches_on_the_accelerator_stay_there() {
    for header in headers() {
        for tokens in [1, 512] {
            let report = report(header, &format!("{ALL} --ctx 1024 --tokens {tokens}"));
            check_nothing_kept_crosses(&report, &header.path);
            assert_eq!(splits(&report), 2);
        }
    }
}

#[test]
fn experts_in_main_memory_get_a_row_and_give_one_back() {
    for header in headers() {
        let model = model_deepseek::Model::open(Path::new(&header.path)).unwrap();
        let d = model.config().embedding_length as u64;
        for tokens in [1, 512] {
            let what = format!("{} {tokens}", header.path);
            let report = report(header, &format!("{ALL} --cpu-moe --ctx 1024 --tokens {tokens}"));
            check_nothing_kept_crosses(&report, &what);
            assert_eq!(splits(&report), 2 * header.moe + 2, "{what}");
            let row = 4 * d * tokens;
            let from_experts: Vec<u64> = transfers(&report)
                .filter(|transfer| transfer["from"] == "cpu" && transfer["kind"] == "activation")
                .map(|transfer| transfer["bytes"].as_u64().unwrap())
                .collect();
            // The embedding, and for each layer with experts one row a token.
            assert_eq!(from_experts, vec![row; header.moe + 1], "{what}");
            let to_experts = transfers(&report).filter(|transfer| transfer["to"] == "cpu");
            let names: std::collections::BTreeSet<String> = to_experts
                .map(|transfer| transfer["value"].as_str().unwrap().rsplit('.').next().unwrap().to_owned())
                .collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            assert_eq!(names, ["ffn_norm", "ids", "weights"], "{what}: the normed row and the routing");
        }
    }
}

#[test]
fn experts_and_caches_in_main_memory_take_the_fewest_splits() {
    for header in headers() {
        for tokens in [1, 512] {
            let options = format!("{ALL} --cpu-moe --no-kv-offload --ctx 1024 --tokens {tokens}");
            let report = report(header, &options);
            check_nothing_kept_crosses(&report, &header.path);
            // Between a layer's attention and its experts lie weights of the accelerator, and between its experts and
            // the next layer's attention too: each of them is left and entered once.
            assert_eq!(splits(&report), 2 * (header.layers + header.moe) + 2, "{}", header.path);
        }
    }
}

#[test]
fn without_the_check_the_defect_is_there() {
    for header in headers() {
        let report = report(header, &format!("{ALL} --no-kv-offload --ctx 1024 --ownership-check off"));
        assert!(report["bytes_per_step"]["state"].as_u64().unwrap() > 0, "{}", header.path);
        let attention = nodes(&report).filter(|(name, ..)| name.ends_with(".attention"));
        assert!(attention.map(|(_, owner, _)| owner).all(|owner| owner == "gpu"), "{}", header.path);
    }
}

#[test]
fn what_does_not_fit_is_made_to() {
    const GIB: u64 = 1 << 30;
    for header in &headers()[1..] {
        for gib in [8, 16, 24, 48] {
            let what = format!("{}, {gib} GiB", header.path);
            let options = format!("--device null:gpu:{gib}GiB --ctx 4096");
            let (decode, prefill) =
                (report(header, &options), report(header, &format!("{options} --tokens 512")));
            let part = |report: &Value, part: &str| report["memory"]["gpu"][part].as_u64().unwrap();
            // What running the model takes, whichever of its steps is shown.
            assert_eq!(decode["memory"], prefill["memory"], "{what}");
            let used = part(&decode, "weights") + part(&decode, "states") + part(&decode, "scratch");
            let margin = (gib * GIB / 16).min(GIB);
            assert!(used <= gib * GIB - margin, "{what}: {used}");
            // Of what is open, the experts of another layer do not fit: beside the margin, what is free is less than
            // a layer.
            let all = decode["memory"]["cpu"]["weights"].as_u64().unwrap();
            let layer = (all + part(&decode, "weights")) / header.moe as u64;
            assert!(used + layer + margin > gib * GIB || all < 2 * GIB, "{what}: {used} used, {all} left");
            assert!(used > gib * GIB / 8, "{what}: {used} used of {gib} GiB");
            check_nothing_kept_crosses(&decode, &what);
            check_nothing_kept_crosses(&prefill, &what);
        }
        let fixed = r"--device null:gpu:24GiB --override-tensor blk\.9\.ffn_.*_exps=gpu";
        let report = report(header, fixed);
        let experts = nodes(&report).find(|(name, ..)| *name == "blk.9.ffn_down_exps").unwrap();
        assert_eq!(experts.1, "gpu", "{}: {}", header.path, experts.2);
    }
    let v3 = &headers()[2];
    let error = place(v3, "--device null:gpu:8GiB --n-gpu-layers all --override-tensor exps=gpu").error();
    for part in ["does not fit", "gpu: ", "of weights", "of caches", "of scratch memory", "may be used"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn flags_do_what_they_do_elsewhere() {
    let header = &headers()[1];
    let owners = |options: &str, part: &str| -> Vec<String> {
        let report = report(header, &format!("--device null:gpu:900GiB --fit off {options}"));
        let mut found: Vec<(usize, String)> = nodes(&report)
            .filter_map(|(name, owner, _)| {
                let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
                (rest == part).then(|| (layer.parse().unwrap(), owner.to_owned()))
            })
            .collect();
        found.sort();
        found.into_iter().map(|(_, owner)| owner).collect()
    };
    let first_on_cpu = |n: usize, of: usize| -> Vec<String> {
        (0..of).map(|layer| if layer < n { "cpu" } else { "gpu" }.to_owned()).collect()
    };
    // The last N of 27 layers and the output; caches go with them.
    for (n, on_cpu) in
        [("0", 27), ("1", 27), ("2", 26), ("10", 18), ("27", 1), ("28", 0), ("99", 0), ("all", 0)]
    {
        for part in ["attn_output", "kv_store", "attention"] {
            assert_eq!(owners(&format!("-ngl {n}"), part), first_on_cpu(on_cpu, 27), "-ngl {n}: {part}");
        }
    }
    // Layer 0 is dense; experts are those of layers 1 to 26.
    let experts = |options: &str| owners(options, "ffn_down_exps");
    assert_eq!(experts("-cmoe"), vec!["cpu"; 26]);
    assert_eq!(experts("-ncmoe 5"), first_on_cpu(4, 26));
    assert_eq!(owners("-cmoe", "ffn_down_shexp"), vec!["gpu"; 26], "shared experts stay");
    assert_eq!(owners("-cmoe", "ffn_gate_inp"), vec!["gpu"; 26], "the router stays");
    assert_eq!(owners("--n-cpu-ffn 3", "ffn_down"), ["cpu"]);
    assert_eq!(owners("--n-cpu-ffn 3", "ffn_down_exps"), vec!["gpu"; 26]);
    // Of several patterns the first counts; a cache by its layer beats all.
    assert_eq!(experts(r"-ot blk\.3\.ffn=gpu -ot exps=CPU"), {
        let mut all = vec!["cpu".to_owned(); 26];
        all[2] = "gpu".to_owned();
        all
    });
    assert_eq!(owners("-nkvo --kv-layers-on gpu=2-26", "attention"), first_on_cpu(2, 27));
    assert_eq!(owners("--kv-layers-on cpu=0", "attention"), first_on_cpu(1, 27));
    // An override moves no cache, and no node but its own.
    assert_eq!(owners("-nkvo -ot attn_v_b=gpu", "attention"), vec!["cpu"; 27]);
    assert_eq!(owners("-nkvo -ot attn_v_b=gpu", "v_absorb"), vec!["gpu"; 27]);
    assert_eq!(owners("-nkvo --absorb layer", "v_absorb"), vec!["gpu"; 27]);
    assert_eq!(owners("-nkvo", "v_absorb"), vec!["cpu"; 27]);
}

#[test]
fn rates_decide_for_absorb_auto() {
    let header = &headers()[2];
    let owner = |rates: &str| -> String {
        let options = format!("--device null:gpu:900GiB:{rates} --fit off -nkvo --absorb auto");
        let report = report(header, &options);
        nodes(&report).find(|(name, ..)| *name == "blk.5.v_absorb").unwrap().1.to_owned()
    };
    assert_eq!(owner("0.1:800"), "cpu", "a slow bus keeps the products at the cache");
    assert_eq!(owner("10000:800"), "gpu", "a fast one lets them use the fast memory");
}

#[test]
fn two_placements_side_by_side() {
    let header = &headers()[0];
    let options = format!("{ALL} --no-kv-offload --ctx 512");
    let table = place(header, &format!("{options} --compare")).ok();
    for part in [
        "first",
        "second",
        "state bytes per step",
        "<>",
        "blk.*.attention (3 times)",
        "cache.*, which lives on cpu",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let json = report(header, &format!("{options} --compare"));
    assert_eq!(json["first"]["bytes_per_step"]["state"], 0);
    assert!(json["second"]["bytes_per_step"]["state"].as_u64().unwrap() > 0);
    let differing = json["differences"].as_array().unwrap();
    assert!(
        differing.iter().any(|node| node["node"] == "blk.1.attention" && node["first"]["device"] == "cpu")
    );
    // A second set of options.
    let mut arguments = vec!["--model", &header.path, "--format", "json", "--compare", "--cpu-moe -nkvo"];
    arguments.extend(ALL.split(' '));
    let json = run(PLACEMENT, &arguments).json();
    assert_eq!((splits(&json["first"]), splits(&json["second"])), (2, 12));
    // The same is the same.
    let mut arguments = vec!["--model", &header.path, "--compare=--strict"];
    arguments.extend(ALL.split(' '));
    assert!(run(PLACEMENT, &arguments).ok().contains("every node has the same owner"));
    // Whose it is cannot be told where the shell took the quotes.
    for option in ["--strict", "-nkvo", "--n-cpu-moe", "-ncmoe=2"] {
        let mut arguments = vec!["--model", &header.path, "--compare", option];
        arguments.extend(ALL.split(' '));
        let error = run(PLACEMENT, &arguments).error();
        assert!(error.contains(&format!("--compare: is {option} of the second placement")), "{error}");
    }
    let mut arguments = vec!["--model", &header.path, "--compare", "--format", "json"];
    arguments.extend(ALL.split(' '));
    assert!(run(PLACEMENT, &arguments).json()["differences"].is_array());
}

#[test]
fn a_picture_is_an_svg() {
    let header = &headers()[1];
    let options = format!("{ALL} --cpu-moe --ctx 512");
    // What running takes, as the table has it: the prompt's scratch memory, too.
    let needs = &report(header, &options)["memory"]["gpu"];
    let scratch = human(needs["scratch"].as_u64().unwrap());
    let svg = place(header, &format!("{options} --format svg")).ok();
    assert!(svg.contains(&format!(" + {scratch} scratch")), "{scratch}");
    let svg = place(&headers()[2], &format!("{ALL} --no-kv-offload --cpu-moe --format svg")).ok();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(
        svg.contains("gpu") && svg.contains("belongs to the cache that lives here") && svg.contains("times")
    );
}

#[test]
fn kv_len_counts_the_rows_that_are_read() {
    let header = &headers()[1];
    let state = |kv_len: &str| {
        let report =
            report(header, &format!("{ALL} -nkvo --ctx 4096 --ownership-check off --kv-len {kv_len}"));
        report["bytes_per_step"]["state"].as_u64().unwrap()
    };
    // 27 layers, 576 values of two bytes.
    assert_eq!(state("1000"), 27 * 1000 * 1152);
    assert_eq!(state("1"), 27 * 1152);
    let bad = [
        ("--kv-len 5000", "--kv-len: expected 1 to 4096"),
        ("--tokens 9 --kv-len 8", "--kv-len: expected 9 to 4096"),
        ("--tokens 5000", "--tokens 5000: expected at most the context of 4096"),
    ];
    for (options, message) in bad {
        let error = place(header, &format!("{ALL} --ctx 4096 {options}")).error();
        assert!(error.contains(message), "{error}");
    }
}

/// The most memory that a program had resident, in bytes. It is looked at while the program waits with more output than
/// a pipe holds: when all is planned.
#[cfg(target_os = "linux")]
fn peak_memory(arguments: &[&str]) -> (u64, Vec<u8>) {
    use std::{fs, io::Read, process::Stdio};
    let mut child = common::command(PLACEMENT)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut all = vec![0; 1];
    output.read_exact(&mut all).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"));
    output.read_to_end(&mut all).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(all.len() > 1 << 17, "{} bytes: more than a pipe holds", all.len());
    (peak.unwrap().trim().parse::<u64>().unwrap() << 10, all)
}

#[test]
#[cfg(target_os = "linux")]
fn the_largest_header_is_planned_in_little_memory() {
    let v3 = &headers()[2];
    for tokens in ["1", "512"] {
        let mut arguments = vec!["--model", &v3.path, "--tokens", tokens, "--format", "json", "-nkvo"];
        arguments.extend(ALL.split(' '));
        let (peak, json) = peak_memory(&arguments);
        let report: Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(splits(&report), 2 * v3.layers + 2);
        assert!(peak <= 500_000_000, "{peak} bytes for {tokens} tokens");
        // A number that is none would be small too.
        assert!(peak > 1_000_000, "{peak} bytes");
    }
}

#[test]
fn mistakes_are_told() {
    let header = &headers()[0];
    let cases = [
        ("-ot exps(=gpu", "override-tensor: expected a regular expression"),
        ("-ot nothing_like_it=gpu", "`nothing_like_it`, which matches none"),
        ("-ot exps=tpu", "found `tpu`"),
        ("--kv-layers-on cpu=0-3", "layers from 0 to 2, found 0-3"),
        ("--fit tpu=1GiB", "found `tpu`"),
        (
            "--device null:GPU:1GiB",
            "device: expected names that differ in more than case, found `gpu` and `GPU`",
        ),
        ("--device null:gpu:2GiB", "--device null:gpu: expected the same memory"),
        ("--compare=--nonsense", "--compare: unexpected argument"),
        ("--compare=--help", "--compare: unexpected argument '--help' found"),
        ("--compare=-h", "--compare: unexpected argument '-h' found"),
        ("--batch 0", "batch: expected at least 1 token, found 0"),
        ("--compare='open", "--compare: a quote is open"),
        ("--compare --format svg", "shows one placement"),
    ];
    for (options, message) in cases {
        let error = place(header, &format!("--device null:gpu:1GiB --ctx 512 {options}")).error();
        assert!(error.contains(message), "{options}: {error}");
    }
    let said = place(header, "--device null:gpu");
    assert_eq!(said.code, Some(2));
    assert!(said.err.contains("null:NAME:SIZE"), "{said:?}");
    // A hypothetical device only plans.
    let generate = ["--model", &header.path, "--device", "null:gpu:1GiB", "--prompt", "x", "--predict", "1"];
    assert!(run(env!("CARGO_BIN_EXE_generate"), &generate).error().contains("hypothetical"));
}

/// What runs a model says what it was planned as: in a line, and on demand node by node, as `placement` has it.
#[test]
fn programs_tell_their_plans() {
    let header = &headers()[0];
    let placed = "--device cpu1 --no-kv-offload --n-gpu-layers all --fit off";
    let report = report(header, placed);
    let bytes = |kind: &str| report["bytes_per_step"][kind].as_u64().unwrap();
    assert_eq!((splits(&report), bytes("state"), bytes("weight"), bytes("input")), (8, 0, 0, 4));
    let line = format!(
        "decode on cpu + cpu1: 8 splits; per step of 1 token: {} activation, 0 B state, 0 B weight, 4 B input",
        human(bytes("activation"))
    );
    let programs = [
        (env!("CARGO_BIN_EXE_generate"), "--predict 1 --temperature 0"),
        (env!("CARGO_BIN_EXE_throughput"), "--prefill 4 --decode 1 --repeat 1"),
    ];
    for (program, own) in programs {
        let said = |more: &str| {
            let arguments = format!("--model {} {placed} {own} {more}", header.path);
            let said = run(program, &arguments.split_whitespace().collect::<Vec<_>>());
            assert_eq!(said.code, Some(0), "{}", said.err);
            said.err
        };
        let short = said("");
        assert!(short.contains(&line), "{short}");
        assert!(short.contains("prefill on cpu + cpu1: 8 splits; per step of "), "{short}");
        assert!(!short.contains("blk.0.attention"), "{short}");
        let long = said("--verbose");
        assert!(long.contains(&line), "{long}");
        for (name, _, reason) in nodes(&report) {
            let told = |line: &str| line.trim_start().starts_with(name) && line.ends_with(reason);
            assert!(long.lines().any(told), "{name}: {reason}: {long}");
        }
    }
}

/// What fitting moved is not said to be the user's doing.
#[test]
fn what_had_no_room_is_said_to_have_had_none() {
    let header = &headers()[1];
    let reason_of = |options: &str, node: &str| {
        let report = report(header, options);
        let found = nodes(&report).find(|(name, ..)| *name == node).map(|(.., reason)| reason.to_owned());
        found.unwrap()
    };
    let experts = "blk.1.ffn_down_exps";
    let by_fit = reason_of("--device null:gpu:4GiB", experts);
    assert_eq!(by_fit, "it reads blk.1.ffn_down_exps.weight, which was placed on cpu for want of room");
    let by_user = reason_of("--device null:gpu:24GiB --cpu-moe", experts);
    assert_eq!(by_user, "it reads blk.1.ffn_down_exps.weight, which was placed on cpu");
    let cache = reason_of("--device null:gpu:1500MiB -ngl all --ctx 32768", "blk.0.attention");
    assert_eq!(cache, "it belongs to cache.0, which lives on cpu for want of room");
    // Whole layers, too, with all that they have; those that were said to be there are there for another reason.
    let v3 = &headers()[2];
    let reasons = report(v3, "--device null:gpu:8GiB --kv-layers-on gpu=7");
    let reason = |node: &str| nodes(&reasons).find(|(name, ..)| *name == node).unwrap().2;
    assert_eq!(reason("blk.5.attention"), "it belongs to cache.5, which lives on cpu for want of room");
    assert_eq!(reason("blk.7.attention"), "it belongs to cache.7, which lives on gpu");
    assert!(reason("blk.5.attn_q_a").ends_with("which is loaded on cpu for want of room"));
    let few = report(v3, "--device null:gpu:2000GiB --n-gpu-layers 10 --ctx 512");
    assert!(nodes(&few).all(|(.., reason)| !reason.contains("room")));
    // Caches that were said to be on the accelerator are not counted among what is not.
    let said = place(v3, "--device null:gpu:8GiB --kv-layers-on gpu=0-60").err;
    assert!(said.contains("not everything fits: on cpu are ") && !said.contains("the caches"), "{said}");
}

/// Layers that are spread over several accelerators cost one split more for each border between two of them.
#[test]
fn a_further_accelerator_is_a_further_split() {
    for header in &headers()[1..] {
        let Header { layers, moe, .. } = *header;
        let rules = [
            ("", 2),
            ("-nkvo", 2 * layers + 2),
            ("-cmoe", 2 * moe + 2),
            ("-nkvo -cmoe", 2 * (layers + moe) + 2),
        ];
        for (options, with_one) in rules {
            for more in [1, 2] {
                let devices =
                    ["a", "b", "c"][..=more].iter().map(|name| format!("--device null:{name}:2000GiB"));
                let devices: Vec<String> = devices.collect();
                let report = report(header, &format!("{} {options} --ctx 512", devices.join(" ")));
                assert_eq!(splits(&report), with_one + more, "{}: {options}", header.path);
                let bytes = &report["bytes_per_step"];
                assert_eq!((&bytes["state"], &bytes["weight"]), (&0.into(), &0.into()), "{options}");
            }
        }
    }
}
