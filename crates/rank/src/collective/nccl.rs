//! NCCL between devices: what a rank sends goes from pinned memory to its device, straight from there to the others', and
//! arrives in their devices' memory.
//!
//! ```text
//! copy stream    slot ──H2D──► staged ──kernel──► packed, where pieces are not one run
//! wire stream                  staged, packed ──one group of sends and receives──► received, on the others' devices
//! ```
//!
//! Every operation is one group of point-to-point sends and receives, so that ranks get their pieces alone, however uneven.
//! NCCL is called by a thread of its own ([`Communicator`]); whether an operation has ended is asked of an event on the
//! stream. Buffers for a fixed number of operations are allocated up front; a rank only runs so far ahead.
//!
//! **Not found by this**: two ranks that disagree on how much one sends to the other. NCCL has no word for it and waits, or
//! worse; the plan's hash, which all ranks have compared before, is what rules it out.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use longshore_kernels::cuda::{
    driver::{CudaError, Device, DeviceMemory, Event, Stream},
    place::Runs,
};
use longshore_nccl::{Communicator, Group, Membership, Nccl, NcclError, Pending, UniqueId};

use super::{
    Arrival, Collective, CollectiveError, DeviceBytes, Incoming, Kind, Operation, Piece,
    slots::{Slot, SlotPool},
};
use crate::{
    device::slabs::{self, NotPlaced, Slab, Slabs},
    error::RankError,
};

/// What an exchange sets aside on each rank. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Ranks of the group.
    pub world_size: u32,
    /// Slots to send from, in pinned memory of the host.
    pub slots: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Operations that may be under way at a time.
    pub depth: u32,
}

/// Parts of a buffer begin on this boundary.
const ALIGNMENT: u64 = 512;

impl Form {
    /// Bytes of device memory that it takes.
    pub fn device_bytes(&self) -> u64 {
        self.slabs().device_bytes() + u64::from(self.depth) * self.buffer_bytes()
    }

    /// A slab for each operation.
    fn slabs(&self) -> slabs::Form {
        let (slabs, slab_bytes) = (self.depth, self.slot_bytes);
        slabs::Form { slabs, slab_bytes, table_spans: slabs::TABLE_SPANS_MAX }
    }

    fn part_bytes(&self) -> u64 {
        self.slot_bytes.next_multiple_of(ALIGNMENT)
    }

    /// What one operation packs for the other ranks, and receives from them: the whole slot of each at most.
    fn buffer_bytes(&self) -> u64 {
        2 * u64::from(self.world_size) * self.part_bytes()
    }
}

/// Thread blocks of an operation where ranks share a device: all of them have to run at the same time.
const SHARED_DEVICE_CTAS: u32 = 2;

/// How long NCCL may take to put an operation on the stream. The first with a rank waits until that rank gets there; a rank
/// that does not is found by the coordinator, which ends the exchange.
const GROUP_LIMIT: Duration = Duration::from_secs(86_400);

/// How long an abort may take. Source: a survivor was released 0.15 s after the abort where a peer was killed in the middle
/// of a broadcast (NVIDIA-NeMo/RL#3591); an abort that hangs is known too (NVIDIA/nccl#1013).
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// How often streams are looked at while operations are under way.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// One rank's end of an exchange over NCCL.
#[derive(Debug)]
pub struct NcclCollective {
    rank: u32,
    form: Form,
    device: Arc<Device>,
    slots: Arc<SlotPool>,
    slabs: Arc<Slabs>,
    memory: Arc<DeviceMemory>,
    copies: Stream,
    wires: Arc<Stream>,
    communicator: Communicator,
    bell: Arc<Bell>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    under_way: VecDeque<UnderWay>,
    /// What nobody has picked up yet.
    arrived: Vec<Arrival>,
    /// Why nothing can be done any more.
    over: Option<CollectiveError>,
}

/// An operation that was started and has not arrived.
#[derive(Debug)]
struct UnderWay {
    number: u64,
    stage: Stage,
    receives: Vec<u64>,
    buffer: Buffer,
    /// Where its bytes come from; kept until they have been sent.
    _slot: Option<Slot>,
}

#[derive(Debug)]
enum Stage {
    /// To be handed to NCCL once the one before is on the stream.
    Waiting(Group),
    /// In the hands of NCCL's thread.
    HandedOver(Pending<()>),
    /// On the stream, up to this event.
    OnStream(Event),
}

/// The memory of one operation; given back when everything that arrived in it has been dropped.
#[derive(Debug)]
struct Buffer {
    slab: Option<Slab>,
    /// That of all operations, of which a part is this one's.
    memory: Arc<DeviceMemory>,
    offset: u64,
    bell: Arc<Bell>,
}

impl Buffer {
    fn address(&self) -> u64 {
        self.memory.address() + self.offset
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // before the bell: whoever wakes up finds it free
        self.slab = None;
        self.bell.ring();
    }
}

/// Wakes the thread that waits for something to change.
#[derive(Debug, Default)]
struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.heard.notify_all();
    }

    /// Waits for a ring since the last call, or for `timeout`; says whether there was one.
    fn wait(&self, timeout: Duration) -> bool {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.heard.wait_timeout_while(rung, timeout, |rung| !*rung);
        std::mem::take(&mut *waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl NcclCollective {
    /// Joins a group, every rank of which does the same within `limit`. `shared`: ranks share devices.
    ///
    /// # Errors
    /// NCCL or memory cannot be had, or a rank does not join.
    pub fn connect(
        rank: u32,
        form: Form,
        device: &Arc<Device>,
        id: UniqueId,
        shared: bool,
        limit: Duration,
    ) -> Result<Self, RankError> {
        let nccl = Nccl::load().map_err(failed)?;
        let memory = u64::from(form.depth) * form.buffer_bytes();
        let memory = Arc::new(device.allocate("exchange", memory)?);
        let slots = SlotPool::pinned(form.slots, form.slot_bytes as usize, device)?;
        let slabs = Slabs::new(device, form.slabs())?;
        let (copies, wires) = (device.stream()?, Arc::new(device.stream()?));
        let bell = Arc::new(Bell::default());
        let max_ctas = shared.then_some(SHARED_DEVICE_CTAS);
        let membership = Membership { id, rank, world_size: form.world_size, max_ctas };
        let (bound, notified) = (Arc::clone(device), Arc::clone(&bell));
        let bind = move || bound.make_current().map(|()| bound);
        let (communicator, connected) =
            Communicator::connect(nccl, membership, limit, bind, move || notified.ring())
                .map_err(failed)?;
        connected.wait().map_err(failed)?;
        Ok(Self {
            rank,
            form,
            device: Arc::clone(device),
            slots,
            slabs,
            memory,
            copies,
            wires,
            communicator,
            bell,
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // consistent after every statement that changes it
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enqueues what has to be sent up to the wire; returns the group of sends and receives.
    fn pack(
        &self,
        sends: &[Vec<Piece>],
        receives: &[u64],
        slot: Option<&Slot>,
        buffer: &mut Buffer,
    ) -> Result<Group, CollectiveError> {
        let mut group = Group::default();
        let part = |number: u32| buffer.address() + u64::from(number) * self.form.part_bytes();
        let packed: Vec<u64> = (0..self.form.world_size).map(part).collect();
        let received: Vec<u64> = (self.form.world_size..).map(part).take(receives.len()).collect();
        let pieces = || sends.iter().flatten().filter(|piece| piece.bytes() > 0);
        let from = pieces().map(|piece| piece.offset).min().unwrap_or(0);
        let to = pieces().filter_map(Piece::end).max().unwrap_or(0);
        if from < to {
            let slot = slot.ok_or_else(|| operation("there are bytes to send, but no slot"))?;
            let slab = buffer.slab.as_mut().ok_or_else(|| operation("a buffer without a slab"))?;
            let staged = slab.address();
            let hull = &slot.bytes()[from as usize..to as usize];
            // SAFETY: slot and buffer are kept until the operation has ended; the slab is nobody else's and as long as a
            // slot.
            unsafe { self.copies.copy_to_device(staged, hull.as_ptr(), hull.len() as u64) }
                .map_err(device)?;
            let mut runs = Vec::new();
            for (rank, pieces) in (0..).zip(sends) {
                let (mut at, own) = (packed[rank as usize], packed[rank as usize]);
                let pieces: Vec<&Piece> = pieces.iter().filter(|p| p.bytes() > 0).collect();
                if let [piece] = pieces[..]
                    && piece.rows == 1
                {
                    group.send(staged + piece.offset - from, piece.width, rank);
                    continue;
                }
                for piece in pieces {
                    runs.push(Runs {
                        source_offset: piece.offset - from,
                        target: at,
                        rows: piece.rows,
                        width: piece.width,
                        source_stride: piece.stride,
                        target_stride: piece.width,
                        cast: None,
                    });
                    at += piece.bytes();
                }
                if at - own > self.form.part_bytes() {
                    return Err(operation("a rank is sent more than a slot"));
                }
                group.send(own, at - own, rank);
            }
            // SAFETY: the slab was just taken, so whatever used it has ended; slab and buffer are kept until the operation
            // has; pieces lie within the slot (`Kind::check`), what they become within the rank's part of the buffer.
            unsafe { slab.place(runs, staged, &self.copies) }.map_err(|e| match e {
                NotPlaced::Device(e) => device(e),
                NotPlaced::Unknown(_) => operation("pieces are converted"),
            })?;
            self.copies.record(&slab.events().copied).map_err(device)?;
            self.wires.wait(&slab.events().copied).map_err(device)?;
        }
        for (source, bytes) in (0..).zip(receives) {
            if *bytes > self.form.part_bytes() {
                return Err(operation("a rank sends more than a slot"));
            }
            group.recv(received[source as usize], *bytes, source);
        }
        Ok(group)
    }

    /// Takes every operation as far as it gets now; what fails is the end of all.
    fn advance(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        if state.over.is_none()
            && let Err(e) = self.try_advance(&mut state)
        {
            state.over = Some(e);
        }
        state
    }

    fn try_advance(&self, state: &mut State) -> Result<(), CollectiveError> {
        if let Some(failure) = self.communicator.failure() {
            return Err(nccl(&failure));
        }
        // each goes on the stream once the one before is there
        for operation in &mut state.under_way {
            if let Stage::Waiting(group) = &mut operation.stage {
                let stream = longshore_nccl::Stream::from_raw(self.wires.raw());
                // SAFETY: buffers and the stream are this collective's, which aborts the communicator before it gives any
                // of them up; parts are each operation's own until it has arrived, and what arrived is dropped.
                let pending =
                    unsafe { self.communicator.group(std::mem::take(group), stream, GROUP_LIMIT) };
                operation.stage = Stage::HandedOver(pending.map_err(|e| nccl(&e))?);
            }
            if let Stage::HandedOver(pending) = &mut operation.stage {
                let Some(answer) = pending.try_take() else { break };
                answer.map_err(|e| nccl(&e))?;
                let event = self.device.event().map_err(device)?;
                self.wires.record(&event).map_err(device)?;
                operation.stage = Stage::OnStream(event);
            }
        }
        while let Some(UnderWay { stage: Stage::OnStream(event), .. }) = state.under_way.front()
            && event.is_done().map_err(device)?
            && let Some(UnderWay { number, receives, buffer, .. }) = state.under_way.pop_front()
        {
            let buffer = Arc::new(buffer);
            let others = (0..).zip(receives).filter(|(source, _)| *source != self.rank);
            let arrivals =
                others.map(|(source, bytes)| self.arrival(number, source, bytes, &buffer));
            state.arrived.extend(arrivals);
        }
        Ok(())
    }

    fn arrival(&self, operation: u64, source: u32, bytes: u64, buffer: &Arc<Buffer>) -> Arrival {
        let number = u64::from(self.form.world_size + source);
        let address = buffer.address() + number * self.form.part_bytes();
        let keep = Arc::clone(buffer);
        let bytes = match bytes {
            0 => Incoming::Nothing,
            bytes => {
                let device = Arc::clone(&self.device);
                Incoming::OnDevice(DeviceBytes { device, address, bytes, _keep: Box::new(keep) })
            }
        };
        Arrival { operation, source, bytes }
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.form.world_size
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lease(&self) -> Result<Option<Slot>, CollectiveError> {
        if let Some(over) = &self.lock().over {
            return Err(over.clone());
        }
        match self.slots.lease() {
            // those of operations that have ended come back
            None => {
                drop(self.advance());
                Ok(self.slots.lease())
            }
            slot => Ok(slot),
        }
    }

    fn start(&self, operation: Operation) -> Result<u64, CollectiveError> {
        let Form { world_size, slot_bytes, .. } = self.form;
        let mut state = self.lock();
        if let Some(over) = &state.over {
            return Err(over.clone());
        }
        operation.kind.check(self.rank, world_size, slot_bytes)?;
        let slab = self.slabs.try_take().ok_or_else(|| self::operation("no room for it"))?;
        let number = u64::from(slab.number());
        let mut buffer = Buffer {
            slab: Some(slab),
            offset: number * self.form.buffer_bytes(),
            memory: Arc::clone(&self.memory),
            bell: Arc::clone(&self.bell),
        };
        let Operation { kind, data } = operation;
        let receives = kind.receives(self.rank, world_size);
        let group = match kind {
            Kind::Barrier => self.barrier(&buffer),
            kind => {
                let sends = kind.into_sends(self.rank, world_size);
                let packed = self.pack(&sends, &receives, data.as_ref(), &mut buffer);
                if packed.is_err() {
                    // slot and slab are kept until nothing uses them; a device that fails is done
                    let _ = self.copies.synchronize();
                }
                packed?
            }
        };
        let (number, stage) = (state.next, Stage::Waiting(group));
        state.next += 1;
        state.under_way.push_back(UnderWay { number, stage, receives, buffer, _slot: data });
        drop(state);
        // the others wait for it already
        drop(self.advance());
        Ok(number)
    }

    fn has_room(&self) -> bool {
        self.advance().over.is_some() || self.slabs.in_use() < self.form.depth
    }

    fn arrivals(&self) -> Result<Vec<Arrival>, CollectiveError> {
        let mut state = self.advance();
        match &state.over {
            Some(over) => Err(over.clone()),
            None => Ok(std::mem::take(&mut state.arrived)),
        }
    }

    fn is_idle(&self) -> bool {
        let state = self.advance();
        state.under_way.is_empty() && state.arrived.is_empty()
    }

    fn wait(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let on_stream = |state: &State| match state.under_way.front() {
                Some(UnderWay { stage: Stage::OnStream(event), .. }) => Some(event.is_done()),
                _ => None,
            };
            let pause = match on_stream(&self.lock()) {
                // or it has failed, which is found by whoever looks
                Some(Ok(true) | Err(_)) => return,
                Some(Ok(false)) => left.min(LOOK_EVERY),
                None => left,
            };
            if self.bell.wait(pause) || left.is_zero() {
                return;
            }
        }
    }

    fn wake(&self) {
        self.bell.ring();
    }

    fn abort(&self, why: &str) {
        let over = CollectiveError::Aborted { why: why.to_owned() };
        self.lock().over.get_or_insert(over);
        self.bell.ring();
        // whether it succeeds is seen when this goes
        let _ = self.communicator.abort(Duration::ZERO);
    }

    fn peak_bytes(&self) -> u64 {
        self.slots.peak_bytes()
    }

    fn held_bytes(&self) -> u64 {
        self.slots.held_bytes()
    }
}

impl NcclCollective {
    /// A byte from everyone to everyone.
    fn barrier(&self, buffer: &Buffer) -> Group {
        let part = |number: u32| buffer.address() + u64::from(number) * self.form.part_bytes();
        let mut group = Group::default();
        for other in (0..self.form.world_size).filter(|other| *other != self.rank) {
            group.send(part(other), 1, other);
            group.recv(part(self.form.world_size + other), 1, other);
        }
        group
    }
}

/// The communicator goes first: until then NCCL may use the buffers.
impl Drop for NcclCollective {
    fn drop(&mut self) {
        if let Err(stuck) = self.communicator.abort(ABORT_LIMIT) {
            tracing::error!("NCCL cannot be ended: {stuck}; this process has to be");
            // giving memory up would wait for what hangs, and NCCL may come back to its stream
            let memory = (Arc::clone(&self.memory), Arc::clone(&self.slabs));
            std::mem::forget((memory, Arc::clone(&self.slots), Arc::clone(&self.wires)));
            return;
        }
        // copies from slots do not end with the communicator; a device that fails is done
        let _ = self.copies.synchronize();
        let _ = self.wires.synchronize();
    }
}

fn operation(what: &str) -> CollectiveError {
    CollectiveError::Operation { what: what.to_owned() }
}

fn device(e: CudaError) -> CollectiveError {
    CollectiveError::System { action: "using the device", what: e.to_string() }
}

fn nccl(e: &NcclError) -> CollectiveError {
    CollectiveError::System { action: "NCCL", what: e.to_string() }
}

fn failed(e: NcclError) -> RankError {
    nccl(&e).into()
}
