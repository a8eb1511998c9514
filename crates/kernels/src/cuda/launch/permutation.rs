//! Permutations of rows and blocks, with their tables in device memory.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    cuda::{
        driver::{CudaError, Device, DeviceMemory, Stream},
        permute::{Move, Order, Segments},
    },
    host::blocks::BLOCK_BYTES,
};

use super::{Checks, Launch, Reorder, Workspace, WorkspaceBytes, reorder};

/// A permutation of the equal runs of bytes that a band consists of; bands are permuted alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permutation {
    order: Order,
    rows: u64,
    blocks: u64,
    run_bytes: u64,
}

impl Permutation {
    /// Of rows of `row_bytes`, which move within bands of `band` rows.
    ///
    /// # Errors
    /// [`CudaError::Launch`] when the order is no permutation of so many rows, or of too many.
    pub fn of_rows(order: Order, band: u64, row_bytes: u64) -> Result<Permutation, CudaError> {
        Permutation { order, rows: band, blocks: 1, run_bytes: row_bytes }.checked()
    }

    /// Of a matrix `[rows, row_bytes]` into `[row_bytes/128, rows, 128]`, its rows in `order` (BLK).
    ///
    /// # Errors
    /// [`CudaError::Launch`] when rows are not whole blocks, and as [`Permutation::of_rows`].
    pub fn of_blocks(order: Order, rows: u64, row_bytes: u64) -> Result<Permutation, CudaError> {
        let run_bytes = BLOCK_BYTES as u64;
        Checks(&Move::ENTRY).whole("bytes in a row", row_bytes, run_bytes)?;
        Permutation { order, rows, blocks: row_bytes / run_bytes, run_bytes }.checked()
    }

    fn checked(self) -> Result<Permutation, CudaError> {
        let of = Checks(&Move::ENTRY);
        match self.order {
            Order::AsStored => {}
            Order::Shuffled32 | Order::GatedShuffled32 => of.whole("rows", self.rows, 32)?,
            Order::Interleaved64 => of.whole("rows", self.rows, 128)?,
        }
        of.dimension("runs in a band", self.rows.saturating_mul(self.blocks))?;
        Ok(self)
    }

    /// Bytes of a band.
    pub fn band_bytes(self) -> u64 {
        self.rows.saturating_mul(self.blocks).saturating_mul(self.run_bytes)
    }

    /// Its segments, made anew: [`Permutations`] keeps them.
    pub fn segments(self) -> Segments {
        match self.blocks {
            1 => Segments::of_rows(self.order, self.rows, self.run_bytes),
            blocks => Segments::of_blocks(self.order, self.rows, blocks * self.run_bytes),
        }
    }
}

/// Workspace for `band_count` bands that `segments` permutes.
pub(super) fn workspace(segments: &Segments, band_count: u64) -> WorkspaceBytes {
    if band_count == 0 {
        return WorkspaceBytes::default();
    }
    let most = segments.workspace_bytes(1).saturating_mul(band_count);
    WorkspaceBytes { least: segments.workspace_bytes(1), most }
}

/// Permutes `band_count` bands from address `bands` on: as many at a time as the workspace allows. `table` is where
/// [`Segments::segments`] are.
///
/// # Safety
/// `table` has the segments, the bands and the workspace are device memory, and nobody else uses them until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when the workspace is too small or not aligned, or what the driver says.
pub unsafe fn permute(
    on: &impl Launch,
    segments: &Segments,
    table: u64,
    bands: u64,
    band_count: u64,
    workspace: Workspace,
) -> Result<(), CudaError> {
    if segments.segments().is_empty() || segments.band_bytes() == 0 || band_count == 0 {
        return Ok(());
    }
    let (of, each) = (Checks(&Move::ENTRY), segments.workspace_bytes(1));
    of.aligned("the table", table, 4)?;
    of.workspace(workspace, each)?;
    let at_once = workspace.bytes.checked_div(each).unwrap_or(band_count).min(band_count);
    let mut first = 0;
    while first < band_count {
        let count = at_once.min(band_count - first);
        let start = bands + first * segments.band_bytes();
        let (save, moved) = segments.kernels(start, count, table, workspace.address);
        let grid = segments.grid(on.geometry(), count);
        if save.saved > 0 {
            // SAFETY: passed on from the caller; the workspace is large enough for `count` bands.
            unsafe { on.launch(&save, grid)? };
        }
        // SAFETY: as above; on a stream, it follows what saves, and what saves for the next bands follows it.
        unsafe { on.launch(&moved, grid)? };
        first += count;
    }
    Ok(())
}

/// A permutation whose table is in device memory.
#[derive(Debug)]
pub struct DevicePermutation {
    segments: Segments,
    table: DeviceMemory,
}

impl DevicePermutation {
    /// Copies the table to the stream's device, and waits for the stream.
    ///
    /// # Errors
    /// [`CudaError::Memory`], or what the driver says.
    pub fn upload(stream: &Stream, segments: Segments) -> Result<DevicePermutation, CudaError> {
        let entries = segments.segments();
        let bytes = size_of_val(entries) as u64;
        let table = stream.device().allocate("tables of permutations", bytes)?;
        // SAFETY: the table is as large as the entries, which stay until the stream is done; nobody else knows of it.
        unsafe { stream.copy_to_device(table.address(), entries.as_ptr().cast(), bytes)? };
        stream.synchronize()?;
        Ok(DevicePermutation { segments, table })
    }

    /// Its segments.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Workspace for so many bands.
    pub fn workspace(&self, band_count: u64) -> WorkspaceBytes {
        workspace(&self.segments, band_count)
    }

    /// Permutes `band_count` bands from address `bands` on, as many at a time as the workspace allows.
    ///
    /// # Safety
    /// Bands and workspace are memory of the stream's device, which is the table's, and nobody else uses them until it
    /// is done; the table stays until then.
    ///
    /// # Errors
    /// As [`permute`].
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        bands: u64,
        band_count: u64,
        workspace: Workspace,
    ) -> Result<(), CudaError> {
        // SAFETY: the table is this object's; the rest is passed on from the caller.
        unsafe {
            permute(stream, &self.segments, self.table.address(), bands, band_count, workspace)
        }
    }
}

/// The permutations that a device needs, each made and copied once.
///
/// A table stays until this goes; whoever launches keeps it until the launches are done.
#[derive(Debug)]
pub struct Permutations {
    stream: Stream,
    made: Mutex<HashMap<Permutation, Arc<DevicePermutation>>>,
}

impl Permutations {
    /// None yet, on `device`.
    ///
    /// # Errors
    /// What the driver says: there is a stream for the tables.
    pub fn new(device: &Arc<Device>) -> Result<Permutations, CudaError> {
        Ok(Permutations { stream: device.stream()?, made: Mutex::default() })
    }

    /// One of them. If it is not there, this waits for its table to be copied, but not for other streams.
    ///
    /// # Errors
    /// As [`DevicePermutation::upload`].
    pub fn get(&self, permutation: Permutation) -> Result<Arc<DevicePermutation>, CudaError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = made.get(&permutation) {
            return Ok(Arc::clone(found));
        }
        let new = Arc::new(DevicePermutation::upload(&self.stream, permutation.segments())?);
        made.insert(permutation, Arc::clone(&new));
        Ok(new)
    }

    /// Bytes of device memory that the tables take.
    pub fn bytes(&self) -> u64 {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.values().map(|permutation| permutation.table.len()).sum()
    }

    /// Workspace for `how`. Makes the permutation that it needs: asked for each beforehand, launches need not wait for
    /// tables.
    ///
    /// # Errors
    /// As [`Permutations::get`].
    pub fn workspace(&self, how: &Reorder) -> Result<WorkspaceBytes, CudaError> {
        let permutation = how.permutation().map(|it| self.get(it)).transpose()?;
        let segments = permutation.as_deref().map(DevicePermutation::segments);
        Ok(how.workspace(segments, self.stream.geometry()))
    }

    /// Reorders the matrices at address `matrices` in place.
    ///
    /// # Safety
    /// Matrices and workspace are memory of the stream's device, which is this one's, and nobody else uses them until
    /// it is done; this stays until then.
    ///
    /// # Errors
    /// [`CudaError::Launch`] when matrices are not aligned as they must be, or the workspace is too small; as
    /// [`Permutations::get`]; or what the driver says.
    pub unsafe fn reorder(
        &self,
        stream: &Stream,
        how: &Reorder,
        matrices: u64,
        workspace: Workspace,
    ) -> Result<(), CudaError> {
        let permutation = how.permutation().map(|it| self.get(it)).transpose()?;
        let table = permutation.as_deref().map(|it| (it.segments(), it.table.address()));
        // SAFETY: the table stays as long as this; the rest is passed on from the caller.
        unsafe { reorder(stream, how, table, matrices, workspace) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Segments` would panic.
    #[test]
    fn what_is_no_permutation_is_an_error() {
        let rows = |order, rows| Permutation::of_rows(order, rows, 16);
        assert!(rows(Order::AsStored, 7).is_ok());
        for order in [Order::Shuffled32, Order::GatedShuffled32] {
            assert!(rows(order, 96).is_ok());
            assert!(matches!(rows(order, 40), Err(CudaError::Launch { .. })));
        }
        assert!(rows(Order::Interleaved64, 256).is_ok());
        assert!(rows(Order::Interleaved64, 192).is_err());
        assert!(rows(Order::AsStored, 1 << 32).is_err());
        assert!(Permutation::of_blocks(Order::AsStored, 4, 100).is_err());
        assert!(Permutation::of_blocks(Order::AsStored, 1 << 20, 1 << 20).is_err());
        assert_eq!(
            Permutation::of_blocks(Order::AsStored, 5, 256).map(Permutation::band_bytes),
            Ok(1280)
        );
    }

    #[test]
    fn fewer_bands_at_a_time_need_less_workspace() {
        let permutation = Permutation::of_rows(Order::GatedShuffled32, 1408, 128);
        let segments = permutation.map(Permutation::segments).unwrap();
        let WorkspaceBytes { least, most } = workspace(&segments, 8);
        assert!(least > 0 && most == 8 * least);
        assert_eq!(workspace(&segments, 0), WorkspaceBytes::default());
    }
}
