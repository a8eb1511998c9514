//! A load onto ranks that are threads of this process.

use std::{
    ops::Deref,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use longshore_rank::protocol::{Phase, Progress};
use tokio::{runtime::Runtime, task::JoinHandle};

use super::{Load, Params};
use crate::{
    digest,
    error::LoadError,
    group::Group,
    load::{self, progress_of},
    plan::Plan,
    report::{Done, Lost, RanksAs, Report},
};

impl Load {
    /// Plans, opens the files, and starts loading onto ranks that are threads of this process.
    ///
    /// # Errors
    /// The source cannot be loaded with these options, or not on this host; nothing has been read of its weights then.
    pub fn start(self) -> Result<Loading, LoadError> {
        let plan = self.planned(self.tensor_parallel.unwrap_or(1))?;
        let prepared = load::prepare(&plan, &self.run)?;
        let runtime = Background::start()?;
        let progress = progress_of(&plan);
        let group = runtime.spawn(load::run(prepared, progress.clone()));
        Ok(Loading { load: self, plan, progress, group, runtime })
    }
}

/// The runtime of a load. Dropping it waits for nothing, so it may be done in asynchronous code too, where a bare runtime
/// panics.
#[derive(Debug)]
pub(super) struct Background(Option<Runtime>);

impl Background {
    pub(super) fn start() -> Result<Self, LoadError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("longshore")
            .enable_all()
            .build();
        runtime.map(|runtime| Self(Some(runtime))).map_err(|e| LoadError::Runtime(e.to_string()))
    }
}

impl Deref for Background {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("only drop takes it")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A load that is going on. Dropping it lets the ranks go on until they are done; their memory is freed then.
#[derive(Debug)]
pub struct Loading {
    load: Load,
    plan: Plan,
    progress: Vec<Arc<Progress>>,
    group: JoinHandle<Result<Group, LoadError>>,
    runtime: Background,
}

/// How one rank is getting on. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankProgress {
    /// The rank.
    pub rank: u32,
    /// What it is doing.
    pub phase: Phase,
    /// What it has read from storage.
    pub read_bytes: u64,
    /// What it will have read in the end.
    pub total_bytes: u64,
    /// What it has received from other ranks.
    pub received_bytes: u64,
}

impl Loading {
    /// What the load does.
    pub fn plan(&self) -> Report {
        Report::forecast(&self.plan, &self.load.source, RanksAs::Threads)
    }

    /// How each rank is getting on.
    pub fn progress(&self) -> Vec<RankProgress> {
        progress(&self.plan, &self.progress)
    }

    /// Waits until every parameter of every rank is complete.
    ///
    /// Blocks; in asynchronous code call it where that is allowed (`spawn_blocking`).
    ///
    /// # Errors
    /// The first failure of any rank; nothing is handed out.
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn wait(self) -> Result<Loaded, LoadError> {
        let Self { load, plan, group, runtime, .. } = self;
        let ended = |e: tokio::task::JoinError| LoadError::Runtime(e.to_string());
        let group = runtime.block_on(group).map_err(ended)??;
        Ok(Loaded { load, plan, group, runtime })
    }
}

pub(super) fn progress(plan: &Plan, progress: &[Arc<Progress>]) -> Vec<RankProgress> {
    let each = progress.iter().zip(&plan.forecast).enumerate();
    each.map(|(rank, (progress, forecast))| RankProgress {
        rank: rank as u32,
        phase: progress.phase(),
        read_bytes: progress.read_bytes.load(Relaxed),
        total_bytes: forecast.storage_bytes,
        received_bytes: progress.received_bytes.load(Relaxed),
    })
    .collect()
}

/// A group of ranks in this process, complete.
#[derive(Debug)]
pub struct Loaded {
    load: Load,
    plan: Plan,
    group: Group,
    runtime: Background,
}

impl Loaded {
    /// Each rank's parameters.
    ///
    /// # Errors
    /// A reload failed and could not be undone: the group is not ready until another reload succeeds.
    pub fn ranks(&self) -> Result<Vec<Params<'_>>, LoadError> {
        Ok(self.group.ranks()?.iter().map(Params).collect())
    }

    /// What the load did.
    pub fn report(&self) -> Report {
        let done = Done {
            reports: &self.group.reports,
            warnings: &self.group.warnings,
            verified: self.group.verified.as_ref(),
            kept_bytes: self.group.kept_bytes,
            generation: self.group.generation(),
            lost: Lost::default(),
            peak_rss_bytes: None,
            ranks_as: RanksAs::Threads,
        };
        let mut report = Report::of_load(&self.plan, &self.load.source, &done);
        report.seconds = Some(self.group.seconds);
        report
    }

    /// The digest over all parameters of all ranks: the same for every load of the same checkpoint with the same options,
    /// however the bytes travelled.
    ///
    /// # Errors
    /// As [`Loaded::ranks`], or a device that holds parameters fails.
    pub fn digest(&self) -> Result<String, LoadError> {
        digest::group_digest(self.group.ranks()?)
    }

    /// Loads another checkpoint into the same parameters, at the same addresses. Files that are the same are not read again,
    /// and what is made of nothing else is not written ([`Report::kept_bytes`]).
    ///
    /// # Errors
    /// Refused before the first write: the weights are untouched. [`LoadError::Reload`]: it failed while writing, and says
    /// whether the old weights are back.
    ///
    /// # Panics
    /// When called within a runtime's own thread.
    pub fn reload(&mut self, source: impl Into<String>) -> Result<(), LoadError> {
        let load = Load { source: source.into(), ..self.load.clone() };
        let plan = load.planned(self.load.tensor_parallel.unwrap_or(1))?;
        self.runtime.block_on(self.group.reload(&plan, progress_of(&plan)))?;
        (self.load, self.plan) = (load, plan);
        Ok(())
    }
}
