//! Values from values: the MLA split and scalars.

use longshore_models::Dtype;

use crate::{
    cuda::{
        driver::CudaError,
        mla::{self, Bf16, F16, F32, Fp8, Mxfp4},
        scalars::{Experts, KvScales, Linear, ONE},
    },
    host::mla::Dims,
};

use super::{Checks, Launch};

/// A weight in device memory that is split; twin of [`crate::host::mla::Weight`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlaWeight {
    /// BF16, F16 or F32 elements.
    Plain {
        /// The elements, aligned.
        data: u64,
        /// Their type.
        dtype: Dtype,
    },
    /// E4M3 elements with one F32 factor per 128×128 block; edge blocks are partial.
    Fp8 {
        /// `[rows, cols]` codes.
        data: u64,
        /// `[ceil(rows/128), ceil(cols/128)]` factors, aligned.
        scale: u64,
    },
    /// E2M1 pairs (low nibble first) with one E8M0 factor per 32 elements.
    Mxfp4 {
        /// `[rows, cols/2]` pairs.
        data: u64,
        /// `[rows, cols/32]` factors.
        scale: u64,
    },
}

/// Splits `kv_b_proj` `[heads·(dn+dv), kl]` by head into `w_kc` `[heads, kl, dn]` and `w_vc` `[heads, dv, kl]`, both
/// BF16.
///
/// # Safety
/// All is device memory of the shapes that `dims` say, the results apart from the weight; nobody else writes to the
/// weight, or reads or writes the results, until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when elements are not aligned, a plain weight has another type, or MXFP4 columns are not whole
/// groups of 32; or what the driver says.
pub unsafe fn mla_split(
    on: &impl Launch,
    weight: MlaWeight,
    dims: Dims,
    w_kc: u64,
    w_vc: u64,
) -> Result<(), CudaError> {
    let of = Checks(match weight {
        MlaWeight::Plain { dtype: Dtype::F32, .. } => &F32::ENTRY,
        MlaWeight::Plain { dtype: Dtype::F16, .. } => &F16::ENTRY,
        MlaWeight::Plain { .. } => &Bf16::ENTRY,
        MlaWeight::Fp8 { .. } => &Fp8::ENTRY,
        MlaWeight::Mxfp4 { .. } => &Mxfp4::ENTRY,
    });
    let Dims { heads, dn, dv, kl } = dims;
    let heads = of.dimension("heads", heads as u64)?;
    let dn = of.dimension("key rows", dn as u64)?;
    let dv = of.dimension("value rows", dv as u64)?;
    let kl = of.dimension("columns", kl as u64)?;
    if heads == 0 || dn + dv == 0 || kl == 0 {
        return Ok(());
    }
    of.aligned("w_kc", w_kc, 2)?;
    of.aligned("w_vc", w_vc, 2)?;
    let grid = mla::grid(dims, on.geometry());
    match weight {
        MlaWeight::Plain { data, dtype: Dtype::BF16 } => {
            of.aligned("the weight", data, 2)?;
            // SAFETY: passed on from the caller.
            unsafe { on.launch(&Bf16 { data, w_kc, w_vc, heads, dn, dv, kl }, grid) }
        }
        MlaWeight::Plain { data, dtype: Dtype::F16 } => {
            of.aligned("the weight", data, 2)?;
            // SAFETY: passed on from the caller.
            unsafe { on.launch(&F16 { data, w_kc, w_vc, heads, dn, dv, kl }, grid) }
        }
        MlaWeight::Plain { data, dtype: Dtype::F32 } => {
            of.aligned("the weight", data, 4)?;
            // SAFETY: passed on from the caller.
            unsafe { on.launch(&F32 { data, w_kc, w_vc, heads, dn, dv, kl }, grid) }
        }
        MlaWeight::Plain { dtype, .. } => of.refused(format!("a weight of {dtype}")),
        MlaWeight::Fp8 { data, scale } => {
            of.aligned("the scale", scale, 4)?;
            // SAFETY: passed on from the caller.
            unsafe { on.launch(&Fp8 { data, scale, w_kc, w_vc, heads, dn, dv, kl }, grid) }
        }
        MlaWeight::Mxfp4 { data, scale } => {
            of.whole("columns", u64::from(kl), 32)?;
            // SAFETY: passed on from the caller.
            unsafe { on.launch(&Mxfp4 { data, scale, w_kc, w_vc, heads, dn, dv, kl }, grid) }
        }
    }
}

/// `alpha` and `input_scale_inv` of a linear layer.
///
/// # Safety
/// The addresses are device memory of as many F32 as the kernel's fields say, results apart from inputs; nobody else
/// writes to the inputs, or reads or writes the results, until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when one of them is not aligned, or what the driver says.
pub unsafe fn linear_scalars(on: &impl Launch, kernel: &Linear) -> Result<(), CudaError> {
    let Linear { scale_2, input_scale, alpha, inverse_input, .. } = *kernel;
    floats(
        &[
            ("weight_scale_2", scale_2),
            ("input_scale", input_scale),
            ("alpha", alpha),
            ("input_scale_inv", inverse_input),
        ],
        Checks(&Linear::ENTRY),
    )?;
    // SAFETY: passed on from the caller.
    unsafe { on.launch(kernel, ONE) }
}

/// The scalars of the experts of one layer on one rank.
///
/// # Safety
/// As [`linear_scalars`].
///
/// # Errors
/// [`CudaError::Launch`] when one of them is not aligned, the rank has experts that the model has not, or maxima are
/// not wanted for all slots or for one; or what the driver says.
pub unsafe fn expert_scalars(on: &impl Launch, kernel: &Experts) -> Result<(), CudaError> {
    let of = Checks(&Experts::ENTRY);
    let k = kernel;
    floats(
        &[
            ("w13_weight_scale_2", k.w13_scale_2),
            ("w2_weight_scale_2", k.w2_scale_2),
            ("w13_input_scale", k.w13_input),
            ("w2_input_scale", k.w2_input),
            ("g1_alphas", k.g1_alphas),
            ("g2_alphas", k.g2_alphas),
            ("w13_input_scale_quant", k.w13_quant),
            ("w2_input_scale_quant", k.w2_quant),
            ("g1_scale_c", k.g1_scale_c),
        ],
        of,
    )?;
    of.dimension("experts", u64::from(k.experts))?;
    of.dimension("slots", u64::from(k.slots))?;
    let routed = k.slots.min(k.per_group);
    let fused = k.slots - routed;
    let ends = [(routed, k.first_expert), (fused, k.routed)];
    let beyond = |(count, first): (u32, u32)| {
        count > 0 && u64::from(first) + u64::from(count) > u64::from(k.experts)
    };
    if k.per_expert != 0 && ends.into_iter().any(beyond) {
        return of.refused(format!("a rank with experts beyond the model's {}", k.experts));
    }
    let quants = if k.per_expert != 0 { k.slots } else { 1 };
    if k.quants != quants {
        return of.refused(format!("{} quantisation scales instead of {quants}", k.quants));
    }
    if k.slots == 0 {
        return Ok(());
    }
    // SAFETY: passed on from the caller.
    unsafe { on.launch(kernel, kernel.grid()) }
}

/// Settles a pair of KV-cache scales. `refused` is zeroed by the caller ([`crate::cuda::driver::Stream::fill`]) and
/// becomes 1 where the pair contradicts itself, which then is as it was; several pairs can share it.
///
/// # Safety
/// The addresses are device memory of an F32 or a U32 each; nobody else reads or writes them until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when one of them is not aligned, or what the driver says.
pub unsafe fn kv_scales(on: &impl Launch, kernel: &KvScales) -> Result<(), CudaError> {
    let KvScales { k, v, refused, .. } = *kernel;
    floats(&[("k_scale", k), ("v_scale", v), ("the outcome", refused)], Checks(&KvScales::ENTRY))?;
    // SAFETY: passed on from the caller.
    unsafe { on.launch(kernel, ONE) }
}

/// That all of them are where words can be.
fn floats(addresses: &[(&str, u64)], of: Checks) -> Result<(), CudaError> {
    addresses.iter().try_for_each(|(what, address)| of.aligned(what, *address, 4))
}
