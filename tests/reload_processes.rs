//! Reload in place where ranks are processes: on all of them or on none, whatever fails or is lost on the way.
//!
//! Ranks that have to tell what they hold after a failure are this very program, started once more for each rank: see
//! [`rank_process`]. `LONGSHORE_KILLS=N` kills at N moments rather than at a few.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(clippy::print_stdout, reason = "a rank process tells by it what it holds")]

use std::{
    env,
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Read},
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use longshore::{KernelLayout, Load, Place, Rank};
use longshore_harness::generator::{Break, Checkpoint, Family, Scheme};
use longshore_rank::fault::Point;
use serde_json::{Value, json};
use xxhash_rust::xxh3::Xxh3;

#[path = "common/processes.rs"]
mod processes;

#[path = "common/mixed.rs"]
mod mixed;

use mixed::{mix, settle};
use processes::{Group, Story, signal, wait_until};

/// What a rank process loads, one source after the other.
const SOURCES: &str = "RELOAD_SOURCES";
/// For these kernels.
const LAYOUT: &str = "RELOAD_LAYOUT";
/// How many seconds a rank may go without getting on.
const PROGRESS: &str = "RELOAD_PROGRESS";

/// Not a test by itself: loads and reloads what it is told to, tells after each what it holds, and lives until its stdin
/// ends, so that nobody learns of its end before all have told.
#[test]
#[ignore = "a rank process of the other tests"]
fn rank_process() {
    let Ok(sources) = env::var(SOURCES) else { return };
    let mut rank: Option<Rank> = None;
    for source in sources.split(' ') {
        let error = match &mut rank {
            Some(rank) => rank.reload(source).err().map(|e| e.line()),
            none => {
                *none = Some(joined(source));
                None
            }
        };
        println!("\n@{}", told(rank.as_ref().unwrap(), error.as_deref()));
    }
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn joined(source: &str) -> Rank {
    // one that is stopped is not lost
    let mut load = Load::from(source).heartbeat_timeout(processes::DEADLINE);
    if let Ok(layout) = env::var(LAYOUT) {
        load = load.kernel_layout(layout.parse::<KernelLayout>().unwrap());
    }
    if let Ok(seconds) = env::var(PROGRESS) {
        load = load.progress_timeout(Duration::from_secs(seconds.parse().unwrap()));
    }
    load.join(Place::from_env().unwrap()).unwrap().wait().unwrap_or_else(|e| panic!("{}", e.line()))
}

fn told(rank: &Rank, error: Option<&str>) -> Value {
    let hash = rank.params().map(|params| {
        let mut hash = Xxh3::new();
        for param in params.iter() {
            hash.update(param.name.as_bytes());
            hash.update(&param.data.to_host().unwrap());
        }
        format!("{:032x}", hash.digest128())
    });
    // on rank 0, of all
    let report = rank.report();
    let at: Option<u64> =
        rank.params().ok().map(|params| params.iter().map(|p| p.data.address()).sum());
    json!({
        "error": error,
        "source": rank.source(),
        "generation": rank.generation(),
        "hash": hash.as_ref().ok(),
        "at": at,
        "read": report.as_ref().map(|report| report.storage_bytes_read),
        "kept": report.as_ref().map(|report| report.kept_bytes),
        "needed": report.as_ref().map(|report| report.needed_bytes),
        "not_ready": hash.as_ref().err().map(|e| e.line()),
    })
}

/// A rank process that tells what it holds.
struct Teller {
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Teller {
    /// What it tells next; `None` if it has gone.
    fn next(&mut self) -> Option<Value> {
        let line = self.lines.by_ref().map_while(Result::ok).find(|line| line.starts_with('@'))?;
        Some(serde_json::from_str(&line[1..]).unwrap())
    }
}

/// A story with checkpoints, and a directory for each rank to name them from.
struct Reloads {
    story: Story,
    ranks: u32,
    layout: Option<&'static str>,
    progress: Option<&'static str>,
}

impl Reloads {
    /// Two checkpoints that differ in their weights only: `a` and `b` of every rank.
    fn new(ranks: u32, checkpoint: &Checkpoint, layout: Option<&'static str>) -> Self {
        let reloads = Self { story: Story::new(), ranks, layout, progress: None };
        for rank in 0..ranks {
            fs::create_dir(reloads.directory(rank)).unwrap();
        }
        for (name, seed) in [("a", 1), ("b", 2)] {
            checkpoint.clone().seed(seed).write(&reloads.story.path(name)).unwrap();
            reloads.give_all(name);
        }
        reloads
    }

    fn directory(&self, rank: u32) -> PathBuf {
        self.story.path(&format!("of-rank-{rank}"))
    }

    /// Another checkpoint, for all ranks under the same name.
    fn give_all(&self, name: &str) {
        self.give_all_as(name, name);
    }

    /// The checkpoint `from`, as `name` of all ranks.
    fn give_all_as(&self, name: &str, from: &str) {
        (0..self.ranks).for_each(|rank| self.give(rank, name, from));
    }

    /// The checkpoint `from`, as `name` of one rank.
    fn give(&self, rank: u32, name: &str, from: &str) {
        let link = self.directory(rank).join(name);
        let _ = fs::remove_file(&link);
        symlink(self.story.path(from), link).unwrap();
    }

    /// A copy of a checkpoint, to be damaged.
    fn copy(&self, from: &str, name: &str) -> PathBuf {
        let copy = self.story.path(name);
        fs::create_dir(&copy).unwrap();
        for file in fs::read_dir(self.story.path(from)).unwrap().flatten() {
            fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
        copy
    }

    fn start(&self, sources: &str, fault: &str) -> Vec<Teller> {
        self.start_each(|_| sources.to_owned(), fault)
    }

    fn start_each(&self, sources: impl Fn(u32) -> String, fault: &str) -> Vec<Teller> {
        let group = Group::new(self.ranks);
        let start = |rank| {
            let mut command = Command::new(env::current_exe().unwrap());
            self.story.mark(&mut command);
            group.tell(&mut command, rank);
            command.args(["rank_process", "--exact", "--ignored", "--nocapture"]);
            command.env(SOURCES, sources(rank)).env("LONGSHORE_FAULT", fault);
            if let Some(layout) = self.layout {
                command.env(LAYOUT, layout);
            }
            if let Some(seconds) = self.progress {
                command.env(PROGRESS, seconds);
            }
            command.current_dir(self.directory(rank)).stdin(Stdio::piped());
            let mut process = command.stderr(Stdio::null()).spawn().unwrap();
            let lines = BufReader::new(process.stdout.take().unwrap()).lines();
            Teller { process, lines }
        };
        (0..self.ranks).map(start).collect()
    }

    /// What each rank tells after each of `sources`.
    fn told(&self, sources: &str, fault: &str) -> Vec<Vec<Option<Value>>> {
        told_by(self.start(sources, fault), sources)
    }

    /// What each rank holds after a load of `source` and nothing else.
    fn fresh(&self, source: &str) -> Vec<String> {
        let told = self.told(source, "");
        told.iter().map(|told| text(told[0].as_ref().unwrap(), "hash")).collect()
    }
}

fn told_by(mut tellers: Vec<Teller>, sources: &str) -> Vec<Vec<Option<Value>>> {
    let steps = sources.split(' ').count();
    let told = tellers.iter_mut().map(|teller| (0..steps).map(|_| teller.next()).collect());
    let told = told.collect();
    // all have told: now they may end
    for teller in &mut tellers {
        drop(teller.process.stdin.take());
        teller.process.wait().unwrap();
    }
    told
}

fn text(told: &Value, key: &str) -> String {
    told[key].as_str().unwrap_or_else(|| panic!("no {key}: {told}")).to_owned()
}

/// Small, and with parameters that are finished in place: rows shuffled, scales in tiles, a block scale in its source's place.
fn nvfp4() -> Checkpoint {
    Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).set("num_hidden_layers", 2)
}

#[test]
fn every_rank_holds_what_a_fresh_load_gives_at_the_same_addresses() {
    let kimi = Checkpoint::new(Family::KimiK25, Scheme::Mxfp4).set("num_hidden_layers", 2);
    let fp8 = Checkpoint::new(Family::DeepseekV3, Scheme::Fp8).set("num_hidden_layers", 2);
    for (ranks, checkpoint, layout) in [
        (4, nvfp4(), Some("trtllm")),
        (2, nvfp4(), None),
        (2, fp8, None),
        (2, kimi, Some("aiter")),
        (4, Checkpoint::new(Family::Llama, Scheme::Bf16), None),
    ] {
        let what = format!("{checkpoint:?} {layout:?}");
        let reloads = Reloads::new(ranks, &checkpoint, layout);
        let fresh = [("a", reloads.fresh("a")), ("b", reloads.fresh("b"))];
        assert_ne!(fresh[0].1, fresh[1].1, "{what}");
        for (rank, told) in reloads.told("a b a b b", "").iter().enumerate() {
            let first = told[0].as_ref().unwrap();
            for (step, now) in told.iter().enumerate() {
                let now = now.as_ref().unwrap();
                let (name, want) = &fresh[[0, 1, 0, 1, 1][step]];
                assert_eq!(now["error"], Value::Null, "{what}, rank {rank}, step {step}");
                assert_eq!(now["hash"], want[rank], "{what}, rank {rank}, step {step}");
                assert_eq!(now["source"], **name, "{what}, rank {rank}");
                assert_eq!(now["generation"], step + 1, "{what}, rank {rank}");
                assert_eq!(now["at"], first["at"], "{what}, rank {rank}");
            }
        }
        reloads.story.assert_nothing_is_left();
    }
}

/// That a reload of `b` changes nothing, on any rank, that all say the same of it, which is returned, and that one of `c`, which is
/// whole, is still possible.
fn refused(reloads: &Reloads, sources: impl Fn(u32) -> String) -> String {
    let fresh = [reloads.fresh("a"), reloads.fresh("c")];
    let told = told_by(reloads.start_each(sources, ""), "a b c");
    let mut said = Vec::new();
    for (rank, told) in told.iter().enumerate() {
        let [before, after, whole] = [0, 1, 2].map(|step| told[step].as_ref().unwrap());
        said.push(text(after, "error"));
        for key in ["hash", "source", "generation", "at"] {
            assert_eq!(after[key], before[key], "rank {rank}: {}", said[rank]);
        }
        assert_eq!(after["hash"], fresh[0][rank], "rank {rank}");
        assert_eq!((&whole["error"], &whole["hash"]), (&Value::Null, &json!(fresh[1][rank])));
    }
    assert!(said.iter().all(|line| *line == said[0]), "{said:?}");
    said.swap_remove(0)
}

fn truncate(dir: &Path) {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().flatten().map(|e| e.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    let file = OpenOptions::new().write(true).open(files.last().unwrap()).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
}

#[test]
fn what_one_rank_cannot_load_whole_changes_nothing_on_any() {
    let all = |_| "a b c".to_owned();
    let checkpoint = nvfp4().files(2);
    let reloads = || {
        let reloads = Reloads::new(2, &checkpoint, Some("trtllm"));
        checkpoint.clone().seed(3).write(&reloads.story.path("c")).unwrap();
        reloads.give_all("c");
        reloads
    };
    for kind in [Break::WrongShape, Break::MissingScale] {
        let reloads = reloads();
        checkpoint.clone().break_with(kind).write(&reloads.story.path("broken")).unwrap();
        reloads.give_all_as("b", "broken");
        let said = refused(&reloads, all);
        assert!(
            said.starts_with("not reloaded, the weights of a are untouched: rank 0: "),
            "{said}"
        );
    }
    // one rank's copy is not whole, is not there, or is another
    let broken = reloads();
    truncate(&broken.copy("b", "truncated"));
    broken.give(1, "b", "truncated");
    let said = refused(&broken, all);
    assert!(said.starts_with("not reloaded, the weights of a are untouched: rank 1: "), "{said}");
    fs::remove_file(broken.directory(1).join("b")).unwrap();
    let said = refused(&broken, all);
    assert!(said.contains(": rank 1: "), "{said}");
    let larger = nvfp4().set("num_hidden_layers", 3);
    larger.write(&broken.story.path("larger")).unwrap();
    broken.give(1, "b", "larger");
    let said = refused(&broken, all);
    assert!(said.contains("rank 1: ") && said.contains("cannot be loaded in place"), "{said}");
    nvfp4().files(3).seed(2).write(&broken.story.path("in-three")).unwrap();
    broken.give(1, "b", "in-three");
    let said = refused(&broken, all);
    assert!(said.contains("rank 1 was told to reload another checkpoint"), "{said}");
    // the same files by another name may be of another time
    broken.give(1, "d", "b");
    let said = refused(&broken, |rank| if rank == 1 { "a d c".into() } else { all(rank) });
    assert!(said.contains("rank 1 was told to reload another checkpoint"), "{said}");
    broken.story.assert_nothing_is_left();
}

/// What follows on every rank from a failure of one after the first write.
fn check_restored(reloads: &Reloads, sources: &str, fault: &str) {
    let (old, new) = (reloads.fresh("a"), reloads.fresh("b"));
    for (rank, told) in reloads.told(sources, fault).iter().enumerate() {
        let [after, whole] = [1, 2].map(|step| told[step].as_ref().unwrap());
        let said = text(after, "error");
        assert!(said.starts_with("reload failed, the weights of a are back in place"), "{said}");
        assert_eq!((&after["hash"], &after["source"]), (&json!(old[rank]), &json!("a")), "{said}");
        assert_eq!(after["generation"], 3, "{said}");
        assert_eq!((&whole["error"], &whole["hash"]), (&Value::Null, &json!(new[rank])));
    }
    reloads.story.assert_nothing_is_left();
}

#[test]
fn a_rank_that_fails_while_writing_brings_the_old_weights_back_on_all() {
    let reloads = Reloads::new(4, &nvfp4(), Some("trtllm"));
    for fault in [
        "rank=1,read=1,do=error,generation=2",
        "rank=0,read=0,do=panic,generation=2",
        "rank=2,at=started,do=panic,generation=2",
        "rank=all,read=0,do=error,generation=2",
    ] {
        check_restored(&reloads, "a b b", fault);
    }
}

/// The values of one scale contradict each other, which only shows when they are read.
fn with_bad_values(reloads: &Reloads, name: &str) {
    let bad = reloads.copy("b", name);
    let discovered = longshore::discover::discover(bad.as_path()).unwrap();
    let tensors = &discovered.checkpoint.tensors;
    let tensor = tensors.iter().find(|t| t.name.ends_with("k_proj.k_scale")).unwrap();
    let path = bad.join(discovered.checkpoint.file_name(tensor));
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&(-1.0f32).to_le_bytes(), tensor.file_range.start).unwrap();
    reloads.give_all(name);
}

#[test]
fn values_that_turn_out_bad_bring_the_old_weights_back_or_leave_no_rank_ready() {
    let checkpoint = nvfp4().set("quant_style", "v31");
    let reloads = Reloads::new(2, &checkpoint, Some("trtllm"));
    with_bad_values(&reloads, "bad");
    check_restored(&reloads, "a bad b", "");

    // the old checkpoint is gone as well, for one rank: nobody is handed a mix, until a whole one is loaded
    truncate(&reloads.copy("a", "gone"));
    let new = reloads.fresh("b");
    let mut tellers = reloads.start("a bad b", "rank=1,at=agreed,do=stop,generation=2");
    for teller in &mut tellers {
        assert_eq!(teller.next().unwrap()["error"], Value::Null);
    }
    let pid = tellers[1].process.id() as i32;
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    wait_until("rank 1 has stopped", || stat().contains(") T "));
    reloads.give(1, "a", "gone");
    signal(pid, "CONT");
    for (rank, teller) in tellers.iter_mut().enumerate() {
        let after = teller.next().unwrap();
        assert!(text(&after, "error").contains("could not be restored (rank 1: "), "{after}");
        assert!(text(&after, "not_ready").contains("v_scale"), "{after}");
        assert_eq!((&after["hash"], &after["source"]), (&Value::Null, &json!("a")));
        let whole = teller.next().unwrap();
        assert_eq!((&whole["error"], &whole["hash"]), (&Value::Null, &json!(new[rank])));
        assert_eq!(whole["source"], "b");
    }
}

/// Where a rank, or the coordinator with rank 0, is lost in a reload, and what that leaves the others with.
#[test]
fn a_loss_in_a_reload_leaves_every_rank_on_one_version_or_not_ready() {
    let reloads = Reloads::new(4, &nvfp4(), Some("trtllm"));
    let (old, new) = (reloads.fresh("a"), reloads.fresh("b"));
    for point in Point::BEFORE_RELOAD.into_iter().chain(Point::ALL) {
        for lost in [0, 1] {
            let what = format!("rank {lost} killed when {}", point.name());
            let fault = format!("rank={lost},at={},do=kill,generation=2", point.name());
            let told = reloads.told("a b b", &fault);
            let mut held = Vec::new();
            for (rank, told) in told.iter().enumerate().filter(|(rank, _)| *rank != lost) {
                let after = told[1].as_ref().unwrap();
                let version = match &after["hash"] {
                    Value::Null => "not ready",
                    hash if *hash == old[rank] => "a",
                    hash if *hash == new[rank] => "b",
                    other => panic!("{what}: rank {rank} holds {other}"),
                };
                if version != "not ready" {
                    assert_eq!(after["source"], version, "{what}: rank {rank}");
                }
                assert_eq!(after["error"] == Value::Null, version == "b", "{what}: {after}");
                // nothing that takes all ranks is possible any more, and it is said
                let again = told[2].as_ref().unwrap();
                assert_ne!(again["error"], Value::Null, "{what}");
                let still = if version == "b" { &new[rank] } else { &old[rank] };
                assert!(
                    again["hash"] == Value::Null || again["hash"] == **still,
                    "{what}: {again}"
                );
                held.push(version);
            }
            let mixed = held.contains(&"a") && held.contains(&"b");
            assert!(!mixed, "{what}: {held:?}");
            let may = match (point, lost) {
                (Point::Validated, _) | (Point::Agreed, 1) => &["a"][..],
                // whether the other ranks had been told to go on the coordinator alone knew
                (Point::Agreed, _) => &["a", "not ready"],
                // what it said may have arrived or not
                (Point::Ready, _) => &["b", "not ready"],
                _ => &["not ready"],
            };
            assert!(held.iter().all(|version| may.contains(version)), "{what}: {held:?}");
        }
    }
    reloads.story.assert_nothing_is_left();
}

/// What all ranks tell where rank 1 was not waited for, itself as well when it comes.
fn assert_unanswered(told: &Value, old: &str) {
    let wanted =
        "not reloaded, the weights of a are untouched: rank 1 is alive but has not answered for 3s";
    assert_eq!(text(told, "error"), wanted);
    let held = (&told["hash"], &told["source"], &told["generation"]);
    assert_eq!(held, (&json!(old), &json!("a"), &json!(1)));
}

/// It is not lost: nobody here takes a rank for that before a minute of silence. It may only be slow, so it stays, and the next
/// reload finds it.
#[test]
fn a_rank_that_does_not_answer_ends_the_reload_and_stays() {
    let mut reloads = Reloads::new(2, &nvfp4(), Some("trtllm"));
    reloads.progress = Some("3");
    let (old, new) = (reloads.fresh("a"), reloads.fresh("b"));
    for point in [Point::Validated, Point::Agreed] {
        let fault = format!("rank=1,at={},do=stop,generation=2", point.name());
        let mut tellers = reloads.start("a b b", &fault);
        for teller in &mut tellers {
            assert_eq!(teller.next().unwrap()["error"], Value::Null);
        }
        assert_unanswered(&tellers[0].next().unwrap(), &old[0]);
        let pid = tellers[1].process.id() as i32;
        let go_on = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let stopped = stat.contains(") T ");
            if stopped {
                signal(pid, "CONT");
            }
            stopped
        };
        wait_until("rank 1 has stopped", go_on);
        assert_unanswered(&tellers[1].next().unwrap(), &old[1]);
        // it comes to the same point in the next reload, and goes on in time
        wait_until("rank 1 has stopped again", go_on);
        for (rank, teller) in tellers.iter_mut().enumerate() {
            let whole = teller.next().unwrap();
            let wanted = (&Value::Null, &json!(new[rank]));
            assert_eq!((&whole["error"], &whole["hash"]), wanted, "{point:?}");
            drop(teller.process.stdin.take());
        }
        for teller in &mut tellers {
            teller.process.wait().unwrap();
        }
    }
    reloads.story.assert_nothing_is_left();
}

/// Whoever has begun to write cannot go back without it.
#[test]
fn a_rank_that_hangs_when_all_are_to_begin_leaves_nobody_ready_and_nobody_waiting() {
    let mut reloads = Reloads::new(2, &nvfp4(), Some("trtllm"));
    reloads.progress = Some("2");
    let mut tellers = reloads.start("a b", "rank=1,at=begun-again,do=hang,generation=2");
    assert_eq!(tellers[0].next().unwrap()["error"], Value::Null);
    let after = tellers[0].next().unwrap();
    assert!(
        text(&after, "error").contains("rank 1 is alive but has not answered for 2s"),
        "{after}"
    );
    assert!(text(&after, "not_ready").contains("the old weights are not back"), "{after}");
    assert_eq!(after["hash"], Value::Null);
    signal(tellers[1].process.id() as i32, "KILL");
}

/// A hang is named in one line, and no process is left for it.
#[test]
fn the_command_line_does_not_wait_for_a_rank_that_hangs_before_a_reload() {
    let reloads = Reloads::new(2, &nvfp4(), Some("trtllm"));
    for point in [Point::Validated, Point::Agreed] {
        for hangs in [0, 1] {
            let began = Instant::now();
            let fault = format!("rank={hangs},at={},do=hang,generation=2", point.name());
            let limits = ["--progress-timeout", "2", "--max-restarts", "0"];
            let reload = [&["--ranks", "processes", "--reload", "b"][..], &limits].concat();
            let ended = load(&reloads, &fault, &reload);
            let what = format!("rank {hangs} hangs when {}: {:?}", point.name(), ended.stderr);
            assert_eq!(ended.status.code(), Some(1), "{what}");
            let wanted = format!("rank {hangs} is alive but has not answered for 2s");
            assert!(ended.stderr.iter().any(|line| line.contains(&wanted)), "{what}");
            assert!(began.elapsed() < Duration::from_secs(12), "{what}: {:?}", began.elapsed());
            reloads.story.assert_nothing_is_left();
        }
    }
}

/// A command line that loads `a`, and how it ends.
fn load(reloads: &Reloads, fault: &str, arguments: &[&str]) -> processes::Ended {
    let ranks = reloads.ranks.to_string();
    let load = ["load", "a", "--tp", &ranks, "--json", "--log-level", "error"];
    let mut command = reloads.story.command(&[&load[..], arguments].concat());
    if let Some(layout) = reloads.layout {
        command.args(["--kernel-layout", layout]);
    }
    command.env("LONGSHORE_FAULT", fault);
    reloads.story.start(command).end()
}

#[test]
fn the_command_line_reloads_in_turn_and_writes_the_last() {
    let reloads = Reloads::new(2, &nvfp4(), Some("trtllm"));
    let threads = load(&reloads, "", &["--reload", "b"]).json();
    let processes = ["--ranks", "processes"];
    let reload = ["--reload", "b", "--reload", "a", "--reload", "b", "--out", "out"];
    let report = load(&reloads, "", &[&processes[..], &reload].concat()).json();
    assert_eq!(report["digest"], threads["digest"]);
    assert_eq!(report["generation"], 4);
    assert_eq!(report["source"], "b");
    for rank in report["ranks"].as_array().unwrap() {
        assert_eq!(rank["final_staging_bytes"], 0);
    }
    let bytes = |report: &Value| -> u64 {
        let ranks = report["ranks"].as_array().unwrap();
        ranks.iter().map(|rank| rank["storage_bytes_read"].as_u64().unwrap()).sum()
    };
    assert_eq!(bytes(&report), bytes(&threads), "of the last load alone");
    let manifest = fs::read_to_string(reloads.story.path("out/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["source"], "b");
    fs::remove_dir_all(reloads.story.path("out")).unwrap();
    // what cannot be planned is refused before anything is loaded, in one line
    nvfp4().break_with(Break::MissingScale).write(&reloads.story.path("broken")).unwrap();
    let ended = load(&reloads, "", &[&processes[..], &["--reload", "broken"]].concat());
    ended.failed(2);
    reloads.story.assert_nothing_is_left();
}

/// Wherever it is in a reload.
#[test]
fn a_rank_that_is_killed_at_any_moment_leaves_no_mix() {
    let reloads = Reloads::new(2, &nvfp4(), Some("trtllm"));
    let versions = [("a", reloads.fresh("a")), ("b", reloads.fresh("b"))];
    let kills = env::var("LONGSHORE_KILLS").map_or(12, |count| count.parse().unwrap());
    // reloads take some 30 ms; the order in which the moments are spread over them does not matter
    for (kill, lost) in (0..kills).zip([0, 1].into_iter().cycle()) {
        let mut tellers = reloads.start("a b a", "rank=all,read=0,do=slow,ms=1");
        for teller in &mut tellers {
            assert_eq!(teller.next().unwrap()["error"], Value::Null);
        }
        thread::sleep(Duration::from_micros(60_000 * kill / kills));
        signal(tellers[lost].process.id() as i32, "KILL");
        let other = &mut tellers[1 - lost];
        for _ in 0..2 {
            let held = other.next().unwrap();
            let Some(hash) = held["hash"].as_str() else {
                assert_ne!(held["not_ready"], Value::Null, "kill {kill}");
                continue;
            };
            let version = versions.iter().find(|(_, hashes)| hashes[1 - lost] == hash);
            let (name, _) = version.unwrap_or_else(|| panic!("kill {kill}: a mix: {held}"));
            assert_eq!(held["source"], *name, "kill {kill}");
        }
        drop(other.process.stdin.take());
        for teller in &mut tellers {
            teller.process.wait().unwrap();
        }
    }
    reloads.story.assert_nothing_is_left();
}

/// The whole command runs again, from its first load on.
#[test]
fn under_a_launcher_a_loss_in_a_reload_is_made_good() {
    let reloads = Reloads::new(2, &nvfp4(), Some("trtllm"));
    let undisturbed = load(&reloads, "", &["--reload", "b"]).json();
    for point in Point::BEFORE_RELOAD.into_iter().chain(Point::ALL) {
        for lost in [0, 1] {
            let what = format!("rank {lost} killed when {}", point.name());
            let fault = format!("rank={lost},at={},do=kill,generation=2", point.name());
            let reload = ["--ranks", "processes", "--reload", "b", "--max-restarts", "3"];
            let ended = load(&reloads, &fault, &reload);
            assert_eq!(ended.status.code(), Some(0), "{what}: {:?}", ended.stderr);
            let report: Value = serde_json::from_str(&ended.stdout).unwrap();
            assert_eq!(report["digest"], undisturbed["digest"], "{what}");
            assert_eq!(report["source"], "b", "{what}");
            reloads.story.assert_nothing_is_left();
        }
    }
    // one that only hangs is not left in the way of its successor
    for lost in [0, 1] {
        let fault = format!("rank={lost},at=started,do=stop,generation=2");
        let reload = ["--ranks", "processes", "--reload", "b", "--heartbeat-timeout", "2"];
        let ended = load(&reloads, &fault, &reload);
        assert_eq!(ended.status.code(), Some(0), "rank {lost} stopped: {:?}", ended.stderr);
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(report["digest"], undisturbed["digest"], "rank {lost} stopped");
        reloads.story.assert_nothing_is_left();
    }
}

/// With `one`, which is `a` but for one file, linked.
fn with_mixture(ranks: u32, checkpoint: &Checkpoint, layout: Option<&'static str>) -> Reloads {
    let reloads = Reloads::new(ranks, checkpoint, layout);
    let path = |name: &str| reloads.story.path(name);
    mix(&path("a"), &path("b"), &path("one"), |file| file == 2);
    reloads.give_all("one");
    settle(&path("."));
    reloads
}

/// What rank 0 tells of the bytes of the last load, of all ranks: read, kept, needed.
fn bytes(told: &Value) -> [u64; 3] {
    ["read", "kept", "needed"].map(|key| told[key].as_u64().unwrap_or_else(|| panic!("{told}")))
}

#[test]
fn files_that_are_the_same_are_not_read_again() {
    let fp8 = Checkpoint::new(Family::DeepseekV3, Scheme::Fp8).set("num_hidden_layers", 2);
    for (ranks, checkpoint, layout) in [
        (2, nvfp4().files(5), Some("trtllm")),
        (1, fp8.clone().files(5), None),
        (2, fp8.files(5), None),
        (4, Checkpoint::new(Family::Llama, Scheme::Bf16).files(3), None),
    ] {
        let what = format!("{checkpoint:?} {layout:?}");
        let reloads = with_mixture(ranks, &checkpoint, layout);
        let fresh = ["a", "b", "one"].map(|name| (name, reloads.fresh(name)));
        let sources = "a a one one a b b";
        let all = reloads.told(sources, "");
        for (rank, told) in all.iter().enumerate() {
            for ((step, name), now) in sources.split(' ').enumerate().zip(told) {
                let now = now.as_ref().unwrap();
                let (_, want) = fresh.iter().find(|(n, _)| *n == name).unwrap();
                assert_eq!(now["error"], Value::Null, "{what}, rank {rank}, step {step}");
                assert_eq!(now["hash"], want[rank], "{what}, rank {rank}, step {step}");
                assert_eq!((&now["source"], &now["generation"]), (&json!(name), &json!(step + 1)));
                assert_eq!(now["at"], told[0].as_ref().unwrap()["at"], "{what}, rank {rank}");
            }
        }
        for (step, now) in all[0].iter().enumerate() {
            let [read, kept, needed] = bytes(now.as_ref().unwrap());
            assert_eq!(read + kept, needed, "{what}, step {step}");
            match step {
                0 | 5 => assert_eq!(kept, 0, "{what}, step {step}"),
                1 | 3 | 6 => assert_eq!(read, 0, "{what}, step {step}"),
                _ => assert!(read > 0 && kept > 0, "{what}, step {step}: {read} {kept}"),
            }
        }
        reloads.story.assert_nothing_is_left();
    }
}

/// Each keeps what it knows to be the same. What one has and another has not is handed on out of parameters that no step works
/// on, and else read.
#[test]
fn ranks_with_copies_of_their_own_keep_what_each_of_them_knows() {
    for (checkpoint, layout) in
        [(nvfp4().files(5), Some("trtllm")), (Checkpoint::new(Family::Llama, Scheme::Bf16), None)]
    {
        let reloads = Reloads::new(2, &checkpoint, layout);
        reloads.copy("a", "copy");
        reloads.give(0, "same", "a");
        reloads.give(1, "same", "copy");
        settle(&reloads.story.path("."));
        let fresh = reloads.fresh("a");
        let all = reloads.told("a same b same same", "");
        for (rank, told) in all.iter().enumerate() {
            for step in [1, 3, 4] {
                let now = told[step].as_ref().unwrap();
                assert_eq!((&now["error"], &now["hash"]), (&Value::Null, &json!(fresh[rank])));
            }
        }
        let [read, kept, needed] = bytes(all[0][1].as_ref().unwrap());
        assert_eq!(kept, needed, "rank 0 has all");
        assert!(read < needed, "{read} of {needed}: what rank 0 has is handed on");
        assert_eq!(bytes(all[0][4].as_ref().unwrap())[0], 0);
        reloads.story.assert_nothing_is_left();
    }
}

/// What was kept was not written, so it is kept when all else is taken back; and the next reload is right.
#[test]
fn a_rank_that_fails_among_what_is_read_again_brings_the_old_weights_back() {
    let reloads = with_mixture(2, &nvfp4().files(5), Some("trtllm"));
    let (old, new) = (reloads.fresh("a"), reloads.fresh("one"));
    for fault in [
        "rank=1,read=0,do=error,generation=2",
        "rank=0,read=0,do=panic,generation=2",
        "rank=1,at=started,do=panic,generation=2",
        "rank=1,at=read,do=panic,generation=2",
        "rank=all,read=0,do=error,generation=2",
    ] {
        let all = reloads.told("a one one one", fault);
        for (rank, told) in all.iter().enumerate() {
            let [after, whole, again] = [1, 2, 3].map(|step| told[step].as_ref().unwrap());
            let said = text(after, "error");
            assert!(
                said.starts_with("reload failed, the weights of a are back in place"),
                "{said}"
            );
            assert_eq!((&after["hash"], &after["generation"]), (&json!(old[rank]), &json!(3)));
            for now in [whole, again] {
                assert_eq!((&now["error"], &now["hash"]), (&Value::Null, &json!(new[rank])));
            }
        }
        let [after, whole, again] = [1, 2, 3].map(|step| bytes(all[0][step].as_ref().unwrap()));
        for [read, kept, needed] in [after, whole] {
            assert!(read > 0 && kept > 0 && read + kept == needed, "{fault}: {read} {kept}");
        }
        assert_eq!(again[0], 0, "{fault}");
    }
    reloads.story.assert_nothing_is_left();
}

/// One that has lost what it held has nothing, whatever its files say.
#[test]
fn a_rank_that_is_not_ready_keeps_nothing() {
    let checkpoint = nvfp4().set("quant_style", "v31").files(5);
    let reloads = with_mixture(2, &checkpoint, Some("trtllm"));
    with_bad_values(&reloads, "bad");
    truncate(&reloads.copy("a", "gone"));
    settle(&reloads.story.path("."));
    let fresh = reloads.fresh("one");
    // the old weights cannot be restored, as those of rank 1 are gone by then
    let mut tellers = reloads.start("a bad one one", "rank=1,at=agreed,do=stop,generation=2");
    for teller in &mut tellers {
        assert_eq!(teller.next().unwrap()["error"], Value::Null);
    }
    let pid = tellers[1].process.id() as i32;
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    wait_until("rank 1 has stopped", || stat().contains(") T "));
    reloads.give(1, "a", "gone");
    signal(pid, "CONT");
    for (rank, teller) in tellers.iter_mut().enumerate() {
        assert_ne!(teller.next().unwrap()["not_ready"], Value::Null);
        let [whole, again] = [0, 1].map(|_| teller.next().unwrap());
        for now in [&whole, &again] {
            assert_eq!((&now["error"], &now["hash"]), (&Value::Null, &json!(fresh[rank])));
        }
        if rank == 0 {
            let [[read, kept, needed], again] = [bytes(&whole), bytes(&again)];
            assert_eq!((read, kept), (needed, 0));
            assert_eq!(again, [0, needed, needed]);
        }
    }
}

/// Wherever a rank is lost in a reload that keeps a part.
#[test]
fn a_loss_among_what_is_read_again_leaves_no_mix() {
    let reloads = with_mixture(2, &nvfp4().files(5), Some("trtllm"));
    let versions = [("a", reloads.fresh("a")), ("one", reloads.fresh("one"))];
    for point in Point::BEFORE_RELOAD.into_iter().chain(Point::ALL) {
        for lost in [0, 1] {
            let what = format!("rank {lost} killed when {}", point.name());
            let fault = format!("rank={lost},at={},do=kill,generation=2", point.name());
            let told = reloads.told("a one one", &fault);
            let after = told[1 - lost][1].as_ref().unwrap();
            let Some(hash) = after["hash"].as_str() else {
                assert_ne!(after["not_ready"], Value::Null, "{what}");
                continue;
            };
            let version = versions.iter().find(|(_, hashes)| hashes[1 - lost] == hash);
            let (name, _) = version.unwrap_or_else(|| panic!("{what}: a mix: {after}"));
            assert_eq!(after["source"], *name, "{what}");
        }
    }
    reloads.story.assert_nothing_is_left();
}
