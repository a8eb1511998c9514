//! Rows in another order and BLK, in place: the cycles of a permutation, cut into segments that run side by side.
//!
//! A launch of [`Save`], if any cycle was cut, then one of [`Move`] on the same stream, both with the grid of
//! [`Segments::grid`]. The workspace is the caller's: [`Segments::workspace_bytes`].

use longshore_models::transform::RowOrder;

use crate::host::{
    blocks::BLOCK_BYTES,
    permute::{gated_shuffled32, interleaved64, shuffled32},
};

use super::table::{Device, Grid, kernel};

/// Runs of a segment, at most: the workspace is a 32nd of the matrix at most, and its traffic twice that.
pub const SEGMENT_RUNS_MAX: u32 = 32;

kernel! {
    /// Saves what segments of cut cycles overwrite before their neighbours have read it.
    Save = "permute_save" in include_str!("../../ptx/permute.ptx"), 256;
    /// The bands, one after the other.
    bands: u64,
    /// How many.
    band_count: u64,
    /// Bytes of one: runs · `run_bytes`.
    band_bytes: u64,
    /// Bytes of a run.
    run_bytes: u64,
    /// A [`Segment`] for each segment.
    segments: u64,
    /// How many of them save their first run.
    saved: u32,
    /// `[band_count, saved, run_bytes]`.
    workspace: u64,
}

kernel! {
    /// Moves the runs of all segments.
    Move = "permute_move" in include_str!("../../ptx/permute.ptx"), 256;
    /// The bands, one after the other.
    bands: u64,
    /// How many.
    band_count: u64,
    /// Bytes of one.
    band_bytes: u64,
    /// Bytes of a run.
    run_bytes: u64,
    /// A [`Segment`] for each segment.
    segments: u64,
    /// How many.
    segment_count: u32,
    /// How many of them saved their first run.
    saved: u32,
    /// [`Order::number`].
    order: u32,
    /// Rows of a band.
    rows: u32,
    /// Pieces of a row: 1 for orders of rows.
    blocks: u32,
    /// What [`Save`] wrote.
    workspace: u64,
}

/// Orders of rows that the kernels know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// None.
    AsStored,
    /// SHUF32.
    Shuffled32,
    /// W31PERM.
    GatedShuffled32,
    /// IL64.
    Interleaved64,
}

impl From<RowOrder> for Order {
    fn from(order: RowOrder) -> Order {
        match order {
            RowOrder::AsStored => Order::AsStored,
            RowOrder::Shuffled32 => Order::Shuffled32,
            RowOrder::GatedShuffled32 => Order::GatedShuffled32,
        }
    }
}

impl Order {
    /// The kernels' number of it. Source: `cu/order.cuh`.
    pub fn number(self) -> u32 {
        match self {
            Order::AsStored => 0,
            Order::Shuffled32 => 1,
            Order::GatedShuffled32 => 2,
            Order::Interleaved64 => 3,
        }
    }

    /// The source row of row `i` of `rows`: the host's definition.
    pub fn source(self, i: usize, rows: usize) -> usize {
        match self {
            Order::AsStored => i,
            Order::Shuffled32 => shuffled32(i),
            Order::GatedShuffled32 => gated_shuffled32(i, rows),
            Order::Interleaved64 => interleaved64(i, rows),
        }
    }
}

/// A part of a cycle, as the kernels read it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    first: u32,
    count: u32,
    last: u32,
}

/// `last` of a segment that is a whole cycle.
const WHOLE_CYCLE: u32 = u32::MAX;

/// A permutation of the runs of a band, made once for each shape.
#[derive(Debug)]
pub struct Segments {
    order: Order,
    rows: u32,
    blocks: u32,
    run_bytes: u64,
    segments: Vec<Segment>,
    saved: u32,
}

impl Segments {
    /// Of rows of `row_bytes`, which move within bands of `band` rows (32 for SHUF32, all for W31PERM and IL64).
    ///
    /// # Panics
    /// When a band has 2³² rows or more, or the order is no permutation of it.
    pub fn of_rows(order: Order, band: u64, row_bytes: u64) -> Segments {
        Segments::new(order, band, 1, row_bytes, SEGMENT_RUNS_MAX)
    }

    /// Of a whole matrix `[rows, row_bytes]` into `[row_bytes/128, rows, 128]`, its rows in `order` (BLK).
    ///
    /// # Panics
    /// When a row is no whole number of blocks, the matrix has 2³² of them or more, or the order is no permutation.
    pub fn of_blocks(order: Order, rows: u64, row_bytes: u64) -> Segments {
        let block = BLOCK_BYTES as u64;
        assert_eq!(row_bytes % block, 0, "rows must be whole blocks");
        Segments::new(order, rows, row_bytes / block, block, SEGMENT_RUNS_MAX)
    }

    /// With segments of up to `longest` runs.
    ///
    /// # Panics
    /// As the others.
    pub fn new(order: Order, rows: u64, blocks: u64, run_bytes: u64, longest: u32) -> Segments {
        let runs = rows.checked_mul(blocks).filter(|runs| *runs < u64::from(u32::MAX));
        let runs = runs.expect("fewer than 2^32 runs in a band") as usize;
        let (height, width) = (rows as usize, blocks as usize);
        let source = |run: usize| order.source(run % height, height) * width + run / height;
        let (mut cut, mut whole) = (Vec::new(), Vec::new());
        let mut placed = vec![false; runs];
        let mut cycle: Vec<u32> = Vec::new();
        for start in 0..runs {
            cycle.clear();
            let mut run = start;
            while !placed[run] {
                placed[run] = true;
                cycle.push(run as u32);
                run = source(run);
            }
            assert!(cycle.is_empty() || run == start, "run {run} twice: no permutation");
            match cycle.len() {
                0 | 1 => {}
                n if n <= longest as usize => {
                    whole.push(Segment { first: cycle[0], count: n as u32, last: WHOLE_CYCLE });
                }
                _ => cut_cycle(&cycle, longest, &mut cut),
            }
        }
        let saved = cut.len() as u32;
        cut.append(&mut whole);
        let (rows, blocks) = (rows as u32, blocks as u32);
        Segments { order, rows, blocks, run_bytes, segments: cut, saved }
    }

    /// The table, to be copied to device memory; empty where nothing moves.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes of a band.
    pub fn band_bytes(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.blocks) * self.run_bytes
    }

    /// Bytes of workspace for bands that are permuted together; 0 where [`Save`] has nothing to do.
    pub fn workspace_bytes(&self, band_count: u64) -> u64 {
        band_count * u64::from(self.saved) * self.run_bytes
    }

    /// The launch for `band_count` bands.
    pub fn grid(&self, device: Device, band_count: u64) -> Grid {
        let items = band_count.saturating_mul(self.segments.len() as u64);
        device.grid(items.saturating_mul(self.run_bytes.div_ceil(16)), 256)
    }

    /// Parameters of both kernels, of bands and workspace at these addresses.
    pub fn kernels(
        &self,
        bands: u64,
        band_count: u64,
        segments: u64,
        workspace: u64,
    ) -> (Save, Move) {
        let (band_bytes, run_bytes, saved) = (self.band_bytes(), self.run_bytes, self.saved);
        let save = Save { bands, band_count, band_bytes, run_bytes, segments, saved, workspace };
        let moved = Move {
            bands,
            band_count,
            band_bytes,
            run_bytes,
            segments,
            segment_count: self.segments.len() as u32,
            saved,
            order: self.order.number(),
            rows: self.rows,
            blocks: self.blocks,
            workspace,
        };
        (save, moved)
    }
}

/// Adds the segments of a cycle of more than `longest` runs; each ends in what the next one has saved.
fn cut_cycle(cycle: &[u32], longest: u32, cut: &mut Vec<Segment>) {
    let number = cut.len() as u32;
    let parts = cycle.len().div_ceil(longest as usize) as u32;
    for (part, runs) in (0..).zip(cycle.chunks(longest as usize)) {
        let last = number + (part + 1) % parts;
        cut.push(Segment { first: runs[0], count: runs.len() as u32, last });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_cycles_stay_whole() {
        let segments = Segments::of_rows(Order::Shuffled32, 32, 100);
        // six cycles of five rows; rows 0 and 31 stay
        assert_eq!(segments.segments().len(), 6);
        assert!(segments.segments().iter().all(|s| s.count == 5 && s.last == WHOLE_CYCLE));
        assert_eq!((segments.workspace_bytes(1000), segments.band_bytes()), (0, 3200));
        assert!(Segments::of_rows(Order::AsStored, 32, 100).segments().is_empty());
    }

    /// All runs are in one segment each, and cut cycles close.
    #[test]
    fn segments_cover_what_moves() {
        for (order, rows, blocks) in [
            (Order::GatedShuffled32, 4096, 1),
            (Order::Interleaved64, 384, 1),
            (Order::AsStored, 40, 7),
            (Order::GatedShuffled32, 128, 12),
        ] {
            let s = Segments::new(order, rows, blocks, 128, 32);
            let source = |run: u32| {
                let (rows, run) = (rows as usize, run as usize);
                (order.source(run % rows, rows) * blocks as usize + run / rows) as u32
            };
            let moving = (0..(rows * blocks) as u32).filter(|run| source(*run) != *run).count();
            let mut seen = vec![false; (rows * blocks) as usize];
            for segment in s.segments() {
                let mut run = segment.first;
                for _ in 0..segment.count {
                    assert!(!std::mem::replace(&mut seen[run as usize], true));
                    run = source(run);
                }
                let end = s.segments().get(segment.last as usize).unwrap_or(segment);
                assert_eq!(run, end.first, "{order:?}: a segment ends where another begins");
            }
            assert_eq!(seen.iter().filter(|seen| **seen).count(), moving, "{order:?}");
        }
    }

    /// W31PERM of a BF16 expert of DeepSeek-V3.
    #[test]
    fn the_workspace_is_a_small_part_of_the_matrix() {
        let segments = Segments::of_rows(Order::GatedShuffled32, 4096, 14336);
        assert!(segments.workspace_bytes(1) <= segments.band_bytes() / 16);
        let segments = Segments::of_blocks(Order::GatedShuffled32, 4096, 14336);
        assert!(segments.workspace_bytes(1) <= segments.band_bytes() / 16);
    }
}
