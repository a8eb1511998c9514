//! Collectives through host memory: a shared segment between processes of one host, TCP between hosts.

use std::{
    collections::VecDeque,
    net::TcpStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::{
    Arrival, Collective, CollectiveError, Incoming, Operation, Piece,
    segment::{Announcement, Borrowed, RING, Segment, ring, wait_at},
    slots::{Slot, SlotPool},
    tcp::{Connection, Outbound},
};

/// How this rank reaches another.
#[derive(Debug)]
pub enum Route {
    /// It is this rank.
    Here,
    /// It is on this host; its segment.
    SharedMemory(Arc<Segment>),
    /// It is on another host; a connection that nothing was sent on yet.
    Tcp(TcpStream),
}

/// A rank's part in a group of processes.
#[derive(Debug)]
pub struct HostCollective {
    rank: u32,
    segment: Arc<Segment>,
    slots: Arc<SlotPool>,
    routes: Vec<Reached>,
    state: Mutex<State>,
    /// What the doorbell showed when arrivals were looked for.
    seen: AtomicU32,
}

#[derive(Debug)]
enum Reached {
    Here,
    SharedMemory(Arc<Segment>),
    Tcp(Connection),
}

#[derive(Debug, Default)]
struct State {
    /// Number of the next operation.
    next: u64,
    /// What each started operation brings from each rank, from operation `first_expected` on.
    expected: VecDeque<Vec<u64>>,
    first_expected: u64,
    /// The next operation to arrive from each rank.
    arriving: Vec<u64>,
    /// Slots that were sent from and that others may still look at.
    sent: VecDeque<Sent>,
    aborted: Option<String>,
}

/// One operation as others still have to take it.
#[derive(Debug)]
struct Sent {
    operation: u64,
    /// Kept until the others have taken it.
    data: Option<Arc<Slot>>,
}

impl HostCollective {
    /// Joins rank `rank` with the others, each reached by its route; `segment` is this rank's own, and each connection has
    /// `receive_slots` to receive into (with two, one is placed while the other is filled).
    ///
    /// Every rank of a group passes routes for the same number of ranks; slots of all are equally large.
    ///
    /// # Errors
    /// Memory or threads cannot be had, the routes are none, or a rank's memory is not of such a group.
    pub fn new(
        rank: u32,
        segment: Arc<Segment>,
        routes: Vec<Route>,
        receive_slots: u32,
    ) -> Result<Self, CollectiveError> {
        if !matches!(routes.get(rank as usize), Some(Route::Here)) {
            let what = format!("rank {rank} is not here in {} routes", routes.len());
            return Err(CollectiveError::Operation { what });
        }
        let world_size = routes.len() as u32;
        check_form(rank, &segment, &segment, world_size)?;
        let mut reached = Vec::with_capacity(routes.len());
        for (with, route) in routes.into_iter().enumerate() {
            reached.push(match route {
                Route::Here => Reached::Here,
                Route::SharedMemory(other) => {
                    check_form(with as u32, &other, &segment, world_size)?;
                    Reached::SharedMemory(other)
                }
                Route::Tcp(stream) => {
                    let own = Arc::clone(&segment);
                    let slots = SlotPool::private(receive_slots.max(1), segment.slot_bytes())
                        .map_err(|e| CollectiveError::System {
                            action: "setting memory aside to receive into",
                            what: e.to_string(),
                        })?;
                    let news = move || ring(own.doorbell());
                    Reached::Tcp(Connection::start(with as u32, stream, slots, news)?)
                }
            });
        }
        let state = State { arriving: vec![0; reached.len()], ..State::default() };
        Ok(Self {
            rank,
            slots: SlotPool::shared(Arc::clone(&segment)),
            segment,
            routes: reached,
            state: Mutex::new(state),
            seen: AtomicU32::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // the state is consistent after every statement that changes it
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, without what all others have taken.
    fn lock_reaped(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        // in order: those behind a slow one wait for it, which bounds how far a rank runs ahead
        while state.sent.front().is_some_and(|sent| self.taken(sent.operation)) {
            let sent = state.sent.pop_front();
            if let Some(slot) = sent.as_ref().and_then(|sent| sent.data.as_ref()) {
                slot.show(false);
            }
        }
        state
    }

    fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.routes.iter().filter_map(|route| match route {
            Reached::Tcp(connection) => Some(connection),
            _ => None,
        })
    }

    /// The next arrival from `source`, of those operations that were started.
    fn next_arrival(
        &self,
        state: &mut State,
        source: u32,
    ) -> Result<Option<Arrival>, CollectiveError> {
        let operation = state.arriving[source as usize];
        if operation == state.next {
            return Ok(None);
        }
        let expected = state.expected[(operation - state.first_expected) as usize][source as usize];
        let arrived = match &self.routes[source as usize] {
            Reached::Here => None,
            Reached::SharedMemory(other) => self.borrow(other, source, operation, expected)?,
            Reached::Tcp(connection) => match connection.arrived(operation)? {
                None => None,
                Some(received) if received.bytes != expected => {
                    return Err(CollectiveError::Disagreement {
                        operation,
                        source_rank: source,
                        found: received.bytes,
                        expected,
                    });
                }
                Some(received) => Some(received.slot.map_or(Incoming::Nothing, Incoming::Packed)),
            },
        };
        let Some(bytes) = arrived else { return Ok(None) };
        state.arriving[source as usize] += 1;
        Ok(Some(Arrival { operation, source, bytes }))
    }

    /// What a rank of this host has announced; where nothing is for this rank it is taken at once.
    fn borrow(
        &self,
        other: &Arc<Segment>,
        source: u32,
        operation: u64,
        expected: u64,
    ) -> Result<Option<Incoming>, CollectiveError> {
        let Some((announced, bytes)) = other.announced(operation, self.rank) else {
            return Ok(None);
        };
        let borrowed = Borrowed::new(&self.segment, other, source, operation, announced)?;
        if bytes != expected {
            return Err(CollectiveError::Disagreement {
                operation,
                source_rank: source,
                found: bytes,
                expected,
            });
        }
        if bytes == 0 {
            return Ok(Some(Incoming::Nothing));
        }
        Ok(Some(Incoming::InPlace(borrowed)))
    }

    /// Whether all ranks of this host have finished with an operation of this rank, and it is on its way to the others.
    fn taken(&self, operation: u64) -> bool {
        self.routes.iter().all(|route| match route {
            Reached::Here => true,
            Reached::SharedMemory(other) => other.has_taken(self.rank, operation),
            Reached::Tcp(connection) => connection.has_sent(operation),
        })
    }
}

/// Whether the memory of rank `with` has a place for each of `world_size` ranks, and slots like `own`'s: what is looked for
/// in it follows from that.
fn check_form(
    with: u32,
    other: &Segment,
    own: &Segment,
    world_size: u32,
) -> Result<(), CollectiveError> {
    let (other, own) = (other.form(), own.form());
    if other.world_size == world_size && other.slot_bytes == own.slot_bytes {
        return Ok(());
    }
    let what = format!(
        "its memory has slots of {} bytes for {} ranks, expected were {} bytes for {world_size}",
        other.slot_bytes, other.world_size, own.slot_bytes
    );
    Err(CollectiveError::Connection { with, what })
}

impl Collective for HostCollective {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.routes.len() as u32
    }

    fn shares_memory(&self) -> bool {
        self.connections().next().is_none()
    }

    fn lease(&self) -> Result<Option<Slot>, CollectiveError> {
        if let Some(why) = &self.lock_reaped().aborted {
            return Err(CollectiveError::Aborted { why: why.clone() });
        }
        Ok(self.slots.lease())
    }

    fn start(&self, operation: Operation) -> Result<u64, CollectiveError> {
        let Operation { kind, data } = operation;
        let filled = data.as_ref().map_or(0, |slot| slot.bytes().len() as u64);
        kind.check(self.rank, self.world_size(), filled)?;
        let mut state = self.lock();
        if let Some(why) = &state.aborted {
            return Err(CollectiveError::Aborted { why: why.clone() });
        }
        let number = state.next;
        if state.sent.front().is_some_and(|sent| number - sent.operation >= RING) {
            let what = format!("operation {number} was started too far ahead");
            return Err(CollectiveError::Operation { what });
        }
        state.expected.push_back(kind.receives(self.rank, self.world_size()));
        let sends = kind.into_sends(self.rank, self.world_size());
        let filled = sends.iter().flatten().filter_map(Piece::end).max().unwrap_or(0);
        let bytes: Vec<u64> =
            sends.iter().map(|pieces| pieces.iter().map(Piece::bytes).sum()).collect();
        let data = data.map(Arc::new);
        for (route, pieces) in self.routes.iter().zip(sends) {
            if let Reached::Tcp(connection) = route {
                let data = data.clone().filter(|_| !pieces.is_empty());
                connection.send(Outbound { operation: number, data, pieces })?;
            }
        }
        let in_sight = self.routes.iter().any(|route| matches!(route, Reached::SharedMemory(_)));
        if let Some(slot) = &data {
            slot.show(in_sight);
        }
        let slot = data.as_ref().map_or(0, |slot| slot.index());
        self.segment.announce(number, Announcement { slot, filled }, bytes.into_iter());
        state.sent.push_back(Sent { operation: number, data });
        state.next += 1;
        drop(state);
        for route in &self.routes {
            if let Reached::SharedMemory(other) = route {
                ring(other.doorbell());
            }
        }
        Ok(number)
    }

    fn has_room(&self) -> bool {
        let state = self.lock_reaped();
        state.sent.front().is_none_or(|sent| state.next - sent.operation < RING)
    }

    fn arrivals(&self) -> Result<Vec<Arrival>, CollectiveError> {
        // before looking, so that what comes meanwhile ends the next wait
        self.seen.store(self.segment.doorbell().load(Ordering::Acquire), Ordering::Relaxed);
        let mut state = self.lock_reaped();
        if let Some(why) = &state.aborted {
            return Err(CollectiveError::Aborted { why: why.clone() });
        }
        let mut arrivals = Vec::new();
        for source in (0..self.world_size()).filter(|&r| r != self.rank) {
            while let Some(arrival) = self.next_arrival(&mut state, source)? {
                arrivals.push(arrival);
            }
        }
        let others = (0..self.world_size()).filter(|&r| r != self.rank);
        let arrived = others.map(|r| state.arriving[r as usize]).min().unwrap_or(state.next);
        while state.first_expected < arrived {
            state.expected.pop_front();
            state.first_expected += 1;
        }
        Ok(arrivals)
    }

    fn is_idle(&self) -> bool {
        let state = self.lock_reaped();
        state.sent.is_empty() && state.first_expected == state.next
    }

    fn wait(&self, timeout: Duration) {
        wait_at(self.segment.doorbell(), self.seen.load(Ordering::Relaxed), timeout);
    }

    fn wake(&self) {
        ring(self.segment.doorbell());
    }

    fn abort(&self, why: &str) {
        self.lock().aborted.get_or_insert_with(|| why.to_owned());
        self.wake();
    }

    fn peak_bytes(&self) -> u64 {
        self.slots.peak_bytes() + self.connections().map(|c| c.slots().peak_bytes()).sum::<u64>()
    }

    fn held_bytes(&self) -> u64 {
        self.slots.held_bytes() + self.connections().map(|c| c.slots().held_bytes()).sum::<u64>()
    }
}
