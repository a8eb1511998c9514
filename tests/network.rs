//! Ranks on two hosts, each a network namespace with an address of its own and a cable between them: shared memory within
//! a host, TCP from one to the other. Skipped where namespaces cannot be made.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    io::Write,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use longshore_harness::{
    cases, compare,
    generator::{Checkpoint, Family, Scheme},
};
use serde_json::Value;

#[path = "common/processes.rs"]
mod processes;

use processes::{Ended, Group, Process, Running, Story, signal};

const SECOND: Duration = Duration::from_secs(1);

/// The port of rank 0; each network has all ports to itself.
const PORT: u16 = 29_500;

/// Two hosts and the cable between them, gone when dropped.
struct Network {
    names: [String; 2],
}

impl Network {
    /// `None` where this process may not make one; then that is said.
    fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let network = Self { names: ["a", "b"].map(|host| format!("longshore-{id}{host}")) };
        match network.lay() {
            Ok(()) => Some(network),
            Err(why) => {
                // a test that passes does not show what it prints; this way it does
                let said = format!("skipped: network namespaces cannot be made here: {why}\n");
                std::io::stderr().write_all(said.as_bytes()).unwrap();
                None
            }
        }
    }

    fn lay(&self) -> Result<(), String> {
        let [a, b] = &self.names;
        for name in [a, b] {
            ip(&["netns", "add", name])?;
        }
        // made within the namespaces, so that no name is taken outside
        ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", b])?;
        for (host, name) in self.names.iter().enumerate() {
            ip(&["-n", name, "address", "add", &format!("{}/24", address(host)), "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
        }
        Ok(())
    }

    /// `longshore` with `arguments` on one of the hosts; it becomes the process that is started.
    fn command(&self, story: &Story, host: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        story.mark(&mut command);
        let program = env!("CARGO_BIN_EXE_longshore");
        command.args(["netns", "exec", &self.names[host], program]).args(arguments);
        command
    }

    /// `longshore rank` as every rank, the first half of them on the first host.
    fn start(
        &self,
        story: &Story,
        world_size: u32,
        fault: Option<&str>,
        arguments: &[&str],
    ) -> Vec<Running> {
        let per_host = world_size / 2;
        let (master, port) = (address(0), PORT);
        let group = Group { per_host: Some(per_host), master, port, ..Group::new(world_size) };
        let start = |rank| {
            let arguments = [&["rank"], arguments].concat();
            let mut command = self.command(story, (rank / per_host) as usize, &arguments);
            group.tell(&mut command, rank);
            command.envs(fault.map(|fault| ("LONGSHORE_FAULT", fault)));
            story.start(command)
        };
        (0..world_size).map(start).collect()
    }

    fn cut(&self) {
        ip(&["-n", &self.names[0], "link", "set", "cable", "down"]).unwrap();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // one that was never made cannot be removed
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let run = Command::new("ip").args(arguments).output().map_err(|e| format!("ip: {e}"))?;
    match run.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&run.stderr).trim().to_owned()),
    }
}

/// The report of rank 0, when all ranks have ended as they should.
fn report(ranks: Vec<Running>) -> Value {
    let mut ended: Vec<Ended> = ranks.into_iter().map(Running::end).collect();
    for other in &ended[1..] {
        assert_eq!(other.status.code(), Some(0), "{:?}", other.stderr);
        assert_eq!((&other.stdout[..], &other.stderr[..]), ("", &[][..]));
    }
    ended.swap_remove(0).json()
}

fn digest_of_threads(story: &Story, arguments: &[&str]) -> Value {
    let load = ["load", "checkpoint", "--json", "--log-level", "error"];
    let digest =
        story.start(story.command(&[&load, arguments].concat())).end().json()["digest"].clone();
    assert!(digest.is_string());
    digest
}

/// Every rank writes to one directory, as on storage that the hosts share.
#[test]
fn every_public_case_is_byte_exact_on_two_hosts() {
    let Some(network) = Network::new() else { return };
    for case in cases::cases() {
        let story = Story::new();
        case.checkpoint.write(&story.path("checkpoint")).unwrap();
        let options = case.options.arguments();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let digest = digest_of_threads(&story, &options);
        // as it comes, and with many small reads in little memory
        for extra in [&[][..], &["--memory-limit", "400KiB", "--io", "direct", "--exchange", "on"]]
        {
            let own = ["checkpoint", "--out", "out", "--json", "--log-level", "error"];
            let arguments = [&own[..], &options, extra].concat();
            let ranks = network.start(&story, case.options.tp as u32, None, &arguments);
            let report = report(ranks);
            let what = format!("{} {extra:?}", case.name);
            let compared = compare::with_case(&story.path("out"), &case);
            compared.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(report["digest"], digest, "{what}");
            assert_eq!(report["storage_bytes_read"], report["needed_bytes"], "{what}");
            for rank in report["ranks"].as_array().unwrap() {
                assert_eq!(rank["final_staging_bytes"], 0, "{what}: {rank}");
            }
            std::fs::remove_dir_all(story.path("out")).unwrap();
        }
        story.assert_nothing_is_left();
    }
}

/// A launcher on each host, which know nothing of each other.
#[test]
fn launchers_of_two_hosts_make_one_group() {
    let Some(network) = Network::new() else { return };
    let story = Story::new();
    Checkpoint::new(Family::DeepseekV3, Scheme::Bf16).write(&story.path("checkpoint")).unwrap();
    let program = env!("CARGO_BIN_EXE_longshore");
    let start = |host: usize| {
        let (node_rank, master) = (host.to_string(), address(0));
        let launch = ["launch", "--nnodes", "2", "--nproc", "2", "--node-rank", &node_rank];
        let rank = ["rank", "checkpoint", "--json", "--log-level", "error"];
        let arguments = [&launch[..], &["--master-addr", &master, "--", program], &rank].concat();
        let mut command = network.command(&story, host, &arguments);
        command.env("LONGSHORE_SECRET", "a secret of both");
        story.start(command)
    };
    // whichever comes first waits for the other
    let second = start(1);
    let report = report(vec![start(0), second]);
    assert_eq!(report["ranks"].as_array().unwrap().len(), 4);
    assert_eq!(report["digest"], digest_of_threads(&story, &["--tp", "4"]));
}

/// Four ranks on two hosts that do not get on: rank 1 hangs, and all are at work.
fn hanging(network: &Network) -> (Story, Vec<Running>, Vec<Process>) {
    let story = Story::new();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Bf16);
    checkpoint.write(&story.path("checkpoint")).unwrap();
    let quiet = ["--json", "--log-level", "error", "--heartbeat-timeout", "2", "--on-loss", "fail"];
    let arguments = [&["checkpoint", "--out", "out", "--read-size", "64KiB"], &quiet[..]].concat();
    let running = network.start(&story, 4, Some("rank=1,read=1,do=hang"), &arguments);
    let processes = story.loading(4);
    (story, running, processes)
}

#[test]
fn a_rank_killed_on_the_other_host_is_named_within_a_second() {
    let Some(network) = Network::new() else { return };
    for killed in [2, 3] {
        let (story, mut running, processes) = hanging(&network);
        assert_eq!(story.segments_seen(), 4);
        let sent = Instant::now();
        signal(processes[killed].pid, "KILL");
        let (at, _) = running[0].wait_for_line("longshore: ");
        assert!(at - sent < SECOND, "{:?}", at - sent);
        for (rank, running) in running.into_iter().enumerate() {
            let ended = running.end();
            let text = format!("rank {rank}: {:?}", ended.stderr);
            match rank {
                0 => {
                    let line = ended.failed(1);
                    let wanted = format!("longshore: rank {killed} was lost: ");
                    assert!(line.starts_with(&wanted), "{text}");
                }
                rank if rank == killed => assert_eq!(ended.status.code(), None, "{text}"),
                // rank 0 has told them
                _ => assert_eq!((ended.status.code(), ended.stderr), (Some(1), vec![]), "{text}"),
            }
        }
        story.assert_nothing_is_left();
    }
}

/// No packet comes any more, and no word that none will.
#[test]
fn a_cut_cable_is_noticed_on_both_ends() {
    let Some(network) = Network::new() else { return };
    let (story, mut running, _) = hanging(&network);
    let cut = Instant::now();
    network.cut();
    let limit = 2 * SECOND;
    for rank in [0, 2, 3] {
        let (at, line) = running[rank].wait_for_line("longshore: ");
        assert!(at - cut < limit + SECOND, "rank {rank}: {:?}", at - cut);
        assert!(at - cut > limit - SECOND, "rank {rank}: {:?}", at - cut);
        let lost = match rank {
            0 => ["longshore: rank 2 was lost: ", "longshore: rank 3 was lost: "],
            _ => ["longshore: the coordinator (rank 0) was lost: "; 2],
        };
        assert!(lost.iter().any(|start| line.starts_with(start)), "{line}");
        assert!(line.contains("nothing was heard for 2s"), "{line}");
    }
    for running in running {
        let ended = running.end();
        assert_eq!((ended.status.code(), &ended.stdout[..]), (Some(1), ""), "{:?}", ended.stderr);
    }
    story.assert_nothing_is_left();
}
