//! The examples of reference §2.8 (E = 4), each family's spellings, and what is not mapped.

use serde_json::{Value, json};

use super::*;
use crate::{config::Config, options::ModelOptions};

fn model(config: &Value, options: ModelOptions) -> Model {
    let config = Config::parse("config.json", config.to_string().as_bytes()).unwrap();
    Model::new(config, None, options).unwrap()
}

fn mapper(config: &Value, options: ModelOptions, ep: u32) -> Mapper {
    Mapper::new(&model(config, options), ep).unwrap()
}

/// Two layers, the first dense, four experts, a prediction layer.
fn deepseek() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "vocab_size": 64, "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "intermediate_size": 64,
        "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "topk_method": "noaux_tc",
    })
}

fn kimi() -> Value {
    let mut text = deepseek();
    text["num_nextn_predict_layers"] = json!(0);
    json!({
        "architectures": ["KimiK25ForConditionalGeneration"], "text_config": text,
        "vision_config": {"vt_num_hidden_layers": 2},
    })
}

fn dense(architecture: &str) -> Value {
    json!({
        "architectures": [architecture], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
        "num_attention_heads": 4, "intermediate_size": 64,
    })
}

fn fused() -> ModelOptions {
    ModelOptions { fuse_shared_experts: true, ..ModelOptions::default() }
}

fn draft() -> ModelOptions {
    ModelOptions { draft: true, ..ModelOptions::default() }
}

/// `runtime shard/shards`, and for experts ` e<expert>/<local experts>`.
fn line(mapper: &Mapper, tensor: &str) -> String {
    let Some(m) = mapper.map(tensor) else {
        return mapper.skip_reason(tensor).map_or("unknown".into(), |why| format!("({why})"));
    };
    let expert = match (m.expert, m.local_experts) {
        (Some(e), Some(local)) => format!(" e{e}/{local}"),
        (None, None) => String::new(),
        odd => panic!("{tensor}: {odd:?}"),
    };
    format!("{} {}/{}{expert}", m.runtime, m.shard, m.shards)
}

fn check(mapper: &Mapper, expected: &[(&str, &str)]) {
    for (tensor, wanted) in expected {
        assert_eq!(line(mapper, tensor), *wanted, "{tensor}");
    }
}

/// Reference §2.8: the DeepSeek examples with four experts, the shared one fused.
#[test]
fn deepseek_names_follow_the_reference() {
    let mapper = mapper(&deepseek(), fused(), 2);
    let p = "model.layers.1.";
    let expected = [
        ("mlp.experts.0.gate_proj.weight", "mlp.experts.w13_weight w1/2 e0/3"),
        ("mlp.experts.3.up_proj.weight", "mlp.experts.w13_weight w3/2 e3/3"),
        ("mlp.experts.2.down_proj.weight", "mlp.experts.w2_weight w2/1 e2/3"),
        ("mlp.experts.2.up_proj.weight_scale_inv", "mlp.experts.w13_weight_scale_inv w3/2 e2/3"),
        ("mlp.experts.2.up_proj.weight_scale_2", "mlp.experts.w13_weight_scale_2 w3/2 e2/3"),
        ("mlp.experts.2.up_proj.weight_shape", "mlp.experts.w13_weight_shape w3/2 e2/3"),
        ("mlp.experts.2.down_proj.weight_packed", "mlp.experts.w2_weight_packed w2/1 e2/3"),
        // every rank keeps the input scales of all experts (§3.5)
        ("mlp.experts.2.gate_proj.input_scale", "mlp.experts.w13_input_scale w1/2 e2/5"),
        ("mlp.shared_experts.gate_proj.weight", "mlp.experts.w13_weight w1/2 e4/3"),
        ("mlp.shared_experts.down_proj.weight", "mlp.experts.w2_weight w2/1 e4/3"),
        ("mlp.gate.weight", "mlp.gate.weight none/1"),
        ("mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias none/1"),
        ("self_attn.k_proj.k_scale", "self_attn.attn_mqa.k_scale none/1"),
        ("self_attn.v_proj.v_scale", "self_attn.attn_mqa.v_scale none/1"),
        ("self_attn.q_a_proj.weight", "self_attn.fused_qkv_a_proj_with_mqa.weight 0/2"),
        ("self_attn.kv_a_proj_with_mqa.weight", "self_attn.fused_qkv_a_proj_with_mqa.weight 1/2"),
        // discarded on arrival (§2.2), but a piece all the same
        (
            "self_attn.kv_a_proj_with_mqa.input_scale",
            "self_attn.fused_qkv_a_proj_with_mqa.input_scale 1/2",
        ),
        ("self_attn.kv_b_proj.weight", "self_attn.kv_b_proj.weight none/1"),
        ("self_attn.kv_b_proj.weight_scale_inv", "self_attn.kv_b_proj.weight_scale_inv none/1"),
        ("self_attn.o_proj.weight_scale", "self_attn.o_proj.weight_scale none/1"),
    ];
    for (tensor, wanted) in expected {
        assert_eq!(line(&mapper, &format!("{p}{tensor}")), format!("{p}{wanted}"));
    }
    check(
        &mapper,
        &[
            ("model.embed_tokens.weight", "model.embed_tokens.weight none/1"),
            ("lm_head.weight", "lm_head.weight none/1"),
            (
                "model.layers.0.mlp.gate_proj.weight_scale",
                "model.layers.0.mlp.gate_up_proj.weight_scale 0/2",
            ),
            (
                "model.layers.0.mlp.up_proj.weight_shape",
                "model.layers.0.mlp.gate_up_proj.weight_shape 1/2",
            ),
        ],
    );
}

#[test]
fn shared_expert_stays_a_module_of_its_own_unless_it_is_fused() {
    let tensor = "model.layers.1.mlp.shared_experts.up_proj.weight";
    let apart = mapper(&deepseek(), ModelOptions::default(), 1);
    let wanted = "model.layers.1.mlp.shared_experts.gate_up_proj.weight 1/2";
    assert_eq!(line(&apart, tensor), wanted);
    let expert = "model.layers.1.mlp.experts.1.up_proj.weight";
    assert_eq!(line(&apart, expert), "model.layers.1.mlp.experts.w13_weight w3/2 e1/4");
    let mut none = deepseek();
    none["n_shared_experts"] = json!(0);
    let none = mapper(&none, ModelOptions::default(), 1);
    assert_eq!(line(&none, tensor), "unknown");
}

#[test]
fn without_a_query_rank_the_a_projection_is_not_fused() {
    let mut config = deepseek();
    config["q_lora_rank"] = Value::Null;
    check(
        &mapper(&config, ModelOptions::default(), 1),
        &[
            (
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.0.self_attn.q_proj.weight none/1",
            ),
            (
                "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
                "model.layers.0.self_attn.kv_a_proj_with_mqa.weight none/1",
            ),
            ("model.layers.0.self_attn.q_a_proj.weight", "unknown"),
        ],
    );
}

#[test]
fn draft_model_takes_the_prediction_layer_and_nothing_else() {
    let copy = "(the main model's embedding and head are used)";
    check(
        &mapper(&deepseek(), draft(), 1),
        &[
            ("model.layers.2.enorm.weight", "model.enorm.weight none/1"),
            ("model.layers.2.shared_head.norm.weight", "model.shared_head.norm.weight none/1"),
            ("model.layers.2.shared_head.head.weight", copy),
            ("model.layers.2.embed_tokens.weight", copy),
            (
                "model.layers.2.self_attn.q_a_proj.weight",
                "model.decoder.self_attn.fused_qkv_a_proj_with_mqa.weight 0/2",
            ),
            (
                "model.layers.2.mlp.experts.1.down_proj.weight",
                "model.decoder.mlp.experts.w2_weight w2/1 e1/4",
            ),
            ("model.layers.1.input_layernorm.weight", "(not part of the draft model)"),
            ("model.layers.2.frobnicator.weight", "unknown"),
        ],
    );
    let main = mapper(&deepseek(), ModelOptions::default(), 1);
    let why = "(prediction layer; --draft loads it)";
    check(&main, &[("model.layers.2.enorm.weight", why)]);
}

#[test]
fn wrapper_answers_for_its_inner_model() {
    let runtime = "language_model.model.layers.1.mlp.experts.w13_weight w1/2 e3/4";
    check(
        &mapper(&kimi(), ModelOptions::default(), 1),
        &[
            ("language_model.model.layers.1.mlp.experts.3.gate_proj.weight", runtime),
            ("language_model.layers.1.mlp.experts.3.gate_proj.weight", runtime),
            ("language_model.lm_head.weight", "language_model.lm_head.weight none/1"),
            (
                "language_model.layers.0.self_attn.k_proj.k_scale",
                "language_model.model.layers.0.self_attn.attn_mqa.k_scale none/1",
            ),
            (
                "vision_tower.encoder.blocks.1.wqkv.bias",
                "vision_tower.encoder.blocks.1.attn.qkv_proj.bias none/1",
            ),
            (
                "vision_tower.encoder.blocks.0.wo.weight",
                "vision_tower.encoder.blocks.0.attn.proj.weight none/1",
            ),
            ("vision_tower.encoder.blocks.2.wo.weight", "unknown"),
            ("mm_projector.proj.0.weight", "mm_projector.linear_1.weight none/1"),
            ("mm_projector.proj.2.bias", "mm_projector.linear_2.bias none/1"),
            ("mm_projector.proj.1.bias", "unknown"),
            ("model.layers.1.input_layernorm.weight", "unknown"),
        ],
    );
    let language_only = ModelOptions { language_only: true, ..ModelOptions::default() };
    let why = "(vision; --language-only)";
    check(&mapper(&kimi(), language_only, 1), &[("mm_projector.proj.0.weight", why)]);
    let encoder_only = ModelOptions { encoder_only: true, ..ModelOptions::default() };
    let why = "(text; --encoder-only)";
    check(&mapper(&kimi(), encoder_only, 1), &[("language_model.lm_head.weight", why)]);
}

#[test]
fn dense_families_stack_q_k_v_and_gate_up() {
    for architecture in ["LlamaForCausalLM", "Qwen3ForCausalLM"] {
        let qwen = architecture.starts_with("Qwen3");
        let stripped = "layers.1.self_attn.v_proj.bias";
        let norm = "model.layers.1.self_attn.q_norm.weight";
        let v = "model.layers.1.self_attn.qkv_proj.bias v/3";
        let norm_kept = format!("{norm} none/1");
        check(
            &mapper(&dense(architecture), ModelOptions::default(), 1),
            &[
                (
                    "model.layers.0.self_attn.q_proj.weight",
                    "model.layers.0.self_attn.qkv_proj.weight q/3",
                ),
                ("model.layers.1.self_attn.v_proj.bias", v),
                (stripped, if qwen { v } else { "unknown" }),
                (norm, if qwen { &norm_kept } else { "unknown" }),
                (
                    "model.layers.0.self_attn.k_proj.k_scale",
                    "model.layers.0.self_attn.attn.k_scale none/1",
                ),
                ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight 1/2"),
                ("model.layers.0.self_attn.rotary_emb.inv_freq", "(computed, not loaded)"),
            ],
        );
    }
    let mut tied = dense("LlamaForCausalLM");
    tied["tie_word_embeddings"] = json!(true);
    let tied = mapper(&tied, ModelOptions::default(), 1);
    check(&tied, &[("lm_head.weight", "(tied to the embedding)")]);
    assert_eq!(tied.sources("lm_head.weight", 0), []);
}

#[test]
fn qwen3_moe_layers_are_dense_where_the_configuration_says_so() {
    let mut config = dense("Qwen3MoeForCausalLM");
    for (key, value) in [
        ("num_experts", json!(4)),
        ("moe_intermediate_size", json!(32)),
        ("mlp_only_layers", json!([0])),
    ] {
        config[key] = value;
    }
    check(
        &mapper(&config, ModelOptions::default(), 4),
        &[
            ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_up_proj.weight 0/2"),
            ("model.layers.0.mlp.experts.0.gate_proj.weight", "unknown"),
            (
                "model.layers.1.mlp.experts.2.gate_proj.weight",
                "model.layers.1.mlp.experts.w13_weight w1/2 e2/1",
            ),
            ("layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight none/1"),
            (
                "model.layers.1.self_attn.k_proj.k_scale",
                "model.layers.1.self_attn.attn.k_scale none/1",
            ),
        ],
    );
}

/// A name that no loader would take is not bent into one that it would.
#[test]
fn strangers_are_unknown() {
    let mapper = mapper(&deepseek(), fused(), 1);
    for tensor in [
        "",
        ".",
        "weight",
        "model.layers.1",
        "model.layers.01.input_layernorm.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.experts.4.gate_proj.weight",
        "model.layers.1.mlp.experts.01.gate_proj.weight",
        "model.layers.1.mlp.experts.+1.gate_proj.weight",
        "model.layers.1.mlp.experts.*.gate_proj.weight",
        "model.layers.1.mlp.experts.1.gate_proj.bias",
        "model.layers.1.mlp.experts.1.gate_proj.weight.weight",
        "model.layers.1.mlp.experts.1.weight",
        "model.layers.1.mlp.experts.w13_weight",
        "model.layers.1.mlp.experts.99999999999999999999.gate_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.v_scale",
        "model.layers.1.self_attn.q_a_proj.weight_scale_3",
        "model.layers.1.self_attn.w_kc",
        "mödel.layers.1.self_attn.o_proj.weight",
    ] {
        assert_eq!(line(&mapper, tensor), "unknown");
    }
    for runtime in ["", "model.layers.1.self_attn.w_kc", "model.layers.1.self_attn.q_a_proj.weight"]
    {
        assert_eq!(mapper.sources(runtime, 0), [], "{runtime}");
    }
}

#[test]
fn sources_are_a_rank_s_own_experts_and_all_input_scales() {
    let mapper = mapper(&deepseek(), fused(), 2);
    let names = |suffix: &str, ep_rank| -> Vec<String> {
        let runtime = format!("model.layers.1.mlp.experts.{suffix}");
        let pieces = mapper.sources(&runtime, ep_rank).into_iter();
        let text = |p: Piece| {
            let tensor = p.tensor.replace("model.layers.1.mlp.", "");
            format!("{tensor} {} {}", p.shard, p.expert.unwrap())
        };
        pieces.map(text).collect()
    };
    assert_eq!(
        names("w13_weight", 1),
        [
            "experts.2.gate_proj.weight w1 2",
            "experts.2.up_proj.weight w3 2",
            "experts.3.gate_proj.weight w1 3",
            "experts.3.up_proj.weight w3 3",
            "shared_experts.gate_proj.weight w1 4",
            "shared_experts.up_proj.weight w3 4",
        ]
    );
    let of_all = [
        "experts.0.down_proj.input_scale w2 0",
        "experts.1.down_proj.input_scale w2 1",
        "experts.2.down_proj.input_scale w2 2",
        "experts.3.down_proj.input_scale w2 3",
        "shared_experts.down_proj.input_scale w2 4",
    ];
    assert_eq!(names("w2_input_scale", 0), of_all);
    assert_eq!(names("w2_input_scale", 1), of_all);
    assert_eq!(names("w2_input_scale", 2), [""; 0]);
    assert_eq!(names("w1_weight", 0), [""; 0]);
}

/// `sources` undoes `map` for every module and suffix of every kind of model.
#[test]
fn every_entry_maps_back_and_forth() {
    let models = [
        mapper(&deepseek(), ModelOptions::default(), 2),
        mapper(&deepseek(), fused(), 2),
        mapper(&deepseek(), draft(), 1),
        mapper(&kimi(), fused(), 4),
        mapper(&dense("Qwen3ForCausalLM"), ModelOptions::default(), 1),
    ];
    for mapper in models {
        for runtime in mapper.table.runtime_names() {
            for ep_rank in 0..mapper.ep() {
                let pieces = mapper.sources(&runtime, ep_rank);
                assert!(!pieces.is_empty(), "{runtime}");
                for piece in &pieces {
                    let m = mapper.map(&piece.tensor).unwrap();
                    let found = (&m.runtime, m.shard, m.expert);
                    assert_eq!(found, (&runtime, piece.shard, piece.expert), "{}", piece.tensor);
                    assert!(mapper.holds(&m, ep_rank), "{}", piece.tensor);
                    let promised = u64::from(m.shards) * m.local_experts.unwrap_or(1);
                    assert_eq!(pieces.len() as u64, promised, "{runtime}");
                }
            }
        }
    }
}

#[test]
fn arrivals_wait_for_the_last_piece_of_the_rank_s_own() {
    let mut arrivals = Arrivals::new(mapper(&deepseek(), ModelOptions::default(), 2), 1).unwrap();
    let expert =
        |e: u32, projection: &str| format!("model.layers.1.mlp.experts.{e}.{projection}.weight");
    // expert 0 is kept by the other group
    for tensor in [expert(0, "gate_proj"), expert(2, "up_proj"), expert(3, "gate_proj")] {
        assert_eq!(arrivals.arrive(&tensor), Ok(None), "{tensor}");
    }
    let w13 = "model.layers.1.mlp.experts.w13_weight";
    assert_eq!(arrivals.arrive(&expert(3, "up_proj")), Ok(None));
    assert_eq!(arrivals.missing(w13).len(), 1);
    assert_eq!(arrivals.missing(w13)[0].tensor, expert(2, "gate_proj"));
    assert_eq!(arrivals.arrive(&expert(2, "up_proj")), Ok(None), "a duplicate");
    assert_eq!(arrivals.arrive(&expert(2, "gate_proj")), Ok(Some(w13.to_owned())));
    assert!(arrivals.is_complete(w13) && arrivals.incomplete().next().is_none());
    assert_eq!(arrivals.arrive(&expert(2, "gate_proj")), Ok(None), "complete before");

    assert_eq!(arrivals.arrive("model.layers.2.enorm.weight"), Ok(None), "skipped");
    let stranger = arrivals.arrive("model.layers.1.mlp.experts.4.up_proj.weight").unwrap_err();
    assert!(stranger.to_string().contains("experts.4.up_proj.weight"));
    arrivals.clear();
    assert!(!arrivals.is_complete(w13));
    assert_eq!(arrivals.missing(w13).len(), 4);
}

#[test]
fn sizes_and_options_that_do_not_fit_are_refused() {
    for ep in [0, 3, 5] {
        assert!(Mapper::new(&model(&deepseek(), ModelOptions::default()), ep).is_err(), "{ep}");
    }
    // no experts to share out
    assert!(Mapper::new(&model(&dense("LlamaForCausalLM"), ModelOptions::default()), 3).is_ok());
    assert!(Mapper::new(&model(&kimi(), draft()), 1).is_err());
    let mut two = deepseek();
    two["n_shared_experts"] = json!(2);
    assert!(Mapper::new(&model(&two, fused()), 1).is_err());
    let two_groups = || mapper(&deepseek(), ModelOptions::default(), 2);
    assert!(Arrivals::new(two_groups(), 1).is_ok());
    assert!(Arrivals::new(two_groups(), 2).is_err());
}

#[test]
fn shards_print_and_serialise_as_the_field_writes_them() {
    let mapping = |shard| Mapping {
        runtime: "p".into(),
        shard,
        shards: 2,
        expert: (shard == Shard::W3).then_some(1),
        local_experts: (shard == Shard::W3).then_some(4),
    };
    let text = |shard| serde_json::to_string(&mapping(shard)).unwrap();
    let expected = r#"{"runtime":"p","shard":1,"shards":2,"expert":null,"local_experts":null}"#;
    assert_eq!(text(Shard::Index(1)), expected);
    let expected = r#"{"runtime":"p","shard":"w3","shards":2,"expert":1,"local_experts":4}"#;
    assert_eq!(text(Shard::W3), expected);
    assert_eq!(serde_json::to_value(Shard::Whole).unwrap(), Value::Null);
    assert_eq!(
        [Shard::Whole, Shard::Q, Shard::Index(0)].map(|s| s.to_string()),
        ["none", "q", "0"]
    );
}
