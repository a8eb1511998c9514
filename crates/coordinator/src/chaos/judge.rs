//! Whether a run ended as it should have, and what the faults have cost. Pure.

use serde::Serialize;

use super::{
    Reference,
    command::{Exit, Printed},
    log::{Events, Stage},
    strike::Attack,
};

/// What is thought of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was disturbed, and ended as the undisturbed one did.
    Right,
    /// It ended so, but nothing could be done to it at the moment that was asked for.
    Missed,
    /// It ended otherwise, or left something behind.
    Wrong,
}

/// One fault of a run. **Units:** seconds.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    /// What was done.
    pub fault: String,
    /// To which rank.
    pub rank: u32,
    /// When it was to be.
    pub wanted: String,
    /// In which phase of the rank's process it was; absent where nothing was done.
    pub phase: Option<Stage>,
    /// That process.
    pub pid: Option<u32>,
    /// When it was, from the start of the command.
    pub at: Option<f64>,
    /// From there until it was noticed that the process was lost; absent where it was not, or need not be.
    pub detected_after: Option<f64>,
    /// From there until the load was complete; absent where it was before.
    pub recovered_after: Option<f64>,
    /// Why nothing was done.
    pub missed: Option<String>,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// Counted from 1.
    pub run: usize,
    /// What was done.
    pub faults: Vec<FaultReport>,
    /// What is thought of it.
    pub verdict: Verdict,
    /// What is wrong.
    pub wrong: Vec<String>,
    /// What the command ended with, as a shell has it; absent where this ended it.
    pub exit_code: Option<i32>,
    /// Over all parameters, if the command prints it.
    pub digest: Option<String>,
    /// From the start of the command until the load was complete, or where nothing tells, until the command's end.
    pub seconds: f64,
    /// How many times as long as undisturbed that is.
    pub ratio: f64,
    /// Weight bytes that were asked of storage beyond those of the undisturbed run. What a killed process had read since it
    /// last told is not known, so it may have been more.
    pub bytes_read_again: u64,
    /// Where the events and the output of a run that went wrong are.
    pub kept: Option<String>,
}

/// What a run was seen to do.
#[derive(Debug)]
pub(super) struct Observed<'a> {
    pub(super) events: &'a Events,
    pub(super) attacks: &'a [Attack],
    pub(super) printed: Printed,
    /// `None`: it was ended from here, which is not held against it.
    pub(super) exit: Option<Exit>,
    /// It was ended because of the time it took.
    pub(super) timed_out: Option<f64>,
    /// What was found of its ranks after its end.
    pub(super) left: Vec<String>,
    pub(super) began: f64,
    pub(super) ended: f64,
}

impl Observed<'_> {
    /// Until the load was complete, or else until the command's end.
    pub(super) fn seconds(&self) -> f64 {
        self.events.complete().unwrap_or(self.ended) - self.began
    }

    /// At least so many weight bytes were asked of storage.
    pub(super) fn read_bytes(&self) -> u64 {
        // the report knows of losses what heartbeats told, the events what the lost themselves did
        self.printed.read_bytes.unwrap_or(0).max(self.events.read_bytes())
    }

    /// What is wrong with it, beside a reference that nothing has disturbed.
    pub(super) fn wrong(&self, reference: &Reference) -> Vec<String> {
        let mut wrong = Vec::new();
        match (self.timed_out, self.exit) {
            (Some(limit), _) => wrong.push(format!("it did not end within {limit} s")),
            (None, None | Some(Exit::Code(0))) => {
                wrong.extend(self.wrong_digest(reference));
                if reference.complete && self.events.complete().is_none() {
                    wrong.push("it ended well, but the load did not become complete".into());
                }
            }
            (None, Some(Exit::Code(code))) => {
                wrong.push(format!("it exited with code {code}: {}", self.printed.last_line));
            }
            (None, Some(Exit::Signal(signal))) => {
                wrong.push(format!("it was killed by signal {signal}"))
            }
        }
        wrong.extend(self.left.iter().cloned());
        wrong
    }

    fn wrong_digest(&self, reference: &Reference) -> Option<String> {
        // who was ended from here may not have come to print it
        match (&reference.digest, &self.printed.digest) {
            (None, _) => None,
            (Some(_), None) if self.exit.is_none() => None,
            (Some(_), None) => Some("it ended well, but printed no digest".into()),
            (Some(wanted), Some(found)) if wanted == found => None,
            (Some(_), Some(found)) if reference.digests.contains(found) => None,
            (Some(wanted), Some(found)) => Some(format!("its digest is {found}, not {wanted}")),
        }
    }

    pub(super) fn report(&self, run: usize, reference: &Reference) -> RunReport {
        let wrong = self.wrong(reference);
        let verdict = match wrong.is_empty() {
            false => Verdict::Wrong,
            true if self.attacks.iter().all(|attack| attack.struck.is_none()) => Verdict::Missed,
            true => Verdict::Right,
        };
        let seconds = self.seconds();
        RunReport {
            run,
            faults: self.attacks.iter().map(|attack| self.fault(attack)).collect(),
            verdict,
            wrong,
            exit_code: self.exit.map(Exit::code),
            digest: self.printed.digest.clone(),
            seconds,
            ratio: seconds / reference.seconds.max(1e-9),
            bytes_read_again: self.read_bytes().saturating_sub(reference.read_bytes),
            kept: None,
        }
    }

    fn fault(&self, attack: &Attack) -> FaultReport {
        let rank = attack.strike.rank;
        let mut report = FaultReport {
            fault: attack.strike.fault.to_string(),
            rank,
            wanted: attack.strike.moment.to_string(),
            phase: None,
            pid: None,
            at: None,
            detected_after: None,
            recovered_after: None,
            missed: attack.missed.clone(),
        };
        if let Some(struck) = attack.struck {
            let (pid, time) = (struck.pid, struck.time);
            let complete = self.events.complete().filter(|complete| *complete > time);
            report.phase = self.events.life_of(rank, pid).map(|life| life.stage_at(time));
            report.pid = Some(pid);
            report.at = Some(time - self.began);
            report.detected_after = self.events.noticed(rank, pid, time).map(|at| at - time);
            report.recovered_after = complete.map(|complete| complete - time);
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Event, What};

    fn complete() -> Events {
        let what = What::Complete;
        Events(vec![Event { time: 105.0, rank: 0, pid: 1, generation: 2, read_bytes: 90, what }])
    }

    fn observed<'a>(events: &'a Events, digest: Option<&str>, exit: Exit) -> Observed<'a> {
        let digest = digest.map(str::to_owned);
        Observed {
            events,
            attacks: &[],
            printed: Printed { digest, ..Printed::default() },
            exit: Some(exit),
            timed_out: None,
            left: Vec::new(),
            began: 100.0,
            ended: 110.0,
        }
    }

    fn reference() -> Reference {
        let digest = Some("abc".into());
        Reference { digest, complete: true, seconds: 2.0, read_bytes: 80, ..Reference::default() }
    }

    #[test]
    fn a_run_is_wrong_for_each_way_in_which_it_can_end_otherwise() {
        let (complete, nothing) = (complete(), Events::default());
        let fine = Exit::Code(0);
        let wrong = |observed: &Observed<'_>| observed.wrong(&reference());
        assert_eq!(wrong(&observed(&complete, Some("abc"), fine)), Vec::<String>::new());
        for (observed, wanted) in [
            (observed(&complete, Some("abd"), fine), "its digest is abd, not abc"),
            (observed(&complete, None, fine), "printed no digest"),
            (observed(&nothing, Some("abc"), fine), "did not become complete"),
            (observed(&complete, Some("abc"), Exit::Code(1)), "exited with code 1"),
            (observed(&complete, Some("abc"), Exit::Signal(9)), "killed by signal 9"),
            (
                Observed { timed_out: Some(5.0), ..observed(&complete, Some("abc"), fine) },
                "within 5 s",
            ),
            (
                Observed { left: vec!["left".into()], ..observed(&complete, Some("abc"), fine) },
                "left",
            ),
        ] {
            let found = wrong(&observed);
            assert!(found.len() == 1 && found[0].contains(wanted), "{found:?}");
        }
    }

    #[test]
    fn a_run_may_end_with_any_digest_that_is_given() {
        let events = complete();
        let reference = Reference { digests: vec!["abd".into()], ..reference() };
        for (digest, wrong) in [("abc", 0), ("abd", 0), ("abe", 1)] {
            let found = observed(&events, Some(digest), Exit::Code(0)).wrong(&reference);
            assert_eq!(found.len(), wrong, "{digest}");
        }
    }

    #[test]
    fn a_run_that_nothing_was_done_to_is_not_right() {
        let events = complete();
        let report = observed(&events, Some("abc"), Exit::Code(0)).report(3, &reference());
        assert_eq!((report.verdict, report.run), (Verdict::Missed, 3));
        assert_eq!((report.seconds, report.ratio, report.bytes_read_again), (5.0, 2.5, 10));
    }

    /// A server that runs on is ended once its load is complete.
    #[test]
    fn what_is_ended_from_here_need_not_print_a_digest() {
        let events = complete();
        let ended = Observed { exit: None, ..observed(&events, None, Exit::Code(0)) };
        assert_eq!(ended.wrong(&reference()), Vec::<String>::new());
        let other = Observed { exit: None, ..observed(&events, Some("x"), Exit::Code(0)) };
        assert_eq!(other.wrong(&reference()).len(), 1);
    }
}
