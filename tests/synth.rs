//! Synthetic checkpoints: what they hold, against the lists that they declare, and that they load.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use longshore::{
    discover::{Discovered, discover},
    plan::{Plan, PlanOptions},
    synth::{self, Scale, Synth},
};
use longshore_harness::{
    generator::{Checkpoint, Family as Generated, Preset, Scheme as Stored},
    scratch::Scratch,
};
use longshore_models::{arch::Family, options::ModelOptions};
use serde_json::Value;

mod common;
#[path = "common/lists.rs"]
mod lists;

use lists::Lists;

fn families() -> impl Iterator<Item = Family> {
    Family::names().map(|name| Family::from_name(name).unwrap())
}

fn planned(dir: &Path, tp: u32, draft: bool) -> Plan {
    let model = ModelOptions { draft, ..ModelOptions::default() };
    let options = PlanOptions { tp, model, ..PlanOptions::default() };
    Plan::new(discover(dir).unwrap(), &options).unwrap_or_else(|e| panic!("{}", e.line()))
}

/// What `synth FAMILY-SCHEME` writes is what `load` takes by default, on two and on four ranks, without a warning.
#[test]
fn every_family_loads_in_every_scheme() {
    for family in families() {
        for scheme in synth::schemes(family) {
            let scratch = Scratch::new().unwrap();
            let written = Synth::new(family.name(), scheme.name()).write(scratch.path()).unwrap();
            let what = format!("{} {}", family.name(), scheme.name());
            assert_eq!(
                (written.family.as_str(), written.quant.as_str()),
                (family.name(), scheme.name())
            );
            assert!(written.checkpoint_bytes < 64 << 20, "{what}: {}", written.checkpoint_bytes);
            for tp in [2, 4] {
                let plan = planned(scratch.path(), tp, false);
                assert_eq!(plan.placement().warnings, [""; 0], "{what}, tp {tp}");
                assert_eq!(plan.checkpoint().data_bytes(), written.checkpoint_bytes, "{what}");
                common::load(&plan);
            }
            if matches!(family, Family::DeepseekV3 | Family::DeepseekV32 | Family::GlmMoeDsa) {
                let draft = planned(scratch.path(), 2, true);
                assert_eq!(draft.placement().warnings, [""; 0], "draft of {what}");
                common::load(&draft);
            }
        }
    }
}

#[test]
fn every_family_can_be_planned_at_every_scale() {
    for family in families() {
        for scheme in synth::schemes(family) {
            for scale in [Scale::Small, Scale::Full] {
                let scratch = Scratch::new().unwrap();
                let synth = Synth::new(family.name(), scheme.name()).scale(scale);
                synth.headers_only(true).layers(Some(4)).write(scratch.path()).unwrap();
                for tp in [2, 4] {
                    let plan = planned(scratch.path(), tp, false);
                    assert_eq!(plan.placement().warnings, [""; 0], "{} {scheme:?}", family.name());
                }
            }
        }
    }
}

/// Modules whose weight may be quantised: linear layers of decoder layers, without router, `eh_proj` and `weights_proj`.
fn linear_modules(checkpoint: &Discovered) -> Vec<(String, bool)> {
    const LINEAR: [&str; 13] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "wq_b",
        "wk",
    ];
    let module = |name: &str| {
        let module = name.strip_suffix("_packed").unwrap_or(name).strip_suffix(".weight")?;
        let (_, last) = module.rsplit_once('.')?;
        (module.contains(".layers.") && LINEAR.contains(&last)).then(|| module.to_owned())
    };
    let tensors = checkpoint.checkpoint.tensors.iter();
    tensors.filter_map(|t| Some((module(&t.name)?, t.dtype.to_string() != "BF16"))).collect()
}

/// The modules that are quantised are those that the lists leave over, and KV scales stand where a cache is declared.
fn check_against_lists(dir: &Path) -> usize {
    let (found, lists) = (discover(dir).unwrap(), Lists::read(dir));
    let modules = linear_modules(&found);
    assert!(!modules.is_empty(), "{}", dir.display());
    for (module, quantised) in &modules {
        assert_eq!(*quantised, lists.quantises(module), "{}: {module}", dir.display());
    }
    let config = found.config.value();
    let text = config.get("text_config").unwrap_or(config);
    let layers = text["num_hidden_layers"].as_u64().unwrap();
    let lead = if config.get("text_config").is_some() { "language_model." } else { "" };
    let wanted: BTreeSet<String> = (0..layers)
        .filter(|_| lists.kv_cache_fp8)
        .flat_map(|i| {
            ["k", "v"].map(|x| format!("{lead}model.layers.{i}.self_attn.{x}_proj.{x}_scale"))
        })
        .collect();
    let names = found.checkpoint.tensors.iter().map(|t| t.name.clone());
    let scales = names.filter(|n| n.ends_with(".k_scale") || n.ends_with(".v_scale")).collect();
    assert_eq!(wanted, scales, "{}", dir.display());
    modules.iter().filter(|(_, quantised)| *quantised).count()
}

/// Every style in which the generator declares a quantisation.
fn styles() -> Vec<Checkpoint> {
    let mut all = Vec::new();
    for &family in Generated::ALL {
        for &scheme in family.schemes() {
            for preset in [Preset::Tiny, Preset::Odd] {
                // GLM-5's prediction layer is published without copies
                let copies = family != Generated::GlmMoeDsa;
                let start = Checkpoint::new(family, scheme).preset(preset);
                let start = match scheme {
                    _ if family.schemes() == [Stored::Bf16] => start,
                    _ => start.set("mtp_copies", copies),
                };
                let switches: &[(&str, bool)] = match (family, scheme) {
                    (Generated::DeepseekV3 | Generated::GlmMoeDsa, Stored::Nvfp4) => {
                        &[("nvfp4_attention", true)]
                    }
                    (Generated::KimiK25, Stored::Mxfp4) => {
                        &[("mxfp4_shared", false), ("mxfp4_kv_b", true)]
                    }
                    (_, Stored::Mxfp4) => &[("mxfp4_shared", true)],
                    (_, Stored::Int4) => &[("int4_linears", true)],
                    _ if family.schemes() == [Stored::Bf16] => {
                        &[("attention_bias", true), ("tie_word_embeddings", true)]
                    }
                    _ => &[],
                };
                all.extend(switches.iter().map(|(key, on)| start.clone().set(key, *on)));
                let styles = family.quant_styles().iter().filter(|_| scheme == Stored::Nvfp4);
                all.extend(styles.map(|style| start.clone().set("quant_style", *style)));
                all.push(start);
            }
        }
    }
    all
}

type Form = (String, String, Vec<u64>);

fn forms(dir: &Path) -> BTreeSet<Form> {
    let tensors = discover(dir).unwrap().checkpoint.tensors;
    let name = |name: &str| match name.strip_prefix("language_model.layers.") {
        Some(rest) => format!("language_model.model.layers.{rest}"),
        None => name.to_owned(),
    };
    tensors.into_iter().map(|t| (name(&t.name), t.dtype.to_string(), t.shape)).collect()
}

/// From nothing but the configuration files of a generated checkpoint, `synth` finds out every tensor of it: name, dtype
/// and shape; and the quantised ones are those that a naive reading of the lists leaves over.
#[test]
fn configurations_of_every_style_imply_the_generators_tensors() {
    let styles = styles();
    assert!(styles.len() >= 50, "{}", styles.len());
    for checkpoint in styles {
        let scratch = Scratch::new().unwrap();
        let (from, to) = (scratch.join("from"), scratch.join("to"));
        checkpoint.write(&from).unwrap();
        Synth::like(&from).headers_only(true).write(&to).unwrap();
        let (wanted, found) = (forms(&from), forms(&to));
        let missing: Vec<_> = wanted.difference(&found).take(3).collect();
        let extra: Vec<_> = found.difference(&wanted).take(3).collect();
        let empty: Vec<&Form> = Vec::new();
        assert_eq!((missing, extra), (empty.clone(), empty), "{checkpoint:?}");
        let quantised = check_against_lists(&to);
        assert_eq!(quantised > 0, checkpoint.scheme() != Stored::Bf16, "{checkpoint:?}");
        for file in ["config.json", "hf_quant_config.json"] {
            assert_eq!(fs::read(from.join(file)).ok(), fs::read(to.join(file)).ok(), "{file}");
        }
    }
}

/// Published configurations, where the environment names a folder of them: all of it at full size, headers only.
#[test]
fn published_configurations_imply_what_their_lists_say() {
    let Some(folder) = std::env::var_os("LONGSHORE_REAL_CONFIGS").map(PathBuf::from) else {
        // past the capture of the test's output: it should be seen
        let skipped = "skipped: LONGSHORE_REAL_CONFIGS names no folder of published configurations";
        writeln!(std::io::stderr(), "{skipped}").unwrap();
        return;
    };
    let mut seen = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let from = entry.unwrap().path();
        if !from.join("config.json").is_file() {
            continue;
        }
        let scratch = Scratch::new().unwrap();
        let written = Synth::like(&from).headers_only(true).write(scratch.path()).unwrap();
        let quantised = check_against_lists(scratch.path());
        assert_eq!(quantised > 0, written.quant != "bf16", "{}", from.display());
        for tp in [1, 8] {
            let plan = planned(scratch.path(), tp, false);
            assert_eq!(plan.placement().warnings, [""; 0], "{}", from.display());
        }
        for file in ["config.json", "hf_quant_config.json"] {
            let copy = fs::read(scratch.join(file)).ok();
            assert_eq!(fs::read(from.join(file)).ok(), copy, "{}: {file}", from.display());
        }
        println!("{}: {} tensors, {quantised} modules", from.display(), written.tensors);
        seen += 1;
    }
    assert!(seen > 0, "{} holds no configuration", folder.display());
}

/// A configuration at another scale keeps its quantisation and its lists, and loads.
#[test]
fn configurations_can_be_shrunk() {
    for (family, scheme) in [
        ("kimi_k25", "nvfp4"),
        ("glm_moe_dsa", "nvfp4"),
        ("deepseek_v3", "nvfp4"),
        ("kimi_k25", "int4"),
        ("glm_moe_dsa", "fp8"),
        ("qwen3_moe", "bf16"),
    ] {
        let scratch = Scratch::new().unwrap();
        let (full, tiny) = (scratch.join("full"), scratch.join("tiny"));
        Synth::new(family, scheme).scale(Scale::Full).headers_only(true).write(&full).unwrap();
        let written = Synth::like(&full).scale(Scale::Tiny).write(&tiny).unwrap();
        assert_eq!((written.family.as_str(), written.quant.as_str()), (family, scheme));
        assert!(written.checkpoint_bytes < 64 << 20, "{family} {scheme}");
        check_against_lists(&tiny);
        for tp in [2, 4] {
            let plan = planned(&tiny, tp, false);
            assert_eq!(plan.placement().warnings, [""; 0], "{family} {scheme}");
            common::load(&plan);
        }
    }
}

fn read_bytes(dir: &Path, found: &Discovered, name: &str) -> Vec<u8> {
    let tensor = found.checkpoint.get(name).unwrap_or_else(|| panic!("{name} is missing"));
    let file = fs::read(dir.join(found.checkpoint.file_name(tensor))).unwrap();
    file[tensor.file_range.start as usize..tensor.file_range.end as usize].to_vec()
}

/// `weight_shape` holds the unpacked shape of its weight.
#[test]
fn weight_shapes_are_true() {
    let scratch = Scratch::new().unwrap();
    Synth::new("kimi_k25", "int4").write(scratch.path()).unwrap();
    let found = discover(scratch.path()).unwrap();
    let mut seen = 0;
    for tensor in &found.checkpoint.tensors {
        let Some(module) = tensor.name.strip_suffix(".weight_shape") else {
            continue;
        };
        let packed = found.checkpoint.get(&format!("{module}.weight_packed")).unwrap();
        let bytes = read_bytes(scratch.path(), &found, &tensor.name);
        let numbers = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b));
        assert_eq!(numbers.collect::<Vec<_>>(), [packed.shape[0], packed.shape[1] * 8], "{module}");
        seen += 1;
        if seen == 12 {
            break;
        }
    }
    assert_eq!(seen, 12);
}

/// Scalars are positive and finite; gate and up of one expert have the same input scale, as ModelOpt writes it.
#[test]
fn scales_are_plausible() {
    let scratch = Scratch::new().unwrap();
    Synth::new("deepseek_v3", "nvfp4").write(scratch.path()).unwrap();
    let found = discover(scratch.path()).unwrap();
    let scalar = |name: &str| {
        let bytes = read_bytes(scratch.path(), &found, name);
        f32::from_le_bytes(bytes.try_into().unwrap())
    };
    let mut seen = 0;
    for tensor in found.checkpoint.tensors.iter().filter(|t| t.shape.is_empty()).take(60) {
        let value = scalar(&tensor.name);
        assert!(value > 1e-5 && value < 4.0, "{}: {value}", tensor.name);
        seen += 1;
    }
    assert_eq!(seen, 60);
    let of =
        |part: &str, what: &str| scalar(&format!("model.layers.1.mlp.experts.3.{part}.{what}"));
    assert_eq!(of("gate_proj", "input_scale"), of("up_proj", "input_scale"));
    assert_ne!(of("gate_proj", "weight_scale_2"), of("up_proj", "weight_scale_2"));
}

fn command(arguments: &[&str]) -> (Option<i32>, String, String) {
    let run = Command::new(env!("CARGO_BIN_EXE_longshore")).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (run.status.code(), text(&run.stdout), text(&run.stderr))
}

/// Options stand before or after DIR; without a scale a configuration is taken at its full size.
#[test]
fn the_command_takes_options_in_any_order() {
    let scratch = Scratch::new().unwrap();
    let [from, a, b] = ["from", "a", "b"].map(|n| scratch.join(n).to_str().unwrap().to_owned());
    let first = [
        "synth",
        "--model",
        "deepseek_v3",
        "--quant",
        "nvfp4",
        "--scale",
        "full",
        "--layers",
        "5",
        "--headers-only",
        &from,
        "--json",
    ];
    let (code, out, complaint) = command(&first);
    assert_eq!(code, Some(0), "{complaint}");
    let first: Value = serde_json::from_str(&out).unwrap();
    for arguments in [
        ["synth", &a, "--config", &from, "--headers-only", "--json"],
        ["synth", "--json", "--headers-only", "--config", &from, &b],
    ] {
        let (code, out, complaint) = command(&arguments);
        assert_eq!(code, Some(0), "{complaint}");
        let second: Value = serde_json::from_str(&out).unwrap();
        for key in ["tensors", "checkpoint_bytes", "family", "quant"] {
            assert_eq!(first[key], second[key], "{key}");
        }
    }
    assert_eq!(forms(Path::new(&from)), forms(Path::new(&a)));
    for arguments in [
        &["synth", &a][..],
        &["synth", &a, "--model", "deepseek_v3"],
        &["synth", &a, "--quant", "fp8"],
        &["synth", &a, "--config", &from, "--model", "deepseek_v3", "--quant", "fp8"],
        &["synth", &a, "--model", "deepseek_v3", "--quant", "int4"],
        &["synth", &a, "--model", "gpt", "--quant", "bf16"],
        &["synth", &a, "--config", "/nowhere"],
    ] {
        let (code, out, complaint) = command(arguments);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}: {complaint}");
        assert_eq!(complaint.lines().count(), 1, "{arguments:?}: {complaint}");
    }
}

/// The one mistake that would cost a real checkpoint.
#[test]
fn a_checkpoint_is_not_overwritten_after_its_own_configuration() {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    Checkpoint::new(Generated::Llama, Stored::Bf16).write(&dir).unwrap();
    let before = fs::read(dir.join("model.safetensors.index.json")).unwrap();
    let refused = Synth::like(&dir).write(&dir).unwrap_err();
    assert!(refused.line().contains("holds a checkpoint"), "{}", refused.line());
    assert_eq!(fs::read(dir.join("model.safetensors.index.json")).unwrap(), before);
}
