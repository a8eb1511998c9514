//! The Hugging Face hub: what it says about a repository, where its files are, and the host that has the large ones.
//!
//! A small file is behind a relative redirect (307), a large one behind a redirect to another host (302), whose URL is
//! signed and expires, and whose `ETag` is not the one that the hub gives. The hub's is the SHA-256 of a large file's
//! content; for small files, where the hub has Git's identity, it is one made up here.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use hmac::{Hmac, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::list::{Query, named, page, token};
use super::{Site, Subject};
use crate::content::{Body, Bucket, Object, Tree};
use crate::reply::{Failure, Reply};
use crate::request::{Ask, decoded};
use crate::xml::iso_date;

/// What paths leave as it is.
const PATH: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// Files of this size and up are large, whatever they are called.
const LARGE_BYTES: u64 = 10 << 20;

/// Files that are kept as large ones, whatever their size.
const LARGE: [&str; 9] =
    [".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx", ".msgpack", ".model"];

/// What the hub remembers: digests that took long, signatures that it gave out.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    digests: Mutex<HashMap<String, String>>,
    signatures: Mutex<Vec<String>>,
}

impl Hub {
    /// The signatures of all redirects.
    pub(crate) fn signatures(&self) -> Vec<String> {
        self.signatures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The SHA-256 of an object's content, or of its identity.
    fn digest(&self, object: &Object, site: &Site<'_>) -> String {
        if !site.options.content_digests {
            return hex(&Sha256::digest(object.identity.to_le_bytes()));
        }
        let key = format!("{:016x}", object.identity);
        let known = |digests: &HashMap<_, _>| digests.get(&key).cloned();
        if let Some(digest) = known(&self.digests.lock().unwrap_or_else(PoisonError::into_inner)) {
            return digest;
        }
        let digest = match &object.body {
            Body::Memory(bytes) => hex(&Sha256::digest(bytes)),
            Body::File(file) => file_digest(file).unwrap_or_default(),
        };
        let mut digests = self.digests.lock().unwrap_or_else(PoisonError::into_inner);
        digests.entry(key).or_insert(digest).clone()
    }
}

fn file_digest(file: &File) -> std::io::Result<String> {
    use std::os::unix::fs::FileExt;
    let (mut digest, mut offset) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(hex(&digest.finalize())),
            count => {
                digest.update(&buffer[..count]);
                offset += count as u64;
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn subject(ask: &Ask) -> Subject {
    let path = ask.path.as_str();
    if let Some(path) = path.strip_prefix("api/resolve-cache/models/") {
        // REPOSITORY/COMMIT/FILE, of which the repository has one slash or none
        return cached(path).unwrap_or(Subject::Other);
    }
    if let Some(path) = path.strip_prefix("api/models/") {
        if let Some((repository, rest)) = path.split_once("/tree/") {
            let revision = rest.split('/').next().map(decoded);
            return Subject::List { bucket: decoded(repository), revision };
        }
        let (repository, revision) = match path.split_once("/revision/") {
            Some((repository, revision)) => (repository, Some(decoded(revision))),
            None => (path, None),
        };
        return Subject::Bucket { bucket: decoded(repository), revision };
    }
    let resolved = path.split_once("/resolve/").and_then(|(repository, file)| {
        let (revision, name) = file.split_once('/')?;
        let (bucket, name) = (decoded(repository), decoded(name));
        Some(Subject::Object { bucket, name, revision: Some(decoded(revision)) })
    });
    resolved.unwrap_or(Subject::Other)
}

fn cached(path: &str) -> Option<Subject> {
    let is_commit = |part: &str| part.len() == 40 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let parts: Vec<&str> = path.split('/').collect();
    let at = parts.iter().position(|part| is_commit(part))?;
    Some(Subject::Object {
        bucket: decoded(&parts[..at].join("/")),
        name: decoded(&parts[at + 1..].join("/")),
        revision: Some(parts[at].to_owned()),
    })
}

/// `/repos/REPOSITORY/COMMIT/FILE`, in which the repository's slash is encoded.
pub(crate) fn cdn_subject(ask: &Ask) -> Subject {
    let found = ask.path.strip_prefix("repos/").and_then(cached);
    found.unwrap_or(Subject::Other)
}

/// By token. Strangers are not told whether there is such a repository.
pub(crate) fn permit(ask: &Ask, private: bool, site: &Site<'_>) -> Result<(), Failure> {
    match ask.bearer() {
        Some(token) if token == site.options.token => Ok(()),
        Some(_) => {
            Err(Failure::new(401, "Unauthorized", "Invalid credentials in Authorization header"))
        }
        None if private => Err(unauthorized()),
        None => Ok(()),
    }
}

/// What strangers are told of what is private or does not exist.
pub(crate) fn unauthorized() -> Failure {
    Failure::new(401, "RepoNotFound", "Invalid username or password.")
}

/// By signature, as long as it lasts.
pub(crate) fn cdn_permit(ask: &Ask, site: &Site<'_>) -> Result<(), Failure> {
    let denied = |message: &str| Err(Failure::new(403, "AccessDenied", message));
    let expires = ask.query("Expires").and_then(|expires| expires.parse().ok());
    let (Some(expires), Some(given)) = (expires, ask.query("Signature")) else {
        return denied("Missing Key-Pair-Id query parameter or cookie value");
    };
    if given != signature(&ask.path, expires, site) {
        return denied("Access Denied");
    }
    match UNIX_EPOCH + Duration::from_secs(expires) < site.now {
        true => denied("Request has expired"),
        false => Ok(()),
    }
}

fn signature(path: &str, expires: u64, site: &Site<'_>) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(site.options.token.as_bytes())
        .expect("a key of any length will do");
    mac.update(format!("{path}\n{expires}").as_bytes());
    hex(&mac.finalize().into_bytes())
}

fn is_large(name: &str, object: &Object) -> bool {
    object.size >= LARGE_BYTES || LARGE.iter().any(|ending| name.ends_with(ending))
}

/// Where a file is, if that is not here.
pub(crate) fn redirect(
    ask: &Ask,
    subject: &Subject,
    tree: &Tree,
    object: &Object,
    site: &Site<'_>,
) -> Option<Reply> {
    if ask.path.starts_with("api/resolve-cache/") {
        return None;
    }
    let (repository, name) = (subject.bucket(), utf8_percent_encode(subject.object(), PATH));
    let commit = &tree.commit;
    let (status, location, etag) = if is_large(subject.object(), object) {
        let repository = utf8_percent_encode(repository, NON_ALPHANUMERIC);
        let path = format!("repos/{repository}/{commit}/{name}");
        let expires = site.expires(site.options.redirect_lifetime);
        let signature = signature(&path, expires, site);
        let url = &site.cdn_url;
        let location =
            format!("{url}/{path}?Expires={expires}&Signature={signature}&Key-Pair-Id=K0");
        site.hub.signatures.lock().unwrap_or_else(PoisonError::into_inner).push(signature);
        (302, location, format!("\"{}\"", site.hub.digest(object, site)))
    } else {
        let repository = utf8_percent_encode(repository, PATH);
        let location = format!("/api/resolve-cache/models/{repository}/{commit}/{name}");
        (307, location, object.etag.clone())
    };
    let text = format!("Redirecting to {}", location.split('?').next().unwrap_or(""));
    let reply = Reply::text(status, "text/plain; charset=utf-8", text);
    Some(
        reply
            .header("location", location)
            .header("x-repo-commit", commit)
            .header("x-linked-size", object.size)
            .header("x-linked-etag", &etag)
            .header("accept-ranges", "bytes"),
    )
}

fn is_true(value: Option<&str>) -> bool {
    matches!(value, Some("true" | "True" | "1"))
}

/// The repository: its commit and its files; with `blobs=true`, their sizes and digests too.
pub(crate) fn info(
    ask: &Ask,
    repository: &str,
    bucket: &Bucket,
    tree: &Tree,
    site: &Site<'_>,
) -> Reply {
    let blobs = is_true(ask.query("blobs"));
    let siblings: Vec<Value> = tree
        .list("")
        .iter()
        .map(|(name, object)| {
            let mut sibling = json!({ "rfilename": name });
            if blobs {
                sibling["size"] = object.size.into();
                sibling["blobId"] = object.etag.trim_matches('"').into();
                if let Some(sha256) = large_digest(name, object, tree, site) {
                    let size = object.size;
                    sibling["lfs"] = json!({ "sha256": sha256, "size": size, "pointerSize": 135 });
                }
            }
            sibling
        })
        .collect();
    let info = json!({
        "_id": &tree.commit[..24],
        "id": repository,
        "modelId": repository,
        "private": bucket.private.unwrap_or(site.options.private),
        "gated": false,
        "disabled": false,
        "sha": &tree.commit,
        "lastModified": iso_date(UNIX_EPOCH),
        "tags": [],
        "siblings": siblings,
    });
    Reply::text(200, "application/json; charset=utf-8", info.to_string())
}

fn large_digest(name: &str, object: &Object, tree: &Tree, site: &Site<'_>) -> Option<String> {
    let opened = is_large(name, object).then(|| tree.object(name)).flatten()?;
    Some(site.hub.digest(&opened, site))
}

/// What follows `/tree/REVISION/`, as the beginning of names.
fn tree_prefix(ask: &Ask) -> String {
    let rest = ask.path.split_once("/tree/").and_then(|(_, rest)| rest.split_once('/'));
    match rest.map(|(_, path)| path.trim_end_matches('/')) {
        None | Some("") => String::new(),
        Some(path) => format!("{}/", decoded(path)),
    }
}

/// The files of a directory, or all beneath it with `recursive=true`, in pages that name the next one by `Link`.
pub(crate) fn list(ask: &Ask, tree: &Tree, site: &Site<'_>) -> Reply {
    let after = ask.query("cursor").and_then(named);
    let asked = ask.query("limit").and_then(|max| max.parse().ok()).unwrap_or(1000);
    let entries_max = site.options.page_entries_max.min(asked).max(1);
    let recursive = is_true(ask.query("recursive"));
    let (prefix, delimiter) = (tree_prefix(ask), if recursive { "" } else { "/" });
    let query =
        Query { prefix: &prefix, delimiter, after: after.as_deref(), from: None, entries_max };
    let page = page(tree, &query);
    let mut files: Vec<Value> = page
        .objects
        .iter()
        .map(|(name, object)| {
            let (oid, size) = (object.etag.trim_matches('"'), object.size);
            let mut file = json!({ "type": "file", "oid": oid, "size": size, "path": name });
            if let Some(oid) = large_digest(name, object, tree, site) {
                file["lfs"] = json!({ "oid": oid, "size": size, "pointerSize": 135 });
            }
            file
        })
        .collect();
    files.extend(page.prefixes.iter().map(|prefix| {
        json!({ "type": "directory", "oid": &tree.commit, "size": 0, "path": prefix.trim_end_matches('/') })
    }));
    let reply = Reply::text(200, "application/json; charset=utf-8", Value::from(files).to_string());
    match page.next {
        None => reply,
        Some(next) => {
            let (url, cursor) = (format!("http://{}/{}", ask.host, ask.path), token(&next));
            let query = format!("limit={asked}&cursor={cursor}&recursive={recursive}");
            reply.header("link", format!("<{url}?{query}>; rel=\"next\""))
        }
    }
}

pub(crate) fn failure(ask: &Ask, failure: &Failure) -> Reply {
    let code = match failure.code.as_str() {
        "NoSuchKey" => "EntryNotFound",
        "NoSuchBucket" => "RepoNotFound",
        other => other,
    };
    let message = match code {
        "EntryNotFound" => "Entry not found",
        "RepoNotFound" if failure.status == 404 => "Repository not found",
        "RevisionNotFound" => "Invalid rev id",
        _ => &failure.message,
    };
    let reply = if ask.head {
        Reply::empty(failure.status)
    } else {
        let error = json!({ "error": message });
        Reply::text(failure.status, "application/json; charset=utf-8", error.to_string())
    };
    reply.header("x-error-code", code).header("x-error-message", message)
}
