//! Post-processing: runs a finish on the complete parameters of one rank.

use longshore_kernels::host::{
    blocks, mla,
    permute::{gated_shuffled32, shuffled32},
};
use longshore_models::{
    quant::Scheme,
    transform::{ExpertBlocks, Finish, KvScales, MlaSplit, RowOrder},
};

use crate::{error::RankError, params::ParamMemory};

/// Runs `finish`. `workspace` is reused from call to call; it grows to one expert.
///
/// # Safety
/// The finish's inputs are complete, and nothing else reads or writes its inputs and outputs meanwhile (the rank's
/// state machine runs each finish once, when its inputs have landed).
///
/// # Errors
/// A scheme that this transform does not know.
pub(crate) unsafe fn run(
    finish: &Finish,
    memory: &ParamMemory,
    workspace: &mut Vec<u8>,
) -> Result<(), RankError> {
    match finish {
        // SAFETY: passed on from the caller.
        Finish::MlaSplit(split) => unsafe { mla_split(split, memory) },
        Finish::ExpertBlocks(b) => {
            // SAFETY: the caller promises exclusive access.
            unsafe { expert_blocks(b, memory, workspace) };
            Ok(())
        }
        // SAFETY: passed on from the caller.
        Finish::KvScales(scales) => unsafe { kv_scales(scales, memory) },
    }
}

/// # Safety
/// As [`run`].
unsafe fn mla_split(split: &MlaSplit, memory: &ParamMemory) -> Result<(), RankError> {
    let param = &memory.placement().params[split.weight as usize];
    // SAFETY: inputs are complete and outputs untouched by anyone else, says the caller; inputs and outputs are
    // different parameters.
    let (data, scale, w_kc, w_vc) = unsafe {
        (
            memory.bytes(split.weight),
            split.scale.map(|s| memory.bytes(s)),
            memory.bytes_mut(split.w_kc),
            memory.bytes_mut(split.w_vc),
        )
    };
    let weight = match (split.scheme, scale) {
        (Scheme::Bf16, _) => mla::Weight::Plain { data, dtype: param.dtype },
        (Scheme::Fp8, Some(scale)) => mla::Weight::Fp8 { data, scale },
        (Scheme::Mxfp4, Some(scale)) => mla::Weight::Mxfp4 { data, scale },
        (scheme, _) => {
            let what = format!("no MLA split of {}", scheme.name());
            return Err(RankError::Transform { param: param.name.clone(), what });
        }
    };
    let dims = mla::Dims {
        heads: split.heads as usize,
        dn: split.dn as usize,
        dv: split.dv as usize,
        kl: split.kl as usize,
    };
    mla::split(weight, dims, w_kc, w_vc);
    Ok(())
}

/// # Safety
/// As [`run`].
unsafe fn expert_blocks(b: &ExpertBlocks, memory: &ParamMemory, workspace: &mut Vec<u8>) {
    let (rows, row_bytes) = (b.rows as usize, b.row_bytes as usize);
    // SAFETY: the caller promises exclusive access.
    let bytes = unsafe { memory.bytes_mut(b.param) };
    for expert in bytes.chunks_exact_mut(rows * row_bytes).take(b.experts as usize) {
        match b.order {
            RowOrder::Shuffled32 => {
                blocks::into_blocks(expert, rows, row_bytes, shuffled32, workspace);
            }
            RowOrder::GatedShuffled32 => {
                let order = |i| gated_shuffled32(i, rows);
                blocks::into_blocks(expert, rows, row_bytes, order, workspace);
            }
        }
    }
}

/// # Safety
/// As [`run`].
unsafe fn kv_scales(scales: &KvScales, memory: &ParamMemory) -> Result<(), RankError> {
    // SAFETY: the caller promises exclusive access; k and v are different parameters.
    let (k, v) = unsafe { (memory.bytes_mut(scales.k), memory.bytes_mut(scales.v)) };
    let read = |bytes: &[u8]| bytes.first_chunk().map_or(f32::NAN, |b| f32::from_le_bytes(*b));
    let (k_scale, v_scale) = (read(k), if scales.v_given { read(v) } else { -1.0 });
    let (k_scale, v_scale) = match (k_scale > 0.0, v_scale > 0.0) {
        (true, true) => (k_scale, v_scale),
        (true, false) => (k_scale, k_scale),
        (false, false) => (1.0, 1.0),
        (false, true) => {
            return Err(RankError::Values {
                param: memory.placement().params[scales.v as usize].name.clone(),
                reason: format!(
                    "v_scale is {v_scale}, which needs a positive k_scale, found {k_scale}"
                ),
            });
        }
    };
    k.copy_from_slice(&k_scale.to_le_bytes());
    v.copy_from_slice(&v_scale.to_le_bytes());
    Ok(())
}
