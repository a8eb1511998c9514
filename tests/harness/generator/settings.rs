//! Dimensions and switches of a checkpoint: defaults by family, preset and scheme, and overrides.

use std::collections::BTreeMap;
use std::io;

use super::json::Json;
use super::{Family, Preset, Scheme, refuse};

/// Every dimension and switch by name.
#[derive(Clone, Debug)]
pub(super) struct Settings(BTreeMap<&'static str, Json>);

impl Settings {
    /// The defaults with the overrides written over them.
    ///
    /// # Errors
    /// An unknown key or style; the text lists the known ones.
    pub(super) fn new(
        family: Family,
        scheme: Scheme,
        preset: Preset,
        overrides: &[(String, Json)],
    ) -> io::Result<Settings> {
        let style = overrides.iter().rev().find(|(key, _)| key == "quant_style");
        let mut settings = Settings::defaults(family, scheme, preset, style.map(|(_, s)| s))?;
        for (key, value) in overrides {
            match settings.0.get_mut(key.as_str()) {
                Some(old) => *old = value.clone(),
                None => {
                    let known: Vec<_> = settings.0.keys().copied().collect();
                    return Err(refuse(format!("unknown key {key}; known: {}", known.join(", "))));
                }
            }
        }
        Ok(settings)
    }

    fn defaults(
        family: Family,
        scheme: Scheme,
        preset: Preset,
        style: Option<&Json>,
    ) -> io::Result<Settings> {
        let mut p = Settings(BTreeMap::new());
        p.update(common());
        if family.is_dense_attention() {
            p.numbers(LLAMA_KEYS, llama_sizes(preset));
            p.update(["tie_word_embeddings", "attention_bias"].map(|key| (key, false.into())));
            p.update(["strip_model_prefix", "lm_head_although_tied"].map(|k| (k, false.into())));
            if family == Family::Qwen3Moe {
                p.numbers(["num_experts", "moe_intermediate_size"], qwen_moe_sizes(preset));
            }
            return Ok(p);
        }
        p.numbers(MLA_KEYS, mla_sizes(preset, scheme));
        p.update(mla_switches());
        p.style(family, scheme, style)?;
        if matches!(family, Family::DeepseekV32 | Family::GlmMoeDsa) {
            let dim = match (preset, scheme) {
                (Preset::Tiny, Scheme::Fp8) => 64,
                (Preset::Odd, Scheme::Fp8) => 40,
                (Preset::Tiny, _) => 32,
                (Preset::Odd, _) => 20,
            };
            p.update([("index_n_heads", 4.into()), ("index_head_dim", dim.into())]);
        }
        match family {
            Family::GlmMoeDsa => p.glm(preset, scheme),
            Family::KimiK2 => p.update([("mtp", 0.into())]),
            Family::KimiK25 => p.kimi_k25(preset),
            _ => {}
        }
        Ok(p)
    }

    fn style(&mut self, family: Family, scheme: Scheme, style: Option<&Json>) -> io::Result<()> {
        let asked = style.filter(|s| s.is_truthy());
        if scheme != Scheme::Nvfp4 {
            return match asked {
                Some(_) => Err(refuse("quant_style needs the scheme nvfp4".into())),
                None => Ok(()),
            };
        }
        let known = family.quant_styles();
        let style = match asked {
            None => known[0],
            Some(Json::Text(s)) if known.contains(&s.as_str()) => s,
            Some(other) => {
                let (name, other) = (family.name(), other.compact());
                let known = known.join(", ");
                return Err(refuse(format!("{name} has no quant_style {other}; known: {known}")));
            }
        };
        self.update([("quant_style", style.into()), ("kv_scales", (style != "v3").into())]);
        Ok(())
    }

    fn glm(&mut self, preset: Preset, scheme: Scheme) {
        const HEADS: [&str; 3] = ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"];
        if preset == Preset::Tiny {
            if scheme == Scheme::Fp8 {
                self.numbers(HEADS, [96, 32, 128]);
                self.update([("num_attention_heads", 8.into())]);
            } else {
                self.numbers(HEADS, [48, 16, 64]);
            }
        }
        self.update([
            ("mxfp4_shared", false.into()),
            ("dtype_key", "dtype".into()),
            ("indexer_norm_dtype", "F32".into()),
            ("mtp_copies", (scheme != Scheme::Nvfp4).into()),
        ]);
    }

    fn kimi_k25(&mut self, preset: Preset) {
        const KEYS: [&str; 5] = [
            "vt_hidden_size",
            "vt_num_attention_heads",
            "vt_num_hidden_layers",
            "vt_intermediate_size",
            "vt_pos_emb",
        ];
        let sizes = match preset {
            Preset::Tiny => [64, 4, 2, 96, 8],
            Preset::Odd => [48, 4, 2, 100, 6],
        };
        self.numbers(KEYS, sizes);
        // one known export leaves out ".model" before ".layers"
        let short = self.text("quant_style") == Some("early");
        self.update([
            ("mtp", 0.into()),
            ("bias_dtype", "BF16".into()),
            ("dtype_key", "dtype".into()),
            ("short_layer_names", short.into()),
        ]);
    }

    fn update<const N: usize>(&mut self, pairs: [(&'static str, Json); N]) {
        self.0.extend(pairs);
    }

    fn numbers<const N: usize>(&mut self, keys: [&'static str; N], values: [i32; N]) {
        self.0.extend(keys.into_iter().zip(values.map(Json::from)));
    }

    /// The value under a key; null where the family has no such key.
    pub(super) fn get(&self, key: &str) -> Json {
        self.0.get(key).cloned().unwrap_or(Json::Null)
    }

    /// A size; null counts as 0.
    ///
    /// # Panics
    /// If an override put something else than a natural number there.
    pub(super) fn size(&self, key: &str) -> usize {
        match self.get(key) {
            Json::Null => 0,
            Json::Bool(value) => value.into(),
            Json::Int(value) => value.try_into().expect("sizes are not negative"),
            other => unreachable!("{key} is no size: {other:?}"),
        }
    }

    /// Whether a switch is on.
    pub(super) fn flag(&self, key: &str) -> bool {
        self.get(key).is_truthy()
    }

    /// A text, or nothing where the value is null.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key) {
            Some(Json::Text(value)) => Some(value),
            _ => None,
        }
    }
}

fn common() -> [(&'static str, Json); 7] {
    [
        ("files", 4.into()),
        ("model_dtype", "bfloat16".into()),
        ("norm_dtype", "BF16".into()),
        ("bias_dtype", Json::Null),
        ("inv_freq", false.into()),
        ("unaligned", false.into()),
        ("dtype_key", "torch_dtype".into()),
    ]
}

fn mla_switches() -> [(&'static str, Json); 19] {
    [
        ("num_hidden_layers", 3.into()),
        ("first_k_dense_replace", 1.into()),
        ("n_shared_experts", 1.into()),
        ("bias_dtype", "F32".into()),
        ("tie_word_embeddings", false.into()),
        ("kv_scales", false.into()),
        ("scalar_shape", 0.into()),
        ("input_scale_pair_differs", false.into()),
        ("nvfp4_attention", false.into()),
        ("int4_linears", false.into()),
        ("mxfp4_shared", true.into()),
        ("mxfp4_kv_b", false.into()),
        ("indexer_norm_dtype", "BF16".into()),
        ("index_n_heads", 0.into()),
        ("index_head_dim", 0.into()),
        ("mtp", 1.into()),
        ("mtp_copies", true.into()),
        ("quant_style", Json::Null),
        ("short_layer_names", false.into()),
    ]
}

const LLAMA_KEYS: [&str; 7] = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
];

fn llama_sizes(preset: Preset) -> [i32; 7] {
    match preset {
        Preset::Tiny => [128, 8, 4, 16, 256, 3, 512],
        Preset::Odd => [200, 8, 2, 24, 136, 3, 1003],
    }
}

fn qwen_moe_sizes(preset: Preset) -> [i32; 2] {
    match preset {
        Preset::Tiny => [8, 128],
        Preset::Odd => [8, 72],
    }
}

const MLA_KEYS: [&str; 11] = [
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "vocab_size",
];

#[rustfmt::skip]
fn mla_sizes(preset: Preset, scheme: Scheme) -> [i32; 11] {
    match (preset, scheme) {
        //                                 H  nh   ql   kl  dn  dr  dv    I   Im  E     V
        (Preset::Tiny, Scheme::Fp8)   => [256,  4, 128, 128, 64, 64, 64, 256, 256, 4,  256],
        (Preset::Odd,  Scheme::Fp8)   => [200, 16, 128,  96, 16, 48, 48, 256, 256, 4, 1003],
        (Preset::Odd,  Scheme::Nvfp4) => [208,  4,  80,  48, 24,  8, 24, 160, 128, 6, 1003],
        (Preset::Tiny, Scheme::Mxfp4) => [256,  4,  64,  64, 32, 16, 32, 256, 512, 4,  256],
        (Preset::Odd,  Scheme::Mxfp4) => [256,  4,  72,  64, 24,  8, 20, 192, 320, 4, 1003],
        (Preset::Odd,  Scheme::Int4)  => [160,  4,  72,  40, 24,  8, 20, 192, 192, 6, 1003],
        (Preset::Odd,  Scheme::Bf16)  => [200,  4,  72,  40, 24,  8, 20, 136,  72, 6, 1003],
        (Preset::Tiny, _)             => [128,  4,  64,  64, 32, 16, 32, 256, 128, 8,  256],
    }
}
