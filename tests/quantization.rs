//! What files and user say of a checkpoint's quantisation, against checkpoints in all published styles.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{fs, path::Path};

use longshore::{
    discover::discover,
    error::LoadError,
    plan::{Plan, PlanOptions},
};
use longshore_harness::{
    generator::{Checkpoint, Family, Preset, Scheme},
    scratch::Scratch,
};
use longshore_models::options::{KernelLayout, ModelOptions};
use serde_json::{Value, json};

fn plan(dir: &Path, user: Option<&str>, draft: bool) -> Result<Plan, LoadError> {
    let model = ModelOptions {
        kernel_layout: Some(KernelLayout::None),
        quantization: user.map(|word| word.parse().unwrap()),
        draft,
        ..ModelOptions::default()
    };
    Plan::new(discover(dir)?, &PlanOptions { model, ..PlanOptions::default() })
}

/// The warnings of a plan that is not refused.
fn warnings(dir: &Path, user: Option<&str>, draft: bool) -> Vec<String> {
    let plan = plan(dir, user, draft).unwrap_or_else(|e| panic!("{user:?}: {}", e.line()));
    plan.placement().warnings.clone()
}

/// The one line of a refusal.
fn refusal(dir: &Path, user: Option<&str>) -> String {
    let error = plan(dir, user, false).err().unwrap_or_else(|| panic!("{user:?}: accepted"));
    assert_eq!(error.exit_code(), 2, "{}", error.line());
    error.line()
}

fn written(checkpoint: &Checkpoint) -> Scratch {
    let scratch = Scratch::new().unwrap();
    checkpoint.write(scratch.path()).unwrap_or_else(|e| panic!("{checkpoint:?}: {e}"));
    scratch
}

/// Changes one JSON file of a checkpoint.
fn edit(dir: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(file);
    let mut value = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).unwrap(),
        Err(_) => json!({}),
    };
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Every style of every family, with each switch that changes what is quantised and that its list knows of.
fn styles() -> Vec<Checkpoint> {
    let mut all = Vec::new();
    for &family in Family::ALL {
        for &scheme in family.schemes() {
            for preset in [Preset::Tiny, Preset::Odd] {
                let start = Checkpoint::new(family, scheme).preset(preset);
                let switches: &[(&str, bool)] = match (family, scheme) {
                    (Family::DeepseekV3 | Family::GlmMoeDsa, Scheme::Nvfp4) => {
                        &[("nvfp4_attention", true)]
                    }
                    (Family::KimiK25, Scheme::Mxfp4) => {
                        &[("mxfp4_shared", false), ("mxfp4_kv_b", true)]
                    }
                    (_, Scheme::Mxfp4) => &[("mxfp4_shared", true)],
                    (_, Scheme::Int4) => &[("int4_linears", true)],
                    _ => &[],
                };
                all.extend(switches.iter().map(|(key, on)| start.clone().set(key, *on)));
                let styles = family.quant_styles().iter().filter(|_| scheme == Scheme::Nvfp4);
                all.extend(styles.map(|style| start.clone().set("quant_style", *style)));
                all.push(start);
            }
        }
    }
    all
}

/// Published styles declare exactly what they store: no style gives a warning, neither for the model nor for its draft,
/// whether or not the user says what is so.
#[test]
fn no_published_style_gives_a_warning() {
    let styles = styles();
    assert!(styles.len() >= 40, "{}", styles.len());
    for checkpoint in styles {
        let scratch = written(&checkpoint);
        let scheme = checkpoint.scheme().name();
        for user in [None, Some(scheme)] {
            assert_eq!(warnings(scratch.path(), user, false), [""; 0], "{checkpoint:?} {user:?}");
            if let Ok(draft) = plan(scratch.path(), user, true) {
                let what = format!("draft of {checkpoint:?} {user:?}");
                assert_eq!(draft.placement().warnings, [""; 0], "{what}");
            }
        }
    }
}

/// One warning for each direction, with the number of modules, the first of them and the list.
#[test]
fn a_list_that_says_otherwise_is_one_warning() {
    let scratch = written(&Checkpoint::new(Family::GlmMoeDsa, Scheme::Fp8));
    edit(scratch.path(), "config.json", |config| {
        let list = &mut config["quantization_config"]["modules_to_not_convert"];
        *list = json!(["model.layers.1.mlp.experts", "model.layers.2.self_attn.o_proj"]);
    });
    let found = warnings(scratch.path(), None, false);
    assert_eq!(found.len(), 1, "{found:?}");
    for part in [
        "13 modules are stored as fp8",
        "config.json: quantization_config.modules_to_not_convert names them",
        "model.layers.1.mlp.experts.0.gate_proj",
    ] {
        assert!(found[0].contains(part), "{found:?}");
    }

    let scratch = written(&Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4));
    edit(scratch.path(), "hf_quant_config.json", |config| {
        config["quantization"]["exclude_modules"] = json!(["model.layers.0.*", "lm_head"]);
    });
    let found = warnings(scratch.path(), None, false);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("3 modules are stored as nvfp4"), "{found:?}");
    assert!(found[0].contains("model.layers.0.mlp.gate_proj"), "{found:?}");
    assert!(found[1].contains("10 modules are not stored as nvfp4"), "{found:?}");
    assert!(found[1].contains("model.layers.1.self_attn.q_a_proj"), "{found:?}");
    assert!(found[1].contains("hf_quant_config.json: quantization.exclude_modules"), "{found:?}");
}

/// The published copy of Kimi-K2.5-NVFP4 with the INT4 block of an older export left in `text_config`.
#[test]
fn a_leftover_declaration_needs_the_user_to_decide() {
    let scratch =
        written(&Checkpoint::new(Family::KimiK25, Scheme::Nvfp4).set("quant_style", "k26"));
    let int4 = Scratch::new().unwrap();
    Checkpoint::new(Family::KimiK25, Scheme::Int4).write(int4.path()).unwrap();
    let leftover: Value =
        serde_json::from_slice(&fs::read(int4.join("config.json")).unwrap()).unwrap();
    let leftover = leftover["text_config"]["quantization_config"].clone();
    edit(scratch.path(), "config.json", |config| {
        config["text_config"]["quantization_config"] = leftover;
    });
    // beside a top-level block it does not count
    assert_eq!(warnings(scratch.path(), None, false), [""; 0]);
    edit(scratch.path(), "config.json", |config| {
        config.as_object_mut().unwrap().remove("quantization_config");
    });
    let line = refusal(scratch.path(), None);
    for part in ["text_config.quantization_config", "hf_quant_config.json", "--quantization"] {
        assert!(line.contains(part), "{line}");
    }
    let found = warnings(scratch.path(), Some("modelopt_fp4"), false);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("compressed-tensors"), "{found:?}");
    // the tensors are the judge: the user cannot choose the declaration that they contradict
    let line = refusal(scratch.path(), Some("compressed-tensors"));
    for part in ["is stored as nvfp4", "--quantization compressed-tensors", "hf_quant_config.json"]
    {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn a_user_whom_the_tensors_contradict_is_told_so() {
    let plain = written(&Checkpoint::new(Family::DeepseekV3, Scheme::Bf16));
    for word in ["fp8", "nvfp4", "mxfp4", "int4"] {
        let line = refusal(plain.path(), Some(word));
        assert!(line.contains(&format!("no module is stored as {word}")), "{line}");
        assert!(line.contains("longshore does not quantise"), "{line}");
    }
    assert_eq!(warnings(plain.path(), Some("bf16"), false), [""; 0]);

    let fp8 = written(&Checkpoint::new(Family::DeepseekV3, Scheme::Fp8));
    for word in ["bf16", "nvfp4", "quark", "int4"] {
        let line = refusal(fp8.path(), Some(word));
        for part in ["model.layers.0.self_attn.", "stored as fp8", word, "quant_method says fp8"] {
            assert!(line.contains(part), "{line}");
        }
    }
    // both four-bit schemes store the weight as U8
    for (family, scheme, word) in [
        (Family::KimiK25, Scheme::Mxfp4, "modelopt_fp4"),
        (Family::KimiK25, Scheme::Nvfp4, "mxfp4"),
    ] {
        let scratch = written(&Checkpoint::new(family, scheme));
        let line = refusal(scratch.path(), Some(word));
        let stored = format!("stored as {}", scheme.name());
        assert!(line.contains(&stored) && line.contains(word), "{line}");
    }
}

/// Files that say nothing, or the wrong thing, do not stop a user who is right.
#[test]
fn a_user_whom_the_tensors_bear_out_wins_over_the_files() {
    let scratch = written(&Checkpoint::new(Family::DeepseekV3, Scheme::Fp8));
    edit(scratch.path(), "config.json", |config| {
        config.as_object_mut().unwrap().remove("quantization_config");
    });
    assert!(refusal(scratch.path(), None).contains("is stored as fp8"));
    let found = plan(scratch.path(), Some("fp8"), false).unwrap();
    assert_eq!(found.model.declared.scheme.name(), "fp8");
    assert_eq!(found.placement().warnings, [""; 0]);

    edit(scratch.path(), "config.json", |config| {
        config["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
    });
    assert!(refusal(scratch.path(), None).contains("quant_method"));
    let found = warnings(scratch.path(), Some("fp8"), false);
    assert!(found.len() == 1 && found[0].contains("says awq"), "{found:?}");
}

/// A part of a model that has no quantised module (a BF16 prediction layer, a vision tower) does not contradict the user.
#[test]
fn the_user_speaks_of_the_whole_checkpoint() {
    let glm = written(&Checkpoint::new(Family::GlmMoeDsa, Scheme::Nvfp4));
    assert_eq!(warnings(glm.path(), Some("modelopt_fp4"), true), [""; 0]);
}

#[test]
fn no_architecture_is_one_clear_line() {
    let scratch = written(&Checkpoint::new(Family::KimiK25, Scheme::Nvfp4));
    edit(scratch.path(), "config.json", |config| config["architectures"] = json!([]));
    let line = refusal(scratch.path(), None);
    assert!(line.contains("config.json: architectures: expected first entry one of"), "{line}");
}

#[test]
fn a_damaged_hf_quant_config_is_one_clear_line() {
    let scratch = written(&Checkpoint::new(Family::GlmMoeDsa, Scheme::Nvfp4));
    fs::write(scratch.join("hf_quant_config.json"), "{\"quantization\":").unwrap();
    let line = refusal(scratch.path(), None);
    assert!(line.contains("hf_quant_config.json: not valid JSON"), "{line}");
}
