//! Where a rank process is, and what it and the others leave for each other in a folder.

use std::{
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use longshore_nccl::UniqueId;

pub(crate) const STORY: &str = "LONGSHORE_NCCL_STORY";
pub(crate) const RANK: &str = "LONGSHORE_NCCL_RANK";
pub(crate) const SIZE: &str = "LONGSHORE_NCCL_SIZE";
pub(crate) const FOLDER: &str = "LONGSHORE_NCCL_FOLDER";

/// For anything that others have to do first.
const LIMIT: Duration = Duration::from_secs(60);

/// Leaves a note, which is there as a whole or not at all.
pub(crate) fn note(folder: &Path, name: &str, rank: u32, text: &[u8]) {
    let unfinished = folder.join(format!("unfinished-{name}-{rank}"));
    fs::write(&unfinished, text).unwrap();
    fs::rename(unfinished, folder.join(format!("note-{name}-{rank}"))).unwrap();
}

/// How many have left it.
pub(crate) fn notes(folder: &Path, name: &str) -> u32 {
    let prefix = format!("note-{name}-");
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with(&prefix)).count().try_into().unwrap()
}

/// A rank of a story.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) rank: u32,
    pub(crate) size: u32,
    folder: PathBuf,
}

impl Place {
    /// This process's; `None`: it is no rank.
    pub(crate) fn of_this_process() -> Option<(String, Self)> {
        let number = |name| env::var(name).unwrap().parse().unwrap();
        let story = env::var(STORY).ok()?;
        let folder = env::var_os(FOLDER).unwrap().into();
        Some((story, Self { rank: number(RANK), size: number(SIZE), folder }))
    }

    /// Another rank, or the same one of fewer.
    pub(crate) fn with(&self, rank: u32, size: u32) -> Self {
        Self { rank, size, folder: self.folder.clone() }
    }

    pub(crate) fn note(&self, name: &str) {
        note(&self.folder, name, self.rank, &[]);
    }

    /// Waits until so many, of ranks and tests, have left it.
    pub(crate) fn wait_for(&self, name: &str, count: u32) {
        let begun = Instant::now();
        while notes(&self.folder, name) < count {
            assert!(begun.elapsed() < LIMIT, "nobody says {name}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// An identifier for all, from rank 0.
    pub(crate) fn share(&self, name: &str, make: impl FnOnce() -> UniqueId) -> UniqueId {
        if self.rank == 0 {
            note(&self.folder, name, 0, &make().0);
        }
        self.wait_for(name, 1);
        UniqueId(fs::read(self.folder.join(format!("note-{name}-0"))).unwrap().try_into().unwrap())
    }
}
