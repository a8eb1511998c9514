//! A checkpoint's tensors one after the other, for servers with a `load_weights(name, tensor)` of their own.
//!
//! Nothing is placed, fused or converted: each wanted tensor comes once, as it is stored, in the order in which reads
//! complete. `longshore_rank::tensor_stream` reads; this module finds the checkpoint and says what went wrong where.
//!
//! ```
//! use longshore::{synth, tensors::{Tensors, TensorsOptions}};
//!
//! # fn load_weights(_: &str, _: longshore_models::Dtype, _: &[u64], _: &[u8]) {}
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! synth::Synth::new("llama", "bf16").write(dir.path())?;
//!
//! let options = TensorsOptions::default().memory_limit(64 << 20).only(|name| name.contains("mlp"));
//! let mut tensors = Tensors::open(dir.path().to_str().expect("UTF-8"), &options)?;
//! let mut bytes = 0;
//! while let Some(tensor) = tensors.next()? {
//!     load_weights(tensor.name(), tensor.dtype(), tensor.shape(), tensor.bytes());
//!     bytes += tensor.bytes().len();
//! } // each goes back at the end of its turn, and its memory with it
//! assert_eq!(bytes, 3 * 3 * 256 * 128 * 2); // layers × gate, up and down × shape × BF16
//! # Ok(())
//! # }
//! ```

use std::{fmt, sync::Arc, time::Duration};

pub use longshore_rank::tensor_stream::{StreamProgress, Tensor};
use longshore_rank::{
    error::RankError,
    storage::IoChoice,
    tensor_stream::{StreamOptions, TensorStream, memory_bytes_min},
};

use crate::{
    cache::weights::KeepWeights,
    discover::{Discovered, discover},
    error::LoadError,
    load::{open_sources, suggested_in_flight},
    origin::Origin,
    plan::MEMORY_LIMIT,
    source::resolve,
};

/// Which tensors are read, and how.
pub struct TensorsOptions<'a> {
    memory_limit: Option<u64>,
    io: IoChoice,
    concurrency: Option<usize>,
    patience: Duration,
    keep: Option<KeepWeights>,
    wanted: Box<dyn Fn(&str) -> bool + 'a>,
}

impl Default for TensorsOptions<'_> {
    /// All tensors, everything else as the command line has it by default.
    fn default() -> Self {
        Self {
            memory_limit: None,
            io: IoChoice::Auto,
            concurrency: None,
            patience: Duration::ZERO,
            keep: None,
            wanted: Box::new(|_| true),
        }
    }
}

impl fmt::Debug for TensorsOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorsOptions")
            .field("memory_limit", &self.memory_limit)
            .field("io", &self.io)
            .field("concurrency", &self.concurrency)
            .field("patience", &self.patience)
            .field("keep", &self.keep)
            .finish_non_exhaustive()
    }
}

impl<'a> TensorsOptions<'a> {
    /// Sets the staging memory that may exist at a time, in bytes: tensors being read, waiting and handed out. A wanted
    /// tensor that it cannot hold is refused; a few times the largest keeps reads in flight while that one is looked at.
    ///
    /// `None`: [`MEMORY_LIMIT`], or what the largest wanted tensor takes where that is more.
    pub fn memory_limit(self, bytes: impl Into<Option<u64>>) -> Self {
        Self { memory_limit: bytes.into(), ..self }
    }

    /// Chooses between reading through the page cache and past it.
    pub fn io(self, io: IoChoice) -> Self {
        Self { io, ..self }
    }

    /// Sets the reads in flight; `None`: what storage and cores suggest.
    pub fn concurrency(self, count: impl Into<Option<usize>>) -> Self {
        Self { concurrency: count.into(), ..self }
    }

    /// Sets how long [`Tensors::next`] waits for *other* threads to drop tensors, where those that were handed out leave
    /// no room for the next; at zero, which is right for a consumer of one thread, it fails at once.
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Keeps what [`Tensors::open`] reads of weights that are elsewhere, and reads from there what is kept.
    pub fn keep(self, keep: impl Into<Option<KeepWeights>>) -> Self {
        Self { keep: keep.into(), ..self }
    }

    /// Reads only the tensors whose names `wanted` accepts. The bytes of others are not read, except where there are at
    /// most 64 KiB of them between two wanted tensors.
    pub fn only(self, wanted: impl Fn(&str) -> bool + 'a) -> Self {
        Self { wanted: Box::new(wanted), ..self }
    }
}

/// The wanted tensors of a checkpoint, each once, as they arrive.
///
/// Reading begins with [`Tensors::open`] and goes on while tensors are looked at, as far as the memory limit reaches.
#[derive(Debug)]
pub struct Tensors {
    origin: Origin,
    stream: TensorStream,
}

impl Tensors {
    /// Begins to read the checkpoint that `source` names: a directory, or `synth:FAMILY-SCHEME`.
    ///
    /// # Errors
    /// No checkpoint, or a damaged one; and as [`Tensors::of`].
    pub fn open(source: &str, options: &TensorsOptions<'_>) -> Result<Self, LoadError> {
        Self::of(discover(resolve(source, options.keep.as_ref())?)?, options)
    }

    /// Begins to read a checkpoint whose headers are known.
    ///
    /// # Errors
    /// A file cannot be opened or has changed since its header was read, or a wanted tensor cannot fit into the memory
    /// limit; no weight has been read then.
    pub fn of(discovered: Discovered, options: &TensorsOptions<'_>) -> Result<Self, LoadError> {
        let Discovered { origin, checkpoint, identities, .. } = discovered;
        let sources = open_sources(&origin, &checkpoint, &identities, options.io)?;
        let suggested = suggested_in_flight(&sources, 1);
        let memory_limit = options
            .memory_limit
            .unwrap_or_else(|| memory_bytes_min(&checkpoint, &options.wanted).max(MEMORY_LIMIT));
        let stream_options = StreamOptions {
            memory_limit,
            concurrency: options.concurrency.unwrap_or(suggested),
            patience: options.patience,
        };
        match TensorStream::open(Arc::new(checkpoint), sources, &options.wanted, &stream_options) {
            Ok(stream) => Ok(Self { origin, stream }),
            Err(source) => Err(LoadError::Tensors { path: origin.shown().into(), source }),
        }
    }

    /// The next complete tensor; waits for it. `None`: every wanted tensor has been handed out, and the files are still
    /// what they were when their headers were read.
    ///
    /// # Errors
    /// [`RankError::StagingHeld`], where the tensors that were handed out leave no room for the next: dropping some of
    /// them lets it go on. Everything else ends the stream, and no further tensor is handed out: a read failed, or a file
    /// was written meanwhile ([`LoadError::FileModified`]), so that the tensors handed out before may not belong together.
    #[expect(
        clippy::should_implement_trait,
        reason = "`next()?` reads better here than an iterator's `next().transpose()?`, and goes on after some errors"
    )]
    pub fn next(&mut self) -> Result<Option<Tensor>, LoadError> {
        self.stream.next().map_err(|e| match e {
            RankError::FileModified { file } => {
                LoadError::FileModified { path: self.origin.shown().join(file) }
            }
            source => LoadError::Tensors { path: self.origin.shown().into(), source },
        })
    }

    /// Its counters, which outlive it.
    pub fn progress(&self) -> Arc<StreamProgress> {
        self.stream.progress()
    }
}
