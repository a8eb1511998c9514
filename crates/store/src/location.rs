//! What a user names: an object store's bucket and prefix, or a model on the Hugging Face hub.
//!
//! Telling these apart from a local path is done here and nowhere else. Nothing is asked of a network or a disk: whether
//! `org/name` is a directory is the caller's question, and it is asked first.

use std::fmt;

use crate::error::StoreError;

/// Who keeps the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Service {
    /// Amazon S3, and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
    /// The Hugging Face hub.
    Hub,
}

impl Service {
    /// The scheme of its URIs, lower case.
    pub fn scheme(self) -> &'static str {
        match self {
            Service::S3 => "s3",
            Service::Gcs => "gs",
            Service::Azure => "az",
            Service::Hub => "hf",
        }
    }
}

/// Where a checkpoint lies that is not a local directory.
///
/// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` (the account comes from the environment) or a model
/// of the Hugging Face hub, `org/name` or `org/name@revision`, also written `hf://org/name@revision`. Schemes are read
/// whatever their case. A location holds no secret: text that could carry one (user information, a query) is refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    service: Service,
    /// A bucket, a container, or `org/name`.
    container: String,
    /// Without slashes at its ends; empty for a whole bucket, always empty on the hub.
    prefix: String,
    /// Only on the hub.
    revision: Option<String>,
}

/// What the hub calls the newest state of a model.
pub(crate) const MAIN: &str = "main";

impl Location {
    /// Reads a location. `None` means that the text is not remote, but a path.
    ///
    /// `org/name` is taken for a model of the hub only when the text has exactly that shape: two names of letters, digits,
    /// `-`, `_` and `.`, neither starting with `.` or `-`, and perhaps `@revision`.
    ///
    /// # Errors
    ///
    /// [`StoreError::BadLocation`] for a scheme that is not known, a missing bucket, an empty, `.` or `..` segment, and
    /// text that could carry a secret. The text is repeated only up to where a secret could begin.
    pub fn parse(text: &str) -> Result<Option<Location>, StoreError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(parse_hub(text));
        };
        let scheme_is_one = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
        if !scheme_is_one {
            return Ok(None);
        }
        let refuse = |reason: &'static str| {
            let shown = text.split(['?', '#']).next().unwrap_or_default();
            let shown = if shown.contains('@') { scheme } else { shown };
            StoreError::BadLocation { text: shown.to_owned(), reason }
        };
        let service = match scheme.to_ascii_lowercase().as_str() {
            "s3" => Service::S3,
            "gs" => Service::Gcs,
            "az" => Service::Azure,
            "hf" => {
                return parse_hub(rest.trim_end_matches('/')).map(Some).ok_or_else(|| {
                    refuse("a model of the hub is hf://org/name or hf://org/name@revision")
                });
            }
            "file" => {
                return Err(refuse("a local directory is given as its path, without file://"));
            }
            _ => return Err(refuse("the known schemes are s3, gs, az and hf")),
        };
        if rest.contains(['?', '#']) {
            return Err(refuse(
                "a query or fragment is not part of a location; credentials come from the environment",
            ));
        }
        let (container, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if container.is_empty() {
            return Err(refuse("the bucket is missing"));
        }
        if !container.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
            return Err(refuse(
                "a bucket's name has letters, digits, '-', '_' and '.'; credentials come from the environment",
            ));
        }
        let prefix = prefix.trim_end_matches('/');
        if !prefix.is_empty() && prefix.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(refuse("empty, '.' and '..' segments do not occur in a prefix"));
        }
        Ok(Some(Location {
            service,
            container: container.to_owned(),
            prefix: prefix.to_owned(),
            revision: None,
        }))
    }

    /// One spelling per model: the scheme in lower case, no slash at the end, no revision where it is the default one.
    pub fn key(&self) -> String {
        let mut key = format!("{}://{}", self.service.scheme(), self.container);
        if !self.prefix.is_empty() {
            key.push('/');
            key.push_str(&self.prefix);
        }
        if let Some(revision) = self.revision.as_deref().filter(|revision| *revision != MAIN) {
            key.push('@');
            key.push_str(revision);
        }
        key
    }

    /// Who keeps the objects.
    pub fn service(&self) -> Service {
        self.service
    }

    /// The bucket or container, or `org/name` on the hub.
    pub fn container(&self) -> &str {
        &self.container
    }

    /// What all names start with, without slashes at its ends; empty for a whole bucket and on the hub.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The revision that was asked for, on the hub.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// How one file under the location is named to a person.
    pub(crate) fn describe(&self, name: &str) -> String {
        match self.service {
            Service::Hub => format!("{self}: {name}"),
            _ => format!("{self}/{name}"),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.service != Service::Hub {
            return f.write_str(&self.key());
        }
        f.write_str(&self.container)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// `org/name` or `org/name@revision`. **Source:** the hub's rules for repository names (huggingface_hub's
/// `validate_repo_id`): at most 96 characters of letters, digits, `-`, `_`, `.`.
fn parse_hub(text: &str) -> Option<Location> {
    let (repository, revision) = match text.split_once('@') {
        Some((repository, revision)) => (repository, Some(revision)),
        None => (text, None),
    };
    let (owner, name) = repository.split_once('/')?;
    let is_name = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    // branches such as refs/pr/1 have slashes
    let is_revision = |text: &str| {
        text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
            && text.split('/').all(|part| !matches!(part, "" | "." | ".."))
    };
    if !is_name(owner) || !is_name(name) || !revision.is_none_or(is_revision) {
        return None;
    }
    Some(Location {
        service: Service::Hub,
        container: repository.to_owned(),
        prefix: String::new(),
        revision: revision.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> String {
        Location::parse(text).unwrap().unwrap().key()
    }

    #[test]
    fn one_model_has_one_key() {
        for text in ["s3://bucket/models/x", "S3://bucket/models/x/", "s3://bucket/models/x//"] {
            assert_eq!(key(text), "s3://bucket/models/x");
        }
        assert_eq!(key("GS://bucket"), "gs://bucket");
        assert_eq!(key("Az://container/a/"), "az://container/a");
        for text in ["org/name", "org/name@main", "hf://org/name", "HF://org/name/"] {
            assert_eq!(key(text), "hf://org/name");
        }
        assert_eq!(key("org/name@refs/pr/1"), "hf://org/name@refs/pr/1");
    }

    #[test]
    fn paths_are_not_remote() {
        for text in [
            "/models/x",
            "./org/name",
            "../org/name",
            "model",
            "a/b/c",
            "org/name/",
            "/a",
            "a/",
            "",
            "~/x",
            "org/na me",
            "C:\\x",
            "org/name@",
            "org/name@a//b",
            "-o/name",
            "a b://c",
        ] {
            assert_eq!(Location::parse(text).unwrap(), None, "{text:?}");
        }
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        for text in [
            "s3://",
            "s3:///x",
            "s3://bucket/a//b",
            "s3://bucket/../x",
            "http://host/x",
            "file:///x",
            "s3a://bucket/x",
            "hf://name",
            "hf://a/b/c",
        ] {
            let error = Location::parse(text).unwrap_err();
            assert!(error.is_refusal(), "{text:?}: {error}");
            assert!(error.to_string().contains(text), "{text:?}: {error}");
        }
    }

    #[test]
    fn refusals_do_not_repeat_secrets() {
        for text in [
            "s3://AKIA:hunter2@bucket/x",
            "az://container/x?sv=1&sig=hunter2",
            "https://user:hunter2@host/x",
            "s3://bucket/x#hunter2",
            "hf://org/name/x@hunter2",
        ] {
            let error = Location::parse(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn parts_are_told() {
        let location = Location::parse("s3://bucket/a/b/").unwrap().unwrap();
        assert_eq!((location.container(), location.prefix()), ("bucket", "a/b"));
        assert_eq!(location.to_string(), "s3://bucket/a/b");
        let location = Location::parse("org/name@v1.0").unwrap().unwrap();
        assert_eq!((location.container(), location.revision()), ("org/name", Some("v1.0")));
        assert_eq!(location.to_string(), "org/name@v1.0");
    }
}
