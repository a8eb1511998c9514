//! Routed experts and what their kernels want of them.

use crate::{
    config::Config,
    declare::{Declare, experts::Experts},
    dtype::elem_bytes,
    error::PlanError,
    options::KernelLayout,
    quant::Scheme,
    transform::{ExpertBlocks, Finish, RowOrder},
};

/// The most experts that are believed (published models have up to 384).
const EXPERTS_MAX: u64 = 4096;

pub(crate) fn check_experts(config: &Config, key: &str, routed: u64) -> Result<(), PlanError> {
    if routed > EXPERTS_MAX {
        return Err(config.wrong(key, "at most 4096"));
    }
    Ok(())
}

/// Declares the experts of one layer and what is done to them once they are complete.
pub(crate) fn experts(d: &mut Declare<'_>, experts: &Experts) -> Result<(), PlanError> {
    let made = d.experts(experts)?;
    if made.scheme != Scheme::Bf16 || d.layout.kernels != KernelLayout::Trtllm {
        return Ok(());
    }
    // §4g: rows permuted, then 128-byte blocks of columns
    let elem = elem_bytes(d.dtype);
    let block_elems = 128 / elem;
    if experts.hidden % 64 != 0 {
        let found = format!("hidden_size {}", experts.hidden);
        let expected = "a multiple of 64 for --kernel-layout trtllm";
        return Err(PlanError::unsupported(experts.name.clone(), found, expected));
    }
    for (param, rows, cols, order) in [
        (made.w13, 2 * made.inner, experts.hidden, RowOrder::GatedShuffled32),
        (made.w2, experts.hidden, made.inner, RowOrder::Shuffled32),
    ] {
        if rows % 32 != 0 {
            let found = format!("{rows} rows");
            let expected = "a multiple of 32 for --kernel-layout trtllm";
            return Err(PlanError::unsupported(experts.name.clone(), found, expected));
        }
        d.param_mut(param).shape = vec![made.local, cols / block_elems, rows, block_elems];
        d.after(Finish::ExpertBlocks(ExpertBlocks {
            param,
            experts: made.local,
            rows,
            row_bytes: cols * elem,
            order,
        }));
    }
    Ok(())
}
