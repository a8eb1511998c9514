//! A rank that fails ends the load at once, with the first cause named; nothing is handed out.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    fs::OpenOptions,
    time::{Duration, Instant},
};

use longshore::{
    error::LoadError,
    load::{RunOptions, prepare, progress_of, run},
    plan::{Exchange, Plan},
};
use longshore_harness::{
    generator::{Checkpoint, Family, Scheme},
    oracle,
    scratch::Scratch,
};
use longshore_rank::storage::IoChoice;

mod common;

use common::{load_with, plan, runtime};

fn checkpoint(scratch: &Scratch) -> Plan {
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::DeepseekV3, Scheme::Fp8).write(&dir).unwrap();
    plan(&dir, &oracle::Options::tp(2), Exchange::On).unwrap()
}

/// A file that shrinks between planning and reading fails the rank that reads there.
#[test]
fn a_file_that_shrinks_during_the_load_is_named_within_a_second() {
    for io in [IoChoice::Buffered, IoChoice::Direct] {
        let scratch = Scratch::new().unwrap();
        let plan = checkpoint(&scratch);
        let prepared = prepare(&plan, &RunOptions { io, ..RunOptions::default() }).unwrap();
        let file = &plan.checkpoint().files[1];
        let path = plan.origin.metadata().join(&file.name);
        OpenOptions::new().write(true).open(path).unwrap().set_len(file.bytes / 2).unwrap();
        let started = Instant::now();
        let error = runtime().block_on(run(prepared, progress_of(&plan))).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(1), "took {:?}", started.elapsed());
        assert!(matches!(error, LoadError::Rank { .. }), "{error:?}");
        let line = error.line();
        assert!(line.contains(&file.name), "{line}");
        assert!(line.contains(&file.bytes.to_string()), "{line}");
        assert_eq!(error.exit_code(), 1);
    }
}

#[test]
fn a_file_that_changed_since_planning_is_refused_before_the_first_read() {
    let scratch = Scratch::new().unwrap();
    let plan = checkpoint(&scratch);
    let file = &plan.checkpoint().files[0];
    let path = plan.origin.metadata().join(&file.name);
    OpenOptions::new().write(true).open(path).unwrap().set_len(file.bytes + 1).unwrap();
    let error = load_with(&plan, &RunOptions::default()).err().unwrap();
    assert!(matches!(error, LoadError::FileChanged { .. }), "{error:?}");
}

fn workers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("rank")).count()
}

/// However a rank's actor ends, its workers end too, and with them the last hold on its memory.
#[test]
fn no_worker_outlives_a_failed_load() {
    let scratch = Scratch::new().unwrap();
    let runtime = runtime();
    for round in 0..40 {
        let dir = scratch.join(&format!("checkpoint-{round}"));
        Checkpoint::new(Family::DeepseekV3, Scheme::Bf16).write(&dir).unwrap();
        let plan = plan(&dir, &oracle::Options::tp(4), Exchange::On).unwrap();
        let options = RunOptions { concurrency: Some(4), ..RunOptions::default() };
        let prepared = prepare(&plan, &options).unwrap();
        let file = &plan.checkpoint().files[1];
        let path = plan.origin.metadata().join(&file.name);
        OpenOptions::new().write(true).open(path).unwrap().set_len(file.bytes / 2).unwrap();
        runtime.block_on(run(prepared, progress_of(&plan))).unwrap_err();
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while workers() > 0 {
        assert!(Instant::now() < deadline, "{} workers are left", workers());
        std::thread::sleep(Duration::from_millis(10));
    }
}
