//! The conformance cases: how each checkpoint is generated, and the options of its load.

use std::path::PathBuf;
use std::{env, fs};

use serde_json::Value;

use crate::generator::Checkpoint;
use crate::oracle::Options;

const CASES: &str = include_str!("../fixtures/conformance/cases.json");

/// Names the directory that holds `conformance/`, for tests that run where they were not built.
const FIXTURES_VARIABLE: &str = "LONGSHORE_TEST_FIXTURES";

/// One conformance case.
#[derive(Clone, Debug)]
pub struct Case {
    /// The case's name, which is also the stem of its expectation's files.
    pub name: String,
    /// The checkpoint to generate.
    pub checkpoint: Checkpoint,
    /// The options of the load.
    pub options: Options,
}

impl Case {
    /// The file that says what every rank must hold.
    pub fn expected_json(&self) -> PathBuf {
        let fixtures = env::var_os(FIXTURES_VARIABLE)
            .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures").into(), PathBuf::from);
        fixtures.join("conformance/expected").join(format!("{}.json", self.name))
    }

    /// The contents of that file.
    ///
    /// # Panics
    /// If the file is missing or damaged.
    pub fn expected(&self) -> Value {
        let text = fs::read(self.expected_json()).expect("every case has its expectation");
        serde_json::from_slice(&text).expect("an expectation is JSON")
    }
}

/// Every conformance case, in the order of `cases.json`.
///
/// # Panics
/// If `cases.json` is not what it should be.
pub fn cases() -> Vec<Case> {
    let all: Value = serde_json::from_str(CASES).expect("cases.json is JSON");
    let all = all["cases"].as_array().expect("cases.json has a list of cases");
    all.iter().map(case).collect()
}

/// The conformance case of that name.
///
/// # Panics
/// If there is none.
pub fn case_named(name: &str) -> Case {
    let found = cases().into_iter().find(|case| case.name == name);
    found.unwrap_or_else(|| panic!("no conformance case is called {name}"))
}

fn case(value: &Value) -> Case {
    let text = |key: &str| value[key].as_str();
    let family = text("family").expect("a case has a family").parse().expect("a known family");
    let scheme = text("scheme").expect("a case has a scheme").parse().expect("a known scheme");
    let preset = text("preset").unwrap_or("tiny").parse().expect("a known preset");
    let seed = value["seed"].as_u64().unwrap_or(0);
    let mut checkpoint = Checkpoint::new(family, scheme).preset(preset).seed(seed);
    for (key, setting) in value["set"].as_object().into_iter().flatten() {
        checkpoint = checkpoint.set(key, setting.clone());
    }
    Case {
        name: text("name").expect("a case has a name").to_owned(),
        checkpoint,
        options: options(value),
    }
}

fn options(value: &Value) -> Options {
    let number = |key: &str| value[key].as_u64().map_or(1, |n| n as usize);
    let switch = |key: &str| value[key].as_bool().unwrap_or(false);
    Options {
        tp: number("tp"),
        ep: number("ep"),
        kernel_layout: value["layout"].as_str().map(str::to_owned),
        fuse_shared_experts: switch("fuse_shared_experts"),
        draft: switch("draft"),
        language_only: switch("language_only"),
        encoder_only: switch("encoder_only"),
    }
}
