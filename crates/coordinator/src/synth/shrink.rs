//! An existing configuration at another scale: its keys, its quantisation and its lists, with a family's smaller sizes.
//!
//! Lists stay as they are. Entries for layers that are no longer there name nothing, and those for layers that are name
//! what they named before, so the result is mixed in the same way.

use serde_json::Value;

use crate::synth::text_config;

/// The keys that decide sizes.
const SIZES: [&str; 21] = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "vocab_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "index_n_heads",
    "index_head_dim",
];

/// Gives `config` the sizes of `small`, a configuration of the same family; keys that it lacks or leaves open stay so.
pub(super) fn shrink(config: &mut Value, small: &Value) {
    let mut small = small.clone();
    let text = text_config(config);
    let sizes = text_config(&mut small);
    for key in SIZES {
        if text[key].is_number() && sizes[key].is_number() {
            text[key] = sizes[key].clone();
        }
    }
    let vision = config.get_mut("vision_config").filter(|vision| vision.is_object());
    let sizes = small.get("vision_config").and_then(Value::as_object);
    let (Some(vision), Some(sizes)) = (vision, sizes) else {
        return;
    };
    for (key, size) in sizes {
        vision[key.as_str()] = size.clone();
        // the same size in the class's own spelling (reference §1.1, "trap")
        let plain = key.trim_start_matches("vt_");
        if vision.get(plain).is_some() {
            vision[plain] = size.clone();
        }
    }
}
