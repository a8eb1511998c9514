//! What a rank decides while it loads: events in, effects out; no I/O, no clock.
//!
//! A finish runs once, when all its inputs are complete; the rank is ready when its reads are placed, every parameter
//! has landed, every finish is done, and what it exchanges with other processes has been taken on both sides.

use longshore_models::{declare::ParamId, placement::Placement};

/// What the actor has to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Run this finish (index into the placement's finishes).
    Run(u32),
    /// Tell the coordinator that everything is complete.
    BecomeReady,
}

/// The decisions of one load on one rank.
#[derive(Debug)]
pub struct LoadState {
    /// Finishes that wait for each parameter.
    waiting: Vec<Vec<u32>>,
    /// Inputs that each finish still waits for.
    inputs_left: Vec<u32>,
    params_left: usize,
    finishes_left: usize,
    reads_done: bool,
    exchange_done: bool,
}

impl LoadState {
    /// The state before the first byte; the effects are those of parameters to which nothing will land on this rank
    /// (`landing_bytes` is 0). `exchange`: bytes are exchanged with other processes.
    pub fn start(
        placement: &Placement,
        landing_bytes: &[u64],
        exchange: bool,
    ) -> (Self, Vec<Effect>) {
        let mut waiting = vec![Vec::new(); placement.params.len()];
        let mut inputs_left = Vec::with_capacity(placement.finishes.len());
        for (number, finish) in placement.finishes.iter().enumerate() {
            let inputs = finish.inputs();
            inputs_left.push(inputs.len() as u32);
            for input in inputs {
                waiting[input as usize].push(number as u32);
            }
        }
        let raw = |p: &usize| !placement.params[*p].derived;
        let mut state = Self {
            waiting,
            inputs_left,
            params_left: (0..placement.params.len()).filter(raw).count(),
            finishes_left: placement.finishes.len(),
            reads_done: false,
            exchange_done: !exchange,
        };
        let mut effects = Vec::new();
        for p in (0..placement.params.len()).filter(raw).filter(|&p| landing_bytes[p] == 0) {
            effects.extend(state.param_landed(p as ParamId));
        }
        (state, effects)
    }

    /// The last byte of a parameter has landed.
    pub fn param_landed(&mut self, param: ParamId) -> Vec<Effect> {
        self.params_left -= 1;
        let mut effects = Vec::new();
        for finish in std::mem::take(&mut self.waiting[param as usize]) {
            let left = &mut self.inputs_left[finish as usize];
            *left -= 1;
            if *left == 0 {
                effects.push(Effect::Run(finish));
            }
        }
        effects.extend(self.ready());
        effects
    }

    /// A finish has run.
    pub fn finish_done(&mut self) -> Vec<Effect> {
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
