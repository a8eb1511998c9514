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
