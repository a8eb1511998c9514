//! Slabs on the device: where bytes lie between their copy and their placement, each with a table of spans.

use std::{slice, sync::Arc};

use longshore_kernels::cuda::{
    driver::{CudaError, Device, DeviceMemory, Event, Stream},
    launch,
    place::{PlaceSpan, Runs, SpanTable},
};
use longshore_models::Dtype;

use crate::{device::Pinned, error::RankError, lender::Lender};

/// Spans of one launch, where there is memory for the table: more of them take several.
pub(crate) const TABLE_SPANS_MAX: u32 = 1024;

/// The widest access of the placement kernel.
pub(crate) const ACCESS_BYTES: u64 = 16;

/// A fixed number of slabs of one size.
#[derive(Debug)]
pub(crate) struct Slabs {
    lender: Lender,
    slab_bytes: u64,
    table_spans: u32,
    memory: DeviceMemory,
    tables: DeviceMemory,
    /// What is copied to the tables.
    pinned_tables: Pinned,
    events: Vec<Events>,
}

/// What tells how far the use of a slab has come.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) copied: Event,
    pub(crate) placed: Event,
}

/// Why runs were not placed.
#[derive(Debug)]
pub(crate) enum NotPlaced {
    /// No kernel knows this conversion.
    Unknown(Option<(Dtype, Dtype)>),
    /// The device says why.
    Device(CudaError),
}

impl From<CudaError> for NotPlaced {
    fn from(e: CudaError) -> Self {
        NotPlaced::Device(e)
    }
}

/// The right to use one slab; dropping it gives the slab back, so it is kept until its last launch has ended.
#[derive(Debug)]
pub(crate) struct Slab {
    slabs: Arc<Slabs>,
    number: u32,
}

/// How many slabs there are, and how large they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Slabs for bytes that are to be placed.
    pub slabs: u32,
    /// Bytes that each has room for: those of the longest read.
    pub slab_bytes: u64,
    /// Spans that the table of each has room for.
    pub table_spans: u32,
}

impl Form {
    /// As many slabs as `limit` bytes of device memory allow, `slabs` at most, one at least; where that is one, its table
    /// takes what is left.
    pub fn within(limit: u64, slabs: u32, slab_bytes: u64) -> Self {
        let whole = Self { slabs: 1, slab_bytes, table_spans: TABLE_SPANS_MAX };
        match limit / whole.device_bytes() {
            0 => {
                let left = limit.saturating_sub(padded(slab_bytes)) / table_bytes(1);
                Self { table_spans: left.max(1) as u32, ..whole }
            }
            fit => Self { slabs: fit.min(slabs.into()) as u32, ..whole },
        }
    }

    /// Bytes of device memory that all slabs take, their tables included.
    pub fn device_bytes(&self) -> u64 {
        u64::from(self.slabs) * (padded(self.slab_bytes) + table_bytes(self.table_spans))
    }
}

/// Bytes of a slab for reads of `read_bytes`, which may be shifted by less than an access of the placement kernel.
fn padded(read_bytes: u64) -> u64 {
    (read_bytes + ACCESS_BYTES).next_multiple_of(512)
}

fn table_bytes(spans: u32) -> u64 {
    u64::from(spans) * size_of::<PlaceSpan>() as u64
}

impl Slabs {
    pub(crate) fn new(device: &Arc<Device>, form: Form) -> Result<Arc<Self>, RankError> {
        let Form { slabs: count, slab_bytes, table_spans } = form;
        let slab_bytes = padded(slab_bytes);
        let tables = u64::from(count) * table_bytes(table_spans);
        let events = || Ok(Events { copied: device.event()?, placed: device.event()? });
        Ok(Arc::new(Self {
            lender: Lender::new(count),
            slab_bytes,
            table_spans,
            memory: device.allocate("staging", u64::from(count) * slab_bytes)?,
            tables: device.allocate("tables of spans", tables)?,
            pinned_tables: Pinned::new("tables of spans", tables as usize, device)?,
            events: (0..count).map(|_| events()).collect::<Result<_, CudaError>>()?,
        }))
    }

    /// Takes a slab as soon as there is one; `None` once this is closed.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Slab> {
        let number = self.lender.take_waiting()?;
        Some(Slab { slabs: Arc::clone(self), number })
    }

    /// Takes a slab; `None` while all are in use.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Slab> {
        let number = self.lender.take()?;
        Some(Slab { slabs: Arc::clone(self), number })
    }

    /// How many are in use.
    pub(crate) fn in_use(&self) -> u32 {
        self.lender.lent()
    }

    /// Ends the waiting for slabs.
    pub(crate) fn close(&self) {
        self.lender.close();
    }
}

impl Slab {
    /// Its address on the device.
    pub(crate) fn address(&self) -> u64 {
        self.slabs.memory.address() + u64::from(self.number) * self.slabs.slab_bytes
    }

    /// Its size in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.slabs.slab_bytes
    }

    /// Which one it is.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn events(&self) -> &Events {
        &self.slabs.events[self.number as usize]
    }

    /// Enqueues kernels that place `runs`, whose offsets count from `source`, an address of the device's.
    ///
    /// # Safety
    /// What an earlier call enqueued has ended; until this has, the slab is kept, source and targets are memory of the
    /// device, and nobody else writes to them or reads the targets.
    ///
    /// # Errors
    /// A conversion that no kernel knows, or what the device says; some of the runs may have been enqueued then.
    pub(crate) unsafe fn place(
        &mut self,
        runs: impl IntoIterator<Item = Runs>,
        source: u64,
        stream: &Stream,
    ) -> Result<(), NotPlaced> {
        // kernels count from a multiple of 16
        let shift = source % ACCESS_BYTES;
        let (mut runs, mut table) = (runs.into_iter().peekable(), SpanTable::default());
        while runs.peek().is_some() {
            if !table.spans().is_empty() {
                // the table is in use until then; reads of so many spans are rare
                stream.synchronize()?;
                table.clear();
            }
            while table.spans().len() < self.slabs.table_spans as usize
                && let Some(runs) = runs.next()
            {
                if !table.push(Runs { source_offset: shift + runs.source_offset, ..runs }) {
                    return Err(NotPlaced::Unknown(runs.cast));
                }
            }
            // SAFETY: the table is free: the caller says so of the first time, and later the stream was waited for. The rest
            // is passed on from the caller.
            unsafe {
                let address = self.fill_table(table.spans(), stream)?;
                launch::place(stream, source - shift, address, &table)?;
            }
        }
        Ok(())
    }

    /// Enqueues the copy of `spans`, no more than a table has room for, to its table on the device, and returns the table's address.
    ///
    /// # Safety
    /// What was enqueued by an earlier call has ended; the slab is kept until this has.
    unsafe fn fill_table(
        &mut self,
        spans: &[PlaceSpan],
        stream: &Stream,
    ) -> Result<u64, CudaError> {
        let (room, bytes) = (table_bytes(self.slabs.table_spans), size_of_val(spans));
        let offset = u64::from(self.number) * room;
        let start = self.slabs.pinned_tables.at(offset as usize, room as usize);
        let address = self.slabs.tables.address() + offset;
        // SAFETY: the table is this slab's alone (`&mut self`), large enough and aligned (tables are whole numbers of spans
        // from a huge page's start on), and no copy from it is under way, says the caller, who also keeps it; a span is
        // plain data, as the kernel reads it.
        unsafe {
            let spans_max = self.slabs.table_spans as usize;
            let table = slice::from_raw_parts_mut(start.as_ptr().cast(), spans_max);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever a limit allows of reads, what is set aside for them on the device stays within it.
    #[test]
    fn slabs_and_their_tables_stay_within_the_limit() {
        for limit in [128 << 10, 140 << 10, 200 << 10, 1 << 20, (4 << 20) + 1, 512 << 20] {
            for read in [64 << 10, 100_000, 256 << 10, 2 << 20] {
                if limit < read + (4 << 10) {
                    continue;
                }
                for slabs in [1, 2, 7, 64] {
                    let form = Form::within(limit, slabs, read);
                    assert!((1..=slabs).contains(&form.slabs) && form.table_spans > 0, "{form:?}");
                    assert!(form.device_bytes() <= limit, "{limit}: {form:?}");
                }
            }
        }
        let plenty = Form::within(512 << 20, 32, 2 << 20);
        assert_eq!((plenty.slabs, plenty.table_spans), (32, TABLE_SPANS_MAX));
    }
}
