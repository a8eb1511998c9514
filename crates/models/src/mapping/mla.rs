//! Names of the DeepSeek family, the draft model's included. Source: reference §1.2, §2.1–2.5.

use crate::{
    arch::{
        Model,
        deepseek::{Dims, ExpertDims, check_draft, check_fusion},
    },
    error::PlanError,
    mapping::{
        Shard,
        table::{At, LINEAR, Table, WEIGHT, WEIGHT_AND_BIAS},
    },
};

/// Adds the language model, whose names start with `prefix`, and says how many routed experts it has.
pub(super) fn decoder(table: &mut Table, model: &Model, prefix: &str) -> Result<u64, PlanError> {
    let dims = Dims::from_model(model)?;
    if model.options.fuse_shared_experts {
        check_fusion(&dims)?;
    }
    if model.options.draft {
        check_draft(&dims)?;
        draft(table, model, &dims, prefix);
    } else {
        main(table, model, &dims, prefix);
    }
    Ok(dims.experts.map_or(0, |experts| experts.routed))
}

fn main(table: &mut Table, model: &Model, dims: &Dims, prefix: &str) {
    let top = At::both(prefix);
    table.kept(&top, &["model.embed_tokens", "model.norm"], WEIGHT);
    if !dims.tied {
        table.kept(&top, &["lm_head"], WEIGHT);
    }
    for i in 0..dims.layers {
        let at = top.inside(&format!("model.layers.{i}."));
        layer(table, model, dims, &at, dims.experts_of(i));
    }
}

/// The prediction layer's names lose their layer: `model.enorm`, `model.decoder.…` (§2.1 step 4).
fn draft(table: &mut Table, model: &Model, dims: &Dims, prefix: &str) {
    let source = format!("{prefix}model.layers.{}.", dims.layers);
    let at = At { runtime: format!("{prefix}model."), source: source.clone() };
    table.kept(&at, &["enorm", "hnorm", "eh_proj", "shared_head.norm"], WEIGHT);
    let decoder = At { runtime: format!("{prefix}model.decoder."), source };
    layer(table, model, dims, &decoder, dims.experts.as_ref());
}

fn layer(table: &mut Table, model: &Model, dims: &Dims, at: &At, experts: Option<&ExpertDims>) {
    table.kept(at, &["input_layernorm", "post_attention_layernorm"], WEIGHT);
    attention(table, dims, &at.inside("self_attn."));
    let mlp = at.inside("mlp.");
    let Some(experts) = experts else {
        table.mlp(&mlp);
        return;
    };
    table.kept(&mlp, &["gate"], WEIGHT);
    if experts.correction_bias {
        table.kept(&mlp, &["gate"], &["e_score_correction_bias"]);
    }
    table.experts(&mlp);
    if experts.shared > 0 && !model.options.fuse_shared_experts {
        table.mlp(&mlp.inside("shared_experts."));
    }
}

fn attention(table: &mut Table, dims: &Dims, at: &At) {
    if dims.q_lora.is_some() {
        let parts = [(Shard::Index(0), "q_a_proj"), (Shard::Index(1), "kv_a_proj_with_mqa")];
        table.stacked(at, "fused_qkv_a_proj_with_mqa", &parts, LINEAR);
        table.kept(at, &["q_a_layernorm"], WEIGHT);
        table.kept(at, &["q_b_proj"], LINEAR);
    } else {
        table.kept(at, &["q_proj", "kv_a_proj_with_mqa"], LINEAR);
    }
    table.kept(at, &["kv_a_layernorm"], WEIGHT);
    table.kept(at, &["kv_b_proj", "o_proj"], LINEAR);
    if dims.indexer.is_some() {
        let indexer = at.inside("indexer.");
        table.kept(&indexer, &["wq_b", "wk"], LINEAR);
        table.kept(&indexer, &["k_norm"], WEIGHT_AND_BIAS);
        table.kept(&indexer, &["weights_proj"], WEIGHT);
    }
    table.renamed(at, ["attn_mqa", "k_proj"], &["k_scale"]);
    table.renamed(at, ["attn_mqa", "v_proj"], &["v_scale"]);
}
