//! A budget of bytes: who wants memory waits until others have given enough back.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that may be held at a time; a single taker may exceed them when nobody else holds any.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    held: Mutex<u64>,
    freed: Condvar,
}

/// The right to use some bytes; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, held: Mutex::new(0), freed: Condvar::new() }
    }

    /// Waits until `bytes` more fit, or nothing is held at all.
    pub(crate) fn take(&self, bytes: u64) -> Permit<'_> {
        let held = self.lock();
        let full = |held: &mut u64| *held > 0 && *held + bytes > self.limit;
        let mut held = self.freed.wait_while(held, full).unwrap_or_else(PoisonError::into_inner);
        *held += bytes;
        Permit { budget: self, bytes }
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        // a number is consistent whatever happened to its last holder
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.budget.lock() -= self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn takers_stay_within_the_limit_and_a_large_one_goes_alone() {
        let budget = Budget::new(100);
        let (held, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for bytes in [30, 40, 50, 60, 10, 90] {
                let (budget, held, most) = (&budget, &held, &most);
                scope.spawn(move || {
                    for _ in 0..100 {
                        let _permit = budget.take(bytes);
                        let now = held.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        most.fetch_max(now, Ordering::SeqCst);
                        std::thread::yield_now();
                        held.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 100);
        drop(budget.take(500));
        assert_eq!(*budget.lock(), 0);
    }
}
