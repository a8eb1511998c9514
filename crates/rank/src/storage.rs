//! Checkpoint files: opened once, read at positions; on local storage buffered or direct, elsewhere by whoever can
//! ([`RemoteFile`]).

mod probe;

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use longshore_models::byte_range::ByteRange;

use crate::{cut, error::RankError, staging::DIRECT_ALIGNMENT};

/// What the user wants of the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoChoice {
    /// Through the page cache where a file is in it already, past it where not.
    #[default]
    Auto,
    /// Through the page cache.
    Buffered,
    /// Past the page cache (`O_DIRECT`).
    Direct,
}

/// How one file is read, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IoMode {
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// What decided.
    pub reason: &'static str,
    /// The share of the file that was in the page cache, where that was asked.
    pub resident: Option<f64>,
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileIdentity {
    /// Its length.
    pub bytes: u64,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Local {
        /// When it was last written.
        modified: Option<SystemTime>,
        /// When anything about it was last changed, in nanoseconds since 1970. Nobody can set this one.
        changed: i128,
        /// Its number within its device, and the device.
        inode: (u64, u64),
    },
    Remote {
        /// What the storage says that it is.
        version: String,
        content: Option<Content>,
    },
}

/// Names what is in a file: no other content has the same, be it of this file or of another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Content(ContentName);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum ContentName {
    /// Length, both times, number and device of a local file.
    Local(u64, Option<SystemTime>, i128, (u64, u64)),
    /// Length, and a digest or what names a state in its storage.
    Named(u64, String),
}

/// The coarsest clock of a file system that is met (Lustre and ext3 count seconds, FAT every other one): what is written this
/// long after something else has another time.
const CLOCK_TICK: Duration = Duration::from_secs(2);

impl FileIdentity {
    /// What `file` is now.
    ///
    /// # Errors
    /// The file system does not answer.
    pub fn of(file: &File) -> io::Result<Self> {
        let data = file.metadata()?;
        let (modified, inode) = (data.modified().ok(), (data.ino(), data.dev()));
        let changed = i128::from(data.ctime()) * 1_000_000_000 + i128::from(data.ctime_nsec());
        Ok(Self { bytes: data.len(), state: State::Local { modified, changed, inode } })
    }

    /// A file of `bytes` bytes that its storage knows as `version`: another version is another file.
    pub fn remote(bytes: u64, version: impl Into<String>) -> Self {
        Self { bytes, state: State::Remote { version: version.into(), content: None } }
    }

    /// With a name that no other content ever has, of whichever file: a digest, or what tells for good a state of one object.
    pub fn named(mut self, name: String) -> Self {
        if let State::Remote { content, .. } = &mut self.state {
            *content = Some(Content(ContentName::Named(self.bytes, name)));
        }
        self
    }

    /// Whether a file that was this is still as it was written, if it is `now` that; a link to it, or other permissions, make
    /// no difference.
    pub fn is_still(&self, now: &Self) -> bool {
        match (&self.state, &now.state) {
            (
                State::Local { modified, inode, .. },
                State::Local { modified: modified_now, inode: inode_now, .. },
            ) => self.bytes == now.bytes && (modified, inode) == (modified_now, inode_now),
            _ => self == now,
        }
    }

    /// What names its content, where that is certain. Of a local file it is where nothing that was written since `read` can
    /// have the same name.
    pub fn content(&self, read: SystemTime) -> Option<Content> {
        match &self.state {
            State::Local { modified, changed, inode } => {
                let settled = read.checked_sub(CLOCK_TICK)?;
                let settled = settled.duration_since(SystemTime::UNIX_EPOCH).ok()?;
                let name = ContentName::Local(self.bytes, *modified, *changed, *inode);
                (*changed < settled.as_nanos() as i128).then_some(Content(name))
            }
            State::Remote { content, .. } => content.clone(),
        }
    }

    /// What its storage calls this state, where it is not on local storage.
    pub fn version(&self) -> Option<&str> {
        match &self.state {
            State::Local { .. } => None,
            State::Remote { version, .. } => Some(version),
        }
    }
}

/// A file that is not on local storage.
pub trait RemoteFile: fmt::Debug + Send + Sync {
    /// Which file it is, and in which state: all reads are of that state.
    fn identity(&self) -> FileIdentity;

    /// Fills `targets`, one after the other, with `range`, which is as long as all of them; several threads may do so at
    /// once.
    ///
    /// # Errors
    /// Not all of it can be had within this storage's limits of time, or the file is not the same any more.
    fn read(&self, range: ByteRange, targets: &mut [&mut [u8]]) -> Result<RemoteRead, RankError>;

    /// Whether many targets cost no more than one.
    fn scatters(&self) -> bool {
        true
    }
}

/// What a scattered read took, or one of a [`RemoteFile`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoteRead {
    /// Requests.
    pub requests: u64,
    /// Bytes that were asked for once more, because a request failed or was slow.
    pub retried_bytes: u64,
    /// Bytes of the range that were not asked for, as they were kept on this host.
    pub cached_bytes: u64,
}

/// An open checkpoint file.
#[derive(Debug)]
pub struct CheckpointSource {
    /// Name within the checkpoint, for messages.
    pub name: String,
    /// What it was when it was opened.
    pub identity: FileIdentity,
    /// How it is read.
    pub mode: IoMode,
    handle: Handle,
}

#[derive(Debug)]
enum Handle {
    Local { buffered: File, direct: Option<File> },
    Remote(Arc<dyn RemoteFile>),
}

/// A file counts as cached from this share on; below it, direct reads win (measured: a direct read of a cold file is
/// 1.3 times as fast as a buffered one and needs a fiftieth of the CPU).
const CACHED_SHARE: f64 = 0.5;

impl CheckpointSource {
    /// Opens `dir/name` and decides how to read it.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(dir: &Path, name: &str, choice: IoChoice) -> io::Result<Self> {
        let path = dir.join(name);
        let buffered = File::open(&path)?;
        let identity = FileIdentity::of(&buffered)?;
        let (mut mode, wanted) = match choice {
            IoChoice::Buffered => {
                (IoMode { direct: false, reason: "asked for", resident: None }, false)
            }
            IoChoice::Direct => {
                (IoMode { direct: true, reason: "asked for", resident: None }, true)
            }
            IoChoice::Auto => {
                let resident = probe::resident_share(&buffered, identity.bytes);
                let direct = resident.is_some_and(|share| share < CACHED_SHARE);
                let reason = match (resident, direct) {
                    (None, _) => "page cache cannot be asked",
                    (_, true) => "not in the page cache",
                    (_, false) => "in the page cache",
                };
                (IoMode { direct, reason, resident }, direct)
            }
        };
        let mut direct = None;
        if wanted {
            match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path) {
                Ok(file) => direct = Some(file),
                // EINVAL: the file system has no direct I/O; reading through the cache is right then
                Err(_) => {
                    mode = IoMode {
                        direct: false,
                        reason: "no direct I/O on this file system",
                        ..mode
                    };
                }
            }
        }
        let handle = Handle::Local { buffered, direct };
        Ok(Self { name: name.to_owned(), identity, mode, handle })
    }

    /// A file that is elsewhere.
    pub fn remote(name: &str, file: Arc<dyn RemoteFile>) -> Self {
        let mode = IoMode { direct: true, reason: "not on local storage", resident: None };
        let (name, identity) = (name.to_owned(), file.identity());
        Self { name, identity, mode, handle: Handle::Remote(file) }
    }

    /// Whether the file is not on local storage.
    pub fn is_remote(&self) -> bool {
        matches!(self.handle, Handle::Remote(_))
    }

    /// Whether it is not on local storage and is read into many places as well as into one.
    pub(crate) fn scatters(&self) -> bool {
        matches!(&self.handle, Handle::Remote(file) if file.scatters())
    }

    /// What the opened file is now.
    ///
    /// # Errors
    /// The file system does not answer.
    pub fn identity_now(&self) -> io::Result<FileIdentity> {
        match &self.handle {
            Handle::Local { buffered, .. } => FileIdentity::of(buffered),
            // every single read has made sure of it
            Handle::Remote(_) => Ok(self.identity.clone()),
        }
    }

    /// Whether the file has been written since it was opened; `true` as well where the file system does not answer.
    pub fn has_changed(&self) -> bool {
        self.identity_now().map_or(true, |now| !self.identity.is_still(&now))
    }

    /// Fills `slab` with `range`, past the page cache if that is this file's mode.
    ///
    /// Returns where in the slab the range begins, and how many bytes were read beyond it for alignment. The slab must
    /// be aligned to [`DIRECT_ALIGNMENT`] and hold the range plus twice that.
    ///
    /// # Errors
    /// The read fails, or the file has become shorter.
    pub fn read_staged(&self, range: ByteRange, slab: &mut [u8]) -> Result<Staged, RankError> {
        let direct = match &self.handle {
            Handle::Local { direct: Some(direct), .. } => direct,
            Handle::Local { buffered, direct: None } => {
                let target = &mut slab[..range.len() as usize];
                let reads = self.read_buffered(buffered, range, target)?;
                return Ok(Staged { reads, ..Staged::default() });
            }
            Handle::Remote(file) => {
                let read = file.read(range, &mut [&mut slab[..range.len() as usize]])?;
                let RemoteRead { requests: reads, retried_bytes, cached_bytes } = read;
                return Ok(Staged { reads, retried_bytes, cached_bytes, ..Staged::default() });
            }
        };
        let start = range.start - range.start % DIRECT_ALIGNMENT;
        let end = range.end.next_multiple_of(DIRECT_ALIGNMENT);
        let begin = (range.start - start) as usize;
        let wanted = begin + range.len() as usize;
        let slab = &mut slab[..(end - start) as usize];
        let (mut got, mut reads) = (0, 0);
        while got < wanted {
            let n = pread(direct, &mut slab[got..], start + got as u64)
                .map_err(|source| self.read_error(range, source))?;
            reads += 1;
            got += n;
            if n == 0 || (got < wanted && got as u64 % DIRECT_ALIGNMENT != 0) {
                return Err(self.truncated(start + got as u64));
            }
        }
        let padding_bytes = (got.max(wanted) - range.len() as usize) as u64;
        Ok(Staged { begin, padding_bytes, reads, ..Staged::default() })
    }

    /// Fills `target` with `range`, through the page cache where there is one; returns the number of reads.
    ///
    /// # Errors
    /// The read fails, or the file has become shorter.
    pub fn read_full(&self, range: ByteRange, target: &mut [u8]) -> Result<u64, RankError> {
        match &self.handle {
            Handle::Local { buffered, .. } => self.read_buffered(buffered, range, target),
            Handle::Remote(file) => file.read(range, &mut [target]).map(|read| read.requests),
        }
    }

    fn read_buffered(
        &self,
        buffered: &File,
        range: ByteRange,
        target: &mut [u8],
    ) -> Result<u64, RankError> {
        let (mut got, mut reads) = (0, 0);
        while got < target.len() {
            let at = range.start + got as u64;
            let n = pread(buffered, &mut target[got..], at)
                .map_err(|source| self.read_error(range, source))?;
            reads += 1;
            if n == 0 {
                return Err(self.truncated(at));
            }
            got += n;
        }
        Ok(reads)
    }

    /// Reads `range` into `targets`, one after the other; through the page cache where there is one.
    ///
    /// # Safety
    /// Every target must be initialised memory, valid for writes of its length, and nothing else may access it meanwhile.
    ///
    /// # Errors
    /// The read fails, or the file has become shorter.
    pub unsafe fn read_scattered(
        &self,
        range: ByteRange,
        targets: &mut [libc::iovec],
    ) -> Result<RemoteRead, RankError> {
        let buffered = match &self.handle {
            Handle::Local { buffered, .. } => buffered,
            Handle::Remote(file) => {
                let slice = |target: &libc::iovec| {
                    // SAFETY: the caller vouches for the memory, and that it is used by nobody else meanwhile.
                    unsafe {
                        std::slice::from_raw_parts_mut(target.iov_base.cast::<u8>(), target.iov_len)
                    }
                };
                let mut targets: Vec<&mut [u8]> = targets.iter().map(slice).collect();
                return file.read(range, &mut targets);
            }
        };
        let (mut at, mut reads, mut first) = (range.start, 0, 0);
        while first < targets.len() {
            let batch = &targets[first..targets.len().min(first + IOV_MAX)];
            // SAFETY: the iovecs point to memory that the caller vouches for; `batch` is at most IOV_MAX long.
            let n = unsafe {
                libc::preadv(
                    buffered.as_raw_fd(),
                    batch.as_ptr(),
                    batch.len() as libc::c_int,
                    at as libc::off_t,
                )
            };
            if n < 0 {
                let source = io::Error::last_os_error();
                if source.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(self.read_error(range, source));
            }
            reads += 1;
            if n == 0 {
                return Err(self.truncated(at));
            }
            at += n as u64;
            first += advance(&mut targets[first..], n as usize);
        }
        Ok(RemoteRead { requests: reads, ..RemoteRead::default() })
    }

    /// Carries out a `read` of weights, unless this process is cut off from storage: also if that happens meanwhile.
    ///
    /// # Errors
    /// The read fails, or is cut off.
    pub(crate) fn unless_cut<T>(
        &self,
        range: ByteRange,
        read: impl FnOnce() -> Result<T, RankError>,
    ) -> Result<T, RankError> {
        let pass = || cut::pass_storage().map_err(|source| self.read_error(range, source));
        pass()?;
        let done = read()?;
        pass()?;
        Ok(done)
    }

    fn read_error(&self, range: ByteRange, source: io::Error) -> RankError {
        RankError::Read { file: self.name.clone(), offset: range.start, bytes: range.len(), source }
    }

    fn truncated(&self, found: u64) -> RankError {
        RankError::Truncated { file: self.name.clone(), found, expected: self.identity.bytes }
    }
}

/// The most iovecs of one call (`UIO_MAXIOV` of Linux).
pub const IOV_MAX: usize = 1024;

/// What a staged read did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Staged {
    /// Where in the slab the wanted range begins.
    pub begin: usize,
    /// Bytes read beyond the range.
    pub padding_bytes: u64,
    /// Reads that were issued.
    pub reads: u64,
    /// Bytes that were asked for once more.
    pub retried_bytes: u64,
    /// Bytes of the range that came from what this host has kept of the storage.
    pub cached_bytes: u64,
}

/// Skips `bytes` bytes of the targets: how many are full, and the next one shortened.
fn advance(targets: &mut [libc::iovec], mut bytes: usize) -> usize {
    let mut full = 0;
    for target in targets {
        if bytes < target.iov_len {
            target.iov_base = target.iov_base.wrapping_byte_add(bytes);
            target.iov_len -= bytes;
            break;
        }
        bytes -= target.iov_len;
        full += 1;
    }
    full
}

fn pread(file: &File, target: &mut [u8], at: u64) -> io::Result<usize> {
    loop {
        match std::os::unix::fs::FileExt::read_at(file, target, at) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::staging::Staging;

    fn file(bytes: usize) -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
        File::create(dir.path().join("f")).unwrap().write_all(&data).unwrap();
        (dir, data)
    }

    /// Ranges at any offset, up to the unaligned end of the file, read the same either way.
    #[test]
    fn direct_and_buffered_reads_return_the_same_bytes() {
        let (dir, data) = file(50_001);
        for choice in [IoChoice::Buffered, IoChoice::Direct] {
            let source = CheckpointSource::open(dir.path(), "f", choice).unwrap();
            let staging = Staging::new(65_536);
            for (start, end) in [(0, 1), (1, 4096), (4095, 4097), (8192, 16384), (49_000, 50_001)] {
                let mut lease = staging.lease().unwrap();
                let range = ByteRange::new(start, end);
                let staged = source.read_staged(range, lease.bytes_mut()).unwrap();
                let got = &lease.bytes_mut()[staged.begin..][..range.len() as usize];
                assert_eq!(got, &data[start as usize..end as usize], "{choice:?} {range}");
            }
        }
    }

    #[test]
    fn scattered_read_fills_all_targets_in_order() {
        let (dir, data) = file(10_000);
        let source = CheckpointSource::open(dir.path(), "f", IoChoice::Buffered).unwrap();
        let mut parts: Vec<Vec<u8>> = (0..1500).map(|i| vec![0; 1 + i % 5]).collect();
        let total: usize = parts.iter().map(Vec::len).sum();
        let mut iov: Vec<libc::iovec> = parts
            .iter_mut()
            .map(|p| libc::iovec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() })
            .collect();
        let range = ByteRange::new(17, 17 + total as u64);
        // SAFETY: the vectors are alive and used by nobody else.
        let read = unsafe { source.read_scattered(range, &mut iov) }.unwrap();
        assert_eq!(read.requests, 2);
        assert_eq!(parts.concat(), &data[17..17 + total]);
    }

    #[test]
    fn a_file_that_became_shorter_is_named_with_its_new_end() {
        let (dir, _) = file(20_000);
        for choice in [IoChoice::Buffered, IoChoice::Direct] {
            let source = CheckpointSource::open(dir.path(), "f", choice).unwrap();
            let shorter = OpenOptions::new().write(true).open(dir.path().join("f")).unwrap();
            shorter.set_len(10_000).unwrap();
            let staging = Staging::new(65_536);
            let mut lease = staging.lease().unwrap();
            let e =
                source.read_staged(ByteRange::new(9_000, 12_000), lease.bytes_mut()).unwrap_err();
            let text = e.to_string();
            assert!(text.contains("10000") && text.contains("20000"), "{choice:?}: {text}");
            shorter.set_len(20_000).unwrap();
        }
    }
}
