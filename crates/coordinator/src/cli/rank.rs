//! `longshore rank`, and `longshore load --ranks processes`, which launches it.

use std::{ffi::OsString, path::Path, process::ExitCode};

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::LevelFilter;

use super::{
    Phases, fail, launch, make_plan, print, start_log,
    arguments::{LoadArgs, RankArgs},
    watch,
};
use crate::{
    digest,
    error::LoadError,
    launch::{FinalLines, Launch},
    link::wire,
    load::{prepare_process, progress_of},
    out::{self, RankFile},
    place::Place,
    plan::Plan,
    processes::{self, Joined},
    report::{Done, Report, peak_rss_bytes},
};

/// Carries `longshore load --ranks processes` out: this program as every rank, with the same arguments.
pub(super) fn launch(
    load: &LoadArgs,
    arguments: Vec<OsString>,
    log_level: LevelFilter,
) -> ExitCode {
    start_log(log_level, None);
    match rank_command(load, arguments).and_then(|command| {
        let launch = Launch { final_lines: FinalLines::One, ..Launch::new(command, load.tp) };
        launch.run()
    }) {
        Ok(ended) => launch::exit(&ended),
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

/// The command line of each rank: this one's, with `rank` in the place of `load`.
fn rank_command(
    load: &LoadArgs,
    mut arguments: Vec<OsString>,
) -> Result<Vec<OsString>, LoadError> {
    // before anything is started: what is wrong with them is said once
    load.run.plan.check_supported()?;
    load.run.run_options()?;
    load.run.plan.plan_options(load.tp)?;
    refuse_reload(&load.run.reload)?;
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

fn refuse_reload(reload: &[String]) -> Result<(), LoadError> {
    match reload.is_empty() {
        true => Ok(()),
        false => {
            let reason = "not supported with ranks that are processes yet".into();
            Err(LoadError::Option { option: "--reload", reason })
        }
    }
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
        // the coordinator prints the cause
        Err(LoadError::GroupEnded { .. }) => ExitCode::FAILURE,
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

fn run_rank(arguments: &RankArgs, place: &Place, json: bool) -> Result<(), LoadError> {
    let run = &arguments.run;
    let tp = arguments.tp(place.world_size)?;
    refuse_reload(&run.reload)?;
    let (options, group) = (run.run_options()?, run.group_options());
    let source = &run.plan.source;
    let mut phases = Phases::default();
    let plan = make_plan(&run.plan, tp, source, &mut phases)?;
    if let Some(dir) = &run.out {
        out::check_writable(dir)?;
    }
    let prepared = phases.measure("open", || {
        prepare_process(&plan, &options, place, group.transport)
    })?;
    let warnings = prepared.warnings.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| LoadError::Runtime(e.to_string()))?;
    let progress = progress_of(&plan);
    let watch = (place.rank == 0).then(|| watch::Watch::start(&plan, &progress));
    let joined = phases.measure("load", || {
        runtime.block_on(processes::load(place, prepared, &group, progress))
    });
    if let Some(watch) = watch {
        watch.stop();
    }
    let done = joined.and_then(|mut joined| {
        let rank = Rank { place, plan: &plan, source, out: run.out.as_deref() };
        let report = runtime.block_on(rank.results(&mut joined, &warnings, !run.no_digest, phases));
        runtime.block_on(joined.end());
        report
    });
    // a read that hangs in the kernel must not keep the process from ending
    runtime.shutdown_background();
    match done? {
        Some(report) => print(&report, json, || report.table()),
        None => Ok(()),
    }
}

/// What a rank tells of what it holds.
#[derive(Debug, Serialize, Deserialize)]
struct Result_ {
    peak_rss_bytes: Option<u64>,
    /// Of each parameter, where a digest was asked for.
    hashes: Vec<u128>,
    /// Of each parameter, where files were asked for.
    sha256: Vec<[u8; 32]>,
    /// Why its file could not be written.
    failed: Option<String>,
}
