//! The language model: layers, embedding and head (§1.2, §1.5, §2.1, §3.6).

use super::build::Builder;
use super::checkpoint::Checkpoint;
use super::linear::{Cut, Part};
use super::tensor::Tensor;

/// The family that a manifest names: chosen by the architecture, never by `model_type`.
pub(super) fn family(checkpoint: &Checkpoint) -> &'static str {
    match checkpoint.architecture() {
        "LlamaForCausalLM" => "llama",
        "Qwen3ForCausalLM" => "qwen3",
        "Qwen3MoeForCausalLM" => "qwen3_moe",
        "DeepseekV3ForCausalLM" => "deepseek_v3",
        "DeepseekV32ForCausalLM" => "deepseek_v32",
        "GlmMoeDsaForCausalLM" => "glm_moe_dsa",
        "KimiK25ForConditionalGeneration" => "kimi_k25",
        other => panic!("no family has the architecture {other}"),
    }
}

/// What stands before the language model's names.
pub(super) fn prefix(checkpoint: &Checkpoint) -> &'static str {
    match family(checkpoint) {
        "kimi_k25" => "language_model.",
        _ => "",
    }
}

/// Whether attention is of the latent kind.
pub(super) fn is_latent(checkpoint: &Checkpoint) -> bool {
    !matches!(family(checkpoint), "llama" | "qwen3" | "qwen3_moe")
}

/// Whether layer `i` of the main model has experts.
pub(super) fn is_sparse(checkpoint: &Checkpoint, i: usize) -> bool {
    let size = |key: &str| checkpoint.size(key);
    if is_latent(checkpoint) {
        let frequency = size("moe_layer_freq").max(1);
        let first = size("first_k_dense_replace");
        return size("n_routed_experts") > 0 && i >= first && i.is_multiple_of(frequency);
    }
    let step = size("decoder_sparse_step").max(1);
    let dense = checkpoint.text["mlp_only_layers"].as_array();
    let only_mlp = dense.is_some_and(|layers| layers.iter().any(|l| l.as_u64() == Some(i as u64)));
    size("num_experts") > 0 && !only_mlp && (i + 1).is_multiple_of(step)
}

impl Builder<'_> {
    /// The main model, or its prediction layer for a draft.
    pub(super) fn decoder(&mut self) {
        let layers = self.checkpoint.size("num_hidden_layers");
        if self.options.draft {
            self.draft(&format!("model.layers.{layers}."));
            return;
        }
        self.vocabulary("model.embed_tokens.weight");
        if self.checkpoint.text["tie_word_embeddings"].as_bool() == Some(true) {
            self.alias("lm_head.weight".into(), "model.embed_tokens.weight".into());
        } else {
            self.vocabulary("lm_head.weight");
        }
        self.put_plain("model.norm.weight", "model.norm.weight");
        for i in 0..layers {
            let layer = format!("model.layers.{i}.");
            self.layer(&layer, &layer, is_sparse(self.checkpoint, i));
        }
    }

    /// The prediction layer alone; embedding and head are the main model's.
    fn draft(&mut self, source: &str) {
        for norm in ["enorm.weight", "hnorm.weight", "shared_head.norm.weight"] {
            self.put_plain(&format!("model.{norm}"), &format!("{source}{norm}"));
        }
        self.linear_of("model.eh_proj", &format!("{source}eh_proj"), Cut::Whole);
        self.layer(source, "model.decoder.", true);
    }

    fn layer(&mut self, source: &str, target: &str, sparse: bool) {
        for norm in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            self.put_plain(&format!("{target}{norm}"), &format!("{source}{norm}"));
        }
        let attention = (format!("{source}self_attn."), format!("{target}self_attn."));
        if is_latent(self.checkpoint) {
            self.latent_attention(&attention.0, &attention.1);
        } else {
            self.grouped_attention(&attention.0, &attention.1);
        }
        let (source, target) = (format!("{source}mlp."), format!("{target}mlp."));
        if sparse {
            self.sparse_mlp(&source, &target);
        } else {
            self.mlp(&source, &target);
        }
    }

    /// gate and up merged, down; split over all ranks.
    fn mlp(&mut self, source: &str, target: &str) {
        let wide =
            ["gate_proj", "up_proj"].map(|part| Part::new(format!("{source}{part}"), self.rows()));
        self.linear(&format!("{target}gate_up_proj"), &wide, 2);
        let (from, to) = (format!("{source}down_proj"), format!("{target}down_proj"));
        self.linear_of(&to, &from, self.columns());
    }

    fn sparse_mlp(&mut self, source: &str, target: &str) {
        self.put_plain(&format!("{target}gate.weight"), &format!("{source}gate.weight"));
        if self.checkpoint.text["topk_method"].as_str() == Some("noaux_tc") {
            let bias = "gate.e_score_correction_bias";
            let tensor = self.checkpoint.get(&format!("{source}{bias}")).cast("F32");
            self.put(format!("{target}{bias}"), tensor);
        }
        self.experts(source, target);
        let shared = self.checkpoint.size("n_shared_experts") > 0;
        if shared && !self.options.fuse_shared_experts {
            self.mlp(&format!("{source}shared_experts."), &format!("{target}shared_experts."));
        }
    }

    /// Rows of the vocabulary, padded to a multiple of 64 and split; rows past its end are zero.
    fn vocabulary(&mut self, name: &str) {
        let whole: Tensor = self.checkpoint.get(name).cast(self.checkpoint.model_dtype());
        let share = whole.shape[0].next_multiple_of(64) / self.options.tp;
        self.put(name.to_owned(), whole.rows_or_zeros(self.rank * share, share));
    }
}
