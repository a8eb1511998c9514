//! `--verify`: every weight file against what its source publishes of it.
//!
//! | published by | how |
//! |---|---|
//! | the Hugging Face hub | the SHA-256 of files in Git LFS |
//! | S3 | a SHA-256 of the whole object, where it was uploaded with one |
//! | files beside the weights, anywhere | `SHA256SUMS`, `NAME.sha256`: lines of digest and name, as `sha256sum` writes them |
//!
//! A digest needs a file's bytes in order and in full, which no rank of a load has. So files are read once before the load, in
//! order, several at a time; local ones are in the page cache afterwards, others are fetched twice unless a cache directory keeps
//! them. Each process of a group takes its share of the files.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use longshore_models::byte_range::ByteRange;
use longshore_rank::storage::CheckpointSource;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{digest::hex, error::LoadError, origin::Origin};

/// A SHA-256.
pub(crate) type Sha256Digest = [u8; 32];

/// Which files were verified.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Files whose bytes are those that their source published a digest of.
    pub verified: Vec<String>,
    /// Files of which no digest is published.
    pub unpublished: Vec<String>,
}

impl Verified {
    /// Both shares.
    pub(crate) fn merge(mut self, other: Verified) -> Verified {
        self.verified.extend(other.verified);
        self.unpublished.extend(other.unpublished);
        self.verified.sort();
        self.unpublished.sort();
        self
    }
}

/// Bytes read at a time.
const CHUNK_BYTES: u64 = 8 << 20;

/// Files read at a time: a core hashes 0.5 to 2 GB/s.
const FILES_AT_A_TIME: usize = 8;

/// Verifies every `of`-th of `sources`, from the `first` on.
///
/// # Errors
/// A file is not what was published, cannot be read, or what is published cannot be understood.
pub(crate) fn verify(
    origin: &Origin,
    sources: &[CheckpointSource],
    (first, of): (usize, usize),
) -> Result<Verified, LoadError> {
    let beside = beside(origin.metadata())?;
    let share: Vec<&CheckpointSource> = sources.iter().skip(first).step_by(of.max(1)).collect();
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..FILES_AT_A_TIME.min(share.len()).min(cores.max(2)) {
            scope.spawn(|| {
                while let Some(source) = share.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = verify_file(origin, source, &beside);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.push((source.name.clone(), result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut verified = Verified::default();
    for (name, result) in results {
        match result? {
            true => verified.verified.push(name),
            false => verified.unpublished.push(name),
        }
    }
    Ok(verified)
}

/// Whether a digest of the file is published; if so, the file has it.
fn verify_file(
    origin: &Origin,
    source: &CheckpointSource,
    beside: &HashMap<String, Sha256Digest>,
) -> Result<bool, LoadError> {
    let published = match beside.get(&source.name) {
        Some(digest) => Some(*digest),
        None => origin.published(&source.name)?,
    };
    let Some(published) = published else { return Ok(false) };
    let path = || origin.shown().join(&source.name);
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES.min(source.identity.bytes) as usize];
    let mut at = 0;
    while at < source.identity.bytes {
        let range = ByteRange::new(at, (at + CHUNK_BYTES).min(source.identity.bytes));
        let target = &mut chunk[..range.len() as usize];
        source
            .read_full(range, target)
            .map_err(|source| LoadError::Tensors { path: path(), source })?;
        hash.update(target);
        at = range.end;
    }
    let found: Sha256Digest = hash.finalize().into();
    match found == published {
        true => Ok(true),
        false => {
            Err(LoadError::Digest { path: path(), found: hex(&found), expected: hex(&published) })
        }
    }
}

/// What files beside the weights say, by the weights' names.
fn beside(dir: &Path) -> Result<HashMap<String, Sha256Digest>, LoadError> {
    let mut all = HashMap::new();
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::Io { path, action: "reading digests", source }
    };
    for entry in std::fs::read_dir(dir).map_err(failed(dir))? {
        let path = entry.map_err(failed(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let of_one = name.strip_suffix(".sha256");
        if name != "SHA256SUMS" && of_one.is_none() {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
        for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let (digest, listed) = parse_line(line).ok_or_else(|| LoadError::Source {
                given: path.display().to_string(),
                reason: format!("line {}: expected a SHA-256 and a file's name", number + 1),
            })?;
            // a file of one digest need not repeat the name
            let listed = if listed.is_empty() { of_one.unwrap_or_default() } else { listed };
            all.insert(listed.to_owned(), digest);
        }
    }
    Ok(all)
}

/// A line of `sha256sum`: digest, two spaces (or a space and a star), name.
fn parse_line(line: &str) -> Option<(Sha256Digest, &str)> {
    let (digest, name) =
        line.trim_end().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
    let name = name.trim_start().trim_start_matches('*');
    let name = name.strip_prefix("./").unwrap_or(name);
    Some((parse_hex(digest)?, name))
}

/// 64 hex digits.
pub(crate) fn parse_hex(text: &str) -> Option<Sha256Digest> {
    let text = text.as_bytes();
    let mut digest = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(text.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use longshore_rank::storage::IoChoice;

    use super::*;

    const OF_ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn lines_of_sha256sum_are_understood() {
        let digest = parse_hex(OF_ABC).unwrap();
        for line in [
            format!("{OF_ABC}  model.safetensors"),
            format!("{OF_ABC} *model.safetensors\r"),
            format!("{}  ./model.safetensors", OF_ABC.to_uppercase()),
        ] {
            assert_eq!(parse_line(&line), Some((digest, "model.safetensors")), "{line}");
        }
        assert_eq!(parse_line(OF_ABC), Some((digest, "")));
        assert_eq!(parse_line("0123  a"), None);
        assert_eq!(parse_line(&OF_ABC.replace('b', "x")), None);
    }

    #[test]
    fn files_are_verified_against_what_lies_beside_them() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("a.safetensors", "abc");
        write("b.safetensors", "abc");
        write("c.safetensors", "abc");
        write("SHA256SUMS", &format!("{OF_ABC}  a.safetensors\n\n"));
        write("b.safetensors.sha256", OF_ABC);
        let origin = Origin::from(dir.path());
        let open =
            |name: &str| CheckpointSource::open(dir.path(), name, IoChoice::Buffered).unwrap();
        let sources = ["a.safetensors", "b.safetensors", "c.safetensors"].map(open);
        let verified = verify(&origin, &sources, (0, 1)).unwrap();
        assert_eq!(verified.verified, ["a.safetensors", "b.safetensors"]);
        assert_eq!(verified.unpublished, ["c.safetensors"]);
        // each process has its share
        assert_eq!(verify(&origin, &sources, (1, 2)).unwrap().verified, ["b.safetensors"]);
        write("b.safetensors", "abd");
        let wrong = verify(&origin, &[open("b.safetensors")], (0, 1)).unwrap_err().line();
        assert!(wrong.contains("b.safetensors") && wrong.contains(OF_ABC), "{wrong}");
    }
}
