//! What every implementation of [`Collective`] must do, whatever it is made of.
//!
//! A suite takes a way to make a group of ranks; each rank then runs on a thread of its own, as it would run in a process
//! of its own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use longshore_rank::collective::{
    Arrival, Collective, CollectiveError, DeviceBytes, Incoming, Kind, Operation, Piece,
};

/// Slots are this large in groups made for the suite.
pub const SLOT_BYTES: u64 = 96 << 10;
/// And there are this many of them for each rank.
pub const SLOTS: u32 = 3;

pub type Ranks = Vec<Arc<dyn Collective>>;

/// Runs every case on groups that `group(world_size)` makes; also that of ranks which disagree.
pub fn run(group: impl Fn(u32) -> Ranks) {
    run_in_agreement(&group);
    disagreement_is_an_error_not_a_hang(group(2));
}

/// Runs every case in which all ranks agree on what they exchange.
pub fn run_in_agreement(group: impl Fn(u32) -> Ranks) {
    for world_size in [1, 2, 3, 5] {
        barrier(group(world_size));
        broadcast(group(world_size));
        scatter(group(world_size));
        all_gather(group(world_size));
        all_to_all(group(world_size));
        many_in_flight(group(world_size));
    }
    barrier_holds_everyone_back(group(3));
    slots_come_back_when_arrivals_are_dropped(group(2));
    operations_that_cannot_be_are_refused(group(2));
    abort_ends_everything_of_a_rank(group(3));
}

/// Calls `each` for every rank on a thread of its own.
fn on_each(ranks: &Ranks, each: impl Fn(&dyn Collective) + Sync) {
    std::thread::scope(|scope| {
        for rank in ranks {
            let each = &each;
            scope.spawn(move || each(&**rank));
        }
    });
}

const PATIENCE: Duration = Duration::from_secs(20);

/// A byte that tells who sent it, in which operation, and where it stood.
fn mark(source: u32, operation: u64, index: u64) -> u8 {
    (u64::from(source) * 131 + operation * 31 + index * 7 + index / 251) as u8
}

/// Starts `kind`, from a slot filled with this rank's marks where it sends anything.
fn start(rank: &dyn Collective, number: u64, kind: Kind) {
    let deadline = Instant::now() + PATIENCE;
    let mut data = rank.lease().unwrap();
    while data.is_none() || !rank.has_room() {
        assert!(Instant::now() < deadline, "no slot");
        rank.wait(Duration::from_millis(20));
        data = data.or(rank.lease().unwrap());
    }
    let mut data = data.unwrap();
    for (i, byte) in data.bytes_mut().iter_mut().enumerate() {
        *byte = mark(rank.rank(), number, i as u64);
    }
    assert_eq!(rank.start(Operation { kind, data: Some(data) }).unwrap(), number);
}

/// Waits for what all others send in the next operation, by source.
fn collect(rank: &dyn Collective) -> Vec<Arrival> {
    let (mut all, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while all.len() + 1 < rank.world_size() as usize {
        all.extend(rank.arrivals().unwrap());
        assert!(Instant::now() < deadline, "only {} arrived", all.len());
        if all.len() + 1 < rank.world_size() as usize {
            rank.wait(Duration::from_millis(500));
        }
    }
    all.sort_by_key(|arrival| arrival.source);
    all
}

/// The pieces of an arrival, one after the other.
fn gather(arrival: &Arrival, pieces: &[Piece]) -> Vec<u8> {
    if let Incoming::OnDevice(bytes) = &arrival.bytes {
        return from_device(bytes);
    }
    let bytes = arrival.bytes.host().expect("host memory");
    if !arrival.bytes.is_in_place() {
        return bytes.to_vec();
    }
    let runs =
        pieces.iter().flat_map(|p| (0..p.rows).map(move |r| (p.offset + r * p.stride, p.width)));
    runs.flat_map(|(at, width)| bytes[at as usize..(at + width) as usize].to_vec()).collect()
}

fn from_device(arrived: &DeviceBytes) -> Vec<u8> {
    let mut bytes = vec![0; arrived.bytes as usize];
    let stream = arrived.device.stream().unwrap();
    // SAFETY: `bytes` is there until the stream is done; what arrived is not used for anything else while it lives.
    unsafe { stream.copy_to_host(bytes.as_mut_ptr(), arrived.address, arrived.bytes) }.unwrap();
    stream.synchronize().unwrap();
    bytes
}

/// What `source` has put into `pieces` in `operation`.
fn marks(source: u32, operation: u64, pieces: &[Piece]) -> Vec<u8> {
    let runs =
        pieces.iter().flat_map(|p| (0..p.rows).map(move |r| (p.offset + r * p.stride, p.width)));
    runs.flat_map(|(at, width)| (at..at + width).map(|i| mark(source, operation, i))).collect()
}

fn check(arrival: &Arrival, pieces: &[Piece]) {
    let want = marks(arrival.source, arrival.operation, pieces);
    assert!(gather(arrival, pieces) == want, "operation {}", arrival.operation);
}

fn piece(bytes: u64) -> Vec<Piece> {
    if bytes == 0 { vec![] } else { vec![Piece::run(0, bytes)] }
}

fn finish(rank: &dyn Collective) {
    let deadline = Instant::now() + PATIENCE;
    while !rank.is_idle() {
        assert!(rank.arrivals().unwrap().is_empty());
        assert!(Instant::now() < deadline, "never idle");
        rank.wait(Duration::from_millis(20));
    }
    assert_eq!(rank.held_bytes(), 0, "slots are given back");
    assert!(rank.peak_bytes() <= u64::from(SLOTS + 2 * rank.world_size()) * SLOT_BYTES);
}

fn barrier(ranks: Ranks) {
    on_each(&ranks, |rank| {
        for number in 0..3 {
            start(rank, number, Kind::Barrier);
            for arrival in collect(rank) {
                assert_eq!(arrival.bytes.host().unwrap(), b"");
            }
        }
        finish(rank);
    });
}

/// Nobody passes before the last has come.
fn barrier_holds_everyone_back(ranks: Ranks) {
    start(&*ranks[0], 0, Kind::Barrier);
    start(&*ranks[1], 0, Kind::Barrier);
    std::thread::sleep(Duration::from_millis(50));
    assert!(ranks[0].arrivals().unwrap().iter().all(|a| a.source == 1));
    assert!(!ranks[0].is_idle());
    start(&*ranks[2], 0, Kind::Barrier);
    let deadline = Instant::now() + PATIENCE;
    while !ranks.iter().all(|rank| rank.is_idle()) {
        assert!(Instant::now() < deadline);
        ranks.iter().for_each(|rank| drop(rank.arrivals().unwrap()));
    }
}

fn broadcast(ranks: Ranks) {
    on_each(&ranks, |rank| {
        for (number, bytes) in [1, 0, 4096, SLOT_BYTES].into_iter().enumerate() {
            let (number, root) = (number as u64, number as u32 % rank.world_size());
            start(rank, number, Kind::Broadcast { root, bytes });
            for arrival in collect(rank) {
                let sent = if arrival.source == root { bytes } else { 0 };
                check(&arrival, &piece(sent));
            }
        }
        finish(rank);
    });
}

fn scatter(ranks: Ranks) {
    on_each(&ranks, |rank| {
        let world = rank.world_size();
        for number in 0..4 {
            let root = number as u32 % world;
            let bytes: Vec<u64> = (0..world).map(|r| u64::from(r) * 1001 * number).collect();
            start(rank, number, Kind::Scatter { root, bytes: bytes.clone() });
            for arrival in collect(rank) {
                let before: u64 = bytes[..rank.rank() as usize].iter().sum();
                let mine = bytes[rank.rank() as usize];
                let pieces = match arrival.source == root && mine > 0 {
                    true => vec![Piece::run(before, mine)],
                    false => vec![],
                };
                check(&arrival, &pieces);
            }
        }
        finish(rank);
    });
}

fn all_gather(ranks: Ranks) {
    on_each(&ranks, |rank| {
        let world = u64::from(rank.world_size());
        for number in 0..6 {
            // uneven, zero for one rank or another
            let size = |r: u64| ((r + number) % world) * SLOT_BYTES / world;
            let bytes: Vec<u64> = (0..world).map(size).collect();
            start(rank, number, Kind::AllGather { bytes: bytes.clone() });
            for arrival in collect(rank) {
                check(&arrival, &piece(bytes[arrival.source as usize]));
            }
        }
        finish(rank);
    });
}

/// Rows of `source`'s slot that `target` gets in operation `number`: short, long, interleaved, none.
fn pieces(source: u32, target: u32, number: u64, world: u32) -> Vec<Piece> {
    let (s, t, w) = (u64::from(source), u64::from(target), u64::from(world));
    match number % 4 {
        0 => vec![Piece { offset: t * 16, width: 16, stride: 16 * w, rows: 50 + s }],
        1 if (s + t) % 2 == 1 => vec![],
        1 => vec![Piece::run(t * 100, 100), Piece::run(0, 0), Piece::run(3, 9000 + t)],
        2 => vec![Piece::run(t, SLOT_BYTES - w - s)],
        _ => vec![
            Piece { offset: 5, width: 3000, stride: 3100, rows: 20 },
            Piece { offset: 1, width: 1, stride: 2, rows: 1000 },
        ],
    }
}

fn all_to_all(ranks: Ranks) {
    on_each(&ranks, |rank| {
        let (me, world) = (rank.rank(), rank.world_size());
        for number in 0..8 {
            let sends = (0..world).map(|t| pieces(me, t, number, world)).collect();
            let total = |p: Vec<Piece>| p.iter().map(Piece::bytes).sum();
            let receives = (0..world).map(|s| total(pieces(s, me, number, world))).collect();
            start(rank, number, Kind::AllToAll { sends, receives });
            for arrival in collect(rank) {
                assert_eq!(arrival.operation, number);
                check(&arrival, &pieces(arrival.source, me, number, world));
            }
        }
        finish(rank);
    });
}

/// A rank may run ahead as far as its slots reach; sources arrive in the order of operations, whoever is slow.
fn many_in_flight(ranks: Ranks) {
    const OPERATIONS: u64 = 700;
    on_each(&ranks, |rank| {
        let (me, world) = (rank.rank(), rank.world_size());
        let size = |r: u32, number: u64| (u64::from(r) * 977 + number * 13) % 5000;
        let (mut started, mut arrived) = (0, vec![0; world as usize]);
        let mut held = Vec::new();
        let deadline = Instant::now() + 3 * PATIENCE;
        while started < OPERATIONS
            || arrived.iter().enumerate().any(|(r, a)| r as u32 != me && *a < OPERATIONS)
        {
            assert!(Instant::now() < deadline, "stuck at {started} started, {arrived:?} arrived");
            while started < OPERATIONS && rank.has_room() {
                let Some(mut data) = rank.lease().unwrap() else { break };
                for (i, byte) in data.bytes_mut()[..5000].iter_mut().enumerate() {
                    *byte = mark(me, started, i as u64);
                }
                let bytes = (0..world).map(|r| size(r, started)).collect();
                rank.start(Operation { kind: Kind::AllGather { bytes }, data: Some(data) })
                    .unwrap();
                started += 1;
            }
            let news = rank.arrivals().unwrap();
            let nothing = news.is_empty();
            for arrival in news {
                let source = arrival.source as usize;
                assert_eq!(arrival.operation, arrived[source]);
                arrived[source] += 1;
                check(&arrival, &piece(size(arrival.source, arrival.operation)));
                held.push(arrival);
            }
            // one rank is slower in giving back than the others
            if nothing || me == 0 || held.len() > 2 {
                held.clear();
            }
            if nothing {
                rank.wait(Duration::from_millis(5));
            }
        }
        drop(held);
        finish(rank);
    });
}

/// Arrivals of one rank that another may hold at a time, at least.
const HELD: u64 = 2;

fn slots_come_back_when_arrivals_are_dropped(ranks: Ranks) {
    let gather = |number| {
        for rank in &ranks {
            start(&**rank, number, Kind::AllGather { bytes: vec![10, 10] });
        }
    };
    let mut held = Vec::new();
    for number in 0..HELD {
        gather(number);
        held.push((collect(&*ranks[0]), collect(&*ranks[1])));
    }
    for (zero, one) in &held {
        check(&zero[0], &piece(10));
        check(&one[0], &piece(10));
    }
    drop(held);
    for number in HELD..20 {
        gather(number);
        assert_eq!((collect(&*ranks[0]).len(), collect(&*ranks[1]).len()), (1, 1));
    }
}

fn operations_that_cannot_be_are_refused(ranks: Ranks) {
    let rank = &ranks[0];
    let refused = |kind| {
        let data = rank.lease().unwrap();
        let error = rank.start(Operation { kind, data }).unwrap_err();
        assert!(matches!(error, CollectiveError::Operation { .. }), "{error}");
    };
    refused(Kind::AllGather { bytes: vec![SLOT_BYTES + 1, 0] });
    refused(Kind::AllGather { bytes: vec![1, 2, 3] });
    refused(Kind::Broadcast { root: 7, bytes: 1 });
    let none = Operation { kind: Kind::AllGather { bytes: vec![1, 0] }, data: None };
    assert!(rank.start(none).is_err(), "bytes without a slot");
    // and nothing of it was started
    start(&**rank, 0, Kind::Barrier);
}

/// Whatever a rank is doing ends at once, and says why; nobody waits for the time limit.
fn abort_ends_everything_of_a_rank(ranks: Ranks) {
    start(&*ranks[1], 0, Kind::AllGather { bytes: vec![100, 100, 100] });
    let aborting = Arc::clone(&ranks[1]);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            aborting.abort("rank 2 was lost");
        });
        let error = loop {
            match ranks[1].arrivals() {
                Err(e) => break e,
                Ok(_) => ranks[1].wait(PATIENCE),
            }
        };
        assert!(error.to_string().contains("rank 2 was lost"), "{error}");
    });
    assert!(begun.elapsed() < PATIENCE / 2);
    assert!(ranks[1].lease().is_err());
    let barrier = Operation { kind: Kind::Barrier, data: None };
    assert!(ranks[1].start(barrier).is_err());
    // the others get on as far as they can without it
    start(&*ranks[0], 0, Kind::AllGather { bytes: vec![100, 100, 100] });
    drop(ranks);
}

/// Rank 0 expects more of rank 1 than that sends.
fn disagreement_is_an_error_not_a_hang(ranks: Ranks) {
    start(&*ranks[0], 0, Kind::AllGather { bytes: vec![0, 200] });
    start(&*ranks[1], 0, Kind::AllGather { bytes: vec![0, 100] });
    let deadline = Instant::now() + PATIENCE;
    let error = loop {
        assert!(Instant::now() < deadline);
        match ranks[0].arrivals() {
            Err(e) => break e,
            Ok(_) => ranks[0].wait(Duration::from_millis(20)),
        }
    };
    assert!(matches!(error, CollectiveError::Disagreement { source_rank: 1, .. }), "{error}");
}
