//! Amazon S3, by its API reference: GetObject, HeadObject, ListObjectsV2, ListObjects, HeadBucket, GetBucketLocation.

use std::time::{Duration, UNIX_EPOCH};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::json;

use super::list::{Query, named, page, token};
use super::{Site, Subject};
use crate::content::Tree;
use crate::reply::{Failure, Reply};
use crate::request::{Ask, decoded};
use crate::xml::{Xml, iso_date, parse_basic_date};

/// What `encoding-type=url` leaves as it is.
const UNRESERVED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b'/');

/// How far a signature's time may be off.
const SKEW_MAX: Duration = Duration::from_secs(15 * 60);

/// The path at which there are credentials that expire; no bucket is called like that.
pub(crate) const CREDENTIALS: &str = ".credentials";

/// How the access key ids of such credentials begin. What follows is when they expire, in seconds since 1970.
const TEMPORARY: &str = "ASIASERVER";

pub(crate) fn subject(ask: &Ask) -> Subject {
    match virtual_bucket(&ask.host) {
        Some(bucket) => named_subject(ask, bucket.to_owned(), decoded(&ask.path)),
        None => subject_by_path(ask),
    }
}

/// What `/BUCKET/NAME` is about.
pub(crate) fn subject_by_path(ask: &Ask) -> Subject {
    let (bucket, name) = ask.path.split_once('/').unwrap_or((&ask.path, ""));
    named_subject(ask, decoded(bucket), decoded(name))
}

fn named_subject(ask: &Ask, bucket: String, name: String) -> Subject {
    if bucket == CREDENTIALS && name.is_empty() {
        Subject::Credentials
    } else if bucket.is_empty() {
        Subject::Other
    } else if !name.is_empty() {
        Subject::object_of(bucket, name)
    } else if ask.head || ask.query("location").is_some() {
        Subject::Bucket { bucket, revision: None }
    } else {
        Subject::List { bucket, revision: None }
    }
}

/// The bucket that a host is named for: `BUCKET.localhost`, `BUCKET.s3.…`, `BUCKET.s3-…`.
fn virtual_bucket(host: &str) -> Option<&str> {
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    let end = host.strip_suffix(".localhost").map(str::len);
    end.or_else(|| host.find(".s3.")).or_else(|| host.find(".s3-")).map(|end| &host[..end])
}

/// Who signed a request, as far as its credential scope says: `KEY/DATE/REGION/s3/aws4_request`.
fn credential(ask: &Ask) -> Option<String> {
    let header = ask.authorization().and_then(|value| {
        let parts = value.strip_prefix("AWS4-HMAC-SHA256 ")?;
        parts.split(',').find_map(|part| part.trim().strip_prefix("Credential="))
    });
    header.or_else(|| ask.query("X-Amz-Credential")).map(str::to_owned)
}

/// Requests that are signed are looked at in public buckets too.
pub(crate) fn permit(ask: &Ask, private: bool, site: &Site<'_>) -> Result<(), Failure> {
    let Some(credential) = credential(ask) else {
        let unsigned = ask.authorization().is_none();
        return match (private, unsigned) {
            (false, true) => Ok(()),
            (true, true) => Err(Failure::usual(403, Some("AccessDenied"))),
            (_, false) => {
                Err(Failure::new(400, "InvalidArgument", "Unsupported Authorization Type"))
            }
        };
    };
    let mut parts = credential.split('/');
    let (key, region) = (parts.next().unwrap_or(""), parts.nth(1).unwrap_or(""));
    if let Some(expires) = key.strip_prefix(TEMPORARY) {
        permit_temporary(ask, expires, site)?;
    } else if key != site.options.access_key_id {
        let failure = Failure::usual(403, Some("InvalidAccessKeyId"));
        return Err(failure.element("AWSAccessKeyId", key));
    }
    let expected = &site.options.region;
    if region != expected {
        let message = format!(
            "The authorization header is malformed; the region '{region}' is wrong; expecting '{expected}'"
        );
        return Err(Failure::new(400, "AuthorizationHeaderMalformed", message)
            .header("x-amz-bucket-region", expected)
            .element("Region", expected));
    }
    let date = ask.header("x-amz-date").or_else(|| ask.query("X-Amz-Date")).unwrap_or("");
    let Some(signed) = parse_basic_date(date) else {
        return Err(Failure::new(403, "AccessDenied", "AWS authentication requires a valid Date"));
    };
    let off = site.now.duration_since(signed).or_else(|_| signed.duration_since(site.now));
    if off.unwrap_or(Duration::ZERO) > SKEW_MAX {
        return Err(Failure::usual(403, Some("RequestTimeTooSkewed"))
            .element("RequestTime", date)
            .element("ServerTime", iso_date(site.now))
            .element("MaxAllowedSkewMilliseconds", SKEW_MAX.as_millis().to_string()));
    }
    Ok(())
}

/// Temporary credentials come with their token, and in time.
fn permit_temporary(ask: &Ask, expires: &str, site: &Site<'_>) -> Result<(), Failure> {
    let given = ask.header("x-amz-security-token").or_else(|| ask.query("X-Amz-Security-Token"));
    if given != Some(&session_token(expires, site)) {
        let message = "The provided token is malformed or otherwise invalid.";
        return Err(Failure::new(400, "InvalidToken", message));
    }
    let expires = Duration::from_secs(expires.parse().unwrap_or(0));
    match UNIX_EPOCH + expires < site.now {
        true => Err(Failure::usual(400, Some("ExpiredToken"))),
        false => Ok(()),
    }
}

fn session_token(expires: &str, site: &Site<'_>) -> String {
    format!("session-{expires}-{}", site.options.token)
}

/// Credentials as containers get them, for whoever has some token of authorisation.
pub(crate) fn credentials(ask: &Ask, site: &Site<'_>) -> Result<Reply, Failure> {
    if ask.authorization().is_none() {
        return Err(Failure::usual(401, None));
    }
    let seconds = site.expires(site.options.credentials_lifetime);
    let credentials = json!({
        "AccessKeyId": format!("{TEMPORARY}{seconds}"),
        "SecretAccessKey": site.options.secret_access_key,
        "Token": session_token(&seconds.to_string(), site),
        "Expiration": iso_date(UNIX_EPOCH + Duration::from_secs(seconds)),
    });
    Ok(Reply::text(200, "application/json", credentials.to_string()))
}

/// Where a bucket is that is not in the region of the endpoint.
pub(crate) fn elsewhere(bucket: &str, region: &str) -> Failure {
    Failure::usual(301, None)
        .header("x-amz-bucket-region", region)
        .element("Endpoint", format!("{bucket}.s3.{region}.amazonaws.com"))
        .element("Bucket", bucket)
}

pub(crate) fn list(ask: &Ask, bucket: &str, tree: &Tree, site: &Site<'_>) -> Reply {
    let second = ask.query("list-type") == Some("2");
    let given = |name| ask.query(name).unwrap_or("");
    let limit = site.options.page_entries_max;
    let keys_max = ask.query("max-keys").and_then(|max| max.parse().ok()).unwrap_or(1000);
    let after = ask.query("continuation-token").and_then(named);
    let start = if second { "start-after" } else { "marker" };
    let query = Query {
        prefix: given("prefix"),
        delimiter: given("delimiter"),
        after: after.as_deref().or_else(|| ask.query(start)),
        from: None,
        entries_max: limit.min(keys_max).max(1),
    };
    let page = page(tree, &query);
    let encoding = ask.query("encoding-type").filter(|encoding| *encoding == "url");
    let written = |name: &str| match encoding {
        Some(_) => utf8_percent_encode(name, UNRESERVED).to_string(),
        None => name.to_owned(),
    };

    let mut xml = Xml::new();
    xml.element("ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"", |xml| {
        xml.text("Name", bucket);
        xml.text("Prefix", written(query.prefix));
        if !query.delimiter.is_empty() {
            xml.text("Delimiter", written(query.delimiter));
        }
        if let Some(encoding) = encoding {
            xml.text("EncodingType", encoding);
        }
        xml.text("MaxKeys", keys_max.to_string());
        if second {
            xml.text("KeyCount", (page.objects.len() + page.prefixes.len()).to_string());
        } else {
            xml.text("Marker", written(given("marker")));
        }
        xml.text("IsTruncated", page.next.is_some().to_string());
        match &page.next {
            Some(next) if second => xml.text("NextContinuationToken", token(next)),
            Some(next) => xml.text("NextMarker", written(next)),
            None => {}
        }
        for (name, object) in &page.objects {
            xml.element("Contents", |xml| {
                xml.text("Key", written(name));
                xml.text("LastModified", iso_date(object.modified));
                xml.text("ETag", &object.etag);
                xml.text("Size", object.size.to_string());
                xml.text("StorageClass", "STANDARD");
            });
        }
        for prefix in &page.prefixes {
            xml.element("CommonPrefixes", |xml| xml.text("Prefix", written(prefix)));
        }
    });
    Reply::text(200, "application/xml", xml.finish())
}

pub(crate) fn bucket(ask: &Ask, region: &str) -> Reply {
    let mut xml = Xml::new();
    xml.element("LocationConstraint xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"", |xml| {
        xml.raw(region);
    });
    let reply = if ask.head {
        Reply::empty(200)
    } else {
        Reply::text(200, "application/xml", xml.finish())
    };
    reply.header("x-amz-bucket-region", region)
}

pub(crate) fn failure(ask: &Ask, failure: &Failure) -> Reply {
    let mut xml = Xml::new();
    xml.element("Error", |xml| {
        xml.text("Code", &failure.code);
        xml.text("Message", &failure.message);
        for (name, text) in &failure.elements {
            xml.text(name, text);
        }
        xml.text("Resource", ask.target.split('?').next().unwrap_or(""));
        xml.text("RequestId", "STORAGESERVER");
    });
    if ask.head {
        Reply::empty(failure.status)
    } else {
        Reply::text(failure.status, "application/xml", xml.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_name_buckets_or_nothing() {
        for (host, bucket) in [
            ("127.0.0.1:9000", None),
            ("localhost:9000", None),
            ("models.localhost:9000", Some("models")),
            ("my.models.s3.us-east-1.amazonaws.com", Some("my.models")),
            ("models.s3-us-west-2.amazonaws.com", Some("models")),
            ("s3.us-east-1.amazonaws.com", None),
        ] {
            assert_eq!(virtual_bucket(host), bucket, "{host}");
        }
    }
}
