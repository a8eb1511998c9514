//! Reload in place: B over A equals a fresh load of B, at the same addresses; what cannot be loaded whole changes nothing.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::Command,
};

use longshore::{
    digest::group_digest,
    error::LoadError,
    group::Group,
    load::{RunOptions, load, progress_of},
    plan::{Exchange, Plan},
};
use longshore_harness::{
    compare,
    generator::{Break, Checkpoint, Family, Preset, Scheme},
    oracle,
    scratch::Scratch,
};

mod common;
#[path = "common/mixed.rs"]
mod mixed;

use common::{plan, runtime};
use mixed::{mix, settle};

fn start(plan: &Plan) -> Group {
    let done = runtime().block_on(load(plan, &RunOptions::default(), progress_of(plan)));
    done.unwrap_or_else(|e| panic!("{}", e.line()))
}

fn reload(group: &mut Group, plan: &Plan) -> Result<(), LoadError> {
    runtime().block_on(group.reload(plan, progress_of(plan)))
}

fn digest(group: &Group) -> String {
    group_digest(group.ranks().unwrap()).unwrap()
}

fn addresses(group: &Group) -> Vec<u64> {
    let ranks = group.ranks().unwrap();
    ranks.iter().flat_map(|r| r.iter().map(|p| p.data.address())).collect()
}

/// Two checkpoints that differ in their weights only.
fn pair(scratch: &Scratch, checkpoint: &Checkpoint) -> [PathBuf; 2] {
    [1, 2].map(|seed| {
        let dir = scratch.join(&format!("checkpoint-{seed}"));
        checkpoint.clone().seed(seed).write(&dir).unwrap();
        dir
    })
}

fn check(checkpoint: &Checkpoint, options: &oracle::Options) -> bool {
    let scratch = Scratch::new().unwrap();
    let [a, b] = pair(&scratch, checkpoint);
    // what this layout cannot take is refused at once, as for a first load
    let Ok(plan_a) = plan(&a, options, Exchange::On) else { return false };
    let plan_b = plan(&b, options, Exchange::On).unwrap();
    let what = format!("{checkpoint:?} {:?}", options.arguments());
    let (fresh_a, fresh_b) = (digest(&start(&plan_a)), digest(&start(&plan_b)));
    assert_ne!(fresh_a, fresh_b, "{what}: the two checkpoints differ");
    let mut group = start(&plan_a);
    let first = addresses(&group);
    for (number, (next, want, source)) in
        [(&plan_b, &fresh_b, &b), (&plan_a, &fresh_a, &a), (&plan_b, &fresh_b, &b)]
            .into_iter()
            .enumerate()
    {
        reload(&mut group, next).unwrap_or_else(|e| panic!("{what}: {}", e.line()));
        assert_eq!(&digest(&group), want, "{what}: reload {number}");
        assert_eq!(addresses(&group), first, "{what}: reload {number}");
        assert_eq!(group.source(), source, "{what}: reload {number}");
        assert_eq!(group.generation(), number as u64 + 2, "{what}");
    }
    true
}

#[test]
fn every_family_scheme_and_layout_reloads_to_what_a_fresh_load_gives() {
    let mut checked = 0;
    for &family in Family::ALL {
        for &scheme in family.schemes() {
            for preset in [Preset::Tiny, Preset::Odd] {
                let checkpoint =
                    Checkpoint::new(family, scheme).preset(preset).set("num_hidden_layers", 2);
                for layout in [None, Some("none"), Some("flashinfer-cutlass"), Some("trtllm")] {
                    for ep in [1, 2] {
                        let mut options = oracle::Options::tp(2).ep(ep);
                        options.kernel_layout = layout.map(str::to_owned);
                        checked += usize::from(check(&checkpoint, &options));
                    }
                }
            }
        }
    }
    assert!(checked >= 100, "only {checked} combinations were reloaded");
}

/// Padding that post-processing moved is zero again: experts of 96 rows padded to 128, rows shuffled.
#[test]
fn padded_parameters_reload_to_what_a_fresh_load_gives() {
    for (family, scheme, layout) in [
        (Family::KimiK25, Scheme::Nvfp4, "trtllm"),
        (Family::Qwen3Moe, Scheme::Bf16, "trtllm"),
        (Family::DeepseekV3, Scheme::Nvfp4, "trtllm"),
    ] {
        let checkpoint = Checkpoint::new(family, scheme)
            .set("moe_intermediate_size", 96)
            .set("num_hidden_layers", 2);
        for tp in [1, 2] {
            let options = oracle::Options::tp(tp).kernel_layout(layout);
            assert!(check(&checkpoint, &options), "{checkpoint:?} {layout} tp {tp}");
        }
    }
    let kimi = Checkpoint::new(Family::KimiK25, Scheme::Mxfp4)
        .preset(Preset::Odd)
        .set("moe_intermediate_size", 576)
        .set("num_hidden_layers", 2);
    assert!(check(&kimi, &oracle::Options::tp(2).kernel_layout("aiter")));
}

fn broken(scratch: &Scratch, kind: Break) -> PathBuf {
    let dir = scratch.join(kind.name());
    Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4)
        .seed(3)
        .break_with(kind)
        .write(&dir)
        .unwrap();
    dir
}

fn truncate(dir: &Path, plan: &Plan) -> PathBuf {
    let file = &plan.checkpoint().files[1];
    let path = dir.join(&file.name);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(file.bytes / 2).unwrap();
    path
}

#[test]
fn what_cannot_be_loaded_whole_is_refused_before_the_first_write() {
    let scratch = Scratch::new().unwrap();
    let [a, b] = pair(&scratch, &Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4));
    let options = oracle::Options::tp(2);
    let plan_a = plan(&a, &options, Exchange::On).unwrap();
    let mut group = start(&plan_a);
    let before = digest(&group);
    for kind in [Break::WrongShape, Break::MissingScale, Break::TruncatedFile] {
        let error = plan(&broken(&scratch, kind), &options, Exchange::On).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{}", error.line());
    }
    // other dimensions, another layout, another group: not the same parameters
    let larger = scratch.join("larger");
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4);
    checkpoint.clone().set("num_hidden_layers", 4).write(&larger).unwrap();
    for (dir, options) in [
        (&larger, options.clone()),
        (&b, options.clone().kernel_layout("none")),
        (&b, oracle::Options::tp(1)),
    ] {
        let other = plan(dir, &options, Exchange::On).unwrap();
        let error = reload(&mut group, &other).unwrap_err();
        assert!(error.line().contains("cannot be loaded in place"), "{}", error.line());
        assert_eq!(error.exit_code(), 2);
    }
    // truncated after it was planned
    let plan_b = plan(&b, &options, Exchange::On).unwrap();
    truncate(&b, &plan_b);
    let error = reload(&mut group, &plan_b).unwrap_err();
    assert!(matches!(error, LoadError::FileChanged { .. }), "{}", error.line());
    assert_eq!((digest(&group), group.generation()), (before, 1), "untouched");
}

/// A failure after the first write: the values of one scale contradict each other, which only shows when they are read.
fn failing(scratch: &Scratch, options: &oracle::Options) -> Plan {
    let dir = scratch.join("failing");
    let kv = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).set("quant_style", "v31");
    kv.seed(4).write(&dir).unwrap();
    let whole = plan(&dir, options, Exchange::On).unwrap();
    let tensor = whole.checkpoint().tensors.iter().find(|t| t.name.ends_with("k_proj.k_scale"));
    let tensor = tensor.unwrap();
    let path = dir.join(whole.checkpoint().file_name(tensor));
    let file = OpenOptions::new().write(true).open(path).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&(-1.0f32).to_le_bytes(), tensor.file_range.start).unwrap();
    plan(&dir, options, Exchange::On).unwrap()
}

#[test]
fn a_reload_that_fails_while_writing_puts_the_old_weights_back() {
    let scratch = Scratch::new().unwrap();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).set("quant_style", "v31");
    let [a, b] = pair(&scratch, &checkpoint);
    let options = oracle::Options::tp(2).kernel_layout("trtllm");
    let plan_a = plan(&a, &options, Exchange::On).unwrap();
    let mut group = start(&plan_a);
    let (before, at) = (digest(&group), addresses(&group));
    let failing = failing(&scratch, &options);
    let error = reload(&mut group, &failing).unwrap_err();
    let LoadError::Reload { kept, not_restored, .. } = &error else {
        panic!("{}", error.line());
    };
    assert_eq!((kept, not_restored), (&a, &None), "{}", error.line());
    assert!(error.line().contains("v_scale"), "{}", error.line());
    assert_eq!((digest(&group), addresses(&group)), (before, at));
    assert_eq!(group.source(), a, "the label changes only on success");

    // the old checkpoint is gone as well: nobody is handed a mix, until a whole one is loaded
    truncate(&a, &plan_a);
    let error = reload(&mut group, &failing).unwrap_err();
    assert!(error.line().contains("not ready"), "{}", error.line());
    let refused = group.ranks().unwrap_err();
    assert!(refused.line().contains("not ready"), "{}", refused.line());
    let plan_b = plan(&b, &options, Exchange::On).unwrap();
    reload(&mut group, &plan_b).unwrap_or_else(|e| panic!("{}", e.line()));
    assert_eq!(digest(&group), digest(&start(&plan_b)));
}

/// `load A --reload B --reload A --reload B --out` leaves B's parameters; a broken B leaves nothing at all.
#[test]
fn the_command_line_reloads_in_turn_and_writes_the_last() {
    let scratch = Scratch::new().unwrap();
    let [a, b] = pair(&scratch, &Checkpoint::new(Family::KimiK25, Scheme::Int4));
    let out = scratch.join("out");
    let load = |arguments: &[&Path]| {
        let run = Command::new(env!("CARGO_BIN_EXE_longshore"))
            .args(["load", "--tp", "2", "--json", "--log-level", "error"])
            .args(arguments)
            .output()
            .unwrap();
        (run.status.code(), run.stdout, String::from_utf8_lossy(&run.stderr).into_owned())
    };
    let reload = Path::new("--reload");
    let (code, json, complaint) =
        load(&[&a, reload, &b, reload, &a, reload, &b, Path::new("--out"), &out]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    let report: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let options = oracle::Options::tp(2);
    let fresh = digest(&start(&plan(&b, &options, Exchange::On).unwrap()));
    assert_eq!((report["digest"].as_str(), &report["generation"]), (Some(&*fresh), &4.into()));
    compare::with_answer(&out, &oracle::answer(&b, &options).unwrap())
        .unwrap_or_else(|e| panic!("{e}"));

    let (broken, nowhere) = (broken(&scratch, Break::MissingScale), scratch.join("nowhere"));
    let (code, json, complaint) = load(&[&a, reload, &broken, Path::new("--out"), &nowhere]);
    assert_eq!((code, json.len(), complaint.lines().count()), (Some(2), 0, 1), "{complaint}");
    assert!(!nowhere.exists());
}

/// Takes a tensor out of a checkpoint: out of its file, and out of the index.
fn drop_tensor(dir: &Path, plan: &Plan, name: &str) {
    let tensor = plan.checkpoint().get(name).unwrap();
    let path = dir.join(plan.checkpoint().file_name(tensor));
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = file.tensors().into_iter().filter(|(n, _)| n != name).collect();
    safetensors::serialize_to_file(kept, None, &path).unwrap();
    let path = dir.join("model.safetensors.index.json");
    let mut index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    index["weight_map"].as_object_mut().unwrap().remove(name).unwrap();
    std::fs::write(&path, index.to_string()).unwrap();
}

/// A scale that one checkpoint has and another leaves to be derived is the same parameter.
#[test]
fn a_derived_scale_and_a_given_one_reload_into_each_other() {
    let scratch = Scratch::new().unwrap();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).set("kv_scales", true);
    let [a, b] = pair(&scratch, &checkpoint);
    let options = oracle::Options::tp(2);
    let plan_a = plan(&a, &options, Exchange::On).unwrap();
    let whole = plan(&b, &options, Exchange::On).unwrap();
    drop_tensor(&b, &whole, "model.layers.0.self_attn.v_proj.v_scale");
    let plan_b = plan(&b, &options, Exchange::On).unwrap();
    let [fresh_a, fresh_b] = [&plan_a, &plan_b].map(|plan| digest(&start(plan)));
    let mut group = start(&plan_a);
    for (next, want) in [(&plan_b, &fresh_b), (&plan_a, &fresh_a), (&plan_b, &fresh_b)] {
        reload(&mut group, next).unwrap_or_else(|e| panic!("{}", e.line()));
        assert_eq!(&digest(&group), want);
    }
}

/// The same parameters for other kernels are not the same: up before gate here, gate before up there.
#[test]
fn another_layout_is_refused_even_where_names_and_shapes_agree() {
    let scratch = Scratch::new().unwrap();
    let [a, b] = pair(&scratch, &Checkpoint::new(Family::Qwen3Moe, Scheme::Bf16));
    let with = |dir: &Path, layout: &str| {
        plan(dir, &oracle::Options::tp(2).kernel_layout(layout), Exchange::On).unwrap()
    };
    let mut group = start(&with(&a, "cutlass"));
    let error = reload(&mut group, &with(&b, "flashinfer-cutlass")).unwrap_err();
    assert!(error.line().contains("kernel layout"), "{}", error.line());
}

/// Small checkpoints of five files each, with everything that ties parameters together: fused, shared between them, derived
/// from several, finished in place, padded.
fn in_five_files() -> Vec<(Checkpoint, Option<&'static str>)> {
    let of = |family, scheme| Checkpoint::new(family, scheme).set("num_hidden_layers", 2).files(5);
    let padded = of(Family::DeepseekV3, Scheme::Nvfp4).set("moe_intermediate_size", 96);
    vec![
        (of(Family::Llama, Scheme::Bf16), None),
        (of(Family::Llama, Scheme::Bf16).set("tie_word_embeddings", true), None),
        (of(Family::DeepseekV3, Scheme::Bf16), None),
        (of(Family::DeepseekV3, Scheme::Fp8), None),
        (of(Family::DeepseekV3, Scheme::Nvfp4), None),
        (padded, Some("trtllm")),
        (of(Family::GlmMoeDsa, Scheme::Mxfp4), Some("aiter")),
        (of(Family::KimiK25, Scheme::Int4), None),
    ]
}

/// `a` and, in the same files as that, others: of `one` another file is other, of `two` two more are, `all` has none of `a`.
fn mixtures(scratch: &Scratch, number: usize, checkpoint: &Checkpoint) -> [PathBuf; 4] {
    let dir = |name: &str| scratch.join(&format!("{name}-{number}"));
    let (a, b) = (dir("a"), dir("b"));
    checkpoint.clone().seed(1).write(&a).unwrap();
    checkpoint.clone().seed(2).write(&b).unwrap();
    mix(&a, &b, &dir("one"), |file| file == 2);
    mix(&a, &b, &dir("two"), |file| file == 1 || file == 4);
    mix(&a, &b, &dir("all"), |_| true);
    [a, dir("one"), dir("two"), dir("all")]
}

/// Weight bytes that the last load of a group asked of storage.
fn read_bytes(group: &Group) -> u64 {
    group.reports.iter().map(|report| report.storage_bytes_read).sum()
}

/// Files that are the same are not read again, nor is anything of them written; what belongs to other bytes is.
#[test]
fn a_reload_reads_the_files_that_differ_and_what_belongs_to_their_bytes() {
    let scratch = Scratch::new().unwrap();
    let cases: Vec<_> = in_five_files()
        .into_iter()
        .enumerate()
        .map(|(number, (checkpoint, layout))| (mixtures(&scratch, number, &checkpoint), layout))
        .collect();
    settle(scratch.path());
    for (dirs, layout) in &cases {
        for (tp, exchange) in [(1, Exchange::On), (2, Exchange::On), (2, Exchange::Off)] {
            let mut options = oracle::Options::tp(tp);
            options.kernel_layout = layout.map(str::to_owned);
            let plans = dirs.each_ref().map(|dir| plan(dir, &options, exchange).unwrap());
            let fresh = plans.each_ref().map(|plan| digest(&start(plan)));
            let mut group = start(&plans[0]);
            let (first, mut some) = (addresses(&group), 0);
            for (step, next) in [0, 1, 1, 2, 0, 2, 1, 3, 3].into_iter().enumerate() {
                let what = format!("{} tp {tp} {exchange:?}, step {step}", dirs[next].display());
                let before = group.source() == dirs[next];
                // as a server does: what is there now is planned anew
                let plan = plan(&dirs[next], &options, exchange).unwrap();
                reload(&mut group, &plan).unwrap_or_else(|e| panic!("{what}: {}", e.line()));
                assert_eq!(digest(&group), fresh[next], "{what}");
                assert_eq!(addresses(&group), first, "{what}");
                let (read, kept) = (read_bytes(&group), group.kept_bytes);
                if before {
                    assert_eq!((read, kept), (0, plan.needed_bytes), "{what}");
                } else if next == 3 {
                    assert_eq!(kept, 0, "{what}");
                } else {
                    some += usize::from(kept > 0);
                    assert!(read > 0, "{what}");
                }
                // without exchange ranks read the same, but none reads what is there
                if exchange == Exchange::On {
                    assert_eq!(read + kept, plan.needed_bytes, "{what}");
                }
            }
            assert_eq!(some, 5, "{dirs:?}: parts of them stay");
        }
    }
}

/// Nothing but the bytes tells that a file is another: not its name, length or time of writing.
#[test]
fn a_file_that_was_written_over_in_place_is_read_again() {
    let scratch = Scratch::new().unwrap();
    let checkpoint = Checkpoint::new(Family::DeepseekV3, Scheme::Fp8).files(5);
    let [a, one, ..] = mixtures(&scratch, 0, &checkpoint);
    settle(scratch.path());
    let options = oracle::Options::tp(2);
    let plan_of = |dir: &Path| plan(dir, &options, Exchange::On).unwrap();
    let mut group = start(&plan_of(&a));
    let before = digest(&group);
    let name = "model-00002-of-00005.safetensors";
    let modified = std::fs::metadata(a.join(name)).unwrap().modified().unwrap();
    let other = std::fs::read(one.join(name)).unwrap();
    std::fs::write(a.join(name), other).unwrap();
    let times = std::fs::FileTimes::new().set_modified(modified);
    OpenOptions::new().write(true).open(a.join(name)).unwrap().set_times(times).unwrap();
    let plan_a = plan_of(&a);
    reload(&mut group, &plan_a).unwrap_or_else(|e| panic!("{}", e.line()));
    assert_eq!(digest(&group), digest(&start(&plan_of(&one))));
    assert_ne!(digest(&group), before);
    assert!(group.kept_bytes > 0 && read_bytes(&group) > 0);
    assert_eq!(read_bytes(&group) + group.kept_bytes, plan_a.needed_bytes);
}

/// What was kept was not written, so it is kept when the rest is taken back; where that fails as well, nothing is trusted.
#[test]
fn a_reload_that_fails_takes_back_what_it_has_written_alone() {
    let scratch = Scratch::new().unwrap();
    let checkpoint =
        Checkpoint::new(Family::DeepseekV3, Scheme::Nvfp4).set("quant_style", "v31").files(5);
    let [a, one, two, _] = mixtures(&scratch, 0, &checkpoint);
    let options = oracle::Options::tp(2).kernel_layout("trtllm");
    let plan_of = |dir: &Path| plan(dir, &options, Exchange::On).unwrap();
    // the scale that makes it fail is in a file of its own; all other files that hold anything else are those of `a`
    let whole = plan_of(&a);
    let tensors = &whole.checkpoint().tensors;
    let scale = tensors.iter().find(|t| t.name.ends_with("k_proj.k_scale")).unwrap();
    let name = whole.checkpoint().file_name(scale);
    let bad = scratch.join("bad");
    mix(&a, &two, &bad, |file| name.contains(&format!("-{file:05}-")));
    let file = OpenOptions::new().write(true).open(bad.join(name)).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&(-1.0f32).to_le_bytes(), scale.file_range.start).unwrap();
    settle(scratch.path());
    let plan_a = plan_of(&a);
    let mut group = start(&plan_a);
    let (before, at) = (digest(&group), addresses(&group));
    for generation in [3, 5] {
        let error = reload(&mut group, &plan_of(&bad)).unwrap_err();
        let LoadError::Reload { not_restored: None, .. } = &error else {
            panic!("{}", error.line());
        };
        assert_eq!((digest(&group), addresses(&group)), (before.clone(), at.clone()));
        assert_eq!(group.generation(), generation);
        let (read, kept) = (read_bytes(&group), group.kept_bytes);
        assert!(kept > 0 && read > 0, "{kept} {read}");
        assert_eq!(read + kept, plan_a.needed_bytes);
    }
    // what is there is known again, all of it
    let plan_one = plan_of(&one);
    reload(&mut group, &plan_one).unwrap_or_else(|e| panic!("{}", e.line()));
    assert_eq!(digest(&group), digest(&start(&plan_one)));
    assert!(group.kept_bytes > 0);
    reload(&mut group, &plan_a).unwrap_or_else(|e| panic!("{}", e.line()));
    assert_eq!(digest(&group), before);

    // as if it had been written: what it was before can no longer be read, by either name
    let last = a.join("model-00005-of-00005.safetensors");
    let times = std::fs::FileTimes::new().set_modified(std::time::SystemTime::now());
    OpenOptions::new().write(true).open(last).unwrap().set_times(times).unwrap();
    let error = reload(&mut group, &plan_of(&bad)).unwrap_err();
    assert!(error.line().contains("not ready"), "{}", error.line());
    group.ranks().unwrap_err();
    settle(scratch.path());
    for (dir, kept_all) in [(&one, false), (&one, true)] {
        let plan = plan_of(dir);
        reload(&mut group, &plan).unwrap_or_else(|e| panic!("{}", e.line()));
        assert_eq!(digest(&group), digest(&start(&plan)));
        assert_eq!(group.kept_bytes > 0, kept_all, "of what is not known nothing is kept");
    }
}
