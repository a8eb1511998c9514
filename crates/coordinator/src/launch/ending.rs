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

    /// Of a `longshore` command: whether its group has failed, which another process would not change.
    pub(super) fn is_verdict(self) -> bool {
        matches!(self, End::Exited(1 | 2))
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
    /// Its number among all that were started.
    pub(super) process: usize,
    pub(super) rank: u32,
    pub(super) end: End,
    /// The launcher had told it to end.
    pub(super) told: bool,
}

impl Gone {
    /// Orders those that were found ended in one look: a process that is killed seldom dies of another's death within the
    /// same instant, one that exits may have.
    pub(super) fn precedence(&self) -> (bool, u32) {
        (matches!(self.end, End::Exited(_)), self.rank)
    }
}

/// A failure that counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cause {
    pub(super) first: Gone,
    /// Processes that ended with it, or because of it.
    pub(super) others: Vec<Gone>,
}

/// What a process said of its failure, and was held back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) process: usize,
    pub(super) line: Vec<u8>,
}

impl Held {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.line).into_owned()
    }
}

impl Cause {
    fn processes(&self) -> impl Iterator<Item = &Gone> {
        std::iter::once(&self.first).chain(&self.others)
    }

    fn end(&self) -> String {
        format!("rank {} {}", self.first.rank, self.first.end)
    }

    /// What was said of it: by rank 0, which knows most, else by whoever said something first.
    fn said<'a>(&self, held: &'a [Held]) -> Option<&'a Held> {
        let of = |held: &&Held| self.processes().find(|gone| gone.process == held.process);
        let mut said = held.iter().filter_map(|held| Some((of(&held)?.rank, held)));
        let by_rank_0 = said.clone().find(|(rank, _)| *rank == 0);
        by_rank_0.or_else(|| said.next()).map(|(_, held)| held)
    }

    /// The line of a group that failed for this alone.
    fn line(&self, held: &[Held]) -> String {
        self.said(held).map_or_else(|| self.end(), Held::text)
    }

    /// Its part of the line of a group that failed for several.
    fn part(&self, held: &[Held]) -> String {
        let spoke = matches!(self.first.end, End::Exited(code) if is_spoken(code));
        match self.said(held).filter(|_| spoke) {
            // of one that was killed, or had no say, the others know less than the launcher
            None => self.end(),
            Some(said) if said.process == self.first.process && self.first.rank != 0 => {
                format!("{}: {}", self.end(), said.text())
            }
            // rank 0, and whoever speaks for another, names whom it is about
            Some(said) => said.text(),
        }
    }
}

/// How a group ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Every process exited with code 0 at last.
    Done,
    /// A process failed and was not started again.
    Failed {
        /// What went before.
        earlier: Vec<Cause>,
        /// What could not be made good.
        last: Cause,
        /// The exit code of rank 0, where that is on this host, ended by itself and failed.
        rank_0: Option<u8>,
    },
    /// The launcher was told to end.
    Interrupted { signal: i32 },
}

impl Outcome {
    /// The failure of a group for `causes`, among all that have `gone`.
    pub(super) fn failed(mut causes: Vec<Cause>, gone: &[Gone], lines: FinalLines) -> Self {
        let Some(mut last) = causes.pop() else { return Outcome::Done };
        // they were all found in order; what ended since did so because of it
        let since = gone.iter().skip_while(|gone| gone.process != last.first.process).skip(1);
        let since: Vec<Gone> = since.filter(|gone| !last.others.contains(gone)).copied().collect();
        last.others.extend(since);
        let rank_0 = last.processes().find(|gone| gone.rank == 0).and_then(|gone| match gone.end {
            End::Exited(code @ 1..) => match lines {
                FinalLines::Each => (!gone.told).then_some(code),
                // one that is told to end does not exit with a code: it failed at the same moment
                FinalLines::One => is_spoken(code).then_some(code),
            },
            _ => None,
        });
        Outcome::Failed { earlier: causes, last, rank_0 }
    }

    /// What the launcher exits with.
    pub(super) fn code(&self, lines: FinalLines) -> u8 {
        match self {
            Outcome::Done => 0,
            Outcome::Interrupted { signal } => of_signal(*signal),
            Outcome::Failed { rank_0: Some(REPLACE_ME), .. } if lines == FinalLines::One => 1,
            Outcome::Failed { rank_0: Some(code), .. } => *code,
            Outcome::Failed { last, .. } => match last.first.end {
                End::Exited(REPLACE_ME) if lines == FinalLines::One => 1,
                End::Exited(code) if lines == FinalLines::Each || is_spoken(code) => code,
                // a rank that is lost is a failed load, whatever took it
                _ if lines == FinalLines::One => 1,
                End::Exited(code) => code,
                End::Killed(signal) => of_signal(signal),
            },
        }
    }

    /// The line that is still to be printed; rank 0 may have `printed` its own.
    pub(super) fn line(&self, lines: FinalLines, held: &[Held], printed: bool) -> Option<String> {
        match self {
            Outcome::Done => None,
            Outcome::Interrupted { signal } => Some(format!("ended by {}", signal_text(*signal))),
            Outcome::Failed { rank_0: Some(_), .. } if lines == FinalLines::One && printed => None,
            Outcome::Failed { earlier, last, .. } if earlier.is_empty() => Some(last.line(held)),
            Outcome::Failed { earlier, last, rank_0 } => {
                // the coordinator's verdict names all that was lost since its process started
                let verdict = rank_0.is_some_and(|code| End::Exited(code).is_verdict());
                if lines == FinalLines::One && verdict {
                    let before = earlier.iter().filter(|cause| cause.first.rank == 0);
                    let parts = before.map(|cause| cause.part(held)).chain([last.line(held)]);
                    return Some(parts.collect::<Vec<_>>().join("; then "));
                }
                let parts = earlier.iter().chain([last]).map(|cause| cause.part(held));
                Some(parts.collect::<Vec<_>>().join("; then "))
            }
        }
    }
}

/// Whether a `longshore` command that exits with `code` has said why.
fn is_spoken(code: u8) -> bool {
    matches!(code, 1 | 2 | REPLACE_ME)
}

/// What a rank exits with that another process is to take the place of. Source: `EX_TEMPFAIL` of BSD's sysexits.
pub(crate) const REPLACE_ME: u8 = 75;

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

    /// Processes with their numbers, one for each.
    fn numbered(all: &[(u32, End, bool)]) -> Vec<Gone> {
        let gone = |(process, &(rank, end, told))| Gone { process, rank, end, told };
        all.iter().enumerate().map(gone).collect()
    }

    fn gone(rank: u32, end: End) -> (u32, End, bool) {
        (rank, end, false)
    }

    fn told(rank: u32, end: End) -> (u32, End, bool) {
        (rank, end, true)
    }

    fn held(process: usize, line: &str) -> Held {
        Held { process, line: line.into() }
    }

    #[test]
    fn a_killed_rank_failed_before_those_that_exited_in_the_same_instant() {
        let mut all =
            numbered(&[gone(3, End::Exited(2)), gone(0, End::Exited(1)), gone(2, KILLED)]);
        all.sort_by_key(Gone::precedence);
        assert_eq!(all.iter().map(|gone| gone.rank).collect::<Vec<_>>(), [2, 0, 3]);
    }

    /// Of groups that failed once, for the first that ended.
    #[test]
    fn codes_and_lines_follow_rank_0_then_the_first_that_failed() {
        let judge = |lines, all: &[(u32, End, bool)], words: &[Held]| {
            let all = numbered(all);
            let cause = Cause { first: all[0], others: Vec::new() };
            let outcome = Outcome::failed(vec![cause], &all, lines);
            (outcome.code(lines), outcome.line(lines, words, true))
        };
        let line = |text: &str| Some(text.to_owned());
        let killed = "rank 2 was killed by signal 9 (SIGKILL)";

        let all = [gone(2, KILLED), gone(0, End::Exited(7))];
        assert_eq!(judge(FinalLines::Each, &all, &[]), (7, line(killed)));
        let all = [gone(2, KILLED), gone(0, End::Exited(1)), gone(1, End::Exited(1))];
        assert_eq!(judge(FinalLines::One, &all, &[held(2, "another's")]), (1, None));

        let all = [gone(2, KILLED), told(0, End::Killed(libc::SIGTERM)), gone(1, End::Exited(1))];
        assert_eq!(judge(FinalLines::Each, &all, &[]), (137, line(killed)));
        assert_eq!(judge(FinalLines::One, &all, &[]), (1, line(killed)));
        assert_eq!(judge(FinalLines::One, &all, &[held(2, "lost")]), (1, line("lost")));

        let all = [gone(1, End::Exited(3)), told(0, End::Exited(143))];
        assert_eq!(judge(FinalLines::Each, &all, &[]), (3, line("rank 1 exited with code 3")));
        // neither code is one that a `longshore` command exits with once it has said why
        assert_eq!(judge(FinalLines::One, &all, &[]), (1, line("rank 1 exited with code 3")));

        let all = [gone(0, End::Exited(3)), gone(1, End::Exited(1))];
        assert_eq!(judge(FinalLines::One, &all, &[held(1, "lost")]), (1, line("lost")));
        assert_eq!(judge(FinalLines::Each, &all, &[]), (3, line("rank 0 exited with code 3")));
        let all = [gone(1, End::Exited(2)), told(0, End::Exited(1))];
        assert_eq!(judge(FinalLines::One, &all, &[held(0, "held")]), (1, None));
    }

    /// What rank 0 said counts where it was held back as well.
    #[test]
    fn each_cause_is_named_in_its_turn() {
        let all = numbered(&[
            gone(1, KILLED),
            gone(1, End::Exited(1)),
            gone(2, KILLED),
            gone(1, End::Exited(1)),
            gone(0, End::Exited(1)),
        ]);
        let alone = |of: usize| Cause { first: all[of], others: Vec::new() };
        let words = [held(3, "a word"), held(4, "rank 2 was lost"), held(1, "no disk")];
        let judge = |causes: Vec<Cause>, printed| {
            let outcome = Outcome::failed(causes, &all, FinalLines::One);
            (outcome.code(FinalLines::One), outcome.line(FinalLines::One, &words, printed))
        };
        let causes = vec![alone(0), alone(1), alone(2)];
        // its coordinator has seen them all
        assert_eq!(judge(causes.clone(), false), (1, Some("rank 2 was lost".to_owned())));
        assert_eq!(judge(causes, true), (1, None));
        assert_eq!(judge(vec![alone(2)], false), (1, Some("rank 2 was lost".to_owned())));
        // of a whole group that failed, one speaks
        let group = Cause { first: all[1], others: vec![all[4]] };
        let line = "rank 2 was lost; then rank 1 exited with code 1: a word";
        let outcome = Outcome::failed(vec![group, alone(3)], &all[..4], FinalLines::One);
        assert_eq!(outcome.line(FinalLines::One, &words, true).as_deref(), Some(line));
    }

    #[test]
    fn a_launcher_that_is_told_to_end_exits_as_a_shell_says() {
        let outcome = Outcome::Interrupted { signal: libc::SIGINT };
        assert_eq!(outcome.code(FinalLines::One), 130);
        let line = outcome.line(FinalLines::One, &[held(0, "held")], false);
        assert_eq!(line.as_deref(), Some("ended by signal 2 (SIGINT)"));
    }
}
