//! The launcher: what each rank is told, what is shown of it, what becomes of one that is lost, how a group ends, and that
//! nothing is left of it.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, IsTerminal, Read},
    net::TcpStream,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use longshore::{
    error::LoadError,
    launch::{Ended, FinalLines, Launch},
};
use longshore_harness::{
    generator::{Checkpoint, Family, Scheme},
    scratch::Scratch,
};

/// Longer than anything here takes; a test that waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(60);

/// By which a test's processes are found.
const MARK: &str = "LONGSHORE_TEST_MARK";

/// One launch, its files, and whatever processes it starts.
struct Story {
    scratch: Scratch,
}

impl Story {
    fn new() -> Self {
        Self { scratch: Scratch::new().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longshore"));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env(MARK, self.scratch.path()).current_dir(self.scratch.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.arg("launch").args(arguments);
        // whatever has started the tests may ignore it, and what it started with it
        let heed = || {
            // SAFETY: sets what a signal does to this process
            unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
            Ok(())
        };
        // SAFETY: a system call that may be made between fork and exec
        unsafe { command.pre_exec(heed) };
        command
    }

    /// Runs to the end; then no process is left.
    fn run(&self, arguments: &[&str]) -> Output {
        let run = self.command(arguments).output().unwrap();
        self.wait_until_nobody_is_left();
        run
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().unwrap()
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.scratch.join(name)).ok()
    }

    /// The number that a rank has written to the file `name`, once it has.
    fn pid(&self, name: &str) -> i32 {
        let written = || self.read(name).filter(|text| text.ends_with('\n'));
        wait_until(name, || written().is_some());
        written().unwrap().trim().parse().unwrap()
    }

    /// Processes that this story started and that have not ended. The dead have no environment.
    fn alive(&self) -> Vec<String> {
        let mark = format!("{MARK}={}", self.scratch.path().display());
        let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        let marked = processes.filter(|path: &PathBuf| {
            let environment = fs::read(path.join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
        });
        marked.map(|path| path.display().to_string()).collect()
    }

    fn wait_until_nobody_is_left(&self) {
        wait_until("all processes are gone", || self.alive().is_empty());
    }
}

fn wait_until(what: &str, reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < DEADLINE, "{what}: not reached");
        thread::sleep(Duration::from_millis(5));
    }
}

fn wait(run: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = run.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > DEADLINE {
            run.kill().unwrap();
            panic!("the launcher does not end");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: i32, signal: &str) {
    let sent = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().unwrap();
    assert!(sent.success(), "kill -{signal} {pid}");
}

fn stderr(run: &Output) -> String {
    String::from_utf8_lossy(&run.stderr).into_owned()
}

/// The last line, and it alone begins as a failed command's does.
fn final_line(run: &Output) -> String {
    let text = stderr(run);
    let last = text.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("longshore: "), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("longshore: ")).count(), 1, "{text}");
    last
}

/// The lines of a stream as they come.
fn lines_of(stream: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
        }
    });
    lines
}

fn wait_for_line(lines: &mpsc::Receiver<String>, wanted: &str) {
    let started = Instant::now();
    loop {
        let left = DEADLINE.saturating_sub(started.elapsed());
        let line = lines.recv_timeout(left).unwrap_or_else(|e| panic!("{wanted}: {e}"));
        if line.contains(wanted) {
            return;
        }
    }
}

/// What a rank was told: the files that `env > $RANK` wrote.
fn environments(story: &Story, ranks: &[u32]) -> Vec<BTreeMap<String, String>> {
    let parse = |text: String| {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    ranks.iter().map(|rank| parse(story.read(&rank.to_string()).unwrap())).collect()
}

const TELL: [&str; 3] = ["sh", "-c", "env > $RANK"];

#[test]
fn each_rank_is_told_its_place() {
    let story = Story::new();
    let run = story.run(&[&["--nproc", "3", "--max-restarts", "2", "--"][..], &TELL].concat());
    assert_eq!((run.status.code(), stderr(&run)), (Some(0), String::new()));
    let told = environments(&story, &[0, 1, 2]);
    for (rank, told) in told.iter().enumerate() {
        let rank = rank.to_string();
        for (name, wanted) in [
            ("RANK", &rank[..]),
            ("LOCAL_RANK", &rank),
            ("WORLD_SIZE", "3"),
            ("LOCAL_WORLD_SIZE", "3"),
            ("NODE_RANK", "0"),
            ("GROUP_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "2"),
            ("LONGSHORE_RESTARTS", "0"),
        ] {
            assert_eq!(told[name], wanted, "{name}");
        }
    }
    assert_ne!(told[0]["MASTER_PORT"].parse::<u16>().unwrap(), 0);
    assert!(told[0]["LONGSHORE_SECRET"].len() >= 32);
    for name in ["MASTER_PORT", "LONGSHORE_SECRET"] {
        assert!(told.iter().all(|other| other[name] == told[0][name]), "{name}");
    }
}

/// The flags of torchrun as its scripts write them, before and without `--`.
#[test]
fn flags_have_both_spellings() {
    let dashes = [
        "--nproc-per-node=2",
        "--node-rank=1",
        "--rdzv-endpoint=node-0:4000",
        "--rdzv-backend=c10d",
        "--rdzv-id=job",
        "--master-addr=other",
        "--master-port=1",
        "--max-restarts=3",
        "--nnodes=2:2",
    ];
    let underscores = dashes.map(|flag| flag.replacen("--", "", 1).replace('-', "_"));
    let underscores = underscores.map(|flag| format!("--{}", flag.replace("node_0", "node-0")));
    let underscores = underscores.each_ref().map(String::as_str);
    for flags in [dashes, underscores] {
        for separator in [&[][..], &["--"]] {
            let story = Story::new();
            let mut command = story.command(&[&flags[..], separator, &TELL].concat());
            // a store of torchrun's is not there, whatever is around the launcher
            command.env("LONGSHORE_SECRET", "abc").env("TORCHELASTIC_USE_AGENT_STORE", "True");
            let run = command.output().unwrap();
            assert_eq!((run.status.code(), stderr(&run)), (Some(0), String::new()), "{flags:?}");
            let told = environments(&story, &[2, 3]);
            let place = ["WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"];
            assert_eq!(place.map(|name| &told[1][name][..]), ["4", "1", "1", "node-0", "4000"]);
            assert_eq!(told[0]["LONGSHORE_SECRET"], "abc");
            assert_eq!(told[0]["TORCHELASTIC_MAX_RESTARTS"], "3");
            assert!(!told[0].contains_key("TORCHELASTIC_USE_AGENT_STORE"));
        }
    }
}

/// Flags after the command are the command's.
#[test]
fn the_command_keeps_its_own_flags() {
    let story = Story::new();
    let run = story.run(&["--nproc", "1", "echo", "--json", "--nproc", "7", "--", "-x", "--help"]);
    assert_eq!(String::from_utf8_lossy(&run.stdout), "--json --nproc 7 -- -x --help\n");
}

#[test]
fn rank_0_writes_through_and_the_others_behind_their_number() {
    let story = Story::new();
    let script = r#"echo out $RANK; echo err $RANK >&2; printf 'tail\377 %s' $RANK"#;
    let run = story.run(&["--nproc", "3", "--", "sh", "-c", script]);
    assert_eq!(run.stdout, b"out 0\ntail\xff 0");
    let mut lines: Vec<&[u8]> = run.stderr.split(|byte| *byte == b'\n').collect();
    lines.sort();
    let wanted: [&[u8]; 8] = [
        b"",
        b"[rank 1] err 1",
        b"[rank 1] out 1",
        b"[rank 1] tail\xff 1",
        b"[rank 2] err 2",
        b"[rank 2] out 2",
        b"[rank 2] tail\xff 2",
        b"err 0",
    ];
    assert_eq!(lines, wanted, "{}", stderr(&run));
}

#[test]
fn nothing_of_what_a_rank_wrote_is_lost() {
    let story = Story::new();
    let script = "test $RANK = 0 || seq 200000";
    let run = story.run(&["--nproc", "2", "--", "sh", "-c", script]);
    let text = stderr(&run);
    let mut count = 0;
    for (line, number) in text.lines().zip(1..) {
        assert_eq!(line, format!("[rank 1] {number}"));
        count = number;
    }
    assert_eq!(count, 200_000);
}

#[test]
fn a_rank_that_floods_does_not_silence_another() {
    let story = Story::new();
    let script =
        "case $RANK in 1) exec yes;; 2) echo hello; exec sleep 1000;; esac; exec sleep 1000";
    let mut run = story.spawn(&["--nproc", "3", "--", "sh", "-c", script]);
    let lines = lines_of(run.stderr.take().unwrap());
    wait_for_line(&lines, "[rank 2] hello");
    kill(run.id() as i32, "TERM");
    // the lines go on being read: a full pipe would stop the flood, not the launcher
    assert_eq!(wait(&mut run).code(), Some(143));
    story.wait_until_nobody_is_left();
}

/// The reader of the launcher's stderr has stopped reading; rank 1 fills the pipe.
#[test]
fn a_reader_that_does_not_read_does_not_keep_a_group_alive() {
    let story = Story::new();
    let script = "echo $$ > pid-$RANK; test $RANK = 0 || exec yes; exec sleep 1000";
    let mut run = story.spawn(&["--nproc", "2", "--", "sh", "-c", script]);
    kill(story.pid("pid-0"), "KILL");
    wait_until("only the launcher is left", || story.alive().len() == 1);
    kill(run.id() as i32, "TERM");
    assert_eq!(wait(&mut run).code(), Some(143));
    story.wait_until_nobody_is_left();
}

/// Rank 0's code, else the first failed rank's; a rank that succeeds ends nobody.
#[test]
fn the_exit_code_is_rank_0s_or_the_first_failed_ranks() {
    for (script, code, line) in [
        ("exit 0", 0, None),
        ("test $RANK = 1 || exec sleep 0.2", 0, None),
        ("test $RANK != 0 || exit 3; exec sleep 1000", 3, Some("rank 0 exited with code 3")),
        ("test $RANK != 2 || exit 7; exec sleep 1000", 7, Some("rank 2 exited with code 7")),
        (
            "test $RANK != 1 || kill -SEGV $$; exec sleep 1000",
            139,
            Some("rank 1 was killed by signal 11 (SIGSEGV)"),
        ),
        // rank 0 learns of it and says so itself
        (
            "test $RANK != 1 || kill -9 $$; test $RANK = 0 || exec sleep 1000; sleep 0.5; exit 5",
            5,
            Some("rank 1 was killed by signal 9 (SIGKILL)"),
        ),
    ] {
        let story = Story::new();
        let run = story.run(&["--nproc", "3", "--", "sh", "-c", script]);
        assert_eq!(run.status.code(), Some(code), "{script}: {}", stderr(&run));
        match line {
            Some(line) => assert_eq!(final_line(&run), format!("longshore: {line}"), "{script}"),
            None => assert_eq!(stderr(&run), "", "{script}"),
        }
    }
}

/// A killed rank is reported at once, and ends the others: those that sleep, that are stopped, that ignore it.
#[test]
fn a_killed_rank_is_reported_at_once_and_the_others_end() {
    let story = Story::new();
    let script =
        "test $RANK != 3 || trap '' TERM; echo $$ > pid-$RANK; while :; do sleep 1000; done";
    let mut run = story.spawn(&["--nproc", "4", "--", "sh", "-c", script]);
    let pids: Vec<i32> = (0..4).map(|rank| story.pid(&format!("pid-{rank}"))).collect();
    let lines = lines_of(run.stderr.take().unwrap());
    kill(pids[1], "STOP");
    let killed = Instant::now();
    kill(pids[2], "KILL");
    wait_for_line(&lines, "rank 2 was killed by signal 9 (SIGKILL)");
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
    assert_eq!(wait(&mut run).code(), Some(137));
    wait_for_line(&lines, "longshore: rank 2 was killed by signal 9 (SIGKILL)");
    story.wait_until_nobody_is_left();
}

/// Whatever ends the launcher: here it has no chance to do anything.
#[test]
fn ranks_die_with_the_launcher() {
    let story = Story::new();
    let script = "trap '' TERM HUP INT; echo $$ > pid-$RANK; exec sleep 1000";
    let mut run = story.spawn(&["--nproc", "3", "--", "sh", "-c", script]);
    let pids: Vec<i32> = (0..3).map(|rank| story.pid(&format!("pid-{rank}"))).collect();
    kill(pids[1], "STOP");
    run.kill().unwrap();
    run.wait().unwrap();
    story.wait_until_nobody_is_left();
}

#[test]
fn a_launcher_that_is_told_to_end_passes_it_on() {
    for (signal, number) in [("INT", 2), ("TERM", 15), ("HUP", 1), ("QUIT", 3)] {
        let story = Story::new();
        // one rank notes what it was sent, and each has started something
        let script =
            format!("trap 'echo > told; exit' {signal}; sleep 1000 & echo $$ > pid-$RANK; wait");
        let mut run = story.spawn(&["--nproc", "2", "--", "sh", "-c", &script]);
        (0..2).for_each(|rank| assert!(story.pid(&format!("pid-{rank}")) > 0));
        kill(run.id() as i32, signal);
        let lines = lines_of(run.stderr.take().unwrap());
        assert_eq!(wait(&mut run).code(), Some(128 + number), "{signal}");
        wait_for_line(&lines, &format!("longshore: ended by signal {number} (SIG{signal})"));
        assert!(story.read("told").is_some(), "{signal} was passed on");
        story.wait_until_nobody_is_left();
    }
}

#[test]
fn ranks_that_ignore_a_signal_are_killed_when_it_comes_twice() {
    let story = Story::new();
    let script = "trap '' TERM; echo $$ > pid-$RANK; while :; do sleep 1000; done";
    let mut run = story.spawn(&["--nproc", "2", "--", "sh", "-c", script]);
    let pids: Vec<i32> = (0..2).map(|rank| story.pid(&format!("pid-{rank}"))).collect();
    kill(pids[1], "STOP");
    let started = Instant::now();
    // signals of one kind that come at once are one
    while run.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(4), "not only after the grace");
        kill(run.id() as i32, "TERM");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(wait(&mut run).code(), Some(143));
    story.wait_until_nobody_is_left();
}

/// `nohup longshore launch …` goes on when the terminal is closed.
#[test]
fn a_launcher_under_nohup_goes_on() {
    let story = Story::new();
    let exe = env!("CARGO_BIN_EXE_longshore");
    let script =
        "trap '' HUP; exec \"$0\" launch --nproc 1 -- sh -c 'echo $$ > pid; exec sleep 1000'";
    let mut run = Command::new("sh")
        .args(["-c", script, exe])
        .env(MARK, story.scratch.path())
        .current_dir(story.scratch.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    story.pid("pid");
    kill(run.id() as i32, "HUP");
    kill(run.id() as i32, "TERM");
    assert_eq!(wait(&mut run).code(), Some(143), "not 129");
    story.wait_until_nobody_is_left();
}

/// The warnings among what a run has written, without their level.
fn warnings(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.trim_start().strip_prefix("WARN ")).collect()
}

/// In its place, with what it was told before; the others do not notice.
#[test]
fn a_lost_rank_is_started_again_while_the_others_run_on() {
    for (lost, signal, number) in [(1, "KILL", 9), (0, "KILL", 9), (2, "SEGV", 11)] {
        let story = Story::new();
        let script = "env > told-$RANK-$LONGSHORE_RESTARTS; echo $$ > pid-$RANK-$LONGSHORE_RESTARTS; \
            until test -e end; do sleep 0.02; done";
        let launch = ["--nproc", "3", "--max-restarts", "3", "--", "sh", "-c", script];
        let mut run = story.spawn(&launch);
        let first: Vec<i32> = (0..3).map(|rank| story.pid(&format!("pid-{rank}-0"))).collect();
        kill(first[lost], signal);
        let second = story.pid(&format!("pid-{lost}-1"));
        assert_ne!(second, first[lost]);
        for (rank, pid) in first.iter().enumerate().filter(|(rank, _)| *rank != lost) {
            assert!(PathBuf::from(format!("/proc/{pid}/environ")).exists(), "rank {rank}");
            assert_eq!(story.read(&format!("pid-{rank}-1")), None);
        }
        let told = |restarts: u32| -> Vec<String> {
            let text = story.read(&format!("told-{lost}-{restarts}")).unwrap();
            let own = |line: &&str| !line.starts_with("LONGSHORE_RESTARTS=");
            text.lines().filter(own).map(str::to_owned).collect()
        };
        assert_eq!(told(0), told(1));
        fs::write(story.scratch.join("end"), "").unwrap();
        wait(&mut run);
        let run = run.wait_with_output().unwrap();
        let warning = format!(
            "rank {lost} was killed by signal {number} (SIG{signal}); it starts again, restart 1 of 3"
        );
        assert_eq!((run.status.code(), warnings(&stderr(&run))), (Some(0), vec![&warning[..]]));
        assert_eq!(stderr(&run).lines().count(), 1, "{}", stderr(&run));
        story.wait_until_nobody_is_left();
    }
}

/// The pauses grow, and the final line has every cause.
#[test]
fn a_rank_that_is_lost_again_and_again_ends_the_group() {
    let story = Story::new();
    let script = "echo $LONGSHORE_RESTARTS $TORCHELASTIC_RESTART_COUNT >> $RANK; \
        test $RANK = 1 || exec sleep 1000; \
        case $LONGSHORE_RESTARTS in 0) kill -9 $$;; 1) exit 5;; *) exit 6;; esac";
    let run = story.run(&["--nproc", "3", "--max-restarts", "2", "--", "sh", "-c", script]);
    let text = stderr(&run);
    assert_eq!(run.status.code(), Some(6), "{text}");
    let wanted = [
        "rank 1 was killed by signal 9 (SIGKILL); it starts again, restart 1 of 2",
        "rank 1 exited with code 5; it starts again in 0.5 s, restart 2 of 2",
    ];
    assert_eq!(warnings(&text), wanted);
    let wanted = "longshore: rank 1 was killed by signal 9 (SIGKILL); then rank 1 exited with code 5; \
        then rank 1 exited with code 6";
    assert_eq!(final_line(&run), wanted);
    assert_eq!(story.read("1").unwrap(), "0 0\n1 0\n2 0\n");
    assert_eq!(
        (story.read("0").unwrap(), story.read("2").unwrap()),
        ("0 0\n".into(), "0 0\n".into())
    );

    let story = Story::new();
    let run = story.run(&["--nproc", "1", "--max_restarts", "1", "--", "sh", "-c", "exit 6"]);
    assert_eq!(run.status.code(), Some(6));
    assert_eq!(
        final_line(&run),
        "longshore: rank 0 exited with code 6; then rank 0 exited with code 6"
    );
}

/// One is killed, the others end because of it: that is one failure.
#[test]
fn a_group_that_fails_together_uses_one_restart() {
    let story = Story::new();
    let script = "test $LONGSHORE_RESTARTS = 0 || exit 0; echo > up-$RANK; \
        until test -e up-0 && test -e up-1 && test -e up-2 && test -e up-3; do sleep 0.01; done; \
        test $RANK != 2 || kill -9 $$; exit 1";
    let run = story.run(&["--nproc", "4", "--max-restarts", "1", "--", "sh", "-c", script]);
    let text = stderr(&run);
    assert_eq!(run.status.code(), Some(0), "{text}");
    let warned = warnings(&text);
    assert_eq!(warned.len(), 4, "{text}");
    assert!(warned.iter().all(|line| line.contains("restart 1 of 1")), "{text}");
    assert!(text.contains("restart 1 of 1 (every rank has failed, which counts once)"), "{text}");
    assert_eq!(text.lines().count(), 4, "{text}");
}

/// More ranks fail than may be started again, and one does not: it is ended, none is left.
#[test]
fn ranks_that_are_too_many_to_be_started_again_end_the_group() {
    let story = Story::new();
    let script = "echo > up-$RANK; until test -e up-0 && test -e up-1 && test -e up-2; do sleep 0.01; done; \
        test $RANK != 0 || exec sleep 1000; test $LONGSHORE_RESTARTS = 0 || exec sleep 1000; exit 7";
    let run = story.run(&["--nproc", "3", "--max-restarts", "1", "--", "sh", "-c", script]);
    assert_eq!(run.status.code(), Some(7), "{}", stderr(&run));
    let line = final_line(&run);
    for rank in [1, 2] {
        assert!(line.contains(&format!("rank {rank} exited with code 7")), "{line}");
    }
    assert!(line.contains("; then "), "{line}");
}

/// A coordinator's successor listens where the others look for it, though its predecessor's connections are still known to
/// the system.
#[test]
fn rank_0_has_its_port_again_at_once() {
    let story = Story::new();
    let checkpoint = Checkpoint::new(Family::Llama, Scheme::Bf16);
    checkpoint.write(&story.scratch.join("checkpoint")).unwrap();
    let script = "echo $MASTER_PORT > port; echo $$ > pid-$RANK-$LONGSHORE_RESTARTS; \
        test $RANK = 0 || exec sleep 1000; exec \"$0\" rank checkpoint --log-level error";
    let exe = env!("CARGO_BIN_EXE_longshore");
    let launch = ["--nproc", "2", "--max-restarts", "2", "--", "sh", "-c", script, exe];
    let mut run = story.spawn(&launch);
    let port = story.pid("port") as u16;
    let greeted = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        let mut greeting = [0; 13];
        stream.read_exact(&mut greeting).ok()?;
        // its length comes first
        (&greeting[4..] == b"longshore").then_some(stream)
    };
    let mut held = Vec::new();
    for restarts in 0..3 {
        let pid = story.pid(&format!("pid-0-{restarts}"));
        wait_until("rank 0 greets", || greeted().is_some());
        held.push(greeted());
        if restarts < 2 {
            kill(pid, "KILL");
        }
    }
    kill(run.id() as i32, "TERM");
    assert_eq!(wait(&mut run).code(), Some(143));
    story.wait_until_nobody_is_left();
}

#[test]
fn a_signal_ends_the_wait_before_a_restart() {
    let story = Story::new();
    let script = "test $RANK = 0 || exec sleep 1000; exit 1";
    let arguments = ["--nproc", "2", "--max-restarts", "9", "--", "sh", "-c", script];
    let mut run = story.spawn(&arguments);
    let lines = lines_of(run.stderr.take().unwrap());
    wait_for_line(&lines, "it starts again in 2 s, restart 4 of 9");
    kill(run.id() as i32, "INT");
    assert_eq!(wait(&mut run).code(), Some(130));
    wait_for_line(&lines, "longshore: ended by signal 2 (SIGINT)");
    story.wait_until_nobody_is_left();
}

/// What a rank leaves in its group goes with it; what has left the group is not waited for.
#[test]
fn what_a_rank_leaves_behind_is_gone_or_not_waited_for() {
    let story = Story::new();
    let run = story.run(&["--nproc", "2", "--", "sh", "-c", "sleep 1000 & sleep 1000 & exit 0"]);
    assert_eq!(run.status.code(), Some(0), "{}", stderr(&run));

    let story = Story::new();
    let script = "test $RANK = 0 || setsid sh -c 'echo $$ > pid; exec sleep 1000' & \
        until test -s pid; do sleep 0.01; done; echo last $RANK";
    let mut run = story.spawn(&["--nproc", "2", "--", "sh", "-c", script]);
    let lines = lines_of(run.stderr.take().unwrap());
    assert_eq!(wait(&mut run).code(), Some(0));
    wait_for_line(&lines, "[rank 1] last 1");
    kill(story.pid("pid"), "KILL");
    story.wait_until_nobody_is_left();
}

/// A rank holds what a command started by a shell holds: no pipe of another rank.
#[test]
fn ranks_inherit_nothing_of_each_other() {
    let story = Story::new();
    let script = "ls /proc/self/fd > fds-$RANK";
    story.run(&["--nproc", "3", "--", "sh", "-c", script]);
    let alone = Command::new("sh")
        .args(["-c", "ls /proc/self/fd > fds-alone"])
        .current_dir(story.scratch.path())
        .status();
    assert!(alone.unwrap().success());
    for rank in 0..3 {
        assert_eq!(story.read(&format!("fds-{rank}")), story.read("fds-alone"), "rank {rank}");
    }
}

#[test]
fn bad_flags_are_one_line_and_exit_code_2() {
    for (arguments, word) in [
        (&[][..], "COMMAND"),
        (&["--"], "COMMAND"),
        (&["--nproc", "0", "--", "true"], "--nproc"),
        (&["--nproc", "many", "--", "true"], "many"),
        (&["--nproc", "1000000", "--", "true"], "1000000"),
        (&["--nnodes", "1:2", "--", "true"], "1:2"),
        (&["--nnodes", "0", "--", "true"], "--nnodes"),
        (&["--nnodes", "2", "--", "true"], "--node-rank"),
        (&["--nnodes", "2", "--node-rank", "2", "--master-addr", "a", "true"], "--node-rank"),
        (&["--nnodes", "2", "--node-rank", "0", "--", "true"], "--master-addr"),
        (&["--nnodes", "2", "--node-rank", "0", "--master-addr", "a", "true"], "LONGSHORE_SECRET"),
        (&["--nnodes", "2", "--node-rank", "0", "--standalone", "true"], "--standalone"),
        (&["--node-rank", "1", "--", "true"], "--node-rank"),
        (&["--rdzv-endpoint", "host:port", "--", "true"], "host:port"),
        (&["--rdzv-backend", "etcd", "--", "true"], "etcd"),
        (&["--master-port", "65536", "--", "true"], "65536"),
        (&["--max-restarts=-1", "--", "true"], "--max-restarts"),
        (&["--frobnicate", "true"], "--frobnicate"),
        (&["--", "/no/such/command"], "/no/such/command"),
        (&["--nproc", "4", "no-such-command"], "no-such-command"),
        (&["--", "/"], "/"),
    ] {
        let story = Story::new();
        let run = story.run(arguments);
        let text = stderr(&run);
        assert_eq!(run.status.code(), Some(2), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
        assert!(final_line(&run).contains(word), "{arguments:?}: {text}");
        assert!(run.stdout.is_empty(), "{arguments:?}");
    }
}

/// `load` with a process per rank ends with one line, whoever of its ranks had one to say.
#[test]
fn of_the_final_lines_of_longshore_commands_one_is_left() {
    let launch = |script: &str, max_restarts| -> Result<Ended, LoadError> {
        let command = ["sh", "-c", script].map(Into::into).to_vec();
        Launch { final_lines: FinalLines::One, max_restarts, ..Launch::new(command, 3) }.run()
    };
    let ended = |code, line: Option<&str>, restarts| Ended {
        code,
        line: line.map(str::to_owned),
        restarts,
    };
    // rank 0 has said it, if it could; what is refused is not tried again
    let script = "test $RANK != 1 || sleep 0.1; echo \"longshore: $RANK\" >&2; exit 2";
    let line = (!io::stderr().is_terminal()).then_some("0");
    assert_eq!(launch(script, 9).unwrap(), ended(2, line, 0));
    assert_eq!(launch(script, 0).unwrap(), ended(2, None, 0));
    // rank 0 had no chance to
    let script = "test $RANK = 1 || exec sleep 1000; echo 'longshore: disk' >&2; exit 1";
    assert_eq!(launch(script, 1).unwrap(), ended(1, Some("disk"), 0));
    // it would do better as another process
    let script = "test $RANK = 1 || exec sleep 1000; echo 'longshore: disk' >&2; exit 75";
    assert_eq!(launch(script, 0).unwrap(), ended(1, Some("disk"), 0));
    let both = "rank 1 exited with code 75: disk; then rank 1 exited with code 75: disk";
    assert_eq!(launch(script, 1).unwrap(), ended(1, Some(both), 1));
    // a line of one that was started again is none of a group that ends well
    let script = "test $LONGSHORE_RESTARTS = 1 && exit; test $RANK = 1 || exec sleep 2; \
        echo 'longshore: disk' >&2; exit 75";
    assert_eq!(launch(script, 1).unwrap(), ended(0, None, 1));
    // none ends well before the work of all is done; but then rank 0 has its report to make, and another process found nobody
    let script = "test $RANK = 1 || exit 0; sleep 0.5; kill -9 $$";
    assert_eq!(launch(script, 1).unwrap(), ended(0, None, 0));
    // nobody waits for ever for one that does not leave, nor starts one again for it
    let began = Instant::now();
    let script = "test $RANK = 0 && sleep 0.5; test $RANK = 1 || exit 0; kill -STOP $$; sleep 1000";
    assert_eq!(launch(script, 1).unwrap(), ended(0, None, 0));
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    let script = "test $RANK = 0 || exit 0; sleep 0.5; kill -9 $$";
    let killed = "rank 0 was killed by signal 9 (SIGKILL)";
    assert_eq!(launch(script, 1).unwrap(), ended(1, Some(killed), 0));
    // nobody had
    let killed = launch("test $RANK = 2 || exec sleep 1000; kill -9 $$", 0).unwrap();
    assert_eq!(killed, ended(1, Some("rank 2 was killed by signal 9 (SIGKILL)"), 0));
    assert_eq!(launch("echo 'longshore: done' >&2", 0).unwrap(), ended(0, None, 0));
}
