//! Names of Kimi-K2.5: its vision tower, and its inner model behind a prefix. Source: reference §1.4, §2.7.

use crate::{
    arch::{Model, kimi_k25},
    error::PlanError,
    mapping::{
        mla,
        table::{At, Table, WEIGHT, WEIGHT_AND_BIAS},
    },
};

/// Adds what the options leave of the model and says how many routed experts it has.
pub(super) fn wrapper(table: &mut Table, model: &Model) -> Result<u64, PlanError> {
    if !model.options.language_only && !model.options.draft {
        tower(table, kimi_k25::vision_layers(model)?);
    }
    if model.options.encoder_only {
        return Ok(0);
    }
    mla::decoder(table, model, kimi_k25::LANGUAGE)
}

fn tower(table: &mut Table, layers: u64) {
    let tower = At::both("vision_tower.");
    table.kept(&tower, &["patch_embed.proj", "encoder.final_layernorm"], WEIGHT_AND_BIAS);
    table.kept(&tower, &["patch_embed.pos_emb"], WEIGHT);
    for i in 0..layers {
        let block = tower.inside(&format!("encoder.blocks.{i}."));
        table.kept(&block, &["norm0", "norm1", "mlp.fc0", "mlp.fc1"], WEIGHT_AND_BIAS);
        // q, k and v are one tensor in the checkpoint: one shard
        table.renamed(&block, ["attn.qkv_proj", "wqkv"], WEIGHT_AND_BIAS);
        table.renamed(&block, ["attn.proj", "wo"], WEIGHT_AND_BIAS);
    }
    let projector = At::both("mm_projector.");
    table.kept(&projector, &["pre_norm"], WEIGHT_AND_BIAS);
    table.renamed(&projector, ["linear_1", "proj.0"], WEIGHT_AND_BIAS);
    table.renamed(&projector, ["linear_2", "proj.2"], WEIGHT_AND_BIAS);
}
