//! A lost rank costs seconds: whenever and however a rank process goes, the load completes with the same bytes, and what the
//! others had is not read again.
//!
//! `LONGSHORE_KILLS=N` kills at N random moments of each kind rather than at a few; `LONGSHORE_SEED=S` chooses them.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    env,
    process::Command,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use longshore_harness::generator::{Checkpoint, Family, Scheme};
use longshore_rank::fault::Point;
use serde_json::Value;

#[path = "common/processes.rs"]
mod processes;
#[path = "recovery/shrink.rs"]
mod shrink;

use processes::{Running, Story, signal};

/// Small reads, so that every rank has several.
const QUIET: [&str; 5] = ["--read-size", "64KiB", "--json", "--log-level", "error"];

/// A story with a checkpoint, and what a load of it that nothing disturbs ends with.
struct Undisturbed {
    story: Story,
    tp: u32,
    report: Value,
}

impl Undisturbed {
    fn new(tp: u32, family: Family, scheme: Scheme) -> Self {
        Self::of(tp, Checkpoint::new(family, scheme))
    }

    fn of(tp: u32, checkpoint: Checkpoint) -> Self {
        let story = Story::new();
        checkpoint.files(3).write(&story.path("checkpoint")).unwrap();
        let tp_text = tp.to_string();
        let load = ["load", "checkpoint", "--tp", &tp_text];
        let report = story.start(story.command(&[&load[..], &QUIET].concat())).end().json();
        Self { story, tp, report }
    }

    /// `longshore load` with a process per rank.
    fn load(&self, fault: &str, extra: &[&str]) -> Running {
        self.story.start(self.command("checkpoint", fault, extra))
    }

    fn command(&self, source: &str, fault: &str, extra: &[&str]) -> Command {
        let tp = self.tp.to_string();
        let load = ["load", source, "--ranks", "processes", "--tp", &tp];
        let mut command = self.story.command(&[&load[..], &QUIET, extra].concat());
        command.env("LONGSHORE_FAULT", fault);
        command
    }

    /// That a load ended as if nothing had happened; returns its report.
    fn check(&self, load: Running, what: &str) -> Value {
        let ended = load.end();
        assert_eq!(ended.status.code(), Some(0), "{what}: {:?}", ended.stderr);
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(report["digest"], self.report["digest"], "{what}");
        for rank in report["ranks"].as_array().unwrap() {
            assert_eq!(rank["final_staging_bytes"], 0, "{what}");
        }
        self.story.assert_nothing_is_left();
        report
    }
}

/// At each boundary of a load, each rank: also rank 0, with which the coordinator goes.
#[test]
fn a_rank_that_is_killed_at_any_boundary_is_replaced() {
    for (tp, family, extra) in [
        (2, Family::DeepseekV3, &[][..]),
        (2, Family::Llama, &["--transport", "tcp"]),
        (2, Family::Llama, &["--exchange", "off"]),
        (4, Family::DeepseekV3, &["--io", "direct"]),
    ] {
        let undisturbed = Undisturbed::new(tp, family, Scheme::Bf16);
        for point in Point::ALL {
            for rank in 0..tp {
                let what = format!("tp {tp} {extra:?}: rank {rank} killed when {}", point.name());
                let fault = format!("rank={rank},at={},do=kill", point.name());
                let report = undisturbed.check(undisturbed.load(&fault, extra), &what);
                if rank > 0 {
                    assert_eq!(
                        (&report["restarts"], &report["generation"]),
                        (&1.into(), &2.into()),
                        "{what}"
                    );
                }
            }
        }
    }
}

/// Whenever it is: one rank or several, chosen at random, in loads that are slow enough to be met in the middle.
#[test]
fn ranks_that_are_killed_at_random_moments_are_replaced() {
    for (tp, family, extra) in [
        (2, Family::DeepseekV3, &[][..]),
        (4, Family::Llama, &["--transport", "tcp"]),
        (8, Family::Qwen3, &[]),
    ] {
        let undisturbed = Undisturbed::new(tp, family, Scheme::Bf16);
        undisturbed.kill_at_random(&|| undisturbed.command("checkpoint", SLOW, extra));
    }
}

impl Undisturbed {
    fn kill_at_random(&self, command: &dyn Fn() -> Command) {
        let kills: u32 = number("LONGSHORE_KILLS", 4);
        let seed: u64 = number("LONGSHORE_SEED", 1);
        let began = Instant::now();
        self.check(self.story.start(command()), "undisturbed");
        let usual = began.elapsed();
        for kill in 0..kills {
            let mut random = Random(seed << 32 | u64::from(kill));
            let losses = 1 + random.below(2);
            let load = self.story.start(command());
            for _ in 0..losses {
                thread::sleep(usual.mul_f64(random.below(1000) as f64 / 1000.0 / losses as f64));
                let rank = random.below(self.tp.into()) as u32;
                // it may be on its way, or over
                if let Some(process) = self.story.rank_now(rank) {
                    signal(process.pid, "KILL");
                }
            }
            let what = format!("tp {}, seed {seed}, kill {kill}: {losses} losses", self.tp);
            self.check(load, &what);
        }
    }
}

/// At once, so that one of them is left; also where that is not rank 0.
#[test]
fn all_ranks_but_one_may_be_lost() {
    let undisturbed = Undisturbed::new(4, Family::DeepseekV3, Scheme::Bf16);
    for left in [0, 3] {
        for point in [Point::Prepared, Point::Started, Point::Read] {
            let lost = (0..4).filter(|rank| *rank != left);
            let faults = lost.map(|rank| format!("rank={rank},at={},do=kill", point.name()));
            let faults: Vec<String> = faults.collect();
            let load = undisturbed.load(&faults.join(";"), &[]);
            undisturbed.check(load, &format!("rank {left} is left, when {}", point.name()));
        }
    }
}

/// What a rank is lost with is read once more, and nothing else: of row-parallel weights its columns alone, where the gaps between
/// them are longer than what a disk reads at a time. (Where they are not, whole rows are read.)
#[test]
fn a_lost_rank_costs_its_share_of_the_reads() {
    const IN_FLIGHT: u64 = 1 << 20;
    for tp in [2, 4] {
        let wide = Checkpoint::new(Family::Llama, Scheme::Bf16)
            .set("hidden_size", 512)
            .set("num_attention_heads", 64)
            .set("num_key_value_heads", 8)
            .set("head_dim", 128)
            .set("intermediate_size", 16384);
        let undisturbed = Undisturbed::of(tp, wide);
        let count = |of: &Value| of["storage_bytes_read"].as_u64().unwrap();
        let needed = undisturbed.report["needed_bytes"].as_u64().unwrap();
        assert_eq!(count(&undisturbed.report), needed);
        // with rank 0 goes the coordinator
        for (point, lost_rank) in
            [Point::Started, Point::Read, Point::Ready].into_iter().flat_map(|p| [(p, 1), (p, 0)])
        {
            let what = format!("tp {tp}, rank {lost_rank} killed when {}", point.name());
            let fault = format!("rank={lost_rank},at={},do=kill", point.name());
            let report = undisturbed.check(undisturbed.load(&fault, &[]), &what);
            // what the lost one can have read at most: the share of a load that nothing disturbs
            let lost = count(&undisturbed.report["ranks"][lost_rank]);
            let read = count(&report);
            let most = needed + needed / u64::from(tp) + IN_FLIGHT;
            assert!(read + lost <= most, "{what}: {read} + {lost} of {needed}");
            // the others had read their own by then
            let others = (0..tp as usize).filter(|rank| *rank != lost_rank);
            for rank in others.filter(|_| point != Point::Started) {
                let (own, usual) =
                    (count(&report["ranks"][rank]), count(&undisturbed.report["ranks"][rank]));
                assert!(own <= usual + IN_FLIGHT, "{what}: rank {rank} {own} of {usual}");
            }
        }
    }
}

/// A rank that was taken for dead and is not: it was killed before its place was given away, and where it could not be, it
/// changes nothing.
#[test]
fn a_rank_that_stops_is_replaced_and_does_no_harm_when_it_goes_on() {
    let undisturbed = Undisturbed::new(2, Family::DeepseekV3, Scheme::Bf16);
    for rank in [0, 1] {
        for point in [Point::Prepared, Point::Started, Point::Read] {
            let what = format!("rank {rank} stops when {}", point.name());
            let fault = format!("rank={rank},at={},do=stop", point.name());
            let load = undisturbed.load(&fault, &["--heartbeat-timeout", "3"]);
            let report = undisturbed.check(load, &what);
            assert!(report["generation"].as_u64().unwrap() > 1, "{what}");
        }
    }
}

/// Who stops when all ranks are complete has its work done, but not what all do together after it: it is killed, and all do it once
/// more.
#[test]
fn a_rank_that_stops_when_all_are_complete_is_not_waited_for() {
    let undisturbed = Undisturbed::new(2, Family::Llama, Scheme::Bf16);
    for rank in [0, 1] {
        for point in [Point::Ready, Point::Released] {
            let what = format!("rank {rank} stops when {}", point.name());
            let fault = format!("rank={rank},at={},do=stop", point.name());
            let began = Instant::now();
            let load = undisturbed.load(&fault, &["--heartbeat-timeout", "2"]);
            undisturbed.check(load, &what);
            assert!(began.elapsed() < Duration::from_secs(12), "{what}: {:?}", began.elapsed());
        }
    }
}

/// Storage that fails on one rank only, a rank that panics or ends by itself: another process fares better.
#[test]
fn a_rank_that_fails_by_itself_is_replaced() {
    let undisturbed = Undisturbed::new(2, Family::Llama, Scheme::Bf16);
    for (rank, what) in [(0, "error"), (1, "error"), (1, "panic"), (1, "exit"), (0, "exit")] {
        let fault = format!("rank={rank},read=1,do={what}");
        undisturbed.check(undisturbed.load(&fault, &[]), &fault);
    }
    let hangs = undisturbed.load("rank=1,read=1,do=hang", &["--progress-timeout", "1"]);
    undisturbed.check(hangs, "hang");
}

/// What fails in the same way each time ends the load, with the first cause and each later one.
#[test]
fn a_rank_that_fails_again_and_again_ends_the_load() {
    let undisturbed = Undisturbed::new(2, Family::Llama, Scheme::Bf16);
    let fault = "rank=1,read=1,do=error,again=1";
    let ended = undisturbed.load(fault, &["--max-restarts", "2"]).end();
    let line = ended.stderr.last().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{:?}", ended.stderr);
    assert_eq!(line.matches("a fault that was asked for").count(), 3, "{line}");
    assert_eq!(line.matches("; then ").count(), 2, "{line}");
    undisturbed.story.assert_nothing_is_left();
}

/// Each read takes a while, also in processes that were started again.
const SLOW: &str = "rank=all,read=0,do=slow,ms=40,again=1";

fn number<T: FromStr>(name: &str, usual: T) -> T {
    env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Numbers from a seed. Source: Vigna's splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// The same where every byte comes from object storage: with the coordinator's rank, and with another.
#[cfg(feature = "remote")]
#[test]
fn a_rank_that_is_killed_while_it_loads_from_s3_is_replaced() {
    use longshore_storage_server::{Dialect, Options, Server};

    let server = Server::start(Options::default());
    let stored = |tp: u32, family: Family| {
        let undisturbed = Undisturbed::new(tp, family, Scheme::Bf16);
        for entry in std::fs::read_dir(undisturbed.story.path("checkpoint")).unwrap() {
            let entry = entry.unwrap();
            let name = format!("some/model-{tp}/{}", entry.file_name().to_str().unwrap());
            server.put("bucket", &name, std::fs::read(entry.path()).unwrap());
        }
        undisturbed
    };
    let from_s3 = |of: &Undisturbed, fault: &str| {
        let mut command = of.command(&format!("s3://bucket/some/model-{}", of.tp), fault, &[]);
        command.envs(server.environment(Dialect::S3));
        command.env("LONGSHORE_CACHE_DIR", of.story.path("cache"));
        command
    };
    let undisturbed = stored(2, Family::DeepseekV3);
    for point in [Point::Prepared, Point::Started, Point::Read, Point::Ready] {
        for rank in [0, 1] {
            let what = format!("from S3, rank {rank} killed when {}", point.name());
            let fault = format!("rank={rank},at={},do=kill", point.name());
            let load = undisturbed.story.start(from_s3(&undisturbed, &fault));
            undisturbed.check(load, &what);
        }
    }
    undisturbed.kill_at_random(&|| from_s3(&undisturbed, SLOW));
    for (tp, family) in [(4, Family::DeepseekV3), (8, Family::Qwen3)] {
        let more = stored(tp, family);
        more.kill_at_random(&|| from_s3(&more, SLOW));
    }
}
