//! How long to wait before asking again.

use std::time::Duration;

use crate::failure::Failure;

/// Waits that double from one failure to the next, with jitter, so that many readers do not come back at once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(10);

impl Backoff {
    /// The wait after a failure: between half and all of the doubled one; what the server asks for, and up to a tenth more,
    /// if that is longer.
    pub(crate) fn wait(&mut self, failure: &Failure) -> Duration {
        self.wait_at(failure, random())
    }

    fn wait_at(&mut self, failure: &Failure, random: f64) -> Duration {
        let longest = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures += 1;
        let own = longest.mul_f64(0.5 + 0.5 * random);
        match failure.retry_after {
            Some(asked) => own.max(asked.mul_f64(1.0 + 0.1 * random)),
            None => own,
        }
    }
}

/// Between 0 and 1; in the middle where the system has no randomness to give.
fn random() -> f64 {
    getrandom::u32().map_or(0.5, |value| f64::from(value) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::FailureKind;

    #[test]
    fn waits_double_up_to_a_limit() {
        let failure = Failure::new(FailureKind::Server, "x");
        let mut backoff = Backoff::default();
        let waits: Vec<u128> =
            (0..12).map(|_| backoff.wait_at(&failure, 1.0).as_millis()).collect();
        assert_eq!(waits[..5], [50, 100, 200, 400, 800]);
        assert_eq!(waits[11], 10_000);
        assert_eq!(Backoff::default().wait_at(&failure, 0.0).as_millis(), 25);
    }

    #[test]
    fn the_servers_wish_counts_if_it_is_longer() {
        let mut failure = Failure::new(FailureKind::Throttled, "x");
        failure.retry_after = Some(Duration::from_secs(3));
        assert_eq!(Backoff::default().wait_at(&failure, 0.0), Duration::from_secs(3));
        assert!(Backoff::default().wait_at(&failure, 1.0) <= Duration::from_millis(3300));
        failure.retry_after = Some(Duration::ZERO);
        assert!(Backoff::default().wait_at(&failure, 0.0) > Duration::ZERO);
    }
}
