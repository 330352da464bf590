//! Hyperparameters from GGUF keys: what is read, what is assumed where a key is missing, and what is refused.

use backend_api::Gating;
use model_deepseek::{
    Config,
    config::{ConfigError, FeedForward, MoeConfig, RopeScaling},
    source::{
        Checkpoint, Keys,
        gguf_writer::{GgufWriter, NewValue},
    },
};
use std::{path::Path, sync::Arc};

/// The shape of V3, with two layers that run.
fn v3() -> Vec<(&'static str, NewValue)> {
    vec![
        ("general.architecture", "deepseek2".into()),
        ("deepseek2.vocab_size", 129_280u32.into()),
        ("deepseek2.context_length", 163_840u32.into()),
        ("deepseek2.embedding_length", 7168u32.into()),
        ("deepseek2.block_count", 2u32.into()),
        ("deepseek2.leading_dense_block_count", 1u32.into()),
        ("deepseek2.feed_forward_length", 18_432u32.into()),
        ("deepseek2.attention.head_count", 128u32.into()),
        ("deepseek2.attention.head_count_kv", 1u32.into()),
        ("deepseek2.attention.layer_norm_rms_epsilon", 1e-6f32.into()),
        ("deepseek2.attention.q_lora_rank", 1536u32.into()),
        ("deepseek2.attention.kv_lora_rank", 512u32.into()),
        ("deepseek2.attention.key_length", 576u32.into()),
        ("deepseek2.attention.value_length", 512u32.into()),
        ("deepseek2.attention.key_length_mla", 192u32.into()),
        ("deepseek2.attention.value_length_mla", 128u32.into()),
        ("deepseek2.rope.dimension_count", 64u32.into()),
        ("deepseek2.rope.freq_base", 10000f32.into()),
        ("deepseek2.rope.scaling.type", "yarn".into()),
        ("deepseek2.rope.scaling.factor", 40f32.into()),
        ("deepseek2.rope.scaling.original_context_length", 4096u32.into()),
        ("deepseek2.rope.scaling.yarn_log_multiplier", 0.1f32.into()),
        ("deepseek2.expert_count", 256u32.into()),
        ("deepseek2.expert_used_count", 8u32.into()),
        ("deepseek2.expert_shared_count", 1u32.into()),
        ("deepseek2.expert_feed_forward_length", 2048u32.into()),
        ("deepseek2.expert_weights_scale", 2.5f32.into()),
        ("deepseek2.expert_weights_norm", true.into()),
        ("deepseek2.expert_gating_func", 2u32.into()),
        ("deepseek2.expert_group_count", 8u32.into()),
        ("deepseek2.expert_group_used_count", 4u32.into()),
    ]
}

/// A change to a set of keys, without the prefix: another value, or none.
type Change<'a> = (&'a str, Option<NewValue>);

fn set<'a>(key: &'a str, value: impl Into<NewValue>) -> Change<'a> {
    (key, Some(value.into()))
}

fn without(key: &str) -> Change<'_> {
    (key, None)
}

/// Reads V3's keys with changes. `tensors` are those the file has.
fn read(changes: &[Change<'_>], tensors: &[&str]) -> Result<Config, ConfigError> {
    let mut keys = v3();
    for (key, value) in changes {
        let full = if key.contains("general.") || key.contains("tokenizer.") {
            (*key).to_owned()
        } else {
            format!("deepseek2.{key}")
        };
        keys.retain(|(known, _)| *known != full);
        if let Some(value) = value {
            keys.push((full.leak(), value.clone()));
        }
    }
    let mut writer = GgufWriter::new();
    for (key, value) in keys {
        writer.key(key, value).unwrap();
    }
    let checkpoint = Checkpoint::from_bytes(Path::new("test.gguf"), Arc::new(writer.header())).unwrap();
    let Keys::Gguf(metadata) = checkpoint.keys() else { panic!("a GGUF file has GGUF keys") };
    Config::from_gguf(metadata, &|name| tensors.contains(&name))
}

const SPLIT: [&str; 3] = ["output.weight", "blk.0.attn_q_a.weight", "blk.0.attn_k_b.weight"];
const LEGACY: [&str; 3] = ["output.weight", "blk.0.attn_q_a.weight", "blk.0.attn_kv_b.weight"];

fn moe(config: &Config) -> &MoeConfig {
    match config.feed_forward.last() {
        Some(FeedForward::Experts(moe)) => moe,
        other => panic!("no experts in the last layer: {other:?}"),
    }
}

#[test]
fn v3_is_read_as_published() {
    let config = read(&[], &SPLIT).unwrap();
    assert_eq!((config.layers(), config.embedding_length, config.vocabulary), (2, 7168, 129_280));
    let attention = &config.attention;
    assert_eq!((attention.heads, attention.q_lora_rank, attention.kv_lora_rank), (128, Some(1536), 512));
    assert_eq!((attention.nope, attention.rope.dims, attention.value), (128, 64, 128));
    assert_eq!(attention.cache_width(), 576);
    assert_eq!(config.feed_forward[0], FeedForward::Dense { width: 18_432 });
    let moe = moe(&config);
    assert_eq!((moe.experts, moe.width, moe.shared_width), (256, 2048, 2048));
    let route = moe.route;
    assert_eq!((route.used, route.groups, route.groups_used), (8, 8, 4));
    assert_eq!((route.gating, route.renormalise, route.scale), (Gating::Sigmoid, true, 2.5));
    assert!(!config.tied_head && config.notices.is_empty() && config.next_token_layers == 0);
}

/// `deepseek2-gguf.md`: kq_scale of V2-Lite and V3, and what linear factors and missing multipliers do.
#[test]
fn scores_and_rotation_grow_as_llama_cpp_has_it() {
    let ln = 40f64.ln();
    let grown = 1.0 + 0.1 * ln;
    // changes, growth of queries and keys each, magnitude of the rotation
    let table: [(&[Change<'_>], f64, f64); 9] = [
        (&[], grown, 1.0),
        (&[set("rope.scaling.yarn_log_multiplier", 0.0707f32)], 1.0 + 0.0707 * ln, 1.0),
        (&[without("rope.scaling.yarn_log_multiplier")], grown, grown),
        (&[set("rope.scaling.attn_factor", 1.5f32)], 1.5 * grown, 1.5),
        (&[without("rope.scaling.type")], grown * grown, 1.0),
        (&[set("rope.scaling.type", "linear"), without("rope.scaling.yarn_log_multiplier")], grown, 1.0),
        (&[set("rope.scaling.type", "none")], 1.0, 1.0),
        (&[set("rope.scaling.factor", 0f32)], 1.0, 1.0),
        (
            &[without("rope.scaling.type"), without("rope.scaling.factor"), set("rope.scale_linear", 40f32)],
            grown * grown,
            1.0,
        ),
    ];
    for (changes, growth, magnitude) in table {
        let attention = read(changes, &SPLIT).unwrap().attention;
        let scale = growth * growth / 192f64.sqrt();
        assert!((attention.scale / scale - 1.0).abs() < 1e-7, "{changes:?}: {} and {scale}", attention.scale);
        let found = attention.rope.magnitude;
        assert!((found / magnitude - 1.0).abs() < 1e-7, "{changes:?}: {found} and {magnitude}");
    }
    let lite = read(&[set("rope.scaling.yarn_log_multiplier", 0.0707f32)], &SPLIT).unwrap();
    assert_eq!(format!("{:.6}", lite.attention.scale), "0.114721");
    let v3 = read(&[], &SPLIT).unwrap();
    assert_eq!(format!("{:.6}", v3.attention.scale), "0.135234");
}

#[test]
fn yarn_keeps_fast_pairs_and_interpolates_slow_ones() {
    let rope = read(&[], &SPLIT).unwrap().attention.rope;
    let yarn = rope.inverse_frequencies();
    let mut plain = rope.clone();
    plain.scaling = RopeScaling::None;
    let plain = plain.inverse_frequencies();
    assert_eq!(yarn.len(), 32);
    // c(32) = 10.4…, c(1) = 22.5… for 64 elements, base 10000 and 4096 tokens: the ramp runs from 10 to 23.
    for pair in 0..32 {
        let keep = (1.0 - (pair as f64 - 10.0) / 13.0).clamp(0.0, 1.0);
        let expected = plain[pair] * (keep + (1.0 - keep) / 40.0);
        assert!((yarn[pair] / expected - 1.0).abs() < 1e-12, "pair {pair}: {} and {expected}", yarn[pair]);
    }
    assert_eq!(plain[0], 1.0);
    assert!((plain[16] - 0.01).abs() < 1e-15);

    let linear = read(&[set("rope.scaling.type", "linear")], &SPLIT).unwrap().attention.rope;
    for (found, plain) in linear.inverse_frequencies().iter().zip(&plain) {
        assert_eq!(*found, plain / 40.0);
    }
    // Files carry the betas, but they were never read.
    let betas = [set("rope.scaling.yarn_beta_fast", 1f32), set("rope.scaling.yarn_beta_slow", 8f32)];
    assert_eq!(read(&betas, &SPLIT).unwrap().attention.rope, rope);
}

#[test]
fn missing_keys_mean_what_they_did_when_files_lacked_them() {
    let check = |changes: &[Change<'_>], tensors: &[&str], holds: fn(&Config) -> bool| {
        let config = read(changes, tensors).unwrap();
        assert!(holds(&config), "{changes:?}: {config:?}");
    };
    check(&[without("leading_dense_block_count")], &SPLIT, |c| {
        c.feed_forward.iter().all(|f| matches!(f, FeedForward::Experts(_)))
    });
    check(&[without("expert_gating_func")], &SPLIT, |c| moe(c).route.gating == Gating::Softmax);
    check(&[set("expert_gating_func", 0u32)], &SPLIT, |c| moe(c).route.gating == Gating::Softmax);
    let glm = [without("expert_gating_func"), set("block_count", 47u32), set("vocab_size", 154_880u32)];
    check(&glm, &SPLIT, |c| moe(c).route.gating == Gating::Sigmoid);
    check(&[without("expert_weights_scale")], &SPLIT, |c| moe(c).route.scale == 1.0);
    check(&[set("expert_weights_scale", 0f32)], &SPLIT, |c| moe(c).route.scale == 1.0);
    check(&[without("expert_weights_norm")], &SPLIT, |c| !moe(c).route.renormalise);
    let groups = [without("expert_group_count"), without("expert_group_used_count")];
    check(&groups, &SPLIT, |c| (moe(c).route.groups, moe(c).route.groups_used) == (1, 1));
    check(&[without("attention.head_count_kv")], &SPLIT, |c| c.attention.heads == 128);
    let heads = [set("attention.head_count", vec![128u32; 2]), without("attention.head_count_kv")];
    check(&heads, &SPLIT, |c| c.attention.heads == 128);
    check(&[without("rope.freq_base")], &SPLIT, |c| c.attention.rope.base == 10000.0);
    check(&[without("rope.scaling.original_context_length")], &SPLIT, |c| {
        matches!(c.attention.rope.scaling, RopeScaling::Yarn { original_context: 163_840.0, .. })
    });
    check(&[set("expert_shared_count", 0u32)], &SPLIT, |c| moe(c).shared_width == 0);
    check(&[set("nextn_predict_layers", 1u32)], &SPLIT, |c| (c.layers(), c.next_token_layers) == (1, 1));
    check(&[], &SPLIT[1..], |c| c.tied_head);
    // Lite: a single query matrix, known by its tensor.
    let lite = ["output.weight", "blk.0.attn_q.weight", "blk.0.attn_k_b.weight"];
    check(&[without("attention.q_lora_rank")], &lite, |c| c.attention.q_lora_rank.is_none());
    check(&[set("attention.q_lora_rank", 0u32)], &lite, |c| c.attention.q_lora_rank.is_none());
    // Legacy: the plain lengths are those of expanded heads.
    let lengths = [without("attention.key_length_mla"), without("attention.value_length_mla")];
    let legacy = [set("attention.key_length", 192u32), set("attention.value_length", 96u32)];
    let all: Vec<_> = lengths.iter().chain(&legacy).cloned().collect();
    check(&all, &LEGACY, |c| (c.attention.nope, c.attention.value) == (128, 96));
    // … and without those, the residual stream divided among the heads.
    let none = [
        without("attention.key_length"),
        without("attention.value_length"),
        set("embedding_length", 16384u32),
    ];
    let all: Vec<_> = lengths.iter().chain(&none).cloned().collect();
    check(&all, &LEGACY, |c| (c.attention.nope, c.attention.value) == (64, 128));
    // The vocabulary is as long as the list of tokens.
    let tokens = [without("vocab_size"), set("tokenizer.ggml.tokens", vec!["a", "b", "c"])];
    check(&tokens, &SPLIT, |c| c.vocabulary == 3);
}

#[test]
fn arrays_hold_one_value_per_layer() {
    let config = read(
        &[
            set("block_count", 4u32),
            set("leading_dense_block_count", 2u32),
            set("feed_forward_length", vec![100u32, 200, 0, 0]),
            set("expert_used_count", vec![0u32, 0, 4, 6]),
            set("expert_feed_forward_length", vec![0i32, 0, 32, 64]),
            set("attention.head_count", vec![128u32; 4]),
        ],
        &SPLIT,
    )
    .unwrap();
    let shapes: Vec<_> = config
        .feed_forward
        .iter()
        .map(|f| match f {
            FeedForward::Dense { width } => (*width, 0),
            FeedForward::Experts(moe) => (moe.width, moe.route.used),
        })
        .collect();
    assert_eq!(shapes, [(100, 0), (200, 0), (32, 4), (64, 6)]);
    assert_eq!(config.attention.heads, 128);
}

#[test]
fn integers_of_any_width_are_integers() {
    let config = read(&[set("block_count", 2u64), set("expert_used_count", 8i32)], &SPLIT).unwrap();
    assert_eq!((config.layers(), moe(&config).route.used), (2, 8));
}

/// Each of these keys has to be there, and the error says which is not.
#[test]
fn required_keys_are_named() {
    let keys = [
        "context_length",
        "embedding_length",
        "block_count",
        "vocab_size",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "attention.q_lora_rank",
        "attention.kv_lora_rank",
        "attention.key_length_mla",
        "attention.value_length_mla",
        "rope.dimension_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "expert_shared_count",
        "expert_group_used_count",
    ];
    for key in keys {
        let error = read(&[without(key)], &SPLIT).unwrap_err().to_string();
        assert!(error.contains(&format!("deepseek2.{key}")), "{key}: {error}");
        assert!(error.contains("found nothing"), "{key}: {error}");
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    let table: Vec<(Change<'_>, &str)> = vec![
        (set("attention.temperature_scale", 0.1f32), "not supported"),
        (set("block_count", 0u32), "1 to 4096 layers"),
        (set("block_count", u32::MAX), "1 to 4096 layers"),
        (set("block_count", "two"), "expected u32"),
        (set("nextn_predict_layers", 2u32), "more than the 2"),
        (set("embedding_length", 0u32), "1 to"),
        (set("embedding_length", u32::MAX), "1 to"),
        (set("embedding_length", 1.5f32), "expected u32"),
        (set("attention.head_count", 0u32), "1 to"),
        (set("attention.head_count", vec![128u32, 64]), "the same in all layers"),
        (set("attention.head_count", vec![128u32]), "one for each of the 2 layers"),
        (set("attention.head_count_kv", 8u32), "1, or 128"),
        (set("attention.layer_norm_rms_epsilon", f32::NAN), "finite"),
        (set("attention.key_length_mla", 64u32), "more than the 64"),
        (set("rope.dimension_count", 63u32), "an even number"),
        (set("rope.dimension_count", 1u32 << 24), "an even number from 2 to 4096"),
        (set("rope.freq_base", 1f32), "above 1"),
        (set("rope.scaling.type", "longrope"), "`none`, `linear` or `yarn`"),
        (set("rope.scaling.factor", -1f32), "above 0"),
        (set("rope.scaling.factor", f32::INFINITY), "finite"),
        (set("rope.scaling.yarn_log_multiplier", -10f32), "above 0"),
        (set("expert_count", 0u32), "at least 1"),
        (set("expert_used_count", 0u32), "1 to 128"),
        (set("expert_used_count", 129u32), "1 to 128"),
        (set("expert_group_count", 7u32), "a divisor of the 256 experts"),
        (set("expert_group_used_count", 9u32), "1 to 8"),
        (set("expert_gating_func", 4u32), "1 (softmax) or 2 (sigmoid)"),
        (set("expert_weights_norm", 1u32), "bool"),
        (set("expert_shared_count", u32::MAX), "1 to"),
        (set("feed_forward_length", vec![0u32, 5]), "1 to"),
    ];
    for (change, expected) in table {
        let key = format!("deepseek2.{}", change.0);
        let error = read(std::slice::from_ref(&change), &SPLIT).unwrap_err().to_string();
        assert!(error.contains(&key) || key.contains("nextn"), "{change:?}: {error}");
        assert!(error.contains(expected), "{change:?}: {error}");
    }
}

#[test]
fn another_architecture_is_named() {
    let error = read(&[set("general.architecture", "llama")], &SPLIT).unwrap_err().to_string();
    assert!(error.contains("`llama`") && error.contains("general.architecture"), "{error}");
    let error = read(&[without("general.architecture")], &SPLIT).unwrap_err().to_string();
    assert!(error.contains("general.architecture"), "{error}");
}
