//! What can go wrong on a rank, with file, range and numbers.

use std::io;

use longshore_kernels::cuda::driver::CudaError;

use crate::collective::CollectiveError;

/// Why a rank gave up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// A read failed.
    #[error("{file}: reading {bytes} bytes at offset {offset} failed")]
    Read {
        /// The checkpoint file.
        file: String,
        /// First byte of the read.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file ended before the range did.
    #[error("{file}: ends at offset {found}, {expected} bytes were there when its header was read")]
    Truncated {
        /// The checkpoint file.
        file: String,
        /// Where it ends now.
        found: u64,
        /// How long it was.
        expected: u64,
    },
    /// A file was written while it was being read, or since.
    #[error("{file}: was written while or after it was read; the bytes may be a mix")]
    FileModified {
        /// The checkpoint file.
        file: String,
    },
    /// A tensor is larger than all of a stream's staging memory.
    #[error(
        "tensor {tensor} of {bytes} bytes needs {needed} bytes of staging memory, the memory limit is {limit}"
    )]
    TensorOverLimit {
        /// The tensor.
        tensor: String,
        /// Its length.
        bytes: u64,
        /// The whole pages around it.
        needed: u64,
        /// What is allowed.
        limit: u64,
    },
    /// The consumer of a stream asks for more while it holds all the staging memory.
    #[error(
        "tensor {tensor} needs {needed} bytes of staging memory, but the tensors that were handed out hold {held} of {limit}; drop some of them first"
    )]
    StagingHeld {
        /// The next tensor to be read.
        tensor: String,
        /// What it and its neighbours need.
        needed: u64,
        /// What is held.
        held: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A stream of tensors is asked for more after it has failed.
    #[error("the stream of tensors is over: {why}")]
    StreamOver {
        /// Why it ended.
        why: String,
    },
    /// A file that is not on local storage could not be read.
    #[error("reading storage")]
    Remote {
        /// Whether the user can mend it.
        refused: bool,
        /// Whether no other process in its place would fare better.
        lasting: bool,
        /// Why; it names the object and the range.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Memory could not be had.
    #[error("{what}: {bytes} bytes of memory could not be allocated")]
    Memory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("a worker thread could not be started")]
    Thread(#[source] io::Error),
    /// More bytes landed in a parameter than belong there: a bug of ours.
    #[error(
        "{param}: {found} bytes landed where {expected} were still missing; please report this"
    )]
    OverfullParam {
        /// The parameter.
        param: String,
        /// Bytes that landed.
        found: u64,
        /// Bytes that were missing.
        expected: u64,
    },
    /// A conversion or transform that the plan should not contain: a bug of ours.
    #[error("{param}: {what}; please report this")]
    Transform {
        /// The parameter.
        param: String,
        /// What is not known.
        what: String,
    },
    /// The checkpoint's values contradict each other.
    #[error("{param}: {reason}")]
    Values {
        /// The parameter.
        param: String,
        /// What does not go together.
        reason: String,
    },
    /// Passing bytes to or from other ranks failed.
    #[error(transparent)]
    Exchange(#[from] CollectiveError),
    /// The load ended while this was going on; whoever ended it says why.
    #[error("the load has ended")]
    Ended,
    /// A device failed, or its memory is short.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A rank in another process gave up.
    #[error("{text}")]
    Reported {
        /// Its error and all causes.
        text: String,
        /// Whether the user can mend it before any weight is read, rather than a load that failed.
        refused: bool,
        /// Whether no other process in its place would fare better.
        lasting: bool,
        /// The rank that it could not go on without.
        blames: Option<u32>,
    },
    /// There is no plan of what is left of a load.
    #[error("what is left of the load cannot be planned: {0}")]
    Rest(String),
    /// A worker panicked: a bug of ours.
    #[error("a worker of this rank panicked: {0}; please report this")]
    Panicked(String),
}

impl RankError {
    /// Whether the user can mend it (exit code 2), rather than a load that failed.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            RankError::Values { .. }
                | RankError::Reported { refused: true, .. }
                | RankError::Remote { refused: true, .. }
        )
    }

    /// Whether no other process in the place of this one would fare better: the user has to mend it, the checkpoint is not what
    /// it was, or it is a bug of ours.
    pub fn is_lasting(&self) -> bool {
        let lasts = matches!(
            self,
            RankError::Truncated { .. }
                | RankError::FileModified { .. }
                | RankError::OverfullParam { .. }
                | RankError::Transform { .. }
                | RankError::Rest(_)
                | RankError::Remote { lasting: true, .. }
                | RankError::Reported { lasting: true, .. }
        );
        lasts || self.is_refusal()
    }

    /// The other rank that this one could not reach any more: the cause may lie there.
    pub fn blames(&self) -> Option<u32> {
        match self {
            RankError::Exchange(CollectiveError::Connection { with, .. }) => Some(*with),
            RankError::Reported { blames, .. } => *blames,
            _ => None,
        }
    }
}
