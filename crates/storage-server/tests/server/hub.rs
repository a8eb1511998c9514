//! The Hugging Face hub, by hand and with a client that follows redirects.

use std::collections::BTreeMap;
use std::time::Duration;

use longshore_storage_server::{Action, Dialect, Operation, Options, Rule, Server};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::common::{Answer, ask, blocking, fill};

const REPOSITORY: &str = "acme/tiny";

/// A server with a repository of a large and a small file, and the content of the large one.
fn hub(options: Options) -> (Server, Vec<u8>) {
    let (server, content) = fill(options);
    server.put(REPOSITORY, "model.safetensors", content.clone());
    server.put(REPOSITORY, "config.json", "{}");
    server.put(REPOSITORY, "sub/a b.txt", "deep");
    (server, content)
}

fn get(server: &Server, target: &str) -> Answer {
    ask(server, Dialect::Hub, "GET", target, &[])
}

fn json(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200);
    serde_json::from_slice(&answer.body).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The path and query of a URL of the other host.
fn on_cdn(server: &Server, answer: &Answer) -> String {
    let location = &answer.headers["location"];
    location.strip_prefix(&server.url(Dialect::Cdn)).unwrap().to_owned()
}

#[test]
fn a_repository_tells_its_commit_its_files_and_their_digests() {
    let (server, content) = hub(Options::default());
    let short = json(&get(&server, "/api/models/acme/tiny"));
    assert_eq!(short["sha"], server.commit(REPOSITORY));
    assert_eq!(short["siblings"][0], serde_json::json!({ "rfilename": "config.json" }));
    let full = json(&get(&server, "/api/models/acme/tiny/revision/main?blobs=true"));
    let siblings = full["siblings"].as_array().unwrap();
    assert_eq!(siblings.len(), 3);
    assert_eq!((&siblings[0]["size"], siblings[0].get("lfs")), (&2.into(), None));
    assert_eq!(siblings[1]["lfs"]["sha256"], sha256(&content));
    assert_eq!(siblings[1]["lfs"]["size"], content.len());
    let by_commit = format!("/api/models/acme/tiny/revision/{}", server.commit(REPOSITORY));
    assert_eq!(json(&get(&server, &by_commit))["sha"], full["sha"]);
}

#[test]
fn a_tree_has_pages() {
    let (server, content) = hub(Options { page_entries_max: 2, ..Options::default() });
    let first = get(&server, "/api/models/acme/tiny/tree/main?recursive=true");
    let link = first.headers["link"].clone();
    let next = link.strip_prefix("<http://127.0.0.1").unwrap().split('>').next().unwrap();
    let second = get(&server, next);
    assert!(!second.headers.contains_key("link"));
    let (first, second) = (json(&first), json(&second));
    assert_eq!(
        (&first[0]["path"], &first[1]["lfs"]["oid"]),
        (&"config.json".into(), &sha256(&content).into())
    );
    assert_eq!((&second[0]["path"], &second[1]), (&"sub/a b.txt".into(), &Value::Null));
    let paths = |target: &str| {
        let tree = json(&get(&server, target));
        tree.as_array().unwrap().iter().map(|file| file["path"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(paths("/api/models/acme/tiny/tree/main/sub?recursive=False"), ["sub/a b.txt"]);
    let (server, _) = hub(Options::default());
    let top = json(&get(&server, "/api/models/acme/tiny/tree/main"));
    assert_eq!((&top[2]["path"], &top[2]["type"]), (&"sub".into(), &"directory".into()));
}

/// A redirect to the other host, whose ETag is another one; by HEAD as by GET.
#[test]
fn large_files_are_on_the_other_host() {
    let (server, content) = hub(Options::default());
    for method in ["HEAD", "GET"] {
        let target = "/acme/tiny/resolve/main/model.safetensors";
        let answer = ask(&server, Dialect::Hub, method, target, &[]);
        assert_eq!(answer.status, 302);
        assert_eq!(answer.headers["x-repo-commit"], server.commit(REPOSITORY));
        assert_eq!(answer.headers["x-linked-size"], content.len().to_string());
        assert_eq!(answer.headers["x-linked-etag"], format!("\"{}\"", sha256(&content)));
        let there = on_cdn(&server, &answer);
        let part = ask(&server, Dialect::Cdn, "GET", &there, &[("range", "bytes=7-99")]);
        assert_eq!((part.status, part.body), (206, content[7..100].to_vec()));
        assert_ne!(part.headers["etag"], answer.headers["x-linked-etag"]);
        let head = ask(&server, Dialect::Cdn, "HEAD", &there, &[]);
        assert_eq!(head.headers["content-length"], content.len().to_string());
    }
    assert_eq!(server.sent_bytes(REPOSITORY, "model.safetensors"), 2 * 93);
}

#[test]
fn small_files_are_behind_a_relative_redirect() {
    let (server, _) = hub(Options::default());
    let answer = get(&server, "/acme/tiny/resolve/main/sub/a%20b.txt");
    assert_eq!(answer.status, 307);
    let content = get(&server, &answer.headers["location"]);
    assert_eq!((content.status, content.body.as_slice()), (200, b"deep".as_slice()));
    assert_eq!(content.headers["etag"], answer.headers["x-linked-etag"]);
    assert_eq!(content.headers["x-repo-commit"], server.commit(REPOSITORY));
}

#[test]
fn a_redirect_is_signed_for_its_file_and_its_time() {
    let (server, _) = hub(Options { redirect_lifetime: Duration::ZERO, ..Options::default() });
    let answer = get(&server, "/acme/tiny/resolve/main/model.safetensors");
    let there = on_cdn(&server, &answer);
    let until = std::time::Instant::now() + Duration::from_secs(20);
    // the time is in whole seconds
    let expired = loop {
        let answer = ask(&server, Dialect::Cdn, "GET", &there, &[]);
        if answer.status == 403 || std::time::Instant::now() > until {
            break answer;
        }
    };
    assert!(String::from_utf8(expired.body).unwrap().contains("Request has expired"));
    let other = there.replace("Expires=", "Expires=9");
    assert_eq!(ask(&server, Dialect::Cdn, "GET", &other, &[]).status, 403);
    let unsigned = there.split('?').next().unwrap();
    assert_eq!(ask(&server, Dialect::Cdn, "GET", unsigned, &[]).status, 403);
    let signature = there.split("Signature=").nth(1).unwrap().split('&').next().unwrap();
    assert!(server.secrets().iter().any(|secret| secret == signature));
}

/// A revision that was resolved stays what it is; `main` moves on.
#[test]
fn commits_stay_and_main_moves() {
    let (server, content) = hub(Options::default());
    let before = server.commit(REPOSITORY);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{\"new\":1}").unwrap();
    server.serve(REPOSITORY, dir.path());
    let after = server.commit(REPOSITORY);
    assert_ne!(before, after);
    assert_eq!(json(&get(&server, "/api/models/acme/tiny"))["sha"], after);
    let old = get(&server, &format!("/acme/tiny/resolve/{before}/model.safetensors"));
    let there = on_cdn(&server, &old);
    assert_eq!(ask(&server, Dialect::Cdn, "GET", &there, &[]).body, content);
    let gone = get(&server, "/acme/tiny/resolve/main/model.safetensors");
    assert_eq!((gone.status, gone.headers["x-error-code"].as_str()), (404, "EntryNotFound"));
    let nowhere = get(&server, "/acme/tiny/resolve/v9/config.json");
    assert_eq!(
        (nowhere.status, nowhere.headers["x-error-code"].as_str()),
        (404, "RevisionNotFound")
    );
}

#[test]
fn private_repositories_ask_for_the_token() {
    let (server, _) = hub(Options::default());
    server.set_private(REPOSITORY, true);
    let token = format!("Bearer {}", server.options().token);
    let status = |target: &str, token: Option<&str>| {
        let headers: Vec<_> = token.map(|token| ("authorization", token)).into_iter().collect();
        let answer = ask(&server, Dialect::Hub, "GET", target, &headers);
        (answer.status, answer.headers.get("x-error-code").cloned().unwrap_or_default())
    };
    let file = "/acme/tiny/resolve/main/config.json";
    assert_eq!(status(file, Some(&token)), (307, String::new()));
    assert_eq!(status(file, None), (401, "RepoNotFound".to_owned()));
    assert_eq!(status(file, Some("Bearer other")).0, 401);
    let nothing = "/acme/nothing/resolve/main/config.json";
    assert_eq!(status(nothing, None), (401, "RepoNotFound".to_owned()));
    assert_eq!(status(nothing, Some(&token)), (404, "RepoNotFound".to_owned()));
}

/// The log tells whether a client hands the token on, and rules tell the two hosts apart.
#[test]
fn what_reaches_the_other_host_is_logged() {
    let (server, content) = hub(Options::default());
    let on_cdn = Rule::new(Action::status(503)).dialect(Dialect::Cdn).operation(Operation::Get);
    let fault = server.fault(on_cdn.times(1));
    let url = format!("{}/acme/tiny/resolve/main/model.safetensors", server.url(Dialect::Hub));
    let statuses = blocking(async {
        let client = reqwest::Client::new();
        let mut statuses = Vec::new();
        for _ in 0..2 {
            let request = client.get(&url).bearer_auth(&server.options().token);
            let response = request.send().await.unwrap();
            statuses.push(response.status().as_u16());
            let body = response.bytes().await.unwrap();
            assert!(statuses != [503, 200] || body == content);
        }
        statuses
    });
    assert_eq!((statuses.as_slice(), server.taken(fault)), ([503, 200].as_slice(), 1));
    let reached: BTreeMap<_, _> =
        server.requests().iter().map(|request| (request.dialect, request.authorization)).collect();
    assert_eq!(reached, BTreeMap::from([(Dialect::Hub, true), (Dialect::Cdn, false)]));
}
