//! What is under way to one rank's device.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
};

use longshore_kernels::cuda::{
    driver::{CudaError, Device, Event, Stream},
    place::Runs,
};
use longshore_models::{byte_range::ByteRange, placement::Span};

use super::slabs::{ACCESS_BYTES, Form, NotPlaced, Slab, Slabs};
use crate::{
    collective::{Incoming, slots::Slot},
    error::RankError,
    params::ParamMemory,
    post_process::device::Finisher,
    protocol::Progress,
};

/// The way to one rank's parameters on its device. Any worker of any rank of this process may hand bytes over; one thread
/// picks up what is done.
#[derive(Debug)]
pub struct Uploads {
    progress: Arc<Progress>,
    copies: Stream,
    places: Stream,
    under_way: Mutex<UnderWay>,
    handed_over: Condvar,
    slabs: Arc<Slabs>,
    finisher: Finisher,
    // dropped last: parameters that nobody else holds are all that is left of a load
    memory: Arc<ParamMemory>,
}

#[derive(Debug, Default)]
struct UnderWay {
    queue: VecDeque<Upload>,
    /// Nothing is taken any more, and nobody waits.
    closed: bool,
}

/// Something that was enqueued, and what has to be kept until the device is done with it.
#[derive(Debug)]
struct Upload {
    end: End,
    origin: Option<Origin>,
    done: Done,
}

/// How the end is known.
#[derive(Debug)]
enum End {
    /// The slab's bytes are placed.
    Placed(Slab),
    /// The device has reached this.
    Reached(Event),
}

/// Where bytes come from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// Pinned memory: spans count from byte `begin` of it.
    Host { staged: Arc<Staged>, begin: u64 },
    /// Memory of the same device.
    Device { bytes: Incoming },
}

/// What the device thread reports once the device has done it.
#[derive(Debug)]
pub(crate) enum Done {
    /// These bytes, which `reader` has read, are in their places; `covers`: with them, all that this rank needs of a range of
    /// a file.
    Placed { reader: u32, spans: Vec<Span>, covers: Option<(u32, ByteRange)> },
    /// This finish has run.
    Finished(u32),
}

/// Bytes in pinned memory, kept until every upload from there is done.
pub(crate) struct Staged {
    slot: Option<Slot>,
    ended: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Staged {
    pub(crate) fn new(slot: Slot) -> Self {
        Self { slot: Some(slot), ended: None }
    }

    /// Calls `ended` once the slot is free again.
    pub(crate) fn on_end(mut self, ended: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.ended = Some(Box::new(ended));
        self
    }

    fn bytes(&self) -> &[u8] {
        self.slot.as_ref().map_or(&[], Slot::bytes)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.slot = None;
        if let Some(ended) = self.ended.take() {
            ended();
        }
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staged").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl Uploads {
    /// Gets streams and slabs ready on `device`, where `memory` is.
    ///
    /// # Errors
    /// The device fails, or its memory is short.
    pub fn new(
        device: &Arc<Device>,
        rank: u32,
        memory: Arc<ParamMemory>,
        progress: Arc<Progress>,
        form: Form,
    ) -> Result<Self, RankError> {
        Ok(Self {
            progress,
            copies: device.stream()?,
            places: device.stream()?,
            under_way: Mutex::default(),
            handed_over: Condvar::new(),
            slabs: Slabs::new(device, form)?,
            finisher: Finisher::new(device, rank, memory.placement())?,
            memory,
        })
    }

    /// Enqueues the placement of `spans`, all of which are of this rank; waits for a slab where all are in use.
    ///
    /// # Errors
    /// The device fails, a conversion is not known, or the load has ended.
    pub(crate) fn place(
        &self,
        spans: Vec<Span>,
        reader: u32,
        origin: Origin,
        covers: Option<(u32, ByteRange)>,
    ) -> Result<(), RankError> {
        let mut slab = self.slabs.take().ok_or(RankError::Ended)?;
        let source = match &origin {
            Origin::Host { staged, begin } => {
                self.copy_hull(&spans, &staged.bytes()[*begin as usize..], &slab)
            }
            Origin::Device { bytes } => Ok(bytes.device_address().unwrap_or_default()),
        };
        let enqueued = source
            .map_err(RankError::from)
            .and_then(|source| self.launch(&spans, source, &mut slab))
            .and_then(|()| Ok(self.places.record(&slab.events().placed)?));
        if let Err(e) = enqueued {
            self.forsake();
            return Err(e);
        }
        let done = Done::Placed { reader, spans, covers };
        match self.hand_over(Upload { end: End::Placed(slab), origin: Some(origin), done })? {
            None => Ok(()),
            Some(_) => Err(RankError::Ended),
        }
    }

    /// Enqueues the copy of all bytes between the first and the last that `spans` want. Returns the address of what lies at
    /// offset 0 of `bytes`, as it were: of a place in the slab, less the first offset.
    fn copy_hull(&self, spans: &[Span], bytes: &[u8], slab: &Slab) -> Result<u64, CudaError> {
        let from = spans.iter().map(|s| s.source_offset).min().unwrap_or(0);
        let to = spans.iter().map(source_end).max().unwrap_or(0);
        let hull = &bytes[from as usize..to as usize];
        // the widest run and its target are apart by whole accesses then
        let widest = spans.iter().max_by_key(|s| s.width);
        let shift = widest.map_or(0, |s| {
            self.memory.span_address(s).wrapping_sub(s.source_offset - from) % ACCESS_BYTES
        });
        assert!(shift + hull.len() as u64 <= slab.len(), "a read is longer than a slab");
        let target = slab.address() + shift;
        // SAFETY: the pinned memory is kept by the upload's origin, the slab by the upload, until both are done with; the
        // slab is nobody else's, and as long as was just checked.
        unsafe { self.copies.copy_to_device(target, hull.as_ptr(), hull.len() as u64) }?;
        self.copies.record(&slab.events().copied)?;
        self.places.wait(&slab.events().copied)?;
        Ok(target.wrapping_sub(from))
    }

    /// Enqueues the kernels that place `spans` from what lies at `source`.
    fn launch(&self, spans: &[Span], source: u64, slab: &mut Slab) -> Result<(), RankError> {
        let runs = spans.iter().map(|span| Runs {
            source_offset: span.source_offset,
            target: self.memory.span_address(span),
            rows: span.rows,
            width: span.width,
            source_stride: span.source_stride,
            target_stride: span.target_stride,
            cast: span.cast,
        });
        // SAFETY: the slab was just taken, so whatever used it has ended; `place` keeps it until the kernels have. The spans
        // lie within their parameters (`span_address` checks it) and within the source, and by RNK-1 nobody else writes
        // there.
        unsafe { slab.place(runs, source, &self.places) }.map_err(|e| match e {
            NotPlaced::Device(e) => RankError::from(e),
            NotPlaced::Unknown(cast) => {
                let span = spans.iter().find(|s| s.cast == cast);
                let param = span.map_or(String::new(), |s| {
                    self.memory.placement().params[s.param as usize].name.clone()
                });
                let what = match cast {
                    Some((from, to)) => format!("no conversion from {from} to {to}"),
                    None => "no such placement".to_owned(),
                };
                RankError::Transform { param, what }
            }
        })
    }

    /// Enqueues a finish; `true` if it has run and nobody is left to tell of it.
    ///
    /// # Safety
    /// As `post_process::run`.
    ///
    /// # Errors
    /// The device fails, or the load has ended.
    pub(crate) unsafe fn finish(&self, number: u32) -> Result<bool, RankError> {
        // SAFETY: passed on from the caller; the parameters are kept by `self`, which waits for the device before it goes.
        let event = match unsafe { self.finisher.enqueue(number, &self.memory) } {
            Ok(event) => event,
            Err(e) => {
                self.forsake();
                return Err(e);
            }
        };
        let done = Done::Finished(number);
        let upload = Upload { end: End::Reached(event), origin: None, done };
        if self.hand_over(upload)?.is_none() {
            return Ok(false);
        }
        self.finisher.check(number, &self.memory)?;
        Ok(true)
    }

    /// Leaves what was enqueued to whoever picks up what is done; where nobody does any more, waits for it and gives it back.
    fn hand_over(&self, upload: Upload) -> Result<Option<Upload>, RankError> {
        let mut under_way = self.lock();
        if under_way.closed {
            drop(under_way);
            // what it uses must not go before the device is done with it
            upload.wait()?;
            return Ok(Some(upload));
        }
        self.progress.in_hand.fetch_add(1, Relaxed);
        under_way.queue.push_back(upload);
        drop(under_way);
        self.handed_over.notify_one();
        Ok(None)
    }

    /// Waits for the oldest of what was handed over and has not been returned yet; `None` once this is closed and empty.
    ///
    /// # Errors
    /// The device fails, or refuses the values that it found.
    pub(crate) fn next_done(&self) -> Result<Option<Done>, RankError> {
        let mut under_way = self.lock();
        let upload = loop {
            if let Some(upload) = under_way.queue.pop_front() {
                break upload;
            }
            if under_way.closed {
                return Ok(None);
            }
            under_way = self.handed_over.wait(under_way).unwrap_or_else(PoisonError::into_inner);
        };
        drop(under_way);
        let waited = upload.wait();
        self.progress.steps.fetch_add(1, Relaxed);
        self.progress.in_hand.fetch_sub(1, Relaxed);
        waited?;
        // what the bytes lay in goes back before anyone can believe the rank to be ready (RNK-3)
        let Upload { end, origin, done } = upload;
        drop((end, origin));
        if let Done::Finished(number) = done {
            self.finisher.check(number, &self.memory)?;
        }
        Ok(Some(done))
    }

    /// Takes nothing more; whoever waits for a slab, or for what was handed over, is told.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.slabs.close();
        self.handed_over.notify_all();
    }

    /// Waits for everything that was enqueued: what failed halfway is known to nobody else.
    fn forsake(&self) {
        // a device that fails is done
        let _ = self.copies.synchronize();
        let _ = self.places.synchronize();
        let _ = self.finisher.synchronize();
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        // consistent after every statement that changes it
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that the device still uses is not given back.
impl Drop for Uploads {
    fn drop(&mut self) {
        self.forsake();
    }
}

impl Upload {
    fn wait(&self) -> Result<(), CudaError> {
        match &self.end {
            End::Placed(slab) => slab.events().placed.synchronize(),
            End::Reached(event) => event.synchronize(),
        }
    }
}

/// One past the last byte that a span wants.
fn source_end(span: &Span) -> u64 {
    match span.rows {
        0 => span.source_offset,
        rows => span.source_offset + (rows - 1) * span.source_stride + span.width,
    }
}
