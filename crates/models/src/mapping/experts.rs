//! Experts in names: which one a module belongs to, and which of them a rank holds. Source: reference §2.4, §3.5.

use std::ops::Range;

use crate::error::PlanError;

const ROUTED: &str = ".mlp.experts.";
const SHARED: &str = ".mlp.shared_experts.";

/// The experts of a model.
#[derive(Debug, Clone)]
pub(super) struct Experts {
    /// Routed experts, E.
    routed: u64,
    /// Whether the shared expert is expert E.
    fused: bool,
    /// Groups of ranks that the routed ones are shared out over.
    ep: u32,
}

/// What [`Experts::split`] found.
pub(super) enum Split {
    /// The module belongs to no expert.
    NoExpert,
    /// The module with `*` in place of the expert.
    Expert {
        /// The module.
        module: String,
        /// The expert.
        expert: u64,
    },
    /// The module names an expert that the model does not have.
    Unknown,
}

impl Experts {
    pub(super) fn new(routed: u64, fused: bool, ep: u32) -> Result<Self, PlanError> {
        if ep == 0 || routed % u64::from(ep) != 0 {
            let found = format!("{routed} experts, ep {ep}");
            return Err(PlanError::unsupported("--ep", found, "ep must divide the experts"));
        }
        Ok(Self { routed, fused, ep })
    }

    pub(super) fn ep(&self) -> u32 {
        self.ep
    }

    /// Takes the expert out of a module's name.
    pub(super) fn split(&self, module: &str) -> Split {
        if self.fused
            && let Some((layer, projection)) = module.split_once(SHARED)
        {
            let module = format!("{layer}{ROUTED}*.{projection}");
            return Split::Expert { module, expert: self.routed };
        }
        let Some((layer, rest)) = module.split_once(ROUTED) else {
            return Split::NoExpert;
        };
        let known = rest.split_once('.').and_then(|(expert, projection)| {
            let expert = number(expert).filter(|&e| e < self.routed)?;
            Some(Split::Expert { module: format!("{layer}{ROUTED}*.{projection}"), expert })
        });
        known.unwrap_or(Split::Unknown)
    }

    /// The module of expert `e` in the checkpoint; `module` has `*` in place of the expert.
    pub(super) fn source(&self, module: &str, e: u64) -> String {
        match module.split_once("experts.*.") {
            Some((layer, projection)) if e < self.routed => {
                format!("{layer}experts.{e}.{projection}")
            }
            Some((layer, projection)) => format!("{layer}shared_experts.{projection}"),
            None => module.to_owned(),
        }
    }

    /// How many experts of a parameter with this suffix one rank holds.
    pub(super) fn held(&self, suffix: &str) -> u64 {
        let routed = self.routed_on(suffix, 0);
        routed.end - routed.start + u64::from(self.fused)
    }

    /// The experts of a parameter with this suffix that ranks of group `ep_rank` hold, in the order of their slots.
    pub(super) fn on(&self, suffix: &str, ep_rank: u32) -> impl Iterator<Item = u64> {
        let fused = self.fused && ep_rank < self.ep;
        self.routed_on(suffix, ep_rank).chain(fused.then_some(self.routed))
    }

    /// Whether ranks of group `ep_rank` hold expert `e` of a parameter with this suffix.
    pub(super) fn holds(&self, suffix: &str, ep_rank: u32, e: u64) -> bool {
        let fused = self.fused && ep_rank < self.ep && e == self.routed;
        fused || self.routed_on(suffix, ep_rank).contains(&e)
    }

    fn routed_on(&self, suffix: &str, ep_rank: u32) -> Range<u64> {
        if ep_rank >= self.ep {
            return 0..0;
        }
        // the kernels want the largest of all experts' input scales (§3.5)
        if suffix == "input_scale" {
            return 0..self.routed;
        }
        let (per_group, group) = (self.routed / u64::from(self.ep), u64::from(ep_rank));
        group * per_group..(group + 1) * per_group
    }
}

/// A number as names spell it: no sign, no leading zero.
fn number(text: &str) -> Option<u64> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}
