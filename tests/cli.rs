//! The command line: JSON alone on stdout, exit codes, one line for bad input.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::process::{Command, Output};

use longshore_harness::scratch::Scratch;
use serde_json::Value;

fn longshore(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_longshore"))
        .env("XDG_CACHE_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"))
        .args(arguments)
        .output()
        .unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let run = longshore(arguments);
    let complaint = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{arguments:?}: {complaint}");
    serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}"))
}

fn keys(value: &Value, wanted: &[&str]) {
    for key in wanted {
        assert!(value.get(key).is_some_and(|v| !v.is_null()), "{key} is missing in {value}");
    }
}

/// The keys that the contract promises (§3).
#[test]
fn load_plan_inspect_and_synth_print_one_json_document() {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    let dir = dir.to_str().unwrap();
    let written = json(&["synth", dir, "--model", "deepseek_v3", "--quant", "fp8", "--json"]);
    keys(&written, &["directory", "family", "quant", "files", "tensors", "checkpoint_bytes"]);

    let loaded = json(&["load", dir, "--tp", "2", "--json"]);
    keys(
        &loaded,
        &[
            "source",
            "family",
            "quant",
            "tp",
            "ep",
            "kernel_layout",
            "device",
            "ranks_as",
            "checkpoint_bytes",
            "needed_bytes",
            "storage_bytes_read",
            "exchanged_bytes",
            "seconds",
            "phases",
            "generation",
            "restarts",
            "ranks",
            "skipped",
            "digest",
            "header_bytes_read",
            "padding_bytes_read",
            "retried_bytes",
        ],
    );
    keys(
        &loaded["ranks"][1],
        &[
            "rank",
            "parameter_bytes",
            "parameters",
            "aliases",
            "storage_bytes_read",
            "received_bytes",
            "sent_bytes",
            "peak_staging_bytes",
            "peak_rss_bytes",
            "seconds",
        ],
    );
    assert_eq!(loaded["checkpoint_bytes"], written["checkpoint_bytes"]);
    assert_eq!(loaded["storage_bytes_read"], loaded["needed_bytes"]);

    let planned = json(&["plan", dir, "--tp", "2", "--json"]);
    for key in ["needed_bytes", "storage_bytes_read", "exchanged_bytes", "skipped"] {
        assert_eq!(planned[key], loaded[key], "{key}: forecast and load");
    }
    assert!(planned.get("seconds").is_none());

    let inspected = json(&["inspect", dir, "--json"]);
    assert_eq!(inspected["family"], "deepseek_v3");
    assert_eq!(inspected["tensors"], written["tensors"]);
}

/// The digest covers the parameters, not the way they came.
#[test]
fn digest_does_not_depend_on_the_way() {
    let base = ["load", "synth:deepseek_v3-fp8", "--tp", "4", "--json"];
    let digest = |extra: &[&str]| json(&[&base[..], extra].concat())["digest"].clone();
    let first = digest(&["--exchange", "on"]);
    assert_eq!(first, digest(&["--exchange", "off"]));
    assert_eq!(first, digest(&["--io", "direct", "--memory-limit", "200KiB"]));
    assert_ne!(first, digest(&["--ep", "2"]));
}

#[test]
fn headers_only_checkpoints_plan_at_full_scale() {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("full");
    let dir = dir.to_str().unwrap();
    let arguments = ["synth", dir, "--model", "deepseek_v3", "--quant", "fp8", "--scale", "full"];
    let written = json(&[&arguments[..], &["--headers-only", "--json"]].concat());
    assert!(written["tensors"].as_u64().unwrap() > 91_000);
    let planned = json(&["plan", dir, "--tp", "16", "--json"]);
    assert_eq!(planned["checkpoint_bytes"], written["checkpoint_bytes"]);
    assert_eq!(planned["storage_bytes_read"], planned["needed_bytes"]);
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    for arguments in [
        &["load", "/nowhere", "--tp", "2"][..],
        &["load", "synth:llama-bf16"],
        &["load", "synth:llama-bf16", "--tp", "0"],
        &["load", "synth:llama-bf16", "--tp", "3"],
        &["load", "synth:llama-bf16", "--tp", "2", "--ep", "3"],
        &["load", "synth:llama-bf16", "--tp", "2", "--memory-limit", "1"],
        &["load", "synth:llama-bf16", "--tp", "2", "--kernel-layout", "aiter"],
        &["load", "synth:llama-bf16", "--tp", "2", "--kernel-layout", "fast"],
        &["load", "synth:llama-bf16", "--tp", "2", "--quantization", "awq"],
        &["load", "synth:llama-bf16", "--tp", "2", "--quantization", "fp8"],
        &["load", "synth:llama-bf16", "--tp", "2", "--draft"],
        &["load", "synth:llama-bf16", "--tp", "2", "--fuse-shared-experts"],
        &["load", "synth:llama-bf16", "--tp", "2", "--language-only", "--encoder-only"],
        &["load", "synth:llama-bf16", "--tp", "2", "--language-only"],
        &["load", "synth:llama-bf16", "--tp", "2", "--device", "tpu"],
        &["load", "synth:gpt-bf16", "--tp", "2"],
        &["load", "ftp://host/model", "--tp", "2"],
        &["plan", "synth:llama-bf16", "--tp", "2", "--nonsense"],
        &["inspect", "/"],
        &["frobnicate"],
    ] {
        let run = longshore(&[arguments, &["--log-level", "error"]].concat());
        let complaint = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{arguments:?}: {complaint}");
        assert_eq!(complaint.lines().count(), 1, "{arguments:?}: {complaint}");
        assert!(complaint.starts_with("longshore: ") && complaint.len() > 20, "{complaint}");
        assert!(run.stdout.is_empty(), "{arguments:?}");
    }
}
