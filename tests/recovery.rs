//! A lost rank costs seconds: whenever and however a rank process goes, the load completes with the same bytes, and what the
//! others had is not read again.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use longshore_harness::generator::{Checkpoint, Family, Scheme};
use longshore_rank::fault::Point;
use serde_json::Value;

#[path = "common/processes.rs"]
mod processes;

use processes::{Running, Story};

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
        let story = Story::new();
        Checkpoint::new(family, scheme).files(3).write(&story.path("checkpoint")).unwrap();
        let tp_text = tp.to_string();
        let load = ["load", "checkpoint", "--tp", &tp_text];
        let report = story.start(story.command(&[&load[..], &QUIET].concat())).end().json();
        Self { story, tp, report }
    }

    /// `longshore load` with a process per rank.
    fn load(&self, fault: &str, extra: &[&str]) -> Running {
        let tp = self.tp.to_string();
        let load = ["load", "checkpoint", "--ranks", "processes", "--tp", &tp];
        let mut command = self.story.command(&[&load[..], &QUIET, extra].concat());
        command.env("LONGSHORE_FAULT", fault);
        self.story.start(command)
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
        (3, Family::Llama, &["--exchange", "off"]),
        (4, Family::DeepseekV3, &["--io", "direct"]),
    ] {
        let undisturbed = Undisturbed::new(tp, family, Scheme::Bf16);
        for point in Point::ALL {
            for rank in 0..tp {
                let what = format!("tp {tp} {extra:?}: rank {rank} killed when {}", point.name());
                let fault = format!("rank={rank},at={},do=kill", point.name());
                let report = undisturbed.check(undisturbed.load(&fault, extra), &what);
                if rank > 0 {
                    assert_eq!(report["restarts"], 1, "{what}");
                }
                assert_eq!(
                    report["generation"].as_u64().unwrap() > 1,
                    rank > 0 || point != Point::Allocated,
                    "{what}: {}",
                    report["generation"]
                );
            }
        }
    }
}
