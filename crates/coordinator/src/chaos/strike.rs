//! Carries out what is to be done to one rank: waits for its moment, acts on its process and on no other.
//!
//! A process is one that has told who it is (host, number, time of start). It is tied to a descriptor and compared before the
//! first signal, so a number that was given to another process since reaches nobody.
//!
//! A process that is stopped for good, or cut off from the others, is lost only if somebody is left who waits for what it says. So
//! that it is, `stop` and `network` wait until the rank has met the coordinator and whatever was lost before is replaced, and what
//! comes after them waits for the same.

use std::{io, path::PathBuf, time::Duration};

use longshore_rank::cut::Cut;

use super::{
    Reference,
    log::{Events, Life, Stage},
    schedule::{Fault, Moment, Strike},
};
use crate::{
    cuts,
    error::LoadError,
    events::now,
    fence::{Held, ProcessIdentity},
};

/// One strike and what has come of it.
#[derive(Debug)]
pub(super) struct Attack {
    pub(super) strike: Strike,
    /// Where ranks listen for what they are to be cut off from.
    cuts: PathBuf,
    state: State,
    pub(super) struck: Option<Struck>,
    /// Why nothing was done.
    pub(super) missed: Option<String>,
}

/// When which process was acted on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Struck {
    pub(super) pid: u32,
    /// Right before the first signal was sent, or it was cut off.
    pub(super) time: f64,
}

#[derive(Debug)]
enum State {
    Waiting,
    /// It goes on at this time, or once it was replaced if that matters.
    Stopped {
        held: Held,
        until: f64,
        or_replaced: bool,
    },
    /// It is stopped and goes on in turns, the next one at this time.
    Slowed {
        held: Held,
        factor: u32,
        stopped: bool,
        next: f64,
    },
    Over,
}

/// What there is to do about a strike now.
#[derive(Debug, PartialEq)]
enum Due {
    NotYet,
    Now,
    Missed(String),
}

/// How long a slow process runs at a time: less than it takes to be late, more than it takes to do something.
const RUNS_SECONDS: f64 = 0.005;

impl Attack {
    pub(super) fn new(strike: Strike, cuts: PathBuf) -> Self {
        Self { strike, cuts, state: State::Waiting, struck: None, missed: None }
    }

    /// Whether it was done, or cannot be any more.
    pub(super) fn has_happened(&self) -> bool {
        !matches!(self.state, State::Waiting)
    }

    /// Whether nothing is left to be done but what goes on for as long as the load.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over | State::Slowed { .. })
    }

    /// Whether nothing at all is left to be done.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether the group is whole again after this.
    fn is_settled(&self, events: &Events) -> bool {
        let replaced = |s: Struck| events.is_replaced(self.strike.rank, s.pid, s.time);
        match self.strike.fault {
            Fault::Kill | Fault::Stop | Fault::Cut(_) => self.struck.is_none_or(replaced),
            Fault::StopContinue(_) | Fault::Pause(_) | Fault::Slow(_) => self.is_over(),
        }
    }

    /// Whether nobody might be left to notice it, `earlier` strikes being what they are.
    pub(super) fn has_to_wait(&self, earlier: &[Attack], events: &Events) -> bool {
        let is_silent = |attack: &Attack| attack.strike.fault.is_silent();
        (is_silent(self) || earlier.iter().any(is_silent))
            && !earlier.iter().all(|attack| attack.is_settled(events))
    }

    /// Does what is to be done now. `began` is when the command was started, `before` when the strike before this one
    /// happened.
    ///
    /// # Errors
    /// The process may not be signalled, or does not listen.
    pub(super) fn look(
        &mut self,
        events: &Events,
        reference: &Reference,
        began: f64,
        before: f64,
    ) -> Result<(), LoadError> {
        let (rank, now) = (self.strike.rank, now());
        let failed = |source| LoadError::Io {
            path: format!("the process of rank {rank}").into(),
            action: "acting on it",
            source,
        };
        self.step(events, reference, (began, before, now)).map_err(failed)
    }

    /// The command has ended: what waits has missed its moment, and nothing stays stopped by this.
    pub(super) fn end(&mut self) {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Waiting => self.missed = Some("the command had ended".into()),
            State::Stopped { held, .. } | State::Slowed { held, .. } => {
                // one that is gone needs nothing, and whatever is left is looked for by its name
                let _ = held.signal(libc::SIGCONT);
            }
            State::Over => {}
        }
    }

    fn step(
        &mut self,
        events: &Events,
        reference: &Reference,
        (began, before, now): (f64, f64, f64),
    ) -> io::Result<()> {
        let rank = self.strike.rank;
        match &mut self.state {
            State::Over => {}
            State::Waiting => {
                let life = events.life(rank);
                let has_joined = life.as_ref().is_some_and(|life| life.joined.is_some());
                let is_heard = has_joined && events.is_heard_of(rank);
                let due = due(&self.strike, life.as_ref(), reference, (began, before, now));
                match due {
                    // nobody notices that one is silent of whom nobody has heard
                    Due::Now if self.strike.fault.is_silent() && !is_heard => {}
                    Due::NotYet => {}
                    Due::Missed(why) => self.miss(why),
                    Due::Now => match life {
                        Some(life) => self.act(&life)?,
                        None => self.miss("it has no process".into()),
                    },
                }
            }
            State::Stopped { held, until, or_replaced } => {
                let replaced = |struck: Struck| events.is_replaced(rank, struck.pid, struck.time);
                if now >= *until || (*or_replaced && self.struck.is_some_and(replaced)) {
                    held.signal(libc::SIGCONT)?;
                    self.state = State::Over;
                }
            }
            State::Slowed { held, factor, stopped, next } if now >= *next => {
                let signal = if *stopped { libc::SIGCONT } else { libc::SIGSTOP };
                let lives = held.signal(signal)?;
                *stopped = !*stopped;
                let stops = RUNS_SECONDS * f64::from(*factor - 1);
                *next = now + if *stopped { stops } else { RUNS_SECONDS };
                if !lives {
                    self.state = State::Over;
                }
            }
            State::Slowed { .. } => {}
        }
        Ok(())
    }

    fn act(&mut self, life: &Life<'_>) -> io::Result<()> {
        let Some(process) = life.process else {
            let why = "it does not tell which process it is";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        };
        let Some(held) = process.hold()? else {
            self.miss("its process had ended".into());
            return Ok(());
        };
        let fault = self.strike.fault;
        let time = now();
        let acted = match fault {
            Fault::Kill => held.signal(libc::SIGKILL)?,
            Fault::Cut(cut) => self.cut(process, &held, cut)?,
            _ => held.signal(libc::SIGSTOP)?,
        };
        if !acted {
            self.miss("its process had ended".into());
            return Ok(());
        }
        self.struck = Some(Struck { pid: life.pid, time });
        self.state = match fault {
            Fault::Kill | Fault::Stop | Fault::Cut(_) => State::Over,
            Fault::StopContinue(limit) => {
                State::Stopped { held, until: time + limit.as_secs_f64(), or_replaced: true }
            }
            Fault::Pause(limit) => {
                State::Stopped { held, until: time + limit.as_secs_f64(), or_replaced: false }
            }
            Fault::Slow(factor) => State::Slowed { held, factor, stopped: true, next: time },
        };
        Ok(())
    }

    /// Has the process cut off; `false`: it is gone.
    fn cut(&self, process: &ProcessIdentity, held: &Held, cut: Cut) -> io::Result<bool> {
        if cuts::make(&self.cuts, self.strike.rank, process.pid, cut)? {
            return Ok(true);
        }
        if held.is_gone(Duration::ZERO)? {
            return Ok(false);
        }
        let why = format!(
            "it does not listen for what it is to be cut off from: it is not handed {}, or cannot use it",
            cuts::CUTS_VARIABLE
        );
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    fn miss(&mut self, why: String) {
        self.missed = Some(why);
        self.state = State::Over;
    }
}

/// Whether a strike's moment has come for the `life` that its rank has now.
fn due(
    strike: &Strike,
    life: Option<&Life<'_>>,
    reference: &Reference,
    (began, before, now): (f64, f64, f64),
) -> Due {
    let whole = reference.seconds;
    let at = match strike.moment {
        Moment::Within { stage, part } => {
            let Some(life) = life else { return Due::NotYet };
            if life.stage() > stage || life.ended.is_some() {
                return Due::Missed(format!("{} was over", stage.name()));
            }
            if life.stage() < stage {
                return Due::NotYet;
            }
            life.entered() + part * reference.stage_seconds(strike.rank, stage)
        }
        Moment::At(seconds) => began + seconds,
        Moment::Part(part) => began + part * whole,
        Moment::Later(part) => before + part * whole,
    };
    let Some(life) = life.filter(|_| now >= at) else { return Due::NotYet };
    match life.ended {
        Some(_) => Due::Missed("it had left the group".into()),
        None => Due::Now,
    }
}

impl Reference {
    /// How long a rank was in a stage, undisturbed.
    fn stage_seconds(&self, rank: u32, stage: Stage) -> f64 {
        self.stages.get(&(rank, stage)).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::events::{Event, What};

    fn reference() -> Reference {
        let stages = BTreeMap::from([((0, Stage::Reading), 4.0)]);
        Reference { seconds: 10.0, stages, ..Reference::default() }
    }

    fn events(happened: &[(f64, What)]) -> Events {
        let first = (100.0, What::Started { world_size: 1, process: None });
        let all = [&[first], happened].concat();
        let event =
            |(time, what)| Event { time, rank: 0, pid: 7, generation: 1, read_bytes: 0, what };
        Events(all.into_iter().map(event).collect())
    }

    fn phase(name: &str) -> What {
        What::Phase { phase: name.into() }
    }

    fn strike(fault: Fault, moment: Moment) -> Strike {
        Strike { fault, rank: 0, moment }
    }

    #[test]
    fn a_stage_is_struck_in_its_course_or_not_at_all() {
        let reading = strike(Fault::Kill, Moment::Within { stage: Stage::Reading, part: 0.5 });
        let due = |happened: &[(f64, What)], now| {
            let events = events(happened);
            due(&reading, events.life(0).as_ref(), &reference(), (99.0, 99.0, now))
        };
        assert_eq!(due(&[], 110.0), Due::NotYet);
        let read = [(101.0, phase("reading"))];
        assert_eq!(due(&read, 102.9), Due::NotYet);
        assert_eq!(due(&read, 103.1), Due::Now);
        let over = [read[0].clone(), (102.0, phase("finishing"))];
        assert_eq!(due(&over, 102.1), Due::Missed("reading was over".into()));
    }

    #[test]
    fn a_moment_waits_for_a_process() {
        let at = strike(Fault::Kill, Moment::Part(0.5));
        let due = |life: Option<&Life<'_>>, now| due(&at, life, &reference(), (99.0, 99.0, now));
        assert_eq!(due(None, 120.0), Due::NotYet);
        let there = events(&[]);
        assert_eq!(due(there.life(0).as_ref(), 103.9), Due::NotYet);
        assert_eq!(due(there.life(0).as_ref(), 104.0), Due::Now);
        let left = events(&[(101.0, What::Ended { why: None })]);
        assert_eq!(due(left.life(0).as_ref(), 104.0), Due::Missed("it had left the group".into()));
    }

    /// After a loss that is not made good nobody may be left who notices the next.
    #[test]
    fn who_is_stopped_for_good_is_stopped_in_a_whole_group() {
        let later = |fault| Attack::new(strike(fault, Moment::Later(0.0)), PathBuf::new());
        let mut killed = later(Fault::Kill);
        killed.state = State::Over;
        killed.struck = Some(Struck { pid: 7, time: 101.0 });
        let lost = events(&[]);
        assert!(!later(Fault::Stop).has_to_wait(&[], &lost));
        let earlier = [killed];
        assert!(later(Fault::Stop).has_to_wait(&earlier, &lost));
        assert!(later(Fault::Cut(Cut::Network)).has_to_wait(&earlier, &lost));
        assert!(!later(Fault::Kill).has_to_wait(&earlier, &lost));
        let mut replaced = events(&[(102.0, What::Started { world_size: 1, process: None })]);
        replaced.0.push(Event { pid: 8, what: What::Joined, time: 103.0, ..replaced.0[0].clone() });
        assert!(!later(Fault::Stop).has_to_wait(&earlier, &replaced));
    }
}
