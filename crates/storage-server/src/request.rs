//! A request as far as all dialects read it alike: its path, its query, the range and the conditions.

use std::ops::Range;

use hyper::header::{AUTHORIZATION, HOST, HeaderMap, IF_MATCH, IF_NONE_MATCH, RANGE};
use percent_encoding::percent_decode_str;

use crate::options::Dialect;

/// A request that has been read.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) dialect: Dialect,
    /// Whether only the headers are wanted.
    pub(crate) head: bool,
    pub(crate) host: String,
    /// The path as sent, without its first slash.
    pub(crate) path: String,
    /// The path and query as sent.
    pub(crate) target: String,
    query: Vec<(String, String)>,
    headers: HeaderMap,
}

impl Ask {
    pub(crate) fn new<T>(dialect: Dialect, request: &hyper::Request<T>) -> Self {
        let uri = request.uri();
        let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
        let query = form_urlencoded::parse(uri.query().unwrap_or("").as_bytes());
        Self {
            dialect,
            head: request.method() == hyper::Method::HEAD,
            host: text(HOST).unwrap_or("").to_owned(),
            path: uri.path().trim_start_matches('/').to_owned(),
            target: uri.path_and_query().map_or("/", |target| target.as_str()).to_owned(),
            query: query.into_owned().collect(),
            headers: request.headers().clone(),
        }
    }

    /// The value of a header, where it is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The value of a parameter of the query.
    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn authorization(&self) -> Option<&str> {
        self.header(AUTHORIZATION.as_str())
    }

    /// The token of `Authorization: Bearer`.
    pub(crate) fn bearer(&self) -> Option<&str> {
        self.authorization().and_then(|value| value.strip_prefix("Bearer "))
    }

    /// The range as sent. Azure's own header comes before the usual one.
    pub(crate) fn range_header(&self) -> Option<&str> {
        let own = (self.dialect == Dialect::Azure).then(|| self.header("x-ms-range")).flatten();
        own.or_else(|| self.header(RANGE.as_str()))
    }

    /// Which bytes of an object of `size` bytes are asked for. What is no single range of bytes counts for nothing.
    pub(crate) fn range(&self, size: u64) -> Asked {
        self.range_header().map_or(Asked::Whole, |range| parse_range(range, size))
    }

    pub(crate) fn if_match(&self) -> Option<&str> {
        self.header(IF_MATCH.as_str())
    }

    pub(crate) fn if_none_match(&self) -> Option<&str> {
        self.header(IF_NONE_MATCH.as_str())
    }
}

/// Which bytes are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Whole,
    Part(Range<u64>),
    /// None that the object has.
    Nothing,
}

fn parse_range(value: &str, size: u64) -> Asked {
    let Some((first, last)) = value.strip_prefix("bytes=").and_then(|range| range.split_once('-'))
    else {
        return Asked::Whole;
    };
    let range = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.trim().is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.trim().is_empty() => size.saturating_sub(suffix)..size,
        _ => return Asked::Whole,
    };
    if range.is_empty() { Asked::Nothing } else { Asked::Part(range) }
}

/// Whether a list of ETags names this one.
pub(crate) fn names(list: &str, etag: &str) -> bool {
    let plain = |tag: &str| tag.trim().trim_start_matches("W/").trim_matches('"').to_owned();
    list.split(',').any(|tag| tag.trim() == "*" || plain(tag) == plain(etag))
}

/// A path or a part of it, decoded.
pub(crate) fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_with_the_object() {
        for (range, asked) in [
            ("bytes=0-0", Asked::Part(0..1)),
            ("bytes=5-9", Asked::Part(5..10)),
            ("bytes=5-99", Asked::Part(5..10)),
            ("bytes=5-", Asked::Part(5..10)),
            ("bytes=-3", Asked::Part(7..10)),
            ("bytes=-99", Asked::Part(0..10)),
            ("bytes=0-18446744073709551615", Asked::Part(0..10)),
            ("bytes=10-", Asked::Nothing),
            ("bytes=10-12", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=3-2", Asked::Whole),
            ("bytes=0-1,4-5", Asked::Whole),
            ("lines=0-1", Asked::Whole),
        ] {
            assert_eq!(parse_range(range, 10), asked, "{range}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Asked::Nothing);
    }

    #[test]
    fn conditions_name_etags_with_and_without_quotes() {
        assert!(names("\"a\"", "\"a\"") && names("a", "\"a\"") && names("*", "\"a\""));
        assert!(names("\"b\", W/\"a\"", "\"a\""));
        assert!(!names("\"b\"", "\"a\""));
    }
}
