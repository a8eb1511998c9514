//! What reading a store took, counted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What was asked of a store so far, and what came. A snapshot: the numbers are read one after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// HTTP requests of any kind, those for credentials included.
    pub requests: u64,
    /// Requests that ask again for what an earlier one failed to bring.
    pub retries: u64,
    /// Bytes that those retries asked for. What had arrived before a failure is never asked for again.
    pub retried_bytes: u64,
    /// Requests beside one that is slow.
    pub hedges: u64,
    /// Bytes that those asked for.
    pub hedged_bytes: u64,
    /// Hedges that were ahead in the end.
    pub hedges_won: u64,
    /// Bytes of bodies that arrived.
    pub received_bytes: u64,
    /// Of those, bytes that were there already: the slower of two requests.
    pub discarded_bytes: u64,
    /// Requests given up because nothing came.
    pub stalls: u64,
    /// Responses that ask for fewer requests (429, 503).
    pub throttled: u64,
    /// Range requests in flight now.
    pub in_flight: u64,
    /// Range requests that may be in flight now.
    pub in_flight_limit: u64,
    /// The most range requests that were in flight at once, hedges not counted.
    pub in_flight_max: u64,
}

macro_rules! cells {
    ($($name:ident),*) => {
        /// The numbers behind [`Counters`].
        #[derive(Debug, Default)]
        pub(crate) struct Cells { $(pub(crate) $name: AtomicU64),* }

        impl Cells {
            pub(crate) fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.load(Relaxed)),* }
            }
        }
    };
}

cells!(
    requests,
    retries,
    retried_bytes,
    hedges,
    hedged_bytes,
    hedges_won,
    received_bytes,
    discarded_bytes,
    stalls,
    throttled,
    in_flight,
    in_flight_limit,
    in_flight_max
);

/// Counts `n` more.
pub(crate) fn count(cell: &AtomicU64, n: u64) {
    cell.fetch_add(n, Relaxed);
}
