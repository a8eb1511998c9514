//! How processes ended, and what the launcher says and exits with because of it.

use std::{fmt, os::unix::process::ExitStatusExt, process::ExitStatus};

use super::FinalLines;

/// How one process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// By itself.
    Exited(u8),
    /// By a signal.
    Killed(i32),
}

impl End {
    pub(super) fn of(status: ExitStatus) -> Self {
        match status.signal() {
            Some(signal) => End::Killed(signal),
            // the system keeps eight bits of an exit code
            None => End::Exited(status.code().map_or(1, |code| code as u8)),
        }
    }

    pub(super) fn is_failure(self) -> bool {
        self != End::Exited(0)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exited(code) => write!(f, "exited with code {code}"),
            End::Killed(signal) => write!(f, "was killed by {}", signal_text(*signal)),
        }
    }
}

/// One process that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) rank: u32,
    pub(super) end: End,
    /// The launcher had told it to end.
    pub(super) told: bool,
}

/// Which of those that were found ended in one look failed first: a process that is killed seldom dies of another's
/// death within the same instant, one that exits may have.
pub(super) fn first_failed(found: &[Gone]) -> Option<Gone> {
    let failed = found.iter().filter(|gone| gone.end.is_failure() && !gone.told);
    failed.min_by_key(|gone| (matches!(gone.end, End::Exited(_)), gone.rank)).copied()
}

/// How one attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Every process exited with code 0.
    Done,
    /// A process failed.
    Failed {
        first: Gone,
        /// The exit code of rank 0, where that is on this host, ended by itself and failed.
        rank_0: Option<u8>,
    },
    /// The launcher was told to end.
    Interrupted { signal: i32 },
}

impl Outcome {
    /// The failure, if `first` is one, among all that ended.
    pub(super) fn of(first: Option<Gone>, gone: &[Gone], lines: FinalLines) -> Self {
        let Some(first) = first else { return Outcome::Done };
        let rank_0 = gone.iter().find(|gone| gone.rank == 0).and_then(|gone| match gone.end {
            End::Exited(code @ 1..) => match lines {
                FinalLines::Each => (!gone.told).then_some(code),
                // one that is told to end does not exit with a code: it failed at the same moment
                FinalLines::One => is_spoken(code).then_some(code),
            },
            _ => None,
        });
        Outcome::Failed { first, rank_0 }
    }

    /// What the launcher exits with.
    pub(super) fn code(self, lines: FinalLines) -> u8 {
        match self {
            Outcome::Done => 0,
            Outcome::Failed { rank_0: Some(code), .. } => code,
            Outcome::Failed { first, .. } if lines == FinalLines::One => match first.end {
                End::Exited(code) if is_spoken(code) => code,
                // a rank that is lost is a failed load, whatever took it
                _ => 1,
            },
            Outcome::Failed { first: Gone { end: End::Exited(code), .. }, .. } => code,
            Outcome::Failed { first: Gone { end: End::Killed(signal), .. }, .. } => {
                of_signal(signal)
            }
            Outcome::Interrupted { signal } => of_signal(signal),
        }
    }

    /// The line that is still to be printed; `held` is the first that a rank other than 0 ended with.
    pub(super) fn line(self, lines: FinalLines, held: Option<&[u8]>) -> Option<String> {
        match self {
            Outcome::Done => None,
            Outcome::Interrupted { signal } => Some(format!("ended by {}", signal_text(signal))),
            Outcome::Failed { rank_0: Some(_), .. } if lines == FinalLines::One => None,
            Outcome::Failed { first, .. } => Some(match held {
                Some(line) => String::from_utf8_lossy(line).into_owned(),
                None => format!("rank {} {}", first.rank, first.end),
            }),
        }
    }
}

/// Whether a `longshore` command that exits with `code` has said why: it knows two codes for what it fails with.
fn is_spoken(code: u8) -> bool {
    matches!(code, 1 | 2)
}

/// What a shell exits with after a process that a signal ended.
fn of_signal(signal: i32) -> u8 {
    128u8.saturating_add(u8::try_from(signal).unwrap_or(u8::MAX))
}

fn signal_text(signal: i32) -> String {
    const NAMES: [(i32, &str); 15] = [
        (libc::SIGHUP, "SIGHUP"),
        (libc::SIGINT, "SIGINT"),
        (libc::SIGQUIT, "SIGQUIT"),
        (libc::SIGILL, "SIGILL"),
        (libc::SIGTRAP, "SIGTRAP"),
        (libc::SIGABRT, "SIGABRT"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGFPE, "SIGFPE"),
        (libc::SIGKILL, "SIGKILL"),
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGPIPE, "SIGPIPE"),
        (libc::SIGALRM, "SIGALRM"),
        (libc::SIGTERM, "SIGTERM"),
        (libc::SIGXCPU, "SIGXCPU"),
        (libc::SIGSYS, "SIGSYS"),
    ];
    match NAMES.iter().find(|(number, _)| *number == signal) {
        Some((_, name)) => format!("signal {signal} ({name})"),
        None => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILLED: End = End::Killed(libc::SIGKILL);

    fn gone(rank: u32, end: End) -> Gone {
        Gone { rank, end, told: false }
    }

    fn told(rank: u32, end: End) -> Gone {
        Gone { rank, end, told: true }
    }

    #[test]
    fn a_killed_rank_failed_before_those_that_exited_in_the_same_instant() {
        let exited = [gone(0, End::Exited(1)), gone(1, End::Exited(0)), gone(3, End::Exited(2))];
        assert_eq!(first_failed(&exited), Some(exited[0]));
        let killed = gone(2, KILLED);
        assert_eq!(first_failed(&[&exited[..], &[killed]].concat()), Some(killed));
        assert_eq!(first_failed(&[gone(0, End::Exited(0)), told(1, KILLED)]), None);
    }

    #[test]
    fn codes_and_lines_follow_rank_0_then_the_first_that_failed() {
        let judge = |lines, all: &[Gone], held: Option<&[u8]>| {
            let outcome = Outcome::of(first_failed(all), all, lines);
            (outcome.code(lines), outcome.line(lines, held))
        };
        let line = |text: &str| Some(text.to_owned());
        let killed = "rank 2 was killed by signal 9 (SIGKILL)";

        let all = [gone(2, KILLED), gone(0, End::Exited(7))];
        assert_eq!(judge(FinalLines::Each, &all, None), (7, line(killed)));
        let all = [gone(2, KILLED), gone(0, End::Exited(1))];
        assert_eq!(judge(FinalLines::One, &all, Some(b"another's")), (1, None));

        let all = [gone(2, KILLED), told(0, End::Killed(libc::SIGTERM))];
        assert_eq!(judge(FinalLines::Each, &all, None), (137, line(killed)));
        assert_eq!(judge(FinalLines::One, &all, None), (1, line(killed)));
        assert_eq!(judge(FinalLines::One, &all, Some(b"lost")), (1, line("lost")));

        let all = [gone(1, End::Exited(3)), told(0, End::Exited(143))];
        assert_eq!(judge(FinalLines::Each, &all, None), (3, line("rank 1 exited with code 3")));
        // neither code is one that a `longshore` command exits with once it has said why
        assert_eq!(judge(FinalLines::One, &all, None), (1, line("rank 1 exited with code 3")));

        let all = [gone(0, End::Exited(3)), gone(1, End::Exited(1))];
        assert_eq!(judge(FinalLines::One, &all, Some(b"lost")), (1, line("lost")));
        assert_eq!(judge(FinalLines::Each, &all, None), (3, line("rank 0 exited with code 3")));
        let all = [gone(1, End::Exited(2)), told(0, End::Exited(1))];
        assert_eq!(judge(FinalLines::One, &all, Some(b"held")), (1, None));

        let all = [gone(0, End::Exited(0)), gone(1, End::Exited(0))];
        assert_eq!(judge(FinalLines::Each, &all, None), (0, None));
    }

    #[test]
    fn a_launcher_that_is_told_to_end_exits_as_a_shell_says() {
        let outcome = Outcome::Interrupted { signal: libc::SIGINT };
        assert_eq!(outcome.code(FinalLines::One), 130);
        let line = outcome.line(FinalLines::One, Some(b"held"));
        assert_eq!(line.as_deref(), Some("ended by signal 2 (SIGINT)"));
    }
}
