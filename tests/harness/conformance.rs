//! The harness against the conformance cases: its generator and its oracle must be right before
//! they may judge a loader.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::cases::{Case, cases};
use crate::compare::{Expectation, sha256};
use crate::generator::{Break, Checkpoint, Family, Preset, Scheme};
use crate::oracle::{self, Options};
use crate::scratch::Scratch;

/// Generates a checkpoint and hands it over.
fn with_checkpoint(checkpoint: &Checkpoint, test: impl FnOnce(&Path)) {
    let scratch = Scratch::new().unwrap();
    let directory = scratch.join("checkpoint");
    checkpoint.write(&directory).unwrap();
    test(&directory);
}

fn digests(directory: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let digest = |path: std::path::PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, sha256(&fs::read(path).unwrap()))
    };
    entries.filter(|path| path.is_file()).map(digest).collect()
}

/// Every file of every case's checkpoint, configuration files included, has the recorded digest.
#[test]
fn every_generated_file_has_its_recorded_digest() {
    assert_eq!(cases().len(), 20);
    for case in cases() {
        with_checkpoint(&case.checkpoint, |directory| {
            let expected = case.expected();
            let recorded = expected["checkpoint_sha256"].as_object().unwrap();
            let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
            let want: BTreeMap<_, _> =
                recorded.iter().map(|(name, digest)| (name.clone(), text(digest))).collect();
            assert_eq!(digests(directory), want, "{}", case.name);
        });
    }
}

/// The oracle's answer to every case has each parameter's dtype, shape and digest, and the aliases.
#[test]
fn oracle_agrees_with_every_case() {
    let mut failures = Vec::new();
    for case in cases() {
        with_checkpoint(&case.checkpoint, |directory| {
            let answer = oracle::answer(directory, &case.options).unwrap();
            let expectation = Expectation::of_case(&case);
            let count: usize = expectation.ranks.iter().map(|rank| rank.parameters.len()).sum();
            match expectation.check_answer(&answer) {
                Ok(equal) => assert_eq!(equal, count, "{}", case.name),
                Err(lines) => failures.push(format!("{}\n{lines}", case.name)),
            }
        });
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// The options of a case are the arguments that its expectation records.
#[test]
fn options_of_cases_are_the_recorded_arguments() {
    for Case { name, options, .. } in cases() {
        let expected = crate::cases::case_named(&name).expected();
        let recorded = expected["arguments"].as_array().unwrap();
        let want: Vec<_> = recorded.iter().map(|a| a.as_str().unwrap()).collect();
        assert_eq!(options.arguments(), want, "{name}");
    }
}

/// Every kind of damage writes the bytes that it is defined by.
#[test]
fn damaged_checkpoints_have_their_recorded_digests() {
    let mut all = String::new();
    for kind in Break::ALL {
        let scratch = Scratch::new().unwrap();
        let written = Checkpoint::new(Family::KimiK25, Scheme::Nvfp4)
            .preset(Preset::Odd)
            .seed(9)
            .break_with(*kind)
            .write(&scratch.join("checkpoint"))
            .unwrap();
        assert_eq!(written.message_names_one_of.is_empty(), *kind == Break::NonfiniteOk);
        for (name, digest) in digests(scratch.path()) {
            all.push_str(&format!("{} {name} {digest}\n", kind.name()));
        }
        for (name, digest) in digests(&scratch.join("checkpoint")) {
            all.push_str(&format!("{} {name} {digest}\n", kind.name()));
        }
    }
    assert_eq!(sha256(all.as_bytes()), DAMAGE_SHA256, "\n{all}");
}

const DAMAGE_SHA256: &str = "f7694b48badf9c8581440c889a1e0f15d70d5ad8a824d5190fdc5a5f7ad10149";

/// In every family and scheme, whatever the options, the oracle either refuses or accounts for each
/// tensor of the checkpoint.
#[test]
fn oracle_looks_at_every_tensor_that_is_not_to_be_skipped() {
    let mut loaded = 0;
    for family in Family::ALL {
        for scheme in family.schemes() {
            for preset in Preset::ALL {
                let checkpoint = Checkpoint::new(*family, *scheme).preset(*preset).seed(3);
                with_checkpoint(&checkpoint, |directory| {
                    for options in option_mix(*scheme) {
                        let Ok(answer) = oracle::answer(directory, &options) else {
                            continue;
                        };
                        loaded += 1;
                        for name in &answer.skipped {
                            let why =
                                format!("{family:?} {scheme:?} {preset:?} {options:?} {name}");
                            assert!(may_be_skipped(name, &options), "{why}");
                        }
                    }
                });
            }
        }
    }
    assert!(loaded > 200, "only {loaded} loads were not refused");
}

/// Layers of the presets are 0, 1 and 2; layer 3 is the prediction layer.
fn may_be_skipped(name: &str, options: &Options) -> bool {
    let vision = name.starts_with("vision_tower") || name.starts_with("mm_projector");
    if options.draft {
        let copy = name.contains("layers.3.embed_tokens") || name.contains("shared_head.head");
        return copy || !name.contains("layers.3.");
    }
    match vision {
        true => options.language_only,
        false => options.encoder_only || name.contains("layers.3."),
    }
}

fn option_mix(scheme: Scheme) -> Vec<Options> {
    let layouts: &[Option<&str>] = match scheme {
        Scheme::Mxfp4 => &[None, Some("none"), Some("aiter")],
        Scheme::Int4 => &[None, Some("none")],
        _ => &[None, Some("none"), Some("flashinfer-cutlass"), Some("trtllm")],
    };
    let plain = [Options::tp(1), Options::tp(2), Options::tp(2).ep(2), Options::tp(4).ep(2)];
    let mut mix = Vec::new();
    for options in plain {
        for layout in layouts {
            let kernel_layout = layout.map(str::to_owned);
            let options = Options { kernel_layout, ..options.clone() };
            mix.push(options.clone().fuse_shared_experts());
            mix.push(options.clone().draft());
            mix.push(options);
        }
    }
    mix.push(Options::tp(2).language_only());
    mix.push(Options::tp(4).encoder_only());
    mix
}

/// One example of each kind of refusal, beside what is almost the same and is loaded.
#[test]
fn what_does_not_fit_is_refused() {
    use Family::{DeepseekV3, GlmMoeDsa, KimiK25, Llama};
    use Scheme::{Bf16, Fp8, Int4, Mxfp4, Nvfp4};
    let tiny = |family, scheme| Checkpoint::new(family, scheme);
    let two = || Options::tp(2);
    let thirds = tiny(Llama, Bf16)
        .set("num_attention_heads", 6)
        .set("num_key_value_heads", 3)
        .set("intermediate_size", 192);
    let accepted = [
        (thirds.clone().set("vocab_size", 192), Options::tp(3)),
        (tiny(Llama, Bf16), Options::tp(8)),
        (tiny(DeepseekV3, Bf16), two().draft()),
        (tiny(KimiK25, Mxfp4), two().kernel_layout("aiter")),
        (tiny(KimiK25, Bf16), two().encoder_only()),
        (tiny(DeepseekV3, Nvfp4), two().fuse_shared_experts()),
        (tiny(DeepseekV3, Bf16).set("n_shared_experts", 2), two()),
    ];
    let refused = [
        (tiny(Llama, Bf16), Options::tp(3)),
        (tiny(Llama, Bf16).set("num_key_value_heads", 8), Options::tp(16)),
        (tiny(Llama, Bf16), two().kernel_layout("aiter")),
        (tiny(Llama, Bf16), two().draft()),
        (tiny(Llama, Bf16), two().language_only()),
        (thirds.clone().set("vocab_size", 512), Options::tp(3)),
        (tiny(KimiK25, Mxfp4), two().kernel_layout("trtllm")),
        (tiny(KimiK25, Int4), two().kernel_layout("cutlass")),
        (tiny(KimiK25, Bf16), two().encoder_only().language_only()),
        (tiny(KimiK25, Int4), two().fuse_shared_experts()),
        (tiny(KimiK25, Bf16), two().draft()),
        (tiny(DeepseekV3, Bf16).set("n_shared_experts", 2), two().fuse_shared_experts()),
        (tiny(DeepseekV3, Bf16).set("n_routed_experts", 5), two().ep(2)),
        (tiny(DeepseekV3, Fp8), Options::tp(4)),
        (tiny(DeepseekV3, Fp8).set("q_lora_rank", 192), two()),
        (tiny(DeepseekV3, Nvfp4).set("moe_intermediate_size", 96), two()),
        (tiny(GlmMoeDsa, Nvfp4).set("hidden_size", 192), two().kernel_layout("trtllm")),
    ];
    for (checkpoint, options) in accepted {
        with_checkpoint(&checkpoint, |directory| {
            let answer = oracle::answer(directory, &options);
            assert!(answer.is_ok(), "{checkpoint:?} {options:?}: {answer:?}");
        });
    }
    for (checkpoint, options) in refused {
        with_checkpoint(&checkpoint, |directory| {
            let answer = oracle::answer(directory, &options);
            assert!(answer.is_err(), "{checkpoint:?} {options:?}");
        });
    }
}
