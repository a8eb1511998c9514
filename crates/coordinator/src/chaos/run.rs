//! One run of the command, from its start until nothing is left of it.

use std::time::Duration;

use tokio::time::timeout;

use super::{
    Chaos, ChaosError, Reference, Scratch,
    command::{Exit, Files, Running},
    judge::Observed,
    log::Log,
    schedule::Strike,
    strike::Attack,
};
use crate::{error::LoadError, events::now, launch::signals::Signals};

/// From one look at the events to the next: the phases of small loads take milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// When nothing is left to be done to the ranks.
const WAIT_EVERY: Duration = Duration::from_millis(5);

/// How long a command that was told to end may take, before it is killed.
const END_WITHIN: f64 = 10.0;

/// Processes of ranks that have ended may take a moment to be gone: memory is given back.
const GONE_WITHIN: Duration = Duration::from_secs(2);

/// Passes the time, and heeds what tells this process to end meanwhile.
#[derive(Debug)]
pub(super) struct Clock {
    runtime: tokio::runtime::Runtime,
    signals: Signals,
}

impl Clock {
    pub(super) fn start() -> Result<Self, LoadError> {
        let failed = |e: std::io::Error| LoadError::Runtime(e.to_string());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(failed)?;
        let signals = runtime.block_on(async { Signals::listen() }).map_err(failed)?;
        Ok(Self { runtime, signals })
    }

    fn pass(&mut self, time: Duration) -> Result<(), ChaosError> {
        let signals = &mut self.signals;
        match self.runtime.block_on(async { timeout(time, signals.next()).await }) {
            Ok(signal) => Err(ChaosError::Interrupted { signal }),
            Err(_) => Ok(()),
        }
    }
}

/// A run that is under way.
#[derive(Debug)]
pub(super) struct Run<'a> {
    chaos: &'a Chaos,
    files: Files,
    running: Running,
    log: Log,
    attacks: Vec<Attack>,
    began: f64,
    /// When it was told to end, and why that was.
    told: Option<(f64, Told)>,
    killed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Its load is complete.
    Complete,
    /// It takes too long.
    TimeUp,
}

/// A run that is over.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) files: Files,
    log: Log,
    attacks: Vec<Attack>,
    exit: Exit,
    told: Option<Told>,
    timeout: Duration,
    left: Vec<String>,
    began: f64,
    ended: f64,
}

impl<'a> Run<'a> {
    /// Starts the command.
    pub(super) fn new(
        chaos: &'a Chaos,
        scratch: &Scratch,
        name: &str,
        strikes: &[Strike],
    ) -> Result<Self, ChaosError> {
        let files = Files::new(scratch.path(), name);
        let began = now();
        let running = Running::start(&chaos.command, &files)?;
        let log = Log::new(files.events.clone());
        let attack = |strike: &Strike| Attack::new(*strike, files.cuts.clone());
        let attacks = strikes.iter().map(attack).collect();
        Ok(Self { chaos, files, running, log, attacks, began, told: None, killed: false })
    }

    /// Does to its ranks what is to be done, and waits until it is over.
    pub(super) fn until_over(
        mut self,
        reference: &Reference,
        clock: &mut Clock,
    ) -> Result<Done, ChaosError> {
        match self.follow(reference, clock) {
            Ok(exit) => self.over(exit),
            Err(e) => {
                self.clear(clock);
                Err(e)
            }
        }
    }

    fn follow(&mut self, reference: &Reference, clock: &mut Clock) -> Result<Exit, ChaosError> {
        loop {
            self.read()?;
            self.attack(reference)?;
            if let Some(exit) = self.running.ended() {
                return Ok(exit);
            }
            self.end_in_time();
            let idle = self.attacks.iter().all(Attack::is_idle);
            clock.pass(if idle { WAIT_EVERY } else { LOOK_EVERY })?;
        }
    }

    fn read(&mut self) -> Result<(), LoadError> {
        let path = self.files.events.clone();
        self.log.read().map_err(|source| LoadError::Io { path, action: "reading it", source })
    }

    /// One strike after the other.
    fn attack(&mut self, reference: &Reference) -> Result<(), LoadError> {
        let mut before = self.began;
        for number in 0..self.attacks.len() {
            let (earlier, later) = self.attacks.split_at_mut(number);
            let attack = &mut later[0];
            if attack.has_happened() || !attack.has_to_wait(earlier, &self.log.events) {
                attack.look(&self.log.events, reference, self.began, before)?;
            }
            if !attack.has_happened() {
                break;
            }
            before = attack.struck.map_or(before, |struck| struck.time);
        }
        Ok(())
    }

    fn end_in_time(&mut self) {
        let now = now();
        match self.told {
            Some((since, _)) if now - since > END_WITHIN && !self.killed => {
                self.killed = true;
                self.running.signal(libc::SIGKILL);
            }
            Some(_) => {}
            None if now - self.began > self.chaos.timeout.as_secs_f64() => {
                self.tell(now, Told::TimeUp);
            }
            None if self.chaos.until_complete && self.is_complete() => {
                self.tell(now, Told::Complete);
            }
            None => {}
        }
    }

    fn tell(&mut self, now: f64, why: Told) {
        self.told = Some((now, why));
        self.running.signal(libc::SIGTERM);
    }

    /// Whether all has been done, and the load has become complete since.
    fn is_complete(&self) -> bool {
        let Some(complete) = self.log.events.complete() else { return false };
        let struck = self.attacks.iter().filter_map(|attack| attack.struck);
        self.attacks.iter().all(Attack::is_over) && struck.map(|s| s.time).all(|t| t < complete)
    }

    fn over(mut self, exit: Exit) -> Result<Done, ChaosError> {
        let ended = now();
        self.read()?;
        for attack in &mut self.attacks {
            attack.end();
        }
        let left = self.left();
        let Self { chaos, files, log, attacks, began, told, .. } = self;
        let (told, timeout) = (told.map(|(_, why)| why), chaos.timeout);
        Ok(Done { files, log, attacks, exit, told, timeout, left, began, ended })
    }

    /// What is found of its ranks; it is killed.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for (rank, process) in self.log.events.processes() {
            let held = match process.hold() {
                Ok(Some(held)) => held,
                Ok(None) => continue,
                Err(e) => {
                    left.push(format!(
                        "process {} of rank {rank} cannot be seen: {e}",
                        process.pid
                    ));
                    continue;
                }
            };
            if !held.is_gone(GONE_WITHIN).unwrap_or(false) {
                left.push(format!("process {} of rank {rank} was left behind", process.pid));
                // it is told about already
                let _ = held.signal(libc::SIGKILL);
            }
        }
        left
    }

    /// The run is given up: ends the command as a user would, so that it can end its ranks; then whatever is left.
    fn clear(mut self, clock: &mut Clock) {
        for attack in &mut self.attacks {
            attack.end();
        }
        self.tell(now(), Told::TimeUp);
        while self.running.ended().is_none() {
            self.end_in_time();
            // who says it again means it
            if clock.pass(WAIT_EVERY).is_err() {
                break;
            }
        }
        // what cannot be read tells of no process
        let _ = self.read();
        self.left();
    }
}

impl Done {
    pub(super) fn observed(&self) -> Observed<'_> {
        Observed {
            events: &self.log.events,
            attacks: &self.attacks,
            printed: self.files.printed(),
            exit: self.told.is_none().then_some(self.exit),
            timed_out: (self.told == Some(Told::TimeUp)).then_some(self.timeout.as_secs_f64()),
            left: self.left.clone(),
            began: self.began,
            ended: self.ended,
        }
    }
}
