//! Synthetic checkpoints: real names, shapes, dtypes and configuration files over random weights.
//!
//! The tensors are those that the family's declaration asks for, so what `synth` writes is what `load` expects; the
//! tests' own generator, which knows nothing of the declarations, keeps both honest.

mod configs;
mod data;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

use longshore_models::{
    Dtype,
    arch::{Family, Model},
    config::{CONFIG_FILE, Config},
    declare::{Lookup, Source},
    error::PlanError,
    header::tensor_bytes,
    index::{INDEX_FILE, SINGLE_FILE},
    options::{KernelLayout, ModelOptions},
    parallel::Parallel,
    quant::Scheme,
};
use serde_json::{Value, json};

use crate::error::LoadError;

/// How large a synthetic checkpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Under a few MiB: tests and trials.
    Tiny,
    /// About 1 GiB: a load that takes a moment.
    Small,
    /// The published dimensions.
    Full,
}

impl FromStr for Scale {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tiny" => Ok(Scale::Tiny),
            "small" => Ok(Scale::Small),
            "full" => Ok(Scale::Full),
            _ => Err("one of tiny, small, full".into()),
        }
    }
}

/// A synthetic checkpoint to be written.
#[derive(Debug, Clone)]
pub struct Synth {
    family: String,
    scheme: String,
    scale: Scale,
    layers: Option<u32>,
    headers_only: bool,
    seed: u64,
}

/// What was written.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Written {
    /// The directory.
    pub directory: PathBuf,
    /// Model family.
    pub family: String,
    /// Quantisation scheme.
    pub quant: String,
    /// Checkpoint files.
    pub files: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub checkpoint_bytes: u64,
    /// Whether the data is a hole.
    pub headers_only: bool,
}

/// The largest checkpoint file at full scale, as the hub's tools write them.
const FILE_BYTES_MAX: u64 = 5_000_000_000;

impl Synth {
    /// A checkpoint of `family` in `scheme` (names as in the manifest), at tiny scale.
    pub fn new(family: &str, scheme: &str) -> Self {
        Self {
            family: family.into(),
            scheme: scheme.into(),
            scale: Scale::Tiny,
            layers: None,
            headers_only: false,
            seed: 0,
        }
    }

    /// Sets the scale.
    pub fn scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// Sets another number of layers than the scale's.
    pub fn layers(mut self, layers: Option<u32>) -> Self {
        self.layers = layers;
        self
    }

    /// Writes real headers over holes: the files have their full length but take no space.
    pub fn headers_only(mut self, yes: bool) -> Self {
        self.headers_only = yes;
        self
    }

    /// Sets the seed of the random weights.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// A short name for everything that decides the bytes: version, configuration and seed.
    ///
    /// # Errors
    /// An unknown family or scheme; the message lists the known ones.
    pub fn fingerprint(&self) -> Result<String, LoadError> {
        let text = format!("{} {} {}", env!("CARGO_PKG_VERSION"), self.config()?, self.seed);
        Ok(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes())))
    }

    fn config(&self) -> Result<Value, LoadError> {
        let reason = |reason| LoadError::Option { option: "synth", reason };
        let family = Family::from_name(&self.family).ok_or_else(|| {
            let known: Vec<&str> = Family::names().collect();
            reason(format!("unknown family {}; known: {}", self.family, known.join(", ")))
        })?;
        let mut config = configs::config(family, &self.scheme, self.scale).map_err(reason)?;
        if let Some(layers) = self.layers {
            let nested = config.get("text_config").is_some();
            let text = if nested { &mut config["text_config"] } else { &mut config };
            text["num_hidden_layers"] = json!(layers);
        }
        Ok(config)
    }

    /// Writes the checkpoint into `dir`, which is created if need be.
    ///
    /// # Errors
    /// An unknown family or scheme, or a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<Written, LoadError> {
        let config = serde_json::to_vec_pretty(&self.config()?).unwrap_or_default();
        let failed = |action| move |source| LoadError::Io { path: dir.into(), action, source };
        let refused = |source| LoadError::Plan { path: dir.into(), source };
        let tensors = tensors(&config).map_err(refused)?;
        fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
        fs::write(dir.join(CONFIG_FILE), &config).map_err(failed("writing config.json"))?;
        let total: u64 = tensors.iter().map(|t| t.bytes).sum();
        let files = split(&tensors, total);
        self.write_files(dir, &files).map_err(failed("writing a checkpoint file"))?;
        if files.len() > 1 {
            write_index(dir, &files, total).map_err(failed("writing the index"))?;
        }
        Ok(Written {
            directory: dir.into(),
            family: self.family.clone(),
            quant: self.scheme.clone(),
            files: files.len(),
            tensors: tensors.len(),
            checkpoint_bytes: total,
            headers_only: self.headers_only,
        })
    }

    fn write_files(&self, dir: &Path, files: &[&[SynthTensor]]) -> io::Result<()> {
        for (i, tensors) in files.iter().enumerate() {
            let mut file = File::create(dir.join(file_name(i, files.len())))?;
            let header = header(tensors);
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            if self.headers_only {
                let data: u64 = tensors.iter().map(|t| t.bytes).sum();
                file.set_len(8 + header.len() as u64 + data)?;
                continue;
            }
            let mut out = BufWriter::with_capacity(1 << 20, file);
            for tensor in *tensors {
                data::write(&mut out, &tensor.name, tensor.dtype, tensor.bytes, self.seed)?;
            }
            out.flush()?;
        }
        Ok(())
    }
}

/// One tensor to be written.
struct SynthTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    bytes: u64,
}

impl SynthTensor {
    fn new(source: Source) -> Self {
        let bytes = tensor_bytes(source.usual, &source.shape).unwrap_or(0);
        Self { name: source.name, dtype: source.usual, shape: source.shape, bytes }
    }
}

/// Every tensor that a configuration implies, the prediction layer included, in natural order of names.
fn tensors(config: &[u8]) -> Result<Vec<SynthTensor>, PlanError> {
    let config = Config::parse(CONFIG_FILE, config)?;
    // layout none: the raw tensors; derived parameters need no sources
    let kernel_layout = Some(KernelLayout::None);
    let options = ModelOptions { kernel_layout, ..ModelOptions::default() };
    let model = Model::new(config.clone(), None, options)?;
    let implied = Implied { scheme: model.declared.scheme };
    let single = Parallel::new(1, 1)?;
    let mut sources = model.declare(single, &implied)?.sources;
    if config.opt_count("num_nextn_predict_layers")? == Some(1) {
        let draft = Model::new(config, None, ModelOptions { draft: true, ..options })?;
        sources.extend(draft.declare(single, &implied)?.sources);
        sources.extend(draft.prediction_copies()?);
    }
    let mut tensors: Vec<SynthTensor> = sources.into_iter().map(SynthTensor::new).collect();
    tensors.sort_by_cached_key(|t| natural_key(&t.name));
    Ok(tensors)
}

/// Answers a declaration from the configuration alone.
struct Implied {
    scheme: Scheme,
}

impl Lookup for Implied {
    fn scheme(&self, _module: &str) -> Option<Scheme> {
        Some(self.scheme)
    }

    fn has(&self, _tensor: &str) -> bool {
        false
    }
}

/// Orders `layers.2` before `layers.10`.
fn natural_key(name: &str) -> Vec<(u64, String)> {
    let part = |p: &str| match p.parse() {
        Ok(number) => (number, String::new()),
        Err(_) => (0, p.to_owned()),
    };
    name.split('.').map(part).collect()
}

/// Consecutive tensors, cut into files; four or so when all would fit into one.
fn split(tensors: &[SynthTensor], total: u64) -> Vec<&[SynthTensor]> {
    let limit = (total / 4 + 1).min(FILE_BYTES_MAX);
    let mut files = Vec::new();
    let (mut first, mut bytes) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if bytes > 0 && bytes + tensor.bytes > limit {
            files.push(&tensors[first..i]);
            (first, bytes) = (i, 0);
        }
        bytes += tensor.bytes;
    }
    files.push(&tensors[first..]);
    files
}

fn file_name(i: usize, count: usize) -> String {
    match count {
        1 => SINGLE_FILE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    }
}

/// The header's JSON, padded with spaces so that the data section starts on a multiple of 8.
fn header(tensors: &[SynthTensor]) -> String {
    let mut at = 0;
    let mut text = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    for t in tensors {
        let entry = json!({
            "dtype": t.dtype.to_string(), "shape": t.shape, "data_offsets": [at, at + t.bytes],
        });
        text.push_str(&format!(",{}:{entry}", Value::from(t.name.as_str())));
        at += t.bytes;
    }
    text.push('}');
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    text
}

fn write_index(dir: &Path, files: &[&[SynthTensor]], total: u64) -> io::Result<()> {
    let mut weight_map = BTreeMap::new();
    for (i, tensors) in files.iter().enumerate() {
        for t in *tensors {
            weight_map.insert(t.name.as_str(), file_name(i, files.len()));
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    fs::write(dir.join(INDEX_FILE), serde_json::to_vec_pretty(&index)?)
}
