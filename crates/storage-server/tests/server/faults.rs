//! Each fault as it arrives at the other end of the connection.

use std::time::{Duration, Instant};

use longshore_storage_server::{Action, At, Dialect, Operation, Options, Rule, Server};

use crate::common::{Answer, End, Raw, ask, fill};

const OBJECT: &str = "/models/model/weights-1.safetensors";
const SECOND: Duration = Duration::from_secs(1);

/// A range of 300 001 bytes from 1000 on, with what comes of it within a second of silence.
fn range(server: &Server) -> (Option<Answer>, End) {
    let mut raw = Raw::open(server, Dialect::S3, SECOND);
    raw.send("GET", OBJECT, &[("range", "bytes=1000-301000")]);
    raw.receive("GET")
}

fn with(action: Action) -> (Server, Vec<u8>) {
    let (server, content) = fill(Options::default());
    server.fault(Rule::new(action));
    (server, content)
}

const ALL: [(At, usize); 5] = [
    (At::Start, 0),
    (At::Bytes(1), 1),
    (At::Middle, 150_000),
    (At::Offset(1000 + 77), 77),
    (At::LastByte, 300_000),
];

/// Exactly the bytes before the position arrive, however the body ends there.
#[test]
fn bodies_end_where_they_are_to() {
    for (at, bytes) in ALL {
        for (action, how) in [
            (Action::Reset { at: Some(at) }, End::Reset),
            (Action::Truncate { at }, End::Closed),
            (Action::Stall { at: Some(at), duration: None }, End::Silence),
        ] {
            let (server, content) = with(action.clone());
            let (answer, end) = range(&server);
            let answer = answer.unwrap();
            assert_eq!(end, how, "{action:?}");
            assert_eq!((answer.status, answer.headers["content-length"].as_str()), (206, "300001"));
            assert_eq!(answer.body.len(), bytes, "{action:?}");
            assert_eq!(answer.body, content[1000..1000 + bytes]);
            assert_eq!(server.requests()[0].actions, [action]);
        }
    }
}

#[test]
fn connections_end_or_stay_silent_before_the_headers() {
    let (server, _) = with(Action::Reset { at: None });
    assert!(matches!(range(&server), (None, End::Reset)));
    let (server, _) = with(Action::Stall { at: None, duration: None });
    assert!(matches!(range(&server), (None, End::Silence)));
    assert_eq!(server.requests()[0].status, 0);
    assert_eq!(server.counters().concurrent_max, 1);
}

/// What a client leaves is over for the server too, whatever it was waiting for.
#[test]
fn requests_of_clients_that_leave_are_over() {
    for at in [None, Some(At::Middle)] {
        let (server, _) = with(Action::Stall { at, duration: None });
        let mut raw = Raw::open(&server, Dialect::S3, SECOND);
        raw.send("GET", OBJECT, &[]);
        let until = Instant::now() + 20 * SECOND;
        while server.counters().concurrent == 0 && Instant::now() < until {
            std::thread::yield_now();
        }
        drop(raw);
        let left = || (server.counters().concurrent, server.counters().connections_open);
        while left() != (0, 0) && Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(left(), (0, 0), "{at:?}");
        assert!(server.requests()[0].ended.is_some());
    }
}

#[test]
fn stalls_delays_and_slow_bodies_take_their_time() {
    let duration = Duration::from_millis(300);
    let start = At::Start;
    for action in [
        Action::Delay(duration),
        Action::Stall { at: None, duration: Some(duration) },
        Action::Stall { at: Some(At::LastByte), duration: Some(duration) },
        Action::Trickle { at: start, bytes: 50_000, interval: Duration::from_millis(50) },
        Action::Bandwidth(1_000_000),
    ] {
        let (server, content) = with(action.clone());
        let begun = Instant::now();
        let (answer, end) = range(&server);
        let took = begun.elapsed();
        assert_eq!(end, End::Complete);
        assert_eq!(answer.unwrap().body, content[1000..301_001]);
        assert!(took >= Duration::from_millis(270), "{action:?}: {took:?}");
    }
}

/// The bandwidth is that of the connection, whatever number of requests it is used for.
#[test]
fn a_connection_has_one_bandwidth() {
    let (server, _) = with(Action::Bandwidth(10_000_000));
    let mut raw = Raw::open(&server, Dialect::S3, SECOND);
    let begun = Instant::now();
    for _ in 0..4 {
        raw.send("GET", OBJECT, &[]);
        assert_eq!(raw.receive("GET").1, End::Complete);
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(350), "{took:?}");
    assert_eq!(server.counters().connections, 1);
}

#[test]
fn errors_have_their_status_code_and_headers() {
    for (action, status, code) in [
        (Action::status(500), 500, "InternalError"),
        (Action::status(503), 503, "SlowDown"),
        (Action::status(403), 403, "AccessDenied"),
        (Action::status(404), 404, "NoSuchKey"),
        (Action::status(416), 416, "InvalidRange"),
        (Action::error("ExpiredToken"), 400, "ExpiredToken"),
        (Action::too_many_requests(3), 429, "TooManyRequests"),
    ] {
        let (server, _) = with(action.clone());
        let (answer, end) = range(&server);
        let answer = answer.unwrap();
        assert_eq!((answer.status, end), (status, End::Complete));
        let body = String::from_utf8(answer.body).unwrap();
        assert!(body.contains(&format!("<Code>{code}</Code>")), "{body}");
        let retry = answer.headers.get("retry-after").map(String::as_str);
        assert_eq!(retry, (status == 429).then_some("3"));
        let head = ask(&server, Dialect::S3, "HEAD", OBJECT, &[]);
        assert_eq!((head.status, head.body.len()), (status, 0));
    }
}

#[test]
fn ranges_are_shortened_mislabelled_and_ignored() {
    let answer = |action| {
        let (server, content) = with(action);
        let answer = range(&server).0.unwrap();
        let range = answer.headers.get("content-range").cloned();
        (answer.status, range.unwrap_or_default(), answer.body, content)
    };
    let (status, range, body, content) = answer(Action::ShortRange { bytes: 1 });
    assert_eq!((status, range.as_str()), (206, "bytes 1000-300999/1000003"));
    assert_eq!(body, content[1000..301_000]);
    let (status, range, body, content) = answer(Action::ShortRange { bytes: u64::MAX });
    assert_eq!(
        (status, range.as_str(), body),
        (206, "bytes 1000-1000/1000003", vec![content[1000]])
    );
    let (status, range, body, content) = answer(Action::WrongContentRange);
    assert_eq!((status, range.as_str()), (206, "bytes 1001-301001/1000003"));
    assert_eq!(body, content[1000..301_001]);
    let (status, range, body, content) = answer(Action::IgnoredRange);
    assert_eq!((status, range.as_str(), body), (200, "", content));
}

#[test]
fn wrong_bytes_are_wrong_where_they_are_to_be() {
    for (at, position) in ALL {
        let (server, content) = with(Action::Corrupt { at });
        let body = range(&server).0.unwrap().body;
        let wrong: Vec<usize> = (0..body.len()).filter(|&i| body[i] != content[1000 + i]).collect();
        assert_eq!(wrong, [position], "{at:?}");
    }
}

/// From the request on that the rule takes, also for those that name the ETag from before.
#[test]
fn etags_change_for_good() {
    let (server, _) = fill(Options::default());
    server.fault(Rule::new(Action::ChangeEtag).operation(Operation::Get).skip(1).times(1));
    let etag = || ask(&server, Dialect::S3, "GET", OBJECT, &[]).headers["etag"].clone();
    let (first, second, third) = (etag(), etag(), etag());
    assert_ne!(first, second);
    assert_eq!(second, third);
    let stale = ask(&server, Dialect::S3, "GET", OBJECT, &[("if-match", &first)]);
    assert_eq!(stale.status, 412);
    let changing = server.fault(Rule::new(Action::ChangeEtag).object("*-1.safetensors").times(1));
    let stale = ask(&server, Dialect::S3, "GET", OBJECT, &[("if-match", &third)]);
    assert_eq!((stale.status, server.taken(changing)), (412, 1));
}

#[test]
fn redirects_lead_to_the_same_object_once_or_elsewhere() {
    let (server, _) = with(Action::Redirect { to: None });
    let answer = ask(&server, Dialect::S3, "GET", OBJECT, &[]);
    assert_eq!(answer.status, 307);
    let location = &answer.headers["location"];
    assert_eq!(*location, format!("http://127.0.0.1{OBJECT}?redirected=1"));
    let there = format!("{OBJECT}?redirected=1");
    assert_eq!(ask(&server, Dialect::S3, "GET", &there, &[]).status, 200);
    let (server, _) = with(Action::Redirect { to: Some("http://there/".to_owned()) });
    let answer = ask(&server, Dialect::S3, "GET", OBJECT, &[]);
    assert_eq!((answer.status, answer.headers["location"].as_str()), (307, "http://there/"));
}

/// A connection is as good as new after a request that failed and was answered.
#[test]
fn connections_outlive_errors_and_slow_answers() {
    let (server, content) = fill(Options::default());
    let delay = Action::Delay(Duration::from_millis(20));
    let actions = vec![Some(Action::status(503)), Some(delay), None, Some(Action::IgnoredRange)];
    server.fault(Rule::script(actions));
    let mut raw = Raw::open(&server, Dialect::S3, SECOND);
    let mut answers = Vec::new();
    for _ in 0..4 {
        raw.send("GET", OBJECT, &[("range", "bytes=0-9")]);
        let (answer, end) = raw.receive("GET");
        assert_eq!(end, End::Complete);
        answers.push(answer.unwrap());
    }
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [503, 206, 206, 200]);
    assert_eq!(answers[1].body, content[..10]);
    assert_eq!(server.counters().connections, 1);
    let error_bytes = answers[0].body.len() as u64;
    assert_eq!(server.counters().sent_bytes, error_bytes + 20 + content.len() as u64);
    let sent = server.sent_bytes("models", "model/weights-1.safetensors");
    assert_eq!(sent, 20 + content.len() as u64);
}
