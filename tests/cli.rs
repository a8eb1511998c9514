//! The command line: JSON alone on stdout, exit codes, one line for bad input.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use longshore_harness::{
    generator::{Checkpoint, Family, Scheme},
    scratch::Scratch,
};
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
            "cached_bytes_read",
            "kept_bytes",
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

/// `inspect --map`: every tensor in file order, where it goes, or why nowhere.
#[test]
fn inspect_maps_every_tensor_to_its_parameter() {
    let source = ["inspect", "synth:deepseek_v3-fp8", "--map"];
    let plain = json(&[&source[..], &["--json"]].concat());
    let map = plain["map"].as_array().unwrap();
    assert_eq!(map.len() as u64, plain["tensors"].as_u64().unwrap());
    let entry = |map: &[Value], tensor: &str| -> Value {
        map.iter().find(|e| e["tensor"] == tensor).unwrap_or_else(|| panic!("{tensor}")).clone()
    };
    let kv_a = entry(map, "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv");
    let wanted = serde_json::json!({
        "tensor": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
        "runtime": "model.layers.1.self_attn.fused_qkv_a_proj_with_mqa.weight_scale_inv",
        "shard": 1, "shards": 2, "expert": null, "local_experts": null,
    });
    assert_eq!(kv_a, wanted);
    let norm = entry(map, "model.norm.weight");
    assert_eq!((&norm["shard"], &norm["shards"]), (&Value::Null, &Value::from(1)));
    let skipped = entry(map, "model.layers.3.enorm.weight");
    keys(&skipped, &["tensor", "skipped"]);
    assert!(skipped["runtime"].is_null() && skipped.get("shards").is_some_and(Value::is_null));
    let mapped = map.iter().filter(|e| e.get("skipped").is_none()).count();
    assert_eq!(map.len() - mapped, plain["skipped"].as_array().unwrap().len());

    let fused = ["--ep", "2", "--fuse-shared-experts", "--json"];
    let fused = json(&[&source[..], &fused].concat());
    let shared =
        entry(fused["map"].as_array().unwrap(), "model.layers.1.mlp.shared_experts.up_proj.weight");
    let found = [&shared["runtime"], &shared["shard"], &shared["expert"], &shared["local_experts"]];
    let wanted: [Value; 4] =
        ["model.layers.1.mlp.experts.w13_weight".into(), "w3".into(), 8.into(), 5.into()];
    assert_eq!(found, wanted.each_ref());

    let draft = json(&[&source[..], &["--draft", "--json"]].concat());
    let enorm = entry(draft["map"].as_array().unwrap(), "model.layers.3.enorm.weight");
    assert_eq!(enorm["runtime"], "model.enorm.weight");

    let text = longshore(&source).stdout;
    let lines: Vec<String> = String::from_utf8(text).unwrap().lines().map(str::to_owned).collect();
    let lines: Vec<&String> = lines.iter().filter(|l| l.starts_with("model.")).collect();
    assert_eq!(lines.len() + 1, map.len(), "one line each, and one for lm_head");
    let mut columns: Vec<usize> = lines.iter().filter_map(|l| l.find(" shard")).collect();
    columns.dedup();
    assert_eq!(columns.len(), 1, "aligned");
}

/// `longshore inspect … --map | head`: no panic, no complaint.
#[test]
fn reader_that_has_seen_enough_is_no_failure() {
    let mut run = Command::new(env!("CARGO_BIN_EXE_longshore"))
        .env("XDG_CACHE_HOME", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"))
        .args(["inspect", "synth:deepseek_v3-fp8", "--map", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(run.stdout.take());
    let run = run.wait_with_output().unwrap();
    assert_eq!((run.status.code(), String::from_utf8_lossy(&run.stderr)), (Some(0), "".into()));
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
        &["inspect", "synth:deepseek_v3-fp8", "--ep", "2"],
        &["inspect", "synth:deepseek_v3-fp8", "--map", "--ep", "3"],
        &["inspect", "synth:deepseek_v3-fp8", "--map", "--ep", "0"],
        &["inspect", "synth:llama-bf16", "--map", "--fuse-shared-experts"],
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

/// A mistake in where to write shows before anything is loaded.
#[test]
fn an_output_that_cannot_be_written_is_refused_before_the_load() {
    let scratch = Scratch::new().unwrap();
    let (checkpoint, taken) = (scratch.join("checkpoint"), scratch.join("taken"));
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&checkpoint).unwrap();
    std::fs::write(&taken, "a file").unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let run = longshore(&["load", &text(&checkpoint), "--tp", "2", "--out", &text(&taken)]);
    let complaint = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(2), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "nothing was read before: {complaint}");
    assert!(complaint.contains(&text(&taken)), "{complaint}");
}

fn llama(scratch: &Scratch) -> (std::path::PathBuf, String) {
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Family::Llama, Scheme::Bf16).write(&dir).unwrap();
    let text = dir.to_str().unwrap().to_owned();
    (dir, text)
}

/// Whatever a link leads to, and however long a file is.
#[test]
fn configuration_files_that_are_no_small_plain_files_are_refused() {
    for name in ["config.json", "model.safetensors.index.json", "hf_quant_config.json"] {
        for long in [false, true] {
            let scratch = Scratch::new().unwrap();
            let (dir, text) = llama(&scratch);
            let path = dir.join(name);
            let _ = std::fs::remove_file(&path);
            match long {
                true => std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap(),
                false => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
            }
            let run = longshore(&["load", &text, "--tp", "2", "--log-level", "error"]);
            let complaint = String::from_utf8_lossy(&run.stderr);
            assert_eq!(run.status.code(), Some(2), "{name}: {complaint}");
            assert_eq!(complaint.lines().count(), 1, "{complaint}");
            assert!(complaint.contains(name), "{complaint}");
        }
    }
}

/// Options of `load` are options of `plan`, and Run:ai's environment is honoured; flags win over it.
#[test]
fn plan_takes_the_options_of_load_and_the_environment_counts() {
    let scratch = Scratch::new().unwrap();
    let (_, dir) = llama(&scratch);
    let nowhere = scratch.join("nowhere").to_str().unwrap().to_owned();
    json(&[
        "plan",
        &dir,
        "--tp",
        "2",
        "--concurrency",
        "4",
        "--out",
        &nowhere,
        "--reload",
        &dir,
        "--json",
    ]);
    assert!(!Path::new(&nowhere).exists(), "plan writes nothing");

    let load = |variable: (&str, &str), flags: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_longshore"))
            .env(variable.0, variable.1)
            .args(["load", &dir, "--tp", "1", "--io", "direct", "--json", "--log-level", "error"])
            .args(flags)
            .output()
            .unwrap();
        (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned(), run.stderr)
    };
    let staging = |text: &str| {
        let report: Value = serde_json::from_str(text).unwrap();
        report["ranks"][0]["peak_staging_bytes"].as_u64().unwrap()
    };
    let limit = "RUNAI_STREAMER_MEMORY_LIMIT";
    assert!(staging(&load((limit, "262144"), &[]).1) <= 262_144);
    assert!(staging(&load((limit, "262144"), &["--memory-limit", "64MiB"]).1) > 262_144);
    assert!(staging(&load((limit, "-1"), &[]).1) > 262_144);
    let (code, _, complaint) = load(("RUNAI_STREAMER_CONCURRENCY", "abc"), &[]);
    let complaint = String::from_utf8_lossy(&complaint);
    assert_eq!(code, Some(2));
    assert!(complaint.contains("RUNAI_STREAMER_CONCURRENCY"), "{complaint}");
}

/// Rank files are as readable as any new file, and what an ended process left behind goes.
#[test]
fn outputs_are_readable_and_leave_nothing_else() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new().unwrap();
    let (_, dir) = llama(&scratch);
    let out = scratch.join("out");
    let abandoned = out.join(".longshore.4194305.tmp");
    std::fs::create_dir_all(&abandoned).unwrap();
    std::fs::write(abandoned.join("rank-00000-of-00001.safetensors"), "half").unwrap();
    json(&["load", &dir, "--tp", "2", "--out", out.to_str().unwrap(), "--json"]);
    let mut names = Vec::new();
    let mut modes = Vec::new();
    for entry in std::fs::read_dir(&out).unwrap().flatten() {
        names.push(entry.file_name().into_string().unwrap());
        modes.push(entry.metadata().unwrap().permissions().mode());
    }
    names.sort();
    let ranks = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
    assert_eq!(names, ["manifest.json", ranks[0], ranks[1]]);
    assert!(modes.iter().all(|mode| mode == &modes[0]), "{modes:?}");
}

/// Of a fused A-projection's scalars only q_a's are kept; a kv_a that says otherwise is worth a word.
#[test]
fn scalars_that_are_discarded_although_they_differ_give_a_warning() {
    let scratch = Scratch::new().unwrap();
    for (attention, warned) in [(true, true), (false, false)] {
        let dir = scratch.join(&format!("checkpoint-{attention}"));
        let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4);
        checkpoint.set("nvfp4_attention", attention).write(&dir).unwrap();
        let loaded = json(&["load", dir.to_str().unwrap(), "--tp", "2", "--json"]);
        let said = loaded["warnings"].to_string().contains("kv_a_proj_with_mqa");
        assert_eq!(said, warned, "{}", loaded["warnings"]);
    }
}
