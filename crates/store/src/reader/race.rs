//! One part, one request, and perhaps a second one beside it: what comes is put in its place, whichever is ahead goes on.

use std::{future::pending, sync::atomic::Ordering::Relaxed, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::{
    pin, select,
    time::{Instant, sleep_until},
};

use super::{Part, Reader};
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
        let mut chase: Option<Runner<'a>> = None;
        let mut hedge_at = self.options.hedge.then_some(lead.asked);
        let alarm = sleep_until(deadline);
        pin!(alarm);
        loop {
            let stall_after = self.options.stall_after;
            let mut next = deadline.min(lead.stalls_at(stall_after));
            next = chase.as_ref().map_or(next, |chase| next.min(chase.stalls_at(stall_after)));
            if let Some(hedge_at) = &mut hedge_at {
                *hedge_at = self.slow_at(&lead, part).unwrap_or(*hedge_at).max(*hedge_at);
                next = next.min(*hedge_at);
            }
            alarm.as_mut().reset(next);
            let event = select! {
                chunk = lead.chunk() => Event::Lead(chunk),
                chunk = next_of(&mut chase) => Event::Chase(chunk),
                () = &mut alarm => Event::Alarm,
            };
            let now = Instant::now();
            let lost = match event {
                Event::Lead(chunk) => self.take(&mut lead, chunk, part, now).err(),
                Event::Chase(chunk) => {
                    match chase.as_mut().map(|chase| self.take(chase, chunk, part, now)) {
                        Some(Ok(())) => {}
                        Some(Err(failure)) => {
                            tracing::debug!(cause = %failure, "hedge failed");
                            chase = None;
                        }
                        None => {}
                    }
                    None
                }
                Event::Alarm => {
                    if now >= deadline {
                        return Err(out_of_time(&lead, now, stall_after));
                    }
                    if chase.as_ref().is_some_and(|chase| now >= chase.stalls_at(stall_after)) {
                        chase = None;
                    }
                    if hedge_at.is_some_and(|at| now >= at) {
                        hedge_at = match self.usual().patience() {
                            // nothing is usual yet
                            None => Some(now + LOOK_AGAIN),
                            Some(_) if self.may_hedge() => {
                                chase = Some(self.hedge(part));
                                None
                            }
                            Some(patience) => Some(now + patience),
                        };
                    }
                    (now >= lead.stalls_at(stall_after)).then(|| silence(&lead, stall_after))
                }
            };
            if part.filled == part.target.len() {
                let runner = chase.as_ref().filter(|chase| chase.at > lead.at).unwrap_or(&lead);
                self.finished(runner, chase.as_ref().is_some_and(|chase| chase.at > lead.at), now);
                return Ok(());
            }
            match (&chase, lost) {
                (Some(ahead), None) if ahead.at > lead.at => {
                    self.finished_behind(&lead, now);
                    lead = chase.take().unwrap_or(lead);
                }
                (Some(_), Some(_)) => lead = chase.take().unwrap_or(lead),
                (None, Some(failure)) => return Err(failure),
                (_, None) => {}
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
        part.target[runner.at + known..end].copy_from_slice(&bytes[known..]);
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

    /// When a request becomes slower than usual.
    fn slow_at(&self, runner: &Runner<'_>, part: &Part<'_>) -> Option<Instant> {
        let usual = self.usual();
        let silent = runner.last + usual.patience()?;
        let body = runner.first.and_then(|(first, at)| {
            Some(first + usual.body_patience((part.target.len() - at) as u64)?)
        });
        Some(body.map_or(silent, |body| body.min(silent)))
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

    fn finished(&self, runner: &Runner<'_>, hedge_won: bool, now: Instant) {
        if let Some((first, at)) = runner.first {
            self.usual().body((runner.at - at) as u64, now - first);
        }
        if hedge_won {
            count(&self.counters.hedges_won, 1);
        }
    }

    /// A request was overtaken: that it takes at least so long is all that is known of it.
    fn finished_behind(&self, runner: &Runner<'_>, now: Instant) {
        count(&self.counters.hedges_won, 1);
        if runner.first.is_none() {
            self.usual().first_byte(now - runner.asked);
        }
    }
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
