//! A directory for one test's files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs, io, process};

/// A fresh directory under the system's temporary one, removed when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates the directory; no two of them are the same.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn new() -> io::Result<Scratch> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = env::temp_dir().join(format!("longshore-{}-{count}", process::id()));
            match fs::create_dir(&path) {
                // left behind by an earlier process of the same number
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                made => return made.map(|()| Scratch(path)),
            }
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A place in the directory; nothing is created.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // a leftover directory harms nobody, a panic while unwinding would abort the test
        let _ = fs::remove_dir_all(&self.0);
    }
}
