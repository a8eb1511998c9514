//! The parameters of one rank, which know of each byte whether it was placed.

use std::{ops::Range, sync::Arc};

use longshore_kernels::host::cast::cast;
use longshore_models::{
    declare::ParamId,
    have::Have,
    placement::{Placement, Span},
};
use longshore_rank::scatter::tensors_in;
use xxhash_rust::xxh3::Xxh3;

use crate::simulation::base::Base;

/// One rank's parameters.
#[derive(Debug)]
pub(super) struct Memory {
    base: Arc<Base>,
    rank: u32,
    params: Vec<Vec<u8>>,
    placed: Vec<Vec<bool>>,
    missing: Vec<u64>,
    /// Whether each finish was run.
    finished: Vec<bool>,
}

impl Memory {
    pub(super) fn new(base: &Arc<Base>, rank: u32) -> Self {
        let placement = base.placement();
        // one beyond those that hold parameters has none
        let params = if rank < placement.parallel.tp() { &placement.params[..] } else { &[] };
        let sizes = || params.iter().map(|param| param.bytes as usize);
        Self {
            base: Arc::clone(base),
            rank,
            params: sizes().map(|bytes| vec![0; bytes]).collect(),
            placed: sizes().map(|bytes| vec![false; bytes]).collect(),
            missing: placement.landing_bytes(rank),
            finished: vec![false; placement.finishes.len()],
        }
    }

    /// Places a span of `bytes`, what was read or has arrived.
    ///
    /// # Errors
    /// A byte of it is there already, or is not the right one.
    pub(super) fn place(&mut self, span: &Span, bytes: &[u8]) -> Result<(), String> {
        let (param, rank) = (span.param as usize, self.rank);
        let name = &self.base.placement().params[param].name;
        let mut wrong = None;
        for_each_row(span, |from, to| {
            let converted = converted(span, &bytes[from]);
            if self.placed[param][to.clone()].contains(&true) {
                wrong = Some(format!("rank {rank}: bytes {to:?} of {name} are placed again"));
            } else if self.base.raw[rank as usize][param][to.clone()] != converted {
                wrong = Some(format!("rank {rank}: wrong bytes are placed at {to:?} of {name}"));
            }
            self.placed[param][to.clone()].fill(true);
            self.params[param][to].copy_from_slice(&converted);
        });
        wrong.map_or(Ok(()), Err)
    }

    /// Counts what a span has placed; whether it was the last of its parameter.
    pub(super) fn landed(&mut self, span: &Span) -> bool {
        let missing = &mut self.missing[span.param as usize];
        let before = *missing;
        *missing = before.saturating_sub(span.target_bytes());
        before > 0 && *missing == 0
    }

    /// Where bytes belong in it.
    pub(super) fn placement(&self) -> &Placement {
        self.base.placement()
    }

    /// Copies a span's bytes back to where they came from.
    pub(super) fn copy_back(&self, span: &Span, source: &mut [u8]) {
        for_each_row(span, |from, to| {
            source[from].copy_from_slice(&self.params[span.param as usize][to]);
        });
    }

    /// How many bytes of the span's were placed.
    pub(super) fn placed_bytes(&self, span: &Span) -> u64 {
        let mut bytes = 0;
        for_each_row(span, |_, to| {
            bytes += self.placed[span.param as usize][to].iter().filter(|placed| **placed).count();
        });
        bytes as u64
    }

    /// Runs a finish.
    ///
    /// # Errors
    /// It was run before, or an input is not complete.
    pub(super) fn finish(&mut self, number: usize) -> Result<(), String> {
        let (placement, rank) = (self.base.placement(), self.rank);
        let inputs = placement.finishes[number].inputs();
        let missing: u64 = inputs.iter().map(|input| self.missing[*input as usize]).sum();
        let again = std::mem::replace(&mut self.finished[number], true);
        run_finish(placement, number, &mut self.params);
        match (again, missing) {
            (true, _) => Err(format!("rank {rank}: finish {number} is run again")),
            (_, 0) => Ok(()),
            (_, left) => {
                Err(format!("rank {rank}: finish {number} runs, {left} bytes are missing"))
            }
        }
    }

    /// # Errors
    /// Something of what is said to be there was not placed.
    pub(super) fn check_have(&self, have: &Have) -> Result<(), String> {
        let checkpoint = self.base.plan.checkpoint();
        for (file, ranges) in have.files() {
            for range in ranges.ranges() {
                let mut missing = 0;
                for (tensor, within, _) in tensors_in(checkpoint, file, *range) {
                    self.base.placement().spans(
                        tensor,
                        within,
                        |r| r == self.rank,
                        |span| {
                            missing += span.target_bytes() - self.placed_bytes(&span);
                        },
                    );
                }
                if missing > 0 {
                    let rank = self.rank;
                    return Err(format!(
                        "rank {rank} says it has {range}, not {missing} bytes of it"
                    ));
                }
            }
        }
        Ok(())
    }

    /// # Errors
    /// A parameter is not what it has to be.
    pub(super) fn check(&self) -> Result<(), String> {
        let expected = self.base.complete.get(self.rank as usize).into_iter().flatten();
        let complete = self.params.iter().zip(expected);
        match complete.enumerate().find(|(_, (found, expected))| found != expected) {
            None => Ok(()),
            Some((param, _)) => {
                let (name, missing) =
                    (&self.base.placement().params[param].name, self.missing[param]);
                Err(format!("rank {}: {name} is wrong, {missing} bytes are missing", self.rank))
            }
        }
    }
}

/// Each run of a span: where its bytes come from, where they go.
pub(super) fn for_each_row(span: &Span, mut each: impl FnMut(Range<usize>, Range<usize>)) {
    let (width, target_width) = (span.width as usize, span.target_width() as usize);
    for row in 0..span.rows {
        let from = (span.source_offset + row * span.source_stride) as usize;
        let to = (span.target_offset + row * span.target_stride) as usize;
        each(from..from + width, to..to + target_width);
    }
}

/// The bytes of one run as the parameter holds them.
pub(super) fn converted(span: &Span, run: &[u8]) -> Vec<u8> {
    let Some((from, to)) = span.cast else { return run.to_vec() };
    let mut target = vec![0; span.target_width() as usize];
    assert!(cast(run, from, &mut target, to), "no conversion from {from} to {to}");
    target
}

/// Changes the outputs of a finish by all bytes of its inputs: never twice the same, whether it works in place or not.
pub(super) fn run_finish(placement: &Placement, number: usize, params: &mut [Vec<u8>]) {
    let finish = &placement.finishes[number];
    let mut digest = Xxh3::with_seed(number as u64);
    let inputs: Vec<ParamId> = finish.inputs();
    inputs.iter().for_each(|input| digest.update(&params[*input as usize]));
    let key = digest.digest().to_le_bytes();
    for output in finish.outputs() {
        for (i, byte) in params[output as usize].iter_mut().enumerate() {
            *byte = byte.wrapping_mul(5).wrapping_add(key[i % 8]) ^ i as u8;
        }
    }
}
