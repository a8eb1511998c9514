//! CUDA kernels against their host twins, byte for byte, without a device: the same sources, compiled as C++ for the host.
//!
//! Shown: index arithmetic, rounding, alignment of accesses (a misaligned one ends the process), bounds (guards around all
//! memory), barriers, and that results do not depend on the order of threads. Not shown: what a device's compiler makes of
//! the sources, and anything about time.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says so by failing")]

mod emulator;
mod twins;

use emulator::{Emulator, TURNS, Turns, emulator};
use longshore_kernels::{
    cuda::{
        driver::CudaError,
        launch::{
            self, Launch, MlaWeight, Permutation, Reorder, Workspace, expert_scalars, kv_scales,
            linear_scalars, mla_split, swizzle_into,
        },
        permute::{Order, Segments},
        place::{Place, Runs, SpanTable},
        reorder::{Band, ShuffleScales, ShuffleWeights, Swizzle, SwizzleInPlace},
        scalars::{Experts, KvScales, Linear},
        table::{Device, Grid, Kernel},
    },
    host::{
        blocks::into_blocks,
        kv,
        mla::{self, Dims, Weight},
        nvfp4,
        rows::permute_rows,
        shuffle, swizzle,
    },
};
use longshore_models::{
    Dtype,
    transform::{Matrices, Reordering, RowOrder, SwizzleInto},
};
use twins::{
    CASTS, ExpertScalars, ROW_ORDERS, Random, assert_same, bytes_of, elements,
    expert_scalars_on_host, place_on_host, random_spans, reorder_on_host, scales,
};

/// A device of one multiprocessor, so that loops go round.
const DEVICE: Device = Device { multiprocessors: 1 };

/// Where typed launches launch.
struct Host<'a> {
    emulator: &'a Emulator,
    turns: Turns,
}

impl Launch for Host<'_> {
    fn geometry(&self) -> Device {
        DEVICE
    }

    unsafe fn launch<K: Kernel>(&self, kernel: &K, grid: Grid) -> Result<(), CudaError> {
        self.emulator.launch(kernel, grid, self.turns);
        Ok(())
    }
}

/// Bytes around all memory that no kernel may touch.
const GUARD: usize = 256;

/// Memory as a device would have it: at a chosen offset from a multiple of 256, guarded.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(contents: &[u8], offset: usize) -> Memory {
        let mut bytes = vec![0xa5; contents.len() + offset + 4 * GUARD];
        let start = bytes.as_ptr().align_offset(256) + GUARD + offset;
        bytes[start..start + contents.len()].copy_from_slice(contents);
        Memory { bytes, start, len: contents.len() }
    }

    /// Of structures that kernels read.
    fn of<T: Copy>(items: &[T]) -> Memory {
        // SAFETY: the table entries of this crate have no padding, whose sizes their own tests state.
        let bytes =
            unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), size_of_val(items)) };
        Memory::new(bytes, 0)
    }

    fn floats(values: &[f32]) -> Memory {
        Memory::of(values)
    }

    fn address(&mut self) -> u64 {
        self.bytes[self.start..].as_mut_ptr() as u64
    }

    /// The contents, once nothing around them has changed.
    fn contents(&self) -> &[u8] {
        let end = self.start + self.len;
        let untouched = |guard: &[u8]| guard.iter().all(|byte| *byte == 0xa5);
        assert!(untouched(&self.bytes[..self.start]), "written before the memory");
        assert!(untouched(&self.bytes[end..]), "written past the memory");
        &self.bytes[self.start..end]
    }
}

// ---- placement -------------------------------------------------------------------------------------------------------

/// Places `runs`, whose targets are relative to the target's start, and compares all of the target.
fn check_placement(
    emulator: &Emulator,
    slab: &[u8],
    target_bytes: usize,
    target_offset: usize,
    runs: &[Runs],
    what: &str,
) {
    let mut source = Memory::new(slab, 0);
    let mut target = Memory::new(&vec![0x3c; target_bytes], target_offset);
    let (base, mut want) = (target.address(), vec![0x3c; target_bytes]);
    let mut table = SpanTable::default();
    for runs in runs {
        let runs = Runs { target: runs.target + base, ..*runs };
        place_on_host(slab, &mut want, base, &runs);
        assert!(table.push(runs), "{what}: {runs:?}");
    }
    let Some(grid) = table.grid(DEVICE) else {
        assert_same(target.contents(), &want, what);
        return;
    };
    let mut spans = Memory::of(table.spans());
    let on = Host { emulator, turns: Turns::Forwards };
    // SAFETY: the memory is there, of these sizes.
    unsafe { launch::place(&on, source.address(), spans.address(), &table).unwrap() };
    assert_same(target.contents(), &want, what);
    let place = Place {
        slab: source.address(),
        spans: spans.address(),
        span_count: table.spans().len() as u32,
        unit_count: table.unit_count(),
    };
    for (turns, blocks) in [(Turns::Forwards, grid.blocks), (Turns::Backwards, 3)] {
        target.bytes[target.start..][..target.len].fill(0x3c);
        emulator.launch(&place, Grid { blocks, ..grid }, turns);
        assert_same(target.contents(), &want, what);
    }
    assert_same(source.contents(), slab, "the slab");
}

#[test]
fn placement_equals_strided_copies() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(1);
    let slab = random.bytes(1 << 18);
    for round in 0..40 {
        let (count, widest) = [(1, 300), (12, 3000), (300, 40), (3, 1 << 16)][round % 4];
        let (spans, bytes) = random_spans(&mut random, slab.len() as u64, count, widest);
        let offset = [0, 0, 1, 4, 8, 13][round % 6];
        check_placement(emulator, &slab, bytes as usize, offset, &spans, &format!("round {round}"));
    }
}

/// Thousands of scalars, one run of megabytes, nothing at all.
#[test]
fn placement_takes_the_huge_and_the_tiny() {
    let Some(emulator) = emulator() else { return };
    let slab = Random(2).bytes(3 << 20);
    let run = |source_offset, target, width| Runs {
        source_offset,
        target,
        rows: 1,
        width,
        source_stride: 0,
        target_stride: 0,
        cast: None,
    };
    let tiny = (0..5000).map(|i| run(i * 7, i * 4, 4));
    let huge = [run(1 << 20, 20_000, (1 << 20) + 5), run(17, 20_000 + (1 << 20) + 10, 1 << 19)];
    let spans: Vec<Runs> = tiny.chain(huge).collect();
    check_placement(emulator, &slab, (2 << 20) + 100_000, 0, &spans, "tiny and huge");
    check_placement(emulator, &slab, 100, 0, &[], "no span");
    check_placement(emulator, &slab, 100, 0, &[run(0, 0, 0)], "an empty span");
}

#[test]
fn placement_converts_as_the_host_does() {
    let Some(emulator) = emulator() else { return };
    for (from, to) in CASTS {
        let all = elements(from);
        let (size, to_size) = (from.bitsize() as u64 / 8, to.bitsize() as u64 / 8);
        let count = all.len() as u64 / size;
        // all at once; as runs of 5 elements, two elements apart; and where nothing is aligned
        let whole = Runs {
            source_offset: 0,
            target: 0,
            rows: 1,
            width: count * size,
            source_stride: 0,
            target_stride: 0,
            cast: Some((from, to)),
        };
        let strided = Runs {
            rows: count / 7,
            width: 5 * size,
            source_stride: 7 * size,
            target_stride: 6 * to_size,
            ..whole
        };
        let bytes = (count * to_size) as usize;
        for (runs, offset) in [(whole, 0), (strided, 0), (strided, 1)] {
            check_placement(emulator, &all, bytes, offset, &[runs], &format!("{from} → {to}"));
        }
        let mut shifted = vec![9];
        shifted.extend_from_slice(&all[..size as usize * 1000]);
        let runs = Runs { source_offset: 1, width: 1000 * size, ..whole };
        let what = format!("{from} → {to}, unaligned");
        check_placement(emulator, &shifted, 1000 * to_size as usize, 3, &[runs], &what);
    }
}

// ---- rows and blocks -------------------------------------------------------------------------------------------------

fn check_permutation(
    emulator: &Emulator,
    segments: &Segments,
    source: &[u8],
    bands: u64,
    offset: usize,
    want: &[u8],
    what: &str,
) {
    for turns in TURNS {
        let mut matrix = Memory::new(source, offset);
        let mut table = Memory::of(segments.segments());
        let mut workspace = Memory::new(&vec![7; segments.workspace_bytes(bands) as usize], 0);
        let (save, moved) =
            segments.kernels(matrix.address(), bands, table.address(), workspace.address());
        let grid = segments.grid(DEVICE, bands);
        if save.saved > 0 {
            emulator.launch(&save, grid, turns);
        }
        if moved.segment_count > 0 {
            emulator.launch(&moved, grid, turns);
        }
        assert_same(matrix.contents(), want, what);
        workspace.contents();
    }
}

#[test]
fn rows_are_permuted_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(4);
    let orders = [
        (Order::AsStored, 32),
        (Order::Shuffled32, 32),
        (Order::Shuffled32, 96),
        (Order::GatedShuffled32, 64),
        (Order::GatedShuffled32, 384),
        (Order::Interleaved64, 128),
        (Order::Interleaved64, 640),
    ];
    for (order, band) in orders {
        for (row_bytes, bands, offset) in
            [(1, 3, 0), (12, 2, 4), (16, 1, 0), (48, 3, 0), (48, 2, 1), (272, 2, 0), (100, 0, 0)]
        {
            let source = random.bytes(band * bands * row_bytes);
            let (mut want, whole) = (source.clone(), band);
            let host = |i| i / whole * whole + order.source(i % whole, whole);
            permute_rows(&mut want, row_bytes, band, host, &mut Vec::new());
            for longest in [1, 2, 7, 32] {
                let what = format!("{order:?} {band} × {row_bytes} × {bands}, {longest}, {offset}");
                let segments = Segments::new(order, band as u64, 1, row_bytes as u64, longest);
                let bands = bands as u64;
                check_permutation(emulator, &segments, &source, bands, offset, &want, &what);
            }
        }
    }
}

#[test]
fn blocks_are_cut_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(5);
    for (order, rows, row_bytes, count) in [
        (Order::AsStored, 7, 256, 2),
        (Order::AsStored, 64, 128, 1),
        (Order::Shuffled32, 96, 640, 2),
        (Order::GatedShuffled32, 128, 384, 3),
        (Order::GatedShuffled32, 256, 1024, 1),
        (Order::AsStored, 0, 128, 1),
        (Order::AsStored, 4, 0, 1),
    ] {
        let bytes = rows * row_bytes;
        let source = random.bytes(bytes * count);
        let mut want = source.clone();
        for matrix in want.chunks_exact_mut(bytes.max(1)) {
            let order = |i| order.source(i, rows);
            into_blocks(matrix, rows, row_bytes, order, &mut Vec::new());
        }
        let segments = Segments::of_blocks(order, rows as u64, row_bytes as u64);
        for offset in [0, 4, 3] {
            let what = format!("{order:?} {rows} × {row_bytes} × {count}, {offset}");
            let count = count as u64;
            check_permutation(emulator, &segments, &source, count, offset, &want, &what);
        }
    }
}

// ---- swizzle and shuffles --------------------------------------------------------------------------------------------

#[test]
fn scales_are_swizzled_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(6);
    let orders = [Order::AsStored, Order::Shuffled32, Order::GatedShuffled32, Order::Interleaved64];
    for rows in [0, 1, 40, 127, 128, 130, 384] {
        for cols in [0, 1, 4, 5, 16, 20, 31, 32, 48, 140] {
            for (order, count, offset) in orders
                .into_iter()
                .flat_map(|order| [(order, 1, 0), (order, 3, 0), (order, 2, 4), (order, 2, 1)])
            {
                let (padded_rows, padded_cols) = swizzle::padded(rows, cols);
                let source = random.bytes(rows * cols * count);
                let mut want = vec![1; padded_rows * padded_cols * count];
                for matrix in 0..count {
                    let from = &source[matrix * rows * cols..][..rows * cols];
                    let bytes = padded_rows * padded_cols;
                    let to = &mut want[matrix * bytes..][..bytes];
                    swizzle::swizzle(from, to, rows, cols, |m| order.source(m, padded_rows));
                }
                let mut from = Memory::new(&source, offset);
                let mut to = Memory::new(&vec![1; want.len()], 0);
                let swizzle = Swizzle {
                    source: from.address(),
                    target: to.address(),
                    count: count as u64,
                    rows: rows as u32,
                    cols: cols as u32,
                    order: order.number(),
                };
                emulator.launch(&swizzle, swizzle.grid(DEVICE), TURNS[offset % 2]);
                let what = format!("{order:?} {rows} × {cols} × {count}, {offset}");
                assert_same(to.contents(), &want, &what);
            }
        }
    }
}

/// Launches an in-place kernel on `source` with grids of several sizes.
fn check_bands<K: Kernel>(
    emulator: &Emulator,
    source: &[u8],
    want: &[u8],
    what: &str,
    band: Band,
    kernel: impl Fn(u64, u64) -> K,
) {
    let grid = band.grid(DEVICE);
    for (turns, blocks) in [(Turns::Forwards, grid.blocks), (Turns::Backwards, 2)] {
        let mut matrix = Memory::new(source, 0);
        let grid = Grid { blocks, ..grid };
        let mut workspace = Memory::new(&vec![7; band.workspace_bytes(grid) as usize], 0);
        emulator.launch(&kernel(matrix.address(), workspace.address()), grid, turns);
        assert_same(matrix.contents(), want, what);
        workspace.contents();
    }
}

#[test]
fn scales_are_swizzled_in_place_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(7);
    for order in [Order::AsStored, Order::Shuffled32] {
        for (blocks, cols) in [
            (0, 4),
            (3, 0),
            (3, 4),
            (2, 16),
            (3, 20),
            (2, 64),
            (1, 448),
            (2, 1024),
            (3, 1028),
            (3, 1040),
        ] {
            let rows = blocks * 128;
            let (source, mut workspace) = (random.bytes(rows * cols), Vec::new());
            let mut want = source.clone();
            let host = |m| order.source(m, rows);
            swizzle::swizzle_in_place(&mut want, rows, cols, host, 128, &mut workspace);
            let kernel = |matrix, workspace| SwizzleInPlace {
                matrix,
                blocks: blocks as u64,
                cols: cols as u32,
                order: order.number(),
                workspace,
            };
            let what = format!("{order:?} {rows} × {cols}");
            check_bands(emulator, &source, &want, &what, kernel(0, 0).band(), kernel);
        }
    }
}

#[test]
fn aiter_tiles_are_shuffled_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(8);
    for (bands, cols) in [(0, 8), (2, 0), (1, 8), (5, 16), (3, 40), (2, 224), (2, 1024), (3, 1032)]
    {
        let source = random.bytes(bands * 32 * cols);
        let mut want = source.clone();
        shuffle::shuffle_scales(&mut want, bands * 32, cols, &mut Vec::new());
        let kernel = |matrix, workspace| ShuffleScales {
            matrix,
            bands: bands as u64,
            cols: cols as u32,
            workspace,
        };
        let what = format!("scales {bands} × {cols}");
        check_bands(emulator, &source, &want, &what, kernel(0, 0).band(), kernel);
    }
    for (bands, row_bytes) in [(0, 32), (2, 0), (1, 32), (3, 96), (2, 3584), (1, 4096), (3, 4128)] {
        let source = random.bytes(bands * 16 * row_bytes);
        let mut want = source.clone();
        shuffle::shuffle_weights(&mut want, bands * 16, row_bytes, &mut Vec::new());
        let kernel = |matrix, workspace| ShuffleWeights {
            matrix,
            bands: bands as u64,
            row_bytes: row_bytes as u32,
            workspace,
        };
        let what = format!("weights {bands} × {row_bytes}");
        check_bands(emulator, &source, &want, &what, kernel(0, 0).band(), kernel);
    }
}

// ---- whole reorderings -----------------------------------------------------------------------------------------------

/// Every reordering as a rank asks for it, with as much workspace as helps, as little as it takes, and less.
#[test]
fn reorderings_are_launched_as_the_host_does_them() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(12);
    let shapes = [(1, 32), (2, 16), (3, 128), (1, 256), (2, 640), (2, 1028), (1, 1152), (2, 4352)];
    let heights = [16, 32, 128, 256, 384];
    let (mut launched, mut in_parts) = (0, 0);
    for (count, row_bytes) in shapes {
        for rows in heights {
            let m = Matrices { param: 0, count, rows, row_bytes };
            let orders = ROW_ORDERS.into_iter().flat_map(|order| {
                [Reordering::Rows(order), Reordering::Blocks(order), Reordering::Swizzled(order)]
            });
            for how in orders.chain([Reordering::ScaleTiles, Reordering::WeightTiles]) {
                // of shapes that it refuses, others are tested
                let Ok(reorder) = Reorder::new(&m, how) else { continue };
                check_reordering(emulator, &m, how, &reorder, &mut random);
                let segments = reorder.permutation().map(Permutation::segments);
                launched += 1;
                in_parts +=
                    u32::from(count > 1 && segments.is_some_and(|s| s.workspace_bytes(1) > 0));
            }
        }
    }
    assert!(launched > 150 && in_parts > 10, "{launched}, {in_parts} of them in parts");
}

fn check_reordering(
    emulator: &Emulator,
    m: &Matrices,
    how: Reordering,
    reorder: &Reorder,
    random: &mut Random,
) {
    let source = random.bytes((m.count * m.rows * m.row_bytes) as usize);
    let mut want = source.clone();
    reorder_on_host(&mut want, m, how);
    let segments = reorder.permutation().map(Permutation::segments);
    let mut table = segments.as_ref().map(|segments| Memory::of(segments.segments()));
    let table = segments.as_ref().zip(table.as_mut().map(Memory::address));
    let needs = reorder.workspace(segments.as_ref(), DEVICE);
    for (turns, bytes) in [
        (Turns::Forwards, needs.most),
        (Turns::Backwards, needs.most + 1000),
        (Turns::Forwards, needs.least),
        (Turns::Backwards, (needs.least + needs.most) / 2 + 5),
    ] {
        let what = format!("{how:?} of {m:?} with {bytes} bytes of {needs:?}");
        let mut matrices = Memory::new(&source, 0);
        let mut workspace = Memory::new(&vec![7; bytes as usize], 0);
        let parts = Workspace { address: workspace.address(), bytes };
        let on = Host { emulator, turns };
        // SAFETY: the memory is there, of these sizes.
        unsafe { launch::reorder(&on, reorder, table, matrices.address(), parts).unwrap() };
        assert_same(matrices.contents(), &want, &what);
        workspace.contents();
    }
    if let Some(bytes) = needs.least.checked_sub(1) {
        let mut matrices = Memory::new(&source, 0);
        let mut workspace = Memory::new(&vec![7; bytes as usize], 0);
        let parts = Workspace { address: workspace.address(), bytes };
        let on = Host { emulator, turns: Turns::Forwards };
        // SAFETY: as above.
        let outcome = unsafe { launch::reorder(&on, reorder, table, matrices.address(), parts) };
        assert!(matches!(outcome, Err(CudaError::Launch { .. })), "{outcome:?}");
        assert_same(matrices.contents(), &source, "matrices of a launch that was refused");
    }
}

#[test]
fn padded_scales_are_launched_as_the_host_swizzles_them() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(13);
    for (count, rows, cols) in [(3, 40, 20), (1, 200, 7), (2, 128, 16), (0, 4, 4), (2, 0, 4)] {
        for order in ROW_ORDERS {
            let (padded_rows, padded_cols) = swizzle::padded(rows, cols);
            let source = random.bytes(count * rows * cols);
            let mut want = vec![1; count * padded_rows * padded_cols];
            let targets = want.chunks_exact_mut((padded_rows * padded_cols).max(1));
            for (from, to) in source.chunks_exact((rows * cols).max(1)).zip(targets) {
                let order = |m| Order::from(order).source(m, padded_rows);
                swizzle::swizzle(from, to, rows, cols, order);
            }
            let (count, rows, row_bytes) = (count as u64, rows as u64, cols as u64);
            let matrices = Matrices { param: 0, count, rows, row_bytes };
            let s = SwizzleInto { source: matrices, target: 1, order };
            let mut from = Memory::new(&source, 0);
            let mut to = Memory::new(&vec![1; want.len()], 0);
            let on = Host { emulator, turns: Turns::Backwards };
            // SAFETY: the memory is there, of these sizes.
            unsafe { swizzle_into(&on, &s, from.address(), to.address()).unwrap() };
            assert_same(to.contents(), &want, &format!("{s:?}"));
        }
    }
}

/// What a kernel could not do is refused; an address that is not aligned would end the process here.
#[test]
fn launches_that_kernels_are_not_made_for_are_refused() {
    let Some(emulator) = emulator() else { return };
    let on = Host { emulator, turns: Turns::Forwards };
    let m = Matrices { param: 0, count: 1, rows: 128, row_bytes: 128 };
    let none = Workspace::default();
    let tiles = |how| Reorder::new(&m, how).unwrap();
    let s = SwizzleInto { source: m, target: 1, order: RowOrder::AsStored };
    let dims = Dims { heads: 1, dn: 1, dv: 1, kl: 33 };
    let plain = |data, dtype| MlaWeight::Plain { data, dtype };
    let experts = Experts { slots: 2, experts: 4, per_group: 2, routed: 4, ..Default::default() };
    let beyond = Experts { first_expert: 3, per_expert: 1, quants: 2, ..experts };
    let mut table = SpanTable::default();
    let runs = Runs {
        source_offset: 0,
        target: 0,
        rows: 1,
        width: 1,
        source_stride: 0,
        target_stride: 0,
        cast: None,
    };
    assert!(table.push(runs));
    // SAFETY: nothing is launched.
    let refused = unsafe {
        [
            launch::place(&on, 8, 0, &table),
            launch::place(&on, 0, 4, &table),
            launch::reorder(&on, &tiles(Reordering::WeightTiles), None, 8, none),
            launch::reorder(&on, &tiles(Reordering::ScaleTiles), None, 24, none),
            launch::reorder(&on, &tiles(Reordering::Swizzled(RowOrder::AsStored)), None, 4, none),
            launch::reorder(&on, &tiles(Reordering::Rows(RowOrder::Shuffled32)), None, 0, none),
            swizzle_into(&on, &s, 0, 8),
            mla_split(&on, plain(1, Dtype::BF16), dims, 0, 0),
            mla_split(&on, plain(2, Dtype::F32), dims, 0, 0),
            mla_split(&on, plain(0, Dtype::F64), dims, 0, 0),
            mla_split(&on, MlaWeight::Fp8 { data: 0, scale: 2 }, dims, 0, 0),
            mla_split(&on, MlaWeight::Mxfp4 { data: 0, scale: 0 }, dims, 0, 0),
            mla_split(&on, plain(0, Dtype::BF16), dims, 1, 0),
            linear_scalars(&on, &Linear { alpha: 2, ..Default::default() }),
            expert_scalars(&on, &Experts { g1_alphas: 2, ..experts }),
            expert_scalars(&on, &experts),
            expert_scalars(&on, &beyond),
            kv_scales(&on, &KvScales { refused: 1, ..Default::default() }),
        ]
    };
    for (number, outcome) in refused.iter().enumerate() {
        assert!(matches!(outcome, Err(CudaError::Launch { .. })), "{number}: {outcome:?}");
    }
}

// ---- MLA -------------------------------------------------------------------------------------------------------------

/// Every form of weight, heads of odd sizes, blocks that straddle heads; NaNs, infinities and subnormals among the values.
#[test]
fn mla_splits_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(9);
    for (heads, dn, dv, kl) in [
        (2, 3, 2, 32),
        (3, 60, 40, 160),
        (2, 32, 64, 512),
        (1, 33, 31, 96),
        (2, 0, 4, 32),
        (0, 4, 4, 32),
        (2, 5, 7, 0),
    ] {
        let dims = Dims { heads, dn, dv, kl };
        let (rows, elements) = (heads * (dn + dv), heads * (dn + dv) * kl);
        let wide = random.bytes(elements * 4);
        let odd = [0, 0x8000_0000, 0x7f80_0000, 0x7fc0_1234, 0xff80_0001, 1, 0x7f7f_ffff];
        let factors: Vec<u32> = (0..rows.div_ceil(128) * kl.div_ceil(128))
            .map(|i| if i % 5 == 1 { odd[i % 7] } else { random.next() as u32 })
            .collect();
        let factors: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        let exponents = random.bytes(elements / 32);
        let plain = |bytes, dtype| Weight::Plain { data: &wide[..elements * bytes], dtype };
        let forms = [
            plain(2, Dtype::BF16),
            plain(2, Dtype::F16),
            plain(4, Dtype::F32),
            Weight::Fp8 { data: &wide[..elements], scale: &factors },
            Weight::Mxfp4 { data: &wide[..elements / 2], scale: &exponents },
        ];
        for (weight, turns) in forms.into_iter().flat_map(|form| TURNS.map(|turns| (form, turns))) {
            let (mut want_kc, mut want_vc) =
                (vec![0; heads * kl * dn * 2], vec![0; heads * dv * kl * 2]);
            mla::split(weight, dims, &mut want_kc, &mut want_vc);
            let mut kc = Memory::new(&vec![1; want_kc.len()], 0);
            let mut vc = Memory::new(&vec![1; want_vc.len()], 0);
            let what = split_emulated(emulator, weight, dims, &mut kc, &mut vc, turns);
            assert_same(kc.contents(), &want_kc, &format!("w_kc, {what}, {dims:?}"));
            assert_same(vc.contents(), &want_vc, &format!("w_vc, {what}, {dims:?}"));
        }
    }
}

fn split_emulated(
    emulator: &Emulator,
    weight: Weight<'_>,
    dims: Dims,
    kc: &mut Memory,
    vc: &mut Memory,
    turns: Turns,
) -> String {
    let (data, scale) = match weight {
        Weight::Plain { data, .. } => (data, &[][..]),
        Weight::Fp8 { data, scale } | Weight::Mxfp4 { data, scale } => (data, scale),
    };
    let (mut data, mut scale) = (Memory::new(data, 0), Memory::new(scale, 0));
    let (data, scale) = (data.address(), scale.address());
    let (weight, name) = match weight {
        Weight::Plain { dtype, .. } => (MlaWeight::Plain { data, dtype }, format!("{dtype}")),
        Weight::Fp8 { .. } => (MlaWeight::Fp8 { data, scale }, "FP8".to_owned()),
        Weight::Mxfp4 { .. } => (MlaWeight::Mxfp4 { data, scale }, "MXFP4".to_owned()),
    };
    let on = Host { emulator, turns };
    // SAFETY: the memory is there, of these sizes.
    unsafe { mla_split(&on, weight, dims, kc.address(), vc.address()).unwrap() };
    name
}

/// All codes with all factors of MXFP4, and all of FP8 with factors that make everything a product can be.
#[test]
fn every_code_is_dequantised_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let dims = Dims { heads: 1, dn: 0, dv: 256, kl: 32 };
    let pairs: Vec<u8> =
        (0..256).flat_map(|_| (0..16).map(|i| ((2 * i + 1) << 4) | (2 * i))).collect();
    let factors: Vec<u8> = (0..=255).collect();
    let mxfp4 = (Weight::Mxfp4 { data: &pairs, scale: &factors }, dims);
    let codes: Vec<u8> = (0..=255).collect();
    let factors: Vec<Vec<u8>> = [
        0x3f80_0000u32,
        0x3e99_999a,
        0,
        0x8000_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7f80_0001,
        0xffc0_4321,
        1,
        0x0080_0000,
        0x7f7f_ffff,
    ]
    .iter()
    .map(|bits| bits.to_le_bytes().to_vec())
    .collect();
    let one = Dims { heads: 1, dn: 0, dv: 2, kl: 128 };
    let fp8 = factors.iter().map(|scale| (Weight::Fp8 { data: &codes, scale }, one));
    for (weight, dims) in fp8.chain([mxfp4]) {
        let mut want = vec![0; dims.dv * dims.kl * 2];
        mla::split(weight, dims, &mut [], &mut want);
        let (mut kc, mut vc) = (Memory::new(&[], 0), Memory::new(&vec![1; want.len()], 0));
        let what = split_emulated(emulator, weight, dims, &mut kc, &mut vc, Turns::Forwards);
        assert_same(vc.contents(), &want, &what);
    }
}

// ---- scalars ---------------------------------------------------------------------------------------------------------

#[test]
fn scalars_of_linear_layers_equal_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(10);
    for round in 0..500 {
        let (a, b) = (scales(&mut random, round % 4), scales(&mut random, 1 + round % 3));
        let want = [nvfp4::alpha(&b, &a), nvfp4::inverse(nvfp4::maximum(&b))];
        let (mut first, mut second) = (Memory::floats(&a), Memory::floats(&b));
        let mut out = Memory::floats(&[0.5; 2]);
        let linear = Linear {
            scale_2: first.address(),
            scale_2_count: a.len() as u32,
            input_scale: second.address(),
            input_count: b.len() as u32,
            alpha: out.address(),
            inverse_input: out.address() + 4,
        };
        let on = Host { emulator, turns: Turns::Forwards };
        // SAFETY: the memory is there, of these sizes.
        unsafe { linear_scalars(&on, &linear).unwrap() };
        assert_same(out.contents(), &bytes_of(&want), &format!("{a:?} {b:?}"));
    }
}

#[test]
fn scalars_of_experts_equal_the_host() {
    let Some(emulator) = emulator() else { return };
    let mut random = Random(11);
    for round in 0..60 {
        let ExpertScalars { kernel, inputs, want } = expert_scalars_on_host(&mut random, round);
        let mut sources = inputs.each_ref().map(|values| Memory::floats(values));
        let mut out = want.each_ref().map(|values| Memory::floats(&vec![0.5; values.len()]));
        let [w13_scale_2, w2_scale_2, w13_input, w2_input] =
            sources.each_mut().map(Memory::address);
        let [g1_alphas, g2_alphas, w13_quant, w2_quant, g1_scale_c] =
            out.each_mut().map(Memory::address);
        let wanted = round % 5 != 0;
        let kernel = Experts {
            w13_scale_2,
            w2_scale_2,
            w13_input,
            w2_input,
            g1_alphas,
            g2_alphas,
            w13_quant,
            w2_quant,
            g1_scale_c: if wanted { g1_scale_c } else { 0 },
            ..kernel
        };
        let on = Host { emulator, turns: TURNS[round % 2] };
        // SAFETY: the memory is there, of these sizes.
        unsafe { expert_scalars(&on, &kernel).unwrap() };
        for (number, (out, want)) in out.iter().zip(&want).enumerate() {
            let unwanted = vec![0.5; want.len()];
            let want = if number == 4 && !wanted { &unwanted } else { want };
            assert_same(
                out.contents(),
                &bytes_of(want),
                &format!("round {round}, result {number}"),
            );
        }
    }
}

#[test]
fn kv_scales_settle_as_on_the_host() {
    let Some(emulator) = emulator() else { return };
    let values = [0.5, 0.25, -1.0, 0.0, -0.0, f32::NAN, f32::INFINITY, 1e-45];
    for (k, v, given) in values
        .into_iter()
        .flat_map(|k| values.into_iter().flat_map(move |v| [(k, v, true), (k, v, false)]))
    {
        let mut memory = Memory::floats(&[k, v]);
        let mut refused = Memory::new(&[0; 4], 0);
        let kernel = KvScales {
            k: memory.address(),
            v: memory.address() + 4,
            v_given: u32::from(given),
            refused: refused.address(),
        };
        let on = Host { emulator, turns: Turns::Forwards };
        // SAFETY: the memory is there, of these sizes.
        unsafe { kv_scales(&on, &kernel).unwrap() };
        let settled = kv::settled(k, given.then_some(v));
        let want = settled.unwrap_or((k, v));
        assert_same(memory.contents(), &bytes_of(&[want.0, want.1]), &format!("{k} {v} {given}"));
        assert_eq!(refused.contents()[0], u8::from(settled.is_none()), "{k} {v} {given}");
    }
}
