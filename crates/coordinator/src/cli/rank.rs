//! `longshore rank`, and `longshore load --ranks processes`, which launches it.

use std::{ffi::OsString, path::Path, process::ExitCode, sync::Arc};

use longshore_rank::{params::ReadyParams, protocol::Progress};
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::LevelFilter;

use super::{
    Phases, Step,
    arguments::{LoadArgs, RankArgs},
    fail, launch, plan_steps, print, start_log, watch,
};
use crate::{
    device, digest,
    error::LoadError,
    launch::{FinalLines, Launch, REPLACE_ME, RESTARTS_VARIABLE},
    link::wire,
    load::{prepare_process, progress_of},
    out::{self, RankFile},
    place::Place,
    plan::Plan,
    processes::{self, Door, Joined, OnLoss, Transport, holder::Holder},
    report::{Done, RanksAs, Report, peak_rss_bytes},
    verify::Verified,
};

/// Carries `longshore load --ranks processes` out: this program as every rank, with the same arguments.
pub(super) fn launch(
    load: &LoadArgs,
    arguments: Vec<OsString>,
    log_level: LevelFilter,
) -> ExitCode {
    start_log(log_level, None);
    match rank_command(load, arguments).and_then(|command| {
        let group = load.run.group_options()?;
        let shared = device::are_shared(load.run.plan.device_choice(), load.tp);
        let nccl_hosts = shared && group.transport == Transport::Nccl;
        let final_lines = FinalLines::One;
        let max_restarts = match group.on_loss {
            OnLoss::Fail | OnLoss::Shrink => 0,
            OnLoss::Wait => group.max_restarts,
        };
        let shrinks = group.on_loss == OnLoss::Shrink;
        let launch = Launch::new(command, load.tp);
        let launch = Launch { max_restarts, shrinks, final_lines, nccl_hosts, ..launch };
        launch.run()
    }) {
        Ok(ended) => launch::exit(&ended),
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

/// The command line of each rank: this one's, with `rank` in the place of `load`.
fn rank_command(load: &LoadArgs, mut arguments: Vec<OsString>) -> Result<Vec<OsString>, LoadError> {
    // before anything is started: what is wrong with them is said once
    load.run.run_options()?;
    load.run.plan.plan_options(load.tp)?;
    device::refuse_unusable(load.run.plan.device_choice())?;
    let failed = |source| LoadError::Io {
        path: "/proc/self/exe".into(),
        action: "finding this program",
        source,
    };
    if let Some(program) = arguments.first_mut() {
        *program = std::env::current_exe().map_err(failed)?.into();
    }
    if let Some(command) = arguments.iter_mut().find(|argument| *argument == "load") {
        *command = "rank".into();
    }
    Ok(arguments)
}

/// Runs one rank and says how to exit.
pub(super) fn run(arguments: &RankArgs, json: bool, log_level: LevelFilter) -> ExitCode {
    let place = match Place::from_env() {
        Ok(place) => place,
        Err(e) => return fail(&e.line(), e.exit_code()),
    };
    match place.rank {
        0 => start_log(log_level, None),
        // what rank 0 says as well is not said by each
        rank => {
            let level = if log_level == LevelFilter::INFO { LevelFilter::WARN } else { log_level };
            start_log(level, Some(format!("[rank {rank}] ")));
        }
    }
    match run_rank(arguments, &place, json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e @ LoadError::NotNeeded { .. }) => {
            tracing::warn!("{}", e.line());
            ExitCode::SUCCESS
        }
        // the coordinator prints the cause
        Err(e) if place.rank > 0 && is_told_by_rank_0(&e) => ExitCode::from(e.exit_code()),
        Err(e @ LoadError::Replaced { .. }) if is_started_again() => fail(&e.line(), REPLACE_ME),
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

/// Whether a launcher of ours is there to start this rank again.
fn is_started_again() -> bool {
    std::env::var_os(RESTARTS_VARIABLE).is_some()
}

/// Whether rank 0 ends with the same, or with the cause of it.
fn is_told_by_rank_0(e: &LoadError) -> bool {
    match e {
        LoadError::GroupEnded { .. } | LoadError::OnRank { .. } | LoadError::OtherReload { .. } => {
            true
        }
        LoadError::NoAnswer { rank, .. } => *rank != 0,
        LoadError::NotReloaded { source, .. } | LoadError::Reload { source, .. } => {
            is_told_by_rank_0(source)
        }
        _ => false,
    }
}

fn run_rank(arguments: &RankArgs, place: &Place, json: bool) -> Result<(), LoadError> {
    let run = &arguments.run;
    let tp = arguments.tp(place.world_size)?;
    let (options, group) = (run.run_options()?, run.group_options()?);
    let door = Door::open(place)?;
    let mut steps = plan_steps(run, tp)?.into_iter();
    let Some(Step { source, plan, mut phases }) = steps.next() else { return Ok(()) };
    if let Some(dir) = &run.out {
        out::check_writable(dir, place.rank)?;
    }
    let prepared = prepare_process(&plan, &options, place, group.transport)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| LoadError::Runtime(e.to_string()))?;
    let progress = progress_of(&plan);
    // what is lost when the load is complete is no part of it any more: all do it once more
    let once_more = group.on_loss == OnLoss::Wait && group.max_restarts > 0 && is_started_again();
    let counters = progress.clone();
    let loading = processes::load(place, door, source, prepared, &group, progress);
    let watched = Watched { place, progress: &counters };
    let held = phases.measure("load", || watched.run(&plan, || runtime.block_on(loading)));
    let done = held.and_then(|mut holder| {
        let (out, hash) = (run.out.as_deref(), !run.no_digest);
        let reloaded = steps.try_for_each(|Step { source, plan, phases: own }| {
            phases = own;
            let reloading = holder.reload(source, Ok(plan.clone()));
            phases.measure("load", || watched.run(&plan, || runtime.block_on(reloading)))
        });
        let report =
            reloaded.and_then(|()| runtime.block_on(results(&mut holder, out, hash, phases)));
        // also where it failed: the others learn the cause before this process is gone
        runtime.block_on(holder.end());
        report.map_err(|e| if once_more && is_loss(&e) { replaced(&e) } else { e })
    });
    // a read that hangs in the kernel must not keep the process from ending
    runtime.shutdown_background();
    match done? {
        Some(report) => print(&report, json, || report.table()),
        None => Ok(()),
    }
}

/// Whether it is for want of a rank, and other processes would fare better.
fn is_loss(e: &LoadError) -> bool {
    match e {
        LoadError::RankLost { .. }
        | LoadError::RankStuck { .. }
        | LoadError::CoordinatorLost { .. }
        | LoadError::GroupEnded { .. }
        | LoadError::NotReady { .. } => true,
        LoadError::NotReloaded { source, .. } | LoadError::Reload { source, .. } => is_loss(source),
        _ => false,
    }
}

fn replaced(e: &LoadError) -> LoadError {
    LoadError::Replaced { why: e.line() }
}

/// On rank 0, shows how all ranks get on.
struct Watched<'a> {
    place: &'a Place,
    progress: &'a [Arc<Progress>],
}

impl Watched<'_> {
    fn run<T>(&self, plan: &Plan, work: impl FnOnce() -> T) -> T {
        let watch = (self.place.rank == 0).then(|| watch::Watch::start(plan, self.progress));
        let done = work();
        if let Some(watch) = watch {
            watch.stop();
        }
        done
    }
}

/// Hashes and writes what the group holds; on rank 0 returns the report.
async fn results(
    holder: &mut Holder,
    out: Option<&Path>,
    hash: bool,
    phases: Phases,
) -> Result<Option<Report>, LoadError> {
    let (place, plan, source) =
        (holder.place().clone(), holder.plan().clone(), holder.source().to_owned());
    let (warnings, verified) = (holder.warnings.clone(), holder.verified.clone());
    let (params, joined) = holder.params_and_joined()?;
    let rank = Rank { place: &place, plan: &plan, source: &source, out, params };
    let own = Holding { verified, ..Holding::default() };
    rank.results(joined, own, &warnings, hash, phases).await
}

/// A rank that has been loaded, and what is to become of it.
struct Rank<'a> {
    place: &'a Place,
    plan: &'a Plan,
    source: &'a str,
    out: Option<&'a Path>,
    params: &'a ReadyParams,
}

/// What a rank tells of what it holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Holding {
    peak_rss_bytes: u64,
    /// Of each parameter, where a digest is wanted.
    hashes: Vec<u128>,
    /// Of each parameter, where files are wanted.
    sha256: Vec<[u8; 32]>,
    /// Its share of the files that were verified, where that was asked for.
    verified: Option<Verified>,
}

impl Rank<'_> {
    /// Hashes and writes what the group holds; on rank 0 returns the report.
    async fn results(
        &self,
        joined: &mut Joined,
        mut own: Holding,
        warnings: &[String],
        hash: bool,
        mut phases: Phases,
    ) -> Result<Option<Report>, LoadError> {
        if hash {
            own.hashes = phases.measure("digest", || digest::param_hashes(self.params))?;
        }
        let file = match self.out {
            None => None,
            Some(dir) => Some(self.write_file(dir, joined).await?),
        };
        if file.is_some() {
            own.sha256 = digest::param_sha256(self.params)?;
        }
        own.peak_rss_bytes = peak_rss_bytes().unwrap_or(0);
        let failed = |e: wire::WireError| LoadError::Runtime(e.to_string());
        let piece = wire::encode(&own).map_err(failed)?.to_vec();
        let holdings = match joined.gather(piece).await? {
            None => None,
            Some(pieces) => {
                let all: Result<Vec<Holding>, _> = pieces.iter().map(|p| wire::decode(p)).collect();
                Some(all.map_err(failed)?)
            }
        };
        if let (Some(dir), Some(file)) = (self.out, file) {
            self.publish(dir, joined, file, holdings.as_deref()).await?;
        }
        let (Some(holdings), Some(reports)) = (holdings, &joined.reports) else {
            return Ok(None);
        };
        let peaks: Vec<u64> = holdings.iter().map(|h| h.peak_rss_bytes).collect();
        let (ranks_as, peak_rss_bytes) = (RanksAs::Processes, Some(peaks.as_slice()));
        let verified = holdings.iter().filter_map(|h| h.verified.clone()).reduce(Verified::merge);
        let verified = verified.as_ref();
        let done = Done {
            reports,
            warnings,
            verified,
            kept_bytes: joined.kept_bytes,
            generation: joined.generation,
            lost: joined.lost,
            ranks_as,
            peak_rss_bytes,
        };
        let mut report = Report::of_load(self.plan, self.source, &done);
        report.seconds = Some(phases.ready_seconds(joined.seconds));
        if hash {
            let shares = holdings.into_iter().map(|h| h.hashes);
            report.digest = Some(digest::combine(self.params, shares));
        }
        report.phases = phases.0;
        Ok(Some(report))
    }

    /// Writes this rank's file aside; returns when every rank has.
    async fn write_file(&self, dir: &Path, joined: &mut Joined) -> Result<RankFile, LoadError> {
        // rank 0 takes the old manifest away before any rank writes
        let begun = if self.place.rank == 0 { out::begin(dir) } else { Ok(()) };
        self.all_could(joined, begun).await?;
        let written = RankFile::write(dir, self.params, self.place.world_size);
        self.all_could(joined, written).await
    }

    /// Gives all files their names, then writes the manifest. A rank that fails ends the group, and there is no manifest.
    async fn publish(
        &self,
        dir: &Path,
        joined: &mut Joined,
        file: RankFile,
        holdings: Option<&[Holding]>,
    ) -> Result<(), LoadError> {
        self.all_could(joined, file.publish()).await?;
        match holdings {
            None => Ok(()),
            Some(holdings) => {
                let hashes: Vec<_> = holdings.iter().map(|h| h.sha256.clone()).collect();
                out::write_manifest(dir, self.plan, self.params, &hashes, self.source)
            }
        }
    }

    /// Waits until every rank has tried what this one has `done`; the first that could not is the failure of all, which rank 0
    /// tells.
    async fn all_could<T>(
        &self,
        joined: &mut Joined,
        done: Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let why = done.as_ref().err().map(LoadError::line).unwrap_or_default();
        let all = joined.all_gather(why.into_bytes()).await?;
        let failed = all.iter().enumerate().find(|(_, why)| !why.is_empty()).map(|(rank, why)| {
            let why = String::from_utf8_lossy(why).into_owned();
            LoadError::RankOutput { rank: rank as u32, why }
        });
        match failed {
            None => done,
            Some(failed) if self.place.rank == 0 => Err(failed),
            Some(failed) => Err(LoadError::GroupEnded { why: failed.line() }),
        }
    }
}
