use std::time::Duration;

use tokio::{
    io::AsyncWriteExt,
    net::TcpListener,
    sync::mpsc,
    time::{Instant, sleep},
};

use super::*;
use crate::{
    link::{
        handshake::{Purpose, Terms},
        listen::Listener,
    },
    secret::Secret,
};

fn credentials(attempt: u32) -> Credentials {
    let secret = Some(Secret::from_text("abc"));
    let within = Duration::from_millis(500);
    Credentials { within, ..Credentials::new(secret, 1, 4, attempt, Purpose::Control) }
}

fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}

/// A free port of this host; nobody listens there.
async fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A coordinator at `address`, `after` a while.
fn coordinator(address: SocketAddr, secret: &str, attempt: u32, after: Duration) {
    let terms = Terms::new(Some(Secret::from_text(secret)), 4, attempt);
    tokio::spawn(async move {
        sleep(after).await;
        let listener = Listener::bind(&[address], terms).await.unwrap();
        let (sender, mut admitted) = mpsc::channel(8);
        let taking = async move {
            let mut kept = Vec::new();
            while let Some(ready) = admitted.recv().await {
                kept.push(ready);
            }
        };
        tokio::join!(listener.run(sender), taking);
    });
}

#[tokio::test]
async fn a_coordinator_that_starts_later_is_waited_for() {
    let address = free().await;
    coordinator(address, "abc", 7, Duration::from_millis(400));
    let limit = within(Duration::from_secs(10));
    assert_eq!(connect(&[address], &credentials(7), limit).await.unwrap().address, address);
}

/// A port that says nothing, one that says something else, one where nobody listens, another load's coordinator, and ours.
#[tokio::test]
async fn the_right_one_is_found_among_others() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [
        silent.local_addr().unwrap(),
        other.local_addr().unwrap(),
        free().await,
        free().await,
        free().await,
    ];
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await;
        }
    });
    coordinator(addresses[3], "abd", 7, Duration::ZERO);
    let limit = within(Duration::from_millis(1500));
    let found = connect(&addresses[..4], &credentials(7), limit).await.unwrap_err().to_string();
    for (address, answer) in [
        (addresses[0], "not a longshore coordinator: it said nothing"),
        (addresses[1], "not a longshore coordinator: it says something else"),
        (addresses[2], "Connection refused"),
        (addresses[3], "it closed the connection on our proof"),
    ] {
        assert!(found.contains(&format!("{address}: {answer}")), "{found}");
    }

    coordinator(addresses[4], "abc", 7, Duration::ZERO);
    let limit = within(Duration::from_secs(10));
    assert_eq!(connect(&addresses, &credentials(7), limit).await.unwrap().address, addresses[4]);
}

#[tokio::test]
async fn a_refusal_is_final() {
    let address = free().await;
    coordinator(address, "abc", 8, Duration::ZERO);
    let start = Instant::now();
    let found = connect(&[address], &credentials(7), within(Duration::from_secs(60))).await;
    let why = Mismatch::Attempt { joiner: 7, group: 8 };
    assert!(matches!(found, Err(ConnectError::Refused { source, .. }) if source == why));
    assert!(start.elapsed() < Duration::from_secs(10));
}

/// The coordinator from before the restart still holds the first port; its successor has the second.
#[tokio::test]
async fn a_coordinator_from_before_a_restart_is_passed_over() {
    let (old, new) = (free().await, free().await);
    coordinator(old, "abc", 6, Duration::ZERO);
    coordinator(new, "abc", 7, Duration::from_millis(200));
    let limit = within(Duration::from_secs(10));
    assert_eq!(connect(&[old, new], &credentials(7), limit).await.unwrap().address, new);
}

/// A replacement is there before its predecessor is known to be lost; whoever claims the place of one that stays is turned away.
#[tokio::test]
async fn a_predecessor_that_is_about_to_be_lost_is_waited_for() {
    let address = free().await;
    let terms = Terms::new(Some(Secret::from_text("abc")), 4, 7);
    let listener = Listener::bind(&[address], terms).await.unwrap();
    let admissions = listener.admissions();
    let (sender, mut admitted) = mpsc::channel(8);
    tokio::spawn(listener.run(sender));
    let first = connect(&[address], &credentials(7), within(Duration::from_secs(10))).await;
    let first = (first.unwrap(), admitted.recv().await.unwrap());

    let limit = within(Duration::from_millis(1500));
    let refused = connect(&[address], &credentials(7), limit).await.unwrap_err().to_string();
    assert!(refused.contains("rank 1 has joined already"), "{refused}");

    let lost = async {
        sleep(Duration::from_millis(200)).await;
        admissions.forget(1);
    };
    let (addresses, credentials) = ([address], credentials(7));
    let second = connect(&addresses, &credentials, within(Duration::from_secs(10)));
    let (second, ()) = tokio::join!(second, lost);
    let joined = admitted.recv().await.unwrap().joined;
    assert_eq!((joined.rank, joined.process), (1, ProcessIdentity::own().ok()));
    assert_eq!(second.unwrap().process, ProcessIdentity::own().ok());
    drop(first);
}

#[tokio::test]
async fn without_a_secret_no_other_host_is_asked() {
    let credentials = Credentials { secret: None, ..credentials(7) };
    let distant = "192.0.2.1:1".parse().unwrap();
    let found = connect(&[distant], &credentials, within(Duration::from_secs(60))).await;
    let found = found.unwrap_err().to_string();
    assert!(found.contains("192.0.2.1:1") && found.contains("LONGSHORE_SECRET"), "{found}");
}

#[tokio::test]
async fn no_address_is_an_answer_too() {
    let found = connect(&[], &credentials(7), within(Duration::from_secs(60))).await.unwrap_err();
    assert!(found.to_string().ends_with("no address was given"));
}

/// The kernel connects a socket to itself where it is bound to the very address it connects to.
#[tokio::test]
async fn a_connection_to_oneself_is_none() {
    let address = free().await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    let stream = socket.connect(address).await.unwrap();
    assert_eq!(stream.local_addr().unwrap(), stream.peer_addr().unwrap());
    let found = hang_up_on_myself(&stream).unwrap();
    drop(stream);
    assert_eq!(found.kind(), io::ErrorKind::ConnectionRefused);
    TcpListener::bind(address).await.unwrap();
}
