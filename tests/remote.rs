//! Checkpoints that are not on this host, through a real server over loopback: the same bytes as from a directory, each once.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::BTreeMap,
    env,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use longshore::Load;
use longshore_harness::{
    cases, compare,
    generator::{Checkpoint, Family, Scheme},
    scratch::Scratch,
};
use longshore_storage_server::{Action, Dialect, Operation, Options, Rule, Server};
use serde_json::{Value, json as value};
use sha2::Digest;

#[path = "common/mixed.rs"]
mod mixed;

/// The program in an environment that leads to the server and to a cache of the test's own, and to nothing else.
fn longshore(server: &Server, dialect: Dialect, scratch: &Scratch) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longshore"));
    command.env_clear().envs(server.environment(dialect));
    command.env("LONGSHORE_CACHE_DIR", scratch.join("cache")).env("HOME", scratch.join("home"));
    command
}

/// What a bucket is called in the dialect.
fn uri(dialect: Dialect, bucket: &str) -> String {
    match dialect {
        Dialect::S3 => format!("s3://{bucket}/some/model/"),
        Dialect::Gcs => format!("gs://{bucket}/some/model"),
        Dialect::Azure => format!("AZ://{bucket}/some/model"),
        _ => format!("{bucket}/model"),
    }
}

/// Serves the files of `dir`.
fn serve(server: &Server, dialect: Dialect, bucket: &str, dir: &Path) {
    if dialect == Dialect::Hub {
        return server.serve(&format!("{bucket}/model"), dir);
    }
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = format!("some/model/{}", entry.file_name().to_str().unwrap());
        server.put(bucket, &name, std::fs::read(entry.path()).unwrap());
    }
}

fn json(command: &mut Command) -> Value {
    let ran = command.output().unwrap();
    let complaint = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{command:?}: {complaint}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

/// The one line of a command that must fail, and its exit code.
fn failure(command: &mut Command) -> (String, i32) {
    let ran = command.output().unwrap();
    let line = String::from_utf8(ran.stderr).unwrap().trim_end().to_owned();
    assert!(!ran.status.success(), "{command:?}");
    assert_eq!(line.lines().count(), 1, "{command:?}: {line}");
    (line, ran.status.code().expect("it exits"))
}

/// Every byte of a weight file is fetched once for all ranks, headers apart.
fn every_public_case(dialect: Dialect) {
    let server = Server::start(Options::default());
    for (number, case) in cases::cases().iter().enumerate() {
        let scratch = Scratch::new().unwrap();
        let (dir, out) = (scratch.join("checkpoint"), scratch.join("out"));
        case.checkpoint.write(&dir).unwrap();
        let bucket = format!("bucket{number}");
        serve(&server, dialect, &bucket, &dir);
        server.clear_log();
        let told = json(
            longshore(&server, dialect, &scratch)
                .args(["load", "--json", "--log-level", "error", &uri(dialect, &bucket)])
                .args(case.options.arguments())
                .arg("--out")
                .arg(&out),
        );
        compare::with_case(&out, case).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        assert_eq!(told["storage_bytes_read"], told["needed_bytes"], "{}", case.name);
    }
}

#[test]
fn every_public_case_is_byte_exact_from_s3() {
    every_public_case(Dialect::S3);
}

#[test]
fn every_public_case_is_byte_exact_from_gcs() {
    every_public_case(Dialect::Gcs);
}

#[test]
fn every_public_case_is_byte_exact_from_azure() {
    every_public_case(Dialect::Azure);
}

#[test]
fn every_public_case_is_byte_exact_from_the_hub() {
    every_public_case(Dialect::Hub);
}

/// Four processes that start together: what is not weights is fetched once, and of the weights each byte once beside the headers.
#[test]
fn processes_that_start_together_fetch_metadata_once() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    serve(&server, Dialect::S3, "models", &dir);
    let told = json(
        longshore(&server, Dialect::S3, &scratch)
            .args(["load", "--json", "--log-level", "error", "--tp", "4", "--ranks", "processes"])
            .arg(uri(Dialect::S3, "models")),
    );
    assert_eq!(told["storage_bytes_read"], told["needed_bytes"]);
    let mut gets: BTreeMap<String, u32> = BTreeMap::new();
    for request in server.requests().into_iter().filter(|r| r.operation == Operation::Get) {
        // a file's header begins it, and nothing else does
        let of_header = request.range.as_ref().is_some_and(|range| range.starts_with("bytes=0-"));
        if of_header || !request.object.ends_with(".safetensors") {
            *gets.entry(request.object).or_default() += 1;
        }
    }
    assert!(gets.contains_key("some/model/config.json"), "{gets:?}");
    assert!(gets.values().all(|&count| count == 1), "{gets:?}");
}

/// A second load finds the metadata in the cache; one whose configuration was replaced does not.
#[test]
fn metadata_is_fetched_again_only_when_it_has_changed() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    serve(&server, Dialect::S3, "models", &dir);
    let fetched = |uri: &str| {
        server.clear_log();
        json(
            longshore(&server, Dialect::S3, &scratch)
                .args(["plan", "--json", "--log-level", "error", "--tp", "2"])
                .arg(uri),
        );
        let requests = server.requests();
        let config = |r: &&longshore_storage_server::Request| {
            r.operation == Operation::Get && r.object.ends_with("/config.json")
        };
        requests.iter().filter(config).count()
    };
    assert_eq!(fetched("s3://models/some/model/"), 1);
    // one model, one entry, however it is spelled
    assert_eq!(fetched("S3://models/some/model"), 0);
    server.replace("models", "some/model/config.json");
    assert_eq!(fetched("s3://models/some/model"), 1);
    let listed = json(longshore(&server, Dialect::S3, &scratch).args(["cache", "--json"]));
    // two states of the configuration, one of the headers
    assert_eq!(listed.as_array().unwrap().len(), 3, "{listed}");
}

/// An object that is replaced in the middle of a load ends it, and is named; no mix is handed out.
#[test]
fn an_object_that_is_replaced_is_an_error() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let (dir, out) = (scratch.join("checkpoint"), scratch.join("out"));
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    serve(&server, Dialect::S3, "models", &dir);
    let replaced = Rule::new(Action::ChangeEtag).object("*.safetensors").operation(Operation::Get);
    server.fault(replaced.skip(8).times(1));
    let mut command = longshore(&server, Dialect::S3, &scratch);
    command.args(["load", "--log-level", "error", "--tp", "2", "--read-size", "64KiB", "--out"]);
    let (line, code) = failure(command.arg(&out).arg(uri(Dialect::S3, "models")));
    assert!(line.contains("replaced") && line.contains(".safetensors"), "{line}");
    assert_eq!(code, 1, "{line}");
    assert!(!out.join("manifest.json").exists());
}

/// What the user can mend is refused with exit code 2 and says what to do.
#[test]
fn what_the_user_can_mend_is_refused() {
    let server = Server::start(Options { private: true, ..Options::default() });
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    serve(&server, Dialect::S3, "models", &dir);
    for (uri, want) in [
        ("s3://models/other", "config.json"),
        ("s3://no-such-bucket/model", "no-such-bucket"),
        ("ftp://models/some", "ftp"),
        ("s3:///some", "bucket"),
    ] {
        let mut command = longshore(&server, Dialect::S3, &scratch);
        let (line, code) =
            failure(command.args(["load", "--log-level", "error", "--tp", "1", uri]));
        assert!(line.contains(want), "{line}");
        assert_eq!(code, 2, "{line}");
    }
}

/// `--verify`: what is published is compared, by the hub and by files beside the weights; what is not is named.
#[test]
fn weights_are_verified_against_what_is_published() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    server.serve("org/model", &dir);
    serve(&server, Dialect::S3, "models", &dir);
    let load = |dialect: Dialect, uri: &str, ranks: &str| {
        let mut command = longshore(&server, dialect, &scratch);
        command.args(["load", "--json", "--log-level", "error", "--tp", "2", "--verify"]);
        command.args(["--ranks", ranks, uri]);
        command
    };
    let files = |told: &Value, key: &str| told["verified"][key].as_array().unwrap().len();
    for ranks in ["threads", "processes"] {
        // small files of the hub are in git, which publishes no SHA-256
        let told = json(&mut load(Dialect::Hub, "org/model", ranks));
        assert_eq!(files(&told, "verified") + files(&told, "unpublished"), 4, "{told}");
        let told = json(&mut load(Dialect::S3, "s3://models/some/model", ranks));
        assert_eq!((files(&told, "verified"), files(&told, "unpublished")), (0, 4));
    }
    let name = "model-00002-of-00004.safetensors";
    let mut bytes = std::fs::read(dir.join(name)).unwrap();
    let digest: String =
        sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    server.put("models", "some/model/SHA256SUMS", format!("{digest}  {name}\n"));
    let told = json(&mut load(Dialect::S3, "s3://models/some/model", "threads"));
    assert_eq!((files(&told, "verified"), files(&told, "unpublished")), (1, 3));
    // one bit, of which nothing else tells
    *bytes.last_mut().unwrap() ^= 1;
    server.put("models", &format!("some/model/{name}"), bytes);
    for ranks in ["threads", "processes"] {
        let (line, code) = failure(&mut load(Dialect::S3, "s3://models/some/model", ranks));
        assert!(line.contains(name) && line.contains(&digest), "{line}");
        assert_eq!(code, 2, "{line}");
    }
}

/// Nothing secret is printed, however much is.
#[test]
fn no_secret_is_printed() {
    let server = Server::start(Options { private: true, ..Options::default() });
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    server.serve("org/model", &dir);
    for dialect in [Dialect::S3, Dialect::Gcs, Dialect::Azure] {
        serve(&server, dialect, "models", &dir);
    }
    // some of what goes wrong is printed too
    server.fault(Rule::new(Action::status(503)).operation(Operation::Get).share(0.2));
    for dialect in [Dialect::S3, Dialect::Gcs, Dialect::Azure, Dialect::Hub] {
        let uri = if dialect == Dialect::Hub { "org/model".into() } else { uri(dialect, "models") };
        for uri in [uri.clone(), format!("{uri}-of-another-name")] {
            let mut command = longshore(&server, dialect, &scratch);
            command.envs(server.environment_with(dialect, true));
            let told = command
                .args(["load", "--log-level", "trace", "--tp", "2", "--ranks", "processes", &uri])
                .output()
                .unwrap();
            let told = [&told.stdout[..], &told.stderr[..]].concat();
            let told = String::from_utf8_lossy(&told);
            assert!(!told.is_empty());
            for secret in server.secrets() {
                assert!(!told.contains(&secret), "{dialect:?} {uri}: {secret} in\n{told}");
            }
        }
    }
}

/// `--download`: read from local storage, now and later, as long as it is in the same state.
#[test]
fn a_downloaded_checkpoint_is_read_from_the_cache() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    server.serve("org/model", &dir);
    let sent = |object: &str| server.sent_bytes("org/model", object);
    let file = "model-00002-of-00004.safetensors";
    let bytes = std::fs::metadata(dir.join(file)).unwrap().len();
    let local = {
        let mut command = longshore(&server, Dialect::Hub, &scratch);
        json(command.args(["load", "--json", "--log-level", "error", "--tp", "2"]).arg(&dir))
    };
    for (extra, times) in [(&["--download"][..], 1), (&[], 1), (&["--download"], 1)] {
        let mut command = longshore(&server, Dialect::Hub, &scratch);
        command.args(["load", "--json", "--log-level", "error", "--tp", "2", "org/model"]);
        assert_eq!(json(command.args(extra))["digest"], local["digest"]);
        assert_eq!(sent(file), times * bytes, "{extra:?}");
    }
}

/// A process that is killed while it fills the cache, wherever, leaves nothing that a later one takes for complete.
#[test]
fn a_killed_download_leaves_nothing_half() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    serve(&server, Dialect::S3, "models", &dir);
    let load = |extra: &[&str]| {
        let mut command = longshore(&server, Dialect::S3, &scratch);
        command.args(["load", "--json", "--log-level", "error", "--tp", "2"]).args(extra);
        command.arg("s3://models/some/model");
        command
    };
    let slow = Rule::new(Action::Delay(std::time::Duration::from_millis(15)));
    server.fault(slow.operation(Operation::Get));
    for after in 0..20 {
        let mut child = load(&["--download"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10 * after));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    server.clear_faults();
    let mut command = longshore(&server, Dialect::S3, &scratch);
    let local =
        json(command.args(["load", "--json", "--log-level", "error", "--tp", "2"]).arg(&dir));
    for extra in [&[][..], &["--download"], &[]] {
        assert_eq!(json(&mut load(extra))["digest"], local["digest"], "{extra:?}");
    }
}

/// What [`reloading_process`] loads.
const SOURCE: &str = "RELOAD_SOURCE";

/// Not a test by itself: loads what it is told to, and reloads it for each line of its stdin; tells what it holds each time.
#[test]
#[ignore = "a process of another test"]
fn reloading_process() {
    let Ok(source) = env::var(SOURCE) else { return };
    let mut loaded = Load::from(&*source).tensor_parallel(2).start().unwrap().wait().unwrap();
    let mut lines = std::io::stdin().lines();
    loop {
        let (report, digest) = (loaded.report(), loaded.digest().unwrap());
        let told = value!({
            "digest": digest,
            "read": report.storage_bytes_read,
            "kept": report.kept_bytes,
            "needed": report.needed_bytes,
        });
        // beside what the test's own harness prints
        let _ = writeln!(std::io::stderr(), "@{told}");
        if lines.next().is_none() {
            return;
        }
        loaded.reload(&*source).unwrap_or_else(|e| panic!("{}", e.line()));
    }
}

/// An object with the entity tag that it had is not fetched again; one with another is, and what belongs to its bytes.
#[test]
fn a_reload_fetches_the_objects_that_have_another_entity_tag() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Fp8).files(5);
    let [a, b, one] = ["a", "b", "one"].map(|name| scratch.join(name));
    checkpoint.clone().seed(1).write(&a).unwrap();
    checkpoint.clone().seed(2).write(&b).unwrap();
    mixed::mix(&a, &b, &one, |file| file == 2);
    let digest = |dir: &Path| {
        let mut command = longshore(&server, Dialect::S3, &scratch);
        let load = ["load", "--json", "--log-level", "error", "--tp", "2"];
        json(command.args(load).arg(dir))["digest"].clone()
    };
    let (of_a, of_one) = (digest(&a), digest(&one));
    serve(&server, Dialect::S3, "models", &a);

    let mut command = Command::new(env::current_exe().unwrap());
    command.env_clear().envs(server.environment(Dialect::S3)).env(SOURCE, "s3://models/some/model");
    command.env("LONGSHORE_CACHE_DIR", scratch.join("cache")).env("HOME", scratch.join("home"));
    command.args(["reloading_process", "--exact", "--ignored", "--nocapture"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut told = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
    let mut stdin = process.stdin.take().unwrap();
    let mut next = || {
        let line = told.find(|line| line.starts_with('@')).expect("it tells what it holds");
        let told: Value = serde_json::from_str(&line[1..]).unwrap();
        let number = |key: &str| told[key].as_u64().unwrap();
        (told["digest"].clone(), number("read"), number("kept"), number("needed"))
    };
    let mut again = || writeln!(stdin).unwrap();
    let weights = || {
        let requests = server.requests().into_iter();
        let gets = requests.filter(|r| r.operation == Operation::Get);
        let mut names: Vec<String> = gets.map(|r| r.object).collect();
        names.retain(|name| name.ends_with(".safetensors"));
        names
    };
    let (first, read, kept, needed) = next();
    assert_eq!((&first, read, kept), (&of_a, needed, 0));

    // nothing has changed
    server.clear_log();
    again();
    assert_eq!(next(), (of_a.clone(), 0, needed, needed));
    assert_eq!(weights(), Vec::<String>::new(), "no weights are asked for");

    // one object has
    let name = "model-00002-of-00005.safetensors";
    server.put("models", &format!("some/model/{name}"), std::fs::read(one.join(name)).unwrap());
    again();
    let (second, read, kept, _) = next();
    assert_eq!(second, of_one);
    assert!(read > 0 && kept > 0 && read + kept == needed, "{read} {kept} {needed}");
    assert!(weights().iter().any(|object| object.ends_with(name)));

    // one has by its entity tag alone: what is in it is not known before it was fetched
    server.replace("models", &format!("some/model/{name}"));
    again();
    let (third, read, kept, _) = next();
    assert_eq!(third, of_one);
    assert!(read > 0 && kept > 0 && read + kept == needed, "{read} {kept} {needed}");
    drop(stdin);
    assert!(process.wait().unwrap().success());
}

/// Of two revisions on the hub, the files with the same SHA-256 are the same; of two places in a bucket, none is.
#[test]
fn a_reload_of_another_revision_fetches_the_files_that_are_other() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Bf16).files(3);
    let [a, b, one] = ["a", "b", "one"].map(|name| scratch.join(name));
    checkpoint.clone().seed(1).write(&a).unwrap();
    checkpoint.clone().seed(2).write(&b).unwrap();
    mixed::mix(&a, &b, &one, |file| file == 2);
    let load = |dialect: Dialect, sources: [&str; 2]| {
        let mut command = longshore(&server, dialect, &scratch);
        command.args(["load", "--json", "--log-level", "error", "--tp", "2", sources[0]]);
        json(command.args(["--reload", sources[1]]))
    };
    let number = |told: &Value, key: &str| told[key].as_u64().unwrap();
    server.serve("org/model", &a);
    let first = format!("org/model@{}", server.commit("org/model"));
    server.serve("org/model", &one);
    let second = format!("org/model@{}", server.commit("org/model"));
    assert_ne!(first, second);
    let told = load(Dialect::Hub, [&first, &second]);
    let [read, kept, needed] =
        ["storage_bytes_read", "kept_bytes", "needed_bytes"].map(|key| number(&told, key));
    assert!(read > 0 && kept > 0 && read + kept == needed, "{read} {kept} {needed}");
    assert_eq!(load(Dialect::Hub, [&second, &second])["digest"], told["digest"]);

    for place in ["some", "other"] {
        for entry in std::fs::read_dir(&a).unwrap().flatten() {
            let name = format!("{place}/{}", entry.file_name().to_str().unwrap());
            server.put("models", &name, std::fs::read(entry.path()).unwrap());
        }
    }
    let told = load(Dialect::S3, ["s3://models/some", "s3://models/other"]);
    assert_eq!(number(&told, "kept_bytes"), 0);
    assert_eq!(number(&told, "storage_bytes_read"), needed);
    let told = load(Dialect::S3, ["s3://models/some", "s3://models/some/"]);
    assert_eq!((number(&told, "kept_bytes"), number(&told, "storage_bytes_read")), (needed, 0));
}
