//! The coordinator's actor: brings up the ranks of one load, watches them, ends it.
//!
//! allocate on all (or take over what an earlier load left) → load on all → start on all → ready from all. The first failure, reported or seen by supervision,
//! stops every rank and is the load's answer; what the others say afterwards no longer matters.

use std::sync::Arc;

use longshore_rank::{
    actor::{RankActor, RankArguments},
    params::{ParamMemory, ReadyParams},
    protocol::{
        Generation, LoadPlan, Peer, Progress, RankCommand, RankEvent, RankEventKind, RankMessage,
        RankReport,
    },
    storage::CheckpointSource,
};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::oneshot;

use crate::error::LoadError;

/// What all ranks ended with.
pub(crate) type Outcome = Result<Vec<(ReadyParams, RankReport)>, LoadError>;

/// Supervises the ranks of one load.
#[derive(Debug)]
pub(crate) struct Supervisor;

/// What a load is started with.
#[derive(Debug)]
pub(crate) struct SupervisorArguments {
    pub(crate) generation: Generation,
    pub(crate) plan: Arc<LoadPlan>,
    pub(crate) sources: Arc<Vec<CheckpointSource>>,
    pub(crate) concurrency: usize,
    /// Memory of an earlier load, rank by rank, to be written again in place.
    pub(crate) reuse: Option<Vec<Arc<ParamMemory>>>,
    pub(crate) progress: Vec<Arc<Progress>>,
    pub(crate) done: oneshot::Sender<Outcome>,
}

#[derive(Debug)]
pub(crate) struct SupervisorState {
    generation: Generation,
    plan: Arc<LoadPlan>,
    sources: Arc<Vec<CheckpointSource>>,
    concurrency: usize,
    ranks: Vec<ActorRef<RankMessage>>,
    peers: Vec<Option<Peer>>,
    ready: Vec<Option<(ReadyParams, RankReport)>>,
    done: Option<oneshot::Sender<Outcome>>,
}

impl Actor for Supervisor {
    type Msg = RankEvent;
    type State = SupervisorState;
    type Arguments = SupervisorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<RankEvent>,
        arguments: SupervisorArguments,
    ) -> Result<SupervisorState, ActorProcessingErr> {
        let mut ranks = Vec::with_capacity(arguments.progress.len());
        for (rank, progress) in arguments.progress.into_iter().enumerate() {
            let events = myself.get_derived();
            let start = RankArguments { rank: rank as u32, events, progress };
            let (actor, _) = Actor::spawn_linked(None, RankActor, start, myself.get_cell()).await?;
            ranks.push(actor);
        }
        let count = ranks.len();
        let state = SupervisorState {
            generation: arguments.generation,
            plan: arguments.plan,
            sources: arguments.sources,
            concurrency: arguments.concurrency,
            ranks,
            peers: vec![None; count],
            ready: (0..count).map(|_| None).collect(),
            done: Some(arguments.done),
        };
        let placement = &state.plan.placement;
        for (rank, actor) in state.ranks.iter().enumerate() {
            let reuse = arguments.reuse.as_ref().map(|all| Arc::clone(&all[rank]));
            let placement = Arc::clone(placement);
            let generation = state.generation;
            tell(actor, RankCommand::Allocate { generation, placement, reuse });
        }
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<RankEvent>,
        event: RankEvent,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        if event.generation != state.generation {
            return Ok(());
        }
        let rank = event.rank;
        match event.kind {
            RankEventKind::Allocated(peer) => state.allocated(rank, peer),
            RankEventKind::Ready(params, report) => state.rank_ready(rank, params, report),
            RankEventKind::Failed(source) => state.end(Err(LoadError::Rank { rank, source })),
        }
        if state.done.is_none() {
            myself.stop(None);
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RankEvent>,
        event: SupervisionEvent,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell, reason.unwrap_or_else(|| "stopped".to_owned()))
            }
            _ => return Ok(()),
        };
        if let Some(rank) = state.ranks.iter().position(|r| r.get_id() == cell.get_id()) {
            state.end(Err(LoadError::RankDied { rank: rank as u32, reason }));
            myself.stop(None);
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _myself: ActorRef<RankEvent>,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        for rank in &state.ranks {
            rank.stop(None);
        }
        Ok(())
    }
}

impl SupervisorState {
    fn allocated(&mut self, rank: u32, peer: Peer) {
        self.peers[rank as usize] = Some(peer);
        let Some(peers) = self.peers.iter().cloned().collect::<Option<Vec<Peer>>>() else {
            return;
        };
        let peers = Arc::new(peers);
        self.tell_all(|| RankCommand::Load {
            generation: self.generation,
            plan: Arc::clone(&self.plan),
            sources: Arc::clone(&self.sources),
            peers: Arc::clone(&peers),
            concurrency: self.concurrency,
        });
        // every rank has its `Load` in the mailbox by now, so bytes that land from here on find a rank that counts them
        self.tell_all(|| RankCommand::Start { generation: self.generation });
    }

    fn rank_ready(&mut self, rank: u32, params: ReadyParams, report: RankReport) {
        self.ready[rank as usize] = Some((params, report));
        if self.ready.iter().all(Option::is_some) {
            let all = self.ready.drain(..).flatten().collect();
            self.end(Ok(all));
        }
    }

    /// Answers, once; a failure stops all ranks first.
    fn end(&mut self, outcome: Outcome) {
        let Some(done) = self.done.take() else { return };
        if outcome.is_err() {
            self.tell_all(|| RankCommand::Abort { generation: self.generation });
        }
        // whoever asked may have gone away
        let _ = done.send(outcome);
    }

    fn tell_all(&self, command: impl Fn() -> RankCommand) {
        self.ranks.iter().for_each(|rank| tell(rank, command()));
    }
}

fn tell(rank: &ActorRef<RankMessage>, command: RankCommand) {
    // a rank that cannot be told is dead, and supervision says so
    let _ = rank.cast(RankMessage::Command(command));
}
