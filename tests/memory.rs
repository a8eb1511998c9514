//! What a load holds beside its parameters, counted by the allocator; and that aliases are no second copies.
//!
//! Parameters and staging are mapped by themselves; everything else, the working memory of post-processing included,
//! comes from the allocator that is counted here.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use longshore::{
    load::RunOptions,
    plan::{Exchange, Plan, PlanOptions},
    synth::Synth,
};
use longshore_harness::{
    generator::{Checkpoint, Family, Scheme},
    oracle,
    scratch::Scratch,
};
use longshore_models::options::{KernelLayout, ModelOptions};
use longshore_rank::storage::IoChoice;
use serde_json::{Value, json};

mod common;

use common::{load_with, plan};

/// Counts the bytes that are allocated now and at most.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: passed on from the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: passed on from the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The counter is the process's, so one load at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Working memory of post-processing (128 rows of a matrix for each worker) and everything else that a load allocates:
/// threads, mailboxes, lists of spans. One layer's parameters here are twenty times that, all layers' forty times.
const BESIDE: usize = 16 << 20;

/// The most that a load of all-zero weights in these dimensions allocates at a time, the plan not counted.
fn peak_of_load(
    config: &Value,
    quantization: Option<&Value>,
    layout: KernelLayout,
    concurrency: usize,
) -> (usize, Plan) {
    let scratch = Scratch::new().unwrap();
    let (like, dir) = (scratch.join("config"), scratch.join("checkpoint"));
    fs::create_dir(&like).unwrap();
    let write = |name: &str, value: &Value| {
        fs::write(like.join(name), serde_json::to_vec(value).unwrap()).unwrap();
    };
    write("config.json", config);
    if let Some(quantization) = quantization {
        write("hf_quant_config.json", quantization);
    }
    Synth::like(&like).headers_only(true).write(&dir).unwrap();
    let plan = plan_for(&dir, layout);
    let run = RunOptions {
        io: IoChoice::Buffered,
        concurrency: Some(concurrency),
        ..RunOptions::default()
    };
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let loaded = load_with(&plan, &run).unwrap_or_else(|e| panic!("{}", e.line()));
    let peak = PEAK.load(Ordering::Relaxed) - before;
    assert_eq!(loaded.ranks.len(), 1);
    (peak, plan)
}

fn plan_for(dir: &Path, layout: KernelLayout) -> Plan {
    let model = ModelOptions { kernel_layout: Some(layout), ..ModelOptions::default() };
    let options = PlanOptions { model, ..PlanOptions::default() };
    Plan::new(longshore::discover::discover(dir).unwrap(), &options).unwrap()
}

fn bytes_of(plan: &Plan, suffix: &str) -> usize {
    let params = &plan.placement().params;
    params.iter().filter(|p| p.name.ends_with(suffix)).map(|p| p.bytes as usize).sum()
}

/// One layer of 96 NVFP4 experts: its w13 is 384 MiB, the scales of it 48 MiB.
#[test]
fn nvfp4_experts_are_finished_without_a_copy() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16", "hidden_size": 2048, "num_attention_heads": 2,
        "num_hidden_layers": 1, "vocab_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
        "intermediate_size": 128, "moe_intermediate_size": 2048, "n_routed_experts": 96,
        "n_shared_experts": 1, "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0, "topk_method": "noaux_tc", "tie_word_embeddings": false,
    });
    let quantization = json!({
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": null, "group_size": 16,
            "exclude_modules": ["model.layers.0.self_attn*", "lm_head"],
        },
    });
    for layout in [KernelLayout::Trtllm, KernelLayout::Cutlass] {
        let (peak, plan) = peak_of_load(&config, Some(&quantization), layout, 16);
        assert!(bytes_of(&plan, "experts.w13_weight") > 20 * BESIDE, "a copy would show");
        assert!(bytes_of(&plan, "experts.w13_weight_scale") > BESIDE, "a copy would show");
        assert!(peak <= BESIDE, "{layout}: {peak} bytes at a time");
    }
}

/// Sixteen layers of one BF16 expert, whose w13 is 32 MiB, on sixteen workers.
#[test]
fn unquantised_experts_are_finished_without_a_copy() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16", "hidden_size": 4096, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 16, "vocab_size": 64,
        "intermediate_size": 64, "moe_intermediate_size": 2048, "num_experts": 1,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": true,
    });
    let (peak, plan) = peak_of_load(&config, None, KernelLayout::Trtllm, 16);
    assert!(bytes_of(&plan, "experts.w13_weight") / 16 > BESIDE, "a copy of one would show");
    assert!(peak <= BESIDE, "{peak} bytes at a time");
}

/// Where the alias rule holds for every block scale, the kernels' names take no byte of their own, and scalars do.
#[test]
fn aliased_scales_are_no_second_copy() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for family in [Family::DeepseekV3, Family::KimiK25, Family::GlmMoeDsa] {
        let scratch = Scratch::new().unwrap();
        let dir = scratch.join("checkpoint");
        Checkpoint::new(family, Scheme::Nvfp4).set("n_routed_experts", 4).write(&dir).unwrap();
        let with = |layout: &str| {
            let options = oracle::Options::tp(2).kernel_layout(layout);
            plan(&dir, &options, Exchange::On).unwrap()
        };
        for layout in ["cutlass", "flashinfer-cutlass", "trtllm"] {
            let plan = with(layout);
            let loaded = load_with(&plan, &RunOptions::default()).unwrap();
            let derived = |name: &str| {
                name.ends_with("weight_scale_interleaved") || name.ends_with("blockscale_swizzled")
            };
            for rank in &loaded.ranks {
                let aliased = rank.aliases().filter(|(name, _)| derived(name)).count();
                assert!(aliased > 0, "{family:?} {layout}");
                assert!(rank.iter().all(|p| !derived(p.name)), "{family:?} {layout}");
                // what is derived holds w_kc, w_vc and a handful of numbers, and no scale
                for p in plan.placement().params.iter().filter(|p| p.derived) {
                    let split = p.name.ends_with("w_kc") || p.name.ends_with("w_vc");
                    assert!(split || p.bytes <= 16, "{family:?} {layout}: {}", p.name);
                }
                let held: u64 = rank.iter().map(|p| p.data.len() as u64).sum();
                // each parameter begins on a boundary of 512 bytes
                let most = held + 512 * rank.iter().count() as u64;
                assert!(rank.allocated_bytes() <= most, "{family:?} {layout}");
            }
        }
    }
}
