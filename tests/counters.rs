//! What a load costs, counted: bytes read, bytes exchanged, staging held, reads issued.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use longshore::{
    load::RunOptions,
    plan::{Exchange, Plan},
};
use longshore_harness::{oracle, scratch::Scratch};
use longshore_models::byte_range::ByteRange;
use longshore_rank::storage::IoChoice;

#[path = "common/checkpoints.rs"]
mod checkpoints;
mod common;

use checkpoints::checkpoints;
use common::{load_with, plan, plan_options};

/// What each rank needs, receives at least, and reads itself, counted byte by byte from the placement.
struct Naive {
    needs: Vec<u64>,
    reads_and_needs: Vec<u64>,
}

fn naive(plan: &Plan) -> Naive {
    let tp = plan.load.reads.len();
    let mut count = Naive { needs: vec![0; tp], reads_and_needs: vec![0; tp] };
    for (id, tensor) in plan.checkpoint().tensors.iter().enumerate() {
        let bytes = tensor.file_range.len();
        let mut wanted = vec![vec![false; tp]; bytes as usize];
        plan.placement().spans(
            id as u32,
            ByteRange::new(0, bytes),
            |_| true,
            |span| {
                for row in 0..span.rows {
                    let first = span.source_offset + row * span.source_stride;
                    for byte in first..first + span.width {
                        wanted[byte as usize][span.rank as usize] = true;
                    }
                }
            },
        );
        for (reader, reads) in plan.load.reads.iter().enumerate() {
            for read in reads.iter().filter(|r| r.file == tensor.file) {
                let Some(part) = read.range.intersect(&tensor.file_range) else {
                    continue;
                };
                let start = (part.start - tensor.file_range.start) as usize;
                let wanted = &wanted[start..start + part.len() as usize];
                count.reads_and_needs[reader] += wanted.iter().filter(|w| w[reader]).count() as u64;
            }
        }
        for (rank, needs) in count.needs.iter_mut().enumerate() {
            *needs += wanted.iter().filter(|w| w[rank]).count() as u64;
        }
    }
    count
}

/// Each needed byte leaves storage once, a replicated byte is received once by each rank that did not read it, a
/// strided one at most once by its owner; staging stays within its limit and ends at zero; the forecast was right.
#[test]
fn every_byte_is_read_once_and_received_at_most_once() {
    for checkpoint in checkpoints() {
        let scratch = Scratch::new().unwrap();
        let dir = scratch.join("checkpoint");
        checkpoint.write(&dir).unwrap();
        for tp in [2, 4, 8] {
            for ep in [1, 2] {
                let options = oracle::Options::tp(tp).ep(ep);
                // small reads, so that the direct path is taken too
                let mut wanted = plan_options(&options, Exchange::On);
                wanted.read_bytes = Some(64 << 10);
                wanted.memory_limit = 1 << 20;
                let plan =
                    Plan::new(longshore::discover::discover(&dir).unwrap(), &wanted).unwrap();
                let naive = naive(&plan);
                for io in [IoChoice::Buffered, IoChoice::Direct] {
                    let run = RunOptions { io, ..RunOptions::default() };
                    let loaded = load_with(&plan, &run).unwrap();
                    let what = format!("{checkpoint:?} tp {tp} ep {ep} {io:?}");
                    let read: u64 = loaded.reports.iter().map(|r| r.storage_bytes_read).sum();
                    assert_eq!(read, plan.needed_bytes, "{what}: storage amplification");
                    for (rank, report) in loaded.reports.iter().enumerate() {
                        let least = naive.needs[rank] - naive.reads_and_needs[rank];
                        assert_eq!(report.received_bytes, least, "{what}: rank {rank} received");
                        let forecast = plan.forecast[rank];
                        assert_eq!(report.received_bytes, forecast.received_bytes, "{what}");
                        assert_eq!(report.sent_bytes, forecast.sent_bytes, "{what}");
                        assert_eq!(report.storage_bytes_read, forecast.storage_bytes, "{what}");
                        assert!(report.peak_staging_bytes <= 1 << 20, "{what}: staging");
                        assert_eq!(report.final_staging_bytes, 0, "{what}: staging at the end");
                    }
                }
            }
        }
    }
}

/// Twice `bytes / read size + files × ranks`, plus one for every run of tensors between skipped ones.
#[test]
fn number_of_reads_stays_near_bytes_over_read_size() {
    for checkpoint in checkpoints() {
        let scratch = Scratch::new().unwrap();
        let dir = scratch.join("checkpoint");
        checkpoint.write(&dir).unwrap();
        for tp in [1, 2, 4, 8] {
            let options = oracle::Options::tp(tp);
            for read_bytes in [64 << 10, 1 << 20] {
                let mut wanted = plan_options(&options, Exchange::On);
                wanted.read_bytes = Some(read_bytes);
                let plan =
                    Plan::new(longshore::discover::discover(&dir).unwrap(), &wanted).unwrap();
                let loaded =
                    load_with(&plan, &RunOptions { io: IoChoice::Direct, ..RunOptions::default() });
                let reports = loaded.unwrap().reports;
                let reads: u64 = reports.iter().map(|r| r.reads).sum();
                let bytes: u64 = reports.iter().map(|r| r.storage_bytes_read).sum();
                let files = plan.checkpoint().files.len() as u64;
                // each skipped tensor in between ends a run
                let gaps = plan.placement().skipped.len() as u64;
                let most = 2 * (bytes / read_bytes + files * tp as u64) + gaps;
                assert!(reads <= most, "{checkpoint:?} tp {tp}: {reads} reads, at most {most}");
            }
        }
    }
}

/// No rank reads much more than its share.
#[test]
fn reads_are_balanced() {
    for checkpoint in checkpoints() {
        let scratch = Scratch::new().unwrap();
        let dir = scratch.join("checkpoint");
        checkpoint.write(&dir).unwrap();
        let mut wanted = plan_options(&oracle::Options::tp(4), Exchange::On);
        wanted.read_bytes = Some(64 << 10);
        let plan = Plan::new(longshore::discover::discover(&dir).unwrap(), &wanted).unwrap();
        let bytes: Vec<u64> = plan.forecast.iter().map(|f| f.storage_bytes).collect();
        let share = plan.needed_bytes / 4;
        for b in &bytes {
            assert!(b.abs_diff(share) <= 4 * (64 << 10), "{checkpoint:?}: {bytes:?}");
        }
    }
}

/// `--exchange auto` keeps the storage amplification at 1 whenever reading alone would read more.
#[test]
fn auto_reads_each_byte_once() {
    for checkpoint in checkpoints() {
        let scratch = Scratch::new().unwrap();
        let dir = scratch.join("checkpoint");
        checkpoint.write(&dir).unwrap();
        for tp in [2, 4, 8] {
            let plan = plan(&dir, &oracle::Options::tp(tp), Exchange::Auto).unwrap();
            let bytes: u64 = plan.forecast.iter().map(|f| f.storage_bytes).sum();
            assert_eq!(bytes, plan.needed_bytes, "{checkpoint:?} tp {tp}");
        }
    }
}
