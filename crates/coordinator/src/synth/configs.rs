//! Configurations of the families at each scale. Full scale: the published values (reference §1.1; model cards).

use longshore_models::arch::Family;
use serde_json::{Value, json};

use crate::synth::Scale;

/// `config.json` of a family, nothing quantised.
pub(super) fn config(family: Family, scale: Scale) -> Value {
    let mut config = match family {
        Family::Llama => dense(scale),
        Family::Qwen3 => qwen3(scale),
        Family::Qwen3Moe => qwen3_moe(scale),
        Family::DeepseekV3 => deepseek_v3(scale),
        Family::DeepseekV32 => deepseek_v32(scale),
        Family::GlmMoeDsa => glm_moe_dsa(scale),
        Family::KimiK25 => kimi_k25(scale),
    };
    config["architectures"] = json!([family.architecture()]);
    config["model_type"] = json!(family.name());
    config["torch_dtype"] = json!("bfloat16");
    config
}

/// Llama-3.1-8B, and smaller.
fn dense(scale: Scale) -> Value {
    let [hidden, heads, kv_heads, inner, layers, vocab] = match scale {
        Scale::Tiny => [128, 8, 4, 256, 3, 512],
        Scale::Small => [1024, 16, 8, 3584, 32, 32_000],
        Scale::Full => [4096, 32, 8, 14_336, 32, 128_256],
    };
    json!({
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden / heads, "intermediate_size": inner, "num_hidden_layers": layers,
        "vocab_size": vocab, "tie_word_embeddings": false, "attention_bias": false,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "silu",
    })
}

/// Qwen3-8B, and smaller.
fn qwen3(scale: Scale) -> Value {
    let mut config = dense(scale);
    if scale == Scale::Full {
        config["intermediate_size"] = json!(12_288);
        config["num_hidden_layers"] = json!(36);
        config["vocab_size"] = json!(151_936);
    }
    config["rms_norm_eps"] = json!(1e-6);
    config["rope_theta"] = json!(1_000_000.0);
    config
}

/// Qwen3-30B-A3B, and smaller.
fn qwen3_moe(scale: Scale) -> Value {
    let mut config = qwen3(scale);
    let [experts, inner] = match scale {
        Scale::Tiny => [8, 128],
        Scale::Small => [16, 512],
        Scale::Full => [128, 768],
    };
    if scale == Scale::Small {
        config["num_hidden_layers"] = json!(16);
    }
    if scale == Scale::Full {
        for (key, value) in [
            ("hidden_size", 2048),
            ("num_key_value_heads", 4),
            ("intermediate_size", 6144),
            ("num_hidden_layers", 48),
        ] {
            config[key] = json!(value);
        }
    }
    config["num_experts"] = json!(experts);
    config["moe_intermediate_size"] = json!(inner);
    config["num_experts_per_tok"] = json!(8.min(experts));
    config["decoder_sparse_step"] = json!(1);
    config["mlp_only_layers"] = json!([]);
    config["norm_topk_prob"] = json!(true);
    config
}

/// DeepSeek-V3, and smaller.
fn deepseek_v3(scale: Scale) -> Value {
    let [hidden, heads, q_lora, kv_lora, nope, rope, value] = match scale {
        Scale::Tiny => [256, 8, 128, 128, 64, 64, 64],
        Scale::Small => [1024, 16, 384, 512, 128, 64, 128],
        Scale::Full => [7168, 128, 1536, 512, 128, 64, 128],
    };
    let [inner, moe_inner, experts, dense_layers, layers, vocab] = match scale {
        Scale::Tiny => [1024, 512, 8, 1, 3, 512],
        Scale::Small => [2560, 512, 64, 1, 8, 32_000],
        Scale::Full => [18_432, 2048, 256, 3, 61, 129_280],
    };
    json!({
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads,
        "q_lora_rank": q_lora, "kv_lora_rank": kv_lora, "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope, "v_head_dim": value, "intermediate_size": inner,
        "moe_intermediate_size": moe_inner, "n_routed_experts": experts, "n_shared_experts": 1,
        "first_k_dense_replace": dense_layers, "moe_layer_freq": 1, "num_experts_per_tok": 8,
        "num_hidden_layers": layers, "num_nextn_predict_layers": 1, "vocab_size": vocab,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4,
        "norm_topk_prob": true, "routed_scaling_factor": 2.5, "tie_word_embeddings": false,
        "attention_bias": false, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu",
    })
}

/// DeepSeek-V3.2, and smaller.
fn deepseek_v32(scale: Scale) -> Value {
    let mut config = deepseek_v3(scale);
    let [heads, head_dim] = match scale {
        Scale::Tiny => [4, 64],
        Scale::Small => [16, 128],
        Scale::Full => [64, 128],
    };
    config["index_n_heads"] = json!(heads);
    config["index_head_dim"] = json!(head_dim);
    config["index_topk"] = json!(2048);
    config
}

/// GLM-5, and smaller.
fn glm_moe_dsa(scale: Scale) -> Value {
    let mut config = deepseek_v32(scale);
    if scale == Scale::Full {
        for (key, value) in [
            ("hidden_size", 6144),
            ("num_attention_heads", 64),
            ("num_key_value_heads", 64),
            ("q_lora_rank", 2048),
            ("qk_nope_head_dim", 192),
            ("v_head_dim", 256),
            ("intermediate_size", 12_288),
            ("num_hidden_layers", 78),
            ("vocab_size", 154_880),
            ("index_n_heads", 32),
        ] {
            config[key] = json!(value);
        }
    }
    config["n_group"] = json!(1);
    config["topk_group"] = json!(1);
    config
}

/// Kimi-K2.5, and smaller.
fn kimi_k25(scale: Scale) -> Value {
    let mut text = deepseek_v3(scale);
    text["architectures"] = json!(["DeepseekV3ForCausalLM"]);
    text["model_type"] = json!("kimi_k2");
    text["num_nextn_predict_layers"] = json!(0);
    text["routed_scaling_factor"] = json!(2.827);
    if scale == Scale::Full {
        for (key, value) in [
            ("num_attention_heads", 64),
            ("num_key_value_heads", 64),
            ("first_k_dense_replace", 1),
            ("n_routed_experts", 384),
            ("vocab_size", 163_840),
            ("n_group", 1),
            ("topk_group", 1),
        ] {
            text[key] = json!(value);
        }
    }
    let [hidden, heads, layers, inner, positions] = match scale {
        Scale::Tiny => [64, 4, 2, 96, 8],
        Scale::Small => [384, 16, 6, 1536, 32],
        Scale::Full => [1152, 16, 27, 4304, 64],
    };
    json!({
        "text_config": text,
        "vision_config": {
            "vt_hidden_size": hidden, "vt_num_attention_heads": heads, "vt_num_hidden_layers": layers,
            "vt_intermediate_size": inner, "patch_size": 14, "init_pos_emb_height": positions,
            "init_pos_emb_width": positions, "init_pos_emb_time": 4, "merge_kernel_size": [2, 2],
            "mm_projector_type": "patchmerger",
        },
        "tie_word_embeddings": false,
    })
}
