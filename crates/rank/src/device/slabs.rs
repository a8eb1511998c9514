//! Slabs on the device: where bytes lie between their copy and their placement, each with a table of spans.

use std::{slice, sync::Arc};

use longshore_kernels::cuda::{
    driver::{CudaError, Device, DeviceMemory, Event, Stream},
    place::PlaceSpan,
};

use crate::{device::Pinned, error::RankError, lender::Lender};

/// Spans of one launch: more of them take several.
pub(super) const TABLE_SPANS: usize = 1024;

/// The widest access of the placement kernel.
pub(super) const ACCESS_BYTES: u64 = 16;

const TABLE_BYTES: usize = TABLE_SPANS * size_of::<PlaceSpan>();

/// A fixed number of slabs of one size.
#[derive(Debug)]
pub(super) struct Slabs {
    lender: Lender,
    slab_bytes: u64,
    memory: DeviceMemory,
    tables: DeviceMemory,
    /// What is copied to the tables.
    pinned_tables: Pinned,
    events: Vec<Events>,
}

/// What tells how far the use of a slab has come.
#[derive(Debug)]
pub(super) struct Events {
    pub(super) copied: Event,
    pub(super) placed: Event,
}

/// The right to use one slab; dropping it gives the slab back, so it is kept until its last launch has ended.
#[derive(Debug)]
pub(super) struct Slab {
    slabs: Arc<Slabs>,
    number: u32,
}

/// Bytes of a slab for reads of `read_bytes`, which may be shifted by less than an access of the placement kernel.
fn slab_bytes(read_bytes: u64) -> u64 {
    (read_bytes + ACCESS_BYTES).next_multiple_of(512)
}

/// Bytes of device memory that a slab takes, its table included.
pub(super) fn device_bytes(read_bytes: u64) -> u64 {
    slab_bytes(read_bytes) + TABLE_BYTES as u64
}

impl Slabs {
    pub(super) fn new(
        device: &Arc<Device>,
        count: u32,
        read_bytes: u64,
    ) -> Result<Arc<Self>, RankError> {
        let slab_bytes = slab_bytes(read_bytes);
        let tables = count as usize * TABLE_BYTES;
        let events = || Ok(Events { copied: device.event()?, placed: device.event()? });
        Ok(Arc::new(Self {
            lender: Lender::new(count),
            slab_bytes,
            memory: device.allocate("staging", u64::from(count) * slab_bytes)?,
            tables: device.allocate("tables of spans", tables as u64)?,
            pinned_tables: Pinned::new("tables of spans", tables, device)?,
            events: (0..count).map(|_| events()).collect::<Result<_, CudaError>>()?,
        }))
    }

    /// Takes a slab as soon as there is one; `None` once this is closed.
    pub(super) fn take(self: &Arc<Self>) -> Option<Slab> {
        let number = self.lender.take_waiting()?;
        Some(Slab { slabs: Arc::clone(self), number })
    }

    /// Ends the waiting for slabs.
    pub(super) fn close(&self) {
        self.lender.close();
    }
}

impl Slab {
    /// Its address on the device.
    pub(super) fn address(&self) -> u64 {
        self.slabs.memory.address() + u64::from(self.number) * self.slabs.slab_bytes
    }

    /// Its size in bytes.
    pub(super) fn len(&self) -> u64 {
        self.slabs.slab_bytes
    }

    pub(super) fn events(&self) -> &Events {
        &self.slabs.events[self.number as usize]
    }

    /// Enqueues the copy of `spans`, at most [`TABLE_SPANS`], to its table on the device, and returns the table's address.
    ///
    /// # Safety
    /// What was enqueued by an earlier call has ended; the slab is kept until this has.
    pub(super) unsafe fn fill_table(
        &mut self,
        spans: &[PlaceSpan],
        stream: &Stream,
    ) -> Result<u64, CudaError> {
        let offset = self.number as usize * TABLE_BYTES;
        let (start, bytes) = (self.slabs.pinned_tables.at(offset, TABLE_BYTES), size_of_val(spans));
        let address = self.slabs.tables.address() + offset as u64;
        // SAFETY: the table is this slab's alone (`&mut self`), large enough and aligned (tables are whole numbers of spans
        // from a huge page's start on), and no copy from it is under way, says the caller, who also keeps it; a span is
        // plain data, as the kernel reads it.
        unsafe {
            let table = slice::from_raw_parts_mut(start.as_ptr().cast(), TABLE_SPANS);
            table[..spans.len()].copy_from_slice(spans);
            stream.copy_to_device(address, start.as_ptr(), bytes as u64)?;
        }
        Ok(address)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        self.slabs.lender.give_back(self.number);
    }
}
