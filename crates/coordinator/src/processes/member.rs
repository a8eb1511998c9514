//! The rank's side of the control link: an actor that supervises the rank of this process, passes the coordinator's commands
//! on to it and its events back, and keeps the finished parameters until every rank is complete.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use longshore_models::have::{Have, Kept};
use longshore_rank::{
    actor::{RankActor, RankArguments},
    error::RankError,
    params::{Home, ParamMemory, ReadyParams},
    protocol::{
        Contact, Former, Generation, Join, LoadPlan, PlanName, Progress, RankCommand, RankEvent,
        RankEventKind, RankMessage, Work,
    },
};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::{
    error::{LoadError, line},
    events,
    fence::{Fenced, ProcessIdentity},
    link::{
        connect::Connected,
        session::{LinkError, Timing},
        thread::{self, LinkThread},
    },
    processes::{
        Way,
        message::{Happened, Piece, ToCoordinator, ToRank},
        remote::beat_of,
    },
};

/// How a load has ended on a rank.
#[derive(Debug)]
pub(crate) enum End {
    /// Every rank is complete: what this one holds, and in which generation that is.
    Complete(ReadyParams, Generation),
    /// It goes on in a group of these ranks, of which this one is, with what it had here.
    Shrunk { ranks: Vec<u32>, former: Option<Former> },
}

/// What a rank is told at the end of a load.
pub(crate) type Released = Result<End, LoadError>;

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
    /// The connection to the coordinator.
    pub(crate) coordinator: Connected,
    pub(crate) timing: Timing,
    pub(crate) progress: Arc<Progress>,
    pub(crate) work: Arc<Work>,
    pub(crate) home: Home,
    /// What it had in a larger group.
    pub(crate) former: Option<Arc<Former>>,
    pub(crate) join: Arc<dyn Join>,
    pub(crate) plan: PlanName,
    pub(crate) check_at_end: CheckAtEnd,
    /// Where another coordinator is looked for if this one is lost; `None`: it would be in this process.
    pub(crate) way: Option<Way>,
    pub(crate) released: oneshot::Sender<Released>,
}

/// Another load into what this rank holds.
pub(crate) struct Again {
    pub(crate) work: Arc<Work>,
    pub(crate) home: Home,
    /// Ready to be written again; whoever asks for this keeps it as well.
    pub(crate) memory: Arc<ParamMemory>,
    /// What of it is not written.
    pub(crate) kept: Arc<Kept>,
    pub(crate) join: Arc<dyn Join>,
    pub(crate) plan: PlanName,
    pub(crate) check_at_end: CheckAtEnd,
    pub(crate) released: oneshot::Sender<Released>,
    /// Told when the coordinator may begin.
    pub(crate) taken_up: oneshot::Sender<Result<(), String>>,
}

impl std::fmt::Debug for Again {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Again").field("plan", &self.plan).finish_non_exhaustive()
    }
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
    /// Let go of the parameters, which are to be written again.
    LetGo,
    /// Take another load up.
    Again(Box<Again>),
    /// The link has ended.
    LinkEnded,
    /// Another coordinator was found, or not.
    Successor(Result<Connected, LoadError>),
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
    number: u32,
    work: Arc<Work>,
    rank: ActorRef<RankMessage>,
    link: Option<LinkThread<ToCoordinator>>,
    /// The coordinator's process.
    coordinator: Option<ProcessIdentity>,
    timing: Timing,
    progress: Arc<Progress>,
    way: Option<Way>,
    /// The coordinator's process where that has fallen silent since all ranks were complete, and how long it is not touched:
    /// nobody here needs it, so far.
    silent: Option<(ProcessIdentity, Duration)>,
    /// How the coordinator was lost whose successor is looked for.
    orphaned: Option<String>,
    plan: PlanName,
    /// What it has is of a larger group, and was so told there.
    is_of_former: bool,
    /// What it had here, for a smaller group.
    handed_over: Option<Option<Former>>,
    /// Of which ranks that is.
    shrunk: Option<Vec<u32>>,
    check_at_end: CheckAtEnd,
    generation: Generation,
    /// The last generation before another load was taken up: what comes later is about that. No other coordinator would know
    /// what ranks hold that have done so.
    before_again: Option<Generation>,
    /// Complete on this rank, not yet everywhere.
    complete: Option<ReadyParams>,
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
        let MemberArguments { rank, coordinator, timing, progress, work, home, .. } = arguments;
        let MemberArguments { former, join, plan, .. } = arguments;
        let (number, is_of_former) = (rank, former.is_some());
        let start = RankArguments {
            rank,
            events: myself.get_derived(),
            progress: Arc::clone(&progress),
            work: Arc::clone(&work),
            home,
            reuse: None,
            kept: Arc::default(),
            former,
            join: Some(join),
        };
        let (rank, _) = Actor::spawn_linked(None, RankActor, start, myself.get_cell()).await?;
        let mut state = MemberState {
            number,
            work,
            rank,
            link: None,
            coordinator: None,
            silent: None,
            timing,
            progress,
            way: arguments.way,
            orphaned: None,
            plan,
            is_of_former,
            handed_over: None,
            shrunk: None,
            check_at_end: arguments.check_at_end,
            generation: 0,
            before_again: None,
            complete: None,
            released: Some(arguments.released),
            gathering: VecDeque::new(),
            over: None,
        };
        state.link(coordinator, myself)?;
        Ok(state)
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
            MemberMessage::Contribute(piece, done) => {
                state.fence_silent().await;
                match &state.over {
                    // whoever waited may have gone away
                    Some(over) => drop(done.send(Err(over.error()))),
                    None => {
                        state.gathering.push_back(done);
                        state.say(ToCoordinator::Contributed(piece)).await;
                    }
                }
            }
            // what it has of the last load, and its threads, go with it
            MemberMessage::LetGo => state.rank.stop(None),
            MemberMessage::Again(again) => state.take_up(*again, myself).await,
            MemberMessage::LinkEnded => {
                let (ended, patience) = match state.link.take() {
                    None => (Ok("it was ended".to_owned()), None),
                    Some(link) => match link.end().await {
                        Ok(_) => (Ok("it ended the group".to_owned()), None),
                        Err(e) => (Err(line(&e)), patience(&e, &state.timing)),
                    },
                };
                match (ended, &state.way) {
                    // the group that follows is met by whoever waits for this
                    _ if state.shrunk.is_some() => {}
                    // the load goes on, under whoever takes its place
                    (Err(reason), Some(way))
                        if state.released.is_some()
                            && state.over.is_none()
                            && state.before_again.is_none() =>
                    {
                        warn!("the coordinator was lost ({reason}); its successor is looked for");
                        events::coordinator_lost(&reason);
                        let way = way.clone();
                        state.orphaned = Some(reason);
                        let gone = state.coordinator.take();
                        tokio::spawn(async move {
                            fence(gone, patience).await;
                            let found = way.meet().await;
                            // a member that is gone has no use for it
                            let _ = myself.cast(MemberMessage::Successor(found));
                        });
                    }
                    // in a reload nobody takes its place: all start again, which one that only hangs must not keep them from
                    (Err(reason), Some(_)) if state.released.is_some() => {
                        // before anyone here is told and ends: then nobody would do it
                        fence(state.coordinator.take(), patience).await;
                        state.end(Over::Lost { reason });
                    }
                    (Ok(reason) | Err(reason), _) => {
                        state.silent = state.coordinator.take().zip(patience);
                        if !state.gathering.is_empty() {
                            state.fence_silent().await;
                        }
                        state.end(Over::Lost { reason });
                    }
                }
            }
            MemberMessage::Successor(Ok(coordinator)) => {
                state.orphaned = None;
                events::emit(events::What::Joined);
                state.link(coordinator, myself)?;
                let generation = state.generation;
                state.say(ToCoordinator::Knows { generation }).await;
            }
            MemberMessage::Successor(Err(e)) => {
                let lost = state.orphaned.take().unwrap_or_default();
                let reason = format!("{lost}; then no other was found: {}", e.line());
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
        let (cell, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell, reason.unwrap_or_else(|| "it stopped".to_owned()))
            }
            _ => return Ok(()),
        };
        if cell.get_id() != state.rank.get_id() {
            // it was that of an earlier load
            return Ok(());
        }
        let text = RankError::Panicked(reason).to_string();
        let what = Happened::Failed { text, refused: false, lasting: false, blames: None };
        state.say(ToCoordinator::Event { generation: state.generation, what }).await;
        Ok(())
    }
}

/// How long a rank does not touch a coordinator that it took for lost. Where two do not hear each other any more, each takes the
/// other for lost, and only others could tell which of them is cut off; so the coordinator, who hears others, goes first. It
/// finds out at most a heartbeat later, and kills at once.
fn patience(ended: &LinkError, timing: &Timing) -> Option<Duration> {
    match ended {
        LinkError::Silent { .. } => Some(timing.beat_every + COORDINATOR_FIRST),
        // its process has ended, or its end of the connection
        _ => None,
    }
}

/// A busy host may need a moment to kill.
const COORDINATOR_FIRST: Duration = Duration::from_secs(1);

/// Makes sure that a process that counts as lost does nothing any more, once it had the time to end by itself.
pub(crate) async fn fence(process: Option<ProcessIdentity>, patience: Option<Duration>) {
    let (Some(process), patience) = (process, patience.unwrap_or_default()) else { return };
    let killed = tokio::task::spawn_blocking(move || process.end_within(patience)).await;
    if let Ok(Fenced::Failed(e)) = killed {
        warn!("a process that counts as lost may still be there: {e}");
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
    /// Takes up the connection to a coordinator.
    fn link(&mut self, coordinator: Connected, myself: ActorRef<MemberMessage>) -> io::Result<()> {
        let Connected { stream, process, .. } = coordinator;
        self.coordinator = process;
        let progress = Arc::clone(&self.progress);
        let (link, told) = thread::spawn(stream, move || beat_of(&progress), self.timing)?;
        tokio::spawn(pass_on(told, myself));
        self.link = Some(link);
        Ok(())
    }

    fn told(&mut self, told: ToRank) {
        match &told {
            // RNK-4: the coordinator was told by now which generation this is
            ToRank::Allocate { generation } if *generation <= self.generation => return,
            ToRank::Allocate { generation } => {
                self.generation = *generation;
                events::generation(*generation);
                // complete means now what it means in this generation
                self.complete = None;
            }
            // a rank may come to a group that is about to shrink
            ToRank::HandOver { generation } => self.generation = *generation,
            ToRank::Dismissed { why } => self.end(Over::Dismissed { why: why.clone() }),
            ToRank::Release { generation } if *generation == self.generation => {
                if let (Some(complete), Some(released)) =
                    (self.complete.take(), self.released.take())
                {
                    // whoever waited may have gone away
                    let _ = released.send(Ok(End::Complete(complete, *generation)));
                }
            }
            ToRank::Abort { generation, why } if *generation == self.generation => {
                let over = Over::Told { why: why.clone() };
                match self.released.take_if(|_| self.before_again.is_some_and(|g| g < *generation))
                {
                    None => self.end(over),
                    // the group can still do something about it
                    Some(released) => {
                        self.complete = None;
                        let _ = released.send(Err(over.error()));
                    }
                }
            }
            ToRank::Shrink { ranks } => {
                self.shrunk = Some(ranks.clone());
                self.go_on_in_another();
            }
            _ => {}
        }
        let gathered = match told {
            ToRank::Gathered(pieces) => Ok(pieces),
            ToRank::NotGathered { unanswered: rank, after } => {
                Err(LoadError::NoAnswer { rank, after })
            }
            other => return self.pass_on(other),
        };
        if let Some(done) = self.gathering.pop_front() {
            // as above
            let _ = done.send(gathered);
        }
    }

    fn pass_on(&self, told: ToRank) {
        if let Some(command) = told.command() {
            // supervision tells when the rank is gone
            let _ = self.rank.cast(RankMessage::Command(command));
        }
    }

    /// Once it is known in which group, and nothing is at work in this one any more.
    fn go_on_in_another(&mut self) {
        if let (Some(ranks), Some(_)) = (&self.shrunk, &self.handed_over)
            && let Some(released) = self.released.take()
        {
            let (ranks, former) = (ranks.clone(), self.handed_over.take().flatten());
            // whoever waited may have gone away
            let _ = released.send(Ok(End::Shrunk { ranks, former }));
        }
    }

    /// In few ranges, what it has of what it needs here.
    fn closed(&self, have: &Have) -> Have {
        let LoadPlan { placement, checkpoint, .. } = &*self.work.plan;
        placement.closed(checkpoint, self.number, have)
    }

    async fn take_up(&mut self, again: Again, myself: ActorRef<MemberMessage>) {
        let Again { work, home, memory, kept, join, plan, check_at_end, released, taken_up } =
            again;
        if let Some(over) = &self.over {
            // whoever waits for these may have gone away, here and below
            let _ = taken_up.send(Err(over.error().line()));
            return;
        }
        self.progress.begin_again();
        let start = RankArguments {
            rank: self.number,
            events: myself.get_derived(),
            progress: Arc::clone(&self.progress),
            work: Arc::clone(&work),
            home,
            reuse: Some(memory),
            kept,
            former: None,
            join: Some(join),
        };
        match Actor::spawn_linked(None, RankActor, start, myself.get_cell()).await {
            Ok((rank, _)) => self.rank = rank,
            Err(e) => return drop(taken_up.send(Err(e.to_string()))),
        }
        (self.work, self.plan, self.check_at_end) = (work, plan, check_at_end);
        self.is_of_former = false;
        (self.complete, self.released) = (None, Some(released));
        self.before_again = Some(self.generation);
        let _ = taken_up.send(Ok(()));
    }

    async fn event(&mut self, event: RankEvent) {
        let RankEvent { generation, kind, .. } = event;
        if generation != self.generation {
            return;
        }
        let what = match kind {
            RankEventKind::Allocated(Contact::Apart(endpoint), have) => {
                let have = if self.is_of_former { have } else { self.closed(&have) };
                Happened::Allocated { endpoint, plan: self.plan, have }
            }
            RankEventKind::Allocated(Contact::Here(_), _) => return,
            RankEventKind::Prepared(plan) => Happened::Prepared { plan },
            RankEventKind::HandedOver(former) => {
                let closed = |former: Former| Former { have: self.closed(&former.have), ..former };
                self.handed_over = Some(former.map(closed));
                return self.go_on_in_another();
            }
            RankEventKind::Ready(params, report) => match (self.check_at_end)() {
                Ok(()) => {
                    self.complete = params;
                    Happened::Ready(report)
                }
                Err(e) => {
                    let (text, refused, lasting) = (e.line(), false, true);
                    Happened::Failed { text, refused, lasting, blames: None }
                }
            },
            RankEventKind::Failed(e) => {
                let (refused, lasting, blames) = (e.is_refusal(), e.is_lasting(), e.blames());
                Happened::Failed { text: line(&e), refused, lasting, blames }
            }
        };
        self.say(ToCoordinator::Event { generation, what }).await;
    }

    /// All ranks are complete and this one waits for the others: a coordinator that has fallen silent would keep its launcher
    /// waiting, once this process has ended for it.
    async fn fence_silent(&mut self) {
        if let Some((process, patience)) = self.silent.take() {
            fence(Some(process), Some(patience)).await;
        }
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
        events::ended(Some(&over.error().line()));
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
    /// The group goes on without this process.
    Dismissed { why: String },
    /// The coordinator is gone.
    Lost { reason: String },
}

impl Over {
    fn error(&self) -> LoadError {
        match self {
            Over::Told { why } => LoadError::GroupEnded { why: why.clone() },
            Over::Dismissed { why } => LoadError::Replaced { why: why.clone() },
            Over::Lost { reason } => LoadError::CoordinatorLost { reason: reason.clone() },
        }
    }
}
