//! How much is kept, by all processes together, and making room.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tracing::info;

use super::{
    super::{Cached, flock_soon},
    directory::{by_model, cached, shrink, states, total_bytes},
};
use crate::report::bytes_text;

/// The directory of all that is kept, and the most that it may hold.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) root: PathBuf,
    limit_bytes: Option<u64>,
    /// Threads of one process need not look out for each other as processes do.
    one_at_a_time: Mutex<()>,
    trimmed: Once,
    /// All that there is room for is in use, so that nothing more is kept.
    full: AtomicBool,
}

/// What is removed at a time is a 64th of the limit, so that not every stretch begins with removing one.
const LIMIT_SHARE: u64 = 64;

/// The same where the file system is the limit.
const FREED_BYTES: u64 = 64 << 20;

impl Room {
    pub(super) fn new(root: PathBuf, limit_bytes: Option<u64>) -> Self {
        let (one_at_a_time, trimmed, full) =
            (Mutex::default(), Once::new(), AtomicBool::new(false));
        Self { root, limit_bytes, one_at_a_time, trimmed, full }
    }

    /// Makes the directory, unless it is there; fails where it cannot be written.
    pub(super) fn prepare(&self) -> io::Result<()> {
        fs::create_dir_all(&self.root)?;
        self.open().map(drop)
    }

    /// Counts what is there, once, and makes it fit: the limit may be lower than it was, and what ended in the middle of something
    /// may have counted what never came.
    pub(super) fn trim(&self) -> io::Result<()> {
        let mut done = Ok(());
        if let Some(limit) = self.limit_bytes {
            self.trimmed.call_once(|| {
                done = self.ledger().and_then(|mut ledger| {
                    ledger.set(total_bytes(&self.root))?;
                    let over = ledger.total.saturating_sub(limit);
                    self.free(&mut ledger, over).map(drop)
                });
            });
        }
        done
    }

    /// Counts `bytes` and makes what will take them; `None` where there is no room for them, not even in the place of what nobody
    /// uses.
    pub(super) fn take<T>(
        &self,
        bytes: u64,
        make: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        if self.full.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut ledger = self.ledger()?;
        if let Some(limit) = self.limit_bytes {
            let over = |total: u64| total.saturating_add(bytes).saturating_sub(limit);
            if over(ledger.total) > 0 {
                let spare = limit / LIMIT_SHARE;
                let wanted = over(ledger.total) + spare;
                self.free(&mut ledger, wanted)?;
            }
            if over(ledger.total) > 0 {
                self.full.store(true, Ordering::Relaxed);
                let (dir, limit) = (self.root.display(), bytes_text(limit));
                info!("{dir}: full at its limit of {limit}, what is read from now on is not kept");
                return Ok(None);
            }
        }
        // first, so that nobody can be ended in between with something that does not count
        ledger.set(ledger.total.saturating_add(bytes))?;
        let made = make();
        if made.is_err() {
            ledger.set(ledger.total.saturating_sub(bytes))?;
        }
        made.map(Some)
    }

    /// So many bytes are there no more. Where that cannot be told, they count until everything is counted again.
    pub(super) fn give_back(&self, bytes: u64) {
        if bytes > 0 {
            let _ = self.ledger().and_then(|mut l| l.set(l.total.saturating_sub(bytes)));
        }
    }

    /// Removes some of what nobody uses; false if there is nothing.
    pub(super) fn make_some(&self) -> io::Result<bool> {
        let mut ledger = self.ledger()?;
        Ok(self.free(&mut ledger, FREED_BYTES)? > 0)
    }

    /// Removes what was not used for longest, until `wanted` bytes are freed or the rest is in use; returns how many were.
    fn free(&self, ledger: &mut Ledger<'_>, wanted: u64) -> io::Result<u64> {
        let mut freed = 0;
        if wanted > 0 {
            for state in states(&self.root) {
                if freed >= wanted {
                    break;
                }
                freed += shrink(&state.dir, wanted - freed);
            }
            ledger.set(ledger.total.saturating_sub(freed))?;
        }
        Ok(freed)
    }

    /// Removes what nobody uses and has not used for `unused`; returns what was removed.
    pub(super) fn prune(&self, unused: Duration) -> io::Result<Vec<Cached>> {
        let mut ledger = self.ledger()?;
        let mut removed = Vec::new();
        for state in states(&self.root) {
            if state.used.elapsed().is_ok_and(|age| age >= unused) {
                let was = cached(&state);
                let freed = shrink(&state.dir, u64::MAX);
                ledger.set(ledger.total.saturating_sub(freed))?;
                removed.extend((!state.dir.exists()).then_some(was));
            }
        }
        Ok(by_model(removed))
    }

    fn open(&self) -> io::Result<File> {
        let path = self.root.join("total");
        File::options().read(true).write(true).create(true).truncate(false).open(path)
    }

    fn ledger(&self) -> io::Result<Ledger<'_>> {
        let alone = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let file = self.open()?;
        flock_soon(&file, libc::LOCK_EX)?;
        let mut total = [0; 8];
        match file.read_exact_at(&mut total, 0) {
            Ok(()) => Ok(Ledger { file, total: u64::from_le_bytes(total), _alone: alone }),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                let mut ledger = Ledger { file, total: 0, _alone: alone };
                ledger.set(total_bytes(&self.root))?;
                Ok(ledger)
            }
            Err(e) => Err(e),
        }
    }
}

/// What is stored, as counted by whoever stores; locked.
#[derive(Debug)]
struct Ledger<'a> {
    file: File,
    total: u64,
    _alone: MutexGuard<'a, ()>,
}

impl Ledger<'_> {
    fn set(&mut self, total: u64) -> io::Result<()> {
        self.total = total;
        self.file.write_all_at(&total.to_le_bytes(), 0)
    }
}
