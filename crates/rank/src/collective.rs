//! Collective operations between ranks that are processes.
//!
//! Every rank starts the same operations in the same order; nothing blocks: what others have sent is picked up as
//! [`Arrival`]s, in the order of operations for each source. Names and meaning are NCCL's, sizes may be uneven and zero.
//!
//! ```text
//! rank 0: lease → fill → start(op 7) ──┐            ┌─► arrivals: (op 7, from 1) → place → drop
//! rank 1: lease → fill → start(op 7) ──┴─ transport ┴─► arrivals: (op 7, from 0) → place → drop
//! ```
//!
//! What is sent from and received into belongs to the collective, so that it can be memory that others see, or memory
//! of a device. A slot is filled again only when everybody has dropped what arrived from it.
//!
//! [`host::HostCollective`] joins processes of one host by shared memory and hosts by TCP, [`nccl::NcclCollective`] devices
//! by NCCL.

pub mod host;
pub mod nccl;
pub mod segment;
pub mod slots;
mod tcp;

use std::{fmt, io, sync::Arc, time::Duration};

use longshore_kernels::cuda::driver::Device;

use self::{segment::Borrowed, slots::Slot};

/// Collective operations of one rank with all others of its group.
///
/// The caller is one thread that starts operations and picks up arrivals; leases are taken and arrivals dropped by any.
pub trait Collective: fmt::Debug + Send + Sync {
    /// This rank.
    fn rank(&self) -> u32;

    /// Ranks of the group.
    fn world_size(&self) -> u32;

    /// Whether every rank sees all that a rank sends, at no cost: then [`Kind::AllGather`] is the cheapest of operations.
    fn shares_memory(&self) -> bool;

    /// Takes a slot to send from; `None` while all are in use.
    ///
    /// # Errors
    /// The collective was aborted.
    fn lease(&self) -> Result<Option<Slot>, CollectiveError>;

    /// Starts the next operation and returns its number; they count from 0.
    ///
    /// # Errors
    /// The collective was aborted, or the operation does not fit its group or its data.
    fn start(&self, operation: Operation) -> Result<u64, CollectiveError>;

    /// Whether another operation may be started now; a group only runs so far ahead of its slowest rank.
    fn has_room(&self) -> bool;

    /// What has arrived since the last call, of operations that this rank has started.
    ///
    /// # Errors
    /// The collective was aborted, or the connection to a rank failed.
    fn arrivals(&self) -> Result<Vec<Arrival>, CollectiveError>;

    /// Whether every operation that was started has arrived from all ranks, and nothing has to be done here for the others to
    /// take what was sent. They may still be about to: this end is kept until all ranks have everything.
    fn is_idle(&self) -> bool;

    /// Waits until something may have changed since the last [`Collective::arrivals`], or for `timeout`.
    fn wait(&self, timeout: Duration);

    /// Ends a [`Collective::wait`] of this rank.
    fn wake(&self);

    /// Ends all operations of this rank at once; every later call fails. The others are told by whoever decides.
    fn abort(&self, why: &str);

    /// The most staging memory that slots have taken, those to receive into included, in bytes.
    fn peak_bytes(&self) -> u64;

    /// The staging memory that slots take now, in bytes.
    fn held_bytes(&self) -> u64;
}

/// One operation, as one rank takes part in it.
#[derive(Debug)]
pub struct Operation {
    /// What is done.
    pub kind: Kind,
    /// What this rank sends from; `None`: it sends no bytes.
    pub data: Option<Slot>,
}

/// The operations. Sizes in bytes; lists have one entry per rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Every rank waits for every other.
    Barrier,
    /// `root` sends the first `bytes` of its slot to all.
    Broadcast {
        /// Who sends.
        root: u32,
        /// How much.
        bytes: u64,
    },
    /// `root` sends rank `r` its part; the parts lie one after the other in its slot.
    Scatter {
        /// Who sends.
        root: u32,
        /// The length of each rank's part.
        bytes: Vec<u64>,
    },
    /// Rank `r` sends the first `bytes[r]` of its slot to all.
    AllGather {
        /// How much each rank sends.
        bytes: Vec<u64>,
    },
    /// Every rank sends every other what it chooses.
    AllToAll {
        /// For each rank, the pieces of this rank's slot that it gets, in order.
        sends: Vec<Vec<Piece>>,
        /// The bytes that come from each rank.
        receives: Vec<u64>,
    },
}

/// `rows` runs of `width` bytes, `stride` bytes apart, the first at `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where the first run begins in the slot.
    pub offset: u64,
    /// Length of a run.
    pub width: u64,
    /// From one run's beginning to the next one's.
    pub stride: u64,
    /// Number of runs.
    pub rows: u64,
}

impl Piece {
    /// One run.
    pub fn run(offset: u64, bytes: u64) -> Self {
        Self { offset, width: bytes, stride: bytes, rows: 1 }
    }

    /// Bytes of all runs.
    pub fn bytes(&self) -> u64 {
        self.width * self.rows
    }

    /// One past the last byte; `None` when that cannot be counted.
    pub fn end(&self) -> Option<u64> {
        match self.rows.checked_sub(1) {
            None => Some(self.offset),
            Some(gaps) => {
                let last = self.offset.checked_add(gaps.checked_mul(self.stride)?)?;
                last.checked_add(self.width)
            }
        }
    }
}

impl Kind {
    /// What `rank` sends: for each rank the pieces of its slot, itself excepted.
    fn into_sends(self, rank: u32, world_size: u32) -> Vec<Vec<Piece>> {
        let none = || vec![Vec::new(); world_size as usize];
        let to_all = |bytes: u64| {
            let one = match bytes {
                0 => Vec::new(),
                _ => vec![Piece::run(0, bytes)],
            };
            vec![one; world_size as usize]
        };
        let mut sends = match self {
            Kind::Barrier => none(),
            Kind::Broadcast { root, bytes } if root == rank => to_all(bytes),
            Kind::Scatter { root, bytes } if root == rank => {
                let mut offset = 0;
                let parts = bytes.into_iter().map(|bytes| {
                    let part = Piece::run(offset, bytes);
                    offset += bytes;
                    if bytes == 0 { Vec::new() } else { vec![part] }
                });
                parts.collect()
            }
            Kind::Broadcast { .. } | Kind::Scatter { .. } => none(),
            Kind::AllGather { bytes } => to_all(bytes[rank as usize]),
            Kind::AllToAll { sends, .. } => sends,
        };
        sends[rank as usize].clear();
        sends
    }

    /// The bytes that `rank` gets from each rank, itself excepted.
    fn receives(&self, rank: u32, world_size: u32) -> Vec<u64> {
        let mut receives = vec![0; world_size as usize];
        match self {
            Kind::Barrier => {}
            Kind::Broadcast { root, bytes } => receives[*root as usize] = *bytes,
            Kind::Scatter { root, bytes } => receives[*root as usize] = bytes[rank as usize],
            Kind::AllGather { bytes } => receives.copy_from_slice(bytes),
            Kind::AllToAll { receives: bytes, .. } => receives.copy_from_slice(bytes),
        }
        receives[rank as usize] = 0;
        receives
    }

    /// Whether the operation can be carried out in a group of `world_size` from a slot of `slot_bytes`.
    fn check(&self, rank: u32, world_size: u32, slot_bytes: u64) -> Result<(), CollectiveError> {
        let refuse = |what: String| Err(CollectiveError::Operation { what });
        let lists = match self {
            Kind::Barrier | Kind::Broadcast { .. } => vec![],
            Kind::Scatter { bytes, .. } | Kind::AllGather { bytes } => vec![bytes.len()],
            Kind::AllToAll { sends, receives } => vec![sends.len(), receives.len()],
        };
        if let Some(found) = lists.into_iter().find(|&l| l != world_size as usize) {
            return refuse(format!("{found} sizes for {world_size} ranks"));
        }
        if let Kind::Broadcast { root, .. } | Kind::Scatter { root, .. } = self
            && *root >= world_size
        {
            return refuse(format!("root {root} of {world_size} ranks"));
        }
        let sends = self.clone().into_sends(rank, world_size);
        let outside = |piece: &&Piece| piece.end().is_none_or(|end| end > slot_bytes);
        match sends.iter().flatten().find(outside) {
            Some(piece) => refuse(format!("{piece:?} leaves a slot of {slot_bytes} bytes")),
            None => Ok(()),
        }
    }
}

/// What one rank has sent to this one in one operation.
#[derive(Debug)]
pub struct Arrival {
    /// The operation's number.
    pub operation: u64,
    /// Who sent it.
    pub source: u32,
    /// What was sent.
    pub bytes: Incoming,
}

/// Bytes that arrived. While it lives, their memory is not used for anything else.
#[derive(Debug)]
pub enum Incoming {
    /// No bytes.
    Nothing,
    /// The sender's whole slot as it lies: the pieces are where the sender has them.
    InPlace(Borrowed),
    /// The pieces alone, one after the other.
    Packed(Slot),
    /// The pieces alone, one after the other, in the memory of this rank's device.
    OnDevice(DeviceBytes),
}

/// Bytes in a device's memory, complete, which is not used for anything else while this lives.
pub struct DeviceBytes {
    /// The device.
    pub device: Arc<Device>,
    /// The address of the first.
    pub address: u64,
    /// How many there are.
    pub bytes: u64,
    /// What keeps the memory. Not for others to make up: what lies at the address is read without asking.
    pub(crate) _keep: Box<dyn Send + Sync>,
}

impl fmt::Debug for DeviceBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, address, bytes, _keep: _ } = self;
        let mut shown = f.debug_struct("DeviceBytes");
        shown.field("device", device).field("address", address).field("bytes", bytes);
        shown.finish_non_exhaustive()
    }
}

impl Incoming {
    /// The bytes, where they lie in the host's memory.
    pub fn host(&self) -> Option<&[u8]> {
        match self {
            Incoming::Nothing => Some(&[]),
            Incoming::InPlace(borrowed) => Some(borrowed.bytes()),
            Incoming::Packed(slot) => Some(slot.bytes()),
            Incoming::OnDevice(_) => None,
        }
    }

    /// The address of the first byte, where they lie in the memory of this rank's device.
    pub fn device_address(&self) -> Option<u64> {
        match self {
            Incoming::OnDevice(bytes) => Some(bytes.address),
            _ => None,
        }
    }

    /// Whether pieces lie where the sender has them, rather than one after the other.
    pub fn is_in_place(&self) -> bool {
        matches!(self, Incoming::InPlace(_))
    }
}

/// Why a collective operation cannot be carried out.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// It was ended on purpose.
    #[error("exchange between ranks ended: {why}")]
    Aborted {
        /// Why.
        why: String,
    },
    /// An operation that cannot be: a bug of ours.
    #[error("exchange between ranks: {what}; please report this")]
    Operation {
        /// What is wrong with it.
        what: String,
    },
    /// Two ranks do not agree on an operation: a bug of ours.
    #[error(
        "exchange between ranks: operation {operation} brought {found} bytes from rank {source_rank} where {expected} were expected; please report this"
    )]
    Disagreement {
        /// The operation.
        operation: u64,
        /// Who sent them.
        source_rank: u32,
        /// Bytes that came.
        found: u64,
        /// Bytes that the plan has.
        expected: u64,
    },
    /// The connection to another rank failed.
    #[error("exchange with rank {with} failed: {what}")]
    Connection {
        /// The other rank.
        with: u32,
        /// What happened.
        what: String,
    },
    /// Shared memory or its likes cannot be had.
    #[error("exchange between ranks: {action} failed: {what}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        what: String,
    },
}

impl CollectiveError {
    pub(crate) fn system(action: &'static str, e: &io::Error) -> Self {
        Self::System { action, what: e.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_sends_and_receives() {
        let scatter = Kind::Scatter { root: 1, bytes: vec![3, 4, 0] };
        assert_eq!(scatter.receives(0, 3), [0, 3, 0]);
        assert_eq!(scatter.receives(1, 3), [0, 0, 0]);
        let none: Vec<Vec<Piece>> = vec![vec![]; 3];
        assert_eq!(scatter.clone().into_sends(1, 3), [vec![Piece::run(0, 3)], vec![], vec![]]);
        assert_eq!(scatter.into_sends(0, 3), none);
        let gather = Kind::AllGather { bytes: vec![1, 2] };
        assert_eq!(gather.receives(0, 2), [0, 2]);
        assert_eq!(gather.into_sends(0, 2), [vec![], vec![Piece::run(0, 1)]]);
    }

    #[test]
    fn operations_that_cannot_be_are_refused() {
        let check = |kind: Kind| kind.check(0, 2, 100);
        assert!(check(Kind::AllGather { bytes: vec![100, 1 << 40] }).is_ok());
        assert!(check(Kind::AllGather { bytes: vec![101, 0] }).is_err());
        assert!(check(Kind::AllGather { bytes: vec![1] }).is_err());
        assert!(check(Kind::Broadcast { root: 2, bytes: 1 }).is_err());
        let piece = Piece { offset: 0, width: 10, stride: u64::MAX, rows: 3 };
        let sends = vec![vec![], vec![piece]];
        assert!(check(Kind::AllToAll { sends, receives: vec![0, 0] }).is_err());
    }
}
