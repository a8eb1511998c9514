//! Ranks that are processes hold what ranks that are threads hold, and cost the same, however they are started and
//! however bytes pass between them.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::process::Output;

use longshore_harness::{
    cases::{self, Case},
    compare,
};
use serde_json::Value;

#[path = "common/checkpoints.rs"]
mod checkpoints;
#[path = "common/processes.rs"]
mod processes;

use checkpoints::checkpoints;
use processes::{Group, Story};

const QUIET: [&str; 3] = ["--json", "--log-level", "error"];

/// One case's checkpoint on disk, to be loaded in many ways.
struct Told {
    story: Story,
    case: Case,
    checkpoint: String,
    arguments: Vec<String>,
}

impl Told {
    fn new(case: Case) -> Self {
        let story = Story::new();
        let checkpoint = story.path("checkpoint");
        case.checkpoint.write(&checkpoint).unwrap();
        let checkpoint = checkpoint.to_str().unwrap().to_owned();
        let arguments = case.options.arguments();
        Self { story, case, checkpoint, arguments }
    }

    fn tp(&self) -> u32 {
        self.case.options.tp as u32
    }

    /// The arguments of `load` and `rank` behind the command's name.
    fn arguments<'a>(&'a self, extra: &[&'a str]) -> Vec<&'a str> {
        let own = self.arguments.iter().map(String::as_str);
        let mut all = vec![self.checkpoint.as_str(), "--out", "out"];
        all.extend(own.chain(extra.iter().copied()).chain(QUIET));
        all
    }

    fn load(&self, extra: &[&str]) -> Value {
        let arguments = [&["load", "--ranks", "processes"][..], &self.arguments(extra)].concat();
        self.finished(extra, &self.story.run(self.story.command(&arguments)))
    }

    fn launch(&self, extra: &[&str]) -> Value {
        let nproc = self.tp().to_string();
        let program = env!("CARGO_BIN_EXE_longshore");
        let launch = ["launch", "--nproc", &nproc, "--", program, "rank"];
        let arguments = [&launch[..], &self.arguments(extra)].concat();
        self.finished(&["launch"], &self.story.run(self.story.command(&arguments)))
    }

    /// As a shell loop starts them.
    fn by_hand(&self, group: &Group, extra: &[&str]) -> Value {
        let ranks = group.start(&self.story, &self.arguments(extra));
        let mut ended: Vec<_> = ranks.into_iter().map(|rank| rank.end()).collect();
        for (rank, other) in ended.iter().enumerate().skip(1) {
            assert_eq!(other.status.code(), Some(0), "rank {rank}: {:?}", other.stderr);
            assert_eq!((&other.stdout[..], &other.stderr[..]), ("", &[][..]), "rank {rank}");
        }
        let report = ended.swap_remove(0).json();
        self.compare(&format!("{group:?} {extra:?}"), report)
    }

    fn finished(&self, how: &[&str], run: &Output) -> Value {
        let complaint = String::from_utf8_lossy(&run.stderr);
        let what = format!("{} {how:?}", self.case.name);
        assert_eq!((run.status.code(), &complaint[..]), (Some(0), ""), "{what}");
        let report: Value =
            serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("{what}: {e}"));
        self.compare(&what, report)
    }

    /// That every rank's file is byte for byte what it should be, and nothing lies beside them.
    fn compare(&self, how: &str, report: Value) -> Value {
        let name = &self.case.name;
        let out = self.story.path("out");
        compare::with_case(&out, &self.case).unwrap_or_else(|e| panic!("{name} {how}: {e}"));
        let mut files: Vec<_> = std::fs::read_dir(&out).unwrap().flatten().collect();
        assert_eq!(files.len(), self.case.options.tp + 1, "{name} {how}: {files:?}");
        files.clear();
        std::fs::remove_dir_all(&out).unwrap();
        assert_eq!(report["ranks_as"], "processes", "{name} {how}");
        report
    }
}

fn every_case(load: impl Fn(&Told)) {
    let all = cases::cases();
    assert_eq!(all.len(), 20);
    for case in all {
        load(&Told::new(case));
    }
}

/// The launched group, however its bytes pass; `--out` replaces what an earlier load has left.
#[test]
fn every_public_case_is_byte_exact_whatever_the_transport_and_the_reads() {
    every_case(|told| {
        let mut digests = Vec::new();
        for transport in ["auto", "tcp"] {
            for io in ["buffered", "direct"] {
                for exchange in ["on", "off"] {
                    let how = ["--transport", transport, "--io", io, "--exchange", exchange];
                    digests.push(told.load(&how)["digest"].clone());
                }
            }
        }
        assert!(digests.iter().all(|d| d == &digests[0] && d.is_string()), "{digests:?}");
    });
}

/// `longshore launch`, and a shell loop that sets what torchrun sets.
#[test]
fn every_public_case_is_byte_exact_whoever_starts_the_ranks() {
    every_case(|told| {
        let launched = told.launch(&[]);
        let by_hand = told.by_hand(&Group::new(told.tp()), &[]);
        assert_eq!(launched["digest"], by_hand["digest"], "{}", told.case.name);
    });
}

/// Without a secret the loopback address and the user decide; how many ranks share the host may be told or not.
#[test]
fn a_group_on_one_host_needs_no_secret() {
    for name in ["llama-odd-tp4", "dsv3-fp8-tiny-fuse-tp2"] {
        let told = Told::new(cases::case_named(name));
        for per_host in [Some(told.tp()), None] {
            for secret in [None, Some("a secret")] {
                let group = Group { per_host, secret, ..Group::new(told.tp()) };
                told.by_hand(&group, &[]);
            }
        }
    }
}

/// The least memory that a rank can work with is told to whoever gives it less, and with it every case is byte exact.
#[test]
fn every_public_case_is_byte_exact_in_the_least_memory() {
    every_case(|told| {
        for transport in ["auto", "tcp"] {
            let load = |limit: u64, extra: &[&str]| {
                let limit = limit.to_string();
                let how = ["--transport", transport, "--memory-limit", &limit, "--json"];
                let load = ["load", &told.checkpoint, "--ranks", "processes", "--no-digest"];
                let own: Vec<&str> = told.arguments.iter().map(String::as_str).collect();
                let arguments = [&load[..], &own, &how, extra].concat();
                told.story.start(told.story.command(&arguments)).end()
            };
            let least = {
                let refused = load(128 << 10, &["--log-level", "error"]);
                let line = refused.failed(2);
                let (_, figure) = line.split_once("need ").unwrap_or_else(|| panic!("{line}"));
                figure.split(' ').next().unwrap().parse::<u64>().unwrap()
            };
            let figure = least.to_string();
            let refused = load(least - 1, &["--log-level", "error"]);
            assert!(refused.failed(2).contains(&format!("need {figure} ")), "{refused:?}");
            for io in ["buffered", "direct"] {
                let how = ["--transport", transport, "--memory-limit", &figure, "--io", io];
                assert_staging(&told.load(&how), least);
            }
        }
    });
}

fn assert_staging(report: &Value, limit: u64) {
    for rank in report["ranks"].as_array().unwrap() {
        assert!(rank["peak_staging_bytes"].as_u64().unwrap() <= limit, "{rank}");
        assert_eq!(rank["final_staging_bytes"], 0, "{rank}");
    }
}

/// What a load costs does not depend on what its ranks are: each byte is read once and passed on as often as it must be.
#[test]
fn processes_read_and_exchange_what_threads_do() {
    const LIMIT: u64 = 1 << 20;
    for checkpoint in checkpoints() {
        let story = Story::new();
        let dir = story.path("checkpoint");
        checkpoint.write(&dir).unwrap();
        for tp in ["2", "4"] {
            // small reads, so that there are many rounds
            let load = |extra: &[&str]| {
                let limit = LIMIT.to_string();
                let how = ["--tp", tp, "--memory-limit", &limit, "--read-size", "64KiB"];
                let load = ["load", dir.to_str().unwrap()];
                let arguments = [&load[..], &how, extra, &QUIET].concat();
                story.start(story.command(&arguments)).end().json()
            };
            let threads = load(&["--ranks", "threads"]);
            assert_eq!(threads["ranks_as"], "threads");
            for transport in ["auto", "tcp"] {
                let what = format!("{checkpoint:?} tp {tp} {transport}");
                let processes = load(&["--ranks", "processes", "--transport", transport]);
                assert_eq!(processes["ranks_as"], "processes", "{what}");
                assert_eq!(processes["storage_bytes_read"], processes["needed_bytes"], "{what}");
                assert_staging(&processes, LIMIT);
                for key in ["digest", "needed_bytes", "exchanged_bytes", "rounds", "generation"] {
                    assert!(!processes[key].is_null(), "{what}: {key}");
                    assert_eq!(processes[key], threads[key], "{what}: {key}");
                }
                let ranks = |report: &Value| report["ranks"].as_array().unwrap().clone();
                let (threads, processes) = (ranks(&threads), ranks(&processes));
                assert_eq!(processes.len(), threads.len(), "{what}");
                for (process, thread) in processes.iter().zip(&threads) {
                    for key in ["rank", "parameter_bytes", "storage_bytes_read", "received_bytes"] {
                        assert_eq!(process[key], thread[key], "{what}: {key}");
                    }
                    assert_eq!(process["sent_bytes"], thread["sent_bytes"], "{what}");
                    let peak = process["peak_rss_bytes"].as_u64().unwrap();
                    assert!(peak > process["parameter_bytes"].as_u64().unwrap(), "{what}");
                }
            }
        }
    }
}
