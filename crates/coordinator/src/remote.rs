//! A checkpoint in object storage or on the Hugging Face hub: its weights are read by ranges, the rest is copied to the cache
//! directory once.

use std::{sync::Arc, time::Duration};

use longshore_models::{byte_range::ByteRange, header::HEADER_BYTES_MAX};
use longshore_rank::{
    error::RankError,
    storage::{FileIdentity, RemoteFile, RemoteRead},
};
use longshore_store::{
    ChecksumAlgorithm, Location, Object, ObjectInfo, Store, StoreError, StoreOptions, hub_snapshot,
};
use tracing::info;

use crate::{
    cache::{self, FileState},
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

/// Looks at what lies at `location` and copies what is not weights, unless that is in the cache.
///
/// # Errors
/// The storage refuses or does not answer, or the cache directory cannot be written.
pub(crate) fn open(location: &Location) -> Result<Origin, LoadError> {
    let options = StoreOptions { give_up_after: GIVE_UP_AFTER, ..StoreOptions::default() };
    // what the hub's own tools have downloaded is a directory like any other
    if let Some(snapshot) = hub_snapshot(location, &options.settings) {
        info!("{location}: found in the local cache, {}", snapshot.display());
        return Ok(snapshot.into());
    }
    let store = Store::open(location, &options)?;
    let objects = store.list()?;
    let is_weights = |object: &&ObjectInfo| WEIGHTS.iter().any(|end| object.name.ends_with(end));
    // a name with a slash is none of a file beside the others; empty objects stand for directories
    let others = objects.iter().filter(|o| !is_weights(o) && !o.name.contains('/'));
    let others: Vec<FileState> = others.filter(|o| o.bytes > 0).map(state).collect();
    let fetch = |file: &FileState| {
        let found = store.get(&file.name, HEADER_BYTES_MAX)?;
        let (bytes, info) = found.ok_or_else(|| changed(location, &file.name))?;
        // the cache says which state it holds
        let listed = objects.iter().find(|o| o.name == file.name);
        let same =
            listed.is_some_and(|o| o.bytes == info.bytes && o.identity.matches(&info.identity));
        if same { Ok(bytes) } else { Err(changed(location, &file.name)) }
    };
    let metadata = cache::model_files(&cache::directory()?, &location.key(), &others, fetch)?;
    let weights = objects.into_iter().filter(|o| is_weights(&o)).collect();
    Ok(Origin::remote(location.to_string(), metadata, Arc::new(Files { store, weights })))
}

fn state(object: &ObjectInfo) -> FileState {
    FileState {
        name: object.name.clone(),
        bytes: object.bytes,
        version: object.identity.to_string(),
    }
}

fn changed(location: &Location, name: &str) -> LoadError {
    let subject = format!("{location}/{name}");
    StoreError::Replaced { subject, cause: "between its listing and its reading".into() }.into()
}

/// The weights of a checkpoint elsewhere.
#[derive(Debug)]
struct Files {
    store: Store,
    weights: Vec<ObjectInfo>,
}

impl RemoteFiles for Files {
    fn names(&self) -> Result<Vec<String>, LoadError> {
        Ok(self.weights.iter().map(|object| object.name.clone()).collect())
    }

    fn open(&self, name: &str) -> Result<Option<Arc<dyn RemoteFile>>, LoadError> {
        let found = self.weights.iter().find(|object| object.name == name);
        Ok(found.map(|info| Arc::new(Weights(self.store.object(info))) as Arc<dyn RemoteFile>))
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
struct Weights(Object);

impl RemoteFile for Weights {
    fn identity(&self) -> FileIdentity {
        let info = self.0.info();
        FileIdentity::remote(info.bytes, info.identity.to_string())
    }

    fn read(&self, range: ByteRange, target: &mut [u8]) -> Result<RemoteRead, RankError> {
        match self.0.read(range.start..range.end, target) {
            Ok(report) => Ok(RemoteRead {
                requests: report.requests,
                retried_bytes: report.asked_again_bytes,
            }),
            Err(e) => {
                let refused = e.is_refusal();
                Err(RankError::Remote { refused, source: Box::new(e) })
            }
        }
    }
}
