//! Hyperparameters from `config.json`: the published families, and what is refused.

use backend_api::Gating;
use model_deepseek::{
    Config,
    config::{ConfigError, FeedForward, MoeConfig, RopeScaling},
};
use serde_json::{Value, json};

/// Reads a configuration whose model has a head of its own.
fn read(config: &Value) -> Result<Config, ConfigError> {
    Config::from_hugging_face(config, &|name| name == "output.weight")
}

fn v3_json() -> Value {
    json!({
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 5,
        "first_k_dense_replace": 3, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "rope_theta": 10000, "max_position_embeddings": 163840, "moe_layer_freq": 1,
        "rope_scaling": { "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                          "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096 },
        "num_nextn_predict_layers": 1, "tie_word_embeddings": false, "attention_bias": false,
    })
}

fn with(mut base: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

fn v2_lite() -> Value {
    let scaling = json!({ "type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                          "original_max_position_embeddings": 4096 });
    with(
        v3_json(),
        json!({
            "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "q_lora_rank": null,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 6,
            "n_shared_experts": 2, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1,
            "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": false,
            "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "rope_scaling": scaling,
        }),
    )
}

fn moe(config: &Config) -> &MoeConfig {
    match config.feed_forward.last() {
        Some(FeedForward::Experts(moe)) => moe,
        other => panic!("no experts in the last layer: {other:?}"),
    }
}

#[test]
fn v3_as_published() {
    let config = read(&v3_json()).unwrap();
    assert_eq!((config.layers(), config.next_token_layers, config.tied_head), (5, 1, false));
    assert_eq!(config.attention.q_lora_rank, Some(1536));
    assert_eq!((config.attention.nope, config.attention.value), (128, 128));
    assert_eq!(format!("{:.6}", config.attention.scale), "0.135234");
    assert_eq!(config.attention.rope.magnitude, 1.0);
    assert_eq!(config.feed_forward[2], FeedForward::Dense { width: 18432 });
    let moe = moe(&config);
    assert_eq!((moe.experts, moe.width, moe.shared_width), (256, 2048, 2048));
    let route = moe.route;
    assert_eq!((route.used, route.groups, route.groups_used), (8, 8, 4));
    assert_eq!((route.gating, route.renormalise, route.scale), (Gating::Sigmoid, true, 2.5));
    assert!(config.notices.is_empty());
}

#[test]
fn v2_lite_as_published() {
    let config = read(&v2_lite()).unwrap();
    assert_eq!(config.attention.q_lora_rank, None);
    assert_eq!(format!("{:.6}", config.attention.scale), "0.114721");
    assert_eq!(config.attention.rope.magnitude, 1.0);
    let route = moe(&config).route;
    assert_eq!(
        (route.gating, route.groups, route.renormalise, route.scale),
        (Gating::Softmax, 1, false, 1.0)
    );
    assert_eq!(moe(&config).shared_width, 2816);
}

/// V2 chooses groups by their best expert; what is done instead is told.
#[test]
fn v2_limits_groups_and_says_how() {
    let changes = json!({ "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
                          "n_routed_experts": 160, "routed_scaling_factor": 16.0 });
    let config = read(&with(v2_lite(), changes)).unwrap();
    let route = moe(&config).route;
    assert_eq!((route.groups, route.groups_used, route.scale), (8, 3, 16.0));
    assert!(config.notices[0].contains("group_limited_greedy"), "{:?}", config.notices);
}

#[test]
fn moonlight_has_no_scaling_and_no_query_rank() {
    let changes = json!({ "rope_scaling": null, "q_lora_rank": null, "rope_theta": 50000.0 });
    let config = read(&with(v3_json(), changes)).unwrap();
    assert_eq!(config.attention.q_lora_rank, None);
    assert_eq!(config.attention.rope.scaling, RopeScaling::None);
    assert_eq!(config.attention.rope.base, 50000.0);
    assert_eq!(config.attention.scale, 1.0 / 192f64.sqrt());
}

/// Kimi-K2's betas are both 1: the ramp is a step.
#[test]
fn kimi_k2_has_betas_of_its_own() {
    let scaling = json!({ "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
                          "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096 });
    let changes = json!({ "model_type": "kimi_k2", "rope_theta": 50000.0, "rope_scaling": scaling,
                          "n_routed_experts": 384, "n_group": 1, "topk_group": 1 });
    let config = read(&with(v3_json(), changes)).unwrap();
    let rope = &config.attention.rope;
    // c(1) = 19.1…: pairs to 19 stay, from 20 on they are interpolated.
    for (pair, theta) in rope.inverse_frequencies().into_iter().enumerate() {
        let plain = 50000f64.powf(-(pair as f64) / 32.0);
        let expected = if pair <= 19 { plain } else { plain / 32.0 };
        assert!((theta / expected - 1.0).abs() < 1e-12, "pair {pair}: {theta} and {expected}");
    }
}

/// transformers 5 writes `rope_parameters`, and may list the layers' kinds.
#[test]
fn glm_4_7_flash() {
    let config = json!({
        "model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"], "intermediate_size": 10240,
        "moe_intermediate_size": 1536, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768,
        "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "qk_head_dim": 256,
        "v_head_dim": 256, "n_routed_experts": 64, "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 202752, "rope_interleave": true,
        "rope_parameters": { "partial_rotary_factor": 1.0, "rope_theta": 1000000, "rope_type": "default" },
    });
    let config = read(&config).unwrap();
    assert_eq!(config.attention.rope.base, 1e6);
    assert_eq!(config.attention.scale, 1.0 / 16.0);
    assert!(matches!(config.feed_forward[0], FeedForward::Dense { width: 10240 }));
    assert_eq!(moe(&config).route.gating, Gating::Sigmoid);
    assert_eq!(moe(&config).route.scale, 1.8);
}

/// `mscale` and `mscale_all_dim` apart: the rotation takes their ratio, the scores the latter alone.
#[test]
fn two_multipliers() {
    let grown = |m: f64| 1.0 + 0.1 * m * 40f64.ln();
    let table = [
        (json!(1.0), json!(1.0), 1.0, grown(1.0)),
        (json!(1.0), json!(0.5), grown(1.0) / grown(0.5), grown(0.5)),
        (json!(0.707), json!(0.707), 1.0, grown(0.707)),
        (json!(null), json!(null), grown(1.0), 1.0),
    ];
    for (mscale, all_dim, magnitude, growth) in table {
        let mut config = v3_json();
        config["rope_scaling"]["mscale"] = mscale;
        config["rope_scaling"]["mscale_all_dim"] = all_dim;
        let attention = read(&config).unwrap().attention;
        assert!((attention.rope.magnitude - magnitude).abs() < 1e-12, "{config}");
        assert!((attention.scale - growth * growth / 192f64.sqrt()).abs() < 1e-12, "{config}");
    }
}

#[test]
fn a_model_may_be_dense_throughout() {
    let config = with(v3_json(), json!({ "n_routed_experts": null }));
    let config = read(&config).unwrap();
    assert!(config.feed_forward.iter().all(|f| *f == FeedForward::Dense { width: 18432 }));
}

/// As it says, and where it says nothing as the tensors do.
#[test]
fn a_head_may_be_tied() {
    for (said, head, tied) in [
        (json!(true), true, true),
        (json!(false), false, false),
        (json!(null), true, false),
        (json!(null), false, true),
    ] {
        let json = with(v3_json(), json!({ "tie_word_embeddings": said }));
        let config = Config::from_hugging_face(&json, &|name| head && name == "output.weight").unwrap();
        assert_eq!(config.tied_head, tied, "{said}, with a head: {head}");
    }
}

#[test]
fn required_keys_are_named() {
    for key in [
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "moe_intermediate_size",
        "first_k_dense_replace",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_experts_per_tok",
        "topk_group",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
    ] {
        let error = read(&with(v3_json(), json!({ key: null }))).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("found nothing"), "{key}: {error}");
    }
    for key in ["factor", "original_max_position_embeddings"] {
        let mut config = v3_json();
        config["rope_scaling"][key] = Value::Null;
        let error = read(&config).unwrap_err().to_string();
        assert!(error.contains(&format!("rope_scaling.{key}")), "{key}: {error}");
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    let table = [
        ("model_type", json!("llama"), "`llama`"),
        ("model_type", json!("deepseek_v32"), "`deepseek_v32`"),
        ("model_type", json!(3), "a string"),
        ("hidden_act", json!("gelu"), "`silu`"),
        ("attention_bias", json!(true), "false"),
        ("moe_layer_freq", json!(2), "1"),
        ("rope_interleave", json!(false), "true"),
        ("index_topk", json!(2048), "not supported"),
        ("num_hidden_layers", json!(1_000_000), "1 to 4096"),
        ("hidden_size", json!(-1), "not negative"),
        ("hidden_size", json!(1.5), "an integer"),
        ("qk_rope_head_dim", json!(63), "an even number"),
        ("qk_rope_head_dim", json!(1 << 24), "an even number from 2 to 4096"),
        ("qk_head_dim", json!(100), "192"),
        ("num_key_value_heads", json!(8), "128"),
        ("scoring_func", json!("tanh"), "`softmax` or `sigmoid`"),
        ("topk_method", json!("best"), "noaux_tc"),
        ("n_group", json!(7), "a divisor of the 256"),
        ("topk_group", json!(9), "1 to 8"),
        ("num_experts_per_tok", json!(129), "1 to 128"),
        ("routed_scaling_factor", json!(1e300), "finite"),
        ("rms_norm_eps", json!(0), "above 0"),
        ("rope_theta", json!(0.5), "above 1"),
        ("rope_scaling", json!("yarn"), "an object"),
        ("mlp_layer_types", json!(["dense"]), "each of the 5 layers"),
    ];
    for (key, value, expected) in table {
        let error = read(&with(v3_json(), json!({ key: value }))).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains(expected), "{key}: {error}");
    }
    let mut dynamic = v3_json();
    dynamic["rope_scaling"]["type"] = json!("dynamic");
    let error = read(&dynamic).unwrap_err().to_string();
    assert!(error.contains("rope_scaling.type") && error.contains("`dynamic`"), "{error}");
    assert!(read(&json!([1, 2])).is_err());
}
