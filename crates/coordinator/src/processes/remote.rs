//! A rank in another process, on the coordinator's side: an actor with the same commands and events as one of this process.
//!
//! When its process is gone, silent or talks nonsense the actor fails with the cause, which its supervisor is told as it is
//! told of any actor.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use longshore_rank::{
    error::RankError,
    protocol::{
        Contact, Generation, Peers, Phase, PlanName, Progress, RankCommand, RankEvent,
        RankEventKind,
    },
};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::{
    coordination::Departure,
    error::line,
    fence::ProcessIdentity,
    link::{
        cable::Cable,
        session::{self, Beat, Ended, LinkError, OUTGOING_MAX, Overrun, Timing},
    },
    processes::message::{Happened, ToCoordinator, ToRank},
    supervisor::SupervisorMessage,
};

/// A rank in another process.
#[derive(Debug)]
pub(crate) struct RemoteRank;

/// What it is started with.
#[derive(Debug)]
pub(crate) struct RemoteArguments {
    pub(crate) rank: u32,
    /// Which process it is, as far as that can be told.
    pub(crate) process: Option<ProcessIdentity>,
    /// The connection, right behind the handshake.
    pub(crate) stream: TcpStream,
    pub(crate) timing: Timing,
    /// Its counters, as of its last heartbeat.
    pub(crate) progress: Arc<Progress>,
    /// The plan that it must carry out.
    pub(crate) plan: PlanName,
}

/// When something was last heard of a rank: heartbeats come when nothing else does.
#[derive(Debug)]
pub(crate) struct Heard(Mutex<Instant>);

impl Heard {
    pub(crate) fn now() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    pub(crate) fn ago(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn again(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Everything that arrives in its mailbox.
#[derive(Debug)]
pub(crate) enum RemoteMessage {
    Command(RankCommand),
    /// What it carries out from now on.
    Plan(PlanName),
    /// The group is over, for this reason.
    Over(String),
    /// The group goes on as another one, of these of its ranks.
    Shrink(Vec<u32>),
    /// Every rank has contributed its piece; all of them, if this one wants them.
    Gathered(Vec<Vec<u8>>),
    /// What was gathered was given up: this rank has not contributed for so long.
    NotGathered {
        unanswered: u32,
        after: Duration,
    },
    /// Nothing is left to be said.
    End,
    /// The group goes on without this process, for this reason.
    Dismiss(String),
    Heard(ToCoordinator),
    Ended(Result<Ended, LinkError>),
}

impl From<RankCommand> for RemoteMessage {
    fn from(command: RankCommand) -> Self {
        Self::Command(command)
    }
}

impl TryFrom<RemoteMessage> for RankCommand {
    type Error = RemoteMessage;

    fn try_from(message: RemoteMessage) -> Result<Self, RemoteMessage> {
        match message {
            RemoteMessage::Command(command) => Ok(command),
            other => Err(other),
        }
    }
}

/// How one is lost that says goodbye before the coordinator does.
pub(crate) const LEFT: &str = "its process left before the end";

/// Why the actor of a rank fails: how its rank was lost.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    #[error("{LEFT}")]
    Left,
    #[error("{}", line(.0))]
    Link(LinkError),
    #[error("it left {OUTGOING_MAX} messages unread")]
    Unread,
}

impl From<&Lost> for Departure {
    fn from(lost: &Lost) -> Self {
        let reason = lost.to_string();
        match lost {
            Lost::Link(LinkError::Silent { .. }) => Departure::Silent(reason),
            Lost::Link(_) | Lost::Left | Lost::Unread => Departure::Left(reason),
        }
    }
}

#[derive(Debug)]
pub(crate) struct RemoteState {
    // dropped first: one that is killed says no goodbye
    _session: AbortOnDropHandle<()>,
    rank: u32,
    supervisor: ActorRef<SupervisorMessage>,
    /// `None` once nothing is left to be said.
    outgoing: Option<mpsc::Sender<ToRank>>,
    /// What the rank has said and was not looked at yet.
    waiting: Arc<AtomicUsize>,
    plan: PlanName,
    generation: Generation,
    late: bool,
    dismissed: bool,
}

impl Actor for RemoteRank {
    type Msg = RemoteMessage;
    type State = RemoteState;
    type Arguments = (RemoteArguments, Arc<Heard>, ActorRef<SupervisorMessage>);

    async fn pre_start(
        &self,
        myself: ActorRef<RemoteMessage>,
        (arguments, heard_of, supervisor): Self::Arguments,
    ) -> Result<RemoteState, ActorProcessingErr> {
        let RemoteArguments { rank, stream, timing, progress, plan, .. } = arguments;
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let waiting: Arc<AtomicUsize> = Arc::default();
        let unheard = Arc::clone(&waiting);
        let session = tokio::spawn(async move {
            // the mailbox has no bound, so what waits in it is counted
            let heard = |message| {
                if unheard.fetch_add(1, Ordering::Relaxed) >= OUTGOING_MAX {
                    return Err(Overrun { waiting: OUTGOING_MAX });
                }
                let _ = myself.cast(RemoteMessage::Heard(message));
                Ok(())
            };
            let beat = |beat| {
                heard_of.again();
                note(&progress, &beat);
            };
            let cable = Cable::new(stream);
            let ended = session::run(cable, queue, heard, Beat::default, beat, timing).await;
            // an actor that is gone has no use for it
            let _ = myself.cast(RemoteMessage::Ended(ended));
        });
        Ok(RemoteState {
            _session: AbortOnDropHandle::new(session),
            rank,
            supervisor,
            outgoing: Some(outgoing),
            waiting,
            plan,
            generation: 0,
            late: false,
            dismissed: false,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<RemoteMessage>,
        message: RemoteMessage,
        state: &mut RemoteState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RemoteMessage::Command(command) => state.tell(to_rank(command)),
            RemoteMessage::Plan(plan) => {
                state.plan = plan;
                Ok(())
            }
            RemoteMessage::Over(why) => {
                let generation = state.generation;
                state.tell(Some(ToRank::Abort { generation, why }))
            }
            RemoteMessage::Shrink(ranks) => state.tell(Some(ToRank::Shrink { ranks })),
            RemoteMessage::Gathered(pieces) => state.tell(Some(ToRank::Gathered(pieces))),
            RemoteMessage::NotGathered { unanswered, after } => {
                state.tell(Some(ToRank::NotGathered { unanswered, after }))
            }
            RemoteMessage::End => {
                state.outgoing = None;
                Ok(())
            }
            RemoteMessage::Dismiss(why) => {
                state.dismissed = true;
                let told = state.tell(Some(ToRank::Dismissed { why }));
                state.outgoing = None;
                told
            }
            RemoteMessage::Heard(said) => {
                state.waiting.fetch_sub(1, Ordering::Relaxed);
                if !state.dismissed {
                    state.heard(said);
                }
                Ok(())
            }
            RemoteMessage::Ended(Ok(_)) if state.outgoing.is_none() => {
                myself.stop(None);
                Ok(())
            }
            RemoteMessage::Ended(Ok(_)) => Err(Lost::Left.into()),
            RemoteMessage::Ended(Err(e)) => Err(Lost::Link(e).into()),
        }
    }
}

impl RemoteState {
    fn tell(&mut self, message: Option<ToRank>) -> Result<(), ActorProcessingErr> {
        if let Some(ToRank::Allocate { generation }) = &message {
            self.generation = *generation;
        }
        let (Some(message), Some(outgoing)) = (message, &self.outgoing) else { return Ok(()) };
        // the session may have ended, which its own message tells
        match outgoing.try_send(message) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(Lost::Unread.into()),
            _ => Ok(()),
        }
    }

    fn heard(&mut self, said: ToCoordinator) {
        match said {
            ToCoordinator::Knows { generation } => {
                self.report(SupervisorMessage::Knows(generation));
            }
            ToCoordinator::Event { generation, what } => self.event(generation, what),
            ToCoordinator::Contributed(piece) => {
                self.report(SupervisorMessage::Contributed { rank: self.rank, piece });
            }
        }
    }

    fn event(&mut self, generation: Generation, what: Happened) {
        // RNK-4
        if generation != self.generation {
            if !self.late {
                let (rank, now) = (self.rank, self.generation);
                warn!("rank {rank} speaks of generation {generation}, it is {now} now: ignored");
            }
            self.late = true;
            return;
        }
        let kind = match what {
            Happened::Allocated { plan, .. } if plan != self.plan => {
                let text = "it plans another load than rank 0: source, options or version differ";
                let (text, blames) = (text.into(), None);
                RankEventKind::Failed(RankError::Reported {
                    text,
                    refused: true,
                    lasting: true,
                    blames,
                })
            }
            Happened::Allocated { endpoint, have, .. } => {
                RankEventKind::Allocated(Contact::Apart(endpoint), have)
            }
            Happened::Prepared { plan } => RankEventKind::Prepared(plan),
            Happened::Ready(report) => RankEventKind::Ready(None, report),
            Happened::Failed { text, refused, lasting, blames } => {
                RankEventKind::Failed(RankError::Reported { text, refused, lasting, blames })
            }
        };
        let rank = self.rank;
        self.report(SupervisorMessage::Event(RankEvent { rank, generation, kind }));
    }

    fn report(&self, message: SupervisorMessage) {
        // without a supervisor there is nobody to tell
        let _ = self.supervisor.cast(message);
    }
}

/// A command as it goes over the link.
pub(crate) fn to_rank(command: RankCommand) -> Option<ToRank> {
    Some(match command {
        RankCommand::Allocate { generation } => ToRank::Allocate { generation },
        RankCommand::Load { generation, peers: Peers::Apart(roster), have } => {
            ToRank::Load { generation, roster: roster.to_vec(), have: have.to_vec() }
        }
        // memory of the coordinator's process means nothing in another
        RankCommand::Load { peers: Peers::Here(_), .. } => return None,
        RankCommand::Start { generation } => ToRank::Start { generation },
        RankCommand::Abort { generation, why } => ToRank::Abort { generation, why },
        RankCommand::Release { generation } => ToRank::Release { generation },
        RankCommand::HandOver { generation } => ToRank::HandOver { generation },
    })
}

/// A rank's counters, from its heartbeat.
fn note(progress: &Progress, beat: &Beat) {
    progress.enter(Phase::from_number(beat.phase));
    progress.steps.store(beat.progress, Ordering::Relaxed);
    progress.in_hand.store(u64::from(!beat.waiting), Ordering::Relaxed);
    progress.read_bytes.store(beat.read_bytes, Ordering::Relaxed);
    progress.cached_bytes.store(beat.cached_bytes, Ordering::Relaxed);
    progress.received_bytes.store(beat.received_bytes, Ordering::Relaxed);
    progress.sent_bytes.store(beat.sent_bytes, Ordering::Relaxed);
}

/// A rank's heartbeat, from its counters.
pub(crate) fn beat_of(progress: &Progress) -> Beat {
    Beat {
        progress: progress.steps.load(Ordering::Relaxed),
        read_bytes: progress.read_bytes.load(Ordering::Relaxed),
        cached_bytes: progress.cached_bytes.load(Ordering::Relaxed),
        received_bytes: progress.received_bytes.load(Ordering::Relaxed),
        sent_bytes: progress.sent_bytes.load(Ordering::Relaxed),
        phase: progress.phase() as u8,
        waiting: progress.in_hand.load(Ordering::Relaxed) == 0,
    }
}
