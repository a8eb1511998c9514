//! Which tensors a checkpoint has, as its configuration files imply. Source: contract §4, "synth --config".

use std::collections::HashMap;

use longshore_models::{
    Dtype,
    arch::{Family, Model},
    config::Config,
    declare::{Lookup, Source},
    error::PlanError,
    header::tensor_bytes,
    options::{KernelLayout, ModelOptions},
    parallel::Parallel,
    quant::{Declared, Scheme},
};

/// One tensor to be written.
pub(super) struct SynthTensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    pub(super) bytes: u64,
    /// The numbers that a `weight_shape` holds; everything else is random.
    pub(super) holds: Option<[u64; 2]>,
}

impl SynthTensor {
    fn new(source: Source) -> Self {
        let bytes = tensor_bytes(source.usual, &source.shape).unwrap_or(0);
        let Source { name, shape, usual: dtype, .. } = source;
        Self { name, dtype, shape, bytes, holds: None }
    }
}

/// Every tensor of `model`, the prediction layer included, in natural order of names.
///
/// # Errors
/// A key that is missing or wrong.
pub(super) fn implied(
    model: &Model,
    hf_quant_config: Option<&Config>,
) -> Result<Vec<SynthTensor>, PlanError> {
    // layout none: the raw tensors; derived parameters need no sources
    let kernel_layout = Some(KernelLayout::None);
    let options = ModelOptions { kernel_layout, ..model.options };
    let again = |options| Model::new(model.config.clone(), hf_quant_config, options);
    let single = Parallel::new(1, 1)?;
    let main = Implied { kv_scales: model.declared.kv_cache_fp8, ..Implied::of(model)? };
    let mut sources = again(options)?.declare(single, &main)?.sources;
    if predicts(model)? {
        let draft = again(ModelOptions { draft: true, ..options })?;
        sources.extend(draft.declare(single, &Implied::of(model)?)?.sources);
        sources.extend(draft.prediction_copies()?);
    }
    let mut tensors: Vec<SynthTensor> = sources.into_iter().map(SynthTensor::new).collect();
    fill_weight_shapes(&mut tensors);
    tensors.sort_by_cached_key(|t| natural_key(&t.name));
    Ok(tensors)
}

fn predicts(model: &Model) -> Result<bool, PlanError> {
    Ok(model.text().opt_count("num_nextn_predict_layers")? == Some(1))
}

/// Answers a declaration from the configuration alone.
struct Implied<'a> {
    declared: &'a Declared,
    kv_scales: bool,
    attention_bias: bool,
    mlp_bias: bool,
}

impl<'a> Implied<'a> {
    fn of(model: &'a Model) -> Result<Self, PlanError> {
        let dense = matches!(model.family, Family::Llama | Family::Qwen3 | Family::Qwen3Moe);
        Ok(Self {
            declared: &model.declared,
            kv_scales: false,
            attention_bias: dense && model.config.flag("attention_bias")?,
            mlp_bias: dense && model.config.flag("mlp_bias")?,
        })
    }
}

impl Lookup for Implied<'_> {
    fn scheme(&self, module: &str) -> Option<Scheme> {
        Some(self.declared.expected(module))
    }

    fn has(&self, tensor: &str) -> bool {
        match tensor.strip_suffix(".bias") {
            Some(module) if module.contains(".self_attn.") => self.attention_bias,
            Some(_) => self.mlp_bias,
            None => {
                let scale = [".k_proj.k_scale", ".v_proj.v_scale"];
                self.kv_scales && scale.iter().any(|end| tensor.ends_with(end))
            }
        }
    }
}

/// `weight_shape` is the unpacked shape of the weight beside it: eight codes per I32 along K (reference §1.3).
fn fill_weight_shapes(tensors: &mut [SynthTensor]) {
    let packed: HashMap<String, [u64; 2]> = tensors
        .iter()
        .filter_map(|t| Some((t.name.strip_suffix(".weight_packed")?, &t.shape)))
        .filter_map(|(module, shape)| match shape[..] {
            [rows, words] => Some((module.to_owned(), [rows, words * 8])),
            _ => None,
        })
        .collect();
    for tensor in tensors {
        let module = tensor.name.strip_suffix(".weight_shape");
        tensor.holds = module.and_then(|module| packed.get(module)).copied();
    }
}

/// Orders `layers.2` before `layers.10`.
fn natural_key(name: &str) -> Vec<(u64, String)> {
    let part = |p: &str| match p.parse() {
        Ok(number) => (number, String::new()),
        Err(_) => (0, p.to_owned()),
    };
    name.split('.').map(part).collect()
}
