//! Which runtime parameter a checkpoint tensor becomes part of, and which tensors make up a parameter: names alone.
//!
//! A trainer that updates a running server tensor by tensor has to know when every piece of a parameter has arrived.
//! [`Mapper`] answers from the configuration, without a checkpoint: `map(tensor) → (runtime name, shard, number of
//! shards, expert, local experts)`, and back with [`Mapper::sources`]; [`Arrivals`] keeps the count. It says nothing of
//! bytes, shapes and ranks of a tensor-parallel group: that is [`crate::placement`]'s business, which knows nothing of
//! the rules here; `tests/mapping.rs` holds each against the other.
//!
//! Source: reference §2.8, in whose order a name is looked up:
//!
//! 1. its spelling is settled ([`Family::canonical`](crate::arch::Family::canonical)), and with
//!    `--fuse-shared-experts` `mlp.shared_experts` is expert E (§2.4);
//! 2. scales of the KV cache go to the attention module (§2.5): `k_proj.k_scale` →
//!    `attn_mqa.k_scale`, in the dense families `attn.k_scale`;
//! 3. experts, then stacked layers, then names that stay.
//!
//! Each name has one entry in a table that is built once, so that no later step can undo an earlier one, and
//! both directions read the same entries. Kimi-K2.5 answers for its inner model, prefix included.
//!
//! **Every piece counts.** A tensor that must exist but is not kept (the A-projection's second scalar, §2.2; the second
//! `weight_shape` of a merged layer) is still a piece of its parameter: `shards` is the number of checkpoint modules
//! that make up the runtime module, for each of its suffixes alike. So a parameter is never called complete while its
//! sender still has a part of it to send.

mod arrivals;
mod dense;
mod experts;
mod mla;
mod shard;
mod table;
#[cfg(test)]
mod tests;
mod vision;

use std::borrow::Cow;

use serde::Serialize;

use crate::{
    arch::{Family, Model},
    error::PlanError,
};

pub use self::{
    arrivals::{Arrivals, UnknownTensor},
    shard::Shard,
};
use self::{experts::Experts, table::Table};

/// Where a checkpoint tensor goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// The runtime parameter.
    pub runtime: String,
    /// Which part of it the tensor is.
    pub shard: Shard,
    /// How many different shards make up the parameter, per expert.
    pub shards: u32,
    /// The expert, counted over all of them; a fused shared expert is the last, E.
    pub expert: Option<u64>,
    /// How many experts' pieces one rank needs to complete the parameter: E / ep and a fused shared one. All of them
    /// for `input_scale`, which every rank holds in full (reference §3.5).
    pub local_experts: Option<u64>,
}

/// A tensor that a runtime parameter needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Its canonical name.
    pub tensor: String,
    /// Which part of the parameter it is.
    pub shard: Shard,
    /// The expert, counted over all of them.
    pub expert: Option<u64>,
}

/// The parameter mapping of one model.
///
/// ```
/// use longshore_models::{arch::Model, config::Config, mapping::{Mapper, Shard}, options::ModelOptions};
///
/// # fn main() -> Result<(), longshore_models::error::PlanError> {
/// let config = br#"{
///     "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64,
///     "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256
/// }"#;
/// let model = Model::new(Config::parse("config.json", config)?, None, ModelOptions::default())?;
/// let mapper = Mapper::new(&model, 1)?;
///
/// let mapping = mapper.map("model.layers.0.self_attn.k_proj.weight").expect("a tensor of the model");
/// assert_eq!(mapping.runtime, "model.layers.0.self_attn.qkv_proj.weight");
/// assert_eq!((mapping.shard, mapping.shards, mapping.expert), (Shard::K, 3, None));
/// assert_eq!(mapper.sources(&mapping.runtime, 0).len(), 3);
/// assert_eq!(mapper.map("model.layers.1.self_attn.k_proj.weight"), None);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Mapper {
    model: Model,
    table: Table,
    experts: Experts,
}

impl Mapper {
    /// The mapping of `model` with its experts shared out over `ep` groups of ranks.
    ///
    /// # Errors
    /// A configuration key that is missing or wrong, options that the model cannot meet, `ep` that does not divide the
    /// experts.
    pub fn new(model: &Model, ep: u32) -> Result<Self, PlanError> {
        let mut table = Table::default();
        let routed = match model.family {
            Family::Llama | Family::Qwen3 | Family::Qwen3Moe => dense::decoder(&mut table, model)?,
            Family::DeepseekV3 | Family::DeepseekV32 | Family::GlmMoeDsa => {
                mla::decoder(&mut table, model, "")?
            }
            Family::KimiK25 => vision::wrapper(&mut table, model)?,
        };
        let experts = Experts::new(routed, model.options.fuse_shared_experts, ep)?;
        Ok(Self { model: model.clone(), table, experts })
    }

    /// Groups of ranks that the experts are shared out over.
    pub fn ep(&self) -> u32 {
        self.experts.ep()
    }

    /// Where `tensor` goes; `None` when it is skipped ([`Mapper::skip_reason`]) or no tensor of the model.
    ///
    /// A scheme's suffix is known whatever scheme the model declares: whether a module is quantised is for the
    /// checkpoint to say.
    pub fn map(&self, tensor: &str) -> Option<Mapping> {
        let canonical = self.model.family.canonical(tensor);
        let (module, suffix) = canonical.rsplit_once('.')?;
        let (module, expert) = self.expert_of(module)?;
        let (fused, shard) = self.table.part(&module, suffix)?;
        Some(Mapping {
            runtime: format!("{}{suffix}", fused.runtime),
            shard,
            shards: fused.parts.len() as u32,
            expert,
            local_experts: expert.map(|_| self.experts.held(suffix)),
        })
    }

    /// Why a tensor that has no mapping is skipped without complaint; `None`: it is unknown.
    pub fn skip_reason(&self, tensor: &str) -> Option<&'static str> {
        self.model.skip_reason(&self.model.family.canonical(tensor))
    }

    /// The tensors that complete `runtime` on a rank of expert group `ep_rank`, in the order in which kernels that want
    /// gate before up have them in memory.
    ///
    /// Empty for a name that no tensor makes up (a derived parameter, an alias, an unknown one) and for a group that
    /// does not exist. Whether the checkpoint has the tensors is not asked: the names follow from the parameter's.
    pub fn sources(&self, runtime: &str, ep_rank: u32) -> Vec<Piece> {
        let Some((fused, suffix)) = self.table.module(runtime) else {
            return Vec::new();
        };
        if ep_rank >= self.ep() {
            return Vec::new();
        }
        let pieces = |expert: Option<u64>| {
            fused.parts.iter().map(move |(shard, module)| Piece {
                tensor: match expert {
                    None => format!("{module}.{suffix}"),
                    Some(e) => format!("{}.{suffix}", self.experts.source(module, e)),
                },
                shard: *shard,
                expert,
            })
        };
        if fused.per_expert {
            let experts = self.experts.on(suffix, ep_rank);
            experts.flat_map(|e| pieces(Some(e))).collect()
        } else {
            pieces(None).collect()
        }
    }

    /// Whether a rank of expert group `ep_rank` keeps a piece of this mapping.
    pub fn holds(&self, mapping: &Mapping, ep_rank: u32) -> bool {
        match mapping.expert {
            None => ep_rank < self.ep(),
            Some(e) => match table::split_runtime(&mapping.runtime) {
                Some((_, suffix)) => self.experts.holds(suffix, ep_rank, e),
                None => false,
            },
        }
    }

    pub(crate) fn family(&self) -> &'static str {
        self.model.family.name()
    }

    /// The module with `*` in place of the expert, and the expert; `None`: an expert that the model does not have.
    fn expert_of<'m>(&self, module: &'m str) -> Option<(Cow<'m, str>, Option<u64>)> {
        match self.experts.split(module) {
            experts::Split::NoExpert => Some((Cow::Borrowed(module), None)),
            experts::Split::Expert { module, expert } => Some((Cow::Owned(module), Some(expert))),
            experts::Split::Unknown => None,
        }
    }
}
