//! Every family × tensor-parallel size × expert-parallel size × dimensions against the oracle, bit for bit.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use longshore_harness::{
    generator::{Checkpoint, Family, Preset, Scheme},
    oracle,
    scratch::Scratch,
};

mod common;

use common::{compare, load, load_with, plan, plan_options};
use longshore::{
    discover::discover,
    load::RunOptions,
    plan::{Exchange, Plan, PlanOptions},
};

/// Loads `checkpoint` under every combination of sizes and options; returns how many were loaded and how many refused.
fn sweep(checkpoint: &Checkpoint, tps: &[usize], options: &[oracle::Options]) -> (usize, usize) {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    checkpoint.write(&dir).unwrap();
    let (mut loaded, mut refused) = (0, 0);
    for &tp in tps {
        for ep in (1..=tp).filter(|ep| tp % ep == 0) {
            for base in options {
                let options = oracle::Options { tp, ep, ..base.clone() };
                let what = format!("{checkpoint:?} {:?}", options.arguments());
                match (oracle::answer(&dir, &options), plan(&dir, &options, Exchange::On)) {
                    (Ok(answer), Ok(with)) => {
                        let result = load(&with);
                        compare(&what, &result, &answer);
                        let alone = plan(&dir, &options, Exchange::Off).unwrap();
                        let other = load(&alone);
                        assert_eq!(result.digest(), other.digest(), "{what}: exchange on and off");
                        loaded += 1;
                    }
                    (Err(_), Err(_)) => refused += 1,
                    (Err(e), Ok(_)) => panic!("{what}: should be refused: {e}"),
                    (Ok(_), Err(e)) => panic!("{what}: should load: {}", e.line()),
                }
            }
        }
    }
    (loaded, refused)
}

fn both_presets(family: Family, scheme: Scheme, set: &[(&str, u64)]) -> [Checkpoint; 2] {
    [Preset::Tiny, Preset::Odd].map(|preset| {
        let start = Checkpoint::new(family, scheme).preset(preset).set("num_hidden_layers", 2);
        set.iter().fold(start, |c, (key, value)| c.set(key, *value))
    })
}

/// Every layout of the contract, and none given; what a scheme does not have is refused on both sides.
fn layouts() -> Vec<oracle::Options> {
    let mut options = vec![oracle::Options::tp(1)];
    for layout in ["none", "cutlass", "flashinfer-cutlass", "trtllm", "aiter"] {
        options.push(oracle::Options::tp(1).kernel_layout(layout));
    }
    options
}

fn plain() -> Vec<oracle::Options> {
    vec![oracle::Options::tp(1), oracle::Options::tp(1).kernel_layout("none")]
}

#[test]
fn llama_and_qwen3_equal_the_oracle() {
    let mut loaded = 0;
    for family in [Family::Llama, Family::Qwen3] {
        for checkpoint in both_presets(family, Scheme::Bf16, &[]) {
            loaded += sweep(&checkpoint, &[1, 2, 4, 8], &plain()).0;
            // F16 and F32 models: BF16 tensors are converted
            for dtype in ["float16", "float32"] {
                loaded +=
                    sweep(&checkpoint.clone().set("model_dtype", dtype), &[2], &plain()[..1]).0;
            }
            let biased = checkpoint.set("attention_bias", true).set("tie_word_embeddings", true);
            loaded += sweep(&biased, &[1, 4], &plain()[..1]).0;
        }
    }
    assert!(loaded >= 60, "only {loaded} combinations were loaded");
}

#[test]
fn qwen3_moe_equals_the_oracle_in_every_layout() {
    let mut loaded = 0;
    let mut options = plain();
    options.push(oracle::Options::tp(1).kernel_layout("trtllm"));
    options.push(oracle::Options::tp(1).kernel_layout("flashinfer-cutlass"));
    for checkpoint in both_presets(Family::Qwen3Moe, Scheme::Bf16, &[]) {
        loaded += sweep(&checkpoint, &[1, 2, 4, 8], &options).0;
    }
    assert!(loaded >= 30, "only {loaded} combinations were loaded");
}

#[test]
fn deepseek_v3_in_bf16_equals_the_oracle() {
    let mut loaded = 0;
    let mut options = plain();
    options.push(oracle::Options::tp(1).fuse_shared_experts());
    options.push(oracle::Options::tp(1).draft());
    for checkpoint in both_presets(Family::DeepseekV3, Scheme::Bf16, &[("num_attention_heads", 8)])
    {
        loaded += sweep(&checkpoint, &[1, 2, 4, 8], &options).0;
    }
    let no_q_lora = Checkpoint::new(Family::DeepseekV3, Scheme::Bf16)
        .set("q_lora_rank", serde_json::Value::Null)
        .set("norm_dtype", "F32")
        .set("unaligned", true);
    loaded += sweep(&no_q_lora, &[1, 2], &plain()).0;
    assert!(loaded >= 40, "only {loaded} combinations were loaded");
}

#[test]
fn deepseek_v3_in_fp8_equals_the_oracle() {
    let mut loaded = 0;
    let mut options = plain();
    options.push(oracle::Options::tp(1).fuse_shared_experts());
    options.push(oracle::Options::tp(1).kernel_layout("trtllm"));
    // dimensions that eight ranks can share in whole blocks
    let wide = [
        ("num_attention_heads", 16),
        ("intermediate_size", 1024),
        ("moe_intermediate_size", 1024),
        ("n_routed_experts", 8),
    ];
    for checkpoint in both_presets(Family::DeepseekV3, Scheme::Fp8, &wide) {
        loaded += sweep(&checkpoint, &[1, 2, 4, 8], &options).0;
    }
    loaded += sweep(&Checkpoint::new(Family::KimiK2, Scheme::Fp8), &[1, 2], &plain()).0;
    assert!(loaded >= 20, "only {loaded} combinations were loaded");
}

#[test]
fn families_with_an_indexer_equal_the_oracle() {
    let mut loaded = 0;
    let mut options = plain();
    options.push(oracle::Options::tp(1).draft());
    for family in [Family::DeepseekV32, Family::GlmMoeDsa] {
        for scheme in [Scheme::Bf16, Scheme::Fp8] {
            for checkpoint in both_presets(family, scheme, &[]) {
                loaded += sweep(&checkpoint, &[1, 2, 4], &options).0;
            }
        }
    }
    assert!(loaded >= 40, "only {loaded} combinations were loaded");
}

#[test]
fn kimi_k25_equals_the_oracle_with_and_without_its_vision_tower() {
    let mut options = plain();
    options.push(oracle::Options::tp(1).language_only());
    options.push(oracle::Options::tp(1).encoder_only());
    let mut loaded = 0;
    for checkpoint in both_presets(Family::KimiK25, Scheme::Bf16, &[]) {
        loaded += sweep(&checkpoint, &[1, 2, 4], &options).0;
        loaded += sweep(&checkpoint.set("short_layer_names", true), &[2], &options[..1]).0;
    }
    assert!(loaded >= 20, "only {loaded} combinations were loaded");
}

/// A size that is no power of two, with dimensions that it divides.
#[test]
fn three_ranks_equal_the_oracle() {
    let llama = Checkpoint::new(Family::Llama, Scheme::Bf16)
        .set("num_attention_heads", 12)
        .set("num_key_value_heads", 3)
        .set("intermediate_size", 384)
        .set("vocab_size", 570);
    assert_eq!(sweep(&llama, &[3, 6], &plain()), (12, 0));
    let deepseek = Checkpoint::new(Family::DeepseekV3, Scheme::Bf16)
        .set("num_attention_heads", 6)
        .set("intermediate_size", 192)
        .set("moe_intermediate_size", 96)
        .set("n_routed_experts", 6)
        .set("vocab_size", 190);
    assert_eq!(sweep(&deepseek, &[3, 6], &plain()), (12, 0));
}

#[test]
fn nvfp4_equals_the_oracle_in_every_layout() {
    let mut loaded = 0;
    let mut options = layouts();
    options.push(oracle::Options::tp(1).kernel_layout("trtllm").fuse_shared_experts());
    options.push(oracle::Options::tp(1).fuse_shared_experts());
    options.push(oracle::Options::tp(1).draft());
    for family in [Family::DeepseekV3, Family::KimiK25, Family::GlmMoeDsa] {
        for checkpoint in both_presets(family, Scheme::Nvfp4, &[("n_routed_experts", 4)]) {
            loaded += sweep(&checkpoint, &[1, 2, 4], &options).0;
        }
    }
    // shapes that eight ranks can share, attention in NVFP4, scalars that differ between gate and up
    let wide = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4)
        .set("nvfp4_attention", true)
        .set("input_scale_pair_differs", true)
        .set("scalar_shape", 1)
        .set("num_attention_heads", 8)
        .set("moe_intermediate_size", 512)
        .set("intermediate_size", 512)
        .set("n_routed_experts", 8)
        .set("num_hidden_layers", 2);
    loaded += sweep(&wide, &[2, 8], &options).0;
    assert!(loaded >= 80, "only {loaded} combinations were loaded");
}

#[test]
fn published_styles_of_nvfp4_equal_the_oracle() {
    let mut loaded = 0;
    for (family, style) in [
        (Family::DeepseekV3, "v3"),
        (Family::DeepseekV3, "v31"),
        (Family::GlmMoeDsa, "glm5"),
        (Family::KimiK25, "early"),
        (Family::KimiK25, "k25"),
        (Family::KimiK25, "k26"),
    ] {
        for checkpoint in both_presets(family, Scheme::Nvfp4, &[("n_routed_experts", 4)]) {
            let checkpoint = checkpoint.set("quant_style", style).set("kv_scales", true);
            loaded += sweep(&checkpoint, &[2], &layouts()).0;
        }
    }
    assert!(loaded >= 40, "only {loaded} combinations were loaded");
}

#[test]
fn mxfp4_equals_the_oracle() {
    let mut loaded = 0;
    let mut options = layouts();
    options.push(oracle::Options::tp(1).fuse_shared_experts());
    options.push(oracle::Options::tp(1).draft());
    for family in [Family::KimiK25, Family::GlmMoeDsa] {
        for checkpoint in both_presets(family, Scheme::Mxfp4, &[]) {
            loaded += sweep(&checkpoint, &[1, 2, 4], &options).0;
            let shared =
                checkpoint.set("mxfp4_shared", true).set("mxfp4_kv_b", family == Family::KimiK25);
            loaded += sweep(&shared, &[1, 2, 8], &options).0;
        }
    }
    assert!(loaded >= 40, "only {loaded} combinations were loaded");
}

#[test]
fn int4_equals_the_oracle() {
    let mut loaded = 0;
    for checkpoint in both_presets(Family::KimiK25, Scheme::Int4, &[]) {
        loaded += sweep(&checkpoint, &[1, 2, 4], &layouts()).0;
        loaded += sweep(&checkpoint.set("int4_linears", true), &[1, 2, 8], &layouts()).0;
    }
    assert!(loaded >= 16, "only {loaded} combinations were loaded");
}

/// Derived parameters that begin in one huge page and end in another, with others in both: what lands in a page after they
/// are finished leaves them as they are. Which comes first differs from load to load, with the number of readers and with the
/// length of reads.
#[test]
fn parameters_of_several_huge_pages_equal_the_oracle() {
    const HUGE_PAGE: u64 = 2 << 20;
    let dimensions = [
        ("hidden_size", 1024),
        ("num_attention_heads", 32),
        ("q_lora_rank", 256),
        ("kv_lora_rank", 512),
        ("qk_nope_head_dim", 128),
        ("v_head_dim", 128),
        ("num_hidden_layers", 4),
        ("files", 3),
    ];
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Fp8);
    let checkpoint = dimensions.iter().fold(checkpoint, |c, (key, value)| c.set(key, *value));
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    checkpoint.write(&dir).unwrap();
    for tp in [1, 2] {
        let options = oracle::Options::tp(tp);
        let answer = oracle::answer(&dir, &options).unwrap();
        let whole = plan(&dir, &options, Exchange::On).unwrap();
        let derived = whole.placement().params.iter().filter(|param| param.derived);
        let large = derived.filter(|param| param.bytes >= HUGE_PAGE).count();
        assert!(large >= 8, "{large} parameters of a huge page or more are derived");
        for (read_bytes, concurrency) in
            [(None, None), (None, Some(1)), (Some(64 << 10), Some(1)), (Some(256 << 10), Some(4))]
        {
            let wanted = PlanOptions { read_bytes, ..plan_options(&options, Exchange::On) };
            let planned = Plan::new(discover(&dir).unwrap(), &wanted).unwrap();
            let run = RunOptions { concurrency, ..RunOptions::default() };
            let what = format!("tp {tp}, reads of {read_bytes:?} bytes, {concurrency:?} at a time");
            for _ in 0..3 {
                let loaded = load_with(&planned, &run).unwrap();
                compare(&what, &loaded, &answer);
            }
        }
    }
}
