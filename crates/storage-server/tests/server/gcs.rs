//! Google Cloud Storage, with `object_store` as the client, which uses the XML interface.

use longshore_storage_server::{Dialect, Options, Server};
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder};
use object_store::path::Path;
use object_store::{Error, GetOptions, ObjectStore, ObjectStoreExt};

use crate::common::{ask, blocking, check_reading, fill, no_retries};

fn store(server: &Server, signed: bool) -> GoogleCloudStorage {
    let mut builder = GoogleCloudStorageBuilder::new().with_bucket_name("models");
    for (name, value) in server.environment_with(Dialect::Gcs, signed) {
        builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
    }
    builder.with_retry(no_retries()).build().unwrap()
}

#[test]
fn the_client_reads() {
    for signed in [true, false] {
        let (server, content) = fill(Options { page_entries_max: 2, ..Options::default() });
        blocking(check_reading(&store(&server, signed), &server, &content));
        assert!(server.requests().iter().all(|request| request.authorization == signed));
    }
}

#[test]
fn a_generation_is_gone_once_the_object_is_replaced() {
    let (server, _) = fill(Options::default());
    let store = store(&server, true);
    let path = Path::from("model/weights-1.safetensors");
    blocking(async {
        let version = store.head(&path).await.unwrap().version;
        assert!(version.is_some());
        let pinned = GetOptions { version, ..GetOptions::default() };
        store.get_opts(&path, pinned.clone()).await.unwrap();
        server.replace("models", "model/weights-1.safetensors");
        let gone = store.get_opts(&path, pinned).await.unwrap_err();
        assert!(matches!(gone, Error::NotFound { .. }), "{gone}");
    });
    let object = "/models/model%2Fconfig%2Ejson";
    let stale = ask(&server, Dialect::Gcs, "GET", object, &[("x-goog-if-generation-match", "1")]);
    assert_eq!(stale.status, 412);
}

#[test]
fn private_buckets_ask_for_the_token() {
    let (server, _) = fill(Options { private: true, ..Options::default() });
    let path = Path::from("model/config.json");
    blocking(async {
        store(&server, true).get(&path).await.unwrap();
        let unsigned = store(&server, false).get(&path).await.unwrap_err();
        assert!(matches!(unsigned, Error::PermissionDenied { .. }), "{unsigned}");
    });
    let wrong = [("authorization", "Bearer other")];
    assert_eq!(ask(&server, Dialect::Gcs, "GET", "/models/model/config.json", &wrong).status, 401);
}

#[test]
fn the_json_interface_lists_and_reads() {
    let (server, _) = fill(Options { page_entries_max: 3, ..Options::default() });
    let json = |target: &str| -> serde_json::Value {
        let answer = ask(&server, Dialect::Gcs, "GET", target, &[]);
        assert_eq!(answer.status, 200);
        serde_json::from_slice(&answer.body).unwrap()
    };
    let first = json("/storage/v1/b/models/o?prefix=model%2F");
    let token = first["nextPageToken"].as_str().unwrap();
    let second = json(&format!("/storage/v1/b/models/o?prefix=model%2F&pageToken={token}"));
    let count = |page: &serde_json::Value| page["items"].as_array().unwrap().len();
    assert_eq!((count(&first), count(&second)), (3, 2));
    assert_eq!(first["items"][0]["name"], "model/config.json");
    assert!(second.get("nextPageToken").is_none());
    let media = "/storage/v1/b/models/o/model%2Fconfig.json?alt=media";
    assert_eq!(ask(&server, Dialect::Gcs, "GET", media, &[]).body, b"{}");
    let metadata = json("/storage/v1/b/models/o/model%2Fconfig.json");
    assert_eq!((&metadata["size"], &metadata["etag"]), (&"2".into(), &first["items"][0]["etag"]));
    let nothing = "/storage/v1/b/models/o/nothing?alt=media";
    let nothing = ask(&server, Dialect::Gcs, "GET", nothing, &[]);
    let error: serde_json::Value = serde_json::from_slice(&nothing.body).unwrap();
    assert_eq!((nothing.status, &error["error"]["code"]), (404, &404.into()));
}
