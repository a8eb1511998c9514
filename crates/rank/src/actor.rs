//! The actor of one rank: delivers events to [`LoadState`], carries out its effects, never blocks.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use ractor::{Actor, ActorProcessingErr, ActorRef, DerivedActorRef};

use crate::{
    collective::Collective,
    device::Uploads,
    error::RankError,
    exchange::Exchange,
    params::{Home, ParamMemory, ReadyParams},
    protocol::{
        Contact, Generation, Join, Peer, Peers, Phase, Progress, RankCommand, RankEvent,
        RankEventKind, RankMessage, RankReport, Work, WorkerEvent,
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
    /// How it is joined with the others, when it is a process of its own.
    pub join: Option<Arc<dyn Join>>,
}

/// What a rank knows.
#[derive(Debug)]
pub struct RankState {
    arguments: RankArguments,
    memory: Option<Arc<ParamMemory>>,
    /// The way to it, where it is a device's.
    uploads: Option<Arc<Uploads>>,
    /// The generation whose ranks are being joined.
    joining: Option<Generation>,
    running: Option<Running>,
    /// Complete on this rank, not yet everywhere: what it has sent may still be on its way, so its end of the exchange is kept.
    complete: Option<Running>,
}

#[derive(Debug)]
struct Running {
    job: Arc<Job>,
    state: LoadState,
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
            memory: None,
            uploads: None,
            joining: None,
            running: None,
            complete: None,
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
                state.allocate(myself, generation);
            }
            RankMessage::Command(RankCommand::Load { generation, peers }) => {
                state.load(myself, generation, peers);
            }
            RankMessage::Command(RankCommand::Start { generation }) => state.start(generation),
            RankMessage::Command(RankCommand::Abort { generation, .. }) => state.abort(generation),
            // whoever holds the finished parameters acts on it too
            RankMessage::Command(RankCommand::Release { generation }) => state.release(generation),
            RankMessage::Worker(generation, WorkerEvent::Joined(collective)) => {
                state.joined(myself, generation, collective);
            }
            RankMessage::Worker(generation, event) => state.worker(generation, event),
        }
        Ok(())
    }
}

impl RankState {
    fn allocate(&mut self, myself: ActorRef<RankMessage>, generation: Generation) {
        let kind = match self.contact(myself, generation) {
            Ok(contact) => RankEventKind::Allocated(contact),
            Err(e) => RankEventKind::Failed(e),
        };
        self.report(generation, kind);
    }

    fn contact(
        &mut self,
        myself: ActorRef<RankMessage>,
        generation: Generation,
    ) -> Result<Contact, RankError> {
        let RankArguments { rank, work, home, reuse, join, progress, .. } = &self.arguments;
        let memory = match reuse {
            Some(memory) => Arc::clone(memory),
            None => Arc::new(ParamMemory::new(Arc::clone(&work.plan.placement), *rank, home)?),
        };
        self.uploads = match memory.device() {
            None => None,
            Some(device) => {
                let form = work.device_form;
                let (memory, progress) = (Arc::clone(&memory), Arc::clone(progress));
                Some(Arc::new(Uploads::new(device, *rank, memory, progress, form)?))
            }
        };
        self.memory = Some(memory);
        match join {
            None => Ok(Contact::Here(self.own(myself)?)),
            Some(join) => Ok(Contact::Apart(join.announce(generation)?)),
        }
    }

    /// This rank as others of its process see it.
    fn own(&self, myself: ActorRef<RankMessage>) -> Result<Peer, RankError> {
        let memory = self.memory.as_ref().map(Arc::clone).ok_or_else(|| {
            RankError::Panicked("the rank was to load before it had memory".to_owned())
        })?;
        let progress = Arc::clone(&self.arguments.progress);
        let uploads = self.uploads.clone();
        Ok(Peer { memory, uploads, progress, actor: myself })
    }

    fn load(&mut self, myself: ActorRef<RankMessage>, generation: Generation, peers: Peers) {
        match peers {
            Peers::Here(all) => {
                let own = self.own(myself);
                self.prepare(generation, own.map(|own| (own, Ranks::All(all), None)));
            }
            Peers::Apart(roster) => {
                self.joining = Some(generation);
                let (rank, join) = (self.arguments.rank, self.arguments.join.clone());
                // reaching other hosts may take long, and an actor must not wait
                let connect = move || {
                    let missing = || RankError::Panicked("the rank cannot join others".to_owned());
                    let joined = catch_unwind(AssertUnwindSafe(|| {
                        join.ok_or_else(missing).and_then(|j| j.join(generation, &roster))
                    }));
                    let joined = joined
                        .unwrap_or_else(|panic| Err(RankError::Panicked(panic_text(&*panic))));
                    let event = joined.map_or_else(WorkerEvent::Failed, WorkerEvent::Joined);
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
    ) {
        // RNK-4
        if self.joining != Some(generation) {
            return collective.abort("the load has ended");
        }
        let rank = self.arguments.rank;
        let prepared = self.own(myself).map(|own| {
            let exchange = Exchange::new(rank, &self.arguments.work.plan, collective);
            (own.clone(), Ranks::One(rank, Box::new(own)), Some(exchange))
        });
        self.prepare(generation, prepared);
    }

    fn prepare(
        &mut self,
        generation: Generation,
        prepared: Result<(Peer, Ranks, Option<Exchange>), RankError>,
    ) {
        self.joining = None;
        let (own, ranks, exchange) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => return self.fail(generation, e),
        };
        let RankArguments { rank, work, .. } = &self.arguments;
        let landing = work.plan.placement.landing_bytes(*rank);
        let (state, effects) = LoadState::start(&work.plan.placement, &landing, exchange.is_some());
        let job = match Job::new(*rank, generation, Arc::clone(work), own, ranks, exchange) {
            Ok(job) => job,
            Err(e) => return self.fail(generation, e),
        };
        self.running = Some(Running { job: Arc::new(job), state, started: Instant::now() });
        self.carry_out(generation, effects);
        self.report(generation, RankEventKind::Prepared);
    }

    fn start(&mut self, generation: Generation) {
        let rank = self.arguments.rank as usize;
        let Some(running) = self.running.as_mut().filter(|r| r.job.generation == generation) else {
            return;
        };
        running.started = Instant::now();
        let idle = running.job.work.plan.reads[rank].is_empty();
        self.arguments.progress.enter(Phase::Reading);
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
        self.running.take_if(|r| r.job.generation == generation);
        self.release(generation);
    }

    fn release(&mut self, generation: Generation) {
        self.complete.take_if(|r| r.job.generation == generation);
    }

    fn worker(&mut self, generation: Generation, event: WorkerEvent) {
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
        let Some(running) = &mut self.running else {
            return Vec::new();
        };
        match event {
            WorkerEvent::ParamLanded(param) => running.state.param_landed(param),
            WorkerEvent::FinishDone(_) => running.state.finish_done(),
            WorkerEvent::ReadsDone => {
                self.arguments.progress.enter(Phase::Finishing);
                running.state.reads_done()
            }
            WorkerEvent::ExchangeDone => running.state.exchange_done(),
            WorkerEvent::Joined(_) | WorkerEvent::Failed(_) => Vec::new(),
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
        let (Some(running), Some(memory)) = (self.running.take(), self.memory.take()) else {
            return;
        };
        running.job.staging.release();
        let rank = self.arguments.rank;
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
        RankReport {
            storage_bytes_read: p.read_bytes.load(Relaxed),
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

    fn fail(&mut self, generation: Generation, error: RankError) {
        self.running = None;
        self.joining = None;
        self.report(generation, RankEventKind::Failed(error));
    }

    fn report(&self, generation: Generation, kind: RankEventKind) {
        let event = RankEvent { rank: self.arguments.rank, generation, kind };
        // without a coordinator there is nobody to tell
        let _ = self.arguments.events.cast(event);
    }
}
