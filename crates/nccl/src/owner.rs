//! The thread that owns a communicator: the only one that calls NCCL for it.
//!
//! NCCL keeps the state of a group per thread, and wants nobody inside it while a communicator is aborted (user guide,
//! "Fault Tolerance"): with one thread per communicator, both hold by construction. A thread is never used for a second
//! communicator, as a failed call can leave NCCL's per-thread state behind (`ncclCommInitRankConfig` without a usable
//! device returns from inside its own group: `init.cc`, 2.30.7).

use std::{
    any::Any,
    ffi::{c_int, c_void},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    communicator::{Connected, Membership},
    error::NcclError,
    group::{Group, Operation, Stream},
    library::Nccl,
    sys::{self, Comm, Config, RawUniqueId},
};

/// How often a communicator that has nothing to do is asked whether it has failed.
const IDLE: Duration = Duration::from_millis(20);
/// The longest pause between two looks at what is in progress.
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// What the owner is told to do.
#[derive(Debug)]
pub(crate) enum Command {
    Group {
        group: Group,
        stream: Stream,
        deadline: Deadline,
        answer: Answer<()>,
    },
    Finish {
        deadline: Deadline,
        answer: Answer<()>,
    },
    /// Look at the abort flag.
    Look,
}

/// Where an answer goes.
pub(crate) type Answer<T> = Sender<Result<T, NcclError>>;

/// Tells whoever waits for several things that something has changed.
pub(crate) type Notify = Box<dyn Fn() + Send>;

/// When something has to be done; never, where the limit is beyond what the clock counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Option<Instant>,
    pub(crate) limit: Duration,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Self {
        Self { at: Instant::now().checked_add(limit), limit }
    }

    /// The time left until `grace` after it; `None`: for ever.
    pub(crate) fn left(&self, grace: Duration) -> Option<Duration> {
        let at = self.at?.checked_add(grace)?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    fn has_passed(&self) -> bool {
        self.left(Duration::ZERO).is_some_and(|left| left.is_zero())
    }
}

/// What the owner and the others see of each other.
#[derive(Debug)]
pub(crate) struct Shared {
    abort: AtomicBool,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What the owner is in that may not return, and since when.
    call: Option<(&'static str, Instant)>,
    failure: Option<NcclError>,
    /// Set once there is no communicator any more, or NCCL refused to abort it.
    end: Option<Result<(), NcclError>>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self { abort: AtomicBool::new(false), state: Mutex::default(), ended: Condvar::new() }
    }

    pub(crate) fn set_abort(&self) {
        self.abort.store(true, Ordering::Release);
    }

    fn is_aborted(&self) -> bool {
        self.abort.load(Ordering::Acquire)
    }

    /// Where the owner is, and since when.
    pub(crate) fn call(&self) -> (&'static str, Duration) {
        let call = self.lock().call;
        call.map_or(("the communicator's thread", Duration::ZERO), |(call, at)| {
            (call, at.elapsed())
        })
    }

    pub(crate) fn failure(&self) -> Option<NcclError> {
        self.lock().failure.clone()
    }

    /// Waits until there is no communicator any more; `None` where that takes longer than `deadline`.
    pub(crate) fn wait_end(&self, deadline: Deadline) -> Option<Result<(), NcclError>> {
        let mut state = self.lock();
        while state.end.is_none() {
            match deadline.left(Duration::ZERO) {
                None => state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    let waited = self.ended.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        state.end.clone()
    }

    /// Does `what`, and lets others see that the owner is in it.
    fn during<T>(&self, call: &'static str, what: impl FnOnce() -> T) -> T {
        self.lock().call = Some((call, Instant::now()));
        let result = what();
        self.lock().call = None;
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner's side of a communicator.
pub(crate) struct Owner {
    pub(crate) nccl: &'static Nccl,
    pub(crate) membership: Membership,
    pub(crate) shared: Arc<Shared>,
    pub(crate) notify: Notify,
}

impl Owner {
    /// Joins, does what it is told, and aborts what is not finished in the end.
    pub(crate) fn run<K, E: fmt::Display>(
        self,
        bind: impl FnOnce() -> Result<K, E>,
        deadline: Deadline,
        connected: &Answer<Connected>,
        commands: &Receiver<Command>,
    ) {
        let mut owned = Owned { owner: self, comm: ptr::null_mut() };
        let kept = owned.bind(bind);
        let (kept, result) = match kept {
            Ok(kept) => (Some(kept), owned.connect(deadline)),
            Err(error) => (None, Err(error)),
        };
        owned.answer(connected, result);
        owned.obey(commands);
        let end = owned.abort();
        let Owner { shared, notify, .. } = owned.owner;
        shared.during("dropping what the device was made current with", || drop(kept));
        shared.lock().end = Some(end);
        shared.ended.notify_all();
        call_out(&notify);
    }
}

/// A communicator in the hands of its thread.
struct Owned {
    owner: Owner,
    /// Null while there is none.
    comm: Comm,
}

impl Owned {
    fn bind<K, E: fmt::Display>(
        &self,
        bind: impl FnOnce() -> Result<K, E>,
    ) -> Result<K, NcclError> {
        let bound = self
            .owner
            .shared
            .during("making the device current", || catch_unwind(AssertUnwindSafe(bind)));
        match bound {
            Ok(Ok(kept)) => Ok(kept),
            Ok(Err(error)) => Err(NcclError::Device { reason: error.to_string() }),
            Err(panic) => Err(NcclError::Device { reason: panic_text(panic.as_ref()) }),
        }
    }

    fn connect(&mut self, deadline: Deadline) -> Result<Connected, NcclError> {
        const CALL: &str = "ncclCommInitRankConfig";
        if self.owner.shared.is_aborted() {
            return Err(NcclError::Gone);
        }
        let Membership { id, rank, world_size, max_ctas } = self.owner.membership;
        let mut config = Config::non_blocking(max_ctas.map(int).transpose()?);
        let (ranks, rank) = (int(world_size)?, int(rank)?);
        let init = self.owner.nccl.entries.comm_init_rank_config;
        let mut comm = ptr::null_mut();
        // SAFETY: `comm` and `config` are there for the call, which copies the configuration
        let started = self.start(CALL, || unsafe {
            init(&raw mut comm, ranks, RawUniqueId(id.0), rank, &raw mut config)
        });
        // one that failed to start may have to be aborted too
        self.comm = comm;
        started?;
        if comm.is_null() {
            return Err(self.owner.nccl.error(CALL, sys::INVALID_ARGUMENT));
        }
        self.wait_ready(CALL, deadline)?;
        self.check_membership()
    }

    fn check_membership(&self) -> Result<Connected, NcclError> {
        let entries = &self.owner.nccl.entries;
        let world_size = self.ask("ncclCommCount", entries.comm_count)?;
        let rank = self.ask("ncclCommUserRank", entries.comm_user_rank)?;
        let cuda_device = self.ask("ncclCommCuDevice", entries.comm_cu_device)?;
        let asked = self.owner.membership;
        if (int(asked.rank)?, int(asked.world_size)?) != (rank, world_size) {
            return Err(NcclError::WrongMembership {
                rank,
                world_size,
                asked_rank: asked.rank,
                asked_world_size: asked.world_size,
            });
        }
        Ok(Connected { cuda_device })
    }

    fn obey(&mut self, commands: &Receiver<Command>) {
        while !self.owner.shared.is_aborted() {
            match commands.recv_timeout(IDLE) {
                Ok(Command::Group { group, stream, deadline, answer }) => {
                    let result = self.usable().and_then(|()| self.group(&group, stream, deadline));
                    self.answer(&answer, result);
                }
                Ok(Command::Finish { deadline, answer }) => {
                    let result = self.usable().and_then(|()| self.finish(deadline));
                    self.answer(&answer, result);
                    if self.comm.is_null() {
                        return;
                    }
                }
                Ok(Command::Look) | Err(RecvTimeoutError::Timeout) => self.look(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Refuses whatever comes after a failure: NCCL does not promise what it would do.
    fn usable(&self) -> Result<(), NcclError> {
        match self.owner.shared.failure() {
            Some(failure) => Err(failure),
            None if self.comm.is_null() => Err(NcclError::Gone),
            None => Ok(()),
        }
    }

    fn group(&self, group: &Group, stream: Stream, deadline: Deadline) -> Result<(), NcclError> {
        const CALL: &str = "ncclGroupEnd";
        let entries = &self.owner.nccl.entries;
        // SAFETY: has no preconditions
        self.start("ncclGroupStart", || unsafe { (entries.group_start)() })?;
        let added = group.operations().iter().try_for_each(|operation| self.add(operation, stream));
        // SAFETY: has no preconditions; a group that was started is left, whatever became of its operations
        let ended = self.start(CALL, || unsafe { (entries.group_end)() });
        added.and(ended)?;
        // only then everything is on the stream: a thread of NCCL's puts it there (`groupLaunchNonBlocking`,
        // `group.cc`)
        self.wait_ready(CALL, deadline)
    }

    fn add(&self, operation: &Operation, stream: Stream) -> Result<(), NcclError> {
        let (entries, comm, stream) = (&self.owner.nccl.entries, self.comm, stream.raw());
        match *operation {
            Operation::Send { from, bytes, to } => {
                let (from, bytes, to) = (from as *const c_void, count(bytes)?, int(to)?);
                // SAFETY: the communicator is ready, and the buffer is what `Communicator::group` asks for
                self.start("ncclSend", || unsafe {
                    (entries.send)(from, bytes, sys::UINT8, to, comm, stream)
                })
            }
            Operation::Recv { into, bytes, from } => {
                let (into, bytes, from) = (into as *mut c_void, count(bytes)?, int(from)?);
                // SAFETY: the communicator is ready, and the buffer is what `Communicator::group` asks for
                self.start("ncclRecv", || unsafe {
                    (entries.recv)(into, bytes, sys::UINT8, from, comm, stream)
                })
            }
            Operation::Broadcast { from, into, bytes, root } => {
                let (from, into) = (from as *const c_void, into as *mut c_void);
                let (bytes, root) = (count(bytes)?, int(root)?);
                // SAFETY: the communicator is ready, and the buffers are what `Communicator::group` asks for
                self.start("ncclBroadcast", || unsafe {
                    (entries.broadcast)(from, into, bytes, sys::UINT8, root, comm, stream)
                })
            }
            Operation::AllGather { from, into, bytes_each } => {
                let (from, into) = (from as *const c_void, into as *mut c_void);
                let bytes = count(bytes_each)?;
                // SAFETY: the communicator is ready, and the buffers are what `Communicator::group` asks for
                self.start("ncclAllGather", || unsafe {
                    (entries.all_gather)(from, into, bytes, sys::UINT8, comm, stream)
                })
            }
        }
    }

    fn finish(&mut self, deadline: Deadline) -> Result<(), NcclError> {
        let entries = &self.owner.nccl.entries;
        let comm = self.comm;
        // SAFETY: the communicator is ready, and not finalized before: afterwards there is none, or a failure
        self.start("ncclCommFinalize", || unsafe { (entries.comm_finalize)(comm) })?;
        self.wait_ready("ncclCommFinalize", deadline)?;
        // SAFETY: the communicator is finalized, and forgotten whatever the call returns
        let destroyed = self.start("ncclCommDestroy", || unsafe { (entries.comm_destroy)(comm) });
        self.comm = ptr::null_mut();
        destroyed
    }

    /// Aborts the communicator that is left, in whatever state it is.
    fn abort(&mut self) -> Result<(), NcclError> {
        if self.comm.is_null() {
            return Ok(());
        }
        let (entries, comm) = (&self.owner.nccl.entries, self.comm);
        // SAFETY: there is a communicator, this is the only thread that uses it, and it is forgotten afterwards
        let aborted = self.start("ncclCommAbort", || unsafe { (entries.comm_abort)(comm) });
        self.comm = ptr::null_mut();
        aborted
    }

    /// Looks whether the communicator has failed while nothing was asked of it.
    fn look(&self) {
        if self.usable().is_err() {
            return;
        }
        let state = self.state("ncclCommGetAsyncError");
        if let Err(error) = state {
            self.fail(error);
        }
    }

    /// Polls until nothing is in progress any more, the limit has passed, or the communicator is to be aborted.
    fn wait_ready(&self, call: &'static str, deadline: Deadline) -> Result<(), NcclError> {
        let mut pause = Duration::ZERO;
        while self.state(call)? == Progress::Going {
            if self.owner.shared.is_aborted() {
                return Err(NcclError::Gone);
            }
            if deadline.has_passed() {
                return Err(NcclError::DeadlinePassed { call, limit: deadline.limit });
            }
            pause = wait_a_little(pause);
        }
        Ok(())
    }

    /// How what `call` started goes on.
    fn state(&self, call: &'static str) -> Result<Progress, NcclError> {
        let code =
            self.ask("ncclCommGetAsyncError", self.owner.nccl.entries.comm_get_async_error)?;
        match code {
            sys::SUCCESS => Ok(Progress::Done),
            sys::IN_PROGRESS => Ok(Progress::Going),
            code => Err(self.owner.nccl.error(call, code)),
        }
    }

    /// Asks for a number of the communicator.
    fn ask(
        &self,
        call: &'static str,
        entry: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    ) -> Result<i32, NcclError> {
        let (comm, mut value) = (self.comm, 0);
        // SAFETY: there is a communicator, and `value` is there to be written to
        let code = self.owner.shared.during(call, || unsafe { entry(comm, &raw mut value) });
        self.owner.nccl.check_code(call, code)?;
        Ok(value)
    }

    /// Calls NCCL; what is still in progress has been started.
    fn start(&self, call: &'static str, what: impl FnOnce() -> c_int) -> Result<(), NcclError> {
        match self.owner.shared.during(call, what) {
            sys::IN_PROGRESS => Ok(()),
            code => self.owner.nccl.check_code(call, code),
        }
    }

    fn answer<T>(&self, answer: &Answer<T>, result: Result<T, NcclError>) {
        if let Err(error) = &result {
            self.owner.shared.lock().failure.get_or_insert_with(|| error.clone());
        }
        // whoever asked may have lost interest
        let _ = answer.send(result);
        call_out(&self.owner.notify);
    }

    fn fail(&self, error: NcclError) {
        self.owner.shared.lock().failure.get_or_insert(error);
        call_out(&self.owner.notify);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Going,
    Done,
}

/// Gives way at first, then sleeps for longer and longer: a group takes microseconds, joining takes seconds.
fn wait_a_little(pause: Duration) -> Duration {
    if pause < Duration::from_micros(50) {
        thread::yield_now();
        return pause + Duration::from_micros(1);
    }
    thread::sleep(pause);
    (pause * 2).min(PAUSE_MAX)
}

/// Calls a function of the caller's, which must not end this thread.
fn call_out(notify: &Notify) {
    let _ = catch_unwind(AssertUnwindSafe(notify));
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panicked").to_owned()
}

fn int(number: u32) -> Result<c_int, NcclError> {
    c_int::try_from(number)
        .map_err(|_| NcclError::Invalid { what: format!("{number} is more than NCCL counts") })
}

fn count(bytes: u64) -> Result<usize, NcclError> {
    usize::try_from(bytes)
        .map_err(|_| NcclError::Invalid { what: format!("{bytes} bytes are no size of memory") })
}
