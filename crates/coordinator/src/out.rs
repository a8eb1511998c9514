//! `--out`: one safetensors file per rank and a manifest. Files get their names only when they are complete.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    path::Path,
};

use longshore_rank::params::{ParamView, ReadyParams};
use safetensors::{Dtype, View};
use serde::Serialize;

use crate::{digest, error::LoadError, plan::Plan, report::Identity};

/// The manifest's name.
pub const MANIFEST_FILE: &str = "manifest.json";

#[derive(Serialize)]
struct Manifest<'a> {
    #[serde(flatten)]
    identity: &'a Identity,
    ranks: Vec<ManifestRank<'a>>,
}

#[derive(Serialize)]
struct ManifestRank<'a> {
    rank: u32,
    file: String,
    aliases: BTreeMap<&'a str, &'a str>,
    parameters: BTreeMap<&'a str, ManifestParam<'a>>,
}

#[derive(Serialize)]
struct ManifestParam<'a> {
    dtype: String,
    shape: &'a [u64],
    bytes: u64,
    sha256: String,
}

/// Creates `dir` if need be and makes sure that files can be written there: before a load, not after it.
///
/// # Errors
/// They cannot.
pub fn check_writable(dir: &Path) -> Result<(), LoadError> {
    let failed = |action| move |e| LoadError::Io { path: dir.into(), action, source: e };
    fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
    let probe = temporary(dir, "probe");
    File::create(&probe).map_err(failed("creating a file"))?;
    fs::remove_file(&probe).map_err(failed("removing a file"))
}

/// Writes what every rank holds to `dir`, which is created if need be.
///
/// An older manifest is removed first; the new one appears last, when every file is in place.
///
/// # Errors
/// A file cannot be written; no file of this load then has its final name unless all before it were complete, and there
/// is no manifest.
pub fn write(
    dir: &Path,
    plan: &Plan,
    ranks: &[ReadyParams],
    source: &str,
) -> Result<(), LoadError> {
    let failed = |action| move |e| LoadError::Io { path: dir.into(), action, source: e };
    fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
    remove_if_there(&dir.join(MANIFEST_FILE)).map_err(failed("removing the old manifest"))?;
    let names: Vec<String> = (0..ranks.len())
        .map(|r| format!("rank-{r:05}-of-{:05}.safetensors", ranks.len()))
        .collect();
    let written = write_aside(dir, plan, ranks, source, &names);
    if written.is_err() {
        for name in names.iter().map(String::as_str).chain([MANIFEST_FILE]) {
            // what cannot be removed either is of no use to anyone, and the first error tells more
            let _ = fs::remove_file(temporary(dir, name));
        }
    }
    written?;
    for name in names.iter().map(String::as_str).chain([MANIFEST_FILE]) {
        fs::rename(temporary(dir, name), dir.join(name)).map_err(failed("renaming"))?;
    }
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed("syncing the directory"))
}

/// Writes and syncs every file under its temporary name.
fn write_aside(
    dir: &Path,
    plan: &Plan,
    ranks: &[ReadyParams],
    source: &str,
    names: &[String],
) -> Result<(), LoadError> {
    let failed = |action| move |e| LoadError::Io { path: dir.into(), action, source: e };
    for (rank, name) in ranks.iter().zip(names) {
        write_rank(&temporary(dir, name), rank).map_err(failed("writing a rank's parameters"))?;
    }
    let identity = Identity::of(plan, source);
    let manifest = Manifest { identity: &identity, ranks: manifest_ranks(ranks, names) };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| failed("manifest")(e.into()))?;
    write_synced(&temporary(dir, MANIFEST_FILE), &json).map_err(failed("writing the manifest"))
}

fn manifest_ranks<'a>(ranks: &'a [ReadyParams], names: &[String]) -> Vec<ManifestRank<'a>> {
    let hashes = digest::param_sha256(ranks);
    let each = ranks.iter().zip(names).zip(hashes).map(|((rank, file), hashes)| ManifestRank {
        rank: rank.rank,
        file: file.clone(),
        aliases: rank.aliases().collect(),
        parameters: rank.iter().zip(hashes).map(manifest_param).collect(),
    });
    each.collect()
}

fn manifest_param<'a>((p, sha256): (ParamView<'a>, String)) -> (&'a str, ManifestParam<'a>) {
    let param = ManifestParam {
        dtype: p.dtype.to_string(),
        shape: p.shape,
        bytes: p.bytes.len() as u64,
        sha256,
    };
    (p.name, param)
}

fn write_rank(path: &Path, rank: &ReadyParams) -> io::Result<()> {
    let metadata: HashMap<String, String> =
        rank.aliases().map(|(name, source)| (format!("alias:{name}"), source.to_owned())).collect();
    let views = rank.iter().map(|p| (p.name, Stored::new(p)));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(io::Error::other)?;
    File::open(path)?.sync_all()
}

/// A parameter as the safetensors crate wants to see it.
struct Stored<'a> {
    param: ParamView<'a>,
    shape: Vec<usize>,
}

impl<'a> Stored<'a> {
    fn new(param: ParamView<'a>) -> Self {
        Self { param, shape: param.shape.iter().map(|&d| d as usize).collect() }
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.param.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.param.bytes)
    }

    fn data_len(&self) -> usize {
        self.param.bytes.len()
    }
}

/// A name beside the final one that no other process uses.
fn temporary(dir: &Path, name: &str) -> std::path::PathBuf {
    dir.join(format!(".{name}.{}.tmp", std::process::id()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    File::open(path)?.sync_all()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
