//! What reading from a store can fail with, each with what to do about it where that is known.

use std::{ops::Range, time::Duration};

use crate::{
    failure::{Failure, FailureKind},
    location::{Location, Service},
};

/// Why a store could not be opened or read. Every message is one line, names what was asked of what, and holds no secret.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The text is not a location.
    #[error("{text}: {reason}")]
    BadLocation {
        /// The text, up to where a secret could begin.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A setting or environment variable is wrong or missing.
    #[error("{location}: {reason}")]
    BadSetting {
        /// What was to be opened.
        location: String,
        /// Which setting, and what is wrong with it.
        reason: String,
    },
    /// No credentials were found.
    #[error("{subject}: no credentials ({cause}); {advice}")]
    NoCredentials {
        /// What was asked of what.
        subject: String,
        /// Where they were looked for last.
        cause: String,
        /// What to do.
        advice: String,
    },
    /// The storage refuses.
    #[error("{subject}: access denied ({cause}); {advice}")]
    Denied {
        /// What was asked of what.
        subject: String,
        /// Status and message.
        cause: String,
        /// What to do.
        advice: String,
    },
    /// The bucket is in another region than requests were made for.
    #[error("{subject}: wrong region ({cause}); {advice}")]
    WrongRegion {
        /// What was asked of what.
        subject: String,
        /// Status and message.
        cause: String,
        /// What to do.
        advice: String,
    },
    /// This machine's clock is too far from the storage's.
    #[error(
        "{subject}: clock skew ({cause}); set this machine's clock, signatures hold for 15 minutes only"
    )]
    ClockSkew {
        /// What was asked of what.
        subject: String,
        /// Status, message and how far the clocks are apart.
        cause: String,
    },
    /// There is no such object, bucket or revision.
    #[error("{subject}: not found ({cause}); {advice}")]
    NotFound {
        /// What was asked of what.
        subject: String,
        /// Status and message.
        cause: String,
        /// What to do.
        advice: String,
    },
    /// The object is no longer the one that was looked at: what has been read of it and what is left are not one content.
    #[error("{subject}: replaced while it was being read ({cause})")]
    Replaced {
        /// What was asked of what.
        subject: String,
        /// How it shows.
        cause: String,
    },
    /// A range that is not within the object was asked for.
    #[error("{subject}: the object has {bytes} bytes only")]
    OutOfRange {
        /// What was asked of what.
        subject: String,
        /// The object's length.
        bytes: u64,
    },
    /// An object is larger than what was allowed.
    #[error("{subject}: {bytes} bytes, more than the {limit} that are allowed here")]
    TooLarge {
        /// What was asked of what.
        subject: String,
        /// The object's length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// It failed again and again until the time was up.
    #[error(
        "{subject}: given up after {requests} requests in {seconds:.1} s, {missing} bytes missing; last: {cause}"
    )]
    GaveUp {
        /// What was asked of what.
        subject: String,
        /// How often.
        requests: u64,
        /// For how long.
        seconds: f64,
        /// What did not come.
        missing: u64,
        /// The last failure.
        cause: String,
    },
    /// It failed in a way that repeating does not help.
    #[error("{subject}: {cause}")]
    Failed {
        /// What was asked of what.
        subject: String,
        /// Status and message.
        cause: String,
    },
}

impl StoreError {
    /// Whether the user can mend it: a name, a setting, a right, a clock.
    pub fn is_refusal(&self) -> bool {
        match self {
            StoreError::BadLocation { .. }
            | StoreError::BadSetting { .. }
            | StoreError::NoCredentials { .. }
            | StoreError::Denied { .. }
            | StoreError::WrongRegion { .. }
            | StoreError::ClockSkew { .. }
            | StoreError::NotFound { .. }
            | StoreError::TooLarge { .. } => true,
            StoreError::Replaced { .. }
            | StoreError::OutOfRange { .. }
            | StoreError::GaveUp { .. }
            | StoreError::Failed { .. } => false,
        }
    }
}

/// What was asked of a location.
#[derive(Debug, Clone)]
pub(crate) enum Operation<'a> {
    /// Its revision, on the hub.
    Revision,
    /// The names under it.
    List,
    /// An object's length and identity.
    Info(&'a str),
    /// A whole object.
    Get(&'a str),
    /// A range of an object.
    Read(&'a str, Range<u64>),
}

impl Operation<'_> {
    /// "s3://bucket/model/a.safetensors, bytes 0..100".
    pub(crate) fn subject(&self, location: &Location) -> String {
        match self {
            Operation::Revision => format!("revision of {location}"),
            Operation::List => format!("listing {location}"),
            Operation::Info(name) | Operation::Get(name) => location.describe(name),
            Operation::Read(name, range) => {
                format!("{}, bytes {}..{}", location.describe(name), range.start, range.end)
            }
        }
    }

    /// The error for a failure that ends the operation.
    pub(crate) fn failed(&self, location: &Location, failure: &Failure) -> StoreError {
        let subject = self.subject(location);
        let cause = failure.to_string();
        match failure.kind {
            FailureKind::Replaced => StoreError::Replaced { subject, cause },
            FailureKind::NotFound | FailureKind::NoContainer => {
                StoreError::NotFound { subject, cause, advice: self.advice_missing(location) }
            }
            FailureKind::Denied => {
                StoreError::Denied { subject, cause, advice: self.advice_denied(location, failure) }
            }
            FailureKind::NoCredentials => {
                StoreError::NoCredentials { subject, cause, advice: advice_credentials(location) }
            }
            FailureKind::WrongRegion => {
                let advice = "set AWS_REGION to the bucket's region".to_owned();
                StoreError::WrongRegion { subject, cause, advice }
            }
            FailureKind::ClockSkew => StoreError::ClockSkew { subject, cause },
            _ => StoreError::Failed { subject, cause },
        }
    }

    /// The error for transient failures that did not end in time.
    pub(crate) fn gave_up(
        &self,
        location: &Location,
        failure: &Failure,
        requests: u64,
        after: Duration,
        missing: u64,
    ) -> StoreError {
        let subject = self.subject(location);
        StoreError::GaveUp {
            subject,
            requests,
            seconds: after.as_secs_f64(),
            missing,
            cause: failure.to_string(),
        }
    }

    fn advice_denied(&self, location: &Location, failure: &Failure) -> String {
        let container = location.container();
        let says = |codes: &[&str]| codes.iter().any(|code| failure.text.contains(code));
        if says(&["ExpiredToken", "TokenRefreshRequired"]) {
            return "the session token has expired: get new credentials".to_owned();
        }
        if says(&["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"]) {
            return "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile".to_owned();
        }
        match (location.service(), self) {
            (Service::S3, Operation::List) => {
                format!("the credentials need s3:ListBucket on {container}")
            }
            (Service::S3, _) => format!(
                "the credentials need s3:GetObject on {container} (without s3:ListBucket, S3 answers so for missing objects too)"
            ),
            (Service::Gcs, Operation::List) => {
                format!("the account needs storage.objects.list on {container}")
            }
            (Service::Gcs, _) => format!("the account needs storage.objects.get on {container}"),
            (Service::Azure, _) => {
                format!(
                    "the credentials need to read and list {container}: check AZURE_STORAGE_ACCOUNT_NAME and the key or token"
                )
            }
            (Service::Hub, _) => format!(
                "if {container} is private or gated, ask for access on its page and set HF_TOKEN to a token that may read it"
            ),
        }
    }

    fn advice_missing(&self, location: &Location) -> String {
        match (location.service(), self) {
            (Service::Hub, Operation::Revision) => {
                "check the name and revision; a private model needs HF_TOKEN".to_owned()
            }
            (Service::Hub, _) => "the revision has no such file".to_owned(),
            (_, Operation::List) => "check the bucket's name and the endpoint".to_owned(),
            _ => "check the location, or whether the object was removed".to_owned(),
        }
    }
}

fn advice_credentials(location: &Location) -> String {
    let text = match location.service() {
        Service::S3 => {
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket"
        }
        Service::Gcs => {
            "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
        }
        Service::Azure => {
            "set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or a service principal, or AZURE_SKIP_SIGNATURE=true for a public container"
        }
        Service::Hub => "set HF_TOKEN to a token that may read the model",
    };
    text.to_owned()
}
