//! `model.safetensors.index.json`: which checkpoint file holds which tensor.

use std::{borrow::Cow, collections::HashMap, fmt};

use serde::{
    Deserialize,
    de::{MapAccess, Visitor},
};

use crate::error::CheckpointError;

/// The index's name in a checkpoint directory.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The name of a checkpoint that is a single file.
pub const SINGLE_FILE: &str = "model.safetensors";

/// A parsed index: tensor name to the name of a file beside the index.
///
/// A hundred thousand tensors lie in a hundred files, so each file's name is kept once.
#[derive(Debug, Clone, Default)]
pub struct Index {
    files: Vec<String>,
    /// Tensor and number of its file, in the order of the index.
    entries: Vec<(String, u32)>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object with weight_map")]
struct RawIndex {
    weight_map: Index,
}

impl Index {
    /// Parses the index's JSON; every entry must be a plain file name (no separators, no `..`).
    ///
    /// # Errors
    /// Not JSON, no `weight_map`, or an entry that leads out of the directory.
    pub fn parse(json: &[u8]) -> Result<Self, CheckpointError> {
        let RawIndex { weight_map: this } =
            serde_json::from_slice(json).map_err(|e| CheckpointError::IndexSyntax {
                file: INDEX_FILE.into(),
                reason: format!("not a valid index: {e}"),
            })?;
        if this.entries.is_empty() {
            return Err(CheckpointError::IndexSyntax {
                file: INDEX_FILE.into(),
                reason: "weight_map is empty".into(),
            });
        }
        let plain =
            |f: &str| !f.is_empty() && f != "." && f != ".." && !f.contains(['/', '\\', '\0']);
        if let Some(found) = this.files.iter().find(|f| !plain(f)) {
            return Err(CheckpointError::IndexPath {
                index: INDEX_FILE.into(),
                tensor: this.first_tensor_of(found).into(),
                found: found.clone(),
            });
        }
        Ok(this)
    }

    /// The files that hold weights, sorted, each once.
    pub fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.files.iter().map(String::as_str).collect();
        files.sort_unstable();
        files
    }

    /// The first tensor that the index places in `file`; empty when there is none.
    pub fn first_tensor_of(&self, file: &str) -> &str {
        let entry = self.entries().find(|(_, f)| *f == file);
        entry.map_or("", |(tensor, _)| tensor)
    }

    /// All `(tensor, file)` entries, in the order of the index.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries.iter().map(|(t, f)| (t.as_str(), self.files[*f as usize].as_str()))
    }
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Index;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
                let mut numbers: HashMap<String, u32> = HashMap::new();
                let mut index = Index::default();
                while let Some((tensor, Text(file))) = map.next_entry::<String, Text<'de>>()? {
                    let number = match numbers.get(&*file) {
                        Some(number) => *number,
                        None => {
                            let number = index.files.len() as u32;
                            index.files.push(file.clone().into_owned());
                            numbers.insert(file.into_owned(), number);
                            number
                        }
                    };
                    index.entries.push((tensor, number));
                }
                Ok(index)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A string, borrowed from the JSON where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
