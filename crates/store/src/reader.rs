//! From an object and a range to bytes in memory: parts, permits, retries, stalls, hedges.
//!
//! A read is cut into parts; each part is one request that is in flight with a permit of the gate. What a request brings
//! goes straight to its place. A request that fails is repeated for what is still missing; beside one that is slow a second
//! one is made, and whichever is ahead goes on:
//!
//! ```text
//! read   |---------- part ----------|---------- part ----------|---- part ----|
//! part    first request ████████ ✗
//!         retry                  ███████ … slow
//!         hedge                         ████████████ done
//! ```

mod backoff;
mod race;
mod target;
mod usual;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep, timeout_at};

use crate::{
    counters::{Cells, count},
    error::{Operation, StoreError},
    failure::{Failure, FailureKind},
    flow::{control::FlowControl, gate::Gate},
    location::Location,
    object_info::{Identity, ObjectInfo},
    options::StoreOptions,
    source::{Attempt, Source},
};

use backoff::Backoff;
use race::Runner;
use target::{Target, deal};
use usual::Usual;

/// What one read took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadReport {
    /// Bytes that were read: the whole range.
    pub bytes: u64,
    /// Requests made, retries and hedges among them.
    pub requests: u64,
    /// Requests for what an earlier one failed to bring.
    pub retries: u64,
    /// Requests beside a slow one.
    pub hedges: u64,
    /// Bytes that retries and hedges asked for.
    pub asked_again_bytes: u64,
    /// From the call to its return.
    pub elapsed: Duration,
}

/// Reads one source.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) location: Location,
    pub(crate) source: Box<dyn Source>,
    pub(crate) counters: Arc<Cells>,
    options: StoreOptions,
    gate: Gate,
    usual: Mutex<Usual>,
    /// Range requests that are not hedges, and hedges: what STO-4 compares.
    asked: AtomicU64,
    hedged: AtomicU64,
    /// Whether the storage ever answered well.
    reached: AtomicBool,
}

/// An address that never answered is more likely wrong than down: no need to wait as long as for one that did.
const FIRST_CONTACT_MAX: Duration = Duration::from_secs(15);

/// What is asked and what came of it, while a part is being read.
struct Part<'a> {
    object: &'a ObjectInfo,
    range: Range<u64>,
    target: Target<'a>,
    /// How much of the target, from its start, is there.
    filled: usize,
    report: ReadReport,
}

impl Part<'_> {
    /// The part of the object that did not come yet.
    fn missing(&self) -> Range<u64> {
        self.range.start + self.filled as u64..self.range.end
    }
}

impl Reader {
    pub(crate) fn new(
        location: Location,
        source: Box<dyn Source>,
        options: &StoreOptions,
        counters: Arc<Cells>,
    ) -> Reader {
        let control = match options.concurrency {
            Some(limit) => FlowControl::fixed(limit),
            None => FlowControl::searching(StoreOptions::CONCURRENCY_MAX),
        };
        Reader {
            location,
            source,
            options: options.clone(),
            gate: Gate::new(control, Arc::clone(&counters)),
            counters,
            usual: Mutex::new(Usual::new()),
            asked: AtomicU64::new(0),
            hedged: AtomicU64::new(0),
            reached: AtomicBool::new(false),
        }
    }

    /// Fills `targets`, one after the other, with the range, which is as long as all of them.
    pub(crate) async fn read(
        &self,
        object: &ObjectInfo,
        range: Range<u64>,
        targets: &mut [&mut [u8]],
    ) -> Result<ReadReport, StoreError> {
        let start = Instant::now();
        let mut report = ReadReport::default();
        let mut parts: FuturesUnordered<_> = split(range, targets, self.options.part_bytes)
            .into_iter()
            .map(|(range, target)| {
                self.part(
                    Part { object, range, target, filled: 0, report: ReadReport::default() },
                    None,
                )
            })
            .collect();
        while let Some(part) = parts.next().await {
            let part = part?;
            report.bytes += part.bytes;
            report.requests += part.requests;
            report.retries += part.retries;
            report.hedges += part.hedges;
            report.asked_again_bytes += part.asked_again_bytes;
        }
        report.elapsed = start.elapsed();
        Ok(report)
    }

    /// A whole object of at most `max_bytes`.
    pub(crate) async fn get(
        &self,
        name: &str,
        known: Option<&Identity>,
        max_bytes: u64,
    ) -> Result<Got, StoreError> {
        let operation = Operation::Get(name);
        let fetched = self.patiently(&operation, || self.source.fetch(name, known)).await;
        let (object, body) = match fetched {
            Ok(fetched) => fetched,
            Err(failed) if failed.kind == FailureKind::NotFound => return Ok(Got::Nothing),
            Err(failed) if failed.kind == FailureKind::NotModified => return Ok(Got::Same),
            Err(failed) => return Err(failed.error),
        };
        let too_large = StoreError::TooLarge {
            subject: operation.subject(&self.location),
            bytes: object.bytes,
            limit: max_bytes,
        };
        let Some(length) = usize::try_from(object.bytes).ok().filter(|_| object.bytes <= max_bytes)
        else {
            return Err(too_large);
        };
        let mut content = vec![0; length];
        if length > 0 {
            let range = 0..object.bytes;
            let part = Part {
                object: &object,
                range,
                target: Target::from(&mut content[..]),
                filled: 0,
                report: ReadReport::default(),
            };
            self.part(part, Some(Runner::open(body, Instant::now()))).await?;
        }
        Ok(Got::Content(content, object))
    }

    /// Repeats what fails in a way that may pass.
    pub(crate) async fn patiently<'a, T>(
        &self,
        operation: &Operation<'_>,
        attempt: impl Fn() -> Attempt<'a, T>,
    ) -> Result<T, Failed> {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        let mut requests = 0;
        loop {
            requests += 1;
            let failure = match timeout_at(start + self.options.give_up_after, attempt()).await {
                Ok(Ok(answer)) => {
                    self.reached.store(true, Relaxed);
                    return Ok(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::new(FailureKind::Stalled, "no answer"),
            };
            self.note(&failure);
            if !failure.is_transient(self.reached.load(Relaxed)) {
                return Err(Failed {
                    kind: failure.kind,
                    error: operation.failed(&self.location, &failure),
                });
            }
            let wait = backoff.wait(&failure);
            if Instant::now() + wait >= self.deadline(start, &failure) {
                let error =
                    operation.gave_up(&self.location, &failure, requests, start.elapsed(), 0);
                return Err(Failed { kind: failure.kind, error });
            }
            count(&self.counters.retries, 1);
            sleep(wait).await;
        }
    }

    /// Reads one part, by `lead` at first if it is given.
    async fn part(
        &self,
        mut part: Part<'_>,
        mut lead: Option<Runner<'_>>,
    ) -> Result<ReadReport, StoreError> {
        let mut permit = Some(self.gate.enter().await);
        let start = Instant::now();
        let end = start + self.options.give_up_after;
        let mut backoff = Backoff::default();
        let mut earlier = None;
        loop {
            let before = part.filled;
            let runner = lead.take().unwrap_or_else(|| self.ask(&part));
            part.report.requests += 1;
            let Err(mut failure) = self.race(runner, &mut part, end).await else {
                self.gate.completed();
                part.report.bytes = part.target.len() as u64;
                return Ok(part.report);
            };
            self.note(&failure);
            let (progress, missing) = (part.filled > before, part.missing());
            tracing::debug!(
                object = %self.location.describe(&part.object.name), range = ?missing, cause = %failure, "request failed"
            );
            let operation = Operation::Read(&part.object.name, part.range.clone());
            if !failure.is_transient(self.reached.load(Relaxed)) {
                return Err(operation.failed(&self.location, &failure));
            }
            if progress {
                backoff = Backoff::default();
            } else if Instant::now() >= end {
                // a request that the deadline cut short says less than the one before
                failure = earlier.take().unwrap_or(failure);
            }
            let wait = backoff.wait(&failure);
            let deadline = self.deadline(start, &failure);
            permit.take();
            if Instant::now() + wait < deadline {
                sleep(wait).await;
                permit = timeout_at(deadline, self.gate.enter()).await.ok();
            }
            if permit.is_none() {
                let bytes = missing.end - missing.start;
                let (requests, time) = (part.report.requests, start.elapsed());
                return Err(operation.gave_up(&self.location, &failure, requests, time, bytes));
            }
            earlier = Some(failure);
            part.report.retries += 1;
            part.report.asked_again_bytes += missing.end - missing.start;
            count(&self.counters.retries, 1);
            count(&self.counters.retried_bytes, missing.end - missing.start);
        }
    }

    /// Asks for what is missing.
    fn ask<'a>(&'a self, part: &Part<'a>) -> Runner<'a> {
        self.asked.fetch_add(1, Relaxed);
        Runner::asking(self.source.open(part.object, part.missing()), part.filled, Instant::now())
    }

    fn note(&self, failure: &Failure) {
        match failure.kind {
            FailureKind::Throttled => {
                count(&self.counters.throttled, 1);
                self.gate.refused();
            }
            FailureKind::Stalled => count(&self.counters.stalls, 1),
            _ => {}
        }
    }

    fn deadline(&self, start: Instant, failure: &Failure) -> Instant {
        let unreached = failure.kind == FailureKind::Connect && !self.reached.load(Relaxed);
        start
            + if unreached {
                self.options.give_up_after.min(FIRST_CONTACT_MAX)
            } else {
                self.options.give_up_after
            }
    }

    fn usual(&self) -> MutexGuard<'_, Usual> {
        self.usual.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of asking for a whole object.
#[derive(Debug)]
pub(crate) enum Got {
    /// There is no such object.
    Nothing,
    /// It is the known one.
    Same,
    /// All of it.
    Content(Vec<u8>, ObjectInfo),
}

/// An operation that failed for good.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) kind: FailureKind,
    pub(crate) error: StoreError,
}

impl From<Failed> for StoreError {
    fn from(failed: Failed) -> StoreError {
        failed.error
    }
}

/// Cuts a range and its targets into parts of nearly equal length, none longer than `part_bytes`.
fn split<'a>(
    range: Range<u64>,
    targets: &'a mut [&mut [u8]],
    part_bytes: u64,
) -> Vec<(Range<u64>, Target<'a>)> {
    let count = (range.end - range.start).div_ceil(part_bytes.max(1));
    let mut ranges = Vec::new();
    let mut start = range.start;
    for left in (1..=count).rev() {
        let end = start + (range.end - start).div_ceil(left);
        ranges.push(start..end);
        start = end;
    }
    // the targets are as long as the range, so the lengths fit
    let targets = deal(targets, ranges.iter().map(|range| (range.end - range.start) as usize));
    ranges.into_iter().zip(targets).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_range_once_and_evenly() {
        for (start, length, part) in
            [(0, 0, 8), (3, 1, 8), (3, 8, 8), (5, 9, 8), (0, 100, 7), (1, 64, 8)]
        {
            let targets = &mut [&mut vec![0; length][..]];
            let parts = split(start..start + length as u64, targets, part);
            let mut at = start;
            for (range, target) in &parts {
                assert_eq!((range.start, range.end - range.start), (at, target.len() as u64));
                assert!((1..=part).contains(&(target.len() as u64)));
                at = range.end;
            }
            assert_eq!(at, start + length as u64);
            let longest = parts.iter().map(|(_, target)| target.len()).max().unwrap_or_default();
            assert!(parts.iter().all(|(_, target)| target.len() + 1 >= longest));
        }
    }
}
