use serde_json::{Value, json};

use crate::{
    config::{CONFIG_FILE, Config, HF_QUANT_CONFIG_FILE},
    error::PlanError,
    quant::{Declared, Scheme},
};

fn declared(
    config: &Value,
    beside: Option<&Value>,
    user: Option<&str>,
) -> Result<Declared, PlanError> {
    let parse = |name, value: &Value| Config::parse(name, value.to_string().as_bytes()).unwrap();
    let config = parse(CONFIG_FILE, config);
    let beside = beside.map(|value| parse(HF_QUANT_CONFIG_FILE, value));
    Declared::new(&config, beside.as_ref(), user.map(|word| word.parse().unwrap()))
}

fn scheme(config: &Value, beside: Option<&Value>, user: Option<&str>) -> Scheme {
    declared(config, beside, user).unwrap().scheme
}

/// The one line of the refusal.
fn refusal(config: &Value, beside: Option<&Value>, user: Option<&str>) -> String {
    declared(config, beside, user).unwrap_err().to_string()
}

fn at_top(block: Value) -> Value {
    json!({ "quantization_config": block })
}

fn in_text(block: Value) -> Value {
    json!({"text_config": {"quantization_config": block}})
}

fn fp8() -> Value {
    json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
    })
}

fn flat() -> Value {
    let group = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16});
    json!({
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "x.y*"],
        "config_groups": {"group_0": {
            "input_activations": group, "weights": group, "targets": ["Linear"],
        }},
        "kv_cache_scheme": {"dynamic": false, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.41.0"},
    })
}

fn nested() -> Value {
    json!({
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
            "exclude_modules": ["lm_head", "x.y*"],
        },
    })
}

fn quark() -> Value {
    let side = json!({
        "dtype": "fp4", "is_dynamic": false, "qscheme": "per_group", "ch_axis": -1,
        "group_size": 32, "scale_format": "e8m0", "round_method": "half_even",
    });
    let mut input = side.clone();
    input["is_dynamic"] = json!(true);
    json!({
        "quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {},
        "layer_type_quant_config": {},
        "global_quant_config": {
            "weight": side, "input_tensors": input, "output_tensors": null, "bias": null,
        },
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
    })
}

fn int4() -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore": ["lm_head"], "kv_cache_scheme": null,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null,
            "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
                "symmetric": true, "dynamic": false, "actorder": null,
            },
        }},
    })
}

fn changed(mut block: Value, pointer: &str, value: Value) -> Value {
    *block.pointer_mut(pointer).unwrap() = value;
    block
}

#[test]
fn each_method_is_recognised_where_it_is_published() {
    let none = json!({});
    assert_eq!(scheme(&none, None, None), Scheme::Bf16);
    assert_eq!(scheme(&at_top(fp8()), None, None), Scheme::Fp8);
    assert_eq!(scheme(&at_top(flat()), None, None), Scheme::Nvfp4);
    assert_eq!(scheme(&none, Some(&nested()), None), Scheme::Nvfp4);
    assert_eq!(scheme(&at_top(flat()), Some(&nested()), None), Scheme::Nvfp4);
    assert_eq!(scheme(&in_text(quark()), None, None), Scheme::Mxfp4);
    assert_eq!(scheme(&in_text(int4()), None, None), Scheme::Int4);
    assert_eq!(scheme(&json!({"compression_config": int4()}), None, None), Scheme::Int4);
    assert_eq!(scheme(&json!({"quantization_config": null}), None, None), Scheme::Bf16);
    for method in [json!("modelopt_fp4"), json!(null)] {
        let block = changed(flat(), "/quant_method", method);
        assert_eq!(scheme(&at_top(block), None, None), Scheme::Nvfp4);
    }
}

#[test]
fn an_fp8_kv_cache_is_seen_in_every_spelling() {
    let kv = |block: &Value| declared(&at_top(block.clone()), None, None).unwrap().kv_cache_fp8;
    assert!(kv(&flat()));
    for (scheme, fp8) in [
        (json!("FP8"), true),
        (json!("FLOAT8"), true),
        (json!("NVFP4"), false),
        (json!(null), false),
        (json!({"type": "float", "num_bits": 4}), false),
    ] {
        assert_eq!(kv(&changed(flat(), "/kv_cache_scheme", scheme)), fp8);
    }
    assert!(declared(&json!({}), Some(&nested()), None).unwrap().kv_cache_fp8);
    let without = changed(nested(), "/quantization/kv_cache_quant_algo", json!(null));
    assert!(!declared(&json!({}), Some(&without), None).unwrap().kv_cache_fp8);
    assert!(!kv(&quark()) && !kv(&int4()) && !kv(&fp8()));
}

#[test]
fn lists_are_named_by_file_and_key() {
    let place = |config: &Value, beside: Option<&Value>| {
        let exclude = declared(config, beside, None).unwrap().exclude.unwrap();
        assert!(exclude.names("lm_head") || exclude.place().contains("ignored_layers"));
        exclude.place().to_owned()
    };
    assert_eq!(place(&at_top(flat()), None), "config.json: quantization_config.ignore");
    let beside = "hf_quant_config.json: quantization.exclude_modules";
    assert_eq!(place(&json!({}), Some(&nested())), beside);
    assert_eq!(
        place(&in_text(quark()), None),
        "config.json: text_config.quantization_config.exclude"
    );
    assert_eq!(place(&at_top(fp8()), None), "config.json: quantization_config.ignored_layers");
    let mut listed = fp8();
    listed["modules_to_not_convert"] = json!(["lm_head"]);
    assert_eq!(
        place(&at_top(listed), None),
        "config.json: quantization_config.modules_to_not_convert"
    );
}

/// What is not supported is one line with file, key, what would be right and what stands there.
#[test]
fn unsupported_parameters_are_named() {
    let weights = "/config_groups/group_0/weights";
    let global = "/global_quant_config";
    let cases = [
        (changed(fp8(), "/weight_block_size", json!([64, 128])), "weight_block_size"),
        (changed(fp8(), "/weight_block_size", json!(null)), "weight_block_size"),
        (changed(fp8(), "/activation_scheme", json!("static")), "activation_scheme"),
        (changed(fp8(), "/quant_method", json!("awq")), "quant_method"),
        (changed(fp8(), "/quant_method", json!(7)), "quant_method"),
        (changed(flat(), "/quant_algo", json!("FP8")), "quant_algo"),
        (changed(flat(), "/quant_algo", json!("MIXED_PRECISION")), "quant_algo"),
        (changed(flat(), &format!("{weights}/group_size"), json!(32)), "group_size"),
        (changed(flat(), &format!("{weights}/group_size"), json!(null)), "group_size"),
        (changed(flat(), "/ignore", json!("lm_head")), "ignore"),
        (changed(quark(), &format!("{global}/weight/dtype"), json!("int4")), "weight.dtype"),
        (changed(quark(), &format!("{global}/weight/is_dynamic"), json!(true)), "is_dynamic"),
        (changed(quark(), &format!("{global}/input_tensors"), json!(null)), "input_tensors"),
        (changed(quark(), &format!("{global}/input_tensors/is_dynamic"), json!(false)), "is_dyn"),
        (changed(quark(), &format!("{global}/weight/group_size"), json!(16)), "group_size"),
        (changed(quark(), &format!("{global}/weight/scale_format"), json!("f32")), "scale_format"),
        (changed(quark(), &format!("{global}/output_tensors"), json!({})), "output_tensors"),
        (changed(int4(), "/format", json!("float-quantized")), "format"),
        (changed(int4(), "/config_groups", json!({})), "config_groups"),
        (changed(int4(), &format!("{weights}/num_bits"), json!(8)), "num_bits"),
        (changed(int4(), &format!("{weights}/type"), json!("float")), "weights.type"),
        (changed(int4(), &format!("{weights}/group_size"), json!(128)), "group_size"),
        (changed(int4(), &format!("{weights}/symmetric"), json!(false)), "symmetric"),
        (changed(int4(), &format!("{weights}/actorder"), json!("group")), "actorder"),
        (json!([1]), "quantization_config"),
    ];
    for (block, key) in cases {
        let line = refusal(&at_top(block.clone()), None, None);
        assert!(line.starts_with("config.json: quantization_config"), "{line}");
        assert!(line.contains(key) && line.contains("expected"), "{key}: {line}");
    }
    let line = refusal(&json!({}), Some(&json!({"quantization": {"quant_algo": "FP8"}})), None);
    let whole = r#"hf_quant_config.json: quantization.quant_algo: expected NVFP4, found "FP8""#;
    assert_eq!(line, whole);
}

/// Another configuration for some layers is refused, no configuration leaves them unquantised.
#[test]
fn quark_layers_with_another_configuration_are_refused() {
    let mut block = quark();
    block["layer_quant_config"] = json!({"*self_attn*": {"weight": null, "input_tensors": null}});
    let exclude = declared(&at_top(block.clone()), None, None).unwrap().exclude.unwrap();
    assert!(exclude.names("model.layers.0.self_attn.o_proj"));
    let mut other = quark()["global_quant_config"].clone();
    other["weight"]["dtype"] = json!("fp8_e4m3");
    block["layer_quant_config"] = json!({"*self_attn*": other});
    let line = refusal(&at_top(block), None, None);
    assert!(line.contains("layer_quant_config.*self_attn*.weight.dtype"), "{line}");
}

#[test]
fn files_that_contradict_each_other_are_both_shown() {
    let other_group = changed(nested(), "/quantization/group_size", json!(32));
    let line = refusal(&at_top(flat()), Some(&other_group), None);
    for part in [
        "config.json: quantization_config.quant_algo says NVFP4, group size 16",
        "hf_quant_config.json: quantization.quant_algo says NVFP4, group size 32",
    ] {
        assert!(line.contains(part), "{line}");
    }
    let other_algo = changed(nested(), "/quantization/quant_algo", json!("FP8"));
    let line = refusal(&at_top(flat()), Some(&other_algo), None);
    assert!(line.contains("says NVFP4") && line.contains("says FP8"), "{line}");
    let line = refusal(&at_top(fp8()), Some(&nested()), None);
    assert!(line.contains("quantization_config.quant_method says fp8"), "{line}");
    // no choice between two that both say NVFP4
    refusal(&at_top(flat()), Some(&other_group), Some("nvfp4"));
}

/// The leftover of an INT4 export: hidden by a top-level block, contradicting `hf_quant_config.json` (reference §1.6 d).
#[test]
fn a_leftover_in_text_config_is_hidden_by_the_top_level_only() {
    let mut both = in_text(int4());
    both["quantization_config"] = flat();
    let found = declared(&both, None, None).unwrap();
    assert_eq!((found.scheme, found.warnings), (Scheme::Nvfp4, vec![]));
    assert_eq!(scheme(&both, Some(&nested()), None), Scheme::Nvfp4);

    let leftover = in_text(int4());
    let line = refusal(&leftover, Some(&nested()), None);
    for part in [
        "config.json: text_config.quantization_config.quant_method says compressed-tensors, group size 32",
        "hf_quant_config.json: quantization.quant_algo says NVFP4, group size 16",
        "--quantization",
    ] {
        assert!(line.contains(part), "{line}");
    }
    for word in ["modelopt_fp4", "modelopt", "nvfp4"] {
        let found = declared(&leftover, Some(&nested()), Some(word)).unwrap();
        assert_eq!(found.scheme, Scheme::Nvfp4);
        assert_eq!(found.declared_in, HF_QUANT_CONFIG_FILE);
        assert!(found.kv_cache_fp8 && found.exclude.unwrap().names("x.y.z"));
        assert_eq!(found.warnings.len(), 1, "{:?}", found.warnings);
        assert!(found.warnings[0].contains("compressed-tensors"), "{:?}", found.warnings);
    }
    assert_eq!(scheme(&leftover, Some(&nested()), Some("int4")), Scheme::Int4);
}

#[test]
fn the_user_wins_over_files_that_say_something_else() {
    let found = declared(&at_top(fp8()), None, Some("bf16")).unwrap();
    assert_eq!((found.scheme, found.exclude.is_none()), (Scheme::Bf16, true));
    assert_eq!(found.warnings.len(), 1);
    // a declaration that is not supported does not matter when it is not the one that is meant
    let found = declared(&at_top(changed(flat(), "/quant_algo", json!("FP8"))), None, Some("fp8"));
    assert_eq!(found.unwrap().scheme, Scheme::Fp8);
    let found = declared(&json!({}), None, Some("fp8")).unwrap();
    assert_eq!((found.scheme, found.declared_in.as_str()), (Scheme::Fp8, "--quantization fp8"));
    assert_eq!(found.warnings, [""; 0]);
    // the user agrees: no warning
    assert_eq!(declared(&at_top(fp8()), None, Some("fp8")).unwrap().warnings, [""; 0]);
}

#[test]
fn contradicted_users_see_their_word_and_the_files() {
    let found = declared(&at_top(flat()), None, Some("fp8")).unwrap();
    let line = found.contradicted_by("a.b", Scheme::Nvfp4).to_string();
    for part in ["a.b", "stored as nvfp4", "--quantization fp8", "quant_algo says NVFP4"] {
        assert!(line.contains(part), "{line}");
    }
    let found = declared(&json!({}), None, Some("fp8")).unwrap();
    let line = found.contradicted_by("a.b", Scheme::Int4).to_string();
    assert!(line.contains("config.json declares no quantisation"), "{line}");
}
