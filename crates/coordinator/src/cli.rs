//! The command line.

mod arguments;
mod chaos;
mod launch;
mod rank;
mod watch;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, IsTerminal, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use serde::Serialize;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cache::{self, weights},
    digest,
    discover::discover,
    error::LoadError,
    group::Group,
    inspect::Inspection,
    load::{RunOptions, load, progress_of},
    out,
    plan::{Plan, PlanOptions},
    report::{Done, Lost, RanksAs, Report, bytes_text},
    source,
};

use self::arguments::{
    CacheAction, CacheArgs, Cli, Command, InspectArgs, LoadArgs, PlanArgs, RanksArg, RunArgs,
    SynthArgs,
};

/// Runs the command line of this process and says how to exit.
pub fn main() -> ExitCode {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(e) if !e.use_stderr() => {
            // --help and --version
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => return fail(&one_line(&e.to_string()), 2),
    };
    if let Command::Load(load) = &cli.command
        && load.run.plan.ranks == RanksArg::Processes
    {
        return rank::launch(load, std::mem::take(&mut arguments), cli.log_level);
    }
    if let Command::Rank(arguments) = &cli.command {
        return rank::run(arguments, cli.json, cli.log_level);
    }
    start_log(cli.log_level, None);
    let done = match &cli.command {
        Command::Load(arguments) => run_load(arguments, cli.json),
        Command::Plan(arguments) => run_plan(arguments, cli.json),
        Command::Inspect(arguments) => run_inspect(arguments, cli.json),
        Command::Synth(arguments) => run_synth(arguments, cli.json),
        Command::Cache(arguments) => run_cache(arguments, cli.json),
        Command::Launch(arguments) => return launch::run(arguments),
        Command::Chaos(arguments) => return chaos::run(arguments, cli.json),
        // taken care of above, since they say where their log goes
        Command::Rank(_) => Ok(()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

/// Ends a failed command with one line. It is written at once, so that lines of several processes do not mix.
fn fail(line: &str, code: u8) -> ExitCode {
    // without stderr there is nobody to tell
    let _ = io::stderr().write_all(format!("longshore: {line}\n").as_bytes());
    ExitCode::from(code)
}

/// The first paragraph of clap's message, without its prefix.
fn one_line(message: &str) -> String {
    let paragraph = message.split("\n\n").next().unwrap_or(message);
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

/// Starts the log, each line of it after `prefix`.
fn start_log(level: LevelFilter, prefix: Option<String>) {
    tracing_subscriber::fmt()
        .with_writer(move || Prefixed { prefix: prefix.clone(), out: io::stderr() })
        .with_max_level(level)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .compact()
        .init();
}

/// Puts a prefix before what is written at a time, which is a line of the log.
#[derive(Debug)]
struct Prefixed {
    prefix: Option<String>,
    out: io::Stderr,
}

impl Write for Prefixed {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.prefix.take() {
            None => self.out.write(line),
            Some(prefix) => {
                // at once, so that lines of several processes do not mix
                let whole = [prefix.as_bytes(), line].concat();
                self.out.write_all(&whole).map(|()| line.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes one JSON document, or the text. A reader that has seen enough (`… | head`) is no failure.
fn print(
    value: &impl Serialize,
    json: bool,
    text: impl FnOnce() -> String,
) -> Result<(), LoadError> {
    let result = match json {
        true => serde_json::to_string_pretty(value).unwrap_or_default(),
        false => text(),
    };
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{result}").and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
            Err(LoadError::Io { path: "stdout".into(), action: "writing the result", source })
        }
        _ => Ok(()),
    }
}

fn make_plan(
    arguments: &PlanArgs,
    tp: u32,
    source: &str,
    phases: &mut Phases,
) -> Result<Plan, LoadError> {
    let origin = phases.measure("source", || match arguments.download {
        false => source::resolve(source, arguments.keep().as_ref()),
        true => source::download(source),
    })?;
    let discovered = phases.measure("headers", || discover(origin))?;
    let options = arguments.plan_options(tp)?;
    phases.measure("plan", || Plan::new(discovered, &options))
}

/// The forecast of the load; what would be reloaded is only checked.
fn run_plan(arguments: &LoadArgs, json: bool) -> Result<(), LoadError> {
    arguments.run.run_options()?;
    let steps = plan_steps(&arguments.run, arguments.tp)?;
    let Some(Step { source, plan, phases }) = steps.into_iter().next() else {
        return Ok(());
    };
    let ranks_as = match arguments.run.plan.ranks {
        RanksArg::Threads => RanksAs::Threads,
        RanksArg::Processes => RanksAs::Processes,
    };
    let mut report = Report::forecast(&plan, source, ranks_as);
    report.device = arguments.run.plan.device_choice().name(arguments.tp);
    report.phases = phases.0;
    print(&report, json, || report.table())
}

fn run_inspect(arguments: &InspectArgs, json: bool) -> Result<(), LoadError> {
    let discovered = discover(source::resolve(&arguments.source, None)?)?;
    let options = PlanOptions { model: arguments.model_options(), ..PlanOptions::default() };
    let plan = Plan::new(discovered, &options)?;
    let mut inspection = Inspection::new(&plan, &arguments.source);
    if arguments.map {
        inspection = inspection.with_map(&plan, arguments.ep)?;
    }
    print(&inspection, json, || inspection.text())
}

fn run_synth(arguments: &SynthArgs, json: bool) -> Result<(), LoadError> {
    let written = arguments.synth().write(&arguments.dir)?;
    print(&written, json, || {
        format!(
            "{}: {} tensors, {} bytes in {} files",
            written.directory.display(),
            written.tensors,
            written.checkpoint_bytes,
            written.files
        )
    })
}

fn run_cache(arguments: &CacheArgs, json: bool) -> Result<(), LoadError> {
    let action = arguments.action.unwrap_or(CacheAction::List);
    let (dir, of_weights) = match &arguments.cache_dir {
        Some(dir) => (dir.clone(), true),
        None => (cache::directory()?, false),
    };
    let (found, done) = match action {
        CacheAction::List if of_weights => (weights::list(&dir), ""),
        CacheAction::List => (cache::list(&dir)?, ""),
        CacheAction::Prune { unused_for } => {
            let unused = Duration::from_secs(u64::from(unused_for) * 86_400);
            let prune = if of_weights { weights::prune } else { cache::prune };
            (prune(&dir, unused)?, " removed")
        }
    };
    print(&found, json, || {
        let mut text: String = found
            .iter()
            .map(|c| format!("{:>10}  {}  {}\n", bytes_text(c.bytes), c.uri, c.directory.display()))
            .collect();
        let bytes = bytes_text(found.iter().map(|c| c.bytes).sum());
        text += &format!("{} in {}: {bytes}{done}", found.len(), dir.display());
        text
    })
}

fn run_load(arguments: &LoadArgs, json: bool) -> Result<(), LoadError> {
    let options = arguments.run.run_options()?;
    let mut steps = plan_steps(&arguments.run, arguments.tp)?;
    // the last step's stand in the summary, if there is one
    for step in &steps[..steps.len() - usize::from(!json)] {
        for warning in &step.plan.placement().warnings {
            tracing::warn!("{}: {warning}", step.source);
        }
    }
    if let Some(dir) = &arguments.run.out {
        out::check_writable(dir, 0)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .map_err(|e| LoadError::Runtime(e.to_string()))?;
    let group = run_steps(&runtime, &mut steps, &options);
    // a read that hangs in the kernel must not keep the process from ending
    runtime.shutdown_background();
    let group = group?;
    // what is held now is the last step's; it is also what is reported
    let Some(Step { source, plan, mut phases }) = steps.pop() else { return Ok(()) };
    let done = Done {
        reports: &group.reports,
        warnings: &group.warnings,
        verified: group.verified.as_ref(),
        kept_bytes: group.kept_bytes,
        generation: group.generation(),
        lost: Lost::default(),
        ranks_as: RanksAs::Threads,
        peak_rss_bytes: None,
    };
    let mut report = Report::of_load(&plan, source, &done);
    let load = phases.0.get("load").copied().unwrap_or(0.0);
    report.seconds = Some(phases.ready_seconds(load));
    let ranks = group.ranks()?;
    if !arguments.run.no_digest {
        report.digest = Some(phases.measure("digest", || digest::group_digest(ranks))?);
    }
    if let Some(dir) = &arguments.run.out {
        phases.measure("out", || out::write(dir, &plan, ranks, source))?;
    }
    report.phases = phases.0;
    print(&report, json, || report.table())
}

/// One checkpoint of a `load` command: the first, or one that is reloaded.
struct Step<'a> {
    source: &'a str,
    plan: Plan,
    phases: Phases,
}

/// Plans the load and all reloads before any weight is read.
fn plan_steps(run: &RunArgs, tp: u32) -> Result<Vec<Step<'_>>, LoadError> {
    let mut steps: Vec<Step<'_>> = Vec::new();
    let RunArgs { plan, reload, .. } = run;
    for source in [&plan.source].into_iter().chain(reload) {
        let mut phases = Phases::default();
        let plan = make_plan(plan, tp, source, &mut phases)?;
        if let Some(first) = steps.first() {
            let same = first.plan.placement().same_parameters(plan.placement());
            same.map_err(|e| LoadError::Plan { path: plan.origin.shown().into(), source: e })?;
        }
        steps.push(Step { source, plan, phases });
    }
    Ok(steps)
}

fn run_steps(
    runtime: &tokio::runtime::Runtime,
    steps: &mut [Step<'_>],
    options: &RunOptions,
) -> Result<Group, LoadError> {
    let mut held: Option<Group> = None;
    for Step { plan, phases, .. } in steps {
        let progress = progress_of(plan);
        let watch = watch::Watch::start(plan, &progress);
        let done = phases.measure("load", || match &mut held {
            Some(group) => runtime.block_on(group.reload(plan, progress)),
            None => runtime.block_on(load(plan, options, progress)).map(|g| held = Some(g)),
        });
        watch.stop();
        done?;
    }
    held.ok_or_else(|| LoadError::Runtime("nothing was loaded".into()))
}

/// Seconds by phase.
#[derive(Debug, Default)]
struct Phases(BTreeMap<&'static str, f64>);

impl Phases {
    fn measure<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        self.0.insert(name, started.elapsed().as_secs_f64());
        result
    }

    /// From the first header until every rank was ready, of which the load itself took `load` seconds.
    fn ready_seconds(&self, load: f64) -> f64 {
        let before = ["headers", "plan"].iter().filter_map(|name| self.0.get(name));
        before.sum::<f64>() + load
    }
}
