//! NCCL, found at run time: communicators that are joined, used and aborted from a thread of their own, within limits.
//!
//! | module | what it holds |
//! |---|---|
//! | `sys` | entries, constants and the configuration of NCCL's C interface, as far as they are used |
//! | [`library`] | [`Nccl`]: the library, looked for once per process; its version; [`UniqueId`] |
//! | [`group`] | [`Group`]: operations that are done together, as plain data |
//! | `owner` | the thread that owns a communicator: the only one that calls NCCL for it |
//! | [`communicator`] | [`Communicator`]: commands to that thread, answers from it, and the abort |
//! | [`error`] | [`NcclError`], and [`Stuck`]: the process has to end |
//!
//! ```text
//! caller ── connect, group, finish ──► bounded queue ──► owner thread ──► NCCL ──► operations on a CUDA stream
//!        ◄───────── Pending ───────────────────────────┘   polls, sees the abort flag and the limit
//! ```
//!
//! **Nobody waits in NCCL but the owner.** Communicators are non-blocking (`blocking = 0`), what is in progress is
//! polled with a limit, and between two looks the owner sees whether it is told to abort. Where NCCL hangs all the
//! same, callers do not: [`Communicator::abort`] then says [`Stuck`].
//!
//! **Recovery.** When a rank is lost, operations with it never end. Every rank that is left aborts its communicator,
//! and joins a new one with a new [`UniqueId`]; NCCL's own shrinking and revoking (2.27 and 2.28.7 on) are not needed
//! for it. Source: NCCL user guide, "Fault Tolerance".
//!
//! **Several ranks on one GPU** are refused (`ncclInvalidUsage`, "Duplicate GPU detected") unless they seem to be on
//! different hosts: each a process of its own with an `NCCL_HOSTID` of its own, set before the first call of NCCL. They
//! then reach each other by sockets, and need [`Membership::max_ctas`]. Source: `initTransportsRank` in `init.cc` and
//! `getHostHash` in `misc/utils.cc`, 2.18.3 to 2.30.7; from 2.30 on `NCCL_MULTI_RANK_GPU_ENABLE=1` lets them in too.
//!
//! What this crate does not do: nothing of CUDA. Memory and streams come in as addresses, the device is made current by
//! a function of the caller's, and whether an operation on a stream has ended is asked of the stream.

mod sys;

pub mod communicator;
pub mod error;
pub mod group;
pub mod library;
mod owner;

pub use communicator::{Communicator, Connected, Membership, Pending};
pub use error::{Code, NcclError, Stuck};
pub use group::{Group, Stream};
pub use library::{MINIMUM, Nccl, UniqueId, Version};

#[cfg(test)]
mod fake;
