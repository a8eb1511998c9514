//! One run from a seed: hosts are started, lost and replaced as the scenario has it, until every rank is released.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    pin::pin,
    rc::Rc,
    task::{Poll, Waker},
    time::Duration,
};

use longshore_rank::protocol::Generation;
use tokio::task::LocalSet;
use tracing::info;
use turmoil::{Builder, Sim};

use crate::simulation::{
    bug::Bug,
    dice::Dice,
    member::{self, NOT_NEEDED},
    scenario::{Fault, Scenario, When},
    watch::{ProcessId, Seen, Watch},
    world::World,
};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The generation in which all became complete, or why the load came to nothing.
    pub(super) answer: Result<Generation, String>,
    /// Processes that were started.
    pub(super) processes: usize,
    pub(super) handed_on_bytes: u64,
    pub(super) taken_over_bytes: u64,
    /// How often the group has shrunk.
    pub(super) shrunk: usize,
    /// How often a rank went on with what it had.
    pub(super) resumed: u32,
    pub(super) elapsed: Duration,
    /// Of everything that happened, in order.
    pub(super) trace: u64,
}

/// From one step to the next.
const TICK: Duration = Duration::from_millis(5);

/// Nothing goes wrong later than this.
const FAULTS_END: Duration = Duration::from_secs(20);

/// How long a load may take once nothing goes wrong any more: time for the successor of a coordinator to be missed and met,
/// and for several ranks to be found stuck one after the other.
const PATIENCE: Duration = Duration::from_secs(90);

/// The same where nobody is replaced: time for several ranks to be missed one after the other, and to find no coordinator.
const PATIENCE_SHRINKING: Duration = Duration::from_secs(30);

/// Runs a scenario; `Err`: what must never be, or what never came.
pub(super) fn run(scenario: Scenario, bug: Option<Bug>) -> Result<Outcome, String> {
    let latency = Duration::from_millis(scenario.latency_millis);
    let mut sim = Builder::new()
        .rng_seed(scenario.seed)
        .enable_random_order()
        .tick_duration(TICK)
        .simulation_duration(Duration::MAX)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(latency)
        .tcp_capacity(4096)
        .build();
    let pending = scenario.faults.clone();
    let dice = Dice::new(scenario.seed, "launcher", 0);
    let world = World::new(scenario, bug);
    let mut driver =
        Driver { world, dice, pending, agenda: Vec::new(), gates: Vec::new(), healed: TICK };
    for rank in 0..driver.world.ranks() {
        let late = driver.dice.millis(0, driver.world.scenario.late_millis);
        driver.at(late, Act::Start(rank));
    }
    loop {
        driver.act(&mut sim);
        sim.step().map_err(|e| format!("a host failed: {e}"))?;
        driver.world.now.set(sim.elapsed());
        if let Some(ended) = driver.look() {
            return ended;
        }
    }
}

/// What is done to the hosts.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Unless there is one by now.
    Start(u32),
    /// The same, because the one before has ended by itself.
    Replace(u32),
    /// Starts another in the place of this one, which may not be dead.
    Supersede(ProcessId),
    Fault(Fault),
    Resume(ProcessId),
    Release(ProcessId, ProcessId),
    Repair(ProcessId, ProcessId),
    RepairOneway(ProcessId, ProcessId),
}

struct Driver {
    world: Rc<World>,
    dice: Dice,
    /// Faults that have not come.
    pending: Vec<(When, Fault)>,
    /// What is to be done when.
    agenda: Vec<(Duration, Act)>,
    gates: Vec<Rc<Gate>>,
    /// When the last fault was over.
    healed: Duration,
}

impl Driver {
    fn now(&self) -> Duration {
        self.world.now.get()
    }

    fn at(&mut self, later: Duration, act: Act) {
        self.agenda.push((self.now() + later, act));
    }

    /// Does what is due.
    fn act(&mut self, sim: &mut Sim<'_>) {
        let now = self.now();
        let (world, agenda) = (&self.world, &mut self.agenda);
        self.pending.retain(|(when, fault)| {
            let due = match *when {
                When::At(at) => Some(at),
                When::Reached(rank, point, often, later) => {
                    let reached = world.watch.borrow().count(rank, point) >= often;
                    reached.then(|| now + later)
                }
            };
            agenda.extend(due.map(|due| (due, Act::Fault(*fault))));
            due.is_none() && now < FAULTS_END
        });
        let (due, later) =
            std::mem::take(&mut self.agenda).into_iter().partition(|(at, _)| *at <= now);
        self.agenda = later;
        let due: Vec<(Duration, Act)> = due;
        for (_, act) in due {
            info!("{now:?}: {act:?}");
            match act {
                Act::Start(rank) | Act::Replace(rank) if self.is_gone(self.latest(rank)) => {
                    self.start(sim, rank);
                }
                Act::Start(_) | Act::Replace(_) => {}
                Act::Supersede(process) => {
                    let rank = self.world.watch.borrow().processes[process].rank;
                    // of two coordinators nobody would know which is the right one: the other ranks have left the first
                    let least = if rank == 0 { self.noticed() } else { Duration::ZERO };
                    let still = self.gates[process].still_since();
                    if self.latest(rank) == process && still.is_some_and(|at| now >= at + least) {
                        self.start(sim, rank);
                    }
                }
                Act::Fault(fault) => self.fault(sim, fault),
                Act::Resume(process) => self.gates[process].resume(),
                Act::Release(a, b) => sim.release(self.host(a), self.host(b)),
                Act::Repair(a, b) => sim.repair(self.host(a), self.host(b)),
                Act::RepairOneway(a, b) => sim.repair_oneway(self.host(a), self.host(b)),
            }
            if !matches!(act, Act::Replace(_)) {
                self.healed = now;
            }
        }
    }

    fn host(&self, process: ProcessId) -> String {
        self.world.watch.borrow().processes[process].host.clone()
    }

    /// Starts a process of a rank, on a host of its own.
    fn start(&mut self, sim: &mut Sim<'_>, rank: u32) {
        let process = self.world.watch.borrow_mut().start(rank);
        self.world.latest.borrow_mut()[rank as usize] = process;
        let gate = Rc::new(Gate::default());
        self.gates.push(Rc::clone(&gate));
        let (host, world) = (self.host(process), Rc::clone(&self.world));
        self.world.watch.borrow_mut().processes[process].address = Some(sim.lookup(host.as_str()));
        sim.host(host, move || {
            let (world, gate) = (Rc::clone(&world), Rc::clone(&gate));
            async move {
                let tasks = LocalSet::new();
                let main = tasks.run_until(member::process(Rc::clone(&world), process));
                let why = gate.hold(main).await;
                info!("{:?}: process {process} ends: {why}", world.now.get());
                world.watch.borrow_mut().processes[process].exited = Some(why);
                Ok(())
            }
        });
    }

    /// The latest process of a rank, if it ever had one.
    fn latest(&self, rank: u32) -> ProcessId {
        self.world.latest.borrow()[rank as usize]
    }

    /// How long a process stands still before all others have noticed.
    fn noticed(&self) -> Duration {
        self.world.scenario.silent_after + Duration::from_millis(500)
    }

    fn is_gone(&self, process: ProcessId) -> bool {
        self.world.watch.borrow().processes.get(process).is_none_or(|seen| seen.gone)
    }

    fn fault(&mut self, sim: &mut Sim<'_>, fault: Fault) {
        match fault {
            Fault::Crash { rank, silently, back } => {
                let process = self.latest(rank);
                if self.is_gone(process) {
                    return;
                }
                if silently {
                    let others = 0..self.gates.len();
                    for other in others.filter(|other| *other != process) {
                        sim.partition(self.host(process), self.host(other));
                    }
                }
                self.world.watch.borrow_mut().processes[process].gone = true;
                sim.crash(self.host(process));
                if let Some(back) = back {
                    self.at(back, Act::Start(rank));
                }
            }
            Fault::Pause { rank, lasting, replaced } => {
                let process = self.latest(rank);
                if self.is_gone(process) {
                    return;
                }
                self.gates[process].pause(self.now());
                self.at(lasting, Act::Resume(process));
                if let Some(replaced) = replaced.filter(|replaced| *replaced < lasting) {
                    self.at(replaced, Act::Supersede(process));
                }
            }
            Fault::Hold { a, b, lasting }
            | Fault::Cut { a, b, lasting }
            | Fault::Mute { from: a, to: b, lasting } => {
                let (a, b) = (self.latest(a), self.latest(b));
                if a == b || self.is_gone(a) || self.is_gone(b) {
                    return;
                }
                let hosts = (self.host(a), self.host(b));
                match fault {
                    Fault::Hold { .. } => {
                        sim.hold(hosts.0, hosts.1);
                        self.at(lasting, Act::Release(a, b));
                    }
                    Fault::Mute { .. } => {
                        sim.partition_oneway(hosts.0, hosts.1);
                        self.at(lasting, Act::RepairOneway(a, b));
                    }
                    _ => {
                        sim.partition(hosts.0, hosts.1);
                        self.at(lasting, Act::Repair(a, b));
                    }
                }
            }
            Fault::Break { rank } => self.world.breaks.borrow_mut()[rank as usize] = true,
            Fault::StorageFails { rank } => {
                self.world.storage.borrow_mut()[rank as usize].next_fails = true;
            }
            Fault::StorageHangs { rank, lasting } => {
                self.world.storage.borrow_mut()[rank as usize].hangs_until = self.now() + lasting;
                self.healed = self.now() + lasting;
            }
            Fault::StorageSlow { rank, times, lasting } => {
                let storage = &mut self.world.storage.borrow_mut()[rank as usize];
                (storage.slow_until, storage.slow_times) = (self.now() + lasting, times);
            }
        }
    }

    /// Whether the run has ended; replaces processes that have.
    fn look(&mut self) -> Option<Result<Outcome, String>> {
        let violation = self.world.watch.borrow().violation.clone();
        if let Some(violation) = violation {
            return Some(Err(violation));
        }
        if let Some(ended) = self.answered().or_else(|| self.abandoned()) {
            return Some(ended);
        }
        self.replace();
        let waiting =
            self.agenda.iter().any(|(_, act)| !matches!(act, Act::Fault(_) | Act::Replace(_)));
        let shrinks = self.world.scenario.shrinks;
        let patience = if shrinks { PATIENCE_SHRINKING } else { PATIENCE };
        if !waiting && self.now() > self.healed + patience {
            return Some(Err(format!("after {:?}: it does not end; {}", self.now(), self.state())));
        }
        None
    }

    fn outcome(&self, answer: Result<Generation, String>) -> Outcome {
        let watch = self.world.watch.borrow();
        Outcome {
            answer,
            processes: watch.processes.len(),
            handed_on_bytes: watch.handed_on_bytes,
            taken_over_bytes: watch.taken_over_bytes,
            shrunk: watch.groups.len(),
            resumed: watch.resumed,
            elapsed: self.now(),
            trace: watch.trace(),
        }
    }

    /// Whether the coordinator is lost for good, and every process has seen that nobody comes in its place.
    fn abandoned(&self) -> Option<Result<Outcome, String>> {
        let watch = self.world.watch.borrow();
        let ended = watch.processes.iter().all(|seen| seen.gone || seen.exited.is_some());
        (self.is_abandoned() && ended).then(|| Ok(self.outcome(Err("no coordinator".to_owned()))))
    }

    /// Whether rank 0 is lost and nothing is to come in its place.
    fn is_abandoned(&self) -> bool {
        let latest = self.world.latest.borrow()[0];
        let seen = |lost: &Seen| lost.gone && lost.exited.is_none();
        let lost = self.world.watch.borrow().processes.get(latest).is_some_and(seen);
        let comes = |act: &Act| matches!(act, Act::Start(0) | Act::Replace(0) | Act::Supersede(_));
        lost && !self.agenda.iter().any(|(_, act)| comes(act))
    }

    /// Whether a coordinator has answered, and every process has heard.
    fn answered(&self) -> Option<Result<Outcome, String>> {
        let watch = self.world.watch.borrow();
        if self.world.scenario.shrinks {
            return self.answered_shrinking(&watch);
        }
        let outcome = |answer| Ok(self.outcome(answer));
        for (coordinator, answer) in &watch.answers {
            match answer {
                Ok(generation) => {
                    let roster = watch.roster(*coordinator, *generation)?;
                    let heard = |process: &ProcessId| {
                        let seen = &watch.processes[*process];
                        seen.gone || seen.released == Some(*generation)
                    };
                    if roster.iter().all(heard) {
                        return Some(outcome(Ok(*generation)));
                    }
                }
                Err(why) if !self.world.scenario.may_fail() => {
                    return Some(Err(format!("after {:?}: it is given up: {why}", self.now())));
                }
                Err(why) if *coordinator == self.world.latest.borrow()[0] => {
                    if watch.processes.iter().all(|seen| seen.gone || seen.exited.is_some()) {
                        return Some(outcome(Err(why.clone())));
                    }
                }
                // its successor tries again
                Err(_) => {}
            }
        }
        None
    }

    /// Whether the only coordinator has answered, and every process is released or has ended.
    fn answered_shrinking(&self, watch: &Watch) -> Option<Result<Outcome, String>> {
        let ended = |seen: &Seen| seen.gone || seen.exited.is_some();
        match &watch.answers[..] {
            [] => None,
            [(_, Err(why))] if !self.may_end(watch, why) => {
                Some(Err(format!("after {:?}: it is given up: {why}", self.now())))
            }
            [(_, Err(why))] => {
                watch.processes.iter().all(ended).then(|| Ok(self.outcome(Err(why.clone()))))
            }
            [(coordinator, Ok(generation))] => {
                let roster = watch.roster(*coordinator, *generation)?;
                for (process, seen) in watch.processes.iter().enumerate() {
                    let needed = (seen.place.1 as usize) < watch.holders;
                    match seen.released == Some(*generation) {
                        true if !roster.contains(&process) => {
                            return Some(Err(format!(
                                "{} is released, and left behind",
                                seen.host
                            )));
                        }
                        true if needed || ended(seen) => {}
                        false if ended(seen) => {}
                        _ => return None,
                    }
                    let not_needed = |why: &String| why == NOT_NEEDED;
                    if seen.released.is_some()
                        && !needed
                        && !seen.exited.as_ref().is_none_or(not_needed)
                    {
                        return Some(Err(format!(
                            "{} ends otherwise: {:?}",
                            seen.host, seen.exited
                        )));
                    }
                }
                Some(Ok(self.outcome(Ok(*generation))))
            }
            [first, second, ..] => Some(Err(format!("two answers: {first:?} and {second:?}"))),
        }
    }

    /// Whether a group that shrinks may come to an end like this: only with rank 0, or when ranks do not come at all.
    fn may_end(&self, watch: &Watch, why: &str) -> bool {
        let last = why.rsplit("; then ").next().unwrap_or(why);
        let absent = watch.processes.iter().any(|seen| seen.gone);
        let without_it = last.contains("rank 0") || why.starts_with("the coordinator was lost");
        // then the group can do without the other
        let another = last.starts_with("rank 0 failed: exchange");
        (without_it && !another) || (absent && watch.groups.is_empty() && last.contains("join"))
    }

    /// Starts a process in the place of each that has ended by itself.
    fn replace(&mut self) {
        let mut ended = Vec::new();
        let abandoned = self.is_abandoned();
        {
            let mut watch = self.world.watch.borrow_mut();
            let latest = self.world.latest.borrow();
            let failed = |(process, answer): &(ProcessId, Result<_, _>)| {
                *process == latest[0] && answer.is_err()
            };
            let over = abandoned || self.world.scenario.shrinks || watch.answers.iter().any(failed);
            for (process, seen) in watch.processes.iter_mut().enumerate() {
                if seen.exited.is_some() && !std::mem::replace(&mut seen.gone, true) {
                    let replaced = !over && latest[seen.rank as usize] == process;
                    ended.extend(replaced.then_some(seen.rank));
                }
            }
        }
        for rank in ended {
            let later = self.dice.millis(50, 1000);
            self.at(later, Act::Replace(rank));
        }
    }

    /// What each process is at, for a run that does not end.
    fn state(&self) -> String {
        let watch = self.world.watch.borrow();
        let seen = watch.processes.iter().map(|seen| {
            let end = match (&seen.exited, seen.gone, seen.released) {
                (Some(why), ..) => format!("ended: {why}"),
                (None, true, _) => "lost".to_owned(),
                (None, _, Some(generation)) => format!("released in {generation}"),
                (None, ..) => format!("in generation {}", seen.generation),
            };
            format!("{} {end}", seen.host)
        });
        seen.collect::<Vec<_>>().join(", ")
    }
}

/// What a process stands still at.
#[derive(Debug, Default)]
struct Gate {
    /// How many pauses are not over.
    pauses: Cell<u32>,
    since: Cell<Duration>,
    waker: RefCell<Option<Waker>>,
}

impl Gate {
    /// Runs `main` whenever the gate is open.
    async fn hold<T>(&self, main: impl Future<Output = T>) -> T {
        let mut main = pin!(main);
        poll_fn(|context| {
            if self.pauses.get() > 0 {
                *self.waker.borrow_mut() = Some(context.waker().clone());
                return Poll::Pending;
            }
            main.as_mut().poll(context)
        })
        .await
    }

    fn pause(&self, now: Duration) {
        if self.pauses.replace(self.pauses.get() + 1) == 0 {
            self.since.set(now);
        }
    }

    /// Since when the process stands still, if it does.
    fn still_since(&self) -> Option<Duration> {
        (self.pauses.get() > 0).then(|| self.since.get())
    }

    fn resume(&self) {
        self.pauses.set(self.pauses.get() - 1);
        self.waker.take().into_iter().for_each(Waker::wake);
    }
}
