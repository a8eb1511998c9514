//! What the configuration files and the user say of a checkpoint's quantisation, brought to one answer.
//!
//! Lookup order: `quantization_config`, `text_config.quantization_config` and `compression_config` of `config.json`, then
//! `hf_quant_config.json` (reference §1.6). The first of `config.json`'s counts; `hf_quant_config.json` must agree with it
//! (contract §4, "where NVFP4 is declared"). A user who names a method decides between them, and wins over both: what is
//! then checked is only that the tensors bear the user out.

use crate::{
    config::Config,
    error::PlanError,
    options::Quantization,
    quant::{Exclude, Scheme, block::Block},
};

/// What is declared of a checkpoint's quantisation.
#[derive(Debug, Clone)]
pub struct Declared {
    /// The scheme of quantised modules.
    pub scheme: Scheme,
    /// The file (or the option) that says so, for messages.
    pub declared_in: String,
    /// Whether the KV cache is declared to be FP8.
    pub kv_cache_fp8: bool,
    /// Which modules are left unquantised; `None` when no file says anything.
    pub exclude: Option<Exclude>,
    /// What looked odd.
    pub warnings: Vec<String>,
    /// What the user said, and what the files say beside it.
    pub(super) user: Option<(Quantization, String)>,
}

impl Declared {
    /// Settles what `config.json`, `hf_quant_config.json` and the user say.
    ///
    /// # Errors
    /// A method that is not known, parameters of it that are not supported, or files that contradict each other where the
    /// user does not decide between them.
    pub fn new(
        config: &Config,
        hf_quant_config: Option<&Config>,
        user: Option<Quantization>,
    ) -> Result<Self, PlanError> {
        let blocks = Block::all(config, hf_quant_config)?;
        let mut declared = match chosen(&blocks, user)? {
            Some(block) => block.read()?,
            None => Self {
                scheme: user.map_or(Scheme::Bf16, Quantization::scheme),
                declared_in: user
                    .map_or_else(|| config.file().to_owned(), |u| format!("--quantization {u}")),
                kv_cache_fp8: false,
                exclude: None,
                warnings: Vec::new(),
                user: None,
            },
        };
        if let Some(user) = user {
            declared.heed(user, &blocks, config);
        }
        Ok(declared)
    }

    /// How `module` ought to be stored: in the declared scheme, unless a list excepts it.
    pub fn expected(&self, module: &str) -> Scheme {
        match &self.exclude {
            Some(exclude) if exclude.names(module) => Scheme::Bf16,
            _ => self.scheme,
        }
    }

    /// The quantised scheme that the user named.
    pub(crate) fn asked_for(&self) -> Option<Quantization> {
        self.user.as_ref().map(|(user, _)| *user).filter(|user| user.scheme() != Scheme::Bf16)
    }

    /// The error for a module that is stored in neither BF16 nor the declared scheme.
    pub(crate) fn contradicted_by(&self, module: &str, stored: Scheme) -> PlanError {
        let (module, found) = (module.to_owned(), stored.name().to_owned());
        match &self.user {
            Some((user, files)) => {
                let (word, files) = (user.to_string(), files.clone());
                PlanError::UserContradicted { module, found, word, files }
            }
            None => PlanError::UndeclaredScheme {
                module,
                found,
                declared_in: self.declared_in.clone(),
                declared: self.scheme.name().into(),
            },
        }
    }

    /// Notes the user's word, and warns of the files that say something else.
    fn heed(&mut self, user: Quantization, blocks: &[Block], config: &Config) {
        let says: Vec<String> = effective(blocks).map(Block::says).collect();
        let files = match says.is_empty() {
            true => format!("{} declares no quantisation", config.file()),
            false => says.join(", "),
        };
        for block in effective(blocks).filter(|b| b.scheme() != Some(user.scheme())) {
            let says = block.says();
            let warning = format!("{says}, but the tensors bear out --quantization {user}");
            self.warnings.push(warning);
        }
        self.user = Some((user, files));
    }
}

/// The declaration that counts.
fn chosen(blocks: &[Block], user: Option<Quantization>) -> Result<Option<&Block>, PlanError> {
    let meant = |block: &&Block| user.is_none_or(|u| block.scheme() == Some(u.scheme()));
    let mut candidates = effective(blocks).filter(meant);
    let first = candidates.next();
    if let (Some(first), Some(second)) = (first, candidates.next()) {
        first.check_agrees(second)?;
    }
    // a declaration that another one hides still counts when it is the one that the user means
    Ok(first.or_else(|| blocks.iter().find(meant)))
}

/// The declarations that are not hidden by another: `config.json`'s first, and `hf_quant_config.json`.
fn effective(blocks: &[Block]) -> impl Iterator<Item = &Block> {
    let first = blocks.iter().find(|b| !b.beside);
    first.into_iter().chain(blocks.iter().find(|b| b.beside))
}

#[cfg(test)]
mod tests;
