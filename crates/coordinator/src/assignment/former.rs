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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use longshore_harness::generator::{Checkpoint as Written, Family, Scheme};
    use longshore_models::error::PlanError;
    use longshore_rank::protocol::LoadPlan;

    use super::*;
    use crate::{
        discover::discover,
        error::LoadError,
        plan::{Plan, PlanOptions, storage_bytes},
    };

    fn planned(family: Family, scheme: Scheme, tp: u32, ep: u32) -> Plan {
        let directory = tempfile::tempdir().unwrap();
        Written::new(family, scheme).write(directory.path()).unwrap();
        let options = PlanOptions { tp, ep, read_bytes: Some(8 << 10), ..PlanOptions::default() };
        Plan::new(discover(directory.path()).unwrap(), &options).unwrap()
    }

    fn everything(plan: &Plan) -> Have {
        let mut have = Have::default();
        for tensor in &plan.checkpoint().tensors {
            have.insert(tensor.file, tensor.file_range);
        }
        have
    }

    /// The bytes of the files that are read from storage, and those that are handed on.
    fn bytes(load: &LoadPlan) -> [BTreeSet<(u32, u64)>; 2] {
        [ReadFrom::Storage, ReadFrom::Former].map(|from| {
            let reads = load.reads.iter().flatten().filter(|read| read.from == from);
            reads.flat_map(|r| (r.range.start..r.range.end).map(|at| (r.file, at))).collect()
        })
    }

    /// Against every byte looked at: what a rank that is left needed of it in its old share, in a parameter that nothing changes
    /// and as whole rows, is handed on; everything else that is needed is read, once.
    #[test]
    fn what_anyone_has_is_handed_on_and_everything_else_is_read() {
        for (family, scheme, tp, ep, left, tp_left) in [
            (Family::Llama, Scheme::Bf16, 4, 1, vec![0, 2, 3], 2),
            (Family::DeepseekV3, Scheme::Bf16, 4, 4, vec![0, 3], 2),
            (Family::DeepseekV3, Scheme::Fp8, 2, 1, vec![0], 1),
            (Family::DeepseekV3, Scheme::Nvfp4, 2, 2, vec![0], 1),
            (Family::KimiK25, Scheme::Int4, 4, 1, vec![0, 1, 3], 2),
        ] {
            let old = planned(family, scheme, tp, ep);
            let new = old.for_fewer(left.len() as u32).unwrap();
            assert_eq!(new.placement().parallel.tp(), tp_left, "{family:?} {scheme:?}");
            assert_eq!(new.load.reads.len(), left.len());
            let mut have = vec![everything(&old); left.len()];
            // one has not got everything
            let first = &old.checkpoint().tensors[0];
            have[0] = Have::default();
            have[0].insert(first.file, first.file_range);
            let load = new.after(&old, &left, &have).unwrap();
            let [stored, handed_on] = bytes(&load);
            assert_eq!(stored.intersection(&handed_on).count(), 0);
            assert_eq!((stored.len() + handed_on.len()) as u64, new.needed_bytes);
            assert!(left.len() == 1 || !handed_on.is_empty(), "{family:?} {scheme:?}");
            let unchanged = old.placement().unchanged();
            for (id, tensor) in old.checkpoint().tensors.iter().enumerate() {
                let pieces = old.placement().pieces_of(id as u32);
                if pieces.is_empty() {
                    continue;
                }
                let simple = pieces.iter().all(|p| {
                    let rows = matches!(p.split, Split::Rows { .. });
                    rows && p.from == p.to && unchanged[p.param as usize]
                });
                let (start, end) = (tensor.file_range.start, tensor.file_range.end);
                for at in start..end {
                    let within = ByteRange::new(at - start, at - start + 1);
                    let had = left.iter().zip(&have).any(|(rank, have)| {
                        let needs = |p: &PlacedPiece| {
                            let part = p.members.part(*rank);
                            part.is_some_and(|part| p.extent_in(part, within).is_some())
                        };
                        pieces.iter().any(needs)
                            && have.file(tensor.file).covers(ByteRange::new(at, at + 1))
                    });
                    let byte = (tensor.file, at);
                    assert_eq!(handed_on.contains(&byte), simple && had, "{} {at}", tensor.name);
                    assert_eq!(stored.contains(&byte), !(simple && had), "{} {at}", tensor.name);
                }
            }
        }
    }

    /// Whatever is left, a size is found that the model can be split over, and ranks beyond it read nothing.
    #[test]
    fn the_largest_size_that_is_left_is_taken() {
        let plan = planned(Family::Llama, Scheme::Bf16, 4, 1);
        for (left, tp) in [(4, 4), (3, 2), (2, 2), (1, 1)] {
            let fewer = plan.for_fewer(left).unwrap();
            assert_eq!(
                (fewer.placement().parallel.tp(), fewer.load.reads.len() as u32),
                (tp, left)
            );
            assert!(fewer.load.reads[tp as usize..].iter().all(Vec::is_empty));
            assert_eq!(storage_bytes(&fewer.load).iter().sum::<u64>(), plan.needed_bytes);
            let same = fewer.without_idle();
            assert_eq!((same.load.reads.len(), same.forecast.len()), (tp as usize, tp as usize));
        }
        let experts = planned(Family::DeepseekV3, Scheme::Bf16, 4, 4);
        let fewer = experts.for_fewer(3).unwrap();
        assert_eq!((fewer.placement().parallel.tp(), fewer.placement().parallel.ep()), (2, 2));
    }

    #[test]
    fn what_nobody_had_is_not_handed_on() {
        let old = planned(Family::Llama, Scheme::Bf16, 4, 1);
        let new = old.for_fewer(3).unwrap();
        let nothing = vec![Have::default(); 3];
        let load = new.after(&old, &[0, 1, 2], &nothing).unwrap();
        assert_eq!(storage_bytes(&load).iter().sum::<u64>(), new.needed_bytes);
        // a rank more or less than there are, or half an element
        assert!(matches!(new.after(&old, &[0, 1], &nothing), Err(LoadError::Plan { .. })));
        let mut half = nothing;
        let norm = old.checkpoint().get("model.norm.weight").unwrap();
        let start = norm.file_range.start;
        half[1].insert(norm.file, ByteRange::new(start, start + 3));
        let Err(LoadError::Plan { source: PlanError::Inconsistent { .. }, .. }) =
            new.after(&old, &[0, 1, 2], &half)
        else {
            panic!()
        };
    }
}
