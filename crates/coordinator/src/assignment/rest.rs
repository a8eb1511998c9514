//! Who reads what of a load that was interrupted: needs = placement − have. Pure.
//!
//! Whoever needs a byte and has it is settled: nobody is handed a byte twice, so a read ends where what any of the
//! ranks that need it has begins or ends. Bytes that are missing somewhere are one of three things:
//!
//! | who has them of those that need them | who reads them | who takes them |
//! |---|---|---|
//! | nobody | as in a first load, a rank that misses something nearby | everybody |
//! | some, in another form | one of those that miss them | those that miss them |
//! | some, in their parameters as they are in the file | one of those, from its parameters | those that miss them |
//!
//! ```text
//! file          | q rows of rank 0 | q rows of rank 1 | o: 64 KiB of each row to rank 0, 1, 0, 1, … | norm |
//! rank 1 lost                      |  rank 1 reads    |    rank 1      rank 1        run by run      | rank 0 hands it on
//! ```
//!
//! So what the ranks that were not lost have is never read again, except for short gaps between the runs of a
//! row-parallel weight.

mod sets;

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::{Checkpoint, Tensor, TensorId},
    declare::Split,
    have::{Have, RankSet},
    placement::{PlacedPiece, Placement},
};
use longshore_rank::protocol::{Read, ReadFrom};

use super::{Assignment, Policy, Share, assign, least, segments, without_exchange};
use sets::{SetId, Sets};

/// Splits what `placement` needs and is in none of `have`, one for each rank, over its ranks.
///
/// What a rank has cuts no element. Equal values give equal assignments, on whichever rank.
///
/// # Panics
/// When `have` is not of as many ranks as `placement`.
pub fn assign_rest(
    placement: &Placement,
    checkpoint: &Checkpoint,
    policy: &Policy,
    have: &[Have],
) -> Assignment {
    assert_eq!(have.len(), placement.parallel.tp() as usize, "what each rank has");
    // fewer ends, fewer cuts
    let closed = |(rank, have)| placement.closed(checkpoint, rank, have);
    let have: Vec<Have> = (0..).zip(have).map(closed).collect();
    if have.iter().all(Have::is_empty) {
        assign(placement, checkpoint, policy)
    } else if policy.exchange {
        with_exchange(placement, checkpoint, policy, &have)
    } else {
        without_exchange(placement, checkpoint, policy, &have)
    }
}

/// Contiguous bytes that ranks miss.
#[derive(Debug, Clone, Copy)]
struct Run {
    file: u32,
    range: ByteRange,
    /// The ranks that miss bytes of it.
    takers: SetId,
    had: Had,
}

/// Which of the ranks that need bytes have them already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Had {
    /// None.
    Nowhere,
    /// Some, but none in the form in which they are in the file; and gaps that are read through.
    Somewhere,
    /// These ranks, in their parameters.
    By(SetId),
}

fn with_exchange(
    placement: &Placement,
    checkpoint: &Checkpoint,
    policy: &Policy,
    have: &[Have],
) -> Assignment {
    let mut survey = Survey {
        have,
        row_gap_bytes: policy.row_gap_bytes,
        unchanged: placement.unchanged(),
        sets: Sets::default(),
        runs: Vec::new(),
        cuts: Vec::new(),
    };
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        if !tensor.file_range.is_empty() {
            survey.tensor(tensor, placement.pieces_of(id as TensorId));
        }
    }
    let Survey { mut sets, runs, .. } = survey;
    let runs = pool_short_runs(runs, &mut sets, policy.read_bytes);
    give_out(placement, checkpoint, policy, &sets, &runs)
}

/// Looks through tensors for bytes that are missing.
struct Survey<'a> {
    have: &'a [Have],
    row_gap_bytes: u64,
    unchanged: Vec<bool>,
    sets: Sets,
    /// In file order.
    runs: Vec<Run>,
    /// Reused by [`Survey::cut`].
    cuts: Vec<u64>,
}

impl Survey<'_> {
    fn tensor(&mut self, tensor: &Tensor, pieces: &[PlacedPiece]) {
        for piece in pieces {
            match piece.split {
                Split::Rows { .. } => {
                    (0..piece.members.parts()).for_each(|part| self.rows(tensor, piece, part));
                }
                Split::Cols { .. } => self.cols(tensor, piece),
            }
        }
    }

    /// One part of a piece that is cut by rows: contiguous, and all of it on each of its holders.
    fn rows(&mut self, tensor: &Tensor, piece: &PlacedPiece, part: u32) {
        let ((r0, r1), _) = piece.part_rect(part);
        if r0 >= r1 {
            return;
        }
        let range = within_file(tensor, r0 * piece.row_bytes, r1 * piece.row_bytes);
        let holders = piece.members.holders(part);
        let cuts = self.cut(tensor.file, range, holders.clone());
        for range in segments(&cuts) {
            let has = |rank: &u32| self.has(*rank, tensor.file, range);
            let missing: RankSet = holders.clone().filter(|rank| !has(rank)).collect();
            let having: RankSet = holders.clone().filter(has).collect();
            let had = if having.is_empty() {
                Had::Nowhere
            } else if self.is_as_in_file(piece) {
                Had::By(self.sets.id(&having))
            } else {
                Had::Somewhere
            };
            self.push(tensor.file, range, &missing, had);
        }
        self.cuts = cuts;
    }

    /// A piece that is cut by columns: every rank has a part of each row.
    fn cols(&mut self, tensor: &Tensor, piece: &PlacedPiece) {
        let (r0, r1) = piece.rows;
        let range = within_file(tensor, r0 * piece.row_bytes, r1 * piece.row_bytes);
        let cuts = self.cut(tensor.file, range, piece.members.ranks());
        for range in segments(&cuts) {
            let within = within_tensor(tensor, range);
            let needing = || {
                let needs = |part| piece.extent_in(part, within).is_some();
                piece.members.ranks().filter(move |r| piece.members.part(*r).is_some_and(needs))
            };
            let has = |rank: &u32| self.has(*rank, tensor.file, range);
            let missing: RankSet = needing().filter(|rank| !has(rank)).collect();
            if needing().any(|rank| has(&rank)) {
                self.narrowed(tensor, piece, within, &missing);
            } else {
                self.push(tensor.file, range, &missing, Had::Nowhere);
            }
        }
        self.cuts = cuts;
    }

    /// What `missing` ranks need of `within`, part of a tensor that is cut by columns, some of which others have: each run
    /// on its own where the gaps between them are long, else whatever lies between the first byte and the last.
    fn narrowed(
        &mut self,
        tensor: &Tensor,
        piece: &PlacedPiece,
        within: ByteRange,
        missing: &RankSet,
    ) {
        let parts = (0..piece.members.parts()).map(|part| {
            let takers = piece.members.holders(part).filter(|rank| missing.contains(*rank));
            (part, takers.collect::<RankSet>())
        });
        let parts: Vec<(u32, RankSet)> = parts.filter(|(_, takers)| !takers.is_empty()).collect();
        if longest_gap(piece, parts.iter().map(|(part, _)| *part)) <= self.row_gap_bytes {
            let extents = || parts.iter().filter_map(|(part, _)| piece.extent_in(*part, within));
            let start = extents().map(|extent| extent.start).min();
            if let Some((start, end)) = start.zip(extents().map(|extent| extent.end).max()) {
                let range = within_file(tensor, start, end);
                self.push(tensor.file, range, missing, Had::Somewhere);
            }
            return;
        }
        for row in within.start / piece.row_bytes..within.end.div_ceil(piece.row_bytes) {
            let row = ByteRange::new(row * piece.row_bytes, (row + 1) * piece.row_bytes);
            let Some(row) = row.intersect(&within) else { continue };
            for (part, takers) in &parts {
                if let Some(run) = piece.extent_in(*part, row) {
                    let range = within_file(tensor, run.start, run.end);
                    self.push(tensor.file, range, takers, Had::Somewhere);
                }
            }
        }
    }

    /// The ends of `range` of `file`, and where within it what any of `ranks` has begins or ends; in order.
    fn cut(&mut self, file: u32, range: ByteRange, ranks: impl Iterator<Item = u32>) -> Vec<u64> {
        let mut cuts = std::mem::take(&mut self.cuts);
        cuts.clear();
        cuts.extend([range.start, range.end]);
        for rank in ranks {
            let parts = self.have[rank as usize].file(file).cut(range);
            cuts.extend(parts.skip(1).map(|(part, _)| part.start));
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }

    /// Whether a rank has `range`, of which it has all or nothing.
    fn has(&self, rank: u32, file: u32, range: ByteRange) -> bool {
        self.have[rank as usize].file(file).cut(range).next().is_some_and(|(_, there)| there)
    }

    /// Whether what lands of `piece` stays in the parameter as it is in the file.
    fn is_as_in_file(&self, piece: &PlacedPiece) -> bool {
        let contiguous = piece.from == piece.to && piece.target_stride == piece.row_bytes;
        contiguous && self.unchanged[piece.param as usize]
    }

    /// Adds a run, joined to the one before where both touch and are dealt with alike.
    fn push(&mut self, file: u32, range: ByteRange, takers: &RankSet, had: Had) {
        if takers.is_empty() {
            return;
        }
        let run = Run { file, range, takers: self.sets.id(takers), had };
        match self.runs.last_mut() {
            Some(last) if touch(last, &run) && last.takers == run.takers => {
                match alike(last.had, had) {
                    Some(had) => (last.range.end, last.had) = (range.end, had),
                    None => self.runs.push(run),
                }
            }
            _ => self.runs.push(run),
        }
    }
}

fn touch(a: &Run, b: &Run) -> bool {
    a.file == b.file && a.range.end == b.range.start
}

/// As what runs of the same takers can be joined: bytes that nobody else needs may lie among those that others have.
fn alike(a: Had, b: Had) -> Option<Had> {
    match (a, b) {
        (Had::Nowhere | Had::Somewhere, Had::Nowhere | Had::Somewhere) if a != b => {
            Some(Had::Somewhere)
        }
        _ => (a == b).then_some(a),
    }
}

fn within_file(tensor: &Tensor, start: u64, end: u64) -> ByteRange {
    ByteRange::new(tensor.file_range.start + start, tensor.file_range.start + end)
}

fn within_tensor(tensor: &Tensor, range: ByteRange) -> ByteRange {
    ByteRange::new(range.start - tensor.file_range.start, range.end - tensor.file_range.start)
}

/// The longest gap between the runs of `parts`, in order, of a piece that is cut by columns, on from row to row.
fn longest_gap(piece: &PlacedPiece, parts: impl Iterator<Item = u32>) -> u64 {
    let mut columns = parts.map(|part| piece.part_rect(part).1);
    let Some((first, mut end)) = columns.next() else { return 0 };
    let mut gap = 0;
    for (start, next_end) in columns {
        (gap, end) = (gap.max(start - end), next_end);
    }
    gap.max(first + piece.row_bytes - end)
}

/// Joins runs that nobody has, except those that are worth a read of the only rank that needs them.
fn pool_short_runs(runs: Vec<Run>, sets: &mut Sets, read_bytes: u64) -> Vec<Run> {
    let mut pooled: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        let joins = |run: &Run| {
            let direct = sets[run.takers].sole().is_some() && run.range.len() >= read_bytes;
            run.had == Had::Nowhere && !direct
        };
        match pooled.last_mut() {
            Some(last) if touch(last, &run) && joins(last) && joins(&run) => {
                last.range.end = run.range.end;
                last.takers = sets.union(last.takers, run.takers);
            }
            _ => pooled.push(run),
        }
    }
    pooled
}

/// Cuts `runs` into reads and gives each to whoever has least to do of those that can.
fn give_out(
    placement: &Placement,
    checkpoint: &Checkpoint,
    policy: &Policy,
    sets: &Sets,
    runs: &[Run],
) -> Assignment {
    let ranks = placement.parallel.tp();
    let mut share = Share::new(ranks as usize);
    // what only one rank can read, later in the files as well
    for run in runs.iter().filter(|run| !matches!(run.had, Had::By(_))) {
        if let Some(rank) = sets[run.takers].sole() {
            share.loads[rank as usize] += run.range.len();
        }
    }
    let (mut settled, mut sent) = (Sets::default(), vec![0; ranks as usize]);
    for run in runs {
        let takers = &sets[run.takers];
        let settled_id = match run.had {
            Had::Nowhere => Sets::EMPTY,
            _ => settled.id(&(0..ranks).filter(|rank| !takers.contains(*rank)).collect()),
        };
        for range in checkpoint.cut(run.file, run.range, policy.read_bytes) {
            let mut read = Read { settled: settled_id, ..Read::new(run.file, range, None) };
            if let Had::By(holders) = run.had {
                let reader = least(&sets[holders], &sent);
                sent[reader] += range.len();
                read.from = ReadFrom::Parameters;
                share.push(reader, read, true);
            } else if let Some(rank) = takers.sole() {
                share.push(rank as usize, read, false);
            } else {
                let reader = least(takers, &share.loads);
                share.loads[reader] += range.len();
                let takes = |rank| rank != reader as u32 && !settled[settled_id].contains(rank);
                let handed_on = anyone_needs(placement, checkpoint, &read, takes);
                share.push(reader, read, handed_on);
            }
        }
    }
    share.assignment(settled.into_vec())
}

/// Whether any rank that is `wanted` needs a byte of `read`.
fn anyone_needs(
    placement: &Placement,
    checkpoint: &Checkpoint,
    read: &Read,
    wanted: impl Fn(u32) -> bool,
) -> bool {
    checkpoint.tensors_in(read.file, read.range).any(|(tensor, within, _)| {
        placement.pieces_of(tensor).iter().any(|piece| {
            let needs = |part| piece.extent_in(part, within).is_some();
            let mut ranks = piece.members.ranks().filter(|&rank| wanted(rank));
            ranks.any(|rank| piece.members.part(rank).is_some_and(needs))
        })
    })
}

#[cfg(test)]
mod tests;
