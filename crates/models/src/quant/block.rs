//! One declaration of quantisation as a file has it, before its parameters are checked.

use crate::{
    config::Config,
    error::PlanError,
    quant::{Declared, Scheme, method},
};

/// A declaration; nothing in it is believed yet.
#[derive(Debug)]
pub(super) struct Block {
    config: Config,
    /// Whether it is the whole of `hf_quant_config.json`.
    pub(super) beside: bool,
}

/// Whose format a declaration is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Fp8,
    ModelOpt,
    Quark,
    CompressedTensors,
    Unknown,
}

impl Block {
    /// Every declaration, in lookup order (reference §1.6).
    ///
    /// # Errors
    /// A key that ought to hold a declaration holds something else.
    pub(super) fn all(
        config: &Config,
        hf_quant_config: Option<&Config>,
    ) -> Result<Vec<Self>, PlanError> {
        let mut blocks = Vec::new();
        let text = config.nested("text_config");
        let places = [
            (Some(config), "quantization_config"),
            (text.as_ref(), "quantization_config"),
            (Some(config), "compression_config"),
        ];
        for (place, key) in places {
            let Some(place) = place.filter(|p| p.get(key).is_some()) else {
                continue;
            };
            let block = place.nested(key).ok_or_else(|| place.wrong(key, "an object"))?;
            // an empty object declares nothing
            if block.value().as_object().is_some_and(|object| !object.is_empty()) {
                blocks.push(Self { config: block, beside: false });
            }
        }
        blocks.extend(hf_quant_config.map(|c| Self { config: c.clone(), beside: true }));
        Ok(blocks)
    }

    /// Reads and checks the declaration.
    ///
    /// # Errors
    /// A method that is not known, or parameters of it that are not supported.
    pub(super) fn read(&self) -> Result<Declared, PlanError> {
        match self.method() {
            Method::Fp8 => method::fp8(&self.config),
            Method::ModelOpt => method::modelopt(&self.config),
            Method::Quark => method::quark(&self.config),
            Method::CompressedTensors => method::compressed_tensors(&self.config),
            Method::Unknown => {
                let expected = "fp8, modelopt, modelopt_fp4, quark or compressed-tensors";
                Err(self.config.wrong("quant_method", expected))
            }
        }
    }

    /// The scheme that is declared, supported or not; `None` when it is none of ours.
    pub(super) fn scheme(&self) -> Option<Scheme> {
        match self.method() {
            Method::Fp8 => Some(Scheme::Fp8),
            Method::ModelOpt => {
                let nvfp4 = |algo: String| algo.eq_ignore_ascii_case(method::NVFP4);
                self.algo().is_some_and(|(_, algo)| nvfp4(algo)).then_some(Scheme::Nvfp4)
            }
            Method::Quark => Some(Scheme::Mxfp4),
            Method::CompressedTensors => Some(Scheme::Int4),
            Method::Unknown => None,
        }
    }

    /// Place and value: `config.json: quantization_config.quant_algo says NVFP4, group size 16`.
    pub(super) fn says(&self) -> String {
        let (place, value) = self.statement();
        format!("{place} says {value}")
    }

    /// # Errors
    /// Another algorithm or another group size (contract §4, "where NVFP4 is declared").
    pub(super) fn check_agrees(&self, other: &Block) -> Result<(), PlanError> {
        let algo = |block: &Block| {
            let algo = block.algo().map(|(_, algo)| algo.to_ascii_uppercase());
            (block.method(), algo)
        };
        let sizes = self.group_size().zip(other.group_size());
        if algo(self) == algo(other) && sizes.is_none_or(|(a, b)| a == b) {
            return Ok(());
        }
        let ((first, first_value), (second, second_value)) = (self.statement(), other.statement());
        Err(PlanError::DeclarationsDiffer { first, first_value, second, second_value })
    }

    fn method(&self) -> Method {
        match self.config.text("quant_method") {
            Some("fp8") => Method::Fp8,
            Some("modelopt" | "modelopt_fp4" | "modelopt_fp8") => Method::ModelOpt,
            Some("quark") => Method::Quark,
            Some("compressed-tensors") => Method::CompressedTensors,
            // the name may be left out where there is a quant_algo (reference §1.6)
            None if self.beside || self.algo().is_some() => Method::ModelOpt,
            _ => Method::Unknown,
        }
    }

    /// ModelOpt's `quant_algo`, flat or nested, and where it stands.
    fn algo(&self) -> Option<(String, String)> {
        let (holder, algo) = method::modelopt_algo(&self.config);
        algo.map(|algo| (holder.place("quant_algo"), algo))
    }

    fn group_size(&self) -> Option<u64> {
        method::group_sizes(&self.config).first().and_then(|(_, size)| *size)
    }

    fn statement(&self) -> (String, String) {
        let method = || {
            let value = self.config.text("quant_method").unwrap_or("nothing that is understood");
            (self.config.place("quant_method"), value.to_owned())
        };
        let (place, mut value) = self.algo().unwrap_or_else(method);
        if let Some(size) = self.group_size() {
            value = format!("{value}, group size {size}");
        }
        (place, value)
    }
}
