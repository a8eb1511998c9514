//! The calls: they block, and many threads may make them at once.

use std::{fmt, ops::Range, sync::Arc};

use crate::{
    counters::{Cells, Counters},
    error::{Operation, StoreError},
    failure::FailureKind,
    location::{Location, Service},
    object_info::{Identity, ObjectInfo},
    options::StoreOptions,
    reader::{Got, ReadReport, Reader},
    runtime::block_on,
    source::{Source, hub::HubSource, object::ObjectSource},
};

/// An open location. Clones are the same store: they share connections, limits and counters.
///
/// All calls block. They may be made from many threads at once; a thread that drives an asynchronous runtime may make them
/// too, at the price of a thread per call.
#[derive(Clone)]
pub struct Store {
    reader: Arc<Reader>,
}

/// What came of asking whether an object changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revalidated {
    /// It is the known one.
    Unchanged,
    /// It is another one: all of it.
    Changed(Vec<u8>, ObjectInfo),
    /// There is none any more.
    Gone,
}

impl Store {
    /// Opens a location. Object stores are not asked anything yet; on the hub, the revision is resolved to a commit, which
    /// everything that is read afterwards belongs to.
    ///
    /// # Errors
    ///
    /// A refusal for settings that make no sense, and on the hub for a model or revision that is not there or needs a token;
    /// [`StoreError::GaveUp`] if the hub does not answer.
    pub fn open(location: &Location, options: &StoreOptions) -> Result<Store, StoreError> {
        options.check(location)?;
        let counters = Arc::new(Cells::default());
        let source: Box<dyn Source> = match location.service() {
            Service::Hub => Box::new(HubSource::new(location, options, Arc::clone(&counters))?),
            _ => Box::new(ObjectSource::open(location, options, Arc::clone(&counters))?),
        };
        let store =
            Store { reader: Arc::new(Reader::new(location.clone(), source, options, counters)) };
        if location.service() == Service::Hub {
            let reader = &store.reader;
            block_on(async {
                Ok(reader.patiently(&Operation::Revision, || reader.source.list()).await?)
            })?;
        }
        Ok(store)
    }

    /// The objects right under the location, in order of their names.
    ///
    /// # Errors
    ///
    /// Where listing is denied, the bucket is not there, or no answer comes in time.
    pub fn list(&self) -> Result<Vec<ObjectInfo>, StoreError> {
        let reader = &self.reader;
        block_on(async { Ok(reader.patiently(&Operation::List, || reader.source.list()).await?) })
    }

    /// What is known of one object, checksums included; `None` if it is not there.
    ///
    /// # Errors
    ///
    /// Where it is denied, the bucket is not there, or no answer comes in time.
    pub fn info(&self, name: &str) -> Result<Option<ObjectInfo>, StoreError> {
        let reader = &self.reader;
        block_on(async {
            match reader.patiently(&Operation::Info(name), || reader.source.info(name)).await {
                Ok(info) => Ok(Some(info)),
                Err(failed) if failed.kind == FailureKind::NotFound => Ok(None),
                Err(failed) => Err(failed.error),
            }
        })
    }

    /// A whole object; `None` if it is not there.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooLarge`] for more than `max_bytes`; as for [`Object::read`] otherwise.
    pub fn get(
        &self,
        name: &str,
        max_bytes: u64,
    ) -> Result<Option<(Vec<u8>, ObjectInfo)>, StoreError> {
        match block_on(self.reader.get(name, None, max_bytes))? {
            Got::Content(bytes, info) => Ok(Some((bytes, info))),
            Got::Nothing | Got::Same => Ok(None),
        }
    }

    /// A whole object, unless it still is the one that is known.
    ///
    /// # Errors
    ///
    /// As for [`get`](Self::get).
    pub fn get_if_changed(
        &self,
        name: &str,
        known: &Identity,
        max_bytes: u64,
    ) -> Result<Revalidated, StoreError> {
        Ok(match block_on(self.reader.get(name, Some(known), max_bytes))? {
            Got::Content(bytes, info) => Revalidated::Changed(bytes, info),
            Got::Same => Revalidated::Unchanged,
            Got::Nothing => Revalidated::Gone,
        })
    }

    /// An object to read ranges of. Nothing is asked: that it still is the one that `info` tells of is checked with every
    /// range.
    pub fn object(&self, info: &ObjectInfo) -> Object {
        Object { reader: Arc::clone(&self.reader), info: info.clone() }
    }

    /// What was asked so far, and what came.
    pub fn counters(&self) -> Counters {
        self.reader.counters.snapshot()
    }

    /// What was opened.
    pub fn location(&self) -> &Location {
        &self.reader.location
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.reader.location).finish()
    }
}

/// One object, to read ranges of.
#[derive(Clone)]
pub struct Object {
    reader: Arc<Reader>,
    info: ObjectInfo,
}

impl Object {
    /// Fills `target` with the bytes of `range`, which is as long. Many threads may read at once; long ranges are asked for
    /// in several requests at once, as far as flow control allows.
    ///
    /// # Errors
    ///
    /// [`StoreError::Replaced`] if the object is no longer the one that was looked at, [`StoreError::GaveUp`] if a part
    /// could not be had in time, [`StoreError::OutOfRange`] for a range that is not within the object, and what the storage
    /// refuses. The contents of `target` are unspecified then.
    ///
    /// # Panics
    ///
    /// If `target` is not as long as the range.
    pub fn read(&self, range: Range<u64>, target: &mut [u8]) -> Result<ReadReport, StoreError> {
        self.read_scattered(range, &mut [target])
    }

    /// The same into several `targets`, one after the other, which together are as long as the range. What comes is copied to its
    /// place once, wherever that is.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    ///
    /// # Panics
    ///
    /// If the targets together are not as long as the range.
    pub fn read_scattered(
        &self,
        range: Range<u64>,
        targets: &mut [&mut [u8]],
    ) -> Result<ReadReport, StoreError> {
        let length = range.end.saturating_sub(range.start);
        let room: u64 = targets.iter().map(|target| target.len() as u64).sum();
        assert_eq!(length, room, "the targets are as long as the range");
        if range.end > self.info.bytes || range.start > range.end {
            let subject = Operation::Read(&self.info.name, range).subject(&self.reader.location);
            return Err(StoreError::OutOfRange { subject, bytes: self.info.bytes });
        }
        if range.is_empty() {
            return Ok(ReadReport::default());
        }
        block_on(self.reader.read(&self.info, range, targets))
    }

    /// What it was when it was looked at.
    pub fn info(&self) -> &ObjectInfo {
        &self.info
    }

    /// Asks whether it is another one now, or gone.
    ///
    /// # Errors
    ///
    /// Where no answer is to be had.
    pub fn has_changed(&self) -> Result<bool, StoreError> {
        let reader = &self.reader;
        let name = &self.info.name;
        block_on(async {
            match reader.patiently(&Operation::Info(name), || reader.source.check(&self.info)).await
            {
                Ok(now) => {
                    Ok(now.bytes != self.info.bytes || !now.identity.matches(&self.info.identity))
                }
                Err(failed) if failed.kind == FailureKind::NotFound => Ok(true),
                Err(failed) => Err(failed.error),
            }
        })
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("location", &self.reader.location)
            .field("info", &self.info)
            .finish()
    }
}
