//! The coordinator's actor: brings up the ranks of a group, watches them, carries their load through.
//!
//! allocate on all (or take over what an earlier load left) → load on all → start on all → ready from all → release. The
//! first failure, reported or seen by supervision, stops every rank and is the load's answer; what the others say
//! afterwards no longer matters. A rank is an actor of this process or a link to another one: the words are the same, and
//! so is what supervision tells.

mod stuck;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use longshore_rank::{
    actor::{RankActor, RankArguments},
    params::{Home, ParamMemory, ReadyParams},
    protocol::{
        Contact, Generation, Peers, Progress, RankCommand, RankEvent, RankEventKind, RankReport,
        Work,
    },
};
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, DerivedActorRef, SupervisionEvent};
use tokio::sync::{mpsc, oneshot};
use tracing::debug;

use self::stuck::{Stuck, Watched};
use crate::{
    error::LoadError,
    processes::{
        member::Gathered,
        message::Piece,
        remote::{RemoteArguments, RemoteMessage, RemoteRank},
    },
};

/// What all ranks ended with; parameters where they are in this process.
pub(crate) type Outcome = Result<Vec<(Option<ReadyParams>, RankReport)>, LoadError>;

/// Supervises the ranks of a group.
#[derive(Debug)]
pub(crate) struct Supervisor;

/// A rank to be supervised.
#[derive(Debug)]
pub(crate) enum Member {
    /// An actor of this process.
    Here {
        /// What it does.
        work: Arc<Work>,
        /// Where its parameters live.
        home: Home,
        /// Memory of an earlier load.
        reuse: Option<Arc<ParamMemory>>,
        /// Its counters.
        progress: Arc<Progress>,
    },
    /// A process of its own.
    Apart(RemoteArguments),
}

/// What a group is started with.
#[derive(Debug)]
pub(crate) struct SupervisorArguments {
    /// Ranks of the group.
    pub(crate) world_size: u32,
    /// Those that are there from the start, in the order of their numbers.
    pub(crate) ranks: Vec<Member>,
    /// How long a rank may have work in hand without getting on.
    pub(crate) stuck_after: Duration,
    /// Where a piece of every rank goes, when all have contributed one.
    pub(crate) gathered: mpsc::Sender<Gathered>,
}

/// What a supervisor is told.
#[derive(Debug)]
pub(crate) enum SupervisorMessage {
    /// Carry a load through, and answer once.
    Load { generation: Generation, done: oneshot::Sender<Outcome> },
    /// A rank's process has joined.
    Joined(RemoteArguments),
    /// The time for joining is over.
    JoiningEnded {
        /// How long it was.
        after: Duration,
    },
    /// A rank has said something.
    Event(RankEvent),
    /// A rank's piece of what is gathered.
    Contributed { rank: u32, piece: Piece },
    /// Time to look whether all ranks get on.
    Look,
    /// Nothing is left to be done: end the ranks, then this.
    End,
}

impl From<RankEvent> for SupervisorMessage {
    fn from(event: RankEvent) -> Self {
        Self::Event(event)
    }
}

impl TryFrom<SupervisorMessage> for RankEvent {
    type Error = SupervisorMessage;

    fn try_from(message: SupervisorMessage) -> Result<Self, SupervisorMessage> {
        match message {
            SupervisorMessage::Event(event) => Ok(event),
            other => Err(other),
        }
    }
}

/// A rank that is supervised.
#[derive(Debug)]
struct Rank {
    id: ActorId,
    commands: DerivedActorRef<RankCommand>,
    remote: Option<ActorRef<RemoteMessage>>,
    progress: Arc<Progress>,
    /// What it has contributed and was not gathered yet; it waits until that was before it contributes more.
    piece: Option<Piece>,
}

/// One load in progress.
#[derive(Debug)]
struct Attempt {
    contacts: Vec<Option<Contact>>,
    prepared: Vec<bool>,
    ready: Vec<Option<(Option<ReadyParams>, RankReport)>>,
    stuck: Stuck,
    /// A failure that may only follow from another rank's, and when it was reported.
    suspicion: Option<(Instant, LoadError)>,
    done: oneshot::Sender<Outcome>,
}

#[derive(Debug)]
pub(crate) struct SupervisorState {
    /// `None`: it has not joined yet.
    ranks: Vec<Option<Rank>>,
    stuck_after: Duration,
    gathered: mpsc::Sender<Gathered>,
    generation: Generation,
    attempt: Option<Attempt>,
    /// The first rank that was lost, and why: nothing is done without it.
    lost: Option<(u32, String)>,
    ending: bool,
}

/// How long a rank that could not reach another is the cause only if nothing is heard of that one: a rank that fails or dies
/// closes its connections to all, and the news of that may come by way of another first.
const SUSPICION: Duration = Duration::from_millis(500);

/// How often to look whether all ranks get on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

impl Actor for Supervisor {
    type Msg = SupervisorMessage;
    type State = SupervisorState;
    type Arguments = SupervisorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<SupervisorMessage>,
        arguments: SupervisorArguments,
    ) -> Result<SupervisorState, ActorProcessingErr> {
        let mut ranks: Vec<Option<Rank>> = (0..arguments.world_size).map(|_| None).collect();
        for (number, member) in arguments.ranks.into_iter().enumerate() {
            ranks[number] = Some(bring_up(&myself, number as u32, member).await?);
        }
        myself.send_interval(LOOK_EVERY, || SupervisorMessage::Look);
        Ok(SupervisorState {
            ranks,
            stuck_after: arguments.stuck_after,
            gathered: arguments.gathered,
            generation: 0,
            attempt: None,
            lost: None,
            ending: false,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<SupervisorMessage>,
        message: SupervisorMessage,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            SupervisorMessage::Load { generation, done } => state.begin(generation, done),
            SupervisorMessage::Joined(rank) => state.join(&myself, rank).await?,
            SupervisorMessage::JoiningEnded { after } => state.joining_ended(after),
            SupervisorMessage::Event(event) => state.event(event),
            SupervisorMessage::Contributed { rank, piece } => state.contributed(rank, piece),
            SupervisorMessage::Look => state.look(Instant::now()),
            SupervisorMessage::End => state.end(&myself),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<SupervisorMessage>,
        event: SupervisionEvent,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell, reason.unwrap_or_else(|| "it stopped".to_owned()))
            }
            _ => return Ok(()),
        };
        let is_it = |rank: &Option<Rank>| rank.as_ref().is_some_and(|r| r.id == cell.get_id());
        if let Some(rank) = state.ranks.iter().position(is_it) {
            state.lose(rank as u32, reason);
            if state.ending && state.ranks.iter().flatten().all(|r| !is_running(r)) {
                myself.stop(None);
            }
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _myself: ActorRef<SupervisorMessage>,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        for rank in state.ranks.iter().flatten() {
            rank.commands.get_cell().stop(None);
        }
        Ok(())
    }
}

async fn bring_up(
    myself: &ActorRef<SupervisorMessage>,
    number: u32,
    member: Member,
) -> Result<Rank, ActorProcessingErr> {
    let (id, commands, remote, progress) = match member {
        Member::Here { work, home, reuse, progress } => {
            let start = RankArguments {
                rank: number,
                events: myself.get_derived(),
                progress: Arc::clone(&progress),
                work,
                home,
                reuse,
                join: None,
            };
            let (actor, _) = Actor::spawn_linked(None, RankActor, start, myself.get_cell()).await?;
            (actor.get_id(), actor.get_derived(), None, progress)
        }
        Member::Apart(start) => {
            let progress = Arc::clone(&start.progress);
            let start = (start, myself.clone());
            let (actor, _) =
                Actor::spawn_linked(None, RemoteRank, start, myself.get_cell()).await?;
            (actor.get_id(), actor.get_derived(), Some(actor), progress)
        }
    };
    Ok(Rank { id, commands, remote, progress, piece: None })
}

fn is_running(rank: &Rank) -> bool {
    !matches!(
        rank.commands.get_cell().get_status(),
        ractor::ActorStatus::Stopping | ractor::ActorStatus::Stopped
    )
}

impl SupervisorState {
    fn begin(&mut self, generation: Generation, done: oneshot::Sender<Outcome>) {
        if let Some((rank, reason)) = self.lost.clone() {
            // whoever asked may have gone away
            let _ = done.send(Err(LoadError::RankLost { rank, reason }));
            return;
        }
        let count = self.ranks.len();
        self.generation = generation;
        self.attempt = Some(Attempt {
            contacts: vec![None; count],
            prepared: vec![false; count],
            ready: (0..count).map(|_| None).collect(),
            stuck: Stuck::new(count, self.stuck_after, Instant::now()),
            suspicion: None,
            done,
        });
        self.tell_all(&RankCommand::Allocate { generation });
    }

    async fn join(
        &mut self,
        myself: &ActorRef<SupervisorMessage>,
        start: RemoteArguments,
    ) -> Result<(), ActorProcessingErr> {
        let number = start.rank;
        if self.ranks[number as usize].is_some() {
            // the listener lets each in once
            return Ok(());
        }
        let rank = bring_up(myself, number, Member::Apart(start)).await?;
        if self.attempt.is_some() {
            let command = RankCommand::Allocate { generation: self.generation };
            // supervision tells when it is gone
            let _ = rank.commands.send_message(command);
        }
        self.ranks[number as usize] = Some(rank);
        Ok(())
    }

    fn joining_ended(&mut self, after: Duration) {
        let missing: Vec<u32> =
            (0..self.ranks.len() as u32).filter(|r| self.ranks[*r as usize].is_none()).collect();
        if !missing.is_empty() {
            let world_size = self.ranks.len() as u32;
            self.answer(Err(LoadError::Missing { missing, world_size, after }));
        }
    }

    fn event(&mut self, event: RankEvent) {
        let RankEvent { rank, generation, kind } = event;
        // RNK-4
        let Some(attempt) = self.attempt.as_mut().filter(|_| generation == self.generation) else {
            debug!("rank {rank}: news of generation {generation} comes too late");
            return;
        };
        let at = rank as usize;
        match kind {
            RankEventKind::Allocated(contact) => {
                attempt.contacts[at] = Some(contact);
                if let Some(peers) = peers(&attempt.contacts) {
                    self.tell_all(&RankCommand::Load { generation, peers });
                }
            }
            RankEventKind::Prepared => {
                attempt.prepared[at] = true;
                // every rank counts what lands on it by now
                if attempt.prepared.iter().all(|p| *p) {
                    self.tell_all(&RankCommand::Start { generation });
                }
            }
            RankEventKind::Ready(params, report) => {
                attempt.ready[at] = Some((params, report));
                if attempt.ready.iter().all(Option::is_some) {
                    let all = attempt.ready.drain(..).flatten().collect();
                    self.tell_all(&RankCommand::Release { generation });
                    self.answer(Ok(all));
                }
            }
            RankEventKind::Failed(source) => {
                let blames_another = source.blames().is_some_and(|other| other != rank);
                let failed = LoadError::Rank { rank, source };
                match blames_another {
                    false => self.answer(Err(failed)),
                    true => {
                        attempt.suspicion.get_or_insert((Instant::now(), failed));
                    }
                }
            }
        }
    }

    fn look(&mut self, now: Instant) {
        let over = |(since, _): &mut (Instant, LoadError)| now.duration_since(*since) >= SUSPICION;
        let suspicion = self.attempt.as_mut().and_then(|a| a.suspicion.take_if(over));
        if let Some((_, failed)) = suspicion {
            return self.answer(Err(failed));
        }
        // whoever has not joined is waited for elsewhere
        let Some(ranks) = self.ranks.iter().map(Option::as_ref).collect::<Option<Vec<&Rank>>>()
        else {
            return;
        };
        let Some(attempt) = &mut self.attempt else { return };
        let watched: Vec<Watched> = ranks
            .iter()
            .zip(&attempt.ready)
            .map(|(rank, ready)| Watched {
                steps: rank.progress.steps.load(Ordering::Relaxed),
                busy: rank.progress.in_hand.load(Ordering::Relaxed) > 0,
                // its last look at the files may hang when everything else is done
                ready: ready.is_some(),
            })
            .collect();
        if let Some(rank) = attempt.stuck.look(&watched, now) {
            let progress = &ranks[rank as usize].progress;
            let stuck = LoadError::RankStuck {
                rank,
                after: self.stuck_after,
                phase: progress.phase().name(),
                read_bytes: progress.read_bytes.load(Ordering::Relaxed),
            };
            self.answer(Err(stuck));
        }
    }

    fn lose(&mut self, rank: u32, reason: String) {
        if self.ending {
            return;
        }
        let (rank, reason) = self.lost.get_or_insert((rank, reason)).clone();
        let lost = || LoadError::RankLost { rank, reason: reason.clone() };
        match self.attempt.is_some() {
            true => self.answer(Err(lost())),
            // those that are complete may wait for each other
            false => self.abort(lost().line()),
        }
        // whoever gathers is told as well, now or when it asks; a full queue holds the news already
        let _ = self.gathered.try_send(Err(lost()));
    }

    /// Answers a load, once; a failure stops all ranks first.
    fn answer(&mut self, outcome: Outcome) {
        let Some(attempt) = self.attempt.take() else { return };
        if let Err(e) = &outcome {
            self.abort(e.line());
        }
        // whoever asked may have gone away
        let _ = attempt.done.send(outcome);
    }

    fn abort(&self, why: String) {
        self.tell_all(&RankCommand::Abort { generation: self.generation, why });
    }

    fn contributed(&mut self, rank: u32, piece: Piece) {
        if let Some(rank) = &mut self.ranks[rank as usize] {
            rank.piece = Some(piece);
        }
        let has_one = |rank: &Option<Rank>| rank.as_ref().is_some_and(|r| r.piece.is_some());
        if !self.ranks.iter().all(has_one) {
            return;
        }
        let pieces = self.ranks.iter_mut().flatten().filter_map(|rank| rank.piece.take());
        let (wanted, pieces): (Vec<bool>, Vec<Vec<u8>>) =
            pieces.map(|piece| (piece.wants_all, piece.bytes)).unzip();
        for (rank, wanted) in self.ranks.iter().flatten().zip(wanted) {
            if let Some(remote) = &rank.remote {
                let pieces = if wanted { pieces.clone() } else { Vec::new() };
                // as with commands
                let _ = remote.cast(RemoteMessage::Gathered(pieces));
            }
        }
        // gatherings follow each other, so there is room unless nobody takes them any more
        let _ = self.gathered.try_send(Ok(pieces));
    }

    fn end(&mut self, myself: &ActorRef<SupervisorMessage>) {
        self.ending = true;
        self.tell_remotes(|| RemoteMessage::End);
        let over = |rank: &Rank| rank.remote.is_none() || !is_running(rank);
        if self.ranks.iter().flatten().all(over) {
            myself.stop(None);
        }
    }

    fn tell_all(&self, command: &RankCommand) {
        for rank in self.ranks.iter().flatten() {
            // a rank that cannot be told is dead, and supervision says so
            let _ = rank.commands.send_message(command.clone());
        }
    }

    fn tell_remotes(&self, command: impl Fn() -> RemoteMessage) {
        for remote in self.ranks.iter().flatten().filter_map(|rank| rank.remote.as_ref()) {
            // as above
            let _ = remote.cast(command());
        }
    }
}

/// All ranks as each has to know them, once all have said where they are.
fn peers(contacts: &[Option<Contact>]) -> Option<Peers> {
    let (mut here, mut apart) = (Vec::new(), Vec::new());
    for contact in contacts {
        match contact.as_ref()? {
            Contact::Here(peer) => here.push(peer.clone()),
            Contact::Apart(endpoint) => apart.push(endpoint.clone()),
        }
    }
    Some(match apart.is_empty() {
        true => Peers::Here(Arc::new(here)),
        false => Peers::Apart(Arc::new(apart)),
    })
}
