//! A rank process and the weights that it holds: takes another checkpoint in place, together with all other ranks, or leaves
//! it on all of them.
//!
//! ```text
//!  validate ─► vote ─► agree ─► begin again ─► allocate, load, start, ready, release
//!  └──────── nothing is written ────────┘ └──────────── the old weights are gone ────┘
//! ```
//!
//! Every arrow is a wait for all ranks. What each of them means where something fails or is lost:
//!
//! | up to | every rank that is left |
//! |---|---|
//! | the vote | keeps the old weights: nobody writes before everybody knows that all can |
//! | agreeing | keeps them too; only where the coordinator is lost itself nobody can tell whether others have begun, and this rank is not ready |
//! | the release | loads the old weights again if all ranks are there, in the same way; else it is not ready |
//!
//! What is made of files that are the same in both checkpoints is neither read nor written, on the way there or back. That
//! takes weights that are known: a rank that is not ready keeps nothing.
//!
//! A rank that lives and does not come to one of these waits for as long as a rank may go without getting on (`--progress-timeout`)
//! ends the reload as one does that cannot load it, for itself as well when it comes. It is not killed: it may only be slow, holds
//! whole weights and may be serving them, and another reload may find it.
//!
//! A rank is ready with the new weights only when the coordinator has seen all ranks complete; so of the ranks that are
//! ready none holds another checkpoint than the others.

use std::{
    slice,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use longshore_models::have::Kept;
use longshore_rank::{
    fault::{self, Point},
    params::{Home, ParamMemory, ReadyParams},
    protocol::{Generation, PlanName},
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::{
    GroupOptions, Joined, host_join,
    member::{self, Again, End, Gathered, MemberMessage},
    wait,
};
use crate::{
    error::LoadError,
    link::wire,
    load::{Prepared, RunOptions, check_unchanged, given_back, prepare_process_into},
    place::Place,
    plan::{Plan, changed},
    verify::Verified,
};

/// How long a reload waits for the reads of an earlier attempt that failed; a read from local storage takes far less.
pub(super) const QUIET_AFTER: Duration = Duration::from_secs(30);

/// What is known of the other ranks where the coordinator is lost when all were about to begin.
const IN_DOUBT: &str = "another rank may have begun to write; start all ranks again";

/// One rank of a group of processes, and the weights of one checkpoint that it holds.
#[derive(Debug)]
pub(crate) struct Holder {
    place: Place,
    options: RunOptions,
    group: GroupOptions,
    /// What the weights that it holds, or held last, were loaded by.
    plan: Plan,
    /// When their files were opened.
    opened: SystemTime,
    source: String,
    weights: Weights,
    joined: Joined,
    /// What looked odd in their values.
    pub(crate) warnings: Vec<String>,
    /// Which of the files were verified, where that was asked for.
    pub(crate) verified: Option<Verified>,
}

#[derive(Debug)]
enum Weights {
    /// Every parameter of every rank is complete.
    Ready(ReadyParams),
    /// Bytes of several checkpoints may be mixed, here or between ranks; nobody may look.
    NotReady { memory: Arc<ParamMemory>, why: String },
    /// Only while they pass from one to the other.
    Moving,
}

/// What a rank says of what is to be loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Vote {
    /// It can.
    Accepts {
        /// What it was told to load.
        source: String,
        /// What it would do.
        plan: PlanName,
    },
    /// It cannot.
    Refuses {
        /// The error and all causes.
        why: String,
        /// Its exit code.
        code: u8,
    },
}

impl Holder {
    pub(super) fn new(
        place: &Place,
        source: &str,
        group: &GroupOptions,
        prepared: &Prepared,
        params: ReadyParams,
        joined: Joined,
    ) -> Self {
        Self {
            place: place.clone(),
            options: prepared.options,
            group: *group,
            plan: prepared.plan.without_idle(),
            opened: prepared.opened,
            source: source.to_owned(),
            weights: Weights::Ready(params),
            joined,
            warnings: prepared.warnings.clone(),
            verified: prepared.verified.clone(),
        }
    }

    /// What it holds.
    ///
    /// # Errors
    /// A reload failed and could not be undone: the rank is not ready.
    pub(crate) fn params(&self) -> Result<&ReadyParams, LoadError> {
        self.weights.params()
    }

    /// What it holds, and its way to the others.
    ///
    /// # Errors
    /// As [`Holder::params`].
    pub(crate) fn params_and_joined(&mut self) -> Result<(&ReadyParams, &mut Joined), LoadError> {
        Ok((self.weights.params()?, &mut self.joined))
    }

    /// Its way to the others.
    pub(crate) fn joined(&mut self) -> &mut Joined {
        &mut self.joined
    }

    /// What the last load did.
    pub(crate) fn load(&self) -> &Joined {
        &self.joined
    }

    /// Where it stands.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// What the weights that it holds, or held last, were loaded by.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The checkpoint that it holds, as it was named; changes only when a reload has succeeded on every rank.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Says goodbye to the group.
    pub(crate) async fn end(self) {
        self.joined.end().await;
    }

    /// Says goodbye to the group, and gives up what it holds.
    ///
    /// # Errors
    /// As [`Holder::params`].
    pub(crate) async fn leave(self) -> Result<ReadyParams, LoadError> {
        self.joined.end().await;
        match self.weights {
            Weights::Ready(params) => Ok(params),
            other => Err(other.not_ready()),
        }
    }

    /// Loads another checkpoint into the same parameters, at the same addresses. Every rank calls it, for the same source, of
    /// which it has made a plan, or not.
    ///
    /// # Errors
    /// [`LoadError::NotReloaded`]: this rank or another cannot load it, one was lost or does not answer, before the first write; the weights
    /// are untouched, on every rank. [`LoadError::Reload`]: it failed while writing, and says whether the old weights are
    /// back; if not, [`Holder::params`] refuses from now on.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the rank not ready, and the others waiting for it.
    pub(crate) async fn reload(
        &mut self,
        source: &str,
        planned: Result<Plan, LoadError>,
    ) -> Result<(), LoadError> {
        let validated = planned.and_then(|plan| self.validate(&self.fitted(plan)?));
        let coming = self.joined.generation + 1;
        fault::at_point(self.place.rank, coming, Point::Validated);
        let prepared = match self.vote(source, validated).await {
            Ok(prepared) => prepared,
            Err(e) => return Err(self.not_reloaded(e)),
        };
        fault::at_point(self.place.rank, coming, Point::Agreed);
        match self.joined.all_gather_in_reload(Vec::new()).await {
            Ok(_) => {}
            // whoever is told so is told before anyone is told to begin
            Err(
                e @ (LoadError::GroupEnded { .. }
                | LoadError::RankLost { .. }
                | LoadError::NoAnswer { .. }),
            ) => {
                return Err(self.not_reloaded(e));
            }
            Err(e) => {
                return Err(self.not_restored(IN_DOUBT.into(), e));
            }
        }
        let changed = match &self.weights {
            Weights::Ready(_) => changed(&self.plan, &prepared.plan, self.opened),
            // what of it is whole is not known
            _ => vec![true; prepared.plan.placement().params.len()],
        };
        match self.write(&prepared, &changed).await {
            Ok(()) => {
                self.plan = prepared.plan.clone();
                source.clone_into(&mut self.source);
                Ok(())
            }
            Err(cause) => Err(self.restore(&changed, cause).await),
        }
    }

    /// For as many ranks as there are, which may be fewer than were planned for.
    fn fitted(&self, plan: Plan) -> Result<Plan, LoadError> {
        match self.plan.placement().parallel.tp() {
            tp if plan.placement().parallel.tp() > tp => plan.for_fewer(tp),
            _ => Ok(plan),
        }
    }

    /// Makes sure of everything that can be without writing: the same parameters, every file open, as it was planned for.
    fn validate(&self, plan: &Plan) -> Result<Arc<Prepared>, LoadError> {
        let same = self.plan.placement().same_parameters(plan.placement());
        same.map_err(|source| LoadError::Plan { path: plan.origin.shown().into(), source })?;
        let (options, transport) = (&self.options, self.group.transport);
        prepare_process_into(plan, options, &self.place, transport, true).map(Arc::new)
    }

    /// Tells all ranks whether this one can load what it `validated`; goes on if all can, and mean the same.
    async fn vote(
        &mut self,
        source: &str,
        validated: Result<Arc<Prepared>, LoadError>,
    ) -> Result<Arc<Prepared>, LoadError> {
        let vote = match &validated {
            Ok(prepared) => Vote::Accepts { source: source.into(), plan: prepared.plan.hash() },
            Err(e) => Vote::Refuses { why: e.line(), code: e.exit_code() },
        };
        let failed = |e: wire::WireError| LoadError::Runtime(e.to_string());
        let piece = wire::encode(&vote).map_err(failed)?.to_vec();
        let all = self.joined.all_gather_in_reload(piece).await?;
        let votes: Result<Vec<Vote>, _> = all.iter().map(|vote| wire::decode(vote)).collect();
        judge(&votes.map_err(failed)?)?;
        validated
    }

    /// Writes what is `changed` of a prepared checkpoint over whatever the memory holds, with all other ranks.
    async fn write(&mut self, prepared: &Arc<Prepared>, changed: &[bool]) -> Result<(), LoadError> {
        let started = Instant::now();
        let kept = prepared.kept(changed);
        let begun = self.begin_again(prepared, &kept).await;
        fault::at_point(self.place.rank, self.joined.generation + 1, Point::BegunAgain);
        let why = begun.as_ref().err().map(LoadError::line).unwrap_or_default();
        let all = self.joined.all_gather_in_reload(why.into_bytes()).await;
        first_failure(all)?;
        let released = begun?;
        // no rank is replaced in a reload, so all count the same
        self.joined.generation += 1;
        let loaded = match &self.joined.hosting {
            Some(hosting) => Some(hosting.load_again(prepared.plan.hash()).await),
            None => None,
        };
        let released = wait(released).await;
        // of a load that fails the coordinator knows the first cause, this rank only what it was told
        let loaded = loaded.transpose()?;
        let End::Complete(params, generation) = released? else {
            return Err(LoadError::Runtime("a reload has changed the group".into()));
        };
        // drops what was kept of it for another attempt
        self.weights = Weights::Ready(params);
        given_back(slice::from_ref(self.weights.params()?)).await;
        let joined = &mut self.joined;
        joined.generation = generation;
        joined.kept_bytes = kept.bytes;
        joined.seconds = prepared.opening_seconds + started.elapsed().as_secs_f64();
        if let Some(loaded) = loaded {
            joined.reports = Some(loaded.ranks.into_iter().map(|(_, report)| report).collect());
            joined.lost.ranks += loaded.lost.ranks;
            joined.lost.bytes_read = loaded.lost.bytes_read;
        }
        self.warnings.clone_from(&prepared.warnings);
        self.verified.clone_from(&prepared.verified);
        self.opened = prepared.opened;
        Ok(())
    }

    /// Gets this rank ready for the next generation; returns what tells its end.
    async fn begin_again(
        &mut self,
        prepared: &Arc<Prepared>,
        kept: &Arc<Kept>,
    ) -> Result<oneshot::Receiver<member::Released>, LoadError> {
        let rank = self.place.rank;
        let placement = &prepared.plan.load.placement;
        let memory = self.memory_alone().await?;
        let in_use = || LoadError::NotReady { why: "its memory is in use".into() };
        let alone = Arc::get_mut(memory).ok_or_else(in_use)?;
        let begun = alone.begin_again(placement.clone(), rank, kept);
        begun.map_err(|source| LoadError::Rank { rank, source })?;
        let memory = Arc::clone(memory);
        let join = host_join(&self.place, prepared, &self.group, self.joined.address, None)?;
        let checked = Arc::clone(prepared);
        let ((released, outcome), (taken_up, answer)) = (oneshot::channel(), oneshot::channel());
        let again = Again {
            work: prepared.work(),
            home: prepared.homes.first().cloned().unwrap_or(Home::Host),
            memory,
            kept: Arc::clone(kept),
            join: Arc::new(join),
            plan: prepared.plan.hash(),
            check_at_end: Box::new(move || check_unchanged(&checked)),
            released,
            taken_up,
        };
        let gone = || LoadError::Runtime("the rank's actor has ended".into());
        let again = MemberMessage::Again(Box::new(again));
        self.joined.member.cast(again).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(LoadError::Runtime)?;
        Ok(outcome)
    }

    /// Takes the right to read away and waits until nothing of an earlier attempt is left (RNK-5).
    async fn memory_alone(&mut self) -> Result<&mut Arc<ParamMemory>, LoadError> {
        self.not_ready("a reload has not ended".to_owned());
        // a member that is gone holds nothing
        let _ = self.joined.member.cast(MemberMessage::LetGo);
        let lost = || LoadError::NotReady { why: "its memory was lost".into() };
        let Weights::NotReady { memory, .. } = &mut self.weights else { return Err(lost()) };
        let deadline = Instant::now() + QUIET_AFTER;
        while Arc::get_mut(memory).is_none() {
            if Instant::now() > deadline {
                let why = format!("a read of an earlier attempt hangs for {QUIET_AFTER:?}");
                return Err(LoadError::NotReady { why });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(memory)
    }

    /// Loads what was `changed` of the old checkpoint again, as all ranks do, if it is still the same on all; says how that went.
    async fn restore(&mut self, changed: &[bool], cause: LoadError) -> LoadError {
        let (plan, source) = (self.plan.clone(), self.source.clone());
        warn!("reload failed, loading {source} again: {}", cause.line());
        // refuses files that are not those which were planned for, and so not those which were loaded
        let validated = self.validate(&plan);
        let restored = match self.vote(&source, validated).await {
            Ok(prepared) => self.write(&prepared, changed).await,
            Err(e) => Err(e),
        };
        match restored {
            Ok(()) => {
                info!("the weights of {source} are back");
                let (kept, not_restored) = (source.into(), None);
                LoadError::Reload { kept, not_restored, source: Box::new(cause) }
            }
            Err(e) => {
                let needed = match e {
                    LoadError::OnRank { .. } => "reload a checkpoint that is whole",
                    _ => "start all ranks again",
                };
                self.not_restored(format!("{}; {needed}", e.line()), cause)
            }
        }
    }

    fn not_reloaded(&self, why: LoadError) -> LoadError {
        LoadError::NotReloaded { kept: self.source.clone().into(), source: Box::new(why) }
    }

    /// Nobody may look at the weights any more; returns what says so.
    fn not_restored(&mut self, why: String, cause: LoadError) -> LoadError {
        self.not_ready(format!("{}; the old weights are not back: {why}", cause.line()));
        let (kept, not_restored) = (self.source.clone().into(), Some(why));
        LoadError::Reload { kept, not_restored, source: Box::new(cause) }
    }

    fn not_ready(&mut self, why: String) {
        self.weights = match std::mem::replace(&mut self.weights, Weights::Moving) {
            Weights::Ready(params) => Weights::NotReady { memory: params.into_memory(), why },
            Weights::NotReady { memory, .. } => Weights::NotReady { memory, why },
            Weights::Moving => Weights::Moving,
        };
    }

    /// Counts the attempts at filling this group.
    pub(crate) fn generation(&self) -> Generation {
        self.joined.generation
    }
}

impl Weights {
    fn params(&self) -> Result<&ReadyParams, LoadError> {
        match self {
            Weights::Ready(params) => Ok(params),
            other => Err(other.not_ready()),
        }
    }

    fn not_ready(&self) -> LoadError {
        let why = match self {
            Weights::NotReady { why, .. } => why.as_str(),
            Weights::Ready(_) | Weights::Moving => "its memory was lost",
        };
        LoadError::NotReady { why: why.to_owned() }
    }
}

/// Whether all ranks can load what they voted on, and mean the same; every rank finds the same reason why not.
fn judge(votes: &[Vote]) -> Result<(), LoadError> {
    for (rank, vote) in (0..).zip(votes) {
        if let Vote::Refuses { why, code } = vote {
            return Err(LoadError::OnRank { rank, why: why.clone(), code: *code });
        }
    }
    match votes.iter().position(|vote| *vote != votes[0]) {
        None => Ok(()),
        Some(other) => Err(LoadError::OtherReload { rank: other as u32 }),
    }
}

/// The first of all ranks that has told why it fails.
fn first_failure(told: Gathered) -> Result<(), LoadError> {
    for (rank, why) in (0..).zip(told?) {
        if !why.is_empty() {
            let why = String::from_utf8_lossy(&why).into_owned();
            return Err(LoadError::OnRank { rank, why, code: 1 });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(source: &str, plan: u8) -> Vote {
        Vote::Accepts { source: source.into(), plan: [plan; 16] }
    }

    #[test]
    fn all_ranks_find_the_first_that_refuses_or_means_another() {
        let refuses = Vote::Refuses { why: "b/x: opening failed".into(), code: 2 };
        let line = |votes: &[Vote]| judge(votes).err().map(|e| (e.line(), e.exit_code()));
        assert_eq!(line(&[accepts("b", 1), accepts("b", 1)]), None);
        let refused = Some(("rank 2: b/x: opening failed".to_owned(), 2));
        assert_eq!(line(&[accepts("b", 1), accepts("c", 1), refuses.clone(), refuses]), refused);
        for other in [accepts("c", 1), accepts("b", 2)] {
            let (line, code) = line(&[accepts("b", 1), other]).unwrap();
            assert!(line.starts_with("rank 1 was told"), "{line}");
            assert_eq!(code, 2);
        }
    }
}
