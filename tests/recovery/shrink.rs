//! `--on-loss shrink`: the load goes on with the ranks that are left, and ends as one of so few ranks would.

use std::{collections::BTreeSet, fs, process::Command, thread, time::Duration};

use longshore_harness::generator::{Checkpoint, Family, Scheme};
use longshore_rank::fault::Point;
use serde_json::Value;

use super::{
    QUIET, Random, number,
    processes::{Ended, Group, Running, Story, signal},
};

/// A story with a checkpoint, and what loads of it by fewer ranks end with.
struct Smaller {
    story: Story,
    tp: u32,
    ep: u32,
}

impl Smaller {
    fn new(tp: u32, ep: u32, family: Family, scheme: Scheme) -> Self {
        let story = Story::new();
        Checkpoint::new(family, scheme).files(3).write(&story.path("checkpoint")).unwrap();
        Self { story, tp, ep }
    }

    /// What a load onto `tp` ranks ends with that nothing disturbs.
    fn undisturbed(&self, tp: u32, ep: u32) -> Value {
        let (tp, ep) = (tp.to_string(), ep.to_string());
        let load = ["load", "checkpoint", "--tp", &tp, "--ep", &ep];
        self.story.start(self.story.command(&[&load[..], &QUIET].concat())).end().json()
    }

    fn load(&self, fault: &str, extra: &[&str]) -> Running {
        self.story.start(self.command(fault, extra))
    }

    fn command(&self, fault: &str, extra: &[&str]) -> Command {
        let (tp, ep) = (self.tp.to_string(), self.ep.to_string());
        let load = ["load", "checkpoint", "--ranks", "processes", "--tp", &tp, "--ep", &ep];
        let shrink = ["--on-loss", "shrink"];
        let mut command = self.story.command(&[&load[..], &shrink, &QUIET, extra].concat());
        command.env("LONGSHORE_FAULT", fault);
        command
    }

    /// That a load ended as `want` with `losses`; returns its report.
    fn check(&self, load: Running, want: &Value, losses: u64, what: &str) -> Value {
        let ended = load.end();
        assert_eq!(ended.status.code(), Some(0), "{what}: {:?}", ended.stderr);
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        for key in ["digest", "tp", "ep", "needed_bytes"] {
            assert_eq!(report[key], want[key], "{what}: {key}");
        }
        assert_eq!(report["restarts"], losses, "{what}");
        let ranks = report["ranks"].as_array().unwrap();
        assert_eq!(ranks.len() as u64, want["tp"].as_u64().unwrap(), "{what}");
        for rank in ranks {
            assert_eq!(rank["final_staging_bytes"], 0, "{what}");
        }
        self.story.assert_nothing_is_left();
        report
    }
}

/// At each boundary of a load, each rank but the coordinator's.
#[test]
fn a_load_goes_on_without_a_rank_that_is_killed_at_any_boundary() {
    for (tp, ep, family, scheme, left, extra) in [
        (2, 1, Family::DeepseekV3, Scheme::Fp8, (1, 1), &[][..]),
        (4, 1, Family::Llama, Scheme::Bf16, (2, 1), &["--transport", "tcp"]),
        (4, 4, Family::DeepseekV3, Scheme::Bf16, (2, 2), &["--io", "direct"]),
        (2, 2, Family::DeepseekV3, Scheme::Nvfp4, (1, 1), &[]),
        (4, 1, Family::Llama, Scheme::Bf16, (2, 1), &["--exchange", "off"]),
    ] {
        let smaller = Smaller::new(tp, ep, family, scheme);
        let want = smaller.undisturbed(left.0, left.1);
        for point in Point::ALL {
            for rank in BTreeSet::from([1, tp - 1]) {
                let what = format!("tp {tp} {extra:?}: rank {rank} killed when {}", point.name());
                let fault = format!("rank={rank},generation=1,at={},do=kill", point.name());
                let load = smaller.load(&fault, extra);
                smaller.check(load, &want, 1, &what);
            }
        }
    }
}

/// What somebody has as it is in the file is not read again: of llama all but row-parallel weights, and what only the lost rank
/// had.
#[test]
fn what_is_left_somewhere_is_not_read_again() {
    let smaller = Smaller::new(4, 1, Family::Llama, Scheme::Bf16);
    let want = smaller.undisturbed(2, 1);
    let fault = "rank=3,generation=1,at=ready,do=kill";
    let report = smaller.check(smaller.load(fault, &[]), &want, 1, "at the end");
    let count = |of: &Value, key: &str| of[key].as_u64().unwrap();
    let needed = count(&report, "needed_bytes");
    // ranks 0 and 1 had read a share each, and read the rest; 2 and 3 are not among those that are left
    let read = count(&report, "storage_bytes_read");
    assert!(read < needed * 3 / 2, "{read} of {needed}");
    let lost = count(&report, "lost_bytes_read");
    assert!(lost > needed / 4 && lost < needed, "{lost} of {needed}");
    assert!(count(&report, "exchanged_bytes") > needed / 8);
}

/// Several at once, one after the other, and all but one.
#[test]
fn any_number_of_ranks_may_be_lost() {
    let smaller = Smaller::new(4, 1, Family::DeepseekV3, Scheme::Bf16);
    let wants: Vec<Value> = [1, 2].iter().map(|tp| smaller.undisturbed(*tp, 1)).collect();
    let slow = "rank=all,read=0,do=slow,ms=10";
    // the numbers are those of the group that is left at the time
    for (losses, left, faults) in [
        (2, 2, "rank=1,generation=1,at=started,do=kill;rank=2,generation=1,at=started,do=kill"),
        (3, 1, "rank=1,read=1,do=kill"),
        (3, 1, "rank=1,at=ready,do=kill"),
        (2, 2, "rank=3,generation=1,read=1,do=kill;rank=2,generation=2,read=0,do=kill"),
        (2, 2, "rank=3,generation=1,at=prepared,do=kill;rank=1,generation=2,at=allocated,do=kill"),
    ] {
        let load = smaller.load(&format!("{faults};{slow}"), &[]);
        smaller.check(load, &wants[left - 1], losses, faults);
    }
}

/// Ranks that stop, hang, panic, fail or end by themselves.
#[test]
fn a_load_goes_on_without_a_rank_that_fails_in_any_other_way() {
    let smaller = Smaller::new(2, 1, Family::Llama, Scheme::Bf16);
    let want = smaller.undisturbed(1, 1);
    for what in ["error", "panic", "exit"] {
        let fault = format!("rank=1,generation=1,read=1,do={what}");
        smaller.check(smaller.load(&fault, &[]), &want, 1, &fault);
    }
    for (what, limit) in [("stop", "--heartbeat-timeout"), ("hang", "--progress-timeout")] {
        let fault = format!("rank=1,generation=1,read=1,do={what}");
        smaller.check(smaller.load(&fault, &[limit, "1"]), &want, 1, &fault);
    }
}

/// The coordinator is in its process.
#[test]
fn without_rank_0_the_load_fails_in_order() {
    let smaller = Smaller::new(2, 1, Family::Llama, Scheme::Bf16);
    for point in [Point::Prepared, Point::Started, Point::Read] {
        let fault = format!("rank=0,at={},do=kill", point.name());
        let ended = smaller.load(&fault, &[]).end();
        assert_eq!(ended.status.code(), Some(1), "{:?}", ended.stderr);
        let line = ended.stderr.last().unwrap();
        assert!(line.contains("rank 0"), "{line}");
        smaller.story.assert_nothing_is_left();
    }
    // lost after another: both are named
    let fault = "rank=1,generation=1,read=1,do=error;rank=0,generation=2,read=1,do=error";
    let ended = smaller.load(fault, &[]).end();
    let line = ended.stderr.last().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{:?}", ended.stderr);
    assert_eq!(line.matches("a fault that was asked for").count(), 2, "{line}");
}

#[test]
fn files_and_a_reload_are_of_the_ranks_that_are_left() {
    let smaller = Smaller::new(4, 2, Family::DeepseekV3, Scheme::Bf16);
    let want = smaller.undisturbed(2, 2);
    let (out, alone) = (smaller.story.path("out"), smaller.story.path("alone"));
    let fault = "rank=2,generation=1,read=1,do=kill";
    let load = smaller.load(fault, &["--out", out.to_str().unwrap(), "--reload", "checkpoint"]);
    let report = load.end();
    assert_eq!(report.status.code(), Some(0), "{:?}", report.stderr);
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!(report["digest"], want["digest"]);
    let two = ["load", "checkpoint", "--tp", "2", "--ep", "2", "--out", alone.to_str().unwrap()];
    let command = smaller.story.command(&[&two[..], &QUIET].concat());
    smaller.story.start(command).end().json();
    let names = |dir: &std::path::Path| {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    };
    assert_eq!(names(&out), names(&alone));
    for name in names(&out) {
        let (a, b) = (fs::read(out.join(&name)).unwrap(), fs::read(alone.join(&name)).unwrap());
        assert_eq!(a.len(), b.len(), "{name:?}");
        assert!(a == b, "{name:?}");
    }
}

/// Under a launcher that knows nothing of the load: ranks that are not needed end well, and nobody is started again.
#[test]
fn a_launcher_goes_on_without_a_rank_as_well() {
    let smaller = Smaller::new(4, 1, Family::Llama, Scheme::Bf16);
    let want = smaller.undisturbed(2, 1);
    let program = env!("CARGO_BIN_EXE_longshore");
    let launch = ["launch", "--nproc", "4", "--on-loss", "shrink", "--", program, "rank"];
    let rank = ["checkpoint", "--on-loss", "shrink"];
    let mut command = smaller.story.command(&[&launch[..], &rank, &QUIET].concat());
    command.env("LONGSHORE_FAULT", "rank=2,generation=1,read=1,do=kill");
    smaller.check(smaller.story.start(command), &want, 1, "launch");
    // each started by hand
    let group = Group::new(4);
    let ranks: Vec<Running> = (0..4)
        .map(|number| {
            let mut command = smaller.story.command(&[&["rank"][..], &rank, &QUIET].concat());
            group.tell(&mut command, number);
            command.env("LONGSHORE_FAULT", "rank=2,generation=1,read=1,do=kill");
            smaller.story.start(command)
        })
        .collect();
    let ended: Vec<Ended> = ranks.into_iter().map(Running::end).collect();
    let codes: Vec<Option<i32>> = ended.iter().map(|ended| ended.status.code()).collect();
    assert_eq!(codes, [Some(0), Some(0), None, Some(0)]);
    let report: Value = serde_json::from_str(&ended[0].stdout).unwrap();
    assert_eq!(report["digest"], want["digest"]);
}

/// Whenever it is.
#[test]
fn a_load_goes_on_without_ranks_that_are_killed_at_random_moments() {
    let kills: u32 = number("LONGSHORE_KILLS", 6);
    let seed: u64 = number("LONGSHORE_SEED", 1);
    let smaller = Smaller::new(4, 1, Family::DeepseekV3, Scheme::Bf16);
    let wants: Vec<Value> = [1, 2, 4].iter().map(|tp| smaller.undisturbed(*tp, 1)).collect();
    for kill in 0..kills {
        let mut random = Random(seed << 32 | u64::from(kill));
        // one may be killed before it has joined
        let slow = "rank=all,read=0,do=slow,ms=10";
        let events = smaller.story.path(&format!("events-{kill}"));
        let mut command = smaller.command(slow, &["--join-timeout", "3"]);
        command.env("LONGSHORE_EVENTS", &events);
        let load = smaller.story.start(command);
        for _ in 0..1 + random.below(3) {
            thread::sleep(Duration::from_millis(random.below(700)));
            // it may be on its way, or over
            if let Some(process) = smaller.story.rank_now(1 + random.below(3) as u32) {
                signal(process.pid, "KILL");
            }
        }
        let ended = load.end();
        if ended.status.code() != Some(0) {
            // one that is lost when the load is complete takes its part of the report with it
            assert_eq!(ended.status.code(), Some(1), "kill {kill}: {:?}", ended.stderr);
            let events = fs::read_to_string(&events).unwrap();
            assert!(events.contains(r#""event":"complete""#), "kill {kill}: {:?}", ended.stderr);
            continue;
        }
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        let want = wants.iter().find(|want| want["tp"] == report["tp"]).unwrap();
        assert_eq!(report["digest"], want["digest"], "kill {kill}");
        smaller.story.assert_nothing_is_left();
    }
}
