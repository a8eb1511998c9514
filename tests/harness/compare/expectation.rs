//! What a load should hold, whether it comes from the oracle or from a conformance case.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cases::Case;
use crate::oracle::Answer;

/// What all ranks should hold, and what the manifest should say.
#[derive(Clone, Debug)]
pub struct Expectation {
    family: String,
    quant: String,
    tp: u64,
    ep: u64,
    kernel_layout: String,
    /// One entry per rank.
    pub ranks: Vec<ExpectedRank>,
}

/// What one rank should hold.
#[derive(Clone, Debug)]
pub struct ExpectedRank {
    /// The rank's file in the output directory.
    pub file: String,
    /// Derived name to source.
    pub aliases: BTreeMap<String, String>,
    /// Parameters by name.
    pub parameters: BTreeMap<String, ExpectedParam>,
}

/// What one parameter should be.
#[derive(Clone, Debug)]
pub struct ExpectedParam {
    /// Dtype in safetensors spelling.
    pub dtype: String,
    /// Shape on the rank.
    pub shape: Vec<u64>,
    /// Number of bytes.
    pub length: u64,
    /// Of the bytes, in lower-case hex.
    pub sha256: String,
    /// The bytes themselves, where they are known.
    pub bytes: Option<Vec<u8>>,
}

impl Expectation {
    /// What a conformance case says.
    ///
    /// # Panics
    /// If the case's files are missing or damaged.
    pub fn of_case(case: &Case) -> Expectation {
        let value = case.expected();
        let number = |key: &str| value[key].as_u64().expect("an expectation counts its ranks");
        let mut expectation = Expectation {
            family: text(&value["family"]),
            quant: text(&value["quant"]),
            tp: number("tp"),
            ep: number("ep"),
            kernel_layout: text(&value["kernel_layout"]),
            ranks: list(&value["ranks"]).iter().map(rank_of_json).collect(),
        };
        let full = case.expected_json().with_extension("safetensors");
        if let Ok(blob) = fs::read(full) {
            let tensors = SafeTensors::deserialize(&blob).expect("parameters in full are readable");
            expectation.add_bytes(&tensors);
        }
        expectation
    }

    fn add_bytes(&mut self, tensors: &SafeTensors<'_>) {
        for (i, rank) in self.ranks.iter_mut().enumerate() {
            for (name, parameter) in &mut rank.parameters {
                let full = tensors.tensor(&format!("rank{i}/{name}")).ok();
                parameter.bytes = full.map(|view| view.data().to_vec());
            }
        }
    }

    /// What the manifest says beside the ranks.
    pub(super) fn header(&self) -> Value {
        json!({
            "family": self.family,
            "quant": self.quant,
            "tp": self.tp,
            "ep": self.ep,
            "kernel_layout": self.kernel_layout,
        })
    }

    /// Where what `got` says of a key is not what the manifest should say.
    pub(super) fn header_differences(
        &self,
        place: &str,
        got: impl Fn(&str) -> Value,
    ) -> Vec<String> {
        let header = self.header();
        let pairs = header.as_object().into_iter().flatten();
        let differing = pairs.filter(|(key, want)| got(key) != **want);
        differing
            .map(|(key, want)| format!("{place}: {key}: want {want}, got {}", got(key)))
            .collect()
    }

    /// Where a manifest is not what it should be.
    pub(super) fn manifest_differences(&self, manifest: &Value) -> Vec<String> {
        let place = "manifest.json";
        let mut lines = self.header_differences(place, |key| manifest[key].clone());
        if !manifest["source"].is_string() {
            lines.push(format!("{place}: source: want a text, got {}", manifest["source"]));
        }
        let listed = manifest["ranks"].as_array().map_or(0, Vec::len);
        if listed != self.ranks.len() {
            lines.push(format!("{place}: want {} ranks, got {listed}", self.ranks.len()));
        }
        for (i, want) in self.ranks.iter().enumerate() {
            let ranks = manifest["ranks"].as_array().into_iter().flatten();
            let found = ranks.into_iter().find(|rank| rank["rank"] == json!(i));
            let got = found.unwrap_or(&Value::Null);
            for (key, want) in [("file", json!(want.file)), ("aliases", json!(want.aliases))] {
                if got[key] != want {
                    lines.push(format!("{place}: rank {i}: {key}: want {want}, got {}", got[key]));
                }
            }
            lines.extend(want.manifest_differences(&format!("{place}: rank {i}"), got));
        }
        lines
    }
}

impl ExpectedRank {
    fn manifest_differences(&self, place: &str, got: &Value) -> Vec<String> {
        let nothing = serde_json::Map::new();
        let listed = got["parameters"].as_object().unwrap_or(&nothing);
        let mut lines = Vec::new();
        for (name, want) in &self.parameters {
            let want = json!({
                "dtype": want.dtype,
                "shape": want.shape,
                "bytes": want.length,
                "sha256": want.sha256,
            });
            let got = listed.get(name).unwrap_or(&Value::Null);
            for (key, want) in want.as_object().into_iter().flatten() {
                if got[key] != *want {
                    lines.push(format!("{place}: {name}: {key}: want {want}, got {}", got[key]));
                }
            }
        }
        for name in listed.keys().filter(|name| !self.parameters.contains_key(*name)) {
            lines.push(format!("{place}: {name}: not expected"));
        }
        lines
    }
}

impl From<&Answer> for Expectation {
    fn from(answer: &Answer) -> Expectation {
        let count = answer.ranks.len();
        let ranks = answer.ranks.iter().enumerate().map(|(i, rank)| {
            let parameters = rank.parameters.iter().map(|(name, param)| {
                let expected = ExpectedParam {
                    dtype: param.dtype.clone(),
                    shape: param.shape.clone(),
                    length: param.bytes.len() as u64,
                    sha256: sha256(&param.bytes),
                    bytes: Some(param.bytes.clone()),
                };
                (name.clone(), expected)
            });
            ExpectedRank {
                file: format!("rank-{i:05}-of-{count:05}.safetensors"),
                aliases: rank.aliases.clone(),
                parameters: parameters.collect(),
            }
        });
        Expectation {
            family: answer.family.clone(),
            quant: answer.quant.clone(),
            tp: answer.tp as u64,
            ep: answer.ep as u64,
            kernel_layout: answer.kernel_layout.clone(),
            ranks: ranks.collect(),
        }
    }
}

/// In lower-case hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let mut hex = String::new();
    for byte in Sha256::digest(bytes) {
        write!(hex, "{byte:02x}").expect("a String takes any text");
    }
    hex
}

fn rank_of_json(rank: &Value) -> ExpectedRank {
    let pairs = |key: &str| rank[key].as_object().into_iter().flatten();
    let parameter = |(name, value): (&String, &Value)| {
        let expected = ExpectedParam {
            dtype: text(&value["dtype"]),
            shape: list(&value["shape"]).iter().filter_map(Value::as_u64).collect(),
            length: value["bytes"].as_u64().unwrap_or(0),
            sha256: text(&value["sha256"]),
            bytes: None,
        };
        (name.clone(), expected)
    };
    ExpectedRank {
        file: text(&rank["file"]),
        aliases: pairs("aliases")
            .map(|(derived, source)| (derived.clone(), text(source)))
            .collect(),
        parameters: pairs("parameters").map(parameter).collect(),
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("an expectation has a text there").to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("an expectation has a list there")
}
