//! Qwen3, dense: Llama with a norm on each head of q and k. Source: reference §1.5, §2.9.

use crate::{
    arch::{Model, dense},
    declare::Declare,
    error::PlanError,
};

pub(super) fn declare(d: &mut Declare<'_>, model: &Model) -> Result<(), PlanError> {
    dense::decoder(d, model, true)
}
