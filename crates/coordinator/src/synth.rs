//! Synthetic checkpoints: real names, shapes, dtypes and configuration files over random weights.
//!
//! | step | module | in → out |
//! |---|---|---|
//! | configuration files | `configs`, `quantization`, `shrink` | family, scheme and scale, or an existing configuration → JSON |
//! | tensors | `tensors` | configuration files → names, dtypes, shapes |
//! | files | `files`, `data` | tensors → headers, index, random weights or holes |
//!
//! The tensors are those that the family's declaration asks for, so what `synth` writes is what `load` expects; the
//! tests' own generator and list matcher, which know nothing of the declarations, keep both honest.

mod configs;
mod data;
mod files;
mod quantization;
mod shrink;
mod tensors;

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use longshore_models::{
    arch::{Family, Model},
    config::{CONFIG_FILE, Config, HF_QUANT_CONFIG_FILE},
    options::ModelOptions,
    quant::Scheme,
};
use serde_json::{Value, json};

use crate::error::LoadError;

/// How large a synthetic checkpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// A few MiB: tests and trials.
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
    origin: Origin,
    scale: Option<Scale>,
    layers: Option<u32>,
    headers_only: bool,
    seed: u64,
}

/// What a synthetic checkpoint is modelled on.
#[derive(Debug, Clone)]
enum Origin {
    /// A family and a scheme, by name.
    Family { family: String, scheme: String },
    /// The configuration files in a directory.
    Config(PathBuf),
}

/// The configuration files of a checkpoint, as they are written.
struct ConfigFiles {
    config: Vec<u8>,
    hf_quant_config: Option<Vec<u8>>,
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

/// Counts up whenever the same arguments give other bytes, so that no old checkpoint is taken from the cache.
const REVISION: u32 = 2;

impl Synth {
    /// A checkpoint of `family` in `scheme` (names as in the manifest), at tiny scale.
    pub fn new(family: &str, scheme: &str) -> Self {
        let (family, scheme) = (family.into(), scheme.into());
        Self::of(Origin::Family { family, scheme })
    }

    /// A checkpoint with the dimensions and the quantisation of the `config.json` (and `hf_quant_config.json`) in
    /// `directory`, at full scale.
    pub fn like(directory: &Path) -> Self {
        Self::of(Origin::Config(directory.into()))
    }

    fn of(origin: Origin) -> Self {
        Self { origin, scale: None, layers: None, headers_only: false, seed: 0 }
    }

    /// Sets the scale; `None`: tiny for a family, full for a configuration.
    pub fn scale(mut self, scale: impl Into<Option<Scale>>) -> Self {
        self.scale = scale.into();
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

    /// A short name for everything that decides the bytes: revision, configuration and seed.
    ///
    /// # Errors
    /// An unknown family or scheme (the message lists the known ones), or a configuration that cannot be read.
    pub fn fingerprint(&self) -> Result<String, LoadError> {
        let files = self.config_files()?;
        let mut text = format!("{REVISION} {} ", self.seed).into_bytes();
        text.extend(files.config);
        text.extend(files.hf_quant_config.unwrap_or_default());
        Ok(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&text)))
    }

    /// Writes the checkpoint into `dir`, which is created if need be.
    ///
    /// # Errors
    /// An unknown family or scheme, a configuration that cannot be read or is not supported, or a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<Written, LoadError> {
        if let Origin::Config(from) = &self.origin {
            refuse_its_own(from, dir)?;
        }
        let given = self.config_files()?;
        let named = match &self.origin {
            Origin::Config(from) => from.as_path(),
            Origin::Family { .. } => dir,
        };
        let refused = |source| LoadError::Plan { path: named.into(), source };
        let config = Config::parse(CONFIG_FILE, &given.config).map_err(refused)?;
        let beside = match &given.hf_quant_config {
            Some(json) => Some(Config::parse(HF_QUANT_CONFIG_FILE, json).map_err(refused)?),
            None => None,
        };
        let model =
            Model::new(config, beside.as_ref(), ModelOptions::default()).map_err(refused)?;
        let tensors = tensors::implied(&model, beside.as_ref()).map_err(refused)?;

        let failed = |action| move |source| LoadError::Io { path: dir.into(), action, source };
        fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
        let files = files::split(&tensors);
        files::write(dir, &files, (!self.headers_only).then_some(self.seed))
            .map_err(failed("writing a checkpoint file"))?;
        given.write(dir).map_err(failed("writing a configuration file"))?;
        Ok(Written {
            directory: dir.into(),
            family: model.family.name().into(),
            quant: model.declared.scheme.name().into(),
            files: files.len(),
            tensors: tensors.len(),
            checkpoint_bytes: tensors.iter().map(|t| t.bytes).sum(),
            headers_only: self.headers_only,
        })
    }

    fn config_files(&self) -> Result<ConfigFiles, LoadError> {
        match &self.origin {
            Origin::Family { family, scheme } => self.made(family, scheme),
            Origin::Config(directory) => self.taken(directory),
        }
    }

    /// The configuration of a family in a scheme.
    fn made(&self, family: &str, scheme: &str) -> Result<ConfigFiles, LoadError> {
        let refuse = |reason| LoadError::Option { option: "synth", reason };
        let known = Family::from_name(family).ok_or_else(|| {
            let names: Vec<&str> = Family::names().collect();
            refuse(format!("unknown family {family}; known: {}", names.join(", ")))
        })?;
        let schemes = quantization::schemes(known);
        let scheme = schemes.iter().find(|s| s.name() == scheme).ok_or_else(|| {
            let names: Vec<&str> = schemes.iter().map(|s| s.name()).collect();
            refuse(format!("{family} is not written in {scheme}; known: {}", names.join(", ")))
        })?;
        let mut config = configs::config(known, self.scale.unwrap_or(Scale::Tiny));
        self.set_layers(&mut config);
        let beside = quantization::declare(&mut config, known, *scheme);
        Ok(ConfigFiles { config: pretty(&config), hf_quant_config: beside.as_ref().map(pretty) })
    }

    /// The configuration of an existing checkpoint, byte for byte unless it is to be another size.
    fn taken(&self, directory: &Path) -> Result<ConfigFiles, LoadError> {
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read(&path).map_err(|source| LoadError::Io { path, action: "reading", source })
        };
        let mut config = read(CONFIG_FILE)?;
        let hf_quant_config = match read(HF_QUANT_CONFIG_FILE) {
            Err(LoadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            other => Some(other?),
        };
        let scale = self.scale.unwrap_or(Scale::Full);
        if scale != Scale::Full || self.layers.is_some() {
            let refused = |source| LoadError::Plan { path: directory.into(), source };
            let parsed = Config::parse(CONFIG_FILE, &config).map_err(refused)?;
            let family = Family::from_config(&parsed).map_err(refused)?;
            let mut value = parsed.value().clone();
            if scale != Scale::Full {
                shrink::shrink(&mut value, &configs::config(family, scale));
            }
            self.set_layers(&mut value);
            config = pretty(&value);
        }
        Ok(ConfigFiles { config, hf_quant_config })
    }

    fn set_layers(&self, config: &mut Value) {
        if let Some(layers) = self.layers {
            text_config(config)["num_hidden_layers"] = json!(layers);
        }
    }
}

impl ConfigFiles {
    fn write(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join(CONFIG_FILE), &self.config)?;
        let beside = dir.join(HF_QUANT_CONFIG_FILE);
        match &self.hf_quant_config {
            Some(json) => fs::write(beside, json),
            // one that an earlier checkpoint left there would declare what is not so
            None => match fs::remove_file(beside) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            },
        }
    }
}

/// A checkpoint is not replaced by random weights after its own configuration.
fn refuse_its_own(from: &Path, dir: &Path) -> Result<(), LoadError> {
    let same = matches!((from.canonicalize(), dir.canonicalize()), (Ok(a), Ok(b)) if a == b);
    let holds_weights = || {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.path()).any(|path| path.extension().is_some_and(|x| x == "safetensors"))
    };
    if same && holds_weights() {
        let reason = format!("{} holds a checkpoint; give another directory", dir.display());
        return Err(LoadError::Option { option: "synth --config", reason });
    }
    Ok(())
}

/// The part of a configuration that describes the language model.
fn text_config(config: &mut Value) -> &mut Value {
    match config.get("text_config").is_some_and(Value::is_object) {
        true => &mut config["text_config"],
        false => config,
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    // a value that was made of plain numbers, texts, lists and objects can always be written
    serde_json::to_vec_pretty(value).unwrap_or_default()
}

/// The schemes that `family` is published in, for the command line's help and tests.
pub fn schemes(family: Family) -> &'static [Scheme] {
    quantization::schemes(family)
}
