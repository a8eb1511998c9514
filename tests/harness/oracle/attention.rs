//! Attention: q/k/v with grouped heads, and the latent kind of DeepSeek, Kimi and GLM-5 (§3.3, §4d).

use super::build::Builder;
use super::checkpoint::Stored;
use super::linear::{Cut, Part};
use super::numbers::{e2m1, e4m3, e8m0};
use super::tensor::Tensor;

impl Builder<'_> {
    /// Attention with separate q, k and v; `source` and `target` end in `self_attn.`.
    pub(super) fn grouped_attention(&mut self, source: &str, target: &str) {
        let kv_heads = self.checkpoint.size("num_key_value_heads");
        let tp = self.options.tp;
        // fewer kv heads than ranks: neighbouring ranks hold the same one
        let kv = match kv_heads < tp {
            true => Cut::Rows { index: self.rank / (tp / kv_heads), count: kv_heads },
            false => self.rows(),
        };
        let parts = [
            Part::new(format!("{source}q_proj"), self.rows()),
            Part::new(format!("{source}k_proj"), kv),
            Part::new(format!("{source}v_proj"), kv),
        ];
        self.linear(&format!("{target}qkv_proj"), &parts, 3);
        self.linear_of(&format!("{target}o_proj"), &format!("{source}o_proj"), self.columns());
        for norm in ["q_norm.weight", "k_norm.weight"] {
            if self.checkpoint.has(&format!("{source}{norm}")) {
                self.put_plain(&format!("{target}{norm}"), &format!("{source}{norm}"));
            }
        }
        self.kv_scales(source, &format!("{target}attn."));
    }

    /// Latent attention; `source` and `target` end in `self_attn.`.
    pub(super) fn latent_attention(&mut self, source: &str, target: &str) {
        let from = |name: &str| format!("{source}{name}");
        let to = |name: &str| format!("{target}{name}");
        if self.checkpoint.size("q_lora_rank") > 0 {
            let parts = ["q_a_proj", "kv_a_proj_with_mqa"].map(|p| Part::new(from(p), Cut::Whole));
            // one slot: of the two parts' scalars only q_a's is kept (§2.2)
            self.linear(&to("fused_qkv_a_proj_with_mqa"), &parts, 1);
            self.put_plain(&to("q_a_layernorm.weight"), &from("q_a_layernorm.weight"));
            self.linear_of(&to("q_b_proj"), &from("q_b_proj"), self.rows());
        } else {
            self.linear_of(&to("q_proj"), &from("q_proj"), self.rows());
            let kv_a = "kv_a_proj_with_mqa";
            self.linear_of(&to(kv_a), &from(kv_a), Cut::Whole);
        }
        self.put_plain(&to("kv_a_layernorm.weight"), &from("kv_a_layernorm.weight"));
        self.linear_of(&to("kv_b_proj"), &from("kv_b_proj"), self.rows());
        self.linear_of(&to("o_proj"), &from("o_proj"), self.columns());
        if !self.options.is_raw() {
            self.split_kv_b(&from("kv_b_proj"), target);
        }
        if !self.checkpoint.text["index_topk"].is_null() {
            self.indexer(&from("indexer."), &to("indexer."));
        }
        self.kv_scales(source, &to("attn_mqa."));
    }

    fn indexer(&mut self, source: &str, target: &str) {
        for name in ["wq_b", "wk"] {
            self.linear_of(&format!("{target}{name}"), &format!("{source}{name}"), Cut::Whole);
        }
        let kept =
            [("k_norm.weight", "F32"), ("k_norm.bias", "F32"), ("weights_proj.weight", "BF16")];
        for (name, dtype) in kept {
            let tensor = self.checkpoint.get(&format!("{source}{name}")).cast(dtype);
            self.put(format!("{target}{name}"), tensor);
        }
    }

    /// `w_kc: [h, kl, dn]` and `w_vc: [h, dv, kl]` of the rank's own heads.
    fn split_kv_b(&mut self, module: &str, target: &str) {
        let heads = self.checkpoint.size("num_attention_heads") / self.options.tp;
        let (dn, dv) =
            (self.checkpoint.size("qk_nope_head_dim"), self.checkpoint.size("v_head_dim"));
        let kl = self.checkpoint.size("kv_lora_rank");
        let weight = self.kv_b_numbers(module); // [h · (dn + dv), kl]
        let mut w_kc = Vec::new();
        let mut w_vc = Vec::new();
        for head in 0..heads {
            let first = head * (dn + dv);
            for k in 0..kl {
                w_kc.extend((0..dn).map(|d| weight[(first + d) * kl + k]));
            }
            for row in first + dn..first + dn + dv {
                w_vc.extend_from_slice(&weight[row * kl..][..kl]);
            }
        }
        let w_kc = Tensor::numbers(&[heads, kl, dn], &w_kc).cast("BF16");
        let w_vc = Tensor::numbers(&[heads, dv, kl], &w_vc).cast("BF16");
        self.put(format!("{target}w_kc"), w_kc);
        self.put(format!("{target}w_vc"), w_vc);
    }

    /// The rank's rows of kv_b as numbers, not yet rounded to BF16.
    fn kv_b_numbers(&self, module: &str) -> Vec<f32> {
        let cut = |suffix: &str| self.stacked(&[Part::new(module, self.rows())], suffix);
        let weight = cut("weight");
        let [rows, width] = weight.matrix();
        let mut out = Vec::new();
        match self.checkpoint.stored(module) {
            // the parameter is what is split, in the model's dtype
            Stored::Bf16 => return weight.cast(self.checkpoint.model_dtype()).floats(),
            Stored::Fp8 => {
                let scale = cut("weight_scale_inv").cast("F32");
                let scales = scale.floats();
                for row in 0..rows {
                    for k in 0..width {
                        let block = (row / 128) * scale.shape[1] + k / 128;
                        out.push(e4m3(weight.bytes[row * width + k]) * scales[block]);
                    }
                }
            }
            Stored::Mxfp4 => {
                let scale = cut("weight_scale");
                for row in 0..rows {
                    for k in 0..2 * width {
                        let byte = weight.bytes[row * width + k / 2];
                        let code = if k % 2 == 0 { byte & 15 } else { byte >> 4 };
                        out.push(e2m1(code) * e8m0(scale.bytes[row * scale.shape[1] + k / 32]));
                    }
                }
            }
            other => panic!("{module} is stored as {}: no split", other.name()),
        }
        out
    }

    /// The scales of the KV cache, where the checkpoint has them (§2.5).
    fn kv_scales(&mut self, source: &str, target: &str) {
        let scale = |name: &str| {
            let name = format!("{source}{name}");
            self.checkpoint.has(&name).then(|| self.checkpoint.scalar(&name))
        };
        let (k, v) = (scale("k_proj.k_scale"), scale("v_proj.v_scale"));
        if k.is_none() && v.is_none() {
            return;
        }
        let (k, v) = match self.options.is_raw() {
            true => (k, v),
            false => {
                // a slot that nothing fills is -1
                let (k, v) = (k.unwrap_or(-1.0), v.unwrap_or(-1.0));
                match (k > 0.0, v > 0.0) {
                    (true, true) => (Some(k), Some(v)),
                    (true, false) => (Some(k), Some(k)),
                    (false, false) => (Some(1.0), Some(1.0)),
                    (false, true) => panic!("{source}v_proj.v_scale without a positive k_scale"),
                }
            }
        };
        for (name, value) in [("k_scale", k), ("v_scale", v)] {
            if let Some(value) = value {
                self.put(format!("{target}{name}"), Tensor::numbers(&[], &[value]));
            }
        }
    }
}
