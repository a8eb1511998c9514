//! Operations that are done together, as plain data.

use std::ffi::c_void;

use crate::error::NcclError;

/// A CUDA stream to put operations on. Only its address is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(usize);

impl Stream {
    /// The stream at `raw`: a `cudaStream_t`, which is the same as the driver's `CUstream`.
    pub fn from_raw(raw: *mut c_void) -> Self {
        Self(raw as usize)
    }

    /// Its address.
    pub(crate) fn raw(self) -> *mut c_void {
        self.0 as *mut c_void
    }
}

/// Operations of one rank that are started together: none of them waits for an earlier one of the group.
///
/// All counts are bytes, all buffers addresses of device memory. Ranks start groups that match, in the same order, and
/// several sends from one rank to another are received in the order they were sent. What is empty is left out: ranks
/// agree on sizes anyway.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    operations: Vec<Operation>,
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Send { from: u64, bytes: u64, to: u32 },
    Recv { into: u64, bytes: u64, from: u32 },
    Broadcast { from: u64, into: u64, bytes: u64, root: u32 },
    AllGather { from: u64, into: u64, bytes_each: u64 },
}

impl Group {
    /// Sends `bytes` from `from` to rank `to`.
    pub fn send(&mut self, from: u64, bytes: u64, to: u32) -> &mut Self {
        self.add(Operation::Send { from, bytes, to }, bytes)
    }

    /// Receives `bytes` into `into` from rank `from`.
    pub fn recv(&mut self, into: u64, bytes: u64, from: u32) -> &mut Self {
        self.add(Operation::Recv { into, bytes, from }, bytes)
    }

    /// Copies `bytes` at `from` on `root` to `into` on all ranks; `from` counts on the root only, and may be `into`.
    pub fn broadcast(&mut self, from: u64, into: u64, bytes: u64, root: u32) -> &mut Self {
        self.add(Operation::Broadcast { from, into, bytes, root }, bytes)
    }

    /// Copies `bytes_each` at `from` of every rank to `into` on all ranks, one rank's after the other's.
    ///
    /// In place where `from` is `into + rank * bytes_each`.
    pub fn all_gather(&mut self, from: u64, into: u64, bytes_each: u64) -> &mut Self {
        self.add(Operation::AllGather { from, into, bytes_each }, bytes_each)
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    fn add(&mut self, operation: Operation, bytes: u64) -> &mut Self {
        if bytes > 0 {
            self.operations.push(operation);
        }
        self
    }

    /// The operations, in the order they were added.
    pub(crate) fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// Refuses what NCCL would fail a whole communicator for.
    pub(crate) fn check(&self, world_size: u32) -> Result<(), NcclError> {
        for operation in &self.operations {
            let (peer, null, bytes) = match *operation {
                Operation::Send { from, bytes, to } => (to, from == 0, Some(bytes)),
                Operation::Recv { into, bytes, from } => (from, into == 0, Some(bytes)),
                Operation::Broadcast { into, bytes, root, .. } => (root, into == 0, Some(bytes)),
                Operation::AllGather { from, into, bytes_each } => {
                    (0, from == 0 || into == 0, bytes_each.checked_mul(u64::from(world_size)))
                }
            };
            let fits = bytes.is_some_and(|bytes| usize::try_from(bytes).is_ok());
            if peer >= world_size || null || !fits {
                let what = format!("{operation:?} is no operation of {world_size} ranks");
                return Err(NcclError::Invalid { what });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_empty_is_left_out() {
        let mut group = Group::default();
        group.send(0, 0, 1).recv(0, 0, 1).broadcast(0, 0, 0, 0).all_gather(0, 0, 0);
        assert!(group.is_empty());
        group.send(16, 1, 1);
        assert!(!group.is_empty());
    }

    #[test]
    fn operations_that_cannot_be_are_refused_before_nccl_sees_them() {
        let mut groups = vec![Group::default(); 5];
        groups[0].send(16, 1, 2);
        groups[1].recv(0, 1, 0);
        groups[2].broadcast(16, 16, 1, 7);
        groups[3].all_gather(16, 16, u64::MAX);
        groups[4].all_gather(0, 16, 8);
        for group in &groups {
            let error = group.check(2).unwrap_err().to_string();
            assert!(error.ends_with("is no operation of 2 ranks"), "{error}");
        }
        let mut group = Group::default();
        group.send(16, 1, 0).recv(16, 1, 1).broadcast(0, 16, 1, 1).all_gather(16, 32, 8);
        group.check(2).unwrap();
    }
}
