//! Damaged checkpoints: exit code 2, one line that names the culprit, nothing under its final name.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{fs, process::Command};

use longshore_harness::{
    generator::{Break, Checkpoint, Family, Scheme},
    scratch::Scratch,
};

fn check(family: Family, scheme: Scheme, damage: Break) {
    let scratch = Scratch::new().unwrap();
    let (checkpoint, out) = (scratch.join("checkpoint"), scratch.join("out"));
    let whole = Checkpoint::new(family, scheme);
    // kinds that need a tensor which this family lacks do not apply
    let Ok(written) = whole.break_with(damage).write(&checkpoint) else {
        return;
    };
    let run = Command::new(env!("CARGO_BIN_EXE_longshore"))
        .args(["load", "--tp", "2", "--json", "--log-level", "error"])
        .arg(&checkpoint)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    let what = format!("{} {} {}", family.name(), scheme.name(), damage.name());
    let complaint = String::from_utf8_lossy(&run.stderr);
    if damage == Break::NonfiniteOk {
        assert!(run.status.success(), "{what}: {complaint}");
        return;
    }
    assert_eq!(run.status.code(), Some(2), "{what}: {complaint}");
    assert_eq!(complaint.lines().count(), 1, "{what}: {complaint}");
    let named = written.message_names_one_of.iter().any(|name| complaint.contains(name.as_str()));
    assert!(named, "{what}: {complaint} names none of {:?}", written.message_names_one_of);
    assert!(run.stdout.is_empty(), "{what}: output on stdout");
    let left: Vec<_> = fs::read_dir(&out).map(|d| d.flatten().collect()).unwrap_or_default();
    assert!(left.is_empty(), "{what}: left behind: {left:?}");
}

#[test]
fn every_kind_of_damage_is_refused_with_its_name() {
    for &damage in Break::ALL {
        for (family, scheme) in [
            (Family::Llama, Scheme::Bf16),
            (Family::Qwen3Moe, Scheme::Bf16),
            (Family::DeepseekV3, Scheme::Bf16),
            (Family::DeepseekV3, Scheme::Fp8),
            (Family::GlmMoeDsa, Scheme::Fp8),
            (Family::KimiK25, Scheme::Bf16),
            (Family::DeepseekV3, Scheme::Nvfp4),
            (Family::KimiK25, Scheme::Nvfp4),
            (Family::KimiK25, Scheme::Mxfp4),
            (Family::KimiK25, Scheme::Int4),
            (Family::GlmMoeDsa, Scheme::Nvfp4),
            (Family::GlmMoeDsa, Scheme::Mxfp4),
        ] {
            check(family, scheme, damage);
        }
    }
}
