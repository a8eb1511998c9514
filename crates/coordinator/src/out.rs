//! `--out`: one safetensors file per rank and a manifest. Files get their names only when they are complete.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use longshore_rank::params::{ParamView, ReadyParams};
use safetensors::{Dtype, SafeTensorError, View};
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
    remove_abandoned(dir);
    let aside = aside(dir);
    fs::create_dir(&aside).map_err(failed("creating a directory in it"))?;
    fs::remove_dir(&aside).map_err(failed("removing a directory in it"))
}

/// Writes what every rank holds to `dir`, which is created if need be.
///
/// An older manifest is removed first; the new one appears last, when every file is in place. Until then everything lies
/// in a directory of its own (`.longshore.PID.tmp`), which goes when writing fails, and with the next output to `dir` where
/// this process was ended in the middle.
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
    let failed = |action| move |e| LoadError::Output { path: dir.into(), action, source: e };
    fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
    remove_abandoned(dir);
    remove_if_there(&dir.join(MANIFEST_FILE)).map_err(failed("removing the old manifest"))?;
    let aside = aside(dir);
    fs::create_dir_all(&aside).map_err(failed("creating a directory in it"))?;
    let written = write_aside(&aside, plan, ranks, source).and_then(|names| {
        for name in &names {
            fs::rename(aside.join(name), dir.join(name)).map_err(failed("renaming"))?;
        }
        Ok(())
    });
    // what cannot be removed is of no use to anyone, and the error of writing tells more
    let _ = fs::remove_dir_all(&aside);
    written?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed("syncing the directory"))
}

/// Writes and syncs every file in `aside`; returns their names, the manifest last.
fn write_aside(
    aside: &Path,
    plan: &Plan,
    ranks: &[ReadyParams],
    source: &str,
) -> Result<Vec<String>, LoadError> {
    let mut names: Vec<String> = (0..ranks.len())
        .map(|r| format!("rank-{r:05}-of-{:05}.safetensors", ranks.len()))
        .collect();
    let failed = |path: &Path, e| {
        let action = "writing";
        LoadError::Output { path: path.into(), action, source: e }
    };
    for (rank, name) in ranks.iter().zip(&names) {
        let path = aside.join(name);
        write_rank(&path, rank).map_err(|e| failed(&path, e))?;
    }
    let identity = Identity::of(plan, source);
    let manifest = Manifest { identity: &identity, ranks: manifest_ranks(ranks, &names) };
    let path = aside.join(MANIFEST_FILE);
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| failed(&path, e.into()))?;
    write_synced(&path, &json).map_err(|e| failed(&path, e))?;
    names.push(MANIFEST_FILE.to_owned());
    Ok(names)
}

/// Where files lie until all are complete.
fn aside(dir: &Path) -> PathBuf {
    dir.join(format!("{ASIDE_START}{}{ASIDE_END}", std::process::id()))
}

const ASIDE_START: &str = ".longshore.";
const ASIDE_END: &str = ".tmp";

/// Removes what processes that are gone have left in `dir`.
fn remove_abandoned(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|n| {
            n.strip_prefix(ASIDE_START)?.strip_suffix(ASIDE_END)?.parse::<u32>().ok()
        });
        if process.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            // somebody else may be tidying up as well
            let _ = fs::remove_dir_all(entry.path());
        }
    }
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
    // the crate writes a private file beside this one and renames it: the permissions are those of any new file
    let permissions = File::create(path)?.metadata()?.permissions();
    let views = rank.iter().map(|p| (p.name, Stored::new(p)));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| match e {
        SafeTensorError::IoError(e) => e,
        other => io::Error::other(other),
    })?;
    fs::set_permissions(path, permissions)?;
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
