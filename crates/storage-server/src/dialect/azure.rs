//! Azure Blob Storage: Get Blob, Get Blob Properties, List Blobs.

use std::time::Duration;

use super::list::{Query, named, page, token};
use super::{Site, Subject};
use crate::content::Tree;
use crate::options::Options;
use crate::reply::{Failure, Reply};
use crate::request::{Ask, decoded};
use crate::xml::Xml;

/// The account of emulators.
const EMULATED: &str = "devstoreaccount1";

/// How far the date of a request may be off.
const SKEW_MAX: Duration = Duration::from_secs(15 * 60);

pub(crate) fn subject(ask: &Ask, options: &Options) -> Subject {
    let account = [options.account.as_str(), EMULATED]
        .into_iter()
        .find_map(|account| ask.path.strip_prefix(account).and_then(|path| path.strip_prefix('/')));
    let path = account.unwrap_or(&ask.path);
    let (container, blob) = path.split_once('/').unwrap_or((path, ""));
    let (bucket, name) = (decoded(container), decoded(blob));
    if bucket.is_empty() {
        Subject::Other
    } else if !name.is_empty() {
        Subject::object_of(bucket, name)
    } else if ask.query("comp") == Some("list") {
        Subject::List { bucket, revision: None }
    } else {
        Subject::Bucket { bucket, revision: None }
    }
}

/// By a shared key of the account, whose signature is not checked, by a bearer token, or by a signed URL.
pub(crate) fn permit(ask: &Ask, private: bool, site: &Site<'_>) -> Result<(), Failure> {
    let failed = |message: &str| Err(Failure::new(403, "AuthenticationFailed", message));
    let Some(authorization) = ask.authorization() else {
        return match private && ask.query("sig").is_none() {
            false => Ok(()),
            true => Err(Failure::new(
                401,
                "NoAuthenticationInformation",
                "Server failed to authenticate the request. Please refer to the information in \
                 the www-authenticate header.",
            )
            .header("www-authenticate", "Bearer resource_id=https://storage.azure.com")),
        };
    };
    if ask.bearer().is_some() {
        return match ask.bearer() == Some(&site.options.token) {
            true => Ok(()),
            false => failed("Server failed to authenticate the request."),
        };
    }
    let account = authorization.strip_prefix("SharedKey ").and_then(|key| key.split(':').next());
    if account.is_none_or(|account| account != site.options.account && account != EMULATED) {
        return failed("Server failed to authenticate the request.");
    }
    let date = ask.header("x-ms-date").or_else(|| ask.header("date")).unwrap_or("");
    let Ok(date) = httpdate::parse_http_date(date) else {
        return failed("The Date header in the request is incorrect.");
    };
    let off = site.now.duration_since(date).or_else(|_| date.duration_since(site.now));
    match off.unwrap_or(Duration::ZERO) > SKEW_MAX {
        true => failed("Request date header too old"),
        false => Ok(()),
    }
}

pub(crate) fn list(ask: &Ask, container: &str, tree: &Tree, site: &Site<'_>) -> Reply {
    let given = |name| ask.query(name).unwrap_or("");
    let after = ask.query("marker").and_then(named);
    let asked = ask.query("maxresults").and_then(|max| max.parse().ok()).unwrap_or(5000);
    let page = page(
        tree,
        &Query {
            prefix: given("prefix"),
            delimiter: given("delimiter"),
            after: after.as_deref(),
            from: ask.query("startFrom"),
            entries_max: site.options.page_entries_max.min(asked).max(1),
        },
    );
    let mut xml = Xml::new();
    xml.element(&format!("EnumerationResults ContainerName=\"{container}\""), |xml| {
        xml.text("Prefix", given("prefix"));
        if !given("marker").is_empty() {
            xml.text("Marker", given("marker"));
        }
        xml.text("MaxResults", asked.to_string());
        xml.element("Blobs", |xml| {
            for (name, object) in &page.objects {
                xml.element("Blob", |xml| {
                    xml.text("Name", name);
                    xml.element("Properties", |xml| {
                        xml.text("Last-Modified", httpdate::fmt_http_date(object.modified));
                        // without quotes, other than in headers
                        xml.text("Etag", object.etag.trim_matches('"'));
                        xml.text("Content-Length", object.size.to_string());
                        xml.text("Content-Type", "application/octet-stream");
                        xml.text("BlobType", "BlockBlob");
                    });
                });
            }
            for prefix in &page.prefixes {
                xml.element("BlobPrefix", |xml| xml.text("Name", prefix));
            }
        });
        xml.text("NextMarker", page.next.as_deref().map(token).unwrap_or_default());
    });
    Reply::text(200, "application/xml", xml.finish())
}

pub(crate) fn failure(ask: &Ask, failure: &Failure) -> Reply {
    let code = match failure.code.as_str() {
        "AccessDenied" => "AuthorizationFailure",
        "NoSuchBucket" => "ContainerNotFound",
        "NoSuchKey" => "BlobNotFound",
        "NotImplemented" => "UnsupportedHttpVerb",
        "PreconditionFailed" => "ConditionNotMet",
        "RequestTimeTooSkewed" => "AuthenticationFailed",
        "SlowDown" => "ServerBusy",
        other => other,
    };
    let mut xml = Xml::new();
    xml.element("Error", |xml| {
        xml.text("Code", code);
        xml.text("Message", &failure.message);
    });
    let reply = if ask.head {
        Reply::empty(failure.status)
    } else {
        Reply::text(failure.status, "application/xml", xml.finish())
    };
    reply.header("x-ms-error-code", code)
}
