//! The parameter mapping against the placement of generated checkpoints: every tensor of every family and scheme goes
//! where its bytes land, and an update is called complete exactly when its last tensor has come.

#![allow(clippy::panic, clippy::unwrap_used, reason = "test code: a panic is the verdict")]

use std::collections::{BTreeMap, BTreeSet};

use longshore::plan::{Exchange, Plan};
use longshore_harness::{
    generator::{Checkpoint, Family, Preset, Scheme},
    oracle,
    scratch::Scratch,
};
use longshore_models::mapping::{Arrivals, Mapper, Mapping, Piece, Shard};

mod common;

use common::plan;

/// A family's checkpoints in one scheme: both sets of dimensions, and what else its names may look like.
fn checkpoints(family: Family, scheme: Scheme) -> Vec<Checkpoint> {
    let new = |preset| {
        Checkpoint::new(family, scheme).preset(preset).set("num_hidden_layers", 2).files(2)
    };
    let (tiny, odd) = (new(Preset::Tiny), new(Preset::Odd));
    let mut all = vec![tiny.clone(), odd];
    match (family, scheme) {
        (Family::Llama, _) => {
            all.push(tiny.set("attention_bias", true).set("tie_word_embeddings", true));
        }
        (Family::Qwen3 | Family::Qwen3Moe, _) => {
            all.push(tiny.set("strip_model_prefix", true).set("inv_freq", true));
        }
        (Family::DeepseekV3, Scheme::Bf16) => {
            all.push(tiny.clone().set("kv_scales", true).set("inv_freq", true));
            all.push(tiny.clone().set("q_lora_rank", serde_json::Value::Null));
            all.push(tiny.set("n_shared_experts", 0));
        }
        (Family::KimiK25, Scheme::Bf16) => all.push(tiny.set("short_layer_names", true)),
        (Family::KimiK25, Scheme::Int4) => all.push(tiny.set("int4_linears", true)),
        (Family::KimiK25, Scheme::Mxfp4) => all.push(tiny.set("mxfp4_kv_b", true)),
        (_, Scheme::Nvfp4) => {
            let styles = family.quant_styles().iter();
            all.extend(styles.map(|style| tiny.clone().set("quant_style", *style)));
            all.push(tiny.set("nvfp4_attention", true).set("scalar_shape", 1));
        }
        _ => {}
    }
    all
}

/// The options that make a difference to names. Layout `none` takes the most sizes, the default one derives parameters.
fn options(family: Family) -> Vec<oracle::Options> {
    let base = || oracle::Options::tp(1).kernel_layout("none");
    let mut all =
        vec![oracle::Options::tp(1), base(), base().fuse_shared_experts(), base().draft()];
    all.push(oracle::Options { tp: 2, ep: 2, ..base() });
    all.push(oracle::Options { tp: 4, ep: 2, ..base().fuse_shared_experts() });
    if family == Family::KimiK25 {
        all.extend([base().language_only(), base().encoder_only()]);
    }
    all
}

/// A plan beside the mapping of the same model.
struct Both<'p> {
    what: String,
    plan: &'p Plan,
    mapper: Mapper,
    /// Canonical names, by tensor.
    names: Vec<String>,
}

impl<'p> Both<'p> {
    fn new(what: String, plan: &'p Plan, ep: u32) -> Self {
        let canonical = |name: &str| plan.model.family.canonical(name).into_owned();
        let names = plan.checkpoint().tensors.iter().map(|t| canonical(&t.name)).collect();
        Self { what, plan, mapper: Mapper::new(&plan.model, ep).unwrap(), names }
    }

    /// Each expert group with a rank of it.
    fn ranks(&self) -> impl Iterator<Item = (u32, u32)> {
        let parallel = self.plan.placement().parallel;
        (0..parallel.ep()).map(move |ep_rank| (ep_rank, ep_rank * parallel.moe_tp()))
    }

    /// Every tensor with pieces maps to the parameters that they land in; every other one is skipped for the
    /// placement's reason, or is a second part that is checked but not kept.
    fn check_tensors(&self) {
        let placement = self.plan.placement();
        let skipped: BTreeMap<u32, &str> =
            placement.skipped.iter().map(|s| (s.tensor, s.why)).collect();
        for (id, tensor) in self.plan.checkpoint().tensors.iter().enumerate() {
            let what = format!("{}: {}", self.what, tensor.name);
            let mapped = self.mapper.map(&tensor.name);
            let pieces = placement.pieces_of(id as u32);
            for piece in pieces {
                let param = &placement.params[piece.param as usize].name;
                assert_eq!(mapped.as_ref().map(|m| &m.runtime), Some(param), "{what}");
            }
            if !pieces.is_empty() {
                continue;
            }
            let why = skipped[&(id as u32)];
            match mapped {
                None => assert_eq!(self.mapper.skip_reason(&tensor.name), Some(why), "{what}"),
                Some(Mapping { runtime, shard, shards, .. }) => {
                    assert!(matches!(shard, Shard::Index(1) | Shard::W3) && shards == 2, "{what}");
                    assert!(placement.params.iter().any(|p| p.name == runtime), "{what}");
                }
            }
        }
    }

    /// For each parameter on each expert group: its sources are what maps to it, as many as promised, and in the order
    /// in which they land.
    fn check_params(&self) {
        let placement = self.plan.placement();
        let mut mapped: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        let mut landed: BTreeMap<(u32, u32), Vec<(u64, &str)>> = BTreeMap::new();
        let mut placed = BTreeSet::new();
        for (id, name) in self.names.iter().enumerate() {
            if let Some(m) = self.mapper.map(name) {
                mapped.entry(m.runtime).or_default().insert(name);
            }
            for piece in placement.pieces_of(id as u32) {
                placed.insert(name.as_str());
                for (ep_rank, rank) in self.ranks() {
                    if piece.members.part(rank).is_some() {
                        let landed = landed.entry((piece.param, ep_rank)).or_default();
                        landed.push((piece.target_offset, name));
                    }
                }
            }
        }
        for (number, param) in placement.params.iter().enumerate() {
            let what = format!("{}: {}", self.what, param.name);
            let mut all = BTreeSet::new();
            for (ep_rank, _) in self.ranks() {
                let sources = self.mapper.sources(&param.name, ep_rank);
                let mut landed = landed.remove(&(number as u32, ep_rank)).unwrap_or_default();
                landed.sort();
                // a tensor that is fused on disk lands in three places
                landed.dedup_by_key(|(_, name)| *name);
                let landed: Vec<&str> = landed.into_iter().map(|(_, name)| name).collect();
                let kept = sources.iter().map(|s| s.tensor.as_str());
                let kept: Vec<&str> = kept.filter(|name| placed.contains(name)).collect();
                assert_eq!(kept, landed, "{what}");
                assert_eq!(sources.is_empty(), param.derived, "{what}");
                self.check_promise(&what, &param.name, &sources, ep_rank);
                all.extend(sources.into_iter().map(|s| s.tensor));
            }
            let mapped = mapped.remove(&param.name).unwrap_or_default();
            assert!(all.iter().eq(&mapped), "{what}: {all:?} and {mapped:?}");
        }
        assert_eq!(mapped, BTreeMap::new(), "{}: parameters that the placement lacks", self.what);
    }

    /// `map` undoes `sources`, and says how many of them there are.
    fn check_promise(&self, what: &str, runtime: &str, sources: &[Piece], ep_rank: u32) {
        let distinct: BTreeSet<_> = sources.iter().map(|s| (s.shard, s.expert)).collect();
        assert_eq!(distinct.len(), sources.len(), "{what}");
        for Piece { tensor, shard, expert } in sources {
            let m = self.mapper.map(tensor).unwrap();
            assert_eq!((m.runtime.as_str(), &m.shard, &m.expert), (runtime, shard, expert));
            assert!(self.mapper.holds(&m, ep_rank), "{what}");
            let promised = u64::from(m.shards) * m.local_experts.unwrap_or(1);
            assert_eq!(sources.len() as u64, promised, "{what}");
        }
    }

    /// In the order of the files, which is none in particular, and each tensor twice.
    fn check_arrivals(&self) {
        let placement = self.plan.placement();
        for (ep_rank, _) in self.ranks() {
            let mut arrivals = Arrivals::new(self.mapper.clone(), ep_rank).unwrap();
            let mut waiting: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
            for param in placement.params.iter().filter(|p| !p.derived) {
                let sources = self.mapper.sources(&param.name, ep_rank).into_iter();
                waiting.insert(&param.name, sources.map(|s| s.tensor).collect());
            }
            for (tensor, name) in self.plan.checkpoint().tensors.iter().zip(&self.names) {
                let mut completed = None;
                for (param, waiting) in &mut waiting {
                    if waiting.remove(name) && waiting.is_empty() {
                        completed = Some((*param).to_owned());
                    }
                }
                let what = format!("{}: {}", self.what, tensor.name);
                assert_eq!(arrivals.arrive(&tensor.name).unwrap(), completed, "{what}");
                assert_eq!(arrivals.arrive(&tensor.name).unwrap(), None, "{what}: again");
            }
            assert_eq!(arrivals.incomplete().next(), None, "{}", self.what);
            for param in placement.params.iter().filter(|p| !p.derived) {
                assert!(arrivals.is_complete(&param.name), "{}: {}", self.what, param.name);
            }
            // beside a draft model, whatever is not of the prediction layer is skipped
            let stranger = arrivals.arrive("model.layers.0.self_attn.bogus_proj.weight");
            assert_eq!(stranger.is_err(), !self.plan.model.options.draft, "{}", self.what);
        }
    }
}

/// Checks one checkpoint under all options; returns how many of them planned.
fn sweep(checkpoint: &Checkpoint) -> usize {
    let scratch = Scratch::new().unwrap();
    let dir = scratch.join("checkpoint");
    checkpoint.write(&dir).unwrap();
    let mut planned = 0;
    for options in options(checkpoint.family()) {
        let what = format!("{checkpoint:?} {:?}", options.arguments());
        match plan(&dir, &options, Exchange::On) {
            Ok(plan) => {
                let both = Both::new(what, &plan, options.ep as u32);
                both.check_tensors();
                both.check_params();
                both.check_arrivals();
                planned += 1;
            }
            // options that the model has no use for, and sizes that do not divide
            Err(e) if oracle::answer(&dir, &options).is_ok() => {
                panic!("{what}: should plan: {}", e.line())
            }
            Err(_) => {}
        }
    }
    planned
}

#[test]
fn every_family_and_scheme_maps_as_it_is_placed() {
    for &family in Family::ALL {
        for &scheme in family.schemes() {
            let planned: usize = checkpoints(family, scheme).iter().map(sweep).sum();
            println!("{} {}: {planned} plans checked", family.name(), scheme.name());
            assert!(planned >= 4, "{} {}: only {planned}", family.name(), scheme.name());
        }
    }
}
