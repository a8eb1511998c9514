//! What a user chooses of a plan: layout of the kernels, which part of a model, strictness.

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

/// Which part of a model is loaded, and how strictly.
#[derive(Debug, Clone, Copy, Default)]
pub struct ModelOptions {
    /// The layout that the user asked for.
    pub kernel_layout: Option<KernelLayout>,
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
