//! The comparison must see every kind of difference.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::*;
use crate::cases::case_named;
use crate::compare::expectation::sha256;
use crate::oracle;
use crate::scratch::Scratch;

/// Writes an answer as a load would.
fn write_output(directory: &Path, answer: &Answer) {
    fs::create_dir_all(directory).unwrap();
    let count = answer.ranks.len();
    let mut ranks = Vec::new();
    for (number, rank) in answer.ranks.iter().enumerate() {
        let file = format!("rank-{number:05}-of-{count:05}.safetensors");
        write_rank(&directory.join(&file), rank);
        let parameters: serde_json::Map<String, Value> = rank
            .parameters
            .iter()
            .map(|(name, p)| {
                let (bytes, sha256) = (p.bytes.len(), sha256(&p.bytes));
                let value =
                    json!({"dtype": p.dtype, "shape": p.shape, "bytes": bytes, "sha256": sha256});
                (name.clone(), value)
            })
            .collect();
        ranks.push(json!({
            "rank": number, "file": file, "aliases": rank.aliases, "parameters": parameters,
        }));
    }
    let manifest = json!({
        "source": "/some/where", "family": answer.family, "quant": answer.quant, "tp": answer.tp,
        "ep": answer.ep, "kernel_layout": answer.kernel_layout, "ranks": ranks,
    });
    fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
}

fn write_rank(path: &Path, rank: &Rank) {
    let dtype = |name: &str| match name {
        "BF16" => Dtype::BF16,
        "F32" => Dtype::F32,
        "U8" => Dtype::U8,
        "F8_E4M3" => Dtype::F8_E4M3,
        other => panic!("{other}"),
    };
    let views = rank.parameters.iter().map(|(name, p)| {
        let shape = p.shape.iter().map(|d| *d as usize).collect();
        (name.clone(), TensorView::new(dtype(&p.dtype), shape, &p.bytes).unwrap())
    });
    let aliases = rank.aliases.iter().map(|(d, s)| (format!("alias:{d}"), s.clone()));
    let metadata: HashMap<String, String> = aliases.collect();
    let blob = safetensors::serialize(views.collect::<Vec<_>>(), Some(metadata)).unwrap();
    fs::write(path, blob).unwrap();
}

/// What the test does to a good answer before it is written.
type Edit = fn(&mut Answer);

/// An output equals its own answer and its case; each edit of it is found and named.
#[test]
fn differences_are_found_and_named() {
    let scratch = Scratch::new().unwrap();
    let case = case_named("dsv3-nvfp4-tiny-cutlass-tp2");
    case.checkpoint.write(&scratch.join("checkpoint")).unwrap();
    let answer = oracle::answer(&scratch.join("checkpoint"), &case.options).unwrap();
    let out = scratch.join("out");
    write_output(&out, &answer);
    assert_eq!(with_answer(&out, &answer), Ok(122));
    assert_eq!(with_case(&out, &case), Ok(122));

    const W13: &str = "model.layers.1.mlp.experts.w13_weight";
    let edits: [(Edit, &str); 7] = [
        (
            |a| a.ranks[1].parameters.get_mut(W13).unwrap().bytes[70] ^= 1,
            "rank 1: model.layers.1.mlp.experts.w13_weight: U8 [4, 128, 64] differs from byte 70",
        ),
        (
            |a| a.ranks[0].parameters.get_mut(W13).unwrap().shape = vec![2, 256, 64],
            "want U8 [4, 128, 64], got U8 [2, 256, 64]",
        ),
        (
            |a| drop(a.ranks[0].parameters.remove("model.norm.weight")),
            "rank 0: model.norm.weight: missing",
        ),
        (
            |a| {
                let norm = a.ranks[0].parameters["model.norm.weight"].clone();
                a.ranks[0].parameters.insert("model.more".into(), norm);
            },
            "rank 0: model.more: not expected",
        ),
        (
            |a| drop(a.ranks[1].aliases.pop_first()),
            "rank 1: alias model.layers.0.mlp.down_proj.weight_scale_interleaved: want Some",
        ),
        (|a| a.kernel_layout = "trtllm".into(), "kernel_layout: want \"cutlass\", got \"trtllm\""),
        (|a| drop(a.ranks.pop()), "rank-00000-of-00001.safetensors: not expected"),
    ];
    for (edit, message) in edits {
        fs::remove_dir_all(&out).unwrap();
        let mut edited = answer.clone();
        edit(&mut edited);
        write_output(&out, &edited);
        let lines = with_answer(&out, &answer).unwrap_err();
        assert!(lines.contains(message), "want {message:?} in\n{lines}");
    }
}

/// A manifest that does not fit its files is a difference, although the files are right.
#[test]
fn a_lying_manifest_is_found() {
    let scratch = Scratch::new().unwrap();
    let case = case_named("qwen3-tied-tp2");
    case.checkpoint.write(&scratch.join("checkpoint")).unwrap();
    let answer = oracle::answer(&scratch.join("checkpoint"), &case.options).unwrap();
    write_output(scratch.path(), &answer);
    let path = scratch.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["ranks"][1]["parameters"]["model.norm.weight"]["bytes"] = json!(1);
    fs::write(&path, manifest.to_string()).unwrap();
    let lines = with_answer(scratch.path(), &answer).unwrap_err();
    let message = "manifest.json: rank 1: model.norm.weight: bytes: want 256, got 1";
    assert!(lines.contains(message), "{lines}");
    fs::remove_file(&path).unwrap();
    assert!(with_answer(scratch.path(), &answer).unwrap_err().contains("manifest.json"));
}
