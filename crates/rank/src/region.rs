//! Large memory regions whose addresses never change.

use std::{
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use crate::error::RankError;

/// Size of a huge page on x86-64 and (with 4 KiB base pages) aarch64.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed anonymous memory, on huge pages where the system has them.
///
/// Huge pages because first-touch faults on 4 KiB pages cost more than the copy itself (measured on a 2-core x86-64
/// machine: 3.6 GB/s on 4 KiB pages, 4.9 GB/s on huge ones, 7.5 GB/s into resident memory).
///
/// Every huge page is touched first by one thread alone ([`Region::touch`]). Left to the page faults of threads that
/// copy side by side, each of them zeroes a page of its own and all but one are thrown away: 60 % more pages were zeroed
/// than used with 2 to 8 readers on 2 cores, for a checkpoint of many small tensors.
///
/// A region hands out raw pointers: who may write where and when is the placement's business (RNK-1, RNK-2).
#[derive(Debug)]
pub struct Region {
    mapping: NonNull<u8>,
    mapped: usize,
    base: NonNull<u8>,
    bytes: usize,
    /// State of each huge page: [`UNTOUCHED`], [`BEING_TOUCHED`] or [`TOUCHED`].
    pages: Vec<AtomicU8>,
}

const UNTOUCHED: u8 = 0;
const BEING_TOUCHED: u8 = 1;
const TOUCHED: u8 = 2;

// SAFETY: a region is plain memory; `Region` itself never dereferences it, and users of its pointers state why their
// accesses do not race.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `bytes` bytes of zeros for `what`, starting on a huge-page boundary. Nothing is resident until it is touched.
    ///
    /// # Errors
    /// The system has no such address space to give.
    pub fn new(what: &'static str, bytes: usize) -> Result<Self, RankError> {
        let mapped = bytes.max(1).saturating_add(HUGE_PAGE);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let failed = |source| RankError::Memory { what, bytes: bytes as u64, source };
        if address == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let Some(mapping) = NonNull::new(address.cast::<u8>()) else {
            return Err(failed(io::ErrorKind::OutOfMemory.into()));
        };
        let skip = mapping.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: `skip` is at most HUGE_PAGE, which is what `mapped` has in excess of `bytes`.
        let base = unsafe { mapping.add(skip) };
        // SAFETY: `base..base + bytes` lies within the mapping made above. Advice only: an error changes nothing.
        unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        let pages = (0..bytes.div_ceil(HUGE_PAGE)).map(|_| AtomicU8::new(UNTOUCHED)).collect();
        Ok(Self { mapping, mapped, base, bytes, pages })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Makes the huge pages of a range resident, each through one thread; others wait for it. To be called before the
    /// first write to the range.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn touch(&self, offset: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let first = offset / HUGE_PAGE;
        let last = (offset + bytes - 1) / HUGE_PAGE;
        for (i, state) in self.pages[first..=last].iter().enumerate() {
            // Acquire: whoever sees TOUCHED also sees the zero that was written
            if state.load(Ordering::Acquire) != TOUCHED {
                self.touch_page(first + i, state);
            }
        }
    }

    #[cold]
    fn touch_page(&self, page: usize, state: &AtomicU8) {
        let claim = (UNTOUCHED, BEING_TOUCHED);
        let claimed =
            state.compare_exchange(claim.0, claim.1, Ordering::Acquire, Ordering::Acquire);
        if claimed.is_ok() {
            let start = self.at(page * HUGE_PAGE, 1);
            // SAFETY: the byte lies in the region, which outlives this; who writes it without an atomic does so only after it
            // was touched.
            let byte = unsafe { AtomicU8::from_ptr(start.as_ptr()) };
            // a write that leaves the byte as it is, even if somebody wrote to the page without touching it
            byte.fetch_or(0, Ordering::Relaxed);
            state.store(TOUCHED, Ordering::Release);
        }
        let mut waited = 0;
        while state.load(Ordering::Acquire) != TOUCHED {
            // zeroing a huge page takes some 100 µs, and the thread that does it may be waiting for this core
            match waited {
                0..8 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
            waited += 1;
        }
    }

    /// Gives the memory of whole pages back to the system, before the region goes. To be done last: what is written there
    /// afterwards is not preceded by [`Region::touch`].
    ///
    /// # Panics
    /// When the range leaves the region.
    ///
    /// # Safety
    /// Nobody reads or writes these bytes any more.
    pub unsafe fn discard(&self, offset: usize, bytes: usize) {
        let start = self.at(offset, bytes);
        // SAFETY: the range lies within the mapping (checked by `at`), and by the caller's promise nobody misses its
        // contents. Advice only: where it is refused, the memory comes back with the region.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
    }

    /// Address of byte `offset`, checked to be followed by `bytes` bytes of the region.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn at(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "range leaves the region");
        // SAFETY: `offset` is within the mapping, as just checked.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, unmapped once; pointers into it are only used by holders of the
        // `Arc` that keeps this region alive.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn region_is_zeroed_aligned_and_writable() {
        let region = Region::new("test", 3 << 20).unwrap();
        let p = region.at(0, region.len());
        assert_eq!(p.as_ptr() as usize % HUGE_PAGE, 0);
        // SAFETY: the region is alive and nobody else uses it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(p.as_ptr(), region.len()) };
        assert!(bytes.iter().all(|&b| b == 0));
        bytes.fill(7);
    }

    #[test]
    fn pages_are_touched_once_and_keep_what_was_written() {
        let region = Region::new("test", (5 << 20) + 3).unwrap();
        std::thread::scope(|scope| {
            for t in 0..4 {
                let region = &region;
                scope.spawn(move || {
                    for chunk in (t * 1000..region.len()).step_by(4000) {
                        let bytes = 1000.min(region.len() - chunk);
                        region.touch(chunk, bytes);
                        // SAFETY: each thread writes chunks of its own.
                        unsafe { region.at(chunk, bytes).as_ptr().write_bytes(1 + t as u8, bytes) };
                    }
                });
            }
        });
        // SAFETY: the threads are done.
        let bytes = unsafe { std::slice::from_raw_parts(region.at(0, 1).as_ptr(), region.len()) };
        assert!(bytes.iter().enumerate().all(|(i, b)| usize::from(*b) == 1 + i / 1000 % 4));
    }

    /// What a derived parameter holds must not suffer from what lands beside it later.
    #[test]
    fn a_page_that_is_touched_late_keeps_what_was_written() {
        let region = Region::new("test", 3 * HUGE_PAGE).unwrap();
        let first = |page: usize| region.at(page * HUGE_PAGE, 1).as_ptr();
        for page in 0..3 {
            // SAFETY: within the region, which nobody else uses
            unsafe { first(page).write(9) };
        }
        region.touch(1, 3 * HUGE_PAGE - 1);
        for page in 0..3 {
            // SAFETY: as above
            assert_eq!(unsafe { first(page).read() }, 9, "page {page}");
        }
    }

    #[test]
    #[should_panic(expected = "leaves the region")]
    fn ranges_past_the_end_are_refused() {
        Region::new("test", 100).unwrap().at(90, 11);
    }
}
