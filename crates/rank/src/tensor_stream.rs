//! A checkpoint's tensors one after the other, as they are stored: for servers that place weights themselves.
//!
//! | module | what it does |
//! |---|---|
//! | `batch` | decides which tensors are read together, and in which reads; pure |
//! | `budget` | bounds staging memory, in bytes |
//! | `slab` | the memory of a batch, and the tensors in it that are handed out |
//! | `worker` | readers, and what they share with the consumer |
//!
//! Neighbouring tensors of a file are read in one go into memory of their own; a large one is read by several readers
//! side by side. Memory is had before a read begins, in the order of the files, and comes back when the tensors in it
//! are dropped: a slow consumer stops the readers. It is not this module's business to decide what a tensor is for, and
//! it neither converts nor cuts.
//!
//! A [`Tensor`] owns its hold on the memory, so it may go to another thread and outlive the stream. A view of its bytes
//! borrows it:
//!
//! ```compile_fail,E0505
//! # use longshore_rank::{error::RankError, tensor_stream::TensorStream};
//! # fn look(stream: &mut TensorStream) -> Result<(), RankError> {
//! if let Some(tensor) = stream.next()? {
//!     let view = tensor.bytes();
//!     drop(tensor); // the memory goes back here, while `view` still points into it
//!     assert!(!view.is_empty());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0597
//! # use longshore_rank::{error::RankError, tensor_stream::TensorStream};
//! # fn look(stream: &mut TensorStream) -> Result<(), RankError> {
//! let mut views: Vec<&[u8]> = Vec::new();
//! while let Some(tensor) = stream.next()? {
//!     views.push(tensor.bytes()); // each goes back at the end of its turn
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Debug builds overwrite a tensor's bytes when it is dropped ([`POISON`](crate::staging::POISON)).

mod batch;
mod budget;
mod slab;
mod worker;

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use longshore_models::checkpoint::Checkpoint;

pub use self::{batch::memory_bytes_min, slab::Tensor, worker::StreamProgress};
use self::{
    batch::{Limits, batches},
    worker::{Found, Shared},
};
use crate::{error::RankError, storage::CheckpointSource};

/// How a stream reads.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions {
    /// Staging memory that may exist at a time, in bytes: what is being read, waits, is handed out, or is kept for the
    /// next read.
    pub memory_limit: u64,
    /// Reads in flight.
    pub concurrency: usize,
    /// How long [`TensorStream::next`] waits for other threads to drop tensors, where all memory is handed out.
    pub patience: Duration,
}

/// The wanted tensors of a checkpoint, each once.
#[derive(Debug)]
pub struct TensorStream {
    shared: Arc<Shared>,
    patience: Duration,
    readers: Vec<JoinHandle<()>>,
}

impl TensorStream {
    /// Begins to read those tensors of `checkpoint` whose names are `wanted`; `sources` are its files, in its order.
    ///
    /// # Errors
    /// A tensor that cannot fit into the memory limit (nothing has been read then), or the system gives no thread.
    pub fn open(
        checkpoint: Arc<Checkpoint>,
        sources: Vec<CheckpointSource>,
        wanted: impl FnMut(&str) -> bool,
        options: &StreamOptions,
    ) -> Result<Self, RankError> {
        let limits = Limits::new(options.memory_limit);
        let batches = batches(&checkpoint, wanted, &limits)?;
        let reads: usize = batches.iter().map(|b| b.parts(limits.read_bytes).count()).sum();
        let shared = Arc::new(Shared::new(checkpoint, sources, batches, limits));
        let mut this = Self { shared, patience: options.patience, readers: Vec::new() };
        // at least one: tensors without bytes need no read, but someone to hand them over
        for number in 0..options.concurrency.min(reads).max(1) {
            let shared = Arc::clone(&this.shared);
            let name = format!("tensors-{number}");
            let spawned = std::thread::Builder::new().name(name).spawn(move || shared.work());
            this.readers.push(spawned.map_err(RankError::Thread)?);
        }
        Ok(this)
    }

    /// The next complete tensor, in the order in which reads complete; waits for it. `None`: every wanted tensor has been
    /// handed out, and the files are still what they were when they were opened.
    ///
    /// # Errors
    /// [`RankError::StagingHeld`]: nothing is in flight, and the tensors that were handed out leave no room for the next
    /// one. The stream goes on when some of them have been dropped. Whatever else: a read failed, or a file was written
    /// meanwhile. The stream is over then, and every further call fails ([`RankError::StreamOver`]).
    #[expect(
        clippy::should_implement_trait,
        reason = "`next()?` reads better here than an iterator's `next().transpose()?`, and goes on after some errors"
    )]
    pub fn next(&mut self) -> Result<Option<Tensor>, RankError> {
        let mut since = None;
        loop {
            match self.shared.find()? {
                Found::Tensor(tensor) => return Ok(Some(tensor)),
                Found::End => match self.shared.check_unchanged() {
                    Ok(()) => return Ok(None),
                    // comes back by `find`
                    Err(e) => self.shared.stop(Some(e)),
                },
                Found::NoRoom(e) => {
                    if self.shared.trim() {
                        continue;
                    }
                    if since.get_or_insert_with(Instant::now).elapsed() >= self.patience {
                        return Err(e);
                    }
                    std::thread::sleep(PATIENCE_STEP);
                }
            }
        }
    }

    /// Its counters, which outlive it.
    pub fn progress(&self) -> Arc<StreamProgress> {
        Arc::clone(&self.shared.progress)
    }
}

/// How often memory is looked for that other threads hold: rarely enough to cost nothing, a read takes longer.
const PATIENCE_STEP: Duration = Duration::from_millis(1);

impl Drop for TensorStream {
    /// Stops the readers, which finish the reads they are at, and frees everything that is not handed out.
    fn drop(&mut self) {
        self.shared.stop(None);
        for reader in self.readers.drain(..) {
            // a reader catches its panics
            let _ = reader.join();
        }
    }
}

#[cfg(test)]
mod tests;
