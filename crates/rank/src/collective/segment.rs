//! A segment of memory through which the ranks of one host pass bytes: written by its owner, read by the others.
//!
//! ```text
//! page 0     | token | doorbell                  the only page that others may write: they ring the doorbell
//! control    | announcements: one per operation  what the owner sends from, in which operation
//!            | sent: one per target, operation   how many bytes of it are for that rank
//!            | taken: one per source, operation  what the owner has finished with
//! slots      | slot 0 | slot 1 | …               what is sent
//! ```
//!
//! The memory has no name in any file system (`memfd_create`): it is gone when the last process that has it is gone,
//! however that ends. Others open it through `/proc/PID/fd`, which the kernel allows to the same user only, and prove by its
//! token that it is the one that was meant. It is sealed, so that nobody can cut it short under a reader.
//!
//! What another rank writes is not trusted: numbers are checked against the segment before they are used.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::CollectiveError;

/// Operations that a rank may have started and not yet seen taken by all others.
pub(super) const RING: u64 = 256;

/// Bytes of a token.
pub const TOKEN_BYTES: usize = 32;

const PAGE: usize = 4096;
const DOORBELL_AT: usize = 64;
/// An announcement: three words, padded so that none lies across two cache lines.
const ANNOUNCEMENT_BYTES: usize = 32;

/// How to find a segment and what it looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentHandle {
    /// The owner's process.
    pub process: u32,
    /// The owner's descriptor of it.
    pub descriptor: i32,
    /// What its first bytes must be.
    pub token: [u8; TOKEN_BYTES],
    /// Its form.
    pub form: Form,
}

/// The sizes that a segment follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Form {
    /// Ranks of the group.
    pub world_size: u32,
    /// Number of slots.
    pub slots: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
}

impl Form {
    fn control_bytes(&self) -> Option<usize> {
        let per_rank = (self.world_size as usize).checked_mul(2 * RING as usize * 8)?;
        let announcements = RING as usize * ANNOUNCEMENT_BYTES;
        announcements.checked_add(per_rank)?.checked_next_multiple_of(PAGE)
    }

    fn slots_at(&self) -> Option<usize> {
        self.control_bytes()?.checked_add(PAGE)
    }

    fn bytes(&self) -> Option<usize> {
        let slots = usize::try_from(self.slot_bytes).ok()?.checked_mul(self.slots as usize)?;
        self.slots_at()?.checked_add(slots)
    }
}

/// A mapped segment: one's own, or another rank's.
#[derive(Debug)]
pub struct Segment {
    file: File,
    form: Form,
    token: [u8; TOKEN_BYTES],
    mapping: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a segment is plain memory; what is shared in it is only accessed through atomics, or under the rule of slots.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// What a rank sends from in one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Announcement {
    pub(super) slot: u32,
    /// Bytes of the slot that were filled.
    pub(super) filled: u64,
}

impl Segment {
    /// Makes this process's segment; `token` is what tells it from any other.
    ///
    /// # Errors
    /// The system has no such memory to give.
    pub fn create(form: Form, token: [u8; TOKEN_BYTES]) -> Result<Arc<Self>, CollectiveError> {
        let failed = |e: io::Error| CollectiveError::system("making shared memory", &e);
        let bytes = form.bytes().ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the name is a C string; the call touches no memory of ours.
        let descriptor = unsafe {
            libc::memfd_create(c"longshore".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if descriptor < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
        file.set_len(bytes as u64).map_err(failed)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: a call on our descriptor that touches no memory.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        let mapping = map(&file, bytes, libc::PROT_READ | libc::PROT_WRITE).map_err(failed)?;
        // SAFETY: the mapping is larger than a page, fresh and seen by nobody else yet.
        unsafe { std::ptr::copy_nonoverlapping(token.as_ptr(), mapping.as_ptr(), TOKEN_BYTES) };
        Ok(Arc::new(Self { file, form, token, mapping, bytes }))
    }

    /// How others find this process's segment.
    pub fn handle(&self) -> SegmentHandle {
        SegmentHandle {
            process: std::process::id(),
            descriptor: self.file.as_raw_fd(),
            token: self.token,
            form: self.form,
        }
    }

    /// Opens another rank's segment.
    ///
    /// # Errors
    /// It cannot be reached from this process, or is another one than `handle` means.
    pub fn open(handle: &SegmentHandle) -> Result<Arc<Self>, CollectiveError> {
        let path = PathBuf::from(format!("/proc/{}/fd/{}", handle.process, handle.descriptor));
        let failed = |e: io::Error| CollectiveError::system("opening a rank's shared memory", &e);
        let other = || failed(io::Error::other("it is another segment than was announced"));
        let file = File::options().read(true).write(true).open(path).map_err(failed)?;
        let bytes = handle.form.bytes().ok_or_else(other)?;
        if file.metadata().map_err(failed)?.len() != bytes as u64 {
            return Err(other());
        }
        // SAFETY: a call on our descriptor that touches no memory.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            return Err(other());
        }
        let mapping = map(&file, bytes, libc::PROT_READ | libc::PROT_WRITE).map_err(failed)?;
        let this = Self { file, form: handle.form, token: handle.token, mapping, bytes };
        // SAFETY: the mapping is larger than a page; the owner wrote the token before it announced the segment.
        let token = unsafe { std::slice::from_raw_parts(mapping.as_ptr(), TOKEN_BYTES) };
        if token != handle.token {
            return Err(other());
        }
        // SAFETY: the range lies within the mapping made above, which nobody has pointers into yet.
        let protected = unsafe {
            libc::mprotect(mapping.as_ptr().add(PAGE).cast(), bytes - PAGE, libc::PROT_READ)
        };
        if protected < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(Arc::new(this))
    }

    /// Its sizes, as its owner has announced them.
    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Number of slots.
    pub(super) fn slots(&self) -> u32 {
        self.form.slots
    }

    /// Bytes of a slot.
    pub(super) fn slot_bytes(&self) -> usize {
        // `bytes` of the form was counted in `usize`
        self.form.slot_bytes as usize
    }

    /// Where a slot begins.
    ///
    /// # Panics
    /// When there is no such slot.
    pub(super) fn slot(&self, index: u32) -> NonNull<u8> {
        assert!(index < self.form.slots, "no such slot");
        let at = self.form.slots_at().map(|at| at + index as usize * self.slot_bytes());
        self.at(at.unwrap_or(self.bytes), self.slot_bytes())
    }

    fn at(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "range leaves the segment");
        // SAFETY: `offset` lies within the mapping, as just checked.
        unsafe { self.mapping.add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8);
        // SAFETY: the word lies within the mapping, which lives as long as `self`, at a multiple of 8 (a page plus
        // multiples of 8), and is accessed as an atomic by all processes.
        unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) }
    }

    fn announcement_at(operation: u64) -> usize {
        PAGE + (operation % RING) as usize * ANNOUNCEMENT_BYTES
    }

    /// Owner: tells the others what it sends from in `operation`, and how much of it is for each of them; they may look at
    /// it from now on.
    pub(super) fn announce(
        &self,
        operation: u64,
        what: Announcement,
        bytes: impl Iterator<Item = u64>,
    ) {
        let at = Self::announcement_at(operation);
        for (target, bytes) in bytes.enumerate() {
            self.word(Self::sent_at(target as u32, operation)).store(bytes, Ordering::Relaxed);
        }
        self.word(at + 8).store(u64::from(what.slot), Ordering::Relaxed);
        self.word(at + 16).store(what.filled, Ordering::Relaxed);
        // Release: whoever sees the number also sees the announcement, and the slot as it was filled
        self.word(at).store(operation + 1, Ordering::Release);
    }

    /// Others: what the owner sends from in `operation`, and how much of it is for `target`; `None` while it has not
    /// announced it.
    pub(super) fn announced(&self, operation: u64, target: u32) -> Option<(Announcement, u64)> {
        let at = Self::announcement_at(operation);
        if self.word(at).load(Ordering::Acquire) != operation + 1 {
            return None;
        }
        let slot = self.word(at + 8).load(Ordering::Relaxed);
        let filled = self.word(at + 16).load(Ordering::Relaxed);
        let bytes = self.word(Self::sent_at(target, operation)).load(Ordering::Relaxed);
        // a slot that is none is refused where the bytes are borrowed
        Some((Announcement { slot: u32::try_from(slot).unwrap_or(u32::MAX), filled }, bytes))
    }

    fn sent_at(target: u32, operation: u64) -> usize {
        let ring = target as usize * RING as usize + (operation % RING) as usize;
        PAGE + RING as usize * ANNOUNCEMENT_BYTES + ring * 8
    }

    fn taken_at(&self, source: u32, operation: u64) -> usize {
        Self::sent_at(self.form.world_size + source, operation)
    }

    /// Owner: it has finished with what `source` sent in `operation`.
    pub(super) fn take(&self, source: u32, operation: u64) {
        // Release: the owner's reads of the slot come before
        self.word(self.taken_at(source, operation)).store(operation + 1, Ordering::Release);
    }

    /// Others: whether the owner has finished with what `source` sent in `operation`.
    pub(super) fn has_taken(&self, source: u32, operation: u64) -> bool {
        let word = self.word(self.taken_at(source, operation));
        word.load(Ordering::Acquire) == operation + 1
    }

    /// The bell that others ring when there is news for the owner.
    pub(super) fn doorbell(&self) -> &AtomicU32 {
        let at = self.at(DOORBELL_AT, 4);
        // SAFETY: the word lies within the mapping, which lives as long as `self`, at a multiple of 4, and is accessed
        // as an atomic by all processes.
        unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `create` or `open`, unmapped once; pointers into it are only used by
        // holders of the `Arc` around `self`.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.bytes) };
    }
}

fn map(file: &File, bytes: usize, protection: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: a mapping at an address of the kernel's choice touches no existing memory.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    match NonNull::new(address.cast::<u8>()) {
        Some(mapping) if address != libc::MAP_FAILED => Ok(mapping),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Rings a bell: whoever waits at it looks again.
pub(super) fn ring(bell: &AtomicU32) {
    bell.fetch_add(1, Ordering::Release);
    // SAFETY: the address is that of a live word; the call only looks at who waits there.
    unsafe {
        libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// Waits at a bell until it was rung since it showed `seen`, or for `timeout`.
pub(super) fn wait_at(bell: &AtomicU32, seen: u32, timeout: Duration) {
    let limit = libc::timespec {
        tv_sec: timeout.as_secs().min(i32::MAX as u64) as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: the address is that of a live word, the limit lives through the call. An error (rung meanwhile, timed out,
    // interrupted) is a reason to look again like any other.
    unsafe {
        libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAIT, seen, &raw const limit);
    }
}

/// Another rank's slot, as far as it was filled; its owner uses it again only after this is dropped.
#[derive(Debug)]
pub struct Borrowed {
    own: Arc<Segment>,
    other: Arc<Segment>,
    source: u32,
    operation: u64,
    announced: Announcement,
}

impl Borrowed {
    /// What `source`, whose segment is `other`, has announced; `own` is where the end of it is noted.
    ///
    /// # Errors
    /// There is no such slot.
    pub(super) fn new(
        own: &Arc<Segment>,
        other: &Arc<Segment>,
        source: u32,
        operation: u64,
        announced: Announcement,
    ) -> Result<Self, CollectiveError> {
        let Announcement { slot, filled } = announced;
        if slot >= other.form.slots || filled > other.form.slot_bytes {
            let what = format!("announced {filled} bytes in slot {slot}, which is none");
            return Err(CollectiveError::Connection { with: source, what });
        }
        let (own, other) = (Arc::clone(own), Arc::clone(other));
        Ok(Self { own, other, source, operation, announced })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        let start = self.other.slot(self.announced.slot);
        // SAFETY: `new` checked slot and length; the mapping lives as long as `other`; its owner does not write the slot
        // before this is dropped (it waits for `take`).
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.announced.filled as usize) }
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.own.take(self.source, self.operation);
        ring(self.other.doorbell());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: Form = Form { world_size: 2, slots: 3, slot_bytes: 5000 };

    #[test]
    fn what_the_owner_announces_is_what_others_see() {
        let own = Segment::create(FORM, [7; 32]).unwrap();
        let other = Segment::open(&own.handle()).unwrap();
        // SAFETY: nobody reads the slot before it is announced.
        unsafe { own.slot(2).as_ptr().write_bytes(9, 5000) };
        assert_eq!(other.announced(0, 1), None);
        own.announce(0, Announcement { slot: 2, filled: 4000 }, [0, 77].into_iter());
        let (announced, bytes) = other.announced(0, 1).unwrap();
        assert_eq!(bytes, 77);
        let mine = Segment::create(FORM, [8; 32]).unwrap();
        let borrowed = Borrowed::new(&mine, &other, 0, 0, announced).unwrap();
        assert_eq!(borrowed.bytes(), [9; 4000]);
        assert!(!mine.has_taken(0, 0));
        let rung = own.doorbell().load(Ordering::Relaxed);
        drop(borrowed);
        assert!(mine.has_taken(0, 0));
        assert_ne!(own.doorbell().load(Ordering::Relaxed), rung);
        assert_eq!(other.announced(RING, 1), None, "the ring has been round");
    }

    #[test]
    fn another_segment_is_refused() {
        let own = Segment::create(FORM, [7; 32]).unwrap();
        let handle = own.handle();
        let wrong = SegmentHandle { token: [0; 32], ..handle.clone() };
        assert!(Segment::open(&wrong).is_err());
        let wrong = SegmentHandle { form: Form { slots: 4, ..FORM }, ..handle.clone() };
        assert!(Segment::open(&wrong).is_err());
        let huge = Form { slots: u32::MAX, slot_bytes: u64::MAX, ..FORM };
        assert!(Segment::open(&SegmentHandle { form: huge, ..handle.clone() }).is_err());
        assert!(Segment::open(&SegmentHandle { descriptor: 0, ..handle }).is_err());
    }

    #[test]
    fn a_slot_that_is_none_is_refused() {
        let own = Segment::create(FORM, [7; 32]).unwrap();
        for announced in
            [Announcement { slot: 3, filled: 1 }, Announcement { slot: 0, filled: 5001 }]
        {
            assert!(Borrowed::new(&own, &own, 1, 0, announced).is_err());
        }
    }
}
