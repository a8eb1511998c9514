//! The same story on every service, and what only the hub has.
#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod support;

use std::{thread, time::Duration};

use longshore_storage_server::{Action, At, Dialect, Operation, Options, Rule, Server};
use longshore_store::{
    ChecksumAlgorithm, Location, Revalidated, Settings, Store, StoreError, StoreOptions,
};
use support::{BUCKET, NAME, REPOSITORY, content, location, open, options, options_with, serve};

const SERVICES: [Dialect; 4] = [Dialect::S3, Dialect::Gcs, Dialect::Azure, Dialect::Hub];

/// Where the content is, for the server.
fn key(dialect: Dialect) -> (&'static str, String) {
    match dialect {
        Dialect::Hub => (REPOSITORY, NAME.to_owned()),
        _ => (BUCKET, format!("models/x/{NAME}")),
    }
}

#[test]
fn names_lengths_and_contents_are_those_of_the_service() {
    let content = content(3_000_001);
    for dialect in SERVICES {
        for private in [false, true] {
            // a page per name
            let server =
                serve(Options { private, page_entries_max: 1, ..Options::default() }, &content);
            let options = StoreOptions { part_bytes: 1 << 20, ..options(&server, dialect) };
            let store = open(&server, dialect, &options);
            let listed = store.list().unwrap();
            let names: Vec<&str> = listed.iter().map(|info| info.name.as_str()).collect();
            assert_eq!(names, [NAME, "config.json"], "{dialect:?}");
            assert_eq!((listed[0].bytes, listed[1].bytes), (3_000_001, 2), "{dialect:?}");

            let info = store.info(NAME).unwrap().unwrap();
            assert!(info.identity.matches(&listed[0].identity), "{dialect:?}: {info:?} {listed:?}");
            assert_eq!(store.info("absent").unwrap(), None, "{dialect:?}");
            assert_eq!(store.get("absent", 10).unwrap(), None, "{dialect:?}");
            assert_eq!(
                store.info("deeper/b.safetensors").unwrap().unwrap().bytes,
                1,
                "{dialect:?}"
            );

            let (bytes, config) = store.get("config.json", 10).unwrap().unwrap();
            assert_eq!(bytes, b"{}", "{dialect:?}");
            let again = store.get_if_changed("config.json", &config.identity, 10).unwrap();
            assert_eq!(again, Revalidated::Unchanged, "{dialect:?}");

            let object = store.object(&listed[0]);
            let mut target = vec![0; content.len()];
            let report = object.read(0..info.bytes, &mut target).unwrap();
            assert!(target == content, "{dialect:?}");
            assert_eq!((report.requests - report.hedges, report.retries), (3, 0), "{dialect:?}");
            assert!(!object.has_changed().unwrap(), "{dialect:?}");
        }
    }
}

#[test]
fn strangers_are_told_what_to_set() {
    for dialect in SERVICES {
        let server = serve(Options { private: true, ..Options::default() }, b"content");
        let mut strangers = options_with(&server, dialect, false);
        let opened = Store::open(&location(dialect), &strangers).and_then(|store| store.list());
        let error = opened.unwrap_err();
        assert!(error.is_refusal(), "{dialect:?}: {error}");
        let advice =
            ["s3:ListBucket", "storage.objects.list", "AZURE_STORAGE_ACCOUNT_NAME", "HF_TOKEN"];
        assert!(
            advice.iter().any(|advice| error.to_string().contains(advice)),
            "{dialect:?}: {error}"
        );

        // somebody else's token
        if dialect == Dialect::Hub {
            let mut settings: Vec<(String, String)> = server
                .environment_with(dialect, false)
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect();
            settings.push(("HF_TOKEN".to_owned(), "hf_wrong".to_owned()));
            strangers.settings = settings.into_iter().collect();
            let error = Store::open(&location(dialect), &strangers).unwrap_err();
            assert!(matches!(&error, StoreError::Denied { .. }), "{error}");
            assert!(!format!("{error:?}").contains("hf_wrong"), "{error:?}");
        }
    }
}

#[test]
fn replaced_objects_are_errors() {
    let content = content(100_000);
    for dialect in [Dialect::S3, Dialect::Gcs, Dialect::Azure] {
        let server = serve(Options::default(), &content);
        let store = open(&server, dialect, &options(&server, dialect));
        let object = store.object(&store.list().unwrap()[0]);
        let (bucket, name) = key(dialect);
        object.read(0..10, &mut [0; 10]).unwrap();
        server.replace(bucket, &name);
        assert!(object.has_changed().unwrap(), "{dialect:?}");
        let error = object.read(0..10, &mut [0; 10]).unwrap_err();
        assert!(matches!(&error, StoreError::Replaced { .. }), "{dialect:?}: {error}");
        let known = object.info().identity.clone();
        let now = store.get_if_changed(NAME, &known, 1 << 20).unwrap();
        assert!(matches!(now, Revalidated::Changed(bytes, _) if bytes == content), "{dialect:?}");
    }
}

#[test]
fn many_threads_read_one_object_at_once() {
    let content = content(5_000_001);
    let server = serve(Options::default(), &content);
    let options = StoreOptions { part_bytes: 300_000, ..options(&server, Dialect::S3) };
    let store = open(&server, Dialect::S3, &options);
    let object = store.object(&store.list().unwrap()[0]);
    thread::scope(|scope| {
        for thread in 0..8u64 {
            let (object, content) = (&object, &content);
            scope.spawn(move || {
                for n in 0..20 {
                    let start = (thread * 611_953 + n * 77_777) % 4_000_000;
                    let end = start + 1 + (n * 49_999) % 900_000;
                    let mut target = vec![0; (end - start) as usize];
                    object.read(start..end, &mut target).unwrap();
                    assert!(target == content[start as usize..end as usize]);
                }
            });
        }
    });
    let counters = store.counters();
    assert_eq!((counters.retries, counters.in_flight), (0, 0));
}

#[test]
fn connections_are_used_again() {
    let content = content(1 << 20);
    for dialect in SERVICES {
        let server = serve(Options::default(), &content);
        let store =
            open(&server, dialect, &StoreOptions { hedge: false, ..options(&server, dialect) });
        let object = store.object(&store.list().unwrap()[0]);
        for n in 0..50 {
            object.read(n * 1000..n * 20_000 + 1, &mut vec![0; n as usize * 19_000 + 1]).unwrap();
        }
        assert!(server.counters().connections <= 6, "{dialect:?}: {:?}", server.counters());
    }
}

#[test]
fn more_than_there_is_or_than_is_allowed_is_an_error() {
    let server = serve(Options::default(), &content(1000));
    let store = open(&server, Dialect::S3, &options(&server, Dialect::S3));
    let object = store.object(&store.info(NAME).unwrap().unwrap());
    server.clear_log();
    let past = object.read(900..1001, &mut [0; 101]).unwrap_err();
    assert!(matches!(past, StoreError::OutOfRange { bytes: 1000, .. }), "{past}");
    assert_eq!(object.read(1000..1000, &mut []).unwrap().requests, 0);
    assert_eq!(server.counters().requests, 0);
    let large = store.get(NAME, 999).unwrap_err();
    assert!(matches!(large, StoreError::TooLarge { bytes: 1000, limit: 999, .. }), "{large}");
}

fn files(server: &Server) -> (Store, longshore_store::Object) {
    let store = open(server, Dialect::Hub, &options(server, Dialect::Hub));
    let object = store.object(&store.list().unwrap()[0]);
    (store, object)
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let content = content(1 << 20);
    let server = serve(Options { private: true, ..Options::default() }, &content);
    let (_, object) = files(&server);
    let mut target = vec![0; 1 << 20];
    object.read(0..1 << 20, &mut target).unwrap();
    assert!(target == content);
    let requests = server.requests();
    assert!(requests.iter().any(|request| request.dialect == Dialect::Cdn));
    for request in requests {
        assert_eq!(request.authorization, request.dialect == Dialect::Hub, "{request:?}");
    }
    // the same host and another port is another place
    let elsewhere = serve(Options::default(), &content);
    let to = format!("{}/{BUCKET}/models/x/{NAME}", elsewhere.url(Dialect::S3));
    server.fault(
        Rule::new(Action::Redirect { to: Some(to) })
            .dialect(Dialect::Hub)
            .operation(Operation::Get),
    );
    let (_, object) = files(&server);
    object.read(0..10, &mut [0; 10]).unwrap();
    assert!(elsewhere.requests().iter().all(|request| !request.authorization));
    assert_eq!(elsewhere.requests().len(), 1);
}

#[test]
fn redirects_are_kept_as_long_as_they_hold() {
    let content = content(1 << 20);
    let server = serve(
        Options { redirect_lifetime: Duration::from_secs(2), ..Options::default() },
        &content,
    );
    let (store, object) = files(&server);
    let at_hub =
        || server.requests().iter().filter(|request| request.dialect == Dialect::Hub).count();
    let opened = at_hub();
    assert_eq!(opened, 1);
    let mut target = vec![0; 1000];
    for _ in 0..20 {
        object.read(0..1000, &mut target).unwrap();
    }
    assert_eq!(at_hub(), opened + 1);
    thread::sleep(Duration::from_millis(3100));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut target = vec![0; 1000];
                object.read(5000..6000, &mut target).unwrap();
                assert!(target == content[5000..6000]);
            });
        }
    });
    assert!((opened + 2..=opened + 5).contains(&at_hub()), "{}", at_hub());
    assert_eq!(store.counters().retries, 0);
}

#[test]
fn a_commit_is_pinned_when_the_store_is_opened() {
    let before = content(50_000);
    let server = serve(Options::default(), &before);
    let (store, object) = files(&server);
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(NAME), &before[..1000]).unwrap();
    server.serve(REPOSITORY, directory.path());
    let mut target = vec![0; before.len()];
    object.read(0..before.len() as u64, &mut target).unwrap();
    assert!(target == before);
    assert!(!object.has_changed().unwrap());
    let (again, _) = files(&server);
    assert_eq!(again.list().unwrap()[0].bytes, 1000);
    assert_ne!(
        again.list().unwrap()[0].identity.version,
        store.list().unwrap()[0].identity.version
    );
}

#[test]
fn the_hub_publishes_digests_of_large_files() {
    let server = serve(Options::default(), b"content");
    let (store, _) = files(&server);
    let listed = store.list().unwrap();
    let published = listed[0].published.as_ref().unwrap();
    assert_eq!(published.algorithm, ChecksumAlgorithm::Sha256);
    // sha256sum of the seven bytes
    assert_eq!(
        published.to_string(),
        "sha256:ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    );
    assert_eq!(listed[1].published, None);
}

#[test]
fn object_stores_publish_checksums_in_headers() {
    for (dialect, name, value, expected) in [
        (Dialect::S3, "x-amz-checksum-crc64nvme", "AAECAwQFBgc=", "crc64nvme:0001020304050607"),
        (Dialect::Gcs, "x-goog-hash", "crc32c=AAECAw==", "crc32c:00010203"),
        (
            Dialect::Azure,
            "content-md5",
            "AAECAwQFBgcICQoLDA0ODw==",
            "md5:000102030405060708090a0b0c0d0e0f",
        ),
    ] {
        let server = serve(Options::default(), b"content");
        let (bucket, object) = key(dialect);
        server.add_header(bucket, &object, name, value);
        let store = open(&server, dialect, &options(&server, dialect));
        let info = store.info(NAME).unwrap().unwrap();
        assert_eq!(info.published.unwrap().to_string(), expected, "{dialect:?}");
    }
}

#[test]
fn what_the_hub_does_not_have_is_said() {
    let server = serve(Options::default(), b"content");
    let options = options_with(&server, Dialect::Hub, true);
    for text in ["org/absent", "org/name@absent"] {
        let location = Location::parse(text).unwrap().unwrap();
        let error = Store::open(&location, &options).unwrap_err();
        assert!(matches!(&error, StoreError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    let offline = Settings::from([("HF_HUB_OFFLINE", "1")]);
    let error =
        Store::open(&location(Dialect::Hub), &StoreOptions { settings: offline, ..options })
            .unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
}

#[test]
fn the_hub_may_ask_to_wait_and_break_off() {
    let content = content(200_000);
    let server = serve(Options::default(), &content);
    for operation in [Operation::Info, Operation::Get] {
        server.fault(
            Rule::new(Action::too_many_requests(0))
                .dialect(Dialect::Hub)
                .operation(operation)
                .times(2),
        );
        server.fault(
            Rule::new(Action::Truncate { at: At::Middle })
                .dialect(Dialect::Hub)
                .operation(operation)
                .times(1),
        );
    }
    let (store, object) = files(&server);
    let mut target = vec![0; content.len()];
    object.read(0..content.len() as u64, &mut target).unwrap();
    assert!(target == content && store.counters().retries >= 4, "{:?}", store.counters());
}

#[test]
fn signed_urls_are_in_no_error() {
    let server = serve(Options { private: true, ..Options::default() }, &content(10_000));
    let options = StoreOptions {
        give_up_after: Duration::from_millis(600),
        ..options(&server, Dialect::Hub)
    };
    let store = open(&server, Dialect::Hub, &options);
    let object = store.object(&store.list().unwrap()[0]);
    object.read(0..10, &mut [0; 10]).unwrap();
    let mut texts = vec![format!("{store:?} {object:?} {options:?}")];
    for fault in [
        Action::status(403),
        Action::status(500),
        Action::Reset { at: None },
        Action::Reset { at: Some(At::Middle) },
        Action::WrongContentRange,
    ] {
        server.clear_faults();
        server.fault(Rule::new(fault).dialect(Dialect::Cdn));
        let error = object.read(0..1000, &mut [0; 1000]).unwrap_err();
        texts.push(format!("{error} {error:?}"));
    }
    assert!(server.secrets().len() > 3);
    for secret in server.secrets() {
        assert!(!texts.iter().any(|text| text.contains(&secret)), "{texts:?}");
    }
}
