//! Which models can be generated: families, schemes, presets and published quantisation styles.

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &[$name] = &[$($name::$variant,)*];

            /// The name used in files of cases and on command lines.
            pub fn name(self) -> &'static str {
                match self {
                    $($name::$variant => $text,)*
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::io::Error;

            fn from_str(text: &str) -> std::io::Result<$name> {
                $name::ALL.iter().copied().find(|x| x.name() == text).ok_or_else(|| {
                    let known: Vec<_> = $name::ALL.iter().map(|x| x.name()).collect();
                    $crate::generator::refuse(format!("no {} {text}; known: {}", stringify!($name), known.join(", ")))
                })
            }
        }
    };
}
pub(super) use named_enum;

named_enum! {
    /// A family of models: architecture, tensor names and configuration keys.
    Family {
        /// `LlamaForCausalLM`
        Llama = "llama",
        /// `Qwen3ForCausalLM`
        Qwen3 = "qwen3",
        /// `Qwen3MoeForCausalLM`
        Qwen3Moe = "qwen3_moe",
        /// `DeepseekV3ForCausalLM`
        DeepseekV3 = "deepseek_v3",
        /// `DeepseekV32ForCausalLM`: with an indexer
        DeepseekV32 = "deepseek_v32",
        /// `DeepseekV3ForCausalLM` under the model type `kimi_k2`
        KimiK2 = "kimi_k2",
        /// `KimiK25ForConditionalGeneration`: a vision tower around a DeepSeek text model
        KimiK25 = "kimi_k25",
        /// `GlmMoeDsaForCausalLM`: with an indexer
        GlmMoeDsa = "glm_moe_dsa",
    }
}

named_enum! {
    /// How the quantised layers are stored.
    Scheme {
        /// Nothing is quantised.
        Bf16 = "bf16",
        /// F8_E4M3 with an F32 scale per block of 128 x 128.
        Fp8 = "fp8",
        /// ModelOpt NVFP4: two e2m1 codes per byte, an F8_E4M3 scale per 16, two scalars.
        Nvfp4 = "nvfp4",
        /// Quark MXFP4: two e2m1 codes per byte, an E8M0 scale per 32.
        Mxfp4 = "mxfp4",
        /// compressed-tensors INT4: eight codes per I32, a BF16 scale per 32.
        Int4 = "int4",
    }
}

named_enum! {
    /// A set of dimensions.
    Preset {
        /// Shapes for which every alias holds at two ranks.
        Tiny = "tiny",
        /// Partial blocks, a vocabulary that is no multiple of 64, fewer kv heads than ranks.
        Odd = "odd",
    }
}

impl Family {
    /// The schemes that the family is published in.
    pub fn schemes(self) -> &'static [Scheme] {
        use Scheme::{Bf16, Fp8, Int4, Mxfp4, Nvfp4};
        match self {
            Family::Llama | Family::Qwen3 | Family::Qwen3Moe => &[Bf16],
            Family::DeepseekV3 => &[Bf16, Fp8, Nvfp4],
            Family::DeepseekV32 => &[Bf16, Fp8],
            Family::KimiK2 => &[Fp8],
            Family::KimiK25 => &[Bf16, Int4, Nvfp4, Mxfp4],
            Family::GlmMoeDsa => &[Bf16, Fp8, Nvfp4, Mxfp4],
        }
    }

    /// How published NVFP4 checkpoints of the family declare their quantisation; the first is the
    /// default.
    pub fn quant_styles(self) -> &'static [&'static str] {
        match self {
            Family::DeepseekV3 => &["v3", "v31"],
            Family::KimiK25 => &["early", "k25", "k26"],
            Family::GlmMoeDsa => &["glm5"],
            _ => &[],
        }
    }

    /// Whether it is one of Llama, Qwen3 and Qwen3-MoE, and not of the MLA kind.
    pub(super) fn is_dense_attention(self) -> bool {
        matches!(self, Family::Llama | Family::Qwen3 | Family::Qwen3Moe)
    }
}
