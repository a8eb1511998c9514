//! Starts the processes of the group, starts again what is lost of it, and waits until none is left.

use std::{
    io::{self, IsTerminal},
    net::{Ipv4Addr, TcpListener},
    process::Command,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::Instant,
};

use super::{
    Ended, FinalLines, Launch, PORT_DEFAULT,
    children::{Children, Writes},
    ending::Outcome,
    environment::{REMOVED, Shared},
    lines::Lines,
    output::Output,
    restarts::{Again, Restarts},
    signals::Signals,
    supervise::{Happened, Supervisor},
};
use crate::{error::LoadError, secret::Secret};

/// How a line begins that a failed `longshore` command ends with.
const FINAL_LINE: &[u8] = b"longshore: ";

impl Launch {
    /// Starts all processes, and those that fail again as often as they may be; waits until none is left.
    pub(super) async fn run_group(
        &self,
        secret: Option<&str>,
        events: &mut Events,
    ) -> Result<Ended, LoadError> {
        let Events { ended, signals } = events;
        let output = Output::start().map_err(|e| LoadError::Runtime(e.to_string()))?;
        let mut group = Group {
            launch: self,
            shared: self.shared(secret)?,
            rank_0_writes: self.rank_0_writes(),
            supervisor: Supervisor { children: Children::default(), ended, signals },
            restarts: Restarts::new(self.ranks(), self.max_restarts, self.final_lines)
                .shrinking(self.shrinks),
            output,
        };
        let told = match group.until_over().await {
            Ok(told) => told,
            Err(e) => {
                group.supervisor.kill().await;
                return Err(e);
            }
        };
        Ok(group.end(told).await)
    }

    /// The ranks of this host.
    fn ranks(&self) -> impl Iterator<Item = u32> {
        (0..self.nproc).map(|local_rank| self.rank(local_rank))
    }

    /// Where several lines may be final ones, those of rank 0 are held back like those of the others; a terminal shows
    /// whatever it writes, its progress among it.
    fn rank_0_writes(&self) -> Writes {
        let several = self.final_lines == FinalLines::One && self.max_restarts > 0;
        if several && !io::stderr().is_terminal() { Writes::ErrorsPiped } else { Writes::Through }
    }

    /// What the processes share, those that are started again included.
    fn shared(&self, secret: Option<&str>) -> Result<Shared, LoadError> {
        let failed = |e: io::Error| LoadError::Runtime(e.to_string());
        let master_port = match self.master_port {
            Some(port) => port,
            None if self.nnodes > 1 => PORT_DEFAULT,
            None => free_port().map_err(failed)?,
        };
        Ok(Shared {
            master_addr: self.master_addr.clone().unwrap_or(Ipv4Addr::LOCALHOST.to_string()),
            master_port,
            secret: match secret {
                Some(given) => given.to_owned(),
                None => Secret::random_text().map_err(failed)?,
            },
        })
    }

    fn process(&self, local_rank: u32, restarts: u32, shared: &Shared) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).envs(self.variables(local_rank, restarts, shared));
        for name in REMOVED {
            command.env_remove(name);
        }
        command
    }

    fn not_started(&self, source: io::Error) -> LoadError {
        LoadError::Start { program: self.command[0].to_string_lossy().into_owned(), source }
    }
}

/// A group that was started, and all that belongs to it.
struct Group<'a> {
    launch: &'a Launch,
    shared: Shared,
    rank_0_writes: Writes,
    supervisor: Supervisor<'a>,
    restarts: Restarts,
    output: Output,
}

impl Group<'_> {
    /// Until nothing is left to be started, or to be waited for. Returns the signal that told the launcher to end, if one
    /// did.
    async fn until_over(&mut self) -> Result<Option<i32>, LoadError> {
        for local_rank in 0..self.launch.nproc {
            self.start(local_rank, 0)?;
        }
        loop {
            let leave_by = self.restarts.leave_by();
            let wake = self.restarts.next().into_iter().chain(leave_by).min();
            let happened = self.supervisor.next(wake).await;
            let now = Instant::now();
            match happened {
                Happened::Told(signal) => return Ok(Some(signal)),
                Happened::TimeUp => self.restarts.look(now),
                Happened::Ended(found) => {
                    for gone in &found {
                        self.output.ended(gone.process);
                    }
                    for again in self.restarts.ended(&found, now) {
                        self.say(&again);
                    }
                }
            }
            let nothing_follows = self.restarts.next().is_none();
            if self.restarts.is_over() || (self.supervisor.children.all_gone() && nothing_follows) {
                return Ok(None);
            }
            if leave_by.is_some_and(|at| at <= now) {
                for (rank, pid) in self.supervisor.children.running() {
                    tracing::warn!(
                        "rank {rank} (process {pid}) has not left since its work was done, and is ended"
                    );
                }
                return Ok(None);
            }
            for (rank, restarts) in self.restarts.due(now) {
                self.start(rank - self.launch.rank(0), restarts)?;
            }
        }
    }

    fn start(&mut self, local_rank: u32, restarts: u32) -> Result<(), LoadError> {
        let rank = self.launch.rank(local_rank);
        let (writes, prefix) = match rank {
            0 => (self.rank_0_writes, String::new()),
            rank => (Writes::Piped, format!("[rank {rank}] ")),
        };
        let command = self.launch.process(local_rank, restarts, &self.shared);
        let started = self.supervisor.children.start(rank, command, writes);
        let (process, pipes) = started.map_err(|source| self.launch.not_started(source))?;
        let held = (self.launch.final_lines == FinalLines::One).then_some(FINAL_LINE);
        for pipe in pipes {
            self.output.read(process, pipe, Lines::new(prefix.clone(), held));
        }
        Ok(())
    }

    fn say(&self, again: &Again) {
        let Again { gone, pause, number, together } = again;
        // the first comes at once, for whoever reads it
        let when = match pause.as_millis() {
            0..500 => String::new(),
            _ => format!(" in {} s", pause.as_secs_f32()),
        };
        let max = self.launch.max_restarts;
        let counted = if *together { " (every rank has failed, which counts once)" } else { "" };
        let what = format!("it starts again{when}, restart {number} of {max}{counted}");
        self.output.note_of(gone.process, format!("rank {} {}", gone.rank, gone.end), what);
    }

    /// Ends what is left, because of a failure or of the signal that `told` the launcher to.
    async fn end(mut self, told: Option<i32>) -> Ended {
        let (over, restarts) = (self.restarts.is_over(), self.restarts.made());
        let causes = self.restarts.causes();
        if let (true, Some(last)) = (over, causes.last())
            && !self.supervisor.children.all_gone()
        {
            let first = last.first;
            self.output.note(format!("rank {} {}; the others are ended", first.rank, first.end));
        }
        let told = self.supervisor.end_all(told).await;
        let late = tokio::select! {
            () = self.output.finish() => None,
            // whoever should read it does not
            signal = self.supervisor.signals.next() => Some(signal),
        };
        let lines = self.launch.final_lines;
        let outcome = match told.or(late) {
            Some(signal) => Outcome::Interrupted { signal },
            None if over => Outcome::failed(causes, self.supervisor.children.gone(), lines),
            None => Outcome::Done,
        };
        let printed = self.rank_0_writes == Writes::Through;
        // nobody reads the launcher's stderr: another line would wait for ever
        let unread = late.is_some();
        let line = outcome.line(lines, &self.output.held(), printed).filter(|_| !unread);
        Ended { code: outcome.code(lines), line, restarts }
    }
}

/// What the launcher listens to, from before the first process is started.
pub(super) struct Events {
    /// A process has ended.
    ended: Signal,
    /// The launcher is told to end.
    signals: Signals,
}

impl Events {
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self { ended: signal(SignalKind::child())?, signals: Signals::listen()? })
    }
}

/// A port that nobody listens on now. Another process may take it before rank 0 does, which then tries the next.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
