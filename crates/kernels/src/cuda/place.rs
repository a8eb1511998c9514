//! The placement kernel's span table: one launch places all spans of a staging slab.

use longshore_models::{Dtype, dtype::elem_bytes};

use super::table::{Device, Grid, kernel};

/// Chunks of a unit, which a warp takes at a time. Source: `cu/place.cu`.
const UNIT_CHUNKS: u64 = 512;
/// Threads of a warp.
const WARP: u64 = 32;

kernel! {
    /// Places spans; nothing in the slab changes, and of the targets nothing but what the spans name.
    Place = "place" in include_str!("../../ptx/place.ptx"), 256;
    /// The slab, a multiple of 16.
    slab: u64,
    /// A [`PlaceSpan`] for each span.
    spans: u64,
    /// How many.
    span_count: u32,
    /// What [`SpanTable::unit_count`] says.
    unit_count: u64,
}

/// Runs of bytes from a slab to device memory, as `longshore_models::placement::Span` describes them.
#[derive(Debug, Clone, Copy)]
pub struct Runs {
    /// First byte, from the slab's start.
    pub source_offset: u64,
    /// Address of the first target byte.
    pub target: u64,
    /// Number of runs.
    pub rows: u64,
    /// Source bytes of one run.
    pub width: u64,
    /// Source bytes from one run to the next.
    pub source_stride: u64,
    /// Target bytes from one run to the next.
    pub target_stride: u64,
    /// Element types when they differ.
    pub cast: Option<(Dtype, Dtype)>,
}

/// An entry of the table in device memory, as the kernel reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PlaceSpan {
    target: u64,
    source_offset: u64,
    rows: u64,
    width: u64,
    source_stride: u64,
    target_stride: u64,
    first_unit: u64,
    row_chunks: u64,
    access: u32,
    cast: u32,
}

/// The spans of one launch.
#[derive(Debug, Default)]
pub struct SpanTable {
    spans: Vec<PlaceSpan>,
    unit_count: u64,
}

impl SpanTable {
    /// Adds a span, unless it has no bytes. Returns whether the conversion is known.
    pub fn push(&mut self, runs: Runs) -> bool {
        let Some((access, cast, row_chunks)) = chunks(&runs) else { return false };
        if runs.rows == 0 || runs.width == 0 {
            return true;
        }
        let Runs { source_offset, target, rows, width, source_stride, target_stride, .. } = runs;
        self.spans.push(PlaceSpan {
            target,
            source_offset,
            rows,
            width,
            source_stride,
            target_stride,
            first_unit: self.unit_count,
            row_chunks,
            access,
            cast,
        });
        self.unit_count += (rows * row_chunks).div_ceil(UNIT_CHUNKS);
        true
    }

    /// The table, to be copied to device memory.
    pub fn spans(&self) -> &[PlaceSpan] {
        &self.spans
    }

    /// Units of work of all spans.
    pub fn unit_count(&self) -> u64 {
        self.unit_count
    }

    /// The launch for this table, or `None` where there is nothing to place.
    pub fn grid(&self, device: Device) -> Option<Grid> {
        (self.unit_count > 0).then(|| device.grid(self.unit_count.saturating_mul(WARP), 256))
    }

    /// Empties the table for another slab.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.unit_count = 0;
    }
}

/// Bytes of a chunk (0: elements), the number of the conversion, chunks of a run.
fn chunks(runs: &Runs) -> Option<(u32, u32, u64)> {
    if let Some((from, to)) = runs.cast {
        return Some((0, number(from, to)?, runs.width / elem_bytes(from)));
    }
    let strides = if runs.rows > 1 { runs.source_stride | runs.target_stride } else { 0 };
    // source and target are apart by whole accesses, and stay so from run to run: their own starts do not matter
    let apart = runs.target.wrapping_sub(runs.source_offset) | strides;
    let fits = |access: &u32| apart % u64::from(*access) == 0 && runs.width >= u64::from(*access);
    let access = [16, 8, 4].into_iter().find(fits).unwrap_or(1);
    let lead = runs.target % u64::from(access);
    Some((access, 0, (lead + runs.width).div_ceil(u64::from(access))))
}

/// The kernel's number of a conversion. Source: `cu/place.cu`.
fn number(from: Dtype, to: Dtype) -> Option<u32> {
    use Dtype::{BF16, F16, F32, F64, I32, I64};
    Some(match (from, to) {
        (BF16, F16) => 0,
        (BF16, F32) => 1,
        (F16, BF16) => 2,
        (F16, F32) => 3,
        (F32, BF16) => 4,
        (F32, F16) => 5,
        (F64, BF16) => 6,
        (F64, F16) => 7,
        (F64, F32) => 8,
        (I32, I64) => 9,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: Runs = Runs {
        source_offset: 0,
        target: 4096,
        rows: 1,
        width: 64,
        source_stride: 64,
        target_stride: 64,
        cast: None,
    };

    #[test]
    fn accesses_are_as_wide_as_alignment_allows() {
        let of = |runs| chunks(&runs).map(|(access, _, chunks)| (access, chunks));
        assert_eq!(of(RUNS), Some((16, 4)));
        // both 3 bytes off: a partial chunk at each end
        assert_eq!(of(Runs { source_offset: 19, target: 4099, ..RUNS }), Some((16, 5)));
        assert_eq!(of(Runs { source_offset: 8, ..RUNS }), Some((8, 8)));
        assert_eq!(of(Runs { source_offset: 4, ..RUNS }), Some((4, 16)));
        assert_eq!(of(Runs { source_offset: 2, ..RUNS }), Some((1, 64)));
        assert_eq!(of(Runs { rows: 2, target_stride: 72, ..RUNS }), Some((8, 8)));
        // of one run, strides mean nothing
        assert_eq!(of(Runs { target_stride: 71, ..RUNS }), Some((16, 4)));
        let cast = Some((Dtype::F32, Dtype::BF16));
        assert_eq!(of(Runs { cast, ..RUNS }), Some((0, 16)));
        assert_eq!(of(Runs { cast: Some((Dtype::U8, Dtype::F32)), ..RUNS }), None);
    }

    #[test]
    fn units_are_numbered_through_the_spans() {
        let mut table = SpanTable::default();
        for width in [16 * 512 * 3, 16, 0, 16 * 513] {
            assert!(table.push(Runs { width, ..RUNS }));
        }
        let first: Vec<u64> = table.spans().iter().map(|s| s.first_unit).collect();
        assert_eq!((first, table.unit_count()), (vec![0, 3, 4], 6));
        let device = Device { multiprocessors: 2 };
        assert_eq!(table.grid(device), Some(Grid { blocks: 1, threads: 256 }));
        table.clear();
        assert_eq!(table.grid(device), None);
    }

    /// The size that `cu/place.cu` counts on.
    #[test]
    fn a_span_is_72_bytes() {
        assert_eq!(size_of::<PlaceSpan>(), 72);
    }
}
