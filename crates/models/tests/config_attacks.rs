//! Configurations that lie: the model is refused or declared, never a panic, never an allocation without bound.

use longshore_models::{
    arch::Model,
    config::Config,
    declare::Lookup,
    mapping::Mapper,
    options::ModelOptions,
    parallel::Parallel,
    quant::{Declared, Scheme},
};
use proptest::prelude::*;
use serde_json::{Value, json};

struct Everything(Scheme);

impl Lookup for Everything {
    fn scheme(&self, _: &str) -> Option<Scheme> {
        Some(self.0)
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

const KEYS: [&str; 22] = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "moe_layer_freq",
    "num_nextn_predict_layers",
    "decoder_sparse_step",
    "tie_word_embeddings",
    "torch_dtype",
];

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        // powers of two get past the checks of divisibility, the largest ones multiply to the most
        20 => (0u32..21).prop_map(|bits| Value::from(1u64 << bits)),
        10 => Just(Value::from(1u64 << 20)),
        1 => (0u64..70).prop_map(Value::from),
        1 => prop_oneof![Just(1u64 << 31), Just(u64::MAX), Just((1 << 20) + 1)].prop_map(Value::from),
        1 => (-3i64..0).prop_map(Value::from),
        1 => Just(json!(null)),
        1 => Just(json!(1.5)),
        1 => Just(json!("bfloat16")),
        2 => any::<bool>().prop_map(Value::from),
        1 => Just(json!([1, 2])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_configuration_is_declared_or_refused(
        values in proptest::collection::vec(value(), KEYS.len()),
        family in 0usize..4, tp in 1u32..5, fp8: bool, draft: bool, fuse: bool,
    ) {
        let architectures =
            ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"];
        let mut config = json!({"architectures": [architectures[family]], "topk_method": "noaux_tc"});
        for (key, value) in KEYS.iter().zip(values) {
            config[*key] = value;
        }
        // layers and experts are bounded by checks of their own; here they stay small to be quick
        for key in ["num_hidden_layers", "n_routed_experts", "num_experts"] {
            if let Some(n) = config[key].as_u64() {
                config[key] = json!(n % 3 + 1);
            }
        }
        for key in ["torch_dtype", "tie_word_embeddings"] {
            if config[key].is_number() {
                config[key] = json!(null);
            }
        }
        let config = Config::parse("config.json", config.to_string().as_bytes()).unwrap();
        let options = ModelOptions { draft, fuse_shared_experts: fuse, ..ModelOptions::default() };
        let scheme = if fp8 { Scheme::Fp8 } else { Scheme::Bf16 };
        if let Ok(model) = Model::new(config, None, options) {
            // sizes that do not fit in 64 bits would panic here, where arithmetic is checked
            let _ = model.declare(Parallel::new(tp, 1).unwrap(), &Everything(scheme));
            let _ = Mapper::new(&model, tp);
        }
    }
}

/// Keys and texts of declarations, put together at random.
const WORDS: [&str; 34] = [
    "quant_method",
    "fp8",
    "modelopt",
    "quark",
    "compressed-tensors",
    "quant_algo",
    "NVFP4",
    "group_size",
    "quantization",
    "config_groups",
    "weights",
    "ignore",
    "exclude",
    "exclude_modules",
    "global_quant_config",
    "weight",
    "input_tensors",
    "layer_quant_config",
    "layer_type_quant_config",
    "export",
    "kv_cache_group",
    "kv_cache_scheme",
    "weight_block_size",
    "modules_to_not_convert",
    "ignored_layers",
    "targets",
    "format",
    "pack-quantized",
    "re:(",
    "re:(?!x)",
    "*",
    "**.?*",
    "model.layers.0*",
    "Linear",
];

fn declaration() -> impl Strategy<Value = Value> {
    let word = || proptest::sample::select(&WORDS[..]);
    let leaf = prop_oneof![
        4 => word().prop_map(Value::from),
        2 => prop_oneof![Just(4u64), Just(16), Just(32), Just(128)].prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
        1 => Just(Value::Null),
        1 => Just(json!([128, 128])),
    ];
    leaf.prop_recursive(4, 48, 8, move |inner| {
        prop_oneof![
            3 => proptest::collection::vec((word(), inner.clone()), 0..8)
                .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
            1 => proptest::collection::vec(inner, 0..4).prop_map(Value::from),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_declaration_is_understood_or_refused(
        top in declaration(), nested in declaration(), beside in declaration(),
    ) {
        let config = json!({"quantization_config": top, "text_config": {"quantization_config": nested}});
        let config = Config::parse("config.json", config.to_string().as_bytes()).unwrap();
        let beside = Config::parse("hf_quant_config.json", beside.to_string().as_bytes()).ok();
        for word in [None, Some("bf16"), Some("fp8"), Some("nvfp4"), Some("mxfp4"), Some("int4")] {
            let user = word.map(|word| word.parse().unwrap());
            match Declared::new(&config, beside.as_ref(), user) {
                Ok(declared) => {
                    declared.expected("language_model.model.layers.0.mlp.experts.3.up_proj");
                }
                Err(e) => prop_assert!(!e.to_string().contains('\n')),
            }
        }
    }
}

/// The largest dimensions that are believed give sizes that fit in 64 bits (arithmetic is checked in tests).
#[test]
fn the_largest_dimensions_do_not_overflow() {
    for (family, scheme) in
        [("LlamaForCausalLM", Scheme::Bf16), ("DeepseekV3ForCausalLM", Scheme::Fp8)]
    {
        let mut config = json!({"architectures": [family], "topk_method": "noaux_tc"});
        for key in KEYS {
            config[key] = json!(1 << 20);
        }
        for key in ["num_hidden_layers", "num_nextn_predict_layers", "moe_layer_freq"] {
            config[key] = json!(1);
        }
        (config["n_routed_experts"], config["first_k_dense_replace"]) = (json!(4096), json!(0));
        (config["torch_dtype"], config["tie_word_embeddings"]) = (json!("float32"), json!(false));
        config["vocab_size"] = json!(1 << 24);
        let config = Config::parse("config.json", config.to_string().as_bytes()).unwrap();
        let model = Model::new(config, None, ModelOptions::default()).unwrap();
        model.declare(Parallel::new(1, 1).unwrap(), &Everything(scheme)).unwrap();
    }
}
