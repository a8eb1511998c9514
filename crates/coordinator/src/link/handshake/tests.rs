use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

fn secret(text: &str) -> Option<Secret> {
    Some(Secret::from_text(text))
}

fn terms() -> Terms {
    Terms::new(secret("abc"), 4, 7)
}

fn credentials() -> Credentials {
    Credentials::new(secret("abc"), 3, 4, 7, Purpose::Control)
}

/// Both sides of one handshake.
async fn shake(
    terms: &Terms,
    credentials: &Credentials,
) -> (Result<Joined, Refusal>, Result<Option<ProcessIdentity>, JoinError>) {
    let (mut a, mut b) = duplex(64);
    let admitter = async {
        let admitted = admit(&mut a, terms).await;
        if admitted.is_err() {
            drop(a);
        }
        admitted
    };
    tokio::join!(admitter, join(&mut b, credentials))
}

/// What an admitter makes of `bytes` that follow its greeting.
async fn admit_bytes(bytes: &[u8]) -> Refusal {
    let (mut a, mut b) = duplex(1 << 16);
    b.write_all(bytes).await.unwrap();
    b.shutdown().await.unwrap();
    admit(&mut a, &terms()).await.unwrap_err()
}

/// What a joiner makes of `bytes`.
async fn join_bytes(bytes: &[u8]) -> JoinError {
    let (mut a, mut b) = duplex(1 << 16);
    a.write_all(bytes).await.unwrap();
    a.shutdown().await.unwrap();
    join(&mut b, &credentials()).await.unwrap_err()
}

fn frame(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes()[..], body].concat()
}

#[tokio::test]
async fn one_that_knows_the_secret_joins_for_either_purpose() {
    for purpose in [Purpose::Control, Purpose::Data] {
        let (admitted, joined) = shake(&terms(), &Credentials { purpose, ..credentials() }).await;
        let process = ProcessIdentity::own().ok();
        assert_eq!(admitted.unwrap(), Joined { rank: 3, purpose, process: process.clone() });
        assert_eq!(joined.unwrap(), process);
    }
}

/// Each is told which process the other is; one that cannot tell is no worse.
#[tokio::test]
async fn each_side_tells_which_process_it_is() {
    let some = |pid| Some(ProcessIdentity { host: "a host".into(), pid, start: 1 << 40 });
    // the longest that the system has a name for, and more
    let long = Some(ProcessIdentity { host: "h".repeat(400), pid: u32::MAX, start: u64::MAX });
    for (ours, theirs) in
        [(some(1), some(2)), (None, some(2)), (some(1), None), (long.clone(), long)]
    {
        let terms = Terms { process: ours.clone(), ..terms() };
        let credentials = Credentials { process: theirs.clone(), ..credentials() };
        let (admitted, joined) = shake(&terms, &credentials).await;
        assert_eq!((admitted.unwrap().process, joined.unwrap()), (theirs, ours));
    }
}

#[tokio::test]
async fn without_a_secret_both_sides_use_the_well_known_one() {
    let (admitted, joined) =
        shake(&Terms { secret: None, ..terms() }, &Credentials { secret: None, ..credentials() })
            .await;
    admitted.unwrap();
    joined.unwrap();
}

/// No byte after the handshake is read by it, on either side.
#[tokio::test]
async fn the_stream_is_handed_on_whole() {
    let (mut a, mut b) = duplex(4096);
    let admitter = async {
        admit(&mut a, &terms()).await.unwrap();
        a.write_all(b"from the admitter").await.unwrap();
        let mut heard = [0; 15];
        a.read_exact(&mut heard).await.unwrap();
        heard
    };
    let joiner = async {
        join(&mut b, &credentials()).await.unwrap();
        b.write_all(b"from the joiner").await.unwrap();
        let mut heard = [0; 17];
        b.read_exact(&mut heard).await.unwrap();
        heard
    };
    let (admitter, joiner) = tokio::join!(admitter, joiner);
    assert_eq!((&admitter, &joiner), (b"from the joiner", b"from the admitter"));
}

#[tokio::test]
async fn another_secret_is_closed_without_a_reason() {
    for theirs in [secret("abd"), None] {
        let (admitted, joined) =
            shake(&terms(), &Credentials { secret: theirs, ..credentials() }).await;
        assert!(matches!(admitted, Err(Refusal::Proof)));
        assert!(matches!(joined, Err(JoinError::Dropped)));
    }
}

/// An unproven joiner gets a close even where its claim is wrong as well.
#[tokio::test]
async fn a_reason_is_told_to_the_proven_only() {
    let wrong = Credentials { secret: secret("abd"), attempt: 6, world_size: 9, ..credentials() };
    let (admitted, joined) = shake(&terms(), &wrong).await;
    assert!(matches!(admitted, Err(Refusal::Proof)));
    assert!(matches!(joined, Err(JoinError::Dropped)));
}

#[tokio::test]
async fn each_mismatch_is_told_to_the_joiner() {
    let cases = [
        (
            Credentials { attempt: 6, ..credentials() },
            Mismatch::Attempt { joiner: 6, group: 7 },
            true,
        ),
        (
            Credentials { attempt: 8, ..credentials() },
            Mismatch::Attempt { joiner: 8, group: 7 },
            false,
        ),
        (
            Credentials { world_size: 8, ..credentials() },
            Mismatch::WorldSize { joiner: 8, group: 4 },
            true,
        ),
        (Credentials { rank: 4, ..credentials() }, Mismatch::Rank { rank: 4, world_size: 4 }, true),
    ];
    for (credentials, why, is_final) in cases {
        let (admitted, joined) = shake(&terms(), &credentials).await;
        assert!(matches!(admitted, Err(Refusal::Mismatch(found)) if found == why));
        assert!(matches!(joined, Err(JoinError::Refused(found)) if found == why));
        assert_eq!(why.is_final(), is_final);
    }
}

/// Whoever has joined as a rank stays it; another purpose is another connection.
#[tokio::test]
async fn a_rank_joins_once_for_each_purpose() {
    let terms = terms();
    for purpose in [Purpose::Control, Purpose::Data] {
        let credentials = Credentials { purpose, ..credentials() };
        // one that knows no secret takes nobody's place
        let stranger = Credentials { secret: secret("abd"), ..credentials.clone() };
        assert!(matches!(shake(&terms, &stranger).await.0, Err(Refusal::Proof)));
        let (admitted, joined) = shake(&terms, &credentials).await;
        assert_eq!(admitted.unwrap().purpose, purpose);
        joined.unwrap();
        let (admitted, joined) = shake(&terms, &credentials).await;
        let why = Mismatch::Joined { rank: credentials.rank };
        assert!(matches!(admitted, Err(Refusal::Mismatch(found)) if found == why));
        assert!(matches!(joined, Err(JoinError::Refused(found)) if found == why));
        assert!(!why.is_final());
    }
}

/// The place of a lost rank is free for its successor, on all clones of the terms; others keep theirs.
#[tokio::test]
async fn a_rank_that_is_forgotten_can_join_again() {
    let terms = terms();
    let other = Credentials { rank: 2, ..credentials() };
    for credentials in [&credentials(), &other] {
        shake(&terms, credentials).await.0.unwrap();
    }
    terms.clone().admissions.forget(3);
    assert!(matches!(shake(&terms, &other).await.0, Err(Refusal::Mismatch(_))));
    shake(&terms, &credentials()).await.0.unwrap();
    // once
    assert!(matches!(shake(&terms, &credentials()).await.0, Err(Refusal::Mismatch(_))));
}

/// It was killed between its claim and the welcome: nobody has joined, and nobody is in the way.
#[tokio::test(start_paused = true)]
async fn a_joiner_that_goes_away_midway_leaves_its_place() {
    let terms = terms();
    // until the claim is proven, and the answer does not fit into what is left of the pipe
    let (mut a, mut b) = duplex(64);
    let joiner = async {
        let credentials = credentials();
        let greeting = hear_greeting(&mut b, HANDSHAKE_LIMIT).await.unwrap();
        let mut writing = Writing(&mut b);
        let joining = answer_greeting(&mut writing, &credentials, greeting);
        let claimed = timeout(Duration::from_secs(1), joining).await;
        assert!(claimed.is_err(), "it hears no answer");
        assert!(!terms.admissions.places().taken.is_empty());
        drop(b);
    };
    let (admitted, ()) = tokio::join!(admit(&mut a, &terms), joiner);
    assert!(matches!(admitted, Err(Refusal::Closed)), "{admitted:?}");
    shake(&terms, &credentials()).await.0.unwrap();

    // one that had the place before it was forgotten does not take it from its successor
    let admissions = Admissions::default();
    let old = admissions.take(1, Purpose::Control).unwrap();
    admissions.forget(1);
    let new = admissions.take(1, Purpose::Control).unwrap();
    drop(old);
    assert!(admissions.take(1, Purpose::Control).is_none());
    new.keep();
    assert!(admissions.take(1, Purpose::Control).is_none());
}

/// A stream of which nothing is read.
struct Writing<'a>(&'a mut tokio::io::DuplexStream);

impl AsyncRead for Writing<'_> {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Pending
    }
}

impl AsyncWrite for Writing<'_> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut *self.0).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut *self.0).poll_shutdown(context)
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_joiner_is_given_up_in_time() {
    let (mut a, _b) = duplex(4096);
    let start = tokio::time::Instant::now();
    let refusal = admit(&mut a, &terms()).await.unwrap_err();
    assert!(matches!(refusal, Refusal::Silent { within: HANDSHAKE_LIMIT }));
    assert!(start.elapsed() < HANDSHAKE_LIMIT * 2);
}

/// Neither one byte now and then nor a peer that reads nothing stretches the limit.
#[tokio::test(start_paused = true)]
async fn a_dribbling_joiner_is_given_up_in_time() {
    let (mut a, mut b) = duplex(1);
    let dribble = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let _ = b.write_all(&[1]).await;
        }
    };
    let start = tokio::time::Instant::now();
    let terms = terms();
    tokio::select! {
        admitted = admit(&mut a, &terms) => assert!(admitted.is_err()),
        () = dribble => {}
    }
    assert!(start.elapsed() < HANDSHAKE_LIMIT * 2);
}

#[tokio::test]
async fn what_is_no_join_is_refused() {
    assert!(matches!(admit_bytes(b"").await, Refusal::Closed));
    assert!(matches!(admit_bytes(&[1, 0, 0]).await, Refusal::Closed));
    assert!(matches!(
        admit_bytes(b"GET / HTTP/1.1\r\n\r\n").await,
        Refusal::Garbage(FrameError::Oversize { length: 0x2054_4547, limit: STRANGER_FRAME_MAX })
    ));
    assert!(matches!(admit_bytes(&frame(&[])).await, Refusal::NoJoin(WireError::Empty)));
    let other_version = frame(&[PROTOCOL_VERSION + 1; 80]);
    assert!(matches!(
        admit_bytes(&other_version).await,
        Refusal::NoJoin(WireError::Version { found }) if found == PROTOCOL_VERSION + 1
    ));
    let cut = frame(&[PROTOCOL_VERSION, 1]);
    assert!(matches!(admit_bytes(&cut).await, Refusal::NoJoin(WireError::Malformed { .. })));
}

#[tokio::test]
async fn what_is_no_coordinator_is_told_apart() {
    for other in [&b""[..], b"SSH-2.0-OpenSSH_9.2\r\n", &frame(b"hello"), &frame(b"longshore")] {
        let found = join_bytes(other).await;
        assert!(matches!(found, JoinError::Stranger(_)), "{found}");
    }
    let newer = frame(&[&b"longshore"[..], &[PROTOCOL_VERSION + 1], b"something new"].concat());
    let found = join_bytes(&newer).await;
    assert!(
        matches!(found, JoinError::Version { theirs } if theirs == PROTOCOL_VERSION + 1),
        "{found}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_no_coordinator() {
    let (_a, mut b) = duplex(4096);
    let found = join(&mut b, &credentials()).await.unwrap_err();
    assert!(matches!(found, JoinError::Stranger("it said nothing")));
}

#[tokio::test(start_paused = true)]
async fn an_admitter_that_falls_silent_is_not_a_stranger() {
    let (mut a, mut b) = duplex(4096);
    a.write_all(&frame(&[&MAGIC[..], &[PROTOCOL_VERSION], &[0; 32]].concat())).await.unwrap();
    let found = join(&mut b, &credentials()).await.unwrap_err();
    assert!(matches!(found, JoinError::Silent { within: HANDSHAKE_LIMIT }));
}

/// An admitter that knows no secret can neither welcome nor send away, not even with the joiner's own proof.
#[tokio::test]
async fn an_impostor_neither_welcomes_nor_refuses() {
    for refuse in [false, true] {
        let (mut a, mut b) = duplex(4096);
        let impostor = async {
            let greeting = [&MAGIC[..], &[PROTOCOL_VERSION], &[0; 32]].concat();
            a.write_all(&frame(&greeting)).await.unwrap();
            let join = read_frame(&mut a, STRANGER_FRAME_MAX).await.unwrap();
            let Join { proof, .. } = wire::decode(&join).unwrap();
            let why = Mismatch::Rank { rank: 3, world_size: 4 };
            let answer = match refuse {
                true => Answer::Refused { why, proof },
                false => Answer::Welcome { process: None, proof },
            };
            a.write_all(&frame(&wire::encode(&answer).unwrap())).await.unwrap();
        };
        let credentials = credentials();
        let ((), joined) = tokio::join!(impostor, join(&mut b, &credentials));
        assert!(matches!(joined, Err(JoinError::Proof)));
    }
}

/// A join overheard on one connection is worth nothing on the next, nor with another claim.
#[tokio::test]
async fn a_proof_is_good_for_one_connection_and_claim() {
    let own = |pid| Some(ProcessIdentity { host: "a host".into(), pid, start: 17 });
    let transcript = |admitter, rank, purpose, process| Transcript {
        admitter,
        joiner: [2; 32],
        claim: Claim { rank, world_size: 4, attempt: 7, purpose, process },
    };
    let secret = Secret::from_text("abc");
    let said = transcript([1; 32], 3, Purpose::Control, own(1));
    let proof = said.prove(&secret, JOINER, &[]);
    assert!(said.verify(&secret, JOINER, &[], &proof));
    assert!(!said.verify(&secret, ADMITTER, &[], &proof));
    for other in [
        transcript([3; 32], 3, Purpose::Control, own(1)),
        transcript([1; 32], 2, Purpose::Control, own(1)),
        transcript([1; 32], 3, Purpose::Data, own(1)),
        transcript([1; 32], 3, Purpose::Control, own(2)),
        transcript([1; 32], 3, Purpose::Control, None),
    ] {
        assert!(!other.verify(&secret, JOINER, &[], &proof));
    }
}

proptest! {
    /// Whatever bytes come, both sides end with an error.
    #[test]
    fn garbage_neither_joins_nor_welcomes(bytes in prop::collection::vec(any::<u8>(), 0..600), framed: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let bytes = if framed { frame(&bytes) } else { bytes };
            admit_bytes(&bytes).await;
            let greeted = [frame(&[&MAGIC[..], &[PROTOCOL_VERSION], &[0; 32]].concat()), bytes.clone()];
            join_bytes(&greeted.concat()).await;
            join_bytes(&bytes).await;
        });
    }
}
