//! The command line.

mod arguments;
mod watch;

use std::{collections::BTreeMap, process::ExitCode, time::Instant};

use clap::Parser;
use longshore_models::options::{KernelLayout, ModelOptions};
use serde::Serialize;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    digest,
    discover::discover,
    error::LoadError,
    inspect::Inspection,
    load::{Group, load, progress_of},
    out,
    plan::{Plan, PlanOptions},
    report::Report,
    source,
};

use self::arguments::{Cli, Command, InspectArgs, LoadArgs, PlanArgs, SynthArgs};

/// Runs the command line of this process and says how to exit.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if !e.use_stderr() => {
            // --help and --version
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => return fail(&one_line(&e.to_string()), 2),
    };
    start_log(cli.log_level);
    let done = match &cli.command {
        Command::Load(arguments) => run_load(arguments, cli.json),
        Command::Plan(arguments) => run_plan(arguments, cli.json),
        Command::Inspect(arguments) => run_inspect(arguments, cli.json),
        Command::Synth(arguments) => run_synth(arguments, cli.json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

#[expect(clippy::print_stderr, reason = "the one line that a failed command ends with")]
fn fail(line: &str, code: u8) -> ExitCode {
    eprintln!("longshore: {line}");
    ExitCode::from(code)
}

/// The first paragraph of clap's message, without its prefix.
fn one_line(message: &str) -> String {
    let paragraph = message.split("\n\n").next().unwrap_or(message);
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

fn start_log(level: LevelFilter) {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_target(false)
        .without_time()
        .compact()
        .init();
}

/// One JSON document, or the text.
#[expect(clippy::print_stdout, reason = "this is the command's result")]
fn print(value: &impl Serialize, json: bool, text: impl FnOnce() -> String) {
    if json {
        println!("{}", serde_json::to_string_pretty(value).unwrap_or_default());
    } else {
        println!("{}", text());
    }
}

fn make_plan(arguments: &PlanArgs, phases: &mut Phases) -> Result<Plan, LoadError> {
    arguments.check_supported()?;
    let dir = phases.measure("source", || source::resolve(&arguments.source))?;
    let discovered = phases.measure("headers", || discover(&dir))?;
    let options = arguments.plan_options();
    phases.measure("plan", || Plan::new(discovered, &options))
}

fn run_plan(arguments: &PlanArgs, json: bool) -> Result<(), LoadError> {
    let mut phases = Phases::default();
    let plan = make_plan(arguments, &mut phases)?;
    let mut report = Report::forecast(&plan, &arguments.source);
    report.phases = phases.0;
    print(&report, json, || report.table());
    Ok(())
}

fn run_inspect(arguments: &InspectArgs, json: bool) -> Result<(), LoadError> {
    let discovered = discover(&source::resolve(&arguments.source)?)?;
    // nothing is derived, so nothing is refused that only some kernels could not take
    let kernel_layout = Some(KernelLayout::None);
    let quantization = arguments.quantization;
    let model = ModelOptions { kernel_layout, quantization, ..ModelOptions::default() };
    let plan = Plan::new(discovered, &PlanOptions { model, ..PlanOptions::default() })?;
    let inspection = Inspection::new(&plan, &arguments.source);
    print(&inspection, json, || inspection.text());
    Ok(())
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
    });
    Ok(())
}

fn run_load(arguments: &LoadArgs, json: bool) -> Result<(), LoadError> {
    let mut phases = Phases::default();
    let plan = make_plan(&arguments.plan, &mut phases)?;
    for warning in &plan.placement().warnings {
        tracing::warn!("{warning}");
    }
    let group = phases.measure("load", || run_ranks(&plan, arguments))?;
    let mut report = Report::of_load(&plan, &arguments.plan.source, &group);
    report.seconds = Some(phases.ready_seconds());
    if !arguments.no_digest {
        report.digest = Some(phases.measure("digest", || digest::group_digest(&group.ranks)));
    }
    if let Some(dir) = &arguments.out {
        let source = &arguments.plan.source;
        phases.measure("out", || out::write(dir, &plan, &group.ranks, source))?;
    }
    report.phases = phases.0;
    print(&report, json, || report.table());
    Ok(())
}

fn run_ranks(plan: &Plan, arguments: &LoadArgs) -> Result<Group, LoadError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .map_err(|e| LoadError::Runtime(e.to_string()))?;
    let progress = progress_of(plan);
    let watch = watch::Watch::start(plan, &progress);
    let group = runtime.block_on(load(plan, &arguments.run_options(), progress));
    watch.stop();
    // a read that hangs in the kernel must not keep the process from ending
    runtime.shutdown_background();
    group
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

    /// From the first header until every rank was ready.
    fn ready_seconds(&self) -> f64 {
        ["headers", "plan", "load"].iter().filter_map(|name| self.0.get(name)).sum()
    }
}
