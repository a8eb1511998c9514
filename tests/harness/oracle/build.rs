//! One rank's parameters under construction.

use std::collections::BTreeMap;

use super::checkpoint::Checkpoint;
use super::options::{Layout, Options};
use super::tensor::Tensor;
use super::{Param, Rank};

/// Collects the parameters of one rank; names are the model's own, without an outer prefix.
#[derive(Debug)]
pub(super) struct Builder<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) options: &'a Options,
    pub(super) layout: Layout,
    pub(super) rank: usize,
    parameters: BTreeMap<String, Tensor>,
    aliases: BTreeMap<String, String>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        options: &'a Options,
        layout: Layout,
        rank: usize,
    ) -> Builder<'a> {
        let (parameters, aliases) = (BTreeMap::new(), BTreeMap::new());
        Builder { checkpoint, options, layout, rank, parameters, aliases }
    }

    /// Adds a parameter.
    pub(super) fn put(&mut self, name: String, tensor: Tensor) {
        let twice = self.parameters.insert(name.clone(), tensor);
        assert!(twice.is_none(), "{name} is made twice");
    }

    /// Makes `derived` another name of `source`.
    pub(super) fn alias(&mut self, derived: String, source: String) {
        self.aliases.insert(derived, source);
    }

    /// A whole tensor in the model's dtype.
    pub(super) fn put_plain(&mut self, target: &str, source: &str) {
        let tensor = self.checkpoint.get(source).cast(self.checkpoint.model_dtype());
        self.put(target.to_owned(), tensor);
    }

    /// `tp / ep`
    pub(super) fn moe_tp(&self) -> usize {
        self.options.tp / self.options.ep
    }

    /// This rank's place in its group of expert tensor parallelism.
    pub(super) fn moe_tp_rank(&self) -> usize {
        self.rank % self.moe_tp()
    }

    /// This rank's group of experts.
    pub(super) fn ep_rank(&self) -> usize {
        self.rank / self.moe_tp()
    }

    /// The finished rank, with `prefix` before every name.
    pub(super) fn finish(self, prefix: &str) -> Rank {
        let name = |name: String| format!("{prefix}{name}");
        let parameters = self.parameters.into_iter().map(|(n, t)| (name(n), Param::from(t)));
        let aliases = self.aliases.into_iter().map(|(d, s)| (name(d), name(s)));
        Rank { parameters: parameters.collect(), aliases: aliases.collect() }
    }
}
