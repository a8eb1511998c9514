//! What is computed from complete parameters, as plain data; `longshore-kernels` carries it out.

use crate::{declare::ParamId, quant::Scheme};

/// One step of post-processing; it runs when all parameters that it reads are complete.
///
/// No parameter is changed by more than one step, and none is read by one step and changed by another: steps may run in
/// any order and side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The MLA split of `kv_b_proj` (§4d): `w_kc` and `w_vc` in BF16.
    MlaSplit(MlaSplit),
    /// The KV-cache scales of one attention layer, in place (§2.5).
    KvScales(KvScales),
    /// A parameter's matrices, each reordered in place.
    Reorder(Matrices, Reordering),
    /// Block scales swizzled into a parameter of their own, because padding keeps them from fitting into their source.
    SwizzleInto(SwizzleInto),
    /// `alpha` and `input_scale_inv` of an NVFP4 linear layer (§4a).
    LinearScalars(LinearScalars),
    /// The scalars of NVFP4 experts (§4b).
    ExpertScalars(ExpertScalars),
}

/// A parameter seen as `count` matrices `[rows, row_bytes]` of bytes, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrices {
    /// The parameter.
    pub param: ParamId,
    /// How many matrices (1, or the experts of a rank).
    pub count: u64,
    /// Rows of one matrix.
    pub rows: u64,
    /// Bytes of one row.
    pub row_bytes: u64,
}

/// How bytes move within one matrix. Source: reference §4.0, §4e, §4g.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reordering {
    /// Rows in another order.
    Rows(RowOrder),
    /// Rows in another order, then cut into 128-byte blocks of columns: `[row_bytes/128, rows, 128]` (BLK).
    Blocks(RowOrder),
    /// Rows in another order, then the 128×4 layout of block scales (SWZ); nothing is padded.
    Swizzled(RowOrder),
    /// AITER's layout of E8M0 scales.
    ScaleTiles,
    /// AITER's 16×16 tiles of packed weights.
    WeightTiles,
}

/// Which permutation of rows comes first. Source: reference §4.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// None.
    AsStored,
    /// SHUF32.
    Shuffled32,
    /// W31PERM: the two halves interleaved, then SHUF32.
    GatedShuffled32,
}

impl RowOrder {
    /// Rows within which rows move, of a matrix of `rows` rows whose bands are at least `least`.
    pub fn band(self, rows: u64, least: u64) -> u64 {
        match self {
            RowOrder::AsStored | RowOrder::Shuffled32 => least,
            RowOrder::GatedShuffled32 => rows,
        }
    }
}

/// `source` `[count, rows, cols]` one-byte scales → `target` `[count, ceil128(rows), ceil4(cols)]`, padding zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwizzleInto {
    /// The raw scales.
    pub source: Matrices,
    /// The swizzled ones.
    pub target: ParamId,
    /// The order of the padded rows.
    pub order: RowOrder,
}

/// `alpha` = max(`input_scale`)·max(`weight_scale_2`), `input_scale_inv` = 1 / max(`input_scale`); all F32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearScalars {
    /// `weight_scale_2`, one slot per part.
    pub scale_2: ParamId,
    /// `input_scale`, one slot per part.
    pub input_scale: ParamId,
    /// `alpha`, `[]`.
    pub alpha: ParamId,
    /// `input_scale_inv`, `[]`.
    pub inverse: ParamId,
}

/// With `a1`, `a2` the maxima of the input scales of w13 and w2, over all experts of the model or expert by expert:
/// `g1_alphas` = a1·`w13_weight_scale_2[:, 0]`, `g2_alphas` = a2·`w2_weight_scale_2`, the `*_input_scale_quant` = 1/a,
/// `g1_scale_c` = `w2_input_scale_quant`·`g1_alphas`. All F32. Source: reference §4b; contract §4, "Post-processing".
///
/// **Shapes**: `w13_scale_2` `[E_l, 2]`, `w2_scale_2` `[E_l]`, `w13_input` `[E, 2]`, `w2_input` `[E]`; results `[E_l]`,
/// the `*_input_scale_quant` `[]` where the maxima are global.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertScalars {
    /// `w13_weight_scale_2`.
    pub w13_scale_2: ParamId,
    /// `w2_weight_scale_2`.
    pub w2_scale_2: ParamId,
    /// `w13_input_scale`.
    pub w13_input: ParamId,
    /// `w2_input_scale`.
    pub w2_input: ParamId,
    /// `g1_alphas`.
    pub g1_alphas: ParamId,
    /// `g2_alphas`.
    pub g2_alphas: ParamId,
    /// `w13_input_scale_quant`.
    pub w13_quant: ParamId,
    /// `w2_input_scale_quant`.
    pub w2_quant: ParamId,
    /// `g1_scale_c`, where the kernels want it.
    pub g1_scale_c: Option<ParamId>,
    /// Maxima expert by expert, of the rank's own experts, instead of over all experts of the model.
    pub per_expert: bool,
    /// Routed experts of the model.
    pub routed: u64,
    /// Routed experts of one expert group; further slots of a rank are fused shared experts.
    pub per_group: u64,
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

impl Finish {
    /// The parameters that must be complete before this runs.
    pub fn inputs(&self) -> Vec<ParamId> {
        match self {
            Finish::MlaSplit(m) => [Some(m.weight), m.scale].into_iter().flatten().collect(),
            Finish::KvScales(s) if s.v_given => vec![s.k, s.v],
            Finish::KvScales(s) => vec![s.k],
            Finish::Reorder(m, _) => vec![m.param],
            Finish::SwizzleInto(s) => vec![s.source.param],
            Finish::LinearScalars(s) => vec![s.scale_2, s.input_scale],
            Finish::ExpertScalars(s) => vec![s.w13_scale_2, s.w2_scale_2, s.w13_input, s.w2_input],
        }
    }

    /// The parameters that this writes; those that it changes in place are among its inputs as well.
    pub fn outputs(&self) -> Vec<ParamId> {
        match self {
            Finish::MlaSplit(m) => vec![m.w_kc, m.w_vc],
            Finish::KvScales(s) => vec![s.k, s.v],
            Finish::Reorder(m, _) => vec![m.param],
            Finish::SwizzleInto(s) => vec![s.target],
            Finish::LinearScalars(s) => vec![s.alpha, s.inverse],
            Finish::ExpertScalars(s) => {
                let made = [s.g1_alphas, s.g2_alphas, s.w13_quant, s.w2_quant];
                made.into_iter().chain(s.g1_scale_c).collect()
            }
        }
    }
}
