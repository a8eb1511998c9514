//! One checkpoint of every family, with dimensions that eight ranks can share.

use longshore_harness::generator::{Checkpoint, Family, Scheme};

pub(crate) fn checkpoints() -> Vec<Checkpoint> {
    let wide = |c: Checkpoint| {
        c.set("num_attention_heads", 8).set("intermediate_size", 1024).set("num_hidden_layers", 2)
    };
    let moe = |c: Checkpoint| wide(c).set("moe_intermediate_size", 1024).set("n_routed_experts", 8);
    vec![
        wide(Checkpoint::new(Family::Llama, Scheme::Bf16)),
        wide(Checkpoint::new(Family::Qwen3, Scheme::Bf16)),
        wide(Checkpoint::new(Family::Qwen3Moe, Scheme::Bf16)),
        moe(Checkpoint::new(Family::DeepseekV3, Scheme::Bf16)),
        moe(Checkpoint::new(Family::DeepseekV3, Scheme::Fp8)).set("num_attention_heads", 16),
        moe(Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4)),
        moe(Checkpoint::new(Family::DeepseekV32, Scheme::Bf16)),
        moe(Checkpoint::new(Family::GlmMoeDsa, Scheme::Mxfp4)).set("moe_intermediate_size", 512),
        moe(Checkpoint::new(Family::KimiK25, Scheme::Int4))
            .set("vt_hidden_size", 64)
            .set("vt_num_attention_heads", 8),
    ]
}
