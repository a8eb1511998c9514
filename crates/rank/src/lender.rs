//! Lends numbers: the slots of a pool, one holder each.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

/// The numbers below a count, each lent to one holder at a time.
#[derive(Debug)]
pub(crate) struct Lender {
    count: u32,
    free: Mutex<Free>,
    returned: Condvar,
    peak: AtomicU32,
}

#[derive(Debug, Default)]
struct Free {
    /// Numbers that came back, the last one on top: what it stands for is the likeliest to be in a cache.
    returned: Vec<u32>,
    /// Numbers from here on were never lent.
    next: u32,
    /// Nobody is to wait any more.
    closed: bool,
}

impl Free {
    fn take(&mut self, count: u32) -> Option<u32> {
        self.returned.pop().or_else(|| {
            let number = self.next;
            self.next += u32::from(number < count);
            (number < count).then_some(number)
        })
    }
}

impl Lender {
    pub(crate) fn new(count: u32) -> Self {
        let (free, returned, peak) = (Mutex::default(), Condvar::new(), AtomicU32::new(0));
        Self { count, free, returned, peak }
    }

    /// Takes a number; `None` while all are lent.
    pub(crate) fn take(&self) -> Option<u32> {
        let mut free = self.lock();
        let number = free.take(self.count)?;
        self.note(&free);
        Some(number)
    }

    /// Takes a number as soon as there is one; `None` once this is closed.
    pub(crate) fn take_waiting(&self) -> Option<u32> {
        let mut free = self.lock();
        while !free.closed {
            if let Some(number) = free.take(self.count) {
                self.note(&free);
                return Some(number);
            }
            free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Gives a number back that was taken.
    pub(crate) fn give_back(&self, number: u32) {
        self.lock().returned.push(number);
        self.returned.notify_one();
    }

    /// Ends the waiting for numbers.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.returned.notify_all();
    }

    /// How many different numbers were ever lent.
    pub(crate) fn peak(&self) -> u32 {
        self.peak.load(Ordering::Relaxed)
    }

    /// How many are lent now.
    pub(crate) fn lent(&self) -> u32 {
        let free = self.lock();
        free.next - free.returned.len() as u32
    }

    fn note(&self, free: &Free) {
        self.peak.fetch_max(free.next, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        // the list is consistent after every statement that changes it
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
