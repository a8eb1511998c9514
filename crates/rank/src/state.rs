//! What a rank decides while it loads: events in, effects out; no I/O, no clock.
//!
//! A finish runs once, when all its inputs are complete; the rank is ready when its reads are placed, every parameter
//! has landed, every finish is done, and what it exchanges with other processes has been taken on both sides.

use longshore_models::{declare::ParamId, have::Kept, placement::Placement};

/// What the actor has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Run this finish (index into the placement's finishes).
    Run(u32),
    /// Tell the coordinator that everything is complete.
    BecomeReady,
}

/// The decisions of a load on one rank. They outlive a generation that ends before it is complete.
#[derive(Debug)]
pub struct LoadState {
    /// Finishes that wait for each parameter.
    waiting: Vec<Vec<u32>>,
    finishes: Vec<FinishState>,
    params_left: usize,
    finishes_left: usize,
    reads_done: bool,
    exchange_done: bool,
}

/// How far a finish is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FinishState {
    /// So many of its inputs are not complete.
    Waits(u32),
    /// It may run, or runs.
    Due,
    /// It has run, and must not again: it may work in place.
    Done,
}

impl LoadState {
    /// The state before the first byte; parameters to which nothing will land on this rank (`landing_bytes` is 0) are complete,
    /// those that are `kept` are finished as well.
    pub fn new(placement: &Placement, landing_bytes: &[u64], kept: &Kept) -> Self {
        let mut waiting = vec![Vec::new(); placement.params.len()];
        let mut finishes = Vec::with_capacity(placement.finishes.len());
        for (number, finish) in placement.finishes.iter().enumerate() {
            let inputs = finish.inputs();
            // whatever a step reads and writes stays together
            if inputs.iter().any(|input| kept.has(*input)) {
                finishes.push(FinishState::Done);
                continue;
            }
            finishes.push(match inputs.len() {
                0 => FinishState::Due,
                inputs => FinishState::Waits(inputs as u32),
            });
            for input in inputs {
                waiting[input as usize].push(number as u32);
            }
        }
        let lands = |p: &usize| !placement.params[*p].derived && !kept.has(*p as ParamId);
        let mut state = Self {
            waiting,
            params_left: (0..placement.params.len()).filter(lands).count(),
            finishes_left: finishes.iter().filter(|state| **state != FinishState::Done).count(),
            finishes,
            reads_done: false,
            exchange_done: false,
        };
        for p in (0..placement.params.len()).filter(lands).filter(|&p| landing_bytes[p] == 0) {
            // what is due is run when a generation begins
            let _ = state.param_landed(p as ParamId);
        }
        state
    }

    /// A generation begins; `exchange`: bytes are exchanged with other processes in it. The effects are what was due before
    /// and was not done.
    pub fn begin(&mut self, exchange: bool) -> Vec<Effect> {
        (self.reads_done, self.exchange_done) = (false, !exchange);
        let due = (0..).zip(&self.finishes).filter(|(_, state)| **state == FinishState::Due);
        due.map(|(number, _)| Effect::Run(number)).collect()
    }

    /// The last byte of a parameter has landed.
    pub fn param_landed(&mut self, param: ParamId) -> Vec<Effect> {
        self.params_left -= 1;
        let mut effects = Vec::new();
        for number in std::mem::take(&mut self.waiting[param as usize]) {
            let finish = &mut self.finishes[number as usize];
            *finish = match *finish {
                FinishState::Waits(left) if left > 1 => FinishState::Waits(left - 1),
                _ => {
                    effects.push(Effect::Run(number));
                    FinishState::Due
                }
            };
        }
        effects.extend(self.ready());
        effects
    }

    /// A finish has run.
    pub fn finish_done(&mut self, number: u32) -> Vec<Effect> {
        self.finishes[number as usize] = FinishState::Done;
        self.finishes_left -= 1;
        self.ready().into_iter().collect()
    }

    /// The rank's own reads are placed.
    pub fn reads_done(&mut self) -> Vec<Effect> {
        self.reads_done = true;
        self.ready().into_iter().collect()
    }

    /// Nothing is left to be exchanged.
    pub fn exchange_done(&mut self) -> Vec<Effect> {
        self.exchange_done = true;
        self.ready().into_iter().collect()
    }

    fn ready(&self) -> Option<Effect> {
        let done = self.reads_done
            && self.exchange_done
            && self.params_left == 0
            && self.finishes_left == 0;
        done.then_some(Effect::BecomeReady)
    }
}
