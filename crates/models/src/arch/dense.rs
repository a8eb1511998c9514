//! What Llama, Qwen3 and Qwen3-MoE share: grouped-query attention, gated MLP, vocabulary. Source: reference §1.5, §2.9.

use crate::{
    arch::{Model, scales::kv_scales},
    config::{Config, VOCAB_MAX},
    declare::{
        Declare,
        linear::{Input, Slots},
    },
    error::PlanError,
};

/// Dimensions of a decoder with grouped-query attention.
pub(crate) struct Dims {
    pub(crate) hidden: u64,
    pub(crate) layers: u32,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    vocab: u64,
    pub(crate) tied: bool,
}

impl Dims {
    pub(crate) fn from_model(model: &Model) -> Result<Self, PlanError> {
        let c = &model.config;
        let (hidden, heads) = (c.dim("hidden_size")?, c.dim("num_attention_heads")?);
        Ok(Self {
            hidden,
            layers: layer_count(c)?,
            heads,
            kv_heads: c.dim_or("num_key_value_heads", heads)?,
            head_dim: c.dim_or("head_dim", hidden / heads)?,
            vocab: c.dim_up_to("vocab_size", VOCAB_MAX)?,
            tied: c.flag("tie_word_embeddings")?,
        })
    }
}

/// The most layers that are believed: ten times any published model, so that a config cannot make us allocate forever.
pub(crate) const LAYERS_MAX: u64 = 1024;

pub(crate) fn layer_count(config: &Config) -> Result<u32, PlanError> {
    Ok(config.dim_up_to("num_hidden_layers", LAYERS_MAX)? as u32)
}

pub(crate) fn embedding(d: &mut Declare<'_>, dims: &Dims) -> Result<(), PlanError> {
    let name = "model.embed_tokens.weight";
    let embed = d.vocab(name, name, dims.vocab, dims.hidden)?;
    if dims.tied {
        d.alias("lm_head.weight", embed);
    }
    Ok(())
}

pub(crate) fn head(d: &mut Declare<'_>, dims: &Dims) -> Result<(), PlanError> {
    d.layer = None;
    norm(d, "model.norm", dims.hidden);
    if !dims.tied {
        d.vocab("lm_head.weight", "lm_head.weight", dims.vocab, dims.hidden)?;
    }
    Ok(())
}

pub(crate) fn norm(d: &mut Declare<'_>, module: &str, size: u64) {
    let name = format!("{module}.weight");
    d.replicated(&name, &name, &[size]);
}

/// Attention and the two norms of layer `a` (`model.layers.3.`).
pub(crate) fn attention(
    d: &mut Declare<'_>,
    a: &str,
    dims: &Dims,
    qk_norm: bool,
) -> Result<(), PlanError> {
    norm(d, &format!("{a}input_layernorm"), dims.hidden);
    let sources = ["q", "k", "v"].map(|x| format!("{a}self_attn.{x}_proj"));
    let qkv = d.qkv(sources, dims.heads, dims.kv_heads, dims.head_dim)?;
    let name = format!("{a}self_attn.qkv_proj");
    d.linear(&name, &qkv, dims.hidden, Input::Whole, Slots::PerPart)?;
    if qk_norm {
        norm(d, &format!("{a}self_attn.q_norm"), dims.head_dim);
        norm(d, &format!("{a}self_attn.k_norm"), dims.head_dim);
    }
    let name = format!("{a}self_attn.o_proj");
    let o = d.whole(name.clone(), dims.hidden);
    d.linear(&name, &[o], dims.heads * dims.head_dim, Input::Split, Slots::PerPart)?;
    let attention = format!("{a}self_attn.");
    kv_scales(d, [&attention, &attention], "attn")?;
    norm(d, &format!("{a}post_attention_layernorm"), dims.hidden);
    Ok(())
}

/// A gated MLP under `a` (`model.layers.3.mlp.`): gate and up fused and column parallel, down row parallel.
pub(crate) fn mlp(d: &mut Declare<'_>, a: &str, inner: u64, hidden: u64) -> Result<(), PlanError> {
    let parts =
        [d.column(format!("{a}gate_proj"), inner)?, d.column(format!("{a}up_proj"), inner)?];
    d.linear(&format!("{a}gate_up_proj"), &parts, hidden, Input::Whole, Slots::PerPart)?;
    let name = format!("{a}down_proj");
    let down = d.whole(name.clone(), hidden);
    d.linear(&name, &[down], inner, Input::Split, Slots::PerPart)?;
    Ok(())
}

/// A whole decoder of attention and gated MLP layers.
pub(crate) fn decoder(d: &mut Declare<'_>, model: &Model, qk_norm: bool) -> Result<(), PlanError> {
    let dims = Dims::from_model(model)?;
    let inner = model.config.dim("intermediate_size")?;
    embedding(d, &dims)?;
    for i in 0..dims.layers {
        d.layer = Some(i);
        let a = format!("model.layers.{i}.");
        attention(d, &a, &dims, qk_norm)?;
        mlp(d, &format!("{a}mlp."), inner, dims.hidden)?;
    }
    head(d, &dims)
}
