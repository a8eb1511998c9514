//! A checkpoint directory, read whole into memory under the names that the model knows.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use super::tensor::Tensor;

/// How the tensors of one module are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Bf16,
    Fp8,
    Nvfp4,
    Mxfp4,
    Int4,
}

impl Stored {
    /// The name in manifests.
    pub(super) fn name(self) -> &'static str {
        match self {
            Stored::Bf16 => "bf16",
            Stored::Fp8 => "fp8",
            Stored::Nvfp4 => "nvfp4",
            Stored::Mxfp4 => "mxfp4",
            Stored::Int4 => "int4",
        }
    }

    /// Elements of the input dimension under one scale.
    pub(super) fn group(self) -> usize {
        match self {
            Stored::Bf16 => 1,
            Stored::Fp8 => 128,
            Stored::Nvfp4 => 16,
            Stored::Mxfp4 | Stored::Int4 => 32,
        }
    }

    /// Elements of the input dimension in one stored element of the weight.
    pub(super) fn packed(self) -> usize {
        match self {
            Stored::Bf16 | Stored::Fp8 => 1,
            Stored::Nvfp4 | Stored::Mxfp4 => 2,
            Stored::Int4 => 8,
        }
    }
}

/// Configuration and tensors of a checkpoint.
///
/// Names are the language model's own: without `language_model.`, with `model.` in front.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// `config.json`
    pub(super) config: Value,
    /// The part of `config.json` that describes the language model.
    pub(super) text: Value,
    /// What the checkpoint says of its quantisation.
    pub(super) declared: Stored,
    tensors: BTreeMap<String, (String, Tensor)>,
    used: RefCell<BTreeSet<String>>,
}

impl Checkpoint {
    /// Reads the files that the index names, or the only one there is.
    pub(super) fn read(directory: &Path) -> Checkpoint {
        let config = json(&directory.join("config.json"));
        let nested = config.get("text_config");
        let text = nested.unwrap_or(&config).clone();
        let declared = declared(directory, &config, &text);
        let mut tensors = BTreeMap::new();
        for (in_file, tensor) in all_tensors(directory) {
            let name = model_name(&in_file);
            let twice = tensors.insert(name, (in_file.clone(), tensor));
            assert!(twice.is_none(), "{in_file} lies in two files or under two names");
        }
        Checkpoint { config, text, declared, tensors, used: RefCell::default() }
    }

    /// `architectures[0]`
    pub(super) fn architecture(&self) -> &str {
        self.config["architectures"][0].as_str().expect("config.json names an architecture")
    }

    /// Whether there is a tensor of that name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of that name.
    pub(super) fn get(&self, name: &str) -> &Tensor {
        let (in_file, tensor) =
            self.tensors.get(name).unwrap_or_else(|| panic!("the checkpoint lacks {name}"));
        self.used.borrow_mut().insert(in_file.clone());
        tensor
    }

    /// Rows and columns of a module's weight as the model counts them, packed or not; does not count
    /// as a use.
    pub(super) fn linear_shape(&self, module: &str) -> [usize; 2] {
        let names = ["weight", "weight_packed"].map(|suffix| format!("{module}.{suffix}"));
        let found = names.iter().find_map(|name| self.tensors.get(name));
        let (_, tensor) = found.unwrap_or_else(|| panic!("the checkpoint lacks {}", names[0]));
        let [rows, columns] = tensor.matrix();
        [rows, columns * self.stored(module).packed()]
    }

    /// The one number of a scalar, whether its shape is `[]` or `[1]`.
    pub(super) fn scalar(&self, name: &str) -> f32 {
        let values = self.get(name).floats();
        assert_eq!(values.len(), 1, "{name} is no scalar");
        values[0]
    }

    /// How a module is stored: its tensors show it.
    pub(super) fn stored(&self, module: &str) -> Stored {
        let has = |suffix: &str| self.has(&format!("{module}.{suffix}"));
        match () {
            () if has("weight_packed") => Stored::Int4,
            () if has("weight_scale_inv") => Stored::Fp8,
            () if has("weight_scale_2") => Stored::Nvfp4,
            () if has("weight_scale") => Stored::Mxfp4,
            () => Stored::Bf16,
        }
    }

    /// A dimension of the language model; 0 where the key is absent or null.
    pub(super) fn size(&self, key: &str) -> usize {
        self.text[key].as_u64().unwrap_or(0) as usize
    }

    /// The dtype of what is not quantised.
    pub(super) fn model_dtype(&self) -> &'static str {
        let keys = ["dtype", "torch_dtype"];
        let found = [&self.config, &self.text]
            .into_iter()
            .find_map(|config| keys.into_iter().find_map(|key| config[key].as_str()));
        match found {
            None | Some("bfloat16") => "BF16",
            Some("float16") => "F16",
            Some("float32") => "F32",
            Some(other) => panic!("no model computes in {other}"),
        }
    }

    /// Names, as in the files, of the tensors that nobody asked for.
    pub(super) fn unused(&self) -> BTreeSet<String> {
        let used = self.used.borrow();
        let all = self.tensors.values().map(|(in_file, _)| in_file);
        all.filter(|name| !used.contains(*name)).cloned().collect()
    }
}

fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every tensor of every file, under the name in the file.
fn all_tensors(directory: &Path) -> Vec<(String, Tensor)> {
    let index = directory.join("model.safetensors.index.json");
    let mut files = BTreeSet::new();
    if index.exists() {
        let index = json(&index);
        let map = index["weight_map"].as_object().expect("an index has a weight_map");
        files.extend(map.values().map(|file| file.as_str().expect("a file name").to_owned()));
    } else {
        files.insert("model.safetensors".to_owned());
    }
    let mut out = Vec::new();
    for file in files {
        let bytes = fs::read(directory.join(&file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{file}: {e}"));
        for (name, view) in tensors.tensors() {
            let dtype = view.dtype().to_string();
            out.push((name, Tensor::new(&dtype, view.shape(), view.data().to_vec())));
        }
    }
    out
}

/// The name that the model knows a tensor under (§2.7, §2.9).
fn model_name(in_file: &str) -> String {
    if in_file.contains("vision_tower") || in_file.contains("mm_projector") {
        return in_file.to_owned();
    }
    let mut name = in_file.to_owned();
    if let Some(rest) = name.strip_prefix("language_model.layers.") {
        name = format!("model.layers.{rest}");
    }
    name = name.replace("language_model.", "");
    if ["layers.", "embed_tokens.", "norm."].iter().any(|lead| name.starts_with(lead)) {
        name = format!("model.{name}");
    }
    name
}

/// The scheme that the configuration files declare (§1.6).
fn declared(directory: &Path, config: &Value, text: &Value) -> Stored {
    let beside = directory.join("hf_quant_config.json");
    let places = [&config["quantization_config"], &text["quantization_config"]];
    if let Some(found) = places.into_iter().find(|place| place.is_object()) {
        return match found["quant_method"].as_str() {
            Some("fp8") => Stored::Fp8,
            Some("modelopt") => Stored::Nvfp4,
            Some("quark") => Stored::Mxfp4,
            Some("compressed-tensors") => Stored::Int4,
            other => panic!("unknown quantisation method {other:?}"),
        };
    }
    if beside.exists() { Stored::Nvfp4 } else { Stored::Bf16 }
}
