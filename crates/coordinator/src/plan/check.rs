//! Proves the reads of a plan before anyone trusts them. A violation is a bug of ours.

use longshore_models::{byte_range::ByteRange, error::PlanError, have::Have};
use longshore_rank::protocol::{LoadPlan, Read, ReadFrom};

/// Every byte that a rank needs and does not have is in exactly one read that it takes, and no byte that it has; the rounds of
/// a rank's reads go up; what is read from parameters is there.
pub(super) fn check_reads(load: &LoadPlan, have: &[Have]) -> Result<(), PlanError> {
    for (rank, reads) in load.reads.iter().enumerate() {
        check_order(rank, reads, load.read_bytes_max)?;
    }
    let mut all: Vec<(u32, &Read)> = Vec::new();
    for (reader, reads) in (0..).zip(&load.reads) {
        all.extend(reads.iter().map(|read| (reader, read)));
    }
    all.sort_by_key(|(_, read)| (read.file, read.range.start));
    let mut landing = Landing { load, have, ranks: vec![Landed::default(); have.len()] };
    for (reader, read) in all {
        landing.read(reader, read)?;
    }
    for (rank, landed) in (0..).zip(&landing.ranks) {
        let missing = missing_bytes(load, rank, &have[rank as usize]);
        if landed.bytes != missing {
            let found = format!("reads bring {} of {missing} missing bytes", landed.bytes);
            return Err(inconsistent(rank, found));
        }
    }
    Ok(())
}

/// Reads are not too long, and each round has one of them at most.
fn check_order(rank: usize, reads: &[Read], read_bytes_max: u64) -> Result<(), PlanError> {
    let rounds: Vec<u32> = reads.iter().filter_map(|read| read.round).collect();
    let longest = reads.iter().map(|read| read.range.len()).max().unwrap_or(0);
    if rounds.is_sorted_by(|a, b| a < b) && longest <= read_bytes_max {
        return Ok(());
    }
    let found = format!("reads of up to {longest} bytes, or rounds that do not go up");
    Err(inconsistent(rank as u32, found))
}

/// What has landed on each rank, read by read in file order.
struct Landing<'a> {
    load: &'a LoadPlan,
    have: &'a [Have],
    ranks: Vec<Landed>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Landed {
    bytes: u64,
    /// The file, and the end in it, of what landed last.
    end: (u32, u64),
}

impl Landing<'_> {
    fn read(&mut self, reader: u32, read: &Read) -> Result<(), PlanError> {
        let Self { load, have, ranks } = self;
        let takes = |r| (load.exchange || r == reader) && load.takes(r, read);
        let mut read_bytes = 0;
        for (tensor, within, _) in load.checkpoint.tensors_in(read.file, read.range) {
            let first = load.checkpoint.tensors[tensor as usize].file_range.start;
            for piece in load.placement.pieces_of(tensor) {
                if read.from == ReadFrom::Parameters
                    && let Some(part) = piece.members.part(reader)
                {
                    read_bytes += piece.bytes_in(part, within);
                }
                for rank in piece.members.ranks().filter(|&rank| takes(rank)) {
                    let part = piece.members.part(rank);
                    let Some((part, extent)) =
                        part.and_then(|part| Some((part, piece.extent_in(part, within)?)))
                    else {
                        continue;
                    };
                    let had = have[rank as usize].file(read.file);
                    let absolute = ByteRange::new(first + extent.start, first + extent.end);
                    let twice = had.cut(absolute).filter(|(_, there)| *there).any(|(range, _)| {
                        let within = ByteRange::new(range.start - first, range.end - first);
                        piece.extent_in(part, within).is_some()
                    });
                    let landed = &mut ranks[rank as usize];
                    if twice || (read.file, absolute.start) < landed.end {
                        let found = format!("bytes {} of file {} land twice", absolute, read.file);
                        return Err(inconsistent(rank, found));
                    }
                    landed.bytes += piece.bytes_in(part, extent);
                    landed.end = (read.file, absolute.end);
                }
            }
        }
        let held = have[reader as usize].file(read.file).covers(read.range);
        if read.from == ReadFrom::Parameters && !(held && read_bytes == read.range.len()) {
            let found = format!("it does not hold all of {} of file {}", read.range, read.file);
            return Err(inconsistent(reader, found));
        }
        Ok(())
    }
}

/// Bytes of the checkpoint that `rank` needs and does not have.
fn missing_bytes(load: &LoadPlan, rank: u32, have: &Have) -> u64 {
    let mut bytes = 0;
    for (id, tensor) in (0..).zip(&load.checkpoint.tensors) {
        let (range, first) = (tensor.file_range, tensor.file_range.start);
        for piece in load.placement.pieces_of(id) {
            let Some(part) = piece.members.part(rank) else { continue };
            for (range, _) in have.file(tensor.file).cut(range).filter(|(_, there)| !there) {
                let within = ByteRange::new(range.start - first, range.end - first);
                bytes += piece.bytes_in(part, within);
            }
        }
    }
    bytes
}

fn inconsistent(rank: u32, found: String) -> PlanError {
    PlanError::Inconsistent { what: format!("the reads of rank {rank}"), found }
}
