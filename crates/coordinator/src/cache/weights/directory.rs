//! The directory of all that is kept: what is there, who uses it, and what goes first.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use longshore_models::byte_range::ByteRange;

use super::{
    super::{Cached, UNFINISHED, flock, flock_soon},
    stretches::{parse_file_name, stored_bytes},
};

/// In the directory of a file: locked by those who use it, as shared; written when it was used last.
const USED: &str = "used";

/// A weight file in one state, of which something is kept.
#[derive(Debug)]
pub(super) struct KeptState {
    pub(super) dir: PathBuf,
    /// When somebody began to use it.
    pub(super) used: SystemTime,
}

/// Everything under `root`, what was not used for longest first.
pub(super) fn states(root: &Path) -> Vec<KeptState> {
    let dirs = subdirectories(root).into_iter().flat_map(|model| subdirectories(&model));
    let used = |dir: &Path| fs::metadata(dir.join(USED)).and_then(|data| data.modified());
    let state = |dir: PathBuf| {
        let used = used(&dir).unwrap_or(SystemTime::UNIX_EPOCH);
        KeptState { dir, used }
    };
    let mut states: Vec<KeptState> = dirs.map(state).collect();
    states.sort_by_key(|state| state.used);
    states
}

/// What cannot be listed holds nothing that could be used.
fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// A stretch in a state's directory, or what a process has written of one.
#[derive(Debug)]
pub(super) struct StretchFile {
    pub(super) path: PathBuf,
    pub(super) stretch: ByteRange,
    pub(super) complete: bool,
}

/// All stretches of a state.
pub(super) fn entries(dir: &Path) -> Vec<StretchFile> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let parse = |entry: fs::DirEntry| {
        let name = entry.file_name();
        let (stretch, complete) = match name.to_str()?.strip_suffix(UNFINISHED) {
            None => (name.to_str()?, true),
            Some(unfinished) => (unfinished.split_once('.')?.0, false),
        };
        Some(StretchFile { path: entry.path(), stretch: parse_file_name(stretch)?, complete })
    };
    entries.filter_map(parse).collect()
}

/// What is stored under `root`, in bytes of its file system; what is being written counts in full.
pub(super) fn total_bytes(root: &Path) -> u64 {
    let stored = |dir| entries(dir).iter().map(|entry| stored_bytes(entry.stretch)).sum::<u64>();
    states(root).iter().map(|state| stored(&state.dir)).sum()
}

/// A state that is in use for as long as this lives, so that nobody takes its stretches for old ones.
#[derive(Debug)]
pub(super) struct InUse(#[expect(dead_code, reason = "held, not looked at")] File);

/// Makes the directory of a state, unless it is there, and says that it is used. `text` tells people what it is.
///
/// Also returns the bytes that were freed: what a process has left that ended while it wrote.
pub(super) fn hold(dir: &Path, text: &str) -> io::Result<(InUse, u64)> {
    loop {
        fs::create_dir_all(dir)?;
        let used = match File::options().create(true).append(true).open(dir.join(USED)) {
            // removed in between
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        // nobody writes here who does not use it
        let alone = flock(&used, libc::LOCK_EX | libc::LOCK_NB).is_ok();
        let freed = if alone { remove(entries(dir).iter().filter(|e| !e.complete)) } else { 0 };
        flock_soon(&used, libc::LOCK_SH)?;
        let data = used.metadata()?;
        if data.nlink() == 0 {
            continue;
        }
        // for people, and for the order in which things go: neither is worth a failure
        if data.len() == 0 {
            let _ = io::Write::write_all(&mut &used, text.as_bytes());
        }
        let _ = used.set_modified(SystemTime::now());
        return Ok((InUse(used), freed));
    }
}

/// Removes stretches; returns what they took. What cannot be removed stays.
fn remove<'a>(entries: impl Iterator<Item = &'a StretchFile>) -> u64 {
    let removed = entries.filter(|entry| fs::remove_file(&entry.path).is_ok());
    removed.map(|entry| stored_bytes(entry.stretch)).sum()
}

/// Removes stretches of a state until `wanted` bytes are freed, or none is left, and then the directory too; returns how many
/// were freed: none where somebody uses it.
pub(super) fn shrink(dir: &Path, wanted: u64) -> u64 {
    let path = dir.join(USED);
    let used = File::options().append(true).open(&path);
    if let Ok(used) = &used
        && flock(used, libc::LOCK_EX | libc::LOCK_NB).is_err()
    {
        return 0;
    }
    let mut freed = 0;
    for entry in entries(dir) {
        if freed >= wanted {
            return freed;
        }
        freed += remove(std::iter::once(&entry));
    }
    // each only succeeds where nothing is left, which is when it ought to
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(dir);
    let _ = dir.parent().map(fs::remove_dir);
    freed
}

/// What is kept of a state, as that of its model.
pub(super) fn cached(state: &KeptState) -> Cached {
    let text = fs::read_to_string(state.dir.join(USED)).unwrap_or_default();
    Cached {
        uri: text.lines().next().unwrap_or_default().to_owned(),
        directory: state.dir.parent().unwrap_or(&state.dir).to_owned(),
        files: 1,
        bytes: entries(&state.dir).iter().map(|entry| stored_bytes(entry.stretch)).sum(),
        unused_seconds: state.used.elapsed().unwrap_or_default().as_secs(),
    }
}

/// States of one model as one, the last used first.
pub(super) fn by_model(states: impl IntoIterator<Item = Cached>) -> Vec<Cached> {
    let mut models: BTreeMap<PathBuf, Cached> = BTreeMap::new();
    for state in states {
        match models.entry(state.directory.clone()) {
            Entry::Vacant(none) => drop(none.insert(state)),
            Entry::Occupied(model) => {
                let model = model.into_mut();
                model.files += state.files;
                model.bytes += state.bytes;
                model.unused_seconds = model.unused_seconds.min(state.unused_seconds);
            }
        }
    }
    let mut models: Vec<Cached> = models.into_values().collect();
    models.sort_by_key(|model| model.unused_seconds);
    models
}
