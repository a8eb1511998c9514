//! The JSON files beside the weights: `config.json` and what a tokenizer brings.

use super::json::Json;
use super::settings::Settings;
use super::{Family, Scheme, quantization};

/// File names and contents, in the order in which they are written.
///
/// # Errors
/// A combination of settings that no quantisation style has.
pub(super) fn files(
    family: Family,
    scheme: Scheme,
    p: &Settings,
) -> Result<Vec<(&'static str, Json)>, String> {
    let declared = quantization::declare(family, scheme, p)?;
    let mut out = vec![
        ("config.json", config(family, scheme, p, declared.in_config)),
        ("generation_config.json", generation()),
        ("tokenizer_config.json", tokenizer_config()),
        ("tokenizer.json", tokenizer()),
    ];
    if let Some(nested) = declared.in_hf_quant_config {
        out.push(("hf_quant_config.json", nested));
    }
    Ok(out)
}

fn config(family: Family, scheme: Scheme, p: &Settings, quantization: Option<Json>) -> Json {
    let mut base = Json::object([
        (p.text("dtype_key").unwrap_or("dtype"), p.get("model_dtype")),
        ("use_cache", true.into()),
        ("initializer_range", 0.02.into()),
        ("hidden_act", "silu".into()),
        ("bos_token_id", 0.into()),
        ("eos_token_id", 1.into()),
        ("transformers_version", "4.57.1".into()),
    ]);
    let mut text = Json::Object(vec![]);
    for key in [
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "tie_word_embeddings",
    ] {
        text.set(key, p.get(key));
    }
    if family.is_dense_attention() {
        dense_attention(&mut text, family, p);
        return with_quantization(base.merged_with(&text), quantization);
    }
    mla(&mut text, p);
    if family == Family::KimiK25 {
        return kimi_k25(&base, text, scheme, p, quantization);
    }
    let (architecture, kind) = match family {
        Family::KimiK2 => ("DeepseekV3ForCausalLM", "kimi_k2"),
        Family::DeepseekV32 => ("DeepseekV32ForCausalLM", "deepseek_v32"),
        Family::GlmMoeDsa => ("GlmMoeDsaForCausalLM", "glm_moe_dsa"),
        _ => ("DeepseekV3ForCausalLM", "deepseek_v3"),
    };
    text.update([("architectures", [architecture].into()), ("model_type", kind.into())]);
    if family == Family::KimiK2 {
        text.update([
            ("rope_theta", 50000.0.into()),
            ("routed_scaling_factor", 2.827.into()),
            ("aux_loss_alpha", 0.001.into()),
            ("seq_aux", true.into()),
        ]);
    }
    if p.text("quant_style") == Some("glm5") {
        glm5(&mut text, p);
        base.set("eos_token_id", [1, 2, 3]);
    }
    with_quantization(base.merged_with(&text), quantization)
}

fn with_quantization(mut config: Json, quantization: Option<Json>) -> Json {
    if let Some(quantization) = quantization {
        config.set("quantization_config", quantization);
    }
    config
}

fn dense_attention(text: &mut Json, family: Family, p: &Settings) {
    text.update([
        ("num_key_value_heads", p.get("num_key_value_heads")),
        ("head_dim", p.get("head_dim")),
        ("attention_bias", p.get("attention_bias")),
        ("attention_dropout", 0.0.into()),
        ("max_position_embeddings", 4096.into()),
    ]);
    if family == Family::Llama {
        text.update([
            ("architectures", ["LlamaForCausalLM"].into()),
            ("model_type", "llama".into()),
            ("mlp_bias", false.into()),
            ("rms_norm_eps", 1e-5.into()),
            ("pretraining_tp", 1.into()),
            ("rope_scaling", Json::Null),
            ("rope_theta", 500_000.0.into()),
        ]);
        return;
    }
    text.update([
        ("architectures", ["Qwen3ForCausalLM"].into()),
        ("model_type", "qwen3".into()),
        ("rms_norm_eps", 1e-6.into()),
        ("rope_scaling", Json::Null),
        ("rope_theta", 1_000_000.into()),
        ("sliding_window", Json::Null),
        ("use_sliding_window", false.into()),
        ("max_window_layers", p.get("num_hidden_layers")),
    ]);
    if family == Family::Qwen3Moe {
        text.update([
            ("architectures", ["Qwen3MoeForCausalLM"].into()),
            ("model_type", "qwen3_moe".into()),
            ("num_experts", p.get("num_experts")),
            ("num_experts_per_tok", 2.into()),
            ("moe_intermediate_size", p.get("moe_intermediate_size")),
            ("norm_topk_prob", true.into()),
            ("decoder_sparse_step", 1.into()),
            ("mlp_only_layers", Json::List(vec![])),
            ("router_aux_loss_coef", 0.001.into()),
            ("output_router_logits", false.into()),
        ]);
    }
}

fn mla(text: &mut Json, p: &Settings) {
    for key in [
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "moe_intermediate_size",
        "n_routed_experts",
        "first_k_dense_replace",
    ] {
        text.set(key, p.get(key));
    }
    let shared = p.get("n_shared_experts");
    text.update([
        ("num_key_value_heads", p.get("num_attention_heads")),
        ("n_shared_experts", if shared.is_truthy() { shared } else { Json::Null }),
        ("num_nextn_predict_layers", p.get("mtp")),
        ("moe_layer_freq", 1.into()),
        ("num_experts_per_tok", 2.into()),
        ("n_group", 1.into()),
        ("topk_group", 1.into()),
        ("topk_method", "noaux_tc".into()),
        ("scoring_func", "sigmoid".into()),
        ("norm_topk_prob", true.into()),
        ("routed_scaling_factor", 2.5.into()),
        ("ep_size", 1.into()),
        ("attention_bias", false.into()),
        ("attention_dropout", 0.0.into()),
        ("max_position_embeddings", 4096.into()),
        ("rms_norm_eps", 1e-6.into()),
        ("rope_theta", 10000.0.into()),
        ("pretraining_tp", 1.into()),
    ]);
    if p.flag("index_n_heads") {
        text.update([
            ("index_n_heads", p.get("index_n_heads")),
            ("index_head_dim", p.get("index_head_dim")),
            ("index_topk", 16.into()),
        ]);
    }
}

/// GLM-5's own keys: `head_dim` is not the head size of the projections.
fn glm5(text: &mut Json, p: &Settings) {
    let rope = Json::object([("rope_theta", 1_000_000.into()), ("rope_type", "default".into())]);
    let head = p.size("qk_nope_head_dim") + p.size("qk_rope_head_dim");
    text.remove("rope_theta");
    text.update([
        ("head_dim", p.get("qk_rope_head_dim")),
        ("qk_head_dim", head.into()),
        ("rope_interleave", true.into()),
        ("indexer_rope_interleave", true.into()),
        ("rope_parameters", rope),
    ]);
}

fn kimi_k25(
    base: &Json,
    mut text: Json,
    scheme: Scheme,
    p: &Settings,
    mut quantization: Option<Json>,
) -> Json {
    text.update([
        ("architectures", ["DeepseekV3ForCausalLM"].into()),
        ("model_type", "kimi_k2".into()),
        ("rope_theta", 50000.0.into()),
        ("rms_norm_eps", 1e-5.into()),
        ("routed_scaling_factor", 2.827.into()),
    ]);
    let mut text = base.merged_with(&text);
    let mut vision = kimi_vision(p);
    if matches!(p.text("quant_style"), Some("k25" | "k26")) {
        // as published: the vt_ spelling only
        for key in PLAIN_VISION_KEYS {
            vision.remove(key);
        }
        vision.set("model_type", "");
        text.set("model_type", "deepseek_v3");
    }
    if matches!(scheme, Scheme::Int4 | Scheme::Mxfp4) {
        // these exports declare it inside text_config
        text = with_quantization(text, quantization.take());
    }
    let config = Json::object([
        ("architectures", ["KimiK25ForConditionalGeneration"].into()),
        ("model_type", "kimi_k25".into()),
        (p.text("dtype_key").unwrap_or("dtype"), p.get("model_dtype")),
        ("text_config", text),
        ("vision_config", vision),
        ("tie_word_embeddings", false.into()),
        ("ignore_index", (-100).into()),
        ("media_placeholder_token_id", 7.into()),
        ("pad_token_id", 0.into()),
        ("use_unified_vision_chunk", true.into()),
        ("transformers_version", "4.57.1".into()),
    ]);
    with_quantization(config, quantization)
}

const PLAIN_VISION_KEYS: [&str; 4] =
    ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"];

fn kimi_vision(p: &Settings) -> Json {
    let mut vision = Json::object([
        ("model_type", "kimi_k25_vision".into()),
        ("patch_size", 14.into()),
        ("init_pos_emb_height", p.get("vt_pos_emb")),
        ("init_pos_emb_width", p.get("vt_pos_emb")),
        ("init_pos_emb_time", 4.into()),
        ("pos_emb_type", "divided_fixed".into()),
        ("merge_kernel_size", [2, 2].into()),
        ("merge_type", "sd2_tpool".into()),
        ("video_attn_type", "spatial_temporal".into()),
        ("mm_projector_type", "patchmerger".into()),
        ("mm_hidden_size", p.get("vt_hidden_size")),
        ("projector_hidden_act", "gelu".into()),
        ("projector_ln_eps", 1e-5.into()),
        ("text_hidden_size", p.get("hidden_size")),
    ]);
    // both spellings: the checkpoint's own keys and the ones the runtime reads
    for lead in ["vt_", ""] {
        for key in PLAIN_VISION_KEYS {
            vision.set(&format!("{lead}{key}"), p.get(&format!("vt_{key}")));
        }
    }
    vision
}

fn generation() -> Json {
    Json::object([
        ("_from_model_config", true.into()),
        ("bos_token_id", 0.into()),
        ("eos_token_id", 1.into()),
    ])
}

fn tokenizer_config() -> Json {
    Json::object([
        ("tokenizer_class", "PreTrainedTokenizerFast".into()),
        ("model_max_length", 4096.into()),
    ])
}

fn tokenizer() -> Json {
    let model = Json::object([
        ("type", "BPE".into()),
        ("dropout", Json::Null),
        ("unk_token", Json::Null),
        ("vocab", Json::object([("a", 0.into()), ("b", 1.into())])),
        ("merges", Json::List(vec![])),
    ]);
    Json::object([
        ("version", "1.0".into()),
        ("truncation", Json::Null),
        ("padding", Json::Null),
        ("added_tokens", Json::List(vec![])),
        ("normalizer", Json::Null),
        ("pre_tokenizer", Json::Null),
        ("post_processor", Json::Null),
        ("decoder", Json::Null),
        ("model", model),
    ])
}
