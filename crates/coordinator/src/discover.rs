//! Stage 1: reads configuration, index and headers of a checkpoint directory. No weight is read.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use longshore_models::{
    checkpoint::{Checkpoint, CheckpointFile},
    config::{CONFIG_FILE, Config, HF_QUANT_CONFIG_FILE},
    error::CheckpointError,
    header::{HEADER_BYTES_MAX, HeaderEntry, header_bytes, parse_header},
    index::{INDEX_FILE, Index, SINGLE_FILE},
};
use longshore_rank::storage::FileIdentity;

use crate::error::LoadError;

/// Everything about a checkpoint but its weights.
#[derive(Debug, Clone)]
pub struct Discovered {
    /// The directory.
    pub dir: PathBuf,
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

/// Reads and validates the checkpoint in `dir`.
///
/// # Errors
/// A file is missing, unreadable or damaged.
pub fn discover(dir: &Path) -> Result<Discovered, LoadError> {
    let (config, hf_quant_config) = read_configs(dir)?;
    let damaged = |source| LoadError::Checkpoint { path: dir.into(), source };
    let index = read_index(dir)?;
    let names = match &index {
        Some(index) => existing_files(dir, index).map_err(damaged)?,
        None => unindexed_files(dir)?,
    };
    // both in the order of the files' names
    let (headers, identities) = read_headers(dir, &names)?.into_iter().unzip();
    let checkpoint = Checkpoint::new(headers, index.as_ref()).map_err(damaged)?;
    Ok(Discovered { dir: dir.into(), config, hf_quant_config, checkpoint, identities })
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

fn existing_files(dir: &Path, index: &Index) -> Result<Vec<String>, CheckpointError> {
    let files = index.files();
    if let Some(missing) = files.iter().find(|f| !dir.join(f).is_file()) {
        return Err(CheckpointError::IndexMissingFile {
            index: INDEX_FILE.into(),
            tensor: index.first_tensor_of(missing).into(),
            found: (*missing).into(),
        });
    }
    Ok(files.into_iter().map(str::to_owned).collect())
}

/// Without an index: `model.safetensors`, else every `*.safetensors` file.
fn unindexed_files(dir: &Path) -> Result<Vec<String>, LoadError> {
    if dir.join(SINGLE_FILE).is_file() {
        return Ok(vec![SINGLE_FILE.to_owned()]);
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| io_error(dir, "listing", e))? {
        let entry = entry.map_err(|e| io_error(dir, "listing", e))?;
        if let Ok(name) = entry.file_name().into_string()
            && name.ends_with(".safetensors")
        {
            names.push(name);
        }
    }
    if names.is_empty() {
        let source = CheckpointError::NoFiles;
        return Err(LoadError::Checkpoint { path: dir.into(), source });
    }
    names.sort();
    Ok(names)
}

type Header = ((CheckpointFile, Vec<HeaderEntry>), FileIdentity);

/// Reads all headers, several at a time; the error returned is that of the first file by name.
fn read_headers(dir: &Path, names: &[String]) -> Result<Vec<Header>, LoadError> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(names.len()));
    std::thread::scope(|scope| {
        for _ in 0..HEADERS_IN_FLIGHT.min(names.len()) {
            scope.spawn(|| {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let header = read_header(dir, name);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((name, header));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(name, _)| *name);
    results.into_iter().map(|(_, header)| header).collect()
}

fn read_header(dir: &Path, name: &str) -> Result<Header, LoadError> {
    let path = dir.join(name);
    let failed = |e| io_error(&path, "reading the header", e);
    let damaged = |source| LoadError::Checkpoint { path: dir.into(), source };
    let file = File::open(&path).map_err(failed)?;
    let identity = FileIdentity::of(&file).map_err(failed)?;
    let bytes = identity.bytes;
    let mut prefix = [0; 8];
    let prefix = match file.read_exact_at(&mut prefix, 0) {
        Ok(()) => &prefix[..],
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => &[],
        Err(e) => return Err(failed(e)),
    };
    let json_bytes = header_bytes(name, prefix, bytes).map_err(damaged)?;
    let mut json = vec![0; json_bytes as usize];
    file.read_exact_at(&mut json, 8).map_err(failed)?;
    let header_bytes = 8 + json_bytes;
    let entries = parse_header(name, &json, bytes - header_bytes).map_err(damaged)?;
    Ok(((CheckpointFile { name: name.to_owned(), bytes, header_bytes }, entries), identity))
}
