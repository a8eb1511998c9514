//! The words that a rank shares with the coordinator, and with the other ranks of its process.
//!
//! Commands go down, events come up; both carry the generation of the load that they belong to (RNK-4). They are the same
//! whether the rank is an actor of the coordinator's process or a process of its own, of which the coordinator holds a
//! link.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::Checkpoint,
    declare::ParamId,
    have::{Have, RankSet},
    placement::Placement,
};
use ractor::ActorRef;
use serde::{Deserialize, Serialize};

use crate::{
    collective::{Collective, segment::SegmentHandle},
    device::{Form, Uploads},
    error::RankError,
    params::{ParamMemory, ReadyParams},
    storage::CheckpointSource,
};

/// Numbers the attempts at a load; messages of older ones are ignored.
pub type Generation = u64;

/// One contiguous range that one rank reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// The checkpoint file.
    pub file: u32,
    /// The bytes, absolute in that file.
    pub range: ByteRange,
    /// The exchange round that it belongs to, to which a rank contributes one read at most; `None` when only the reader
    /// itself needs the bytes.
    pub round: Option<u32>,
    /// Where the reader takes the bytes from.
    pub from: ReadFrom,
    /// The ranks that take nothing of it, because they have what they need of it: index into [`LoadPlan::settled`].
    pub settled: u32,
}

/// Where a reader takes the bytes of a read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReadFrom {
    /// The checkpoint's file.
    Storage,
    /// Its own parameters, which hold all of the range as it is in the file.
    Parameters,
    /// The parameters that it had in a former group ([`Former`]), which hold all of the range as it is in the file.
    Former,
}

/// What all ranks of a load agree on.
#[derive(Debug)]
pub struct LoadPlan {
    /// The checkpoint's headers.
    pub checkpoint: Arc<Checkpoint>,
    /// Where each byte belongs.
    pub placement: Arc<Placement>,
    /// What each rank reads, in order.
    pub reads: Vec<Vec<Read>>,
    /// Sets of ranks for reads to refer to; the first is empty.
    pub settled: Vec<RankSet>,
    /// Whether a rank hands bytes on to the others (otherwise it keeps only its own).
    pub exchange: bool,
    /// The longest read, in bytes.
    pub read_bytes_max: u64,
}

impl Read {
    /// A read from storage of which every rank takes what it needs.
    pub fn new(file: u32, range: ByteRange, round: Option<u32>) -> Self {
        Self { file, range, round, from: ReadFrom::Storage, settled: 0 }
    }
}

impl LoadPlan {
    /// Whether `rank` takes what it needs of `read`.
    pub fn takes(&self, rank: u32, read: &Read) -> bool {
        !self.settled[read.settled as usize].contains(rank)
    }
}

/// What a rank held in a group of more ranks that lost some: its share of the model is another one now, and bytes of the new one
/// lie here, on it or on another of those that are left.
#[derive(Debug, Clone)]
pub struct Former {
    /// Its number in that group.
    pub rank: u32,
    /// Its parameters, of the placement of that group.
    pub memory: Arc<ParamMemory>,
    /// What had landed in them.
    pub have: Have,
}

impl Former {
    /// Copies `range` of `file` to `into`, out of parameters.
    ///
    /// # Safety
    /// All of the range has landed in them, none of it was converted or finished, and nobody writes them any more.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) unsafe fn copy_out(
        &self,
        checkpoint: &Checkpoint,
        file: u32,
        range: ByteRange,
        into: &mut [u8],
    ) -> Result<(), RankError> {
        let mut copied = Ok(());
        for (tensor, within, offset) in checkpoint.tensors_in(file, range) {
            let own = |rank| rank == self.rank;
            self.memory.placement().spans(tensor, within, own, |mut span| {
                span.source_offset += offset;
                if copied.is_ok() {
                    // SAFETY: the caller's promise.
                    copied = unsafe { self.memory.copy_back(&span, into) };
                }
            });
        }
        copied
    }
}

/// A rank of this process as the others see it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its parameters.
    pub memory: Arc<ParamMemory>,
    /// The way to them, where they live on a device.
    pub uploads: Option<Arc<Uploads>>,
    /// Its counters.
    pub progress: Arc<Progress>,
    /// Its mailbox.
    pub actor: ActorRef<RankMessage>,
}

/// What one rank does in a load, as far as its own process knows it.
#[derive(Debug, Clone)]
pub struct Work {
    /// The plan.
    pub plan: Arc<LoadPlan>,
    /// The open files.
    pub sources: Arc<Vec<CheckpointSource>>,
    /// Reads in flight.
    pub concurrency: usize,
    /// Slabs of pinned memory of a rank whose parameters live on a device.
    pub pinned_slabs: u32,
    /// What such a rank sets aside on its device.
    pub device_form: Form,
}

/// How others reach a rank that is a process of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The host that it is on: ranks that say the same can open each other's memory.
    pub host: String,
    /// The memory that it passes bytes through.
    pub segment: SegmentHandle,
    /// Where it takes connections from ranks on other hosts.
    pub address: SocketAddr,
    /// What it brings to an exchange over NCCL, if it can take part in one.
    pub nccl: Option<NcclOffer>,
}

/// A rank that could exchange over NCCL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NcclOffer {
    /// The UUID of its device.
    pub device: [u8; 16],
    /// Its library, as that counts its versions: all ranks need the same.
    pub version: u32,
    /// Rank 0's name for the communicator.
    pub id: Option<Vec<u8>>,
}

/// Tells one plan from another: a hash of all that ranks have to agree on.
pub type PlanName = [u8; 16];

/// Where a rank's parameters are.
#[derive(Debug, Clone)]
pub enum Contact {
    /// In the coordinator's process.
    Here(Peer),
    /// In a process of its own.
    Apart(Endpoint),
}

/// All ranks of a load, in their order.
#[derive(Debug, Clone)]
pub enum Peers {
    /// They are threads of one process: bytes are placed straight into whichever wants them.
    Here(Arc<Vec<Peer>>),
    /// They are processes, which have to be joined first.
    Apart(Arc<Vec<Endpoint>>),
}

/// Joins a rank that is a process of its own with the others.
pub trait Join: fmt::Debug + Send + Sync {
    /// What the others need to know to reach this rank in `generation`. Older generations can no longer be joined.
    ///
    /// # Errors
    /// Memory cannot be had.
    fn announce(&self, generation: Generation) -> Result<Endpoint, RankError>;

    /// The plan of what is left when each rank has what `have` says, and its name: ranks that plan the same have the same.
    ///
    /// # Errors
    /// There is none.
    fn plan(&self, have: &[Have]) -> Result<(Arc<LoadPlan>, PlanName), RankError>;

    /// Joins the others, all of which do the same; waits for them.
    ///
    /// # Errors
    /// A rank cannot be reached.
    fn join(
        &self,
        generation: Generation,
        roster: &[Endpoint],
    ) -> Result<Arc<dyn Collective>, RankError>;
}

/// From the coordinator to a rank.
#[derive(Debug, Clone)]
pub enum RankCommand {
    /// Get hold of memory for parameters; a rank that is in the middle of an older generation stops what it is doing, and
    /// keeps what has landed.
    Allocate {
        /// The generation.
        generation: Generation,
    },
    /// Get ready to read, place, exchange and finish; other ranks may land bytes here from now on.
    Load {
        /// The generation.
        generation: Generation,
        /// All ranks, this one included.
        peers: Peers,
        /// What each of them has.
        have: Arc<Vec<Have>>,
    },
    /// Begin. Sent once every rank is prepared, so that no news of landed bytes comes too early.
    Start {
        /// The generation.
        generation: Generation,
    },
    /// Stop as soon as the reads in flight return.
    Abort {
        /// The generation.
        generation: Generation,
        /// Why.
        why: String,
    },
    /// Every rank is complete: the parameters may be handed out.
    Release {
        /// The generation.
        generation: Generation,
    },
    /// The group goes on with fewer ranks, as another one: stop, and give up what has landed.
    HandOver {
        /// The generation.
        generation: Generation,
    },
}

/// What a rank's workers, and those of other ranks, tell its actor.
#[derive(Debug)]
pub enum WorkerEvent {
    /// The last byte of a parameter has landed.
    ParamLanded(ParamId),
    /// The last read of the assignment has been placed.
    ReadsDone,
    /// A step of post-processing is done (index into the placement's finishes).
    FinishDone(u32),
    /// The other ranks have been joined, to carry out this plan.
    Joined(Arc<dyn Collective>, Arc<LoadPlan>, PlanName),
    /// The last worker of a load that was stopped has ended.
    Halted,
    /// Everything has arrived from the others, and they have taken everything from this rank.
    ExchangeDone,
    /// A worker gave up.
    Failed(RankError),
}

/// Everything that arrives in a rank's mailbox.
#[derive(Debug)]
pub enum RankMessage {
    /// From the coordinator.
    Command(RankCommand),
    /// From workers of that generation.
    Worker(Generation, WorkerEvent),
}

impl From<RankCommand> for RankMessage {
    fn from(command: RankCommand) -> Self {
        Self::Command(command)
    }
}

impl TryFrom<RankMessage> for RankCommand {
    type Error = RankMessage;

    fn try_from(message: RankMessage) -> Result<Self, RankMessage> {
        match message {
            RankMessage::Command(command) => Ok(command),
            other => Err(other),
        }
    }
}

/// From a rank to the coordinator.
#[derive(Debug)]
pub struct RankEvent {
    /// The rank.
    pub rank: u32,
    /// The generation that it speaks of.
    pub generation: Generation,
    /// What happened.
    pub kind: RankEventKind,
}

/// What happened on a rank.
#[derive(Debug)]
pub enum RankEventKind {
    /// Parameters are allocated; of the checkpoint this much has landed in them, or in those of a former group, if there is
    /// one.
    Allocated(Contact, Have),
    /// The rank can begin to carry out this plan, and can be landed on.
    Prepared(PlanName),
    /// Every parameter is complete; they come along when they are in the coordinator's process.
    Ready(Option<ReadyParams>, RankReport),
    /// What the rank had, for a group of fewer ranks; `None`: nothing. Only for whoever is in its process.
    HandedOver(Option<Former>),
    /// The rank gave up.
    Failed(RankError),
}

/// What a rank did, once it is ready. Sizes in bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RankReport {
    /// Weight bytes that it asked of storage.
    pub storage_bytes_read: u64,
    /// Weight bytes that it read from what this host has kept of the storage, and so did not ask for.
    pub cached_bytes_read: u64,
    /// Bytes read beyond them because direct I/O works in blocks.
    pub padding_bytes_read: u64,
    /// Bytes that it asked of storage once more, because a request failed or was slow.
    pub retried_bytes: u64,
    /// Reads issued to storage; the steps in which one goes through the page cache are one read.
    pub reads: u64,
    /// Bytes that other ranks read and this one received.
    pub received_bytes: u64,
    /// Bytes that this rank read and others received.
    pub sent_bytes: u64,
    /// The most staging memory that it held.
    pub peak_staging_bytes: u64,
    /// The most device memory that its process had allocated on its device, where its parameters live on one.
    pub peak_device_bytes: Option<u64>,
    /// Staging memory that it still held at the end (always 0).
    pub final_staging_bytes: u64,
    /// From the `Start` command until ready.
    pub elapsed: Duration,
}

/// What a rank is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Nothing yet.
    Waiting,
    /// Reading its assignment.
    Reading,
    /// Waiting for bytes from others, or finishing parameters.
    Finishing,
    /// Complete.
    Ready,
}

impl Phase {
    /// The phase that `number` stands for; anything past the last one is the last one.
    pub fn from_number(number: u8) -> Self {
        match number {
            0 => Phase::Waiting,
            1 => Phase::Reading,
            2 => Phase::Finishing,
            _ => Phase::Ready,
        }
    }

    /// A word for tables and logs.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Waiting => "waiting",
            Phase::Reading => "reading",
            Phase::Finishing => "finishing",
            Phase::Ready => "ready",
        }
    }
}

/// A rank's counters, readable at any time by anyone. Of a rank in another process they are as of its last heartbeat.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    /// Who is told of every phase, if anyone.
    listener: OnceLock<fn(Phase)>,
    /// Weight bytes read, from storage or from what this host has kept of it.
    pub read_bytes: AtomicU64,
    /// Those of them that were kept.
    pub cached_bytes: AtomicU64,
    /// Bytes read for alignment only.
    pub padding_bytes: AtomicU64,
    /// Bytes asked of storage once more, because a request failed or was slow.
    pub retried_bytes: AtomicU64,
    /// Reads issued to storage; the steps in which one goes through the page cache are one read.
    pub reads: AtomicU64,
    /// Bytes received from other ranks.
    pub received_bytes: AtomicU64,
    /// Bytes handed to other ranks.
    pub sent_bytes: AtomicU64,
    /// Counts everything that brings the rank closer to its end: while it stands still, so does the rank.
    pub steps: AtomicU64,
    /// Pieces of work that workers have in hand.
    pub in_hand: AtomicU64,
}

impl Progress {
    /// What the rank is doing.
    pub fn phase(&self) -> Phase {
        Phase::from_number(self.phase.load(Ordering::Relaxed))
    }

    /// Notes what the rank is doing.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Relaxed);
        if let Some(tell) = self.listener.get() {
            tell(phase);
        }
    }

    /// Has `listener` told of every phase from now on; the first that is given stays.
    pub fn tell(&self, listener: fn(Phase)) {
        // one that has a listener keeps it
        let _ = self.listener.set(listener);
    }

    /// Counts from nothing again, for another load: nothing of the last one runs any more.
    pub fn begin_again(&self) {
        let Self {
            phase: _,
            listener: _,
            read_bytes,
            cached_bytes,
            padding_bytes,
            retried_bytes,
            reads,
            received_bytes,
            sent_bytes,
            steps: _,
            in_hand,
        } = self;
        for counter in [
            read_bytes,
            cached_bytes,
            padding_bytes,
            retried_bytes,
            reads,
            received_bytes,
            sent_bytes,
            in_hand,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        self.enter(Phase::Waiting);
    }
}
