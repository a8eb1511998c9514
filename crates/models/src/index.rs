//! `model.safetensors.index.json`: which checkpoint file holds which tensor.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::CheckpointError;

/// The index's name in a checkpoint directory.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The name of a checkpoint that is a single file.
pub const SINGLE_FILE: &str = "model.safetensors";

/// A parsed index: tensor name to the name of a file beside the index.
#[derive(Debug, Clone, Default)]
pub struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Parses the index's JSON; every entry must be a plain file name (no separators, no `..`).
    ///
    /// # Errors
    /// Not JSON, no `weight_map`, or an entry that leads out of the directory.
    pub fn parse(json: &[u8]) -> Result<Self, CheckpointError> {
        let RawIndex { weight_map } =
            serde_json::from_slice(json).map_err(|e| CheckpointError::IndexSyntax {
                file: INDEX_FILE.into(),
                reason: format!("not a valid index: {e}"),
            })?;
        if weight_map.is_empty() {
            return Err(CheckpointError::IndexSyntax {
                file: INDEX_FILE.into(),
                reason: "weight_map is empty".into(),
            });
        }
        let plain =
            |f: &str| !f.is_empty() && f != "." && f != ".." && !f.contains(['/', '\\', '\0']);
        if let Some((tensor, file)) = weight_map.iter().find(|(_, f)| !plain(f)) {
            return Err(CheckpointError::IndexPath {
                index: INDEX_FILE.into(),
                tensor: tensor.clone(),
                found: file.clone(),
            });
        }
        Ok(Self { weight_map })
    }

    /// The files that hold weights, sorted, each once.
    pub fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        files.sort_unstable();
        files.dedup();
        files
    }

    /// The file that holds `tensor`.
    pub fn file_of(&self, tensor: &str) -> Option<&str> {
        self.weight_map.get(tensor).map(String::as_str)
    }

    /// All `(tensor, file)` entries, sorted by tensor name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.weight_map.iter().map(|(t, f)| (t.as_str(), f.as_str()))
    }
}
