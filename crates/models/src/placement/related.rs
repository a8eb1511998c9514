//! Which parameters can only be loaded together.

use crate::{
    checkpoint::{Checkpoint, TensorId},
    declare::ParamId,
    have::{Have, Kept},
    placement::Placement,
};

impl Placement {
    /// What stays of the parameters where those that are `changed` are loaded again: a parameter goes with all that it is
    /// computed from or into, as steps may work in place, and with all that lie in one tensor with it, as whole tensors are
    /// what is had or not.
    pub fn kept(&self, checkpoint: &Checkpoint, changed: &[bool]) -> Kept {
        let mut groups = Groups::new(self.params.len());
        for finish in &self.finishes {
            groups.join(finish.inputs().into_iter().chain(finish.outputs()));
        }
        let tensors = || (0..checkpoint.tensors.len()).map(|id| self.pieces_of(id as TensorId));
        for pieces in tensors() {
            groups.join(pieces.iter().map(|piece| piece.param));
        }
        let mut touched = vec![false; self.params.len()];
        for (param, _) in changed.iter().enumerate().filter(|(_, changed)| **changed) {
            touched[groups.of(param as ParamId) as usize] = true;
        }
        let stays = |param| !touched[groups.of(param as ParamId) as usize];
        let params: Vec<bool> = (0..self.params.len()).map(stays).collect();
        let (mut have, mut bytes) = (Have::default(), 0);
        for (tensor, pieces) in checkpoint.tensors.iter().zip(tensors()) {
            // all of its parameters are in one group
            if pieces.first().is_some_and(|piece| params[piece.param as usize]) {
                have.insert(tensor.file, tensor.file_range);
                bytes += tensor.file_range.len();
            }
        }
        Kept { params, have, bytes }
    }
}

/// Parameters in groups, each named by one of its own.
struct Groups(Vec<ParamId>);

impl Groups {
    fn new(params: usize) -> Self {
        Self((0..params as ParamId).collect())
    }

    fn of(&self, mut param: ParamId) -> ParamId {
        while self.0[param as usize] != param {
            param = self.0[param as usize];
        }
        param
    }

    /// Makes one group of those of `params`; ways to its name stay short, as they are cut here.
    fn join(&mut self, params: impl Iterator<Item = ParamId>) {
        let mut first = None;
        for param in params {
            let (group, mut at) = (self.of(param), param);
            while at != group {
                at = std::mem::replace(&mut self.0[at as usize], group);
            }
            let first = *first.get_or_insert(group);
            self.0[group as usize] = first;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        byte_range::ByteRange,
        checkpoint::CheckpointFile,
        declare::{Param, Split},
        dtype::Dtype,
        header::HeaderEntry,
        options::{KernelLayout, Layout},
        parallel::{Members, Parallel},
        placement::PlacedPiece,
        transform::{Finish, KvScales},
    };

    /// Tensors of four bytes each, which land in the parameters that are listed for each; two steps.
    ///
    /// ```text
    /// tensor      0    1      2    3    4
    ///             │   ╱ ╲     │    │
    /// parameter   0  1   2    3    4 ──step── 5    6 ──step── 7
    /// ```
    fn placement() -> (Placement, Checkpoint) {
        const LANDS: [&[ParamId]; 5] = [&[0], &[1, 2], &[3], &[4], &[]];
        let entry = |number: u64| HeaderEntry {
            name: format!("tensor {number}"),
            dtype: Dtype::F32,
            shape: vec![1],
            data_offsets: ByteRange::new(4 * number, 4 * number + 4),
        };
        let file = CheckpointFile { name: "file".into(), bytes: 120, header_bytes: 100 };
        let headers = vec![(file, (0..5).map(entry).collect())];
        let parallel = Parallel::new(1, 1).unwrap();
        let param = |number: u32| Param {
            name: format!("param {number}"),
            dtype: Dtype::F32,
            shape: vec![1],
            bytes: 4,
            filled_bytes: 4,
            layer: None,
            derived: false,
        };
        let piece = |param: &ParamId| PlacedPiece {
            param: *param,
            from: Dtype::F32,
            to: Dtype::F32,
            row_bytes: 4,
            rows: (0, 1),
            split: Split::Rows { per: 1 },
            members: Members::replicated(parallel),
            target_offset: 0,
            target_stride: 4,
        };
        let step = |k, v| Finish::KvScales(KvScales { k, v, v_given: false });
        let first_piece = (0..=LANDS.len()).map(|t| LANDS[..t].concat().len() as u32);
        let placement = Placement {
            parallel,
            layout: Layout { kernels: KernelLayout::None, derive: true },
            params: (0..8).map(param).collect(),
            finishes: vec![step(4, 5), step(7, 6)],
            aliases: Vec::new(),
            skipped: Vec::new(),
            discarded: Vec::new(),
            warnings: Vec::new(),
            pieces: LANDS.concat().iter().map(piece).collect(),
            first_piece: first_piece.collect(),
        };
        (placement, Checkpoint::new(headers, None).unwrap())
    }

    #[test]
    fn what_shares_a_tensor_or_a_step_goes_together() {
        let (placement, checkpoint) = placement();
        for (changed, goes, bytes) in [
            (&[][..], &[][..], &[(100, 116)][..]),
            (&[0], &[0], &[(104, 116)]),
            (&[1], &[1, 2], &[(100, 104), (108, 116)]),
            (&[2], &[1, 2], &[(100, 104), (108, 116)]),
            (&[4], &[4, 5], &[(100, 112)]),
            (&[5], &[4, 5], &[(100, 112)]),
            // nothing of theirs is read
            (&[6], &[6, 7], &[(100, 116)]),
            (&[2, 3, 7], &[1, 2, 3, 6, 7], &[(100, 104), (112, 116)]),
        ] {
            let flags: Vec<bool> = (0..8).map(|param| changed.contains(&param)).collect();
            let kept = placement.kept(&checkpoint, &flags);
            let stays: Vec<bool> = (0..8).map(|param| !goes.contains(&param)).collect();
            assert_eq!(kept.params, stays, "{changed:?}");
            let ranges: Vec<_> =
                kept.have.file(0).ranges().iter().map(|r| (r.start, r.end)).collect();
            assert_eq!(ranges, bytes, "{changed:?}");
            assert_eq!(kept.bytes, bytes.iter().map(|(start, end)| end - start).sum::<u64>());
            assert!(!kept.is_empty() && !Kept::default().has(0) && Kept::default().is_empty());
        }
        assert!(placement.kept(&checkpoint, &[true; 8]).is_empty());
    }

    #[test]
    fn groups_are_joined_in_whatever_order() {
        let mut groups = Groups::new(6);
        for pair in [[4, 2], [0, 5], [2, 5], [5, 4]] {
            groups.join(pair.into_iter());
        }
        let of = [0, 1, 2, 3, 4, 5].map(|param| groups.of(param));
        assert!([2, 4, 5].iter().all(|p| of[*p] == of[0]) && of[1] == 1 && of[3] == 3);
    }
}
