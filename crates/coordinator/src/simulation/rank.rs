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
use tokio::sync::mpsc;
use turmoil::net::TcpListener;

use crate::simulation::{
    bug::Bug,
    exchange::{self, Streams},
    job::{Held, Job},
    member::MemberMessage,
    memory::Memory,
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
    Failed(RankError),
}

/// What a rank knows.
struct Rank {
    world: Rc<World>,
    process: ProcessId,
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
    next: Option<Generation>,
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
    member: mpsc::UnboundedSender<MemberMessage>,
    progress: Arc<Progress>,
) -> mpsc::UnboundedSender<Message> {
    let (myself, mut mailbox) = mpsc::unbounded_channel();
    let rank = world.watch.borrow().processes[process].rank;
    let mut state = Rank {
        world: Rc::clone(world),
        process,
        rank,
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
    world.spawn(async move {
        while let Some(message) = mailbox.recv().await {
            state.handle(message).await;
        }
    });
    myself
}

impl Rank {
    async fn handle(&mut self, message: Message) {
        match message {
            Message::Command(RankCommand::Allocate { generation }) => {
                self.allocate(generation).await;
            }
            Message::Command(RankCommand::Load { generation, peers, have }) => {
                self.load(generation, peers, have);
            }
            Message::Command(RankCommand::Start { generation }) => self.start(generation),
            Message::Command(RankCommand::Abort { generation, .. }) => self.abort(generation),
            Message::Command(RankCommand::Release { generation }) => self.release(generation),
            // no group shrinks here
            Message::Command(RankCommand::HandOver { .. }) => {}
            Message::Worker(generation, WorkerEvent::Joined(streams, plan, name)) => {
                self.joined(generation, streams, plan, name);
            }
            Message::Worker(generation, WorkerEvent::Halted) => {
                if self.halted.take_if(|job| job.generation == generation).is_some() {
                    self.announce().await;
                }
            }
            Message::Worker(generation, event) => self.worker(generation, event),
        }
    }

    async fn allocate(&mut self, generation: Generation) {
        self.world.watch.borrow_mut().processes[self.process].generation = generation;
        self.joining = None;
        let waited_for = self.next.replace(generation).is_some();
        self.halt();
        match &self.halted {
            None => self.announce().await,
            Some(_) if waited_for => {}
            Some(_) if self.world.has(Bug::DoesNotWaitForWorkers) => {
                self.halted = None;
                self.announce().await;
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

    async fn announce(&mut self) {
        let Some(generation) = self.next.take() else { return };
        let event = match self.contact(generation).await {
            Ok((endpoint, have)) => Event::Allocated(endpoint, have),
            Err(e) => Event::Failed(e),
        };
        self.report(generation, event);
    }

    async fn contact(&mut self, generation: Generation) -> Result<(Endpoint, Have), RankError> {
        let (held, _) = self.held.get_or_insert_with(|| {
            let placement = self.world.base.placement();
            let held = Held {
                memory: RefCell::new(Memory::new(&self.world.base, self.rank)),
                have: RefCell::default(),
                told: Cell::default(),
            };
            let state =
                LoadState::new(placement, &placement.landing_bytes(self.rank), &Kept::default());
            (Rc::new(held), state)
        });
        held.told.set(generation);
        let have = held.have.borrow().clone();
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
        let form = Form { world_size: self.world.ranks(), slots: 1, slot_bytes: 1 };
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
        let (world, process, myself) = (Rc::clone(&self.world), self.process, self.myself.clone());
        self.world.spawn(async move {
            let joined = async {
                let (plan, name) = world.plan(&have)?;
                let Some((_, listener)) = listener else {
                    let what = format!("generation {generation} was not announced");
                    return Err(CollectiveError::Operation { what }.into());
                };
                let roster = roster.to_vec();
                let streams =
                    exchange::join(Rc::clone(&world), process, generation, listener, roster);
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
            self.rank,
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
        self.next.take_if(|g| *g == generation);
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
            self.world.holds(held.memory.borrow().check_have(have));
        }
        // without a member there is nobody to tell
        let _ = self.member.send(MemberMessage::Event(generation, event));
    }
}
