//! The coordinator, as `supervisor` and `processes::remote` have it: the same decisions ([`Coordination`]), over simulated
//! connections.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt::Arguments,
    rc::Rc,
    time::Duration,
};

use longshore_rank::{
    error::RankError,
    protocol::{Contact, Generation, Phase, RankCommand, RankEvent, RankEventKind},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tracing::info;
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    coordination::{Coordination, Departure, LoadEnd, Order, Recovery, Watched},
    error::{LoadError, line},
    link::{
        handshake::{self, Purpose, Terms},
        session::{self, Beat, Ended, OUTGOING_MAX, Overrun},
    },
    processes::{
        message::{Happened, ToCoordinator, ToRank},
        remote::{Lost, to_rank},
    },
    simulation::{bug::Bug, member::JOIN_LIMIT, watch::ProcessId, world::World},
};

/// Where it listens.
pub(super) const PORT: u16 = 9_000;

/// How long a rank may have work in hand without getting on.
pub(super) const STUCK_AFTER: Duration = Duration::from_secs(4);

/// How often to look whether all ranks get on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The longest that the ranks are waited for once nothing is left to be said.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The generation of a first load.
const FIRST_GENERATION: Generation = 1;

/// Numbers connections.
type Connection = u64;

/// Everything that arrives in the mailbox.
enum Said {
    Joined(u32, TcpStream),
    Knows(Generation),
    Event(Connection, RankEvent, Generation),
    Ended(Connection, Departure),
}

/// A rank's process, as far as its connection tells.
struct Remote {
    rank: u32,
    /// `None` once nothing is left to be said.
    outgoing: RefCell<Option<mpsc::Sender<ToRank>>>,
    generation: Cell<Generation>,
    dismissed: Cell<bool>,
    /// Nothing is ever said to it: a bug.
    forgotten: bool,
    beat: Cell<Beat>,
}

struct Host {
    world: Rc<World>,
    process: ProcessId,
    coordination: Coordination,
    said: mpsc::UnboundedSender<Said>,
    /// Every connection that has not ended.
    remotes: BTreeMap<Connection, Rc<Remote>>,
    /// Whose place each is.
    seats: Vec<Option<Connection>>,
    connections: Connection,
    generation: Generation,
    ready: u32,
    /// Why the load has failed.
    failed: Option<String>,
    /// Because another process has to come in the place of this one.
    replaced: bool,
}

/// Hosts the coordinator; tells how a load has failed, once all were told.
pub(super) async fn host(world: Rc<World>, process: ProcessId, over: oneshot::Sender<String>) {
    let (said, mut mailbox) = mpsc::unbounded_channel();
    let ranks = world.ranks();
    let recovery = Recovery {
        replacements_max: world.scenario.replacements_max,
        join_limit: JOIN_LIMIT,
        own_rank: Some(0),
        shrinks: false,
    };
    let mut host = Host {
        coordination: Coordination::new(ranks, ranks, STUCK_AFTER, recovery, Vec::new()),
        process,
        said,
        remotes: BTreeMap::new(),
        seats: vec![None; ranks as usize],
        connections: 0,
        generation: 0,
        ready: 0,
        failed: None,
        replaced: false,
        world,
    };
    host.world.spawn(listen(Rc::clone(&host.world), host.said.clone()));
    let begun = host.coordination.begin(FIRST_GENERATION, now());
    host.carry_out(begun);
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while host.failed.is_none() {
        let said = tokio::select! {
            biased;
            said = mailbox.recv() => said,
            _ = look.tick() => None,
        };
        let orders = match said {
            Some(said) => host.hear(said),
            None => {
                let watched = host.watched();
                host.coordination.look(watched.as_deref(), now())
            }
        };
        host.carry_out(orders);
    }
    if host.replaced {
        // this process goes without a goodbye, so that the others look for the next one
        let _ = over.send(host.failed.take().unwrap_or_default());
        return std::future::pending().await;
    }
    for remote in host.remotes.values() {
        remote.outgoing.take();
    }
    let until = Instant::now() + END_LIMIT;
    while !host.remotes.is_empty() && Instant::now() < until {
        while let Ok(said) = mailbox.try_recv() {
            if let Said::Ended(connection, _) = said {
                host.remotes.remove(&connection);
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
    // whoever waited may have gone away
    let _ = over.send(host.failed.unwrap_or_default());
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Lets ranks in.
async fn listen(world: Rc<World>, said: mpsc::UnboundedSender<Said>) {
    let Ok(listener) = TcpListener::bind(("0.0.0.0", PORT)).await else {
        return world.violate("two coordinators on one host");
    };
    while let Ok((mut stream, _)) = listener.accept().await {
        // a seat is refused by whoever knows whether it is taken
        let terms = Terms::new(None, world.ranks(), 0);
        let said = said.clone();
        world.spawn(async move {
            if let Ok(joined) = handshake::admit(&mut stream, &terms).await
                && joined.purpose == Purpose::Control
            {
                // a coordinator that is gone has no use for it
                let _ = said.send(Said::Joined(joined.rank, stream));
            }
        });
    }
}

impl Host {
    fn hear(&mut self, said: Said) -> Vec<Order> {
        match said {
            Said::Joined(rank, stream) => self.join(rank, stream),
            Said::Knows(generation) => self.coordination.knows(generation, now()),
            Said::Event(connection, event, said) => {
                let (rank, what) = (event.rank, word(&event.kind));
                self.say(format_args!("hears rank {rank} in {said}: {what}"));
                self.check(connection, &event, said);
                if matches!(event.kind, RankEventKind::Ready(..)) {
                    self.ready += 1;
                }
                let mut orders = self.coordination.event(event, now());
                if self.world.has(Bug::ReleasesTooSoon)
                    && self.ready + 1 == self.world.ranks()
                    && orders.is_empty()
                {
                    let generation = self.generation;
                    orders.push(Order::TellAll(RankCommand::Release { generation }));
                }
                orders
            }
            Said::Ended(connection, departure) => {
                self.say(format_args!("loses {connection}: {departure:?}"));
                let Some(remote) = self.remotes.remove(&connection) else { return Vec::new() };
                if self.seats[remote.rank as usize] != Some(connection) {
                    return Vec::new();
                }
                let orders = self.coordination.lost(remote.rank, departure, now());
                self.carry_out(orders);
                // nobody waits for it, whether another comes in its place or not
                self.vacate(remote.rank);
                Vec::new()
            }
        }
    }

    /// For whoever follows a run.
    fn say(&self, what: Arguments<'_>) {
        info!("{:?}: coordinator of process {}: {what}", self.world.now.get(), self.process);
    }

    /// What is acted on is of this generation, and said by whoever has the rank's place.
    fn check(&self, connection: Connection, event: &RankEvent, said: Generation) {
        let rank = event.rank as usize;
        if event.generation != self.generation || !self.coordination.is_present(event.rank) {
            return;
        }
        if said != self.generation {
            let now = self.generation;
            self.world
                .violate(format!("what rank {rank} says of generation {said} is taken for {now}"));
        }
        if self.seats[rank] != Some(connection) {
            self.world.violate(format!("two processes are heard as rank {rank}"));
        }
    }

    fn join(&mut self, rank: u32, stream: TcpStream) -> Vec<Order> {
        if self.coordination.is_present(rank) && !self.world.has(Bug::SeatsTwo) {
            // it tries again
            return Vec::new();
        }
        self.connections += 1;
        self.say(format_args!("seats rank {rank} at {}", self.connections));
        let connection = self.connections;
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let remote = Rc::new(Remote {
            rank,
            outgoing: RefCell::new(Some(outgoing)),
            generation: Cell::default(),
            dismissed: Cell::default(),
            forgotten: self.world.has(Bug::ForgetsReplacement) && self.generation > 1,
            beat: Cell::default(),
        });
        self.seats[rank as usize] = Some(connection);
        self.remotes.insert(connection, Rc::clone(&remote));
        let (said, ended) = (self.said.clone(), self.said.clone());
        let (world, timing) = (Rc::clone(&self.world), self.world.timing());
        self.world.spawn(async move {
            let heard = |message| {
                if !remote.dismissed.get() {
                    hear(&world, &remote, connection, message, &said);
                }
                Ok::<(), Overrun>(())
            };
            let beat = |beat| remote.beat.set(beat);
            let end = session::run(stream, queue, heard, Beat::default, beat, timing).await;
            let left = remote.outgoing.take().is_none();
            let departure = match end {
                Ok(Ended::ByeSent | Ended::ByeReceived) if left => {
                    Departure::Left("it was ended".to_owned())
                }
                Ok(_) => (&Lost::Left).into(),
                Err(e) => (&Lost::Link(e)).into(),
            };
            // a coordinator that is gone has no use for it
            let _ = ended.send(Said::Ended(connection, departure));
        });
        self.coordination.joined(rank)
    }

    /// What there is to be seen of each rank, if all are there.
    fn watched(&self) -> Option<Vec<Watched>> {
        let seen = |seat: &Option<Connection>| {
            let beat = self.remotes.get(seat.as_ref()?)?.beat.get();
            Some(Watched {
                steps: beat.progress,
                busy: !beat.waiting,
                ready: false,
                phase: Phase::from_number(beat.phase).name(),
                read_bytes: beat.read_bytes,
            })
        };
        self.seats.iter().map(seen).collect()
    }

    fn carry_out(&mut self, orders: Vec<Order>) {
        for order in orders {
            self.say(format_args!("orders {}", told(&order)));
            match order {
                Order::Tell(rank, command) => self.tell(rank, &command),
                Order::TellAll(command) => {
                    (0..self.world.ranks()).for_each(|rank| self.tell(rank, &command));
                    if let RankCommand::Allocate { generation } = command {
                        (self.generation, self.ready) = (generation, 0);
                    }
                }
                Order::Dismiss(rank, why) => self.dismiss(rank, why),
                Order::Answer(Err(LoadError::Replaced { why })) => {
                    (self.failed, self.replaced) = (Some(why), true);
                }
                Order::Answer(outcome) => {
                    let loaded = outcome.and_then(LoadEnd::complete);
                    let answer = loaded.map(|loaded| loaded.generation).map_err(|e| e.line());
                    self.failed = answer.clone().err();
                    self.world.watch.borrow_mut().answers.push((self.process, answer));
                }
            }
        }
    }

    fn tell(&self, rank: u32, command: &RankCommand) {
        let remote = self.seats[rank as usize].and_then(|connection| self.remotes.get(&connection));
        let Some(remote) = remote.filter(|remote| !remote.forgotten) else { return };
        if let RankCommand::Allocate { generation } = command {
            remote.generation.set(*generation);
        }
        if let (Some(message), Some(outgoing)) =
            (to_rank(command.clone()), &*remote.outgoing.borrow())
        {
            // the session may have ended, which its own message tells; this many never wait
            let _ = outgoing.try_send(message);
        }
    }

    fn vacate(&mut self, rank: u32) -> Option<Rc<Remote>> {
        self.remotes.get(&self.seats[rank as usize].take()?).cloned()
    }

    fn dismiss(&mut self, rank: u32, why: String) {
        let Some(remote) = self.vacate(rank) else { return };
        remote.dismissed.set(true);
        if let Some(outgoing) = remote.outgoing.take() {
            // as with commands
            let _ = outgoing.try_send(ToRank::Dismissed { why });
        }
    }
}

/// What a rank's process has said, in the words of the coordinator.
fn hear(
    world: &World,
    remote: &Remote,
    connection: Connection,
    said: ToCoordinator,
    supervisor: &mpsc::UnboundedSender<Said>,
) {
    let (generation, what) = match said {
        ToCoordinator::Knows { generation } => {
            let _ = supervisor.send(Said::Knows(generation));
            return;
        }
        ToCoordinator::Contributed(_) => return,
        ToCoordinator::Event { generation, what } => (generation, what),
    };
    // RNK-4
    let now = remote.generation.get();
    if generation != now && !world.has(Bug::HearsOldGeneration) {
        return;
    }
    let kind = match what {
        Happened::Allocated { endpoint, have, .. } => {
            RankEventKind::Allocated(Contact::Apart(endpoint), have)
        }
        Happened::Prepared { plan } => RankEventKind::Prepared(plan),
        Happened::Ready(report) => RankEventKind::Ready(None, report),
        Happened::Failed { text, refused, lasting, blames } => {
            RankEventKind::Failed(RankError::Reported { text, refused, lasting, blames })
        }
    };
    let event = RankEvent { rank: remote.rank, generation: now, kind };
    // without a supervisor there is nobody to tell
    let _ = supervisor.send(Said::Event(connection, event, generation));
}

/// An event in a word, for whoever follows a run.
fn word(kind: &RankEventKind) -> String {
    match kind {
        RankEventKind::Allocated(..) => "allocated".to_owned(),
        RankEventKind::Prepared(_) => "prepared".to_owned(),
        RankEventKind::Ready(..) => "ready".to_owned(),
        RankEventKind::HandedOver(_) => "handed over".to_owned(),
        RankEventKind::Failed(e) => format!("failed: {}", line(e)),
    }
}

/// An order in a few words.
fn told(order: &Order) -> String {
    let word = |command: &RankCommand| match command {
        RankCommand::Allocate { generation } => format!("allocate {generation}"),
        RankCommand::Load { generation, .. } => format!("load {generation}"),
        RankCommand::Start { generation } => format!("start {generation}"),
        RankCommand::Abort { generation, why } => format!("abort {generation}: {why}"),
        RankCommand::Release { generation } => format!("release {generation}"),
        RankCommand::HandOver { generation } => format!("hand over {generation}"),
    };
    match order {
        Order::Tell(rank, command) => format!("rank {rank}: {}", word(command)),
        Order::TellAll(command) => word(command),
        Order::Dismiss(rank, why) => format!("rank {rank} dismissed: {why}"),
        Order::Answer(Ok(LoadEnd::Complete(loaded))) => {
            format!("answer: complete in {}", loaded.generation)
        }
        Order::Answer(Ok(LoadEnd::Shrunk(shrunk))) => {
            format!("answer: {:?} are left", shrunk.ranks)
        }
        Order::Answer(Err(e)) => format!("answer: {}", e.line()),
    }
}
