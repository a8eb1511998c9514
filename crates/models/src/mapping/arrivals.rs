//! Counts the tensors of an update as they come in: which runtime parameters are complete?

use std::collections::{HashMap, HashSet};

use crate::{
    error::PlanError,
    mapping::{Mapper, Mapping, Piece, Shard},
};

/// What a rank has received of an update, by runtime parameter.
///
/// Tensors come in any order, under either spelling of their names. A parameter is complete when every piece that
/// [`Mapper::sources`] lists has come; what is derived from it (`w_kc`, swizzled scales) can be made from then on.
///
/// ```
/// # use longshore_models::{arch::Model, config::Config, error::PlanError, options::ModelOptions};
/// use longshore_models::mapping::{Arrivals, Mapper};
///
/// # fn model() -> Result<Model, PlanError> {
/// #     let config = br#"{
/// #         "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64,
/// #         "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256
/// #     }"#;
/// #     Model::new(Config::parse("config.json", config)?, None, ModelOptions::default())
/// # }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut arrivals = Arrivals::new(Mapper::new(&model()?, 1)?, 0)?;
///
/// assert_eq!(arrivals.arrive("model.layers.0.mlp.up_proj.weight")?, None);
/// let complete = arrivals.arrive("model.layers.0.mlp.gate_proj.weight")?;
/// assert_eq!(complete.as_deref(), Some("model.layers.0.mlp.gate_up_proj.weight"));
/// // a duplicate changes nothing, a stranger is an error
/// assert_eq!(arrivals.arrive("model.layers.0.mlp.up_proj.weight")?, None);
/// assert!(arrivals.arrive("model.layers.7.mlp.up_proj.weight").is_err());
///
/// arrivals.arrive("model.layers.0.self_attn.q_proj.weight")?;
/// let qkv = "model.layers.0.self_attn.qkv_proj.weight";
/// assert_eq!(arrivals.incomplete().collect::<Vec<_>>(), [qkv]);
/// assert_eq!(arrivals.missing(qkv)[0].tensor, "model.layers.0.self_attn.k_proj.weight");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Arrivals {
    mapper: Mapper,
    ep_rank: u32,
    params: HashMap<String, Arrived>,
}

/// What has come of one parameter.
#[derive(Debug, Clone)]
struct Arrived {
    pieces: HashSet<(Option<u64>, Shard)>,
    needed: u64,
}

/// A tensor that belongs to no parameter of the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tensor {tensor} belongs to no parameter of {family}")]
pub struct UnknownTensor {
    /// Its name.
    pub tensor: String,
    /// The model family.
    pub family: &'static str,
}

impl Arrivals {
    /// Nothing has come yet on a rank of expert group `ep_rank` (0 without expert parallelism).
    ///
    /// # Errors
    /// The group does not exist.
    pub fn new(mapper: Mapper, ep_rank: u32) -> Result<Self, PlanError> {
        if ep_rank >= mapper.ep() {
            let (found, ep) = (format!("group {ep_rank}"), mapper.ep());
            let expected = format!("expert groups are 0 to {}", ep - 1);
            return Err(PlanError::unsupported("expert group", found, expected));
        }
        Ok(Self { mapper, ep_rank, params: HashMap::new() })
    }

    /// Takes note of a tensor; returns the parameter that it completes.
    ///
    /// `None`: the parameter is still waiting for others, or was complete before, or another expert group's rank keeps
    /// this expert, or the tensor is one that loads skip.
    ///
    /// # Errors
    /// No tensor of the model.
    pub fn arrive(&mut self, tensor: &str) -> Result<Option<String>, UnknownTensor> {
        let Some(mapping) = self.mapper.map(tensor) else {
            return match self.mapper.skip_reason(tensor) {
                Some(_) => Ok(None),
                None => Err(self.unknown(tensor)),
            };
        };
        if !self.mapper.holds(&mapping, self.ep_rank) {
            return Ok(None);
        }
        let Mapping { runtime, shard, shards, expert, local_experts } = mapping;
        let needed = u64::from(shards) * local_experts.unwrap_or(1);
        let arrived = match self.params.get_mut(&runtime) {
            Some(arrived) => arrived,
            None => self
                .params
                .entry(runtime.clone())
                .or_insert_with(|| Arrived { pieces: HashSet::new(), needed }),
        };
        let new = arrived.pieces.insert((expert, shard));
        Ok((new && arrived.is_complete()).then_some(runtime))
    }

    /// Whether every piece of a runtime parameter has come.
    pub fn is_complete(&self, runtime: &str) -> bool {
        self.params.get(runtime).is_some_and(Arrived::is_complete)
    }

    /// The parameters that have begun to come and are not complete; when an update is over, there should be none.
    pub fn incomplete(&self) -> impl Iterator<Item = &str> {
        let open = self.params.iter().filter(|(_, arrived)| !arrived.is_complete());
        open.map(|(runtime, _)| runtime.as_str())
    }

    /// The pieces of a runtime parameter that have not come.
    pub fn missing(&self, runtime: &str) -> Vec<Piece> {
        let mut pieces = self.mapper.sources(runtime, self.ep_rank);
        if let Some(arrived) = self.params.get(runtime) {
            pieces.retain(|piece| !arrived.pieces.contains(&(piece.expert, piece.shard)));
        }
        pieces
    }

    /// Forgets what has come, for the next update.
    pub fn clear(&mut self) {
        self.params.clear();
    }

    /// The mapping that tensors are looked up in.
    pub fn mapper(&self) -> &Mapper {
        &self.mapper
    }

    fn unknown(&self, tensor: &str) -> UnknownTensor {
        UnknownTensor { tensor: tensor.to_owned(), family: self.mapper.family() }
    }
}

impl Arrived {
    fn is_complete(&self) -> bool {
        self.pieces.len() as u64 == self.needed
    }
}
