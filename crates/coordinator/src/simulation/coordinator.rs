//! The coordinator, as `supervisor` and `processes::remote` have it: the same decisions ([`Coordination`]), over simulated
//! connections. Where the group shrinks, `processes::Attempt` has it end in the same steps.

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
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tracing::info;
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    coordination::{Coordination, Departure, LoadEnd, Order, Recovery, Shrunk, Watched},
    error::{LoadError, line},
    link::{
        handshake::{self, Admissions, Purpose, Terms},
        session::{self, Beat, Ended, OUTGOING_MAX, Overrun},
    },
    processes::{
        message::{Happened, ToCoordinator, ToRank},
        remote::{Lost, to_rank},
    },
    simulation::{
        bug::Bug,
        group::Group,
        watch::{ProcessId, Seen},
        world::World,
    },
};

/// Where it listens.
pub(super) const PORT: u16 = 9_000;

/// How long a rank may have work in hand without getting on.
pub(super) const STUCK_AFTER: Duration = Duration::from_secs(4);

/// How often to look whether all ranks get on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The longest that the ranks are waited for once nothing is left to be said.
const END_LIMIT: Duration = Duration::from_secs(2);

/// How long the ranks that are left of a group may take to join, beyond what it takes to notice that one is lost.
const REGROUP_LIMIT: Duration = Duration::from_secs(3);

/// How long a rank that is dismissed may take to end, and its process after it.
const DISMISSED_WITHIN: Duration = Duration::from_millis(750);

/// The generation of a first load.
const FIRST_GENERATION: Generation = 1;

/// What has come of a load.
pub(super) enum Answered {
    Failed(String),
    /// All ranks are complete, of a group that may shrink.
    Complete,
    /// It goes on in a smaller group.
    Shrunk,
}

/// What a coordinator has of the groups that its one was part of.
#[derive(Default)]
pub(super) struct Before {
    losses: Vec<LoadError>,
    generation: Generation,
}

/// A coordinator that runs in this process.
pub(super) struct Hosting {
    end: oneshot::Sender<()>,
    ended: oneshot::Receiver<Before>,
}

impl Hosting {
    /// Starts one; `answered` is told how a load has failed, once all were told, or that the group has shrunk.
    pub(super) fn start(
        world: &Rc<World>,
        process: ProcessId,
        group: Rc<Group>,
        listener: Rc<TcpListener>,
        before: Before,
        answered: oneshot::Sender<Answered>,
    ) -> Self {
        let (end, to_end) = oneshot::channel();
        let (done, ended) = oneshot::channel();
        let doors = Doors { listener, admissions: Admissions::default(), tasks: Rc::default() };
        let host = host(Rc::clone(world), process, group, doors, before, (answered, to_end));
        world.spawn(async move {
            // whoever waited may have gone away
            let _ = done.send(host.await);
        });
        Self { end, ended }
    }

    /// Says goodbye to all ranks, and returns what the next group has to know.
    pub(super) async fn end(self) -> Before {
        // one that has ended has said it
        let _ = self.end.send(());
        self.ended.await.unwrap_or_default()
    }
}

/// Where ranks come in.
struct Doors {
    /// Outlives the group: whoever knocks while it gives way to the next is let in by that one.
    listener: Rc<TcpListener>,
    admissions: Admissions,
    tasks: Rc<RefCell<Vec<AbortHandle>>>,
}

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
    process: ProcessId,
    session: RefCell<Option<AbortHandle>>,
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
    group: Rc<Group>,
    doors: Doors,
    coordination: Coordination,
    said: mpsc::UnboundedSender<Said>,
    /// Every connection that has not ended.
    remotes: BTreeMap<Connection, Rc<Remote>>,
    /// Whose place each is.
    seats: Vec<Option<Connection>>,
    connections: Connection,
    generation: Generation,
    ready: u32,
    /// Which ranks have ever been there.
    seated: Vec<bool>,
    /// Since when ranks may join, and how long they may take.
    since: Instant,
    join_limit: Duration,
    /// How the group goes on as another one.
    shrunk: Option<Shrunk>,
    complete: bool,
    /// Why the load has failed.
    failed: Option<String>,
    /// Because another process has to come in the place of this one.
    replaced: bool,
}

async fn host(
    world: Rc<World>,
    process: ProcessId,
    group: Rc<Group>,
    doors: Doors,
    before: Before,
    (over, mut to_end): (oneshot::Sender<Answered>, oneshot::Receiver<()>),
) -> Before {
    let (said, mut mailbox) = mpsc::unbounded_channel();
    let mut over = Some(over);
    let ranks = group.ranks;
    let mut join_limit = world.scenario.join_limit;
    if group.before.is_some() {
        // those that are left were there a moment ago
        join_limit = join_limit.min(world.scenario.silent_after + REGROUP_LIMIT);
    }
    let recovery = Recovery {
        replacements_max: world.scenario.replacements_max,
        join_limit,
        own_rank: Some(0),
        shrinks: world.scenario.shrinks,
    };
    let holders = group.holders();
    let mut host = Host {
        coordination: Coordination::new(ranks, holders, STUCK_AFTER, recovery, before.losses),
        process,
        group,
        doors,
        seated: vec![false; ranks as usize],
        since: Instant::now(),
        join_limit,
        shrunk: None,
        complete: false,
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
    host.listen();
    let begun = host.coordination.begin(before.generation + FIRST_GENERATION, now());
    host.carry_out(begun);
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while host.failed.is_none() {
        let said = tokio::select! {
            biased;
            said = mailbox.recv() => said,
            _ = look.tick() => None,
            _ = &mut to_end => break,
        };
        let orders = match said {
            Some(said) => host.hear(said),
            None => {
                let watched = host.watched();
                host.coordination.look(watched.as_deref(), now())
            }
        };
        host.carry_out(orders);
        let answered = match &host.shrunk {
            Some(_) => Some(Answered::Shrunk),
            None => (host.complete && host.world.scenario.shrinks).then_some(Answered::Complete),
        };
        if let Some(answered) = answered
            && let Some(over) = over.take()
        {
            // whoever waited may have gone away
            let _ = over.send(answered);
        }
    }
    if host.replaced {
        // this process goes without a goodbye, so that the others look for the next one
        let why = host.failed.take().unwrap_or_default();
        let _ = over.map(|over| over.send(Answered::Failed(why)));
        return std::future::pending().await;
    }
    for remote in host.remotes.values() {
        remote.outgoing.take();
    }
    let mut limit = END_LIMIT;
    if host.shrunk.is_some() {
        // whoever is not lost by then has heard of it
        limit = limit.max(host.world.scenario.silent_after);
    }
    let until = Instant::now() + limit;
    while host.is_waited_for() && Instant::now() < until {
        while let Ok(said) = mailbox.try_recv() {
            if let Said::Ended(connection, _) = said {
                host.remotes.remove(&connection);
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
    if host.world.scenario.shrinks {
        host.close();
        host.remotes.values().filter_map(|r| r.session.take()).for_each(|session| session.abort());
    }
    if let (Some(over), Some(why)) = (over, host.failed) {
        // whoever waited may have gone away
        let _ = over.send(Answered::Failed(why));
    }
    let shrunk = host.shrunk.map(|Shrunk { losses, generation, .. }| Before { losses, generation });
    shrunk.unwrap_or_default()
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

impl Host {
    /// Lets ranks in.
    fn listen(&self) {
        let Doors { listener, admissions, tasks } = &self.doors;
        let (listener, admissions) = (Rc::clone(listener), admissions.clone());
        let (world, said, heard) = (Rc::clone(&self.world), self.said.clone(), Rc::clone(tasks));
        let ranks = self.group.ranks;
        let listening = self.world.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut terms = Terms::new(None, ranks, 0);
                if world.scenario.shrinks {
                    terms.admissions = admissions.clone();
                }
                // else a seat is refused by whoever knows whether it is taken
                let said = said.clone();
                let hearing = world.spawn(async move {
                    if let Ok(joined) = handshake::admit(&mut stream, &terms).await
                        && joined.purpose == Purpose::Control
                    {
                        // a coordinator that is gone has no use for it
                        let _ = said.send(Said::Joined(joined.rank, stream));
                    }
                });
                heard.borrow_mut().push(hearing);
            }
        });
        tasks.borrow_mut().push(listening);
    }

    /// Whether ranks are to say goodbye yet.
    fn is_waited_for(&self) -> bool {
        // a group that goes on has no time for those that are lost
        let waited = |remote: &Rc<Remote>| self.shrunk.is_none() || !remote.dismissed.get();
        self.remotes.values().any(waited)
    }

    /// Lets nobody in any more.
    fn close(&self) {
        self.doors.tasks.take().iter().for_each(AbortHandle::abort);
    }

    /// The group goes on as another one, which is met at the same door: this one is closed first.
    fn shrink(&mut self, shrunk: Shrunk) {
        let waited = self.since.elapsed() >= self.join_limit;
        for rank in (0..self.group.ranks).filter(|rank| !shrunk.ranks.contains(rank)) {
            if !self.seated[rank as usize] && !waited {
                self.world.violate(format!("rank {rank} is left behind on its way"));
            }
        }
        let left = shrunk.ranks.iter().map(|rank| self.seats[*rank as usize]);
        let left: Option<Vec<&Rc<Remote>>> = left.map(|seat| self.remotes.get(&seat?)).collect();
        match left {
            None => self.world.violate("a rank that is not there is to go on"),
            Some(left) => {
                let left = left.iter().map(|remote| remote.process).collect();
                let shrunk = self.world.watch.borrow_mut().shrink(left);
                self.world.holds(shrunk);
            }
        }
        self.close();
        for remote in self.seats.iter().flatten().filter_map(|seat| self.remotes.get(seat)) {
            if let Some(outgoing) = &*remote.outgoing.borrow() {
                // as with commands
                let _ = outgoing.try_send(ToRank::Shrink { ranks: shrunk.ranks.clone() });
            }
        }
        self.shrunk = Some(shrunk);
    }

    /// The process at the other end of a connection.
    fn process_at(&self, stream: &TcpStream) -> ProcessId {
        let address = stream.peer_addr().map(|address| address.ip()).ok();
        let watch = self.world.watch.borrow();
        let is_it = |seen: &Seen| seen.address == address;
        watch.processes.iter().position(is_it).unwrap_or(self.process)
    }
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
                    && self.ready + 1 == self.group.ranks
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
                if self.seats.get(remote.rank as usize) != Some(&Some(connection)) {
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
        let Some(seated) = self.seated.get_mut(rank as usize) else { return Vec::new() };
        *seated = true;
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let remote = Rc::new(Remote {
            rank,
            process: self.process_at(&stream),
            session: RefCell::default(),
            outgoing: RefCell::new(Some(outgoing)),
            generation: Cell::default(),
            dismissed: Cell::default(),
            forgotten: self.world.has(Bug::ForgetsReplacement) && self.generation > 1,
            beat: Cell::default(),
        });
        self.seats[rank as usize] = Some(connection);
        self.remotes.insert(connection, Rc::clone(&remote));
        let seated = Rc::clone(&remote);
        let (said, ended) = (self.said.clone(), self.said.clone());
        let (world, timing) = (Rc::clone(&self.world), self.world.timing());
        let session = self.world.spawn(async move {
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
        *seated.session.borrow_mut() = Some(session);
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
                    (0..self.group.ranks).for_each(|rank| self.tell(rank, &command));
                    if let RankCommand::Allocate { generation } = command {
                        (self.generation, self.ready) = (generation, 0);
                    }
                    if matches!(command, RankCommand::HandOver { .. })
                        && self.world.has(Bug::LeavesWhoeverIsOnItsWay)
                    {
                        self.leave_whoever_is_on_its_way();
                    }
                }
                Order::Dismiss(rank, why) => self.dismiss(rank, why),
                Order::Answer(Err(LoadError::Replaced { why })) => {
                    (self.failed, self.replaced) = (Some(why), true);
                }
                Order::Answer(Ok(LoadEnd::Shrunk(shrunk))) => self.shrink(shrunk),
                Order::Answer(outcome) => {
                    let loaded = outcome.and_then(LoadEnd::complete);
                    // those that only handed on go, and nobody waits for them
                    self.seats.truncate(loaded.as_ref().map_or(usize::MAX, |_| self.holders()));
                    let answer = loaded.map(|loaded| loaded.generation).map_err(|e| e.line());
                    (self.complete, self.failed) = (answer.is_ok(), answer.clone().err());
                    let mut watch = self.world.watch.borrow_mut();
                    watch.holders = self.holders();
                    watch.answers.push((self.process, answer));
                }
            }
        }
    }

    fn holders(&self) -> usize {
        self.group.holders() as usize
    }

    /// A bug.
    fn leave_whoever_is_on_its_way(&mut self) {
        for rank in (0..self.group.ranks).filter(|rank| !self.seated[*rank as usize]) {
            let _ = self.coordination.joined(rank);
            let left = Departure::Left("it has not joined".to_owned());
            let _ = self.coordination.lost(rank, left, now());
        }
    }

    fn tell(&self, rank: u32, command: &RankCommand) {
        let seat = self.seats.get(rank as usize).copied().flatten();
        let remote = seat.and_then(|connection| self.remotes.get(&connection));
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
        self.remotes.get(&self.seats.get_mut(rank as usize)?.take()?).cloned()
    }

    fn dismiss(&mut self, rank: u32, why: String) {
        let Some(remote) = self.vacate(rank) else { return };
        remote.dismissed.set(true);
        let told = remote.outgoing.take().map(|outgoing| {
            // as with commands
            let _ = outgoing.try_send(ToRank::Dismissed { why });
        });
        if self.world.scenario.shrinks && self.coordination.over().is_none() {
            let admissions = self.doors.admissions.clone();
            self.world.spawn(async move {
                if told.is_some() {
                    sleep(DISMISSED_WITHIN).await;
                }
                admissions.forget(rank);
            });
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
