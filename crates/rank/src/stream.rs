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

use longshore_models::placement::Span;
use ractor::ActorRef;

use crate::{
    error::RankError,
    params::ParamMemory,
    post_process,
    protocol::{Generation, LoadPlan, Peer, Progress, RankMessage, Read, WorkerEvent},
    scatter::{Scatter, count_exchange, steps},
    staging::{DIRECT_ALIGNMENT, Staging},
    storage::CheckpointSource,
};

/// One load on one rank, shared by its workers.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) rank: u32,
    pub(crate) generation: Generation,
    pub(crate) plan: Arc<LoadPlan>,
    pub(crate) sources: Arc<Vec<CheckpointSource>>,
    pub(crate) peers: Arc<Vec<Peer>>,
    pub(crate) staging: Staging,
    queue: Mutex<Queue>,
    wake: Condvar,
    reads_left: AtomicUsize,
}

#[derive(Debug, Default)]
struct Queue {
    next_read: usize,
    finishes: VecDeque<u32>,
    stopped: bool,
}

enum Work {
    Read(usize),
    Finish(u32),
    Exit,
}

impl Job {
    pub(crate) fn new(
        rank: u32,
        generation: Generation,
        plan: Arc<LoadPlan>,
        sources: Arc<Vec<CheckpointSource>>,
        peers: Arc<Vec<Peer>>,
    ) -> Self {
        let slab_bytes = slab_bytes(plan.read_bytes_max) as usize;
        let reads_left = AtomicUsize::new(plan.reads[rank as usize].len());
        Self {
            rank,
            generation,
            plan,
            sources,
            peers,
            staging: Staging::new(slab_bytes),
            queue: Mutex::default(),
            wake: Condvar::new(),
            reads_left,
        }
    }

    /// Starts `count` workers.
    ///
    /// # Errors
    /// The system gives no thread; those already started are stopped.
    pub(crate) fn spawn_workers(self: &Arc<Self>, count: usize) -> Result<(), RankError> {
        for number in 0..count {
            let job = Arc::clone(self);
            let name = format!("rank{}-worker{number}", self.rank);
            let spawned = std::thread::Builder::new().name(name).spawn(move || job.work());
            if let Err(e) = spawned {
                self.stop();
                return Err(RankError::Thread(e));
            }
        }
        Ok(())
    }

    /// Hands a finish to the workers.
    pub(crate) fn push_finish(&self, finish: u32) {
        self.lock().finishes.push_back(finish);
        self.wake.notify_one();
    }

    /// Lets the workers exit after what they are doing.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.wake.notify_all();
    }

    pub(crate) fn memory(&self) -> &ParamMemory {
        &self.peers[self.rank as usize].memory
    }

    pub(crate) fn progress(&self) -> &Progress {
        &self.peers[self.rank as usize].progress
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // the queue is consistent after every statement that changes it
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut scatter = Scatter::default();
        let mut workspace = Vec::new();
        loop {
            let step = match self.next() {
                Work::Exit => return,
                Work::Read(i) => catch_unwind(AssertUnwindSafe(|| self.read(i, &mut scatter))),
                Work::Finish(f) => {
                    catch_unwind(AssertUnwindSafe(|| self.finish(f, &mut workspace)))
                }
            };
            let failed = match step {
                Ok(Ok(())) => continue,
                Ok(Err(e)) => e,
                Err(panic) => RankError::Panicked(panic_text(&*panic)),
            };
            self.stop();
            self.tell(self.rank, WorkerEvent::Failed(failed));
            return;
        }
    }

    /// The next piece of work; waits when there is none yet.
    fn next(&self) -> Work {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                return Work::Exit;
            }
            if let Some(finish) = queue.finishes.pop_front() {
                return Work::Finish(finish);
            }
            if queue.next_read < self.plan.reads[self.rank as usize].len() {
                queue.next_read += 1;
                return Work::Read(queue.next_read - 1);
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read(&self, number: usize, scatter: &mut Scatter) -> Result<(), RankError> {
        let read = &self.plan.reads[self.rank as usize][number];
        let source = &self.sources[read.file as usize];
        let progress = self.progress();
        // the steps of one read are one read to storage, unless it answers short
        progress.reads.fetch_add(1, Ordering::Relaxed);
        for range in steps(&self.plan.checkpoint, read.file, read.range, source.mode.direct) {
            let step = Read { range, ..*read };
            let outcome = scatter.execute(
                &self.plan,
                self.rank,
                &step,
                source,
                &self.peers,
                &self.staging,
            )?;
            progress.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
            progress.padding_bytes.fetch_add(outcome.padding_bytes, Ordering::Relaxed);
            progress.reads.fetch_add(outcome.reads.saturating_sub(1), Ordering::Relaxed);
            self.land(scatter.spans())?;
        }
        if self.reads_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.tell(self.rank, WorkerEvent::ReadsDone);
        }
        Ok(())
    }

    /// Counts what has landed, and tells each rank of its parameters that are complete.
    fn land(&self, spans: &[Span]) -> Result<(), RankError> {
        count_exchange(spans, self.rank, &self.peers);
        for span in spans {
            let peer = &self.peers[span.rank as usize];
            if peer.memory.landed(span.param, span.target_bytes())? {
                self.tell(span.rank, WorkerEvent::ParamLanded(span.param));
            }
        }
        Ok(())
    }

    fn finish(&self, number: u32, workspace: &mut Vec<u8>) -> Result<(), RankError> {
        let finish = &self.plan.placement.finishes[number as usize];
        // SAFETY: the state machine pushes a finish once, after its inputs have landed (RNK-2); outputs belong to one
        // finish only.
        unsafe { post_process::run(finish, self.rank, self.memory(), workspace) }?;
        self.tell(self.rank, WorkerEvent::FinishDone(number));
        Ok(())
    }

    fn tell(&self, rank: u32, event: WorkerEvent) {
        let actor: &ActorRef<RankMessage> = &self.peers[rank as usize].actor;
        // a rank that is gone has no use for the news; its supervisor knows
        let _ = actor.cast(RankMessage::Worker(self.generation, event));
    }
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
