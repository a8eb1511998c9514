//! Qwen3-MoE: Qwen3 with routed experts and no shared one. Source: reference §1.5, §2.9.

use crate::{
    arch::{Model, dense, moe},
    declare::{Declare, experts::Experts},
    error::PlanError,
};

pub(super) fn declare(d: &mut Declare<'_>, model: &Model) -> Result<(), PlanError> {
    let c = &model.config;
    let dims = dense::Dims::from_model(model)?;
    let dense_inner = c.dim("intermediate_size")?;
    let (routed, inner) = (c.dim("num_experts")?, c.dim("moe_intermediate_size")?);
    let step = c.dim_or("decoder_sparse_step", 1)?;
    let dense_layers: Vec<u64> = c
        .get("mlp_only_layers")
        .and_then(|v| v.as_array())
        .map(|list| list.iter().filter_map(|v| v.as_u64()).collect())
        .unwrap_or_default();
    moe::check_experts(c, "num_experts", routed)?;

    dense::embedding(d, &dims)?;
    for i in 0..dims.layers {
        d.layer = Some(i);
        let a = format!("model.layers.{i}.");
        dense::attention(d, &a, &dims, true)?;
        let layer = u64::from(i);
        if dense_layers.contains(&layer) || (layer + 1) % step != 0 {
            dense::mlp(d, &format!("{a}mlp."), dense_inner, dims.hidden)?;
            continue;
        }
        let router = format!("{a}mlp.gate.weight");
        d.replicated(&router, &router, &[routed, dims.hidden]);
        let name = format!("{a}mlp.experts");
        let sources = (0..routed).map(|e| format!("{name}.{e}")).collect();
        d.experts(&Experts { name, sources, routed, inner, hidden: dims.hidden })?;
    }
    dense::head(d, &dims)
}
