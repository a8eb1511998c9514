//! Who reads what when a group goes on with fewer ranks: every rank has another share of the model than before, and bytes of
//! the new shares lie where ranks that are left had them. Pure.
//!
//! ```text
//! file             | q rows of 0 | of 1 (lost) | of 2 | of 3 |   o: columns of 0 1 2 3, row by row   | norm |
//! before           |   rank 0    |      -      |  2   |  3   |                                       | all  |
//! new rank 0 takes |  had by 0   |   storage   |      |      |  storage, as far as it needs them     | its own
//! new rank 1 takes |             |             | had by 2, 3 |                                       | its own
//! ```
//!
//! Bytes that nobody has as they are in the file come from storage: what the lost rank had alone, what a finish works on or has
//! converted, and row-parallel weights, of whose every row the lost rank had a part: storage gives whole blocks, and with the
//! lost parts the others come anyway.

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::{Checkpoint, Tensor, TensorId},
    declare::Split,
    have::{Have, RankSet},
    placement::{PlacedPiece, Placement},
};
use longshore_rank::protocol::{Read, ReadFrom};

use super::{Assignment, Policy, Share, assign, least, segments};

/// What ranks had in a former group.
#[derive(Debug)]
pub struct FormerGroup<'a> {
    placement: &'a Placement,
    ranks: &'a [u32],
    have: &'a [Have],
    unchanged: Vec<bool>,
}

impl<'a> FormerGroup<'a> {
    /// A group whose ranks held `placement`; of those that are left `ranks` are the numbers there, and `have` is what each has.
    ///
    /// # Panics
    /// When these are not as many.
    pub fn new(placement: &'a Placement, ranks: &'a [u32], have: &'a [Have]) -> Self {
        assert_eq!(ranks.len(), have.len(), "what each rank has");
        Self { placement, ranks, have, unchanged: placement.unchanged() }
    }

    /// The ranks that have all of `range` of `file` as it is there.
    pub fn having(&self, checkpoint: &Checkpoint, file: u32, range: ByteRange) -> RankSet {
        let (mut having, mut bytes) = (self.all(), 0);
        for (tensor, within, _) in checkpoint.tensors_in(file, range) {
            let start = checkpoint.tensors[tensor as usize].file_range.start;
            let holders = self.holders(tensor, file, start, within);
            having = having.iter().filter(|rank| holders.contains(*rank)).collect();
            bytes += within.len();
        }
        if bytes == range.len() { having } else { RankSet::default() }
    }

    fn all(&self) -> RankSet {
        (0..self.ranks.len() as u32).collect()
    }

    /// The ranks that have all of `within`, part of a tensor that begins at `start` of `file`, as it is there.
    fn holders(&self, tensor: TensorId, file: u32, start: u64, within: ByteRange) -> RankSet {
        let pieces = self.placement.pieces_of(tensor);
        if !pieces.iter().all(|piece| is_as_in_file(piece, &self.unchanged)) {
            return RankSet::default();
        }
        let range = ByteRange::new(start + within.start, start + within.end);
        let has = |rank: &u32| {
            let rank = *rank as usize;
            let parts = pieces.iter().filter_map(|p| Some((p, p.members.part(self.ranks[rank])?)));
            let held: u64 = parts.map(|(piece, part)| piece.bytes_in(part, within)).sum();
            held == within.len() && self.have[rank].file(file).covers(range)
        };
        self.all().iter().filter(has).collect()
    }

    /// Where within a tensor it may change who has its bytes: offsets in the file, in order, from its first byte to its end.
    fn cuts(&self, tensor: &Tensor, id: TensorId) -> Vec<u64> {
        let (start, end) = (tensor.file_range.start, tensor.file_range.end);
        let mut cuts = vec![start, end];
        for piece in self.placement.pieces_of(id) {
            for part in 0..piece.members.parts() {
                let ((r0, r1), _) = piece.part_rect(part);
                cuts.extend([r0, r1].map(|row| start + row * piece.row_bytes));
            }
        }
        for have in self.have {
            let parts = have.file(tensor.file).cut(tensor.file_range);
            cuts.extend(parts.map(|(part, _)| part.start));
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }
}

/// Whether what has landed of `piece` stays as it is in the file, whole rows of it.
fn is_as_in_file(piece: &PlacedPiece, unchanged: &[bool]) -> bool {
    let rows = matches!(piece.split, Split::Rows { .. });
    rows && piece.from == piece.to && unchanged[piece.param as usize]
}

/// Contiguous bytes, and who has them.
struct Run {
    file: u32,
    range: ByteRange,
    having: RankSet,
}

/// Splits what `placement` needs over the ranks of `former` that are left: what any of those has is handed on by it, all else is
/// read by one of those that need it. `placement` may be of fewer ranks than are left: those beyond only hand on.
pub fn assign_over(
    placement: &Placement,
    checkpoint: &Checkpoint,
    policy: &Policy,
    former: &FormerGroup<'_>,
) -> Assignment {
    if !policy.exchange {
        return assign(placement, checkpoint, policy).over(former.ranks.len());
    }
    let mut runs: Vec<Run> = Vec::new();
    for (id, tensor) in checkpoint.tensors.iter().enumerate() {
        let (id, file) = (id as TensorId, tensor.file);
        if tensor.file_range.is_empty() || placement.pieces_of(id).is_empty() {
            continue;
        }
        let start = tensor.file_range.start;
        for range in segments(&former.cuts(tensor, id)) {
            let within = ByteRange::new(range.start - start, range.end - start);
            let having = former.holders(id, file, start, within);
            match runs.last_mut() {
                Some(last)
                    if last.file == file
                        && last.range.end == range.start
                        && last.having == having =>
                {
                    last.range.end = range.end;
                }
                _ => runs.push(Run { file, range, having }),
            }
        }
    }
    give_out(placement, checkpoint, policy, former, &runs)
}

/// Cuts `runs` into reads, and gives each to whoever has least to do of those that can.
fn give_out(
    placement: &Placement,
    checkpoint: &Checkpoint,
    policy: &Policy,
    former: &FormerGroup<'_>,
    runs: &[Run],
) -> Assignment {
    let mut share = Share::new(former.ranks.len());
    let mut copied = vec![0; former.ranks.len()];
    for run in runs {
        for range in checkpoint.cut(run.file, run.range, policy.read_bytes) {
            let takers = takers(placement, checkpoint, run.file, range);
            if takers.is_empty() {
                continue;
            }
            let mut read = Read::new(run.file, range, None);
            let reader = if run.having.is_empty() {
                let reader = least(&takers, &share.loads);
                share.loads[reader] += range.len();
                reader
            } else {
                read.from = ReadFrom::Former;
                // what need not leave its rank does not
                let both: RankSet = run.having.iter().filter(|r| takers.contains(*r)).collect();
                let reader = least(if both.is_empty() { &run.having } else { &both }, &copied);
                copied[reader] += range.len();
                reader
            };
            let handed_on = takers.iter().any(|rank| rank as usize != reader);
            share.push(reader, read, handed_on);
        }
    }
    share.assignment(vec![RankSet::default()])
}

/// The ranks that need any byte of `range` of `file`.
fn takers(placement: &Placement, checkpoint: &Checkpoint, file: u32, range: ByteRange) -> RankSet {
    let mut takers = RankSet::default();
    for (tensor, within, _) in checkpoint.tensors_in(file, range) {
        for piece in placement.pieces_of(tensor) {
            let needs = |part| piece.extent_in(part, within).is_some();
            let ranks = piece.members.ranks();
            ranks
                .filter(|rank| piece.members.part(*rank).is_some_and(needs))
                .for_each(|rank| takers.insert(rank));
        }
    }
    takers
}
