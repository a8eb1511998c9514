//! Staging memory by the byte: what is in use, what is kept for the next batch, and that both stay within the limit.

use std::sync::Arc;

use crate::{error::RankError, region::Region};

/// The staging memory of a stream.
#[derive(Debug, Default)]
pub(super) struct Budget {
    pub(super) limit: u64,
    /// Bytes that batches pay for: being read, waiting, or handed out.
    pub(super) leased: u64,
    /// Memory of earlier batches, resident: a read into it is 1.5 times as fast as one into fresh pages ([`Region`]).
    kept: Vec<Arc<Region>>,
    kept_bytes: u64,
    peak: u64,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Whether a batch of `bytes` may begin.
    pub(super) fn admits(&self, bytes: u64) -> bool {
        self.leased + bytes <= self.limit
    }

    /// Memory for a batch of `bytes`, kept or new; it pays for the whole region. To be called for what is admitted.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub(super) fn lease(&mut self, bytes: u64) -> Result<Arc<Region>, RankError> {
        let region = match self.best_kept(bytes) {
            Some(i) => {
                let region = self.kept.swap_remove(i);
                self.kept_bytes -= region.len() as u64;
                region
            }
            None => {
                while self.held() + bytes > self.limit
                    && let Some(oldest) = self.kept.first()
                {
                    self.kept_bytes -= oldest.len() as u64;
                    self.kept.remove(0);
                }
                Arc::new(Region::new("staging", bytes as usize)?)
            }
        };
        self.leased += region.len() as u64;
        self.peak = self.peak.max(self.held());
        Ok(region)
    }

    /// The smallest kept region that serves without wasting more than it holds.
    fn best_kept(&self, bytes: u64) -> Option<usize> {
        let serves = |len: u64| (bytes..=2 * bytes).contains(&len);
        let sizes = self.kept.iter().map(|r| r.len() as u64).enumerate();
        sizes.filter(|&(_, len)| serves(len)).min_by_key(|&(_, len)| len).map(|(i, _)| i)
    }

    /// Takes `bytes` back that a batch no longer pays for.
    pub(super) fn refund(&mut self, bytes: u64) {
        self.leased -= bytes;
    }

    /// Takes a whole region back, to lend it again.
    pub(super) fn keep(&mut self, region: Arc<Region>) {
        let bytes = region.len() as u64;
        self.leased -= bytes;
        self.kept_bytes += bytes;
        self.kept.push(region);
    }

    /// Gives to the system what no batch uses.
    pub(super) fn release_kept(&mut self) {
        self.kept.clear();
        self.kept_bytes = 0;
    }

    /// Bytes that exist, leased or kept.
    pub(super) fn held(&self) -> u64 {
        self.leased + self.kept_bytes
    }

    /// The most bytes that existed at a time.
    pub(super) fn peak(&self) -> u64 {
        self.peak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RNK-3.
    #[test]
    fn kept_memory_is_lent_again_and_makes_room_for_other_sizes() {
        let mut budget = Budget::new(100 << 10);
        let (a, b) = (budget.lease(40 << 10).unwrap(), budget.lease(60 << 10).unwrap());
        assert!(!budget.admits(1) && budget.held() == 100 << 10);
        let address = a.at(0, 1);
        budget.keep(a);
        budget.refund(b.len() as u64);
        // neither too small nor wasteful: the same again
        let a = budget.lease(30 << 10).unwrap();
        assert_eq!((a.at(0, 1), budget.held()), (address, 40 << 10));
        budget.keep(a);
        let whole = budget.lease(100 << 10).unwrap();
        assert_eq!((budget.held(), budget.peak()), (100 << 10, 100 << 10));
        budget.keep(whole);
        budget.release_kept();
        assert_eq!((budget.held(), budget.leased), (0, 0));
    }
}
