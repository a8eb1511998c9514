//! Who lives but does not get on. Pure: counters and a clock in, a rank out.
//!
//! A rank is stuck when it has work in hand and has done nothing for too long. A rank that waits for others is not; only when
//! nobody gets on and nobody has work in hand is the first unfinished one named, since something must be wrong with it.

use std::time::{Duration, Instant};

/// What is known of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Watched {
    /// Counts what it has done.
    pub(crate) steps: u64,
    /// Whether it has work in hand.
    pub(crate) busy: bool,
    /// Whether it has nothing left to do.
    pub(crate) ready: bool,
    /// What it is doing.
    pub(crate) phase: &'static str,
    /// Weight bytes that it has read from storage.
    pub(crate) read_bytes: u64,
}

/// When each rank was last seen to get on.
#[derive(Debug)]
pub(crate) struct Stuck {
    after: Duration,
    seen: Vec<(u64, Instant)>,
}

impl Stuck {
    /// Nobody is stuck before `after` has passed since `now`.
    pub(crate) fn new(ranks: usize, after: Duration, now: Instant) -> Self {
        Self { after, seen: vec![(0, now); ranks] }
    }

    /// The first rank that is stuck at `now`, if any is.
    pub(crate) fn look(&mut self, ranks: &[Watched], now: Instant) -> Option<u32> {
        for (seen, rank) in self.seen.iter_mut().zip(ranks) {
            if rank.steps != seen.0 {
                *seen = (rank.steps, now);
            }
        }
        let still = |i: &usize| now.duration_since(self.seen[*i].1) >= self.after;
        let busy = (0..ranks.len()).find(|i| !ranks[*i].ready && ranks[*i].busy && still(i));
        let nobody = (0..ranks.len()).all(|i| still(&i));
        let first = (0..ranks.len()).find(|&i| !ranks[i].ready);
        busy.or(first.filter(|_| nobody)).map(|i| i as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(10);

    fn rank(steps: u64, busy: bool) -> Watched {
        Watched { steps, busy, ready: false, phase: "reading", read_bytes: 0 }
    }

    #[test]
    fn the_rank_with_work_in_hand_is_named_not_the_one_that_waits_for_it() {
        let start = Instant::now();
        let mut stuck = Stuck::new(2, AFTER, start);
        assert_eq!(stuck.look(&[rank(5, true), rank(5, true)], start), None);
        let later = start + AFTER;
        assert_eq!(stuck.look(&[rank(5, false), rank(5, true)], later), Some(1));
        assert_eq!(stuck.look(&[rank(6, true), rank(5, false)], later), None);
    }

    #[test]
    fn when_nobody_gets_on_the_first_unfinished_one_is_named() {
        let start = Instant::now();
        let mut stuck = Stuck::new(3, AFTER, start);
        let ready = Watched { ready: true, ..rank(0, false) };
        let later = start + AFTER;
        assert_eq!(stuck.look(&[ready, rank(0, false), rank(0, false)], later), Some(1));
        assert_eq!(stuck.look(&[ready, rank(0, false), rank(1, false)], later), None);
        assert_eq!(stuck.look(&[ready; 3], later + AFTER), None, "all are done");
    }
}
