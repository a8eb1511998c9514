//! The scalars of NVFP4 layers and the KV-cache scales; a block of threads is enough for each.

use super::table::{Grid, kernel};

/// One thread, for [`Linear`] and [`KvScales`].
pub const ONE: Grid = Grid { blocks: 1, threads: 1 };

kernel! {
    /// `alpha` and `input_scale_inv` of a linear layer.
    Linear = "nvfp4_linear" in include_str!("../../ptx/scalars.ptx"), 1;
    /// `weight_scale_2`, F32.
    scale_2: u64,
    /// How many.
    scale_2_count: u32,
    /// `input_scale`, F32.
    input_scale: u64,
    /// How many.
    input_count: u32,
    /// `alpha`, F32.
    alpha: u64,
    /// `input_scale_inv`, F32.
    inverse_input: u64,
}

kernel! {
    /// The scalars of the experts of one layer on one rank; all of them F32.
    Experts = "nvfp4_experts" in include_str!("../../ptx/scalars.ptx"), 128;
    /// `[slots, 2]`.
    w13_scale_2: u64,
    /// `[slots]`.
    w2_scale_2: u64,
    /// `[experts, 2]`.
    w13_input: u64,
    /// `[experts]`.
    w2_input: u64,
    /// `[slots]`.
    g1_alphas: u64,
    /// `[slots]`.
    g2_alphas: u64,
    /// `[quants]`.
    w13_quant: u64,
    /// `[quants]`.
    w2_quant: u64,
    /// `[slots]`, or 0: not wanted.
    g1_scale_c: u64,
    /// Experts on the rank.
    slots: u32,
    /// Experts of the model.
    experts: u32,
    /// The model's number of the rank's first routed expert.
    first_expert: u32,
    /// Routed experts on the rank; further slots are fused shared experts.
    per_group: u32,
    /// Routed experts of the model.
    routed: u32,
    /// 1: maxima expert by expert; 0: over all.
    per_expert: u32,
    /// 1 where the maxima are global, else `slots`.
    quants: u32,
}

kernel! {
    /// Settles a pair of KV-cache scales.
    KvScales = "kv_scales" in include_str!("../../ptx/scalars.ptx"), 1;
    /// F32.
    k: u64,
    /// F32.
    v: u64,
    /// Whether the checkpoint has a `v_scale`: 1 or 0.
    v_given: u32,
    /// U32, becomes 1 where the pair is refused.
    refused: u64,
}

impl Experts {
    /// The launch.
    pub fn grid(&self) -> Grid {
        Grid { blocks: self.slots.div_ceil(128).max(1), threads: 128 }
    }
}
