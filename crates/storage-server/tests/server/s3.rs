//! S3, with `object_store` as the client, and with requests by hand where it has no way to make them.

use crate::common::{Answer, End, Raw, ask, blocking, check_reading, client_error, fill};
use std::time::Duration;

use longshore_storage_server::{Action, At, Dialect, Operation, Options, Rule, Server};
use object_store::aws::{AmazonS3, AmazonS3Builder, AwsCredential};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt};

fn store(server: &Server, signed: bool) -> AmazonS3 {
    builder(server, signed).build().unwrap()
}

fn builder(server: &Server, signed: bool) -> AmazonS3Builder {
    let mut builder = AmazonS3Builder::new().with_bucket_name("models");
    for (name, value) in server.environment_with(Dialect::S3, signed) {
        builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
    }
    builder.with_retry(crate::common::no_retries())
}

#[test]
fn the_client_reads() {
    let (server, content) = fill(Options { page_entries_max: 2, ..Options::default() });
    blocking(check_reading(&store(&server, true), &server, &content));
    let requests = server.requests();
    assert!(requests.iter().all(|request| request.authorization));
    assert!(requests.iter().any(|request| request.range.as_deref() == Some("bytes=5-8")));
    let lists = requests.iter().filter(|request| request.operation == Operation::List).count();
    assert!(lists >= 6, "{lists}");
}

#[test]
fn the_client_reads_unsigned_and_the_end_alone() {
    let (server, content) = fill(Options::default());
    blocking(async {
        let store = store(&server, false);
        check_reading(&store, &server, &content).await;
        let suffix = GetOptions { range: Some(GetRange::Suffix(7)), ..GetOptions::default() };
        let path = Path::from("model/weights-2.safetensors");
        let end = store.get_opts(&path, suffix).await.unwrap().bytes().await.unwrap();
        assert_eq!(end, content[content.len() - 7..]);
    });
    assert!(server.requests().iter().all(|request| !request.authorization));
}

#[test]
fn private_buckets_ask_for_the_right_key() {
    let (server, _) = fill(Options { private: true, ..Options::default() });
    let path = Path::from("model/config.json");
    let other = AmazonS3Builder::with_access_key_id;
    blocking(async {
        store(&server, true).get(&path).await.unwrap();
        let unsigned = store(&server, false).get(&path).await.unwrap_err();
        assert!(matches!(unsigned, Error::PermissionDenied { .. }), "{unsigned}");
        let stranger = other(builder(&server, true), "AKIAOTHER").build().unwrap();
        let error = client_error(stranger.get(&path).await.map(|_| ()));
        assert!(error.contains("InvalidAccessKeyId"), "{error}");
        server.set_private("models", false);
        store(&server, false).get(&path).await.unwrap();
    });
}

/// A client that fetches new ones goes on; one that keeps the old ones is refused.
#[test]
fn temporary_credentials_expire() {
    let credentials_lifetime = Duration::from_secs(1);
    let options = Options { private: true, credentials_lifetime, ..Options::default() };
    let (server, _) = fill(options);
    let token_file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token_file.path(), "container").unwrap();
    let mut builder = AmazonS3Builder::new().with_bucket_name("models");
    for (name, value) in server.environment_of_role(token_file.path()) {
        builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
    }
    let role = builder.with_retry(crate::common::no_retries()).build().unwrap();
    let path = Path::from("model/config.json");
    blocking(async {
        let first = role.credentials().get_credential().await.unwrap();
        let kept = builder_with(&server, &first).build().unwrap();
        kept.get(&path).await.unwrap();
        let until = std::time::Instant::now() + Duration::from_secs(20);
        let error = loop {
            role.get(&path).await.unwrap();
            match kept.get(&path).await {
                Ok(_) if std::time::Instant::now() < until => {}
                result => break client_error(result.map(|_| ())),
            }
        };
        assert!(error.contains("ExpiredToken"), "{error}");
        role.get(&path).await.unwrap();
        let without_token = builder_with(&server, &first).with_token("other").build().unwrap();
        let error = client_error(without_token.get(&path).await.map(|_| ()));
        assert!(error.contains("InvalidToken"), "{error}");
    });
}

fn builder_with(server: &Server, credential: &AwsCredential) -> AmazonS3Builder {
    builder(server, true)
        .with_access_key_id(&credential.key_id)
        .with_secret_access_key(&credential.secret_key)
        .with_token(credential.token.as_deref().unwrap_or(""))
}

#[test]
fn wrong_regions_and_clocks_have_their_own_errors() {
    let (server, _) = fill(Options::default());
    let path = Path::from("model/config.json");
    blocking(async {
        let there = builder(&server, true).with_region("eu-west-9").build().unwrap();
        let error = client_error(there.get(&path).await.map(|_| ()));
        assert!(error.contains("AuthorizationHeaderMalformed"), "{error}");
        assert!(error.contains("<Region>us-east-1</Region>"), "{error}");
        server.set_region("models", "eu-west-9");
        let error = client_error(store(&server, true).get(&path).await.map(|_| ()));
        assert!(error.contains("redirect without LOCATION"), "{error}");
        let Answer { status, headers, body } =
            ask(&server, Dialect::S3, "GET", "/models/model/config.json", &[]);
        assert_eq!((status, headers["x-amz-bucket-region"].as_str()), (301, "eu-west-9"));
        assert!(String::from_utf8(body).unwrap().contains("<Code>PermanentRedirect</Code>"));

        let clock_ahead = Duration::from_secs(20 * 60);
        let (ahead, _) = fill(Options { clock_ahead, ..Options::default() });
        let error = client_error(store(&ahead, true).get(&path).await.map(|_| ()));
        assert!(error.contains("RequestTimeTooSkewed"), "{error}");
    });
}

#[test]
fn buckets_are_found_by_host_and_by_path() {
    let (server, _) = fill(Options::default());
    let host = [("host", "models.localhost")];
    let by_host = ask(&server, Dialect::S3, "GET", "/model/config.json", &host);
    let by_path = ask(&server, Dialect::S3, "GET", "/models/model/config.json", &[]);
    assert_eq!((by_host.status, by_host.body), (200, by_path.body));
    let nothing = ask(&server, Dialect::S3, "GET", "/nothing/model/config.json", &[]);
    assert_eq!(nothing.status, 404);
    assert!(String::from_utf8(nothing.body).unwrap().contains("<Code>NoSuchBucket</Code>"));
    let bucket = ask(&server, Dialect::S3, "HEAD", "/models", &[]);
    assert_eq!((bucket.status, bucket.headers["x-amz-bucket-region"].as_str()), (200, "us-east-1"));
    let location = ask(&server, Dialect::S3, "GET", "/models/?location", &[]);
    assert!(String::from_utf8(location.body).unwrap().contains(">us-east-1<"));
    let put = ask(&server, Dialect::S3, "PUT", "/models/new", &[("content-length", "0")]);
    assert_eq!(put.status, 501);
}

/// Whether the page cache has a file makes no difference.
#[test]
fn files_are_read_from_disk_too() {
    use std::os::fd::AsRawFd;

    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> =
        (0..5_000_001u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let path = dir.path().join("file");
    std::fs::write(&path, &content).unwrap();
    let server = Server::start(Options::default());
    server.serve("models", dir.path());
    for cached in [true, false] {
        if !cached {
            let file = std::fs::File::open(&path).unwrap();
            file.sync_all().unwrap();
            // SAFETY: the file is open
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        let whole = ask(&server, Dialect::S3, "GET", "/models/file", &[]);
        assert!(whole.body == content, "cached: {cached}");
        let range = [("range", "bytes=4095-4999999")];
        let part = ask(&server, Dialect::S3, "GET", "/models/file", &range);
        assert!(part.body == content[4095..5_000_000], "cached: {cached}");
    }
}

/// Nothing is made up where a file has become shorter than was promised.
#[test]
fn files_that_shrink_end_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, vec![1; 3_000_000]).unwrap();
    let server = Server::start(Options::default());
    server.serve("models", dir.path());
    let duration = Some(Duration::from_millis(300));
    server.fault(Rule::new(Action::Stall { at: Some(At::Bytes(1000)), duration }));
    let mut raw = Raw::open(&server, Dialect::S3, Duration::from_secs(10));
    raw.send("GET", "/models/file", &[]);
    while server.requests().first().is_none_or(|request| request.status == 0) {
        std::thread::yield_now();
    }
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1_000_000).unwrap();
    let (answer, end) = raw.receive("GET");
    assert_eq!(end, End::Closed);
    assert!(answer.unwrap().body == vec![1; 1_000_000]);
}
