//! The names of a checkpoint, in the spelling that declarations use.

use std::{borrow::Cow, cell::RefCell, collections::HashMap};

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
    by_canonical: HashMap<Cow<'a, str>, TensorId>,
    canonical: Vec<Cow<'a, str>>,
    /// The first module found in a scheme that is neither BF16 nor the declared one.
    undeclared: RefCell<Option<(String, Scheme)>>,
}

impl<'a> Names<'a> {
    pub(super) fn new(model: &'a Model, checkpoint: &'a Checkpoint) -> Result<Self, PlanError> {
        let mut by_canonical = HashMap::with_capacity(checkpoint.tensors.len());
        let mut canonical = Vec::with_capacity(checkpoint.tensors.len());
        for (id, tensor) in checkpoint.tensors.iter().enumerate() {
            let name = model.family.canonical(&tensor.name);
            if let Some(other) = by_canonical.insert(name.clone(), id as TensorId) {
                return Err(PlanError::DoublySupplied {
                    first: checkpoint.tensors[other as usize].name.clone(),
                    second: tensor.name.clone(),
                });
            }
            canonical.push(name);
        }
        let undeclared = RefCell::new(None);
        Ok(Self { checkpoint, declared: &model.declared, by_canonical, canonical, undeclared })
    }

    pub(super) fn tensor(&self, canonical: &str) -> Option<TensorId> {
        self.by_canonical.get(canonical).copied()
    }

    pub(super) fn canonical(&self, tensor: TensorId) -> &str {
        &self.canonical[tensor as usize]
    }

    /// Refuses a checkpoint with a module whose scheme was not declared (contract §4, "how a module is stored").
    pub(super) fn check_schemes(&self) -> Result<(), PlanError> {
        match self.undeclared.borrow().as_ref() {
            None => Ok(()),
            Some((module, scheme)) => Err(PlanError::UndeclaredScheme {
                module: module.clone(),
                found: scheme.name().into(),
                declared_in: self.declared.declared_in.clone(),
                declared: self.declared.scheme.name().into(),
            }),
        }
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
            Some(Dtype::U8) if self.declared.scheme == Scheme::Mxfp4 => Some(Scheme::Mxfp4),
            Some(Dtype::U8) => Some(Scheme::Nvfp4),
            // a dtype that no scheme knows is refused when the tensor is matched
            Some(_) => Some(Scheme::Bf16),
        }
    }
}

impl Lookup for Names<'_> {
    fn scheme(&self, module: &str) -> Option<Scheme> {
        let scheme = self.stored_scheme(module)?;
        if scheme != Scheme::Bf16 && scheme != self.declared.scheme {
            self.undeclared.borrow_mut().get_or_insert_with(|| (module.to_owned(), scheme));
        }
        Some(scheme)
    }

    fn has(&self, tensor: &str) -> bool {
        self.by_canonical.contains_key(tensor)
    }
}
