//! Ranks are killed, stopped, delayed and cut off while they load, and what comes of it is compared with a run that nothing disturbs:
//! for users to try on their own checkpoints, under their own launch command.
//!
//! ```text
//!  command ──► undisturbed runs (two: the first warms up): digest, seconds, how long each rank was in each phase
//!     │
//!     └──────► run 1 … n: events tell pids and phases ──► faults at the chosen moments ──► digest, exit code, what is left
//! ```
//!
//! It works from outside, by signals and by what the ranks tell ([`events`](crate::events)) and listen for
//! ([`cuts`](crate::cuts)), so the ranks are those that users run: release builds, in whatever program, under whatever launcher
//! hands `LONGSHORE_EVENTS` and `LONGSHORE_CUTS` on to processes of this host.
//!
//! | step | module | in → out |
//! |---|---|---|
//! | what is done | `schedule` | options and a seed → faults, ranks and moments of every run |
//! | one run | `run`, `command`, `log`, `strike` | the command → events, signals, cuts, output |
//! | what came of it | `judge`, `report` | that and the undisturbed run → right or wrong, figures, table |
//!
//! Who is cut off from the network still shares memory with the ranks of its host, as long as it is there: that nothing is heard
//! of it is what the others notice. Rank 0's connection to the coordinator of its own process is cut as well.

mod command;
mod judge;
mod log;
mod report;
mod run;
mod schedule;
mod strike;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use self::{
    judge::Observed,
    run::{Clock, Run},
    schedule::{Strike, schedule},
};
pub use self::{
    judge::{FaultReport, RunReport, Verdict},
    log::Stage,
    report::Report,
    schedule::{Choice, Fault, Wanted, When},
};
use crate::error::{LoadError, one_line};

/// A command whose ranks are to be disturbed.
#[derive(Debug, Clone, PartialEq)]
pub struct Chaos {
    /// Starts all ranks of this host, and ends when they have.
    pub command: Vec<OsString>,
    /// How it is called in the report.
    pub shown: String,
    /// What is done to its ranks.
    pub wanted: Wanted,
    /// Chooses what is random.
    pub seed: u64,
    /// Digests that a run may end with beside the undisturbed one's: those of fewer ranks, where a group may shrink to them.
    pub digests: Vec<String>,
    /// How long one run may take.
    pub timeout: Duration,
    /// The command is one that runs on when its load is complete: it is told to end then.
    pub until_complete: bool,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChaosError {
    /// A file, an option, or the command cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What goes wrong undisturbed says nothing when it is disturbed.
    #[error("the undisturbed run went wrong: {}", .wrong.join("; "))]
    Reference {
        /// What is wrong.
        wrong: Vec<String>,
        /// What the command ended with.
        code: i32,
    },
    /// The ranks of the command do not tell what they do.
    #[error(
        "the undisturbed run has told no events: its ranks embed no longshore, or are not handed the variable LONGSHORE_EVENTS, or run on another host"
    )]
    Silent,
    /// This process was told to end.
    #[error("interrupted")]
    Interrupted {
        /// By this signal.
        signal: i32,
    },
}

impl ChaosError {
    /// The exit code of the command line: 2 for what the user can mend, else 1; 128 and the signal that ended it.
    pub fn exit_code(&self) -> u8 {
        match self {
            ChaosError::Load(e) => e.exit_code(),
            ChaosError::Reference { code: 2, .. } | ChaosError::Silent => 2,
            ChaosError::Reference { .. } => 1,
            ChaosError::Interrupted { signal } => u8::try_from(128 + signal).unwrap_or(1),
        }
    }

    /// The error and all its causes in one line.
    pub fn line(&self) -> String {
        match self {
            ChaosError::Load(e) => e.line(),
            other => one_line(&other.to_string()),
        }
    }
}

/// How often a moment that was missed is tried for, sooner each time.
const TRIES: u32 = 3;

/// The run that nothing has disturbed.
#[derive(Debug, Default)]
struct Reference {
    /// Until it was complete, or else until its end.
    seconds: f64,
    /// How long each rank was in each stage. **Units:** seconds.
    stages: BTreeMap<(u32, Stage), f64>,
    digest: Option<String>,
    /// What is as good.
    digests: Vec<String>,
    read_bytes: u64,
    /// Whether it tells when all ranks are complete.
    complete: bool,
    world_size: u32,
}

impl Chaos {
    /// Runs the command twice undisturbed, then as often as is wanted with its ranks disturbed.
    ///
    /// Blocks, outside of any runtime. From the first call on, the signals that end a process (SIGINT, SIGQUIT, SIGTERM,
    /// SIGHUP) only end such runs in this one. Nothing that was started is left, unless it hides from its process group.
    ///
    /// # Errors
    /// The undisturbed run goes wrong or tells nothing; a rank is asked for that there is not; a process may not be signalled.
    /// What goes wrong in disturbed runs is no error, but in the report.
    pub fn run(&self) -> Result<Report, ChaosError> {
        let mut clock = Clock::start()?;
        let scratch = Scratch::new(self.seed)?;
        // the first finds caches as they are, and all that follow as it left them
        let first = self.undisturbed(&scratch, &mut clock, &Reference::default())?;
        self.check_ranks(first.world_size)?;
        let reference = self.undisturbed(&scratch, &mut clock, &first)?;
        let Reference { seconds, world_size, .. } = reference;
        tracing::info!("undisturbed: {world_size} ranks complete after {seconds:.3} s");
        let schedule = schedule(&self.wanted, reference.world_size, self.seed);
        let mut runs = Vec::with_capacity(schedule.len());
        for (number, strikes) in (1..).zip(&schedule) {
            let mut disturb = |strikes: &[Strike]| {
                self.disturbed(&scratch, &mut clock, &reference, number, strikes)
            };
            let mut run = disturb(strikes)?;
            let mut sooner = strikes.clone();
            for _ in 1..TRIES {
                if run.verdict != Verdict::Missed {
                    break;
                }
                sooner = sooner.iter().map(Strike::sooner).collect();
                run = disturb(&sooner)?;
            }
            let what: Vec<String> = strikes
                .iter()
                .map(|s| format!("{} rank {} {}", s.fault, s.rank, s.moment))
                .collect();
            let (what, verdict) = (what.join(", "), report::verdict_text(&run));
            tracing::info!("run {number} of {}: {what}: {verdict}", schedule.len());
            runs.push(run);
        }
        Ok(self.report(&reference, runs))
    }

    /// Nothing is done to this one; `before` is the one before, which it may not differ from either.
    fn undisturbed(
        &self,
        scratch: &Scratch,
        clock: &mut Clock,
        before: &Reference,
    ) -> Result<Reference, ChaosError> {
        let run = Run::new(self, scratch, "undisturbed", &[])?;
        let done = run.until_over(before, clock)?;
        let observed = done.observed();
        let wrong = observed.wrong(before);
        let code = observed.exit.map_or(0, command::Exit::code);
        let digests = self.digests.clone();
        let reference = Reference { digests, ..Reference::of(&observed) };
        if !wrong.is_empty() {
            return Err(ChaosError::Reference { wrong, code });
        }
        if reference.world_size == 0 {
            return Err(ChaosError::Silent);
        }
        Ok(reference)
    }

    fn disturbed(
        &self,
        scratch: &Scratch,
        clock: &mut Clock,
        reference: &Reference,
        number: usize,
        strikes: &[Strike],
    ) -> Result<RunReport, ChaosError> {
        let run = Run::new(self, scratch, &format!("run-{number}"), strikes)?;
        let mut done = run.until_over(reference, clock)?;
        let mut report = done.observed().report(number, reference);
        if report.verdict == Verdict::Wrong {
            done.files.keep();
            report.kept = Some(scratch.0.display().to_string());
        }
        Ok(report)
    }

    fn check_ranks(&self, world_size: u32) -> Result<(), LoadError> {
        let given = self.wanted.ranks.iter().filter_map(|rank| match rank {
            Choice::This(rank) => Some(*rank),
            Choice::Random => None,
        });
        match given.max() {
            Some(rank) if rank >= world_size => {
                let reason = format!("{rank}, but there are {world_size} ranks");
                Err(LoadError::Option { option: "--rank", reason })
            }
            _ => Ok(()),
        }
    }
}

impl Reference {
    fn of(observed: &Observed<'_>) -> Self {
        let events = observed.events;
        let world_size = events.world_size();
        let mut stages = BTreeMap::new();
        for life in (0..world_size).filter_map(|rank| Some((rank, events.life(rank)?))) {
            let (rank, life) = life;
            stages.extend(life.durations().map(|(stage, seconds)| ((rank, stage), seconds)));
        }
        Self {
            seconds: observed.seconds(),
            stages,
            digest: observed.printed.digest.clone(),
            digests: Vec::new(),
            read_bytes: observed.read_bytes(),
            complete: events.complete().is_some(),
            world_size,
        }
    }
}

/// Where the files of the runs are; those of runs that went wrong stay.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new(seed: u64) -> Result<Self, LoadError> {
        let name = format!("longshore-chaos-{}-{seed}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let failed = |source: io::Error| LoadError::Io {
            path: path.clone(),
            action: "creating a directory for the runs",
            source,
        };
        fs::create_dir(&path).map_err(failed)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // stays where something is left in it
        let _ = fs::remove_dir(&self.0);
    }
}
