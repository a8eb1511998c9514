//! The example server under the launcher and without one: every group size computes the same, and when one rank ends all do.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use longshore_harness::scratch::Scratch;
use serde_json::{Value, json};

/// Longer than anything here takes; a test that waits so long has failed.
const DEADLINE: Duration = Duration::from_secs(60);

/// By which a test's processes are found.
const MARK: &str = "LONGSHORE_TEST_MARK";

const MODEL: &str = "synth:llama-bf16";

/// An example's program: `cargo test` builds them beside the command line.
fn example(name: &str) -> PathBuf {
    let longshore = Path::new(env!("CARGO_BIN_EXE_longshore"));
    let path = longshore.parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not there: cargo build --example {name}", path.display());
    path
}

/// One group of servers, its files, and its processes.
struct Story {
    scratch: Scratch,
}

impl Story {
    fn new() -> Self {
        Self { scratch: Scratch::new().unwrap() }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env(MARK, self.scratch.path()).env("XDG_CACHE_HOME", self.scratch.join("cache"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn launch(&self, ranks: u32, arguments: &[&str]) -> Command {
        let mut command = self.command(Path::new(env!("CARGO_BIN_EXE_longshore")));
        command.args(["launch", "--nproc", &ranks.to_string(), "--"]);
        command.arg(example("tp_server")).args(arguments);
        command
    }

    /// All ranks, told their places as torchrun tells them, with nobody to watch over them.
    fn start_alone(&self, ranks: u32) -> Vec<Child> {
        // free at the time of asking; those after it are tried as well
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = |rank: u32| {
            let mut command = self.command(&example("tp_server"));
            for (name, number) in [("RANK", rank), ("LOCAL_RANK", rank)] {
                command.env(name, number.to_string());
            }
            for name in ["WORLD_SIZE", "LOCAL_WORLD_SIZE"] {
                command.env(name, ranks.to_string());
            }
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command.env("LONGSHORE_SECRET", "only for this test");
            command.arg(MODEL).spawn().unwrap()
        };
        (0..ranks).map(start).collect()
    }

    /// Processes of this story that have not ended: their numbers, and their ranks where they are told one.
    fn alive(&self) -> Vec<(i32, Option<u32>)> {
        let mark = format!("{MARK}={}", self.scratch.path().display());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let found = processes.filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let environment = fs::read_to_string(entry.path().join("environ")).ok()?;
            let mut variables = environment.split('\0');
            variables.clone().find(|v| *v == mark)?;
            let rank = variables.find_map(|v| v.strip_prefix("RANK=")?.parse().ok());
            Some((pid, rank))
        });
        found.collect()
    }

    fn pid_of(&self, rank: u32) -> i32 {
        let alive = self.alive();
        let found = alive.iter().find(|(_, r)| *r == Some(rank));
        found.unwrap_or_else(|| panic!("rank {rank} among {alive:?}")).0
    }

    fn wait_until_nobody_is_left(&self) {
        let started = Instant::now();
        while !self.alive().is_empty() {
            assert!(started.elapsed() < DEADLINE, "{:?} are left", self.alive());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Story {
    /// Nothing of a test that failed goes on.
    fn drop(&mut self) {
        for (pid, _) in self.alive() {
            // SAFETY: sends a signal to a process that this test has started
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

/// Where rank 0 takes requests: it says so on its stdout, which is read on.
fn address(process: &mut Child) -> String {
    let stdout = BufReader::new(process.stdout.take().unwrap());
    let (found, address) = mpsc::channel();
    thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if let Some(address) = line.strip_prefix("listening on ") {
                let _ = found.send(address.to_owned());
            }
        }
    });
    address.recv_timeout(DEADLINE).unwrap_or_else(|_| {
        let _ = process.kill();
        panic!("rank 0 does not listen: {}", said(process));
    })
}

fn said(process: &mut Child) -> String {
    let mut text = String::new();
    process.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

fn wait(process: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > DEADLINE {
            process.kill().unwrap();
            panic!("it does not end: {}", said(process));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: sends a signal to a process that this test has started
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "{pid}");
}

/// A client's connection.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn ask(&mut self, line: &str) -> Value {
        self.say(line);
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{line}: {answer:?}: {e}"))
    }

    fn error(&mut self, line: &str) -> String {
        let answer = self.ask(line);
        answer["error"].as_str().unwrap_or_else(|| panic!("{line}: {answer}")).to_owned()
    }
}

fn final_line(run: &Output) -> String {
    let text = String::from_utf8_lossy(&run.stderr).into_owned();
    text.lines().rfind(|line| line.starts_with("tp_server: ")).unwrap_or(&text).to_owned()
}

/// What rank 0 is asked to continue, and by how much.
const PROMPTS: [(&[u32], usize); 3] = [(&[1, 2, 3], 8), (&[500], 3), (&[7, 7, 7, 7, 41, 300], 1)];

#[test]
fn every_group_size_continues_alike() {
    let continued: Vec<Vec<Value>> = [1, 2, 4]
        .map(|ranks| {
            let story = Story::new();
            let mut server = story.launch(ranks, &[MODEL]).spawn().unwrap();
            let mut client = Client::connect(&address(&mut server));
            let answers = PROMPTS.map(|(tokens, steps)| {
                let answer = client.ask(&json!({ "tokens": tokens, "steps": steps }).to_string());
                assert_eq!(answer["tokens"].as_array().unwrap().len(), steps, "{answer}");
                answer
            });
            client.say(r#"{"quit": true}"#);
            assert_eq!(wait(&mut server).code(), Some(0), "{}", said(&mut server));
            assert_eq!(said(&mut server), "");
            story.wait_until_nobody_is_left();
            answers.to_vec()
        })
        .to_vec();
    for together in &continued[1..] {
        for (together, alone) in together.iter().zip(&continued[0]) {
            assert_eq!(together["tokens"], alone["tokens"]);
            let [a, b] = [together, alone].map(|answer| answer["logits_max"].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-3 * b.abs(), "{a} and {b}");
        }
    }
}

#[test]
fn the_check_passes_on_every_group_size() {
    for ranks in [1, 2, 4] {
        let story = Story::new();
        let run = story.launch(ranks, &[MODEL, "--check"]).output().unwrap();
        let out = String::from_utf8_lossy(&run.stdout);
        assert_eq!(run.status.code(), Some(0), "{out}{}", String::from_utf8_lossy(&run.stderr));
        assert!(out.starts_with(&format!("llama bf16 on {ranks} ranks: ")), "{out}");
        assert!(out.lines().last().unwrap().starts_with("largest difference "), "{out}");
        story.wait_until_nobody_is_left();
    }
}

/// What cannot be served is said, and the next request is.
#[test]
fn requests_that_cannot_be_served_are_answered() {
    let story = Story::new();
    let mut server = story.launch(2, &[MODEL]).spawn().unwrap();
    let address = address(&mut server);
    let mut client = Client::connect(&address);
    assert!(client.error("hello").contains("line 1"));
    assert!(client.error(r#"{"tokens": [1], "step": 1}"#).contains("step"));
    assert!(client.error(r#"{"tokens": [1]}"#).contains("at least one step"));
    assert!(client.error(r#"{"tokens": [1], "steps": 1024}"#).contains("1024"));
    assert_eq!(client.error(r#"{"tokens": [], "steps": 1}"#), "no token, the vocabulary has 512");
    assert_eq!(
        client.error(r#"{"tokens": [1, 512], "steps": 1}"#),
        "token 512, the vocabulary has 512"
    );
    // a client that leaves in between harms nobody
    Client::connect(&address).say(r#"{"tokens": [1], "steps": 4}"#);
    let answer = Client::connect(&address).ask(r#"{"tokens": [1], "steps": 1}"#);
    assert!(answer["tokens"].is_array(), "{answer}");
    client.say(r#"{"quit": true}"#);
    assert_eq!(wait(&mut server).code(), Some(0));
    story.wait_until_nobody_is_left();
}

#[test]
fn a_model_that_is_not_computed_is_refused_in_one_line() {
    let story = Story::new();
    let run = story.launch(2, &["synth:qwen3-bf16"]).output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    let line = "tp_server: config.json: model_type is \"qwen3\", llama is computed here";
    assert_eq!(final_line(&run), line);
    let text = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(text.matches("tp_server: ").count(), 1, "{text}");
    story.wait_until_nobody_is_left();
}

#[test]
fn a_launcher_that_is_told_to_end_leaves_nobody() {
    let story = Story::new();
    let mut server = story.launch(4, &[MODEL]).spawn().unwrap();
    address(&mut server);
    kill(server.id() as i32, libc::SIGTERM);
    assert_eq!(wait(&mut server).code(), Some(128 + libc::SIGTERM), "{}", said(&mut server));
    story.wait_until_nobody_is_left();
}

#[test]
fn a_killed_rank_ends_the_group() {
    for rank in [0, 3] {
        let story = Story::new();
        let mut server = story.launch(4, &[MODEL]).spawn().unwrap();
        address(&mut server);
        kill(story.pid_of(rank), libc::SIGKILL);
        assert_ne!(wait(&mut server).code(), Some(0));
        // whoever is faster: the launcher, or the ranks, whose connections close before their end can be waited for
        let text = said(&mut server);
        let ends = [" was killed by signal 9", ": it is gone"];
        assert!(ends.iter().any(|end| text.contains(&format!("rank {rank}{end}"))), "{text}");
        story.wait_until_nobody_is_left();
    }
}

/// Here it is the ranks that notice, although there is no request.
#[test]
fn ranks_without_a_launcher_notice_that_one_is_lost() {
    for (killed, signal) in [(2, libc::SIGKILL), (1, libc::SIGTERM), (0, libc::SIGTERM)] {
        let story = Story::new();
        let mut ranks = story.start_alone(4);
        let mut client = Client::connect(&address(&mut ranks[0]));
        assert!(client.ask(r#"{"tokens": [5], "steps": 2}"#)["tokens"].is_array());
        kill(ranks[killed].id() as i32, signal);
        wait(&mut ranks[killed]);
        for (number, rank) in ranks.iter_mut().enumerate().filter(|(number, _)| *number != killed) {
            let status = wait(rank);
            let line = said(rank);
            assert_eq!(status.code(), Some(1), "rank {number}: {line}");
            // rank 0 loses the one that was killed, the others lose rank 0
            let gone = if number == 0 { killed } else { 0 };
            assert!(line.starts_with("tp_server: "), "rank {number}: {line}");
            assert!(line.ends_with(&format!("rank {gone}: it is gone\n")), "{number}: {line}");
        }
        story.wait_until_nobody_is_left();
    }
}

#[test]
fn the_streaming_example_places_every_tensor() {
    let story = Story::new();
    let run = story.command(&example("stream")).arg(MODEL).output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(text, "30 tensors, 1148672 bytes\n");
}
