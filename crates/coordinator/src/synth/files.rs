//! Checkpoint files: which tensors go together, headers, index, data or holes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use longshore_models::index::{INDEX_FILE, SINGLE_FILE};
use serde_json::{Value, json};

use crate::synth::{data, tensors::SynthTensor};

/// The largest checkpoint file, as the hub's tools write them.
const FILE_BYTES_MAX: u64 = 5_000_000_000;

/// Consecutive tensors, cut into files; four or so when all would fit into one.
pub(super) fn split(tensors: &[SynthTensor]) -> Vec<&[SynthTensor]> {
    let total: u64 = tensors.iter().map(|t| t.bytes).sum();
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

/// Writes all files and, for more than one, the index; without a seed the data is a hole.
pub(super) fn write(dir: &Path, files: &[&[SynthTensor]], seed: Option<u64>) -> io::Result<()> {
    for (i, tensors) in files.iter().enumerate() {
        let mut file = File::create(dir.join(name(i, files.len())))?;
        let header = header(tensors);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let Some(seed) = seed else {
            let data: u64 = tensors.iter().map(|t| t.bytes).sum();
            file.set_len(8 + header.len() as u64 + data)?;
            continue;
        };
        let mut out = BufWriter::with_capacity(1 << 20, file);
        for tensor in *tensors {
            data::write(&mut out, tensor, seed)?;
        }
        out.flush()?;
    }
    match files.len() {
        1 => Ok(()),
        _ => write_index(dir, files),
    }
}

fn name(i: usize, count: usize) -> String {
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

fn write_index(dir: &Path, files: &[&[SynthTensor]]) -> io::Result<()> {
    let mut weight_map = BTreeMap::new();
    for (i, tensors) in files.iter().enumerate() {
        for t in *tensors {
            weight_map.insert(t.name.as_str(), name(i, files.len()));
        }
    }
    let total: u64 = files.iter().flat_map(|tensors| tensors.iter()).map(|t| t.bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    fs::write(dir.join(INDEX_FILE), serde_json::to_vec_pretty(&index)?)
}
