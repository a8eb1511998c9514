//! An NCCL made of functions of this process, which does what a test tells it, and the tests of communicators with it.
//!
//! The identifier of a communicator is the address of its [`Script`], and so is the communicator.

use std::{
    cell::Cell,
    ffi::{CStr, c_int, c_void},
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Code, Communicator, Connected, Group, Membership, Nccl, NcclError, Pending, Stream, Stuck,
    UniqueId,
    sys::{Comm, Config, Entries, RawStream, RawUniqueId, Symbols},
};

const SECOND: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(30);

/// What the fake does, and what it was asked.
#[derive(Debug, Default)]
struct Script {
    /// Looks that find something in progress, for each thing started; negative: all of them.
    looks: AtomicI32,
    looks_left: AtomicI32,
    init_code: AtomicI32,
    /// What is found once nothing is in progress.
    state: AtomicI32,
    /// The entry that does not return until `release`.
    hang: Mutex<&'static str>,
    release: AtomicBool,
    calls: Mutex<Vec<&'static str>>,
    size: AtomicU32,
}

thread_local! {
    /// Groups belong to threads, and not to communicators.
    static CURRENT: Cell<Option<&'static Script>> = const { Cell::new(None) };
}

impl Script {
    fn of(comm: Comm) -> &'static Self {
        // SAFETY: communicators are addresses of scripts, which are never freed
        unsafe { &*comm.cast::<Self>() }
    }

    /// Notes a call, hangs in it if told so, and starts something.
    fn called(&self, call: &'static str) -> c_int {
        self.calls.lock().unwrap().push(call);
        while *self.hang.lock().unwrap() == call && !self.release.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(1));
        }
        0
    }

    fn started(&self, call: &'static str) -> c_int {
        self.called(call);
        self.looks_left.store(self.looks.load(Ordering::Acquire), Ordering::Release);
        if self.looks_left.load(Ordering::Acquire) == 0 { 0 } else { 7 }
    }

    fn calls(&self) -> Vec<&'static str> {
        self.calls.lock().unwrap().clone()
    }
}

/// Writes where NCCL is asked to.
fn put<T>(place: *mut T, value: T) {
    // SAFETY: entries get places to write to
    unsafe { place.write(value) };
}

unsafe extern "C" fn get_unique_id(_: *mut RawUniqueId) -> c_int {
    2
}

unsafe extern "C" fn comm_init(
    comm: *mut Comm,
    size: c_int,
    id: RawUniqueId,
    _: c_int,
    config: *mut Config,
) -> c_int {
    let address = usize::from_ne_bytes(id.0[..8].try_into().unwrap());
    let script = Script::of(address as Comm);
    CURRENT.set(Some(script));
    // SAFETY: NCCL may read what it is handed during the call
    let config = unsafe { &*config };
    assert!(format!("{config:?}").contains("blocking: 0"));
    script.size.store(size.unsigned_abs(), Ordering::Release);
    let code = script.init_code.load(Ordering::Acquire);
    if code != 0 {
        return code;
    }
    put(comm, address as Comm);
    script.started("init")
}

unsafe extern "C" fn comm_get_async_error(comm: Comm, state: *mut c_int) -> c_int {
    let script = Script::of(comm);
    let left = script.looks_left.load(Ordering::Acquire);
    if left > 0 {
        script.looks_left.store(left - 1, Ordering::Release);
    }
    put(state, if left == 0 { script.state.load(Ordering::Acquire) } else { 7 });
    0
}

unsafe extern "C" fn comm_count(comm: Comm, count: *mut c_int) -> c_int {
    put(count, Script::of(comm).size.load(Ordering::Acquire) as c_int);
    0
}

unsafe extern "C" fn comm_user_rank(_: Comm, rank: *mut c_int) -> c_int {
    put(rank, 0);
    0
}

unsafe extern "C" fn comm_cu_device(_: Comm, device: *mut c_int) -> c_int {
    put(device, 3);
    0
}

unsafe extern "C" fn group_start() -> c_int {
    CURRENT.get().unwrap().called("start")
}

unsafe extern "C" fn group_end() -> c_int {
    CURRENT.get().unwrap().started("end")
}

unsafe extern "C" fn send(
    _: *const c_void,
    _: usize,
    _: c_int,
    _: c_int,
    c: Comm,
    _: RawStream,
) -> c_int {
    Script::of(c).called("send")
}

unsafe extern "C" fn recv(
    _: *mut c_void,
    _: usize,
    _: c_int,
    _: c_int,
    c: Comm,
    _: RawStream,
) -> c_int {
    Script::of(c).called("recv")
}

unsafe extern "C" fn broadcast(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: c_int,
    _: c_int,
    _: Comm,
    _: RawStream,
) -> c_int {
    // as NCCL does for a root there is not
    4
}

unsafe extern "C" fn all_gather(
    _: *const c_void,
    _: *mut c_void,
    _: usize,
    _: c_int,
    c: Comm,
    _: RawStream,
) -> c_int {
    Script::of(c).called("all_gather")
}

unsafe extern "C" fn comm_finalize(comm: Comm) -> c_int {
    Script::of(comm).started("finalize")
}

unsafe extern "C" fn comm_destroy(comm: Comm) -> c_int {
    Script::of(comm).called("destroy")
}

unsafe extern "C" fn comm_abort(comm: Comm) -> c_int {
    Script::of(comm).called("abort")
}

/// Has all entries but one.
struct Without(&'static CStr);

impl Symbols for Without {
    fn address(&self, name: &CStr) -> Option<*mut c_void> {
        (name != self.0).then_some(ptr::without_provenance_mut(8))
    }

    fn missing(&self, name: &CStr) -> NcclError {
        let symbol = name.to_string_lossy().into_owned();
        NcclError::MissingSymbol {
            library: "fake".to_owned(),
            version: "NCCL 2.18.0".to_owned(),
            symbol,
        }
    }
}

fn fake() -> &'static Nccl {
    Box::leak(Box::new(Nccl::of(Entries {
        get_unique_id,
        comm_init_rank_config: comm_init,
        comm_get_async_error,
        comm_count,
        comm_user_rank,
        comm_cu_device,
        group_start,
        group_end,
        send,
        recv,
        broadcast,
        all_gather,
        comm_finalize,
        comm_destroy,
        comm_abort,
        get_error_string: None,
        get_last_error: None,
    })))
}

fn script() -> &'static Script {
    Box::leak(Box::default())
}

fn connect(script: &'static Script, limit: Duration) -> (Communicator, Pending<Connected>) {
    let mut id = UniqueId([0; 128]);
    id.0[..8].copy_from_slice(&(ptr::from_ref(script) as usize).to_ne_bytes());
    let membership = Membership { id, rank: 0, world_size: 2, max_ctas: None };
    Communicator::connect(fake(), membership, limit, || Ok::<_, NcclError>(()), || ()).unwrap()
}

fn exchange() -> Group {
    let mut group = Group::default();
    group.send(16, 4, 1).recv(32, 4, 1).all_gather(16, 64, 4);
    group
}

fn start(communicator: &Communicator, group: Group, limit: Duration) -> Pending<()> {
    // SAFETY: the fake touches no memory
    unsafe { communicator.group(group, Stream::from_raw(ptr::null_mut()), limit) }.unwrap()
}

/// Every call may be in progress: it is polled until it is done, and the next one waits for that.
#[test]
fn what_is_in_progress_is_polled_until_it_is_done() {
    let script = script();
    script.looks.store(100, Ordering::Release);
    let (communicator, connected) = connect(script, LONG);
    assert_eq!(connected.wait().unwrap(), Connected { cuda_device: 3 });
    start(&communicator, exchange(), LONG).wait().unwrap();
    communicator.finish(LONG).unwrap().wait().unwrap();
    let expected = ["init", "start", "send", "recv", "all_gather", "end", "finalize", "destroy"];
    assert_eq!(script.calls(), expected);
    communicator.abort(LONG).unwrap();
    drop(communicator);
    assert_eq!(script.calls(), expected, "nothing is done to a communicator that is finished");
}

/// A rank that never joins ends the wait of the others at their limit; the communicator is aborted when it is dropped.
#[test]
fn a_limit_ends_what_stays_in_progress() {
    let script = script();
    script.looks.store(-1, Ordering::Release);
    let (communicator, connected) = connect(script, Duration::from_millis(20));
    let error = connected.wait().unwrap_err();
    assert!(
        matches!(error, NcclError::DeadlinePassed { call: "ncclCommInitRankConfig", .. }),
        "{error}"
    );
    let error = start(&communicator, exchange(), LONG).wait().unwrap_err();
    assert!(matches!(error, NcclError::DeadlinePassed { .. }), "the first reason stays: {error}");
    drop(communicator);
    assert_eq!(script.calls(), ["init", "abort"]);
}

#[test]
fn an_abort_ends_what_is_in_progress() {
    let script = script();
    script.looks.store(-1, Ordering::Release);
    let (communicator, connected) = connect(script, LONG);
    let begun = Instant::now();
    communicator.abort(LONG).unwrap();
    assert!(matches!(connected.wait(), Err(NcclError::Gone)));
    assert!(begun.elapsed() < LONG / 2);
    communicator.abort(LONG).unwrap();
    assert!(matches!(
        communicator.finish(LONG).map(Pending::wait),
        Err(NcclError::Gone) | Ok(Err(NcclError::Gone))
    ));
}

/// Neither the caller nor an abort waits for a thread that hangs; the abort says where it does.
#[test]
fn a_thread_that_hangs_makes_an_abort_stuck() {
    let script = script();
    let (communicator, connected) = connect(script, LONG);
    connected.wait().unwrap();
    *script.hang.lock().unwrap() = "end";
    let pending = start(&communicator, exchange(), Duration::from_millis(1));
    let error = pending.wait().unwrap_err();
    assert!(matches!(error, NcclError::Unresponsive { call: "ncclGroupEnd", .. }), "{error}");
    let stuck = communicator.abort(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(stuck, Stuck::Hangs { call: "ncclGroupEnd", .. }), "{stuck}");
    script.release.store(true, Ordering::Release);
    communicator.abort(LONG).unwrap();
}

#[test]
fn an_abort_that_hangs_is_stuck() {
    let script = script();
    let (communicator, connected) = connect(script, LONG);
    connected.wait().unwrap();
    *script.hang.lock().unwrap() = "abort";
    let stuck = communicator.abort(Duration::from_millis(10)).unwrap_err();
    assert!(stuck.to_string().contains("ncclCommAbort has not returned"), "{stuck}");
    script.release.store(true, Ordering::Release);
    communicator.abort(LONG).unwrap();
}

/// What NCCL finds out while nobody asks is told, and nothing more is done with such a communicator.
#[test]
fn a_failure_is_seen_while_nothing_is_asked_for() {
    let script = script();
    let (communicator, connected) = connect(script, LONG);
    connected.wait().unwrap();
    assert!(communicator.failure().is_none());
    script.state.store(6, Ordering::Release);
    let begun = Instant::now();
    while communicator.failure().is_none() {
        assert!(begun.elapsed() < LONG);
        thread::sleep(Duration::from_millis(1));
    }
    let error = start(&communicator, exchange(), LONG).wait().unwrap_err();
    assert!(matches!(error, NcclError::Nccl { code: Code(6), .. }), "{error}");
    communicator.abort(LONG).unwrap();
    assert_eq!(script.calls(), ["init", "abort"]);
}

#[test]
fn a_group_is_left_after_an_operation_was_refused() {
    let script = script();
    let (communicator, connected) = connect(script, LONG);
    connected.wait().unwrap();
    let mut group = exchange();
    group.broadcast(16, 16, 4, 1).send(16, 4, 1);
    let error = start(&communicator, group, LONG).wait().unwrap_err();
    assert_eq!(error.to_string(), "ncclBroadcast: ncclInvalidArgument");
    communicator.abort(LONG).unwrap();
    assert_eq!(script.calls(), ["init", "start", "send", "recv", "all_gather", "end", "abort"]);
}

#[test]
fn an_empty_group_is_done_at_once() {
    let script = script();
    let (communicator, connected) = connect(script, LONG);
    connected.wait().unwrap();
    start(&communicator, Group::default(), LONG).wait().unwrap();
    assert_eq!(script.calls(), ["init"]);
}

#[test]
fn joining_that_is_refused_leaves_nothing_to_abort() {
    let script = script();
    script.init_code.store(5, Ordering::Release);
    let (communicator, connected) = connect(script, LONG);
    let error = connected.wait().unwrap_err();
    assert_eq!(error.to_string(), "ncclCommInitRankConfig: ncclInvalidUsage");
    communicator.abort(LONG).unwrap();
    assert!(script.calls().is_empty());
}

/// The device is bound on the owner's thread, what that returns lives as long as the communicator, and a panic is an
/// error.
#[test]
fn the_device_is_bound_where_the_communicator_lives() {
    let script = script();
    let mut id = UniqueId([0; 128]);
    id.0[..8].copy_from_slice(&(ptr::from_ref(script) as usize).to_ne_bytes());
    let membership = Membership { id, rank: 0, world_size: 1, max_ctas: Some(2) };
    let kept = Arc::new(());
    let weak = Arc::downgrade(&kept);
    let bind = move || {
        assert_eq!(thread::current().name(), Some("nccl-0"));
        Ok::<_, NcclError>(kept)
    };
    let (notices, noticed) = std::sync::mpsc::channel();
    let notify = move || notices.send(()).unwrap();
    let (communicator, mut connected) =
        Communicator::connect(fake(), membership, LONG, bind, notify).unwrap();
    noticed.recv_timeout(LONG).unwrap();
    connected.try_take().unwrap().unwrap();
    assert!(weak.upgrade().is_some());
    communicator.abort(LONG).unwrap();
    assert!(weak.upgrade().is_none());

    let bind = || -> Result<(), NcclError> { panic!("no device") };
    let (_, connected) = Communicator::connect(fake(), membership, LONG, bind, || ()).unwrap();
    let error = connected.wait().unwrap_err().to_string();
    assert_eq!(error, "the device is not usable by a communicator: no device");
}

#[test]
fn ranks_that_are_none_of_the_group_are_refused() {
    let membership = Membership { id: UniqueId([0; 128]), rank: 2, world_size: 2, max_ctas: None };
    let bind = || Ok::<_, NcclError>(());
    assert!(Communicator::connect(fake(), membership, LONG, bind, || ()).is_err());
    let membership = Membership { rank: 0, max_ctas: Some(0), ..membership };
    assert!(Communicator::connect(fake(), membership, LONG, bind, || ()).is_err());
}

/// The owner keeps so many commands; more of them are refused at once, and limits nobody's clock counts are for ever.
#[test]
fn too_many_commands_are_refused() {
    let script = script();
    *script.hang.lock().unwrap() = "init";
    let (communicator, connected) = connect(script, Duration::MAX);
    let mut pending: Vec<_> = (0..64).map(|_| start(&communicator, exchange(), LONG)).collect();
    // SAFETY: the fake touches no memory
    let refused =
        unsafe { communicator.group(exchange(), Stream::from_raw(ptr::null_mut()), LONG) };
    assert!(matches!(refused, Err(NcclError::Busy { waiting: 64 })));
    assert!(pending[0].try_take().is_none());
    script.release.store(true, Ordering::Release);
    connected.wait().unwrap();
    pending.into_iter().for_each(|pending| pending.wait().unwrap());
    communicator.abort(SECOND * 30).unwrap();
}

#[test]
fn a_missing_entry_is_named_unless_it_only_makes_errors_clearer() {
    // SAFETY: none of these functions is called
    let entries = unsafe { Entries::look_up(&Without(c"ncclGetLastError")) }.unwrap();
    assert!(entries.get_last_error.is_none() && entries.get_error_string.is_some());
    // SAFETY: none of these functions is called
    let error = unsafe { Entries::look_up(&Without(c"ncclCommFinalize")) }.unwrap_err();
    assert_eq!(error.to_string(), "fake (NCCL 2.18.0) has no ncclCommFinalize");
}

#[test]
fn no_identifier_is_an_ordinary_error() {
    assert_eq!(fake().unique_id().unwrap_err().to_string(), "ncclGetUniqueId: ncclSystemError");
}
