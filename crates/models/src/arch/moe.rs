//! Limits on routed experts.

use crate::{config::Config, error::PlanError};

/// The most experts that are believed (published models have up to 384).
const EXPERTS_MAX: u64 = 4096;

pub(crate) fn check_experts(config: &Config, key: &str, routed: u64) -> Result<(), PlanError> {
    if routed > EXPERTS_MAX {
        return Err(config.wrong(key, "at most 4096"));
    }
    Ok(())
}
