//! The memory of one batch, and the tensors in it that are handed out.

use std::{
    fmt,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use longshore_models::{Dtype, byte_range::ByteRange};

use super::{
    batch::{Batch, pages},
    worker::Shared,
};
use crate::{region::Region, staging::POISON};

/// The memory of one batch. Its drop, when nobody holds a tensor of the batch any more, gives the memory back.
#[derive(Debug)]
pub(super) struct Slab {
    pub(super) shared: Arc<Shared>,
    /// Index into the stream's batches.
    pub(super) batch: usize,
    pub(super) region: Arc<Region>,
    /// Parts that have not been read yet; tensors are handed out at zero.
    pub(super) unread: AtomicUsize,
    /// Which tensors nobody will look at again.
    returned: Vec<AtomicBool>,
    /// What the budget counts for this slab: the region, less what was given back of it early.
    pub(super) charged: AtomicU64,
}

impl Slab {
    pub(super) fn new(shared: Arc<Shared>, batch: usize, region: Arc<Region>) -> Self {
        let this = &shared.batches[batch];
        let parts = this.parts(shared.limits.read_bytes).count();
        Self {
            unread: AtomicUsize::new(parts),
            returned: this.tensors.iter().map(|_| AtomicBool::new(false)).collect(),
            charged: AtomicU64::new(region.len() as u64),
            shared,
            batch,
            region,
        }
    }

    pub(super) fn batch(&self) -> &Batch {
        &self.shared.batches[self.batch]
    }

    /// The bytes of tensor `number` of the batch, as offsets into the region.
    fn place(&self, number: usize) -> ByteRange {
        let (batch, base) = (self.batch(), self.batch().base());
        let range = self.shared.checkpoint.tensors[batch.tensors[number] as usize].file_range;
        ByteRange::new(range.start - base, range.end - base)
    }

    /// Gives the pages back that no tensor still needs, while others of the batch are held; returns their bytes. The
    /// caller tells the budget.
    ///
    /// Only when memory is short: the pages would have to be zeroed again for the next batch.
    pub(super) fn trim(&self) -> u64 {
        // Acquire: whoever sees the last part read sees no write of a worker afterwards
        if self.unread.load(Ordering::Acquire) > 0 {
            return 0;
        }
        let (mut at, mut needed) = (0, 0);
        for number in 0..self.returned.len() {
            // Acquire: what the holder of a returned tensor did to its bytes came before
            if !self.returned[number].load(Ordering::Acquire) {
                let whole = pages(self.place(number));
                self.discard(at, whole.start);
                needed += whole.end.saturating_sub(whole.start.max(at));
                at = whole.end.max(at);
            }
        }
        self.discard(at, self.region.len() as u64);
        self.charged.swap(needed, Ordering::Relaxed) - needed
    }

    fn discard(&self, start: u64, end: u64) {
        if start < end {
            // SAFETY: the workers are done with this slab, tensors that were returned are not looked at again, and the
            // caller leaves out the pages of all others.
            unsafe { self.region.discard(start as usize, (end - start) as usize) };
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        self.shared.take_back(self);
    }
}

/// One complete tensor of a checkpoint, in staging memory. Dropping it gives its part of that memory back.
///
/// It owns its hold on the memory: it may be sent to another thread, and outlive the stream that it came from.
pub struct Tensor {
    slab: Arc<Slab>,
    /// Its place among the batch's tensors.
    number: usize,
}

impl Tensor {
    pub(super) fn new(slab: Arc<Slab>, number: usize) -> Self {
        Self { slab, number }
    }

    fn stored(&self) -> &longshore_models::checkpoint::Tensor {
        &self.slab.shared.checkpoint.tensors[self.slab.batch().tensors[self.number] as usize]
    }

    /// Its name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.stored().name
    }

    /// Its element type.
    pub fn dtype(&self) -> Dtype {
        self.stored().dtype
    }

    /// Its shape; empty for a scalar.
    pub fn shape(&self) -> &[u64] {
        &self.stored().shape
    }

    /// Name of the file that it was read from, within the checkpoint.
    pub fn file(&self) -> &str {
        self.slab.shared.checkpoint.file_name(self.stored())
    }

    /// Its bytes, little-endian and in row-major order as in the file. Their address is aligned as their offset in the
    /// file is, up to 4096.
    pub fn bytes(&self) -> &[u8] {
        let (start, bytes) = self.memory();
        // SAFETY: the slab keeps the region alive; these bytes of it were filled before the tensor was made, and are
        // written again only after it is dropped.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }
    }

    /// Where its bytes lie: within the slab's region, and nobody else's.
    fn memory(&self) -> (NonNull<u8>, usize) {
        let place = self.slab.place(self.number);
        match place.is_empty() {
            // a batch without bytes has a region without any, wherever in a page of the file it lies
            true => (NonNull::dangling(), 0),
            false => {
                let (start, bytes) = (place.start as usize, place.len() as usize);
                (self.slab.region.at(start, bytes), bytes)
            }
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut tensor = f.debug_struct("Tensor");
        tensor.field("name", &self.name()).field("dtype", &self.dtype());
        tensor.field("shape", &self.shape()).finish_non_exhaustive()
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            let (start, bytes) = self.memory();
            // SAFETY: as in `bytes`; `&mut self` proves that no view is left, and no other tensor has these bytes.
            unsafe { start.as_ptr().write_bytes(POISON, bytes) };
        }
        self.slab.returned[self.number].store(true, Ordering::Release);
    }
}
