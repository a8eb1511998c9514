//! A rank process that dies, hangs, stops or says no: the load ends in time, names it, and leaves nothing behind. And who
//! does not belong to a group does not disturb it.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use longshore_harness::generator::{Checkpoint, Family, Scheme};

#[path = "common/processes.rs"]
mod processes;

use processes::{Ended, Group, Process, Running, Story, signal, wait_until};

const SECOND: Duration = Duration::from_secs(1);

/// A story with a checkpoint in `checkpoint`.
fn story() -> Story {
    let story = Story::new();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Bf16).files(4);
    checkpoint.write(&story.path("checkpoint")).unwrap();
    story
}

/// `longshore load` with a process per rank, one of which does something at its second read; no rank that is lost is replaced.
fn load(story: &Story, tp: u32, fault: &str, extra: &[&str]) -> Running {
    let tp = tp.to_string();
    let load = ["load", "checkpoint", "--ranks", "processes", "--tp", &tp, "--out", "out"];
    // small reads, so that every rank has several
    let quiet = ["--read-size", "64KiB", "--json", "--log-level", "error"];
    let end = ["--on-loss", "fail"];
    let mut command = story.command(&[&load[..], &quiet, &end, extra].concat());
    command.env("LONGSHORE_FAULT", fault);
    story.start(command)
}

/// A load that does not get on: one of its ranks hangs, and all are at work.
struct Hanging {
    story: Story,
    load: Running,
    ranks: Vec<Process>,
}

impl Hanging {
    fn new(tp: u32, hangs: u32, extra: &[&str]) -> Self {
        let story = story();
        let load = load(&story, tp, &format!("rank={hangs},read=1,do=hang"), extra);
        let ranks = story.loading(tp);
        Self { story, load, ranks }
    }

    /// Sends `name` to `rank`; how long it takes until the load's final line, and how the load ended.
    fn signal(mut self, rank: u32, name: &str) -> (Duration, Ended) {
        assert!(self.story.segments_seen() > 0);
        let sent = Instant::now();
        signal(self.ranks[rank as usize].pid, name);
        let (at, _) = self.load.wait_for_line("longshore: ");
        let ended = self.load.end();
        self.story.assert_nothing_is_left();
        (at - sent, ended)
    }
}

/// Runs each of `all` in a thread of its own: most of them wait for a time to pass.
fn at_once<T: Sync>(all: &[T], story: impl Fn(&T) + Sync) {
    thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| story(one))).collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// Of ranks that read, that wait and that hang themselves.
#[test]
fn a_killed_rank_is_named_within_a_second() {
    for (tp, hangs, killed, extra) in [
        (2, 0, 1, &[][..]),
        (2, 1, 1, &[]),
        (2, 0, 1, &["--transport", "tcp"]),
        (4, 1, 2, &["--transport", "tcp"]),
        (4, 0, 3, &[]),
        (4, 2, 2, &["--io", "direct"]),
    ] {
        let what = format!("tp {tp}, rank {hangs} hangs, rank {killed} is killed, {extra:?}");
        let (took, ended) = Hanging::new(tp, hangs, extra).signal(killed, "KILL");
        let line = ended.failed(1);
        assert!(
            line.starts_with(&format!("longshore: rank {killed} was lost: ")),
            "{what}: {line}"
        );
        assert!(took < SECOND, "{what}: {took:?}");
    }
}

/// The coordinator goes with rank 0: the others notice by themselves.
#[test]
fn a_killed_rank_0_is_named_within_a_second() {
    for (tp, hangs, extra) in [
        (2, 1, &[][..]),
        (2, 0, &["--transport", "tcp"]),
        (4, 1, &["--transport", "tcp"]),
        (4, 3, &[]),
    ] {
        let what = format!("tp {tp}, rank {hangs} hangs, {extra:?}");
        let (took, ended) = Hanging::new(tp, hangs, extra).signal(0, "KILL");
        let line = ended.failed(1);
        assert!(line.contains("rank 0"), "{what}: {line}");
        assert!(took < SECOND, "{what}: {took:?}");
    }
}

/// A stopped process keeps its connections: only its silence tells.
#[test]
fn a_stopped_rank_is_named_when_its_heartbeat_fails_to_come() {
    let two = &["--heartbeat-timeout", "2"][..];
    at_once(
        &[(2, 1, 2, two), (4, 2, 2, two), (2, 0, 2, two), (2, 1, 5, &[][..])],
        |&(tp, stopped, seconds, extra)| {
            let what = format!("tp {tp}, rank {stopped} is stopped, {extra:?}");
            let hanging = Hanging::new(tp, 1 - stopped.min(1), extra);
            let sent = Instant::now();
            let (took, ended) = hanging.signal(stopped, "STOP");
            let line = ended.failed(1);
            assert!(line.contains(&format!("rank {stopped}")), "{what}: {line}");
            assert!(line.contains("was lost: nothing was heard for"), "{what}: {line}");
            let limit = Duration::from_secs(seconds);
            // with rank 0 stopped, the launcher shows what another has said when all have ended
            let ending = if stopped == 0 { 3 * SECOND } else { Duration::ZERO };
            assert!(took < limit + ending + SECOND, "{what}: {took:?}");
            assert!(took > limit - SECOND, "{what}: {took:?}");
            // a stopped process can only be killed
            assert!(sent.elapsed() < limit + 6 * SECOND, "{what}: {:?}", sent.elapsed());
        },
    );
}

/// Its weights are complete, what it was to write and to tell may be missing.
#[test]
fn a_rank_that_stops_when_all_are_complete_has_failed() {
    at_once(&[(2, 1), (2, 0), (4, 2)], |&(tp, stopped)| {
        let what = format!("tp {tp}, rank {stopped} is stopped");
        let story = story();
        let began = Instant::now();
        let fault = format!("rank={stopped},at=released,do=stop");
        let ended = load(&story, tp, &fault, &["--heartbeat-timeout", "2"]).end();
        let line = ended.failed(1);
        let who =
            if stopped == 0 { "the coordinator (rank 0)" } else { &format!("rank {stopped}") };
        let wanted = format!("longshore: {who} was lost: nothing was heard for 2s");
        assert!(line.starts_with(&wanted), "{what}: {line}");
        assert!(began.elapsed() < 12 * SECOND, "{what}: {:?}", began.elapsed());
        assert!(!story.path("out").join("manifest.json").exists(), "{what}");
        story.assert_nothing_is_left();
    });
}

/// Its heartbeats come, its counters stand still; the ranks that wait for it are not blamed.
#[test]
fn a_rank_that_is_alive_and_stuck_is_named_by_its_progress() {
    at_once(&[(2, 1), (2, 0), (4, 2)], |&(tp, stuck)| {
        let mut hanging = Hanging::new(tp, stuck, &["--progress-timeout", "2"]);
        let began = Instant::now();
        let (at, _) = hanging.load.wait_for_line("longshore: ");
        // two seconds, a heartbeat late, seen at the next look
        assert!(at - began < 4 * SECOND, "{:?}", at - began);
        let ended = hanging.load.end();
        let line = ended.failed(1);
        let wanted = format!("rank {stuck} is alive but has not got on for 2s (reading, ");
        assert!(line.contains(&wanted), "{line}");
        hanging.story.assert_nothing_is_left();
    });
}

/// A second for every read is not fast, and no reason to end anything.
#[test]
fn a_slow_rank_is_waited_for() {
    let story = Story::new();
    let checkpoint = Checkpoint::new(Family::Llama, Scheme::Bf16);
    checkpoint.write(&story.path("checkpoint")).unwrap();
    let arguments = ["load", "checkpoint", "--tp", "2", "--json", "--log-level", "error"];
    let threads = story.start(story.command(&arguments)).end().json();
    let group = ["--ranks", "processes", "--progress-timeout", "3", "--heartbeat-timeout", "1"];
    let mut command = story.command(&[&arguments[..], &group].concat());
    command.env("LONGSHORE_FAULT", "rank=1,read=0,do=slow");
    let began = Instant::now();
    let processes = story.start(command).end().json();
    assert!(began.elapsed() > SECOND);
    assert_eq!(processes["digest"], threads["digest"]);
}

/// What went wrong in one process is said by the one that the user looks at.
#[test]
fn what_ends_a_rank_is_told_in_its_own_words() {
    let said = "a fault that was asked for";
    for (what, words) in [
        ("error", &["rank R failed: ", said][..]),
        ("panic", &["rank R failed: ", "panicked", said]),
        ("exit", &["rank R"]),
    ] {
        for (tp, rank, transport) in [(2, 1, "auto"), (2, 0, "tcp"), (4, 2, "tcp"), (4, 0, "auto")]
        {
            let story = story();
            let fault = format!("rank={rank},read=1,do={what}");
            let began = Instant::now();
            let ended = load(&story, tp, &fault, &["--transport", transport]).end();
            let text = format!("{what} of rank {rank} of {tp}: {:?}", ended.stderr);
            assert_eq!((ended.status.code(), &ended.stdout[..]), (Some(1), ""), "{text}");
            let finals = ended.stderr.iter().filter(|line| line.starts_with("longshore: "));
            let finals: Vec<&String> = finals.collect();
            assert_eq!(finals.len(), 1, "{text}");
            // Rust has its say of a panic, which may come by the launcher later than rank 0's line
            assert!(what == "panic" || ended.stderr.len() == 1, "{text}");
            for word in words {
                assert!(
                    finals[0].contains(&word.replace('R', &rank.to_string())),
                    "{word}: {text}"
                );
            }
            assert!(began.elapsed() < 10 * SECOND, "{text}");
            story.assert_nothing_is_left();
        }
    }
}

/// Ctrl-C, which a terminal sends to the whole group, and an end without a word.
#[test]
fn nothing_is_left_when_the_launcher_ends() {
    for tp in [2, 4] {
        let Hanging { story, load, .. } = Hanging::new(tp, 1, &[]);
        signal(-load.pid(), "INT");
        let ended = load.end();
        assert_eq!(ended.failed(130), "longshore: ended by signal 2 (SIGINT)");
        story.assert_nothing_is_left();

        let Hanging { story, load, .. } = Hanging::new(tp, 0, &[]);
        signal(load.pid(), "KILL");
        assert_eq!(load.end().stderr, Vec::<String>::new());
        story.assert_nothing_is_left();
    }
}

/// The arguments of a rank that is started by hand.
fn rank_arguments<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    [&["checkpoint", "--out", "out", "--json", "--log-level", "error"], extra].concat()
}

/// The digest that a load of threads has.
fn digest_of_threads(story: &Story, tp: &str) -> serde_json::Value {
    let arguments = ["load", "checkpoint", "--tp", tp, "--json", "--log-level", "error"];
    story.start(story.command(&arguments)).end().json()["digest"].clone()
}

#[test]
fn ranks_that_never_join_are_named_when_the_time_is_over() {
    let story = story();
    let group = Group::new(4);
    let arguments = rank_arguments(&["--join-timeout", "2"]);
    let began = Instant::now();
    let start = |rank| story.start(group.command(&story, rank, &arguments));
    let mut ranks = [0, 2].map(start).into_iter();
    let ended = ranks.next().unwrap().end();
    let wanted = "longshore: 2 of 4 ranks have not joined within 2s: 1, 3";
    assert_eq!(ended.failed(1), wanted);
    let took = began.elapsed();
    assert!(took > 2 * SECOND && took < 5 * SECOND, "{took:?}");
    for other in ranks {
        // rank 0 has told the cause
        let ended = other.end();
        assert_eq!((ended.status.code(), ended.stderr), (Some(1), vec![]));
    }
    story.assert_nothing_is_left();

    // nor does rank 0
    let began = Instant::now();
    let group = Group::new(2);
    let ended = story.start(group.command(&story, 1, &arguments)).end();
    let line = ended.failed(1);
    assert!(line.contains("no coordinator admitted this rank in time"), "{line}");
    assert!(line.contains(&format!("127.0.0.1:{}", group.port)), "{line}");
    assert!(began.elapsed() < 4 * SECOND, "{:?}", began.elapsed());
    story.assert_nothing_is_left();
}

/// Whoever has joined as a rank stays it.
#[test]
fn a_second_process_of_the_same_rank_does_not_disturb_the_first() {
    let story = story();
    let group = Group::new(4);
    let arguments = ["checkpoint", "--out", "out", "--json", "--log-level", "warn"];
    let start = |rank| story.start(group.command(&story, rank, &arguments));
    let mut first = start(0);
    let one = start(1);
    let joined = story.rank(1);
    wait_until("rank 1 has joined", || joined.has_thread("longshore-link"));
    let hurried = [&arguments[..], &["--join-timeout", "1"]].concat();
    let second = story.start(group.command(&story, 1, &hurried)).end();
    let line = second.failed(1);
    assert!(line.contains("rank 1 has joined already"), "{line}");
    first.wait_for_line("rank 1 has joined already");
    for rank in [one, start(2), start(3)] {
        assert_eq!(rank.end().status.code(), Some(0));
    }
    let ended = first.end();
    assert_eq!((ended.status.code(), ended.stderr.len()), (Some(0), 1), "{:?}", ended.stderr);
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["digest"], digest_of_threads(&story, "4"));
    assert!(story.path("out").join("manifest.json").exists());
}

/// Found out before the first byte: each rank would end at its first read.
#[test]
fn ranks_that_plan_another_load_are_refused_before_any_weight_is_read() {
    for other in [
        &["--ep", "2"][..],
        &["--kernel-layout", "trtllm"],
        &["--read-size", "128KiB"],
        &["--memory-limit", "256KiB"],
        &["another"],
    ] {
        for (world_size, odd) in [(2, 1), (4, 2)] {
            let story = story();
            let another = Checkpoint::new(Family::DeepseekV3, Scheme::Bf16).files(3);
            another.write(&story.path("another")).unwrap();
            let group = Group::new(world_size);
            let start = |rank| {
                let arguments = match other {
                    _ if rank != odd => rank_arguments(&[]),
                    &["another"] => [&["another"], &rank_arguments(&[])[1..]].concat(),
                    options => rank_arguments(options),
                };
                let mut command = group.command(&story, rank, &arguments);
                command.env("LONGSHORE_FAULT", format!("rank={rank},read=0,do=exit"));
                story.start(command)
            };
            // the odd one comes last, so that all are told
            let mut ranks: Vec<(u32, Running)> = Vec::new();
            for rank in (0..world_size).filter(|rank| *rank != odd).chain([odd]) {
                ranks.push((rank, start(rank)));
                let process = story.rank(rank);
                let joined = || rank == odd || process.has_thread("longshore-link");
                wait_until(&format!("rank {rank} has joined"), joined);
            }
            for (rank, running) in ranks {
                let ended = running.end();
                if rank == 0 {
                    let line = ended.failed(2);
                    assert!(line.contains(&format!("rank {odd} ")), "{other:?}: {line}");
                    assert!(line.contains("plans another load"), "{other:?}: {line}");
                } else {
                    let (code, stderr) = (ended.status.code(), ended.stderr);
                    assert_eq!((code, stderr), (Some(1), vec![]), "{other:?}: rank {rank}");
                }
            }
            assert_eq!(fs::read_dir(story.path("out")).unwrap().count(), 0, "{other:?}");
            story.assert_nothing_is_left();
        }
    }
}

/// Before the load where it can be seen then, else at its end; either way there is no manifest.
#[test]
fn an_output_that_one_rank_cannot_write_fails_the_group() {
    let story = story();
    fs::write(story.path("file"), "").unwrap();
    let script =
        "exec \"$0\" rank checkpoint --log-level error --out $(test $RANK = 1 && echo file/)out";
    let program = env!("CARGO_BIN_EXE_longshore");
    let launch = ["launch", "--nproc", "2", "--", "sh", "-c", script, program];
    let ended = story.start(story.command(&launch)).end();
    assert_eq!((ended.status.code(), &ended.stdout[..]), (Some(2), ""), "{:?}", ended.stderr);
    let told =
        |line: &String| line.starts_with("[rank 1] longshore: ") && line.contains("file/out");
    assert!(ended.stderr.iter().any(told), "{:?}", ended.stderr);
    story.assert_nothing_is_left();

    for odd in [0, 1] {
        let group = Group::new(2);
        let out = story.path("out");
        let ranks = [0, 1].map(|rank| {
            let mut command = group.command(&story, rank, &rank_arguments(&[]));
            command.env("LONGSHORE_FAULT", format!("rank={odd},read=0,do=slow"));
            story.start(command)
        });
        // past its look whether it can write, and far from writing
        let process = story.rank(odd);
        wait_until("the rank loads", || process.has_thread("longshore-link"));
        let taken = out.join(format!(".longshore.{}.{odd}.tmp", process.pid));
        fs::write(&taken, "").unwrap();
        for (rank, running) in ranks.into_iter().enumerate() {
            let ended = running.end();
            assert_eq!((ended.status.code(), &ended.stdout[..]), (Some(1), ""), "{:?}", ended);
            match rank {
                0 => {
                    let line = ended.failed(1);
                    let wanted = format!("rank {odd} could not write its output: ");
                    assert!(line.contains(&wanted), "{line}");
                    assert!(line.contains("creating a directory"), "{line}");
                }
                // one says it for all
                _ => assert!(ended.stderr.is_empty(), "{:?}", ended.stderr),
            }
        }
        fs::remove_file(&taken).unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
        story.assert_nothing_is_left();
    }
}

/// What it was writing goes with the next output, since it cannot take it away itself; nothing else is to be seen of it.
#[test]
fn a_rank_that_is_killed_while_it_writes_leaves_no_output() {
    let story = story();
    let group = Group::new(2);
    let out = story.path("out");
    let names = || -> Vec<String> {
        let entries = fs::read_dir(&out).unwrap().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let one = story.start(group.command(&story, 1, &rank_arguments(&[])));
    // it has looked whether it can write there before it waits for the others
    let waits = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", one.pid())).into_iter().flatten();
        let comms = tasks.flatten().filter_map(|t| fs::read_to_string(t.path().join("comm")).ok());
        comms.into_iter().any(|comm| comm.starts_with("tokio"))
    };
    wait_until("rank 1 waits for the others", waits);
    // rank 1 writes into a pipe that nobody reads
    let aside = format!(".longshore.{}.1.tmp", one.pid());
    let pipe = out.join(&aside).join("rank-00001-of-00002.safetensors");
    fs::create_dir_all(out.join(&aside)).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut zero = story.start(group.command(&story, 0, &rank_arguments(&[])));
    let own = out.join(format!(".longshore.{}.0.tmp", zero.pid()));
    wait_until("rank 0 has written its file", || {
        own.join("rank-00000-of-00002.safetensors").exists()
    });
    let killed = Instant::now();
    signal(one.pid(), "KILL");
    let (at, _) = zero.wait_for_line("longshore: rank 1 was lost: ");
    assert!(at - killed < SECOND, "{:?}", at - killed);
    zero.end().failed(1);
    assert_eq!(one.end().stderr, Vec::<String>::new());
    assert_eq!(names(), [aside]);

    let again = ["load", "checkpoint", "--ranks", "processes", "--tp", "2", "--out", "out"];
    let again = story.command(&[&again[..], &["--json", "--log-level", "error"]].concat());
    story.start(again).end().json();
    let files = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
    assert_eq!(names(), ["manifest.json", files[0], files[1]]);
}

/// The very last step of a rank, told in its own words as well.
#[test]
fn a_file_that_cannot_get_its_name_fails_the_group() {
    for odd in [0, 1] {
        let story = story();
        let taken = story.path("out").join(format!("rank-0000{odd}-of-00002.safetensors"));
        fs::create_dir_all(taken.join("full")).unwrap();
        let group = Group::new(2);
        let start = |rank| story.start(group.command(&story, rank, &rank_arguments(&[])));
        let (zero, one) = (start(0), start(1));
        let line = zero.end().failed(1).to_owned();
        assert!(line.contains(&format!("rank {odd} could not write its output: ")), "{line}");
        assert!(line.contains("renaming"), "{line}");
        let one = one.end();
        assert_eq!((one.status.code(), one.stderr), (Some(1), vec![]));
        let left = fs::read_dir(story.path("out")).unwrap().flatten().map(|e| e.file_name());
        let left: Vec<_> = left.filter(|name| name != taken.file_name().unwrap()).collect();
        assert!(left.iter().all(|name| name.to_str().unwrap().starts_with("rank-")), "{left:?}");
        story.assert_nothing_is_left();
    }
}

/// Connects to rank 0 once it listens, and sends `bytes`.
fn stranger(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let connect = || TcpStream::connect(address).ok();
    let mut stream = processes::wait_for("rank 0 listens", connect);
    stream.write_all(bytes).unwrap();
    stream
}

/// While a group waits for its last rank others come, each kind twice; each is turned away and told once.
#[test]
fn strangers_do_not_disturb_a_group_that_waits() {
    let story = story();
    let group = Group { attempt: 3, ..Group::new(2) };
    let address = SocketAddr::from(([127, 0, 0, 1], group.port));
    let arguments = ["checkpoint", "--json", "--log-level", "warn"];
    let mut first = story.start(group.command(&story, 0, &arguments));

    let silent = [(); 2].map(|()| stranger(address, &[]));
    // a frame of four bytes that is no message; one of four gigabytes; another protocol, whose first word is a length as well
    let garbage: [&[u8]; 3] = [&[4, 0, 0, 0, 1, 2, 3, 4], &[0xff; 4], b"GET / HTTP/1.1\r\n\r\n"];
    for bytes in [garbage, garbage].concat() {
        let mut stream = stranger(address, bytes);
        // until it is hung up; a reset is as good as an end
        let _ = stream.read_to_end(&mut Vec::new());
    }
    for _ in 0..2 {
        drop(stranger(address, &[]));
        let refused = |group: Group, code, words: &str| {
            let arguments = ["checkpoint", "--join-timeout", "0.5", "--log-level", "error"];
            let ended = story.start(group.command(&story, 1, &arguments)).end();
            let line = ended.failed(code);
            assert!(line.contains(words), "{line}");
        };
        refused(Group { secret: Some("another"), ..group.clone() }, 1, "it has another secret");
        refused(Group { attempt: 2, ..group.clone() }, 2, "an old generation");
        refused(Group { world_size: 4, ..group.clone() }, 2, "4 ranks");
    }
    // it is told after the time for a handshake
    first.wait_for_line("it did not join within");

    let last = story.start(group.command(&story, 1, &arguments)).end();
    assert_eq!((last.status.code(), &last.stderr[..]), (Some(0), &[][..]));
    let ended = first.end();
    drop(silent);
    assert_eq!(ended.status.code(), Some(0), "{:?}", ended.stderr);
    for words in [
        "it did not join within",
        "what it sent is no join",
        "what it sent is no frame of a join",
        "it closed the connection before it had joined",
        "its proof is wrong",
        "an old generation: the joiner is of attempt 2, the group of attempt 3",
        "the joiner's group has 4 ranks, this one has 2",
    ] {
        let told = ended.stderr.iter().filter(|line| line.contains(words));
        assert_eq!(told.count(), 1, "{words}: {:?}", ended.stderr);
    }
    assert_eq!(ended.stderr.len(), 7, "{:?}", ended.stderr);
    assert!(ended.stderr.iter().all(|line| line.contains("WARN")), "{:?}", ended.stderr);
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["digest"], digest_of_threads(&story, "2"));
    story.assert_nothing_is_left();
}
