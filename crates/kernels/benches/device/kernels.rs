//! The rows of kernels, in the shapes that models have.

use std::{error::Error, slice};

use longshore_kernels::{
    cuda::{
        driver::DeviceMemory,
        launch::{MlaWeight, Permutations, Reorder, Workspace, mla_split, place, swizzle_into},
        permute::Order,
        place::{Runs, SpanTable},
    },
    host::{
        mla::{self, Dims, Weight},
        swizzle::swizzle,
    },
};
use longshore_models::{
    Dtype,
    transform::{Matrices, Reordering, RowOrder, SwizzleInto},
};

use crate::{
    Row, Table,
    arenas::{Arenas, Start, Work, each},
    twins::{place_on_host, reorder_on_host},
};

/// What the project wants of a kernel that passes over its bytes once, and of one that does so twice.
const ONE_PASS: Option<f64> = Some(0.7);
const TWO_PASSES: Option<f64> = Some(0.35);

/// A shape `[rows, bytes of a row]` of one expert or one layer on one rank.
type Shape = (u64, u64);

/// DeepSeek-V3 in NVFP4, experts whole (EP): w13 `[2·2048, 7168/2]`, w2 `[7168, 2048/2]`.
const W13: Shape = (4096, 3584);
const W2: Shape = (7168, 1024);
/// Their scales, one byte for 16 elements.
const W13_SCALE: Shape = (4096, 448);
const W2_SCALE: Shape = (7168, 128);
/// gate_up of a dense layer, DeepSeek-V3, tp 8: `[2·18432/8, 7168/2]` and its scale.
const DENSE: Shape = (4608, 3584);
const DENSE_SCALE: Shape = (4608, 448);
/// Scales of the same experts in MXFP4, one byte for 32 elements.
const W13_E8M0: Shape = (4096, 224);
const W2_E8M0: Shape = (7168, 64);
/// The same experts in BF16.
const W13_BF16: Shape = (4096, 14336);
const W2_BF16: Shape = (7168, 4096);

/// Matrices in place: what, the shape of one, what is wanted.
const IN_PLACE: [(&str, Reordering, Shape, Option<f64>); 16] = {
    use Reordering::{Blocks, Rows, ScaleTiles, Swizzled, WeightTiles};
    use RowOrder::{AsStored, GatedShuffled32, Shuffled32};
    [
        ("rows SHUF32", Rows(Shuffled32), W2, ONE_PASS),
        ("rows SHUF32", Rows(Shuffled32), W2_SCALE, ONE_PASS),
        ("rows SHUF32", Rows(Shuffled32), DENSE, ONE_PASS),
        ("rows W31PERM", Rows(GatedShuffled32), W13, ONE_PASS),
        ("rows W31PERM", Rows(GatedShuffled32), W13_SCALE, ONE_PASS),
        ("swizzle in place", Swizzled(AsStored), W13_SCALE, ONE_PASS),
        ("swizzle in place", Swizzled(AsStored), DENSE_SCALE, ONE_PASS),
        ("swizzle in place, SHUF32", Swizzled(Shuffled32), W2_SCALE, ONE_PASS),
        // the permutation, then the swizzle
        ("swizzle in place, W31PERM", Swizzled(GatedShuffled32), W13_SCALE, TWO_PASSES),
        ("E8M0 scale shuffle", ScaleTiles, W13_E8M0, ONE_PASS),
        ("E8M0 scale shuffle", ScaleTiles, W2_E8M0, ONE_PASS),
        ("16×16 weight shuffle", WeightTiles, W13, ONE_PASS),
        ("16×16 weight shuffle", WeightTiles, W2, ONE_PASS),
        ("BLK", Blocks(AsStored), W2_BF16, ONE_PASS),
        ("BLK, SHUF32", Blocks(Shuffled32), W2_BF16, ONE_PASS),
        ("BLK, W31PERM", Blocks(GatedShuffled32), W13_BF16, ONE_PASS),
    ]
};

type Outcome = Result<(), Box<dyn Error>>;

/// Measures all of them; `tiny`: of a quarter of the rows and columns.
pub(crate) fn measure(table: &mut Table, arenas: &mut Arenas, tiny: bool) -> Outcome {
    let cut = |(rows, bytes): Shape| if tiny { (rows / 4, bytes / 4) } else { (rows, bytes) };
    placements(table, arenas)?;
    for shape in [W13_SCALE, W2_SCALE, DENSE_SCALE] {
        swizzled(table, arenas, cut(shape))?;
    }
    let tables = Permutations::new(&arenas.device)?;
    for (name, how, shape, wanted) in IN_PLACE {
        in_place(table, arenas, &tables, (name, how), cut(shape), wanted)?;
    }
    splits(table, arenas)
}

/// As many matrices as fit, and what they are called.
fn matrices(arenas: &Arenas, (rows, row_bytes): Shape) -> (Matrices, usize, String) {
    let count = (arenas.source.len() / (rows * row_bytes)).max(1);
    let bytes = (count * rows * row_bytes) as usize;
    (
        Matrices { param: 0, count, rows, row_bytes },
        bytes,
        format!("{count} × [{rows}, {row_bytes}]"),
    )
}

fn in_place(
    table: &mut Table,
    arenas: &mut Arenas,
    tables: &Permutations,
    (name, how): (&str, Reordering),
    shape: Shape,
    wanted: Option<f64>,
) -> Outcome {
    let (matrices, bytes, shape) = matrices(arenas, shape);
    let reorder = Reorder::new(&matrices, how)?;
    let one = Matrices { count: 1, ..matrices };
    let work = Work {
        bytes: 2 * bytes as u64,
        start: Start::Copied,
        // SAFETY: the target is as long; target, workspace and tables stay, and all that uses them is on this stream.
        launch: &|arenas| unsafe {
            let workspace = Workspace::from(&arenas.workspace);
            tables.reorder(&arenas.stream, &reorder, arenas.target.address(), workspace)
        },
        host: &|_, target| {
            each(target, bytes / matrices.count as usize, |_, m| reorder_on_host(m, &one, how));
        },
        target_bytes: bytes,
    };
    arenas.measure(table, &Row::new(name, shape, wanted), &work)
}

/// Scales into memory of their own; of these shapes nothing is padded.
fn swizzled(table: &mut Table, arenas: &mut Arenas, shape: Shape) -> Outcome {
    let (source, bytes, shape) = matrices(arenas, shape);
    let swizzling = SwizzleInto { source, target: 0, order: RowOrder::AsStored };
    let (rows, cols) = (source.rows as usize, source.row_bytes as usize);
    let work = Work {
        bytes: 2 * bytes as u64,
        start: Start::Filled,
        // SAFETY: both are as long; they stay, and all that uses them is on this stream.
        launch: &|arenas| unsafe {
            let (source, target) = (arenas.source.address(), arenas.target.address());
            swizzle_into(&arenas.stream, &swizzling, source, target)
        },
        host: &|source, target| {
            each(target, rows * cols, |number, target| {
                let source = &source[number * rows * cols..][..rows * cols];
                swizzle(source, target, rows, cols, |m| Order::AsStored.source(m, rows));
            });
        },
        target_bytes: bytes,
    };
    arenas.measure(table, &Row::new("swizzle", shape, ONE_PASS), &work)
}

/// One long run; rows of 256 bytes out of rows four times as long; many short runs in another order; what alignment or
/// another type costs.
fn placements(table: &mut Table, arenas: &mut Arenas) -> Outcome {
    let all = arenas.source.len();
    let whole = Runs {
        source_offset: 0,
        target: 0,
        rows: 1,
        width: all,
        source_stride: 0,
        target_stride: 0,
        cast: None,
    };
    let rows =
        Runs { rows: all / 1024, width: 256, source_stride: 1024, target_stride: 256, ..whole };
    const SHORT: u64 = 4096;
    let last = all / SHORT - 1;
    let short = (0..=last).map(|n| Runs {
        source_offset: n * SHORT,
        target: (last - n) * SHORT,
        width: SHORT,
        ..whole
    });
    let shifted = Runs { source_offset: 1, width: all - 16, ..whole };
    let cast = Runs { cast: Some((Dtype::F32, Dtype::BF16)), ..whole };
    let mib = all >> 20;
    for (name, shape, runs, wanted) in [
        ("placement, one run", format!("{mib} MiB"), vec![whole], ONE_PASS),
        ("placement, rows", format!("[{}, 256 of 1024]", rows.rows), vec![rows], ONE_PASS),
        ("placement, short runs", format!("{} × {SHORT}", last + 1), short.collect(), ONE_PASS),
        ("placement, an odd byte apart", format!("{mib} MiB"), vec![shifted], None),
        ("placement, F32 → BF16", format!("{mib} MiB"), vec![cast], None),
    ] {
        placed(table, arenas, &Row::new(name, shape, wanted), &runs)?;
    }
    Ok(())
}

/// `runs` have offsets for targets.
fn placed(table: &mut Table, arenas: &mut Arenas, row: &Row, runs: &[Runs]) -> Outcome {
    let mut spans = SpanTable::default();
    for runs in runs {
        let known = spans.push(Runs { target: arenas.target.address() + runs.target, ..*runs });
        assert!(known, "a conversion that placement knows");
    }
    let on_device: DeviceMemory = {
        let bytes = size_of_val(spans.spans());
        // SAFETY: spans have no padding (their own test states the size), and the slice ends before the table changes.
        arenas.uploaded(unsafe { slice::from_raw_parts(spans.spans().as_ptr().cast(), bytes) })?
    };
    let written = |r: &Runs| r.rows * if r.cast.is_some() { r.width / 2 } else { r.width };
    let read: u64 = runs.iter().map(|r| r.rows * r.width).sum();
    let bytes = read + runs.iter().map(written).sum::<u64>();
    let work = Work {
        bytes,
        start: Start::Filled,
        // SAFETY: the runs lie within source and target; these and the table stay, and all that uses them is on this
        // stream.
        launch: &|arenas| unsafe {
            place(&arenas.stream, arenas.source.address(), on_device.address(), &spans)
        },
        host: &|source, target| {
            for runs in runs {
                place_on_host(source, target, 0, runs);
            }
        },
        target_bytes: arenas.target.len() as usize,
    };
    arenas.measure(table, row, &work)
}

/// `kv_b_proj` with the heads of DeepSeek-V3, of as many layers as fit at once: for information.
fn splits(table: &mut Table, arenas: &mut Arenas) -> Outcome {
    let (dn, dv, kl) = (128, 128, 512);
    let heads = (arenas.source.len() as usize / ((dn + dv) * kl * 2)).max(1);
    let dims = Dims { heads, dn, dv, kl };
    let (rows, elements) = (heads * (dn + dv), heads * (dn + dv) * kl);
    let factors = 1.5f32.to_le_bytes().repeat(rows.div_ceil(128) * kl.div_ceil(128));
    let exponents: Vec<u8> = (0..elements / 32).map(|i| 120 + (i % 16) as u8).collect();
    let (factors_at, exponents_at) = (arenas.uploaded(&factors)?, arenas.uploaded(&exponents)?);
    let kc_bytes = heads * dn * kl * 2;
    for (name, bytes) in [("BF16", elements * 2), ("FP8", elements), ("MXFP4", elements / 2)] {
        let on_device = |data| match name {
            "BF16" => MlaWeight::Plain { data, dtype: Dtype::BF16 },
            "FP8" => MlaWeight::Fp8 { data, scale: factors_at.address() },
            _ => MlaWeight::Mxfp4 { data, scale: exponents_at.address() },
        };
        let work = Work {
            bytes: (bytes + elements * 2) as u64,
            start: Start::Filled,
            // SAFETY: source, target and factors have the shapes that `dims` say; they stay, and all that uses them is
            // on this stream.
            launch: &|arenas| unsafe {
                let w_kc = arenas.target.address();
                let weight = on_device(arenas.source.address());
                mla_split(&arenas.stream, weight, dims, w_kc, w_kc + kc_bytes as u64)
            },
            host: &|source, target| {
                let (w_kc, w_vc) = target.split_at_mut(kc_bytes);
                let data = &source[..bytes];
                let weight = match name {
                    "BF16" => Weight::Plain { data, dtype: Dtype::BF16 },
                    "FP8" => Weight::Fp8 { data, scale: &factors },
                    _ => Weight::Mxfp4 { data, scale: &exponents },
                };
                mla::split(weight, dims, w_kc, w_vc);
            },
            target_bytes: elements * 2,
        };
        let row = Row::new(format!("MLA split, {name}"), format!("[{rows}, {kl}]"), None);
        arenas.measure(table, &row, &work)?;
    }
    Ok(())
}
