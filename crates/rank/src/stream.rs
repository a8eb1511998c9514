//! The workers of one rank: threads that read, place and post-process until the rank is ready or stopped.
//!
//! Post-processing goes before reading, so that a layer is finished while its bytes are warm.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use longshore_models::{byte_range::ByteRange, have::Have, placement::Span};
use ractor::ActorRef;

use crate::{
    collective::{
        CollectiveError,
        slots::{Slot, SlotPool},
    },
    device::{Done, Origin, Staged, Uploads},
    error::RankError,
    exchange::{Exchange, Landed},
    fault,
    params::ParamMemory,
    post_process,
    protocol::{
        Former, Generation, Peer, Progress, RankMessage, Read, ReadFrom, Work, WorkerEvent,
    },
    scatter::{
        Ranks, Scatter, Slab, count_exchange, count_received, count_sent, place_all, steps,
        tensors_in,
    },
    staging::{DIRECT_ALIGNMENT, Staging},
};

/// One load on one rank, shared by its workers.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) rank: u32,
    pub(crate) generation: Generation,
    pub(crate) work: Arc<Work>,
    pub(crate) staging: Staging,
    queue: Mutex<Queue>,
    wake: Condvar,
    reads_left: AtomicUsize,
    /// With ranks in other processes.
    exchange: Option<Exchange>,
    /// What is read into, where the parameters live on a device.
    pinned: Option<Arc<SlotPool>>,
    // dropped last: parameters that nobody else holds are all that is left of a load
    ranks: Ranks,
    /// Of this rank.
    own: Peer,
    /// What has landed here.
    have: Arc<Mutex<Have>>,
    /// What this rank had in a former group.
    former: Option<Arc<Former>>,
    /// Threads that have not ended.
    threads: Mutex<u32>,
    still: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    next_read: usize,
    landed: VecDeque<Landed>,
    finishes: VecDeque<u32>,
    stopped: bool,
}

/// What a job's mutexes hold is consistent after every statement that changes it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread of a job, from before it starts until nothing of it is left.
struct AtWork(Arc<Job>);

impl AtWork {
    fn new(job: &Arc<Job>) -> Self {
        *lock(&job.threads) += 1;
        Self(Arc::clone(job))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        *lock(&self.0.threads) -= 1;
        self.0.still.notify_all();
    }
}

enum Task {
    /// Place what another process has sent.
    Place(Landed),
    /// Run a finish.
    Finish(u32),
    /// Read; with a slot when other processes want of it.
    Read(usize, Option<Slot>),
    Exit,
}

impl Job {
    /// `own` is this rank as the others see it; `exchange` joins it with ranks in other processes.
    ///
    /// # Errors
    /// Memory cannot be pinned.
    #[expect(clippy::too_many_arguments, reason = "the fields of a job, made in one place")]
    pub(crate) fn new(
        rank: u32,
        generation: Generation,
        work: Arc<Work>,
        own: Peer,
        ranks: Ranks,
        exchange: Option<Exchange>,
        have: Arc<Mutex<Have>>,
        former: Option<Arc<Former>>,
    ) -> Result<Self, RankError> {
        let slab_bytes = slab_bytes(work.plan.read_bytes_max) as usize;
        let reads_left = AtomicUsize::new(work.plan.reads[rank as usize].len());
        let pinned = match own.memory.device() {
            Some(device) => Some(SlotPool::pinned(work.pinned_slabs, slab_bytes, device)?),
            None => None,
        };
        Ok(Self {
            rank,
            generation,
            work,
            staging: Staging::new(slab_bytes),
            queue: Mutex::default(),
            wake: Condvar::new(),
            reads_left,
            exchange,
            pinned,
            ranks,
            own,
            have,
            former,
            threads: Mutex::default(),
            still: Condvar::new(),
        })
    }

    /// Starts the workers, and the thread of the exchange.
    ///
    /// # Errors
    /// The system gives no thread; those already started are stopped.
    pub(crate) fn spawn_workers(self: &Arc<Self>) -> Result<(), RankError> {
        for number in 0..self.work.concurrency {
            self.spawn(format!("rank{}-worker{number}", self.rank), Self::run_tasks)?;
        }
        if self.exchange.is_some() {
            let run = |job: &Arc<Self>| job.run_exchange();
            self.spawn(format!("rank{}-exchange", self.rank), run)?;
        }
        if self.own.uploads.is_some() {
            self.spawn(format!("rank{}-device", self.rank), |job| job.run_device())?;
        }
        Ok(())
    }

    fn spawn(self: &Arc<Self>, name: String, run: fn(&Arc<Self>)) -> Result<(), RankError> {
        let at_work = AtWork::new(self);
        let spawned = std::thread::Builder::new().name(name).spawn(move || run(&at_work.0));
        spawned.map(|_| ()).map_err(|e| {
            self.stop("a thread could not be started");
            RankError::Thread(e)
        })
    }

    /// Waits until every thread has ended; once this is stopped they do as soon as what they are at is done.
    pub(crate) fn wait_until_still(&self) {
        let mut threads = lock(&self.threads);
        while *threads > 0 {
            threads = self.still.wait(threads).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands a finish to the workers.
    pub(crate) fn push_finish(&self, finish: u32) {
        self.lock().finishes.push_back(finish);
        self.wake.notify_one();
    }

    /// Lets the workers exit after what they are doing, and ends the exchange.
    pub(crate) fn stop(&self, why: &str) {
        let mut queue = self.lock();
        queue.stopped = true;
        // what has arrived is given back
        queue.landed.clear();
        drop(queue);
        self.wake.notify_all();
        if let Some(exchange) = &self.exchange {
            exchange.collective.abort(why);
        }
        if let Some(pinned) = &self.pinned {
            pinned.close();
        }
        if let Some(uploads) = &self.own.uploads {
            uploads.close();
        }
    }

    pub(crate) fn progress(&self) -> &Progress {
        &self.own.progress
    }

    /// The most staging memory that the rank has held, slots included, and what it holds now; in bytes.
    pub(crate) fn staging_bytes(&self) -> (u64, u64) {
        let slots = self.exchange.as_ref().map(|e| &e.collective);
        let (mut peak, mut held) = slots.map_or((0, 0), |s| (s.peak_bytes(), s.held_bytes()));
        if let Some(pinned) = &self.pinned {
            (peak, held) = (peak + pinned.peak_bytes(), held + pinned.held_bytes());
        }
        (self.staging.peak_bytes() + peak, self.staging.held_bytes() + held)
    }

    fn memory(&self) -> &ParamMemory {
        &self.own.memory
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    fn run_tasks(self: &Arc<Self>) {
        let mut scatter = Scatter::default();
        let mut workspace = Vec::new();
        loop {
            let task = match self.next() {
                Ok(Task::Exit) => return,
                Ok(task) => task,
                Err(e) => return self.give_up(e),
            };
            let progress = self.progress();
            progress.in_hand.fetch_add(1, Ordering::Relaxed);
            let done = catch_unwind(AssertUnwindSafe(|| match task {
                Task::Place(landed) => self.place(landed),
                Task::Finish(finish) => self.finish(finish, &mut workspace),
                Task::Read(number, slot) => match &self.pinned {
                    None => self.read(number, slot, &mut scatter),
                    Some(pinned) => self.read_to_device(number, slot, pinned, &mut scatter),
                },
                Task::Exit => Ok(()),
            }));
            progress.steps.fetch_add(1, Ordering::Relaxed);
            progress.in_hand.fetch_sub(1, Ordering::Relaxed);
            match done {
                Ok(Ok(())) => {}
                Ok(Err(RankError::Ended)) => return,
                Ok(Err(e)) => return self.give_up(e),
                Err(panic) => return self.give_up(RankError::Panicked(panic_text(&*panic))),
            }
        }
    }

    fn run_device(&self) {
        let Some(uploads) = &self.own.uploads else { return };
        loop {
            let done = catch_unwind(AssertUnwindSafe(|| match uploads.next_done()? {
                None => Ok(true),
                Some(Done::Placed { reader, spans, covers }) => {
                    count_received(&spans, reader, &self.ranks);
                    self.land(&spans)?;
                    if let Some((file, range)) = covers {
                        self.note(file, range);
                    }
                    Ok(false)
                }
                Some(Done::Finished(number)) => {
                    self.tell(&self.own, WorkerEvent::FinishDone(number));
                    Ok(false)
                }
            }));
            match done {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => {}
                // whoever stopped the rank knows why; what is under way is waited for all the same
                Ok(Err(_)) if self.lock().stopped => {}
                Ok(Err(e)) => self.give_up(e),
                Err(panic) => self.give_up(RankError::Panicked(panic_text(&*panic))),
            }
        }
    }

    fn run_exchange(&self) {
        let Some(exchange) = &self.exchange else { return };
        let land = |landed| {
            self.lock().landed.push_back(landed);
            self.wake.notify_one();
        };
        // workers that wait for a slot look again; the lock orders this after a look that found none
        let freed = || {
            drop(self.lock());
            self.wake.notify_all();
        };
        let driven =
            catch_unwind(AssertUnwindSafe(|| exchange.drive(&self.work.plan, land, freed)));
        match driven {
            Ok(Ok(())) => self.tell(&self.own, WorkerEvent::ExchangeDone),
            // whoever stopped the rank knows why
            Ok(Err(_)) if self.lock().stopped => {}
            Ok(Err(e)) => self.give_up(e.into()),
            Err(panic) => self.give_up(RankError::Panicked(panic_text(&*panic))),
        }
    }

    fn give_up(&self, error: RankError) {
        self.stop("the rank gave up");
        self.tell(&self.own, WorkerEvent::Failed(error));
    }

    /// The next task; waits when there is none yet. What others wait for goes first: their slots come back when it is
    /// placed. Slots are taken in the order of reads, so that the oldest round always has one.
    fn next(&self) -> Result<Task, RankError> {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                return Ok(Task::Exit);
            }
            if let Some(landed) = queue.landed.pop_front() {
                return Ok(Task::Place(landed));
            }
            if let Some(finish) = queue.finishes.pop_front() {
                return Ok(Task::Finish(finish));
            }
            if let Some((number, slot)) = self.next_read(&mut queue)? {
                return Ok(Task::Read(number, slot));
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next read, with a slot where it needs one; `None` when none is left, or no slot is free.
    fn next_read(&self, queue: &mut Queue) -> Result<Option<(usize, Option<Slot>)>, RankError> {
        let Some(read) = self.work.plan.reads[self.rank as usize].get(queue.next_read) else {
            return Ok(None);
        };
        let slot = match &self.exchange {
            Some(exchange) if read.round.is_some() => match exchange.collective.lease()? {
                None => return Ok(None),
                slot => slot,
            },
            _ => None,
        };
        queue.next_read += 1;
        Ok(Some((queue.next_read - 1, slot)))
    }

    fn read(
        &self,
        number: usize,
        mut slot: Option<Slot>,
        scatter: &mut Scatter,
    ) -> Result<(), RankError> {
        fault::at_read(self.rank, self.generation, number)?;
        let Work { plan, sources, .. } = &*self.work;
        let read = &plan.reads[self.rank as usize][number];
        match read.from {
            ReadFrom::Storage => {}
            ReadFrom::Parameters => return self.pass_on(read, slot, scatter),
            ReadFrom::Former => return self.take_over(read, slot, scatter),
        }
        let source = &sources[read.file as usize];
        let progress = self.progress();
        // the steps of one read are one read to storage, unless it answers short
        let mut counted = 0;
        for range in steps(&plan.checkpoint, read.file, read.range, source.mode.direct) {
            let step = Read { range, ..*read };
            let slab = match &mut slot {
                None => Slab::Own(&self.staging),
                Some(slot) => {
                    let at = (range.start - read.range.start) as usize;
                    let part = &mut slot.bytes_mut()[at..at + range.len() as usize];
                    Slab::Slot(part, &self.staging)
                }
            };
            let outcome = source.unless_cut(range, || {
                scatter.execute(plan, self.rank, &step, source, &self.ranks, slab)
            })?;
            progress.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
            progress.padding_bytes.fetch_add(outcome.padding_bytes, Ordering::Relaxed);
            progress.retried_bytes.fetch_add(outcome.retried_bytes, Ordering::Relaxed);
            progress.cached_bytes.fetch_add(outcome.cached_bytes, Ordering::Relaxed);
            progress.reads.fetch_add(outcome.reads.saturating_sub(counted), Ordering::Relaxed);
            counted = 1;
            progress.steps.fetch_add(1, Ordering::Relaxed);
            count_exchange(scatter.spans(), self.rank, &self.ranks);
            self.land(scatter.spans())?;
            self.note(read.file, range);
        }
        if let (Some(exchange), Some(round), Some(slot)) = (&self.exchange, read.round, slot) {
            exchange.contribute(round, slot);
        }
        self.read_ended();
        Ok(())
    }

    /// Hands bytes on that this rank has, out of its parameters.
    fn pass_on(
        &self,
        read: &Read,
        slot: Option<Slot>,
        scatter: &mut Scatter,
    ) -> Result<(), RankError> {
        let (Some(exchange), Some(round), Some(mut slot)) = (&self.exchange, read.round, slot)
        else {
            let what = "bytes are to be handed on, and nobody takes them".to_owned();
            return Err(RankError::Exchange(CollectiveError::Operation { what }));
        };
        let plan = &self.work.plan;
        let mut copied = Ok(());
        for (tensor, within, offset) in tensors_in(&plan.checkpoint, read.file, read.range) {
            plan.placement.spans(
                tensor,
                within,
                |r| r == self.rank,
                |mut span| {
                    span.source_offset += offset;
                    if copied.is_ok() {
                        // SAFETY: this rank has all of the read, so its bytes landed in an earlier generation, whose
                        // workers have ended; no finish works on parameters that are handed on.
                        copied = unsafe { self.memory().copy_back(&span, slot.bytes_mut()) };
                    }
                },
            );
        }
        copied?;
        scatter.find_spans(plan, self.rank, read);
        count_sent(scatter.spans(), self.rank, &self.ranks);
        exchange.contribute(round, slot);
        self.read_ended();
        Ok(())
    }

    /// Places bytes that this rank had in a former group, here and where others want them.
    fn take_over(
        &self,
        read: &Read,
        slot: Option<Slot>,
        scatter: &mut Scatter,
    ) -> Result<(), RankError> {
        let plan = &self.work.plan;
        let mut lease = self.staging.lease()?;
        let bytes = &mut lease.bytes_mut()[..read.range.len() as usize];
        self.copy_former(read, bytes)?;
        scatter.find_spans(plan, self.rank, read);
        place_all(scatter.spans(), bytes, &self.ranks)?;
        count_exchange(scatter.spans(), self.rank, &self.ranks);
        self.land(scatter.spans())?;
        self.note(read.file, read.range);
        if let (Some(exchange), Some(round), Some(mut slot)) = (&self.exchange, read.round, slot) {
            scatter.fill_slot(bytes, slot.bytes_mut(), &self.ranks);
            exchange.contribute(round, slot);
        }
        // given back before anyone can believe the rank to be ready (RNK-3)
        drop(lease);
        self.read_ended();
        Ok(())
    }

    /// Copies what this rank had of `read` in a former group.
    fn copy_former(&self, read: &Read, into: &mut [u8]) -> Result<(), RankError> {
        let Some(former) = &self.former else {
            let what = "bytes of a former group are to be handed on, and there are none".to_owned();
            return Err(RankError::Exchange(CollectiveError::Operation { what }));
        };
        // SAFETY: the plan was proven: all of the read had landed there, as it is in the file. The workers of that group have
        // ended, and no finish works on parameters that are handed on.
        unsafe { former.copy_out(&self.work.plan.checkpoint, read.file, read.range, into) }
    }

    fn read_ended(&self) {
        if self.reads_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.tell(&self.own, WorkerEvent::ReadsDone);
        }
    }

    /// Reads into pinned memory, from where the bytes go to the devices of all ranks of this process that want them.
    fn read_to_device(
        self: &Arc<Self>,
        number: usize,
        slot: Option<Slot>,
        pinned: &Arc<SlotPool>,
        scatter: &mut Scatter,
    ) -> Result<(), RankError> {
        fault::at_read(self.rank, self.generation, number)?;
        let Work { plan, sources, .. } = &*self.work;
        let read = &plan.reads[self.rank as usize][number];
        if read.from == ReadFrom::Parameters {
            return self.pass_on(read, slot, scatter);
        }
        let mut slab = pinned.lease_waiting().ok_or(RankError::Ended)?;
        let begin = if read.from == ReadFrom::Former {
            self.copy_former(read, &mut slab.bytes_mut()[..read.range.len() as usize])?;
            0
        } else {
            let source = &sources[read.file as usize];
            let staged = source
                .unless_cut(read.range, || source.read_staged(read.range, slab.bytes_mut()))?;
            let progress = self.progress();
            progress.reads.fetch_add(staged.reads, Ordering::Relaxed);
            progress.read_bytes.fetch_add(read.range.len(), Ordering::Relaxed);
            progress.padding_bytes.fetch_add(staged.padding_bytes, Ordering::Relaxed);
            progress.retried_bytes.fetch_add(staged.retried_bytes, Ordering::Relaxed);
            progress.cached_bytes.fetch_add(staged.cached_bytes, Ordering::Relaxed);
            staged.begin
        };
        scatter.find_spans(plan, self.rank, read);
        if let (Some(exchange), Some(round), Some(mut slot)) = (&self.exchange, read.round, slot) {
            let bytes = &slab.bytes()[begin..][..read.range.len() as usize];
            scatter.fill_slot(bytes, slot.bytes_mut(), &self.ranks);
            exchange.contribute(round, slot);
        }
        // an upload that nobody picks up any more must not keep the load
        let (begin, job) = (begin as u64, Arc::downgrade(self));
        let ended = move || job.upgrade().iter().for_each(|job| job.read_ended());
        let staged = Arc::new(Staged::new(slab).on_end(ended));
        // before anyone else can believe this rank to be ready
        count_sent(scatter.spans(), self.rank, &self.ranks);
        let mut spans = scatter.spans().to_vec();
        spans.sort_by_key(|span| span.rank);
        let covers = Some((read.file, read.range));
        for spans in spans.chunk_by(|a, b| a.rank == b.rank) {
            let Some(uploads) = self.ranks.here(spans[0].rank).and_then(|p| p.uploads.as_ref())
            else {
                continue;
            };
            let origin = Origin::Host { staged: Arc::clone(&staged), begin };
            uploads.place(spans.to_vec(), self.rank, origin, covers)?;
        }
        Ok(())
    }

    /// Places what another process has read.
    fn place(&self, landed: Landed) -> Result<(), RankError> {
        let spans = landed.spans(&self.work.plan, self.rank);
        if let (Some(pinned), Some(uploads)) = (&self.pinned, &self.own.uploads) {
            return place_on_device(spans, landed, pinned, uploads);
        }
        place_all(&spans, landed.host_bytes()?, &self.ranks)?;
        count_exchange(&spans, landed.source, &self.ranks);
        // what it lies in goes back before anyone can believe the rank to be ready (RNK-3)
        let Read { file, range, .. } = landed.read;
        drop(landed);
        self.land(&spans)?;
        self.note(file, range);
        Ok(())
    }

    /// Counts what has landed, and tells each rank of its parameters that are complete.
    fn land(&self, spans: &[Span]) -> Result<(), RankError> {
        for span in spans {
            if let Some(peer) = self.ranks.here(span.rank)
                && peer.memory.landed(span.param, span.target_bytes())?
            {
                self.tell(peer, WorkerEvent::ParamLanded(span.param));
            }
        }
        Ok(())
    }

    fn finish(&self, number: u32, workspace: &mut Vec<u8>) -> Result<(), RankError> {
        if let Some(uploads) = &self.own.uploads {
            // SAFETY: as below.
            if unsafe { uploads.finish(number) }? {
                self.tell(&self.own, WorkerEvent::FinishDone(number));
            }
            return Ok(());
        }
        let finish = &self.work.plan.placement.finishes[number as usize];
        // SAFETY: the state machine pushes a finish once, after its inputs have landed (RNK-2); outputs belong to one
        // finish only.
        unsafe { post_process::run(finish, self.rank, self.memory(), workspace) }?;
        self.tell(&self.own, WorkerEvent::FinishDone(number));
        Ok(())
    }

    /// Notes that everything of `range` that this rank needs has landed on it.
    fn note(&self, file: u32, range: ByteRange) {
        lock(&self.have).insert(file, range);
    }

    fn tell(&self, peer: &Peer, event: WorkerEvent) {
        let actor: &ActorRef<RankMessage> = &peer.actor;
        // a rank that is gone has no use for the news; its supervisor knows
        let _ = actor.cast(RankMessage::Worker(self.generation, event));
    }
}

/// Places what another process has read: straight away where it arrived on the device, else through pinned memory, to which
/// only what this rank wants is copied.
fn place_on_device(
    mut spans: Vec<Span>,
    landed: Landed,
    pinned: &Arc<SlotPool>,
    uploads: &Uploads,
) -> Result<(), RankError> {
    let covers = Some((landed.read.file, landed.read.range));
    if landed.bytes.device_address().is_some() {
        let origin = Origin::Device { bytes: landed.bytes };
        return uploads.place(spans, landed.source, origin, covers);
    }
    // what all ranks of a host see may be for some of them only
    if spans.is_empty() {
        return Ok(());
    }
    let source = landed.source;
    let mut landed = Some(landed);
    while let Some(held) = &landed {
        let mut slab = pinned.lease_waiting().ok_or(RankError::Ended)?;
        let packed = pack(&mut spans, held.host_bytes()?, slab.bytes_mut());
        if spans.is_empty() {
            // what it lies in goes back before anyone can believe the rank to be ready (RNK-3)
            landed = None;
        }
        let origin = Origin::Host { staged: Arc::new(Staged::new(slab)), begin: 0 };
        // uploads end in their order: with the last of them, all have
        uploads.place(packed, source, origin, covers.filter(|_| spans.is_empty()))?;
    }
    Ok(())
}

/// Copies the runs of as many of `spans` as there is room for, one after the other; takes these away, and returns them as
/// they lie in `slab`.
fn pack(spans: &mut Vec<Span>, bytes: &[u8], slab: &mut [u8]) -> Vec<Span> {
    let mut end = 0;
    let fits = |span: &&Span| {
        end += span.source_bytes();
        end <= slab.len() as u64
    };
    let count = spans.iter().take_while(fits).count();
    assert!(count > 0, "a span is longer than a slab");
    let mut packed: Vec<Span> = spans.drain(..count).collect();
    let mut at = 0;
    for span in &mut packed {
        let (from, width) = (*span, span.width as usize);
        (span.source_offset, span.source_stride) = (at as u64, span.width);
        for row in 0..from.rows {
            let run = (from.source_offset + row * from.source_stride) as usize;
            slab[at..at + width].copy_from_slice(&bytes[run..run + width]);
            at += width;
        }
    }
    packed
}

/// The staging memory that a read of at most `read_bytes` bytes takes: both ends may need a block more.
pub fn slab_bytes(read_bytes: u64) -> u64 {
    read_bytes.next_multiple_of(DIRECT_ALIGNMENT) + DIRECT_ALIGNMENT
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
