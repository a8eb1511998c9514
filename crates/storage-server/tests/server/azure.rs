//! Azure Blob Storage, with `object_store` as the client.

use std::time::Duration;

use longshore_storage_server::{Action, Dialect, Options, Rule, Server};
use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::path::Path;
use object_store::{Error, ObjectStoreExt};

use crate::common::{ask, blocking, check_reading, client_error, fill, no_retries};

fn store(server: &Server, signed: bool) -> MicrosoftAzure {
    let mut builder = MicrosoftAzureBuilder::new().with_container_name("models");
    for (name, value) in server.environment_with(Dialect::Azure, signed) {
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

/// Their paths begin with the account.
#[test]
fn containers_are_found_as_in_an_emulator() {
    let (server, _) = fill(Options::default());
    for account in ["/storageserver", "/devstoreaccount1", ""] {
        let target = format!("{account}/models/model/config.json");
        assert_eq!(ask(&server, Dialect::Azure, "GET", &target, &[]).body, b"{}");
    }
    let range = [("range", "bytes=0-9"), ("x-ms-range", "bytes=1-1")];
    let answer = ask(&server, Dialect::Azure, "GET", "/models/model/config.json", &range);
    assert_eq!((answer.status, answer.body), (206, b"}".to_vec()));
}

#[test]
fn private_containers_ask_for_the_account_and_a_recent_date() {
    let private = Options { private: true, ..Options::default() };
    let (server, _) = fill(private.clone());
    let path = Path::from("model/config.json");
    blocking(async {
        store(&server, true).get(&path).await.unwrap();
        let unsigned = store(&server, false).get(&path).await.unwrap_err();
        assert!(matches!(unsigned, Error::Unauthenticated { .. }), "{unsigned}");
        let clock_ahead = Duration::from_secs(20 * 60);
        let (ahead, _) = fill(Options { clock_ahead, ..private });
        let error = client_error(store(&ahead, true).get(&path).await.map(|_| ()));
        assert!(error.contains("Request date header too old"), "{error}");
    });
    let other = [("authorization", "SharedKey other:abc")];
    assert_eq!(
        ask(&server, Dialect::Azure, "GET", "/models/model/config.json", &other).status,
        403
    );
}

#[test]
fn errors_have_azures_names() {
    let (server, _) = fill(Options::default());
    let code = |target: &str| {
        let answer = ask(&server, Dialect::Azure, "GET", target, &[]);
        (answer.status, answer.headers["x-ms-error-code"].clone())
    };
    assert_eq!(code("/models/nothing"), (404, "BlobNotFound".to_owned()));
    assert_eq!(code("/nothing/nothing"), (404, "ContainerNotFound".to_owned()));
    server.fault(Rule::new(Action::status(503)));
    assert_eq!(code("/models/model/config.json"), (503, "ServerBusy".to_owned()));
}
