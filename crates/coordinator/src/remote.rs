//! A checkpoint in object storage or on the Hugging Face hub: its weights are read by ranges, the rest is copied to the cache
//! directory once.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use longshore_models::{byte_range::ByteRange, header::HEADER_BYTES_MAX};
use longshore_rank::{
    error::RankError,
    storage::{FileIdentity, RemoteFile, RemoteRead},
};
use longshore_store::{
    ChecksumAlgorithm, Location, Object, ObjectInfo, Store, StoreError, StoreOptions, hub_snapshot,
};
use tracing::{info, warn};

use crate::{
    cache::{
        self, FileState,
        weights::{KeepWeights, WeightCache},
    },
    error::LoadError,
    origin::{Origin, RemoteFiles},
    verify::Sha256Digest,
};

/// What weights are stored in: whatever else lies beside them is copied to the cache.
const WEIGHTS: [&str; 12] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".npz",
    ".tflite",
    ".ot",
];

/// How long one piece of a read may take with all its retries: less than a rank may go without getting on.
const GIVE_UP_AFTER: Duration = Duration::from_secs(45);

/// Looks at what lies at `location` and copies what is not weights, unless that is in the cache; with `download` the weights too,
/// which are then read from there, now and whenever the cache holds them in the state that they are in. What will be read of weights
/// elsewhere is kept where `keep` says.
///
/// # Errors
/// The storage refuses or does not answer, or a cache directory cannot be written.
pub(crate) fn open(
    location: &Location,
    download: bool,
    keep: Option<&KeepWeights>,
) -> Result<Origin, LoadError> {
    let options = StoreOptions { give_up_after: GIVE_UP_AFTER, ..StoreOptions::default() };
    // what the hub's own tools have downloaded is a directory like any other
    if let Some(snapshot) = hub_snapshot(location, &options.settings) {
        info!("{location}: found in the local cache, {}", snapshot.display());
        return Ok(snapshot.into());
    }
    let store = Store::open(location, &options)?;
    // a name with a slash is none of a file beside the others; empty objects stand for directories
    let mut objects = store.list()?;
    objects.retain(|object| object.bytes > 0 && !object.name.contains('/'));
    let (cache, key) = (cache::directory()?, location.key());
    let of_checkpoint =
        |object: &ObjectInfo| !is_weights(object) || object.name.ends_with(WEIGHTS[0]);
    let wanted: Vec<FileState> = objects.iter().filter(|o| of_checkpoint(o)).map(state).collect();
    if let Some(dir) = cache::existing_files(&cache, &key, &wanted) {
        info!("{location}: downloaded before, {}", dir.display());
        return Ok(dir.into());
    }
    let fetch = |files: &[FileState], dir: &Path| {
        let found = |file: &FileState| objects.iter().find(|object| object.name == file.name);
        let wanted: Vec<ObjectInfo> = files.iter().filter_map(found).cloned().collect();
        in_parallel(&wanted, |object| copy(&store, object, dir))
    };
    if download {
        let dir = cache::model_files(&cache, &key, &wanted, |dir| fetch(&wanted, dir))?;
        return Ok(dir.into());
    }
    let others: Vec<FileState> = objects.iter().filter(|o| !is_weights(o)).map(state).collect();
    let metadata = cache::model_files(&cache, &key, &others, |dir| fetch(&others, dir))?;
    objects.retain(|object| object.name.ends_with(WEIGHTS[0]));
    let states: Vec<FileState> = objects.iter().map(state).collect();
    let headers = cache::model_files(&cache, &key, &states, |dir| {
        in_parallel(&objects, |object| copy_header(&store, object, dir))
    })?;
    let kept = keep.map(|keep| WeightCache::open(keep, &key)).transpose()?;
    if let Some(loose) = objects.iter().find(|o| kept.is_some() && !o.identity.is_of_one_content())
    {
        let (name, identity) = (&loose.name, &loose.identity);
        warn!(
            "{location}/{name}: {identity} may be that of another content too, nothing of such files is kept"
        );
    }
    let weights = Files { store, key, weights: objects, headers, kept };
    Ok(Origin::remote(location.to_string(), metadata, Arc::new(weights)))
}

fn is_weights(object: &ObjectInfo) -> bool {
    WEIGHTS.iter().any(|end| object.name.ends_with(end))
}

/// Bytes that are in memory at a time while an object is copied; a store asks for them in several requests at once.
const COPY_BYTES: u64 = 16 << 20;

/// Copies an object, in the state that was listed, to a directory.
fn copy(store: &Store, object: &ObjectInfo, dir: &Path) -> Result<(), LoadError> {
    let path = dir.join(&object.name);
    let failed = |source| LoadError::Io { path: path.clone(), action: "writing", source };
    let mut file = File::create(&path).map_err(failed)?;
    let (reader, mut at) = (store.object(object), 0);
    let mut chunk = vec![0; object.bytes.min(COPY_BYTES) as usize];
    while at < object.bytes {
        let end = (at + COPY_BYTES).min(object.bytes);
        let chunk = &mut chunk[..(end - at) as usize];
        reader.read(at..end, chunk)?;
        file.write_all(chunk).map_err(failed)?;
        at = end;
    }
    Ok(())
}

fn state(object: &ObjectInfo) -> FileState {
    FileState {
        name: object.name.clone(),
        bytes: object.bytes,
        version: object.identity.to_string(),
    }
}

/// Copies the header of a weight file; whether it is one is seen by whoever reads it.
fn copy_header(store: &Store, object: &ObjectInfo, dir: &Path) -> Result<(), LoadError> {
    let reader = store.object(object);
    let mut start = vec![0; object.bytes.min(header_guess(object.bytes)) as usize];
    reader.read(0..start.len() as u64, &mut start)?;
    let told = start.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    let end = told.saturating_add(8).min(object.bytes);
    if told <= HEADER_BYTES_MAX && end > start.len() as u64 {
        let there = start.len();
        start.resize(end as usize, 0);
        reader.read(there as u64..end, &mut start[there..])?;
    } else {
        start.truncate(end.max(8) as usize);
    }
    let path = dir.join(&object.name);
    std::fs::write(&path, start).map_err(|source| LoadError::Io { path, action: "writing", source })
}

/// What is read at once of a file whose header is as long as nobody knows yet: more than most have, as each request takes a while,
/// but no more than a 128th of the file, as what is not header will be read once more.
fn header_guess(bytes: u64) -> u64 {
    (bytes / 128).clamp(8, 512 << 10)
}

/// Calls `each` for all of `objects`, several at a time; the first error that is met ends it.
fn in_parallel(
    objects: &[ObjectInfo],
    each: impl Fn(&ObjectInfo) -> Result<(), LoadError> + Sync,
) -> Result<(), LoadError> {
    /// Enough to hide the time that a request takes.
    const AT_A_TIME: usize = 16;
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(objects.len()) {
            scope.spawn(|| {
                while let Some(object) = objects.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = each(object) {
                        next.store(objects.len(), Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// The weights of a checkpoint elsewhere.
#[derive(Debug)]
struct Files {
    store: Store,
    /// What tells the model from others.
    key: String,
    weights: Vec<ObjectInfo>,
    /// A directory with the header of each.
    headers: PathBuf,
    kept: Option<Arc<WeightCache>>,
}

impl RemoteFiles for Files {
    fn names(&self) -> Result<Vec<String>, LoadError> {
        Ok(self.weights.iter().map(|object| object.name.clone()).collect())
    }

    fn header(&self, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
        let path = self.headers.join(name);
        match std::fs::read(&path) {
            Ok(header) => Ok(Some(header)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LoadError::Io { path, action: "reading", source }),
        }
    }

    fn open(&self, name: &str) -> Result<Option<Arc<dyn RemoteFile>>, LoadError> {
        let found = self.weights.iter().find(|object| object.name == name);
        Ok(found.map(|info| {
            let object = self.store.object(info);
            let file: Arc<dyn RemoteFile> = Arc::new(Weights { key: self.key.clone(), object });
            match &self.kept {
                Some(kept) if info.identity.is_of_one_content() => kept.file(name, file),
                _ => file,
            }
        }))
    }

    fn published(&self, name: &str) -> Result<Option<Sha256Digest>, LoadError> {
        let sha256 = |object: &ObjectInfo| {
            let sum = object.published.as_ref();
            let sum = sum.filter(|sum| sum.algorithm == ChecksumAlgorithm::Sha256)?;
            sum.value.as_slice().try_into().ok()
        };
        let listed = self.weights.iter().find(|object| object.name == name);
        if let Some(digest) = listed.and_then(sha256) {
            return Ok(Some(digest));
        }
        // lists of object stores tell no digests
        Ok(self.store.info(name)?.as_ref().and_then(sha256))
    }
}

/// One weight file elsewhere.
#[derive(Debug)]
struct Weights {
    /// What tells its model from others.
    key: String,
    object: Object,
}

impl RemoteFile for Weights {
    fn identity(&self) -> FileIdentity {
        let info = self.object.info();
        let identity = FileIdentity::remote(info.bytes, info.identity.to_string());
        match &info.published {
            Some(sum) if sum.algorithm == ChecksumAlgorithm::Sha256 => {
                identity.named(sum.to_string())
            }
            // an entity tag tells states of one object apart, not one object from another
            _ if info.identity.is_of_one_content() => {
                identity.named(format!("{}/{} {}", self.key, info.name, info.identity))
            }
            _ => identity,
        }
    }

    fn read(&self, range: ByteRange, targets: &mut [&mut [u8]]) -> Result<RemoteRead, RankError> {
        match self.object.read_scattered(range.start..range.end, targets) {
            Ok(report) => Ok(RemoteRead {
                requests: report.requests,
                retried_bytes: report.asked_again_bytes,
                cached_bytes: 0,
            }),
            Err(e) => {
                let refused = e.is_refusal();
                // what others have read is of a state that is no more
                let lasting =
                    matches!(e, StoreError::Replaced { .. } | StoreError::OutOfRange { .. });
                Err(RankError::Remote { refused, lasting, source: Box::new(e) })
            }
        }
    }
}
