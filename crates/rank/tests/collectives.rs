//! One conformance suite over every way in which ranks are joined.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, unreachable_pub, reason = "test code")]

use std::{
    net::{TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use longshore_rank::collective::{
    Collective, CollectiveError, Kind, Operation,
    host::{HostCollective, Route},
    segment::{Form, Segment},
};

mod conformance;

use conformance::{Ranks, SLOT_BYTES, SLOTS};

/// Joins ranks; `host(rank)` says which host each of them is on.
fn group(world_size: u32, host: impl Fn(u32) -> u32) -> Ranks {
    let form = Form { world_size, slots: SLOTS, slot_bytes: SLOT_BYTES };
    let segments: Vec<_> =
        (0..world_size).map(|r| Segment::create(form, [r as u8; 32]).unwrap()).collect();
    let mut routes: Vec<Vec<Option<Route>>> =
        (0..world_size).map(|_| (0..world_size).map(|_| None).collect()).collect();
    for a in 0..world_size {
        for b in 0..a {
            let ((ra, rb), (ia, ib)) = match host(a) == host(b) {
                true => {
                    let open = |r: u32| Segment::open(&segments[r as usize].handle()).unwrap();
                    ((Route::SharedMemory(open(b)), Route::SharedMemory(open(a))), (a, b))
                }
                false => {
                    let (x, y) = connected();
                    ((Route::Tcp(x), Route::Tcp(y)), (a, b))
                }
            };
            routes[ia as usize][ib as usize] = Some(ra);
            routes[ib as usize][ia as usize] = Some(rb);
        }
        routes[a as usize][a as usize] = Some(Route::Here);
    }
    let ranks = routes.into_iter().zip(&segments).enumerate().map(|(rank, (routes, segment))| {
        let routes = routes.into_iter().map(Option::unwrap).collect();
        let joined = HostCollective::new(rank as u32, Arc::clone(segment), routes, 2).unwrap();
        Arc::new(joined) as Arc<dyn Collective>
    });
    ranks.collect()
}

fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

#[test]
fn shared_memory_conforms() {
    conformance::run(|world_size| group(world_size, |_| 0));
}

#[test]
fn tcp_conforms() {
    conformance::run(|world_size| group(world_size, |rank| rank));
}

#[test]
fn two_hosts_with_several_ranks_each_conform() {
    conformance::run(|world_size| group(world_size, |rank| rank / 2));
}

/// A rank whose process is gone closes its connections, and those who wait for it are told.
#[test]
fn a_connection_that_ends_is_an_error_with_the_rank_named() {
    let mut ranks = group(2, |rank| rank);
    drop(ranks.pop());
    ranks[0].start(Operation { kind: Kind::Barrier, data: None }).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let error = loop {
        assert!(Instant::now() < deadline);
        match ranks[0].arrivals() {
            Err(e) => break e,
            Ok(_) => ranks[0].wait(Duration::from_millis(100)),
        }
    };
    assert!(matches!(error, CollectiveError::Connection { with: 1, .. }), "{error}");
}

/// What was sent before a rank went away still arrives.
#[test]
fn bytes_sent_before_the_end_arrive() {
    for hosts in [0, 1] {
        let mut ranks = group(2, |rank| rank * hosts);
        let mut data = ranks[1].lease().unwrap().unwrap();
        data.bytes_mut().fill(3);
        let kind = || Kind::AllGather { bytes: vec![0, SLOT_BYTES] };
        ranks[1].start(Operation { kind: kind(), data: Some(data) }).unwrap();
        ranks[0].start(Operation { kind: kind(), data: None }).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while hosts == 1 && !ranks[1].is_idle() {
            assert!(Instant::now() < deadline);
            drop(ranks[1].arrivals().unwrap());
            ranks[1].wait(Duration::from_millis(10));
        }
        drop(ranks.pop());
        let arrival = loop {
            assert!(Instant::now() < deadline);
            if let Some(arrival) = ranks[0].arrivals().unwrap().pop() {
                break arrival;
            }
            ranks[0].wait(Duration::from_millis(10));
        };
        // in shared memory the pages stay as long as anyone maps them
        let bytes = arrival.bytes.host().unwrap();
        assert_eq!(bytes.len() as u64, SLOT_BYTES);
        assert!(hosts == 0 || bytes.iter().all(|&b| b == 3));
    }
}

/// Threads of connections end with their group. No other test has as many ranks, so the names are this one's.
#[test]
fn no_thread_is_left() {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
        names.filter(|name| name.trim_end().ends_with("-rank9")).count()
    };
    let ranks = group(10, |rank| rank);
    let deadline = Instant::now() + Duration::from_secs(10);
    // a thread takes its name when it first runs
    while threads() != 18 {
        assert!(Instant::now() < deadline, "{} threads of 18", threads());
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(ranks);
    while threads() > 0 {
        assert!(Instant::now() < deadline, "{} threads are left", threads());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A segment says itself for how many ranks it is, and where its words lie follows from that.
#[test]
fn memory_of_another_group_is_refused_when_the_ranks_are_joined() {
    let form = |world_size, slot_bytes| Form { world_size, slots: SLOTS, slot_bytes };
    let own = || Segment::create(form(3, SLOT_BYTES), [1; 32]).unwrap();
    for other in [form(2, SLOT_BYTES), form(0, SLOT_BYTES), form(3, SLOT_BYTES / 2)] {
        let other = Segment::create(other, [2; 32]).unwrap();
        let third = Segment::create(form(3, SLOT_BYTES), [3; 32]).unwrap();
        let routes = vec![Route::Here, Route::SharedMemory(third), Route::SharedMemory(other)];
        let refused = HostCollective::new(0, own(), routes, 1).unwrap_err();
        assert!(matches!(refused, CollectiveError::Connection { with: 2, .. }), "{refused}");
    }
}
