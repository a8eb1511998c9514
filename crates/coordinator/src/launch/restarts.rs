//! Which ranks that failed are started again, when, how that counts, and when it is over: decisions, and nothing else.
//!
//! A rank that fails starts again by itself, while the others run on: that is a restart. Ranks that cannot go on without it
//! end as well, and the whole group would use up all restarts at once. So the failures within a second after a first one
//! are looked at together:
//!
//! * If by then every rank has failed, they count as one restart; a rank that fails more than once in that second counts
//!   each time. Ranks that were replaced earlier need not fail for this: what is left of the group that was started
//!   together has failed.
//! * Otherwise each of them counts.
//!
//! What a `longshore` command ends with by itself is its group's verdict, and final: it has replaced what could be replaced.
//!
//! Rank 0's of them ends well only when all that there was to do has been done, by every rank: what is to be started again then
//! is not, and whoever has not left some seconds later does not leave by itself.
//!
//! While it is open which it will be, ranks are started again only as far as the number allows if each counts; the others
//! are held until the second is over.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::{
    FinalLines,
    ending::{Cause, Gone},
};

/// Failures within this time after a first one may be one failure of the group.
const TOGETHER: Duration = Duration::from_secs(1);

/// Before a rank starts again that was not lost before: what it left is killed with it, and needs a moment to let go of its
/// port and its memory.
const PAUSE_FIRST: Duration = Duration::from_millis(50);

/// Before it starts again after its second loss; doubled for each that follows, up to the longest.
const PAUSE: Duration = Duration::from_millis(500);

/// The longest time before a restart.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// From the end of rank 0 of a `longshore` command until the others must have left: they have nothing to do but to give back memory.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);

/// The state of every rank of this host, and what has failed so far.
#[derive(Debug)]
pub(super) struct Restarts {
    max: u32,
    lines: FinalLines,
    ranks: BTreeMap<u32, Rank>,
    /// What counted before the open second.
    counted: u32,
    /// The failures since the last first one.
    open: Option<Open>,
    causes: Vec<Cause>,
    /// As [`Restarts::made`] says.
    made: u32,
    /// Whether the others go on without a rank that has failed.
    shrinks: bool,
    over: bool,
    /// When all must have left, if nothing is left to be done.
    leave_by: Option<Instant>,
}

#[derive(Debug)]
struct Rank {
    state: State,
    /// How often it was lost.
    losses: u32,
    /// It was started again by itself, after the others.
    is_replacement: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// It ended well.
    Done,
    /// It failed, and the others go on without it.
    LeftBehind,
    /// It is to start.
    Due(Instant),
    /// It failed, and may not start unless all fail.
    Held,
}

#[derive(Debug)]
struct Open {
    until: Instant,
    /// In their order, each with how often its rank has failed within this second.
    failures: Vec<(u32, Gone)>,
}

/// A rank that is to be started again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Again {
    pub(super) gone: Gone,
    pub(super) pause: Duration,
    /// The how-manieth restart this is.
    pub(super) number: u32,
    /// It counts once for all ranks.
    pub(super) together: bool,
}

impl Restarts {
    /// All `ranks` run, and may be started again `max` times together.
    pub(super) fn new(ranks: impl Iterator<Item = u32>, max: u32, lines: FinalLines) -> Self {
        let rank = || Rank { state: State::Running, losses: 0, is_replacement: false };
        Self {
            max,
            lines,
            ranks: ranks.map(|number| (number, rank())).collect(),
            counted: 0,
            open: None,
            causes: Vec::new(),
            made: 0,
            shrinks: false,
            over: false,
            leave_by: None,
        }
    }

    /// Whether the others go on without a rank that has failed, unless it is rank 0.
    pub(super) fn shrinking(self, shrinks: bool) -> Self {
        Self { shrinks, ..self }
    }

    /// Takes note of those that were found ended in one look, in their order, and returns which are started again because of
    /// it.
    pub(super) fn ended(&mut self, found: &[Gone], now: Instant) -> Vec<Again> {
        self.look(now);
        for gone in found.iter().filter(|gone| !gone.end.is_failure()) {
            self.with_rank(gone.rank, |rank| rank.state = State::Done);
        }
        for gone in found.iter().filter(|gone| gone.end.is_failure()) {
            if self.is_late(gone) {
                tracing::warn!("rank {} {} when its work was done", gone.rank, gone.end);
                self.with_rank(gone.rank, |rank| rank.state = State::Done);
            } else if self.shrinks && gone.rank != 0 && !self.over {
                self.left_behind(*gone);
            } else if !self.over {
                self.failed(*gone, now);
            }
        }
        let done = |gone: &Gone| gone.rank == 0 && !gone.end.is_failure();
        if self.lines == FinalLines::One && found.iter().any(done) {
            self.is_done(now);
        }
        if self.over { Vec::new() } else { self.start_again(now) }
    }

    /// Rank 0 has made its report, so nothing is started any more.
    fn is_done(&mut self, now: Instant) {
        self.leave_by = Some(now + LEAVE_WITHIN);
        for rank in self.ranks.values_mut() {
            if matches!(rank.state, State::Due(_) | State::Held) {
                rank.state = State::Done;
            }
        }
    }

    /// Ends the open second if it is time.
    pub(super) fn look(&mut self, now: Instant) {
        if self.open.as_ref().is_none_or(|open| now < open.until) {
            return;
        }
        // those that are held would be too many
        self.over |= self.ranks.values().any(|rank| rank.state == State::Held);
        if !self.over {
            self.close();
        }
    }

    /// The ranks whose time has come, which run from now on, each with how often it was started again.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(u32, u32)> {
        let mut due = Vec::new();
        for (number, rank) in &mut self.ranks {
            if matches!(rank.state, State::Due(at) if at <= now) {
                rank.state = State::Running;
                due.push((*number, rank.losses));
            }
        }
        due
    }

    /// When there is something to be done, if nothing happens until then.
    pub(super) fn next(&self) -> Option<Instant> {
        let at = |rank: &Rank| match rank.state {
            State::Due(at) => Some(at),
            State::Held => self.open.as_ref().map(|open| open.until),
            State::Running | State::Done | State::LeftBehind => None,
        };
        self.ranks.values().filter_map(at).min()
    }

    /// When those that are left are to be ended, with nothing left to be done.
    pub(super) fn leave_by(&self) -> Option<Instant> {
        self.leave_by
    }

    /// Whether nothing is started again any more, and the group is to end.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// How many restarts were made, or are about to be.
    pub(super) fn made(&self) -> u32 {
        self.made
    }

    /// What has failed, as far as it counted, in order. The last is what could not be made good, if it is over.
    pub(super) fn causes(mut self) -> Vec<Cause> {
        self.close();
        self.causes
    }

    /// Of `longshore` commands none ends well before the work of all ranks is done; what is left is rank 0's report.
    fn is_late(&self, gone: &Gone) -> bool {
        self.lines == FinalLines::One && gone.rank != 0 && self.one_is_done()
    }

    fn one_is_done(&self) -> bool {
        self.ranks.values().any(|rank| rank.state == State::Done)
    }

    fn left_behind(&mut self, gone: Gone) {
        tracing::warn!("rank {} {}; the others go on without it", gone.rank, gone.end);
        self.with_rank(gone.rank, |rank| rank.state = State::LeftBehind);
        self.causes.push(Cause { first: gone, others: Vec::new() });
        self.over = self.ranks.values().all(|rank| rank.state == State::LeftBehind);
    }

    fn failed(&mut self, gone: Gone, now: Instant) {
        let open = self.open.get_or_insert(Open { until: now + TOGETHER, failures: Vec::new() });
        let earlier = open.failures.iter().filter(|(_, other)| other.rank == gone.rank).count();
        open.failures.push((earlier as u32, gone));
        let rounds = open.rounds();
        self.with_rank(gone.rank, |rank| {
            rank.state = State::Held;
            rank.losses += 1;
        });
        // where one has ended well, another process would find nobody
        let verdict =
            self.lines == FinalLines::One && (gone.end.is_verdict() || self.one_is_done());
        self.over = verdict || self.counted.saturating_add(rounds) > self.max;
    }

    /// Lets those start that are held, if there are not too many.
    fn start_again(&mut self, now: Instant) -> Vec<Again> {
        let Some(open) = &self.open else { return Vec::new() };
        let together = self.all_have_failed(open);
        let count = if together { open.rounds() } else { open.failures.len() as u32 };
        let number = self.counted.saturating_add(count);
        if number > self.max {
            return Vec::new();
        }
        self.made = number;
        let several = together && open.failures.len() as u32 > count;
        let mut again = Vec::new();
        for (_, gone) in &open.failures {
            // a rank that failed twice is held for the last time
            let last = open.failures.iter().rfind(|(_, other)| other.rank == gone.rank);
            let is_last = last.is_some_and(|(_, other)| other.process == gone.process);
            let Some(rank) = self.ranks.get_mut(&gone.rank).filter(|_| is_last) else { continue };
            if rank.state == State::Held {
                let pause = pause(rank.losses);
                rank.state = State::Due(now + pause);
                again.push(Again { gone: *gone, pause, number, together: several });
            }
        }
        again
    }

    fn all_have_failed(&self, open: &Open) -> bool {
        let has_failed = |number| open.failures.iter().any(|(_, gone)| gone.rank == number);
        self.ranks.iter().all(|(number, rank)| {
            rank.state == State::Done || rank.is_replacement || has_failed(*number)
        })
    }

    /// Counts what has failed in the open second.
    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        let together = self.all_have_failed(&open);
        if together {
            for round in 0..open.rounds() {
                let in_round = open.failures.iter().filter(|(of, _)| *of == round);
                let mut in_round = in_round.map(|(_, gone)| *gone);
                if let Some(first) = in_round.next() {
                    self.causes.push(Cause { first, others: in_round.collect() });
                }
            }
            self.counted = self.counted.saturating_add(open.rounds());
            for rank in self.ranks.values_mut() {
                rank.is_replacement = false;
            }
        } else {
            for (_, gone) in open.failures {
                self.causes.push(Cause { first: gone, others: Vec::new() });
                self.counted = self.counted.saturating_add(1);
                self.with_rank(gone.rank, |rank| rank.is_replacement = true);
            }
        }
    }

    fn with_rank(&mut self, number: u32, change: impl FnOnce(&mut Rank)) {
        if let Some(rank) = self.ranks.get_mut(&number) {
            change(rank);
        }
    }
}

impl Open {
    /// How often the rank has failed that has failed most.
    fn rounds(&self) -> u32 {
        self.failures.iter().map(|(earlier, _)| earlier + 1).max().unwrap_or(0)
    }
}

fn pause(losses: u32) -> Duration {
    match losses {
        0 | 1 => PAUSE_FIRST,
        // 2^6 × 0.5 s is more than the longest
        more => (PAUSE * 2u32.pow((more - 2).min(6))).min(PAUSE_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ending::End, *};

    const KILLED: End = End::Killed(libc::SIGKILL);
    const FAILED: End = End::Exited(1);

    /// A group, its processes numbered as they are started, and a clock.
    struct Story {
        restarts: Restarts,
        start: Instant,
        ms: u64,
        processes: usize,
    }

    impl Story {
        fn new(ranks: u32, max: u32) -> Self {
            Self::with_lines(ranks, max, FinalLines::Each)
        }

        fn with_lines(ranks: u32, max: u32, lines: FinalLines) -> Self {
            let restarts = Restarts::new(0..ranks, max, lines);
            Self { restarts, start: Instant::now(), ms: 0, processes: 0 }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.ms)
        }

        /// `ranks` end at `ms`; the ranks that start again for it, with their pauses in milliseconds and numbers.
        fn at(&mut self, ms: u64, ranks: &[u32], end: End) -> Vec<(u32, u128, u32)> {
            self.ms = ms;
            self.restarts.look(self.now());
            self.restarts.due(self.now());
            let mut gone = Vec::new();
            for rank in ranks {
                gone.push(Gone { process: self.processes, rank: *rank, end, told: false });
                self.processes += 1;
            }
            let again = self.restarts.ended(&gone, self.now());
            again.iter().map(|a| (a.gone.rank, a.pause.as_millis(), a.number)).collect()
        }

        fn next_ms(&self) -> Option<u128> {
            self.restarts.next().map(|at| (at - self.start).as_millis())
        }

        /// The ranks that failed, by cause.
        fn causes(self) -> Vec<Vec<u32>> {
            let ranks = |cause: Cause| {
                [&[cause.first], &cause.others[..]].concat().iter().map(|gone| gone.rank).collect()
            };
            self.restarts.causes().into_iter().map(ranks).collect()
        }
    }

    #[test]
    fn a_lost_rank_starts_again_alone_at_once_and_later_more_slowly() {
        let mut story = Story::new(3, 9);
        let mut ms = 0;
        for (number, pause) in
            [50, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000].into_iter().enumerate()
        {
            assert_eq!(story.at(ms, &[1], KILLED), [(1, pause, number as u32 + 1)]);
            let due = ms as u128 + pause;
            assert_eq!(story.next_ms(), Some(due));
            story.ms = due as u64 - 1;
            assert_eq!(story.restarts.due(story.now()), []);
            story.ms += 1;
            assert_eq!(story.restarts.due(story.now()), [(1, number as u32 + 1)]);
            assert_eq!(story.next_ms(), None);
            ms = due as u64 + 2000;
        }
        assert!(!story.restarts.is_over());
        // another rank's first loss would be fast, but they count together
        assert_eq!(story.at(ms, &[2], KILLED), []);
        assert!(story.restarts.is_over());
        assert_eq!(story.restarts.made(), 9);
        assert_eq!(story.causes().concat(), [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
    }

    /// The ranks that cannot go on without the lost one end a little later.
    #[test]
    fn a_group_that_fails_together_uses_one_restart() {
        let mut story = Story::new(4, 2);
        assert_eq!(story.at(0, &[2], KILLED), [(2, 50, 1)]);
        assert_eq!(story.at(200, &[0], FAILED), [(0, 50, 2)]);
        // too many, if the last one goes on
        assert_eq!(story.at(300, &[1], FAILED), []);
        assert_eq!(story.next_ms(), Some(1000));
        assert_eq!(story.at(400, &[3], FAILED), [(1, 50, 1), (3, 50, 1)]);
        assert_eq!(story.restarts.made(), 1);
        // and again, not as fast
        let again = story.at(5000, &[0, 1, 2, 3], FAILED);
        assert_eq!(again, [(0, 500, 2), (1, 500, 2), (2, 500, 2), (3, 500, 2)]);
        assert_eq!(story.at(9000, &[3], KILLED), []);
        assert!(story.restarts.is_over());
        assert_eq!(story.restarts.made(), 2);
        assert_eq!(story.causes(), [vec![2, 0, 1, 3], vec![0, 1, 2, 3], vec![3]]);
    }

    #[test]
    fn ranks_that_are_held_start_if_all_fail_and_end_the_group_otherwise() {
        let mut story = Story::new(3, 1);
        assert_eq!(story.at(0, &[0], KILLED), [(0, 50, 1)]);
        assert_eq!(story.at(900, &[1], KILLED), []);
        assert!(!story.restarts.is_over());
        assert_eq!(story.next_ms(), Some(1000));
        story.ms = 1000;
        story.restarts.look(story.now());
        assert!(story.restarts.is_over());
        assert_eq!(story.restarts.made(), 1);
        assert_eq!(story.causes(), [[0], [1]]);
    }

    #[test]
    fn failures_that_are_further_apart_count_each() {
        let mut story = Story::new(2, 2);
        assert_eq!(story.at(0, &[0], KILLED), [(0, 50, 1)]);
        assert_eq!(story.at(1000, &[1], KILLED), [(1, 50, 2)]);
        assert_eq!(story.at(2000, &[1], KILLED), []);
        assert!(story.restarts.is_over());
        assert_eq!(story.causes(), [[0], [1], [1]]);
    }

    /// They notice after a while; the replacement of the one that they miss waits for them.
    #[test]
    fn what_is_left_of_a_group_fails_together() {
        let mut story = Story::new(4, 2);
        assert_eq!(story.at(0, &[2], KILLED), [(2, 50, 1)]);
        assert_eq!(story.at(60_000, &[0, 1], FAILED), []);
        let again = story.at(60_500, &[3], FAILED);
        assert_eq!(again, [(0, 50, 2), (1, 50, 2), (3, 50, 2)]);
        assert_eq!(story.causes(), [vec![2], vec![0, 1, 3]]);
    }

    /// As many restarts as were asked for, however fast they are used up.
    #[test]
    fn a_rank_that_fails_twice_in_a_second_counts_twice() {
        let mut story = Story::new(2, 2);
        assert_eq!(story.at(0, &[0, 1], FAILED), [(0, 50, 1), (1, 50, 1)]);
        assert_eq!(story.at(100, &[0, 1], FAILED), [(0, 500, 2), (1, 500, 2)]);
        assert_eq!(story.at(700, &[1], FAILED), []);
        assert!(story.restarts.is_over());
        assert_eq!(story.causes(), [vec![0, 1], vec![0, 1], vec![1]]);
    }

    #[test]
    fn a_rank_that_has_ended_well_is_not_missed() {
        let mut story = Story::new(3, 1);
        assert_eq!(story.at(0, &[1], End::Exited(0)), []);
        assert_eq!(story.next_ms(), None);
        assert_eq!(story.at(100, &[0], FAILED), [(0, 50, 1)]);
        assert_eq!(story.at(120, &[2], FAILED), [(2, 50, 1)]);
        assert!(!story.restarts.is_over());
    }

    #[test]
    fn without_restarts_the_first_failure_is_the_last() {
        let mut story = Story::new(3, 0);
        assert_eq!(story.at(0, &[0, 2], FAILED), []);
        assert!(story.restarts.is_over());
        assert_eq!(story.restarts.made(), 0);
        assert_eq!(story.causes(), [[0]]);
    }

    #[test]
    fn what_is_refused_is_not_tried_again() {
        let mut story = Story::with_lines(2, 9, FinalLines::One);
        assert_eq!(story.at(0, &[1], KILLED).len(), 1);
        assert_eq!(story.at(2000, &[1], End::Exited(2)), []);
        assert!(story.restarts.is_over());
        assert_eq!((story.restarts.made(), story.causes()), (1, vec![vec![1], vec![1]]));
        let mut story = Story::new(2, 9);
        assert_eq!(story.at(0, &[1], End::Exited(2)).len(), 1);
    }

    #[test]
    fn others_go_on_without_a_rank_unless_it_is_rank_0_or_the_last() {
        let shrinking = |ranks| {
            let mut story = Story::with_lines(ranks, 0, FinalLines::One);
            story.restarts = story.restarts.shrinking(true);
            story
        };
        let mut story = shrinking(4);
        assert_eq!(story.at(0, &[2], KILLED), []);
        assert_eq!(story.at(100, &[1], End::Exited(1)), []);
        assert_eq!(story.next_ms(), None);
        assert!(!story.restarts.is_over());
        assert_eq!(story.at(200, &[0, 3], End::Exited(0)), []);
        assert!(!story.restarts.is_over());
        let mut story = shrinking(3);
        story.at(0, &[2], KILLED);
        story.at(100, &[0], KILLED);
        assert!(story.restarts.is_over());
        assert_eq!(story.causes(), [[2], [0]]);
        // a host of which no rank is left
        let mut story = shrinking(3);
        story.restarts.ranks.remove(&0);
        story.at(0, &[1], KILLED);
        assert!(!story.restarts.is_over());
        story.at(5, &[2], FAILED);
        assert!(story.restarts.is_over());
    }

    /// Its successor would find nobody.
    #[test]
    fn nothing_is_started_any_more_when_rank_0_has_made_its_report() {
        let fine = End::Exited(0);
        let mut story = Story::with_lines(3, 9, FinalLines::One);
        assert_eq!(story.at(0, &[1], KILLED), [(1, 50, 1)]);
        assert_eq!(story.at(40, &[0], fine), []);
        assert_eq!((story.next_ms(), story.restarts.is_over()), (None, false));
        let leave_by = story.restarts.leave_by().map(|at| at - story.start);
        assert_eq!(leave_by, Some(Duration::from_millis(5040)));
        // what ends otherwise since then has done its work
        assert_eq!(story.at(6000, &[2], KILLED), []);
        assert!(!story.restarts.is_over());
        // commands of the user's have an end of their own
        let mut story = Story::new(2, 9);
        assert_eq!(story.at(0, &[0], fine), []);
        assert_eq!(story.restarts.leave_by(), None);
    }
}
