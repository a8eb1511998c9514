use std::{
    cell::{Cell, RefCell},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::sleep,
};

use super::*;

/// A session that collects what it hears.
struct Side {
    stream: DuplexStream,
    outgoing: mpsc::Receiver<String>,
    heard: RefCell<Vec<String>>,
    beats: Cell<u32>,
}

impl Side {
    fn new(stream: DuplexStream) -> (Self, mpsc::Sender<String>) {
        let (sender, outgoing) = mpsc::channel(OUTGOING_MAX);
        (Self { stream, outgoing, heard: RefCell::default(), beats: Cell::new(0) }, sender)
    }

    async fn run(self) -> (Result<Ended, LinkError>, Vec<String>, u32) {
        let Self { stream, outgoing, heard, beats } = self;
        let take = |message| {
            heard.borrow_mut().push(message);
            Ok(())
        };
        let on_beat = |_| beats.set(beats.get() + 1);
        let ended = run(stream, outgoing, take, Beat::default, on_beat, Timing::default()).await;
        (ended, heard.into_inner(), beats.get())
    }
}

/// One session over `stream` with nothing to say.
async fn listen_only(stream: DuplexStream) -> Result<Ended, LinkError> {
    let (side, _sender) = Side::new(stream);
    side.run().await.0
}

fn frame<M: Serialize>(packet: &Packet<M>) -> Vec<u8> {
    let body = wire::encode(packet).unwrap();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// Everything queued before the goodbye arrives, though the pipe is smaller than a message, in both directions.
#[tokio::test(start_paused = true)]
async fn a_graceful_end_loses_nothing() {
    let (a, b) = duplex(16);
    let ((a, from_a), (b, from_b)) = (Side::new(a), Side::new(b));
    for i in 0..OUTGOING_MAX {
        from_a.send(format!("message {i} of a")).await.unwrap();
    }
    from_b.send("from b".to_owned()).await.unwrap();
    drop(from_a);
    let (a, b) = tokio::join!(a.run(), b.run());
    assert_eq!(a.0.unwrap(), Ended::ByeSent);
    assert_eq!(b.0.unwrap(), Ended::ByeReceived);
    assert_eq!(b.1.len(), OUTGOING_MAX);
    assert_eq!(b.1[63], "message 63 of a");
    assert_eq!(a.1, ["from b"]);
    drop(from_b);
}

#[tokio::test(start_paused = true)]
async fn two_goodbyes_at_once_end_both_sides() {
    let (a, b) = duplex(1024);
    let ((a, from_a), (b, from_b)) = (Side::new(a), Side::new(b));
    drop((from_a, from_b));
    let (a, b) = tokio::join!(a.run(), b.run());
    a.0.unwrap();
    b.0.unwrap();
}

/// A coordinator runs its sessions as tasks.
#[tokio::test(start_paused = true)]
async fn a_session_can_be_a_task() {
    let (a, b) = duplex(1024);
    let (sender, outgoing) = mpsc::channel::<String>(1);
    let (take, beats) = (|_: String| Ok(()), |_| {});
    let task = tokio::spawn(run(a, outgoing, take, Beat::default, beats, Timing::default()));
    drop(sender);
    assert_eq!(listen_only(b).await.unwrap(), Ended::ByeReceived);
    assert_eq!(task.await.unwrap().unwrap(), Ended::ByeSent);
}

/// Two idle sides keep each other alive for as long as anyone wants.
#[tokio::test(start_paused = true)]
async fn heartbeats_keep_an_idle_link_alive() {
    let (a, b) = duplex(1024);
    let ((a, from_a), (b, from_b)) = (Side::new(a), Side::new(b));
    let later = async {
        sleep(Duration::from_secs(60)).await;
        drop(from_a);
    };
    let (a, b, ()) = tokio::join!(a.run(), b.run(), later);
    assert_eq!(a.0.unwrap(), Ended::ByeSent);
    assert!((120..=122).contains(&a.2), "{} beats in a minute", a.2);
    b.0.unwrap();
    drop(from_b);
}

#[tokio::test(start_paused = true)]
async fn silence_is_found_in_time() {
    let (a, _b) = duplex(1 << 20);
    let start = Instant::now();
    let found = listen_only(a).await.unwrap_err();
    assert!(matches!(found, LinkError::Silent { after } if after == Duration::from_secs(5)));
    assert_eq!(start.elapsed().as_secs(), 5);
}

/// Time runs from the last byte, not from the last whole frame: a long message on a slow line is no silence.
#[tokio::test(start_paused = true)]
async fn a_long_message_on_a_slow_line_is_life() {
    let (a, mut b) = duplex(1 << 20);
    let message = frame(&Packet::Message("x".repeat(20)));
    let slowly = async {
        for byte in message {
            sleep(Duration::from_secs(4)).await;
            b.write_all(&[byte]).await.unwrap();
        }
        // open, and silent from here on
        sleep(Duration::from_secs(60)).await;
    };
    let (side, _sender) = Side::new(a);
    let ((ended, heard, _), ()) = tokio::join!(side.run(), slowly);
    assert_eq!(heard, ["x".repeat(20)]);
    assert!(matches!(ended, Err(LinkError::Silent { .. })));
}

/// The other side reads nothing, so our writes block at once, and says nothing: found as early as otherwise.
#[tokio::test(start_paused = true)]
async fn a_blocked_write_hides_no_silence() {
    let (a, _b) = duplex(1);
    let (side, sender) = Side::new(a);
    sender.send("never taken".to_owned()).await.unwrap();
    let start = Instant::now();
    assert!(matches!(side.run().await.0, Err(LinkError::Silent { .. })));
    assert_eq!(start.elapsed().as_secs(), 5);
}

/// The other side reads nothing but speaks: what it says arrives all the same.
#[tokio::test(start_paused = true)]
async fn a_blocked_write_does_not_stop_the_reading() {
    let (a, mut b) = duplex(64);
    let (side, sender) = Side::new(a);
    sender.send("x".repeat(1000)).await.unwrap();
    let speaking = async {
        for i in 0..20 {
            sleep(Duration::from_secs(1)).await;
            b.write_all(&frame(&Packet::Message(i.to_string()))).await.unwrap();
        }
        b.write_all(&frame(&Packet::<String>::Bye)).await.unwrap();
    };
    let ((ended, heard, _), ()) = tokio::join!(side.run(), speaking);
    assert_eq!(ended.unwrap(), Ended::ByeReceived);
    assert_eq!(heard.len(), 20);
}

#[tokio::test(start_paused = true)]
async fn an_end_without_goodbye_is_told_from_one_with() {
    let (a, b) = duplex(1024);
    drop(b);
    assert!(matches!(listen_only(a).await, Err(LinkError::Closed { .. })));

    let (a, mut b) = duplex(1024);
    b.write_all(&frame(&Packet::Message("half"))[..6]).await.unwrap();
    drop(b);
    assert!(matches!(listen_only(a).await, Err(LinkError::Closed { .. })));

    let (a, mut b) = duplex(1024);
    b.write_all(&frame(&Packet::<String>::Bye)).await.unwrap();
    drop(b);
    assert!(matches!(listen_only(a).await, Ok(Ended::ByeReceived)));
}

/// A stream that takes nothing any more still holds what its other side said last.
#[tokio::test(start_paused = true)]
async fn a_goodbye_is_heard_though_writing_failed_first() {
    struct NoWrites(DuplexStream);
    impl AsyncRead for NoWrites {
        fn poll_read(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(context, buffer)
        }
    }
    impl AsyncWrite for NoWrites {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }
    for (last, goodbye) in [(Packet::Bye, true), (Packet::Message("and gone".to_owned()), false)] {
        let (a, mut b) = duplex(1024);
        b.write_all(&frame(&last)).await.unwrap();
        drop(b);
        let (_sender, outgoing) = mpsc::channel::<String>(1);
        let take = |_: String| Ok(());
        let ended =
            run(NoWrites(a), outgoing, take, Beat::default, |_| {}, Timing::default()).await;
        match goodbye {
            true => assert_eq!(ended.unwrap(), Ended::ByeReceived),
            false => assert!(matches!(ended, Err(LinkError::Closed { .. }))),
        }
    }
}

/// One that goes on talking after our goodbye does not hold us.
#[tokio::test(start_paused = true)]
async fn a_goodbye_that_is_not_answered_ends_all_the_same() {
    let (a, mut b) = duplex(1 << 16);
    let (side, sender) = Side::new(a);
    drop(sender);
    let chatter = async {
        loop {
            b.write_all(&frame(&Packet::<String>::Beat(Beat::default()))).await.unwrap();
            sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        (ended, ..) = side.run() => assert!(matches!(ended, Err(LinkError::Unanswered { .. }))),
        () = chatter => {}
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_understood_ends_the_session() {
    let (a, mut b) = duplex(1024);
    b.write_all(&(FRAME_MAX as u32 + 1).to_le_bytes()).await.unwrap();
    let found = listen_only(a).await.unwrap_err();
    assert!(matches!(found, LinkError::Frame(FrameError::Oversize { .. })));

    let (a, mut b) = duplex(1024);
    let mut other = frame(&Packet::<String>::Bye);
    other[4] += 1;
    let newer = other[4];
    b.write_all(&other).await.unwrap();
    let found = listen_only(a).await.unwrap_err();
    assert!(matches!(found, LinkError::Wire(WireError::Version { found }) if found == newer));
}

#[tokio::test(start_paused = true)]
async fn a_message_too_long_is_not_sent() {
    let (a, b) = duplex(1024);
    let ((a, from_a), (b, _from_b)) = (Side::new(a), Side::new(b));
    from_a.send("x".repeat(FRAME_MAX)).await.unwrap();
    let (a, b) = tokio::join!(a.run(), b.run());
    assert!(matches!(a.0, Err(LinkError::Frame(FrameError::Oversize { .. }))));
    assert!(matches!(b.0, Err(LinkError::Closed { .. })) && b.1.is_empty());
}

#[tokio::test(start_paused = true)]
async fn messages_that_nobody_takes_end_the_session() {
    let (a, mut b) = duplex(1024);
    b.write_all(&frame(&Packet::Message("one"))).await.unwrap();
    let (_sender, outgoing) = mpsc::channel::<String>(1);
    let full = |_: String| Err(Overrun { waiting: 7 });
    let ended = run(a, outgoing, full, Beat::default, |_| {}, Timing::default()).await;
    assert!(matches!(ended, Err(LinkError::Overrun { waiting: 7 })));
}

/// Beats carry what the closure says at that moment.
#[tokio::test(start_paused = true)]
async fn a_beat_carries_the_counters() {
    let (a, b) = duplex(1024);
    let done = Arc::new(AtomicUsize::new(0));
    let (sender, outgoing) = mpsc::channel::<String>(1);
    let counter = Arc::clone(&done);
    let beat = move || Beat {
        progress: counter.fetch_add(1, Ordering::Relaxed) as u64,
        phase: 3,
        waiting: true,
        ..Beat::default()
    };
    let (_sender, silent) = mpsc::channel::<String>(1);
    let beats = RefCell::new(Vec::new());
    let later = async {
        sleep(Duration::from_millis(1100)).await;
        drop(sender);
    };
    let nothing = |_: String| Ok(());
    let (a, b, ()) = tokio::join!(
        run(a, outgoing, nothing, beat, |_| {}, Timing::default()),
        run(b, silent, nothing, Beat::default, |b| beats.borrow_mut().push(b), Timing::default()),
        later
    );
    a.unwrap();
    b.unwrap();
    let beats = beats.into_inner();
    assert_eq!(beats.iter().map(|b| b.progress).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(beats.iter().all(|b| b.phase == 3 && b.waiting));
}

proptest! {
    /// Whatever bytes come, the session ends, and not with a message that nobody sent.
    #[test]
    fn garbage_ends_the_session(bytes in prop::collection::vec(any::<u8>(), 0..600), framed: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (a, mut b) = duplex(1 << 16);
            if framed {
                b.write_all(&(bytes.len() as u32).to_le_bytes()).await.unwrap();
            }
            b.write_all(&bytes).await.unwrap();
            b.shutdown().await.unwrap();
            let _ = listen_only(a).await;
            let _ = b.read_u8().await;
        });
    }
}
