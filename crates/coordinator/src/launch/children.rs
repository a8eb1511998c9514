//! The processes of a group: starting, signalling, and learning of their end.
//!
//! 1. A process and what it starts are one process group, told and killed together.
//! 2. A process dies with the thread that started it, so that must be one that lives as long as the launcher.
//! 3. A number is signalled only while its process has not been waited for: the system gives it to nobody else until then.

use std::{
    io, mem,
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
};

use super::ending::{End, Gone};

/// What the processes of a group are and were.
#[derive(Debug, Default)]
pub(super) struct Children {
    running: Vec<Running>,
    gone: Vec<Gone>,
    started: usize,
}

#[derive(Debug)]
struct Running {
    /// Counts those that were started.
    number: usize,
    rank: u32,
    process: Child,
    told: bool,
}

/// Where a process writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writes {
    /// To the launcher's stdout and stderr.
    Through,
    /// To the launcher's stdout, and to a pipe in the place of stderr.
    ErrorsPiped,
    /// To pipes that the launcher reads.
    Piped,
}

impl Children {
    /// Starts `command` as `rank`; its standard input is empty. Returns the process's number among all that were started, and
    /// the pipes that it writes to.
    pub(super) fn start(
        &mut self,
        rank: u32,
        mut command: Command,
        writes: Writes,
    ) -> io::Result<(usize, Vec<OwnedFd>)> {
        match writes {
            Writes::Through => {}
            Writes::ErrorsPiped => {
                command.stderr(Stdio::piped());
            }
            Writes::Piped => {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
        }
        // in groups of their own they could not read from a terminal either
        command.stdin(Stdio::null()).process_group(0);
        let launcher = std::process::id();
        // SAFETY: between fork and exec only system calls are made that may be made there; nothing is allocated
        unsafe { command.pre_exec(move || die_with(launcher)) };
        let mut process = command.spawn()?;
        let pipes =
            [process.stdout.take().map(OwnedFd::from), process.stderr.take().map(OwnedFd::from)];
        let number = self.started;
        self.started += 1;
        self.running.push(Running { number, rank, process, told: false });
        Ok((number, pipes.into_iter().flatten().collect()))
    }

    /// Whether none is left.
    pub(super) fn all_gone(&self) -> bool {
        self.running.is_empty()
    }

    /// All that have ended so far.
    pub(super) fn gone(&self) -> &[Gone] {
        &self.gone
    }

    /// Those that run, with the numbers of their processes.
    pub(super) fn running(&self) -> impl Iterator<Item = (u32, u32)> {
        self.running.iter().map(|running| (running.rank, running.process.id()))
    }

    /// Those that have ended since the last look, what failed first before the others. What they left in their groups is
    /// killed.
    pub(super) fn look(&mut self) -> &[Gone] {
        let known = self.gone.len();
        let gone = &mut self.gone;
        self.running.retain_mut(|running| {
            if !has_ended(&running.process) {
                return true;
            }
            signal_group(&running.process, libc::SIGKILL);
            // one that somebody else has waited for tells nobody how it ended
            let status = running.process.wait().unwrap_or(ExitStatus::from_raw(1 << 8));
            let Running { number: process, rank, told, .. } = *running;
            gone.push(Gone { process, rank, end: End::of(status), told });
            false
        });
        self.gone[known..].sort_by_key(Gone::precedence);
        &self.gone[known..]
    }

    /// Sends `signal` to all that run, and to what they started.
    pub(super) fn signal(&mut self, signal: i32) {
        for running in &mut self.running {
            running.told = true;
            signal_group(&running.process, signal);
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        // nothing runs on if a launch is left early
        self.signal(libc::SIGKILL);
    }
}

/// Makes the calling process die when the thread that started it does, and at once if that is already gone.
fn die_with(launcher: u32) -> io::Result<()> {
    // SAFETY: takes numbers and changes nothing but this process's own setting
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // a launcher that died before the setting sends nothing; the process then has another parent
    match std::os::unix::process::parent_id() == launcher {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// Whether the process has ended; it is not waited for, so its number and group stay its own.
fn has_ended(process: &Child) -> bool {
    // SAFETY: all zeroes is a value of this plain structure
    let mut found: libc::siginfo_t = unsafe { mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `found` is written to and outlives the call
    let failed = unsafe { libc::waitid(libc::P_PID, process.id(), &raw mut found, flags) } != 0;
    // SAFETY: `waitid` has filled in the part that has a process number, or left it zero
    failed || unsafe { found.si_pid() } != 0
}

/// Sends `signal` to the group of a process that has not been waited for.
fn signal_group(process: &Child, signal: i32) {
    let Ok(pid) = i32::try_from(process.id()) else { return };
    // SAFETY: takes numbers; the process has not been waited for, so they are still its own
    if unsafe { libc::kill(-pid, signal) } != 0 {
        // one that has left its group is reached by itself; one that has ended needs nothing
        // SAFETY: as above
        unsafe { libc::kill(pid, signal) };
    }
}
