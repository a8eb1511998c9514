//! How tensors are spread over files, and the bytes of one file.

use sha2::{Digest, Sha256};

use super::json::Json;
use super::tensor::Tensor;

/// Spreads the tensors over `count` files, on purpose not in layer order: the halves of a fused
/// parameter (q_a and kv_a, gate and up of one expert) go to different files, a weight and its
/// scale usually as well.
pub(super) fn place(
    tensors: Vec<Tensor>,
    count: usize,
    seed: u64,
    unaligned: bool,
) -> Vec<Vec<Tensor>> {
    let mut files: Vec<Vec<Tensor>> = vec![Vec::new(); count];
    for tensor in tensors {
        files[file_of(&tensor.name, seed) % count].push(tensor);
    }
    for file in &mut files {
        file.sort_by_key(|t| {
            // the widest elements first keep every tensor aligned
            let width = if unaligned { 0 } else { 8 - t.element_bytes() };
            (width, Sha256::digest(format!("{seed}|order|{}", t.name)))
        });
    }
    files.retain(|file| !file.is_empty());
    files
}

fn file_of(name: &str, seed: u64) -> usize {
    let parts: Vec<&str> = name.split('.').collect();
    let number = |part: &str| part.parse::<usize>().ok();
    let layer = parts.iter().find_map(|part| number(part)).unwrap_or(0);
    let expert = match parts.iter().position(|part| *part == "experts") {
        Some(at) => number(parts[at + 1]).expect("an expert has a number"),
        None => 0,
    };
    if name.ends_with(".weight") || name.ends_with(".weight_packed") {
        if parts.contains(&"q_a_proj") || parts.contains(&"gate_proj") {
            return layer + expert;
        }
        if parts.contains(&"kv_a_proj_with_mqa") || parts.contains(&"up_proj") {
            return layer + expert + 1;
        }
    }
    let digest = Sha256::digest(format!("{seed}|file|{name}"));
    u32::from_le_bytes(digest[..4].try_into().expect("four bytes")) as usize
}

/// The names of `count` checkpoint files.
pub(super) fn names(count: usize) -> Vec<String> {
    match count {
        1 => vec!["model.safetensors".to_owned()],
        n => (1..=n).map(|i| format!("model-{i:05}-of-{n:05}.safetensors")).collect(),
    }
}

/// One entry of a header; offsets are relative to the data section and may be lies.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    pub(super) data_offsets: [u64; 2],
}

/// Header and data of one file, still apart so that either can be damaged.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) header: Vec<Entry>,
    pub(super) data: Vec<u8>,
}

impl File {
    /// The tensors one behind the other, without gaps.
    pub(super) fn new(tensors: &[Tensor]) -> File {
        let mut file = File { header: Vec::new(), data: Vec::new() };
        for tensor in tensors {
            let begin = file.data.len() as u64;
            file.data.extend_from_slice(&tensor.data);
            file.header.push(Entry {
                name: tensor.name.clone(),
                dtype: tensor.dtype.clone(),
                shape: tensor.shape.iter().map(|d| *d as u64).collect(),
                data_offsets: [begin, file.data.len() as u64],
            });
        }
        file
    }

    /// Length of the header, header padded to 8 bytes with spaces, data.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let metadata = Json::object([("format", "pt".into())]);
        let mut header = Json::object([("__metadata__", metadata)]);
        for entry in &self.header {
            let value = Json::object([
                ("dtype", entry.dtype.as_str().into()),
                ("shape", entry.shape.clone().into()),
                ("data_offsets", entry.data_offsets.into()),
            ]);
            header.set(&entry.name, value);
        }
        let mut text = header.compact().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text);
        out.extend(&self.data);
        out
    }
}
