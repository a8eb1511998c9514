//! What the consumer and the readers of a stream share, and the loop that a reader runs.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use longshore_models::{byte_range::ByteRange, checkpoint::Checkpoint};

use super::{
    batch::{Batch, Limits, pages},
    budget::Budget,
    slab::{Slab, Tensor},
};
use crate::{error::RankError, region::Region, storage::CheckpointSource, stream::panic_text};

/// A stream's counters, readable at any time by anyone. Sizes in bytes.
#[derive(Debug, Default)]
pub struct StreamProgress {
    /// Bytes of tensors read, and of the gaps between them that were read through.
    pub read_bytes: AtomicU64,
    /// Of these, bytes of the gaps.
    pub gap_bytes: AtomicU64,
    /// Bytes read beyond them because direct I/O works in blocks.
    pub padding_bytes: AtomicU64,
    /// Of [`read_bytes`](Self::read_bytes), what came from what this host has kept of the storage.
    pub cached_bytes: AtomicU64,
    /// Reads issued to storage.
    pub reads: AtomicU64,
    /// Tensors handed out.
    pub tensors: AtomicU64,
    /// Staging memory that exists now: being read, waiting, handed out, or kept for the next read.
    pub staging_bytes: AtomicU64,
    /// The most staging memory that existed at a time.
    pub peak_staging_bytes: AtomicU64,
}

/// One stream, shared by its consumer, its readers and the tensors that were handed out.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) sources: Vec<CheckpointSource>,
    pub(super) batches: Vec<Batch>,
    pub(super) limits: Limits,
    pub(super) progress: Arc<StreamProgress>,
    state: Mutex<State>,
    /// Readers wait here for memory.
    room: Condvar,
    /// The consumer waits here for tensors.
    arrived: Condvar,
}

/// A slab must never be dropped while this is locked: its drop locks it.
#[derive(Debug, Default)]
struct State {
    /// The next batch that gets memory; they do so in order, so that a large one is not passed by for ever.
    next_batch: usize,
    /// Parts of batches that have memory, not yet taken by a reader.
    parts: VecDeque<Part>,
    /// Parts that readers are at.
    in_flight: usize,
    ready: VecDeque<Tensor>,
    /// Tensors that have not been handed out.
    left: usize,
    budget: Budget,
    /// Slabs that may still exist, for when memory is short.
    slabs: Vec<Weak<Slab>>,
    failed: Option<RankError>,
    /// Why nothing will be handed out any more.
    over: Option<String>,
    stopped: bool,
}

/// One read of a batch.
#[derive(Debug)]
struct Part {
    slab: Arc<Slab>,
    range: ByteRange,
}

/// What the consumer finds when it asks for a tensor.
pub(super) enum Found {
    Tensor(Tensor),
    /// Everything has been handed out.
    End,
    /// Nothing is in flight, and what is held leaves no room for the next batch.
    NoRoom(RankError),
}

impl Shared {
    pub(super) fn new(
        checkpoint: Arc<Checkpoint>,
        sources: Vec<CheckpointSource>,
        batches: Vec<Batch>,
        limits: Limits,
    ) -> Self {
        let left = batches.iter().map(|b| b.tensors.len()).sum();
        let budget = Budget::new(limits.memory_bytes);
        Self {
            checkpoint,
            sources,
            batches,
            limits,
            progress: Arc::default(),
            state: Mutex::new(State { left, budget, ..State::default() }),
            room: Condvar::new(),
            arrived: Condvar::new(),
        }
    }

    /// Waits until there is an answer.
    ///
    /// # Errors
    /// A reader failed; from then on, every call.
    pub(super) fn find(&self) -> Result<Found, RankError> {
        let mut state = self.lock();
        loop {
            if let Some(e) = state.failed.take() {
                return Err(e);
            }
            if let Some(why) = &state.over {
                return Err(RankError::StreamOver { why: why.clone() });
            }
            if let Some(tensor) = state.ready.pop_front() {
                state.left -= 1;
                self.progress.tensors.fetch_add(1, Ordering::Relaxed);
                return Ok(Found::Tensor(tensor));
            }
            if state.left == 0 && state.in_flight == 0 {
                return Ok(Found::End);
            }
            if state.in_flight == 0
                && state.parts.is_empty()
                && let Some(next) = self.batches.get(state.next_batch)
                && !state.budget.admits(next.memory_bytes())
            {
                return Ok(Found::NoRoom(RankError::StagingHeld {
                    tensor: self.checkpoint.tensors[next.tensors[0] as usize].name.clone(),
                    needed: next.memory_bytes(),
                    held: state.budget.leased,
                    limit: self.limits.memory_bytes,
                }));
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives back the pages of tensors that were dropped while others of their batch are held; whether there were any.
    pub(super) fn trim(&self) -> bool {
        // collected first and dropped last: dropping the last hold on a slab locks the state
        let slabs: Vec<Arc<Slab>> = self.lock().slabs.iter().filter_map(Weak::upgrade).collect();
        let bytes = slabs.iter().map(|slab| slab.trim()).sum();
        let mut state = self.lock();
        state.budget.refund(bytes);
        self.count_staging(&state.budget);
        drop(state);
        self.room.notify_all();
        bytes > 0
    }

    /// The files that were read are what they were when they were opened.
    ///
    /// # Errors
    /// One of them has been written since.
    pub(super) fn check_unchanged(&self) -> Result<(), RankError> {
        let files = self.batches.chunk_by(|a, b| a.file == b.file).map(|of_file| of_file[0].file);
        files.map(|file| &self.sources[file as usize]).try_for_each(unchanged)
    }

    /// Ends the stream: readers exit after what they are doing, and what nobody holds is freed.
    pub(super) fn stop(&self, why: Option<RankError>) {
        let mut state = self.lock();
        state.stopped = true;
        if state.over.is_none() {
            // the first cause; what other readers meet afterwards is a consequence
            state.over =
                Some(why.as_ref().map_or_else(|| "it was closed".into(), |e| e.to_string()));
            state.failed = why;
        }
        let unread = std::mem::take(&mut state.parts);
        let unclaimed = std::mem::take(&mut state.ready);
        state.budget.release_kept();
        self.count_staging(&state.budget);
        drop(state);
        drop((unread, unclaimed));
        self.room.notify_all();
        self.arrived.notify_all();
    }

    /// The memory of a slab that nobody holds any more.
    pub(super) fn take_back(&self, slab: &Slab) {
        let mut state = self.lock();
        let charged = slab.charged.load(Ordering::Relaxed);
        let whole = charged == slab.region.len() as u64;
        let wanted = !state.stopped && state.next_batch < self.batches.len();
        match whole && wanted {
            true => state.budget.keep(Arc::clone(&slab.region)),
            false => state.budget.refund(charged),
        }
        self.count_staging(&state.budget);
        drop(state);
        self.room.notify_all();
    }

    /// A reader's life.
    pub(super) fn work(self: &Arc<Self>) {
        loop {
            let step = catch_unwind(AssertUnwindSafe(|| {
                let Some(part) = self.next_part()? else {
                    return Ok(false);
                };
                self.read(&part)?;
                self.arrive(part)?;
                Ok(true)
            }));
            let failed = match step {
                Ok(Ok(true)) => continue,
                Ok(Ok(false)) => return,
                Ok(Err(e)) => e,
                Err(panic) => RankError::Panicked(panic_text(&*panic)),
            };
            return self.stop(Some(failed));
        }
    }

    /// The next part to be read; waits for memory. `None`: there will be none.
    fn next_part(self: &Arc<Self>) -> Result<Option<Part>, RankError> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return Ok(None);
            }
            if let Some(part) = state.parts.pop_front() {
                state.in_flight += 1;
                return Ok(Some(part));
            }
            let Some(batch) = self.batches.get(state.next_batch) else {
                return Ok(None);
            };
            if state.budget.admits(batch.memory_bytes()) {
                let region = state.budget.lease(batch.memory_bytes())?;
                self.begin(&mut state, region);
            } else {
                state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// The next batch has memory: its parts may be read.
    fn begin(self: &Arc<Self>, state: &mut State, region: Arc<Region>) {
        let number = state.next_batch;
        state.next_batch += 1;
        if state.next_batch == self.batches.len() {
            // nobody will want what is kept
            state.budget.release_kept();
        }
        self.count_staging(&state.budget);
        let slab = Arc::new(Slab::new(Arc::clone(self), number, region));
        state.slabs.retain(|slab| slab.strong_count() > 0);
        state.slabs.push(Arc::downgrade(&slab));
        let batch = &self.batches[number];
        let parts = batch.parts(self.limits.read_bytes);
        state.parts.extend(parts.map(|range| Part { slab: Arc::clone(&slab), range }));
        if state.parts.is_empty() {
            // no tensor of it has a byte
            self.hand_over(state, slab);
        }
        // others may read its parts, or exit after the last batch
        self.room.notify_all();
    }

    /// All tensors of a batch are complete.
    fn hand_over(&self, state: &mut State, slab: Arc<Slab>) {
        let numbers = 0..slab.batch().tensors.len();
        state.ready.extend(numbers.map(|number| Tensor::new(Arc::clone(&slab), number)));
        self.arrived.notify_all();
    }

    fn read(&self, part: &Part) -> Result<(), RankError> {
        let slab = &part.slab;
        let source = &self.sources[slab.batch().file as usize];
        // what is read past the page cache is read by whole pages
        let read = if source.mode.direct { pages(part.range) } else { part.range };
        let (offset, bytes) = ((read.start - slab.batch().base()) as usize, read.len() as usize);
        slab.region.touch(offset, bytes);
        // SAFETY: the range lies within the region (checked by `at`), which the slab keeps alive. Parts share no page, so
        // no other reader writes here; nobody reads it before all parts are counted as read.
        let target = unsafe {
            std::slice::from_raw_parts_mut(slab.region.at(offset, bytes).as_ptr(), bytes)
        };
        let staged = source.read_staged(part.range, target)?;
        let progress = &self.progress;
        progress.reads.fetch_add(staged.reads, Ordering::Relaxed);
        progress.read_bytes.fetch_add(part.range.len(), Ordering::Relaxed);
        progress.padding_bytes.fetch_add(staged.padding_bytes, Ordering::Relaxed);
        progress.cached_bytes.fetch_add(staged.cached_bytes, Ordering::Relaxed);
        Ok(())
    }

    /// A part has been read; with the last one of a batch its tensors are complete.
    fn arrive(&self, part: Part) -> Result<(), RankError> {
        let Part { slab, .. } = part;
        // AcqRel: whoever reads the last part sees what the others wrote
        let last = slab.unread.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            unchanged(&self.sources[slab.batch().file as usize])?;
            self.progress.gap_bytes.fetch_add(slab.batch().gap_bytes, Ordering::Relaxed);
        }
        if !last {
            // before it counts as done: nobody but the consumer holds the memory when nothing is in flight
            drop(slab);
            self.finish_part(&mut self.lock());
            return Ok(());
        }
        let mut state = self.lock();
        if state.stopped {
            // nobody asks for tensors, and the slab must not be dropped under the lock
            drop(state);
            return Ok(());
        }
        self.hand_over(&mut state, slab);
        self.finish_part(&mut state);
        Ok(())
    }

    fn finish_part(&self, state: &mut State) {
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.arrived.notify_all();
        }
    }

    fn count_staging(&self, budget: &Budget) {
        self.progress.staging_bytes.store(budget.held(), Ordering::Relaxed);
        self.progress.peak_staging_bytes.store(budget.peak(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // the state is consistent after every statement that changes it
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unchanged(source: &CheckpointSource) -> Result<(), RankError> {
    match source.has_changed() {
        true => Err(RankError::FileModified { file: source.name.clone() }),
        false => Ok(()),
    }
}
