//! Asks the page cache how much of a file it holds.

use std::{fs::File, os::fd::AsRawFd};

/// Windows that are looked at, spread evenly; enough to tell cached from not, cheap for any size.
const WINDOWS: u64 = 64;
const WINDOW_BYTES: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4096;

/// The share of `file` that is in the page cache, by sample; `None` where the system does not say.
pub(super) fn resident_share(file: &File, bytes: u64) -> Option<f64> {
    if bytes == 0 {
        return None;
    }
    // SAFETY: a read-only shared mapping of a file, never dereferenced, unmapped below.
    let map = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes as usize,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if map == libc::MAP_FAILED {
        return None;
    }
    let share = sample(map, bytes);
    // SAFETY: the mapping made above, unmapped once.
    unsafe { libc::munmap(map, bytes as usize) };
    share
}

fn sample(map: *mut libc::c_void, bytes: u64) -> Option<f64> {
    let (mut pages, mut resident) = (0usize, 0usize);
    let step = (bytes / WINDOWS).max(WINDOW_BYTES).next_multiple_of(PAGE_BYTES);
    for start in (0..bytes).step_by(step as usize) {
        let length = WINDOW_BYTES.min(bytes - start);
        let mut present = [0u8; (WINDOW_BYTES / PAGE_BYTES) as usize];
        // SAFETY: `start` is page-aligned and the window lies within the mapping; `present` has a byte per page of it.
        let rc = unsafe {
            libc::mincore(map.byte_add(start as usize), length as usize, present.as_mut_ptr())
        };
        if rc != 0 {
            return None;
        }
        let count = length.div_ceil(PAGE_BYTES) as usize;
        pages += count;
        resident += present[..count].iter().filter(|&&p| p & 1 == 1).count();
    }
    Some(resident as f64 / pages as f64)
}
