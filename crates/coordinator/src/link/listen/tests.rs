use std::{
    io::Write,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinHandle,
    time::timeout,
};

use super::*;
use crate::{
    link::{
        connect::connect,
        handshake::{Credentials, Purpose},
        session::{self, Beat, Ended, Timing},
    },
    secret::Secret,
};

const LOCAL: &str = "127.0.0.1:0";

fn secret(text: &str) -> Option<Secret> {
    Some(Secret::from_text(text))
}

fn credentials(rank: u32) -> Credentials {
    Credentials::new(secret("abc"), rank, 4, 7, Purpose::Control)
}

/// A running listener for ranks of [`credentials`].
async fn listening(terms: Terms) -> (SocketAddr, mpsc::Receiver<Admitted>, JoinHandle<()>) {
    let listener = Listener::bind(&[LOCAL.parse().unwrap()], terms).await.unwrap();
    let address = listener.address();
    let (sender, admitted) = mpsc::channel(4);
    (address, admitted, tokio::spawn(listener.run(sender)))
}

fn terms() -> Terms {
    Terms::new(secret("abc"), 4, 7)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// What is logged while the guard lives, on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn capture(level: tracing::Level) -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap()
    }

    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.bytes().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bytes().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Waits until the other side closes.
async fn until_closed(stream: &mut TcpStream) {
    let mut sink = [0; 256];
    while let Ok(1..) = stream.read(&mut sink).await {}
}

#[tokio::test]
async fn the_first_free_address_is_taken() {
    let taken = Listener::bind(&[LOCAL.parse().unwrap()], terms()).await.unwrap();
    let candidates = [taken.address(), LOCAL.parse().unwrap()];
    let second = Listener::bind(&candidates, terms()).await.unwrap();
    assert_ne!(second.address(), taken.address());

    let both = [taken.address(), second.address()];
    let found = Listener::bind(&both, terms()).await.unwrap_err().to_string();
    assert!(both.iter().all(|a| found.contains(&a.to_string())), "{found}");
    assert!(found.contains("in use"), "{found}");
    let none = Listener::bind(&[], terms()).await.unwrap_err().to_string();
    assert!(none.ends_with("none was given"), "{none}");
}

#[tokio::test]
async fn without_a_secret_only_this_host_is_listened_to() {
    let open = Terms { secret: None, ..terms() };
    let candidates = [LOCAL.parse().unwrap(), "0.0.0.0:0".parse().unwrap()];
    let found = Listener::bind(&candidates, open.clone()).await.unwrap_err().to_string();
    assert!(found.contains("0.0.0.0:0") && found.contains("LONGSHORE_SECRET"), "{found}");
    Listener::bind(&["[::ffff:127.0.0.1]:0".parse().unwrap()], open).await.unwrap();
}

#[tokio::test]
async fn ranks_join_over_loopback() {
    let (address, mut admitted, _task) = listening(terms()).await;
    for (rank, purpose) in [(0, Purpose::Control), (3, Purpose::Data)] {
        let credentials = Credentials { purpose, ..credentials(rank) };
        let connected = connect(&[address], &credentials, soon()).await.unwrap();
        assert_eq!(connected.address, address);
        let stream = connected.stream;
        let ready = admitted.recv().await.unwrap();
        for stream in [&stream, &ready.stream] {
            let limit = socket2::SockRef::from(stream).tcp_user_timeout().unwrap();
            assert_eq!(limit, Some(Duration::from_secs(10)));
        }
        assert_eq!((ready.joined.rank, ready.joined.purpose), (rank, purpose));
        assert_eq!(ready.address, stream.local_addr().unwrap());
    }
}

#[tokio::test]
async fn a_data_connection_goes_on_as_a_plain_blocking_stream() {
    use std::io::{Read, Write};
    let (address, mut admitted, _task) = listening(terms()).await;
    let credentials = Credentials { purpose: Purpose::Data, ..credentials(1) };
    let ours = connect(&[address], &credentials, soon()).await.unwrap().stream;
    let ready = admitted.recv().await.unwrap();
    let mut theirs = tcp::into_blocking(ready.stream).unwrap();
    let mut ours = tcp::into_blocking(ours).unwrap();
    let socket = socket2::SockRef::from(&ours);
    assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
    assert_eq!(socket.tcp_user_timeout().unwrap(), None);
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        ours.read_exact(&mut bytes).unwrap();
        bytes
    });
    theirs.write_all(&vec![7; 1 << 20]).unwrap();
    assert!(reader.join().unwrap().iter().all(|&b| b == 7));
}

#[tokio::test]
async fn without_a_secret_the_same_user_joins() {
    let (address, mut admitted, _task) = listening(Terms { secret: None, ..terms() }).await;
    let credentials = Credentials { secret: None, ..credentials(2) };
    let joined = connect(&[address], &credentials, soon()).await;
    joined.unwrap();
    assert_eq!(admitted.recv().await.unwrap().joined.rank, 2);
}

/// Only root can take on another user, and only to open a socket; elsewhere there is nothing to see.
#[tokio::test]
async fn without_a_secret_another_user_does_not_join() {
    if same_user::current_user() != 0 {
        eprintln!("ignored: only root can be another user");
        return;
    }
    let (log, _guard) = Log::capture(tracing::Level::WARN);
    let (address, mut admitted, _task) = listening(Terms { secret: None, ..terms() }).await;
    let stream = tokio::task::spawn_blocking(move || {
        // SAFETY: setfsuid takes a number and changes the user of this thread alone; each call returns the one before
        let become_user = |user: libc::c_long| unsafe { libc::syscall(libc::SYS_setfsuid, user) };
        become_user(12345);
        let stream = std::net::TcpStream::connect(address).unwrap();
        (become_user(0) == 12345).then_some(stream)
    });
    let Some(stream) = stream.await.unwrap() else {
        eprintln!("ignored: this root may not be another user");
        return;
    };
    stream.set_nonblocking(true).unwrap();
    let mut stream = TcpStream::from_std(stream).unwrap();
    let mut heard = Vec::new();
    let _ = stream.read_to_end(&mut heard).await;
    assert!(heard.is_empty(), "not even a greeting");
    assert!(admitted.try_recv().is_err());
    let lines = log.lines();
    assert!(lines.len() == 1 && lines[0].contains("belongs to user 12345"), "{lines:?}");
}

/// One of each kind of stranger, twice, while a rank has its session: one line for each kind, and the session goes on.
#[tokio::test]
async fn strangers_disturb_nobody_and_are_logged_once() {
    let (log, _guard) = Log::capture(tracing::Level::WARN);
    let quick = Terms { within: Duration::from_millis(300), ..terms() };
    let (address, mut admitted, _task) = listening(quick).await;
    let ours = connect(&[address], &credentials(0), soon()).await.unwrap().stream;
    let theirs = admitted.recv().await.unwrap().stream;
    let (to_rank, queue) = mpsc::channel::<u32>(8);
    let (to_coordinator, other_queue) = mpsc::channel::<u32>(8);
    let timing = Timing::default();
    let nothing = |_: u32| Ok(());
    let rank = session::run(ours, queue, nothing, Beat::default, |_| {}, timing);
    let coordinator = session::run(theirs, other_queue, nothing, Beat::default, |_| {}, timing);

    let strangers = async {
        for _ in 0..2 {
            let wrong = [
                Credentials { secret: secret("abd"), ..credentials(1) },
                Credentials { attempt: 6, ..credentials(1) },
                Credentials { world_size: 5, ..credentials(1) },
                credentials(4),
            ];
            for credentials in wrong {
                let deadline = Instant::now() + Duration::from_millis(40);
                connect(&[address], &credentials, deadline).await.unwrap_err();
            }
            for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[2, 0, 0, 0, 9, 9], b""] {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(said).await.unwrap();
                // the last one says nothing, and is not the first to close
                until_closed(&mut stream).await;
            }
            TcpStream::connect(address).await.unwrap().shutdown().await.unwrap();
        }
        // the last stranger may still be on its way to the log
        while log.lines().len() < 8 {
            sleep(Duration::from_millis(5)).await;
        }
        drop(to_rank);
    };
    let (rank, coordinator, ()) = tokio::join!(rank, coordinator, strangers);
    assert_eq!(rank.unwrap(), Ended::ByeSent);
    assert_eq!(coordinator.unwrap(), Ended::ByeReceived);
    drop(to_coordinator);
    assert!(admitted.try_recv().is_err());

    let lines = log.lines();
    for why in [
        "its proof is wrong",
        "an old generation: the joiner is of attempt 6, the group of attempt 7",
        "the joiner's group has 5 ranks, this one has 4",
        "there is no rank 4 among 4",
        "a frame of 542393671 bytes, 1024 are allowed",
        "the message is of protocol version 9",
        "it did not join within 300ms",
        "it closed the connection before it had joined",
    ] {
        let found = lines.iter().filter(|l| l.contains(why)).count();
        assert_eq!(found, 1, "{why}: {lines:#?}");
    }
    assert_eq!(lines.len(), 8, "{lines:#?}");
    assert!(lines.iter().all(|l| l.contains("WARN") && l.contains("from 127.0.0.1:")));
}

#[tokio::test]
async fn a_hundred_silent_strangers_keep_no_rank_out() {
    let (address, mut admitted, _task) = listening(terms()).await;
    let mut strangers = Vec::new();
    for _ in 0..100 {
        strangers.push(TcpStream::connect(address).await.unwrap());
    }
    let start = Instant::now();
    connect(&[address], &credentials(1), soon()).await.unwrap();
    assert_eq!(admitted.recv().await.unwrap().joined.rank, 1);
    // far below the five seconds that each of them is allowed
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

/// More ranks at once than are heard at a time, and than the channel holds.
#[tokio::test]
async fn a_large_group_joins_at_once() {
    let ranks = 3 * UNPROVEN_MAX as u32;
    let (log, _guard) = Log::capture(tracing::Level::WARN);
    let (address, mut admitted, _task) = listening(Terms { world_size: ranks, ..terms() }).await;
    let mut joining = JoinSet::new();
    for rank in 0..ranks {
        let credentials = Credentials { world_size: ranks, ..credentials(rank) };
        joining.spawn(async move { connect(&[address], &credentials, soon()).await.unwrap() });
    }
    let mut seen = vec![false; ranks as usize];
    while seen.contains(&false) {
        let ready = timeout(Duration::from_secs(20), admitted.recv()).await.unwrap().unwrap();
        assert!(!std::mem::replace(&mut seen[ready.joined.rank as usize], true));
    }
    joining.join_all().await;
    assert!(log.lines().is_empty(), "{:?}", log.lines());
}

#[tokio::test]
async fn it_ends_when_nobody_takes_any_more() {
    let (address, admitted, task) = listening(terms()).await;
    connect(&[address], &credentials(1), soon()).await.unwrap();
    drop(admitted);
    timeout(Duration::from_secs(5), task).await.unwrap().unwrap();
    TcpStream::connect(address).await.unwrap_err();
}

/// 1 KiB of anything, to the open port.
#[test]
fn garbage_over_tcp_changes_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (address, mut admitted, _task) = runtime.block_on(listening(terms()));
    let strategy = proptest::collection::vec(proptest::num::u8::ANY, 0..1024);
    proptest::proptest!(proptest::test_runner::Config::with_cases(64), |(bytes in strategy)| {
        runtime.block_on(async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // it may be closed before all of it is written
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            until_closed(&mut stream).await;
        });
    });
    assert!(admitted.try_recv().is_err());
    runtime.block_on(async {
        connect(&[address], &credentials(1), soon()).await.unwrap();
        assert_eq!(admitted.recv().await.unwrap().joined.rank, 1);
    });
}
