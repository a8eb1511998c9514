//! What the stories share: planning and loading through the library.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]
#![allow(missing_docs, missing_debug_implementations, reason = "test code")]
#![allow(dead_code, unreachable_pub, reason = "each story uses its part of this file")]

use std::path::Path;

use longshore::{
    digest::group_digest,
    discover::discover,
    error::LoadError,
    load::{RunOptions, load as run, progress_of},
    plan::{Exchange, Plan, PlanOptions},
};
use longshore_harness::oracle;
use longshore_models::options::ModelOptions;
use longshore_rank::{params::ReadyParams, protocol::RankReport};

/// The finished ranks of a load.
pub struct Loaded {
    pub ranks: Vec<ReadyParams>,
    pub reports: Vec<RankReport>,
}

impl Loaded {
    pub fn digest(&self) -> String {
        group_digest(&self.ranks).unwrap()
    }
}

/// The loader's options for the oracle's.
pub fn plan_options(options: &oracle::Options, exchange: Exchange) -> PlanOptions {
    PlanOptions {
        tp: options.tp as u32,
        ep: options.ep as u32,
        model: ModelOptions {
            kernel_layout: options.kernel_layout.as_deref().map(|l| l.parse().unwrap()),
            fuse_shared_experts: options.fuse_shared_experts,
            draft: options.draft,
            language_only: options.language_only,
            encoder_only: options.encoder_only,
            ..ModelOptions::default()
        },
        exchange,
        ..PlanOptions::default()
    }
}

pub fn plan(dir: &Path, options: &oracle::Options, exchange: Exchange) -> Result<Plan, LoadError> {
    Plan::new(discover(dir)?, &plan_options(options, exchange))
}

pub fn load(plan: &Plan) -> Loaded {
    load_with(plan, &RunOptions::default()).unwrap_or_else(|e| panic!("{}", e.line()))
}

pub fn load_with(plan: &Plan, options: &RunOptions) -> Result<Loaded, LoadError> {
    let group = runtime().block_on(run(plan, options, progress_of(plan)))?;
    let reports = group.reports.clone();
    Ok(Loaded { ranks: group.into_ranks()?, reports })
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap()
}

/// What every rank holds against what it must hold.
pub fn compare(what: &str, loaded: &Loaded, answer: &oracle::Answer) {
    assert_eq!(loaded.ranks.len(), answer.ranks.len(), "{what}: ranks");
    for (rank, want) in loaded.ranks.iter().zip(&answer.ranks) {
        let what = format!("{what}, rank {}", rank.rank);
        let mut names: Vec<&str> = rank.iter().map(|p| p.name).collect();
        names.sort_unstable();
        let wanted: Vec<&str> = want.parameters.keys().map(String::as_str).collect();
        assert_eq!(names, wanted, "{what}: parameters");
        for param in rank.iter() {
            let want = &want.parameters[param.name];
            assert_eq!(param.dtype.to_string(), want.dtype, "{what}: {}", param.name);
            assert_eq!(param.shape, want.shape, "{what}: {}", param.name);
            let bytes = param.data.to_host().unwrap();
            let differs = bytes.iter().zip(&want.bytes).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{what}: {}: first differing byte", param.name);
            assert_eq!(bytes.len(), want.bytes.len(), "{what}: {}", param.name);
        }
        let mut aliases: Vec<(String, String)> =
            rank.aliases().map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
        aliases.sort();
        let wanted: Vec<_> = want.aliases.iter().map(|(a, b)| (a.clone(), b.clone())).collect();
        assert_eq!(aliases, wanted, "{what}: aliases");
    }
}
