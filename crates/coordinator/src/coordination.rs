//! What the coordinator decides: events in, orders out. Pure: no I/O, and the time is given.
//!
//! ```text
//!            ┌──────────────── a rank is lost: next generation ────────────────┐
//!            ▼                                                                 │
//!  begin → allocate on all (each tells what it has) → load on all → start on all → ready from all → release
//!                    ▲
//!            a rank joins: its place was empty, or the one before was lost
//! ```
//!
//! A lost rank ends the generation, not the load: the others stop, keep what has landed, and tell what that is; when its
//! replacement has joined, all carry out a plan of what is left. It is dismissed before anyone does its work. The load ends with
//! the first failure that no replacement can mend: one that the user has to mend, or one more loss than is allowed, or a
//! replacement that does not come.
//!
//! Where lost ranks are not to be replaced, all that are left stop and keep what has landed, and when it is certain which they
//! are, this group is over for another one of them: its load goes on from what they have.
//!
//! A reload is one generation: what fails is answered at once, as the ranks mend it by loading the old weights again, and they
//! can say whether they may. With a rank that is lost the group is over: its replacement would have no weights at all.

pub(crate) mod gathering;
mod stuck;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use longshore_models::have::Have;
use longshore_rank::{
    params::ReadyParams,
    protocol::{
        Contact, Generation, Peers, PlanName, RankCommand, RankEvent, RankEventKind, RankReport,
    },
};
use tracing::debug;

use self::stuck::Stuck;
pub(crate) use self::stuck::Watched;
use crate::{
    error::{LoadError, line},
    report::Lost,
};

/// How a load may go on after a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Recovery {
    /// How many lost ranks may be replaced.
    pub(crate) replacements_max: u32,
    /// How long ranks may take to join, at first and as replacements.
    pub(crate) join_limit: Duration,
    /// The rank of the coordinator's own process, where ranks are processes.
    pub(crate) own_rank: Option<u32>,
    /// Whether the others go on without lost ranks, as a group of their own, rather than that these are replaced.
    pub(crate) shrinks: bool,
}

impl Recovery {
    /// The first loss ends the load; nobody is waited for.
    pub(crate) const NONE: Self =
        Self { replacements_max: 0, join_limit: Duration::MAX, own_rank: None, shrinks: false };
}

/// What all ranks ended with.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// In the order of ranks; parameters where they are in this process.
    pub(crate) ranks: Vec<(Option<ReadyParams>, RankReport)>,
    /// In which generation they became complete.
    pub(crate) generation: Generation,
    /// What was lost on the way.
    pub(crate) lost: Lost,
}

/// A group that has lost ranks, and goes on as another one.
#[derive(Debug)]
pub(crate) struct Shrunk {
    /// The ranks that are left, which are numbered in this order from now on.
    pub(crate) ranks: Vec<u32>,
    /// The last generation.
    pub(crate) generation: Generation,
    /// How the others were lost, in this group and before it.
    pub(crate) losses: Vec<LoadError>,
    /// Weight bytes that these had asked of storage.
    pub(crate) lost_bytes_read: u64,
}

/// How a load has ended in a group.
#[derive(Debug)]
pub(crate) enum LoadEnd {
    /// Every rank is complete.
    Complete(Loaded),
    /// It goes on in a smaller one.
    Shrunk(Shrunk),
}

impl LoadEnd {
    /// Of a group that cannot shrink.
    ///
    /// # Errors
    /// It has shrunk: a bug.
    pub(crate) fn complete(self) -> Result<Loaded, LoadError> {
        match self {
            LoadEnd::Complete(loaded) => Ok(loaded),
            LoadEnd::Shrunk(_) => Err(LoadError::Runtime("the group has changed".into())),
        }
    }
}

/// How a rank is gone, and why that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Departure {
    /// It has ended, or ended its connection; what its process does now is its own affair.
    Left(String),
    /// It is not heard any more, and may go on at any moment.
    Silent(String),
}

/// The answer to a load.
pub(crate) type Outcome = Result<LoadEnd, LoadError>;

/// What is to be done. A rank that cannot be told is about to be lost.
#[derive(Debug)]
pub(crate) enum Order {
    /// Tell one rank.
    Tell(u32, RankCommand),
    /// Tell every rank that is there.
    TellAll(RankCommand),
    /// End this rank's process and its connection, if it has any, for this reason; whatever it says from now on is not heard.
    Dismiss(u32, String),
    /// Answer whoever asked for the load.
    Answer(Outcome),
}

/// The state of one group.
#[derive(Debug)]
pub(crate) struct Coordination {
    /// Whether each rank is there.
    present: Vec<bool>,
    /// Where lost ranks are not replaced, whether each is one.
    gone: Vec<bool>,
    /// How many of the first ranks hold parameters; the others only hand on what they have.
    holders: usize,
    stuck_after: Duration,
    recovery: Recovery,
    generation: Generation,
    attempt: Option<Attempt>,
    /// Whether a load was asked for.
    begun: bool,
    /// In which generation every rank became complete.
    complete: Option<Generation>,
    /// Whether the load that was asked for is into weights that are complete.
    reloads: bool,
    /// What ended earlier generations of this load.
    losses: Vec<LoadError>,
    /// A rank that was lost when nothing could replace it: nothing is done without it.
    over: Option<(u32, String)>,
    /// Ranks that have fallen silent since all were complete, and why that is known: nobody needs them, so far.
    silent: Vec<(u32, String)>,
    /// The load goes on in a smaller group: whoever leaves this one from now on may be on its way to that one.
    shrunk: bool,
}

/// One generation of a load.
#[derive(Debug)]
struct Attempt {
    contacts: Vec<Option<(Contact, Have)>>,
    prepared: Vec<Option<PlanName>>,
    ready: Vec<Option<(Option<ReadyParams>, RankReport)>>,
    stuck: Stuck,
    /// A failure that may only follow from another rank's.
    suspicion: Option<Suspicion>,
    /// Since when ranks may join.
    since: Instant,
    /// Since when the ranks that are left are to hand over what they have.
    shrinking: Option<Instant>,
}

impl Attempt {
    fn new(ranks: usize, stuck_after: Duration, now: Instant) -> Self {
        Self {
            contacts: vec![None; ranks],
            prepared: vec![None; ranks],
            ready: (0..ranks).map(|_| None).collect(),
            stuck: Stuck::new(ranks, stuck_after, now),
            suspicion: None,
            since: now,
            shrinking: None,
        }
    }
}

/// A rank that could not go on without another.
#[derive(Debug)]
struct Suspicion {
    /// When it was reported.
    since: Instant,
    rank: u32,
    blamed: u32,
    failed: LoadError,
}

/// How long a rank that could not reach another is the cause only if nothing is heard of that one: a rank that fails or dies
/// closes its connections to all, and the news of that may come by way of another first.
const SUSPICION: Duration = Duration::from_millis(500);

/// How long a loss is waited with: what takes one rank away often takes others too, which is known a little later.
const SHRINK_AFTER: Duration = Duration::from_millis(300);

impl Coordination {
    /// Of `world_size` ranks the first `holders` hold parameters; `losses` are those of the groups that this one was part of.
    pub(crate) fn new(
        world_size: u32,
        holders: u32,
        stuck_after: Duration,
        recovery: Recovery,
        losses: Vec<LoadError>,
    ) -> Self {
        Self {
            present: vec![false; world_size as usize],
            gone: vec![false; world_size as usize],
            holders: holders as usize,
            stuck_after,
            recovery,
            generation: 0,
            attempt: None,
            begun: false,
            complete: None,
            reloads: false,
            losses,
            over: None,
            silent: Vec::new(),
            shrunk: false,
        }
    }

    /// Whether a rank is there.
    pub(crate) fn is_present(&self, rank: u32) -> bool {
        self.present.get(rank as usize).copied().unwrap_or(false)
    }

    /// The rank that nothing could replace, and how it was lost.
    pub(crate) fn over(&self) -> Option<(u32, String)> {
        self.over.clone()
    }

    /// A load is asked for, in this generation or a later one.
    pub(crate) fn begin(&mut self, generation: Generation, now: Instant) -> Vec<Order> {
        self.reloads = false;
        self.begin_attempt(generation, now)
    }

    /// A load is asked for into what the ranks hold, all of them.
    pub(crate) fn begin_again(&mut self, now: Instant) -> Vec<Order> {
        self.reloads = true;
        self.losses.clear();
        self.begin_attempt(0, now)
    }

    fn begin_attempt(&mut self, generation: Generation, now: Instant) -> Vec<Order> {
        if let Some((rank, reason)) = self.over.clone() {
            return vec![Order::Answer(Err(LoadError::RankLost { rank, reason }))];
        }
        self.begun = true;
        self.next_generation(generation, now)
    }

    /// A rank has joined.
    pub(crate) fn joined(&mut self, rank: u32) -> Vec<Order> {
        let generation = self.generation;
        if self.gone.get(rank as usize) == Some(&true) {
            let why = "the group goes on without this rank".to_owned();
            return vec![Order::Dismiss(rank, why)];
        }
        if let Some(present) = self.present.get_mut(rank as usize) {
            *present = true;
        }
        match (&self.attempt, self.begun) {
            (Some(attempt), _) if attempt.shrinking.is_some() => {
                vec![Order::Tell(rank, RankCommand::HandOver { generation })]
            }
            (Some(_), _) => vec![Order::Tell(rank, RankCommand::Allocate { generation })],
            (None, false) => Vec::new(),
            (None, true) => self.too_late(rank),
        }
    }

    /// A rank joins when the load is over. One that was complete like all others, and was lost before it heard so, is told now;
    /// nobody else takes notice of a release. More will not come of it, and a process that nobody tells would wait for ever.
    fn too_late(&mut self, rank: u32) -> Vec<Order> {
        if let Some(present) = self.present.get_mut(rank as usize) {
            *present = false;
        }
        let why = match self.over.clone() {
            Some((rank, reason)) => LoadError::RankLost { rank, reason }.line(),
            None => "the load has ended".to_owned(),
        };
        let release = |generation| Order::Tell(rank, RankCommand::Release { generation });
        let release = self.complete.map(release);
        release.into_iter().chain([Order::Dismiss(rank, why)]).collect()
    }

    /// A rank that has joined was in this generation before, under another coordinator: what is said from now on is of later ones.
    pub(crate) fn knows(&mut self, generation: Generation, now: Instant) -> Vec<Order> {
        if generation < self.generation {
            return Vec::new();
        }
        match self.attempt {
            Some(_) => self.next_generation(generation + 1, now),
            None => {
                self.generation = generation;
                Vec::new()
            }
        }
    }

    fn next_generation(&mut self, at_least: Generation, now: Instant) -> Vec<Order> {
        self.generation = at_least.max(self.generation + 1);
        self.complete = None;
        self.attempt = Some(Attempt::new(self.present.len(), self.stuck_after, now));
        vec![Order::TellAll(RankCommand::Allocate { generation: self.generation })]
    }

    /// A rank has said something.
    pub(crate) fn event(&mut self, event: RankEvent, now: Instant) -> Vec<Order> {
        let RankEvent { rank, generation, kind } = event;
        // RNK-4; one that was lost has nothing to say either
        let current = generation == self.generation && self.is_present(rank);
        let attempt = self.attempt.as_mut().filter(|attempt| attempt.shrinking.is_none());
        let Some(attempt) = attempt.filter(|_| current) else {
            debug!("rank {rank}: news of generation {generation} comes too late");
            return Vec::new();
        };
        match kind {
            RankEventKind::Allocated(contact, have) => {
                attempt.contacts[rank as usize] = Some((contact, have));
                let Some((peers, have)) = peers(&attempt.contacts) else { return Vec::new() };
                vec![Order::TellAll(RankCommand::Load { generation, peers, have })]
            }
            RankEventKind::Prepared(plan) => {
                attempt.prepared[rank as usize] = Some(plan);
                let Some(plans) = attempt.prepared.iter().copied().collect::<Option<Vec<_>>>()
                else {
                    return Vec::new();
                };
                match plans.iter().position(|plan| *plan != plans[0]) {
                    // every rank counts what lands on it by now
                    None => vec![Order::TellAll(RankCommand::Start { generation })],
                    Some(other) => {
                        self.answer(Err(LoadError::OtherPlan { rank: other as u32, generation }))
                    }
                }
            }
            RankEventKind::Ready(params, report) => {
                attempt.ready[rank as usize] = Some((params, report));
                if !attempt.ready.iter().all(Option::is_some) {
                    return Vec::new();
                }
                let ranks = attempt.ready.drain(..).flatten().collect();
                let lost = Lost { ranks: self.losses.len() as u32, bytes_read: 0 };
                let loaded = Loaded { ranks, generation, lost };
                self.complete = Some(generation);
                let mut orders = vec![Order::TellAll(RankCommand::Release { generation })];
                orders.extend(self.answer(Ok(LoadEnd::Complete(loaded))));
                // the others have nothing more to do here
                self.present.truncate(self.holders);
                orders
            }
            // only its own process hears it
            RankEventKind::HandedOver(_) => Vec::new(),
            RankEventKind::Failed(source) => {
                let blames_another = source.blames().filter(|other| *other != rank);
                let lasting = source.is_lasting();
                let failed = LoadError::Rank { rank, source };
                if lasting {
                    return self.answer(Err(failed));
                }
                if let Some(blamed) = blames_another {
                    let suspicion = Suspicion { since: now, rank, blamed, failed };
                    attempt.suspicion.get_or_insert(suspicion);
                    return Vec::new();
                }
                self.lose(rank, failed, now)
            }
        }
    }

    /// A rank is gone.
    pub(crate) fn lost(&mut self, rank: u32, departure: Departure, now: Instant) -> Vec<Order> {
        if !self.is_present(rank) {
            // it was dismissed
            return Vec::new();
        }
        let (Departure::Left(reason) | Departure::Silent(reason)) = departure.clone();
        if self.attempt.is_some() {
            return self.lose(rank, LoadError::RankLost { rank, reason }, now);
        }
        self.present[rank as usize] = false;
        if self.shrunk {
            // those that still read here are not to end
            return Vec::new();
        }
        if !self.begun && self.recovery.replacements_max > 0 {
            // nothing was asked for yet, and whoever comes in its place serves as well
            return vec![Order::Dismiss(rank, reason)];
        }
        if let Departure::Silent(reason) = departure {
            self.silent.push((rank, reason));
        }
        let (rank, reason) = self.over.get_or_insert((rank, reason)).clone();
        let why = LoadError::RankLost { rank, reason }.line();
        // those that are complete may wait for each other
        vec![Order::TellAll(RankCommand::Abort { generation: self.generation, why })]
    }

    /// Whether a rank has fallen silent since all were complete, and nobody needed it so far.
    pub(crate) fn is_silent(&self, rank: u32) -> bool {
        self.silent.iter().any(|(silent, _)| *silent == rank)
    }

    /// A rank waits for all others, who are complete. Those that are silent would keep it waiting, or their launcher; those that
    /// have left may be doing their last work, and are nobody's hindrance.
    pub(crate) fn awaited(&mut self) -> Vec<Order> {
        self.silent.drain(..).map(|(rank, why)| Order::Dismiss(rank, why)).collect()
    }

    /// Time has passed; `watched` tells of each rank, if all are there.
    pub(crate) fn look(&mut self, watched: Option<&[Watched]>, now: Instant) -> Vec<Order> {
        let own_is_there = self.recovery.own_rank.is_none_or(|rank| self.is_present(rank));
        let Some(attempt) = &mut self.attempt else { return Vec::new() };
        if self.recovery.shrinks && !own_is_there {
            // this process has only begun, or has stood still: nobody is late for it yet
            attempt.since = now;
        }
        if let Some(since) = attempt.shrinking {
            // whoever has not joined yet is on its way
            let on_its_way =
                self.present.iter().zip(&self.gone).any(|(there, gone)| !there && !gone);
            let waited = now.duration_since(attempt.since) >= self.recovery.join_limit;
            if now.duration_since(since) < SHRINK_AFTER || (on_its_way && !waited) {
                return Vec::new();
            }
            return self.shrink();
        }
        let over = |suspicion: &mut Suspicion| now.duration_since(suspicion.since) >= SUSPICION;
        if let Some(Suspicion { rank, blamed, failed, .. }) = attempt.suspicion.take_if(over) {
            // where the group cannot do without the one, it does without the other
            let needed = self.recovery.shrinks && self.recovery.own_rank == Some(rank);
            let lost = if needed && self.is_present(blamed) { blamed } else { rank };
            return self.lose(lost, failed, now);
        }
        if now.duration_since(attempt.since) >= self.recovery.join_limit
            && self.present.contains(&false)
        {
            return self.missing(now);
        }
        // whoever has not joined is waited for
        let Some(mut watched) = watched.map(<[Watched]>::to_vec) else { return Vec::new() };
        for (watched, ready) in watched.iter_mut().zip(&attempt.ready) {
            // its last look at the files may hang when everything else is done
            watched.ready = ready.is_some();
        }
        match attempt.stuck.look(&watched, now) {
            None => Vec::new(),
            Some(rank) => {
                let Watched { phase, read_bytes, .. } = watched[rank as usize];
                let after = self.stuck_after;
                self.lose(rank, LoadError::RankStuck { rank, after, phase, read_bytes }, now)
            }
        }
    }

    fn missing(&mut self, now: Instant) -> Vec<Order> {
        let world_size = self.present.len() as u32;
        let missing = (0..world_size).filter(|rank| !self.is_present(*rank)).collect();
        let after = self.recovery.join_limit;
        let missing = LoadError::Missing { missing, world_size, after };
        if self.recovery.shrinks {
            // one may have died before it was there, or since a larger group was left
            self.losses.push(missing);
            self.gone.iter_mut().zip(&self.present).for_each(|(gone, there)| *gone |= !there);
            return self.hand_over(now);
        }
        let end = self.with_losses(missing);
        self.answer(Err(end))
    }

    /// A rank that has to be replaced, if it may be.
    fn lose(&mut self, rank: u32, cause: LoadError, now: Instant) -> Vec<Order> {
        if self.reloads {
            return self.lose_in_reload(rank, cause);
        }
        if self.recovery.shrinks && self.recovery.own_rank != Some(rank) {
            tracing::warn!("{}; the others go on without it", cause.line());
            (self.present[rank as usize], self.gone[rank as usize]) = (false, true);
            let mut orders = vec![Order::Dismiss(rank, cause.line())];
            self.losses.push(cause);
            orders.extend(self.hand_over(now));
            return orders;
        }
        if self.recovery.shrinks || self.losses.len() as u32 >= self.recovery.replacements_max {
            self.over.get_or_insert((rank, cause.line()));
            let end = self.with_losses(cause);
            return self.answer(Err(end));
        }
        tracing::warn!("{}; its replacement is waited for", cause.line());
        if self.recovery.own_rank == Some(rank) {
            // this process goes, and the coordinator with it; the others are not to end but to look for the next one
            self.attempt = None;
            return vec![Order::Answer(Err(LoadError::Replaced { why: cause.line() }))];
        }
        self.present[rank as usize] = false;
        let mut orders = vec![Order::Dismiss(rank, cause.line())];
        self.losses.push(cause);
        orders.extend(self.next_generation(0, now));
        orders
    }

    /// Has the ranks that are left stop and keep what they have, unless they were told so.
    fn hand_over(&mut self, now: Instant) -> Vec<Order> {
        let generation = self.generation;
        match &mut self.attempt {
            Some(attempt) if attempt.shrinking.is_none() => {
                attempt.shrinking = Some(now);
                vec![Order::TellAll(RankCommand::HandOver { generation })]
            }
            _ => Vec::new(),
        }
    }

    /// The group is over: another one goes on, of the ranks that are left.
    fn shrink(&mut self) -> Vec<Order> {
        (self.attempt, self.shrunk) = (None, true);
        let numbers = (0..).zip(&self.present).filter(|(_, there)| **there);
        let ranks = numbers.map(|(rank, _)| rank).collect();
        let losses = std::mem::take(&mut self.losses);
        let generation = self.generation;
        let shrunk = Shrunk { ranks, generation, losses, lost_bytes_read: 0 };
        vec![Order::Answer(Ok(LoadEnd::Shrunk(shrunk)))]
    }

    fn lose_in_reload(&mut self, rank: u32, cause: LoadError) -> Vec<Order> {
        if matches!(cause, LoadError::Rank { .. }) {
            // it is there, and has failed: so does the reload
            return self.answer(Err(cause));
        }
        let why = cause.line();
        let reason = match &cause {
            LoadError::RankLost { reason, .. } => reason.clone(),
            other => other.line(),
        };
        self.over.get_or_insert((rank, reason));
        self.present[rank as usize] = false;
        let mut orders = vec![Order::Dismiss(rank, why.clone())];
        orders.extend(self.answer(Err(cause)));
        // the first ends the reload, the second the group
        orders.push(Order::TellAll(RankCommand::Abort { generation: self.generation, why }));
        orders
    }

    /// What ends the load, after what it had survived.
    fn with_losses(&mut self, last: LoadError) -> LoadError {
        if self.losses.is_empty() {
            return last;
        }
        let mut causes = std::mem::take(&mut self.losses);
        causes.push(last);
        let later = causes.split_off(1).iter().map(|e| line(e)).collect();
        LoadError::Losses { first: causes.swap_remove(0).line(), later }
    }

    /// Answers a load, once; a failure stops all ranks first.
    fn answer(&mut self, outcome: Outcome) -> Vec<Order> {
        if self.attempt.take().is_none() {
            return Vec::new();
        }
        let mut orders = Vec::new();
        if let Err(e) = &outcome {
            let (generation, why) = (self.generation, e.line());
            orders.push(Order::TellAll(RankCommand::Abort { generation, why }));
        }
        orders.push(Order::Answer(outcome));
        orders
    }
}

/// All ranks as each has to know them, and what each has, once all have said it.
fn peers(contacts: &[Option<(Contact, Have)>]) -> Option<(Peers, Arc<Vec<Have>>)> {
    let (mut here, mut apart, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for contact in contacts {
        let (contact, have) = contact.as_ref()?;
        all.push(have.clone());
        match contact {
            Contact::Here(peer) => here.push(peer.clone()),
            Contact::Apart(endpoint) => apart.push(endpoint.clone()),
        }
    }
    let peers = match apart.is_empty() {
        true => Peers::Here(Arc::new(here)),
        false => Peers::Apart(Arc::new(apart)),
    };
    Some((peers, Arc::new(all)))
}

#[cfg(test)]
mod tests;
