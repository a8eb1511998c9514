//! The number of requests in flight, as a function of what they bring. No clock, no lock: time is handed in.
//!
//! Time is cut into epochs. An epoch ends when it is long enough and as many requests have ended as may be in flight, so
//! that its rate is that of the present number. The number doubles while that helps, then settles; from time to time a
//! neighbouring number is tried and kept if it is better. A storage that asks for less (429, 503) is given two thirds at
//! once, and one more per epoch afterwards.
//!
//! * FLO-1: the number stays between 1 and the maximum; a number that the user sets is never left.
//! * FLO-2: it grows only in epochs in which somebody had to wait for a permit: otherwise the rate says nothing.
//! * FLO-3: a burst of refusals counts once per epoch.

use std::time::Duration;

/// Decides how many requests may be in flight.
#[derive(Debug, Clone)]
pub(crate) struct FlowControl {
    limit: usize,
    max: usize,
    /// Set by the user.
    fixed: bool,
    phase: Phase,
    epoch: Epoch,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Doubling; the rate of the epoch before, with half as many.
    Doubling { before: Option<f64> },
    /// Kept for some epochs. `rate` is what this number brings, smoothed.
    Settled { rate: f64, epochs: u32, next: Direction },
    /// A neighbour is being tried.
    Probing { from: usize, rate: f64, direction: Direction },
    /// After a refusal: one more per epoch, up to where it was refused.
    Recovering { ceiling: usize },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Direction {
    Up,
    Down,
}

#[derive(Debug, Clone, Copy, Default)]
struct Epoch {
    start: Duration,
    bytes: u64,
    completed: usize,
    waited: bool,
    refused: bool,
}

/// Shorter epochs measure the scheduler rather than the storage.
const EPOCH_MIN: Duration = Duration::from_millis(200);
/// Doubling goes on while it brings this much.
const DOUBLING_GAIN: f64 = 1.15;
/// A neighbour is kept if it brings this much more (up), or at least this much (down).
const UP_GAIN: f64 = 1.05;
const DOWN_KEEP: f64 = 0.99;
/// Epochs between two probes.
const PROBE_EVERY: u32 = 8;
/// Where the search begins: enough for one fast connection's worth on anything, too few to offend anybody.
const START: usize = 8;

impl FlowControl {
    pub(crate) fn searching(max: usize) -> FlowControl {
        let max = max.max(1);
        let limit = START.min(max);
        FlowControl {
            limit,
            max,
            fixed: false,
            phase: Phase::Doubling { before: None },
            epoch: Epoch::default(),
        }
    }

    pub(crate) fn fixed(limit: usize) -> FlowControl {
        let limit = limit.max(1);
        FlowControl { fixed: true, limit, max: limit, ..FlowControl::searching(limit) }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Somebody has to wait for a permit.
    pub(crate) fn waited(&mut self) {
        self.epoch.waited = true;
    }

    /// The storage asks for fewer requests.
    pub(crate) fn refused(&mut self, now: Duration) {
        if self.fixed || self.epoch.refused {
            return;
        }
        let ceiling = self.limit;
        self.limit = (self.limit * 2 / 3).max(1);
        self.phase = Phase::Recovering { ceiling };
        self.epoch = Epoch { start: now, refused: true, ..Epoch::default() };
    }

    /// A request ended well; `bytes` have come since the last call.
    pub(crate) fn completed(&mut self, bytes: u64, now: Duration) {
        self.epoch.bytes += bytes;
        self.epoch.completed += 1;
        let length = now.saturating_sub(self.epoch.start);
        if self.fixed || length < EPOCH_MIN || self.epoch.completed < self.limit {
            return;
        }
        let rate = self.epoch.bytes as f64 / length.as_secs_f64();
        if self.epoch.waited {
            self.step(rate);
        }
        self.epoch = Epoch { start: now, ..Epoch::default() };
    }

    fn step(&mut self, rate: f64) {
        let full = self.limit;
        match self.phase {
            Phase::Doubling { before } => {
                let helped = before.is_none_or(|before| rate >= before * DOUBLING_GAIN);
                if helped && full < self.max {
                    self.limit = (full * 2).min(self.max);
                    self.phase = Phase::Doubling { before: Some(rate) };
                } else {
                    // what did not help is taken back by half: some in reserve hide the gaps between requests
                    if !helped {
                        self.limit = (full * 3 / 4).max(1);
                    }
                    self.settle(rate, Direction::Up);
                }
            }
            Phase::Settled { rate: known, epochs, next } => {
                let known = 0.7 * known + 0.3 * rate;
                if epochs < PROBE_EVERY {
                    self.phase = Phase::Settled { rate: known, epochs: epochs + 1, next };
                } else {
                    self.probe(full, known, next);
                }
            }
            Phase::Probing { from, rate: known, direction } => {
                let (keep, next) = match direction {
                    Direction::Up => (rate >= known * UP_GAIN, Direction::Down),
                    Direction::Down => (rate >= known * DOWN_KEEP, Direction::Up),
                };
                if keep {
                    self.settle(rate, direction);
                } else {
                    self.limit = from;
                    self.settle(known, next);
                }
            }
            Phase::Recovering { ceiling } => {
                self.limit = (full + 1).min(self.max);
                if self.limit >= ceiling {
                    self.settle(rate, Direction::Up);
                }
            }
        }
    }

    fn settle(&mut self, rate: f64, next: Direction) {
        self.phase = Phase::Settled { rate, epochs: 0, next };
    }

    fn probe(&mut self, from: usize, rate: f64, direction: Direction) {
        let step = (from / 4).max(1);
        self.limit = match direction {
            Direction::Up => (from + step).min(self.max),
            Direction::Down => from.saturating_sub(step).max(1),
        };
        self.phase = if self.limit == from {
            let next = if direction == Direction::Up { Direction::Down } else { Direction::Up };
            Phase::Settled { rate, epochs: 0, next }
        } else {
            Phase::Probing { from, rate, direction }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs against a storage that brings `rate(limit)` bytes a second, for `seconds`; requests of 8 MiB.
    fn run(
        control: &mut FlowControl,
        now: &mut Duration,
        seconds: f64,
        rate: impl Fn(usize) -> f64,
    ) {
        const REQUEST: u64 = 8 << 20;
        let end = *now + Duration::from_secs_f64(seconds);
        while *now < end {
            *now += Duration::from_secs_f64(REQUEST as f64 / rate(control.limit()));
            control.waited();
            control.completed(REQUEST, *now);
        }
    }

    /// Each connection brings 100 MB/s, all together at most 5 GB/s.
    fn wide(limit: usize) -> f64 {
        (limit as f64 * 1e8).min(5e9)
    }

    #[test]
    fn grows_to_what_the_storage_gives() {
        let (mut control, mut now) = (FlowControl::searching(128), Duration::ZERO);
        run(&mut control, &mut now, 20.0, wide);
        assert!((50..=96).contains(&control.limit()), "{}", control.limit());
    }

    #[test]
    fn stays_small_where_one_connection_fills_the_link() {
        let (mut control, mut now) = (FlowControl::searching(128), Duration::ZERO);
        run(&mut control, &mut now, 60.0, |_| 1e9);
        assert!(control.limit() <= 12, "{}", control.limit());
    }

    #[test]
    fn leaves_what_makes_it_slower() {
        let (mut control, mut now) = (FlowControl::searching(128), Duration::ZERO);
        // more than 16 connections disturb each other
        run(&mut control, &mut now, 60.0, |limit| {
            if limit <= 16 { limit as f64 * 1e8 } else { 1.6e9 * 16.0 / limit as f64 }
        });
        assert!((10..=20).contains(&control.limit()), "{}", control.limit());
    }

    #[test]
    fn follows_a_storage_that_becomes_better() {
        let (mut control, mut now) = (FlowControl::searching(128), Duration::ZERO);
        run(&mut control, &mut now, 20.0, |limit| (limit as f64 * 1e8).min(1e9));
        let before = control.limit();
        run(&mut control, &mut now, 60.0, wide);
        assert!(control.limit() > before + 10, "{before} {}", control.limit());
    }

    #[test]
    fn refusals_cost_a_third_once_per_epoch_and_are_recovered_from() {
        let (mut control, mut now) = (FlowControl::searching(128), Duration::ZERO);
        run(&mut control, &mut now, 10.0, wide);
        let before = control.limit();
        for _ in 0..50 {
            control.refused(now);
        }
        assert_eq!(control.limit(), before * 2 / 3);
        run(&mut control, &mut now, 30.0, wide);
        assert!(control.limit() >= before * 9 / 10, "{before} {}", control.limit());
    }

    #[test]
    fn never_below_one_and_never_above_the_maximum() {
        let (mut control, mut now) = (FlowControl::searching(20), Duration::ZERO);
        run(&mut control, &mut now, 30.0, wide);
        assert_eq!(control.limit(), 20);
        for _ in 0..100 {
            control.refused(now);
            run(&mut control, &mut now, 0.5, wide);
            control.refused(now);
            assert!(control.limit() >= 1);
        }
    }

    #[test]
    fn epochs_without_waiting_say_nothing() {
        let mut control = FlowControl::searching(128);
        for second in 1..100 {
            control.completed(1 << 30, Duration::from_secs(second));
        }
        assert_eq!(control.limit(), START);
    }

    #[test]
    fn what_the_user_sets_is_kept() {
        let (mut control, mut now) = (FlowControl::fixed(7), Duration::ZERO);
        run(&mut control, &mut now, 10.0, wide);
        control.refused(now);
        assert_eq!(control.limit(), 7);
    }
}
