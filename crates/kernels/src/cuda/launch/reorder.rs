//! Reordering of matrices: in place, whatever it consists of, and swizzling with padding.

use longshore_models::transform::{Matrices, Reordering, RowOrder, SwizzleInto};

use crate::{
    cuda::{
        driver::CudaError,
        permute::{Move, Order, Segments},
        reorder::{Band, ShuffleScales, ShuffleWeights, Swizzle, SwizzleInPlace},
        table::{Device, Kernel},
    },
    host::swizzle::BLOCK_ROWS,
};

use super::{
    Checks, Launch, Permutation, Workspace, WorkspaceBytes,
    permutation::{permute, workspace},
};

/// How the matrices of a parameter are reordered in place: a permutation, tiles, or one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reorder {
    /// With how many bands.
    permutation: Option<(Permutation, u64)>,
    tiles: Option<Tiles>,
}

/// Kernels that reorder bands of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tiles {
    /// SWZ of blocks of 128 rows.
    Swizzled { blocks: u64, cols: u32, order: Order },
    /// AITER's scales, by bands of 32 rows.
    Scales { bands: u64, cols: u32 },
    /// AITER's weights, by bands of 16 rows.
    Weights { bands: u64, row_bytes: u32 },
}

impl Reorder {
    /// Twin of what the host does for a `Finish::Reorder`.
    ///
    /// # Errors
    /// [`CudaError::Launch`] when rows or their bytes are not what the order or the tiles need: nothing is padded.
    pub fn new(m: &Matrices, how: Reordering) -> Result<Reorder, CudaError> {
        if m.count == 0 || m.rows == 0 || m.row_bytes == 0 {
            return Ok(Reorder { permutation: None, tiles: None });
        }
        match how {
            Reordering::Rows(order) => permuted_rows(m, order),
            Reordering::Blocks(order) => {
                let permutation = Permutation::of_blocks(order.into(), m.rows, m.row_bytes)?;
                Ok(Reorder { permutation: Some((permutation, m.count)), tiles: None })
            }
            Reordering::Swizzled(order) => swizzled(m, order),
            Reordering::ScaleTiles => {
                let of = Checks(&ShuffleScales::ENTRY);
                let (bands, cols) = bands(of, m, 32, 8)?;
                Ok(Reorder { permutation: None, tiles: Some(Tiles::Scales { bands, cols }) })
            }
            Reordering::WeightTiles => {
                let of = Checks(&ShuffleWeights::ENTRY);
                let (bands, row_bytes) = bands(of, m, 16, 32)?;
                Ok(Reorder { permutation: None, tiles: Some(Tiles::Weights { bands, row_bytes }) })
            }
        }
    }

    /// The permutation that it begins with, whose table [`reorder`] needs.
    pub fn permutation(&self) -> Option<Permutation> {
        self.permutation.map(|(permutation, _)| permutation)
    }

    /// Its workspace, with the segments of [`Reorder::permutation`].
    pub fn workspace(&self, segments: Option<&Segments>, device: Device) -> WorkspaceBytes {
        let moved = match (self.permutation, segments) {
            (Some((_, bands)), Some(segments)) => workspace(segments, bands),
            _ => WorkspaceBytes::default(),
        };
        let tiles = match self.tiles.map(|tiles| tiles.band()) {
            Some(band) => band_workspace(band, device),
            None => WorkspaceBytes::default(),
        };
        moved.or(tiles)
    }
}

impl Tiles {
    fn band(self) -> Band {
        match self {
            Tiles::Swizzled { blocks, cols, .. } => {
                SwizzleInPlace { blocks, cols, ..Default::default() }.band()
            }
            Tiles::Scales { bands, cols } => {
                ShuffleScales { bands, cols, ..Default::default() }.band()
            }
            Tiles::Weights { bands, row_bytes } => {
                ShuffleWeights { bands, row_bytes, ..Default::default() }.band()
            }
        }
    }
}

/// Rows in another order: within 32 rows, or within a matrix.
fn permuted_rows(m: &Matrices, order: RowOrder) -> Result<Reorder, CudaError> {
    if order == RowOrder::AsStored {
        return Ok(Reorder { permutation: None, tiles: None });
    }
    let band = order.band(m.rows, 32);
    // of a matrix that is not whole bands, the order is no permutation
    Permutation::of_rows(order.into(), m.rows, m.row_bytes)?;
    let permutation = Permutation::of_rows(order.into(), band, m.row_bytes)?;
    let bands = m.count.saturating_mul(m.rows / band);
    Ok(Reorder { permutation: Some((permutation, bands)), tiles: None })
}

/// SWZ knows orders that stay within its blocks; of others, it follows the permutation.
fn swizzled(m: &Matrices, order: RowOrder) -> Result<Reorder, CudaError> {
    let of = Checks(&SwizzleInPlace::ENTRY);
    let (blocks, cols) = bands(of, m, BLOCK_ROWS as u64, 4)?;
    let (permutation, order) = match order {
        RowOrder::AsStored | RowOrder::Shuffled32 => (None, order.into()),
        RowOrder::GatedShuffled32 => (permuted_rows(m, order)?.permutation, Order::AsStored),
    };
    Ok(Reorder { permutation, tiles: Some(Tiles::Swizzled { blocks, cols, order }) })
}

/// Bands of `height` rows in all matrices, and bytes of a row, a multiple of `width`.
fn bands(of: Checks, m: &Matrices, height: u64, width: u64) -> Result<(u64, u32), CudaError> {
    of.whole("rows", m.rows, height)?;
    of.whole("bytes in a row", m.row_bytes, width)?;
    let row_bytes = of.dimension("bytes in a row", m.row_bytes)?;
    Ok((m.count.saturating_mul(m.rows / height), row_bytes))
}

/// Blocks of threads that are resident together share what workspace there is; more of them would only take turns.
fn band_workspace(band: Band, device: Device) -> WorkspaceBytes {
    if band.held() {
        return WorkspaceBytes::default();
    }
    let most = band.resident_grid(device).blocks;
    WorkspaceBytes { least: band.bytes, most: u64::from(most).saturating_mul(band.bytes) }
}

/// Reorders the matrices at address `matrices` in place. `table` has the segments of [`Reorder::permutation`], and
/// where they are in device memory.
///
/// # Safety
/// The table is there; matrices and workspace are device memory, and nobody else uses them until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when the table is missing, matrices that are cut into tiles are no multiple of 16, or the
/// workspace is too small; or what the driver says.
pub unsafe fn reorder(
    on: &impl Launch,
    how: &Reorder,
    table: Option<(&Segments, u64)>,
    matrices: u64,
    workspace: Workspace,
) -> Result<(), CudaError> {
    if let Some(tiles) = how.tiles {
        // before the permutation is launched: half a reordering would be worse than none
        tiles.check(matrices, workspace)?;
    }
    if let Some((_, bands)) = how.permutation {
        let of = Checks(&Move::ENTRY);
        let Some((segments, table)) = table else { return of.refused("its table is missing") };
        // SAFETY: passed on from the caller.
        unsafe { permute(on, segments, table, matrices, bands, workspace)? };
    }
    match how.tiles {
        None => Ok(()),
        // SAFETY: passed on from the caller; checked above.
        Some(tiles) => unsafe { tiles.launch(on, matrices, workspace) },
    }
}

impl Tiles {
    fn check(self, matrices: u64, workspace: Workspace) -> Result<(), CudaError> {
        let of = Checks(match self {
            Tiles::Swizzled { .. } => &SwizzleInPlace::ENTRY,
            Tiles::Scales { .. } => &ShuffleScales::ENTRY,
            Tiles::Weights { .. } => &ShuffleWeights::ENTRY,
        });
        of.aligned("matrices", matrices, 16)?;
        let band = self.band();
        of.workspace(workspace, if band.held() { 0 } else { band.bytes })
    }

    /// # Safety
    /// As [`reorder`], and [`Tiles::check`] has passed.
    unsafe fn launch(
        self,
        on: &impl Launch,
        matrix: u64,
        workspace: Workspace,
    ) -> Result<(), CudaError> {
        let band = self.band();
        let Workspace { address: workspace, bytes } = workspace;
        match self {
            Tiles::Swizzled { blocks, cols, order } => {
                let order = order.number();
                let kernel = SwizzleInPlace { matrix, blocks, cols, order, workspace };
                // SAFETY: passed on from the caller.
                unsafe { launch_bands(on, &kernel, band, bytes) }
            }
            Tiles::Scales { bands, cols } => {
                let kernel = ShuffleScales { matrix, bands, cols, workspace };
                // SAFETY: passed on from the caller.
                unsafe { launch_bands(on, &kernel, band, bytes) }
            }
            Tiles::Weights { bands, row_bytes } => {
                let kernel = ShuffleWeights { matrix, bands, row_bytes, workspace };
                // SAFETY: passed on from the caller.
                unsafe { launch_bands(on, &kernel, band, bytes) }
            }
        }
    }
}

/// With as many blocks of threads as there is work for, or, where each needs its part of the workspace, parts of it.
///
/// # Safety
/// As [`reorder`]; `kernel` is of `band`.
unsafe fn launch_bands<K: Kernel>(
    on: &impl Launch,
    kernel: &K,
    band: Band,
    workspace_bytes: u64,
) -> Result<(), CudaError> {
    let mut grid = band.grid(on.geometry());
    if !band.held() {
        grid = band.resident_grid(on.geometry());
        let parts = workspace_bytes / band.bytes;
        // no more than there were: it fits
        grid.blocks = parts.min(u64::from(grid.blocks)) as u32;
    }
    // SAFETY: passed on from the caller; each block of threads has a part of the workspace.
    unsafe { on.launch(kernel, grid) }
}

/// Swizzles matrices into memory of their own, padded.
///
/// # Safety
/// `source` and `target` are device memory of the shapes that `s` says, and apart; nobody else writes to the source, or
/// reads or writes the target, until it is done.
///
/// # Errors
/// [`CudaError::Launch`] when the target is no multiple of 16 or the matrices are too large, or what the driver says.
pub unsafe fn swizzle_into(
    on: &impl Launch,
    s: &SwizzleInto,
    source: u64,
    target: u64,
) -> Result<(), CudaError> {
    let Matrices { count, rows, row_bytes, .. } = s.source;
    if count == 0 || rows == 0 || row_bytes == 0 {
        return Ok(());
    }
    let of = Checks(&Swizzle::ENTRY);
    of.aligned("the target", target, 16)?;
    let (rows, cols) = (of.dimension("rows", rows)?, of.dimension("columns", row_bytes)?);
    let order = Order::from(s.order).number();
    let kernel = Swizzle { source, target, count, rows, cols, order };
    // SAFETY: passed on from the caller.
    unsafe { on.launch(&kernel, kernel.grid(on.geometry())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reorder(rows: u64, row_bytes: u64, how: Reordering) -> Result<Reorder, String> {
        let m = Matrices { param: 0, count: 2, rows, row_bytes };
        Reorder::new(&m, how).map_err(|error| error.to_string())
    }

    #[test]
    fn shapes_that_would_need_padding_are_refused() {
        use RowOrder::{AsStored, GatedShuffled32, Shuffled32};
        for (rows, row_bytes, how) in [
            (33, 4, Reordering::Rows(Shuffled32)),
            (16, 4, Reordering::Rows(Shuffled32)),
            (48, 4, Reordering::Rows(GatedShuffled32)),
            (32, 100, Reordering::Blocks(AsStored)),
            (48, 128, Reordering::Blocks(Shuffled32)),
            (96, 4, Reordering::Swizzled(AsStored)),
            (128, 5, Reordering::Swizzled(AsStored)),
            (48, 8, Reordering::ScaleTiles),
            (32, 4, Reordering::ScaleTiles),
            (24, 32, Reordering::WeightTiles),
            (16, 16, Reordering::WeightTiles),
            (16, 1 << 30, Reordering::WeightTiles),
        ] {
            let refused = reorder(rows, row_bytes, how).unwrap_err();
            assert!(refused.contains(" cannot be launched: "), "{refused}");
            assert!(reorder(0, row_bytes, how).is_ok(), "no rows");
        }
    }

    #[test]
    fn only_what_registers_do_not_hold_needs_workspace() {
        let device = Device { multiprocessors: 10 };
        let of = |row_bytes, how| reorder(512, row_bytes, how).unwrap().workspace(None, device);
        assert_eq!(of(4096, Reordering::WeightTiles), WorkspaceBytes::default());
        // two blocks of 512 threads for each multiprocessor
        let long = WorkspaceBytes { least: 16 * 8192, most: 20 * 16 * 8192 };
        assert_eq!(of(8192, Reordering::WeightTiles), long);
        let of_bands = WorkspaceBytes { least: 32 * 2048, most: 32 * 32 * 2048 };
        assert_eq!(of(2048, Reordering::ScaleTiles), of_bands);
    }
}
