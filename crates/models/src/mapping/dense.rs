//! Names of Llama, Qwen3 and Qwen3-MoE. Source: reference §1.5, §2.5, §2.9.

use crate::{
    arch::{Family, Model, dense::Dims, qwen3_moe::MoeLayers},
    error::PlanError,
    mapping::{
        Shard,
        table::{At, LINEAR, Table, WEIGHT},
    },
};

/// Adds the decoder and says how many routed experts it has.
pub(super) fn decoder(table: &mut Table, model: &Model) -> Result<u64, PlanError> {
    let dims = Dims::from_model(model)?;
    let moe = match model.family {
        Family::Qwen3Moe => Some(MoeLayers::from_model(model)?),
        _ => None,
    };
    let top = At::both("");
    table.kept(&top, &["model.embed_tokens", "model.norm"], WEIGHT);
    if !dims.tied {
        table.kept(&top, &["lm_head"], WEIGHT);
    }
    for i in 0..dims.layers {
        let layer = At::both(format!("model.layers.{i}."));
        table.kept(&layer, &["input_layernorm", "post_attention_layernorm"], WEIGHT);
        attention(table, &layer.inside("self_attn."), model.family);
        let mlp = layer.inside("mlp.");
        if moe.as_ref().is_some_and(|moe| moe.has_experts(i)) {
            table.kept(&mlp, &["gate"], WEIGHT);
            table.experts(&mlp);
        } else {
            table.mlp(&mlp);
        }
    }
    Ok(moe.map_or(0, |moe| moe.routed))
}

fn attention(table: &mut Table, at: &At, family: Family) {
    let parts = [(Shard::Q, "q_proj"), (Shard::K, "k_proj"), (Shard::V, "v_proj")];
    table.stacked(at, "qkv_proj", &parts, LINEAR);
    table.kept(at, &["o_proj"], LINEAR);
    if family != Family::Llama {
        table.kept(at, &["q_norm", "k_norm"], WEIGHT);
    }
    table.renamed(at, ["attn", "k_proj"], &["k_scale"]);
    table.renamed(at, ["attn", "v_proj"], &["v_scale"]);
}
