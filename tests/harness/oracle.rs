//! What every rank must hold after a load, computed the slow way.
//!
//! An independent reader: it opens the files with the `safetensors` crate, keeps whole tensors in
//! memory, and cuts, joins and permutes them by plain loops, straight from the formulas of the
//! published formats and runtimes. It plans nothing, shares nothing with the loader under test, and
//! is only as fast as small checkpoints need. Section numbers (§) are those of the reference on
//! model loading.
//!
//! | module | what it knows |
//! |---|---|
//! | `checkpoint` | files, names, how a module is stored |
//! | `refusal` | what must be refused rather than loaded |
//! | `decoder`, `attention`, `experts`, `vision` | which parameters a model has |
//! | `linear`, `nvfp4` | how one linear layer is sharded and finished |
//! | `permute`, `numbers`, `tensor` | permutations, number formats, cutting and joining |

mod attention;
mod build;
mod checkpoint;
mod decoder;
mod experts;
mod linear;
mod numbers;
mod nvfp4;
mod options;
mod permute;
mod refusal;
mod tensor;
mod vision;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use self::build::Builder;
use self::checkpoint::{Checkpoint, Stored};
use self::options::Layout;
pub use self::options::Options;
use self::tensor::Tensor;

/// One parameter of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Dtype in safetensors spelling.
    pub dtype: String,
    /// Shape on this rank.
    pub shape: Vec<u64>,
    /// The final bytes.
    pub bytes: Vec<u8>,
}

/// What one rank holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rank {
    /// Parameters with bytes of their own, by runtime name.
    pub parameters: BTreeMap<String, Param>,
    /// Derived name to the source whose bytes it shares.
    pub aliases: BTreeMap<String, String>,
}

/// What all ranks hold, and what the manifest says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The model's family, as in manifests.
    pub family: String,
    /// The declared quantisation, as in manifests.
    pub quant: String,
    /// The effective kernel layout, as in manifests.
    pub kernel_layout: String,
    /// `--tp`
    pub tp: usize,
    /// `--ep`
    pub ep: usize,
    /// One entry per rank.
    pub ranks: Vec<Rank>,
    /// Tensors, by their names in the files, that this load does not look at.
    pub skipped: BTreeSet<String>,
}

/// Computes what every rank must hold after a load of `directory` with these options.
///
/// # Errors
/// The reason, where the contract says that the load is refused because of its options or shapes.
///
/// # Panics
/// If the checkpoint itself is broken: a missing tensor, a file that cannot be read.
pub fn answer(directory: &Path, options: &Options) -> Result<Answer, String> {
    let checkpoint = Checkpoint::read(directory);
    refusal::check(&checkpoint, options)?;
    let layout = options.effective_layout(checkpoint.declared);
    let ranks = (0..options.tp).map(|rank| {
        let mut text = Builder::new(&checkpoint, options, layout, rank);
        if !options.encoder_only {
            text.decoder();
        }
        let mut whole = text.finish(decoder::prefix(&checkpoint));
        if vision::is_loaded(&checkpoint, options) {
            let mut tower = Builder::new(&checkpoint, options, layout, rank);
            tower.vision();
            whole.parameters.extend(tower.finish("").parameters);
        }
        whole
    });
    Ok(Answer {
        ranks: ranks.collect(),
        family: decoder::family(&checkpoint).to_owned(),
        quant: checkpoint.declared.name().to_owned(),
        kernel_layout: manifest_layout(layout, checkpoint.declared).to_owned(),
        tp: options.tp,
        ep: options.ep,
        skipped: checkpoint.unused(),
    })
}

/// For BF16 and FP8 `cutlass` is the same as no layout, for FP8 `flashinfer-cutlass` too.
fn manifest_layout(layout: Layout, declared: Stored) -> &'static str {
    match (declared, layout) {
        (Stored::Bf16 | Stored::Fp8, Layout::Cutlass) => "none",
        (Stored::Fp8, Layout::FlashinferCutlass) => "none",
        _ => layout.name(),
    }
}

impl From<Tensor> for Param {
    fn from(tensor: Tensor) -> Param {
        let shape = tensor.shape.iter().map(|d| *d as u64).collect();
        Param { dtype: tensor.dtype, shape, bytes: tensor.bytes }
    }
}
