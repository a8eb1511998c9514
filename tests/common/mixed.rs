//! Checkpoints of which some files are the same, and some are not.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, missing_debug_implementations, reason = "test code")]
#![allow(dead_code, unreachable_pub, reason = "each story uses its part of this file")]

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use longshore::discover::discover;

/// Makes `mixed` of `a`: files that are `another` hold the weights that `b`, a checkpoint of the same model, has of these
/// tensors, in the order of `a`; the rest are links to those of `a`.
pub fn mix(a: &Path, b: &Path, mixed: &Path, another: impl Fn(usize) -> bool) {
    fs::create_dir(mixed).unwrap();
    let number = |name: &str| name.split(['-', '.']).nth(1)?.parse::<usize>().ok();
    for entry in fs::read_dir(a).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        match number(&name).is_some_and(&another) {
            true => drop(fs::copy(entry.path(), mixed.join(name)).unwrap()),
            false => fs::hard_link(entry.path(), mixed.join(name)).unwrap(),
        }
    }
    let (into, from) = (discover(mixed).unwrap(), discover(b).unwrap());
    let mut opened: HashMap<PathBuf, fs::File> = HashMap::new();
    for tensor in &into.checkpoint.tensors {
        let name = into.checkpoint.file_name(tensor);
        if !number(name).is_some_and(&another) {
            continue;
        }
        let other = from.checkpoint.get(&tensor.name).unwrap();
        assert_eq!((other.dtype, &other.shape), (tensor.dtype, &tensor.shape));
        let mut file = |path: PathBuf| {
            let open = |path: &PathBuf| OpenOptions::new().read(true).write(true).open(path);
            let file = opened.entry(path.clone()).or_insert_with(|| open(&path).unwrap());
            file.try_clone().unwrap()
        };
        let mut bytes = vec![0; tensor.file_range.len() as usize];
        let source = file(b.join(from.checkpoint.file_name(other)));
        source.read_exact_at(&mut bytes, other.file_range.start).unwrap();
        file(mixed.join(name)).write_all_at(&bytes, tensor.file_range.start).unwrap();
    }
}

/// Waits until whatever is below `dir` was last changed so long ago that it is known to be what it was when it is loaded from
/// now on.
pub fn settle(dir: &Path) {
    let changed = last_changed(dir) + Duration::from_millis(2100);
    while let Ok(left) = changed.duration_since(SystemTime::now()) {
        thread::sleep(left);
    }
}

fn last_changed(path: &Path) -> SystemTime {
    let data = fs::symlink_metadata(path).unwrap();
    let nanos = data.ctime() as u64 * 1_000_000_000 + data.ctime_nsec() as u64;
    let changed = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos);
    if !data.is_dir() {
        return changed;
    }
    let below = fs::read_dir(path).unwrap().flatten().map(|entry| last_changed(&entry.path()));
    below.max().unwrap_or(changed)
}
