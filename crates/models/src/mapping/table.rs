//! Runtime modules and the checkpoint modules they are made of: the entries that both directions read.

use std::collections::HashMap;

use crate::mapping::Shard;

/// What a linear layer may be stored in, whatever the scheme (reference §1.3), and its bias.
pub(super) const LINEAR: &[&str] = &[
    "weight",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "input_scale",
    "weight_packed",
    "weight_shape",
    "bias",
];
/// The same for experts, which have no bias.
const EXPERT: &[&str] = LINEAR.split_at(LINEAR.len() - 1).0;
/// A norm, an embedding, a layer that is never quantised.
pub(super) const WEIGHT: &[&str] = &["weight"];
/// The same with a bias.
pub(super) const WEIGHT_AND_BIAS: &[&str] = &["weight", "bias"];

/// One runtime module.
#[derive(Debug, Clone)]
pub(super) struct Module {
    /// Its parameters' names up to the suffix: `….qkv_proj.`, `….experts.w13_`.
    pub(super) runtime: String,
    /// The checkpoint modules that it is made of; `*` stands for an expert.
    pub(super) parts: Vec<(Shard, String)>,
    /// Which suffixes its tensors may have.
    suffixes: &'static [&'static str],
    /// Whether every expert has these parts.
    pub(super) per_expert: bool,
}

/// A stretch of a model: its names' prefix at run time and in the checkpoint.
#[derive(Debug, Clone)]
pub(super) struct At {
    pub(super) runtime: String,
    pub(super) source: String,
}

impl At {
    /// A stretch that is called the same in both.
    pub(super) fn both(prefix: impl Into<String>) -> Self {
        let prefix = prefix.into();
        Self { runtime: prefix.clone(), source: prefix }
    }

    /// A stretch within this one.
    pub(super) fn inside(&self, block: &str) -> Self {
        let [runtime, source] = [&self.runtime, &self.source].map(|x| format!("{x}{block}"));
        Self { runtime, source }
    }
}

/// All modules of a model, found by either name.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    modules: Vec<Module>,
    /// Module and shard of each checkpoint module; two where its suffixes go different ways (`k_proj.k_scale`).
    by_source: HashMap<String, Vec<(usize, Shard)>>,
    by_runtime: HashMap<String, Vec<usize>>,
}

impl Table {
    /// The runtime module that a tensor belongs to, and which part of it the tensor is.
    pub(super) fn part(&self, module: &str, suffix: &str) -> Option<(&Module, Shard)> {
        let parts = self.by_source.get(module)?.iter();
        parts
            .map(|&(number, shard)| (&self.modules[number], shard))
            .find(|(module, _)| module.suffixes.contains(&suffix))
    }

    /// The module of a runtime parameter, and the parameter's suffix.
    pub(super) fn module<'n>(&self, runtime: &'n str) -> Option<(&Module, &'n str)> {
        let (stem, suffix) = split_runtime(runtime)?;
        let modules = self.by_runtime.get(stem)?.iter().map(|&number| &self.modules[number]);
        let module = modules.into_iter().find(|module| module.suffixes.contains(&suffix))?;
        Some((module, suffix))
    }

    /// Every name that a runtime parameter can have.
    #[cfg(test)]
    pub(super) fn runtime_names(&self) -> Vec<String> {
        let of = |m: &Module| m.suffixes.iter().map(|s| format!("{}{s}", m.runtime)).collect();
        self.modules.iter().flat_map(|m| -> Vec<String> { of(m) }).collect()
    }

    /// Modules whose name stays, with these suffixes.
    pub(super) fn kept(&mut self, at: &At, modules: &[&str], suffixes: &'static [&'static str]) {
        for module in modules {
            self.renamed(at, [module, module], suffixes);
        }
    }

    /// A module that is called `to` at run time and `from` in the checkpoint.
    pub(super) fn renamed(
        &mut self,
        at: &At,
        [to, from]: [&str; 2],
        suffixes: &'static [&'static str],
    ) {
        self.stacked(at, to, &[(Shard::Whole, from)], suffixes);
    }

    /// A module that is made of several.
    pub(super) fn stacked(
        &mut self,
        at: &At,
        name: &str,
        parts: &[(Shard, &str)],
        suffixes: &'static [&'static str],
    ) {
        self.push(Module {
            runtime: format!("{}{name}.", at.runtime),
            parts: parts.iter().map(|(s, part)| (*s, format!("{}{part}", at.source))).collect(),
            suffixes,
            per_expert: false,
        });
    }

    /// Gate, up and down of a gated MLP.
    pub(super) fn mlp(&mut self, at: &At) {
        let parts = [(Shard::Index(0), "gate_proj"), (Shard::Index(1), "up_proj")];
        self.stacked(at, "gate_up_proj", &parts, LINEAR);
        self.kept(at, &["down_proj"], LINEAR);
    }

    /// Gate, up and down of every routed expert (reference §2.3).
    pub(super) fn experts(&mut self, at: &At) {
        let part =
            |shard, projection: &str| (shard, format!("{}experts.*.{projection}", at.source));
        for (name, parts) in [
            ("w13", vec![part(Shard::W1, "gate_proj"), part(Shard::W3, "up_proj")]),
            ("w2", vec![part(Shard::W2, "down_proj")]),
        ] {
            let runtime = format!("{}experts.{name}_", at.runtime);
            self.push(Module { runtime, parts, suffixes: EXPERT, per_expert: true });
        }
    }

    fn push(&mut self, module: Module) {
        let number = self.modules.len();
        for (shard, part) in &module.parts {
            self.by_source.entry(part.clone()).or_default().push((number, *shard));
        }
        self.by_runtime.entry(module.runtime.clone()).or_default().push(number);
        self.modules.push(module);
    }
}

/// Cuts a parameter's name before its suffix: after the last dot, and after `w13_` or `w2_` there.
pub(super) fn split_runtime(runtime: &str) -> Option<(&str, &str)> {
    let after_dot = runtime.rfind('.')? + 1;
    let tail = &runtime[after_dot..];
    let stacked = ["w13_", "w2_"].into_iter().find(|stem| tail.starts_with(stem));
    Some(runtime.split_at(after_dot + stacked.map_or(0, str::len)))
}
