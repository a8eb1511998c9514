//! What is loaded: small checkpoints, held in memory, with the plan of a first load and what must come of it.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::{Checkpoint, TensorId},
    placement::Placement,
    transform::{Finish, KvScales, Matrices, Reordering, RowOrder},
};
use longshore_rank::protocol::{LoadPlan, PlanName};
use serde_json::{Value, json};

use crate::{
    discover::discover,
    plan::{Exchange, Plan, PlanOptions},
    simulation::memory,
    synth::Synth,
};

/// The kind of model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Key/value heads that some ranks share, fused and row-parallel weights.
    Dense,
    /// Experts.
    Experts,
    /// Latent attention, whose weight is split once it is complete.
    Latent,
}

/// What decides the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) shape: Shape,
    pub(super) ranks: u32,
    pub(super) exchange: bool,
    pub(super) read_bytes: u64,
}

/// A checkpoint, and what its load comes to.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) plan: Plan,
    pub(super) name: PlanName,
    /// The bytes of the files.
    pub(super) files: Arc<Vec<Vec<u8>>>,
    /// What each parameter of each rank that holds any has in it when all has landed and nothing is finished.
    pub(super) raw: Vec<Vec<Vec<u8>>>,
    /// What it holds in the end.
    pub(super) complete: Vec<Vec<Vec<u8>>>,
}

impl Base {
    /// The one of this form; made when it is first asked for.
    pub(super) fn of(form: Form) -> Arc<Self> {
        Self::made(form, form.ranks, || Self::new(form))
    }

    /// The one of what is left of a group of this form: so many ranks.
    pub(super) fn for_fewer(form: Form, ranks: u32) -> Arc<Self> {
        let first = Self::of(form);
        Self::made(form, ranks, || {
            let plan = with_finishes(first.plan.for_fewer(ranks).unwrap());
            Self::of_plan(plan, Arc::clone(&first.files))
        })
    }

    fn made(form: Form, ranks: u32, make: impl FnOnce() -> Self) -> Arc<Self> {
        static MADE: Mutex<Vec<(Form, u32, Arc<Base>)>> = Mutex::new(Vec::new());
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., base)) = made.iter().find(|(f, r, _)| *f == form && *r == ranks) {
            return Arc::clone(base);
        }
        let base = Arc::new(make());
        made.push((form, ranks, Arc::clone(&base)));
        base
    }

    fn new(form: Form) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (like, written) = (scratch.path().join("like"), scratch.path().join("written"));
        fs::create_dir(&like).unwrap();
        fs::write(like.join("config.json"), config(form.shape).to_string()).unwrap();
        Synth::like(&like).write(&written).unwrap();
        let discovered = discover(written.as_path()).unwrap();
        let options = PlanOptions {
            tp: form.ranks,
            ep: if form.shape == Shape::Experts { form.ranks.min(2) } else { 1 },
            exchange: if form.exchange { Exchange::On } else { Exchange::Off },
            read_bytes: Some(form.read_bytes),
            ..PlanOptions::default()
        };
        let plan = with_finishes(Plan::new(discovered, &options).unwrap());
        let files = Arc::new(files(&written, plan.checkpoint()));
        Self::of_plan(plan, files)
    }

    fn of_plan(plan: Plan, files: Arc<Vec<Vec<u8>>>) -> Self {
        let holders = 0..plan.placement().parallel.tp();
        let raw: Vec<_> = holders.map(|rank| all_of(&plan.load, &files, rank)).collect();
        let complete = raw.iter().map(|params| {
            let mut params = params.clone();
            for number in 0..plan.placement().finishes.len() {
                memory::run_finish(plan.placement(), number, &mut params);
            }
            params
        });
        let complete = complete.collect();
        Self { name: plan.hash(), plan, files, raw, complete }
    }

    pub(super) fn placement(&self) -> &Placement {
        self.plan.placement()
    }
}

/// Adds steps that work in place, on one parameter and on two together, to those that the model has.
fn with_finishes(plan: Plan) -> Plan {
    let mut placement = plan.placement().clone();
    let finishes = placement.finishes.iter();
    let mut taken: Vec<u32> =
        finishes.flat_map(|f| f.inputs().into_iter().chain(f.outputs())).collect();
    taken.extend(placement.aliases.iter().map(|alias| alias.source));
    let free = |p: &u32| !taken.contains(p) && !placement.params[*p as usize].derived;
    let free: Vec<u32> = (0..placement.params.len() as u32).filter(free).collect();
    let mut finishes = Vec::new();
    for params in free.chunks(7) {
        let &[a, b, c, ..] = params else { continue };
        let whole = Matrices { param: a, count: 1, rows: 1, row_bytes: 1 };
        finishes.push(Finish::Reorder(whole, Reordering::Rows(RowOrder::AsStored)));
        finishes.push(Finish::KvScales(KvScales { k: b, v: c, v_given: true }));
    }
    placement.finishes.extend(finishes);
    let LoadPlan { checkpoint, reads, settled, exchange, read_bytes_max, .. } = &*plan.load;
    let load = LoadPlan {
        checkpoint: Arc::clone(checkpoint),
        placement: Arc::new(placement),
        reads: reads.clone(),
        settled: settled.clone(),
        exchange: *exchange,
        read_bytes_max: *read_bytes_max,
    };
    Plan { load: Arc::new(load), ..plan }
}

fn files(directory: &Path, checkpoint: &Checkpoint) -> Vec<Vec<u8>> {
    let read = |name: &String| fs::read(directory.join(name)).unwrap();
    checkpoint.files.iter().map(|file| read(&file.name)).collect()
}

/// The parameters of a rank that has read everything by itself.
fn all_of(plan: &LoadPlan, files: &[Vec<u8>], rank: u32) -> Vec<Vec<u8>> {
    let LoadPlan { checkpoint, placement, .. } = plan;
    let mut params: Vec<Vec<u8>> =
        placement.params.iter().map(|param| vec![0; param.bytes as usize]).collect();
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        let range = tensor.file_range;
        let bytes = &files[tensor.file as usize][range.start as usize..range.end as usize];
        let whole = ByteRange::new(0, range.len());
        placement.spans(
            id as TensorId,
            whole,
            |r| r == rank,
            |span| {
                memory::for_each_row(&span, |from, to| {
                    let converted = memory::converted(&span, &bytes[from]);
                    params[span.param as usize][to].copy_from_slice(&converted);
                });
            },
        );
    }
    params
}

/// As small as a configuration can be whose heads eight ranks can share out.
fn config(shape: Shape) -> Value {
    let mut config = json!({
        "torch_dtype": "bfloat16", "hidden_size": 64, "num_attention_heads": 8,
        "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64,
        "tie_word_embeddings": false, "attention_bias": false, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "hidden_act": "silu",
    });
    let (class, family, more) = match shape {
        Shape::Dense => {
            ("LlamaForCausalLM", "llama", json!({"num_key_value_heads": 4, "head_dim": 8}))
        }
        Shape::Experts => (
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            json!({
                "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 1, "num_experts": 8,
                "moe_intermediate_size": 16, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
                "mlp_only_layers": [], "norm_topk_prob": true,
            }),
        ),
        Shape::Latent => (
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            json!({
                "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 32,
                "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
                "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_experts_per_tok": 2,
                "num_nextn_predict_layers": 0, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
                "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
            }),
        ),
    };
    config["architectures"] = json!([class]);
    config["model_type"] = json!(family);
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}
