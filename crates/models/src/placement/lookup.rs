//! The names of a checkpoint, in the spelling that declarations use, and how its modules are stored.
//!
//! The tensors of a module show its scheme. What the files and the user say is held against that here: another scheme
//! than the declared one is an error, a list that says otherwise a warning (contract §4, "how a module is stored").

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::HashMap,
};

use crate::dtype::Dtype;

use crate::{
    arch::Model,
    checkpoint::{Checkpoint, TensorId},
    declare::Lookup,
    error::PlanError,
    quant::{Declared, Scheme},
};

/// Answers a declaration's questions about one checkpoint.
pub(super) struct Names<'a> {
    checkpoint: &'a Checkpoint,
    declared: &'a Declared,
    /// The tensors that declarations spell otherwise than the checkpoint: usually none.
    renamed: HashMap<String, TensorId>,
    canonical: Vec<Cow<'a, str>>,
    /// The first module found in a scheme that is neither BF16 nor the declared one.
    undeclared: RefCell<Option<(String, Scheme)>>,
    /// Whether any module was found in the declared scheme, if that is not BF16.
    quantised: Cell<bool>,
    /// Modules that the list names, but that are quantised.
    though_named: Odd,
    /// Modules in BF16 that the list does not name.
    not_named: Odd,
}

/// How many modules are odd in one way, and the first of them.
#[derive(Default)]
struct Odd {
    count: Cell<u64>,
    first: RefCell<Option<String>>,
}

impl Odd {
    fn add(&self, module: &str) {
        self.count.set(self.count.get() + 1);
        self.first.borrow_mut().get_or_insert_with(|| module.to_owned());
    }

    /// A warning for all of them together.
    fn warning(&self, text: impl FnOnce(u64, &str) -> String) -> Option<String> {
        self.first.borrow().as_deref().map(|first| text(self.count.get(), first))
    }
}

impl<'a> Names<'a> {
    pub(super) fn new(model: &'a Model, checkpoint: &'a Checkpoint) -> Result<Self, PlanError> {
        let mut renamed = HashMap::new();
        let mut canonical = Vec::with_capacity(checkpoint.tensors.len());
        for (id, tensor) in checkpoint.tensors.iter().enumerate() {
            let name = model.family.canonical(&tensor.name);
            if let Cow::Owned(name) = &name {
                let twin = renamed.insert(name.clone(), id as TensorId);
                if let Some(other) = twin.or_else(|| checkpoint.id(name)) {
                    return Err(PlanError::DoublySupplied {
                        first: checkpoint.tensors[other as usize].name.clone(),
                        second: tensor.name.clone(),
                    });
                }
            }
            canonical.push(name);
        }
        Ok(Self {
            checkpoint,
            declared: &model.declared,
            renamed,
            canonical,
            undeclared: RefCell::default(),
            quantised: Cell::new(false),
            though_named: Odd::default(),
            not_named: Odd::default(),
        })
    }

    pub(super) fn tensor(&self, canonical: &str) -> Option<TensorId> {
        self.renamed.get(canonical).copied().or_else(|| self.checkpoint.id(canonical))
    }

    pub(super) fn canonical(&self, tensor: TensorId) -> &str {
        &self.canonical[tensor as usize]
    }

    /// Holds what was found against what was declared; returns what is odd but does no harm.
    ///
    /// # Errors
    /// A module in a scheme that was not declared, or a scheme that the user named and nothing is stored in.
    pub(super) fn check_schemes(&self) -> Result<Vec<String>, PlanError> {
        if let Some((module, scheme)) = self.undeclared.borrow().as_ref() {
            return Err(self.declared.contradicted_by(module, *scheme));
        }
        if let Some(user) = self.declared.asked_for()
            && !self.quantised.get()
            && !self.stores_any(user.scheme())
        {
            return Err(PlanError::unsupported(
                format!("--quantization {user}"),
                format!("no module is stored as {}", user.scheme().name()),
                "longshore does not quantise",
            ));
        }
        let mut warnings = self.declared.warnings.clone();
        warnings.extend(self.list_warnings());
        Ok(warnings)
    }

    /// Whether any module of the whole checkpoint is stored in `scheme`; the loaded part may well be without (a BF16
    /// prediction layer, a vision tower).
    fn stores_any(&self, scheme: Scheme) -> bool {
        self.canonical.iter().any(|name| {
            let module = name.strip_suffix("_packed").unwrap_or(name).strip_suffix(".weight");
            module.is_some_and(|module| self.stored_scheme(module) == Some(scheme))
        })
    }

    fn list_warnings(&self) -> Vec<String> {
        let place = self.declared.exclude.as_ref().map_or("", |list| list.place());
        let scheme = self.declared.scheme.name();
        let though_named = self.though_named.warning(|count, first| {
            format!("{count} modules are stored as {scheme} although {place} names them, the first is {first}")
        });
        let not_named = self.not_named.warning(|count, first| {
            format!("{count} modules are not stored as {scheme} although {place} does not name them, the first is {first}")
        });
        [though_named, not_named].into_iter().flatten().collect()
    }

    fn dtype(&self, canonical: &str) -> Option<Dtype> {
        self.tensor(canonical).map(|id| self.checkpoint.tensors[id as usize].dtype)
    }

    fn stored_scheme(&self, module: &str) -> Option<Scheme> {
        let mut name = String::with_capacity(module.len() + 16);
        name.push_str(module);
        name.push_str(".weight");
        match self.dtype(&name) {
            None => {
                name.push_str("_packed");
                self.tensor(&name).map(|_| Scheme::Int4)
            }
            Some(Dtype::F8_E4M3) => Some(Scheme::Fp8),
            Some(Dtype::U8) => Some(self.fp4_scheme(module)),
            // a dtype that no scheme knows is refused when the tensor is matched
            Some(_) => Some(Scheme::Bf16),
        }
    }

    /// Which of the two schemes of packed E2M1: the dtype of the block scale shows it, the declaration where it is missing.
    fn fp4_scheme(&self, module: &str) -> Scheme {
        match self.dtype(&format!("{module}.weight_scale")) {
            Some(Dtype::F8_E4M3) => Scheme::Nvfp4,
            Some(Dtype::U8) => Scheme::Mxfp4,
            _ if self.declared.scheme == Scheme::Mxfp4 => Scheme::Mxfp4,
            _ => Scheme::Nvfp4,
        }
    }

    /// Counts a module whose storage is not what its list says.
    fn hold_against_list(&self, module: &str, stored: Scheme) {
        let Some(list) = &self.declared.exclude else {
            return;
        };
        match (list.names(module), stored == Scheme::Bf16) {
            (true, false) => self.though_named.add(module),
            (false, true) => self.not_named.add(module),
            _ => {}
        }
    }
}

impl Lookup for Names<'_> {
    fn scheme(&self, module: &str) -> Option<Scheme> {
        let scheme = self.stored_scheme(module)?;
        if scheme == self.declared.scheme || scheme == Scheme::Bf16 {
            self.quantised.set(self.quantised.get() || scheme != Scheme::Bf16);
            self.hold_against_list(module, scheme);
        } else {
            self.undeclared.borrow_mut().get_or_insert_with(|| (module.to_owned(), scheme));
        }
        Some(scheme)
    }

    fn has(&self, tensor: &str) -> bool {
        self.tensor(tensor).is_some()
    }
}
