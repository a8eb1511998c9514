//! Reads what `longshore load … --out DIR` wrote.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::oracle::{Param, Rank};

/// Parameters and aliases of one rank's file.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn read_rank(path: &Path) -> Result<Rank, String> {
    let blob = fs::read(path).map_err(|e| e.to_string())?;
    let (_, metadata) = SafeTensors::read_metadata(&blob).map_err(|e| e.to_string())?;
    let tensors = SafeTensors::deserialize(&blob).map_err(|e| e.to_string())?;
    let mut rank = Rank::default();
    for (key, source) in metadata.metadata().iter().flatten() {
        if let Some(derived) = key.strip_prefix("alias:") {
            rank.aliases.insert(derived.to_owned(), source.clone());
        }
    }
    for (name, view) in tensors.tensors() {
        let param = Param {
            dtype: view.dtype().to_string(),
            shape: view.shape().iter().map(|d| *d as u64).collect(),
            bytes: view.data().to_vec(),
        };
        rank.parameters.insert(name, param);
    }
    Ok(rank)
}

/// `manifest.json`
///
/// # Errors
/// What is wrong with the file.
pub(super) fn read_manifest(out_dir: &Path) -> Result<Value, String> {
    let text = fs::read_to_string(out_dir.join("manifest.json")).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

/// The rank files in a directory.
pub(super) fn rank_files(out_dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(out_dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("rank-")).collect()
}
