//! The public conformance cases, through the command line: what `--out` holds is byte for byte what is expected.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::process::Command;

use longshore_harness::{cases, compare, scratch::Scratch};

fn load(case: &cases::Case, extra: &[&str]) {
    let scratch = Scratch::new().unwrap();
    let (checkpoint, out) = (scratch.join("checkpoint"), scratch.join("out"));
    case.checkpoint.write(&checkpoint).unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_longshore"))
        .args(["load", "--log-level", "error"])
        .arg(&checkpoint)
        .args(case.options.arguments())
        .arg("--out")
        .arg(&out)
        .args(extra)
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{} {extra:?}: {complaint}", case.name);
    assert_eq!(complaint, "", "{} {extra:?}", case.name);
    compare::with_case(&out, case).unwrap_or_else(|e| panic!("{} {extra:?}: {e}", case.name));
}

#[test]
fn every_public_case_is_byte_exact_however_it_is_read() {
    let mut seen = 0;
    for case in &cases::cases() {
        for exchange in ["on", "off"] {
            for io in ["buffered", "direct"] {
                load(case, &["--exchange", exchange, "--io", io]);
            }
        }
        // reads of 64 KiB, two slabs of staging
        load(case, &["--memory-limit", "160KiB", "--io", "direct"]);
        seen += 1;
    }
    assert_eq!(seen, 20);
}
