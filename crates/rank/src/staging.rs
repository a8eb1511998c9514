//! Staging memory: where bytes wait that cannot be read straight into a parameter.
//!
//! One slab size per load, as many slabs as the limit allows, made when first needed and kept until the load ends. A
//! [`Lease`] is the right to use one slab; dropping it gives the slab back. Views of a slab borrow its lease, so a slab
//! cannot be refilled, or lent to another, while anyone looks at it:
//!
//! ```compile_fail,E0505
//! # use longshore_rank::staging::Staging;
//! let staging = Staging::new(4096);
//! let mut lease = staging.lease().unwrap();
//! let view = &lease.bytes_mut()[..16];
//! drop(lease); // the slab goes back here, while `view` still points into it
//! assert_eq!(view.len(), 16);
//! ```
//!
//! Nor does the lease outlive the memory that it is a part of:
//!
//! ```compile_fail,E0597
//! # use longshore_rank::staging::Staging;
//! let lease = {
//!     let staging = Staging::new(4096);
//!     staging.lease().unwrap()
//! };
//! ```
//!
//! Debug builds overwrite a slab when it comes back ([`POISON`]), so that a test in which anything looked at it
//! afterwards would load wrong bytes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{error::RankError, region::Region};

/// Direct I/O wants addresses, offsets and lengths in multiples of the device's block size; a page always is one.
pub const DIRECT_ALIGNMENT: u64 = 4096;

/// What debug builds fill a returned slab with.
pub const POISON: u8 = 0xa5;

/// The slabs of one rank.
#[derive(Debug)]
pub struct Staging {
    slab_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Slabs are regions because those lie on huge pages: a direct read into scattered 4 KiB pages is split into many
    /// requests to the device.
    free: Vec<Region>,
    held_bytes: u64,
    peak_bytes: u64,
}

impl Staging {
    /// Slabs of `slab_bytes` each; how many exist at a time is bounded by the number of leases taken at a time.
    pub fn new(slab_bytes: usize) -> Self {
        Self { slab_bytes, state: Mutex::default() }
    }

    /// Takes a slab.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub fn lease(&self) -> Result<Lease<'_>, RankError> {
        if let Some(slab) = self.lock().free.pop() {
            return Ok(Lease { staging: self, slab: Some(slab) });
        }
        let slab = Region::new("staging", self.slab_bytes)?;
        let mut state = self.lock();
        state.held_bytes += self.slab_bytes as u64;
        state.peak_bytes = state.peak_bytes.max(state.held_bytes);
        drop(state);
        Ok(Lease { staging: self, slab: Some(slab) })
    }

    /// Gives all slabs back that are not leased.
    pub fn release(&self) {
        let mut state = self.lock();
        state.held_bytes -= (state.free.len() * self.slab_bytes) as u64;
        state.free.clear();
    }

    /// Bytes of staging that exist now, leased or not.
    pub fn held_bytes(&self) -> u64 {
        self.lock().held_bytes
    }

    /// The most bytes of staging that existed at a time.
    pub fn peak_bytes(&self) -> u64 {
        self.lock().peak_bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // the state is consistent after every statement that changes it
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to use one slab.
#[derive(Debug)]
pub struct Lease<'a> {
    staging: &'a Staging,
    slab: Option<Region>,
}

impl Lease<'_> {
    /// The slab's bytes; their address is a multiple of [`DIRECT_ALIGNMENT`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.slab {
            // SAFETY: the region's memory is initialised to zero, and `&mut self` makes the access exclusive.
            Some(slab) => unsafe {
                std::slice::from_raw_parts_mut(slab.at(0, slab.len()).as_ptr(), slab.len())
            },
            None => &mut [],
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            self.bytes_mut().fill(POISON);
        }
        if let Some(slab) = self.slab.take() {
            self.staging.lock().free.push(slab);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RNK-3.
    #[test]
    fn slabs_are_reused_counted_and_given_back() {
        let staging = Staging::new(8192);
        {
            let (mut a, _b) = (staging.lease().unwrap(), staging.lease().unwrap());
            assert_eq!(a.bytes_mut().len(), 8192);
            assert_eq!(a.bytes_mut().as_ptr() as u64 % DIRECT_ALIGNMENT, 0);
        }
        assert!(staging.lease().unwrap().bytes_mut().iter().all(|&b| b == POISON));
        assert_eq!((staging.held_bytes(), staging.peak_bytes()), (16384, 16384));
        staging.release();
        assert_eq!((staging.held_bytes(), staging.peak_bytes()), (0, 16384));
    }
}
