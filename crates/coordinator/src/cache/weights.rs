//! What is kept of weights that are elsewhere: written as it is read, so that the next load of this host reads locally.
//!
//! ```text
//! DIR
//! └── weights
//!     ├── total               how much there is, counted by whoever writes; locked meanwhile
//!     ├── warned              locked by whoever has told that nothing is kept any more
//!     └── 3f9a…               one per model: the first 16 hex digits of the SHA-256 of its URI
//!         └── 51d0…           one per weight file in one state: the same of its name, length and version
//!             ├── used        these, for people; locked as shared by whoever uses it; written when it was used last
//!             ├── 0000000000001000-0000000000201000                    a stretch: bytes start..end, then their checksum
//!             └── 0000000000201000-0000000000401000.a7…-3.unfinished   one that is being written
//! ```
//!
//! A stretch is what one read has fetched. It depends on nothing else: any may be removed at any time, and whoever misses it
//! fetches it.
//!
//! 1. WCH-1: A stretch gets its name when all of it has been written. A process may end anywhere.
//! 2. WCH-2: No byte is handed out unless all of its stretch has the checksum that was computed of what was fetched.
//! 3. WCH-3: Whatever the cache cannot do makes a load slower, never wrong, and never fail. (A directory that cannot be written at
//!    all is refused before anything is read.)
//! 4. WCH-4: There is never more than the limit, counting what is being written; what is used is not removed for it.
//!
//! Nothing is flushed to the disk: after a crash of the host, what did not get there fails its checksum. A read waits for the file
//! system to take what it has fetched, so a disk that is slower than the storage slows the first load down.

mod directory;
mod kept;
mod room;
mod stretches;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use longshore_models::byte_range::ByteRange;
use longshore_rank::{
    error::RankError,
    storage::{FileIdentity, RemoteFile, RemoteRead},
};
use tracing::{debug, warn};

use self::{kept::KeptFile, room::Room};
use super::{Cached, flock, short_hash};
use crate::error::LoadError;

/// Where what is read of weights elsewhere is kept, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepWeights {
    /// The directory; several processes may share it, and models too.
    pub dir: PathBuf,
    /// The most bytes of the file system that it may take, all models together: what was not used for longest goes first, and
    /// what does not fit is not kept. `None`: as much as there is.
    pub limit_bytes: Option<u64>,
}

impl KeepWeights {
    fn root(&self) -> PathBuf {
        self.dir.join("weights")
    }
}

/// What is kept of one model's weights.
#[derive(Debug)]
pub struct WeightCache {
    uri: String,
    room: Room,
    /// Tells what this process writes from what others write.
    token: u64,
    /// Writing has failed, and is not tried again.
    stopped: AtomicBool,
    /// Held by the one process that has told so.
    warned: Mutex<Option<File>>,
}

impl WeightCache {
    /// The cache of the model `uri`. What is there is not looked at before something is read.
    ///
    /// # Errors
    /// The directory cannot be made or written, for another reason than a full disk.
    pub fn open(keep: &KeepWeights, uri: &str) -> Result<Arc<Self>, LoadError> {
        let cache = Self {
            uri: uri.to_owned(),
            room: Room::new(keep.root(), keep.limit_bytes),
            token: getrandom::u64().map_err(|e| LoadError::Runtime(e.to_string()))?,
            stopped: AtomicBool::new(false),
            warned: Mutex::new(None),
        };
        match cache.room.prepare() {
            Ok(()) => {}
            Err(e) if is_full(&e) => cache.stop(&e),
            Err(e) => {
                let reason = format!("{}: cannot be written: {e}", keep.dir.display());
                return Err(LoadError::Option { option: "--cache-dir", reason });
            }
        }
        Ok(Arc::new(cache))
    }

    /// `source` through the cache. Only for files whose version no other content ever has.
    pub fn file(self: &Arc<Self>, name: &str, source: Arc<dyn RemoteFile>) -> Arc<dyn RemoteFile> {
        let (cache, name, kept) = (Arc::clone(self), name.to_owned(), OnceLock::new());
        Arc::new(CachedFile { cache, name, kept, source })
    }

    fn model(&self) -> PathBuf {
        self.room.root.join(short_hash(self.uri.as_bytes()))
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Writes nothing any more, and says why once: the ranks of a load, which share a disk, say so once together.
    fn stop(&self, why: &io::Error) {
        if self.stopped.swap(true, Ordering::Relaxed) {
            return;
        }
        let dir = self.room.root.display();
        let text =
            format!("{dir}: what is read is not kept any more, loading goes on without: {why}");
        let file = File::options().create(true).append(true).open(self.room.root.join("warned"));
        let locked = file.and_then(|f| flock(&f, libc::LOCK_EX | libc::LOCK_NB).map(|()| f));
        match locked {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => debug!("{text}"),
            locked => {
                warn!("{text}");
                *self.warned.lock().unwrap_or_else(PoisonError::into_inner) = locked.ok();
            }
        }
    }
}

/// Whether the file system has no room left.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A file that is not on local storage, read from what is kept of it as far as that goes.
#[derive(Debug)]
struct CachedFile {
    cache: Arc<WeightCache>,
    name: String,
    /// Opened by the first read; `None` where it could not be.
    kept: OnceLock<Option<KeptFile>>,
    source: Arc<dyn RemoteFile>,
}

impl CachedFile {
    fn kept(&self) -> Option<&KeptFile> {
        let open = || {
            let identity = self.source.identity();
            let version = identity.version()?;
            let opened = KeptFile::open(&self.cache, &self.name, identity.bytes, version);
            opened.map_err(|e| self.cache.stop(&e)).ok()
        };
        self.kept.get_or_init(open).as_ref()
    }
}

impl RemoteFile for CachedFile {
    fn identity(&self) -> FileIdentity {
        self.source.identity()
    }

    fn read(&self, range: ByteRange, targets: &mut [&mut [u8]]) -> Result<RemoteRead, RankError> {
        // nothing is begun for nothing
        let kept = if range.is_empty() { None } else { self.kept() };
        let (Some(kept), [target]) = (kept, &mut *targets) else {
            return self.source.read(range, targets);
        };
        let mut read = RemoteRead { cached_bytes: range.len(), ..RemoteRead::default() };
        for missing in kept.read(range, target) {
            let part = &mut target[within(missing, range)];
            let fetched = self.source.read(missing, &mut [&mut *part])?;
            read.requests += fetched.requests;
            read.retried_bytes += fetched.retried_bytes;
            read.cached_bytes -= missing.len();
            kept.keep(missing, part);
        }
        Ok(read)
    }

    /// A stretch is checked and kept as a whole.
    fn scatters(&self) -> bool {
        false
    }
}

/// Where `part` is in a buffer that holds `whole`.
fn within(part: ByteRange, whole: ByteRange) -> std::ops::Range<usize> {
    (part.start - whole.start) as usize..(part.end - whole.start) as usize
}

/// What is kept of each model in a directory, the last used first.
pub fn list(dir: &Path) -> Vec<Cached> {
    let states = directory::states(&dir.join("weights"));
    directory::by_model(states.iter().map(directory::cached))
}

/// Removes what nobody uses and has not used for `unused`; returns what was removed.
///
/// # Errors
/// The directory cannot be written.
pub fn prune(dir: &Path, unused: Duration) -> Result<Vec<Cached>, LoadError> {
    let root = dir.join("weights");
    if !root.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |source| LoadError::Io { path: root.clone(), action: "pruning", source };
    Room::new(root.clone(), None).prune(unused).map_err(failed)
}
