//! How each service is asked and how it answers.

use std::time::SystemTime;

use crate::content::Tree;
use crate::options::Options;
use crate::reply::{Failure, Reply};
use crate::request::Ask;

pub(crate) mod list;
pub(crate) mod s3;

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// An object.
    Object { bucket: String, name: String },
    /// The names of the objects of a bucket.
    List { bucket: String },
    /// The bucket itself.
    Bucket { bucket: String },
    /// Something that is not served.
    Other,
}

impl Subject {
    pub(crate) fn bucket(&self) -> &str {
        match self {
            Self::Object { bucket, .. } | Self::List { bucket } | Self::Bucket { bucket, .. } => {
                bucket
            }
            Self::Other => "",
        }
    }

    pub(crate) fn object(&self) -> &str {
        if let Self::Object { name, .. } = self { name } else { "" }
    }
}

/// What an answer is made of besides the request.
pub(crate) struct Site<'a> {
    pub(crate) options: &'a Options,
    pub(crate) now: SystemTime,
}

/// What a request is about.
pub(crate) fn subject(ask: &Ask) -> Subject {
    s3::subject(ask)
}

/// Whether a request may read a bucket that is private or not.
pub(crate) fn permit(ask: &Ask, private: bool, site: &Site<'_>) -> Result<(), Failure> {
    s3::permit(ask, private, site)
}

/// The names of objects.
pub(crate) fn list(ask: &Ask, bucket: &str, tree: &Tree, site: &Site<'_>) -> Reply {
    s3::list(ask, bucket, tree, site)
}

/// What is said about a bucket.
pub(crate) fn bucket(ask: &Ask, region: &str) -> Reply {
    s3::bucket(ask, region)
}

/// An error as the service writes it.
pub(crate) fn failure(ask: &Ask, failure: &Failure) -> Reply {
    s3::failure(ask, failure)
}
