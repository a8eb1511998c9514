//! What can go wrong, in NCCL's words where it has any.

use std::{fmt, time::Duration};

use crate::library::Version;

/// Why NCCL cannot be used, or something asked of it was not done.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum NcclError {
    /// No library could be loaded.
    #[error("no NCCL library: {tried}")]
    NotFound {
        /// Each name with the loader's answer.
        tried: String,
    },
    /// The library is not NCCL, or not one that can be used.
    #[error("{library} ({version}) has no {symbol}")]
    MissingSymbol {
        /// The library's name.
        library: String,
        /// Its version, or that it does not tell.
        version: String,
        /// What is missing.
        symbol: String,
    },
    /// The library is older than what this crate is written for.
    #[error("{library} is NCCL {found}, and {minimum} is the oldest that can be used")]
    TooOld {
        /// The library's name.
        library: String,
        /// Its version.
        found: Version,
        /// The oldest version that can be used.
        minimum: Version,
    },
    /// NCCL returned an error, or reports one for the communicator.
    #[error("{call}: {code}{detail}")]
    Nccl {
        /// The function that returned the error or was in progress.
        call: &'static str,
        /// What it returned.
        code: Code,
        /// NCCL's own text for the code and its last error, each after a separator; may be empty.
        detail: String,
    },
    /// Something in progress took longer than it was given. The communicator has to be aborted.
    #[error("{call}: not finished within {limit:?}")]
    DeadlinePassed {
        /// What was in progress.
        call: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// The thread that owns the communicator gave no answer in time: NCCL hangs in `call`.
    #[error("{call}: has not returned for {since:?}")]
    Unresponsive {
        /// Where the thread is.
        call: &'static str,
        /// For how long it has been there.
        since: Duration,
    },
    /// The device could not be made current on the communicator's thread.
    #[error("the device is not usable by a communicator: {reason}")]
    Device {
        /// What the caller's function said.
        reason: String,
    },
    /// What NCCL says of the communicator is not what was asked for.
    #[error(
        "NCCL made rank {rank} of {world_size}, asked for was rank {asked_rank} of {asked_world_size}"
    )]
    WrongMembership {
        /// NCCL's rank.
        rank: i32,
        /// NCCL's number of ranks.
        world_size: i32,
        /// The rank asked for.
        asked_rank: u32,
        /// The number of ranks asked for.
        asked_world_size: u32,
    },
    /// An argument that NCCL must not see.
    #[error("{what}")]
    Invalid {
        /// What is wrong.
        what: String,
    },
    /// More commands wait for the communicator's thread than it keeps.
    #[error("{waiting} commands wait for the communicator's thread already")]
    Busy {
        /// How many it keeps.
        waiting: usize,
    },
    /// The communicator was aborted, or finished before.
    #[error("the communicator was aborted or finished")]
    Gone,
    /// The communicator's thread could not be started.
    #[error("no thread for a communicator: {reason}")]
    NoThread {
        /// What the system said.
        reason: String,
    },
}

/// A `ncclResult_t`, shown by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(pub i32);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `nccl.h`; ncclTimeout since 2.30, where its number was ncclNumResults before
        f.write_str(match self.0 {
            0 => "ncclSuccess",
            1 => "ncclUnhandledCudaError",
            2 => "ncclSystemError",
            3 => "ncclInternalError",
            4 => "ncclInvalidArgument",
            5 => "ncclInvalidUsage",
            6 => "ncclRemoteError",
            7 => "ncclInProgress",
            8 => "ncclTimeout",
            other => return write!(f, "ncclResult_t {other}"),
        })
    }
}

/// A communicator could not be aborted.
///
/// Device memory and streams of its operations stay in use, and no other communicator can be relied on: the process has
/// to end, and another one to take its place.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Stuck {
    /// Its thread hangs.
    #[error(
        "not aborted within {waited:?}: {call} has not returned for {since:?}; the process has to end"
    )]
    Hangs {
        /// Where the thread is.
        call: &'static str,
        /// For how long it has been there.
        since: Duration,
        /// How long the abort was waited for.
        waited: Duration,
    },
    /// NCCL refused to abort it.
    #[error("not aborted, and the process has to end")]
    Refused {
        /// What NCCL said.
        #[source]
        error: NcclError,
    },
}
