//! What is computed from complete parameters, as plain data; `longshore-kernels` carries it out.

use crate::{declare::ParamId, quant::Scheme};

/// One step of post-processing; it runs when all parameters that it reads are complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The MLA split of `kv_b_proj` (§4d): `w_kc` and `w_vc` in BF16.
    MlaSplit(MlaSplit),
    /// Rows permuted within each expert, then cut into 128-byte column blocks, in place (§4g).
    ExpertBlocks(ExpertBlocks),
    /// The KV-cache scales of one attention layer, in place (§2.5).
    KvScales(KvScales),
}

/// Splits `kv_b_proj` `[heads·(dn+dv), kl]` by head into keys and values.
///
/// **Shapes**: `w_kc` is stored `[heads, kl, dn]`, `w_vc` is stored `[heads, dv, kl]` (contract §2). An FP8 weight is
/// dequantised on the way: F32(weight) · scale of its 128×128 block, rounded once; blocks may straddle heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaSplit {
    /// The raw weight.
    pub weight: ParamId,
    /// Its block scales.
    pub scale: Option<ParamId>,
    /// How the weight is stored.
    pub scheme: Scheme,
    /// Keys.
    pub w_kc: ParamId,
    /// Values.
    pub w_vc: ParamId,
    /// Heads on one rank.
    pub heads: u64,
    /// qk_nope_head_dim.
    pub dn: u64,
    /// v_head_dim.
    pub dv: u64,
    /// kv_lora_rank.
    pub kl: u64,
}

/// Settles a pair of KV-cache scales (contract §4): both positive are kept, both negative become 1.0, a lone or
/// positive `k` is copied to `v`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvScales {
    /// `k_scale`, F32 `[]`.
    pub k: ParamId,
    /// `v_scale`, F32 `[]`.
    pub v: ParamId,
    /// Whether the checkpoint has `v_scale`.
    pub v_given: bool,
}

/// Which permutation of rows comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// SHUF32 (§4.0).
    Shuffled32,
    /// W31PERM (§4.0): the two halves interleaved, then SHUF32.
    GatedShuffled32,
}

/// `[experts, rows, row_bytes]` → `[experts, row_bytes/128, rows, 128]` bytes, rows permuted first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertBlocks {
    /// The parameter, changed in place.
    pub param: ParamId,
    /// Experts on one rank.
    pub experts: u64,
    /// Rows of one expert.
    pub rows: u64,
    /// Bytes of one row.
    pub row_bytes: u64,
    /// The permutation of rows.
    pub order: RowOrder,
}

impl Finish {
    /// The parameters that must be complete before this runs.
    pub fn inputs(&self) -> Vec<ParamId> {
        match self {
            Finish::MlaSplit(m) => [Some(m.weight), m.scale].into_iter().flatten().collect(),
            Finish::ExpertBlocks(b) => vec![b.param],
            Finish::KvScales(s) if s.v_given => vec![s.k, s.v],
            Finish::KvScales(s) => vec![s.k],
        }
    }

    /// The parameters that are complete once this has run, apart from its inputs.
    pub fn outputs(&self) -> Vec<ParamId> {
        match self {
            Finish::MlaSplit(m) => vec![m.w_kc, m.w_vc],
            Finish::ExpertBlocks(_) => Vec::new(),
            Finish::KvScales(s) if s.v_given => Vec::new(),
            Finish::KvScales(s) => vec![s.v],
        }
    }
}
