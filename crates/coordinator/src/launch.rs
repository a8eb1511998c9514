//! Starts the processes of a group on this host and watches over them, as torchrun does.
//!
//! Each process learns its place from its environment, under torchrun's names ([`place`](crate::place)). Nothing is left
//! behind: what a process started goes with it, and it goes with the launcher, whatever ends that. (Only where the launcher
//! is itself killed outright may something be left that a process has started: nobody is there to do anything about it.)
//!
//! ```text
//!            ┌── rank 0 ── its stdout and stderr are the launcher's
//! launcher ──┼── rank 1 ── ┐ whole lines, after `[rank 1] `,
//!            └── rank 2 ── ┘ to the launcher's stderr
//! ```
//!
//! A rank that fails is started again alone, while the others run on: in the same place, with the same secret, and told by
//! `LONGSHORE_RESTARTS` how often that was. Programs that go on after a loss have their rank back at once; those that
//! cannot end their other ranks, which are started again as well. So that this does not use up the restarts of all, what
//! fails within a second counts once if by then every rank has failed; else each failure counts. A rank that is lost
//! again waits before it starts, half a second at first, twice as long each time. When the restarts are used up the group
//! is ended, with a line that names the first cause and each later one.
//!
//! Or the others go on without a rank that fails ([`Launch::shrinks`]), as long as rank 0 does not, and any rank of this host is
//! left.
//!
//! Launchers of several hosts do not talk to each other: each starts its own ranks again, and counts for itself.

mod children;
mod ending;
mod environment;
mod lines;
mod output;
mod restarts;
mod run;
pub(crate) mod signals;
mod supervise;

use std::{ffi::OsString, io};

use crate::{error::LoadError, secret::SECRET_VARIABLE};

use self::run::Events;
pub(crate) use self::{ending::REPLACE_ME, environment::RESTARTS_VARIABLE};

/// The port of rank 0's host where there are several hosts and none was given; torchrun's default.
pub const PORT_DEFAULT: u16 = 29500;

/// A command to be started as each rank of this host.
///
/// ```
/// use longshore::launch::Launch;
///
/// let command = ["sh", "-c", "test $WORLD_SIZE = 2"].map(Into::into).to_vec();
/// let ended = Launch::new(command, 2).run()?;
/// assert_eq!(ended.code, 0);
/// # Ok::<(), longshore::error::LoadError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Processes on this host.
    pub nproc: u32,
    /// Hosts.
    pub nnodes: u32,
    /// This host among them.
    pub node_rank: u32,
    /// The host of rank 0; this one if there is only one.
    pub master_addr: Option<String>,
    /// The first port to be tried there; a free one if there is only one host, else [`PORT_DEFAULT`].
    pub master_port: Option<u16>,
    /// How often ranks are started again after a failure, all ranks together.
    pub max_restarts: u32,
    /// Whether the others go on without a rank that has failed, unless it is rank 0, rather than that it is started again.
    pub shrinks: bool,
    /// How many of the last lines of failed commands are shown.
    pub final_lines: FinalLines,
    /// For NCCL, each process is on a host of its own, reached by the loopback interface: only so do several on one device
    /// exchange. Variables of NCCL's that are set already stay as they are.
    pub nccl_hosts: bool,
}

/// How many of the last lines of failed commands are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinalLines {
    /// Whatever the ranks write; the launcher adds which of them failed first.
    Each,
    /// The command is `longshore`, whose failures end with one line: rank 0's, else the first that another ended with.
    One,
}

/// How a launch ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// What the launcher is to exit with: 0; rank 0's code if that failed by itself, else that of the first that
    /// failed and was not started again; 128 and the number of the signal that ended it or the launcher.
    pub code: u8,
    /// The line that the launcher is to end with, if no rank has printed it; without `longshore: ` in front.
    pub line: Option<String>,
    /// How many restarts were made; one of all ranks together counts once.
    pub restarts: u32,
}

impl Launch {
    /// `nproc` processes of `command` on this host alone, without restarts.
    pub fn new(command: Vec<OsString>, nproc: u32) -> Self {
        Self {
            command,
            nproc,
            nnodes: 1,
            node_rank: 0,
            master_addr: None,
            master_port: None,
            max_restarts: 0,
            shrinks: false,
            final_lines: FinalLines::Each,
            nccl_hosts: false,
        }
    }

    /// Starts the processes and waits until none is left.
    ///
    /// Blocks, outside of any runtime. The processes die with the calling thread. From the first call on, the signals
    /// that end a process (SIGINT, SIGQUIT, SIGTERM, SIGHUP) only end launches in this one. The secret in this process's
    /// environment is handed down; without one there is a fresh one.
    ///
    /// # Errors
    /// The numbers do not go together, or the command cannot be started; no process is left then either.
    pub fn run(&self) -> Result<Ended, LoadError> {
        let secret = std::env::var(SECRET_VARIABLE).ok().filter(|text| !text.trim().is_empty());
        self.check(secret.is_some())?;
        let failed = |e: io::Error| LoadError::Runtime(e.to_string());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        // the calling thread is the one that starts the processes
        runtime.map_err(failed)?.block_on(async {
            let mut events = Events::listen().map_err(failed)?;
            self.run_group(secret.as_deref(), &mut events).await
        })
    }

    fn check(&self, secret_is_set: bool) -> Result<(), LoadError> {
        let refuse = |option, reason| Err(LoadError::Option { option, reason });
        if self.command.is_empty() {
            return refuse("launch", "expected a command to start".into());
        }
        for (option, count) in [("--nproc", self.nproc), ("--nnodes", self.nnodes)] {
            if count == 0 {
                return refuse(option, "expected at least 1, found 0".into());
            }
        }
        if self.nnodes.checked_mul(self.nproc).is_none() {
            return refuse("--nnodes", format!("{} times {} processes", self.nnodes, self.nproc));
        }
        if self.node_rank >= self.nnodes {
            let Self { nnodes, node_rank, .. } = self;
            let reason =
                format!("expected less than --nnodes, which is {nnodes}, found {node_rank}");
            return refuse("--node-rank", reason);
        }
        if self.nnodes > 1 && self.master_addr.is_none() {
            return refuse(
                "--master-addr",
                "expected the host of rank 0: there are several".into(),
            );
        }
        if self.nnodes > 1 && !secret_is_set {
            let reason =
                "expected the same text in the environment of every host's launcher; it is not set";
            return refuse(SECRET_VARIABLE, reason.into());
        }
        Ok(())
    }
}
