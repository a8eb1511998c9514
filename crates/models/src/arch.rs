//! Model families: how one is chosen from the configuration, and what each declares.
//!
//! A family is one file of declarations; everything that it shares with others (linear layers, experts, vocabulary)
//! is in [`crate::declare`].

pub(crate) mod deepseek;
pub(crate) mod dense;
pub(crate) mod kimi_k25;
mod llama;
mod qwen3;
pub(crate) mod qwen3_moe;
pub(crate) mod scales;

use std::borrow::Cow;

use crate::{
    config::Config,
    declare::{Declaration, Declare, Lookup, Source},
    dtype::Dtype,
    error::PlanError,
    options::{Layout, ModelOptions},
    parallel::Parallel,
    quant::Declared,
};

/// The model families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// LlamaForCausalLM.
    Llama,
    /// Qwen3ForCausalLM.
    Qwen3,
    /// Qwen3MoeForCausalLM.
    Qwen3Moe,
    /// DeepseekV3ForCausalLM: DeepSeek V3, R1, V3.1 and Kimi-K2.
    DeepseekV3,
    /// DeepseekV32ForCausalLM: the same with an indexer (sparse attention).
    DeepseekV32,
    /// GlmMoeDsaForCausalLM: GLM-5 and 5.1, with an indexer.
    GlmMoeDsa,
    /// KimiK25ForConditionalGeneration: DeepSeek's decoder behind a vision tower.
    KimiK25,
}

impl Family {
    const ALL: [(Family, &'static str, &'static str); 7] = [
        (Family::Llama, "LlamaForCausalLM", "llama"),
        (Family::Qwen3, "Qwen3ForCausalLM", "qwen3"),
        (Family::Qwen3Moe, "Qwen3MoeForCausalLM", "qwen3_moe"),
        (Family::DeepseekV3, "DeepseekV3ForCausalLM", "deepseek_v3"),
        (Family::DeepseekV32, "DeepseekV32ForCausalLM", "deepseek_v32"),
        (Family::GlmMoeDsa, "GlmMoeDsaForCausalLM", "glm_moe_dsa"),
        (Family::KimiK25, "KimiK25ForConditionalGeneration", "kimi_k25"),
    ];

    /// The name used in manifest, JSON and `synth`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(f, ..)| *f == self).map_or("", |(_, _, name)| name)
    }

    /// All family names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::ALL.iter().map(|(_, _, name)| *name)
    }

    /// The family of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, _, n)| *n == name).map(|(f, ..)| *f)
    }

    /// The `architectures` entry of this family.
    pub fn architecture(self) -> &'static str {
        Self::ALL.iter().find(|(f, ..)| *f == self).map_or("", |(_, arch, _)| arch)
    }

    /// Chooses by `architectures[0]`, never by `model_type` (contract §4, "family").
    ///
    /// # Errors
    /// No architecture, or one that is not known.
    pub fn from_config(config: &Config) -> Result<Self, PlanError> {
        let name = config.get("architectures").and_then(|v| v.get(0)).and_then(|v| v.as_str());
        let found = name.and_then(|name| Self::ALL.iter().find(|(_, arch, _)| *arch == name));
        found.map(|(f, ..)| *f).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|(_, arch, _)| *arch).collect();
            config.wrong("architectures", &format!("first entry one of {}", known.join(", ")))
        })
    }

    /// Whether the family has multi-head latent attention, shared experts and a prediction layer.
    fn is_mla(self) -> bool {
        !matches!(self, Family::Llama | Family::Qwen3 | Family::Qwen3Moe)
    }

    /// Whether the family may have an indexer; it does when the configuration has `index_topk` (reference §1.2).
    fn may_index(self) -> bool {
        matches!(self, Family::DeepseekV3 | Family::DeepseekV32 | Family::GlmMoeDsa)
    }

    /// The canonical spelling of a tensor name: Qwen3 with the leading `model.`, Kimi-K2.5 with `.model` before
    /// `.layers` (contract §4).
    pub fn canonical(self, name: &str) -> Cow<'_, str> {
        match self {
            Family::KimiK25 => match name.strip_prefix("language_model.layers.") {
                Some(rest) => Cow::Owned(format!("language_model.model.layers.{rest}")),
                None => Cow::Borrowed(name),
            },
            Family::Qwen3 | Family::Qwen3Moe
                if ["layers.", "embed_tokens.", "norm."].iter().any(|p| name.starts_with(p)) =>
            {
                Cow::Owned(format!("model.{name}"))
            }
            _ => Cow::Borrowed(name),
        }
    }
}

/// A model that is ready to be declared: family, configuration and the settled choices.
#[derive(Debug, Clone)]
pub struct Model {
    /// The family.
    pub family: Family,
    /// The parsed `config.json`.
    pub config: Config,
    /// What is declared of quantisation.
    pub declared: Declared,
    /// The settled kernel layout.
    pub layout: Layout,
    /// The user's choices.
    pub options: ModelOptions,
    /// dtype of unquantised parameters (`torch_dtype`/`dtype`).
    pub dtype: Dtype,
    text: Config,
}

impl Model {
    /// Reads family, quantisation and dtype from the configuration files and checks the options against them.
    ///
    /// # Errors
    /// Unknown family or method, options that do not fit the model.
    pub fn new(
        config: Config,
        hf_quant_config: Option<&Config>,
        options: ModelOptions,
    ) -> Result<Self, PlanError> {
        let family = Family::from_config(&config)?;
        let declared = Declared::new(&config, hf_quant_config, options.quantization)?;
        let layout = Layout::resolve(options.kernel_layout, declared.scheme)?;
        let dtype = model_dtype(&config)?;
        let sees = family == Family::KimiK25;
        for (flag, given, needed) in [
            ("--language-only", options.language_only && !sees, "a model with a vision tower"),
            ("--encoder-only", options.encoder_only && !sees, "a model with a vision tower"),
            ("--draft", options.draft && !family.is_mla(), "a model with a prediction layer"),
            (
                "--fuse-shared-experts",
                options.fuse_shared_experts && !family.is_mla(),
                "a model with one shared expert",
            ),
        ] {
            if given {
                let found = format!("family {}", family.name());
                return Err(PlanError::unsupported(flag, found, format!("needs {needed}")));
            }
        }
        let text = config.nested("text_config").unwrap_or_else(|| config.clone());
        Ok(Self { family, config, declared, layout, options, dtype, text })
    }

    /// Declares every parameter and tensor of the model.
    ///
    /// # Errors
    /// A configuration key that is missing or wrong, or dimensions that the parallel layout cannot cut.
    pub fn declare(
        &self,
        parallel: Parallel,
        lookup: &dyn Lookup,
    ) -> Result<Declaration, PlanError> {
        let mut d = Declare::new(parallel, self.layout, self.dtype, lookup);
        match self.family {
            Family::Llama => llama::declare(&mut d, self)?,
            Family::Qwen3 => qwen3::declare(&mut d, self)?,
            Family::Qwen3Moe => qwen3_moe::declare(&mut d, self)?,
            Family::DeepseekV3 | Family::DeepseekV32 | Family::GlmMoeDsa => {
                deepseek::declare(&mut d, self, "")?;
            }
            Family::KimiK25 => kimi_k25::declare(&mut d, self)?,
        }
        Ok(d.finish())
    }

    /// Copies of main-model tensors that a published prediction layer holds; never loaded.
    ///
    /// # Errors
    /// A configuration key that is missing or wrong.
    pub fn prediction_copies(&self) -> Result<Vec<Source>, PlanError> {
        match self.family {
            Family::DeepseekV3 | Family::DeepseekV32 => deepseek::prediction_copies(self),
            _ => Ok(Vec::new()),
        }
    }

    /// Why a tensor that no parameter wants is skipped without complaint; `None`: it is unknown.
    ///
    /// Source: contract §4, "skipped without complaint".
    pub fn skip_reason(&self, canonical: &str) -> Option<&'static str> {
        if canonical.ends_with("rotary_emb.inv_freq") {
            return Some("computed, not loaded");
        }
        match self.family {
            Family::Llama | Family::Qwen3 | Family::Qwen3Moe => {
                let tied = self.config.flag("tie_word_embeddings").unwrap_or(false);
                (tied && canonical == "lm_head.weight").then_some("tied to the embedding")
            }
            Family::DeepseekV3 | Family::DeepseekV32 | Family::GlmMoeDsa => {
                deepseek::skip_reason(self, canonical)
            }
            Family::KimiK25 => kimi_k25::skip_reason(self, canonical),
        }
    }
}

impl Model {
    /// The configuration of the language model: `text_config` where there is one.
    pub fn text(&self) -> &Config {
        &self.text
    }
}

/// `torch_dtype` or `dtype`, BF16 when neither is given.
fn model_dtype(config: &Config) -> Result<Dtype, PlanError> {
    let nested = config.nested("text_config");
    let places = [Some(config), nested.as_ref()];
    for place in places.into_iter().flatten() {
        for key in ["torch_dtype", "dtype"] {
            if place.get(key).is_none() {
                continue;
            }
            return match place.text(key) {
                Some("bfloat16") => Ok(Dtype::BF16),
                Some("float16") => Ok(Dtype::F16),
                Some("float32") => Ok(Dtype::F32),
                _ => Err(place.wrong(key, "bfloat16, float16 or float32")),
            };
        }
    }
    Ok(Dtype::BF16)
}
