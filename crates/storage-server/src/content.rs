//! The objects: files of directories, and what is given in memory.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

/// Everything that is served, by bucket.
#[derive(Debug, Default)]
pub(crate) struct Content {
    buckets: RwLock<BTreeMap<String, Bucket>>,
}

/// A bucket, container or repository.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bucket {
    /// Its states that can be asked for, the current one last. Only the hub knows more than the current one.
    pub(crate) commits: Vec<Arc<Tree>>,
    /// Whether it asks for credentials, where that was said.
    pub(crate) private: Option<bool>,
    /// Where it is, if that is not the region of the endpoint.
    pub(crate) region: Option<String>,
}

impl Bucket {
    /// Its current state.
    pub(crate) fn current(&self) -> Arc<Tree> {
        self.commits.last().cloned().unwrap_or_default()
    }

    /// The state that a revision names: a commit, or `main` for the current one.
    pub(crate) fn revision(&self, revision: Option<&str>) -> Option<Arc<Tree>> {
        match revision {
            None | Some("main") => Some(self.current()),
            Some(name) => self.commits.iter().find(|tree| tree.commit == name).cloned(),
        }
    }
}

impl Content {
    /// The bucket of this name.
    pub(crate) fn bucket(&self, name: &str) -> Option<Bucket> {
        self.buckets.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Changes a bucket, which is created if it is not there.
    pub(crate) fn change<T>(&self, name: &str, change: impl FnOnce(&mut Bucket) -> T) -> T {
        let mut buckets = self.buckets.write().unwrap_or_else(PoisonError::into_inner);
        change(buckets.entry(name.to_owned()).or_default())
    }

    /// The current state of a bucket, which is created if it is not there.
    pub(crate) fn current(&self, name: &str) -> Arc<Tree> {
        self.change(name, |bucket| {
            if bucket.commits.is_empty() {
                bucket.commits.push(Arc::new(Tree::new(name, 0, None)));
            }
            bucket.current()
        })
    }

    /// Gives a bucket a new state: the files of a directory.
    pub(crate) fn serve(&self, name: &str, dir: &Path) {
        self.change(name, |bucket| {
            let tree = Tree::new(name, bucket.commits.len(), Some(dir.to_owned()));
            bucket.commits.push(Arc::new(tree));
        });
    }
}

/// One state of a bucket.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// 40 hexadecimal digits, as the hub names states.
    pub(crate) commit: String,
    dir: Option<PathBuf>,
    given: Mutex<BTreeMap<String, Given>>,
}

/// What was said about an object.
#[derive(Clone, Debug, Default)]
pub(crate) struct Given {
    /// Its content; without, that of the file of its name.
    pub(crate) content: Option<(Bytes, SystemTime)>,
    /// Its ETag, without quotes; without, one made of its identity.
    pub(crate) etag: Option<String>,
    /// Headers of its responses.
    pub(crate) headers: Vec<(String, String)>,
    /// How often it is said to have been replaced.
    pub(crate) replaced: u64,
    /// Whether there is no such object, although there may be a file.
    pub(crate) removed: bool,
}

/// An object as it is at this moment; its content stays what it is while the object is replaced.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) body: Body,
    /// Another one for what is likely to be other content.
    pub(crate) identity: u64,
    pub(crate) size: u64,
    /// With quotes.
    pub(crate) etag: String,
    /// Microseconds since 1970, as in GCS, and what was replaced since.
    pub(crate) generation: u64,
    pub(crate) modified: SystemTime,
    pub(crate) headers: Vec<(String, String)>,
}

/// Where the bytes of an object are.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    File(Arc<File>),
    Memory(Bytes),
}

impl Tree {
    fn new(name: &str, number: usize, dir: Option<PathBuf>) -> Self {
        let commit = hex(&[&(name, number, 0), &(name, number, 1), &(name, number, 2)]);
        let commit = commit.chars().take(40).collect();
        Self { commit, dir, given: Mutex::default() }
    }

    fn given(&self) -> MutexGuard<'_, BTreeMap<String, Given>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is said about an object.
    pub(crate) fn give(&self, name: &str, change: impl FnOnce(&mut Given)) {
        change(self.given().entry(name.to_owned()).or_default());
    }

    /// The object of this name, opened.
    pub(crate) fn object(&self, name: &str) -> Option<Object> {
        let given = self.given().get(name).cloned().unwrap_or_default();
        let body = match &given.content {
            _ if given.removed => return None,
            Some((bytes, _)) => Body::Memory(bytes.clone()),
            None => Body::File(Arc::new(File::open(self.file(name)?).ok()?)),
        };
        let facts = match &body {
            Body::File(file) => Facts::of_file(&file.metadata().ok().filter(Metadata::is_file)?),
            Body::Memory(_) => Facts::given(&given)?,
        };
        Some(facts.object(&given, body))
    }

    /// Where the file of an object would be: within the directory, and written in one way only.
    fn file(&self, name: &str) -> Option<PathBuf> {
        let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        let parts = name.split('/').all(|part| !part.is_empty() && part != ".");
        (plain && parts).then(|| self.dir.as_ref().map(|dir| dir.join(name))).flatten()
    }

    /// The objects whose names begin with `prefix`, in the order of their names' bytes, with empty bodies.
    pub(crate) fn list(&self, prefix: &str) -> Vec<(String, Object)> {
        let mut objects = BTreeMap::new();
        if let Some(dir) = &self.dir {
            let _ = walk(dir, "", prefix, &mut objects);
        }
        let empty = || Body::Memory(Bytes::new());
        for (name, given) in self.given().iter() {
            if let Some(facts) = Facts::given(given) {
                objects.insert(name.clone(), facts);
            }
            if given.removed {
                objects.remove(name);
            }
        }
        let given = self.given();
        let none = Given::default();
        let with_prefix = objects.into_iter().filter(|(name, _)| name.starts_with(prefix));
        with_prefix
            .map(|(name, facts)| {
                let object = facts.object(given.get(&name).unwrap_or(&none), empty());
                (name, object)
            })
            .collect()
    }
}

/// Collects the files beneath `dir`, whose names begin with `base`, where they can begin with `prefix`.
fn walk(
    dir: &Path,
    base: &str,
    prefix: &str,
    into: &mut BTreeMap<String, Facts>,
) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = format!("{base}{name}");
        // follows links: a snapshot of a hub's cache consists of them
        let Ok(metadata) = fs::metadata(entry.path()) else { continue };
        if metadata.is_dir() {
            let base = format!("{name}/");
            if base.starts_with(prefix) || prefix.starts_with(&base) {
                let _ = walk(&entry.path(), &base, prefix, into);
            }
        } else if metadata.is_file() {
            into.insert(name, Facts::of_file(&metadata));
        }
    }
    Ok(())
}

/// What is known of an object without reading it.
struct Facts {
    identity: u64,
    size: u64,
    modified: SystemTime,
}

impl Facts {
    fn of_file(metadata: &Metadata) -> Self {
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Self {
            identity: hash(&(metadata.dev(), metadata.ino(), metadata.size(), modified)),
            size: metadata.len(),
            modified: metadata.modified().unwrap_or(UNIX_EPOCH),
        }
    }

    fn given(given: &Given) -> Option<Self> {
        let (bytes, modified) = given.content.as_ref()?;
        Some(Self { identity: hash(bytes), size: bytes.len() as u64, modified: *modified })
    }

    fn object(&self, given: &Given, body: Body) -> Object {
        let made =
            || hex(&[&(self.identity, given.replaced, 0), &(self.identity, given.replaced, 1)]);
        let since_1970 = self.modified.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Object {
            body,
            identity: self.identity,
            size: self.size,
            etag: format!("\"{}\"", given.etag.clone().unwrap_or_else(made)),
            generation: u64::try_from(since_1970.as_micros()).unwrap_or(0) + given.replaced,
            modified: self.modified,
            headers: given.headers.clone(),
        }
    }
}

fn hash(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// Sixteen hexadecimal digits for each.
fn hex<T: Hash>(parts: &[&T]) -> String {
    parts.iter().map(|part| format!("{:016x}", hash(part))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tree: &Tree, prefix: &str) -> Vec<String> {
        tree.list(prefix).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn files_and_given_objects_are_listed_together_in_the_order_of_bytes() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        for name in ["a/x", "a-b", "b"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let content = Content::default();
        content.serve("models", dir.path());
        let tree = content.current("models");
        tree.give("a/given", |given| given.content = Some((Bytes::from("1"), UNIX_EPOCH)));
        tree.give("b", |given| given.removed = true);
        assert_eq!(names(&tree, ""), ["a-b", "a/given", "a/x"]);
        assert_eq!(names(&tree, "a/"), ["a/given", "a/x"]);
        assert_eq!(names(&tree, "a/x"), ["a/x"]);
        assert!(tree.object("b").is_none());
        assert_eq!(tree.object("a/x").unwrap().size, 3);
        assert_eq!(tree.object("a/x").unwrap().etag, tree.list("a/x")[0].1.etag);
    }

    #[test]
    fn nothing_outside_the_directory_is_served() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        fs::write(dir.path().join("out"), "").unwrap();
        fs::write(dir.path().join("in/file"), "").unwrap();
        let content = Content::default();
        content.serve("models", &dir.path().join("in"));
        let tree = content.current("models");
        assert!(tree.object("file").is_some());
        for name in ["../out", "/etc/hostname", "./file", "a/../file", "file/", "", "/file"] {
            assert!(tree.object(name).is_none(), "{name}");
        }
    }

    /// What was opened stays, the name leads to something else with another ETag.
    #[test]
    fn a_replaced_object_has_another_etag_and_generation() {
        let content = Content::default();
        let tree = content.current("models");
        tree.give("a", |given| given.content = Some((Bytes::from("1"), UNIX_EPOCH)));
        let before = tree.object("a").unwrap();
        tree.give("a", |given| given.replaced += 1);
        let after = tree.object("a").unwrap();
        assert_ne!(before.etag, after.etag);
        assert!(after.generation > before.generation);
        tree.give("a", |given| given.etag = Some("mine".to_owned()));
        assert_eq!(tree.object("a").unwrap().etag, "\"mine\"");
    }
}
