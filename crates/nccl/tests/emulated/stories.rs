//! What rank processes do.

use std::{
    panic, process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use longshore_kernels::cuda::driver::{Device, DeviceMemory, Stream, probe};
use longshore_nccl::{
    Code, Communicator, Connected, Group, Membership, Nccl, NcclError, Pending,
    Stream as RawStream, Stuck,
};

use crate::place::Place;

/// For what is expected to end.
const LIMIT: Duration = Duration::from_secs(60);
/// For what is expected not to.
const SHORT: Duration = Duration::from_millis(300);

/// Lives the story of this process, if it has one.
pub(crate) fn tell() {
    let Some((story, place)) = Place::of_this_process() else { return };
    // to give up memory is to wait for streams that wait for others
    let say = panic::take_hook();
    panic::set_hook(Box::new(move |what| {
        say(what);
        process::exit(101);
    }));
    match story.as_str() {
        "everything" => everything(&place),
        "all_send" => all_send(&place),
        "order" => order(&place),
        "survive" => survive(&place),
        "notice" => notice(&place),
        "alone" => alone(&place),
        "stuck" => stuck(&place),
        "drop" => drop_stuck(&place),
        "fail" => fail(&place),
        "duplicate" => duplicate(&place),
        "mismatch" => mismatch(&place),
        "threads" => threads(&place),
        other => panic!("no story {other}"),
    }
}

// ---- a rank ----

/// A rank with its device, ready to exchange.
struct Rank {
    place: Place,
    communicator: Communicator,
    stream: Stream,
    device: Arc<Device>,
}

fn device_of(place: &Place) -> Arc<Device> {
    Device::open(place.rank % probe().unwrap().devices).unwrap()
}

/// Joins a communicator of this name.
fn joining(place: &Place, name: &str, limit: Duration) -> (Communicator, Pending<Connected>) {
    let nccl = Nccl::load().unwrap();
    let id = place.share(name, || nccl.unique_id().unwrap());
    let membership = Membership { id, rank: place.rank, world_size: place.size, max_ctas: Some(2) };
    let device = device_of(place);
    let bind = move || device.make_current().map(|()| device);
    Communicator::connect(nccl, membership, limit, bind, || ()).unwrap()
}

impl Rank {
    fn join(place: &Place) -> Self {
        Self::join_as(place, "id")
    }

    fn join_as(place: &Place, name: &str) -> Self {
        let (communicator, connected) = joining(place, name, LIMIT);
        let device = device_of(place);
        assert_eq!(connected.wait().unwrap().cuda_device.cast_unsigned(), device.ordinal());
        let stream = device.stream().unwrap();
        Self { place: place.clone(), communicator, stream, device }
    }

    /// Memory with these bytes.
    fn memory(&self, bytes: &[u8]) -> DeviceMemory {
        let memory = self.device.allocate("a test", bytes.len().max(1) as u64).unwrap();
        // SAFETY: both are there until the stream is done, which is waited for
        unsafe { self.stream.copy_to_device(memory.address(), bytes.as_ptr(), bytes.len() as u64) }
            .unwrap();
        self.stream.synchronize().unwrap();
        memory
    }

    /// The bytes of memory, once the stream is done with all before.
    fn bytes(&self, memory: &DeviceMemory, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        // SAFETY: both are there until the stream is done, which is waited for
        unsafe { self.stream.copy_to_host(bytes.as_mut_ptr(), memory.address(), count as u64) }
            .unwrap();
        self.stream.synchronize().unwrap();
        bytes
    }

    fn start_on(&self, stream: &Stream, group: &Group, limit: Duration) -> Pending<()> {
        // SAFETY: stories keep their memory until the stream is done or the communicator aborted
        unsafe { self.communicator.group(group.clone(), RawStream::from_raw(stream.raw()), limit) }
            .unwrap()
    }

    fn start(&self, group: &Group) -> Pending<()> {
        self.start_on(&self.stream, group, LIMIT)
    }

    fn finish(self) {
        self.stream.synchronize().unwrap();
        self.communicator.finish(LIMIT).unwrap().wait().unwrap();
    }
}

// ---- bytes that all ranks know ----

/// Numbers that are the same on all ranks, one after the other.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    /// None, few, or many bytes.
    fn size(&mut self) -> u64 {
        let end = [1, 16, 5_000, 300_000][self.below(4) as usize];
        self.below(end)
    }
}

/// What `from` sends in the operation of this number.
fn content(operation: u64, from: u32, count: u64) -> Vec<u8> {
    let mut numbers = Numbers(operation << 8 | u64::from(from));
    (0..count).map(|_| numbers.below(256) as u8).collect()
}

// ---- exchanges ----

/// A group in the making, with its memory and what has to be in it afterwards.
struct Exchange<'a> {
    rank: &'a Rank,
    group: Group,
    sources: Vec<DeviceMemory>,
    expected: Vec<(DeviceMemory, Vec<u8>)>,
}

impl<'a> Exchange<'a> {
    fn new(rank: &'a Rank) -> Self {
        Self { rank, group: Group::default(), sources: Vec::new(), expected: Vec::new() }
    }

    fn source(&mut self, bytes: &[u8]) -> u64 {
        self.sources.push(self.rank.memory(bytes));
        self.sources[self.sources.len() - 1].address()
    }

    fn target(&mut self, expected: Vec<u8>) -> u64 {
        self.expected.push((self.rank.memory(&vec![0xee; expected.len()]), expected));
        self.expected[self.expected.len() - 1].0.address()
    }

    fn send(&mut self, operation: u64, from: u32, to: u32, bytes: u64) {
        if self.rank.place.rank == from {
            let source = self.source(&content(operation, from, bytes));
            self.group.send(source, bytes, to);
        }
        if self.rank.place.rank == to {
            let target = self.target(content(operation, from, bytes));
            self.group.recv(target, bytes, from);
        }
    }

    fn broadcast(&mut self, operation: u64, root: u32, bytes: u64, in_place: bool) {
        let target = self.target(content(operation, root, bytes));
        let source = if self.rank.place.rank != root {
            0
        } else if in_place {
            let memory = self.rank.memory(&content(operation, root, bytes));
            let address = memory.address();
            self.expected.pop();
            self.expected.push((memory, content(operation, root, bytes)));
            address
        } else {
            self.source(&content(operation, root, bytes))
        };
        let target = if in_place && source != 0 { source } else { target };
        self.group.broadcast(source, target, bytes, root);
    }

    fn all_gather(&mut self, operation: u64, bytes_each: u64) {
        let source = self.source(&content(operation, self.rank.place.rank, bytes_each));
        let all = (0..self.rank.place.size).flat_map(|rank| content(operation, rank, bytes_each));
        let target = self.target(all.collect());
        self.group.all_gather(source, target, bytes_each);
    }

    fn check(self) {
        self.rank.start(&self.group).wait().unwrap();
        for (memory, expected) in &self.expected {
            assert!(self.rank.bytes(memory, expected.len()) == *expected, "wrong bytes arrive");
        }
    }
}

fn exchange_much(rank: &Rank, rounds: u64) {
    let size = rank.place.size;
    let mut numbers = Numbers(size.into());
    for round in 0..rounds {
        let mut exchange = Exchange::new(rank);
        for part in 0..=round % 3 {
            let operation = round * 1_000 + part * 100;
            match numbers.below(3) {
                0 => {
                    for (from, to) in (0..size * size).map(|pair| (pair / size, pair % size)) {
                        let number = operation + u64::from(from * size + to);
                        exchange.send(number, from, to, numbers.size());
                    }
                }
                1 => {
                    let root = numbers.below(size.into()) as u32;
                    exchange.broadcast(operation, root, numbers.size(), numbers.below(2) == 0);
                }
                _ => exchange.all_gather(operation, numbers.size()),
            }
        }
        exchange.check();
    }
}

// ---- stories ----

fn everything(place: &Place) {
    let rank = Rank::join(place);
    exchange_much(&rank, 12);
    assert!(rank.communicator.failure().is_none());
    rank.finish();
}

fn all_send(place: &Place) {
    const BYTES: u64 = 8 << 20;
    let rank = Rank::join(place);
    let mut exchange = Exchange::new(&rank);
    for from in 0..place.size {
        for to in 0..place.size {
            exchange.send(u64::from(from * place.size + to), from, to, BYTES);
        }
    }
    exchange.check();
    rank.finish();
}

/// Rank 0's memory goes around: filled on the stream, sent, filled again; rank 1 copies what it gets between groups.
fn order(place: &Place) {
    const BYTES: u64 = 100_000;
    let rank = Rank::join(place);
    let other = rank.device.stream().unwrap();
    let memory = rank.memory(&vec![0; BYTES as usize]);
    let seen: Vec<_> = (0..6).map(|_| rank.memory(&vec![0; BYTES as usize])).collect();
    let address = memory.address();
    for (step, seen) in seen.iter().enumerate() {
        let mut group = Group::default();
        if place.rank == 0 {
            group.send(address, BYTES, 1);
            // SAFETY: the memory is there until the stream is done, and nobody but the stream uses it
            unsafe { rank.stream.fill(address, step as u8 + 1, BYTES) }.unwrap();
            rank.start(&group).wait().unwrap();
        } else {
            group.recv(address, BYTES, 0);
            rank.start(&group).wait().unwrap();
            // SAFETY: both are there until the stream is done, and nobody but the stream uses them
            unsafe { rank.stream.copy_within(seen.address(), address, BYTES) }.unwrap();
        }
    }
    if place.rank == 1 {
        for (step, seen) in seen.iter().enumerate() {
            assert_eq!(rank.bytes(seen, BYTES as usize), vec![step as u8 + 1; BYTES as usize]);
        }
    }
    // groups of a communicator follow each other whatever their streams are: the same bytes go back and forth
    rank.stream.synchronize().unwrap();
    for step in 0..6 {
        let stream = if step % 2 == place.rank % 2 { &rank.stream } else { &other };
        let mut group = Group::default();
        match place.rank == step % 2 {
            true => group.send(address, BYTES, 1 - place.rank),
            false => group.recv(address, BYTES, 1 - place.rank),
        };
        rank.start_on(stream, &group, LIMIT).wait().unwrap();
    }
    other.synchronize().unwrap();
    assert_eq!(rank.bytes(&memory, BYTES as usize), vec![6; BYTES as usize]);
    rank.finish();
}

/// All wait for the last rank, which is killed.
fn survive(place: &Place) {
    let rank = Rank::join(place);
    exchange_much(&rank, 3);
    let last = place.size - 1;
    if place.rank == last {
        place.note("waits");
        thread::sleep(LIMIT * 10);
    }
    let memory = rank.memory(&[7; 4096]);
    let mut group = Group::default();
    group.all_gather(memory.address() + 1024 * u64::from(place.rank % 2), memory.address(), 512);
    // they are connected if there was an all-gather before; either way nothing comes of it
    let pending = rank.start_on(&rank.stream, &group, LIMIT);
    place.note("waits");
    place.wait_for("killed", 1);
    thread::sleep(SHORT);
    let begun = Instant::now();
    rank.communicator.abort(LIMIT).unwrap();
    assert!(begun.elapsed() < LIMIT / 4, "an abort takes no time");
    assert!(rank.communicator.failure().is_none_or(|failure| matches!(failure, NcclError::Gone)));
    // on the stream, or never put there
    assert!(matches!(pending.wait(), Ok(()) | Err(NcclError::Gone)));
    rank.stream.synchronize().unwrap();
    drop(rank);
    let rank = Rank::join_as(&place.with(place.rank, last), "second-id");
    exchange_much(&rank, 6);
    rank.finish();
}

fn notice(place: &Place) {
    let rank = Rank::join(place);
    let memory = rank.memory(&[7; 4096]);
    let mut warm_up = Group::default();
    warm_up.all_gather(
        memory.address() + 2048 + 512 * u64::from(place.rank),
        memory.address() + 2048,
        512,
    );
    rank.start(&warm_up).wait().unwrap();
    rank.stream.synchronize().unwrap();
    place.note("waits");
    if place.rank == 1 {
        thread::sleep(LIMIT * 10);
    }
    let mut group = Group::default();
    group.all_gather(memory.address(), memory.address() + 1024, 512);
    // on the stream at once, as they are connected; there, it may have failed by the time it is asked about
    let _ = rank.start(&group).wait();
    let begun = Instant::now();
    while rank.communicator.failure().is_none() {
        assert!(begun.elapsed() < LIMIT, "a lost rank is not noticed");
        thread::sleep(Duration::from_millis(1));
    }
    let failure = rank.communicator.failure().unwrap();
    assert!(matches!(failure, NcclError::Nccl { code: Code(6), .. }), "{failure}");
    rank.communicator.abort(LIMIT).unwrap();
    rank.stream.synchronize().unwrap();
}

/// The last rank never joins.
fn alone(place: &Place) {
    if place.rank == place.size - 1 {
        place.note("absent");
        thread::sleep(LIMIT * 10);
    }
    let (communicator, connected) = joining(place, "id", SHORT);
    let error = connected.wait().unwrap_err();
    assert!(matches!(error, NcclError::DeadlinePassed { .. }), "{error}");
    communicator.abort(LIMIT).unwrap();
}

/// The end of the first group or the first abort hangs: the process ends all the same.
fn stuck(place: &Place) {
    let rank = Rank::join(place);
    let memory = rank.memory(&[7; 4096]);
    let mut group = Group::default();
    group.recv(memory.address(), 4096, 1 - place.rank);
    let error = rank.start_on(&rank.stream, &group, SHORT).wait().unwrap_err();
    let begun = Instant::now();
    let stuck = rank.communicator.abort(SHORT).unwrap_err();
    assert!(begun.elapsed() < LIMIT / 4, "a limit is kept");
    let Stuck::Hangs { call, .. } = stuck else { panic!("{stuck}") };
    match error {
        NcclError::Unresponsive { .. } => assert_eq!(call, "ncclGroupEnd"),
        error => assert_eq!(call, "ncclCommAbort", "{error}"),
    }
    // what a process does that cannot be relied on any more
    process::exit(0);
}

fn drop_stuck(place: &Place) {
    let rank = Rank::join(place);
    let begun = Instant::now();
    drop(rank);
    let taken = begun.elapsed();
    assert!(Duration::from_secs(4) < taken && taken < LIMIT / 4, "{taken:?}");
    process::exit(0);
}

/// One call fails on all ranks: an error each, and an abort.
fn fail(place: &Place) {
    let (communicator, connected) = joining(place, "id", LIMIT);
    let device = device_of(place);
    let stream = device.stream().unwrap();
    let memory = device.allocate("a test", 8192).unwrap();
    let exchange = |_| {
        let mut group = Group::default();
        group.send(memory.address(), 4096, 1 - place.rank);
        group.recv(memory.address() + 4096, 4096, 1 - place.rank);
        // SAFETY: the memory is there until the stream is done or the communicator aborted
        unsafe { communicator.group(group, RawStream::from_raw(stream.raw()), LIMIT) }?.wait()
    };
    let told = connected.wait().and_then(exchange).and_then(|()| {
        stream.synchronize().unwrap();
        communicator.finish(LIMIT)?.wait()
    });
    let error = told.unwrap_err();
    assert!(matches!(error, NcclError::Nccl { code: Code(2), .. }), "{error}");
    assert!(error.to_string().ends_with("is made to fail"), "{error}");
    communicator.abort(LIMIT).unwrap();
    stream.synchronize().unwrap();
    place.note("aborted");
    place.wait_for("aborted", place.size);
}

fn duplicate(place: &Place) {
    let (communicator, connected) = joining(place, "id", LIMIT);
    let error = connected.wait().unwrap_err().to_string();
    assert!(
        error.contains("ncclInvalidUsage") && error.contains("Duplicate GPU detected"),
        "{error}"
    );
    communicator.abort(LIMIT).unwrap();
    // the process that made the identifier stays until nobody needs it
    place.note("refused");
    place.wait_for("refused", place.size);
}

fn mismatch(place: &Place) {
    let rank = Rank::join(place);
    let memory = rank.memory(&[7; 4096]);
    let mut group = Group::default();
    match place.rank {
        0 => group.send(memory.address(), 1000, 1),
        _ => group.recv(memory.address(), 1001, 0),
    };
    rank.start(&group).wait().unwrap();
    let _ = rank.stream.synchronize();
    rank.communicator.abort(LIMIT).unwrap();
}

fn threads(place: &Place) {
    thread::scope(|scope| {
        for number in [0, 1] {
            let place = place.with(number, 2);
            scope.spawn(move || everything(&place));
        }
    });
}
