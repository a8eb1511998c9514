//! One rank process: its end of the control link, as `processes::member` has it, and the rank behind it. Rank 0's holds the
//! coordinator as well, and ends when its rank is lost: the launcher then starts both again.

use std::{rc::Rc, sync::Arc, time::Duration};

use longshore_rank::protocol::{Generation, Progress, RankCommand};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use turmoil::net::TcpStream;

use crate::{
    link::{
        handshake::{self, Credentials, Purpose},
        session::{self, Ended, LinkError, OUTGOING_MAX, Overrun},
    },
    processes::{
        message::{Happened, ToCoordinator, ToRank},
        remote::beat_of,
    },
    simulation::{
        coordinator::{self, PORT},
        rank::{self, Event, Message},
        scenario::Point,
        watch::ProcessId,
        world::World,
    },
};

/// How long the coordinator, or its successor, is looked for.
pub(super) const JOIN_LIMIT: Duration = Duration::from_secs(20);

const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Everything that arrives in the mailbox.
pub(super) enum MemberMessage {
    Told(ToRank),
    Event(Generation, Event),
    LinkEnded(Result<Ended, LinkError>),
    Successor(Result<TcpStream, String>),
    /// What the coordinator in this process has come to, if it has failed.
    Answered(String),
}

/// A process from its start to its end; returns why it ends.
pub(super) async fn process(world: Rc<World>, process: ProcessId) -> String {
    let (myself, mut mailbox) = mpsc::unbounded_channel();
    let rank = world.watch.borrow().processes[process].rank;
    let over = (rank == 0).then(|| {
        let (tell, over) = oneshot::channel();
        world.spawn(coordinator::host(Rc::clone(&world), process, tell));
        over
    });
    let progress: Arc<Progress> = Arc::default();
    let actor = rank::start(&world, process, myself.clone(), Arc::clone(&progress));
    let mut member = Member {
        world,
        process,
        rank,
        actor,
        progress,
        myself,
        outgoing: None,
        hosting: rank == 0,
        met: false,
        generation: 0,
        complete: false,
        released: false,
        over: None,
    };
    if let Some(over) = over {
        let myself = member.myself.clone();
        member.world.spawn(async move {
            if let Ok(why) = over.await {
                let _ = myself.send(MemberMessage::Answered(why));
            }
        });
    }
    member.meet();
    while member.over.is_none() {
        match mailbox.recv().await {
            Some(message) => member.handle(message).await,
            None => break,
        }
    }
    member.over.unwrap_or_default()
}

struct Member {
    world: Rc<World>,
    process: ProcessId,
    rank: u32,
    actor: mpsc::UnboundedSender<Message>,
    progress: Arc<Progress>,
    myself: mpsc::UnboundedSender<MemberMessage>,
    outgoing: Option<mpsc::Sender<ToCoordinator>>,
    /// The coordinator is in this process.
    hosting: bool,
    /// It had a coordinator before.
    met: bool,
    generation: Generation,
    /// Complete on this rank, not yet everywhere.
    complete: bool,
    released: bool,
    over: Option<String>,
}

impl Member {
    async fn handle(&mut self, message: MemberMessage) {
        match message {
            MemberMessage::Told(told) => self.told(told),
            MemberMessage::Event(generation, event) => self.event(generation, event).await,
            MemberMessage::LinkEnded(ended) => {
                self.outgoing = None;
                match ended {
                    Err(_) if !self.hosting && !self.released => {
                        self.world.watch.borrow_mut().reach(self.process, Point::Orphaned);
                        self.meet();
                    }
                    // of a coordinator in this process the answer tells
                    Ok(_) if self.hosting => {}
                    ended => self.over = Some(format!("the coordinator was lost: {ended:?}")),
                }
            }
            MemberMessage::Successor(Ok(stream)) => {
                self.link(stream);
                if std::mem::replace(&mut self.met, true) {
                    self.say(ToCoordinator::Knows { generation: self.generation }).await;
                }
            }
            MemberMessage::Successor(Err(why)) | MemberMessage::Answered(why) => {
                self.over = Some(why);
            }
        }
    }

    /// Looks for the coordinator, wherever it is now.
    fn meet(&self) {
        let (world, rank, myself) = (Rc::clone(&self.world), self.rank, self.myself.clone());
        self.world.spawn(async move {
            let found = meet(&world, rank).await;
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
            ToRank::Dismissed { why } => self.end(why.clone()),
            ToRank::Release { generation } if *generation == self.generation => {
                self.release(*generation);
            }
            ToRank::Abort { generation, why } if *generation == self.generation => {
                self.end(why.clone());
            }
            _ => {}
        }
        if let Some(command) = told.command() {
            // a rank that is gone has no use for it
            let _ = self.actor.send(Message::Command(command));
        }
    }

    /// Every rank is complete.
    fn release(&mut self, generation: Generation) {
        if std::mem::take(&mut self.complete) {
            self.released = true;
            let released = self.world.watch.borrow_mut().release(self.process, generation);
            self.world.holds(released);
        }
    }

    async fn event(&mut self, generation: Generation, event: Event) {
        if generation != self.generation {
            return;
        }
        let base = &self.world.base;
        let what = match event {
            Event::Allocated(endpoint, have) => {
                let (placement, checkpoint) = (base.placement(), base.plan.checkpoint());
                let have = placement.closed(checkpoint, self.rank, &have);
                let mut watch = self.world.watch.borrow_mut();
                watch.announce(self.process, generation, have.clone());
                Happened::Allocated { endpoint, plan: base.name, have }
            }
            Event::Prepared(plan) => Happened::Prepared { plan },
            Event::Ready(report) => {
                self.complete = true;
                Happened::Ready(report)
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

    /// Nothing more will come of this load.
    fn end(&mut self, why: String) {
        if self.released {
            return;
        }
        self.complete = false;
        let generation = self.generation;
        let command = RankCommand::Abort { generation, why: why.clone() };
        let _ = self.actor.send(Message::Command(command));
        self.over = Some(why);
    }
}

/// Connects to whoever is the coordinator now.
async fn meet(world: &World, rank: u32) -> Result<TcpStream, String> {
    let credentials = Credentials::new(None, rank, world.ranks(), 0, Purpose::Control);
    let until = Instant::now() + JOIN_LIMIT;
    while Instant::now() < until {
        let coordinator = world.latest.borrow()[0];
        let host = world.watch.borrow().processes.get(coordinator).map(|seen| seen.host.clone());
        let attempt = async {
            let mut stream = TcpStream::connect((host?.as_str(), PORT)).await.ok()?;
            handshake::join(&mut stream, &credentials).await.ok()?;
            Some(stream)
        };
        if let Ok(Some(stream)) = timeout(world.scenario.silent_after, attempt).await {
            return Ok(stream);
        }
        sleep(TRY_AGAIN).await;
    }
    Err("no coordinator was found".to_owned())
}
