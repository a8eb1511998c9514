//! What a rank has, in few ranges.

use crate::{byte_range::ByteRange, checkpoint::Checkpoint, have::Have, placement::Placement};

impl Placement {
    /// `have` of `rank` with the gaps filled that hold nothing that the rank needs. What it has and what it lacks of its
    /// need stays the same, in about as many ranges as there are stretches of it, rather than one per tensor or row.
    pub fn closed(&self, checkpoint: &Checkpoint, rank: u32, have: &Have) -> Have {
        let mut closed = Have::default();
        for (file, set) in have.files() {
            let mut last: Option<ByteRange> = None;
            for &range in set.ranges() {
                last = Some(match last {
                    Some(before)
                        if !self.needs(checkpoint, rank, file, before.end..range.start) =>
                    {
                        ByteRange::new(before.start, range.end)
                    }
                    Some(before) => {
                        closed.insert(file, before);
                        range
                    }
                    None => range,
                });
            }
            last.into_iter().for_each(|range| closed.insert(file, range));
        }
        closed
    }

    /// Whether `rank` needs any byte of `range` of `file`.
    fn needs(
        &self,
        checkpoint: &Checkpoint,
        rank: u32,
        file: u32,
        range: std::ops::Range<u64>,
    ) -> bool {
        let range = ByteRange::new(range.start, range.end);
        checkpoint.tensors_in(file, range).any(|(tensor, within, _)| {
            self.pieces_of(tensor).iter().any(|piece| {
                let part = piece.members.part(rank);
                part.is_some_and(|part| piece.extent_in(part, within).is_some())
            })
        })
    }
}
