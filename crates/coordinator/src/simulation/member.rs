//! One rank process: its end of the control link, as `processes::member` has it, and the rank behind it. Rank 0's holds the
//! coordinator as well, and ends when its rank is lost: the launcher then starts both again.
//!
//! Where the group shrinks, a process goes from one group to the next as `processes::Attempt` has it, and whoever loses the
//! coordinator ends.

use std::{rc::Rc, sync::Arc, time::Duration};

use longshore_models::have::Have;
use longshore_rank::protocol::{Generation, Progress, RankCommand};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    link::{
        handshake::{self, Credentials, JoinError, Purpose},
        session::{self, Ended, LinkError, OUTGOING_MAX, Overrun},
    },
    processes::{
        message::{Happened, ToCoordinator, ToRank},
        remote::beat_of,
    },
    simulation::{
        bug::Bug,
        coordinator::{Answered, Before, Hosting, PORT},
        dice::Dice,
        group::{Former, Group},
        rank::{self, Event, Message},
        scenario::Point,
        watch::ProcessId,
        world::World,
    },
};

/// How long rank 0 waits for its reads once its group has shrunk.
const QUIET_AFTER: Duration = Duration::from_secs(5);

const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Everything that arrives in the mailbox.
pub(super) enum MemberMessage {
    Told(ToRank),
    Event(Generation, Event),
    LinkEnded(Result<Ended, LinkError>),
    Successor(Result<TcpStream, String>),
    /// What the coordinator in this process has come to, unless all are complete.
    Answered(Answered),
    /// The group has shrunk, and this rank still reads.
    Hangs,
}

/// How a process ends its part in a group.
enum End {
    Over(String),
    /// The load goes on in a group of these ranks.
    Shrunk {
        ranks: Vec<u32>,
        former: Option<Former>,
    },
}

/// How a process ends that is complete, and holds no part of what its group has loaded.
pub(super) const NOT_NEEDED: &str = "it is not needed";

/// A process from its start to its end; returns why it ends.
pub(super) async fn process(world: Rc<World>, process: ProcessId) -> String {
    let rank = world.watch.borrow().processes[process].rank;
    let mut group = Rc::new(Group::first(&world, rank));
    let progress: Arc<Progress> = Arc::default();
    let (mut listener, mut before) = (None, Before::default());
    if rank == 0 {
        let Ok(bound) = TcpListener::bind(("0.0.0.0", PORT)).await else {
            world.violate("two coordinators on one host");
            return String::new();
        };
        listener = Some(Rc::new(bound));
    }
    let mut dice = Dice::new(world.scenario.seed, "planning", process as u64);
    loop {
        let (end, hosting) = {
            let group = Rc::clone(&group);
            let before = std::mem::take(&mut before);
            let progress = Arc::clone(&progress);
            let mut member =
                Member::new(&world, process, group, progress, listener.clone(), before);
            let end = member.run().await;
            if world.scenario.shrinks {
                member.leave().await;
            }
            (end, member.hosting.take())
        };
        if let Some(hosting) = hosting
            && world.scenario.shrinks
        {
            before = hosting.end().await;
        }
        let (ranks, former) = match end {
            End::Over(why) => {
                let answers = &mut world.watch.borrow_mut().answers;
                if world.scenario.shrinks && rank == 0 && answers.is_empty() {
                    answers.push((process, Err(why.clone())));
                }
                return why;
            }
            End::Shrunk { ranks, former } => (ranks, former),
        };
        match group.with_fewer(&world, &ranks, former) {
            Ok(smaller) => group = Rc::new(smaller),
            Err(why) => return why,
        }
        // each plans for fewer, on its own
        sleep(dice.millis(0, world.scenario.planning_millis)).await;
        world.watch.borrow_mut().regroup(process, (group.number, group.rank));
    }
}

struct Member {
    world: Rc<World>,
    process: ProcessId,
    group: Rc<Group>,
    rank: u32,
    actor: mpsc::UnboundedSender<Message>,
    actor_runs: AbortHandle,
    mailbox: mpsc::UnboundedReceiver<MemberMessage>,
    progress: Arc<Progress>,
    myself: mpsc::UnboundedSender<MemberMessage>,
    outgoing: Option<mpsc::Sender<ToCoordinator>>,
    /// The coordinator, where it is in this process.
    hosting: Option<Hosting>,
    /// It had a coordinator before.
    met: bool,
    generation: Generation,
    /// Complete on this rank, not yet everywhere.
    complete: bool,
    released: bool,
    /// What it had here, for a smaller group, and of which ranks that is.
    handed_over: Option<Option<Former>>,
    shrunk: Option<Vec<u32>>,
    over: Option<End>,
    /// Where the coordinator is in this process, how this rank's part has ended before that was told what has come of the load.
    lost: Option<String>,
    answered: bool,
}

impl Member {
    /// Takes part in a group; with a listener, as the one that hosts the coordinator.
    fn new(
        world: &Rc<World>,
        process: ProcessId,
        group: Rc<Group>,
        progress: Arc<Progress>,
        listener: Option<Rc<TcpListener>>,
        before: Before,
    ) -> Self {
        let (myself, mailbox) = mpsc::unbounded_channel();
        let hosting = listener.map(|listener| {
            let (tell, over) = oneshot::channel();
            let of = Rc::clone(&group);
            (Hosting::start(world, process, of, listener, before, tell), over)
        });
        let (actor, actor_runs) =
            rank::start(world, process, Rc::clone(&group), myself.clone(), Arc::clone(&progress));
        let hosting = hosting.map(|(hosting, over)| {
            let myself = myself.clone();
            world.spawn(async move {
                if let Ok(answered) = over.await {
                    let _ = myself.send(MemberMessage::Answered(answered));
                }
            });
            hosting
        });
        Self {
            world: Rc::clone(world),
            process,
            rank: group.rank,
            group,
            actor,
            actor_runs,
            mailbox,
            progress,
            myself,
            outgoing: None,
            hosting,
            met: false,
            generation: 0,
            complete: false,
            released: false,
            handed_over: None,
            shrunk: None,
            over: None,
            lost: None,
            answered: false,
        }
    }

    async fn run(&mut self) -> End {
        self.meet();
        loop {
            if let Some(end) = self.over.take() {
                return end;
            }
            let Some(message) = self.mailbox.recv().await else {
                return End::Over(String::new());
            };
            self.handle(message).await;
        }
    }

    /// Says goodbye to the coordinator, and ends the rank.
    async fn leave(&mut self) {
        if self.outgoing.take().is_some() {
            let ended = async {
                while let Some(message) = self.mailbox.recv().await {
                    if matches!(message, MemberMessage::LinkEnded(_)) {
                        return;
                    }
                }
            };
            // a coordinator that does not answer is not waited for
            let _ = timeout(self.world.scenario.silent_after, ended).await;
        }
        self.actor_runs.abort();
    }

    async fn handle(&mut self, message: MemberMessage) {
        match message {
            MemberMessage::Told(told) => self.told(told),
            MemberMessage::Event(generation, event) => self.event(generation, event).await,
            MemberMessage::LinkEnded(ended) => {
                self.outgoing = None;
                match ended {
                    // the group that follows is met once this one is left
                    _ if self.shrunk.is_some() => {}
                    Err(_)
                        if self.hosting.is_none()
                            && !self.released
                            && !self.world.scenario.shrinks =>
                    {
                        self.world.watch.borrow_mut().reach(self.process, Point::Orphaned);
                        self.meet();
                    }
                    // of a coordinator in this process the answer tells
                    Ok(_) if self.hosting.is_some() => {}
                    ended => {
                        let why = format!("the coordinator was lost: {ended:?}");
                        if matches!(ended, Ok(_) | Err(LinkError::Closed { .. }))
                            && !self.world.scenario.loses_messages()
                        {
                            self.check_that_it_may_end(&why);
                        }
                        self.end(why, true);
                    }
                }
            }
            MemberMessage::Successor(Ok(stream)) => {
                self.link(stream);
                if std::mem::replace(&mut self.met, true) {
                    self.say(ToCoordinator::Knows { generation: self.generation }).await;
                }
            }
            MemberMessage::Successor(Err(why)) => {
                let coordinator = self.world.latest.borrow()[0];
                let admitted = self.world.watch.borrow().is_left_out(self.process, coordinator);
                self.world.holds(admitted);
                self.over = Some(End::Over(why));
            }
            MemberMessage::Answered(Answered::Failed(why)) => self.over = Some(End::Over(why)),
            MemberMessage::Answered(_) if self.lost.is_some() => {
                self.over = self.lost.take().map(End::Over);
            }
            MemberMessage::Answered(Answered::Complete) => self.answered = true,
            MemberMessage::Answered(Answered::Shrunk) => {
                self.answered = true;
                let myself = self.myself.clone();
                self.world.spawn(async move {
                    sleep(QUIET_AFTER).await;
                    // a member that is gone has no use for it
                    let _ = myself.send(MemberMessage::Hangs);
                });
            }
            MemberMessage::Hangs => {
                self.over = Some(End::Over("a read of rank 0 hangs".to_owned()));
            }
        }
    }

    /// Looks for the coordinator, wherever it is now.
    fn meet(&self) {
        let (world, group, myself) =
            (Rc::clone(&self.world), Rc::clone(&self.group), self.myself.clone());
        self.world.spawn(async move {
            let found = meet(&world, &group).await;
            // a member that is gone has no use for it
            let _ = myself.send(MemberMessage::Successor(found));
        });
    }

    fn link(&mut self, stream: TcpStream) {
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        self.outgoing = Some(outgoing);
        let (told, ended) = (self.myself.clone(), self.myself.clone());
        let (progress, timing) = (Arc::clone(&self.progress), self.world.timing());
        self.world.spawn(async move {
            let take = move |message| {
                // whoever is gone has no use for it
                let _ = told.send(MemberMessage::Told(message));
                Ok::<(), Overrun>(())
            };
            let beat = move || beat_of(&progress);
            let end = session::run(stream, queue, take, beat, |_| {}, timing).await;
            // as above
            let _ = ended.send(MemberMessage::LinkEnded(end));
        });
    }

    fn told(&mut self, told: ToRank) {
        match &told {
            // RNK-4: the coordinator was told by now which generation this is
            ToRank::Allocate { generation } if *generation <= self.generation => return,
            ToRank::Allocate { generation } => {
                self.generation = *generation;
                self.complete = false;
            }
            // a rank may come to a group that is about to shrink
            ToRank::HandOver { generation } => self.generation = *generation,
            ToRank::Dismissed { .. } if self.goes_on_left_behind() => {}
            ToRank::Dismissed { why } => self.end(why.clone(), false),
            ToRank::Release { generation } if *generation == self.generation => {
                self.release(*generation);
            }
            ToRank::Abort { generation, why } if *generation == self.generation => {
                self.check_that_it_may_end(why);
                self.end(why.clone(), false);
            }
            ToRank::Shrink { ranks } => {
                self.shrunk = Some(ranks.clone());
                self.go_on_in_another();
            }
            _ => {}
        }
        if let Some(command) = told.command() {
            // a rank that is gone has no use for it
            let _ = self.actor.send(Message::Command(command));
        }
    }

    /// Unless the load goes on with it, as far as the coordinator knows.
    fn check_that_it_may_end(&self, why: &str) {
        let coordinator = self.world.latest.borrow()[0];
        if self.world.watch.borrow().goes_on(self.process, coordinator) {
            let rank = self.rank;
            self.world.violate(format!("rank {rank}, which is to go on, is ended: {why}"));
        }
    }

    /// Once it is known in which group, and nothing is at work in this one any more.
    fn go_on_in_another(&mut self) {
        if let (Some(ranks), Some(_), None) = (&self.shrunk, &self.handed_over, &self.over) {
            let (ranks, former) = (ranks.clone(), self.handed_over.take().flatten());
            self.over = Some(End::Shrunk { ranks, former });
        }
    }

    /// A bug: it goes on as though the group were one of all but the last, itself included.
    fn goes_on_left_behind(&mut self) -> bool {
        let goes_on = self.world.has(Bug::GoesOnLeftBehind) && self.rank > 0;
        if goes_on {
            let mut ranks: Vec<u32> = (0..self.group.ranks).collect();
            ranks.remove(if self.rank + 1 < self.group.ranks { self.rank as usize + 1 } else { 1 });
            self.over = Some(End::Shrunk { ranks, former: None });
        }
        goes_on
    }

    /// Every rank is complete.
    fn release(&mut self, generation: Generation) {
        if std::mem::take(&mut self.complete) {
            self.released = true;
            let released = self.world.watch.borrow_mut().release(self.process, generation);
            self.world.holds(released);
            if self.rank >= self.group.holders() {
                self.over = Some(End::Over(NOT_NEEDED.to_owned()));
            }
        }
    }

    async fn event(&mut self, generation: Generation, event: Event) {
        if generation != self.generation {
            return;
        }
        let what = match event {
            Event::Allocated(endpoint, have) => {
                let have = if self.group.former().is_some() { have } else { self.closed(&have) };
                let mut watch = self.world.watch.borrow_mut();
                let announced = watch.announce(self.process, generation, have.clone());
                drop(watch);
                self.world.holds(announced);
                let base = &self.group.base;
                Happened::Allocated { endpoint, plan: base.name, have }
            }
            Event::Prepared(plan) => Happened::Prepared { plan },
            Event::Ready(report) => {
                self.complete = true;
                Happened::Ready(report)
            }
            Event::HandedOver(former) => {
                let closed = |former: Former| Former { have: self.closed(&former.have), ..former };
                self.handed_over = Some(former.map(closed));
                return self.go_on_in_another();
            }
            Event::Failed(e) => {
                let (refused, lasting, blames) = (e.is_refusal(), e.is_lasting(), e.blames());
                Happened::Failed { text: e.to_string(), refused, lasting, blames }
            }
        };
        self.say(ToCoordinator::Event { generation, what }).await;
    }

    async fn say(&mut self, message: ToCoordinator) {
        if let Some(link) = &self.outgoing {
            // an ended link is told by a message of its own
            let _ = link.send(message).await;
        }
    }

    /// In few ranges, what it has of what it needs here.
    fn closed(&self, have: &Have) -> Have {
        let base = &self.group.base;
        base.placement().closed(base.plan.checkpoint(), self.rank, have)
    }

    /// Nothing more will come of this load; where it is over for this rank, only if its link has `ended`.
    fn end(&mut self, why: String, ended: bool) {
        if self.over.is_some() || (self.released && !ended) {
            return;
        }
        self.complete = false;
        let generation = self.generation;
        let command = RankCommand::Abort { generation, why: why.clone() };
        let _ = self.actor.send(Message::Command(command));
        if self.world.scenario.shrinks && self.hosting.is_some() && !self.answered {
            // the coordinator knows the first cause
            self.lost.get_or_insert(why);
        } else {
            self.over = Some(End::Over(why));
        }
    }
}

/// Connects to whoever is the coordinator now.
async fn meet(world: &World, group: &Group) -> Result<TcpStream, String> {
    let credentials = Credentials::new(None, group.rank, group.ranks, 0, Purpose::Control);
    let until = Instant::now() + world.scenario.join_limit;
    while Instant::now() < until {
        let coordinator = world.latest.borrow()[0];
        let host = world.watch.borrow().processes.get(coordinator).map(|seen| seen.host.clone());
        let attempt = async {
            let mut stream = TcpStream::connect((host?.as_str(), PORT)).await.ok()?;
            match handshake::join(&mut stream, &credentials).await {
                Ok(_) => Some(Ok(stream)),
                Err(JoinError::Refused(why)) if why.is_final() => Some(Err(why)),
                Err(_) => None,
            }
        };
        match timeout(world.scenario.silent_after, attempt).await {
            Ok(Some(Ok(stream))) => return Ok(stream),
            Ok(Some(Err(why))) => return Err(why.to_string()),
            Ok(None) | Err(_) => {}
        }
        sleep(TRY_AGAIN).await;
    }
    Err("no coordinator was found".to_owned())
}
