//! S3, GCS and Azure through `object_store`, whose own retries are off.

mod settings;
mod verdict;

use std::{ops::Range, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt};
use object_store::{
    BackoffConfig, GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, RetryConfig,
    path::Path,
};

use crate::{
    counters::Cells,
    error::StoreError,
    failure::{Failure, FailureKind},
    location::Location,
    object_info::{Identity, ObjectInfo},
    options::StoreOptions,
    source::{Attempt, Body, Source},
    transport::{Seen, watched},
};

use verdict::{body_verdict, published, verdict};

/// Objects under one prefix of one bucket.
#[derive(Debug)]
pub(crate) struct ObjectSource {
    store: Arc<dyn ObjectStore>,
    /// The same with what makes S3 tell checksums, for requests of metadata.
    informed: Arc<dyn ObjectStore>,
    prefix: Path,
    location: Location,
}

impl ObjectSource {
    pub(crate) fn open(
        location: &Location,
        options: &StoreOptions,
        counters: Arc<Cells>,
    ) -> Result<ObjectSource, StoreError> {
        let (store, informed) = settings::connect(location, options, counters)?;
        Self::over(location, store, informed)
    }

    /// Over a store that is there already.
    pub(crate) fn over(
        location: &Location,
        store: Arc<dyn ObjectStore>,
        informed: Arc<dyn ObjectStore>,
    ) -> Result<ObjectSource, StoreError> {
        let prefix = Path::parse(location.prefix()).map_err(|_| StoreError::BadLocation {
            text: location.to_string(),
            reason: "the prefix has characters that no object's name can have",
        })?;
        Ok(ObjectSource { store, informed, prefix, location: location.clone() })
    }

    fn path(&self, name: &str) -> Result<Path, Failure> {
        let full = match self.prefix.as_ref() {
            "" => name.to_owned(),
            prefix => format!("{prefix}/{name}"),
        };
        Path::parse(full).map_err(|error| Failure::new(FailureKind::NotFound, error.to_string()))
    }

    /// The name under the prefix. `None` for the empty object that consoles make to show a folder: its name is the prefix.
    fn name<'a>(&self, path: &'a Path) -> Option<&'a str> {
        let name = match self.prefix.as_ref() {
            "" => path.as_ref(),
            prefix => path.as_ref().strip_prefix(prefix)?.strip_prefix('/')?,
        };
        Some(name).filter(|name| !name.is_empty() && !name.contains('/'))
    }

    fn verdict(&self, error: &object_store::Error, seen: Option<&Seen>) -> Failure {
        verdict(self.location.service(), error, seen)
    }
}

/// Our reader repeats; a request that fails is told at once.
pub(crate) fn no_retries() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: Duration::ZERO }
}

impl Source for ObjectSource {
    fn list(&self) -> Attempt<'_, Vec<ObjectInfo>> {
        async move {
            let prefix = Some(&self.prefix).filter(|prefix| !prefix.as_ref().is_empty());
            let (listed, seen) = watched(self.store.list_with_delimiter(prefix)).await;
            let listed = listed.map_err(|error| self.verdict(&error, seen.as_ref()))?;
            let mut objects: Vec<ObjectInfo> = listed
                .objects
                .iter()
                .filter_map(|meta| Some(info_of(self.name(&meta.location)?, meta, None)))
                .collect();
            objects.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(objects)
        }
        .boxed()
    }

    fn info<'a>(&'a self, name: &'a str) -> Attempt<'a, ObjectInfo> {
        async move {
            let path = self.path(name)?;
            let options = GetOptions { head: true, ..GetOptions::default() };
            let (result, seen) = watched(self.informed.get_opts(&path, options)).await;
            let result = result.map_err(|error| self.verdict(&error, seen.as_ref()))?;
            Ok(info_of(name, &result.meta, seen.as_ref()))
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        name: &'a str,
        known: Option<&'a Identity>,
    ) -> Attempt<'a, (ObjectInfo, Body)> {
        async move {
            let path = self.path(name)?;
            let if_none_match = known.and_then(|known| known.etag.clone());
            let options = GetOptions { if_none_match, ..GetOptions::default() };
            let (result, seen) = watched(self.informed.get_opts(&path, options)).await;
            let result = result.map_err(|error| self.verdict(&error, seen.as_ref()))?;
            Ok((info_of(name, &result.meta, seen.as_ref()), body_of(result)))
        }
        .boxed()
    }

    fn open<'a>(&'a self, object: &'a ObjectInfo, range: Range<u64>) -> Attempt<'a, Body> {
        async move {
            let path = self.path(&object.name)?;
            let if_match = object.identity.strong_etag().map(str::to_owned);
            // With an entity tag there is no need for the version, which takes one right more on S3
            // (s3:GetObjectVersion). It is compared all the same, below.
            let version = if if_match.is_none() { object.identity.version.clone() } else { None };
            let options = GetOptions {
                range: Some(GetRange::Bounded(range.clone())),
                if_match,
                version,
                ..GetOptions::default()
            };
            let (result, seen) = watched(self.store.get_opts(&path, options)).await;
            let result = result.map_err(|error| self.verdict(&error, seen.as_ref()))?;
            check(object, &range, &result)?;
            Ok(body_of(result))
        }
        .boxed()
    }
}

/// Not every server honours `If-Match`, and a range past the end of a shorter object is shortened in silence.
fn check(object: &ObjectInfo, range: &Range<u64>, result: &GetResult) -> Result<(), Failure> {
    let found = info_of(&object.name, &result.meta, None);
    if !object.identity.matches(&found.identity) {
        let text = format!("it had {}, now {}", object.identity, found.identity);
        return Err(Failure::new(FailureKind::Replaced, text));
    }
    if found.bytes != object.bytes {
        let text =
            format!("a length of {} bytes instead of {} was told", found.bytes, object.bytes);
        return Err(Failure::new(FailureKind::WrongRange, text));
    }
    if result.range != *range {
        let text = format!("bytes {}..{} came", result.range.start, result.range.end);
        return Err(Failure::new(FailureKind::WrongRange, text));
    }
    Ok(())
}

fn info_of(name: &str, meta: &ObjectMeta, seen: Option<&Seen>) -> ObjectInfo {
    // the client says 1970 where the server says nothing
    let modified_ms = Some(meta.last_modified.timestamp_millis()).filter(|ms| *ms != 0);
    let identity = Identity {
        etag: meta.e_tag.as_deref().map(quoted),
        version: meta.version.clone(),
        modified_ms,
    };
    ObjectInfo {
        name: name.to_owned(),
        bytes: meta.size,
        identity,
        published: seen.and_then(published),
    }
}

/// Lists of Azure give entity tags without the quotes that headers have them in, and that belong to them (RFC 9110 §8.8.3).
fn quoted(etag: &str) -> String {
    if etag.ends_with('"') { etag.to_owned() } else { format!("\"{etag}\"") }
}

fn body_of(result: GetResult) -> Body {
    result.into_stream().map(|chunk| chunk.map_err(|error| body_verdict(&error))).boxed()
}
