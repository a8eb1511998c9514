//! What a failed exchange with an object store means, and what a good one tells of an object's content.

use std::{
    error::Error,
    time::{Duration, SystemTime},
};

use object_store::{
    HeaderMap,
    client::{HttpError, HttpErrorKind},
};

use crate::{
    failure::{Failure, FailureKind},
    http_date,
    location::Service,
    object_info::{Checksum, ChecksumAlgorithm},
    source::exchange::{Trouble, connection_failure, element, header, wrong_range},
    transport::{From, Seen, chain},
};

/// Signatures of S3 hold for 15 minutes. **Source:** "Authenticating requests (AWS Signature Version 4)", Amazon S3 API
/// reference.
const SKEW_MAX: Duration = Duration::from_secs(15 * 60);

/// What a request that failed means. `seen` is the last exchange; the error alone where there was none.
pub(super) fn verdict(
    service: Service,
    error: &object_store::Error,
    seen: Option<&Seen>,
) -> Failure {
    match seen {
        Some(Seen::Nothing { from, kind, text }) => nothing_came(from, *kind, text),
        Some(Seen::Response { from, status, headers, body }) if *status >= 300 => {
            let mut failure = refused(service, from, *status, headers, body);
            failure.status = Some(*status);
            failure
        }
        Some(Seen::Response { status, headers, .. }) => unusable(error, *status, headers),
        None => match error {
            object_store::Error::NotFound { .. } => {
                Failure::new(FailureKind::NotFound, "no such object")
            }
            object_store::Error::NotModified { .. } => {
                Failure::new(FailureKind::NotModified, "as it was")
            }
            object_store::Error::Precondition { .. } => {
                Failure::new(FailureKind::Replaced, "its identity is another one now")
            }
            // before any request: a credential's file, a command line tool that is asked for a token
            _ => Failure::new(FailureKind::NoCredentials, chain(error)),
        },
    }
}

fn nothing_came(from: &From, kind: HttpErrorKind, text: &str) -> Failure {
    if from.credentials {
        return Failure::new(
            FailureKind::NoCredentials,
            format!("{} does not answer: {text}", from.host),
        );
    }
    connection_failure(trouble(kind), format!("{}: {text}", from.host))
}

fn trouble(kind: HttpErrorKind) -> Trouble {
    match kind {
        HttpErrorKind::Connect => Trouble::Connect,
        HttpErrorKind::Timeout => Trouble::Silence,
        _ => Trouble::Other,
    }
}

/// A body that broke off.
pub(super) fn body_verdict(error: &object_store::Error) -> Failure {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(http) = inner.downcast_ref::<HttpError>() {
            return connection_failure(trouble(http.kind()), chain(http));
        }
        cause = inner.source();
    }
    Failure::new(FailureKind::Interrupted, chain(error))
}

/// A success that the client cannot use: no `Content-Range`, another range, no length.
fn unusable(error: &object_store::Error, status: u16, headers: &HeaderMap) -> Failure {
    let text = match error {
        object_store::Error::Generic { source, .. } => chain(source.as_ref()),
        error => chain(error),
    };
    // what `object_store` 0.14 says in `client/get.rs`
    if ["Content-Range", "CONTENT_RANGE", "Requested", "non-partial"]
        .iter()
        .any(|word| text.contains(word))
    {
        return wrong_range(status, headers);
    }
    let mut failure = Failure::new(FailureKind::Garbled, text);
    failure.status = Some(status);
    failure
}

fn refused(service: Service, from: &From, status: u16, headers: &HeaderMap, body: &str) -> Failure {
    let code = element(body, "Code").or_else(|| header(headers, "x-ms-error-code"));
    let message = element(body, "Message").unwrap_or_default();
    let message = message.lines().next().unwrap_or_default();
    let mut text = [code.unwrap_or_default(), message].join(" ").trim().to_owned();
    let kind = kind_of(service, from, status, code.unwrap_or_default(), headers);
    let also = match kind {
        FailureKind::WrongRegion => header(headers, "x-amz-bucket-region")
            .or_else(|| element(body, "Region"))
            .map(|region| format!("the bucket is in {region}")),
        FailureKind::ClockSkew => {
            skew(headers).map(|skew| format!("the clocks are {} s apart", skew.as_secs()))
        }
        _ if from.credentials => Some(format!("asked of {}", from.host)),
        _ => None,
    };
    if let Some(also) = also {
        text = if text.is_empty() { also } else { format!("{text}; {also}") };
    }
    let mut failure = Failure::new(kind, text);
    failure.retry_after = http_date::retry_after(header(headers, "retry-after"));
    failure
}

/// **Source:** "Error responses", Amazon S3 API reference; "Common REST API error codes", Azure Storage; "HTTP status and
/// error codes for XML", Cloud Storage.
fn kind_of(
    service: Service,
    from: &From,
    status: u16,
    code: &str,
    headers: &HeaderMap,
) -> FailureKind {
    let told_region = header(headers, "x-amz-bucket-region").is_some();
    match (status, code) {
        (408 | 429 | 500..=599, _) if from.credentials => FailureKind::Server,
        _ if from.credentials => FailureKind::NoCredentials,
        (_, "RequestTimeTooSkewed") => FailureKind::ClockSkew,
        (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
            FailureKind::WrongRegion
        }
        (400, "RequestTimeout") => FailureKind::Interrupted,
        (400, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => FailureKind::Denied,
        // a request without a body (HEAD) is not told the code
        (400, "") if told_region && service == Service::S3 => FailureKind::WrongRegion,
        (301, _) => FailureKind::WrongRegion,
        (304, _) => FailureKind::NotModified,
        (404, "NoSuchBucket" | "ContainerNotFound") => FailureKind::NoContainer,
        (404 | 410, _) => FailureKind::NotFound,
        (412 | 416, _) => FailureKind::Replaced,
        (401 | 403, _) if skew(headers).is_some() => FailureKind::ClockSkew,
        (401 | 403, _) => FailureKind::Denied,
        (429 | 503, _) => FailureKind::Throttled,
        (307 | 308 | 408 | 425 | 500..=599, _) => FailureKind::Server,
        _ => FailureKind::Other,
    }
}

/// How far this machine's clock is from the server's, if so far that signatures do not hold.
fn skew(headers: &HeaderMap) -> Option<Duration> {
    let theirs = http_date::parse(header(headers, "date")?)?;
    let ours = SystemTime::now();
    let apart = ours.duration_since(theirs).or_else(|_| theirs.duration_since(ours)).ok()?;
    Some(apart).filter(|apart| *apart > SKEW_MAX)
}

/// The digest of the whole object that a response tells, the strongest one.
///
/// **Source:** "Checking object integrity", Amazon S3 user guide (composite checksums are of the parts' checksums, so they
/// say nothing here); "Get blob properties", Azure; `x-goog-hash`, Cloud Storage XML API.
pub(super) fn published(seen: &Seen) -> Option<Checksum> {
    let Seen::Response { headers, .. } = seen else { return None };
    let own_headers = [
        ("x-amz-checksum-sha256", ChecksumAlgorithm::Sha256),
        ("x-amz-checksum-sha1", ChecksumAlgorithm::Sha1),
        ("x-amz-checksum-crc64nvme", ChecksumAlgorithm::Crc64Nvme),
        ("x-amz-checksum-crc32c", ChecksumAlgorithm::Crc32c),
        ("x-amz-checksum-crc32", ChecksumAlgorithm::Crc32),
        ("content-md5", ChecksumAlgorithm::Md5),
    ];
    let whole = header(headers, "x-amz-checksum-type") != Some("COMPOSITE");
    for (name, algorithm) in own_headers {
        let told = header(headers, name).filter(|_| whole);
        if let Some(checksum) = told.and_then(|text| checksum(algorithm, text)) {
            return Some(checksum);
        }
    }
    let hashes = headers.get_all("x-goog-hash").iter().filter_map(|value| value.to_str().ok());
    let hashes: Vec<&str> = hashes.flat_map(|value| value.split(',')).map(str::trim).collect();
    let wanted = [("md5=", ChecksumAlgorithm::Md5), ("crc32c=", ChecksumAlgorithm::Crc32c)];
    wanted.iter().find_map(|(name, algorithm)| {
        let told = hashes.iter().find_map(|hash| hash.strip_prefix(name))?;
        checksum(*algorithm, told)
    })
}

fn checksum(algorithm: ChecksumAlgorithm, base64: &str) -> Option<Checksum> {
    let value = decode_base64(base64)?;
    (value.len() == algorithm.bytes()).then_some(Checksum { algorithm, value })
}

/// Standard base64 with padding (RFC 4648 §4); `None` for anything else.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if text.len() % 4 != 0 || text.len() - digits.len() > 2 {
        return None;
    }
    let mut value = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0u32, 0);
    for digit in digits.bytes() {
        let six = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            value.push((bits >> held & 0xff) as u8);
        }
    }
    Some(value)
}
