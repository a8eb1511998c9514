//! What object stores and the hub have in common: headers, and connections that fail.

use object_store::HeaderMap;

use crate::failure::{Failure, FailureKind};

/// How an HTTP client says that a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    Connect,
    Silence,
    Other,
}

/// A request that got no response, or a body that broke off.
pub(super) fn connection_failure(trouble: Trouble, text: String) -> Failure {
    let lower = text.to_ascii_lowercase();
    let kind = match trouble {
        _ if lower.contains("certificate") || lower.contains("corrupt message") => FailureKind::Tls,
        Trouble::Connect => FailureKind::Connect,
        Trouble::Silence => FailureKind::Stalled,
        // hyper's words for a body that is shorter than its Content-Length
        Trouble::Other if lower.contains("before message length reached") => FailureKind::Truncated,
        Trouble::Other => FailureKind::Interrupted,
    };
    Failure::new(kind, text)
}

/// A header's value, unless it is empty or not ASCII.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().filter(|value| !value.is_empty())
}

/// A success that is of another range than was asked for.
pub(super) fn wrong_range(status: u16, headers: &HeaderMap) -> Failure {
    let text = match header(headers, "content-range") {
        Some(told) if status == 206 => format!("Content-Range: {told} came"),
        None if status == 206 => "no Content-Range came".to_owned(),
        _ => "the whole object came, not the range".to_owned(),
    };
    let mut failure = Failure::new(FailureKind::WrongRange, text);
    failure.status = Some(status);
    failure
}

/// The text of the first `<name>` in an error's XML. Only code, message and region are taken from it: other elements repeat
/// what was signed.
pub(super) fn element<'a>(body: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = body.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once("</")?;
    Some(text.trim()).filter(|text| !text.is_empty())
}
