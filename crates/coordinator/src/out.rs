//! `--out`: one safetensors file per rank and a manifest. Files get their names only when they are complete.

use std::{
    borrow::Cow,
    cell::OnceCell,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use longshore_rank::{
    error::RankError,
    params::{ParamView, ReadyParams},
};
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

/// Creates `dir` if need be and makes sure that files of `rank` can be written there: before a load, not after it.
///
/// # Errors
/// They cannot.
pub fn check_writable(dir: &Path, rank: u32) -> Result<(), LoadError> {
    let failed = |action| move |e| LoadError::Io { path: dir.into(), action, source: e };
    fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
    let aside = aside(dir, rank);
    // one that is there was left by an earlier process of the same number: in a container every one is number 1
    fs::create_dir_all(&aside).map_err(failed("creating a directory in it"))?;
    fs::remove_dir_all(&aside).map_err(failed("removing a directory in it"))
}

/// Writes what every rank holds to `dir`, which is created if need be.
///
/// An older manifest is removed first; the new one appears last, when every file is in place. Until then everything lies
/// in a directory of its own, which goes when writing fails, and with the next output to `dir` where this process was ended
/// in the middle.
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
    begin(dir)?;
    let world_size = ranks.len() as u32;
    let mut files = Vec::with_capacity(ranks.len());
    for rank in ranks {
        files.push(RankFile::write(dir, rank, world_size)?);
    }
    let hashes: Result<Vec<_>, LoadError> = ranks.iter().map(digest::param_sha256).collect();
    let hashes = hashes?;
    for file in files {
        file.publish()?;
    }
    match ranks.first() {
        Some(any) => write_manifest(dir, plan, any, &hashes, source),
        None => Ok(()),
    }
}

/// Gets `dir` ready for an output: takes an older manifest away, and what dead processes left behind. Done once, while no rank
/// has anything there: whether a process of another host lives cannot be seen from this one.
///
/// # Errors
/// The directory cannot be had or changed.
pub(crate) fn begin(dir: &Path) -> Result<(), LoadError> {
    let failed = |action| move |e| LoadError::Output { path: dir.into(), action, source: e };
    fs::create_dir_all(dir).map_err(failed("creating the directory"))?;
    remove_abandoned(dir);
    remove_if_there(&dir.join(MANIFEST_FILE)).map_err(failed("removing the old manifest"))
}

/// One rank's file, complete and synced, not yet under its final name; dropping it removes it.
#[derive(Debug)]
pub(crate) struct RankFile {
    aside: PathBuf,
    target: PathBuf,
    name: String,
}

impl RankFile {
    /// Writes what `rank`, one of `world_size`, holds.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn write(
        dir: &Path,
        rank: &ReadyParams,
        world_size: u32,
    ) -> Result<Self, LoadError> {
        let name = rank_file_name(rank.rank, world_size);
        let this = Self { aside: aside(dir, rank.rank), target: dir.join(&name), name };
        let path = this.aside.join(&this.name);
        let failed = |action| move |e| LoadError::Output { path, action, source: e };
        fs::create_dir_all(&this.aside).map_err(failed.clone()("creating a directory for it"))?;
        write_rank(&this.aside.join(&this.name), rank).map_err(failed("writing"))?;
        Ok(this)
    }

    /// Gives it its final name.
    ///
    /// # Errors
    /// It cannot be renamed.
    pub(crate) fn publish(self) -> Result<(), LoadError> {
        let failed =
            |source| LoadError::Output { path: self.target.clone(), action: "renaming", source };
        fs::rename(self.aside.join(&self.name), &self.target).map_err(failed)
    }
}

impl Drop for RankFile {
    fn drop(&mut self) {
        // what cannot be removed is of no use to anyone, and goes with the next output
        let _ = fs::remove_dir_all(&self.aside);
    }
}

fn rank_file_name(rank: u32, world_size: u32) -> String {
    format!("rank-{rank:05}-of-{world_size:05}.safetensors")
}

/// Writes the manifest, last of all; `hashes` are those of each rank's parameters, which have the names, dtypes and shapes
/// of `any`.
///
/// # Errors
/// It cannot be written.
pub(crate) fn write_manifest(
    dir: &Path,
    plan: &Plan,
    any: &ReadyParams,
    hashes: &[Vec<[u8; 32]>],
    source: &str,
) -> Result<(), LoadError> {
    let failed = |action| move |e| LoadError::Output { path: dir.into(), action, source: e };
    let identity = Identity::of(plan, source);
    let world_size = hashes.len() as u32;
    let ranks = hashes.iter().enumerate().map(|(rank, hashes)| ManifestRank {
        rank: rank as u32,
        file: rank_file_name(rank as u32, world_size),
        aliases: any.aliases().collect(),
        parameters: any.iter().zip(hashes).map(manifest_param).collect(),
    });
    let manifest = Manifest { identity: &identity, ranks: ranks.collect() };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| failed("writing")(e.into()))?;
    let aside = aside(dir, 0);
    fs::create_dir_all(&aside).map_err(failed("creating a directory in it"))?;
    let path = aside.join(MANIFEST_FILE);
    let written = write_synced(&path, &json)
        .map_err(failed("writing the manifest"))
        .and_then(|()| fs::rename(&path, dir.join(MANIFEST_FILE)).map_err(failed("renaming")));
    // as for a rank's file
    let _ = fs::remove_dir_all(&aside);
    written?;
    File::open(dir).and_then(|d| d.sync_all()).map_err(failed("syncing the directory"))
}

/// Where files of a rank lie until all are complete. With the rank, since processes of several hosts may share `dir` and have
/// the same number.
fn aside(dir: &Path, rank: u32) -> PathBuf {
    dir.join(format!("{ASIDE_START}{}.{rank}{ASIDE_END}", std::process::id()))
}

const ASIDE_START: &str = ".longshore.";
const ASIDE_END: &str = ".tmp";

/// Removes what processes that are gone have left in `dir`.
fn remove_abandoned(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|n| {
            let numbers = n.strip_prefix(ASIDE_START)?.strip_suffix(ASIDE_END)?;
            numbers.split('.').next()?.parse::<u32>().ok()
        });
        if process.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            // somebody else may be tidying up as well
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn manifest_param<'a>((p, sha256): (ParamView<'a>, &[u8; 32])) -> (&'a str, ManifestParam<'a>) {
    let param = ManifestParam {
        dtype: p.dtype.to_string(),
        shape: p.shape,
        bytes: p.data.len() as u64,
        sha256: digest::hex(sha256),
    };
    (p.name, param)
}

fn write_rank(path: &Path, rank: &ReadyParams) -> io::Result<()> {
    let metadata: HashMap<String, String> =
        rank.aliases().map(|(name, source)| (format!("alias:{name}"), source.to_owned())).collect();
    // the crate writes a private file beside this one and renames it: the permissions are those of any new file
    let permissions = File::create(path)?.metadata()?.permissions();
    let failed = OnceCell::new();
    let views = rank.iter().map(|p| (p.name, Stored::new(p, &failed)));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| match e {
        SafeTensorError::IoError(e) => e,
        other => io::Error::other(other),
    })?;
    if let Some(e) = failed.into_inner() {
        return Err(io::Error::other(e));
    }
    fs::set_permissions(path, permissions)?;
    File::open(path)?.sync_all()
}

/// A parameter as the safetensors crate wants to see it.
struct Stored<'a> {
    param: ParamView<'a>,
    shape: Vec<usize>,
    /// Where it is noted that the bytes could not be had: the crate has no way to be told.
    failed: &'a OnceCell<RankError>,
}

impl<'a> Stored<'a> {
    fn new(param: ParamView<'a>, failed: &'a OnceCell<RankError>) -> Self {
        Self { param, shape: param.shape.iter().map(|&d| d as usize).collect(), failed }
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
        self.param.data.to_host().unwrap_or_else(|e| {
            // the first one counts
            let _ = self.failed.set(e);
            Cow::Owned(Vec::new())
        })
    }

    fn data_len(&self) -> usize {
        self.param.data.len()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a rank of another host has there looks like a dead process's.
    #[test]
    fn ranks_of_several_hosts_do_not_get_into_each_others_way() {
        let scratch = tempfile::tempdir().unwrap();
        let of_another_host = scratch.path().join(format!("{ASIDE_START}4194305.1{ASIDE_END}"));
        fs::create_dir(&of_another_host).unwrap();
        check_writable(scratch.path(), 0).unwrap();
        assert!(of_another_host.exists());

        let of_the_same_number = aside(scratch.path(), 0);
        fs::create_dir(&of_the_same_number).unwrap();
        fs::write(of_the_same_number.join("left"), "").unwrap();
        check_writable(scratch.path(), 0).unwrap();
        assert!(!of_the_same_number.exists());
    }
}
