//! `longshore chaos`: what it does to ranks, what it says of it, and that what goes wrong does not get past it.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{fs, os::unix::fs::PermissionsExt};

use longshore_harness::generator::{Checkpoint, Family, Scheme};
use serde_json::Value;

#[path = "common/processes.rs"]
mod processes;

use processes::{Ended, Story, signal};

/// Every read takes a while, so that there is a load to be disturbed; rank 0 reads so long that rank 1 finishes for a while.
const SLOW: &str = "rank=0,read=0,do=slow,ms=50,again=1;rank=1,read=0,do=slow,ms=15,again=1";

/// What every load is made of: several reads per rank, silence is noticed soon.
const LOAD: [&str; 6] = ["--tp", "2", "--read-size", "64KiB", "--heartbeat-timeout", "1"];

/// A story with a small checkpoint in `checkpoint`.
fn story() -> Story {
    let story = Story::new();
    let checkpoint = Checkpoint::new(Family::Llama, Scheme::Bf16).files(2);
    checkpoint.write(&story.path("checkpoint")).unwrap();
    story
}

fn chaos(story: &Story, arguments: &[&str]) -> Ended {
    let quiet = ["chaos", "--json", "--log-level", "error"];
    let mut command = story.command(&[&quiet, arguments].concat());
    command.env("LONGSHORE_FAULT", SLOW);
    story.start(command).end()
}

/// That no run went wrong; the report.
fn right(ended: &Ended) -> Value {
    let report = ended.json();
    assert_eq!(report["wrong"], 0, "{report:#}");
    report
}

/// The report of runs of which some went wrong.
fn wrong(ended: &Ended) -> Value {
    assert_eq!(ended.status.code(), Some(1), "{:?} {}", ended.stderr, ended.stdout);
    let [line] = &ended.stderr[..] else { panic!("{:?}", ended.stderr) };
    assert!(line.starts_with("longshore: ") && line.contains("--seed"), "{line}");
    serde_json::from_str(&ended.stdout).unwrap()
}

fn runs(report: &Value) -> &[Value] {
    report["runs"].as_array().unwrap()
}

/// That every run which was disturbed ended with the digest of the one that was not, and that a loss was noticed.
fn assert_recovered(report: &Value) {
    let digest = report["digest"].as_str().unwrap();
    for run in runs(report) {
        assert_eq!((run["digest"].as_str(), run["exit_code"].as_i64()), (Some(digest), Some(0)));
        let [fault] = &run["faults"].as_array().unwrap()[..] else { panic!("{run:#}") };
        if run["verdict"] == "missed" {
            // the phase was over before the signal
            assert!(fault["missed"].is_string() && fault["pid"].is_null(), "{run:#}");
            continue;
        }
        assert_eq!(run["verdict"], "right");
        assert!(fault["phase"].is_string() && fault["pid"].is_u64(), "{run:#}");
        if fault["fault"] == "kill" && fault["phase"] != "ready" {
            assert!(fault["detected_after"].is_f64(), "{run:#}");
            assert!(fault["recovered_after"].is_f64(), "{run:#}");
        }
    }
}

#[test]
fn ranks_are_killed_in_each_phase_and_at_random_moments() {
    let story = story();
    for (options, count) in [
        (&["--rank", "0", "--rank", "1", "--phase", "joining", "--phase", "reading"][..], 4),
        (&["--rank", "1", "--phase", "finishing"], 1),
        (&["--at", "random", "--runs", "2"], 2),
        (&["--at", "0.1"], 1),
    ] {
        let load = [&["checkpoint"], &LOAD[..], &["--fault", "kill"]].concat();
        let report = right(&chaos(&story, &[&load[..], options].concat()));
        assert_eq!((runs(&report).len(), report["ranks"].as_u64()), (count, Some(2)));
        assert_recovered(&report);
    }
    story.assert_nothing_is_left();
}

/// A group that goes on with fewer ranks ends with their digest.
#[test]
fn a_group_that_shrinks_is_right_with_the_digest_of_fewer_ranks() {
    let story = story();
    let one = ["load", "checkpoint", "--tp", "1", "--json", "--log-level", "error"];
    let one = story.start(story.command(&one)).end().json();
    let digest = one["digest"].as_str().unwrap();
    let load = [&["checkpoint"], &LOAD[..], &["--on-loss", "shrink", "--fault", "kill"]].concat();
    let when = ["--rank", "1", "--phase", "reading"];
    let report = right(&chaos(&story, &[&load[..], &when, &["--digest", digest]].concat()));
    assert_eq!(runs(&report)[0]["digest"], digest);
    let report = wrong(&chaos(&story, &[&load[..], &when].concat()));
    assert_eq!(runs(&report)[0]["digest"], digest);
}

/// What goes on after it was replaced changes nothing; what goes on before it was missed comes late.
#[test]
fn ranks_are_stopped_and_continued_in_each_phase() {
    let story = story();
    for options in [
        &["--rank", "1", "--phase", "joining", "--phase", "finishing"][..],
        &["--rank", "0", "--rank", "1", "--phase", "reading"],
    ] {
        let load = [&["checkpoint"], &LOAD[..], &["--fault", "stop-continue:2"]].concat();
        assert_recovered(&right(&chaos(&story, &[&load[..], options].concat())));
    }
    story.assert_nothing_is_left();
}

/// Of storage the reads that are left; a rank that has done its own has nothing to be cut off from.
#[test]
fn ranks_are_cut_off_from_storage() {
    let story = story();
    let load = [&["checkpoint"], &LOAD[..], &["--progress-timeout", "1"]].concat();
    let ranks = ["--rank", "0", "--rank", "1", "--phase", "reading"];
    for faults in [&["--fault", "storage"][..], &["--fault", "storage:hang"]] {
        let report = right(&chaos(&story, &[&load[..], faults, &ranks].concat()));
        assert_recovered(&report);
        for run in runs(&report).iter().filter(|run| run["verdict"] == "right") {
            assert!(run["faults"][0]["recovered_after"].is_f64(), "{run:#}");
        }
    }
    let late = ["--fault", "storage", "--rank", "1", "--phase", "joining", "--phase", "finishing"];
    assert_recovered(&right(&chaos(&story, &[&load[..], &late].concat())));
    story.assert_nothing_is_left();
}

/// Each side takes the other for lost; the one that hears others, or is told by itself, has the say. Rank 0's is the coordinator's.
#[test]
fn ranks_are_cut_off_from_each_other() {
    let story = story();
    for options in [
        &["--rank", "0", "--rank", "1", "--phase", "reading"][..],
        &["--rank", "0", "--rank", "1", "--phase", "reading", "--transport", "tcp"],
        &["--rank", "1", "--phase", "joining", "--phase", "finishing"],
    ] {
        let load = [&["checkpoint"], &LOAD[..], &["--fault", "network"]].concat();
        let report = right(&chaos(&story, &[&load[..], options].concat()));
        assert_recovered(&report);
        for run in runs(&report).iter().filter(|run| run["verdict"] == "right") {
            let fault = &run["faults"][0];
            let detected = fault["detected_after"].as_f64().unwrap();
            assert!(detected > 0.5, "{run:#}: only its silence tells");
            assert!(fault["phase"] == "ready" || fault["recovered_after"].is_f64(), "{run:#}");
        }
    }
    story.assert_nothing_is_left();
}

/// Who is lost when the others have begun to leave finds nobody to load with again: then the load fails, and that is told.
#[test]
fn ranks_are_killed_when_they_are_ready() {
    let story = story();
    let options = ["--fault", "kill", "--phase", "ready", "--join-timeout", "2"];
    let ended = chaos(&story, &[&["checkpoint"], &LOAD[..], &options].concat());
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let [run] = runs(&report) else { panic!("{report:#}") };
    match ended.status.code() {
        Some(0) => assert_recovered(&report),
        _ => {
            assert!(run["wrong"].to_string().contains("have not joined within 2s"), "{run:#}");
            fs::remove_dir_all(run["kept"].as_str().unwrap()).unwrap();
        }
    }
    story.assert_nothing_is_left();
}

/// What is only late is not lost, unless it is late for too long.
#[test]
fn a_rank_that_is_late_is_waited_for() {
    let story = story();
    let faults = ["--fault", "pause:0.2", "--fault", "slow:3"];
    let moments = ["--phase", "reading", "--phase", "ready", "--rank", "1"];
    let report = right(&chaos(&story, &[&["checkpoint"], &LOAD[..], &faults, &moments].concat()));
    for run in runs(&report) {
        assert!(run["verdict"] == "right" || run["verdict"] == "missed", "{run:#}");
    }
    story.assert_nothing_is_left();
}

/// The choice of faults, ranks and moments is the seed's.
#[test]
fn a_seed_repeats_the_schedule() {
    let story = story();
    let chosen = |seed: &str| {
        let faults = ["--fault", "pause:0.05", "--fault", "slow:2", "--losses", "2"];
        let options = [&faults[..], &["--runs", "2", "--seed", seed]].concat();
        let report = right(&chaos(&story, &[&["checkpoint"], &LOAD[..], &options].concat()));
        assert_eq!(report["seed"].to_string(), seed);
        let faults = runs(&report).iter().flat_map(|run| run["faults"].as_array().unwrap());
        let chosen = faults.map(|f| ["fault", "rank", "wanted"].map(|key| f[key].to_string()));
        chosen.collect::<Vec<_>>()
    };
    let first = chosen("7");
    assert_eq!(first.len(), 8);
    assert_eq!(first, chosen("7"));
    story.assert_nothing_is_left();
}

/// A script as the user's command, in the place of `longshore load`.
fn script(story: &Story, text: &str) -> String {
    let path = story.path("command.sh");
    let program = env!("CARGO_BIN_EXE_longshore");
    fs::write(&path, format!("#!/bin/sh\nlongshore={program}\n{text}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    path.to_str().unwrap().to_owned()
}

const RANKS: &str = "-- \"$longshore\" rank checkpoint --json --read-size 64KiB --log-level error";

/// Ranks of the user's own launch command are found by what they tell.
#[test]
fn a_command_of_the_users_is_disturbed_in_the_same_way() {
    let story = story();
    let restarts = format!("exec \"$longshore\" launch --nproc 2 --max-restarts 3 {RANKS}\n");
    let command = script(&story, &restarts);
    let ended = chaos(&story, &["--fault", "kill", "--phase", "reading", "--", &command]);
    let report = right(&ended);
    let [run] = runs(&report) else { panic!("{report:#}") };
    assert!(report["digest"].is_string() && run["digest"] == report["digest"]);
    if run["verdict"] == "right" {
        let fault = &run["faults"][0];
        assert!(fault["detected_after"].is_f64() && fault["recovered_after"].is_f64(), "{run:#}");
    }
    story.assert_nothing_is_left();
}

/// The ranks print no digest and the command always ends well: only that the load was not complete can be seen.
#[test]
fn a_loss_that_is_ignored_is_wrong() {
    let story = story();
    for (output, wanted) in [("", "printed no digest"), (" >/dev/null", "did not become complete")]
    {
        let ranks = format!("\"$longshore\" launch --nproc 2 {RANKS}{output}\nexit 0\n");
        let command = script(&story, &ranks);
        let options = ["--fault", "kill", "--rank", "0", "--phase", "reading", "--runs", "2"];
        let ended = chaos(&story, &[&options[..], &["--", &command]].concat());
        let report = wrong(&ended);
        assert_eq!(report["digest"].is_null(), !output.is_empty());
        let run = runs(&report).iter().find(|run| run["verdict"] == "wrong").unwrap();
        assert!(run["wrong"].to_string().contains(wanted), "{run:#}");
        // what tells why stays, and nothing else
        let kept = run["kept"].as_str().unwrap();
        assert!(fs::read_dir(kept).unwrap().count() % 3 == 0);
        fs::remove_dir_all(kept).unwrap();
    }
    story.assert_nothing_is_left();
}

/// Whatever the load says of itself: another digest is another result.
#[test]
fn another_digest_is_wrong() {
    let story = story();
    let command = script(
        &story,
        "\"$longshore\" load checkpoint --tp 2 --ranks processes --json --read-size 64KiB >out.json || exit 1\n\
         test -e second && sed -i 's/\"digest\": \".*\"/\"digest\": \"0\"/' out.json\n\
         test -e first && touch second; touch first\ncat out.json\n",
    );
    let ended = chaos(&story, &["--fault", "kill", "--phase", "reading", "--", &command]);
    let report = wrong(&ended);
    let run = &runs(&report)[0];
    assert!(run["wrong"][0].as_str().unwrap().starts_with("its digest is 0, not "), "{run:#}");
    fs::remove_dir_all(run["kept"].as_str().unwrap()).unwrap();
    story.assert_nothing_is_left();
}

/// Whoever asks for the end of it has nothing left to clear away.
#[test]
fn an_interrupted_run_leaves_nothing() {
    let story = story();
    let load = [&["chaos", "checkpoint"], &LOAD[..], &["--log-level", "error"]].concat();
    let mut command = story.command(&load);
    command.env("LONGSHORE_FAULT", "rank=1,read=1,do=hang");
    let running = story.start(command);
    story.loading(2);
    signal(running.pid(), "INT");
    assert_eq!(running.end().failed(130), "longshore: interrupted");
    story.assert_nothing_is_left();
}

/// A server runs on when its ranks are complete.
#[test]
fn a_command_that_runs_on_is_ended_when_its_load_is_complete() {
    let story = story();
    let command = script(
        &story,
        "\"$longshore\" load checkpoint --tp 2 --ranks processes --read-size 64KiB || exit 1\nsleep 1000\n",
    );
    let options = ["--fault", "kill", "--phase", "reading", "--until-complete", "--", &command];
    let report = right(&chaos(&story, &options));
    assert!(runs(&report)[0]["exit_code"].is_null(), "{report:#}");
    story.assert_nothing_is_left();
}

#[test]
fn what_cannot_be_done_is_refused_in_one_line() {
    let story = story();
    let silent = script(&story, "exit 0\n");
    for (arguments, wanted) in [
        (&["checkpoint", "--tp", "2", "--fault", "storage:melt"][..], "storage[:hang], network"),
        (&["checkpoint", "--tp", "2", "--fault", "melt"], "stop-continue[:SECONDS]"),
        (&["checkpoint", "--tp", "2", "--phase", "lunch"], "joining"),
        (&["checkpoint", "--tp", "2", "--rank", "2"], "--rank: 2, but there are 2 ranks"),
        (&["checkpoint", "--tp", "2", "--ranks", "threads"], "--ranks: threads"),
        (&["checkpoint", "--tp", "2", "--runs", "0"], "--runs"),
        (&["checkpoint"], "expected SOURCE and --tp N, or a COMMAND after --"),
        (&[], "expected SOURCE and --tp N, or a COMMAND after --"),
        (&["checkpoint", "--tp", "2", "--", "true"], "cannot be used with a COMMAND"),
        (&["--tp", "2", "--", "true"], "--tp cannot be used with a COMMAND"),
        (&["--until-complete", "checkpoint", "--tp", "2"], "COMMAND"),
        (&["nowhere", "--tp", "2"], "nowhere"),
        (&["--", "./no-such-program"], "./no-such-program: cannot be started"),
        (&["--", &silent], "has told no events"),
    ] {
        let ended = chaos(&story, arguments);
        let line = ended.failed(2);
        assert!(line.contains(wanted), "{arguments:?}: {line}");
    }
    let failing = script(&story, "echo why >&2\nexit 3\n");
    let line = chaos(&story, &["--", &failing]).failed(1).to_owned();
    assert!(line.contains("the undisturbed run went wrong: it exited with code 3: why"), "{line}");
    story.assert_nothing_is_left();
}
