//! What is known of an object before it is read: its length, what tells one content from the next, what was published of
//! its bytes.

use std::fmt;

/// One object under a location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name relative to the location.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Which content this is.
    pub identity: Identity,
    /// A digest that the source itself publishes, where it does and it was asked for ([`Store::info`](crate::Store::info)
    /// asks, [`Store::list`](crate::Store::list) knows none but on the hub).
    pub published: Option<Checksum>,
}

/// What tells one content of an object from the next. All that is known is compared; what only one side knows is not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The entity tag, as sent, quotes included.
    pub etag: Option<String>,
    /// The generation (GCS), the version (S3 and Azure, where buckets keep versions) or the commit (hub).
    pub version: Option<String>,
    /// When it was written, in milliseconds since 1970. Compared only where nothing better is known.
    pub modified_ms: Option<i64>,
}

impl Identity {
    /// Whether both can be of one content: false as soon as one thing that both know differs, or if they share nothing.
    pub fn matches(&self, other: &Identity) -> bool {
        let etags = compare(&self.etag, &other.etag);
        let versions = compare(&self.version, &other.version);
        match (etags, versions) {
            (Some(false), _) | (_, Some(false)) => false,
            (Some(true), _) | (_, Some(true)) => true,
            (None, None) => compare(&self.modified_ms, &other.modified_ms).unwrap_or(false),
        }
    }

    /// Whether no other content ever has this identity, so that bytes may be kept under it: a time of writing promises no such
    /// thing, nor does a weak entity tag (RFC 9110 §8.8.1).
    pub fn is_of_one_content(&self) -> bool {
        match self.etag {
            Some(_) => self.strong_etag().is_some(),
            None => self.version.is_some(),
        }
    }

    /// The entity tag, if a conditional request can use it: weak ones never match (RFC 9110 §13.1.1).
    pub(crate) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.etag, &self.version, self.modified_ms) {
            (Some(etag), _, _) => write!(f, "etag {etag}"),
            (None, Some(version), _) => write!(f, "version {version}"),
            (None, None, Some(modified)) => write!(f, "written {modified} ms after 1970"),
            (None, None, None) => f.write_str("unknown content"),
        }
    }
}

/// `None` unless both are known.
fn compare<T: PartialEq>(one: &Option<T>, other: &Option<T>) -> Option<bool> {
    Some(one.as_ref()? == other.as_ref()?)
}

/// A digest of an object's whole content that its source publishes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Checksum {
    /// How it is computed.
    pub algorithm: ChecksumAlgorithm,
    /// The digest, most significant byte first.
    pub value: Vec<u8>,
}

/// The digests that object stores publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ChecksumAlgorithm {
    /// SHA-256: Git LFS object ids on the hub, `x-amz-checksum-sha256`.
    Sha256,
    /// SHA-1: `x-amz-checksum-sha1`.
    Sha1,
    /// MD5: `Content-MD5` (Azure), `x-goog-hash: md5=`.
    Md5,
    /// CRC-64/NVME: `x-amz-checksum-crc64nvme`, the default of S3's clients since 2024-12.
    Crc64Nvme,
    /// CRC-32C: `x-amz-checksum-crc32c`, `x-goog-hash: crc32c=`.
    Crc32c,
    /// CRC-32 (ISO-HDLC): `x-amz-checksum-crc32`.
    Crc32,
}

impl ChecksumAlgorithm {
    /// The length of its digest.
    pub fn bytes(self) -> usize {
        match self {
            ChecksumAlgorithm::Sha256 => 32,
            ChecksumAlgorithm::Sha1 => 20,
            ChecksumAlgorithm::Md5 => 16,
            ChecksumAlgorithm::Crc64Nvme => 8,
            ChecksumAlgorithm::Crc32c | ChecksumAlgorithm::Crc32 => 4,
        }
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            ChecksumAlgorithm::Sha256 => "sha256",
            ChecksumAlgorithm::Sha1 => "sha1",
            ChecksumAlgorithm::Md5 => "md5",
            ChecksumAlgorithm::Crc64Nvme => "crc64nvme",
            ChecksumAlgorithm::Crc32c => "crc32c",
            ChecksumAlgorithm::Crc32 => "crc32",
        }
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.algorithm.name())?;
        self.value.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(etag: Option<&str>, version: Option<&str>, modified_ms: Option<i64>) -> Identity {
        Identity { etag: etag.map(str::to_owned), version: version.map(str::to_owned), modified_ms }
    }

    #[test]
    fn what_both_know_decides() {
        let known = identity(Some("\"a\""), Some("1"), Some(5));
        assert!(known.matches(&identity(Some("\"a\""), None, Some(6))));
        assert!(known.matches(&identity(None, Some("1"), None)));
        assert!(!known.matches(&identity(Some("\"b\""), Some("1"), Some(5))));
        assert!(!known.matches(&identity(Some("\"a\""), Some("2"), Some(5))));
        assert!(known.matches(&identity(None, None, Some(5))));
        assert!(!known.matches(&identity(None, None, Some(6))));
        assert!(!known.matches(&identity(None, None, None)));
    }

    #[test]
    fn weak_tags_are_no_condition() {
        assert_eq!(identity(Some("W/\"a\""), None, None).strong_etag(), None);
        assert_eq!(identity(Some("\"a\""), None, None).strong_etag(), Some("\"a\""));
    }

    #[test]
    fn strong_tags_and_versions_are_of_one_content() {
        let is = |etag, version| identity(etag, version, Some(5)).is_of_one_content();
        assert!(is(Some("\"a\""), None) && is(None, Some("1")));
        assert!(!is(Some("W/\"a\""), None) && !is(None, None));
    }
}
