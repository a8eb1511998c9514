//! Carries bytes to the parameters of one rank on its device, and finishes them there.
//!
//! ```text
//! worker         read ► pinned slab
//! copy stream           pinned slab ──H2D──► slab on the device
//! place stream                               slab ──one kernel, all spans──► parameters
//! finish stream                                                              parameters ──► parameters
//! device thread         ◄── pinned slab is free                 ◄── bytes have landed, a finish is done
//! ```
//!
//! A worker goes on as soon as it has handed its bytes over, so that reads, copies and kernels overlap. The device thread
//! waits for what was handed over, in order; only then is a slab used again, and only then do bytes count as landed.

pub(crate) mod slabs;
mod uploads;

use std::{ptr::NonNull, sync::Arc};

use longshore_kernels::cuda::driver::{Device, Registration};

use crate::{error::RankError, region::Region};

pub(crate) use self::uploads::{Done, Origin, Staged};
pub use self::{slabs::Form, uploads::Uploads};

/// Host memory that a device copies from and to by itself, while the host does something else.
#[derive(Debug)]
pub(crate) struct Pinned {
    // unpinned before it is unmapped: fields are dropped in this order
    _registration: Registration,
    region: Region,
}

impl Pinned {
    /// Pins `bytes` bytes of zeros for `what`.
    pub(crate) fn new(
        what: &'static str,
        bytes: usize,
        device: &Arc<Device>,
    ) -> Result<Self, RankError> {
        let region = Region::new(what, bytes.max(1))?;
        region.touch(0, region.len());
        // SAFETY: the region stays mapped until the registration has gone.
        let registration = unsafe { device.register(region.at(0, region.len()), region.len()) }?;
        Ok(Self { _registration: registration, region })
    }

    /// Address of byte `offset`, checked to be followed by `bytes` bytes.
    ///
    /// # Panics
    /// When the range leaves the memory.
    pub(crate) fn at(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        self.region.at(offset, bytes)
    }
}
