//! Qwen3-MoE: Qwen3 with routed experts and no shared one. Source: reference §1.5, §2.9.

use crate::{
    arch::{Model, dense},
    config::EXPERTS_MAX,
    declare::{Declare, experts::Experts},
    error::PlanError,
};

/// Which layers have experts, and how many.
pub(crate) struct MoeLayers {
    pub(crate) routed: u64,
    step: u64,
    dense: Vec<u64>,
}

impl MoeLayers {
    pub(crate) fn from_model(model: &Model) -> Result<Self, PlanError> {
        let c = &model.config;
        let routed = c.dim_up_to("num_experts", EXPERTS_MAX)?;
        let dense = c.get("mlp_only_layers").and_then(|v| v.as_array());
        Ok(Self {
            routed,
            step: c.dim_or("decoder_sparse_step", 1)?,
            dense: dense.into_iter().flatten().filter_map(|v| v.as_u64()).collect(),
        })
    }

    pub(crate) fn has_experts(&self, layer: u32) -> bool {
        let layer = u64::from(layer);
        !self.dense.contains(&layer) && (layer + 1) % self.step == 0
    }
}

pub(super) fn declare(d: &mut Declare<'_>, model: &Model) -> Result<(), PlanError> {
    let c = &model.config;
    let dims = dense::Dims::from_model(model)?;
    let layers = MoeLayers::from_model(model)?;
    let (routed, dense_inner) = (layers.routed, c.dim("intermediate_size")?);
    let inner = c.dim("moe_intermediate_size")?;

    dense::embedding(d, &dims)?;
    for i in 0..dims.layers {
        d.layer = Some(i);
        let a = format!("model.layers.{i}.");
        dense::attention(d, &a, &dims, true)?;
        if !layers.has_experts(i) {
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
