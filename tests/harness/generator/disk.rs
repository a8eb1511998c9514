//! Lays tensors out in files, damages headers and index, and writes the directory.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use super::damage::{Break, locate};
use super::files::{self, File};
use super::json::Json;
use super::tensor::Tensor;

/// What lies on disk afterwards.
pub(super) struct Directory {
    pub(super) files: Vec<PathBuf>,
    pub(super) bytes: u64,
    pub(super) message_names: Vec<String>,
}

/// Writes checkpoint files, index and configuration files, with the damage that concerns them.
pub(super) fn write(
    directory: &Path,
    mut groups: Vec<Vec<Tensor>>,
    mut configs: Vec<(&'static str, Json)>,
    kind: Option<Break>,
) -> io::Result<Directory> {
    let names = files::names(groups.len());
    let mut index = Index::new(&groups, &names);
    let mut message_names = Vec::new();
    if kind == Some(Break::DupTensorTwoFiles) {
        let (f, i) = locate(&groups, "layers.0.input_layernorm.weight")?;
        let mut copy = groups[f][i].clone();
        assert!(groups.len() > 1, "a duplicate needs two files");
        copy.data.reverse();
        message_names = vec![copy.name.clone()];
        let other = (f + 1) % groups.len();
        groups[other].push(copy);
        index = Index { total_bytes: total_bytes(&groups), ..index };
    }

    let last = groups.len() - 1;
    let mut blobs: Vec<_> = groups[..last].iter().map(|g| File::new(g).bytes()).collect();
    let mut file = File::new(&groups[last]);
    message_names.extend(damage_offsets(&mut file, &names[last], kind));
    let mut blob = file.bytes();
    message_names.extend(damage_blob(&mut blob, &names[last], kind));
    blobs.push(blob);

    fs::create_dir_all(directory)?;
    let mut targets: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
    if kind == Some(Break::IndexPointsToMissingFile) {
        message_names = index.point_to_missing_file(&names);
    }
    if kind == Some(Break::IndexPathTraversal) {
        // the file exists beside the directory, so a loader that only joins paths would read it
        let outside = outside_of(directory)?;
        targets[0] = directory.join(&outside);
        message_names = index.point_outside(&names[0], outside);
    }
    let mut bytes = 0;
    for (target, blob) in targets.iter().zip(&blobs) {
        fs::write(target, blob)?;
        bytes += blob.len() as u64;
    }
    if groups.len() > 1 {
        configs.push(("model.safetensors.index.json", index.json()));
    }
    message_names.extend(write_configs(directory, configs, kind)?);
    Ok(Directory { files: targets, bytes, message_names })
}

fn write_configs(
    directory: &Path,
    configs: Vec<(&'static str, Json)>,
    kind: Option<Break>,
) -> io::Result<Vec<String>> {
    let mut message_names = Vec::new();
    for (name, mut value) in configs {
        if name == "config.json" && kind == Some(Break::EmptyArchitectures) {
            value.set("architectures", Json::List(vec![]));
            message_names = ["architectures", "config.json"].map(str::to_owned).into();
        }
        let mut text = value.pretty() + "\n";
        if name == "config.json" && kind == Some(Break::ConfigNotJson) {
            text.truncate(text.len() / 2);
            message_names = vec![name.to_owned()];
        }
        fs::write(directory.join(name), text)?;
    }
    Ok(message_names)
}

/// Lies in the header of the last file.
fn damage_offsets(file: &mut File, file_name: &str, kind: Option<Break>) -> Vec<String> {
    let count = file.header.len();
    let before = file.header.len().checked_sub(2).map(|i| file.header[i].name.clone());
    let entry = &mut file.header[count - 1];
    let [begin, end] = entry.data_offsets;
    let element = (end - begin) / entry.shape.iter().product::<u64>();
    let mut names = vec![file_name.to_owned(), entry.name.clone()];
    match kind {
        Some(Break::OverlappingOffsets) => {
            assert!(begin >= element, "an overlap needs a tensor before the last one");
            entry.data_offsets = [begin - element, end - element];
            file.data.truncate((end - element) as usize);
            names.extend(before);
        }
        Some(Break::HoleInOffsets) => {
            entry.data_offsets = [begin + 64, end + 64];
            let tail = file.data.split_off(begin as usize);
            file.data.extend([0; 64]);
            file.data.extend(tail);
        }
        Some(Break::OffsetOverflow) => {
            entry.dtype = "BF16".into();
            entry.shape = vec![1 << 32, 1 << 32];
            entry.data_offsets = [begin, u64::MAX];
        }
        _ => return vec![],
    }
    names
}

/// Damage to the bytes of the last file.
fn damage_blob(blob: &mut Vec<u8>, file_name: &str, kind: Option<Break>) -> Vec<String> {
    match kind {
        Some(Break::TruncatedFile) => blob.truncate(blob.len().saturating_sub(1000)),
        Some(Break::HeaderTooLong) => {
            let length = blob.len() as u64 + 64;
            blob[..8].copy_from_slice(&length.to_le_bytes());
        }
        Some(Break::HugeHeaderLength) => {
            blob[..8].copy_from_slice(&((1u64 << 63) + 5).to_le_bytes());
        }
        Some(Break::HeaderNotJson) => blob[8..11].copy_from_slice(&[b'{', 0x80, 0xFF]),
        _ => return vec![],
    }
    vec![file_name.to_owned()]
}

/// `../NAME-outside.safetensors` for a directory called NAME.
fn outside_of(directory: &Path) -> io::Result<String> {
    let path = std::path::absolute(directory)?;
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
    Ok(format!("../{}-outside.safetensors", name.unwrap_or_default()))
}

fn total_bytes(groups: &[Vec<Tensor>]) -> u64 {
    groups.iter().flatten().map(|t| t.data.len() as u64).sum()
}

/// `model.safetensors.index.json`
struct Index {
    total_bytes: u64,
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn new(groups: &[Vec<Tensor>], names: &[String]) -> Index {
        let mut weight_map = BTreeMap::new();
        for (group, file) in groups.iter().zip(names) {
            weight_map.extend(group.iter().map(|t| (t.name.clone(), file.clone())));
        }
        Index { total_bytes: total_bytes(groups), weight_map }
    }

    fn point_to_missing_file(&mut self, names: &[String]) -> Vec<String> {
        let count = names.len();
        let missing = format!("model-{:05}-of-{count:05}.safetensors", count + 1);
        let mut entry = self.weight_map.first_entry().expect("a model has tensors");
        entry.insert(missing.clone());
        vec![missing, entry.key().clone()]
    }

    fn point_outside(&mut self, file: &str, outside: String) -> Vec<String> {
        for target in self.weight_map.values_mut().filter(|target| *target == file) {
            *target = outside.clone();
        }
        vec![outside, "model.safetensors.index.json".to_owned()]
    }

    fn json(mut self) -> Json {
        let mut map = Json::Object(vec![]);
        for (name, file) in mem::take(&mut self.weight_map) {
            map.set(&name, file);
        }
        let metadata = Json::object([("total_size", self.total_bytes.into())]);
        Json::object([("metadata", metadata), ("weight_map", map)])
    }
}
