//! Slots: equal parts of one allocation, leased to be sent from or received into.

use std::{
    slice,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use longshore_kernels::cuda::driver::Device;

use super::segment::Segment;
use crate::{device::Pinned, error::RankError, lender::Lender, region::Region, staging::POISON};

/// A fixed number of slots of one size; memory becomes resident as slots are first used.
#[derive(Debug)]
pub struct SlotPool {
    memory: Memory,
    slot_bytes: usize,
    lender: Lender,
}

#[derive(Debug)]
enum Memory {
    Private(Region),
    Pinned(Pinned),
    Shared(Arc<Segment>),
}

impl SlotPool {
    /// Slots that only this process sees.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub fn private(slots: u32, slot_bytes: usize) -> Result<Arc<Self>, RankError> {
        let region = Region::new("exchange", slots as usize * slot_bytes)?;
        Ok(Self::new(Memory::Private(region), slots, slot_bytes))
    }

    /// Slots that devices copy from and to by themselves.
    ///
    /// # Errors
    /// The memory cannot be had, or not be pinned.
    pub fn pinned(
        slots: u32,
        slot_bytes: usize,
        device: &Arc<Device>,
    ) -> Result<Arc<Self>, RankError> {
        let pinned = Pinned::new("staging", slots as usize * slot_bytes, device)?;
        Ok(Self::new(Memory::Pinned(pinned), slots, slot_bytes))
    }

    /// The slots of a segment that other processes see.
    pub fn shared(segment: Arc<Segment>) -> Arc<Self> {
        let (slots, slot_bytes) = (segment.slots(), segment.slot_bytes());
        Self::new(Memory::Shared(segment), slots, slot_bytes)
    }

    fn new(memory: Memory, slots: u32, slot_bytes: usize) -> Arc<Self> {
        Arc::new(Self { memory, slot_bytes, lender: Lender::new(slots) })
    }

    /// Takes a slot; `None` while all are in use.
    pub fn lease(self: &Arc<Self>) -> Option<Slot> {
        self.lender.take().map(|index| self.slot(index))
    }

    /// Takes a slot as soon as there is one; `None` once the pool is closed.
    pub(crate) fn lease_waiting(self: &Arc<Self>) -> Option<Slot> {
        self.lender.take_waiting().map(|index| self.slot(index))
    }

    /// Ends the waiting for slots.
    pub(crate) fn close(&self) {
        self.lender.close();
    }

    fn slot(self: &Arc<Self>, index: u32) -> Slot {
        if let Memory::Private(region) = &self.memory {
            region.touch(index as usize * self.slot_bytes, self.slot_bytes);
        }
        Slot { pool: Arc::clone(self), index, used: self.slot_bytes, shown: AtomicBool::new(false) }
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes of all slots that were ever in use: they stay resident.
    pub fn peak_bytes(&self) -> u64 {
        u64::from(self.lender.peak()) * self.slot_bytes as u64
    }

    /// Slots that are leased now, in bytes.
    pub fn held_bytes(&self) -> u64 {
        u64::from(self.lender.lent()) * self.slot_bytes as u64
    }
}

/// The right to use one slot; dropping it gives the slot back.
#[derive(Debug)]
pub struct Slot {
    pool: Arc<SlotPool>,
    index: u32,
    used: usize,
    /// Other processes may be looking at it.
    shown: AtomicBool,
}

impl Slot {
    /// Which one it is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Notes whether other processes may be looking at it. One that goes meanwhile (its group has ended, the others may not know)
    /// is never used again.
    pub(super) fn show(&self, shown: bool) {
        self.shown.store(shown, Ordering::Relaxed);
    }

    /// Makes the slot `bytes` long, up to its full size.
    pub(super) fn truncated(mut self, bytes: usize) -> Self {
        self.used = bytes.min(self.pool.slot_bytes);
        self
    }

    /// The slot's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the slot lies within the pool's memory, which is initialised to zero; whoever holds the `Slot` is the
        // only one that writes it, and needs `&mut` for that.
        unsafe { slice::from_raw_parts(self.start(), self.used) }
    }

    /// The slot's bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; other processes look at a slot only between the start of the operation that it was
        // handed to (which takes the `Slot` away) and its return.
        unsafe { slice::from_raw_parts_mut(self.start(), self.used) }
    }

    fn start(&self) -> *mut u8 {
        let offset = self.index as usize * self.pool.slot_bytes;
        match &self.pool.memory {
            Memory::Private(region) => region.at(offset, self.pool.slot_bytes).as_ptr(),
            Memory::Pinned(pinned) => pinned.at(offset, self.pool.slot_bytes).as_ptr(),
            Memory::Shared(segment) => segment.slot(self.index).as_ptr(),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if *self.shown.get_mut() {
            return;
        }
        if cfg!(debug_assertions) {
            // whoever looks at it afterwards sees rubbish, and a test fails
            self.used = self.pool.slot_bytes;
            self.bytes_mut().fill(POISON);
        }
        self.pool.lender.give_back(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rank that leaves a group must not spoil what another one is copying: what that has placed counts as landed.
    #[test]
    fn a_slot_that_others_may_see_keeps_its_bytes() {
        let pool = SlotPool::private(2, 4096).unwrap();
        let mut slot = pool.lease().unwrap();
        slot.bytes_mut().fill(7);
        let seen = slot.bytes().as_ptr();
        slot.show(true);
        drop(slot);
        // SAFETY: the pool's memory lives, and nobody has this slot
        assert!(unsafe { slice::from_raw_parts(seen, 4096) }.iter().all(|&b| b == 7));
        let other = pool.lease().unwrap();
        assert_ne!(other.bytes().as_ptr(), seen);
        assert!(pool.lease().is_none());
    }

    #[test]
    fn slots_are_counted_reused_and_given_back() {
        let pool = SlotPool::private(2, 4096).unwrap();
        let (mut a, b) = (pool.lease().unwrap(), pool.lease().unwrap());
        assert!(pool.lease().is_none());
        a.bytes_mut().fill(1);
        assert!(b.bytes().iter().all(|&b| b == 0));
        assert_eq!((pool.held_bytes(), pool.peak_bytes()), (8192, 8192));
        let index = a.index();
        drop(a);
        let again = pool.lease().unwrap();
        assert_eq!(again.index(), index);
        assert!(again.bytes().iter().all(|&b| b == POISON));
        drop((again, b));
        assert_eq!((pool.held_bytes(), pool.peak_bytes()), (0, 8192));
    }
}
