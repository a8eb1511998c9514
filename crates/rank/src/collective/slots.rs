//! Slots: equal parts of one allocation, leased to be sent from or received into.

use std::{
    slice,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::segment::Segment;
use crate::{error::RankError, region::Region, staging::POISON};

/// A fixed number of slots of one size; memory becomes resident as slots are first used.
#[derive(Debug)]
pub struct SlotPool {
    memory: Memory,
    slot_bytes: usize,
    slots: u32,
    free: Mutex<Free>,
    returned: Condvar,
    peak_bytes: AtomicU64,
}

#[derive(Debug)]
enum Memory {
    Private(Region),
    Shared(Arc<Segment>),
}

#[derive(Debug, Default)]
struct Free {
    /// Returned slots, the last one on top: it is the likeliest to be in a cache.
    returned: Vec<u32>,
    /// Slots from here on were never used.
    next: u32,
    /// Nobody is to wait any more.
    closed: bool,
}

impl Free {
    fn take(&mut self, slots: u32) -> Option<u32> {
        self.returned.pop().or_else(|| {
            let index = self.next;
            self.next += u32::from(index < slots);
            (index < slots).then_some(index)
        })
    }
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

    /// The slots of a segment that other processes see.
    pub fn shared(segment: Arc<Segment>) -> Arc<Self> {
        let (slots, slot_bytes) = (segment.slots(), segment.slot_bytes());
        Self::new(Memory::Shared(segment), slots, slot_bytes)
    }

    fn new(memory: Memory, slots: u32, slot_bytes: usize) -> Arc<Self> {
        let (free, returned) = (Mutex::default(), Condvar::new());
        let peak_bytes = AtomicU64::new(0);
        Arc::new(Self { memory, slot_bytes, slots, free, returned, peak_bytes })
    }

    /// Takes a slot; `None` while all are in use.
    pub fn lease(self: &Arc<Self>) -> Option<Slot> {
        let mut free = self.lock();
        let index = free.take(self.slots)?;
        Some(self.slot(index, free))
    }

    /// Takes a slot as soon as there is one; `None` once the pool is closed.
    pub(super) fn lease_waiting(self: &Arc<Self>) -> Option<Slot> {
        let mut free = self.lock();
        while !free.closed {
            if let Some(index) = free.take(self.slots) {
                return Some(self.slot(index, free));
            }
            free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Ends the waiting for slots.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.returned.notify_all();
    }

    fn slot(self: &Arc<Self>, index: u32, free: MutexGuard<'_, Free>) -> Slot {
        let resident = u64::from(free.next) * self.slot_bytes as u64;
        self.peak_bytes.fetch_max(resident, Ordering::Relaxed);
        drop(free);
        if let Memory::Private(region) = &self.memory {
            region.touch(index as usize * self.slot_bytes, self.slot_bytes);
        }
        Slot { pool: Arc::clone(self), index, used: self.slot_bytes }
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes of all slots that were ever in use: they stay resident.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Slots that are leased now, in bytes.
    pub fn held_bytes(&self) -> u64 {
        let free = self.lock();
        (u64::from(free.next) - free.returned.len() as u64) * self.slot_bytes as u64
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        // the list is consistent after every statement that changes it
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to use one slot; dropping it gives the slot back.
#[derive(Debug)]
pub struct Slot {
    pool: Arc<SlotPool>,
    index: u32,
    used: usize,
}

impl Slot {
    /// Which one it is.
    pub fn index(&self) -> u32 {
        self.index
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
            Memory::Shared(segment) => segment.slot(self.index).as_ptr(),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            // whoever looks at it afterwards sees rubbish, and a test fails
            self.used = self.pool.slot_bytes;
            self.bytes_mut().fill(POISON);
        }
        self.pool.lock().returned.push(self.index);
        self.pool.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
