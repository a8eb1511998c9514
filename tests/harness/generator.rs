//! Writes small synthetic checkpoints in Hugging Face layout: real names, real dtypes, real
//! configuration files, random weights.
//!
//! The same arguments give the same bytes on every machine, byte for byte those of the conformance
//! cases: the numbers come from a counter over the tensor's name. The generator knows the published
//! formats and nothing of the loader under test.
//!
//! ```no_run
//! use longshore_harness::generator::{Checkpoint, Family, Preset, Scheme};
//!
//! let written = Checkpoint::new(Family::DeepseekV3, Scheme::Fp8)
//!     .preset(Preset::Odd)
//!     .seed(7)
//!     .set("num_hidden_layers", 2)
//!     .write("/tmp/checkpoint".as_ref())?;
//! assert_eq!(written.files.len(), 4);
//! # Ok::<(), std::io::Error>(())
//! ```

mod config;
mod damage;
mod disk;
mod family;
mod files;
mod json;
mod model;
mod modelopt;
mod numbers;
mod quantization;
mod settings;
mod tensor;
mod writer;

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use self::damage::Break;
pub use self::family::{Family, Preset, Scheme};
use self::json::Json;
use self::settings::Settings;

/// A checkpoint to be written: family, scheme and what differs from the defaults.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    family: Family,
    scheme: Scheme,
    preset: Preset,
    seed: u64,
    overrides: Vec<(String, Json)>,
    damage: Option<Break>,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// The directory of the checkpoint.
    pub directory: PathBuf,
    /// The checkpoint files, in the order of their names.
    pub files: Vec<PathBuf>,
    /// Number of tensors in the files.
    pub tensors: usize,
    /// Bytes of the checkpoint files, headers included.
    pub bytes: u64,
    /// What a good error message about the damage names: any one of these.
    pub message_names_one_of: Vec<String>,
}

impl Checkpoint {
    /// A checkpoint of the preset `tiny` with seed 0.
    pub fn new(family: Family, scheme: Scheme) -> Checkpoint {
        let overrides = Vec::new();
        Checkpoint { family, scheme, preset: Preset::Tiny, seed: 0, overrides, damage: None }
    }

    /// Chooses the dimensions.
    pub fn preset(self, preset: Preset) -> Checkpoint {
        Checkpoint { preset, ..self }
    }

    /// Chooses the weights.
    pub fn seed(self, seed: u64) -> Checkpoint {
        Checkpoint { seed, ..self }
    }

    /// Changes one dimension or switch; an unknown key makes [`write`](Self::write) fail with a
    /// list of the known ones.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Checkpoint {
        self.overrides.push((key.to_owned(), Json::from(&value.into())));
        self
    }

    /// Spreads the tensors over this many files.
    pub fn files(self, count: usize) -> Checkpoint {
        self.set("files", count)
    }

    /// Writes it damaged.
    pub fn break_with(self, damage: Break) -> Checkpoint {
        Checkpoint { damage: Some(damage), ..self }
    }

    /// The family that was asked for.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The scheme that was asked for.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Writes checkpoint files, index, configuration and tokenizer files into `directory`, which is
    /// created if need be.
    ///
    /// # Errors
    /// A scheme that the family has not, an unknown key, damage that the model cannot have
    /// (`InvalidInput`), and whatever the file system says.
    pub fn write(&self, directory: &Path) -> io::Result<Written> {
        let (family, scheme, seed) = (self.family, self.scheme, self.seed);
        if !family.schemes().contains(&scheme) {
            let (family, scheme) = (family.name(), scheme.name());
            return Err(refuse(format!("{family} has no scheme {scheme}")));
        }
        let settings = Settings::new(family, scheme, self.preset, &self.overrides)?;
        let tensors = model::tensors(family, scheme, &settings, seed);
        let configs = config::files(family, scheme, &settings).map_err(refuse)?;
        let unaligned = settings.flag("unaligned");
        let mut groups = files::place(tensors, settings.size("files"), seed, unaligned);
        let mut names = match self.damage {
            Some(kind) => damage::tensors(&mut groups, kind, family, scheme, seed)?,
            None => vec![],
        };
        let twice = usize::from(self.damage == Some(Break::DupTensorTwoFiles));
        let tensors = groups.iter().map(Vec::len).sum::<usize>() + twice;
        let on_disk = disk::write(directory, groups, configs, self.damage)?;
        names.extend(on_disk.message_names);
        for name in &mut names {
            // an exporter's prefix before "layers." may be written either way in a message
            if let Some(at) = name.find("layers.") {
                name.drain(..at);
            }
        }
        Ok(Written {
            directory: directory.to_owned(),
            files: on_disk.files,
            tensors,
            bytes: on_disk.bytes,
            message_names_one_of: names,
        })
    }
}

/// An answer to arguments that make no sense.
fn refuse(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}
