//! The actor of one rank: delivers events to [`LoadState`], carries out its effects, never blocks.

use std::{sync::Arc, time::Instant};

use longshore_models::placement::Placement;
use ractor::{Actor, ActorProcessingErr, ActorRef, DerivedActorRef};

use crate::{
    error::RankError,
    params::{ParamMemory, ReadyParams},
    protocol::{
        Generation, LoadPlan, Peer, Phase, Progress, RankCommand, RankEvent, RankEventKind,
        RankMessage, RankReport, WorkerEvent,
    },
    state::{Effect, LoadState},
    storage::CheckpointSource,
    stream::Job,
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
}

/// What a rank knows.
#[derive(Debug)]
pub struct RankState {
    arguments: RankArguments,
    memory: Option<Arc<ParamMemory>>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    job: Arc<Job>,
    state: LoadState,
    concurrency: usize,
    started: Instant,
}

/// However a load ends on this rank, its workers end with it: also when the actor is killed, which runs no `post_stop`.
/// A worker left waiting would hold the parameters for ever (RNK-5).
impl Drop for Running {
    fn drop(&mut self) {
        self.job.stop();
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
        Ok(RankState { arguments, memory: None, running: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<RankMessage>,
        message: RankMessage,
        state: &mut RankState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RankMessage::Command(RankCommand::Allocate { generation, placement, reuse }) => {
                state.allocate(myself, generation, placement, reuse);
            }
            RankMessage::Command(RankCommand::Load {
                generation,
                plan,
                sources,
                peers,
                concurrency,
            }) => state.load(generation, plan, sources, peers, concurrency),
            RankMessage::Command(RankCommand::Start { generation }) => state.start(generation),
            RankMessage::Command(RankCommand::Abort { generation }) => state.abort(generation),
            RankMessage::Worker(generation, event) => state.worker(generation, event),
        }
        Ok(())
    }
}

impl RankState {
    fn allocate(
        &mut self,
        myself: ActorRef<RankMessage>,
        generation: Generation,
        placement: Arc<Placement>,
        reuse: Option<Arc<ParamMemory>>,
    ) {
        let memory = match reuse {
            Some(memory) => Ok(memory),
            None => ParamMemory::new(placement, self.arguments.rank).map(Arc::new),
        };
        let kind = match memory {
            Ok(memory) => {
                self.memory = Some(Arc::clone(&memory));
                let progress = Arc::clone(&self.arguments.progress);
                RankEventKind::Allocated(Peer { memory, progress, actor: myself })
            }
            Err(e) => RankEventKind::Failed(e),
        };
        self.report(generation, kind);
    }

    fn load(
        &mut self,
        generation: Generation,
        plan: Arc<LoadPlan>,
        sources: Arc<Vec<CheckpointSource>>,
        peers: Arc<Vec<Peer>>,
        concurrency: usize,
    ) {
        let rank = self.arguments.rank;
        let landing = plan.placement.landing_bytes(rank);
        let (state, effects) = LoadState::start(&plan.placement, &landing);
        let job = Arc::new(Job::new(rank, generation, plan, sources, peers));
        self.running = Some(Running { job, state, concurrency, started: Instant::now() });
        self.carry_out(generation, effects);
    }

    fn start(&mut self, generation: Generation) {
        let rank = self.arguments.rank as usize;
        let Some(running) = self.running.as_mut().filter(|r| r.job.generation == generation) else {
            return;
        };
        running.started = Instant::now();
        let idle = running.job.plan.reads[rank].is_empty();
        let spawned = running.job.spawn_workers(running.concurrency);
        self.arguments.progress.enter(Phase::Reading);
        match spawned {
            Err(e) => self.fail(generation, e),
            Ok(()) if idle => {
                let effects = self.on(WorkerEvent::ReadsDone);
                self.carry_out(generation, effects);
            }
            Ok(()) => {}
        }
    }

    fn abort(&mut self, generation: Generation) {
        self.running.take_if(|r| r.job.generation == generation);
    }

    fn worker(&mut self, generation: Generation, event: WorkerEvent) {
        // RNK-4
        if self.running.as_ref().is_none_or(|r| r.job.generation != generation) {
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
            WorkerEvent::Failed(_) => Vec::new(),
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
        let (Some(running), Some(memory)) = (self.running.take(), &self.memory) else {
            return;
        };
        running.job.staging.release();
        let rank = self.arguments.rank;
        let Some(params) = ReadyParams::new(rank, Arc::clone(memory)) else {
            let what = "the rank believed to be ready while bytes were missing".to_owned();
            return self.fail(generation, RankError::Panicked(what));
        };
        let report = self.summary(&running);
        self.arguments.progress.enter(Phase::Ready);
        self.report(generation, RankEventKind::Ready(params, report));
    }

    fn summary(&self, running: &Running) -> RankReport {
        use std::sync::atomic::Ordering::Relaxed;
        let p = &self.arguments.progress;
        RankReport {
            storage_bytes_read: p.read_bytes.load(Relaxed),
            padding_bytes_read: p.padding_bytes.load(Relaxed),
            reads: p.reads.load(Relaxed),
            received_bytes: p.received_bytes.load(Relaxed),
            sent_bytes: p.sent_bytes.load(Relaxed),
            peak_staging_bytes: running.job.staging.peak_bytes(),
            final_staging_bytes: running.job.staging.held_bytes(),
            elapsed: running.started.elapsed(),
        }
    }

    fn fail(&mut self, generation: Generation, error: RankError) {
        self.running = None;
        self.report(generation, RankEventKind::Failed(error));
    }

    fn report(&self, generation: Generation, kind: RankEventKind) {
        let event = RankEvent { rank: self.arguments.rank, generation, kind };
        // without a coordinator there is nobody to tell
        let _ = self.arguments.events.cast(event);
    }
}
