//! S3, with `object_store` as the client, and with requests by hand where it has no way to make them.

use crate::common::{Answer, NAMES, ask, blocking, client_error, fill, names};
use longshore_storage_server::{Dialect, Options, Server};
use object_store::aws::{AmazonS3, AmazonS3Builder};
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
fn objects_are_read_whole_and_by_range() {
    let (server, content) = fill(Options::default());
    let store = store(&server, true);
    blocking(async {
        let path = Path::from("model/weights-1.safetensors");
        let meta = store.head(&path).await.unwrap();
        assert_eq!(meta.size, content.len() as u64);
        let whole = store.get(&path).await.unwrap();
        assert_eq!(whole.meta.e_tag, meta.e_tag);
        assert_eq!(whole.bytes().await.unwrap(), content);
        for range in [0..1, 5..9, 100_000..400_001, content.len() - 1..content.len()] {
            let asked = range.start as u64..range.end as u64;
            assert_eq!(store.get_range(&path, asked).await.unwrap(), content[range]);
        }
        let suffix = GetOptions { range: Some(GetRange::Suffix(7)), ..GetOptions::default() };
        let end = store.get_opts(&path, suffix).await.unwrap().bytes().await.unwrap();
        assert_eq!(end, content[content.len() - 7..]);
    });
    assert!(server.requests().iter().all(|request| request.authorization));
    assert_eq!(server.requests()[3].range.as_deref(), Some("bytes=5-8"));
}

#[test]
fn what_is_past_the_end_is_left_out_or_refused() {
    let (server, content) = fill(Options::default());
    let store = store(&server, false);
    let size = content.len() as u64;
    blocking(async {
        let path = Path::from("model/weights-1.safetensors");
        let end = store.get_range(&path, size - 3..size + 100).await.unwrap();
        assert_eq!(end, content[content.len() - 3..]);
        let error = client_error(store.get_range(&path, size..size + 1).await);
        assert!(error.contains("InvalidRange"), "{error}");
        let nothing = store.get(&Path::from("model/nothing")).await.unwrap_err();
        assert!(matches!(nothing, Error::NotFound { .. }), "{nothing}");
    });
    let statuses: Vec<u16> = server.requests().iter().map(|request| request.status).collect();
    assert_eq!(statuses, [206, 416, 404]);
}

#[test]
fn lists_have_pages_prefixes_and_delimiters() {
    let (server, _) = fill(Options { page_entries_max: 2, ..Options::default() });
    let store = store(&server, true);
    blocking(async {
        let all = names(&store, None).await;
        assert_eq!(all, NAMES);
        let some = names(&store, Some("model/sub")).await;
        assert_eq!(some, ["model/sub/config.json", "model/sub/ä é+%&<.json"]);
        let level = store.list_with_delimiter(Some(&Path::from("model"))).await.unwrap();
        let prefixes: Vec<&str> = level.common_prefixes.iter().map(Path::as_ref).collect();
        assert_eq!(prefixes, ["model/sub"]);
        assert_eq!(level.objects.len(), 3);
        let path = Path::parse("model/sub/ä é+%&<.json").unwrap();
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "strange");
    });
    let lists = server.requests().iter().filter(|request| request.object.is_empty()).count();
    assert!(lists >= 6, "{lists}");
}

#[test]
fn a_condition_on_a_replaced_object_fails() {
    let (server, content) = fill(Options::default());
    let store = store(&server, true);
    blocking(async {
        let path = Path::from("model/weights-1.safetensors");
        let before = store.head(&path).await.unwrap();
        let if_match = GetOptions {
            range: Some((0..10).into()),
            if_match: before.e_tag.clone(),
            ..GetOptions::default()
        };
        let read = store.get_opts(&path, if_match.clone()).await.unwrap();
        assert_eq!(read.bytes().await.unwrap(), content[..10]);
        let new = GetOptions { if_none_match: before.e_tag.clone(), ..GetOptions::default() };
        let same = store.get_opts(&path, new).await.unwrap_err();
        assert!(matches!(same, Error::NotModified { .. }), "{same}");
        server.replace("models", "model/weights-1.safetensors");
        let replaced = store.get_opts(&path, if_match).await.unwrap_err();
        assert!(matches!(replaced, Error::Precondition { .. }), "{replaced}");
        assert_ne!(store.head(&path).await.unwrap().e_tag, before.e_tag);
    });
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

        let clock_ahead = std::time::Duration::from_secs(20 * 60);
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
