//! What was asked and what was sent.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::fault::{Action, Operation};
use crate::options::Dialect;

/// A request, as far as it has come.
#[derive(Clone, Debug)]
pub struct Request {
    /// The port on which it came.
    pub dialect: Dialect,
    /// The connection: connections of a server are counted from 1.
    pub connection: u64,
    /// Its method.
    pub method: String,
    /// The path and query as sent.
    pub target: String,
    /// The host it was meant for.
    pub host: String,
    /// What was asked for.
    pub operation: Operation,
    /// The bucket, container or repository.
    pub bucket: String,
    /// The name of the object, decoded.
    pub object: String,
    /// The value of `Range`, or of `x-ms-range`.
    pub range: Option<String>,
    /// The value of `If-Match`.
    pub if_match: Option<String>,
    /// The value of `User-Agent`.
    pub user_agent: Option<String>,
    /// Whether it had an `Authorization` header.
    pub authorization: bool,
    /// The actions of rules.
    pub actions: Vec<Action>,
    /// The status of the response; 0 before there is one.
    pub status: u16,
    /// Bytes of the body that were handed to the connection. Some of them may not have reached a client that went away.
    pub sent_bytes: u64,
    /// When it came, since the server was started.
    pub started: Duration,
    /// When it was over, since the server was started.
    pub ended: Option<Duration>,
}

/// Sums over all requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests.
    pub requests: u64,
    /// Requests that are under way.
    pub concurrent: usize,
    /// The most requests that were under way at the same time.
    pub concurrent_max: usize,
    /// Bytes of bodies.
    pub sent_bytes: u64,
    /// Connections that were accepted.
    pub connections: u64,
    /// Connections that are open.
    pub connections_open: usize,
}

/// The log of a server.
#[derive(Debug)]
pub(crate) struct Log {
    start: Instant,
    requests: Mutex<Vec<Arc<Mutex<Request>>>>,
    /// Bytes by bucket and object.
    sent: Mutex<BTreeMap<(String, String), u64>>,
    count: AtomicU64,
    sent_bytes: AtomicU64,
    concurrent: AtomicUsize,
    concurrent_max: AtomicUsize,
    connections: AtomicU64,
    connections_open: AtomicUsize,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            requests: Mutex::default(),
            sent: Mutex::default(),
            count: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            concurrent: AtomicUsize::new(0),
            concurrent_max: AtomicUsize::new(0),
            connections: AtomicU64::new(0),
            connections_open: AtomicUsize::new(0),
        }
    }

    /// The number of a new connection.
    pub(crate) fn connected(&self) -> u64 {
        self.connections_open.fetch_add(1, Relaxed);
        self.connections.fetch_add(1, Relaxed) + 1
    }

    pub(crate) fn disconnected(&self) {
        self.connections_open.fetch_sub(1, Relaxed);
    }

    /// Enters a request; it is under way until the entry is dropped.
    pub(crate) fn enter(self: &Arc<Self>, mut request: Request) -> Entry {
        request.started = self.start.elapsed();
        let request = Arc::new(Mutex::new(request));
        lock(&self.requests).push(Arc::clone(&request));
        self.count.fetch_add(1, Relaxed);
        let concurrent = self.concurrent.fetch_add(1, Relaxed) + 1;
        self.concurrent_max.fetch_max(concurrent, Relaxed);
        Entry { log: Arc::clone(self), request, sent_bytes: 0 }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        lock(&self.requests).iter().map(|request| lock(request).clone()).collect()
    }

    pub(crate) fn clear(&self) {
        lock(&self.requests).clear();
        lock(&self.sent).clear();
        self.count.store(0, Relaxed);
        self.sent_bytes.store(0, Relaxed);
        self.concurrent_max.store(self.concurrent.load(Relaxed), Relaxed);
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters {
            requests: self.count.load(Relaxed),
            concurrent: self.concurrent.load(Relaxed),
            concurrent_max: self.concurrent_max.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            connections: self.connections.load(Relaxed),
            connections_open: self.connections_open.load(Relaxed),
        }
    }

    /// The bytes that were sent of the content of an object, by requests that are over.
    pub(crate) fn sent_bytes(&self, bucket: &str, object: &str) -> u64 {
        let key = (bucket.to_owned(), object.to_owned());
        lock(&self.sent).get(&key).copied().unwrap_or(0)
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request that is under way.
#[derive(Debug)]
pub(crate) struct Entry {
    log: Arc<Log>,
    request: Arc<Mutex<Request>>,
    sent_bytes: u64,
}

impl Entry {
    pub(crate) fn update(&self, change: impl FnOnce(&mut Request)) {
        change(&mut lock(&self.request));
    }

    /// Counts bytes of the body.
    pub(crate) fn sent(&mut self, bytes: u64) {
        self.sent_bytes += bytes;
        self.log.sent_bytes.fetch_add(bytes, Relaxed);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut request = lock(&self.request);
        request.sent_bytes = self.sent_bytes;
        request.ended = Some(self.log.start.elapsed());
        if request.operation == Operation::Get && matches!(request.status, 200 | 206) {
            let key = (request.bucket.clone(), request.object.clone());
            *lock(&self.log.sent).entry(key).or_default() += self.sent_bytes;
        }
        self.log.concurrent.fetch_sub(1, Relaxed);
    }
}
