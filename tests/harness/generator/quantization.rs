//! How a checkpoint declares its quantisation.

use std::ops::Range;

use super::json::Json;
use super::settings::Settings;
use super::{Family, Scheme, modelopt};

/// The declarations of one checkpoint.
pub(super) struct Declared {
    /// `quantization_config` of `config.json`
    pub(super) in_config: Option<Json>,
    /// `hf_quant_config.json`
    pub(super) in_hf_quant_config: Option<Json>,
}

/// The declarations that go with a scheme.
///
/// # Errors
/// A combination of settings that no style has.
pub(super) fn declare(family: Family, scheme: Scheme, p: &Settings) -> Result<Declared, String> {
    let in_config = match scheme {
        Scheme::Bf16 => None,
        Scheme::Fp8 => Some(fp8(family, p)),
        Scheme::Nvfp4 => return modelopt::declare(family, p),
        Scheme::Mxfp4 => Some(mxfp4(family, p)),
        Scheme::Int4 => Some(int4(p)),
    };
    Ok(Declared { in_config, in_hf_quant_config: None })
}

pub(super) fn layers(p: &Settings) -> Range<usize> {
    0..p.size("num_hidden_layers")
}

/// Layers with experts, the prediction layer included.
fn moe_layers(p: &Settings) -> Range<usize> {
    p.size("first_k_dense_replace")..p.size("num_hidden_layers") + p.size("mtp")
}

fn fp8(family: Family, p: &Settings) -> Json {
    let mut q = Json::object([
        ("activation_scheme", "dynamic".into()),
        ("fmt", "e4m3".into()),
        ("quant_method", "fp8".into()),
        ("weight_block_size", [128, 128].into()),
    ]);
    if family == Family::DeepseekV32 {
        q.set("scale_fmt", "ue8m0");
    }
    if family == Family::GlmMoeDsa {
        let mut kept = strings(["lm_head", "model.embed_tokens", "model.norm"]);
        for i in layers(p) {
            kept.push(format!("model.layers.{i}.self_attn.indexers_proj"));
        }
        for i in layers(p) {
            kept.push(format!("model.layers.{i}.input_layernorm"));
            kept.push(format!("model.layers.{i}.post_attention_layernorm"));
        }
        kept.extend(moe_layers(p).map(|i| format!("model.layers.{i}.mlp.gate")));
        for name in ["eh_proj", "enorm", "hnorm", "shared_head.norm"] {
            kept.push(format!("model.layers.{}.{name}", p.size("num_hidden_layers")));
        }
        q.set("modules_to_not_convert", kept);
    }
    q
}

fn mxfp4(family: Family, p: &Settings) -> Json {
    let exclude = match family {
        Family::KimiK25 => kimi_mxfp4_exclude(p),
        _ => glm_mxfp4_exclude(p),
    };
    let weight = mxfp4_side();
    let mut input = weight.clone();
    input.set("is_dynamic", true);
    let global = Json::object([
        ("weight", weight),
        ("input_tensors", input),
        ("output_tensors", Json::Null),
        ("bias", Json::Null),
        ("target_device", Json::Null),
    ]);
    let export = Json::object([
        ("kv_cache_group", Json::List(vec![])),
        ("min_kv_scale", 0.0.into()),
        ("pack_method", "reorder".into()),
        ("weight_format", "real_quantized".into()),
        ("weight_merge_groups", Json::Null),
    ]);
    Json::object([
        ("quant_method", "quark".into()),
        ("quant_mode", "eager_mode".into()),
        ("version", "0.11".into()),
        ("global_quant_config", global),
        ("layer_quant_config", Json::Object(vec![])),
        ("layer_type_quant_config", Json::Object(vec![])),
        ("algo_config", Json::Null),
        ("softmax_quant_spec", Json::Null),
        ("exclude", exclude.into()),
        ("export", export),
    ])
}

fn mxfp4_side() -> Json {
    Json::object([
        ("dtype", "fp4".into()),
        ("is_dynamic", false.into()),
        ("qscheme", "per_group".into()),
        ("ch_axis", (-1).into()),
        ("group_size", 32.into()),
        ("symmetric", Json::Null),
        ("round_method", "half_even".into()),
        ("scale_type", "float".into()),
        ("scale_format", "e8m0".into()),
        ("scale_calculation_mode", "even".into()),
        ("mx_element_dtype", Json::Null),
        ("observer_cls", "PerBlockMXObserver".into()),
        ("is_scale_quant", false.into()),
    ])
}

fn kimi_mxfp4_exclude(p: &Settings) -> Vec<String> {
    let attention = match p.flag("mxfp4_kv_b") {
        true => r"re:.*self_attn\.(q_a_proj|q_b_proj|q_proj|kv_a_proj_with_mqa|o_proj).*",
        false => "re:.*self_attn.*",
    };
    let mut exclude = strings(["re:vision_tower.*", "re:mm_projector.*", "language_model.lm_head"]);
    exclude.extend(strings([attention, r"re:.*mlp\.gate$"]));
    if !p.flag("mxfp4_shared") {
        exclude.push("re:.*shared_experts.*".to_owned());
    }
    exclude
}

fn glm_mxfp4_exclude(p: &Settings) -> Vec<String> {
    let mut exclude = strings(["lm_head", r"re:model\.layers\.\d+\.self_attn.*"]);
    exclude.extend(moe_layers(p).map(|i| format!("model.layers.{i}.mlp.gate")));
    if p.flag("mtp") {
        exclude.push(format!("model.layers.{}.eh_proj", p.size("num_hidden_layers")));
    }
    if !p.flag("mxfp4_shared") {
        for i in moe_layers(p) {
            for name in ["gate", "up", "down"] {
                exclude.push(format!("model.layers.{i}.mlp.shared_experts.{name}_proj"));
            }
        }
    }
    exclude
}

fn int4(p: &Settings) -> Json {
    let mut ignore = strings(["lm_head", "re:.*self_attn.*"]);
    if !p.flag("int4_linears") {
        ignore.push("re:.*shared_experts.*".to_owned());
        ignore.push(r"re:.*mlp\.(gate|up|gate_up|down)_proj.*".to_owned());
    }
    let weights = Json::object([
        ("num_bits", 4.into()),
        ("type", "int".into()),
        ("strategy", "group".into()),
        ("group_size", 32.into()),
        ("symmetric", true.into()),
        ("dynamic", false.into()),
        ("actorder", Json::Null),
        ("block_structure", Json::Null),
        ("observer", "minmax".into()),
        ("observer_kwargs", Json::Object(vec![])),
    ]);
    let group_0 = Json::object([
        ("targets", ["Linear"].into()),
        ("input_activations", Json::Null),
        ("output_activations", Json::Null),
        ("weights", weights),
    ]);
    Json::object([
        ("quant_method", "compressed-tensors".into()),
        ("format", "pack-quantized".into()),
        ("quantization_status", "compressed".into()),
        ("config_groups", Json::object([("group_0", group_0)])),
        ("ignore", ignore.into()),
        ("kv_cache_scheme", Json::Null),
    ])
}

pub(super) fn strings<const N: usize>(texts: [&str; N]) -> Vec<String> {
    texts.map(str::to_owned).into()
}
