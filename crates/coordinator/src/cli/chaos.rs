//! `longshore chaos`: what is to be disturbed, and how.

use std::{ffi::OsString, process::ExitCode, time::Duration};

use clap::{ArgAction, ArgMatches, Args, FromArgMatches, error::ErrorKind, parser::ValueSource};

use super::{
    arguments::{LoadArgs, RanksArg, parse_seconds},
    fail, print,
};
use crate::{
    chaos::{Chaos, ChaosError, Choice, Fault, Report, Stage, Wanted, When},
    error::LoadError,
    processes::MAX_RESTARTS,
    secret,
};

/// Kills, stops, delays and cuts off ranks while they load.
#[derive(Debug, Args)]
#[command(
    override_usage = "longshore chaos [OPTIONS] SOURCE --tp N [OPTIONS OF load]\n       longshore chaos [OPTIONS] -- COMMAND…",
    after_help = "Ranks of a COMMAND are found by what they write to the file in LONGSHORE_EVENTS, and cut off by what they are told in \
                  the directory in LONGSHORE_CUTS: it has to hand both on to them. No privileges are needed."
)]
pub(super) struct ChaosArgs {
    /// What is done to a rank's process (repeatable): kill; stop; stop-continue[:SECONDS], continued once its replacement has
    /// joined, at the latest after so long (10); pause:SECONDS; slow:FACTOR, stopped again and again so that it has one part in
    /// so many of the time; storage, its reads of weights fail, or storage:hang, they never end; network, it neither says
    /// anything to other ranks nor hears it over sockets, which stay open (shared memory of this host stays) [default: kill,
    /// stop-continue, pause:1, storage and network].
    #[arg(long, value_name = "FAULT", help_heading = HEADING)]
    fault: Vec<Fault>,
    /// To which rank: a number or random (repeatable) [default: random].
    #[arg(long, value_name = "RANK", value_parser = parse_rank, help_heading = HEADING)]
    rank: Vec<Choice<u32>>,
    /// In the course of which phase of the rank: joining, reading, finishing, ready or random (repeatable) [default: random,
    /// where there is no --at].
    #[arg(long, value_name = "PHASE", value_parser = parse_phase, help_heading = HEADING)]
    phase: Vec<Choice<Stage>>,
    /// How many seconds after the start of the command, or random (repeatable).
    #[arg(long, value_name = "SECONDS", value_parser = parse_at, help_heading = HEADING)]
    at: Vec<Choice<Duration>>,
    /// Runs of each fault with each rank and phase or time.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = HEADING,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    runs: u32,
    /// Faults in each run, one after the other; those after the first at random moments.
    #[arg(long, value_name = "K", default_value_t = 1, help_heading = HEADING,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    losses: u32,
    /// Repeats the choice of what is random [default: another one each time].
    #[arg(long, value_name = "SEED", help_heading = HEADING)]
    seed: Option<u64>,
    /// A digest that a run may end with beside the undisturbed one's: of a load with fewer ranks, where --on-loss shrink lets a
    /// group go on with these (repeatable).
    #[arg(long, value_name = "DIGEST", help_heading = HEADING)]
    digest: Vec<String>,
    /// How long a run may take.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = parse_seconds,
          help_heading = HEADING)]
    timeout: Duration,
    /// The COMMAND runs on when its load is complete: end it then (SIGTERM), and leave its exit code out of the verdict.
    #[arg(long, requires = "command", help_heading = HEADING)]
    until_complete: bool,
    #[command(flatten)]
    target: Target,
}

/// Its own options, apart from those of `load`.
const HEADING: &str = "Options of chaos";

/// Whose ranks are disturbed.
#[derive(Debug)]
enum Target {
    /// Those of `load`, with these arguments.
    Load { load: Box<LoadArgs>, arguments: Vec<OsString> },
    /// Those of a command of the user's.
    Command(Vec<OsString>),
}

/// The command after `--`.
const COMMAND: &str = "command";

impl Args for Target {
    fn augment_args(command: clap::Command) -> clap::Command {
        // as for an update nothing is required: with a command there is no source
        let command = LoadArgs::augment_args_for_update(command);
        let own = clap::Arg::new(COMMAND).value_name("COMMAND").last(true).num_args(1..);
        let own = own.value_parser(clap::value_parser!(OsString));
        command.arg(own.help("A command that starts all ranks, which embed longshore."))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Target {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let load = LoadArgs::augment_args(clap::Command::new("load"));
        let given = |argument: &&clap::Arg| {
            let source = matches.value_source(argument.get_id().as_str());
            source == Some(ValueSource::CommandLine)
        };
        let given: Vec<&clap::Arg> = load.get_arguments().filter(given).collect();
        let refuse = |text: String| Err(clap::Error::raw(ErrorKind::ArgumentConflict, text));
        let Some(command) = matches.get_many::<OsString>(COMMAND) else {
            let arguments = given.iter().flat_map(|argument| as_given(argument, matches)).collect();
            let missing = |_| {
                let text = "expected SOURCE and --tp N, or a COMMAND after --";
                clap::Error::raw(ErrorKind::MissingRequiredArgument, text)
            };
            let load = Box::new(LoadArgs::from_arg_matches(matches).map_err(missing)?);
            return Ok(Target::Load { load, arguments });
        };
        match given.first() {
            None => Ok(Target::Command(command.cloned().collect())),
            Some(option) => {
                let name = option.get_long().map_or("SOURCE".into(), |name| format!("--{name}"));
                refuse(format!(
                    "{name} cannot be used with a COMMAND, which has options of its own"
                ))
            }
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// An argument as it was given on the command line.
fn as_given(argument: &clap::Arg, matches: &ArgMatches) -> Vec<OsString> {
    let option = argument.get_long().map(|name| OsString::from(format!("--{name}")));
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return option.into_iter().collect();
    }
    let values = matches.get_raw(argument.get_id().as_str()).into_iter().flatten();
    values.flat_map(|value| option.clone().into_iter().chain([value.to_owned()])).collect()
}

/// Disturbs, and says how to exit.
pub(super) fn run(arguments: &ChaosArgs, json: bool) -> ExitCode {
    match arguments.chaos().map_err(ChaosError::from).and_then(|chaos| chaos.run()) {
        Ok(report) => finish(&report, json),
        Err(e) => fail(&e.line(), e.exit_code()),
    }
}

fn finish(report: &Report, json: bool) -> ExitCode {
    match print(report, json, || report.table()) {
        Err(e) => fail(&e.line(), e.exit_code()),
        Ok(()) if report.is_right() => ExitCode::SUCCESS,
        Ok(()) => {
            let (wrong, runs, seed) = (report.wrong, report.runs.len(), report.seed);
            fail(&format!("{wrong} of {runs} runs went wrong; --seed {seed} repeats them"), 1)
        }
    }
}

impl ChaosArgs {
    fn chaos(&self) -> Result<Chaos, LoadError> {
        let (command, shown) = match &self.target {
            Target::Command(command) => (command.clone(), shown(command)),
            Target::Load { load, arguments } => {
                let command = self.load_command(load, arguments)?;
                let shown = shown(&command[1..]);
                (command, format!("longshore {shown}"))
            }
        };
        let seed = match self.seed {
            Some(seed) => seed,
            None => {
                let random = secret::random().map_err(|e| LoadError::Runtime(e.to_string()))?;
                // short enough to be typed again
                random.iter().take(4).fold(0, |seed, byte| seed << 8 | u64::from(*byte))
            }
        };
        Ok(Chaos {
            command,
            shown,
            wanted: self.wanted(),
            seed,
            digests: self.digest.clone(),
            timeout: self.timeout,
            until_complete: self.until_complete,
        })
    }

    fn wanted(&self) -> Wanted {
        let faults =
            if self.fault.is_empty() { Fault::DEFAULT.to_vec() } else { self.fault.clone() };
        let ranks = if self.rank.is_empty() { vec![Choice::Random] } else { self.rank.clone() };
        let phases = self.phase.iter().copied().map(When::Phase);
        let mut moments: Vec<When> = phases.chain(self.at.iter().copied().map(When::At)).collect();
        if moments.is_empty() {
            moments.push(When::Phase(Choice::Random));
        }
        Wanted { faults, ranks, moments, runs: self.runs, losses: self.losses }
    }

    /// `longshore load` as it was asked for, with a process per rank.
    fn load_command(
        &self,
        load: &LoadArgs,
        arguments: &[OsString],
    ) -> Result<Vec<OsString>, LoadError> {
        if load.run.plan.ranks == RanksArg::Threads && given(arguments, "--ranks") {
            let reason = "threads cannot be killed one by one; they are processes here".into();
            return Err(LoadError::Option { option: "--ranks", reason });
        }
        let failed = |source| LoadError::Io {
            path: "/proc/self/exe".into(),
            action: "finding this program",
            source,
        };
        let program = std::env::current_exe().map_err(failed)?;
        let mut command: Vec<OsString> = vec![program.into(), "load".into()];
        command.extend_from_slice(arguments);
        if !given(arguments, "--ranks") {
            command.extend(["--ranks".into(), "processes".into()]);
        }
        if self.losses > MAX_RESTARTS && !given(arguments, "--max-restarts") {
            command.extend(["--max-restarts".into(), self.losses.to_string().into()]);
        }
        command.push("--json".into());
        Ok(command)
    }
}

fn given(arguments: &[OsString], option: &str) -> bool {
    arguments.iter().any(|argument| argument == option)
}

fn shown(command: &[OsString]) -> String {
    let words: Vec<_> = command.iter().map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

fn parse_rank(text: &str) -> Result<Choice<u32>, String> {
    match text {
        "random" => Ok(Choice::Random),
        text => text.parse().map(Choice::This).map_err(|_| "expected a number or random".into()),
    }
}

fn parse_phase(text: &str) -> Result<Choice<Stage>, String> {
    match (text, Stage::named(text)) {
        ("random", _) => Ok(Choice::Random),
        (_, Some(stage)) => Ok(Choice::This(stage)),
        _ => Err("one of joining, reading, finishing, ready, random".into()),
    }
}

fn parse_at(text: &str) -> Result<Choice<Duration>, String> {
    let seconds = || text.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    match text {
        "random" => Ok(Choice::Random),
        _ => seconds().map(Choice::This).ok_or_else(|| "expected seconds or random".into()),
    }
}
