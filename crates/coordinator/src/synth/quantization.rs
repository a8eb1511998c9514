//! How published checkpoints of a family declare each scheme. Source: reference §1.3, §1.6; the published files.

use longshore_models::{arch::Family, quant::Scheme};
use serde_json::{Value, json};

use crate::synth::text_config;

/// The schemes that a family is published in.
pub(super) fn schemes(family: Family) -> &'static [Scheme] {
    use Scheme::{Bf16, Fp8, Int4, Mxfp4, Nvfp4};
    match family {
        Family::Llama | Family::Qwen3 | Family::Qwen3Moe => &[Bf16],
        Family::DeepseekV3 => &[Bf16, Fp8, Nvfp4],
        Family::DeepseekV32 => &[Bf16, Fp8],
        Family::GlmMoeDsa => &[Bf16, Fp8, Nvfp4, Mxfp4],
        Family::KimiK25 => &[Bf16, Int4, Nvfp4, Mxfp4],
    }
}

/// Declares `scheme` in `config`, and in the `hf_quant_config.json` that is returned where the family has one.
pub(super) fn declare(config: &mut Value, family: Family, scheme: Scheme) -> Option<Value> {
    let layers = Layers::of(text_config(config));
    match (scheme, family) {
        (Scheme::Bf16, _) => return None,
        // ModelOpt declares these beside config.json only
        (Scheme::Nvfp4, Family::DeepseekV3 | Family::GlmMoeDsa) => {
            return Some(modelopt_nested(&modelopt_exclude(family, &layers)));
        }
        (Scheme::Nvfp4, _) => config["quantization_config"] = modelopt_flat(&kimi_ignore(&layers)),
        (Scheme::Fp8, _) => config["quantization_config"] = fp8(family, &layers),
        (Scheme::Mxfp4, _) => text_config(config)["quantization_config"] = quark(family, &layers),
        (Scheme::Int4, _) => text_config(config)["quantization_config"] = int4(),
    }
    None
}

/// The layers that lists enumerate.
struct Layers {
    /// num_hidden_layers, which is also the number of the prediction layer.
    main: u64,
    first_with_experts: u64,
    predicts: bool,
}

impl Layers {
    fn of(text: &Value) -> Self {
        let count = |key: &str| text[key].as_u64().unwrap_or(0);
        Self {
            main: count("num_hidden_layers"),
            first_with_experts: count("first_k_dense_replace"),
            predicts: count("num_nextn_predict_layers") > 0,
        }
    }

    /// One past the last layer of the checkpoint.
    fn end(&self) -> u64 {
        self.main + u64::from(self.predicts)
    }
}

/// DeepSeek lists nothing; GLM-5 lists everything that is no linear layer, and misspells the indexer's projection.
fn fp8(family: Family, layers: &Layers) -> Value {
    let mut block = json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    });
    if family == Family::DeepseekV32 {
        block["scale_fmt"] = json!("ue8m0");
    }
    if family == Family::GlmMoeDsa {
        let mut list = vec!["lm_head".to_owned(), "model.embed_tokens".to_owned()];
        for i in 0..layers.end() {
            let norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm"];
            let others = ["self_attn.kv_a_layernorm", "self_attn.indexer.k_norm"];
            let misspelt = ["self_attn.indexer.k_norm.bias", "self_attn.indexers_proj"];
            let names = norms.iter().chain(&others).chain(&misspelt);
            list.extend(names.map(|name| format!("model.layers.{i}.{name}")));
            if i >= layers.first_with_experts {
                let router = format!("model.layers.{i}.mlp.gate");
                list.extend([format!("{router}.e_score_correction_bias"), router]);
            }
        }
        if layers.predicts {
            let names = ["eh_proj", "enorm", "hnorm", "shared_head.norm"];
            list.extend(names.map(|name| format!("model.layers.{}.{name}", layers.main)));
        }
        list.push("model.norm".to_owned());
        block["modules_to_not_convert"] = json!(list);
    }
    block
}

/// As DeepSeek-V3.1-NVFP4 and GLM-5-NVFP4 have it: attention but for DeepSeek's `o_proj`, and the prediction layer whole.
fn modelopt_exclude(family: Family, layers: &Layers) -> Vec<String> {
    let mut parts = vec!["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"];
    if family == Family::GlmMoeDsa {
        parts.extend(["indexer*", "o_proj"]);
    }
    let mut list = vec!["lm_head".to_owned()];
    for i in 0..layers.main {
        list.extend(parts.iter().map(|part| format!("model.layers.{i}.self_attn.{part}")));
    }
    if layers.predicts {
        list.push(format!("model.layers.{}*", layers.main));
    }
    list
}

/// As Kimi-K2.5-NVFP4 has it.
fn kimi_ignore(layers: &Layers) -> Vec<String> {
    let mut list = vec!["language_model.lm_head".to_owned()];
    let lead = "language_model.model.layers";
    list.extend((0..layers.main).map(|i| format!("{lead}.{i}.self_attn*")));
    list.extend(["mm_projector*", "vision_tower*"].map(str::to_owned));
    list
}

fn producer() -> Value {
    json!({"name": "modelopt", "version": "0.41.0"})
}

/// ModelOpt's `hf_quant_config.json`, with an FP8 KV cache.
fn modelopt_nested(exclude: &[String]) -> Value {
    json!({
        "producer": producer(),
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
            "exclude_modules": exclude,
        },
    })
}

/// ModelOpt's `quantization_config`, with an FP8 KV cache.
fn modelopt_flat(ignore: &[String]) -> Value {
    let group = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16});
    json!({
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore,
        "config_groups": {"group_0": {
            "input_activations": group, "weights": group, "targets": ["Linear"],
        }},
        "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"},
        "producer": producer(),
    })
}

/// Quark: attention stays, in GLM-5 the shared experts too (reference §1.3).
fn quark(family: Family, layers: &Layers) -> Value {
    let text = |entries: &[&str]| entries.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>();
    let exclude = if family == Family::KimiK25 {
        let vision = ["re:vision_tower.*", "re:mm_projector.*"];
        let rest = ["language_model.lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$"];
        text(&[&vision[..], &rest].concat())
    } else {
        let mut list = text(&["lm_head", r"re:model\.layers\.\d+\.self_attn.*"]);
        for i in layers.first_with_experts..layers.end() {
            list.push(format!("model.layers.{i}.mlp.gate"));
            let shared = ["gate", "up", "down"]
                .map(|part| format!("model.layers.{i}.mlp.shared_experts.{part}_proj"));
            list.extend(shared);
        }
        if layers.predicts {
            list.push(format!("model.layers.{}.eh_proj", layers.main));
        }
        list
    };
    let side = |dynamic: bool| {
        json!({
            "dtype": "fp4", "is_dynamic": dynamic, "qscheme": "per_group", "ch_axis": -1,
            "group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even",
            "round_method": "half_even", "symmetric": null,
        })
    };
    json!({
        "quant_method": "quark", "exclude": exclude,
        "global_quant_config": {
            "weight": side(false), "input_tensors": side(true), "output_tensors": null, "bias": null,
        },
        "layer_quant_config": {}, "layer_type_quant_config": {},
        "export": {
            "kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized",
        },
    })
}

/// As Kimi-K2.5 has it: routed experts only.
fn int4() -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "kv_cache_scheme": null,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null,
            "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
                "symmetric": true, "dynamic": false, "actorder": null,
            },
        }},
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
    })
}
