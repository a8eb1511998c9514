//! What of the weights in memory another plan can leave as it is. Pure.
//!
//! A parameter stays where everything that it is made of is the same in both plans: the same bytes of files whose content is
//! the same, placed and finished in the same way. What it is computed from or into, and what lies in one tensor with it, stays
//! or goes with it ([`Placement::kept`]).
//!
//! ```text
//! file 1, the same  ─► q_a_proj, o_proj                    stay
//! file 2, another   ─► kv_b_proj ─► w_kc, w_vc             read, and computed, again
//! file 1, the same  ─► kv_b_proj's scales ─┘               read again: they belong to these
//! ```
//!
//! Each rank finds it out by itself: it holds what it holds, and may have a copy of the files of its own. What it keeps is
//! what it has when the load begins; of what all have, all make the plan of the rest, whose hash they compare.

use std::{collections::HashMap, time::SystemTime};

use longshore_models::{
    checkpoint::{Tensor, TensorId},
    have::Kept,
    placement::{PlacedPiece, Placement},
    transform::Finish,
};
use longshore_rank::storage::Content;

use super::Plan;

/// For each parameter whether `one` plan makes it of anything else than the `other`, where it was loaded from files that were
/// opened at `opened`.
///
/// It is the same either way round: what may stay when one is loaded over the other may stay when that is taken back.
pub(crate) fn changed(one: &Plan, other: &Plan, opened: SystemTime) -> Vec<bool> {
    let [a, b] = [one.placement(), other.placement()];
    if a.same_parameters(b).is_err() {
        // numbers of parameters mean something else
        return vec![true; a.params.len().max(b.params.len())];
    }
    let mut changed: Vec<bool> = a.params.iter().zip(&b.params).map(|(a, b)| a != b).collect();
    let mut contents = Contents { numbers: HashMap::new(), opened };
    let sources = [one, other].map(|plan| sources(plan, &contents.of(plan)));
    for (param, changed) in changed.iter_mut().enumerate() {
        let [a, b] = sources.each_ref().map(|sources| &sources[param]);
        *changed |= a.len() != b.len() || a.iter().zip(b).any(|(a, b)| !a.is(b));
    }
    mark_other_finishes(a, b, &mut changed);
    mark_other_finishes(b, a, &mut changed);
    changed
}

impl Plan {
    /// What stays in memory where what is `changed` of it is loaded by this plan.
    pub(crate) fn kept(&self, changed: &[bool]) -> Kept {
        self.placement().kept(self.checkpoint(), changed)
    }
}

/// A rectangle of a tensor that lands in a parameter.
struct Source<'a> {
    /// Which content its file has; `None`: it may be any.
    content: Option<u32>,
    tensor: &'a Tensor,
    piece: &'a PlacedPiece,
}

impl Source<'_> {
    fn is(&self, other: &Self) -> bool {
        let [a, b] = [self.tensor, other.tensor];
        self.content.is_some()
            && self.content == other.content
            && self.piece == other.piece
            && (&a.name, a.dtype, &a.shape, a.file_range)
                == (&b.name, b.dtype, &b.shape, b.file_range)
    }
}

/// What each parameter of `plan` is made of, in an order that does not depend on that of the files.
fn sources<'a>(plan: &'a Plan, contents: &[Option<u32>]) -> Vec<Vec<Source<'a>>> {
    let placement = plan.placement();
    let mut sources: Vec<Vec<Source<'_>>> = Vec::new();
    sources.resize_with(placement.params.len(), Vec::new);
    for (id, tensor) in plan.checkpoint().tensors.iter().enumerate() {
        for piece in placement.pieces_of(id as TensorId) {
            let content = contents[tensor.file as usize];
            sources[piece.param as usize].push(Source { content, tensor, piece });
        }
    }
    for sources in &mut sources {
        // pieces of one tensor stay in their order
        sources.sort_by_key(|source| (source.content, source.tensor.file_range.start));
    }
    sources
}

/// Numbers what files hold.
struct Contents {
    numbers: HashMap<Content, u32>,
    /// When those files were opened that were read.
    opened: SystemTime,
}

impl Contents {
    /// For each file of `plan` the number of its content.
    fn of(&mut self, plan: &Plan) -> Vec<Option<u32>> {
        let mut number = |content| {
            let next = self.numbers.len() as u32;
            *self.numbers.entry(content).or_insert(next)
        };
        let files = plan.identities.iter();
        files.map(|file| file.content(self.opened).map(&mut number)).collect()
    }
}

/// Marks whatever takes part in a step of `placement` that `other` has not.
fn mark_other_finishes(placement: &Placement, other: &Placement, changed: &mut [bool]) {
    let is_new = |finish: &&Finish| !other.finishes.contains(finish);
    for finish in placement.finishes.iter().filter(is_new) {
        for param in finish.inputs().into_iter().chain(finish.outputs()) {
            changed[param as usize] = true;
        }
    }
}

#[cfg(test)]
mod tests;
