//! DeepSeek V3, R1, V3.1, V3.2, Kimi-K2 and GLM-5: multi-head latent attention and experts with a shared one.
//!
//! Source: reference §1.1, §1.2, §2.1–2.5, §3.3–3.5, §4d.

use crate::{
    arch::{Family, Model, dense, scales::kv_scales},
    config::{Config, EXPERTS_MAX, VOCAB_MAX},
    declare::{
        Accept, Declare, Source,
        experts::Experts,
        linear::{Input, Slots},
    },
    dtype::Dtype,
    error::PlanError,
    quant::Scheme,
    transform::{Finish, MlaSplit},
};

/// The dimensions of the family, as `config.json` gives them.
pub(crate) struct Dims {
    hidden: u64,
    pub(crate) layers: u32,
    vocab: u64,
    heads: u64,
    /// q_lora_rank; `None`: one q_proj instead of q_a and q_b.
    pub(crate) q_lora: Option<u64>,
    kv_lora: u64,
    nope: u64,
    rope: u64,
    value: u64,
    dense_inner: u64,
    pub(crate) experts: Option<ExpertDims>,
    pub(crate) indexer: Option<IndexerDims>,
    /// dtype of the indexer's norms in published files (contract §4, "dtypes in the files").
    indexer_norm_dtype: Dtype,
    pub(crate) tied: bool,
    /// num_nextn_predict_layers.
    prediction_layers: u64,
}

pub(crate) struct IndexerDims {
    heads: u64,
    head_dim: u64,
}

pub(crate) struct ExpertDims {
    pub(crate) routed: u64,
    pub(crate) shared: u64,
    inner: u64,
    first_layer: u64,
    every: u64,
    pub(crate) correction_bias: bool,
}

impl Dims {
    pub(crate) fn from_model(model: &Model) -> Result<Self, PlanError> {
        let c = model.text();
        let indexes = model.family.may_index() && c.get("index_topk").is_some();
        let experts = match c.opt_count("n_routed_experts")? {
            None | Some(0) => None,
            Some(_) => {
                let routed = c.dim_up_to("n_routed_experts", EXPERTS_MAX)?;
                Some(ExpertDims {
                    routed,
                    shared: c.opt_count("n_shared_experts")?.unwrap_or(0),
                    inner: c.dim("moe_intermediate_size")?,
                    first_layer: c.opt_count("first_k_dense_replace")?.unwrap_or(0),
                    every: c.dim_or("moe_layer_freq", 1)?,
                    correction_bias: c.text("topk_method") == Some("noaux_tc"),
                })
            }
        };
        Ok(Self {
            hidden: c.dim("hidden_size")?,
            layers: dense::layer_count(c)?,
            vocab: c.dim_up_to("vocab_size", VOCAB_MAX)?,
            heads: c.dim("num_attention_heads")?,
            q_lora: c.opt_count("q_lora_rank")?.filter(|&n| n > 0),
            kv_lora: c.dim("kv_lora_rank")?,
            nope: c.dim("qk_nope_head_dim")?,
            rope: c.dim("qk_rope_head_dim")?,
            value: c.dim("v_head_dim")?,
            dense_inner: c.dim("intermediate_size")?,
            experts,
            indexer: match indexes {
                false => None,
                true => Some(IndexerDims {
                    heads: c.dim("index_n_heads")?,
                    head_dim: c.dim("index_head_dim")?,
                }),
            },
            indexer_norm_dtype: match model.family {
                Family::GlmMoeDsa => Dtype::F32,
                _ => model.dtype,
            },
            tied: c.flag("tie_word_embeddings")?,
            prediction_layers: prediction_layers(c),
        })
    }

    /// The expert dimensions of layer `i` when it has experts (reference §1.1).
    pub(crate) fn experts_of(&self, i: u32) -> Option<&ExpertDims> {
        let i = u64::from(i);
        self.experts.as_ref().filter(|e| i >= e.first_layer && i % e.every == 0)
    }
}

fn prediction_layers(text: &Config) -> u64 {
    text.opt_count("num_nextn_predict_layers").ok().flatten().unwrap_or(0)
}

/// Declares the language model; its names start with `prefix` (`language_model.` behind a vision tower).
pub(super) fn declare(d: &mut Declare<'_>, model: &Model, prefix: &str) -> Result<(), PlanError> {
    let dims = Dims::from_model(model)?;
    if model.options.fuse_shared_experts {
        check_fusion(&dims)?;
    }
    if model.options.draft {
        return declare_draft(d, model, &dims, prefix);
    }
    let embedding = format!("{prefix}model.embed_tokens.weight");
    let embedding = d.vocab(&embedding, &embedding, dims.vocab, dims.hidden)?;
    for i in 0..dims.layers {
        d.layer = Some(i);
        let a = format!("{prefix}model.layers.{i}.");
        decoder_layer(d, model, &dims, [&a, &a], dims.experts_of(i))?;
    }
    d.layer = None;
    dense::norm(d, &format!("{prefix}model.norm"), dims.hidden);
    let head = format!("{prefix}lm_head.weight");
    if dims.tied {
        d.alias(head, embedding);
    } else {
        d.vocab(&head, &head, dims.vocab, dims.hidden)?;
    }
    Ok(())
}

/// The prediction layer as the runtime's draft model (§2.1 step 4; contract §4, `--draft`).
fn declare_draft(
    d: &mut Declare<'_>,
    model: &Model,
    dims: &Dims,
    prefix: &str,
) -> Result<(), PlanError> {
    check_draft(dims)?;
    let (target, source) =
        (format!("{prefix}model."), format!("{prefix}model.layers.{}.", dims.layers));
    d.layer = Some(dims.layers);
    for (name, shape) in [
        ("enorm.weight", vec![dims.hidden]),
        ("hnorm.weight", vec![dims.hidden]),
        ("eh_proj.weight", vec![dims.hidden, 2 * dims.hidden]),
        ("shared_head.norm.weight", vec![dims.hidden]),
    ] {
        d.replicated(&format!("{target}{name}"), &format!("{source}{name}"), &shape);
    }
    // the prediction layer always has experts (reference §1.1)
    let target = format!("{target}decoder.");
    decoder_layer(d, model, dims, [&target, &source], dims.experts.as_ref())
}

/// One decoder layer; `to` and `from` are its prefixes at run time and in the checkpoint.
fn decoder_layer(
    d: &mut Declare<'_>,
    model: &Model,
    dims: &Dims,
    [to, from]: [&str; 2],
    experts: Option<&ExpertDims>,
) -> Result<(), PlanError> {
    norm(d, [to, from], "input_layernorm", dims.hidden);
    attention(d, dims, [to, from])?;
    norm(d, [to, from], "post_attention_layernorm", dims.hidden);
    match experts {
        None => mlp(d, [to, from], "mlp.", dims.dense_inner, dims.hidden),
        Some(experts) => moe_block(d, model, dims, experts, [to, from]),
    }
}

fn norm(d: &mut Declare<'_>, [to, from]: [&str; 2], module: &str, size: u64) {
    d.replicated(&format!("{to}{module}.weight"), &format!("{from}{module}.weight"), &[size]);
}

fn attention(d: &mut Declare<'_>, dims: &Dims, [to, from]: [&str; 2]) -> Result<(), PlanError> {
    let tp = u64::from(d.parallel.tp());
    if dims.heads % tp != 0 {
        let found = format!("{} attention heads, tp {tp}", dims.heads);
        let expected = "tp must divide num_attention_heads";
        return Err(PlanError::unsupported(format!("{to}self_attn"), found, expected));
    }
    let [to, from] = [format!("{to}self_attn."), format!("{from}self_attn.")];
    let both = [to.as_str(), from.as_str()];
    let query_rows = dims.heads * (dims.nope + dims.rope);
    let kv_a = d.whole(format!("{from}kv_a_proj_with_mqa"), dims.kv_lora + dims.rope);
    match dims.q_lora {
        Some(q_lora) => {
            let parts = [d.whole(format!("{from}q_a_proj"), q_lora), kv_a];
            let name = format!("{to}fused_qkv_a_proj_with_mqa");
            d.linear(&name, &parts, dims.hidden, Input::Whole, Slots::First)?;
            norm(d, both, "q_a_layernorm", q_lora);
            column(d, both, "q_b_proj", query_rows, q_lora)?;
        }
        None => {
            column(d, both, "q_proj", query_rows, dims.hidden)?;
            let name = format!("{to}kv_a_proj_with_mqa");
            d.linear(&name, &[kv_a], dims.hidden, Input::Whole, Slots::PerPart)?;
        }
    }
    norm(d, both, "kv_a_layernorm", dims.kv_lora);
    kv_b(d, dims, both)?;
    row(d, both, "o_proj", dims.hidden, dims.heads * dims.value)?;
    if let Some(indexer) = &dims.indexer {
        sparse_indexer(d, dims, indexer, both)?;
    }
    kv_scales(d, both, "attn_mqa")
}

/// The indexer of sparse attention: whole on every rank; norms in F32, the head weights always BF16 (reference §1.2).
fn sparse_indexer(
    d: &mut Declare<'_>,
    dims: &Dims,
    indexer: &IndexerDims,
    [to, from]: [&str; 2],
) -> Result<(), PlanError> {
    let Some(q_lora) = dims.q_lora else {
        let found = "q_lora_rank null";
        let expected = "an indexer needs q_lora_rank";
        return Err(PlanError::unsupported(format!("{to}indexer"), found, expected));
    };
    let linears =
        [("wq_b", indexer.heads * indexer.head_dim, q_lora), ("wk", indexer.head_dim, dims.hidden)];
    for (module, rows, k) in linears {
        let part = d.whole(format!("{from}indexer.{module}"), rows);
        d.linear(&format!("{to}indexer.{module}"), &[part], k, Input::Whole, Slots::PerPart)?;
    }
    let mut plain = |name: &str, shape: &[u64], dtype, usual| {
        d.replicated_as(&format!("{to}{name}"), &format!("{from}{name}"), shape, dtype, usual);
    };
    for name in ["indexer.k_norm.weight", "indexer.k_norm.bias"] {
        plain(name, &[indexer.head_dim], Dtype::F32, dims.indexer_norm_dtype);
    }
    plain("indexer.weights_proj.weight", &[indexer.heads, dims.hidden], Dtype::BF16, Dtype::BF16);
    Ok(())
}

/// `kv_b_proj`, column parallel by whole heads, and its split into `w_kc` and `w_vc` (§4d).
fn kv_b(d: &mut Declare<'_>, dims: &Dims, [to, from]: [&str; 2]) -> Result<(), PlanError> {
    let rows = dims.heads * (dims.nope + dims.value);
    let part = d.column(format!("{from}kv_b_proj"), rows)?;
    let name = format!("{to}kv_b_proj");
    let made = d.linear(&name, &[part], dims.kv_lora, Input::Whole, Slots::PerPart)?;
    if !d.layout.derive {
        return Ok(());
    }
    if matches!(made.scheme, Scheme::Nvfp4 | Scheme::Int4) {
        let found = format!("stored as {}", made.scheme.name());
        let expected = "the MLA split needs BF16, FP8 or MXFP4 (or --kernel-layout none)";
        return Err(PlanError::unsupported(name, found, expected));
    }
    let heads = dims.heads / u64::from(d.parallel.tp());
    let (dn, dv, kl) = (dims.nope, dims.value, dims.kv_lora);
    let w_kc = d.derived(format!("{to}w_kc"), Dtype::BF16, vec![heads, kl, dn]);
    let w_vc = d.derived(format!("{to}w_vc"), Dtype::BF16, vec![heads, dv, kl]);
    let (weight, scale, scheme) = (made.weight, made.scale, made.scheme);
    d.after(Finish::MlaSplit(MlaSplit { weight, scale, scheme, w_kc, w_vc, heads, dn, dv, kl }));
    Ok(())
}

fn column(
    d: &mut Declare<'_>,
    [to, from]: [&str; 2],
    module: &str,
    rows: u64,
    k: u64,
) -> Result<(), PlanError> {
    let part = d.column(format!("{from}{module}"), rows)?;
    d.linear(&format!("{to}{module}"), &[part], k, Input::Whole, Slots::PerPart)?;
    Ok(())
}

fn row(
    d: &mut Declare<'_>,
    [to, from]: [&str; 2],
    module: &str,
    rows: u64,
    k: u64,
) -> Result<(), PlanError> {
    let part = d.whole(format!("{from}{module}"), rows);
    d.linear(&format!("{to}{module}"), &[part], k, Input::Split, Slots::PerPart)?;
    Ok(())
}

fn mlp(
    d: &mut Declare<'_>,
    [to, from]: [&str; 2],
    block: &str,
    inner: u64,
    hidden: u64,
) -> Result<(), PlanError> {
    let parts = [
        d.column(format!("{from}{block}gate_proj"), inner)?,
        d.column(format!("{from}{block}up_proj"), inner)?,
    ];
    let name = format!("{to}{block}gate_up_proj");
    d.linear(&name, &parts, hidden, Input::Whole, Slots::PerPart)?;
    row(d, [to, from], &format!("{block}down_proj"), hidden, inner)
}

fn moe_block(
    d: &mut Declare<'_>,
    model: &Model,
    dims: &Dims,
    experts: &ExpertDims,
    [to, from]: [&str; 2],
) -> Result<(), PlanError> {
    let (routed, hidden) = (experts.routed, dims.hidden);
    let router = "mlp.gate.weight";
    d.replicated(&format!("{to}{router}"), &format!("{from}{router}"), &[routed, hidden]);
    if experts.correction_bias {
        let bias = "mlp.gate.e_score_correction_bias";
        let (name, source) = (format!("{to}{bias}"), format!("{from}{bias}"));
        let usual = if model.family == Family::KimiK25 { Dtype::BF16 } else { Dtype::F32 };
        d.replicated_as(&name, &source, &[routed], Dtype::F32, usual);
    }
    let fuse = model.options.fuse_shared_experts;
    let mut sources: Vec<String> = (0..routed).map(|e| format!("{from}mlp.experts.{e}")).collect();
    if fuse {
        sources.push(format!("{from}mlp.shared_experts"));
    }
    let name = format!("{to}mlp.experts");
    d.experts(&Experts { name, sources, routed, inner: experts.inner, hidden })?;
    if experts.shared > 0 && !fuse {
        mlp(d, [to, from], "mlp.shared_experts.", experts.inner * experts.shared, hidden)?;
    }
    Ok(())
}

/// The copies of embedding and head in the prediction layer, as DeepSeek publishes them (contract §4).
pub(super) fn prediction_copies(model: &Model) -> Result<Vec<Source>, PlanError> {
    let dims = Dims::from_model(model)?;
    let copy = |name: &str| Source {
        name: format!("model.layers.{}.{name}.weight", dims.layers),
        shape: vec![dims.vocab, dims.hidden],
        accept: Accept::AnyFloat,
        usual: model.dtype,
    };
    Ok(vec![copy("embed_tokens"), copy("shared_head.head")])
}

pub(crate) fn check_fusion(dims: &Dims) -> Result<(), PlanError> {
    let shared = dims.experts.as_ref().map_or(0, |e| e.shared);
    if shared != 1 {
        let found = format!("n_shared_experts {shared}");
        let expected = "needs exactly one shared expert";
        return Err(PlanError::unsupported("--fuse-shared-experts", found, expected));
    }
    Ok(())
}

pub(crate) fn check_draft(dims: &Dims) -> Result<(), PlanError> {
    if dims.prediction_layers != 1 {
        let found = format!("num_nextn_predict_layers {}", dims.prediction_layers);
        return Err(PlanError::unsupported("--draft", found, "needs exactly one prediction layer"));
    }
    Ok(())
}

pub(super) fn skip_reason(model: &Model, canonical: &str) -> Option<&'static str> {
    let text = model.text();
    let layers = text.dim("num_hidden_layers").ok()?;
    let name = canonical.strip_prefix("language_model.").unwrap_or(canonical);
    let layer = name.strip_prefix("model.layers.").and_then(|rest| {
        let (number, _) = rest.split_once('.')?;
        number.parse::<u64>().ok()
    });
    let predicts = prediction_layers(text) > 0 && layer.is_some_and(|l| l >= layers);
    if model.options.draft {
        let copy =
            name.ends_with(".embed_tokens.weight") || name.ends_with(".shared_head.head.weight");
        return match predicts {
            false => Some("not part of the draft model"),
            true => copy.then_some("the main model's embedding and head are used"),
        };
    }
    if name == "lm_head.weight" && text.flag("tie_word_embeddings").unwrap_or(false) {
        return Some("tied to the embedding");
    }
    predicts.then_some("prediction layer; --draft loads it")
}
