//! What goes wrong between a client and a store, one test per promise: a read is exact, or it fails in time with an error
//! that names object, range and cause.
#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod support;

use std::{
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use longshore_storage_server::{Action, At, Dialect, Operation, Options, Rule, Server};
use longshore_store::{Object, Settings, Store, StoreError, StoreOptions};
use support::{BUCKET, NAME, content, location, open, options, serve};

const POSITIONS: [At; 3] = [At::Start, At::Middle, At::LastByte];
const BYTES: usize = 1 << 20;

/// All faults that pass when they are met once, each at each position where it has one.
fn passing() -> Vec<Action> {
    let mut faults = vec![
        Action::status(500),
        Action::status(502),
        Action::status(503),
        Action::status(408),
        Action::error("SlowDown"),
        Action::error("InternalError"),
        Action::error("RequestTimeout"),
        Action::Status { status: 429, code: None, retry_after_s: Some(0) },
        Action::Stall { at: None, duration: None },
        Action::Reset { at: None },
        Action::ShortRange { bytes: 1 },
        Action::ShortRange { bytes: BYTES as u64 / 2 },
        Action::WrongContentRange,
        Action::IgnoredRange,
    ];
    for at in POSITIONS {
        faults.extend([
            Action::Stall { at: Some(at), duration: None },
            Action::Reset { at: Some(at) },
            Action::Truncate { at },
        ]);
    }
    // a last byte that comes alone is no fault
    for at in [At::Start, At::Middle] {
        faults.push(Action::Trickle { at, bytes: 100, interval: Duration::from_millis(20) });
    }
    faults
}

fn gets(action: Action) -> Rule {
    Rule::new(action).operation(Operation::Get)
}

/// Impatient limits, one request per read.
fn impatient(server: &Server, dialect: Dialect) -> StoreOptions {
    StoreOptions {
        stall_after: Duration::from_millis(400),
        give_up_after: Duration::from_millis(2500),
        hedge: false,
        ..options(server, dialect)
    }
}

fn object(store: &Store) -> Object {
    store.object(&store.info(NAME).unwrap().unwrap())
}

/// The port that the content comes from.
fn port(dialect: Dialect) -> Dialect {
    if dialect == Dialect::Hub { Dialect::Cdn } else { dialect }
}

fn passes(dialect: Dialect) {
    let content = content(BYTES);
    thread::scope(|scope| {
        for fault in passing() {
            let content = &content;
            scope.spawn(move || {
                let server = serve(Options::default(), content);
                let store = open(&server, dialect, &impatient(&server, dialect));
                let object = object(&store);
                let rule = server.fault(gets(fault.clone()).dialect(port(dialect)).times(2));
                // not from the start, not to the end: an ignored range must not go unnoticed
                let range = 1000..content.len() as u64 - 1000;
                let mut target = vec![0; content.len() - 2000];
                let read = object.read(range, &mut target);
                assert!(read.is_ok(), "{fault:?}: {read:?}");
                let report = read.unwrap();
                assert!(target == content[1000..content.len() - 1000], "{fault:?}: wrong bytes");
                assert_eq!(server.taken(rule), 2, "{fault:?}");
                assert!(report.retries >= 2, "{fault:?}: {report:?}");
                assert_eq!(store.counters().in_flight, 0);
            });
        }
    });
}

#[test]
fn a_fault_that_passes_leaves_every_byte_right_on_s3() {
    passes(Dialect::S3);
}

#[test]
fn a_fault_that_passes_leaves_every_byte_right_on_gcs() {
    passes(Dialect::Gcs);
}

#[test]
fn a_fault_that_passes_leaves_every_byte_right_on_azure() {
    passes(Dialect::Azure);
}

#[test]
fn a_fault_that_passes_leaves_every_byte_right_on_the_hub() {
    passes(Dialect::Hub);
}

fn stays(dialect: Dialect) {
    let content = content(BYTES);
    let denied = Action::status(403);
    let faults = passing().into_iter().chain([Action::too_many_requests(60), denied]);
    thread::scope(|scope| {
        for fault in faults {
            let content = &content;
            scope.spawn(move || {
                let server = serve(Options::default(), content);
                let store = open(&server, dialect, &impatient(&server, dialect));
                let object = object(&store);
                server.fault(gets(fault.clone()).dialect(port(dialect)));
                let start = Instant::now();
                let error =
                    object.read(1000..500_000, &mut vec![0; 499_000]).expect_err("the fault stays");
                assert!(
                    start.elapsed() < Duration::from_secs(8),
                    "{fault:?}: {:?}",
                    start.elapsed()
                );
                let text = error.to_string();
                let named = location(dialect).to_string();
                assert!(
                    text.contains(&named) && text.contains("a.safetensors, bytes 1000..500000"),
                    "{text}"
                );
                assert!(!text.contains('\n') && text.len() < 700, "{fault:?}: {text}");
                let causes: &[&str] = match &fault {
                    Action::Status { status, .. } => &[&format!("status {status}")],
                    Action::Stall { .. } => &["no first byte", "no more bytes", "too slow"],
                    Action::Trickle { .. } => &["too slow", "no more bytes"],
                    Action::Truncate { .. } => &["end of file before message length reached"],
                    Action::Reset { .. } => &["Connection reset by peer"],
                    Action::IgnoredRange => &["the whole object came"],
                    _ => &["Content-Range: bytes 100"],
                };
                assert!(causes.iter().any(|cause| text.contains(cause)), "{fault:?}: {text}");
            });
        }
    });
}

#[test]
fn a_fault_that_stays_ends_in_time_and_is_named_on_s3() {
    stays(Dialect::S3);
}

#[test]
fn a_fault_that_stays_ends_in_time_and_is_named_on_the_hub() {
    stays(Dialect::Hub);
}

#[test]
fn a_retry_asks_for_the_next_missing_byte_only() {
    let content = content(BYTES);
    let server = serve(Options::default(), &content);
    let store =
        open(&server, Dialect::S3, &StoreOptions { hedge: false, ..options(&server, Dialect::S3) });
    let object = object(&store);
    server.fault(gets(Action::Truncate { at: At::Middle }).times(3));
    server.clear_log();
    let mut target = vec![0; BYTES];
    let report = object.read(0..BYTES as u64, &mut target).unwrap();
    assert!(target == content);
    assert_eq!((report.requests, report.retries), (4, 3));
    let ranges: Vec<String> =
        server.requests().into_iter().filter_map(|request| request.range).collect();
    let half = BYTES / 2;
    let starts = [0, half, half + half / 2, half + half / 2 + half / 4];
    assert_eq!(ranges, starts.map(|start| format!("bytes={start}-{}", BYTES - 1)));
    let counters = store.counters();
    assert_eq!((counters.received_bytes, counters.discarded_bytes), (BYTES as u64, 0));
    assert_eq!(counters.retried_bytes, (half + half / 2 + half / 4) as u64);
    assert_eq!(server.sent_bytes(BUCKET, &format!("models/x/{NAME}")), BYTES as u64);
}

#[test]
fn the_server_is_given_the_time_it_asks_for() {
    let content = content(1000);
    let server = serve(Options::default(), &content);
    let store = open(&server, Dialect::S3, &options(&server, Dialect::S3));
    let object = object(&store);
    server.fault(gets(Action::too_many_requests(1)).times(1));
    let start = Instant::now();
    object.read(0..1000, &mut [0; 1000]).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(store.counters().throttled, 1);

    // longer than there is time: no reason to wait at all
    server.fault(gets(Action::too_many_requests(3600)));
    let start = Instant::now();
    let error = object.read(0..1000, &mut [0; 1000]).unwrap_err();
    assert!(
        start.elapsed() < Duration::from_secs(5) && error.to_string().contains("429"),
        "{error}"
    );
}

#[test]
fn a_replaced_object_is_an_error_never_a_mix() {
    let before = content(BYTES);
    let server = serve(Options::default(), &before);
    let store = open(&server, Dialect::S3, &options(&server, Dialect::S3));
    let object = object(&store);
    let key = format!("models/x/{NAME}");
    object.read(0..1000, &mut [0; 1000]).unwrap();
    assert!(!object.has_changed().unwrap());

    // in the middle of one body: what is left must not come from the new content
    let rule = server.fault(gets(Action::Truncate { at: At::Middle }).times(1));
    server.fault(gets(Action::ChangeEtag).skip(1).times(1));
    let error = object.read(0..BYTES as u64, &mut vec![0; BYTES]).unwrap_err();
    assert_eq!(server.taken(rule), 1);
    assert!(matches!(&error, StoreError::Replaced { .. }), "{error}");
    assert!(object.has_changed().unwrap());

    let object = store.object(&store.info(NAME).unwrap().unwrap());
    object.read(0..1000, &mut [0; 1000]).unwrap();
    server.put(BUCKET, &key, before[..5000].to_vec());
    let error = object.read(0..1000, &mut [0; 1000]).unwrap_err();
    assert!(matches!(&error, StoreError::Replaced { .. }), "{error}");
    server.remove(BUCKET, &key);
    let error = object.read(0..1000, &mut [0; 1000]).unwrap_err();
    assert!(matches!(&error, StoreError::NotFound { .. }), "{error}");
    assert!(object.has_changed().unwrap());
}

#[test]
fn what_a_user_can_mend_is_refused_at_once_and_says_how() {
    let content = content(1000);
    let cases: [(Action, &str); 6] = [
        (Action::error("AccessDenied"), "s3:GetObject"),
        (Action::error("InvalidAccessKeyId"), "check AWS_ACCESS_KEY_ID"),
        (Action::error("SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
        (Action::error("RequestTimeTooSkewed"), "clock"),
        (Action::error("ExpiredToken"), "get new credentials"),
        (Action::error("AuthorizationHeaderMalformed"), "AWS_REGION"),
    ];
    for (fault, advice) in cases {
        let server = serve(Options::default(), &content);
        let store = open(&server, Dialect::S3, &options(&server, Dialect::S3));
        let object = object(&store);
        server.clear_log();
        server.fault(gets(fault.clone()));
        let error = object.read(0..1000, &mut [0; 1000]).unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains(advice), "{fault:?}: {error}");
        assert_eq!(server.counters().requests, 1, "{fault:?}");
    }
}

#[test]
fn a_bucket_that_is_elsewhere_or_private_or_absent_is_told_apart() {
    let content = content(1000);
    let server = serve(Options::default(), &content);
    server.set_region(BUCKET, "eu-west-1");
    let store = open(&server, Dialect::S3, &options(&server, Dialect::S3));
    for error in [store.list().unwrap_err(), store.info(NAME).unwrap_err()] {
        assert!(matches!(&error, StoreError::WrongRegion { .. }), "{error}");
        assert!(error.is_refusal() && error.to_string().contains("eu-west-1"), "{error}");
    }

    let server = serve(Options { private: true, ..Options::default() }, &content);
    let unsigned = support::options_with(&server, Dialect::S3, false);
    let error = open(&server, Dialect::S3, &unsigned).list().unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("s3:ListBucket"), "{error}");
    let signed = support::options_with(&server, Dialect::S3, true);
    assert_eq!(open(&server, Dialect::S3, &signed).list().unwrap().len(), 2);

    let absent = longshore_store::Location::parse("s3://absent/x").unwrap().unwrap();
    let store = Store::open(&absent, &signed).unwrap();
    let error = store.get("config.json", 100).unwrap_err();
    assert!(
        matches!(&error, StoreError::NotFound { .. }) && error.to_string().contains("NoSuchBucket"),
        "{error}"
    );

    // nobody gives credentials
    let mut settings: Vec<(String, String)> = vec![
        ("AWS_ENDPOINT_URL".to_owned(), server.url(Dialect::S3)),
        ("AWS_METADATA_ENDPOINT".to_owned(), "http://127.0.0.1:1".to_owned()),
    ];
    settings.push(("AWS_CONFIG_FILE".to_owned(), "/nonexistent".to_owned()));
    let options =
        StoreOptions { settings: settings.into_iter().collect(), ..StoreOptions::default() };
    let error = open(&server, Dialect::S3, &options).list().unwrap_err();
    assert!(matches!(&error, StoreError::NoCredentials { .. }), "{error}");
    assert!(error.to_string().contains("AWS_SKIP_SIGNATURE"), "{error}");
}

#[test]
fn an_address_where_nobody_is_does_not_take_long() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let settings =
        Settings::from([("AWS_ENDPOINT_URL", endpoint.as_str()), ("AWS_SKIP_SIGNATURE", "true")]);
    let store =
        Store::open(&location(Dialect::S3), &StoreOptions { settings, ..StoreOptions::default() })
            .unwrap();
    let start = Instant::now();
    let error = store.list().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(matches!(&error, StoreError::GaveUp { .. }), "{error}");
    assert!(error.to_string().contains("listing s3://bucket/models/x"), "{error}");
}

#[test]
fn a_clock_that_is_wrong_is_named() {
    let clock_ahead = Duration::from_secs(3600);
    let server =
        serve(Options { private: true, clock_ahead, ..Options::default() }, &content(1000));
    let signed = support::options_with(&server, Dialect::S3, true);
    let error = open(&server, Dialect::S3, &signed).list().unwrap_err();
    assert!(matches!(&error, StoreError::ClockSkew { .. }), "{error}");
}

#[test]
fn small_objects_survive_faults_too() {
    let content = content(1000);
    for fault in
        [Action::status(503), Action::Truncate { at: At::Middle }, Action::Reset { at: None }]
    {
        let server = serve(Options::default(), &content);
        let store = open(&server, Dialect::S3, &impatient(&server, Dialect::S3));
        for operation in [Operation::Get, Operation::Head, Operation::List] {
            server.fault(Rule::new(fault.clone()).operation(operation).times(2));
        }
        assert_eq!(store.list().unwrap().len(), 2, "{fault:?}");
        assert_eq!(store.info(NAME).unwrap().unwrap().bytes, 1000, "{fault:?}");
        assert!(store.get(NAME, 1000).unwrap().unwrap().0 == content, "{fault:?}");
    }
}

#[test]
fn a_slow_tail_is_hedged_and_no_more_than_a_twentieth_is() {
    let content = content(4 << 20);
    let server = serve(Options::default(), &content);
    let store = open(&server, Dialect::S3, &options(&server, Dialect::S3));
    let object = object(&store);
    let read = |at: u64| {
        let start = (at * 65_536) % (4 << 20);
        let mut target = vec![0; 65_536];
        let report = object.read(start..start + 65_536, &mut target).unwrap();
        assert!(target == content[start as usize..][..65_536]);
        report.elapsed
    };
    for at in 0..200 {
        read(at);
    }
    let slow = Duration::from_secs(20);
    let rules =
        [50, 200, 300, 430].map(|skip| server.fault(gets(Action::Delay(slow)).skip(skip).times(1)));
    let slowest = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                scope.spawn(move || (0..150).map(|at| read(thread * 17 + at)).max().unwrap())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
    });
    let counters = store.counters();
    let delayed: u64 = rules.into_iter().map(|rule| server.taken(rule)).sum();
    assert_eq!(delayed, 4);
    assert!(slowest < slow / 2, "{slowest:?} {counters:?}");
    assert!(counters.hedges_won >= 1 && counters.hedges >= delayed - 1, "{counters:?}");
    assert!(counters.hedges <= 800 / 20, "{counters:?}");

    // all are slow: that is no tail, and the storage is not asked twice as much
    server.clear_faults();
    server.fault(gets(Action::Delay(Duration::from_millis(500))));
    let before = store.counters();
    for at in 0..12 {
        read(at);
    }
    let hedges = store.counters().hedges - before.hedges;
    assert!(store.counters().hedges <= 812 / 20, "{hedges}");
}

#[test]
fn a_body_that_becomes_slow_is_overtaken() {
    let content = content(8 << 20);
    let server = serve(Options::default(), &content);
    let store = open(
        &server,
        Dialect::S3,
        &StoreOptions { part_bytes: 2 << 20, ..options(&server, Dialect::S3) },
    );
    let object = object(&store);
    let mut target = vec![0; 2 << 20];
    for at in 0..40 {
        let start = (at % 4) * (2 << 20);
        object.read(start..start + (2 << 20), &mut target).unwrap();
    }
    // enough not to be silent, too little to be usual
    let trickle =
        Action::Trickle { at: At::Middle, bytes: 2000, interval: Duration::from_millis(20) };
    server.fault(gets(trickle).times(1));
    let start = Instant::now();
    object.read(0..2 << 20, &mut target).unwrap();
    assert!(target == content[..2 << 20]);
    let counters = store.counters();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?} {counters:?}", start.elapsed());
    assert_eq!((counters.hedges_won, counters.retries), (1, 0), "{counters:?}");
}

#[test]
fn requests_in_flight_follow_what_the_storage_gives() {
    let content = content(16 << 20);
    let server = serve(Options::default(), &content);
    let options =
        StoreOptions { part_bytes: 64 << 10, hedge: false, ..options(&server, Dialect::S3) };
    let store = open(&server, Dialect::S3, &options);
    let object = object(&store);
    // each connection is slow, all together are not
    let slow = server.fault(gets(Action::Delay(Duration::from_millis(60))));
    let mut target = vec![0; 16 << 20];
    for _ in 0..6 {
        object.read(0..16 << 20, &mut target).unwrap();
        assert!(target == content);
    }
    let grown = store.counters();
    assert!(grown.in_flight_max > 16 && grown.in_flight_limit > 8, "{grown:?}");
    server.remove_fault(slow);

    server.fault(gets(Action::error("SlowDown")).times(40));
    object.read(0..16 << 20, &mut target).unwrap();
    assert!(target == content);
    let throttled = store.counters();
    assert_eq!(throttled.throttled, 40);
    assert!(throttled.in_flight_limit < grown.in_flight_limit, "{grown:?} {throttled:?}");

    let fixed = open(&server, Dialect::S3, &StoreOptions { concurrency: Some(3), ..options });
    let object = fixed.object(object.info());
    object.read(0..16 << 20, &mut target).unwrap();
    assert_eq!((fixed.counters().in_flight_max, fixed.counters().in_flight_limit), (3, 3));
}

#[test]
fn seeded_mixtures_are_exact() {
    let content = content(4 << 20);
    for seed in 0..4 {
        let server = serve(Options { seed, ..Options::default() }, &content);
        let options = StoreOptions {
            part_bytes: 100_000,
            stall_after: Duration::from_millis(500),
            give_up_after: Duration::from_secs(60),
            ..options(&server, Dialect::S3)
        };
        let store = open(&server, Dialect::S3, &options);
        let object = object(&store);
        server.fault(Rule::mixture(0.3, passing()).operation(Operation::Get));
        thread::scope(|scope| {
            for thread in 0..4u64 {
                let (object, content) = (&object, &content);
                scope.spawn(move || {
                    for n in 0..3u64 {
                        let start = (thread * 999_331 + n * 77_777) % (3 << 20);
                        let mut target = vec![0; 900_000];
                        object.read(start..start + 900_000, &mut target).unwrap();
                        assert!(target == content[start as usize..][..900_000], "seed {seed}");
                    }
                });
            }
        });
        let counters = store.counters();
        assert!(counters.retries > 0 && counters.in_flight == 0, "{counters:?}");
    }
}

#[test]
fn errors_hold_no_secrets() {
    let server = serve(Options { private: true, ..Options::default() }, &content(1000));
    let signed = impatient(&server, Dialect::S3);
    let store = open(&server, Dialect::S3, &signed);
    let object = object(&store);
    let mut texts = vec![format!("{store:?} {object:?} {signed:?} {:?}", location(Dialect::S3))];
    for fault in [
        Action::error("SignatureDoesNotMatch"),
        Action::error("AccessDenied"),
        Action::Redirect { to: Some("http://127.0.0.1:1/x?X-Amz-Signature=deadbeef".to_owned()) },
    ] {
        server.clear_faults();
        server.fault(Rule::new(fault));
        let error = object.read(0..10, &mut [0; 10]).unwrap_err();
        texts.push(format!("{error} {error:?}"));
    }
    for secret in server.secrets().iter().map(String::as_str).chain(["deadbeef"]) {
        assert!(!texts.iter().any(|text| text.contains(secret)), "{texts:?}");
    }
}
