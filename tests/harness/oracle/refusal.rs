//! What the contract says must be refused: options that do not fit the model, shapes that do not
//! divide. Nothing here looks for broken checkpoints.

use super::build::Builder;
use super::checkpoint::{Checkpoint, Stored};
use super::decoder::{is_latent, is_sparse};
use super::options::{Layout, Options};
use super::vision;

/// # Errors
/// The first reason to refuse the load.
pub(super) fn check(checkpoint: &Checkpoint, options: &Options) -> Result<(), String> {
    check_options(checkpoint, options)?;
    let layout = options.effective_layout(checkpoint.declared);
    let builder = Builder::new(checkpoint, options, layout, 0);
    if vision::is_loaded(checkpoint, options) {
        let heads = vision::size(checkpoint, "num_attention_heads", 16);
        divides("vision heads", heads, options.tp)?;
    }
    if options.encoder_only {
        return Ok(());
    }
    divides("attention heads", checkpoint.size("num_attention_heads"), options.tp)?;
    let layers = checkpoint.size("num_hidden_layers");
    if options.draft {
        return builder.check_layer(&format!("model.layers.{layers}."), true);
    }
    divides("padded vocabulary", checkpoint.size("vocab_size").next_multiple_of(64), options.tp)?;
    for i in 0..layers {
        builder.check_layer(&format!("model.layers.{i}."), is_sparse(checkpoint, i))?;
    }
    Ok(())
}

fn check_options(checkpoint: &Checkpoint, options: &Options) -> Result<(), String> {
    let one_sided = options.language_only || options.encoder_only;
    refuse_if(one_sided && !vision::has_tower(checkpoint), || "no vision tower".into())?;
    refuse_if(options.language_only && options.encoder_only, || {
        "language and encoder only".into()
    })?;
    if let Some(layout) = options.kernel_layout.as_deref() {
        let known: &[&str] = match checkpoint.declared {
            Stored::Bf16 | Stored::Fp8 | Stored::Nvfp4 => {
                &["none", "cutlass", "flashinfer-cutlass", "trtllm"]
            }
            Stored::Mxfp4 => &["none", "aiter"],
            Stored::Int4 => &["none"],
        };
        let quant = checkpoint.declared.name();
        refuse_if(!known.contains(&layout), || format!("{quant} has no layout {layout}"))?;
    }
    let predicted = checkpoint.size("num_nextn_predict_layers");
    refuse_if(options.draft && predicted != 1, || format!("{predicted} prediction layers"))?;
    let shared = checkpoint.size("n_shared_experts");
    refuse_if(options.fuse_shared_experts && shared != 1, || format!("{shared} shared experts"))
}

impl Builder<'_> {
    fn check_layer(&self, layer: &str, sparse: bool) -> Result<(), String> {
        let attention = format!("{layer}self_attn.");
        if is_latent(self.checkpoint) {
            self.check_latent(&attention)?;
        } else {
            self.check_grouped(&attention)?;
        }
        let mlp = format!("{layer}mlp.");
        if !sparse {
            return self.check_mlp(&mlp);
        }
        self.check_experts(&mlp)?;
        if self.checkpoint.size("n_shared_experts") > 0 && !self.options.fuse_shared_experts {
            return self.check_mlp(&format!("{mlp}shared_experts."));
        }
        Ok(())
    }

    fn check_grouped(&self, attention: &str) -> Result<(), String> {
        let (kv_heads, tp) = (self.checkpoint.size("num_key_value_heads"), self.options.tp);
        let fits = kv_heads.is_multiple_of(tp) || tp.is_multiple_of(kv_heads);
        refuse_if(!fits, || format!("{kv_heads} kv heads and {tp} ranks"))?;
        self.check_row_parallel(&format!("{attention}o_proj"))
    }

    fn check_latent(&self, attention: &str) -> Result<(), String> {
        let module = |name: &str| format!("{attention}{name}");
        let rank = self.checkpoint.size("q_lora_rank");
        let q_b = if rank > 0 { "q_b_proj" } else { "q_proj" };
        if rank > 0 && self.checkpoint.stored(&module("q_a_proj")) == Stored::Fp8 {
            refuse_if(!rank.is_multiple_of(128), || format!("q_a of {rank} rows in FP8"))?;
        }
        self.check_column_parallel(&module(q_b))?;
        self.check_column_parallel(&module("kv_b_proj"))?;
        self.check_row_parallel(&module("o_proj"))?;
        let kv_b = self.checkpoint.stored(&module("kv_b_proj"));
        let no_split = matches!(kv_b, Stored::Nvfp4 | Stored::Int4) && !self.options.is_raw();
        refuse_if(no_split, || format!("kv_b_proj in {}", kv_b.name()))?;
        self.check_kv_scales(attention)
    }

    fn check_kv_scales(&self, attention: &str) -> Result<(), String> {
        let positive = |name: &str| {
            let name = format!("{attention}{name}");
            self.checkpoint.has(&name) && self.checkpoint.scalar(&name) > 0.0
        };
        let lonely = positive("v_proj.v_scale") && !positive("k_proj.k_scale");
        refuse_if(lonely && !self.options.is_raw(), || "v_scale without k_scale".into())
    }

    fn check_column_parallel(&self, module: &str) -> Result<(), String> {
        let ([rows, _], tp) = (self.checkpoint.linear_shape(module), self.options.tp);
        divides(module, rows, tp)?;
        let blocks = self.checkpoint.stored(module) == Stored::Fp8 && tp > 1;
        refuse_if(blocks && !(rows / tp).is_multiple_of(128), || format!("rows of {module}"))
    }

    fn check_row_parallel(&self, module: &str) -> Result<(), String> {
        let ([_, columns], tp) = (self.checkpoint.linear_shape(module), self.options.tp);
        divides(module, columns, tp)?;
        let group = self.checkpoint.stored(module).group();
        let whole = tp == 1 || (columns / tp).is_multiple_of(group);
        refuse_if(!whole, || format!("columns of {module}"))
    }

    fn check_mlp(&self, mlp: &str) -> Result<(), String> {
        let (gate, tp) = (format!("{mlp}gate_proj"), self.options.tp);
        let [rows, _] = self.checkpoint.linear_shape(&gate);
        divides(&gate, rows, tp)?;
        let blocks = self.checkpoint.stored(&gate) == Stored::Fp8;
        refuse_if(blocks && !(rows / tp).is_multiple_of(128), || format!("rows of {gate}"))?;
        self.check_row_parallel(&format!("{mlp}down_proj"))
    }

    fn check_experts(&self, mlp: &str) -> Result<(), String> {
        divides("ranks", self.options.tp, self.options.ep)?;
        divides("experts", self.routed_experts(), self.options.ep)?;
        divides("expert size", self.checkpoint.size("moe_intermediate_size"), self.moe_tp())?;
        let stored = self.checkpoint.stored(&format!("{mlp}experts.0.gate_proj"));
        if self.options.fuse_shared_experts {
            let shared = self.checkpoint.stored(&format!("{mlp}shared_experts.gate_proj"));
            refuse_if(shared != stored, || format!("shared experts in {}", shared.name()))?;
        }
        let (share, h) = (self.inner_share(stored), self.checkpoint.size("hidden_size"));
        let whole = share.is_multiple_of(stored.group());
        refuse_if(!whole, || format!("experts' share of {share}"))?;
        match (stored, self.layout) {
            (Stored::Bf16, Layout::Trtllm) => divides("hidden size", h, 64),
            (Stored::Nvfp4, Layout::Trtllm) => divides("hidden size", h, 128),
            (Stored::Nvfp4, Layout::Cutlass | Layout::FlashinferCutlass) => {
                divides("rows of w13", 2 * share, 128)
            }
            (Stored::Mxfp4, Layout::Aiter) => self.check_aiter(share, h),
            _ => Ok(()),
        }
    }

    fn check_aiter(&self, share: usize, h: usize) -> Result<(), String> {
        let fused = usize::from(self.options.fuse_shared_experts);
        let local = self.routed_experts() / self.options.ep + fused;
        for (rows, columns) in [(2 * share, h), (h, share)] {
            divides("scale rows of all experts", local * rows, 256)?;
            divides("scale columns", columns / 32, 8)?;
            divides("weight rows", rows, 16)?;
            divides("bytes of a weight row", columns / 2, 32)?;
        }
        Ok(())
    }
}

fn divides(what: &str, size: usize, count: usize) -> Result<(), String> {
    refuse_if(!size.is_multiple_of(count), || format!("{what}: {size} is no multiple of {count}"))
}

fn refuse_if(refused: bool, reason: impl FnOnce() -> String) -> Result<(), String> {
    if refused { Err(reason()) } else { Ok(()) }
}
