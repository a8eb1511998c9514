//! What a checkpoint holds: architecture, quantisation, tensors and bytes by kind, what would be skipped.

mod map;

use std::collections::BTreeMap;

use serde::Serialize;

pub use self::map::MapEntry;
use crate::{
    error::LoadError,
    plan::Plan,
    report::{RanksAs, Report, SkippedEntry, bytes_text},
};

/// Tensors and bytes of one kind.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Count {
    /// Number of tensors.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The answer of `longshore inspect`.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The source as the user gave it.
    pub source: String,
    /// Model family.
    pub family: &'static str,
    /// `architectures[0]`.
    pub architecture: &'static str,
    /// Quantisation scheme.
    pub quant: &'static str,
    /// The file that declares it.
    pub quant_declared_in: String,
    /// Checkpoint files.
    pub files: usize,
    /// All tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub checkpoint_bytes: u64,
    /// Bytes that a load would need.
    pub needed_bytes: u64,
    /// By the role of the tensor.
    pub kinds: BTreeMap<&'static str, Count>,
    /// By dtype.
    pub dtypes: BTreeMap<String, Count>,
    /// What would be skipped.
    pub skipped: Vec<SkippedEntry>,
    /// What looked odd.
    pub warnings: Vec<String>,
    /// Where each tensor goes, if that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Vec<MapEntry>>,
}

impl Inspection {
    /// Inspects the checkpoint of a plan for one rank.
    pub fn new(plan: &Plan, source: &str) -> Self {
        let checkpoint = plan.checkpoint();
        let mut kinds: BTreeMap<&'static str, Count> = BTreeMap::new();
        let mut dtypes: BTreeMap<String, Count> = BTreeMap::new();
        for tensor in &checkpoint.tensors {
            let dtype = dtypes.entry(tensor.dtype.to_string()).or_default();
            for count in [kinds.entry(kind(&tensor.name)).or_default(), dtype] {
                count.tensors += 1;
                count.bytes += tensor.file_range.len();
            }
        }
        let report = Report::forecast(plan, source, RanksAs::Threads);
        Self {
            source: source.to_owned(),
            family: plan.model.family.name(),
            architecture: plan.model.family.architecture(),
            quant: plan.model.declared.scheme.name(),
            quant_declared_in: plan.model.declared.declared_in.clone(),
            files: checkpoint.files.len(),
            tensors: checkpoint.tensors.len(),
            checkpoint_bytes: report.checkpoint_bytes,
            needed_bytes: plan.needed_bytes,
            kinds,
            dtypes,
            skipped: report.skipped,
            warnings: report.warnings,
            map: None,
        }
    }

    /// Adds where each tensor goes when the experts are shared out over `ep` groups of ranks.
    ///
    /// # Errors
    /// `ep` does not divide the experts.
    pub fn with_map(self, plan: &Plan, ep: u32) -> Result<Self, LoadError> {
        Ok(Self { map: Some(map::entries(plan, ep)?), ..self })
    }

    /// The inspection for people.
    pub fn text(&self) -> String {
        let mut lines = vec![format!(
            "{} ({}), {} ({}): {} tensors, {} in {} files, {} needed",
            self.family,
            self.architecture,
            self.quant,
            self.quant_declared_in,
            self.tensors,
            bytes_text(self.checkpoint_bytes),
            self.files,
            bytes_text(self.needed_bytes),
        )];
        let count = |name: &str, c: &Count| {
            format!("  {name:<16} {:>8} tensors  {:>12}", c.tensors, bytes_text(c.bytes))
        };
        lines.push("by kind".into());
        lines.extend(self.kinds.iter().map(|(name, c)| count(name, c)));
        lines.push("by dtype".into());
        lines.extend(self.dtypes.iter().map(|(name, c)| count(name, c)));
        let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
        for s in &self.skipped {
            *reasons.entry(s.why).or_default() += 1;
        }
        lines.extend(reasons.iter().map(|(why, count)| format!("skipped {count}: {why}")));
        lines.extend(self.warnings.iter().map(|w| format!("warning: {w}")));
        lines.extend(self.map.iter().flat_map(|entries| map::lines(entries)));
        lines.join("\n")
    }
}

/// The role of a tensor, by its name.
fn kind(name: &str) -> &'static str {
    const KINDS: [(&str, &str); 10] = [
        ("vision_tower", "vision"),
        ("mm_projector", "vision"),
        ("shared_experts", "shared experts"),
        (".experts.", "experts"),
        (".mlp.gate.", "router"),
        ("norm", "norms"),
        (".self_attn.", "attention"),
        (".mlp.", "dense MLP"),
        ("embed_tokens", "embedding, head"),
        ("head", "embedding, head"),
    ];
    KINDS.iter().find(|(part, _)| name.contains(part)).map_or("other", |(_, kind)| kind)
}
