//! Kimi-K2.5: a vision tower and a projector in front of DeepSeek's decoder.
//!
//! The vision part is never quantised; its attention is cut by heads, all else is whole on every rank. Source: reference
//! §1.4, §2.7, §3.4.

use crate::{
    arch::{Model, deepseek, dense},
    config::Config,
    declare::{Accept, Declare, Split},
    dtype::elem_bytes,
    error::PlanError,
    parallel::Members,
};

/// What the inner model's names start with.
pub(crate) const LANGUAGE: &str = "language_model.";
const VISION: [&str; 2] = ["vision_tower.", "mm_projector."];

pub(super) fn declare(d: &mut Declare<'_>, model: &Model) -> Result<(), PlanError> {
    if !model.options.language_only && !model.options.draft {
        vision(d, model)?;
    }
    if model.options.encoder_only {
        return Ok(());
    }
    deepseek::declare(d, model, LANGUAGE)
}

pub(super) fn skip_reason(model: &Model, canonical: &str) -> Option<&'static str> {
    if VISION.iter().any(|part| canonical.starts_with(part)) {
        return match (model.options.language_only, model.options.draft) {
            (true, _) => Some("vision; --language-only"),
            (_, true) => Some("not part of the draft model"),
            _ => None,
        };
    }
    if model.options.encoder_only {
        return canonical.starts_with(LANGUAGE).then_some("text; --encoder-only");
    }
    deepseek::skip_reason(model, canonical)
}

/// Sizes of the vision tower: the published `vt_*` keys, else the plain ones, else the defaults of reference §1.1.
struct Vision {
    hidden: u64,
    heads: u64,
    layers: u64,
    inner: u64,
    patch: u64,
    positions: [u64; 2],
    merged: u64,
    text_hidden: u64,
}

impl Vision {
    fn from_model(model: &Model) -> Result<Self, PlanError> {
        let config = model.config.nested("vision_config");
        let config = config.unwrap_or_else(|| Config::empty(model.config.file(), "vision_config."));
        let size = |key: &str, default| {
            let published = format!("vt_{key}");
            let key = if config.get(&published).is_some() { &published } else { key };
            config.dim_or(key, default)
        };
        let hidden = size("hidden_size", 1152)?;
        let merge = match config.get("merge_kernel_size").map(|v| v.as_array()) {
            None => 4,
            Some(list) => {
                let sides =
                    list.and_then(|l| l.iter().map(|v| v.as_u64()).collect::<Option<Vec<u64>>>());
                match sides.as_deref() {
                    Some([a @ 1..=16, b @ 1..=16]) => a * b,
                    _ => return Err(config.wrong("merge_kernel_size", "two integers from 1 to 16")),
                }
            }
        };
        let layers = size("num_hidden_layers", 27)?;
        if layers > dense::LAYERS_MAX {
            let keys = ["vt_num_hidden_layers", "num_hidden_layers"];
            let key = if config.get(keys[0]).is_some() { keys[0] } else { keys[1] };
            return Err(config.wrong(key, "at most 1024"));
        }
        Ok(Self {
            hidden,
            heads: size("num_attention_heads", 16)?,
            layers,
            inner: size("intermediate_size", 4304)?,
            patch: config.dim_or("patch_size", 14)?,
            positions: [
                config.dim_or("init_pos_emb_height", 64)?,
                config.dim_or("init_pos_emb_width", 64)?,
            ],
            merged: hidden * merge,
            text_hidden: model.text().dim("hidden_size")?,
        })
    }
}

/// Blocks of the vision tower.
pub(crate) fn vision_layers(model: &Model) -> Result<u64, PlanError> {
    Ok(Vision::from_model(model)?.layers)
}

fn vision(d: &mut Declare<'_>, model: &Model) -> Result<(), PlanError> {
    let v = Vision::from_model(model)?;
    check(d, &v)?;
    let patch = "vision_tower.patch_embed.";
    whole(d, &format!("{patch}proj.weight"), &[v.hidden, 3, v.patch, v.patch]);
    whole(d, &format!("{patch}proj.bias"), &[v.hidden]);
    whole(d, &format!("{patch}pos_emb.weight"), &[v.positions[0], v.positions[1], v.hidden]);
    for i in 0..v.layers {
        block(d, &v, &format!("vision_tower.encoder.blocks.{i}."));
    }
    norm(d, "vision_tower.encoder.final_layernorm", v.hidden);
    norm(d, "mm_projector.pre_norm", v.hidden);
    for (source, name, rows) in
        [("proj.0", "linear_1", v.merged), ("proj.2", "linear_2", v.text_hidden)]
    {
        let [source, name] = [source, name].map(|x| format!("mm_projector.{x}"));
        d.replicated(&format!("{name}.weight"), &format!("{source}.weight"), &[rows, v.merged]);
        d.replicated(&format!("{name}.bias"), &format!("{source}.bias"), &[rows]);
    }
    Ok(())
}

fn check(d: &Declare<'_>, v: &Vision) -> Result<(), PlanError> {
    let tp = u64::from(d.parallel.tp());
    if v.heads % tp != 0 || v.hidden % v.heads != 0 {
        let found = format!("{} vision heads, vision hidden size {}, tp {tp}", v.heads, v.hidden);
        let expected = "tp must divide the vision heads, and these the hidden size";
        return Err(PlanError::unsupported("vision_tower", found, expected));
    }
    Ok(())
}

fn block(d: &mut Declare<'_>, v: &Vision, b: &str) {
    norm(d, &format!("{b}norm0"), v.hidden);
    norm(d, &format!("{b}norm1"), v.hidden);
    fused_qkv(
        d,
        &format!("{b}attn.qkv_proj.weight"),
        &format!("{b}wqkv.weight"),
        v.hidden,
        v.hidden,
    );
    fused_qkv(d, &format!("{b}attn.qkv_proj.bias"), &format!("{b}wqkv.bias"), v.hidden, 1);
    row_parallel(d, &format!("{b}attn.proj.weight"), &format!("{b}wo.weight"), v.hidden);
    d.replicated(&format!("{b}attn.proj.bias"), &format!("{b}wo.bias"), &[v.hidden]);
    whole(d, &format!("{b}mlp.fc0.weight"), &[v.inner, v.hidden]);
    whole(d, &format!("{b}mlp.fc0.bias"), &[v.inner]);
    whole(d, &format!("{b}mlp.fc1.weight"), &[v.hidden, v.inner]);
    whole(d, &format!("{b}mlp.fc1.bias"), &[v.hidden]);
}

fn whole(d: &mut Declare<'_>, name: &str, shape: &[u64]) {
    d.replicated(name, name, shape);
}

fn norm(d: &mut Declare<'_>, module: &str, size: u64) {
    whole(d, &format!("{module}.weight"), &[size]);
    whole(d, &format!("{module}.bias"), &[size]);
}

/// q, k and v stacked in one tensor of `3·hidden` rows (a bias has rows of one element): each third is cut by heads.
fn fused_qkv(d: &mut Declare<'_>, name: &str, source: &str, hidden: u64, row_elems: u64) {
    let per = hidden / u64::from(d.parallel.tp());
    let shape = |rows: u64| if row_elems == 1 { vec![rows] } else { vec![rows, row_elems] };
    let param = d.param(name.to_owned(), d.dtype, shape(3 * per));
    let source = d.source(source.to_owned(), shape(3 * hidden), Accept::AnyFloat, d.dtype);
    let stride = row_elems * elem_bytes(d.dtype);
    for third in 0..3 {
        let rows = (third * hidden, (third + 1) * hidden);
        let members = Members::split(d.parallel, 1);
        d.piece(source, rows, Split::Rows { per }, members, param, third * per * stride, stride);
    }
}

fn row_parallel(d: &mut Declare<'_>, name: &str, source: &str, hidden: u64) {
    let per = hidden / u64::from(d.parallel.tp());
    let param = d.param(name.to_owned(), d.dtype, vec![hidden, per]);
    let source = d.source(source.to_owned(), vec![hidden, hidden], Accept::AnyFloat, d.dtype);
    let (members, stride) = (Members::split(d.parallel, 1), per * elem_bytes(d.dtype));
    d.piece(source, (0, hidden), Split::Cols { per }, members, param, 0, stride);
}
