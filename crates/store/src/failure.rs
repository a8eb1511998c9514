//! Why one request failed, sorted into what can be done about it. Everything that reaches a message goes through
//! [`redact`] here.

use std::{fmt, time::Duration};

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// 429 or 503: asked too often.
    Throttled,
    /// Any other 5xx, or 408.
    Server,
    /// No connection came about.
    Connect,
    /// The connection ended before the response did.
    Interrupted,
    /// Nothing came for too long.
    Stalled,
    /// The body ended before the range did.
    Truncated,
    /// Not the range that was asked for.
    WrongRange,
    /// A response that makes no sense.
    Garbled,
    /// The object is not the one that was looked at before.
    Replaced,
    /// No such object or revision.
    NotFound,
    /// No such bucket, container or model: there cannot be any object.
    NoContainer,
    /// The object is as it was (304).
    NotModified,
    /// Credentials were found and are not enough.
    Denied,
    /// No credentials were found, or their source does not answer.
    NoCredentials,
    /// The bucket is in another region.
    WrongRegion,
    /// The clocks of both sides are too far apart.
    ClockSkew,
    /// TLS does not come about: repeating will not help.
    Tls,
    /// Anything that repeating will not help.
    Other,
}

/// Why one request failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// The HTTP status, where there was a response.
    pub(crate) status: Option<u16>,
    /// One line, free of secrets.
    pub(crate) text: String,
    /// What the server asks to wait before the next try.
    pub(crate) retry_after: Option<Duration>,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, text: impl AsRef<str>) -> Failure {
        Failure { kind, status: None, text: redact(text.as_ref()), retry_after: None }
    }

    /// Whether the same request may succeed a moment later. Decided here and nowhere else. Where requests succeeded before
    /// (`reached`), credentials that are not to be had will be again.
    pub(crate) fn is_transient(&self, reached: bool) -> bool {
        use FailureKind::*;
        match self.kind {
            Throttled | Server | Connect | Interrupted | Stalled | Truncated | WrongRange
            | Garbled => true,
            NoCredentials => reached,
            Replaced | NotFound | NoContainer | NotModified | Denied | WrongRegion | ClockSkew
            | Tls | Other => false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Some(status) if self.text.is_empty() => write!(f, "status {status}"),
            Some(status) => write!(f, "status {status}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// One line without what may be secret: queries and user information of URLs (signatures live there), control characters.
pub(crate) fn redact(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        let end = after
            .find(|c: char| c.is_whitespace() || "\"'<>)]}|".contains(c))
            .unwrap_or(after.len());
        let (url, tail) = after.split_at(end);
        let (address, query) = match url.find(['?', '#']) {
            Some(at) => (&url[..at], true),
            None => (url, false),
        };
        let host_end = address.find('/').unwrap_or(address.len());
        let host = address[..host_end].rsplit('@').next().unwrap_or_default();
        clean.push_str(before);
        clean.push_str(host);
        clean.push_str(&address[host_end..]);
        if query {
            clean.push_str("?…");
        }
        rest = tail;
    }
    clean.push_str(rest);
    let one_line: String = clean.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut short: String = one_line.trim().chars().take(500).collect();
    if short.len() < one_line.trim().len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_lose_queries_and_users() {
        assert_eq!(
            redact("error for url (https://u:p@h.x:1/a/b?X-Amz-Signature=abc&y=1): reset"),
            "error for url (https://h.x:1/a/b?…): reset"
        );
        assert_eq!(
            redact("a\nb \"http://x?sig=1\" c http://y/z"),
            "a b \"http://x?…\" c http://y/z"
        );
        assert_eq!(redact("plain: a?b=c"), "plain: a?b=c");
        assert!(redact(&"é".repeat(2000)).len() < 1100);
    }
}
