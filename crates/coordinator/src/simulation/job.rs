//! One generation's work on one rank: reads, exchange, placing and finishing, as `longshore_rank::stream` and
//! `longshore_rank::exchange` do it with threads.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
};

use longshore_models::{byte_range::ByteRange, have::Have, placement::Span};
use longshore_rank::{
    error::RankError,
    protocol::{Generation, LoadPlan, Progress, Read, ReadFrom},
    scatter::tensors_in,
};
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::sleep,
};

use crate::simulation::{
    bug::Bug,
    dice::Dice,
    exchange::{self, Streams},
    group::Group,
    memory::Memory,
    rank::{Message, WorkerEvent},
    scenario::Point,
    watch::ProcessId,
    world::World,
};

/// What a rank has of a load, whichever generation it is in.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) memory: RefCell<Memory>,
    pub(super) have: RefCell<Have>,
    /// The generation in which it was last told what there is.
    pub(super) told: Cell<Generation>,
}

/// One load on one rank.
pub(super) struct Job {
    pub(super) world: Rc<World>,
    pub(super) process: ProcessId,
    pub(super) group: Rc<Group>,
    /// As it was started, which is how its storage and its connections are known.
    pub(super) seat: u32,
    pub(super) rank: u32,
    pub(super) generation: Generation,
    pub(super) plan: Arc<LoadPlan>,
    held: Rc<Held>,
    progress: Arc<Progress>,
    events: mpsc::UnboundedSender<Message>,
    queue: RefCell<Queue>,
    pub(super) wake: Notify,
    workers: Cell<u32>,
    still: Notify,
    reads_left: Cell<usize>,
    pub(super) slots: Slots,
    /// Reads of this rank that are in their slots and were not sent yet, by round.
    pub(super) filled: RefCell<BTreeMap<u32, Vec<u8>>>,
    pub(super) contributed: Notify,
    streams: RefCell<Option<Streams>>,
    exchange: RefCell<Vec<AbortHandle>>,
}

#[derive(Debug, Default)]
struct Queue {
    next_read: usize,
    landed: VecDeque<Landed>,
    finishes: VecDeque<u32>,
    stopped: bool,
}

/// Staging memory, counted in slots.
#[derive(Debug)]
pub(super) struct Slots {
    /// In use to send from, and how many there are.
    sending: (Cell<u32>, u32),
    /// Holding what has arrived from each rank, and how many there may.
    pub(super) received: (Vec<Cell<u32>>, u32),
    pub(super) freed: Notify,
}

/// Bytes of another rank's read that have arrived.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) source: u32,
    /// The generation in which they were sent.
    pub(super) generation: Generation,
    pub(super) read: Read,
    pub(super) bytes: Vec<u8>,
}

enum Task {
    Place(Landed),
    Finish(u32),
    Read(usize),
    Wait,
    Exit,
}

impl Job {
    #[expect(clippy::too_many_arguments, reason = "all that a load needs, each once")]
    pub(super) fn new(
        world: &Rc<World>,
        process: ProcessId,
        group: Rc<Group>,
        generation: Generation,
        plan: Arc<LoadPlan>,
        held: Rc<Held>,
        progress: Arc<Progress>,
        events: mpsc::UnboundedSender<Message>,
        streams: Streams,
    ) -> Rc<Self> {
        let (slots, &Group { rank, ranks, .. }) = (world.scenario.slots, &*group);
        Rc::new(Self {
            world: Rc::clone(world),
            process,
            seat: world.watch.borrow().processes[process].rank,
            group,
            rank,
            generation,
            reads_left: Cell::new(plan.reads[rank as usize].len()),
            plan,
            held,
            progress,
            events,
            queue: RefCell::default(),
            wake: Notify::new(),
            workers: Cell::default(),
            still: Notify::new(),
            slots: Slots {
                sending: (Cell::new(0), slots),
                received: ((0..ranks).map(|_| Cell::new(0)).collect(), slots),
                freed: Notify::new(),
            },
            filled: RefCell::default(),
            contributed: Notify::new(),
            streams: RefCell::new(Some(streams)),
            exchange: RefCell::default(),
        })
    }

    /// Starts the workers and the exchange.
    pub(super) fn start(self: &Rc<Self>) {
        for number in 0..self.world.scenario.concurrency {
            self.workers.set(self.workers.get() + 1);
            let name = (self.process as u64) << 32 | self.generation << 8 | u64::from(number);
            let dice = Dice::new(self.world.scenario.seed, "worker", name);
            self.world.spawn(Rc::clone(self).run_tasks(dice));
        }
        if let Some(streams) = self.streams.take() {
            *self.exchange.borrow_mut() = exchange::start(self, streams);
        }
    }

    /// Waits until every worker has ended; once this is stopped they do as soon as what they are at is done.
    pub(super) async fn wait_until_still(&self) {
        loop {
            let still = self.still.notified();
            if self.workers.get() == 0 {
                return;
            }
            still.await;
        }
    }

    /// Hands a finish to the workers.
    pub(super) fn push_finish(&self, finish: u32) {
        self.queue.borrow_mut().finishes.push_back(finish);
        self.wake.notify_waiters();
    }

    /// Lets the workers exit after what they are doing, and ends the exchange.
    pub(super) fn stop(&self) {
        {
            let mut queue = self.queue.borrow_mut();
            queue.stopped = true;
            queue.landed.clear();
        }
        self.streams.take();
        self.exchange.take().iter().for_each(AbortHandle::abort);
        self.wake.notify_waiters();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.queue.borrow().stopped
    }

    /// Takes in what another rank has sent.
    pub(super) fn land_later(&self, landed: Landed) {
        self.world.watch.borrow_mut().reach(self.process, Point::Received);
        self.queue.borrow_mut().landed.push_back(landed);
        self.wake.notify_waiters();
    }

    pub(super) fn tell(&self, event: WorkerEvent) {
        // a rank that is gone has no use for the news
        let _ = self.events.send(Message::Worker(self.generation, event));
    }

    pub(super) fn give_up(&self, error: RankError) {
        self.stop();
        self.tell(WorkerEvent::Failed(error));
    }

    async fn run_tasks(self: Rc<Self>, mut dice: Dice) {
        loop {
            let woken = self.wake.notified();
            let task = match self.next() {
                Task::Exit => break,
                Task::Wait => {
                    woken.await;
                    continue;
                }
                task => task,
            };
            self.progress.in_hand.fetch_add(1, Ordering::Relaxed);
            let done = match task {
                Task::Place(landed) => self.place(landed),
                Task::Finish(number) => self.finish(number, &mut dice).await,
                Task::Read(number) => self.read(number, &mut dice).await,
                Task::Wait | Task::Exit => Ok(()),
            };
            self.progress.steps.fetch_add(1, Ordering::Relaxed);
            self.progress.in_hand.fetch_sub(1, Ordering::Relaxed);
            if let Err(e) = done {
                self.give_up(e);
                break;
            }
        }
        self.workers.set(self.workers.get() - 1);
        self.still.notify_waiters();
    }

    fn next(&self) -> Task {
        let queue = &mut *self.queue.borrow_mut();
        if queue.stopped {
            return Task::Exit;
        }
        if let Some(landed) = queue.landed.pop_front() {
            return Task::Place(landed);
        }
        if let Some(finish) = queue.finishes.pop_front() {
            return Task::Finish(finish);
        }
        let Some(read) = self.plan.reads[self.rank as usize].get(queue.next_read) else {
            return Task::Wait;
        };
        if read.round.is_some() && !self.lease() {
            return Task::Wait;
        }
        queue.next_read += 1;
        Task::Read(queue.next_read - 1)
    }

    /// Takes a slot to send from.
    fn lease(&self) -> bool {
        let (used, limit) = &self.slots.sending;
        if used.get() >= *limit && !self.world.has(Bug::TakesSlotInUse) {
            return false;
        }
        used.set(used.get() + 1);
        if used.get() > *limit {
            self.world.violate(format!(
                "rank {}: {} slots of {limit} in use",
                self.rank,
                used.get()
            ));
        }
        true
    }

    /// Gives a slot back that was sent from.
    pub(super) fn give_back(&self) {
        let (used, _) = &self.slots.sending;
        used.set(used.get() - 1);
        self.wake.notify_waiters();
    }

    async fn read(&self, number: usize, dice: &mut Dice) -> Result<(), RankError> {
        let plan = &self.plan;
        let read = plan.reads[self.rank as usize][number];
        match read.from {
            ReadFrom::Former => return self.take_over(&read),
            ReadFrom::Parameters if !self.world.has(Bug::ReadsWhatItHas) => {
                return self.pass_on(&read);
            }
            ReadFrom::Parameters | ReadFrom::Storage => {}
        }
        let mut slot = vec![0; read.range.len() as usize];
        // longer ones are taken in steps, each of which is kept
        for range in
            plan.checkpoint.cut(read.file, read.range, self.world.scenario.form.read_bytes / 2)
        {
            self.world.storage(self.seat, &read, dice).await?;
            let step = Read { range, ..read };
            let file = &self.world.base.files[read.file as usize];
            let bytes = &file[range.start as usize..range.end as usize];
            let at = (range.start - read.range.start) as usize;
            slot[at..at + bytes.len()].copy_from_slice(bytes);
            self.check_read(&step);
            let spans = self.spans(&step, self.rank);
            self.put(&spans, bytes);
            self.note(read.file, range);
            self.progress.read_bytes.fetch_add(range.len(), Ordering::Relaxed);
            self.progress.steps.fetch_add(1, Ordering::Relaxed);
            let mut watch = self.world.watch.borrow_mut();
            watch.storage_bytes += range.len();
            watch.reach(self.process, Point::Read);
        }
        self.contribute(&read, slot);
        Ok(())
    }

    /// Hands bytes on that this rank has, out of its parameters.
    fn pass_on(&self, read: &Read) -> Result<(), RankError> {
        let mut slot = vec![0; read.range.len() as usize];
        every_span(
            &self.plan,
            read,
            |r| r == self.rank,
            |span| {
                self.held.memory.borrow().copy_back(&span, &mut slot);
            },
        );
        let file = &self.world.base.files[read.file as usize];
        if slot != file[read.range.start as usize..read.range.end as usize] {
            let (rank, range) = (self.rank, read.range);
            self.world.violate(format!("rank {rank} hands on {range} as it is not in the file"));
        }
        self.world.watch.borrow_mut().handed_on_bytes += read.range.len();
        self.contribute(read, slot);
        Ok(())
    }

    /// Places bytes that this rank had in a former group, and hands them on.
    fn take_over(&self, read: &Read) -> Result<(), RankError> {
        let (rank, range) = (self.rank, read.range);
        let mut slot = vec![0; range.len() as usize];
        if let Some(former) = self.group.former() {
            let number = if self.world.has(Bug::TakesPresentNumber) { rank } else { former.rank };
            let memory = former.held.memory.borrow();
            for (tensor, within, offset) in tensors_in(&self.plan.checkpoint, read.file, range) {
                let own = |rank| rank == number;
                memory.placement().spans(tensor, within, own, |mut span| {
                    span.source_offset += offset;
                    memory.copy_back(&span, &mut slot);
                });
            }
        }
        let file = &self.world.base.files[read.file as usize];
        if slot != file[range.start as usize..range.end as usize] {
            self.world.violate(format!("rank {rank} did not have {range} as it is in the file"));
        }
        self.put(&self.spans(read, rank), &slot);
        self.note(read.file, range);
        self.world.watch.borrow_mut().taken_over_bytes += range.len();
        self.contribute(read, slot);
        Ok(())
    }

    fn contribute(&self, read: &Read, slot: Vec<u8>) {
        if let Some(round) = read.round {
            self.filled.borrow_mut().insert(round, slot);
            self.contributed.notify_waiters();
        }
        self.reads_left.set(self.reads_left.get() - 1);
        if self.reads_left.get() == 0 {
            self.tell(WorkerEvent::ReadsDone);
        }
    }

    /// Places what another rank has read.
    fn place(&self, landed: Landed) -> Result<(), RankError> {
        let Landed { source, generation, read, bytes } = landed;
        if generation != self.generation {
            let (rank, now) = (self.rank, self.generation);
            self.world.violate(format!(
                "rank {rank} takes bytes of generation {generation} from rank {source}, it is {now}"
            ));
        }
        let mut spans = self.spans(&read, self.rank);
        let mut at = 0;
        for span in &mut spans {
            (span.source_offset, span.source_stride) = (at, span.width);
            at += span.source_bytes();
        }
        self.put(&spans, &bytes);
        self.note(read.file, read.range);
        let received = &self.slots.received.0[source as usize];
        received.set(received.get() - 1);
        self.slots.freed.notify_waiters();
        Ok(())
    }

    /// Places spans of this rank, counts them, and tells of parameters that are complete.
    fn put(&self, spans: &[Span], bytes: &[u8]) {
        if self.held.told.get() > self.generation {
            let (rank, told) = (self.rank, self.held.told.get());
            self.world.violate(format!(
                "rank {rank}: bytes of generation {} land after it has told what it has in {told}",
                self.generation
            ));
        }
        for span in spans {
            let mut memory = self.held.memory.borrow_mut();
            self.world.holds(memory.place(span, bytes));
            if memory.landed(span) {
                self.tell(WorkerEvent::ParamLanded(span.param));
            }
        }
    }

    async fn finish(&self, number: u32, dice: &mut Dice) -> Result<(), RankError> {
        sleep(dice.millis(1, self.world.scenario.read_millis)).await;
        self.world.holds(self.held.memory.borrow_mut().finish(number as usize));
        self.world.watch.borrow_mut().reach(self.process, Point::Finished);
        self.tell(WorkerEvent::FinishDone(number));
        Ok(())
    }

    /// Notes that everything of `range` that this rank needs has landed on it.
    fn note(&self, file: u32, range: ByteRange) {
        if self.world.has(Bug::ForgetsRange) && range.start / 2048 % 3 == 0 {
            return;
        }
        self.held.have.borrow_mut().insert(file, range);
    }

    /// Nobody reads what it has.
    fn check_read(&self, step: &Read) {
        let memory = self.held.memory.borrow();
        let mut again = 0;
        every_span(
            &self.plan,
            step,
            |r| r == self.rank,
            |span| again += memory.placed_bytes(&span),
        );
        if again > 0 {
            let (rank, range) = (self.rank, step.range);
            self.world.violate(format!("rank {rank} reads {range}, of which it has {again} bytes"));
        }
    }

    /// The spans of `read`, which this rank or another reads, on `rank`.
    pub(super) fn spans(&self, read: &Read, rank: u32) -> Vec<Span> {
        let mut spans = Vec::new();
        let wanted = |r: u32| r == rank;
        match self.world.has(Bug::IgnoresSettled) {
            true => every_span(&self.plan, read, wanted, |span| spans.push(span)),
            false => for_each_span(&self.plan, read, wanted, |span| spans.push(span)),
        }
        spans
    }
}

/// However a load ends on this rank, its workers end with it.
impl Drop for Job {
    fn drop(&mut self) {
        self.exchange.take().iter().for_each(AbortHandle::abort);
    }
}

/// The spans that `read` turns into on those of the ranks that take of it that are `wanted`, relative to its beginning.
pub(super) fn for_each_span(
    plan: &LoadPlan,
    read: &Read,
    wanted: impl Fn(u32) -> bool,
    each: impl FnMut(Span),
) {
    every_span(plan, read, |rank| wanted(rank) && plan.takes(rank, read), each);
}

/// [`for_each_span`], on those as well that take nothing of it.
fn every_span(
    plan: &LoadPlan,
    read: &Read,
    wanted: impl Fn(u32) -> bool,
    mut each: impl FnMut(Span),
) {
    for (tensor, within, offset) in tensors_in(&plan.checkpoint, read.file, read.range) {
        plan.placement.spans(tensor, within, &wanted, |mut span| {
            span.source_offset += offset;
            each(span);
        });
    }
}
