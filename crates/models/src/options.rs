//! What a user chooses of a plan: layout of the kernels, which part of a model, quantisation, strictness.

use std::{fmt, str::FromStr};

use crate::{error::PlanError, quant::Scheme};

/// Which kernels the parameters are finished for (contract §1, `--kernel-layout`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelLayout {
    /// Mapping, fusion and sharding only.
    None,
    /// CUTLASS.
    Cutlass,
    /// CUTLASS as FlashInfer wraps it: up before gate in fused experts.
    FlashinferCutlass,
    /// TensorRT-LLM through FlashInfer: shuffled rows, up before gate.
    Trtllm,
    /// AMD's AITER.
    Aiter,
}

impl KernelLayout {
    /// The name on the command line, in manifest and JSON.
    pub fn name(self) -> &'static str {
        match self {
            KernelLayout::None => "none",
            KernelLayout::Cutlass => "cutlass",
            KernelLayout::FlashinferCutlass => "flashinfer-cutlass",
            KernelLayout::Trtllm => "trtllm",
            KernelLayout::Aiter => "aiter",
        }
    }
}

impl fmt::Display for KernelLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KernelLayout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use KernelLayout::{Aiter, Cutlass, FlashinferCutlass, None, Trtllm};
        [None, Cutlass, FlashinferCutlass, Trtllm, Aiter]
            .into_iter()
            .find(|l| l.name() == text)
            .ok_or_else(|| "one of none, cutlass, flashinfer-cutlass, trtllm, aiter".to_owned())
    }
}

/// A layout that has been checked against the checkpoint's scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// What the parameters end in.
    pub kernels: KernelLayout,
    /// Whether derived parameters are made at all (`false` only for an explicit `none`).
    pub derive: bool,
}

impl Layout {
    /// Settles the user's choice for a checkpoint in `scheme`.
    ///
    /// # Errors
    /// A pair without meaning (contract §4, "which layout means something").
    pub fn resolve(chosen: Option<KernelLayout>, scheme: Scheme) -> Result<Self, PlanError> {
        use KernelLayout::{Aiter, Cutlass, FlashinferCutlass, None as Plain, Trtllm};
        let kernels = match (scheme, chosen) {
            (_, Some(Plain)) => {
                return Ok(Self { kernels: Plain, derive: false });
            }
            (Scheme::Nvfp4, None) => Cutlass,
            (Scheme::Nvfp4, Some(l @ (Cutlass | FlashinferCutlass | Trtllm))) => l,
            (Scheme::Mxfp4, None | Some(Aiter)) => Aiter,
            (_, None) => Plain,
            // the same as no --kernel-layout
            (Scheme::Bf16 | Scheme::Fp8, Some(Cutlass)) => Plain,
            (Scheme::Fp8, Some(FlashinferCutlass)) => Plain,
            (Scheme::Bf16 | Scheme::Fp8, Some(l @ (FlashinferCutlass | Trtllm))) => l,
            (_, Some(l)) => {
                return Err(PlanError::unsupported(
                    format!("--kernel-layout {l}"),
                    format!("the checkpoint is {}", scheme.name()),
                    match scheme {
                        Scheme::Mxfp4 => "one of none, aiter",
                        Scheme::Int4 => "none",
                        _ => "one of none, cutlass, flashinfer-cutlass, trtllm",
                    },
                ));
            }
        };
        Ok(Self { kernels, derive: true })
    }
}

/// What the user says of a checkpoint's quantisation: a method's name, and the scheme that it stands for (contract §1,
/// `--quantization`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    word: &'static str,
    scheme: Scheme,
}

impl Quantization {
    /// Every accepted name. The method names are those of SGLang's option of the same name (reference §1.6), the others
    /// those of `quant` in manifest and JSON.
    const ALL: [Self; 9] = [
        Self { word: "bf16", scheme: Scheme::Bf16 },
        Self { word: "fp8", scheme: Scheme::Fp8 },
        Self { word: "nvfp4", scheme: Scheme::Nvfp4 },
        Self { word: "modelopt_fp4", scheme: Scheme::Nvfp4 },
        Self { word: "modelopt", scheme: Scheme::Nvfp4 },
        Self { word: "mxfp4", scheme: Scheme::Mxfp4 },
        Self { word: "quark", scheme: Scheme::Mxfp4 },
        Self { word: "int4", scheme: Scheme::Int4 },
        Self { word: "compressed-tensors", scheme: Scheme::Int4 },
    ];

    /// The scheme that quantised modules are then stored in.
    pub fn scheme(self) -> Scheme {
        self.scheme
    }
}

/// As the user wrote it.
impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word)
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|q| q.word == text).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|q| q.word).collect();
            format!("one of {}", known.join(", "))
        })
    }
}

/// Which part of a model is loaded, and how strictly.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelOptions {
    /// The layout that the user asked for.
    pub kernel_layout: Option<KernelLayout>,
    /// What the user says of the quantisation; wins over the files.
    pub quantization: Option<Quantization>,
    /// Make the shared expert the last routed expert (§2.4).
    pub fuse_shared_experts: bool,
    /// Load the prediction layer instead of the main model.
    pub draft: bool,
    /// Skip the vision tower.
    pub language_only: bool,
    /// Load only the vision tower.
    pub encoder_only: bool,
    /// Skip tensors that belong to no parameter instead of refusing them.
    pub allow_unknown: bool,
}
