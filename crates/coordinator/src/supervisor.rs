//! The coordinator's actor: brings up the ranks of a group, watches them, carries out what
//! [`Coordination`] decides.
//!
//! A rank is an actor of this process or a link to another one: the words are the same, and so is what supervision tells.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use longshore_models::have::Kept;
use longshore_rank::{
    actor::{RankActor, RankArguments},
    params::{Home, ParamMemory},
    protocol::{Generation, PlanName, Progress, RankCommand, RankEvent, Work},
};
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, DerivedActorRef, SupervisionEvent};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    coordination::{
        Coordination, Departure, LoadEnd, Order, Outcome, Recovery, Watched,
        gathering::{Gathering, Round},
    },
    error::LoadError,
    events,
    fence::ProcessIdentity,
    link::{handshake::Admissions, session::Timing},
    processes::{
        member::{Gathered, fence},
        message::Piece,
        remote::{Heard, Lost, RemoteArguments, RemoteMessage, RemoteRank},
    },
};

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
        /// What of it is not written.
        kept: Arc<Kept>,
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
    /// How many of the first of them hold parameters.
    pub(crate) holders: u32,
    /// Those that are there from the start, in the order of their numbers.
    pub(crate) ranks: Vec<Member>,
    /// How long a rank may have work in hand without getting on.
    pub(crate) stuck_after: Duration,
    /// How a load may go on after a loss.
    pub(crate) recovery: Recovery,
    /// How ranks were lost of the groups that this one was part of, and the weight bytes that these had asked of storage.
    pub(crate) before: (Vec<LoadError>, u64),
    /// Who was let in, where ranks are processes: one that is lost makes room.
    pub(crate) admissions: Option<Admissions>,
    /// Where a piece of every rank goes, when all have contributed one.
    pub(crate) gathered: mpsc::Sender<Gathered>,
}

/// What a supervisor is told.
#[derive(Debug)]
pub(crate) enum SupervisorMessage {
    /// Carry a load through, and answer once.
    Load { generation: Generation, done: oneshot::Sender<Outcome> },
    /// Carry another load through, into what the ranks hold, by this plan; and answer once.
    LoadAgain { plan: PlanName, done: oneshot::Sender<Outcome> },
    /// A rank's process has joined.
    Joined(RemoteArguments),
    /// A rank that has joined was in this generation before.
    Knows(Generation),
    /// A rank has said something.
    Event(RankEvent),
    /// A rank's piece of what is gathered.
    Contributed { rank: u32, piece: Piece },
    /// Tell all ranks that the group goes on as another one, of these of its ranks.
    Shrink(Vec<u32>),
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
    process: Option<ProcessIdentity>,
    /// When it was last heard, and how often it should be; of one that is an actor nothing is heard.
    heard: Option<(Arc<Heard>, Timing)>,
    progress: Arc<Progress>,
}

#[derive(Debug)]
pub(crate) struct SupervisorState {
    coordination: Coordination,
    gathering: Gathering,
    /// `None`: it has not joined yet, or was lost.
    ranks: Vec<Option<Rank>>,
    /// How many of the first hold parameters.
    holders: usize,
    /// The rank of this process, where ranks are processes.
    own_rank: Option<u32>,
    admissions: Option<Admissions>,
    gathered: mpsc::Sender<Gathered>,
    /// Where the answer to the load goes that is under way.
    done: Option<oneshot::Sender<Outcome>>,
    ending: bool,
    /// Ranks that are being dismissed, or were.
    dismissals: Vec<JoinHandle<()>>,
    /// What ranks that were lost had read.
    lost_read_bytes: u64,
}

/// How long a rank that is dismissed may take to end.
const DISMISSED_WITHIN: Duration = Duration::from_millis(500);

/// From the end of its connection to the end of its process.
const LEAVE: Duration = Duration::from_millis(250);

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
        let SupervisorArguments { world_size, holders, stuck_after, recovery, .. } = arguments;
        let SupervisorArguments { admissions, gathered, before: (losses, lost_read_bytes), .. } =
            arguments;
        let own_rank = recovery.own_rank;
        let mut coordination =
            Coordination::new(world_size, holders, stuck_after, recovery, losses);
        // whoever holds nothing has nothing to gather
        let gathering = Gathering::new(holders, stuck_after);
        let mut ranks: Vec<Option<Rank>> = (0..world_size).map(|_| None).collect();
        for (number, member) in arguments.ranks.into_iter().enumerate() {
            ranks[number] = Some(bring_up(&myself, number as u32, member).await?);
            // nothing was asked for yet, so there is nothing to tell it
            let _ = coordination.joined(number as u32);
        }
        myself.send_interval(LOOK_EVERY, || SupervisorMessage::Look);
        Ok(SupervisorState {
            coordination,
            gathering,
            ranks,
            holders: holders as usize,
            own_rank,
            admissions,
            gathered,
            done: None,
            ending: false,
            dismissals: Vec::new(),
            lost_read_bytes,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<SupervisorMessage>,
        message: SupervisorMessage,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        let orders = match message {
            SupervisorMessage::Load { generation, done } => {
                state.done = Some(done);
                state.coordination.begin(generation, now)
            }
            SupervisorMessage::LoadAgain { plan, done } => {
                state.done = Some(done);
                state.tell_remotes(|| RemoteMessage::Plan(plan));
                state.coordination.begin_again(now)
            }
            SupervisorMessage::Joined(rank) => state.join(&myself, rank).await?,
            SupervisorMessage::Knows(generation) => state.coordination.knows(generation, now),
            SupervisorMessage::Event(event) => state.coordination.event(event, now),
            SupervisorMessage::Look => {
                let round = state.gathering.look(now);
                state.tell_of(round);
                let watched = state.watched();
                state.coordination.look(watched.as_deref(), now)
            }
            SupervisorMessage::Contributed { rank, piece } => {
                state.contributed(rank, piece, now);
                Vec::new()
            }
            SupervisorMessage::Shrink(ranks) => {
                state.tell_remotes(|| RemoteMessage::Shrink(ranks.clone()));
                Vec::new()
            }
            SupervisorMessage::End => {
                state.end(&myself);
                Vec::new()
            }
        };
        state.carry_out(orders);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<SupervisorMessage>,
        event: SupervisionEvent,
        state: &mut SupervisorState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, departure) = match event {
            SupervisionEvent::ActorFailed(cell, error) => match error.downcast_ref::<Lost>() {
                Some(lost) => (cell, lost.into()),
                None => (cell, Departure::Left(error.to_string())),
            },
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                let reason = reason.unwrap_or_else(|| "it stopped".to_owned());
                (cell, Departure::Left(reason))
            }
            _ => return Ok(()),
        };
        let is_it = |rank: &Option<Rank>| rank.as_ref().is_some_and(|r| r.id == cell.get_id());
        if let Some(rank) = state.ranks.iter().position(is_it) {
            state.lose(rank as u32, departure);
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
        // with this process goes whoever would end them
        for dismissal in std::mem::take(&mut state.dismissals) {
            // one that has panicked has ended
            let _ = dismissal.await;
        }
        Ok(())
    }
}

async fn bring_up(
    myself: &ActorRef<SupervisorMessage>,
    number: u32,
    member: Member,
) -> Result<Rank, ActorProcessingErr> {
    let (id, commands, remote, process, heard, progress) = match member {
        Member::Here { work, home, reuse, kept, progress } => {
            let start = RankArguments {
                rank: number,
                events: myself.get_derived(),
                progress: Arc::clone(&progress),
                work,
                home,
                reuse,
                kept,
                former: None,
                join: None,
            };
            let (actor, _) = Actor::spawn_linked(None, RankActor, start, myself.get_cell()).await?;
            (actor.get_id(), actor.get_derived(), None, None, None, progress)
        }
        Member::Apart(start) => {
            let (process, progress) = (start.process.clone(), Arc::clone(&start.progress));
            let (heard, timing) = (Arc::new(Heard::now()), start.timing);
            let start = (start, Arc::clone(&heard), myself.clone());
            let (actor, _) =
                Actor::spawn_linked(None, RemoteRank, start, myself.get_cell()).await?;
            let (id, commands) = (actor.get_id(), actor.get_derived());
            (id, commands, Some(actor), process, Some((heard, timing)), progress)
        }
    };
    Ok(Rank { id, commands, remote, process, heard, progress })
}

fn is_running(rank: &Rank) -> bool {
    !matches!(
        rank.commands.get_cell().get_status(),
        ractor::ActorStatus::Stopping | ractor::ActorStatus::Stopped
    )
}

impl SupervisorState {
    async fn join(
        &mut self,
        myself: &ActorRef<SupervisorMessage>,
        start: RemoteArguments,
    ) -> Result<Vec<Order>, ActorProcessingErr> {
        let number = start.rank;
        if self.coordination.is_present(number) {
            // the listener lets each in once
            return Ok(Vec::new());
        }
        let rank = bring_up(myself, number, Member::Apart(start)).await?;
        self.ranks[number as usize] = Some(rank);
        Ok(self.coordination.joined(number))
    }

    /// What there is to be seen of each rank, if all are there.
    fn watched(&self) -> Option<Vec<Watched>> {
        let seen = |rank: &Option<Rank>| {
            let progress = &rank.as_ref()?.progress;
            Some(Watched {
                steps: progress.steps.load(Ordering::Relaxed),
                busy: progress.in_hand.load(Ordering::Relaxed) > 0,
                ready: false,
                phase: progress.phase().name(),
                read_bytes: progress.read_bytes.load(Ordering::Relaxed),
            })
        };
        self.ranks.iter().map(seen).collect()
    }

    fn lose(&mut self, rank: u32, departure: Departure) {
        if self.ending {
            return;
        }
        let (rank, departure) = self.at_fault(rank, departure);
        let orders = self.coordination.lost(rank, departure, Instant::now());
        self.carry_out(orders);
        if self.gathering.is_awaited() {
            let orders = self.coordination.awaited();
            self.carry_out(orders);
        }
        if !self.coordination.is_silent(rank) {
            // nobody waits for it, whether another comes in its place or not
            self.vacate(rank);
        }
        if let Some((rank, reason)) = self.coordination.over() {
            // whoever gathers is told as well, now or when it asks; a full queue holds the news already
            let _ = self.gathered.try_send(Err(LoadError::RankLost { rank, reason }));
        }
    }

    /// Whose fault it is that `rank` is gone: a coordinator that hears nobody, not even the rank of its own process, is cut off
    /// itself, and must not take the others for lost.
    fn at_fault(&self, rank: u32, departure: Departure) -> (u32, Departure) {
        let own = self.own_rank.filter(|own| *own != rank);
        let heard = own.and_then(|own| self.ranks[own as usize].as_ref()?.heard.as_ref());
        match (own, heard) {
            // the last heartbeats of all came within the time of one
            (Some(own), Some((heard, Timing { beat_every, silent_after })))
                if matches!(departure, Departure::Silent(_))
                    && heard.ago() + 2 * *beat_every >= *silent_after =>
            {
                let why = "its coordinator hears nobody, not even the rank of its own process";
                (own, Departure::Silent(why.to_owned()))
            }
            _ => (rank, departure),
        }
    }

    fn carry_out(&mut self, orders: Vec<Order>) {
        for order in orders {
            events::ordered(&order, |rank| self.read_bytes(rank));
            match order {
                Order::Tell(rank, command) => {
                    if let Some(rank) = &self.ranks[rank as usize] {
                        // a rank that cannot be told is dead, and supervision says so
                        let _ = rank.commands.send_message(command);
                    }
                }
                Order::TellAll(command) => self.tell_all(&command),
                Order::Dismiss(rank, why) => self.dismiss(rank, why),
                Order::Answer(mut outcome) => {
                    let lost_bytes_read = self.lost_read_bytes;
                    match &mut outcome {
                        Ok(LoadEnd::Complete(loaded)) => {
                            loaded.lost.bytes_read = lost_bytes_read;
                            // those that only handed on go, and nobody waits for them
                            self.ranks.truncate(self.holders);
                        }
                        Ok(LoadEnd::Shrunk(shrunk)) => shrunk.lost_bytes_read = lost_bytes_read,
                        Err(_) => {}
                    }
                    if let Some(done) = self.done.take() {
                        // whoever asked may have gone away
                        let _ = done.send(outcome);
                    }
                }
            }
        }
    }

    fn read_bytes(&self, rank: u32) -> u64 {
        let rank = self.ranks[rank as usize].as_ref();
        rank.map_or(0, |rank| rank.progress.read_bytes.load(Ordering::Relaxed))
    }

    fn vacate(&mut self, rank: u32) -> Option<Rank> {
        self.gathering.vacate(rank);
        let rank = self.ranks.get_mut(rank as usize)?.take()?;
        let Progress { read_bytes, cached_bytes, .. } = &*rank.progress;
        let (read, cached) =
            (read_bytes.swap(0, Ordering::Relaxed), cached_bytes.swap(0, Ordering::Relaxed));
        self.lost_read_bytes += read.saturating_sub(cached);
        Some(rank)
    }

    /// Makes room for a replacement.
    fn dismiss(&mut self, rank: u32, why: String) {
        let Some(gone) = self.vacate(rank) else { return };
        let Some(remote) = gone.remote else {
            return gone.commands.get_cell().stop(None);
        };
        // one that is gone already has nothing to be told
        let told = remote.cast(RemoteMessage::Dismiss(why)).is_ok();
        // a group that is over has no room for anybody
        let admissions = self.admissions.clone().filter(|_| self.coordination.over().is_none());
        let dismissal = tokio::spawn(async move {
            if told {
                // it ends by itself and says why, if it still can
                let _ = timeout(DISMISSED_WITHIN, remote.get_cell().wait(None)).await;
            }
            // one that was killed has ended already: nobody waits for that
            fence(gone.process, told.then_some(LEAVE)).await;
            if let Some(admissions) = admissions {
                admissions.forget(rank);
            }
        });
        self.dismissals.push(dismissal);
    }

    fn contributed(&mut self, rank: u32, piece: Piece, now: Instant) {
        if let Some((lost, reason)) = self.coordination.over() {
            let orders = self.coordination.awaited();
            self.carry_out(orders);
            return self.refuse_piece(rank, LoadError::RankLost { rank: lost, reason });
        }
        let round = self.gathering.contributed(rank, piece, now);
        self.tell_of(round);
    }

    /// Tells what came of a round, to whom it concerns.
    fn tell_of(&self, round: Option<Round>) {
        match round {
            None => {}
            Some(Round::Complete(pieces)) => {
                let (wanted, pieces): (Vec<bool>, Vec<Vec<u8>>) =
                    pieces.into_iter().map(|piece| (piece.wants_all, piece.bytes)).unzip();
                for (rank, wanted) in (0..).zip(wanted) {
                    let pieces = if wanted { pieces.clone() } else { Vec::new() };
                    self.tell_remote(rank, RemoteMessage::Gathered(pieces));
                }
                // gatherings follow each other, so there is room unless nobody takes them any more
                let _ = self.gathered.try_send(Ok(pieces));
            }
            Some(Round::GivenUp { told, unanswered, after }) => {
                for &rank in &told {
                    self.tell_remote(rank, RemoteMessage::NotGathered { unanswered, after });
                }
                if self.own_rank.is_some_and(|own| told.contains(&own)) {
                    // as above
                    let _ = self
                        .gathered
                        .try_send(Err(LoadError::NoAnswer { rank: unanswered, after }));
                }
            }
        }
    }

    /// Whoever gathers with a rank that is lost waits for ever, unless it is told.
    fn refuse_piece(&self, rank: u32, why: LoadError) {
        self.tell_remote(rank, RemoteMessage::Over(why.line()));
        // a full queue holds the news already
        let _ = self.gathered.try_send(Err(why));
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

    fn tell_remote(&self, rank: u32, message: RemoteMessage) {
        if let Some(remote) = self.ranks[rank as usize].as_ref().and_then(|r| r.remote.as_ref()) {
            // as above
            let _ = remote.cast(message);
        }
    }

    fn tell_remotes(&self, command: impl Fn() -> RemoteMessage) {
        for remote in self.ranks.iter().flatten().filter_map(|rank| rank.remote.as_ref()) {
            // as above
            let _ = remote.cast(command());
        }
    }
}
