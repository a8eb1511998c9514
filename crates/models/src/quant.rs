//! Quantisation: which tensors a module of each scheme is stored in, and what the files and the user say of a checkpoint.
//!
//! | question | module |
//! |---|---|
//! | which files declare something, do they agree, what does the user say | [`Declared`] |
//! | what one declaration means, and whether it is supported | `block`, `method` |
//! | which modules a list excepts | [`Exclude`], over `patterns` |

mod block;
mod declared;
mod exclude;
mod method;
mod patterns;

pub use self::{declared::Declared, exclude::Exclude};

use crate::dtype::Dtype;

/// How a module's weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scheme {
    /// Unquantised floats (BF16 in every published checkpoint).
    Bf16,
    /// F8_E4M3 with one F32 scale per 128×128 block.
    Fp8,
    /// ModelOpt NVFP4: E2M1 pairs, E4M3 scale per 16, two per-tensor F32 scalars.
    Nvfp4,
    /// Quark MXFP4: E2M1 pairs, E8M0 scale per 32.
    Mxfp4,
    /// compressed-tensors pack-quantized: eight 4-bit codes per I32, BF16 scale per 32.
    Int4,
}

impl Scheme {
    /// The name used in manifest and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Bf16 => "bf16",
            Scheme::Fp8 => "fp8",
            Scheme::Nvfp4 => "nvfp4",
            Scheme::Mxfp4 => "mxfp4",
            Scheme::Int4 => "int4",
        }
    }

    /// Elements of K that share a scale; a row-parallel share must be whole groups (contract §4, "refused").
    pub fn k_group(self) -> u64 {
        match self {
            Scheme::Bf16 => 1,
            Scheme::Fp8 => 128,
            Scheme::Nvfp4 => 16,
            Scheme::Mxfp4 | Scheme::Int4 => 32,
        }
    }

    /// The tensors of a module `X` with weight `[N, K]`.
    ///
    /// **Shapes**: `matrix` tensors are `[ceil(N / row_unit), ceil(K / col_unit)]`. Source: reference §1.3.
    pub fn stored(self) -> &'static [Stored] {
        use Content::{Matrix, Scalar, Shape};
        use Dtype::{BF16, F8_E4M3, F32, I32, I64, U8};
        const fn row(suffix: &'static str, dtype: Dtype, content: Content, float: bool) -> Stored {
            Stored { suffix, dtype, content, float }
        }
        const fn matrix(row_unit: u64, col_unit: u64) -> Content {
            Matrix { row_unit, col_unit }
        }
        match self {
            // the dtype of an unquantised weight is the model's own, given by the caller
            Scheme::Bf16 => const { &[row("weight", BF16, matrix(1, 1), true)] },
            Scheme::Fp8 => {
                const {
                    &[
                        row("weight", F8_E4M3, matrix(1, 1), false),
                        row("weight_scale_inv", F32, matrix(128, 128), true),
                    ]
                }
            }
            Scheme::Nvfp4 => {
                const {
                    &[
                        row("weight", U8, matrix(1, 2), false),
                        row("weight_scale", F8_E4M3, matrix(1, 16), false),
                        row("weight_scale_2", F32, Scalar, true),
                        row("input_scale", F32, Scalar, true),
                    ]
                }
            }
            Scheme::Mxfp4 => {
                const {
                    &[
                        row("weight", U8, matrix(1, 2), false),
                        row("weight_scale", U8, matrix(1, 32), false),
                    ]
                }
            }
            Scheme::Int4 => {
                const {
                    &[
                        row("weight_packed", I32, matrix(1, 8), false),
                        row("weight_scale", BF16, matrix(1, 32), true),
                        row("weight_shape", I64, Shape, false),
                    ]
                }
            }
        }
    }
}

/// One tensor of a stored module.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    /// What follows the module's name and a dot.
    pub suffix: &'static str,
    /// The parameter's dtype.
    pub dtype: Dtype,
    /// What it holds.
    pub content: Content,
    /// Whether any float in the file is accepted and converted to `dtype`.
    pub float: bool,
}

impl Stored {
    /// Whether this is the block scale that goes with the weight.
    pub fn is_scale(&self) -> bool {
        matches!(self.content, Content::Matrix { .. }) && self.suffix.starts_with("weight_scale")
    }
}

/// What a stored tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A matrix that follows the weight's rows and columns.
    Matrix {
        /// Rows of the weight per row of this tensor.
        row_unit: u64,
        /// Elements of K per element of this tensor.
        col_unit: u64,
    },
    /// One number for the module, `[]` or `[1]` in the file.
    Scalar,
    /// The weight's own shape, `[2]`.
    Shape,
}
