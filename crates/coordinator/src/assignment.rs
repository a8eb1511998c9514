//! Who reads which bytes: splits the needed ranges over the ranks. Pure.
//!
//! With exchange, each needed byte is read by exactly one rank:
//!
//! * *direct*: bytes that only one rank needs are read by it, where a whole read's worth of them lies together;
//! * *pooled*: everything else (replicated bytes, row-parallel weights, tensors too small to be worth a read per rank)
//!   goes, in reads that span tensors, to whichever rank has read least so far; the reader hands the bytes on.
//!
//! So a row-parallel weight is read by whole rows, never row by row, and the number of reads stays within twice
//! `bytes / read_bytes` plus one for each run of tensors between skipped ones. Without exchange each rank reads all that
//! it needs, across small gaps.
//!
//! [`assign_rest`] does the same for what is missing after a rank was lost, [`assign_over`] where the others go on without it.

mod former;
mod rest;

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::{Checkpoint, TensorId},
    declare::Split,
    have::{Have, RankSet},
    placement::{PlacedPiece, Placement},
};
use longshore_rank::protocol::Read;

pub use former::{FormerGroup, assign_over};
pub use rest::assign_rest;

/// What an assignment is made for.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Whether ranks hand bytes on to each other.
    pub exchange: bool,
    /// The longest read.
    pub read_bytes: u64,
    /// Without exchange: the longest gap between needed bytes that is read through.
    pub gap_bytes: u64,
    /// With exchange: the longest gap between the runs of a row-parallel weight that is read through, where a rank reads
    /// its own part alone because the others have theirs.
    pub row_gap_bytes: u64,
}

/// The reads of every rank.
#[derive(Debug, Clone)]
pub struct Assignment {
    /// Per rank, in the order in which they are issued.
    pub reads: Vec<Vec<Read>>,
    /// Number of exchange rounds.
    pub rounds: u32,
    /// Sets of ranks that reads refer to; the first is empty.
    pub settled: Vec<RankSet>,
}

impl Assignment {
    /// The same in a group of `ranks`, of which those at the end do nothing.
    pub fn over(mut self, ranks: usize) -> Self {
        self.reads.resize(ranks.max(self.reads.len()), Vec::new());
        self
    }
}

/// Splits what `placement` needs over its ranks.
pub fn assign(placement: &Placement, checkpoint: &Checkpoint, policy: &Policy) -> Assignment {
    if policy.exchange {
        with_exchange(placement, checkpoint, policy)
    } else {
        let nothing = vec![Have::default(); placement.parallel.tp() as usize];
        without_exchange(placement, checkpoint, policy, &nothing)
    }
}

/// A run of needed bytes; `owner`: the only rank that needs them and reads them itself.
#[derive(Debug, Clone, Copy)]
struct Run {
    file: u32,
    range: ByteRange,
    owner: Option<u32>,
}

fn with_exchange(placement: &Placement, checkpoint: &Checkpoint, policy: &Policy) -> Assignment {
    let mut share = Share::new(placement.parallel.tp() as usize);
    for run in runs(placement, checkpoint, policy.read_bytes) {
        for range in checkpoint.cut(run.file, run.range, policy.read_bytes) {
            let reader = run.owner.map_or_else(|| share.least_loaded(), |rank| rank as usize);
            share.loads[reader] += range.len();
            share.push(reader, Read::new(run.file, range, None), run.owner.is_none());
        }
    }
    share.assignment(vec![RankSet::default()])
}

/// Reads given out so far.
struct Share {
    reads: Vec<Vec<Read>>,
    /// Bytes that each rank reads from storage.
    loads: Vec<u64>,
    /// Who contributes to the present round already.
    in_round: Vec<bool>,
    round: u32,
    any_round: bool,
}

impl Share {
    fn new(ranks: usize) -> Self {
        Self {
            reads: vec![Vec::new(); ranks],
            loads: vec![0; ranks],
            in_round: vec![false; ranks],
            round: 0,
            any_round: false,
        }
    }

    /// Adds a read; `shared`: its bytes are handed on, in a round.
    fn push(&mut self, reader: usize, read: Read, shared: bool) {
        let round = shared.then(|| self.round_for(reader));
        self.reads[reader].push(Read { round, ..read });
    }

    fn least_loaded(&self) -> usize {
        (0..self.loads.len()).min_by_key(|&r| self.loads[r]).unwrap_or(0)
    }

    /// To a round each rank contributes one read: rounds stay small, so that what is passed on is still in a cache, and
    /// whoever wants larger ones takes several together.
    fn round_for(&mut self, reader: usize) -> u32 {
        if self.in_round[reader] {
            self.in_round.fill(false);
            self.round += 1;
        }
        self.in_round[reader] = true;
        self.any_round = true;
        self.round
    }

    fn assignment(self, settled: Vec<RankSet>) -> Assignment {
        let rounds = self.round + u32::from(self.any_round);
        Assignment { reads: self.reads, rounds, settled }
    }
}

/// Which of `ranks` has least of `bytes`.
fn least(ranks: &RankSet, bytes: &[u64]) -> usize {
    ranks.iter().map(|rank| rank as usize).min_by_key(|&rank| bytes[rank]).unwrap_or(0)
}

fn segments(cuts: &[u64]) -> impl Iterator<Item = ByteRange> {
    cuts.windows(2).map(|ends| ByteRange::new(ends[0], ends[1]))
}

/// The needed bytes as runs in file order.
fn runs(placement: &Placement, checkpoint: &Checkpoint, read_bytes: u64) -> Vec<Run> {
    let mut runs = Vec::new();
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        let pieces = placement.pieces_of(id as TensorId);
        if pieces.is_empty() || tensor.file_range.is_empty() {
            continue;
        }
        let mut push = |start: u64, end: u64, owner| {
            let start = tensor.file_range.start + start;
            let range = ByteRange::new(start, tensor.file_range.start + end);
            extend(&mut runs, Run { file: tensor.file, range, owner });
        };
        match ownership(pieces, read_bytes) {
            Ownership::Sole(rank) => push(0, tensor.file_range.len(), Some(rank)),
            Ownership::Shared => push(0, tensor.file_range.len(), None),
            Ownership::PerRank(piece) => {
                for rank in piece.members.ranks() {
                    let Some(part) = piece.members.part(rank) else {
                        continue;
                    };
                    let ((r0, r1), _) = piece.part_rect(part);
                    if r0 < r1 {
                        push(r0 * piece.row_bytes, r1 * piece.row_bytes, Some(rank));
                    }
                }
            }
        }
    }
    if placement.parallel.tp() > 1 {
        pool_short_runs(&mut runs, read_bytes);
    }
    runs
}

enum Ownership<'a> {
    /// One rank needs all of the tensor, and no other needs any.
    Sole(u32),
    /// Each member needs a long contiguous part of its own.
    PerRank(&'a PlacedPiece),
    /// Anything else.
    Shared,
}

fn ownership(pieces: &[PlacedPiece], read_bytes: u64) -> Ownership<'_> {
    let sole = pieces[0].members.sole();
    if let Some(rank) = sole
        && pieces.iter().all(|p| p.members.sole() == sole)
    {
        return Ownership::Sole(rank);
    }
    let [piece] = pieces else {
        return Ownership::Shared;
    };
    let long = piece.members.is_exclusive()
        && matches!(piece.split, Split::Rows { per } if per * piece.row_bytes >= read_bytes);
    if long { Ownership::PerRank(piece) } else { Ownership::Shared }
}

/// Adds a run, joined to the one before where both touch and have the same owner.
fn extend(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last)
            if last.file == run.file
                && last.range.end == run.range.start
                && last.owner == run.owner =>
        {
            last.range.end = run.range.end;
        }
        _ => runs.push(run),
    }
}

/// A rank's own bytes that are fewer than a read are not worth one: they join the pool.
fn pool_short_runs(runs: &mut Vec<Run>, read_bytes: u64) {
    let mut pooled = Vec::with_capacity(runs.len());
    for run in runs.drain(..) {
        let owner = run.owner.filter(|_| run.range.len() >= read_bytes);
        extend(&mut pooled, Run { owner, ..run });
    }
    *runs = pooled;
}

/// Each rank reads whatever it needs and does not have.
fn without_exchange(
    placement: &Placement,
    checkpoint: &Checkpoint,
    policy: &Policy,
    have: &[Have],
) -> Assignment {
    let reads = (0..placement.parallel.tp()).zip(have).map(|(rank, have)| {
        let runs = runs_of(placement, checkpoint, policy.gap_bytes, rank, have);
        let cuts = runs.iter().flat_map(|run| {
            let ranges = checkpoint.cut(run.file, run.range, policy.read_bytes);
            ranges.map(|range| Read::new(run.file, range, None))
        });
        cuts.collect()
    });
    Assignment { reads: reads.collect(), rounds: 0, settled: vec![RankSet::default()] }
}

/// What `rank` needs and does not have, as runs in file order; no gap between two of them that is read through holds what
/// it has.
fn runs_of(
    placement: &Placement,
    checkpoint: &Checkpoint,
    gap_bytes: u64,
    rank: u32,
    have: &Have,
) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut apart = false;
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        let (file, start) = (tensor.file, tensor.file_range.start);
        for piece in placement.pieces_of(id as TensorId) {
            let Some(part) = piece.members.part(rank) else {
                continue;
            };
            // of a row-parallel weight, the whole rows: never a read per row
            let ((r0, r1), (c0, c1)) = piece.part_rect(part);
            if r0 == r1 || c0 == c1 {
                continue;
            }
            let rows = ByteRange::new(start + r0 * piece.row_bytes, start + r1 * piece.row_bytes);
            for (range, there) in have.file(file).cut(rows) {
                let within = ByteRange::new(range.start - start, range.end - start);
                if piece.extent_in(part, within).is_none() {
                    continue;
                }
                let run = Run { file, range, owner: Some(rank) };
                if there {
                    apart = true;
                } else if std::mem::take(&mut apart) {
                    runs.push(run);
                } else {
                    join(&mut runs, run, gap_bytes);
                }
            }
        }
    }
    runs
}

/// Adds a run, joined to the one before across a gap of at most `gap_bytes`.
fn join(runs: &mut Vec<Run>, run: Run, gap_bytes: u64) {
    match runs.last_mut() {
        Some(last) if last.file == run.file && run.range.start <= last.range.end + gap_bytes => {
            last.range.end = last.range.end.max(run.range.end);
        }
        _ => runs.push(run),
    }
}
