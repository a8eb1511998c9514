use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::net::TcpListener;

use super::*;

const TIMING: Timing =
    Timing { beat_every: Duration::from_millis(50), silent_after: Duration::from_millis(600) };

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

/// The application's only thread blocks three times as long as silence is borne; the other side hears beats all the while.
#[tokio::test(flavor = "current_thread")]
async fn beats_go_on_while_the_application_is_blocked() {
    let (ours, theirs) = pair().await;
    let (link, mut incoming) = spawn::<String, String>(ours, Beat::default, TIMING).unwrap();
    let beats = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&beats);
    // the coordinator, on a thread of its own as well: this runtime is about to be blocked
    let (to_rank, queue) = mpsc::channel::<String>(8);
    let theirs = theirs.into_std().unwrap();
    let coordinator = thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let stream = TcpStream::from_std(theirs).unwrap();
            let on_beat = move |_| {
                counter.fetch_add(1, Ordering::Relaxed);
            };
            session::run(stream, queue, |_: String| Ok(()), Beat::default, on_beat, TIMING).await
        })
    });
    thread::sleep(TIMING.silent_after * 3);
    assert!(beats.load(Ordering::Relaxed) > 10);
    assert!(!coordinator.is_finished());

    to_rank.send("still there?".to_owned()).await.unwrap();
    assert_eq!(incoming.recv().await.unwrap(), "still there?");
    assert_eq!(link.end().await.unwrap(), Ended::ByeSent);
    assert_eq!(coordinator.join().unwrap().unwrap(), Ended::ByeReceived);
}

/// Dropping the handle is a goodbye; what was queued arrives before.
#[tokio::test]
async fn dropping_the_handle_ends_the_session_and_loses_nothing() {
    let (ours, theirs) = pair().await;
    let (link, _incoming) = spawn::<u32, u32>(ours, Beat::default, TIMING).unwrap();
    for i in 0..40 {
        link.send(i).await.unwrap();
    }
    drop(link);
    let (_sender, queue) = mpsc::channel::<u32>(1);
    let mut heard = Vec::new();
    let take = |i: u32| {
        heard.push(i);
        Ok(())
    };
    let ended = session::run(theirs, queue, take, Beat::default, |_| {}, TIMING).await;
    assert_eq!(ended.unwrap(), Ended::ByeReceived);
    assert_eq!(heard, (0..40).collect::<Vec<u32>>());
}

/// The other side never reads: the handle's end comes nevertheless.
#[tokio::test]
async fn a_write_that_is_never_taken_does_not_hold_the_end() {
    let (ours, _theirs) = pair().await;
    let patient = Timing { silent_after: Duration::from_millis(400), ..TIMING };
    let (link, mut incoming) = spawn::<Vec<u8>, u32>(ours, Beat::default, patient).unwrap();
    link.send(vec![0; 12 << 20]).await.unwrap();
    let start = Instant::now();
    assert!(matches!(
        link.end().await,
        Err(LinkError::Silent { .. } | LinkError::Unanswered { .. })
    ));
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(incoming.recv().await, None);
}

#[tokio::test]
async fn the_handle_tells_that_the_other_side_is_gone() {
    let (ours, theirs) = pair().await;
    let (link, mut incoming) = spawn::<u32, u32>(ours, Beat::default, TIMING).unwrap();
    drop(theirs);
    assert_eq!(incoming.recv().await, None);
    assert_eq!(link.send(1).await, Err(Gone));
    assert!(matches!(link.end().await, Err(LinkError::Closed { .. })));
}

#[tokio::test]
async fn a_panic_in_the_heartbeat_is_an_end_with_a_name() {
    let (ours, _theirs) = pair().await;
    let beat = || -> Beat { panic!("counters are gone") };
    let (link, mut incoming) = spawn::<u32, u32>(ours, beat, TIMING).unwrap();
    assert_eq!(incoming.recv().await, None);
    assert!(matches!(link.end().await, Err(LinkError::Panicked)));
}

/// An application that takes nothing loses its link rather than its memory.
#[tokio::test]
async fn messages_that_nobody_takes_are_bounded() {
    let (ours, theirs) = pair().await;
    let (link, _incoming) = spawn::<u32, u32>(ours, Beat::default, TIMING).unwrap();
    let (sender, queue) = mpsc::channel::<u32>(8);
    let talk = async {
        for i in 0..2 * INCOMING_MAX as u32 {
            if sender.send(i).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = session::run(theirs, queue, |_: u32| Ok(()), Beat::default, |_| {}, TIMING) => {
            assert!(matches!(ended, Err(LinkError::Closed { .. })), "{ended:?}");
        }
        () = talk => {}
    }
    assert!(matches!(link.end().await, Err(LinkError::Overrun { waiting: INCOMING_MAX })));
}
