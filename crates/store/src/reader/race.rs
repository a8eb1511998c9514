//! One part, one request, and perhaps a second one beside it: what comes is put in its place, whichever is ahead goes on.

use std::{future::pending, sync::atomic::Ordering::Relaxed, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::{
    pin, select,
    time::{Instant, sleep_until},
};

use super::{Part, Reader, usual::Patience};
use crate::{
    counters::count,
    failure::{Failure, FailureKind},
    source::{Attempt, Body},
};

/// One request and how far it is.
pub(crate) struct Runner<'a> {
    state: State<'a>,
    /// Where in the part its next byte belongs.
    at: usize,
    asked: Instant,
    /// When its first byte came, and where that belonged.
    first: Option<(Instant, usize)>,
    /// When it last brought anything.
    last: Instant,
    /// When it last had brought [`STALL_BYTES`], and what it brought since.
    mark: Instant,
    since_mark: usize,
}

enum State<'a> {
    Opening(Attempt<'a, Body>),
    Open(Body),
}

/// A request that brings less than this in `stall_after` is as good as silent.
const STALL_BYTES: usize = 64 << 10;
/// How often is looked whether anything is usual yet.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Hedges are at most one in so many requests.
const REQUESTS_PER_HEDGE: u64 = 20;

impl<'a> Runner<'a> {
    pub(crate) fn asking(opening: Attempt<'a, Body>, at: usize, now: Instant) -> Runner<'a> {
        Runner::new(State::Opening(opening), at, now)
    }

    /// For a response that is there already, from the start of the part on.
    pub(crate) fn open(body: Body, now: Instant) -> Runner<'a> {
        Runner::new(State::Open(body), 0, now)
    }

    fn new(state: State<'a>, at: usize, now: Instant) -> Runner<'a> {
        Runner { state, at, asked: now, first: None, last: now, mark: now, since_mark: 0 }
    }

    /// The next bytes, `None` at the end of the body.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: what is awaited is kept.
    async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            match &mut self.state {
                State::Opening(opening) => self.state = State::Open(opening.await?),
                State::Open(body) => return body.next().await.transpose(),
            }
        }
    }

    fn stalls_at(&self, stall_after: Duration) -> Instant {
        self.mark + stall_after
    }
}

enum Event {
    Lead(Result<Option<Bytes>, Failure>),
    Chase(Result<Option<Bytes>, Failure>),
    Alarm,
}

impl Reader {
    /// Fills the part, by `lead` and perhaps one hedge. What arrived before a failure stays.
    pub(super) async fn race<'a>(
        &'a self,
        mut lead: Runner<'a>,
        part: &mut Part<'a>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let stall_after = self.options.stall_after;
        let mut chase: Option<Runner<'a>> = None;
        let mut watch = self.options.hedge.then(|| Watch::new(self.usual().patience(), lead.asked));
        let alarm = sleep_until(deadline);
        pin!(alarm);
        loop {
            let stalls = chase.iter().chain([&lead]).map(|runner| runner.stalls_at(stall_after));
            let looks = watch.iter().map(|watch| watch.look_at(&lead, part));
            alarm.as_mut().reset(stalls.chain(looks).fold(deadline, Instant::min));
            let event = select! {
                chunk = lead.chunk() => Event::Lead(chunk),
                chunk = next_of(&mut chase) => Event::Chase(chunk),
                () = &mut alarm => Event::Alarm,
            };
            let now = Instant::now();
            let mut lost = None;
            match event {
                Event::Lead(chunk) => lost = self.take(&mut lead, chunk, part, now).err(),
                Event::Chase(chunk) => {
                    let failure =
                        chase.as_mut().and_then(|chase| self.take(chase, chunk, part, now).err());
                    if let Some(failure) = failure {
                        tracing::debug!(cause = %failure, "hedge failed");
                        chase = None;
                    }
                }
                Event::Alarm if now >= deadline => {
                    return Err(out_of_time(&lead, now, stall_after));
                }
                Event::Alarm => {
                    if now >= lead.stalls_at(stall_after) {
                        lost = Some(silence(&lead, stall_after));
                    }
                    chase = chase.filter(|chase| now < chase.stalls_at(stall_after));
                    if watch.as_mut().is_some_and(|watch| {
                        watch.is_slow(&lead, part, self.usual().patience(), now)
                    }) && self.may_hedge()
                    {
                        chase = Some(self.hedge(part));
                        watch = None;
                    }
                }
            }
            // whoever is ahead leads; whoever is left leads
            let overtaken = chase.as_ref().is_some_and(|chase| chase.at > lead.at);
            if overtaken {
                self.overtaken(&lead, now);
            }
            if overtaken || lost.is_some() {
                match chase.take() {
                    Some(ahead) => lead = ahead,
                    None => return lost.map_or(Ok(()), Err),
                }
            }
            if part.filled == part.target.len() {
                self.finished(&lead, now);
                return Ok(());
            }
        }
    }

    /// Puts a chunk where it belongs, except for what is there already.
    fn take(
        &self,
        runner: &mut Runner<'_>,
        chunk: Result<Option<Bytes>, Failure>,
        part: &mut Part<'_>,
        now: Instant,
    ) -> Result<(), Failure> {
        let Some(bytes) = chunk? else {
            let text = format!("the body ended {} bytes early", part.target.len() - runner.at);
            return Err(Failure::new(FailureKind::Truncated, text));
        };
        count(&self.counters.received_bytes, bytes.len() as u64);
        self.gate.received(bytes.len() as u64);
        let end = runner.at + bytes.len();
        if end > part.target.len() {
            return Err(Failure::new(FailureKind::WrongRange, "the body is longer than the range"));
        }
        let known = (part.filled - runner.at).min(bytes.len());
        count(&self.counters.discarded_bytes, known as u64);
        part.target.write(runner.at + known, &bytes[known..]);
        if runner.first.is_none() && !bytes.is_empty() {
            runner.first = Some((now, runner.at));
            self.reached.store(true, Relaxed);
            self.usual().first_byte(now - runner.asked);
        }
        runner.at = end;
        runner.last = now;
        runner.since_mark += bytes.len();
        if runner.since_mark >= STALL_BYTES {
            (runner.mark, runner.since_mark) = (now, 0);
        }
        part.filled = part.filled.max(end);
        Ok(())
    }

    /// Counts a hedge, if there may be one more (STO-4).
    fn may_hedge(&self) -> bool {
        let most = self.asked.load(Relaxed) / REQUESTS_PER_HEDGE;
        self.hedged
            .fetch_update(Relaxed, Relaxed, |hedged| (hedged < most).then_some(hedged + 1))
            .is_ok()
    }

    fn hedge<'a>(&'a self, part: &mut Part<'a>) -> Runner<'a> {
        let missing = part.missing();
        count(&self.counters.hedges, 1);
        count(&self.counters.hedged_bytes, missing.end - missing.start);
        part.report.hedges += 1;
        part.report.asked_again_bytes += missing.end - missing.start;
        part.report.requests += 1;
        Runner::asking(self.source.open(part.object, missing), part.filled, Instant::now())
    }

    fn finished(&self, runner: &Runner<'_>, now: Instant) {
        if let Some((first, at)) = runner.first {
            self.usual().body((runner.at - at) as u64, now - first);
        }
    }

    /// That the slower one takes at least so long is all that is known of it.
    fn overtaken(&self, runner: &Runner<'_>, now: Instant) {
        count(&self.counters.hedges_won, 1);
        if runner.first.is_none() {
            self.usual().first_byte(now - runner.asked);
        }
    }
}

/// Looks whether a request is slower than usual.
struct Watch {
    patience: Option<Patience>,
    /// Not looked at again before this.
    not_before: Instant,
}

impl Watch {
    fn new(patience: Option<Patience>, now: Instant) -> Watch {
        let not_before = if patience.is_some() { now } else { now + LOOK_AGAIN };
        Watch { patience, not_before }
    }

    /// When there is something to see.
    fn look_at(&self, runner: &Runner<'_>, part: &Part<'_>) -> Instant {
        let slow = self.patience.map(|patience| slow_at(runner, part, &patience));
        slow.map_or(self.not_before, |slow| slow.max(self.not_before))
    }

    /// Whether a request is slower than what is usual now. If it is, it is looked at again after as long a time: there may be
    /// no hedge to be had.
    fn is_slow(
        &mut self,
        runner: &Runner<'_>,
        part: &Part<'_>,
        patience: Option<Patience>,
        now: Instant,
    ) -> bool {
        if now < self.look_at(runner, part) {
            return false;
        }
        self.patience = patience;
        let Some(patience) = patience else {
            self.not_before = now + LOOK_AGAIN;
            return false;
        };
        let slow = now >= slow_at(runner, part, &patience);
        if slow {
            self.not_before = now + patience.silence;
        }
        slow
    }
}

/// When a request is slower than usual: silent for too long, or a body that takes too long.
fn slow_at(runner: &Runner<'_>, part: &Part<'_>, patience: &Patience) -> Instant {
    let silent = runner.last + patience.silence;
    let body =
        runner.first.and_then(|(first, at)| Some(first + patience.body(part.target.len() - at)?));
    body.map_or(silent, |body| body.min(silent))
}

async fn next_of(chase: &mut Option<Runner<'_>>) -> Result<Option<Bytes>, Failure> {
    match chase {
        Some(chase) => chase.chunk().await,
        None => pending().await,
    }
}

/// The deadline passed while a request was under way.
fn out_of_time(runner: &Runner<'_>, now: Instant, stall_after: Duration) -> Failure {
    let silent = now - runner.last;
    if runner.first.is_none() || silent >= stall_after / 2 {
        return silence(runner, silent);
    }
    Failure::new(FailureKind::Stalled, "too slow: bytes come, but time is up")
}

fn silence(runner: &Runner<'_>, time: Duration) -> Failure {
    let what = if runner.first.is_some() { "no more bytes" } else { "no first byte" };
    Failure::new(FailureKind::Stalled, format!("{what} for {:.1} s", time.as_secs_f64()))
}
