//! Stage 1: reads configuration, index and headers of a checkpoint directory. No weight is read.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use longshore_models::byte_range::ByteRange;
use longshore_models::{
    checkpoint::{Checkpoint, CheckpointFile},
    config::{CONFIG_FILE, Config, HF_QUANT_CONFIG_FILE},
    error::CheckpointError,
    header::{HEADER_BYTES_MAX, HeaderEntry, header_bytes, parse_header},
    index::{INDEX_FILE, Index, SINGLE_FILE},
};
use longshore_rank::{
    error::RankError,
    storage::{FileIdentity, IoChoice},
};

use crate::{error::LoadError, origin::Origin};

/// Everything about a checkpoint but its weights.
#[derive(Debug, Clone)]
pub struct Discovered {
    /// Where its files are.
    pub origin: Origin,
    /// `config.json`.
    pub config: Config,
    /// `hf_quant_config.json`, if it is there.
    pub hf_quant_config: Option<Config>,
    /// The validated headers.
    pub checkpoint: Checkpoint,
    /// What the checkpoint files were when their headers were read, in the order of the checkpoint's files.
    pub identities: Vec<FileIdentity>,
}

impl Discovered {
    /// Bytes of headers that were read.
    pub fn header_bytes(&self) -> u64 {
        self.checkpoint.files.iter().map(|f| f.header_bytes).sum()
    }
}

/// Headers read at a time: enough to hide a network file system's latency.
const HEADERS_IN_FLIGHT: usize = 8;

/// Reads and validates the checkpoint in a directory, or wherever else it is.
///
/// # Errors
/// A file is missing, unreadable or damaged.
pub fn discover(origin: impl Into<Origin>) -> Result<Discovered, LoadError> {
    let origin = origin.into();
    let (config, hf_quant_config) = read_configs(origin.metadata())?;
    let damaged = |source| LoadError::Checkpoint { path: origin.shown().into(), source };
    let index = read_index(origin.metadata())?;
    let names = match &index {
        Some(index) => existing_files(&origin, index)?,
        None => unindexed_files(&origin)?,
    };
    // both in the order of the files' names
    let (headers, identities) = read_headers(&origin, &names)?.into_iter().unzip();
    let checkpoint = Checkpoint::new(headers, index.as_ref()).map_err(damaged)?;
    Ok(Discovered { origin, config, hf_quant_config, checkpoint, identities })
}

/// Reads `config.json` and, if it is there, `hf_quant_config.json`.
///
/// # Errors
/// A file cannot be read or is not a JSON object.
pub fn read_configs(dir: &Path) -> Result<(Config, Option<Config>), LoadError> {
    let parse = |name: &str, json: &[u8]| {
        Config::parse(name, json).map_err(|source| LoadError::Plan { path: dir.into(), source })
    };
    let path = dir.join(CONFIG_FILE);
    let json = read_json(&path).map_err(|e| io_error(&path, "reading", e))?;
    let config = parse(CONFIG_FILE, &json)?;
    let path = dir.join(HF_QUANT_CONFIG_FILE);
    let hf_quant_config = match read_json(&path) {
        Ok(json) => Some(parse(HF_QUANT_CONFIG_FILE, &json)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(io_error(&path, "reading", e)),
    };
    Ok((config, hf_quant_config))
}

/// The longest JSON file that is read: the limit of headers, which say more.
const JSON_BYTES_MAX: u64 = HEADER_BYTES_MAX;

/// Reads a file that ought to be small: a plain file of at most [`JSON_BYTES_MAX`], whatever a link leads to.
fn read_json(path: &Path) -> io::Result<Vec<u8>> {
    let data = std::fs::metadata(path)?;
    let refuse = |reason: String| Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    if !data.is_file() {
        return refuse("not a plain file".into());
    }
    if data.len() > JSON_BYTES_MAX {
        return refuse(format!("{} bytes, at most {JSON_BYTES_MAX} are read", data.len()));
    }
    let mut json = Vec::with_capacity(data.len() as usize);
    // the file may grow meanwhile
    File::open(path)?.take(JSON_BYTES_MAX).read_to_end(&mut json)?;
    Ok(json)
}

fn io_error(path: &Path, action: &'static str, source: io::Error) -> LoadError {
    LoadError::Io { path: path.into(), action, source }
}

fn read_index(dir: &Path) -> Result<Option<Index>, LoadError> {
    let path = dir.join(INDEX_FILE);
    match read_json(&path) {
        Ok(json) => Index::parse(&json)
            .map(Some)
            .map_err(|source| LoadError::Checkpoint { path: dir.into(), source }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error(&path, "reading", e)),
    }
}

fn existing_files(origin: &Origin, index: &Index) -> Result<Vec<String>, LoadError> {
    let files = index.files();
    for missing in &files {
        if !origin.has(missing)? {
            let source = CheckpointError::IndexMissingFile {
                index: INDEX_FILE.into(),
                tensor: index.first_tensor_of(missing).into(),
                found: (*missing).into(),
            };
            return Err(LoadError::Checkpoint { path: origin.shown().into(), source });
        }
    }
    Ok(files.into_iter().map(str::to_owned).collect())
}

/// Without an index: `model.safetensors`, else every `*.safetensors` file.
fn unindexed_files(origin: &Origin) -> Result<Vec<String>, LoadError> {
    if origin.has(SINGLE_FILE)? {
        return Ok(vec![SINGLE_FILE.to_owned()]);
    }
    let mut names = origin.names()?;
    names.retain(|name| name.ends_with(".safetensors"));
    if names.is_empty() {
        let source = CheckpointError::NoFiles;
        return Err(LoadError::Checkpoint { path: origin.shown().into(), source });
    }
    names.sort();
    Ok(names)
}

type Header = ((CheckpointFile, Vec<HeaderEntry>), FileIdentity);

/// Reads all headers, several at a time; the error returned is that of the first file by name.
fn read_headers(origin: &Origin, names: &[String]) -> Result<Vec<Header>, LoadError> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(names.len()));
    std::thread::scope(|scope| {
        for _ in 0..HEADERS_IN_FLIGHT.min(names.len()) {
            scope.spawn(|| {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let header = read_header(origin, name);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((name, header));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(name, _)| *name);
    results.into_iter().map(|(_, header)| header).collect()
}

fn read_header(origin: &Origin, name: &str) -> Result<Header, LoadError> {
    const ACTION: &str = "reading the header";
    let source = origin.open(name, IoChoice::Buffered, ACTION)?;
    let path = origin.shown().join(name);
    let failed = |source: RankError| match source {
        RankError::Read { source, .. } => io_error(&path, ACTION, source),
        other => io_error(&path, ACTION, io::Error::other(other)),
    };
    let damaged = |source| LoadError::Checkpoint { path: origin.shown().into(), source };
    let identity = source.identity.clone();
    let bytes = identity.bytes;
    let start = match origin.header(name)? {
        Some(start) => start,
        None => {
            let mut start = vec![0; bytes.min(8) as usize];
            source.read_full(ByteRange::new(0, start.len() as u64), &mut start).map_err(failed)?;
            start
        }
    };
    let prefix = start.get(..8).unwrap_or_default();
    let json_bytes = header_bytes(name, prefix, bytes).map_err(damaged)?;
    let header_bytes = 8 + json_bytes;
    let there = start.len().min(header_bytes as usize);
    let mut json = vec![0; json_bytes as usize];
    json[..there - 8].copy_from_slice(&start[8..there]);
    let rest = ByteRange::new(there as u64, header_bytes);
    source.read_full(rest, &mut json[there - 8..]).map_err(failed)?;
    let entries = parse_header(name, &json, bytes - header_bytes).map_err(damaged)?;
    Ok(((CheckpointFile { name: name.to_owned(), bytes, header_bytes }, entries), identity))
}
