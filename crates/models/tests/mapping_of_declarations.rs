//! The rules for names against the declarations, which were written apart: every tensor that a family declares, in
//! every scheme, maps to the parameter that its bytes land in, in the order in which they lie there.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::collections::BTreeMap;

use longshore_models::{
    arch::Model,
    config::Config,
    declare::{Declaration, Lookup},
    mapping::{Mapper, Piece},
    options::{KernelLayout, ModelOptions},
    parallel::Parallel,
    quant::Scheme,
};
use serde_json::{Value, json};

/// A checkpoint in which every module is stored in one scheme and has all that may be there.
struct Everything(Scheme);

impl Lookup for Everything {
    fn scheme(&self, _: &str) -> Option<Scheme> {
        Some(self.0)
    }

    fn has(&self, _: &str) -> bool {
        true
    }
}

const SCHEMES: [Scheme; 5] =
    [Scheme::Bf16, Scheme::Fp8, Scheme::Nvfp4, Scheme::Mxfp4, Scheme::Int4];

fn configs() -> Vec<Value> {
    let mut configs = Vec::new();
    for architecture in ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"] {
        for tied in [true, false] {
            configs.push(json!({
                "architectures": [architecture], "hidden_size": 256, "num_hidden_layers": 3,
                "vocab_size": 64, "num_attention_heads": 8, "head_dim": 128,
                "intermediate_size": 256, "tie_word_embeddings": tied, "num_experts": 4,
                "moe_intermediate_size": 512, "mlp_only_layers": [1],
            }));
        }
    }
    for architecture in ["DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"]
    {
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 256, "num_hidden_layers": 3,
            "vocab_size": 64, "num_attention_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "intermediate_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 4,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
            "topk_method": "noaux_tc", "index_topk": 16, "index_n_heads": 4, "index_head_dim": 64,
        });
        configs.push(config.clone());
        let vision = json!({"vt_hidden_size": 64, "vt_num_attention_heads": 4, "patch_size": 2});
        let kimi = "KimiK25ForConditionalGeneration";
        configs.push(json!({
            "architectures": [kimi], "text_config": config, "vision_config": vision,
        }));
        for key in ["q_lora_rank", "index_topk", "topk_method"] {
            config[key] = Value::Null;
        }
        configs.push(config);
    }
    configs
}

fn options() -> Vec<ModelOptions> {
    // layout none: every scheme declares under it
    let plain = ModelOptions { kernel_layout: Some(KernelLayout::None), ..ModelOptions::default() };
    vec![
        plain,
        ModelOptions { fuse_shared_experts: true, ..plain },
        ModelOptions { draft: true, ..plain },
        ModelOptions { draft: true, fuse_shared_experts: true, ..plain },
        ModelOptions { language_only: true, ..plain },
        ModelOptions { encoder_only: true, ..plain },
    ]
}

/// The tensors that land in each parameter on `rank`, by the offset at which they land.
fn landings(declaration: &Declaration, rank: u32) -> BTreeMap<&str, Vec<&str>> {
    let mut landings: BTreeMap<&str, Vec<(u64, &str)>> = BTreeMap::new();
    for piece in declaration.pieces.iter().filter(|p| p.members.part(rank).is_some()) {
        let tensor = declaration.sources[piece.source as usize].name.as_str();
        let param = &declaration.params[piece.param as usize];
        landings.entry(&param.name).or_default().push((piece.target_offset, tensor));
    }
    let in_order = |(param, mut landed): (_, Vec<(u64, _)>)| {
        landed.sort_unstable();
        let mut tensors: Vec<&str> = landed.into_iter().map(|(_, tensor)| tensor).collect();
        // the three thirds of a tensor that is fused on disk
        tensors.dedup();
        (param, tensors)
    };
    landings.into_iter().map(in_order).collect()
}

fn check(what: &str, declaration: &Declaration, mapper: &Mapper, parallel: Parallel) {
    let unplaced: Vec<&str> = declaration
        .unplaced
        .iter()
        .map(|(source, _)| declaration.sources[*source as usize].name.as_str())
        .collect();
    for ep_rank in 0..parallel.ep() {
        let landings = landings(declaration, ep_rank * parallel.moe_tp());
        for param in &declaration.params {
            let what = format!("{what}: {}", param.name);
            let sources = mapper.sources(&param.name, ep_rank);
            let landed = landings.get(param.name.as_str()).cloned().unwrap_or_default();
            let kept: Vec<&str> = sources
                .iter()
                .map(|piece| piece.tensor.as_str())
                .filter(|tensor| !unplaced.contains(tensor))
                .collect();
            assert_eq!(kept, landed, "{what}");
            for Piece { tensor, shard, expert } in &sources {
                let m = mapper.map(tensor).unwrap_or_else(|| panic!("{what}: {tensor}"));
                assert_eq!((&m.runtime, &m.shard, &m.expert), (&param.name, shard, expert));
                let promised = u64::from(m.shards) * m.local_experts.unwrap_or(1);
                assert_eq!(sources.len() as u64, promised, "{what}");
            }
        }
    }
    for source in &declaration.sources {
        assert!(mapper.map(&source.name).is_some(), "{what}: {}", source.name);
    }
    for alias in &declaration.aliases {
        assert_eq!(mapper.sources(&alias.name, 0), [], "{what}: {}", alias.name);
    }
}

#[test]
fn every_declared_tensor_maps_to_where_its_bytes_land() {
    let mut checked = 0;
    for config in configs() {
        for options in options() {
            let parsed = Config::parse("config.json", config.to_string().as_bytes()).unwrap();
            let Ok(model) = Model::new(parsed, None, options) else {
                continue;
            };
            for (tp, ep) in [(1, 1), (2, 2), (4, 2)] {
                let parallel = Parallel::new(tp, ep).unwrap();
                for scheme in SCHEMES {
                    // FP8 blocks do not fit every size and tp
                    let Ok(declaration) = model.declare(parallel, &Everything(scheme)) else {
                        assert_eq!(scheme, Scheme::Fp8, "{config}");
                        continue;
                    };
                    let what = format!("{config} {options:?} ep {ep} {scheme:?}");
                    let mapper = Mapper::new(&model, ep).unwrap();
                    check(&what, &declaration, &mapper, parallel);
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 500, "only {checked} declarations were checked");
}
