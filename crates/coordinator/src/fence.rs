//! Which process it was that counts as lost, and the end of it.
//!
//! A process that was not heard of may only be slow, or stopped: it may go on at any moment, write where its successor writes
//! and hold what that needs. So before its work moves it is killed, by whoever took it for lost and is on its host. From
//! another host nothing can be done to it; there only what it says is ignored.
//!
//! 1. Nothing is killed but the very process that was named. Numbers of processes are given again: the number is tied to one
//!    process first (a pidfd), then that one's time of start is compared, then the signal goes by the pidfd.
//! 2. Nobody kills itself, which ranks that are threads of one process would.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// What tells one process from any other, of whatever host and time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its host; processes of one host can signal each other.
    pub host: String,
    /// Its number there.
    pub pid: u32,
    /// When it was started. **Units:** clock ticks since the host's start.
    pub start: u64,
}

/// What became of a process that was to be killed.
#[derive(Debug)]
pub enum Fenced {
    /// It was killed, and is gone.
    Killed,
    /// It was gone already.
    Gone,
    /// It is on another host, or in another container.
    Elsewhere,
    /// It is this one, which goes on.
    Own,
    /// It may still be there.
    Failed(io::Error),
}

/// How long a killed process may take to go: one that maps much memory takes a while to give it back, one that hangs in the
/// system stays until that is over.
const GONE_WITHIN: Duration = Duration::from_secs(2);

impl ProcessIdentity {
    /// This process.
    ///
    /// # Errors
    /// `/proc` does not tell.
    pub fn own() -> io::Result<Self> {
        let start = start_in(&fs::read_to_string("/proc/self/stat")?)?;
        Ok(Self { host: host_identity()?, pid: std::process::id(), start })
    }

    /// Kills the process and waits until it is gone, for two seconds at the most. Blocks.
    pub fn kill(&self) -> Fenced {
        self.kill_within(GONE_WITHIN)
    }

    /// Gives the process so long to end by itself, then [kills](Self::kill) it. Blocks.
    pub(crate) fn end_within(&self, patience: Duration) -> Fenced {
        let waits = !patience.is_zero() && Self::own().is_ok_and(|own| own != *self);
        // one that cannot be watched cannot be killed either, and it is said why
        if let (true, Ok(Some(held))) = (waits, self.hold()) {
            let _ = held.is_gone(patience);
        }
        self.kill()
    }

    /// Ties the process to a descriptor, so that signals may be sent to it; `None`: it is gone.
    ///
    /// # Errors
    /// It is on another host, or in another container; or the system does not say.
    pub(crate) fn hold(&self) -> io::Result<Option<Held>> {
        if self.host != host_identity()? {
            let why = "it is on another host, or in another container";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        let process = match open(self.pid) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            opened => opened?,
        };
        let is_it = start_of(self.pid)? == Some(self.start) && !is_gone(&process, Duration::ZERO)?;
        Ok(is_it.then_some(Held(process)))
    }

    fn kill_within(&self, limit: Duration) -> Fenced {
        match self.try_kill(limit) {
            Ok(fenced) => fenced,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Fenced::Gone,
            Err(e) => Fenced::Failed(e),
        }
    }

    fn try_kill(&self, limit: Duration) -> io::Result<Fenced> {
        let own = Self::own()?;
        if self.host != own.host {
            return Ok(Fenced::Elsewhere);
        }
        if *self == own {
            return Ok(Fenced::Own);
        }
        let process = open(self.pid)?;
        if is_gone(&process, Duration::ZERO)? || start_of(self.pid)? != Some(self.start) {
            return Ok(Fenced::Gone);
        }
        send(&process, libc::SIGKILL)?;
        match is_gone(&process, limit)? {
            true => Ok(Fenced::Killed),
            false => {
                let why = format!("it was killed and is still there after {limit:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            }
        }
    }
}

/// A process whose number is tied to a descriptor: what is sent to it reaches no other.
#[derive(Debug)]
pub(crate) struct Held(OwnedFd);

impl Held {
    /// Sends a signal; `false`: the process is gone.
    ///
    /// # Errors
    /// It may not be sent.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<bool> {
        match send(&self.0, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            sent => sent.map(|()| true),
        }
    }

    /// Waits until the process has ended; one that its parent has not waited for counts.
    ///
    /// # Errors
    /// The system does not say.
    pub(crate) fn is_gone(&self, within: Duration) -> io::Result<bool> {
        is_gone(&self.0, within)
    }
}

/// Ties the process that has the number now to a descriptor.
fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // a number that is none means a group, or everyone, to other calls
    if pid < 1 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: takes numbers and gives a new descriptor or an error
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = i32::try_from(opened).ok().filter(|number| *number >= 0);
    let descriptor = descriptor.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the descriptor is new and nobody else's
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn send(process: &OwnedFd, signal: i32) -> io::Result<()> {
    let (descriptor, nothing) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    let call = libc::SYS_pidfd_send_signal;
    // SAFETY: the descriptor is open; with a null pointer for the details nothing is read
    match unsafe { libc::syscall(call, descriptor, signal, nothing, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until the process has ended; one that its parent has not waited for counts.
fn is_gone(process: &OwnedFd, within: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + within;
    let mut poll = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // rounded up, so that the last wait is no busy loop
        let left_ms = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: `poll` is one entry and outlives the call
        match unsafe { libc::poll(&raw mut poll, 1, left_ms) } {
            0 => return Ok(false),
            1.. => return Ok(true),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// When the process that has the number now was started; `None`: none has it.
fn start_of(pid: u32) -> io::Result<Option<u64>> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => start_in(&stat).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        // it went while it was read
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The 22nd field of a process's `stat`, the 20th after its name, which is in parentheses and may hold anything.
/// **Source:** `man proc_pid_stat`.
fn start_in(stat: &str) -> io::Result<u64> {
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_ascii_whitespace());
    let start = fields.and_then(|mut fields| fields.nth(19)?.parse().ok());
    start.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no time of start in its stat"))
}

/// What tells this host from any other, as far as memory is concerned: processes with the same answer can open each
/// other's. Containers on one machine count as hosts of their own, and so do network namespaces.
pub(crate) fn host_identity() -> io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}"));
    let (pid, net) = (namespace("pid")?, namespace("net")?);
    // SAFETY: the call has no preconditions and cannot fail.
    let user = unsafe { libc::geteuid() };
    Ok(format!("{} {} {} user:{user}", boot.trim(), pid.display(), net.display()))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A process that ends with the test, and which one it is.
    struct Sleeping(Child);

    impl Sleeping {
        fn start() -> (Self, ProcessIdentity) {
            let child = Command::new("sleep").arg("1000").spawn().unwrap();
            let (pid, host) = (child.id(), host_identity().unwrap());
            let identity = ProcessIdentity { host, pid, start: start_of(pid).unwrap().unwrap() };
            (Self(child), identity)
        }

        fn is_alive(&mut self) -> bool {
            self.0.try_wait().unwrap().is_none()
        }

        fn signal(&self, number: i32) {
            // SAFETY: takes numbers; the child has not been waited for
            assert_eq!(unsafe { libc::kill(self.0.id() as i32, number) }, 0);
        }
    }

    impl Drop for Sleeping {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_is_killed_and_then_gone() {
        use std::os::unix::process::ExitStatusExt;
        let (mut sleeping, identity) = Sleeping::start();
        assert!(matches!(identity.kill(), Fenced::Killed));
        assert_eq!(sleeping.0.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(matches!(identity.kill(), Fenced::Gone));
    }

    /// Its parent has not waited for it, so the number is still its own.
    #[test]
    fn a_process_that_has_ended_is_gone() {
        let (sleeping, identity) = Sleeping::start();
        sleeping.signal(libc::SIGKILL);
        // whichever of the two was faster
        assert!(matches!(identity.kill(), Fenced::Killed | Fenced::Gone));
        assert!(matches!(identity.kill(), Fenced::Gone));
        assert_eq!(start_of(identity.pid).unwrap(), Some(identity.start));
    }

    #[test]
    fn a_process_is_given_time_to_end_by_itself() {
        let (mut sleeping, identity) = Sleeping::start();
        assert!(matches!(identity.end_within(Duration::from_millis(20)), Fenced::Killed));
        assert!(!sleeping.is_alive());
        assert!(matches!(identity.end_within(Duration::from_secs(3600)), Fenced::Gone));
    }

    /// It would go on where it was, once somebody continues it.
    #[test]
    fn a_stopped_process_is_killed() {
        let (mut sleeping, identity) = Sleeping::start();
        sleeping.signal(libc::SIGSTOP);
        assert!(matches!(identity.kill(), Fenced::Killed));
        assert!(!sleeping.is_alive());
    }

    #[test]
    fn nothing_but_the_very_process_is_killed() {
        let (mut sleeping, identity) = Sleeping::start();
        // another process had the number before
        let earlier = ProcessIdentity { start: identity.start - 1, ..identity.clone() };
        assert!(matches!(earlier.kill(), Fenced::Gone));
        let distant = ProcessIdentity { host: "another".into(), ..identity.clone() };
        assert!(matches!(distant.kill(), Fenced::Elsewhere));
        // numbers that mean everyone, or a group, elsewhere
        for pid in [0, u32::MAX, 1 << 31, (1 << 22) + 1] {
            let nobody = ProcessIdentity { pid, ..identity.clone() };
            assert!(matches!(nobody.kill(), Fenced::Gone), "{pid}");
        }
        assert!(sleeping.is_alive());
    }

    /// What was held when it ended stays that process, whoever has the number then.
    #[test]
    fn signals_reach_the_very_process_or_nobody() {
        let (mut sleeping, identity) = Sleeping::start();
        let held = identity.hold().unwrap().unwrap();
        let earlier = ProcessIdentity { start: identity.start - 1, ..identity.clone() };
        assert!(earlier.hold().unwrap().is_none());
        let distant = ProcessIdentity { host: "another".into(), ..identity.clone() };
        assert_eq!(distant.hold().unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert!(held.signal(libc::SIGSTOP).unwrap() && held.signal(libc::SIGCONT).unwrap());
        assert!(!held.is_gone(Duration::ZERO).unwrap() && sleeping.is_alive());
        assert!(held.signal(libc::SIGKILL).unwrap());
        assert!(held.is_gone(Duration::from_secs(60)).unwrap());
        sleeping.0.wait().unwrap();
        assert!(!held.signal(libc::SIGKILL).unwrap());
        assert!(identity.hold().unwrap().is_none());
    }

    #[test]
    fn nobody_kills_itself() {
        let own = ProcessIdentity::own().unwrap();
        assert!(matches!(own.kill(), Fenced::Own));
        assert!(matches!(own.end_within(Duration::from_secs(3600)), Fenced::Own));
        assert_eq!(own, ProcessIdentity::own().unwrap());
        assert_eq!(start_of(own.pid).unwrap(), Some(own.start));
    }

    /// Killed in time or not, whoever waits goes on.
    #[test]
    fn a_process_that_stays_is_not_waited_for_for_ever() {
        let (sleeping, identity) = Sleeping::start();
        let process = open(identity.pid).unwrap();
        assert!(!is_gone(&process, Duration::from_millis(20)).unwrap());
        sleeping.signal(libc::SIGKILL);
        assert!(is_gone(&process, Duration::from_secs(60)).unwrap());
    }

    #[test]
    fn a_name_may_hold_anything() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(start_in(&format!("17 (a) S 9 (b) {rest}")).unwrap(), 4711);
        for odd in
            ["", "17 (a", "17 (a) S 1 2", "17 (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x"]
        {
            assert_eq!(start_in(odd).unwrap_err().kind(), io::ErrorKind::InvalidData, "{odd}");
        }
    }
}
