//! Where a checkpoint's files are: told apart once, the same for everything after.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use longshore_rank::storage::{CheckpointSource, IoChoice, RemoteFile};

use crate::{error::LoadError, verify::Sha256Digest};

/// Where a checkpoint's files are.
#[derive(Debug, Clone)]
pub struct Origin {
    shown: PathBuf,
    metadata: PathBuf,
    remote: Option<Arc<dyn RemoteFiles>>,
}

/// Weight files that are in no directory of this host.
pub trait RemoteFiles: fmt::Debug + Send + Sync {
    /// The names of all files that lie beside the configuration.
    ///
    /// # Errors
    /// The storage does not answer.
    fn names(&self) -> Result<Vec<String>, LoadError>;

    /// The beginning of a weight file in that state, at least its header; `None` where there is no such file.
    ///
    /// # Errors
    /// The copy cannot be read.
    fn header(&self, name: &str) -> Result<Option<Vec<u8>>, LoadError>;

    /// A file in the state that it has now; `None` where there is none of that name.
    ///
    /// # Errors
    /// The storage does not answer.
    fn open(&self, name: &str) -> Result<Option<Arc<dyn RemoteFile>>, LoadError>;

    /// The SHA-256 of a file that the storage itself publishes, if it does.
    ///
    /// # Errors
    /// The storage does not answer.
    fn published(&self, name: &str) -> Result<Option<Sha256Digest>, LoadError>;
}

impl Origin {
    /// Weights elsewhere; `metadata` holds a copy of everything else, `shown` is what people call all of it.
    pub fn remote(
        shown: impl Into<PathBuf>,
        metadata: PathBuf,
        weights: Arc<dyn RemoteFiles>,
    ) -> Self {
        Self { shown: shown.into(), metadata, remote: Some(weights) }
    }

    /// What people call it: a directory or a URI. For messages only.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    /// The directory of everything that is not weights: configuration, index, tokenizer.
    pub fn metadata(&self) -> &Path {
        &self.metadata
    }

    /// Whether the weights are in no directory of this host.
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Whether there is a weight file of that name.
    pub(crate) fn has(&self, name: &str) -> Result<bool, LoadError> {
        match &self.remote {
            None => Ok(self.metadata.join(name).is_file()),
            Some(remote) => Ok(remote.names()?.iter().any(|n| n == name)),
        }
    }

    /// The names of all files.
    pub(crate) fn names(&self) -> Result<Vec<String>, LoadError> {
        let Some(remote) = &self.remote else {
            let failed = |source| {
                let (path, action) = (self.shown.clone(), "listing");
                LoadError::Io { path, action, source }
            };
            let entries = std::fs::read_dir(&self.metadata).map_err(failed)?;
            let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
            let names: io::Result<Vec<Option<String>>> = names.collect();
            return Ok(names.map_err(failed)?.into_iter().flatten().collect());
        };
        remote.names()
    }

    /// The SHA-256 of a weight file that where it is publishes.
    pub(crate) fn published(&self, name: &str) -> Result<Option<Sha256Digest>, LoadError> {
        self.remote.as_ref().map_or(Ok(None), |remote| remote.published(name))
    }

    /// The beginning of a weight file that is elsewhere, at least its header, where that is known without asking for it.
    pub(crate) fn header(&self, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
        self.remote.as_ref().map_or(Ok(None), |remote| remote.header(name))
    }

    /// Opens a weight file.
    pub(crate) fn open(
        &self,
        name: &str,
        io: IoChoice,
        action: &'static str,
    ) -> Result<CheckpointSource, LoadError> {
        let failed = |source| LoadError::Io { path: self.shown.join(name), action, source };
        match &self.remote {
            None => CheckpointSource::open(&self.metadata, name, io).map_err(failed),
            Some(remote) => match remote.open(name)? {
                Some(file) => Ok(CheckpointSource::remote(name, file)),
                None => Err(failed(io::ErrorKind::NotFound.into())),
            },
        }
    }
}

impl From<&Path> for Origin {
    fn from(dir: &Path) -> Self {
        Self { shown: dir.into(), metadata: dir.into(), remote: None }
    }
}

impl From<PathBuf> for Origin {
    fn from(dir: PathBuf) -> Self {
        Self { shown: dir.clone(), metadata: dir, remote: None }
    }
}

impl From<&PathBuf> for Origin {
    fn from(dir: &PathBuf) -> Self {
        dir.as_path().into()
    }
}
