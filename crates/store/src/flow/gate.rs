//! Permits for requests in flight, given out in the order of asking.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::control::FlowControl;
use crate::counters::Cells;

/// Lets as many requests be in flight as [`FlowControl`] says.
#[derive(Debug)]
pub(crate) struct Gate {
    permits: Arc<Semaphore>,
    state: Mutex<State>,
    /// Bytes that came since a request last ended.
    bytes: AtomicU64,
    born: Instant,
    counters: Arc<Cells>,
}

#[derive(Debug)]
struct State {
    control: FlowControl,
    /// Permits that exist.
    permits: usize,
}

/// The right to have one request in flight. Dropped: given back.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    gate: &'a Gate,
    permit: Option<OwnedSemaphorePermit>,
}

impl Gate {
    pub(crate) fn new(control: FlowControl, counters: Arc<Cells>) -> Gate {
        let permits = control.limit();
        counters.in_flight_limit.store(permits as u64, Relaxed);
        Gate {
            permits: Arc::new(Semaphore::new(permits)),
            state: Mutex::new(State { control, permits }),
            bytes: AtomicU64::new(0),
            born: Instant::now(),
            counters,
        }
    }

    /// Waits for a permit.
    pub(crate) async fn enter(&self) -> Permit<'_> {
        let permit = match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => Some(permit),
            Err(_) => {
                self.state().control.waited();
                // the semaphore is never closed
                Arc::clone(&self.permits).acquire_owned().await.ok()
            }
        };
        let now = self.counters.in_flight.fetch_add(1, Relaxed) + 1;
        self.counters.in_flight_max.fetch_max(now, Relaxed);
        Permit { gate: self, permit }
    }

    /// Bytes came.
    pub(crate) fn received(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// A request brought all that it was for.
    pub(crate) fn completed(&self) {
        let bytes = self.bytes.swap(0, Relaxed);
        let now = self.now();
        let mut state = self.state();
        state.control.completed(bytes, now);
        self.follow(&mut state);
    }

    /// The storage asks for fewer requests.
    pub(crate) fn refused(&self) {
        let now = self.now();
        let mut state = self.state();
        state.control.refused(now);
        self.follow(&mut state);
    }

    /// More permits at once; fewer as far as there are free ones, the rest when permits come back.
    fn follow(&self, state: &mut State) {
        let limit = state.control.limit();
        if limit > state.permits {
            self.permits.add_permits(limit - state.permits);
            state.permits = limit;
        } else if limit < state.permits {
            state.permits -= self.permits.forget_permits(state.permits - limit);
        }
        self.counters.in_flight_limit.store(limit as u64, Relaxed);
    }

    fn now(&self) -> Duration {
        self.born.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.gate.counters.in_flight.fetch_sub(1, Relaxed);
        let Some(permit) = self.permit.take() else { return };
        let mut state = self.gate.state();
        if state.permits > state.control.limit() {
            permit.forget();
            state.permits -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn permits_shrink_as_they_come_back() {
        let counters = Arc::new(Cells::default());
        let gate = Gate::new(FlowControl::searching(8), Arc::clone(&counters));
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(gate.enter().await);
        }
        gate.refused();
        assert_eq!(counters.snapshot().in_flight_limit, 5);
        held.truncate(5);
        assert!(gate.permits.try_acquire().is_err());
        held.truncate(4);
        let _fifth = gate.enter().await;
        assert!(gate.permits.try_acquire().is_err());
        drop((held, _fifth));
        let counters = counters.snapshot();
        assert_eq!((counters.in_flight, counters.in_flight_max), (0, 8));
        assert_eq!(gate.permits.available_permits(), 5);
    }
}
