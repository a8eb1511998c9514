//! One attempt after the other: the group is started, watched to its end, and started again.

use std::{
    io,
    net::{Ipv4Addr, TcpListener},
    process::Command,
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{
    Ended, FinalLines, Launch, PORT_DEFAULT,
    children::{Children, Writes},
    ending::{Gone, Outcome},
    environment::{Attempt, REMOVED},
    lines::Lines,
    output::{Output, Stream},
    signals::Signals,
    supervise::Supervisor,
};
use crate::{error::LoadError, secret::Secret};

/// Before the first restart; doubled for each that follows, up to the longest.
const BACKOFF: Duration = Duration::from_secs(1);
/// The longest time before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How a line begins that a failed `longshore` command ends with.
const FINAL_LINE: &[u8] = b"longshore: ";

impl Launch {
    /// Starts the group, and again as often as it fails and may be.
    pub(super) async fn attempts(
        &self,
        secret: Option<&str>,
        events: &mut Events,
    ) -> Result<Ended, LoadError> {
        let mut restarts = 0;
        loop {
            let attempted = self.attempt(&self.prepare(restarts, secret)?, events).await?;
            let ended = self.ended(&attempted, restarts);
            let Outcome::Failed { first, .. } = attempted.outcome else { return Ok(ended) };
            // what a `longshore` command refuses it refuses again
            let refused = self.final_lines == FinalLines::One && ended.code == 2;
            if restarts == self.max_restarts || refused || attempted.stuck {
                return Ok(ended);
            }
            let pause = (BACKOFF * 2u32.pow(restarts.min(5))).min(BACKOFF_MAX);
            restarts += 1;
            let cause = ended.line.unwrap_or_else(|| format!("rank {} {}", first.rank, first.end));
            tracing::warn!(
                "{cause}; all ranks start again in {} s, restart {restarts} of {}",
                pause.as_secs(),
                self.max_restarts
            );
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                signal = events.signals.next() => {
                    let outcome = Outcome::Interrupted { signal };
                    let attempted = Attempted { outcome, ..attempted };
                    return Ok(self.ended(&attempted, restarts - 1));
                }
            }
        }
    }

    fn ended(&self, attempted: &Attempted, restarts: u32) -> Ended {
        let Attempted { outcome, held, .. } = attempted;
        let line = outcome.line(self.final_lines, held.as_deref()).filter(|_| !attempted.unread);
        Ended { code: outcome.code(self.final_lines), line, restarts }
    }

    /// What the processes of one attempt share.
    fn prepare(&self, number: u32, secret: Option<&str>) -> Result<Attempt, LoadError> {
        let failed = |e: io::Error| LoadError::Runtime(e.to_string());
        let master_port = match self.master_port {
            Some(port) => port,
            None if self.nnodes > 1 => PORT_DEFAULT,
            None => free_port().map_err(failed)?,
        };
        Ok(Attempt {
            number,
            master_addr: self.master_addr.clone().unwrap_or(Ipv4Addr::LOCALHOST.to_string()),
            master_port,
            secret: match secret {
                Some(given) => given.to_owned(),
                None => Secret::random_text().map_err(failed)?,
            },
        })
    }

    /// Starts all processes once and waits until none is left.
    async fn attempt(
        &self,
        attempt: &Attempt,
        events: &mut Events,
    ) -> Result<Attempted, LoadError> {
        let Events { ended, signals } = events;
        let children = Children::default();
        let mut group = Supervisor { children, ended, signals, first_failed: None };
        let mut output = match self.start(&mut group.children, attempt) {
            Ok(output) => output,
            Err(e) => {
                group.kill().await;
                return Err(e);
            }
        };
        let told = group.until_one_fails().await;
        if let Some(Gone { rank, end, .. }) = group.first_failed
            && !group.children.all_gone()
        {
            output.note(format!("rank {rank} {end}; the others are ended"));
        }
        let told = group.end_all(told).await;
        let late = tokio::select! {
            () = output.finish() => None,
            // whoever should read it does not
            signal = group.signals.next() => Some(signal),
        };
        let outcome = match told.or(late) {
            Some(signal) => Outcome::Interrupted { signal },
            None => Outcome::of(group.first_failed, group.children.gone(), self.final_lines),
        };
        let held = output.held().map(<[u8]>::to_vec);
        let stuck = !group.children.all_gone();
        Ok(Attempted { outcome, held, stuck, unread: late.is_some() })
    }

    fn start(&self, children: &mut Children, attempt: &Attempt) -> Result<Output, LoadError> {
        let mut streams = Vec::new();
        for local_rank in 0..self.nproc {
            let rank = self.rank(local_rank);
            let writes = if rank == 0 { Writes::Through } else { Writes::Piped };
            let pipes = children.start(rank, self.process(local_rank, attempt), writes);
            let held = (self.final_lines == FinalLines::One).then_some(FINAL_LINE);
            for pipe in pipes.map_err(|source| self.not_started(source))? {
                let lines = Lines::new(format!("[rank {rank}] "), held);
                streams.push(Stream { pipe, lines });
            }
        }
        Output::start(streams).map_err(|e| LoadError::Runtime(e.to_string()))
    }

    fn process(&self, local_rank: u32, attempt: &Attempt) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).envs(self.variables(local_rank, attempt));
        for name in REMOVED {
            command.env_remove(name);
        }
        command
    }

    fn not_started(&self, source: io::Error) -> LoadError {
        LoadError::Start { program: self.command[0].to_string_lossy().into_owned(), source }
    }
}

/// What came of one attempt.
struct Attempted {
    outcome: Outcome,
    /// The first line that was held back.
    held: Option<Vec<u8>>,
    /// Whether a process could not even be killed.
    stuck: bool,
    /// Whether nobody reads the launcher's stderr: another line would wait for ever.
    unread: bool,
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
