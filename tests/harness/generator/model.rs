//! Which tensors a model has, in the order of its modules.

use super::settings::Settings;
use super::tensor::Tensor;
use super::writer::{Linear, Writer};
use super::{Family, Scheme};

/// Every tensor of the model.
pub(super) fn tensors(
    family: Family,
    scheme: Scheme,
    settings: &Settings,
    seed: u64,
) -> Vec<Tensor> {
    let mut writer = Writer::new(family, scheme, settings, seed);
    if family.is_dense_attention() {
        writer.dense_decoder();
    } else if family == Family::KimiK25 {
        let short = settings.flag("short_layer_names");
        writer.vision();
        writer.mla_decoder("language_model.", if short { "" } else { "model." });
    } else {
        writer.mla_decoder("", "model.");
    }
    writer.tensors
}

/// How the parts of one layer of an MLA model are stored.
struct LayerSchemes {
    attention: Scheme,
    kv_b: Scheme,
    o_proj: Scheme,
    dense: Scheme,
    shared: Scheme,
    routed: Scheme,
}

impl LayerSchemes {
    fn all(scheme: Scheme) -> LayerSchemes {
        LayerSchemes {
            attention: scheme,
            kv_b: scheme,
            o_proj: scheme,
            dense: scheme,
            shared: scheme,
            routed: scheme,
        }
    }
}

impl Writer<'_> {
    /// Llama, Qwen3 and Qwen3-MoE.
    fn dense_decoder(&mut self) {
        let p = self.settings;
        let m = if p.flag("strip_model_prefix") { "" } else { "model." };
        let (h, vocab) = (p.size("hidden_size"), p.size("vocab_size"));
        self.weight(&format!("{m}embed_tokens.weight"), &[vocab, h]);
        for i in 0..p.size("num_hidden_layers") {
            self.dense_layer(&format!("{m}layers.{i}."));
        }
        self.norm(&format!("{m}norm"), h);
        if !p.flag("tie_word_embeddings") || p.flag("lm_head_although_tied") {
            self.weight("lm_head.weight", &[vocab, h]);
        }
    }

    fn dense_layer(&mut self, a: &str) {
        let p = self.settings;
        let (h, hd) = (p.size("hidden_size"), p.size("head_dim"));
        let q = p.size("num_attention_heads") * hd;
        let kv = p.size("num_key_value_heads") * hd;
        self.norm(&format!("{a}input_layernorm"), h);
        self.norm(&format!("{a}post_attention_layernorm"), h);
        for (part, n, k) in [("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)] {
            self.plain_linear(&format!("{a}self_attn.{part}_proj"), n, k);
            if p.flag("attention_bias") {
                self.weight(&format!("{a}self_attn.{part}_proj.bias"), &[n]);
            }
        }
        if self.family != Family::Llama {
            self.norm(&format!("{a}self_attn.q_norm"), hd);
            self.norm(&format!("{a}self_attn.k_norm"), hd);
        }
        self.inv_freq(a, hd / 2);
        if self.family == Family::Qwen3Moe {
            self.plain_linear(&format!("{a}mlp.gate"), p.size("num_experts"), h);
            for e in 0..p.size("num_experts") {
                let inner = p.size("moe_intermediate_size");
                self.mlp(&format!("{a}mlp.experts.{e}."), inner, Scheme::Bf16, None);
            }
        } else {
            self.mlp(&format!("{a}mlp."), p.size("intermediate_size"), Scheme::Bf16, None);
        }
    }

    fn inv_freq(&mut self, a: &str, size: usize) {
        if self.settings.flag("inv_freq") {
            let name = format!("{a}self_attn.rotary_emb.inv_freq");
            self.bell_shaped(&name, &[size], "F32", 0.1, 1.0);
        }
    }

    /// gate, up and down; `pair` names the input scale that gate and up share.
    fn mlp(&mut self, a: &str, inner: usize, scheme: Scheme, pair: Option<&str>) {
        let h = self.settings.size("hidden_size");
        let wide = Linear { rows: inner, columns: h, scheme, input_scale_of: pair };
        let narrow = Linear { rows: h, columns: inner, scheme, input_scale_of: None };
        self.linear(&format!("{a}gate_proj"), wide);
        self.linear(&format!("{a}up_proj"), wide);
        self.linear(&format!("{a}down_proj"), narrow);
    }

    fn layer_schemes(&self, i: usize) -> LayerSchemes {
        let (p, scheme) = (self.settings, self.scheme);
        let mut schemes = LayerSchemes::all(Scheme::Bf16);
        match scheme {
            Scheme::Bf16 => {}
            Scheme::Fp8 => schemes = LayerSchemes::all(scheme),
            Scheme::Nvfp4 => {
                let style = p.text("quant_style").unwrap_or_default();
                if i >= p.size("num_hidden_layers") || (style == "k26" && i == 0) {
                    return schemes;
                }
                if p.flag("nvfp4_attention") {
                    (schemes.attention, schemes.o_proj) = (scheme, scheme);
                }
                if style == "v31" {
                    schemes.o_proj = scheme;
                }
                (schemes.dense, schemes.routed) = (scheme, scheme);
                if style != "k26" {
                    schemes.shared = scheme;
                }
            }
            Scheme::Mxfp4 => {
                (schemes.dense, schemes.routed) = (scheme, scheme);
                if p.flag("mxfp4_kv_b") {
                    schemes.kv_b = scheme;
                }
                if p.flag("mxfp4_shared") {
                    schemes.shared = scheme;
                }
            }
            Scheme::Int4 => {
                schemes.routed = scheme;
                if p.flag("int4_linears") {
                    (schemes.dense, schemes.shared) = (scheme, scheme);
                }
            }
        }
        schemes
    }

    fn mla_layer(&mut self, a: &str, i: usize) {
        let p = self.settings;
        let schemes = self.layer_schemes(i);
        let h = p.size("hidden_size");
        self.norm(&format!("{a}input_layernorm"), h);
        self.norm(&format!("{a}post_attention_layernorm"), h);
        self.mla_attention(&format!("{a}self_attn."), &schemes);
        self.inv_freq(a, p.size("qk_rope_head_dim") / 2);
        self.indexer(&format!("{a}self_attn.indexer."), &schemes);
        if p.flag("kv_scales") && i < p.size("num_hidden_layers") {
            for name in ["k_proj.k_scale", "v_proj.v_scale"] {
                let name = format!("{a}self_attn.{name}");
                self.scalar_of(&name, &name, &[], [0.5, 2.0]);
            }
        }
        if i < p.size("first_k_dense_replace") {
            self.mlp(&format!("{a}mlp."), p.size("intermediate_size"), schemes.dense, None);
        } else {
            self.moe(&format!("{a}mlp."), &schemes);
        }
    }

    fn mla_attention(&mut self, t: &str, schemes: &LayerSchemes) {
        let p = self.settings;
        let (h, heads) = (p.size("hidden_size"), p.size("num_attention_heads"));
        let (ql, kl) = (p.size("q_lora_rank"), p.size("kv_lora_rank"));
        let (dn, dr) = (p.size("qk_nope_head_dim"), p.size("qk_rope_head_dim"));
        let dv = p.size("v_head_dim");
        let linear = |rows, columns, scheme| Linear { rows, columns, scheme, input_scale_of: None };
        if ql > 0 {
            self.linear(&format!("{t}q_a_proj"), linear(ql, h, schemes.attention));
            self.norm(&format!("{t}q_a_layernorm"), ql);
            let q_b = linear(heads * (dn + dr), ql, schemes.attention);
            self.linear(&format!("{t}q_b_proj"), q_b);
        } else {
            self.linear(&format!("{t}q_proj"), linear(heads * (dn + dr), h, schemes.attention));
        }
        self.linear(&format!("{t}kv_a_proj_with_mqa"), linear(kl + dr, h, schemes.attention));
        self.norm(&format!("{t}kv_a_layernorm"), kl);
        self.linear(&format!("{t}kv_b_proj"), linear(heads * (dn + dv), kl, schemes.kv_b));
        self.linear(&format!("{t}o_proj"), linear(h, heads * dv, schemes.o_proj));
    }

    fn indexer(&mut self, t: &str, schemes: &LayerSchemes) {
        let p = self.settings;
        let (heads, dim) = (p.size("index_n_heads"), p.size("index_head_dim"));
        if heads == 0 {
            return;
        }
        let scheme = match schemes.attention {
            Scheme::Fp8 => Scheme::Fp8,
            _ => Scheme::Bf16,
        };
        let (h, ql) = (p.size("hidden_size"), p.size("q_lora_rank"));
        let linear = |rows, columns| Linear { rows, columns, scheme, input_scale_of: None };
        self.linear(&format!("{t}wq_b"), linear(heads * dim, ql));
        self.linear(&format!("{t}wk"), linear(dim, h));
        self.biased_norm(&format!("{t}k_norm"), dim, p.text("indexer_norm_dtype"));
        self.plain_linear(&format!("{t}weights_proj"), heads, h);
    }

    fn moe(&mut self, t: &str, schemes: &LayerSchemes) {
        let p = self.settings;
        let (experts, inner) = (p.size("n_routed_experts"), p.size("moe_intermediate_size"));
        self.plain_linear(&format!("{t}gate"), experts, p.size("hidden_size"));
        let bias_dtype = p.text("bias_dtype").unwrap_or("BF16");
        let bias = format!("{t}gate.e_score_correction_bias");
        self.bell_shaped(&bias, &[experts], bias_dtype, 0.5, 3.0);
        for e in 0..experts {
            let x = format!("{t}experts.{e}.");
            self.mlp(&x, inner, schemes.routed, Some(&format!("{x}input_scale")));
        }
        let shared = p.size("n_shared_experts");
        if shared > 0 {
            self.mlp(&format!("{t}shared_experts."), inner * shared, schemes.shared, None);
        }
    }

    /// The DeepSeek kind of model; `layers` is what stands between the prefix and `layers.N`.
    fn mla_decoder(&mut self, prefix: &str, layers: &str) {
        let p = self.settings;
        let (h, vocab) = (p.size("hidden_size"), p.size("vocab_size"));
        let count = p.size("num_hidden_layers");
        self.weight(&format!("{prefix}model.embed_tokens.weight"), &[vocab, h]);
        for i in 0..count + p.size("mtp") {
            let a = format!("{prefix}{layers}layers.{i}.");
            self.mla_layer(&a, i);
            if i < count {
                continue;
            }
            self.norm(&format!("{a}enorm"), h);
            self.norm(&format!("{a}hnorm"), h);
            self.plain_linear(&format!("{a}eh_proj"), h, 2 * h);
            self.norm(&format!("{a}shared_head.norm"), h);
            if p.flag("mtp_copies") {
                self.weight(&format!("{a}embed_tokens.weight"), &[vocab, h]);
                self.weight(&format!("{a}shared_head.head.weight"), &[vocab, h]);
            }
        }
        self.norm(&format!("{prefix}model.norm"), h);
        self.weight(&format!("{prefix}lm_head.weight"), &[vocab, h]);
    }

    fn vision(&mut self) {
        let p = self.settings;
        let (d, inner) = (p.size("vt_hidden_size"), p.size("vt_intermediate_size"));
        let (merged, position) = (4 * d, p.size("vt_pos_emb"));
        self.weight("vision_tower.patch_embed.proj.weight", &[d, 3, 14, 14]);
        self.weight("vision_tower.patch_embed.proj.bias", &[d]);
        self.weight("vision_tower.patch_embed.pos_emb.weight", &[position, position, d]);
        for i in 0..p.size("vt_num_hidden_layers") {
            let b = format!("vision_tower.encoder.blocks.{i}.");
            self.biased_norm(&format!("{b}norm0"), d, None);
            self.biased_norm(&format!("{b}norm1"), d, None);
            self.biased_linear(&format!("{b}wqkv"), 3 * d, d);
            self.biased_linear(&format!("{b}wo"), d, d);
            self.biased_linear(&format!("{b}mlp.fc0"), inner, d);
            self.biased_linear(&format!("{b}mlp.fc1"), d, inner);
        }
        self.biased_norm("vision_tower.encoder.final_layernorm", d, None);
        self.biased_norm("mm_projector.pre_norm", d, None);
        self.biased_linear("mm_projector.proj.0", merged, merged);
        self.biased_linear("mm_projector.proj.2", p.size("hidden_size"), merged);
    }

    fn biased_linear(&mut self, name: &str, rows: usize, columns: usize) {
        self.weight(&format!("{name}.weight"), &[rows, columns]);
        self.weight(&format!("{name}.bias"), &[rows]);
    }
}
