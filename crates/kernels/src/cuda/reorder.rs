//! Swizzle and shuffles.
//!
//! In place, a block of threads holds a band in registers between reading and writing it, or, where a band is too long
//! for that, in its part of a workspace of the caller's: [`Band::workspace_bytes`].

use crate::host::swizzle::padded;

use super::table::{Device, Grid, kernel};

kernel! {
    /// SWZ into memory of its own, padded.
    Swizzle = "swizzle" in include_str!("../../ptx/swizzle.ptx"), 256;
    /// `[count, rows, cols]`.
    source: u64,
    /// `[count, ceil128(rows), ceil4(cols)]`, a multiple of 16.
    target: u64,
    /// Matrices.
    count: u64,
    /// Rows of one.
    rows: u32,
    /// Columns of one.
    cols: u32,
    /// [`super::permute::Order::number`] of the padded rows.
    order: u32,
}

kernel! {
    /// SWZ of blocks of 128 rows, in place.
    SwizzleInPlace = "swizzle_in_place" in include_str!("../../ptx/swizzle.ptx"), 512, synchronises;
    /// `[blocks, 128, cols]`, a multiple of 16.
    matrix: u64,
    /// Blocks of 128 rows.
    blocks: u64,
    /// Columns, a multiple of 4.
    cols: u32,
    /// [`super::permute::Order::number`], of an order that keeps rows within 128: as stored or SHUF32.
    order: u32,
    /// [`Band::workspace_bytes`], a multiple of 16.
    workspace: u64,
}

kernel! {
    /// AITER's scale tiles, in place.
    ShuffleScales = "shuffle_scales" in include_str!("../../ptx/shuffle.ptx"), 128, synchronises;
    /// `[bands, 32, cols]`, a multiple of 16.
    matrix: u64,
    /// Bands of 32 rows.
    bands: u64,
    /// Columns, a multiple of 8.
    cols: u32,
    /// [`Band::workspace_bytes`], a multiple of 16.
    workspace: u64,
}

kernel! {
    /// AITER's 16×16 weight tiles, in place.
    ShuffleWeights = "shuffle_weights" in include_str!("../../ptx/shuffle.ptx"), 512, synchronises;
    /// `[bands, 16, row_bytes]`, a multiple of 16.
    matrix: u64,
    /// Bands of 16 rows.
    bands: u64,
    /// Bytes of a row, a multiple of 32.
    row_bytes: u32,
    /// [`Band::workspace_bytes`], a multiple of 16.
    workspace: u64,
}

impl Swizzle {
    /// The launch for these matrices.
    pub fn grid(&self, device: Device) -> Grid {
        let (rows, cols) = padded(self.rows as usize, self.cols as usize);
        let pieces = (rows as u64 / 4).saturating_mul((cols as u64).div_ceil(32) * 2);
        device.grid(self.count.saturating_mul(pieces), Self::ENTRY.threads)
    }
}

/// What a block of threads takes at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// How many there are.
    pub count: u64,
    /// Bytes of one.
    pub bytes: u64,
    /// Bytes that a block's registers hold. Source: `HELD` of each kernel in `cu/`.
    held_bytes: u64,
    threads: u32,
}

impl Band {
    /// The launch.
    pub fn grid(&self, device: Device) -> Grid {
        device.grid_of_bands(self.count, self.threads)
    }

    /// A launch of no more blocks than are resident on every chip: enough where each needs workspace of its own.
    pub fn resident_grid(&self, device: Device) -> Grid {
        let Grid { blocks, threads } = self.grid(device);
        Grid { blocks: blocks.min(device.resident_blocks(threads)), threads }
    }

    /// Whether registers hold a band, so that no workspace is needed.
    pub fn held(&self) -> bool {
        self.bytes <= self.held_bytes
    }

    /// Bytes of workspace for a launch of `grid`: a band for each of its blocks, or 0 where registers do.
    pub fn workspace_bytes(&self, grid: Grid) -> u64 {
        if self.held() { 0 } else { u64::from(grid.blocks) * self.bytes }
    }
}

impl SwizzleInPlace {
    /// Its bands.
    pub fn band(&self) -> Band {
        let threads = Self::ENTRY.threads;
        let bytes = 128 * u64::from(self.cols);
        Band { count: self.blocks, bytes, held_bytes: 4 * 64 * u64::from(threads), threads }
    }
}

impl ShuffleScales {
    /// Its bands.
    pub fn band(&self) -> Band {
        let threads = Self::ENTRY.threads;
        let bytes = 32 * u64::from(self.cols);
        Band { count: self.bands, bytes, held_bytes: 4 * 64 * u64::from(threads), threads }
    }
}

impl ShuffleWeights {
    /// Its bands.
    pub fn band(&self) -> Band {
        let threads = Self::ENTRY.threads;
        let bytes = 16 * u64::from(self.row_bytes);
        Band { count: self.bands, bytes, held_bytes: 8 * 16 * u64::from(threads), threads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the comments in `cu/` say: up to 1024 columns, 1024 columns, 4096 bytes.
    #[test]
    fn bands_that_registers_hold_need_no_workspace() {
        let grid = Grid { blocks: 10, threads: 512 };
        let swizzled = |cols| SwizzleInPlace { cols, ..Default::default() }.band();
        assert_eq!(swizzled(1024).workspace_bytes(grid), 0);
        assert_eq!(swizzled(1028).workspace_bytes(grid), 10 * 128 * 1028);
        let scales = |cols| ShuffleScales { cols, ..Default::default() }.band();
        assert_eq!(scales(1024).workspace_bytes(grid), 0);
        assert_eq!(scales(1032).workspace_bytes(grid), 10 * 32 * 1032);
        let weights = |row_bytes| ShuffleWeights { row_bytes, ..Default::default() }.band();
        assert_eq!(weights(4096).workspace_bytes(grid), 0);
        assert_eq!(weights(4128).workspace_bytes(grid), 10 * 16 * 4128);
    }

    #[test]
    fn a_swizzle_has_a_thread_for_each_piece() {
        let swizzle = Swizzle { count: 3, rows: 130, cols: 5, ..Default::default() };
        // 256 padded rows, two groups of 16 columns, 4 rows a thread, 3 matrices
        let device = Device { multiprocessors: 100 };
        assert_eq!(swizzle.grid(device).blocks, (3 * 64 * 2u32).div_ceil(256));
    }
}
