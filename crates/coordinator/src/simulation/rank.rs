//! The rank's actor, as `longshore_rank::actor` has it: the same decisions ([`LoadState`]) and the same rules for what is
//! kept from one generation to the next, over simulated workers.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
};

use longshore_models::{
    declare::ParamId,
    have::{Have, Kept},
};
use longshore_rank::{
    collective::{
        CollectiveError,
        segment::{Form, SegmentHandle},
    },
    error::RankError,
    protocol::{
        Endpoint, Generation, LoadPlan, Peers, Phase, PlanName, Progress, RankCommand, RankReport,
    },
    state::{Effect, LoadState},
};
use tokio::{sync::mpsc, task::AbortHandle};
use turmoil::net::TcpListener;

use crate::simulation::{
    bug::Bug,
    exchange::{self, Streams},
    group::{Former, Group},
    job::{Held, Job},
    member::MemberMessage,
    memory::Memory,
    scenario::Point,
    watch::ProcessId,
    world::World,
};

/// What workers tell.
#[derive(Debug)]
pub(super) enum WorkerEvent {
    ParamLanded(ParamId),
    ReadsDone,
    FinishDone(u32),
    Joined(Streams, Arc<LoadPlan>, PlanName),
    Halted,
    ExchangeDone,
    Failed(RankError),
}

/// Everything that arrives in the mailbox.
#[derive(Debug)]
pub(super) enum Message {
    Command(RankCommand),
    Worker(Generation, WorkerEvent),
}

/// What the rank tells.
#[derive(Debug)]
pub(super) enum Event {
    Allocated(Endpoint, Have),
    Prepared(PlanName),
    Ready(RankReport),
    HandedOver(Option<Former>),
    Failed(RankError),
}

/// What it does when nothing of a generation is at work any more.
#[derive(Debug, Clone, Copy)]
enum Next {
    Begin(Generation),
    HandOver(Generation),
}

impl Next {
    fn generation(self) -> Generation {
        match self {
            Next::Begin(generation) | Next::HandOver(generation) => generation,
        }
    }
}

/// What a rank knows.
struct Rank {
    world: Rc<World>,
    process: ProcessId,
    group: Rc<Group>,
    rank: u32,
    myself: mpsc::UnboundedSender<Message>,
    member: mpsc::UnboundedSender<MemberMessage>,
    progress: Arc<Progress>,
    held: Option<(Rc<Held>, LoadState)>,
    announced: Option<(Generation, TcpListener)>,
    joining: Option<Generation>,
    running: Option<Running>,
    complete: Option<Running>,
    halted: Option<Rc<Job>>,
    next: Option<Next>,
    /// Finishes that were run.
    done: Vec<u32>,
}

struct Running(Rc<Job>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Starts the actor.
pub(super) fn start(
    world: &Rc<World>,
    process: ProcessId,
    group: Rc<Group>,
    member: mpsc::UnboundedSender<MemberMessage>,
    progress: Arc<Progress>,
) -> (mpsc::UnboundedSender<Message>, AbortHandle) {
    let (myself, mut mailbox) = mpsc::unbounded_channel();
    let mut state = Rank {
        world: Rc::clone(world),
        process,
        rank: group.rank,
        group,
        myself: myself.clone(),
        member,
        progress,
        held: None,
        announced: None,
        joining: None,
        running: None,
        complete: None,
        halted: None,
        next: None,
        done: Vec::new(),
    };
    let running = world.spawn(async move {
        while let Some(message) = mailbox.recv().await {
            state.handle(message).await;
        }
    });
    (myself, running)
}

impl Rank {
    async fn handle(&mut self, message: Message) {
        match message {
            Message::Command(RankCommand::Allocate { generation }) => {
                self.after_halt(Next::Begin(generation)).await;
            }
            Message::Command(RankCommand::Load { generation, peers, have }) => {
                self.load(generation, peers, have);
            }
            Message::Command(RankCommand::Start { generation }) => self.start(generation),
            Message::Command(RankCommand::Abort { generation, .. }) => self.abort(generation),
            Message::Command(RankCommand::Release { generation }) => self.release(generation),
            Message::Command(RankCommand::HandOver { generation }) => {
                self.after_halt(Next::HandOver(generation)).await;
            }
            Message::Worker(generation, WorkerEvent::Joined(streams, plan, name)) => {
                self.joined(generation, streams, plan, name);
            }
            Message::Worker(generation, WorkerEvent::Halted) => {
                if self.halted.take_if(|job| job.generation == generation).is_some() {
                    self.go_on().await;
                }
            }
            Message::Worker(generation, event) => self.worker(generation, event),
        }
    }

    async fn after_halt(&mut self, next: Next) {
        self.world.watch.borrow_mut().processes[self.process].generation = next.generation();
        self.joining = None;
        let waited_for = self.next.replace(next).is_some();
        self.halt();
        let too_soon = match next {
            Next::Begin(_) => Bug::DoesNotWaitForWorkers,
            Next::HandOver(_) => Bug::HandsOverTooSoon,
        };
        match &self.halted {
            None => self.go_on().await,
            Some(_) if waited_for => {}
            Some(_) if self.world.has(too_soon) => {
                self.halted = None;
                self.go_on().await;
            }
            Some(job) => {
                let job = Rc::clone(job);
                self.world.spawn(async move {
                    job.wait_until_still().await;
                    job.tell(WorkerEvent::Halted);
                });
            }
        }
    }

    fn halt(&mut self) {
        let running = self.running.take().or(self.complete.take());
        if let Some(running) = running {
            self.halted = Some(Rc::clone(&running.0));
        }
    }

    async fn go_on(&mut self) {
        let Some(next) = self.next.take() else { return };
        let event = match next {
            Next::Begin(generation) => match self.contact(generation).await {
                Ok((endpoint, have)) => Event::Allocated(endpoint, have),
                Err(e) => Event::Failed(e),
            },
            Next::HandOver(_) => Event::HandedOver(self.hand_over()),
        };
        self.report(next.generation(), event);
    }

    /// Gives up what it has.
    fn hand_over(&mut self) -> Option<Former> {
        let (held, _) = self.held.take()?;
        // nothing lands there any more
        held.told.set(Generation::MAX);
        let mut have = held.have.borrow().clone();
        let mut watch = self.world.watch.borrow_mut();
        if self.group.before.is_none() {
            watch.processes[self.process].had = have.clone();
        }
        watch.reach(self.process, Point::HandedOver);
        drop(watch);
        if let Some(read) = self.group.base.plan.load.reads[self.rank as usize].last()
            && self.world.has(Bug::HandsOverTooMuch)
        {
            have.insert(read.file, read.range);
        }
        if self.world.has(Bug::HandsOverTooLittle) {
            have = Have::default();
        }
        Some(Former { rank: self.rank, held, have })
    }

    async fn contact(&mut self, generation: Generation) -> Result<(Endpoint, Have), RankError> {
        let (held, _) = self.held.get_or_insert_with(|| {
            let base = &self.group.base;
            let placement = base.placement();
            let held = Held {
                memory: RefCell::new(Memory::new(base, self.rank)),
                have: RefCell::default(),
                told: Cell::default(),
            };
            let state = if self.rank < self.group.holders() {
                LoadState::new(placement, &placement.landing_bytes(self.rank), &Kept::default())
            } else {
                // it only hands on what it had
                LoadState::new(&placement.nothing(), &[], &Kept::default())
            };
            (Rc::new(held), state)
        });
        held.told.set(generation);
        let have = match self.group.former() {
            None => held.have.borrow().clone(),
            Some(former) => former.have.clone(),
        };
        // a port that nobody has heard of before
        let port = 10_000 + (generation % 20_000) as u16;
        self.announced = None;
        let listener = TcpListener::bind(("0.0.0.0", port)).await;
        let system = |e: std::io::Error| CollectiveError::System {
            action: "listening for other ranks",
            what: e.to_string(),
        };
        self.announced = Some((generation, listener.map_err(system)?));
        let host = self.world.watch.borrow().processes[self.process].host.clone();
        let form = Form { world_size: self.group.ranks, slots: 1, slot_bytes: 1 };
        let endpoint = Endpoint {
            address: SocketAddr::new(turmoil::lookup(host.as_str()), port),
            host,
            segment: SegmentHandle { process: 0, descriptor: 0, token: [0; 32], form },
            nccl: None,
        };
        Ok((endpoint, have))
    }

    fn load(&mut self, generation: Generation, peers: Peers, have: Arc<Vec<Have>>) {
        let Peers::Apart(roster) = peers else { return };
        let addresses: Vec<_> = roster.iter().map(|endpoint| endpoint.address.ip()).collect();
        let met = self.world.watch.borrow_mut().meet(self.process, generation, &addresses, &have);
        self.world.holds(met);
        self.joining = Some(generation);
        let listener = self.announced.take_if(|(g, _)| *g == generation);
        let (world, group, myself) =
            (Rc::clone(&self.world), Rc::clone(&self.group), self.myself.clone());
        self.world.spawn(async move {
            let joined = async {
                let (plan, name) = world.plan(&group, &have)?;
                let Some((_, listener)) = listener else {
                    let what = format!("generation {generation} was not announced");
                    return Err(CollectiveError::Operation { what }.into());
                };
                let roster = roster.to_vec();
                let streams = exchange::join(group, generation, listener, roster);
                Ok(WorkerEvent::Joined(streams.await?, plan, name))
            };
            let event = joined.await.unwrap_or_else(WorkerEvent::Failed);
            // a rank that is gone has no use for it
            let _ = myself.send(Message::Worker(generation, event));
        });
    }

    fn joined(
        &mut self,
        generation: Generation,
        streams: Streams,
        plan: Arc<LoadPlan>,
        name: PlanName,
    ) {
        // RNK-4
        if self.joining != Some(generation) && !self.world.has(Bug::HearsOldWorkers) {
            return;
        }
        self.joining = None;
        self.act(generation);
        let Some((held, state)) = &mut self.held else { return };
        let job = Job::new(
            &self.world,
            self.process,
            Rc::clone(&self.group),
            generation,
            plan,
            Rc::clone(held),
            Arc::clone(&self.progress),
            self.myself.clone(),
            streams,
        );
        let mut effects = state.begin(true);
        if self.world.has(Bug::FinishesAgain) {
            effects.extend(self.done.iter().map(|number| Effect::Run(*number)));
        }
        self.running = Some(Running(job));
        self.carry_out(generation, effects);
        self.world.watch.borrow_mut().prepare(self.process, generation);
        self.report(generation, Event::Prepared(name));
    }

    fn start(&mut self, generation: Generation) {
        let Some(Running(job)) = self.running.as_ref().filter(|r| r.0.generation == generation)
        else {
            return;
        };
        self.act(generation);
        let begun = self.world.watch.borrow_mut().begin(self.process, generation);
        self.world.holds(begun);
        let idle = job.plan.reads[self.rank as usize].is_empty();
        self.progress.enter(Phase::Reading);
        job.start();
        if idle {
            let effects = self.on(WorkerEvent::ReadsDone);
            self.carry_out(generation, effects);
        }
    }

    fn abort(&mut self, generation: Generation) {
        self.joining.take_if(|g| *g == generation);
        self.next.take_if(|next| next.generation() == generation);
        self.running.take_if(|r| r.0.generation == generation);
        self.release(generation);
        self.held = None;
    }

    fn release(&mut self, generation: Generation) {
        if self.complete.take_if(|r| r.0.generation == generation).is_some() {
            self.held = None;
        }
    }

    fn worker(&mut self, generation: Generation, event: WorkerEvent) {
        if self.halted.as_ref().is_some_and(|job| job.generation == generation) {
            // what they have done is done, and goes on in the next generation
            self.on(event);
            return;
        }
        // RNK-4
        let running = self.running.as_ref().map(|r| r.0.generation).or(self.joining);
        if running != Some(generation) && !self.world.has(Bug::HearsOldWorkers) {
            return;
        }
        self.act(generation);
        match event {
            WorkerEvent::Failed(e) => self.fail(generation, e),
            other => {
                let effects = self.on(other);
                self.carry_out(generation, effects);
            }
        }
    }

    /// This process does what belongs to a generation.
    fn act(&self, generation: Generation) {
        let acted = self.world.watch.borrow().act(self.process, generation);
        self.world.holds(acted);
    }

    fn on(&mut self, event: WorkerEvent) -> Vec<Effect> {
        let Some((_, state)) = &mut self.held else { return Vec::new() };
        match event {
            WorkerEvent::ParamLanded(param) => state.param_landed(param),
            WorkerEvent::FinishDone(number) => {
                self.done.push(number);
                state.finish_done(number)
            }
            WorkerEvent::ReadsDone => {
                self.progress.enter(Phase::Finishing);
                let mut effects = state.reads_done();
                if self.world.has(Bug::ReadyTooSoon) {
                    effects.push(Effect::BecomeReady);
                }
                effects
            }
            WorkerEvent::ExchangeDone => state.exchange_done(),
            WorkerEvent::Joined(..) | WorkerEvent::Halted | WorkerEvent::Failed(_) => Vec::new(),
        }
    }

    fn carry_out(&mut self, generation: Generation, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Run(finish) => {
                    if let Some(Running(job)) = &self.running {
                        job.push_finish(finish);
                    }
                }
                Effect::BecomeReady => self.become_ready(generation),
            }
        }
    }

    fn become_ready(&mut self, generation: Generation) {
        let (Some(running), Some((held, _))) = (self.running.take(), &self.held) else { return };
        self.world.holds(held.memory.borrow().check());
        self.progress.enter(Phase::Ready);
        self.complete = Some(running);
        self.world.watch.borrow_mut().ready(self.process, generation);
        self.report(generation, Event::Ready(RankReport::default()));
    }

    fn fail(&mut self, generation: Generation, error: RankError) {
        self.halt();
        self.joining = None;
        self.report(generation, Event::Failed(error));
    }

    fn report(&mut self, generation: Generation, mut event: Event) {
        if let (Event::Allocated(_, have), true) = (&mut event, self.world.has(Bug::HaveTooLarge))
            && let Some(read) = self.world.base.plan.load.reads[self.rank as usize].last()
            && !have.is_empty()
        {
            have.insert(read.file, read.range);
        }
        if let (Event::Allocated(_, have), Some((held, _))) = (&event, &self.held) {
            let held = self.group.former().map_or(held, |former| &former.held);
            self.world.holds(held.memory.borrow().check_have(have));
        }
        // without a member there is nobody to tell
        let _ = self.member.send(MemberMessage::Event(generation, event));
    }
}
