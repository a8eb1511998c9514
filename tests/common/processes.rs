//! What the stories of ranks that are processes share: starting them, finding them, ending them, and that nothing is left.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, missing_debug_implementations, reason = "test code")]
#![allow(dead_code, unreachable_pub, reason = "each story uses its part of this file")]

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    os::unix::{fs::FileTypeExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{
        atomic::{AtomicU16, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use longshore_harness::scratch::Scratch;
use serde_json::Value;

/// Longer than anything here takes; a test that waits so long has failed.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// By which a story's processes are found.
const MARK: &str = "LONGSHORE_TEST_MARK";

/// A test's files and whatever processes it starts: those go when it ends, however it ends.
pub struct Story {
    scratch: Scratch,
    /// The shared memory that its processes were seen to map.
    segments: RefCell<BTreeSet<u64>>,
}

impl Story {
    pub fn new() -> Self {
        let story = Self { scratch: Scratch::new().unwrap(), segments: RefCell::default() };
        fs::create_dir(story.path("tmp")).unwrap();
        story
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// The program in an environment that holds nothing of the test's own.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longshore"));
        self.mark(&mut command);
        command.args(arguments);
        command
    }

    /// Makes whatever `command` starts one of this story's processes.
    pub fn mark(&self, command: &mut Command) {
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        command.env(MARK, self.scratch.path()).env("TMPDIR", self.path("tmp"));
        command.current_dir(self.scratch.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    /// Starts a command, as the first of a process group of its own.
    pub fn start(&self, mut command: Command) -> Running {
        Running::of(command.process_group(0).spawn().unwrap())
    }

    /// Runs a command to its end.
    pub fn run(&self, mut command: Command) -> Output {
        command.output().unwrap()
    }

    /// Processes of this story that have not ended. The dead have no environment.
    pub fn alive(&self) -> Vec<Process> {
        let mark = format!("{MARK}={}", self.scratch.path().display());
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(Process::look).filter(|p| p.environment.contains(&mark)).collect()
    }

    /// The process of `rank`, once it is there.
    pub fn rank(&self, rank: u32) -> Process {
        let mark = format!("RANK={rank}");
        let find = || self.alive().into_iter().find(|p| p.environment.contains(&mark));
        wait_for(&format!("a process of rank {rank}"), find)
    }

    /// The process of `rank`, if there is one now.
    pub fn rank_now(&self, rank: u32) -> Option<Process> {
        let mark = format!("RANK={rank}");
        self.alive().into_iter().find(|p| p.environment.contains(&mark))
    }

    /// The processes of all ranks, once every one of them reads or has read.
    pub fn loading(&self, world_size: u32) -> Vec<Process> {
        let ranks: Vec<Process> = (0..world_size).map(|rank| self.rank(rank)).collect();
        for (rank, process) in ranks.iter().enumerate() {
            let worker = format!("rank{rank}-worker");
            let works = || process.threads().iter().any(|name| name.starts_with(&worker));
            wait_until(&format!("rank {rank} reads"), works);
            self.segments.borrow_mut().extend(process.segments());
        }
        ranks
    }

    /// How many segments of shared memory have been seen.
    pub fn segments_seen(&self) -> usize {
        self.segments.borrow().len()
    }

    /// That nothing is left of a group: no process, no socket, no shared memory, nothing half written, no manifest.
    pub fn assert_nothing_is_left(&self) {
        wait_until("all processes are gone", || self.alive().is_empty());
        let found = all_files(self.scratch.path());
        let odd = found.iter().filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            let socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
            socket || name.ends_with(".tmp") || name == "manifest.json"
        });
        assert_eq!(odd.collect::<Vec<_>>(), Vec::<&PathBuf>::new());
        assert_eq!(all_files(&self.path("tmp")), Vec::<PathBuf>::new());
        let shared = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let shared = shared.map(|entry| entry.file_name().to_string_lossy().into_owned());
        assert_eq!(shared.filter(|name| name.contains("longshore")).count(), 0);
        let segments = self.segments.borrow();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        for process in pids.filter_map(Process::look) {
            let held: Vec<u64> = process.segments().intersection(&segments).copied().collect();
            assert_eq!(held, Vec::<u64>::new(), "process {} maps it still", process.pid);
        }
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        // they may start others while they are looked for
        while let Some(process) = self.alive().first() {
            signal(process.pid, "KILL");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Every file and directory below `dir`.
fn all_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(all_files(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}

/// A process as `/proc` shows it.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    environment: Vec<String>,
}

impl Process {
    fn look(pid: i32) -> Option<Self> {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let variables = environment.split(|byte| *byte == 0);
        let environment = variables.map(|v| String::from_utf8_lossy(v).into_owned()).collect();
        Some(Self { pid, environment })
    }

    /// The names of its threads.
    fn threads(&self) -> Vec<String> {
        let tasks =
            fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        names.map(|name| name.trim_end().to_owned()).collect()
    }

    /// The shared memory of ranks that it maps, by inode.
    fn segments(&self) -> BTreeSet<u64> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        let shared = maps.lines().filter(|line| line.contains("memfd:longshore"));
        shared.filter_map(|line| line.split_whitespace().nth(4)?.parse().ok()).collect()
    }

    pub fn has_thread(&self, name: &str) -> bool {
        self.threads().iter().any(|thread| thread == name)
    }

    pub fn is_alive(&self) -> bool {
        fs::read(format!("/proc/{}/environ", self.pid)).is_ok_and(|found| !found.is_empty())
    }
}

/// A process whose output is read as it comes.
pub struct Running {
    child: Child,
    lines: mpsc::Receiver<(Instant, String)>,
    seen: Vec<String>,
    stdout: JoinHandle<String>,
}

/// How one ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: Vec<String>,
}

impl Running {
    fn of(mut child: Child) -> Self {
        let (mut out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let stdout = thread::spawn(move || {
            let mut bytes = Vec::new();
            out.read_to_end(&mut bytes).unwrap();
            String::from_utf8(bytes).unwrap()
        });
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(err).split(b'\n').map_while(Result::ok) {
                let _ = sender.send((Instant::now(), String::from_utf8_lossy(&line).into_owned()));
            }
        });
        Self { child, lines, seen: Vec::new(), stdout }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for a line on stderr that has `wanted` in it; when it came, and the whole of it.
    pub fn wait_for_line(&mut self, wanted: &str) -> (Instant, String) {
        let started = Instant::now();
        loop {
            let left = DEADLINE.saturating_sub(started.elapsed());
            let (at, line) = match self.lines.recv_timeout(left) {
                Ok(found) => found,
                Err(e) => panic!("{wanted}: {e}; so far {:?}", self.seen),
            };
            self.seen.push(line.clone());
            if line.contains(wanted) {
                return (at, line);
            }
        }
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > DEADLINE {
                self.seen.extend(self.lines.try_iter().map(|(_, line)| line));
                panic!("it does not end; so far {:?}", self.seen);
            }
            thread::sleep(Duration::from_millis(2));
        };
        let stdout = self.stdout.join().unwrap();
        self.seen.extend(self.lines.iter().map(|(_, line)| line));
        Ended { status, stdout, stderr: self.seen }
    }
}

impl Ended {
    /// That it failed with `code` and exactly one line, which is returned.
    pub fn failed(&self, code: i32) -> &str {
        assert_eq!(self.status.code(), Some(code), "{:?}", self.stderr);
        assert_eq!(self.stderr.len(), 1, "{:?}", self.stderr);
        assert_eq!(self.stdout, "", "{:?}", self.stderr);
        assert!(self.stderr[0].starts_with("longshore: "), "{:?}", self.stderr);
        &self.stderr[0]
    }

    /// The JSON that it printed; nothing else was printed anywhere.
    pub fn json(&self) -> Value {
        assert_eq!(self.status.code(), Some(0), "{:?}", self.stderr);
        assert_eq!(self.stderr, Vec::<String>::new());
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// Where a group of processes meets, as a launcher or a shell loop tells them.
#[derive(Debug, Clone)]
pub struct Group {
    pub world_size: u32,
    /// Ranks of each host, where they are told.
    pub per_host: Option<u32>,
    pub master: String,
    pub port: u16,
    pub secret: Option<&'static str>,
    pub attempt: u32,
}

impl Group {
    /// All on this host, with a secret.
    pub fn new(world_size: u32) -> Self {
        Self {
            world_size,
            per_host: Some(world_size),
            master: "127.0.0.1".into(),
            port: free_ports(),
            secret: Some("a secret of this test"),
            attempt: 0,
        }
    }

    /// Tells `command` that it is `rank`.
    pub fn tell(&self, command: &mut Command, rank: u32) {
        let local_rank = rank % self.per_host.unwrap_or(self.world_size);
        for (name, number) in [
            ("RANK", rank),
            ("WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", local_rank),
            ("MASTER_PORT", self.port.into()),
            ("TORCHELASTIC_RESTART_COUNT", self.attempt),
        ] {
            command.env(name, number.to_string());
        }
        command.env("MASTER_ADDR", &self.master);
        if let Some(count) = self.per_host {
            command.env("LOCAL_WORLD_SIZE", count.to_string());
        }
        if let Some(secret) = self.secret {
            command.env("LONGSHORE_SECRET", secret);
        }
    }

    /// `longshore rank` as `rank`.
    pub fn command(&self, story: &Story, rank: u32, arguments: &[&str]) -> Command {
        let mut command = story.command(&[&["rank"], arguments].concat());
        self.tell(&mut command, rank);
        command
    }

    /// Starts `longshore rank` as every rank.
    pub fn start(&self, story: &Story, arguments: &[&str]) -> Vec<Running> {
        let start = |rank| story.start(self.command(story, rank, arguments));
        (0..self.world_size).map(start).collect()
    }
}

/// The first of four ports in a row on which nobody listens, below those that the system hands out by itself: ranks
/// without a secret must not meet another test's.
pub fn free_ports() -> u16 {
    const FIRST: u16 = 20_000;
    const BLOCKS: u16 = 3000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // other test programs run as well
    let start = (std::process::id().wrapping_mul(97) % u32::from(BLOCKS)) as u16;
    loop {
        let block = (start + NEXT.fetch_add(1, Ordering::Relaxed)) % BLOCKS;
        let first = FIRST + 4 * block;
        if (first..first + 4).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}

pub fn wait_until(what: &str, reached: impl Fn() -> bool) {
    wait_for(what, || reached().then_some(()));
}

/// Waits until there is what `find` looks for.
pub fn wait_for<T>(what: &str, find: impl Fn() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "{what}: not reached");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal; to a process that is gone it is not sent.
pub fn signal(pid: i32, name: &str) {
    let _ = Command::new("kill").args(["-s", name, "--", &pid.to_string()]).output().unwrap();
}
