//! How each service is asked and how it answers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::content::{Bucket, Object, Tree};
use crate::dialect::hub::Hub;
use crate::options::{Dialect, Options};
use crate::reply::{Failure, Reply};
use crate::request::Ask;

mod azure;
mod gcs;
pub(crate) mod hub;
mod list;
pub(crate) mod s3;

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// An object; on the hub as it was in a revision.
    Object { bucket: String, name: String, revision: Option<String> },
    /// The names of the objects of a bucket.
    List { bucket: String, revision: Option<String> },
    /// The bucket itself.
    Bucket { bucket: String, revision: Option<String> },
    /// Credentials of S3 that expire.
    Credentials,
    /// Something that is not served.
    Other,
}

impl Subject {
    /// An object as it is.
    fn object_of(bucket: String, name: String) -> Self {
        Self::Object { bucket, name, revision: None }
    }

    /// The name of the bucket.
    pub(crate) fn bucket(&self) -> &str {
        match self {
            Self::Object { bucket, .. }
            | Self::List { bucket, .. }
            | Self::Bucket { bucket, .. } => bucket,
            Self::Credentials | Self::Other => "",
        }
    }

    /// The name of the object.
    pub(crate) fn object(&self) -> &str {
        if let Self::Object { name, .. } = self { name } else { "" }
    }

    /// The state of the bucket that is asked for.
    pub(crate) fn revision(&self) -> Option<&str> {
        match self {
            Self::Object { revision, .. }
            | Self::List { revision, .. }
            | Self::Bucket { revision, .. } => revision.as_deref(),
            Self::Credentials | Self::Other => None,
        }
    }
}

/// What an answer is made of besides the request and the content.
pub(crate) struct Site<'a> {
    pub(crate) options: &'a Options,
    pub(crate) now: SystemTime,
    pub(crate) hub: &'a Hub,
    pub(crate) cdn_url: String,
}

impl Site<'_> {
    /// When something expires that is given out now, in seconds since 1970, rounded up.
    fn expires(&self, lifetime: Duration) -> u64 {
        let since_1970 = (self.now + lifetime).duration_since(UNIX_EPOCH).unwrap_or_default();
        since_1970.as_secs() + 1
    }
}

/// What a request is about.
pub(crate) fn subject(ask: &Ask, options: &Options) -> Subject {
    match ask.dialect {
        Dialect::S3 => s3::subject(ask),
        Dialect::Gcs => gcs::subject(ask),
        Dialect::Azure => azure::subject(ask, options),
        Dialect::Hub => hub::subject(ask),
        Dialect::Cdn => hub::cdn_subject(ask),
    }
}

/// Whether a request for an object is not for its content.
pub(crate) fn is_metadata(ask: &Ask) -> bool {
    ask.head || ask.dialect == Dialect::Gcs && gcs::is_metadata(ask)
}

/// Whether a request may read a bucket that is private or not.
pub(crate) fn permit(ask: &Ask, private: bool, site: &Site<'_>) -> Result<(), Failure> {
    match ask.dialect {
        Dialect::S3 => s3::permit(ask, private, site),
        Dialect::Gcs => gcs::permit(ask, private, site),
        Dialect::Azure => azure::permit(ask, private, site),
        Dialect::Hub => hub::permit(ask, private, site),
        Dialect::Cdn => hub::cdn_permit(ask, site),
    }
}

/// Why there is no such bucket: the hub does not tell strangers.
pub(crate) fn no_bucket(ask: &Ask, name: &str) -> Failure {
    match ask.dialect {
        Dialect::Hub if ask.authorization().is_none() => hub::unauthorized(),
        _ => Failure::usual(404, Some("NoSuchBucket")).element("BucketName", name),
    }
}

/// The names of objects.
pub(crate) fn list(ask: &Ask, subject: &Subject, tree: &Tree, site: &Site<'_>) -> Reply {
    match ask.dialect {
        Dialect::S3 => s3::list(ask, subject.bucket(), tree, site),
        Dialect::Gcs => gcs::list(ask, subject.bucket(), tree, site),
        Dialect::Azure => azure::list(ask, subject.bucket(), tree, site),
        Dialect::Hub | Dialect::Cdn => hub::list(ask, tree, site),
    }
}

/// What is said about a bucket.
pub(crate) fn bucket(
    ask: &Ask,
    subject: &Subject,
    bucket: &Bucket,
    tree: &Tree,
    site: &Site<'_>,
) -> Reply {
    match ask.dialect {
        Dialect::S3 | Dialect::Gcs => s3::bucket(ask, &site.options.region),
        Dialect::Azure => Reply::empty(200),
        Dialect::Hub | Dialect::Cdn => hub::info(ask, subject.bucket(), bucket, tree, site),
    }
}

/// What is answered before the content of an object is looked at: where to find it, or that it is another one now.
pub(crate) fn instead_of_content(
    ask: &Ask,
    subject: &Subject,
    tree: &Tree,
    object: &Object,
    site: &Site<'_>,
) -> Result<Option<Reply>, Failure> {
    match ask.dialect {
        Dialect::Gcs => {
            gcs::check_generation(ask, object).map(|()| gcs::metadata(ask, subject, object))
        }
        Dialect::Hub => Ok(hub::redirect(ask, subject, tree, object, site)),
        _ => Ok(None),
    }
}

/// Headers that a dialect adds to those of an object's content.
pub(crate) fn object_headers(ask: &Ask, tree: &Tree, object: &Object) -> Vec<(String, String)> {
    let headers: &[(&str, &str)] = match ask.dialect {
        Dialect::S3 | Dialect::Cdn => &[],
        Dialect::Gcs => &[
            ("x-goog-generation", &object.generation.to_string()),
            ("x-goog-metageneration", "1"),
            ("x-goog-stored-content-length", &object.size.to_string()),
            ("x-goog-stored-content-encoding", "identity"),
        ],
        Dialect::Azure => &[("x-ms-version", "2023-11-03"), ("x-ms-blob-type", "BlockBlob")],
        Dialect::Hub => &[("x-repo-commit", &tree.commit)],
    };
    headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// An error as the service writes it.
pub(crate) fn failure(ask: &Ask, failure: &Failure) -> Reply {
    match ask.dialect {
        Dialect::S3 | Dialect::Cdn => s3::failure(ask, failure),
        Dialect::Gcs => gcs::failure(ask, failure),
        Dialect::Azure => azure::failure(ask, failure),
        Dialect::Hub => hub::failure(ask, failure),
    }
}
