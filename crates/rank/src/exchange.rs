//! Exchange with ranks in other processes, round by round: one thread per rank starts operations and picks up what
//! arrives; the workers fill and place.
//!
//! Round `k` is operation `k + 1`; operation 0 is the barrier that every rank joined with. To a round each rank contributes
//! one read at most. Where ranks share memory the whole read is shown to all, and each copies what it wants; otherwise
//! each is sent its pieces alone.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use longshore_models::placement::Span;

use crate::{
    collective::{
        Arrival, Collective, CollectiveError, Incoming, Kind, Operation, Piece, slots::Slot,
    },
    error::RankError,
    protocol::{LoadPlan, Read},
    scatter::tensors_in,
};

/// The number of round 0's operation.
const FIRST_OPERATION: u64 = 1;

/// How long the thread sleeps when nothing rings; only a lost wake-up would make it matter.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The exchange of one load on one rank.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) collective: Arc<dyn Collective>,
    rank: u32,
    rounds: u32,
    /// For each rank its reads that are exchanged: `(round, index into its reads)`, in order.
    pooled: Vec<Vec<(u32, u32)>>,
    /// Reads of this rank that are in their slots and were not sent yet, by round.
    filled: Mutex<BTreeMap<u32, Slot>>,
}

/// Bytes of another rank's read that have arrived.
#[derive(Debug)]
pub(crate) struct Landed {
    pub(crate) source: u32,
    pub(crate) read: Read,
    pub(crate) bytes: Incoming,
}

impl Exchange {
    pub(crate) fn new(rank: u32, plan: &LoadPlan, collective: Arc<dyn Collective>) -> Self {
        let pooled: Vec<Vec<(u32, u32)>> = plan
            .reads
            .iter()
            .map(|reads| {
                let numbered = reads.iter().enumerate();
                numbered.filter_map(|(i, read)| Some((read.round?, i as u32))).collect()
            })
            .collect();
        let rounds = pooled.iter().filter_map(|p| Some(p.last()?.0 + 1)).max().unwrap_or(0);
        Self { collective, rank, rounds, pooled, filled: Mutex::default() }
    }

    /// This rank's read of `round` is in `slot`.
    pub(crate) fn contribute(&self, round: u32, slot: Slot) {
        self.lock().insert(round, slot);
        self.collective.wake();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        // consistent after every statement that changes it
        self.filled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs all rounds; hands what arrives to `land`, calls `freed` when slots may have become free.
    ///
    /// Ends when everything has arrived and everything was taken.
    ///
    /// # Errors
    /// The collective fails or is aborted.
    pub(crate) fn drive(
        &self,
        plan: &LoadPlan,
        land: impl Fn(Landed),
        freed: impl Fn(),
    ) -> Result<(), CollectiveError> {
        let mut arrived = vec![0; self.pooled.len()];
        let land = |arrival| {
            if let Some(landed) = self.landed(plan, &mut arrived, arrival) {
                land(landed);
            }
        };
        run_rounds(&*self.collective, self.rounds, |round| self.operation(plan, round), land, freed)
    }

    /// This rank's part in `round`; `None` while its read is not done.
    fn operation(&self, plan: &LoadPlan, round: u32) -> Option<Operation> {
        let read_of = |rank: usize| {
            let reads = &self.pooled[rank];
            let at = reads.binary_search_by_key(&round, |(r, _)| *r).ok()?;
            Some(&plan.reads[rank][reads[at].1 as usize])
        };
        let own = read_of(self.rank as usize);
        let data = match own {
            None => None,
            Some(_) => Some(self.lock().remove(&round)?),
        };
        let ranks = 0..self.pooled.len();
        let kind = if self.collective.shares_memory() {
            let bytes = ranks.map(|rank| read_of(rank).map_or(0, |read| read.range.len()));
            Kind::AllGather { bytes: bytes.collect() }
        } else {
            let receives = ranks.map(|rank| match read_of(rank) {
                Some(read) if rank as u32 != self.rank => wanted_bytes(plan, read, self.rank),
                _ => 0,
            });
            let receives = receives.collect();
            Kind::AllToAll { sends: self.sends(plan, own), receives }
        };
        Some(Operation { kind, data })
    }

    /// For each rank the pieces of `read` that it gets.
    fn sends(&self, plan: &LoadPlan, read: Option<&Read>) -> Vec<Vec<Piece>> {
        let mut sends = vec![Vec::new(); self.pooled.len()];
        let Some(read) = read else { return sends };
        for_each_span(
            plan,
            read,
            |rank| rank != self.rank,
            |span| {
                sends[span.rank as usize].push(Piece {
                    offset: span.source_offset,
                    width: span.width,
                    stride: span.source_stride,
                    rows: span.rows,
                });
            },
        );
        sends
    }

    /// Which read has arrived; `None` when nothing of it is for this rank.
    fn landed(&self, plan: &LoadPlan, arrived: &mut [usize], arrival: Arrival) -> Option<Landed> {
        let Arrival { operation, source, bytes } = arrival;
        let round = operation.checked_sub(FIRST_OPERATION)?;
        let reads = &self.pooled[source as usize];
        let next = &mut arrived[source as usize];
        let (of_round, index) = *reads.get(*next)?;
        if u64::from(of_round) != round {
            return None;
        }
        *next += 1;
        let read = plan.reads[source as usize][index as usize];
        (!matches!(bytes, Incoming::Nothing)).then_some(Landed { source, read, bytes })
    }
}

/// Starts the operation of each round as soon as there is one and room for it, hands on what arrives; calls `freed` now and
/// then. Ends when everything has arrived and everything was taken.
fn run_rounds(
    collective: &dyn Collective,
    rounds: u32,
    operation: impl Fn(u32) -> Option<Operation>,
    mut arrived: impl FnMut(Arrival),
    freed: impl Fn(),
) -> Result<(), CollectiveError> {
    let mut round = 0;
    loop {
        // before anything else is looked at, so that whatever changes from here on ends the wait below
        collective.arrivals()?.into_iter().for_each(&mut arrived);
        let before = round;
        while round < rounds && collective.has_room() {
            let Some(operation) = operation(round) else { break };
            collective.start(operation)?;
            round += 1;
        }
        if round == rounds && collective.is_idle() {
            return Ok(());
        }
        freed();
        // what others have sent to an operation that was just started may have been there before
        if round == before {
            collective.wait(LOOK_AGAIN);
        }
    }
}

/// The spans that `read` turns into on those of the ranks that take of it that are `wanted`, relative to its beginning.
pub(crate) fn for_each_span(
    plan: &LoadPlan,
    read: &Read,
    wanted: impl Fn(u32) -> bool,
    mut each: impl FnMut(Span),
) {
    for (tensor, within, offset) in tensors_in(&plan.checkpoint, read.file, read.range) {
        let takes = |rank| wanted(rank) && plan.takes(rank, read);
        plan.placement.spans(tensor, within, takes, |mut span| {
            span.source_offset += offset;
            each(span);
        });
    }
}

fn wanted_bytes(plan: &LoadPlan, read: &Read, rank: u32) -> u64 {
    let mut bytes = 0;
    for_each_span(plan, read, |r| r == rank, |span| bytes += span.source_bytes());
    bytes
}

impl Landed {
    /// The spans of this read on `rank`, relative to the beginning of what arrived.
    pub(crate) fn spans(&self, plan: &LoadPlan, rank: u32) -> Vec<Span> {
        let (mut spans, mut at) = (Vec::new(), 0);
        let packed = !self.bytes.is_in_place();
        for_each_span(
            plan,
            &self.read,
            |r| r == rank,
            |mut span| {
                if packed {
                    (span.source_offset, span.source_stride) = (at, span.width);
                    at += span.source_bytes();
                }
                spans.push(span);
            },
        );
        spans
    }

    /// The bytes.
    ///
    /// # Errors
    /// They are not in the host's memory, where this rank's parameters are.
    pub(crate) fn host_bytes(&self) -> Result<&[u8], RankError> {
        self.bytes.host().ok_or_else(|| {
            let what = "bytes arrived in a device's memory".to_owned();
            RankError::Exchange(CollectiveError::Operation { what })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, time::Instant};

    use super::*;
    use crate::collective::{
        host::{HostCollective, Route},
        segment::{Form, Segment},
    };

    /// A read that is contributed right after a look found none would otherwise lie there for [`LOOK_AGAIN`].
    #[test]
    fn a_read_is_sent_at_once_whenever_it_is_contributed() {
        const ROUNDS: u32 = 20;
        let form = Form { world_size: 1, slots: 1, slot_bytes: 4096 };
        let segment = Segment::create(form, [1; 32]).unwrap();
        let alone = HostCollective::new(0, segment, vec![Route::Here], 1).unwrap();
        let looks = Cell::new(0);
        let operation = |_| {
            looks.set(looks.get() + 1);
            if looks.get() % 3 == 0 {
                return Some(Operation { kind: Kind::Barrier, data: None });
            }
            // contributed in the instant after this look
            alone.wake();
            None
        };
        let began = Instant::now();
        run_rounds(&alone, ROUNDS, operation, |_| {}, || {}).unwrap();
        assert!(began.elapsed() < LOOK_AGAIN * ROUNDS / 4, "{:?}", began.elapsed());
    }
}
