//! The rank's side of the control link: an actor that supervises the rank of this process, passes the coordinator's commands
//! on to it and its events back, and keeps the finished parameters until every rank is complete.

use std::{collections::VecDeque, sync::Arc};

use longshore_rank::{
    actor::{RankActor, RankArguments},
    error::RankError,
    params::{Home, ReadyParams},
    protocol::{
        Contact, Generation, Join, Progress, RankCommand, RankEvent, RankEventKind, RankMessage,
        RankReport, Work,
    },
};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot},
};

use crate::{
    error::{LoadError, line},
    link::{
        session::Timing,
        thread::{self, LinkThread},
    },
    processes::{
        message::{Happened, PLAN_HASH_BYTES, Piece, ToCoordinator, ToRank},
        remote::beat_of,
    },
};

/// What a rank holds when every rank is complete.
pub(crate) type Released = Result<(ReadyParams, RankReport), LoadError>;

/// What all ranks have contributed, or nothing where that was not asked for.
pub(crate) type Gathered = Result<Vec<Vec<u8>>, LoadError>;

/// One rank process.
#[derive(Debug)]
pub(crate) struct Member;

/// Checks what has to hold at the end of a load on this rank, before it is reported ready.
pub(crate) type CheckAtEnd = Box<dyn Fn() -> Result<(), LoadError> + Send>;

/// What it is started with.
pub(crate) struct MemberArguments {
    pub(crate) rank: u32,
    /// The connection to the coordinator, right behind the handshake.
    pub(crate) stream: TcpStream,
    pub(crate) timing: Timing,
    pub(crate) progress: Arc<Progress>,
    pub(crate) work: Arc<Work>,
    pub(crate) home: Home,
    pub(crate) join: Arc<dyn Join>,
    pub(crate) plan: [u8; PLAN_HASH_BYTES],
    pub(crate) check_at_end: CheckAtEnd,
    pub(crate) released: oneshot::Sender<Released>,
}

/// Everything that arrives in its mailbox.
#[derive(Debug)]
pub(crate) enum MemberMessage {
    /// From the coordinator.
    Told(ToRank),
    /// From the rank.
    Event(RankEvent),
    /// Contribute a piece, and answer when every rank has.
    Contribute(Piece, oneshot::Sender<Gathered>),
    /// The link has ended.
    LinkEnded,
    /// Nothing is left to be done.
    End(oneshot::Sender<()>),
}

impl From<RankEvent> for MemberMessage {
    fn from(event: RankEvent) -> Self {
        Self::Event(event)
    }
}

impl TryFrom<MemberMessage> for RankEvent {
    type Error = MemberMessage;

    fn try_from(message: MemberMessage) -> Result<Self, MemberMessage> {
        match message {
            MemberMessage::Event(event) => Ok(event),
            other => Err(other),
        }
    }
}

pub(crate) struct MemberState {
    rank: ActorRef<RankMessage>,
    link: Option<LinkThread<ToCoordinator>>,
    plan: [u8; PLAN_HASH_BYTES],
    check_at_end: CheckAtEnd,
    generation: Generation,
    /// Complete on this rank, not yet everywhere.
    complete: Option<(ReadyParams, RankReport)>,
    released: Option<oneshot::Sender<Released>>,
    gathering: VecDeque<oneshot::Sender<Gathered>>,
    /// Set once nothing more will come of the group.
    over: Option<Over>,
}

impl Actor for Member {
    type Msg = MemberMessage;
    type State = MemberState;
    type Arguments = MemberArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<MemberMessage>,
        arguments: MemberArguments,
    ) -> Result<MemberState, ActorProcessingErr> {
        let MemberArguments { rank, stream, timing, progress, work, home, join, plan, .. } =
            arguments;
        let start = RankArguments {
            rank,
            events: myself.get_derived(),
            progress: Arc::clone(&progress),
            work,
            home,
            reuse: None,
            join: Some(join),
        };
        let (rank, _) = Actor::spawn_linked(None, RankActor, start, myself.get_cell()).await?;
        let (link, told) = thread::spawn(stream, move || beat_of(&progress), timing)?;
        tokio::spawn(pass_on(told, myself));
        Ok(MemberState {
            rank,
            link: Some(link),
            plan,
            check_at_end: arguments.check_at_end,
            generation: 0,
            complete: None,
            released: Some(arguments.released),
            gathering: VecDeque::new(),
            over: None,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<MemberMessage>,
        message: MemberMessage,
        state: &mut MemberState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            MemberMessage::Told(told) => state.told(told),
            MemberMessage::Event(event) => state.event(event).await,
            MemberMessage::Contribute(piece, done) => match &state.over {
                // whoever waited may have gone away
                Some(over) => drop(done.send(Err(over.error()))),
                None => {
                    state.gathering.push_back(done);
                    state.say(ToCoordinator::Contributed(piece)).await;
                }
            },
            MemberMessage::LinkEnded => {
                let reason = match state.link.take() {
                    None => "it was ended".to_owned(),
                    Some(link) => match link.end().await {
                        Ok(_) => "it ended the group".to_owned(),
                        Err(e) => line(&e),
                    },
                };
                state.end(Over::Lost { reason });
            }
            MemberMessage::End(done) => {
                if let Some(link) = state.link.take() {
                    // the load is over; how the link ends changes nothing
                    let _ = link.end().await;
                }
                let _ = done.send(());
                myself.stop(None);
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<MemberMessage>,
        event: SupervisionEvent,
        state: &mut MemberState,
    ) -> Result<(), ActorProcessingErr> {
        let reason = match event {
            SupervisionEvent::ActorFailed(_, error) => error.to_string(),
            SupervisionEvent::ActorTerminated(_, _, reason) => {
                reason.unwrap_or_else(|| "it stopped".to_owned())
            }
            _ => return Ok(()),
        };
        let text = RankError::Panicked(reason).to_string();
        let what = Happened::Failed { text, refused: false, blames: None };
        state.say(ToCoordinator::Event { generation: state.generation, what }).await;
        Ok(())
    }
}

/// Hands on what the coordinator says, until the link ends.
async fn pass_on(mut told: mpsc::Receiver<ToRank>, member: ActorRef<MemberMessage>) {
    while let Some(message) = told.recv().await {
        if member.cast(MemberMessage::Told(message)).is_err() {
            return;
        }
    }
    // a member that is gone has no use for it
    let _ = member.cast(MemberMessage::LinkEnded);
}

impl MemberState {
    fn told(&mut self, told: ToRank) {
        match &told {
            ToRank::Allocate { generation } => self.generation = *generation,
            ToRank::Release { generation } if *generation == self.generation => {
                if let (Some(complete), Some(released)) =
                    (self.complete.take(), self.released.take())
                {
                    // whoever waited may have gone away
                    let _ = released.send(Ok(complete));
                }
            }
            ToRank::Abort { generation, why } if *generation == self.generation => {
                self.end(Over::Told { why: why.clone() });
            }
            _ => {}
        }
        if let ToRank::Gathered(pieces) = told {
            if let Some(done) = self.gathering.pop_front() {
                let _ = done.send(Ok(pieces));
            }
            return;
        }
        if let Some(command) = told.command() {
            // supervision tells when the rank is gone
            let _ = self.rank.cast(RankMessage::Command(command));
        }
    }

    async fn event(&mut self, event: RankEvent) {
        let RankEvent { generation, kind, .. } = event;
        if generation != self.generation {
            return;
        }
        let what = match kind {
            RankEventKind::Allocated(Contact::Apart(endpoint)) => {
                Happened::Allocated { endpoint, plan: self.plan }
            }
            RankEventKind::Allocated(Contact::Here(_)) => return,
            RankEventKind::Prepared => Happened::Prepared,
            RankEventKind::Ready(params, report) => match (self.check_at_end)() {
                Ok(()) => {
                    self.complete = params.map(|params| (params, report.clone()));
                    Happened::Ready(report)
                }
                Err(e) => Happened::Failed { text: e.line(), refused: false, blames: None },
            },
            RankEventKind::Failed(e) => {
                let (refused, blames) = (e.is_refusal(), e.blames());
                Happened::Failed { text: line(&e), refused, blames }
            }
        };
        self.say(ToCoordinator::Event { generation, what }).await;
    }

    async fn say(&mut self, message: ToCoordinator) {
        if let Some(link) = &self.link {
            // an ended link is told by a message of its own
            let _ = link.send(message).await;
        }
    }

    /// Nothing more will come of this load: tells everyone who waits, and stops the rank.
    fn end(&mut self, over: Over) {
        self.complete = None;
        // the first cause is the one that counts
        let over = self.over.get_or_insert(over);
        if let Some(released) = self.released.take() {
            // whoever waited may have gone away, here and below
            let _ = released.send(Err(over.error()));
        }
        for done in self.gathering.drain(..) {
            let _ = done.send(Err(over.error()));
        }
        let why = over.error().line();
        let command = RankCommand::Abort { generation: self.generation, why };
        let _ = self.rank.cast(RankMessage::Command(command));
    }
}

/// How a group came to its end before its load did.
#[derive(Debug)]
enum Over {
    /// The coordinator said so.
    Told { why: String },
    /// The coordinator is gone.
    Lost { reason: String },
}

impl Over {
    fn error(&self) -> LoadError {
        match self {
            Over::Told { why } => LoadError::GroupEnded { why: why.clone() },
            Over::Lost { reason } => LoadError::CoordinatorLost { reason: reason.clone() },
        }
    }
}
