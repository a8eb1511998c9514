//! One rank's connection to a rank on another host: a thread that sends, a thread that receives.
//!
//! ```text
//! operation (u64) | bytes (u64) | bytes …      for every operation, in order; little endian
//! ```
//!
//! What is received lies in slots that are set aside for this connection, at least one; while they are full nothing is
//! read from the connection, and the sender is held up by its window. So memory is bounded on both ends, and a connection
//! whose oldest operation has room always gets on.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use super::{
    CollectiveError, Piece,
    slots::{Slot, SlotPool},
};
use crate::cut;

/// Runs shorter than this are put together before they are sent.
const RUN_BYTES_MIN: usize = 64 << 10;
const GATHER_BYTES: usize = 256 << 10;

/// What is sent in one operation.
#[derive(Debug)]
pub(super) struct Outbound {
    pub(super) operation: u64,
    pub(super) data: Option<Arc<Slot>>,
    pub(super) pieces: Vec<Piece>,
}

/// A connection in use.
#[derive(Debug)]
pub(super) struct Connection {
    with: u32,
    stream: TcpStream,
    outbound: Option<mpsc::Sender<Outbound>>,
    shared: Arc<Shared>,
    slots: Arc<SlotPool>,
}

/// What its threads and its user share.
struct Shared {
    state: Mutex<State>,
    /// Operations that were sent.
    sent: AtomicU64,
    news: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    arrived: VecDeque<Received>,
    failed: Option<CollectiveError>,
    ended: bool,
}

/// What came in one operation.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) operation: u64,
    pub(super) bytes: u64,
    /// `None` when there are no bytes.
    pub(super) slot: Option<Slot>,
}

impl Connection {
    /// Takes over a connection to rank `with`; `slots` are its own to receive into, `news` is called when something has
    /// arrived.
    pub(super) fn start(
        with: u32,
        stream: TcpStream,
        slots: Arc<SlotPool>,
        news: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, CollectiveError> {
        let failed = |e: io::Error| CollectiveError::system("starting a connection", &e);
        stream.set_nonblocking(false).map_err(failed)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            sent: AtomicU64::new(0),
            news: Box::new(news),
        });
        let (outbound, queue) = mpsc::channel();
        let mut sending = Cable(stream.try_clone().map_err(failed)?);
        let sends = Arc::clone(&shared);
        thread::Builder::new()
            .name(format!("to-rank{with}"))
            .spawn(move || {
                let mut gathered = Vec::with_capacity(GATHER_BYTES);
                for outbound in queue {
                    if let Err(e) = send(&mut sending, &outbound, &mut gathered) {
                        return sends.fail(connection_error(with, &e));
                    }
                    let operation = outbound.operation;
                    // its slot goes back before anyone is told that it was sent
                    drop(outbound);
                    sends.sent.store(operation + 1, Ordering::Release);
                    (sends.news)();
                }
            })
            .map_err(failed)?;
        let mut receiving = Cable(stream.try_clone().map_err(failed)?);
        let (arrives, pool) = (Arc::clone(&shared), Arc::clone(&slots));
        thread::Builder::new()
            .name(format!("from-rank{with}"))
            .spawn(move || {
                let mut next = 0;
                while let Some(received) = receive(with, &mut receiving, &arrives, &pool, next) {
                    match received {
                        Ok(received) => arrives.arrive(received),
                        Err(e) => return arrives.fail(e),
                    }
                    next += 1;
                }
            })
            .map_err(failed)?;
        Ok(Self { with, stream, outbound: Some(outbound), shared, slots })
    }

    /// Sends this after everything before it. The queue is as long as the group lets a rank run ahead, and what it holds
    /// are slots, so its bytes are bounded by theirs.
    pub(super) fn send(&self, outbound: Outbound) -> Result<(), CollectiveError> {
        let sent = self.outbound.as_ref().map(|queue| queue.send(outbound));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(self.shared.lock().failed.clone().unwrap_or_else(|| self.ended())),
        }
    }

    /// What came in operation `next`, if it has come.
    pub(super) fn arrived(&self, next: u64) -> Result<Option<Received>, CollectiveError> {
        let mut state = self.shared.lock();
        match state.arrived.front() {
            Some(first) if first.operation == next => Ok(state.arrived.pop_front()),
            // everything that came before it failed is handed out first
            _ => state.failed.clone().map_or(Ok(None), Err),
        }
    }

    /// Whether all of `operation` has been handed to the system.
    pub(super) fn has_sent(&self, operation: u64) -> bool {
        self.shared.sent.load(Ordering::Acquire) > operation
    }

    pub(super) fn slots(&self) -> &SlotPool {
        &self.slots
    }

    fn ended(&self) -> CollectiveError {
        CollectiveError::Connection { with: self.with, what: "the connection was ended".into() }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // the sender ends after what it has in hand
        self.outbound = None;
        self.shared.lock().ended = true;
        self.slots.close();
        if cut::network_is_cut() {
            // its threads hang, and hold it open
            return;
        }
        // a failure means that it has ended already
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A stream that neither gives nor takes anything, and does not end, once this process is cut off.
#[derive(Debug)]
struct Cable(TcpStream);

impl Read for Cable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer);
        // what came after the cut, and that the other end is gone, is not heard
        cut::pass_network();
        read
    }
}

impl Write for Cable {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        cut::pass_network();
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // the state is consistent after every statement that changes it
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrive(&self, received: Received) {
        self.lock().arrived.push_back(received);
        (self.news)();
    }

    fn fail(&self, error: CollectiveError) {
        self.lock().failed.get_or_insert(error);
        (self.news)();
    }
}

fn send(stream: &mut Cable, outbound: &Outbound, gathered: &mut Vec<u8>) -> io::Result<()> {
    gathered.clear();
    let bytes: u64 = outbound.pieces.iter().map(Piece::bytes).sum();
    gathered.extend_from_slice(&outbound.operation.to_le_bytes());
    gathered.extend_from_slice(&bytes.to_le_bytes());
    let slot = outbound.data.as_ref().map_or(&[][..], |slot| slot.bytes());
    for piece in &outbound.pieces {
        for row in 0..piece.rows {
            // `Kind::check` saw that every piece lies within the slot
            let run = &slot[(piece.offset + row * piece.stride) as usize..][..piece.width as usize];
            if run.len() < RUN_BYTES_MIN && gathered.len() + run.len() <= GATHER_BYTES {
                gathered.extend_from_slice(run);
                continue;
            }
            stream.write_all(gathered)?;
            gathered.clear();
            match run.len() < RUN_BYTES_MIN {
                true => gathered.extend_from_slice(run),
                false => stream.write_all(run)?,
            }
        }
    }
    stream.write_all(gathered)
}

/// The next operation's bytes; `None` when this end has ended the connection.
fn receive(
    with: u32,
    stream: &mut Cable,
    shared: &Shared,
    pool: &Arc<SlotPool>,
    next: u64,
) -> Option<Result<Received, CollectiveError>> {
    let failed = |e: &io::Error| {
        // what follows from ending the connection on this side is no news
        (!shared.lock().ended).then(|| Err(connection_error(with, e)))
    };
    let mut header = [0; 16];
    if let Err(e) = stream.read_exact(&mut header) {
        return failed(&e);
    }
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let (operation, bytes) = (word(0), word(8));
    if operation != next || bytes > pool.slot_bytes() as u64 {
        let what = format!(
            "{bytes} bytes of operation {operation} came, expected were at most {} of operation {next}",
            pool.slot_bytes()
        );
        return Some(Err(CollectiveError::Connection { with, what }));
    }
    if bytes == 0 {
        return Some(Ok(Received { operation, bytes, slot: None }));
    }
    let mut slot = pool.lease_waiting()?.truncated(bytes as usize);
    match stream.read_exact(slot.bytes_mut()) {
        Ok(()) => Some(Ok(Received { operation, bytes, slot: Some(slot) })),
        Err(e) => failed(&e),
    }
}

fn connection_error(with: u32, e: &io::Error) -> CollectiveError {
    let what = match e.kind() {
        io::ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
        _ => e.to_string(),
    };
    CollectiveError::Connection { with, what }
}
