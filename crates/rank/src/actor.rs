//! The actor of one rank: delivers events to [`LoadState`], carries out its effects, never blocks.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use longshore_models::have::{Have, Kept};

use ractor::{Actor, ActorProcessingErr, ActorRef, DerivedActorRef};

use crate::{
    collective::Collective,
    device::Uploads,
    error::RankError,
    exchange::Exchange,
    fault::{self, Point},
    params::{Home, ParamMemory, ReadyParams},
    protocol::{
        Contact, Former, Generation, Join, LoadPlan, Peer, Peers, Phase, PlanName, Progress,
        RankCommand, RankEvent, RankEventKind, RankMessage, RankReport, Work, WorkerEvent,
    },
    scatter::Ranks,
    state::{Effect, LoadState},
    stream::{Job, panic_text},
};

/// A rank of a load.
#[derive(Debug)]
pub struct RankActor;

/// What a rank is started with.
#[derive(Debug)]
pub struct RankArguments {
    /// Its number.
    pub rank: u32,
    /// Where its events go.
    pub events: DerivedActorRef<RankEvent>,
    /// Its counters.
    pub progress: Arc<Progress>,
    /// What it does.
    pub work: Arc<Work>,
    /// Where its parameters live.
    pub home: Home,
    /// Memory of an earlier load of the same parameters, to be written again in place; `None`: new memory.
    pub reuse: Option<Arc<ParamMemory>>,
    /// What of it is not written.
    pub kept: Arc<Kept>,
    /// What it had in a group of more ranks.
    pub former: Option<Arc<Former>>,
    /// How it is joined with the others, when it is a process of its own.
    pub join: Option<Arc<dyn Join>>,
}

/// What a rank knows.
#[derive(Debug)]
pub struct RankState {
    arguments: RankArguments,
    /// What it has of the load; outlives a generation that ends before it is complete.
    held: Option<Held>,
    /// The way to its memory, where it is a device's.
    uploads: Option<Arc<Uploads>>,
    /// The generation whose ranks are being joined.
    joining: Option<Generation>,
    running: Option<Running>,
    /// Complete on this rank, not yet everywhere: what it has sent may still be on its way, so its end of the exchange is kept.
    complete: Option<Running>,
    /// Stopped; its workers may still be at work.
    halted: Option<Arc<Job>>,
    /// What to do when they are not any more.
    next: Option<Next>,
}

/// What a rank does when nothing of a generation is at work any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It begins with this one.
    Begin(Generation),
    /// It hands over what it has.
    HandOver(Generation),
}

impl Next {
    fn generation(self) -> Generation {
        match self {
            Next::Begin(generation) | Next::HandOver(generation) => generation,
        }
    }
}

/// What a rank has of a load.
#[derive(Debug)]
struct Held {
    memory: Arc<ParamMemory>,
    state: LoadState,
    have: Arc<Mutex<Have>>,
}

#[derive(Debug)]
struct Running {
    job: Arc<Job>,
    started: Instant,
}

/// However a load ends on this rank, its workers end with it: also when the actor is killed, which runs no `post_stop`.
/// A worker left waiting would hold the parameters for ever (RNK-5).
impl Drop for Running {
    fn drop(&mut self) {
        self.job.stop("the load ended on this rank");
    }
}

impl Actor for RankActor {
    type Msg = RankMessage;
    type State = RankState;
    type Arguments = RankArguments;

    async fn pre_start(
        &self,
        _myself: ActorRef<RankMessage>,
        arguments: RankArguments,
    ) -> Result<RankState, ActorProcessingErr> {
        Ok(RankState {
            arguments,
            held: None,
            uploads: None,
            joining: None,
            running: None,
            complete: None,
            halted: None,
            next: None,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<RankMessage>,
        message: RankMessage,
        state: &mut RankState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RankMessage::Command(RankCommand::Allocate { generation }) => {
                state.after_halt(myself, Next::Begin(generation));
            }
            RankMessage::Command(RankCommand::HandOver { generation }) => {
                state.after_halt(myself, Next::HandOver(generation));
            }
            RankMessage::Command(RankCommand::Load { generation, peers, have }) => {
                state.load(myself, generation, peers, have);
            }
            RankMessage::Command(RankCommand::Start { generation }) => state.start(generation),
            RankMessage::Command(RankCommand::Abort { generation, .. }) => state.abort(generation),
            // whoever holds the finished parameters acts on it too
            RankMessage::Command(RankCommand::Release { generation }) => state.release(generation),
            RankMessage::Worker(generation, WorkerEvent::Joined(collective, plan, name)) => {
                state.joined(myself, generation, collective, (plan, name));
            }
            RankMessage::Worker(generation, WorkerEvent::Halted) => {
                state.halted(myself, generation);
            }
            RankMessage::Worker(generation, event) => state.worker(generation, event),
        }
        Ok(())
    }
}

impl RankState {
    fn after_halt(&mut self, myself: ActorRef<RankMessage>, next: Next) {
        self.joining = None;
        let waited_for = self.next.replace(next).is_some();
        self.halt();
        match &self.halted {
            None => self.go_on(myself),
            // its end comes, and is for this now
            Some(_) if waited_for => {}
            Some(job) => {
                let job = Arc::clone(job);
                // a read may take long, and an actor must not wait
                let named = std::thread::Builder::new().name(format!("rank{}-halt", job.rank));
                let waiting = named.spawn(move || {
                    job.wait_until_still();
                    // a rank that is gone has no use for it
                    let _ = myself.cast(RankMessage::Worker(job.generation, WorkerEvent::Halted));
                });
                if let Err(e) = waiting {
                    self.fail(next.generation(), RankError::Thread(e));
                }
            }
        }
    }

    /// Stops what runs; what has landed is kept, and what its workers still tell is noted.
    fn halt(&mut self) {
        self.uploads = None;
        let running = self.running.take().or(self.complete.take());
        if let Some(running) = running {
            self.halted = Some(Arc::clone(&running.job));
        }
    }

    fn halted(&mut self, myself: ActorRef<RankMessage>, generation: Generation) {
        if self.halted.take_if(|job| job.generation == generation).is_some() {
            self.go_on(myself);
        }
    }

    /// Does what comes next: tells what this rank has and how it can be reached, or hands over what it has.
    fn go_on(&mut self, myself: ActorRef<RankMessage>) {
        let Some(next) = self.next.take() else { return };
        let kind = match next {
            Next::Begin(generation) => match self.contact(myself, generation) {
                Ok((contact, have)) => RankEventKind::Allocated(contact, have),
                Err(e) => RankEventKind::Failed(e),
            },
            Next::HandOver(_) => RankEventKind::HandedOver(self.hand_over()),
        };
        self.report(next.generation(), kind);
    }

    /// Gives up what it has.
    fn hand_over(&mut self) -> Option<Former> {
        let (held, rank) = (self.held.take(), self.arguments.rank);
        held.map(|held| Former { rank, have: held.have(), memory: held.memory })
    }

    fn contact(
        &mut self,
        myself: ActorRef<RankMessage>,
        generation: Generation,
    ) -> Result<(Contact, Have), RankError> {
        let RankArguments { rank, work, home, reuse, kept, join, progress, .. } = &self.arguments;
        let held = match self.held.take() {
            Some(held) => held,
            None => Held::new(*rank, work, home, reuse.as_ref(), kept)?,
        };
        let have = match &self.arguments.former {
            None => held.have(),
            Some(former) => former.have.clone(),
        };
        let memory = Arc::clone(&held.memory);
        self.held = Some(held);
        self.uploads = match memory.device() {
            None => None,
            Some(device) => {
                let form = work.device_form;
                let (memory, progress) = (Arc::clone(&memory), Arc::clone(progress));
                Some(Arc::new(Uploads::new(device, *rank, memory, progress, form)?))
            }
        };
        let contact = match join {
            None => Contact::Here(self.own(myself)?),
            Some(join) => Contact::Apart(join.announce(generation)?),
        };
        Ok((contact, have))
    }

    /// This rank as others of its process see it.
    fn own(&self, myself: ActorRef<RankMessage>) -> Result<Peer, RankError> {
        let memory = self.held.as_ref().map(|held| Arc::clone(&held.memory)).ok_or_else(|| {
            RankError::Panicked("the rank was to load before it had memory".to_owned())
        })?;
        let progress = Arc::clone(&self.arguments.progress);
        let uploads = self.uploads.clone();
        Ok(Peer { memory, uploads, progress, actor: myself })
    }

    fn load(
        &mut self,
        myself: ActorRef<RankMessage>,
        generation: Generation,
        peers: Peers,
        have: Arc<Vec<Have>>,
    ) {
        match peers {
            Peers::Here(all) => {
                let own = self.own(myself);
                let work = Arc::clone(&self.arguments.work);
                let prepared = own.map(|own| (work, own, Ranks::All(all), None));
                self.prepare(generation, PlanName::default(), prepared);
            }
            Peers::Apart(roster) => {
                self.joining = Some(generation);
                let (rank, join) = (self.arguments.rank, self.arguments.join.clone());
                // reaching other hosts may take long, and an actor must not wait
                let connect = move || {
                    let missing = || RankError::Panicked("the rank cannot join others".to_owned());
                    let joined = catch_unwind(AssertUnwindSafe(|| {
                        let join = join.ok_or_else(missing)?;
                        let (plan, name) = join.plan(&have)?;
                        let collective = join.join(generation, &roster)?;
                        Ok(WorkerEvent::Joined(collective, plan, name))
                    }));
                    let joined = joined
                        .unwrap_or_else(|panic| Err(RankError::Panicked(panic_text(&*panic))));
                    let event = joined.unwrap_or_else(WorkerEvent::Failed);
                    // a rank that is gone has no use for it
                    let _ = myself.cast(RankMessage::Worker(generation, event));
                };
                let named = std::thread::Builder::new().name(format!("rank{rank}-join"));
                if let Err(e) = named.spawn(connect) {
                    self.fail(generation, RankError::Thread(e));
                }
            }
        }
    }

    fn joined(
        &mut self,
        myself: ActorRef<RankMessage>,
        generation: Generation,
        collective: Arc<dyn Collective>,
        (plan, name): (Arc<LoadPlan>, PlanName),
    ) {
        // RNK-4
        if self.joining != Some(generation) {
            return collective.abort("the load has ended");
        }
        let rank = self.arguments.rank;
        let prepared = self.own(myself).map(|own| {
            let exchange = Exchange::new(rank, &plan, collective);
            let work = Arc::new(Work { plan, ..(*self.arguments.work).clone() });
            (work, own.clone(), Ranks::One(rank, Box::new(own)), Some(exchange))
        });
        self.prepare(generation, name, prepared);
    }

    fn prepare(
        &mut self,
        generation: Generation,
        name: PlanName,
        prepared: Result<(Arc<Work>, Peer, Ranks, Option<Exchange>), RankError>,
    ) {
        self.joining = None;
        let (work, own, ranks, exchange) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => return self.fail(generation, e),
        };
        let Some(held) = &mut self.held else { return };
        let exchanges = exchange.is_some();
        let (rank, have) = (self.arguments.rank, Arc::clone(&held.have));
        let former = self.arguments.former.clone();
        let job = match Job::new(rank, generation, work, own, ranks, exchange, have, former) {
            Ok(job) => job,
            Err(e) => return self.fail(generation, e),
        };
        let effects = held.state.begin(exchanges);
        self.running = Some(Running { job: Arc::new(job), started: Instant::now() });
        self.carry_out(generation, effects);
        self.report(generation, RankEventKind::Prepared(name));
    }

    fn start(&mut self, generation: Generation) {
        let rank = self.arguments.rank as usize;
        let Some(running) = self.running.as_mut().filter(|r| r.job.generation == generation) else {
            return;
        };
        running.started = Instant::now();
        let idle = running.job.work.plan.reads[rank].is_empty();
        self.arguments.progress.enter(Phase::Reading);
        fault::at_point(self.arguments.rank, generation, Point::Started);
        match running.job.spawn_workers() {
            Err(e) => self.fail(generation, e),
            Ok(()) if idle => {
                let effects = self.on(WorkerEvent::ReadsDone);
                self.carry_out(generation, effects);
            }
            Ok(()) => {}
        }
    }

    fn abort(&mut self, generation: Generation) {
        self.joining.take_if(|g| *g == generation);
        self.next.take_if(|next| next.generation() == generation);
        self.running.take_if(|r| r.job.generation == generation);
        self.release(generation);
        self.held = None;
    }

    fn release(&mut self, generation: Generation) {
        if self.complete.take_if(|r| r.job.generation == generation).is_some() {
            self.held = None;
            // whoever has the finished parameters has them alone
            self.arguments.reuse = None;
            self.arguments.former = None;
        }
    }

    fn worker(&mut self, generation: Generation, event: WorkerEvent) {
        if self.halted.as_ref().is_some_and(|job| job.generation == generation) {
            // what they have done is done, and goes on in the next generation
            self.on(event);
            return;
        }
        // RNK-4
        let running = self.running.as_ref().map(|r| r.job.generation).or(self.joining);
        if running != Some(generation) {
            return;
        }
        match event {
            WorkerEvent::Failed(e) => self.fail(generation, e),
            other => {
                let effects = self.on(other);
                self.carry_out(generation, effects);
            }
        }
    }

    fn on(&mut self, event: WorkerEvent) -> Vec<Effect> {
        let Some(Held { state, .. }) = &mut self.held else {
            return Vec::new();
        };
        match event {
            WorkerEvent::ParamLanded(param) => state.param_landed(param),
            WorkerEvent::FinishDone(number) => state.finish_done(number),
            WorkerEvent::ReadsDone => {
                self.arguments.progress.enter(Phase::Finishing);
                let generation = self.running.as_ref().map_or(0, |running| running.job.generation);
                fault::at_point(self.arguments.rank, generation, Point::Read);
                state.reads_done()
            }
            WorkerEvent::ExchangeDone => state.exchange_done(),
            WorkerEvent::Joined(..) | WorkerEvent::Halted | WorkerEvent::Failed(_) => Vec::new(),
        }
    }

    fn carry_out(&mut self, generation: Generation, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Run(finish) => {
                    if let Some(running) = &self.running {
                        running.job.push_finish(finish);
                    }
                }
                Effect::BecomeReady => self.become_ready(generation),
            }
        }
    }

    fn become_ready(&mut self, generation: Generation) {
        // what is not needed any more is not kept for as long as the actor
        self.uploads = None;
        let (Some(running), Some(held)) = (self.running.take(), &self.held) else {
            return;
        };
        running.job.staging.release();
        let rank = self.arguments.rank;
        let memory = Arc::clone(&held.memory);
        let report = self.summary(&running, &memory);
        let Some(params) = ReadyParams::new(rank, memory) else {
            let what = "the rank believed to be ready while bytes were missing".to_owned();
            return self.fail(generation, RankError::Panicked(what));
        };
        self.arguments.progress.enter(Phase::Ready);
        self.complete = Some(running);
        self.report(generation, RankEventKind::Ready(Some(params), report));
    }

    fn summary(&self, running: &Running, memory: &ParamMemory) -> RankReport {
        use std::sync::atomic::Ordering::Relaxed;
        let p = &self.arguments.progress;
        let (peak_staging_bytes, final_staging_bytes) = running.job.staging_bytes();
        let cached_bytes_read = p.cached_bytes.load(Relaxed);
        RankReport {
            storage_bytes_read: p.read_bytes.load(Relaxed).saturating_sub(cached_bytes_read),
            cached_bytes_read,
            padding_bytes_read: p.padding_bytes.load(Relaxed),
            retried_bytes: p.retried_bytes.load(Relaxed),
            reads: p.reads.load(Relaxed),
            received_bytes: p.received_bytes.load(Relaxed),
            sent_bytes: p.sent_bytes.load(Relaxed),
            peak_staging_bytes,
            peak_device_bytes: memory.device().map(|d| d.peak_bytes()),
            final_staging_bytes,
            elapsed: running.started.elapsed(),
        }
    }

    /// What has landed is kept: the cause may be another rank's.
    fn fail(&mut self, generation: Generation, error: RankError) {
        self.halt();
        self.joining = None;
        self.report(generation, RankEventKind::Failed(error));
    }

    fn report(&self, generation: Generation, kind: RankEventKind) {
        let rank = self.arguments.rank;
        let point = match &kind {
            RankEventKind::Allocated(..) => Some(Point::Allocated),
            RankEventKind::Prepared(_) => Some(Point::Prepared),
            RankEventKind::Ready(..) => Some(Point::Ready),
            RankEventKind::HandedOver(_) | RankEventKind::Failed(_) => None,
        };
        let event = RankEvent { rank, generation, kind };
        // without a coordinator there is nobody to tell
        let _ = self.arguments.events.cast(event);
        if let Some(point) = point {
            fault::at_point(rank, generation, point);
        }
    }
}

impl Held {
    fn new(
        rank: u32,
        work: &Work,
        home: &Home,
        reuse: Option<&Arc<ParamMemory>>,
        kept: &Kept,
    ) -> Result<Self, RankError> {
        let placement = &work.plan.placement;
        if rank >= placement.parallel.tp() {
            // it only hands on what it had
            let nothing = Arc::new(placement.nothing());
            let state = LoadState::new(&nothing, &[], kept);
            let memory = Arc::new(ParamMemory::new(nothing, rank, &Home::Host)?);
            return Ok(Self { memory, state, have: Arc::default() });
        }
        let memory = match reuse {
            Some(memory) => Arc::clone(memory),
            None => Arc::new(ParamMemory::new(Arc::clone(placement), rank, home)?),
        };
        let state = LoadState::new(placement, &placement.landing_bytes(rank), kept);
        Ok(Self { memory, state, have: Arc::new(Mutex::new(kept.have.clone())) })
    }

    fn have(&self) -> Have {
        // consistent after every statement that changes it
        self.have.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
