//! The cache directory: what is kept of models whose weights are elsewhere, so that it is fetched once per host.
//!
//! ```text
//! $LONGSHORE_CACHE_DIR, or $XDG_CACHE_HOME/longshore, or ~/.cache/longshore
//! └── models
//!     └── 3f9a…  one per model: the first 16 hex digits of the SHA-256 of its URI
//!         ├── uri         the URI, for people and `longshore cache`
//!         ├── lock        held by whoever fetches
//!         ├── 77c0…  one per state of the files: the same of their names, lengths and versions
//!         │   └── config.json, tokenizer.json, …
//!         └── 02b1…  the headers of the weight files, likewise
//! ```
//!
//! A state's directory gets its name when it is complete, and never changes after that: whoever finds it may use it, whoever
//! does not fetches it, one process at a time. Whether a model has changed is seen from a listing, so nothing in here is trusted
//! for longer than that.
//!
//! Weights are kept only where that is asked for, in a directory that the user chooses: [`weights`].

pub mod weights;

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{digest::hex, error::LoadError};

/// The cache directory of this user.
///
/// # Errors
/// The environment does not say where.
pub fn directory() -> Result<PathBuf, LoadError> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let found = set("LONGSHORE_CACHE_DIR")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("longshore")))
        .or_else(|| Some(set("HOME")?.join(".cache/longshore")));
    found.ok_or_else(|| LoadError::Option {
        option: "LONGSHORE_CACHE_DIR",
        reason: "not set, and neither are XDG_CACHE_HOME and HOME".into(),
    })
}

/// A file of a model, in one state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileState {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// What its storage calls this state.
    pub(crate) version: String,
}

/// The directory that holds `files` of the model `uri`, if it is complete.
pub(crate) fn existing_files(cache: &Path, uri: &str, files: &[FileState]) -> Option<PathBuf> {
    let state = cache.join("models").join(short_hash(uri.as_bytes())).join(state_name(files));
    state.is_dir().then(|| {
        touch(&state);
        state
    })
}

/// The directory that holds `files` of the model `uri`; unless it is there, `fetch` fills one with them, which has no other name
/// until it is complete.
///
/// Processes that ask for it at the same time wait for one of them to fetch it. One that is ended in the middle leaves a
/// temporary directory that nobody takes for a complete one, and that goes with the next fetch.
///
/// # Errors
/// The directory cannot be written, or `fetch` fails.
pub(crate) fn model_files(
    cache: &Path,
    uri: &str,
    files: &[FileState],
    fetch: impl Fn(&Path) -> Result<(), LoadError>,
) -> Result<PathBuf, LoadError> {
    if let Some(state) = existing_files(cache, uri, files) {
        return Ok(state);
    }
    let model = cache.join("models").join(short_hash(uri.as_bytes()));
    let state = model.join(state_name(files));
    let failed = |path: &Path, action| {
        let path = path.to_owned();
        move |source| LoadError::Io { path, action, source }
    };
    fs::create_dir_all(&model).map_err(failed(&model, "creating the directory"))?;
    let _lock = Lock::take(&model.join("lock")).map_err(failed(&model, "locking"))?;
    // another process may have fetched it meanwhile
    if state.is_dir() {
        return Ok(state);
    }
    remove_unfinished(&model);
    let uri_file = model.join("uri");
    fs::write(&uri_file, uri).map_err(failed(&uri_file, "writing"))?;
    let aside = model.join(format!("{}{UNFINISHED}", state_name(files)));
    fs::create_dir(&aside).map_err(failed(&aside, "creating the directory"))?;
    fetch(&aside)?;
    for file in files {
        let path = aside.join(&file.name);
        File::open(&path).and_then(|f| f.sync_all()).map_err(failed(&path, "writing"))?;
    }
    fs::rename(&aside, &state).map_err(failed(&state, "renaming"))?;
    Ok(state)
}

/// What the names of directories end in that are not complete.
const UNFINISHED: &str = ".unfinished";

/// Removes what processes left behind that were ended in the middle; the lock is held.
fn remove_unfinished(model: &Path) {
    for entry in fs::read_dir(model).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(UNFINISHED) {
            // what cannot be removed is in nobody's way: its name is not looked for
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The first 16 hex digits of a SHA-256.
fn short_hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes)[..8])
}

fn state_name(files: &[FileState]) -> String {
    let mut sorted: Vec<&FileState> = files.iter().collect();
    sorted.sort();
    let lines = sorted.iter().map(|f| format!("{}\n{}\n{}\n", f.name, f.bytes, f.version));
    short_hash(lines.collect::<String>().as_bytes())
}

/// Notes that a state was used; where that cannot be, it only goes sooner.
fn touch(state: &Path) {
    let _ = File::open(state).and_then(|dir| dir.set_modified(SystemTime::now()));
}

/// An exclusive lock between processes; ends with the process that holds it, however that ends.
#[derive(Debug)]
struct Lock(#[expect(dead_code, reason = "held, not looked at")] File);

impl Lock {
    /// Waits for it.
    fn take(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        flock(&file, libc::LOCK_EX)?;
        Ok(Self(file))
    }

    /// Takes it if nobody holds it.
    fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let file = File::options().create(true).append(true).open(path)?;
        match flock(&file, libc::LOCK_EX | libc::LOCK_NB) {
            Ok(()) => Ok(Some(Self(file))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Locks a file between processes, for as long as it is open.
fn flock(file: &File, operation: libc::c_int) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open; the call touches no memory.
        if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// [`flock`] for what others hold for moments only: a process that is stopped with it must not stop this one.
fn flock_soon(file: &File, operation: libc::c_int) -> io::Result<()> {
    /// Longer than removing any number of files takes, and shorter than a rank may go without getting on.
    const PATIENCE: Duration = Duration::from_secs(20);
    let started = Instant::now();
    loop {
        match flock(file, operation | libc::LOCK_NB) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && started.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_micros(200));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "locked by another process"));
            }
            done => return done,
        }
    }
}

/// One state of a model's files in the cache.
#[derive(Debug, Clone, Serialize)]
pub struct Cached {
    /// The model.
    pub uri: String,
    /// Where the files are.
    pub directory: PathBuf,
    /// How many there are.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Seconds since they were last used.
    pub unused_seconds: u64,
}

/// Everything in the cache, the last used first.
///
/// # Errors
/// The directory cannot be read.
pub fn list(cache: &Path) -> Result<Vec<Cached>, LoadError> {
    let models = cache.join("models");
    let failed = |source| LoadError::Io { path: models.clone(), action: "listing", source };
    let entries = match fs::read_dir(&models) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut all = Vec::new();
    for model in entries {
        let model = model.map_err(failed)?.path();
        let Ok(uri) = fs::read_to_string(model.join("uri")) else { continue };
        for state in fs::read_dir(&model).map_err(failed)? {
            let directory = state.map_err(failed)?.path();
            let unfinished = directory.to_string_lossy().ends_with(UNFINISHED);
            if directory.is_dir() && !unfinished {
                all.push(cached(&uri, directory));
            }
        }
    }
    all.sort_by_key(|cached| cached.unused_seconds);
    Ok(all)
}

fn cached(uri: &str, directory: PathBuf) -> Cached {
    let files = fs::read_dir(&directory).into_iter().flatten().flatten();
    let sizes: Vec<u64> = files.filter_map(|f| Some(f.metadata().ok()?.len())).collect();
    let used = fs::metadata(&directory).and_then(|data| data.modified()).ok();
    let unused = used.and_then(|used| used.elapsed().ok()).unwrap_or_default();
    Cached {
        uri: uri.to_owned(),
        directory,
        files: sizes.len(),
        bytes: sizes.iter().sum(),
        unused_seconds: unused.as_secs(),
    }
}

/// Removes what was not used for `unused`, and what is not complete; returns what was removed. What a process is fetching
/// right now stays.
///
/// # Errors
/// Something cannot be removed.
pub fn prune(cache: &Path, unused: Duration) -> Result<Vec<Cached>, LoadError> {
    let mut removed = Vec::new();
    for cached in list(cache)? {
        let failed = |source| {
            let (path, action) = (cached.directory.clone(), "removing the directory");
            LoadError::Io { path, action, source }
        };
        let Some(model) = cached.directory.parent() else { continue };
        let Some(_lock) = Lock::try_take(&model.join("lock")).map_err(failed)? else { continue };
        remove_unfinished(model);
        if Duration::from_secs(cached.unused_seconds) < unused {
            continue;
        }
        // under a name that nobody looks for, so that nobody finds half of it
        let aside = cached.directory.with_extension(UNFINISHED.trim_start_matches('.'));
        fs::rename(&cached.directory, &aside).map_err(failed)?;
        fs::remove_dir_all(&aside).map_err(failed)?;
        removed.push(cached);
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn file(name: &str, version: &str) -> FileState {
        FileState { name: name.into(), bytes: 2, version: version.into() }
    }

    /// Fills a directory with files that tell their state.
    fn fill(dir: &Path, files: &[FileState]) -> Result<(), LoadError> {
        for file in files {
            fs::write(dir.join(&file.name), format!("v{}", file.version)).unwrap();
        }
        Ok(())
    }

    #[test]
    fn files_are_fetched_once_for_each_state() {
        let cache = tempfile::tempdir().unwrap();
        let fetched = Cell::new(0);
        let [old, new] = ["1", "2"].map(|v| vec![file("config.json", v), file("b", "1")]);
        let get = |files: &[FileState]| {
            let fetch = |dir: &Path| {
                fetched.set(fetched.get() + 1);
                fill(dir, files)
            };
            model_files(cache.path(), "s3://a/b", files, fetch).unwrap()
        };
        let first = get(&old);
        assert_eq!(fs::read(first.join("config.json")).unwrap(), b"v1");
        assert_eq!((get(&old), fetched.get()), (first.clone(), 1));
        let second = get(&new);
        assert_eq!((second == first, fetched.get()), (false, 2));
        // whoever has the old state goes on with it
        assert!(first.join("b").is_file());
        let reversed: Vec<FileState> = new.iter().rev().cloned().collect();
        assert_eq!((get(&reversed), fetched.get()), (second, 2));
        assert_eq!(list(cache.path()).unwrap().len(), 2);
    }

    #[test]
    fn what_fails_halfway_is_not_there() {
        let cache = tempfile::tempdir().unwrap();
        let files = [file("a", "1"), file("b", "1")];
        let fail = |dir: &Path| {
            fill(dir, &files[..1])?;
            Err(LoadError::Runtime("no".into()))
        };
        assert!(model_files(cache.path(), "gs://x", &files, fail).is_err());
        assert!(list(cache.path()).unwrap().is_empty());
        assert_eq!(existing_files(cache.path(), "gs://x", &files), None);
        let done = model_files(cache.path(), "gs://x", &files, |dir| fill(dir, &files)).unwrap();
        assert_eq!(existing_files(cache.path(), "gs://x", &files), Some(done.clone()));
        let left = fs::read_dir(done.parent().unwrap()).unwrap().flatten();
        let left = left.filter(|e| e.file_name().to_string_lossy().ends_with(UNFINISHED));
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn what_was_not_used_for_long_is_removed() {
        let cache = tempfile::tempdir().unwrap();
        let get = |uri, version| {
            let files = [file("a", version)];
            model_files(cache.path(), uri, &files, |dir| fill(dir, &files)).unwrap()
        };
        let (old, new) = (get("s3://old", "1"), get("s3://new", "1"));
        let long_ago = SystemTime::now() - Duration::from_secs(1000);
        File::open(&old).unwrap().set_modified(long_ago).unwrap();
        let removed = prune(cache.path(), Duration::from_secs(500)).unwrap();
        assert_eq!(removed.len(), 1);
        assert_eq!((removed[0].uri.as_str(), removed[0].bytes), ("s3://old", 2));
        assert!(!old.exists() && new.exists());
        assert_eq!(prune(cache.path(), Duration::ZERO).unwrap().len(), 1);
    }

    /// Several at once, as processes are: one fetches, all find it.
    #[test]
    fn those_who_ask_at_the_same_time_wait_for_one() {
        let cache = tempfile::tempdir().unwrap();
        let fetched = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let files = [file("a", "1")];
                    model_files(cache.path(), "az://m", &files, |dir| {
                        fetched.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(50));
                        fill(dir, &files)
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(fetched.into_inner(), 1);
    }
}
