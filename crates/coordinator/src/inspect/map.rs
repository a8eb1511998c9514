//! `--map`: which runtime parameter each tensor of a checkpoint becomes part of.

use longshore_models::mapping::{Mapper, Mapping, Shard};
use serde::Serialize;

use crate::{error::LoadError, plan::Plan};

/// One tensor; every key but `tensor` is `null` where it does not apply.
#[derive(Debug, Clone, Serialize)]
pub struct MapEntry {
    /// Its name in the checkpoint.
    pub tensor: String,
    /// The runtime parameter.
    pub runtime: Option<String>,
    /// Which part of it the tensor is, if not all.
    pub shard: Option<Shard>,
    /// How many different shards make up the parameter, per expert.
    pub shards: Option<u32>,
    /// The expert, counted over all of them.
    pub expert: Option<u64>,
    /// How many experts' pieces one rank needs to complete the parameter.
    pub local_experts: Option<u64>,
    /// Why the tensor is skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<&'static str>,
}

/// The mapping of every tensor of the plan's checkpoint, in file order, with the experts shared out over `ep` groups.
///
/// # Errors
/// `ep` does not divide the experts.
pub(super) fn entries(plan: &Plan, ep: u32) -> Result<Vec<MapEntry>, LoadError> {
    let mapper = Mapper::new(&plan.model, ep)
        .map_err(|source| LoadError::Plan { path: plan.origin.shown().into(), source })?;
    let tensors = plan.checkpoint().tensors.iter();
    Ok(tensors.map(|tensor| MapEntry::new(&mapper, &tensor.name)).collect())
}

impl MapEntry {
    fn new(mapper: &Mapper, tensor: &str) -> Self {
        let tensor_name = tensor.to_owned();
        match mapper.map(tensor) {
            Some(Mapping { runtime, shard, shards, expert, local_experts }) => Self {
                tensor: tensor_name,
                runtime: Some(runtime),
                shard: Some(shard),
                shards: Some(shards),
                expert,
                local_experts,
                skipped: None,
            },
            None => Self {
                tensor: tensor_name,
                runtime: None,
                shard: None,
                shards: None,
                expert: None,
                local_experts: None,
                // a plan has a reason for every tensor that it does not need
                skipped: Some(mapper.skip_reason(tensor).unwrap_or("unknown")),
            },
        }
    }
}

/// The entries for people: a line each, in columns.
pub(super) fn lines(entries: &[MapEntry]) -> impl Iterator<Item = String> {
    let width = |name: fn(&MapEntry) -> usize| entries.iter().map(name).max().unwrap_or(0);
    let tensors = width(|e| e.tensor.len());
    let runtimes = width(|e| e.runtime.as_ref().map_or(0, String::len));
    entries.iter().map(move |e| {
        let tensor = &e.tensor;
        let (Some(runtime), Some(shard), Some(shards)) = (&e.runtime, e.shard, e.shards) else {
            return format!("{tensor:<tensors$}  skipped: {}", e.skipped.unwrap_or("unknown"));
        };
        let plural = if shards == 1 { " " } else { "s" };
        let shard = format!("{shard:<4}  {shards} shard{plural}");
        let mut line = format!("{tensor:<tensors$}  {runtime:<runtimes$}  {shard}");
        if let (Some(expert), Some(local)) = (e.expert, e.local_experts) {
            line.push_str(&format!("  expert {expert:>3}, {local} on a rank"));
        }
        line.truncate(line.trim_end().len());
        line
    })
}
