//! The weight cache, seen from outside: what is fetched once is read locally from then on, and is right whatever happened.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        fs::FileExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use longshore_harness::{
    cases, compare,
    generator::{Checkpoint, Family, Scheme},
    scratch::Scratch,
};
use longshore_storage_server::{Action, Dialect, Operation, Options, Rule, Server};
use serde_json::Value;

const URI: &str = "s3://models/some/model";

/// A model in a bucket, and a cache.
struct Story {
    server: Server,
    scratch: Scratch,
}

impl Story {
    fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let server = Server::start(Options::default());
        let checkpoint = Checkpoint::new(Family::Llama, Scheme::Bf16).files(3);
        let checkpoint = checkpoint.set("num_hidden_layers", 4).set("intermediate_size", 2048);
        checkpoint.write(&scratch.join("checkpoint")).unwrap();
        let story = Self { server, scratch };
        for name in story.names() {
            story.put(&name, |_| {});
        }
        story
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.scratch.join("checkpoint")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Puts a file into the bucket, changed.
    fn put(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.scratch.join("checkpoint").join(name);
        let mut content = fs::read(&path).unwrap();
        change(&mut content);
        fs::write(&path, &content).unwrap();
        self.server.put("models", &format!("some/model/{name}"), content);
    }

    /// The program in an environment that leads to the server and to directories of the test's own, and to nothing else.
    fn longshore(&self) -> Command {
        self.in_environment(Command::new(env!("CARGO_BIN_EXE_longshore")))
    }

    fn in_environment(&self, mut command: Command) -> Command {
        command.env_clear().envs(self.server.environment(Dialect::S3));
        command.env("LONGSHORE_CACHE_DIR", self.scratch.join("metadata"));
        command.env("HOME", self.scratch.join("home"));
        command
    }

    /// A load with the cache.
    fn load(&self, extra: &[&str]) -> Command {
        let mut command = self.longshore();
        self.arguments(&mut command, &self.cache());
        command.args(extra);
        command
    }

    fn arguments(&self, command: &mut Command, cache: &Path) {
        command.args(["load", "--json", "--log-level", "warn", "--device", "cpu"]);
        command.args(["--read-size", "64KiB", "--cache-dir"]).arg(cache).arg(URI);
    }

    /// The digest of the same load from the directory.
    fn digest(&self, tp: &str) -> Value {
        let mut command = self.longshore();
        command.args(["load", "--json", "--log-level", "warn", "--device", "cpu", "--tp", tp]);
        told(&command.arg(self.scratch.join("checkpoint")).output().unwrap())["digest"].clone()
    }

    /// Weight bytes that the server has sent since the last time, headers apart.
    fn sent(&self) -> u64 {
        let requests = self.server.requests();
        self.server.clear_log();
        let weights = requests.iter().filter(|request| {
            let of_header = request.range.as_ref().is_some_and(|r| r.starts_with("bytes=0-"));
            let get = request.operation == Operation::Get;
            get && !of_header && request.object.ends_with(".safetensors")
        });
        weights.map(|request| request.sent_bytes).sum()
    }

    /// What the load that just ended asked of storage, which the server has sent, and what it did not.
    fn read(&self, told: &Value) -> (u64, u64) {
        let (asked, cached) = read(told);
        // a slow request may have got a second one beside it
        let twice = told["retried_bytes"].as_u64().unwrap();
        let sent = self.sent();
        assert!(
            (asked..=asked + twice).contains(&sent),
            "{sent} sent, {asked} asked, {twice} again"
        );
        (asked, cached)
    }

    fn cache(&self) -> PathBuf {
        self.scratch.join("cache")
    }

    /// Everything that is kept, and what is half written.
    fn kept(&self) -> Vec<PathBuf> {
        let within = |dir: PathBuf| -> Vec<PathBuf> {
            fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
        };
        let models = within(self.cache().join("weights"));
        let files = models.into_iter().flat_map(within).flat_map(within);
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut kept: Vec<PathBuf> = files.filter(|path| name(path) != "used").collect();
        kept.sort();
        kept
    }

    fn half_written(&self) -> usize {
        self.kept().iter().filter(|path| path.to_str().unwrap().ends_with(".unfinished")).count()
    }
}

fn told(ran: &Output) -> Value {
    let complaint = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{complaint}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

fn run(mut command: Command) -> Value {
    told(&command.output().unwrap())
}

/// What was asked of storage, and what was not.
fn read(told: &Value) -> (u64, u64) {
    let number = |key: &str| told[key].as_u64().unwrap();
    let (asked, cached) = (number("storage_bytes_read"), number("cached_bytes_read"));
    assert_eq!(asked + cached, number("needed_bytes"));
    let ranks = told["ranks"].as_array().unwrap();
    let of_ranks = ranks.iter().map(|rank| rank["cached_bytes_read"].as_u64().unwrap());
    assert_eq!(of_ranks.sum::<u64>(), cached);
    (asked, cached)
}

/// Also by another group, by ranks that are processes, and forecast by a plan.
#[test]
fn what_was_fetched_once_is_read_locally() {
    let story = Story::new();
    let first = run(story.load(&["--tp", "2"]));
    assert_eq!(first["digest"], story.digest("2"));
    let needed = first["needed_bytes"].as_u64().unwrap();
    assert_eq!(story.read(&first), (needed, 0));
    for (tp, ranks) in [("2", "threads"), ("4", "threads"), ("1", "threads"), ("2", "processes")] {
        let again = run(story.load(&["--tp", tp, "--ranks", ranks]));
        assert_eq!(again["digest"], story.digest(tp), "tp {tp}, {ranks}");
        assert_eq!(story.read(&again), (0, needed), "tp {tp}, {ranks}");
        assert_eq!(again["ranks"][0]["storage_reads"], 0);
    }
    let mut table = story.longshore();
    table.args(["load", "--tp", "2", "--log-level", "warn", "--cache-dir"]).arg(story.cache());
    let table = table.arg(URI).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("read from storage 0 B (0.000 × needed), from the weight cache "),
        "{table}"
    );
}

/// Four processes that start together with an empty cache: each byte is fetched once, and not at all the second time.
#[test]
fn rank_processes_share_it() {
    let story = Story::new();
    let digest = story.digest("4");
    let load = || run(story.load(&["--tp", "4", "--ranks", "processes"]));
    let first = load();
    let needed = first["needed_bytes"].as_u64().unwrap();
    assert_eq!((story.read(&first), &first["digest"]), ((needed, 0), &digest));
    let second = load();
    assert_eq!((story.read(&second), &second["digest"]), ((0, needed), &digest));
}

/// Of every family and scheme, through the cache twice: byte-exact by an independent reading of the checkpoint.
#[test]
fn every_public_case_is_byte_exact_through_it() {
    let server = Server::start(Options::default());
    let scratch = Scratch::new().unwrap();
    for (number, case) in cases::cases().iter().enumerate() {
        let dir = scratch.join(&format!("checkpoint{number}"));
        case.checkpoint.write(&dir).unwrap();
        server.serve(&format!("case{number}"), &dir);
        for round in 0..2 {
            let out = scratch.join(&format!("out{number}-{round}"));
            let mut command = Command::new(env!("CARGO_BIN_EXE_longshore"));
            command.env_clear().envs(server.environment(Dialect::S3));
            command.env("LONGSHORE_CACHE_DIR", scratch.join("metadata"));
            command.env("HOME", scratch.join("home"));
            command.args(["load", "--json", "--log-level", "error", "--cache-dir"]);
            command.arg(scratch.join("cache")).arg(format!("s3://case{number}"));
            let told = run_with(command.args(case.options.arguments()).arg("--out").arg(&out));
            compare::with_case(&out, case)
                .unwrap_or_else(|e| panic!("{}, {round}: {e}", case.name));
            let number = |key: &str| told[key].as_u64().unwrap();
            let (asked, cached) = (number("storage_bytes_read"), number("cached_bytes_read"));
            assert_eq!(asked + cached, number("needed_bytes"), "{}, {round}", case.name);
            match round {
                // scalars that are compared before the load are kept, too
                0 => assert!(cached <= 1024, "{}: {cached}", case.name),
                _ => assert_eq!(asked, 0, "{}", case.name),
            }
        }
    }
}

fn run_with(command: &mut Command) -> Value {
    told(&command.output().unwrap())
}

/// What identifies an object is good enough on each service.
#[test]
fn every_service_can_be_kept() {
    let story = Story::new();
    let digest = story.digest("2");
    story.server.serve("org/model", story.scratch.join("checkpoint"));
    for (dialect, uri) in [
        (Dialect::S3, URI),
        (Dialect::Gcs, "gs://models/some/model"),
        (Dialect::Azure, "az://models/some/model"),
        (Dialect::Hub, "org/model"),
    ] {
        let load = || {
            let mut command = story.longshore();
            command.envs(story.server.environment(dialect));
            command.args(["load", "--json", "--log-level", "warn", "--tp", "2", "--cache-dir"]);
            run_with(command.arg(story.cache()).arg(uri))
        };
        let (first, second) = (load(), load());
        assert_eq!((&first["digest"], &second["digest"]), (&digest, &digest), "{uri}");
        assert_eq!((read(&first).1, read(&second).0), (0, 0), "{uri}");
    }
}

/// A limit lets a part be kept, which is read the next time; the limit holds.
#[test]
fn a_limit_holds_and_what_is_missing_is_fetched() {
    const LIMIT: u64 = 1 << 20;
    let story = Story::new();
    for ranks in ["threads", "processes"] {
        run(story.load(&["--tp", "2", "--cache-limit", "1MiB", "--ranks", ranks]));
        let allocated: u64 = story.kept().iter().map(|path| blocks(path)).sum();
        assert!(allocated > LIMIT / 2 && allocated <= LIMIT, "{ranks}: {allocated}");
        story.sent();
        let rest = run(story.load(&["--tp", "2", "--cache-limit", "1MiB", "--ranks", ranks]));
        let (asked, cached) = story.read(&rest);
        assert_eq!(rest["digest"], story.digest("2"));
        assert!(asked > 0 && cached > LIMIT / 2, "{ranks}: {asked} and {cached}");
    }
    // other cuts find what is there, too
    let (asked, cached) = read(&run(story.load(&["--tp", "4"])));
    assert!(asked > 0 && cached > LIMIT / 2, "{asked} and {cached}");
    assert_eq!(read(&run(story.load(&["--tp", "4"]))).0, 0);
}

fn blocks(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}

/// What was not used for longest makes room for what is read now; by hand, likewise.
#[test]
fn what_is_old_goes_first() {
    let story = Story::new();
    let other = "s3://models/other/model";
    for name in story.names() {
        let content = fs::read(story.scratch.join("checkpoint").join(&name)).unwrap();
        story.server.put("models", &format!("other/model/{name}"), content);
    }
    let load = |uri: &str, limit: u64| {
        let mut command = story.longshore();
        command.args(["load", "--json", "--log-level", "warn", "--device", "cpu", "--tp", "2"]);
        command.args(["--read-size", "64KiB", "--cache-limit", &limit.to_string()]);
        run_with(command.arg("--cache-dir").arg(story.cache()).arg(uri))
    };
    let listed = |action: &[&str]| -> Vec<(String, u64)> {
        let mut command = story.longshore();
        command.args(["cache", "--json", "--cache-dir"]).arg(story.cache()).args(action);
        let listed = run(command);
        let entry =
            |e: &Value| (e["uri"].as_str().unwrap().to_owned(), e["bytes"].as_u64().unwrap());
        listed.as_array().unwrap().iter().map(entry).collect()
    };
    load(URI, u64::MAX);
    let [(_, bytes)] = listed(&[])[..] else { panic!("one model") };
    std::thread::sleep(Duration::from_millis(20));
    // room for one and a half
    let limit = bytes * 3 / 2;
    load(other, limit);
    let after: Vec<(String, u64)> = listed(&[]);
    let of = |uri: &str| after.iter().find(|(u, _)| u == uri).map_or(0, |(_, bytes)| *bytes);
    assert_eq!(of(other), bytes, "{after:?}");
    assert!(of(URI) > 0 && of(URI) + bytes <= limit, "{after:?}");
    assert_eq!(read(&load(other, limit)).0, 0);
    let (asked, cached) = read(&load(URI, limit));
    assert!(asked > 0 && cached > 0, "{asked} and {cached}");
    assert_eq!(listed(&["prune"]), []);
    assert_eq!(listed(&["prune", "--unused-for", "0"]).len(), 2);
    assert_eq!((listed(&[]), story.kept().len()), (vec![], 0));
}

/// An object of the same name with another ETag is another object.
#[test]
fn a_replaced_object_is_fetched_anew() {
    let story = Story::new();
    let needed = read(&run(story.load(&["--tp", "2"]))).0;
    let names = story.names();
    let replaced = names.iter().find(|name| name.ends_with(".safetensors")).unwrap();
    story.put(replaced, |content| *content.last_mut().unwrap() ^= 1);
    let again = run(story.load(&["--tp", "2"]));
    assert_eq!(again["digest"], story.digest("2"));
    let (asked, cached) = read(&again);
    assert!(asked > 0 && asked < needed && cached > 0, "{asked} and {cached} of {needed}");
    // the same bytes under another tag: nothing says that they are the same
    story.server.replace("models", &format!("some/model/{replaced}"));
    assert_eq!(read(&run(story.load(&["--tp", "2"]))), (asked, cached));
}

/// An object that is replaced in the middle of a load is an error also where a part of it was kept before.
#[test]
fn an_object_that_is_replaced_meanwhile_is_an_error() {
    let story = Story::new();
    run(story.load(&["--tp", "2", "--cache-limit", "1MiB"]));
    let replaced = Rule::new(Action::ChangeEtag).object("*.safetensors").operation(Operation::Get);
    story.server.fault(replaced.skip(8).times(1));
    let ran = story.load(&["--tp", "2"]).output().unwrap();
    let line = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(1), "{line}");
    assert!(line.contains("replaced") && line.contains(".safetensors"), "{line}");
    story.server.clear_faults();
    assert_eq!(run(story.load(&["--tp", "2"]))["digest"], story.digest("2"));
}

#[test]
fn two_loads_at_once_share_it() {
    let story = Story::new();
    // slow enough for the two to meet
    let slow = Rule::new(Action::Delay(Duration::from_millis(5)));
    story.server.fault(slow.operation(Operation::Get).object("*.safetensors"));
    for others in [["2", "2"], ["2", "4"]] {
        let start = |tp| {
            let mut load = story.load(&["--tp", tp]);
            load.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let both = others.map(|tp| (tp, start(tp)));
        for (tp, process) in both {
            let ran = process.wait_with_output().unwrap();
            assert_eq!(told(&ran)["digest"], story.digest(tp));
            assert_eq!(String::from_utf8_lossy(&ran.stderr), "");
            read(&told(&ran));
        }
        for tp in others {
            story.sent();
            assert_eq!(story.read(&run(story.load(&["--tp", tp]))).0, 0);
        }
        fs::remove_dir_all(story.cache()).unwrap();
    }
}

/// Starts a load in a process group of its own, to be killed with all its ranks.
fn start(mut load: Command) -> Child {
    load.process_group(0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Ends it and all its processes; returns whether it had not ended before.
fn kill(mut process: Child) -> bool {
    let group = -(process.id() as libc::pid_t);
    // SAFETY: the group's first process has not been waited for, so its number is no other's.
    unsafe { libc::kill(group, libc::SIGKILL) };
    let status = process.wait().unwrap();
    status.signal() == Some(libc::SIGKILL)
}

/// WCH-1, for real: killed at many points from its start to its end, alone and two at once, with ranks that are threads and
/// processes, a load leaves nothing that is wrong, and nothing half written for longer than until the next one.
#[test]
fn a_process_that_is_killed_leaves_nothing_wrong() {
    const ROUNDS: u32 = 40;
    let story = Story::new();
    let digest = story.digest("2");
    // slow enough to be killed in the middle
    let slow = Rule::new(Action::Delay(Duration::from_millis(10)));
    story.server.fault(slow.operation(Operation::Get).object("*.safetensors"));
    let load = |ranks: &str| story.load(&["--tp", "2", "--ranks", ranks]);
    let mut takes = ["threads", "processes"].map(|ranks| {
        let started = Instant::now();
        run(load(ranks));
        fs::remove_dir_all(story.cache()).unwrap();
        started.elapsed()
    });
    takes.reverse();
    let (mut killed, mut partly, mut half, mut points) = (0, 0, 0, BTreeSet::new());
    for round in 0..ROUNDS {
        let ranks = ["processes", "threads"][(round % 2) as usize];
        let processes: Vec<Child> = (0..=round / 2 % 2).map(|_| start(load(ranks))).collect();
        std::thread::sleep(takes[(round % 2) as usize] * round / ROUNDS);
        killed += processes.into_iter().map(kill).filter(|killed| *killed).count();
        let kept = story.kept().len();
        points.insert(kept);
        half += story.half_written();
        let ran = load("threads").output().unwrap();
        let next = told(&ran);
        assert_eq!(next["digest"], digest, "round {round}");
        assert_eq!(String::from_utf8_lossy(&ran.stderr), "", "round {round}: nothing is damaged");
        let (asked, cached) = read(&next);
        assert_eq!(story.half_written(), 0, "round {round}");
        assert_eq!(cached > 0, kept > 0, "round {round}");
        partly += u32::from(asked > 0 && cached > 0);
        let again = run(load("threads"));
        assert_eq!((read(&again).0, &again["digest"]), (0, &digest), "round {round}");
        fs::remove_dir_all(story.cache()).unwrap();
    }
    eprintln!(
        "{killed} loads killed, at {} different counts of stretches; {partly} rounds began with a part; {half} half written",
        points.len()
    );
    assert!(killed >= ROUNDS as usize / 2 && partly >= 5, "{killed} killed, {partly} in part");
}

/// WCH-1, to the byte: the kernel ends a process within a write, wherever a stretch crosses what a file may have.
#[test]
fn a_process_that_is_killed_within_a_write_leaves_no_entry() {
    let story = Story::new();
    let digest = story.digest("2");
    // what is not weights is there, so that only stretches are written
    let mut plan = story.longshore();
    run_with(plan.args(["plan", "--json", "--tp", "2", URI]));
    // blocks of 512 bytes: at the start of a stretch, in the middle, in its last block, and between bytes and checksum
    for blocks in [1, 64, 127, 128] {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -c 0; ulimit -f {blocks}; exec \"$@\""), "sh"]);
        let mut command = story.in_environment(command);
        command.arg(env!("CARGO_BIN_EXE_longshore"));
        story.arguments(&mut command, &story.cache());
        let ran = command.args(["--tp", "2"]).output().unwrap();
        assert_eq!(ran.status.signal(), Some(libc::SIGXFSZ), "{blocks}: {ran:?}");
        assert!(story.half_written() > 0, "{blocks}");
        let ran = story.load(&["--tp", "2"]).output().unwrap();
        assert_eq!(told(&ran)["digest"], digest, "{blocks}");
        assert_eq!(String::from_utf8_lossy(&ran.stderr), "", "{blocks}: nothing is damaged");
        assert_eq!(story.half_written(), 0, "{blocks}");
        let again = run(story.load(&["--tp", "2"]));
        assert_eq!((read(&again).0, &again["digest"]), (0, &digest), "{blocks}");
        fs::remove_dir_all(story.cache()).unwrap();
    }
}

/// WCH-2: damaged on disk, each load is right, says what is damaged, and mends it.
#[test]
fn a_damaged_cache_is_mended() {
    let story = Story::new();
    let digest = story.digest("2");
    run(story.load(&["--tp", "2"]));
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("a byte", |path| write(path, 4711, &[0xa5; 3])),
        ("its checksum", |path| write(path, fs::metadata(path).unwrap().len() - 1, &[0xa5])),
        ("all", |path| fs::write(path, "no weights").unwrap()),
        ("nothing is left", |path| fs::write(path, "").unwrap()),
    ];
    for (damage, damaged) in damages {
        let paths = story.kept();
        let path = paths.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let ends = name.split('-').map(|end| u64::from_str_radix(end, 16).unwrap());
        let [start, end] = ends.collect::<Vec<u64>>()[..] else { panic!("{name}") };
        damaged(path);
        let ran = story.load(&["--tp", "2"]).output().unwrap();
        assert_eq!(told(&ran)["digest"], digest, "{damage}");
        assert_eq!(read(&told(&ran)).0, end - start, "{damage}");
        let warnings = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(warnings.lines().count(), 1, "{damage}: {warnings}");
        let used = fs::read_to_string(path.parent().unwrap().join("used")).unwrap();
        let object = used.lines().take(2).collect::<Vec<&str>>().join("/");
        for told in [object, format!("{start}..{end}")] {
            assert!(warnings.contains(&told), "{damage}, {told}: {warnings}");
        }
        story.sent();
        let again = run(story.load(&["--tp", "2"]));
        assert_eq!((&again["digest"], story.read(&again).0), (&digest, 0), "{damage}");
    }
    // all of them at once: once for each of the three files
    story.kept().iter().for_each(|path| write(path, 0, &[0x5a; 100]));
    let ran = story.load(&["--tp", "4", "--ranks", "threads"]).output().unwrap();
    assert_eq!(told(&ran)["digest"], story.digest("4"));
    assert_eq!(read(&told(&ran)).1, 0);
    assert_eq!(String::from_utf8(ran.stderr).unwrap().lines().count(), 3);
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// WCH-3: without room to write, a load is as right as without a cache, and says once why nothing is kept, however many
/// processes it has.
#[test]
fn without_room_to_write_a_load_goes_on() {
    let story = Story::new();
    fs::create_dir_all(story.cache()).unwrap();
    // files of more than 32 KiB cannot be written; or the file system has 600 KiB, or nothing at all
    let tmpfs = |size: &str| {
        format!("mount -t tmpfs -o size={size} tmpfs \"$1\" || exit 77; shift; exec \"$@\"")
    };
    let full =
        tmpfs("600k").replace("shift", "head -c 1m /dev/zero > \"$1/else\" 2>/dev/null; shift");
    let limits: [(&str, &[&str], String); 3] = [
        ("sh", &[], "trap '' XFSZ; ulimit -f 64; shift; exec \"$@\"".into()),
        ("unshare", &["-rm", "sh"], tmpfs("600k")),
        ("unshare", &["-rm", "sh"], full),
    ];
    for (number, (shell, prefix, script)) in limits.iter().enumerate() {
        // what processes share are files to that limit as well
        let groups = [("2", "threads"), ("4", "processes")];
        for (tp, ranks) in groups.into_iter().take(if number == 0 { 1 } else { 2 }) {
            let mut command = Command::new(shell);
            command.args(*prefix).args(["-c", script, "sh"]).arg(story.cache());
            let mut command = story.in_environment(command);
            command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
            command.arg(env!("CARGO_BIN_EXE_longshore"));
            story.arguments(&mut command, &story.cache());
            let ran = command.args(["--tp", tp, "--ranks", ranks]).output().unwrap();
            let warnings = String::from_utf8(ran.stderr.clone()).unwrap();
            if ran.status.code() == Some(77) || warnings.contains("unshare:") {
                eprintln!("ignored: no name spaces here: {warnings}");
                continue;
            }
            let told = told(&ran);
            assert_eq!(told["digest"], story.digest(tp), "{number}, {ranks}");
            assert!(read(&told).0 > 0);
            assert_eq!(warnings.lines().count(), 1, "{number}, {ranks}: {warnings}");
            assert!(warnings.contains("not kept any more"), "{number}, {ranks}: {warnings}");
        }
    }
    assert_eq!(story.half_written(), 0);
}

/// One line and exit code 2 for what cannot be meant; a source on this host is read as ever.
#[test]
fn options_are_checked() {
    let story = Story::new();
    let file = story.scratch.join("a file");
    fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let cache = story.cache();
    let cache = cache.to_str().unwrap();
    for (arguments, want) in [
        (&["--cache-limit", "1GiB"][..], "--cache-dir"),
        (&["--cache-dir", cache, "--cache-limit", "much"], "--cache-limit"),
        (&["--cache-dir", cache, "--cache-limit=-1"], "--cache-limit"),
        (&["--cache-dir", cache, "--download"], "--download"),
        (&["--cache-dir", file], file),
        (&["--cache-dir", "/proc/no/such"], "/proc/no/such"),
        (&["--cache-dir", file, "--ranks", "processes"], file),
        (&["--cache-dir", ""], "--cache-dir"),
    ] {
        let mut command = story.longshore();
        command.args(["load", "--log-level", "warn", "--tp", "2", URI]).args(arguments);
        let ran = command.output().unwrap();
        let line = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(
            (ran.status.code(), line.lines().count()),
            (Some(2), 1),
            "{arguments:?}: {line}"
        );
        assert!(line.contains(want), "{arguments:?}: {line}");
    }
    for dir in [cache, file] {
        let mut command = story.longshore();
        command.args(["load", "--json", "--tp", "1", "--cache-dir", dir]);
        let local = run_with(command.arg(story.scratch.join("checkpoint")));
        assert_eq!(read(&local).1, 0);
    }
    assert!(!story.cache().exists());
}
