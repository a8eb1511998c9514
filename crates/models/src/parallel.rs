//! The parallel layout: which ranks hold which part of a tensor.

use crate::error::PlanError;

/// Tensor- and expert-parallel sizes of a group of ranks.
///
/// `moe_tp = tp / ep`; rank `r` is number `r mod moe_tp` of expert group `r div moe_tp`. Source: contract §4,
/// "ranks and experts".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallel {
    tp: u32,
    ep: u32,
}

/// The largest group that is planned for: two more digits than any published deployment.
pub const TP_MAX: u32 = 4096;

impl Parallel {
    /// Makes a layout of `tp` ranks in `ep` expert groups.
    ///
    /// # Errors
    /// `tp` is zero or over [`TP_MAX`], or `ep` does not divide it.
    pub fn new(tp: u32, ep: u32) -> Result<Self, PlanError> {
        if tp == 0 || tp > TP_MAX {
            return Err(PlanError::unsupported(
                "--tp",
                tp.to_string(),
                format!("1 to {TP_MAX} ranks"),
            ));
        }
        if ep == 0 || tp % ep != 0 {
            let found = format!("--ep {ep} with --tp {tp}");
            return Err(PlanError::unsupported("--ep", found, "a divisor of --tp"));
        }
        Ok(Self { tp, ep })
    }

    /// Ranks of the group.
    pub fn tp(&self) -> u32 {
        self.tp
    }

    /// Expert groups.
    pub fn ep(&self) -> u32 {
        self.ep
    }

    /// Ranks that share one expert.
    pub fn moe_tp(&self) -> u32 {
        self.tp / self.ep
    }

    /// The expert group of `rank`.
    pub fn expert_group(&self, rank: u32) -> u32 {
        rank / self.moe_tp()
    }
}

/// Which ranks hold parts of a piece, and which part each holds.
///
/// Ranks `first..first + count` are members; member `r` holds part `((r - first) mod modulo) / rep`.
///
/// ```text
/// column parallel, tp 4:        first 0, count 4, modulo 4, rep 1   parts 0 1 2 3
/// replicated, tp 4:             first 0, count 4, modulo 1, rep 1   parts 0 0 0 0
/// 2 kv heads, tp 4:             first 0, count 4, modulo 4, rep 2   parts 0 0 1 1
/// expert of group 1, ep 2:      first 2, count 2, modulo 2, rep 1   parts - - 0 1
/// fused shared expert, ep 2:    first 0, count 4, modulo 2, rep 1   parts 0 1 0 1
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Members {
    first: u32,
    count: u32,
    modulo: u32,
    rep: u32,
}

impl Members {
    /// Every rank holds everything.
    pub fn replicated(p: Parallel) -> Self {
        Self { first: 0, count: p.tp, modulo: 1, rep: 1 }
    }

    /// Every rank holds a part of its own; `rep` neighbours share one.
    pub fn split(p: Parallel, rep: u32) -> Self {
        Self { first: 0, count: p.tp, modulo: p.tp, rep }
    }

    /// The ranks of one expert group, each with its own part.
    pub fn expert_group(p: Parallel, group: u32) -> Self {
        Self { first: group * p.moe_tp(), count: p.moe_tp(), modulo: p.moe_tp(), rep: 1 }
    }

    /// Every rank, cut as an expert of its own group is.
    pub fn every_group(p: Parallel) -> Self {
        Self { first: 0, count: p.tp, modulo: p.moe_tp(), rep: 1 }
    }

    /// The same ranks, each holding everything.
    pub fn whole(self) -> Self {
        Self { modulo: 1, rep: 1, ..self }
    }

    /// The part that `rank` holds; `None` when it is no member.
    pub fn part(&self, rank: u32) -> Option<u32> {
        let at = rank.checked_sub(self.first).filter(|&at| at < self.count)?;
        Some(at % self.modulo / self.rep)
    }

    /// The member ranks.
    pub fn ranks(&self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }

    /// The member ranks that hold `part`, in order.
    pub fn holders(&self, part: u32) -> impl Iterator<Item = u32> + Clone + use<> {
        let Self { first, count, modulo, rep } = *self;
        let rounds = (0..count).step_by(modulo.max(1) as usize);
        let held = move |round: u32| round + part * rep..round + (part + 1) * rep;
        rounds.flat_map(held).filter(move |&at| at < count).map(move |at| first + at)
    }

    /// Number of different parts.
    pub fn parts(&self) -> u32 {
        self.modulo / self.rep
    }

    /// Whether no two ranks hold the same part.
    pub fn is_exclusive(&self) -> bool {
        self.parts() == self.count
    }

    /// How many ranks hold each part.
    pub fn copies(&self) -> u32 {
        self.count / self.parts()
    }

    /// The only member, when there is just one.
    pub fn sole(&self) -> Option<u32> {
        (self.count == 1).then_some(self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(m: Members, tp: u32) -> Vec<Option<u32>> {
        (0..tp).map(|r| m.part(r)).collect()
    }

    /// The table in the doc of [`Members`].
    #[test]
    fn parts_follow_the_documented_table() {
        let p = Parallel::new(4, 2).unwrap();
        assert_eq!(parts(Members::split(p, 1), 4), [Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!(parts(Members::replicated(p), 4), [Some(0); 4]);
        assert_eq!(parts(Members::split(p, 2), 4), [Some(0), Some(0), Some(1), Some(1)]);
        assert_eq!(parts(Members::expert_group(p, 1), 4), [None, None, Some(0), Some(1)]);
        assert_eq!(parts(Members::every_group(p), 4), [Some(0), Some(1), Some(0), Some(1)]);
        assert!(Members::split(p, 1).is_exclusive());
        assert!(!Members::split(p, 2).is_exclusive());
        assert_eq!(Members::every_group(p).copies(), 2);
    }

    #[test]
    fn holders_of_a_part_are_the_members_that_hold_it() {
        let p = Parallel::new(8, 2).unwrap();
        let members = [
            Members::split(p, 1),
            Members::split(p, 2),
            Members::replicated(p),
            Members::expert_group(p, 1),
            Members::every_group(p),
            Members::every_group(p).whole(),
        ];
        for m in members {
            for part in 0..m.parts() {
                let want: Vec<u32> = m.ranks().filter(|&r| m.part(r) == Some(part)).collect();
                assert_eq!(m.holders(part).collect::<Vec<u32>>(), want, "{m:?} {part}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_divide_are_refused() {
        assert!(Parallel::new(0, 1).is_err());
        assert!(Parallel::new(4, 3).is_err());
        assert!(Parallel::new(5000, 1).is_err());
    }
}
