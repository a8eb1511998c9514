//! A group of ranks after their load: hands out complete parameters, and takes another checkpoint in place.
//!
//! Design: everything about the new checkpoint is validated before the first byte of it is written (headers, shapes,
//! dtypes, completeness, the same parameters on every rank, every file open and as long as its header says). All ranks
//! commit or none does: a failure before the first write leaves the old weights as they were; a failure while writing is
//! repaired by loading the old checkpoint again. What both checkpoints have in files that are the same is neither read nor
//! written, forth or back. Where that fails too, the group is not ready, and says so instead of
//! handing out a mix.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use longshore_rank::{
    error::RankError,
    params::{ParamMemory, ReadyParams},
    protocol::{Generation, Progress, RankReport},
};
use tracing::{info, warn};

use crate::{
    error::LoadError,
    load::{Finished, Prepared, Reuse, RunOptions, attempt, given_back, prepare_into, progress_of},
    plan::{Plan, changed},
    verify::Verified,
};

/// How long a reload waits for the reads of an earlier attempt that failed; a read from local storage takes far less.
const QUIET_AFTER: Duration = Duration::from_secs(30);

/// A group of ranks that holds the weights of one checkpoint.
#[derive(Debug)]
pub struct Group {
    /// The plan of the weights that it holds, or held last.
    plan: Plan,
    options: RunOptions,
    /// When its files were opened.
    opened: SystemTime,
    generation: Generation,
    weights: Weights,
    /// What each rank did in the load of these weights.
    pub reports: Vec<RankReport>,
    /// What looked odd in their values.
    pub warnings: Vec<String>,
    /// Which of the files were verified, where that was asked for.
    pub verified: Option<Verified>,
    /// Checkpoint bytes that were in place before, and so were not read.
    pub kept_bytes: u64,
    /// Seconds that it took, from opening the files until every rank was ready.
    pub seconds: f64,
}

#[derive(Debug)]
enum Weights {
    /// Every parameter of every rank is complete.
    Ready(Vec<ReadyParams>),
    /// Bytes of several checkpoints may be mixed; nobody may look.
    NotReady { memory: Vec<Arc<ParamMemory>>, why: String },
}

impl Group {
    pub(crate) fn new(prepared: Prepared, finished: Finished) -> Self {
        Self {
            plan: prepared.plan,
            options: prepared.options,
            opened: prepared.opened,
            generation: finished.generation,
            weights: Weights::Ready(finished.ranks),
            reports: finished.reports,
            warnings: prepared.warnings,
            verified: prepared.verified,
            kept_bytes: 0,
            seconds: finished.seconds,
        }
    }

    /// Each rank's finished parameters.
    ///
    /// # Errors
    /// A reload failed and could not be undone: the group is not ready until another reload succeeds.
    pub fn ranks(&self) -> Result<&[ReadyParams], LoadError> {
        match &self.weights {
            Weights::Ready(ranks) => Ok(ranks),
            Weights::NotReady { why, .. } => Err(LoadError::NotReady { why: why.clone() }),
        }
    }

    /// Gives up the group for its ranks' parameters.
    ///
    /// # Errors
    /// As [`Group::ranks`].
    pub fn into_ranks(self) -> Result<Vec<ReadyParams>, LoadError> {
        match self.weights {
            Weights::Ready(ranks) => Ok(ranks),
            Weights::NotReady { why, .. } => Err(LoadError::NotReady { why }),
        }
    }

    /// The checkpoint that the group holds; changes only when a reload has succeeded on every rank.
    pub fn source(&self) -> &Path {
        self.plan.origin.shown()
    }

    /// Counts the attempts at filling this group.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Loads another checkpoint into the same parameters, at the same addresses. What both have in files that are the same is
    /// not read, and nobody writes it.
    ///
    /// # Errors
    /// Refused before the first write (files that cannot be opened or have changed, other parameters than the group
    /// holds): the weights are untouched. [`LoadError::Reload`]: it failed while writing, and says whether the old weights
    /// are back; if not, [`Group::ranks`] refuses from now on.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the group not ready; another reload waits for what is still running, and mends it.
    pub async fn reload(
        &mut self,
        plan: &Plan,
        progress: Vec<Arc<Progress>>,
    ) -> Result<(), LoadError> {
        let same = self.plan.placement().same_parameters(plan.placement());
        same.map_err(|source| LoadError::Plan { path: plan.origin.shown().into(), source })?;
        let prepared = prepare_into(plan, &self.options, 0)?;
        let changed = match &self.weights {
            Weights::Ready(_) => changed(&self.plan, plan, self.opened),
            // what of it is whole is not known
            Weights::NotReady { .. } => vec![true; plan.placement().params.len()],
        };
        match self.write(&prepared, &changed, progress).await {
            Ok(()) => {
                self.plan = prepared.plan;
                Ok(())
            }
            Err(cause) => Err(self.restore(&changed, cause).await),
        }
    }

    /// Writes what is `changed` of a prepared checkpoint over whatever the memory holds.
    async fn write(
        &mut self,
        prepared: &Prepared,
        changed: &[bool],
        progress: Vec<Arc<Progress>>,
    ) -> Result<(), LoadError> {
        let kept = prepared.kept(changed);
        let left = prepared.plan.left(&vec![kept.have.clone(); prepared.plan.load.reads.len()])?;
        self.generation += 1;
        let memory = self.memory_alone().await?;
        let placement = &prepared.plan.load.placement;
        let alone: Option<Vec<&mut ParamMemory>> = memory.iter_mut().map(Arc::get_mut).collect();
        let Some(alone) = alone else {
            return Err(LoadError::NotReady { why: "its memory is in use".into() });
        };
        std::thread::scope(|scope| {
            let mut begun = Vec::with_capacity(alone.len());
            for (rank, memory) in alone.into_iter().enumerate() {
                let (placement, kept) = (Arc::clone(placement), &*kept);
                let begin = move || memory.begin_again(placement, rank as u32, kept);
                begun.push((rank as u32, scope.spawn(begin)));
            }
            let panicked = |_| Err(RankError::Panicked("while it began again".to_owned()));
            begun.into_iter().try_for_each(|(rank, begin)| {
                let begun = begin.join().unwrap_or_else(panicked);
                begun.map_err(|source| LoadError::Rank { rank, source })
            })
        })?;
        let kept_bytes = kept.bytes;
        let reuse = Reuse { memory: memory.clone(), kept, left };
        let finished = attempt(prepared, self.generation, Some(reuse), progress).await?;
        self.opened = prepared.opened;
        self.kept_bytes = kept_bytes;
        self.reports = finished.reports;
        self.warnings.clone_from(&prepared.warnings);
        self.verified.clone_from(&prepared.verified);
        self.seconds = finished.seconds;
        self.weights = Weights::Ready(finished.ranks);
        given_back(self.ranks()?).await;
        Ok(())
    }

    /// Takes the right to read away and waits until no worker of an earlier attempt is left (RNK-5).
    async fn memory_alone(&mut self) -> Result<&mut Vec<Arc<ParamMemory>>, LoadError> {
        if let Weights::Ready(ranks) = &mut self.weights {
            let memory = std::mem::take(ranks).into_iter().map(ReadyParams::into_memory).collect();
            self.weights = Weights::NotReady { memory, why: "a reload has not ended".into() };
        }
        let deadline = Instant::now() + QUIET_AFTER;
        loop {
            let Weights::NotReady { memory, .. } = &mut self.weights else {
                return Err(LoadError::NotReady { why: "its memory was lost".into() });
            };
            if memory.iter_mut().all(|m| Arc::get_mut(m).is_some()) {
                break;
            }
            if Instant::now() > deadline {
                let why = format!("a read of an earlier attempt hangs for {QUIET_AFTER:?}");
                return Err(LoadError::NotReady { why });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        match &mut self.weights {
            Weights::NotReady { memory, .. } => Ok(memory),
            Weights::Ready(_) => Err(LoadError::NotReady { why: "its memory was lost".into() }),
        }
    }

    /// Loads what was `changed` of the old checkpoint again, if it is still the same; says how that went.
    async fn restore(&mut self, changed: &[bool], cause: LoadError) -> LoadError {
        let old = self.plan.clone();
        let kept = old.origin.shown().to_owned();
        warn!("reload failed, loading {} again: {}", kept.display(), cause.line());
        // refuses files that are not those which were planned for, and so not those which were loaded
        let outcome = match prepare_into(&old, &self.options, 0) {
            Ok(prepared) => self.write(&prepared, changed, progress_of(&old)).await,
            Err(e) => Err(e),
        };
        let not_restored = outcome.err().map(|e| e.line());
        if let Some(why) = &not_restored {
            let text = format!("{}; restoring the old weights failed: {why}", cause.line());
            if let Weights::NotReady { why, .. } = &mut self.weights {
                *why = text;
            }
        } else {
            info!("the weights of {} are back", kept.display());
        }
        LoadError::Reload { kept, not_restored, source: Box::new(cause) }
    }
}
