//! Proves the reads of a plan before anyone trusts them. A violation is a bug of ours.

use longshore_models::{
    byte_range::ByteRange, error::PlanError, have::Have, placement::PlacedPiece,
};
use longshore_rank::protocol::{LoadPlan, Read, ReadFrom};

use crate::assignment::FormerGroup;

/// Every byte that a rank needs and does not have is in exactly one read that it takes, and no byte that it has; the rounds of
/// a rank's reads go up; what is read from parameters is there, or was in those of the `former` group.
pub(super) fn check_reads(
    load: &LoadPlan,
    have: &[Have],
    former: Option<&FormerGroup<'_>>,
) -> Result<(), PlanError> {
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
        check_source(load, have, former, reader, read)?;
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
        let load = self.load;
        let takes = |&r: &u32| (load.exchange || r == reader) && load.takes(r, read);
        for (tensor, within, _) in load.checkpoint.tensors_in(read.file, read.range) {
            let tensor_start = load.checkpoint.tensors[tensor as usize].file_range.start;
            for piece in load.placement.pieces_of(tensor) {
                for rank in piece.members.ranks().filter(takes) {
                    self.piece(rank, piece, read.file, tensor_start, within)?;
                }
            }
        }
        Ok(())
    }

    /// What `rank` takes of `within`, part of a tensor that begins at `tensor_start` in its file.
    fn piece(
        &mut self,
        rank: u32,
        piece: &PlacedPiece,
        file: u32,
        tensor_start: u64,
        within: ByteRange,
    ) -> Result<(), PlanError> {
        let Some(part) = piece.members.part(rank) else { return Ok(()) };
        let Some(extent) = piece.extent_in(part, within) else { return Ok(()) };
        let range = ByteRange::new(tensor_start + extent.start, tensor_start + extent.end);
        let has = |(range, there): (ByteRange, bool)| {
            let within = ByteRange::new(range.start - tensor_start, range.end - tensor_start);
            there && piece.extent_in(part, within).is_some()
        };
        let landed = &mut self.ranks[rank as usize];
        let again = (file, range.start) < landed.end;
        if again || self.have[rank as usize].file(file).cut(range).any(has) {
            let found = format!("bytes of {range} of file {file} land again");
            return Err(inconsistent(rank, found));
        }
        landed.bytes += piece.bytes_in(part, extent);
        landed.end = (file, range.end);
        Ok(())
    }
}

/// A rank that reads from its parameters has all of the read there, for others to take.
fn check_source(
    load: &LoadPlan,
    have: &[Have],
    former: Option<&FormerGroup<'_>>,
    reader: u32,
    read: &Read,
) -> Result<(), PlanError> {
    match read.from {
        ReadFrom::Storage => return Ok(()),
        ReadFrom::Former => {
            let having = former.map(|f| f.having(&load.checkpoint, read.file, read.range));
            if having.is_some_and(|having| having.contains(reader)) {
                return Ok(());
            }
            let found = format!("it did not have {} of file {}", read.range, read.file);
            return Err(inconsistent(reader, found));
        }
        ReadFrom::Parameters => {}
    }
    let mut held = 0;
    for (tensor, within, _) in load.checkpoint.tensors_in(read.file, read.range) {
        for piece in load.placement.pieces_of(tensor) {
            held += piece.members.part(reader).map_or(0, |part| piece.bytes_in(part, within));
        }
    }
    let landed = have[reader as usize].file(read.file).covers(read.range);
    if landed && held == read.range.len() && read.round.is_some() {
        return Ok(());
    }
    let found = format!("it has {held} bytes of {} of file {}", read.range, read.file);
    Err(inconsistent(reader, found))
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

#[cfg(test)]
mod tests {
    use longshore_models::have::RankSet;

    use super::*;
    use crate::{
        discover::discover,
        error::LoadError,
        plan::{Plan, PlanOptions, storage_bytes},
        synth::Synth,
    };

    const LOST: usize = 1;

    /// What is wrong with the reads, and how they get to be so.
    type Damage = (&'static str, fn(&mut LoadPlan));

    /// A plan for four ranks, and what they have when all has landed and one was lost.
    fn lost_at_the_end() -> (Plan, Vec<Have>) {
        let directory = tempfile::tempdir().unwrap();
        Synth::new("llama", "bf16").write(directory.path()).unwrap();
        let options = PlanOptions { tp: 4, read_bytes: Some(8 << 10), ..PlanOptions::default() };
        let plan = Plan::new(discover(directory.path()).unwrap(), &options).unwrap();
        let mut have = vec![Have::default(); 4];
        for tensor in &plan.checkpoint().tensors {
            have.iter_mut().for_each(|have| have.insert(tensor.file, tensor.file_range));
        }
        have[LOST] = Have::default();
        (plan, have)
    }

    #[test]
    fn what_is_left_is_read_by_the_replacement_alone() {
        let (plan, have) = lost_at_the_end();
        let rest = plan.rest(&have).unwrap();
        let stored = storage_bytes(&rest);
        let needed = plan.placement().landing_bytes(LOST as u32).iter().sum::<u64>();
        assert!(stored[LOST] > needed / 2);
        assert_eq!(stored.iter().sum::<u64>(), stored[LOST]);
        let first = plan.rest(&vec![Have::default(); 4]).unwrap();
        assert_eq!(first.reads, plan.load.reads);
        assert_eq!(storage_bytes(&first).iter().sum::<u64>(), plan.needed_bytes);
    }

    #[test]
    fn what_ranks_say_that_they_have_is_checked() {
        let (plan, mut have) = lost_at_the_end();
        assert!(matches!(plan.rest(&have[1..]), Err(LoadError::Plan { .. })));
        let norm = plan.checkpoint().get("model.norm.weight").unwrap();
        let start = norm.file_range.start;
        have[LOST].insert(norm.file, ByteRange::new(start, start + 2));
        plan.rest(&have).unwrap();
        have[LOST].insert(norm.file, ByteRange::new(start, start + 3));
        let error = plan.rest(&have).unwrap_err();
        let LoadError::Plan { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("within an element"), "{source}");
        // past the end of the file, there is nothing to be cut
        have[LOST] = Have::default();
        have[LOST].insert(norm.file, ByteRange::new(1 << 40, (1 << 40) + 1));
        have[LOST].insert(99, ByteRange::new(5, 7));
        plan.rest(&have).unwrap();
    }

    /// Each way in which reads can be wrong is found.
    #[test]
    fn wrong_reads_are_found() {
        let (plan, have) = lost_at_the_end();
        let damages: [Damage; 9] = [
            ("left out", |load| load.reads[LOST].truncate(9)),
            ("twice", |load| {
                let read = load.reads[LOST][0];
                load.reads[LOST].insert(0, read);
            }),
            ("twice, by another", |load| {
                let read = load.reads[LOST][0];
                load.reads[0].insert(0, read);
            }),
            ("shorter", |load| load.reads[LOST][3].range.end -= 2),
            ("for those that have it", |load| {
                let read = load.reads[0].iter().position(|r| r.from == ReadFrom::Parameters);
                load.reads[0][read.unwrap()].settled = 0;
            }),
            ("for nobody", |load| {
                load.settled.push(RankSet::from_iter(0..4));
                load.reads[LOST][0].settled = load.settled.len() as u32 - 1;
            }),
            ("from parameters that are empty", |load| {
                load.reads[LOST][0].from = ReadFrom::Parameters;
            }),
            ("in one round", |load| {
                let rounds = load
                    .reads
                    .iter_mut()
                    .find(|r| r.iter().filter(|read| read.round.is_some()).count() > 1);
                rounds.unwrap().iter_mut().for_each(|r| r.round = r.round.map(|_| 0));
            }),
            ("too long", |load| load.read_bytes_max = 4 << 10),
        ];
        for (what, damage) in damages {
            let mut load = plan.rest(&have).unwrap();
            check_reads(&load, &have, None).unwrap();
            damage(&mut load);
            let checked = check_reads(&load, &have, None);
            assert!(matches!(checked, Err(PlanError::Inconsistent { .. })), "{what}: {checked:?}");
        }
    }

    #[test]
    fn what_is_taken_over_was_there() {
        let (old, mut have) = lost_at_the_end();
        let ranks = [0, 2, 3];
        have.remove(LOST);
        let new = old.for_fewer(3).unwrap();
        let had = FormerGroup::new(old.placement(), &ranks, &have);
        let nothing = vec![Have::default(); 2];
        let mut load = new.after(&old, &ranks, &have).unwrap();
        check_reads(&load, &nothing, Some(&had)).unwrap();
        let wrong = |load: &LoadPlan, had: Option<&FormerGroup<'_>>| {
            matches!(check_reads(load, &nothing, had), Err(PlanError::Inconsistent { .. }))
        };
        assert!(wrong(&load, None));
        let stored = load.reads[0].iter().position(|read| read.from == ReadFrom::Storage).unwrap();
        load.reads[0][stored].from = ReadFrom::Former;
        assert!(wrong(&load, Some(&had)));
        load.reads[0][stored].from = ReadFrom::Storage;
        check_reads(&load, &nothing, Some(&had)).unwrap();
        let less = vec![have[0].clone(), have[1].clone(), Have::default()];
        let had = FormerGroup::new(old.placement(), &ranks, &less);
        assert!(wrong(&load, Some(&had)));
    }
}
