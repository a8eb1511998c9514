//! Google Cloud Storage. The XML interface for objects and lists, as readers use it; listing and reading by the JSON
//! interface for those that do.

use serde_json::{Value, json};

use super::list::{Query, named, page, token};
use super::{Site, Subject, s3};
use crate::content::{Object, Tree};
use crate::reply::{Failure, Reply};
use crate::request::{Ask, decoded};
use crate::xml::iso_date;

pub(crate) fn subject(ask: &Ask) -> Subject {
    let by_json = json_path(ask).map(|path| match path.split_once("/o") {
        Some((bucket, "" | "/")) => Subject::List { bucket: decoded(bucket), revision: None },
        Some((bucket, name)) => {
            Subject::object_of(decoded(bucket), decoded(name.trim_start_matches('/')))
        }
        None => Subject::Bucket { bucket: decoded(path), revision: None },
    });
    by_json.unwrap_or_else(|| s3::subject_by_path(ask))
}

/// What follows `/storage/v1/b/`.
fn json_path(ask: &Ask) -> Option<&str> {
    let path = ask.path.strip_prefix("download/").unwrap_or(&ask.path);
    path.strip_prefix("storage/v1/b/")
}

pub(crate) fn permit(ask: &Ask, private: bool, site: &Site<'_>) -> Result<(), Failure> {
    match ask.bearer() {
        Some(token) if token == site.options.token => Ok(()),
        Some(_) => Err(Failure::new(401, "AuthenticationRequired", "Authentication required.")),
        None if private => Err(Failure::new(
            403,
            "AccessDenied",
            "Access denied. Anonymous caller does not have storage.objects.get access to the \
             Google Cloud Storage object.",
        )),
        None => Ok(()),
    }
}

/// Whether the object is still of the generation that the request names.
pub(crate) fn check_generation(ask: &Ask, object: &Object) -> Result<(), Failure> {
    let differs = |expected: &str| expected != object.generation.to_string();
    if ask.query("generation").is_some_and(differs) {
        return Err(Failure::usual(404, Some("NoSuchKey")));
    }
    let condition = ask.header("x-goog-if-generation-match");
    if condition.or_else(|| ask.query("ifGenerationMatch")).is_some_and(differs) {
        return Err(Failure::usual(412, None).element("Condition", "If-Generation-Match"));
    }
    Ok(())
}

pub(crate) fn list(ask: &Ask, bucket: &str, tree: &Tree, site: &Site<'_>) -> Reply {
    if json_path(ask).is_none() {
        return s3::list(ask, bucket, tree, site);
    }
    let given = |name| ask.query(name).unwrap_or("");
    let after = ask.query("pageToken").and_then(named);
    let asked = ask.query("maxResults").and_then(|max| max.parse().ok()).unwrap_or(1000);
    let page = page(
        tree,
        &Query {
            prefix: given("prefix"),
            delimiter: given("delimiter"),
            after: after.as_deref(),
            from: ask.query("startOffset"),
            entries_max: site.options.page_entries_max.min(asked).max(1),
        },
    );
    let items: Vec<Value> =
        page.objects.iter().map(|(name, object)| resource(bucket, name, object)).collect();
    let mut list = json!({ "kind": "storage#objects", "items": items, "prefixes": page.prefixes });
    if let Some(next) = page.next {
        list["nextPageToken"] = token(&next).into();
    }
    Reply::text(200, "application/json", list.to_string())
}

/// What the JSON interface says about an object.
fn resource(bucket: &str, name: &str, object: &Object) -> Value {
    json!({
        "kind": "storage#object",
        "name": name,
        "bucket": bucket,
        "generation": object.generation.to_string(),
        "metageneration": "1",
        "size": object.size.to_string(),
        "updated": iso_date(object.modified),
        "etag": object.etag.trim_matches('"'),
    })
}

/// Whether a request of the JSON interface is for what there is to say about an object, and not for its content.
pub(crate) fn is_metadata(ask: &Ask) -> bool {
    let by_json = ask.path.starts_with("storage/v1/b/");
    by_json && ask.query("alt") != Some("media")
}

/// That answer.
pub(crate) fn metadata(ask: &Ask, subject: &Subject, object: &Object) -> Option<Reply> {
    is_metadata(ask).then(|| {
        let resource = resource(subject.bucket(), subject.object(), object);
        Reply::text(200, "application/json", resource.to_string())
    })
}

pub(crate) fn failure(ask: &Ask, failure: &Failure) -> Reply {
    if json_path(ask).is_none() || ask.head {
        return s3::failure(ask, failure);
    }
    let (code, message) = (failure.status, &failure.message);
    let errors = json!([{ "message": message, "domain": "global", "reason": &failure.code }]);
    let error = json!({ "error": { "code": code, "message": message, "errors": errors } });
    Reply::text(failure.status, "application/json", error.to_string())
}
