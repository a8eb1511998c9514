//! What has to hold of an assignment, said byte by byte and with none of the planner's arithmetic.
//!
//! 1. A rank takes each byte that it needs and does not have once, and none that it needs and has.
//! 2. All ranks that miss a byte get it by the same read (with exchange).
//! 3. A byte that a rank has in its parameters as in the file is handed over, by a rank that has it; every other is read
//!    from storage, by a rank that misses something of the same tensor where others have theirs.
//! 4. Nothing is read from storage that nobody takes, but for gaps of at most `row_gap_bytes` between what is taken (with
//!    exchange).
//! 5. A rank that misses nothing reads nothing from storage.
//! 6. A read has a round exactly if another rank takes of it; a rank's rounds go up; no read is too long; reads are in the order
//!    of the files.

use longshore_models::{
    byte_range::ByteRange,
    checkpoint::Checkpoint,
    declare::Split,
    have::{Have, RankSet},
    placement::{PlacedPiece, Placement},
    transform::Finish,
};
use longshore_rank::protocol::{Read, ReadFrom};

use super::takes;
use crate::assignment::{Assignment, Policy};

const NEEDED: u8 = 1;
const HAD: u8 = 2;

/// Every byte of every file.
pub(super) struct Model<'a> {
    checkpoint: &'a Checkpoint,
    /// `[rank][file][byte]`: what holds of it.
    state: Vec<Vec<Vec<u8>>>,
    /// `[rank][file][byte]`: which read brings it, 0 for none.
    brought: Vec<Vec<Vec<u32>>>,
    /// `[file][byte]`: whether it lies in parameters as it lies in the file.
    as_in_file: Vec<Vec<bool>>,
}

impl<'a> Model<'a> {
    pub(super) fn new(placement: &Placement, checkpoint: &'a Checkpoint, ranks: usize) -> Self {
        let lens = || checkpoint.files.iter().map(|file| file.bytes as usize);
        let mut this = Self {
            checkpoint,
            state: vec![lens().map(|len| vec![0; len]).collect(); ranks],
            brought: vec![lens().map(|len| vec![0; len]).collect(); ranks],
            as_in_file: lens().map(|len| vec![false; len]).collect(),
        };
        for (id, tensor) in (0..).zip(&checkpoint.tensors) {
            for piece in placement.pieces_of(id) {
                let kept = is_kept(placement, piece);
                each_byte(piece, ranks as u32, |rank, byte| {
                    let (file, at) =
                        (tensor.file as usize, (tensor.file_range.start + byte) as usize);
                    this.state[rank as usize][file][at] = NEEDED;
                    this.as_in_file[file][at] = kept;
                });
            }
        }
        this
    }

    fn set_had(&mut self, have: &[Have]) {
        for (files, have) in self.state.iter_mut().zip(have) {
            for (file, bytes) in (0..).zip(files) {
                bytes.iter_mut().for_each(|byte| *byte &= NEEDED);
                for range in have.file(file).ranges() {
                    bytes[range.start as usize..range.end as usize]
                        .iter_mut()
                        .for_each(|b| *b |= HAD);
                }
            }
        }
    }

    /// Bytes that a rank needs.
    pub(super) fn needed_bytes(&self, rank: usize) -> u64 {
        self.state[rank].iter().flatten().filter(|byte| **byte & NEEDED > 0).count() as u64
    }

    /// Bytes that a rank needs and that another could hand over.
    pub(super) fn handed_over_bytes(&self, rank: usize) -> u64 {
        let mut count = 0;
        for (file, kept) in self.as_in_file.iter().enumerate() {
            let needs = |rank: usize, at: usize| self.state[rank][file][at] & NEEDED > 0;
            let others = |at| (0..self.state.len()).any(|other| other != rank && needs(other, at));
            let handed = |at: &usize| kept[*at] && needs(rank, *at) && others(*at);
            count += (0..kept.len()).filter(handed).count() as u64;
        }
        count
    }

    /// Checks all that the module says of `assignment`, made for ranks that have `have`.
    pub(super) fn check(
        &mut self,
        assignment: &Assignment,
        policy: &Policy,
        have: &[Have],
    ) -> Result<(), String> {
        self.set_had(have);
        self.brought.iter_mut().flatten().for_each(|file| file.fill(0));
        let first_load = have.iter().all(Have::is_empty);
        let (mut number, mut rounds) = (0, 0);
        for (reader, reads) in (0..).zip(&assignment.reads) {
            check_order(reads, policy).map_err(|wrong| format!("rank {reader}: {wrong}"))?;
            if !first_load {
                self.check_idle(reader, reads)?;
            }
            for read in reads {
                number += 1;
                rounds = rounds.max(read.round.map_or(0, |round| round + 1));
                let takers: Vec<u32> = (0..have.len() as u32)
                    .filter(|rank| takes(assignment, policy, reader, *rank, read))
                    .collect();
                let taking = self.bring(number, &takers, read)?;
                let others = taking.iter().any(|rank| rank != reader);
                if read.round.is_some() != others && !first_load {
                    return Err(format!("rank {reader} reads {read:?} for {taking:?}"));
                }
                let from = match read.from {
                    ReadFrom::Parameters => self.check_handed_over(reader, read),
                    ReadFrom::Storage if policy.exchange => {
                        self.check_stored(reader, number, read, policy.row_gap_bytes)
                    }
                    ReadFrom::Storage => Ok(()),
                    ReadFrom::Former => Err("there was no other group".to_owned()),
                };
                from.map_err(|wrong| format!("rank {reader} reads {read:?}: {wrong}"))?;
            }
        }
        if rounds != assignment.rounds {
            return Err(format!("{rounds} rounds of {}", assignment.rounds));
        }
        if policy.exchange {
            self.check_ends(assignment)?;
        }
        self.check_all_brought(policy)
    }

    /// Brings `takers` what they need of a read; returns which of them need anything.
    fn bring(&mut self, number: u32, takers: &[u32], read: &Read) -> Result<RankSet, String> {
        let (file, range) = place(read);
        let mut taking = RankSet::default();
        for &rank in takers {
            let state = &self.state[rank as usize][file][range.clone()];
            let brought = &mut self.brought[rank as usize][file][range.clone()];
            for (at, (state, brought)) in state.iter().zip(brought).enumerate() {
                if state & NEEDED == 0 {
                    continue;
                }
                if state & HAD > 0 || *brought > 0 {
                    return Err(format!("{read:?} brings rank {rank} byte {at} of it again"));
                }
                *brought = number;
                taking.insert(rank);
            }
        }
        Ok(taking)
    }

    /// The reader has all of it, one byte after the other, in parameters that stay as they are.
    fn check_handed_over(&self, reader: u32, read: &Read) -> Result<(), String> {
        let state = &self.state[reader as usize][read.file as usize];
        for at in read.range.start..read.range.end {
            if state[at as usize] != NEEDED | HAD {
                return Err(format!("it does not have byte {at}"));
            }
            if !self.as_in_file[read.file as usize][at as usize] {
                return Err(format!("byte {at} is not as in the file"));
            }
            if !self.misses_any(read.file, at) {
                return Err(format!("nobody misses byte {at}"));
            }
        }
        Ok(())
    }

    fn misses_any(&self, file: u32, at: u64) -> bool {
        self.state.iter().any(|files| files[file as usize][at as usize] == NEEDED)
    }

    /// What `reader` reads as the `number`th read of all is for those that take it.
    fn check_stored(
        &self,
        reader: u32,
        number: u32,
        read: &Read,
        row_gap_bytes: u64,
    ) -> Result<(), String> {
        let (file, range) = place(read);
        let states: Vec<&[u8]> = self.state.iter().map(|s| &s[file][range.clone()]).collect();
        let brought: Vec<&[u32]> = self.brought.iter().map(|b| &b[file][range.clone()]).collect();
        let (mut gap, mut someone_has) = (0, false);
        for at in 0..range.len() {
            let taken = brought.iter().any(|brought| brought[at] == number);
            gap = if taken { 0 } else { gap + 1 };
            if gap > row_gap_bytes {
                return Err(format!("nobody takes of the bytes up to {at}"));
            }
            let had = states.iter().any(|state| state[at] == NEEDED | HAD);
            if taken && had && self.as_in_file[file][range.start + at] {
                return Err(format!("byte {at} could be handed over"));
            }
            someone_has |= had;
        }
        if someone_has && !self.misses_within_tensors(reader, read) {
            return Err("others have theirs, and it misses nothing there".into());
        }
        Ok(())
    }

    /// A rank that misses nothing reads nothing from storage.
    fn check_idle(&self, rank: u32, reads: &[Read]) -> Result<(), String> {
        let reads = reads.iter().any(|read| read.from == ReadFrom::Storage);
        let misses = || self.state[rank as usize].iter().flatten().any(|byte| *byte == NEEDED);
        if reads && !misses() {
            return Err(format!("rank {rank} misses nothing, and reads"));
        }
        Ok(())
    }

    /// Each stretch of what is read from storage begins and ends with a byte that a rank is brought.
    fn check_ends(&self, assignment: &Assignment) -> Result<(), String> {
        let mut stored = Have::default();
        let reads = assignment.reads.iter().flatten();
        for read in reads.filter(|read| read.from == ReadFrom::Storage) {
            stored.insert(read.file, read.range);
        }
        for (file, ranges) in stored.files() {
            let taken = |at: u64| self.brought.iter().any(|b| b[file as usize][at as usize] > 0);
            let mut ranges = ranges.ranges().iter();
            if let Some(range) = ranges.find(|range| !taken(range.start) || !taken(range.end - 1)) {
                return Err(format!("an end of {range} of file {file} is read for nobody"));
            }
        }
        Ok(())
    }

    /// Whether `rank` misses anything of the tensors that `read` touches.
    fn misses_within_tensors(&self, rank: u32, read: &Read) -> bool {
        let touched = self.checkpoint.tensors.iter().filter(|tensor| {
            tensor.file == read.file && tensor.file_range.intersect(&read.range).is_some()
        });
        let bytes = &self.state[rank as usize][read.file as usize];
        touched
            .map(|tensor| tensor.file_range)
            .any(|ByteRange { start, end }| bytes[start as usize..end as usize].contains(&NEEDED))
    }

    /// Every rank was brought what it missed; whoever missed the same byte, by the same read.
    fn check_all_brought(&self, policy: &Policy) -> Result<(), String> {
        for file in 0..self.checkpoint.files.len() {
            let mut by = vec![0; self.as_in_file[file].len()];
            for (rank, (state, brought)) in self.state.iter().zip(&self.brought).enumerate() {
                for (at, (state, brought)) in state[file].iter().zip(&brought[file]).enumerate() {
                    if (*state == NEEDED) != (*brought > 0) {
                        return Err(format!("rank {rank}, file {file}, byte {at} is left out"));
                    }
                    if policy.exchange && *brought > 0 {
                        if by[at] > 0 && by[at] != *brought {
                            return Err(format!("two reads bring byte {at} of file {file}"));
                        }
                        by[at] = *brought;
                    }
                }
            }
        }
        Ok(())
    }

    /// `closed` has of what `rank` needs just what `have` has, in no more ranges than it takes.
    pub(super) fn check_closed(&self, rank: u32, have: &Have, closed: &Have) -> Result<(), String> {
        for (file, state) in (0..).zip(&self.state[rank as usize]) {
            let needed = |range: &std::ops::Range<u64>| {
                range.clone().any(|at| state[at as usize] & NEEDED > 0)
            };
            let ranges = closed.file(file).ranges();
            let mut covered = vec![false; state.len()];
            for range in ranges {
                covered[range.start as usize..range.end as usize].fill(true);
            }
            for (at, (state, covered)) in state.iter().zip(&covered).enumerate() {
                let had = state & HAD > 0;
                if had && !covered || state & NEEDED > 0 && *covered && !had {
                    return Err(format!("file {file}, byte {at}: {had} before"));
                }
            }
            let mut gaps = ranges.windows(2).map(|w| w[0].end..w[1].start);
            if let Some(gap) = gaps.find(|gap| !needed(gap)) {
                return Err(format!("file {file}: nothing of {gap:?} is needed"));
            }
            if ranges.len() > have.file(file).ranges().len() {
                return Err(format!("file {file}: more ranges than before"));
            }
        }
        Ok(())
    }
}

/// The file and the bytes of a read, as indices.
fn place(read: &Read) -> (usize, std::ops::Range<usize>) {
    (read.file as usize, read.range.start as usize..read.range.end as usize)
}

/// Calls `each` with every rank below `ranks` and every byte of the tensor that it needs of `piece`.
fn each_byte(piece: &PlacedPiece, ranks: u32, mut each: impl FnMut(u32, u64)) {
    for rank in 0..ranks {
        let Some(part) = piece.members.part(rank).map(u64::from) else { continue };
        for row in piece.rows.0..piece.rows.1 {
            for col in 0..piece.row_bytes {
                let mine = match piece.split {
                    Split::Rows { per } => (row - piece.rows.0) / per.max(1) == part,
                    Split::Cols { per } => col / per.max(1) == part,
                };
                if mine {
                    each(rank, row * piece.row_bytes + col);
                }
            }
        }
    }
}

/// Whether what lands of a piece can be handed over: whole rows, as they are in the file, in a parameter that nothing changes.
fn is_kept(placement: &Placement, piece: &PlacedPiece) -> bool {
    let mut untouched = placement.aliases.iter().all(|alias| alias.source != piece.param);
    for finish in &placement.finishes {
        untouched &= !finish.inputs().contains(&piece.param);
        untouched &= !matches!(finish, Finish::KvScales(scales) if scales.v == piece.param);
    }
    let rows = matches!(piece.split, Split::Rows { .. });
    untouched && rows && piece.from == piece.to && piece.target_stride == piece.row_bytes
}

fn check_order(reads: &[Read], policy: &Policy) -> Result<(), String> {
    let rounds: Vec<u32> = reads.iter().filter_map(|read| read.round).collect();
    if !rounds.windows(2).all(|w| w[0] < w[1]) {
        return Err(format!("rounds {rounds:?}"));
    }
    if let Some(read) =
        reads.iter().find(|r| r.range.len() > policy.read_bytes || r.range.is_empty())
    {
        return Err(format!("{read:?} of at most {} bytes", policy.read_bytes));
    }
    let starts: Vec<(u32, u64)> = reads.iter().map(|read| (read.file, read.range.start)).collect();
    if !starts.is_sorted() {
        return Err("reads in no order".into());
    }
    Ok(())
}
