//! Addresses of the hub, and which others it may lead to.

use reqwest::Url;

use crate::failure::{Failure, FailureKind};

/// The hub's own address.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// With a slash at its end, so that paths are joined to it.
    base: Url,
}

impl Endpoint {
    pub(super) fn parse(text: &str) -> Result<Endpoint, &'static str> {
        let base =
            Url::parse(&format!("{}/", text.trim_end_matches('/'))).map_err(|_| "not a URL")?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err("neither http nor https");
        }
        if !base.username().is_empty() || base.password().is_some() || base.query().is_some() {
            return Err("user, password and query are not part of it; the token is HF_TOKEN");
        }
        Ok(Endpoint { base })
    }

    /// Whether nobody on the way can read what is sent.
    pub(super) fn keeps_secrets(&self) -> bool {
        keeps_secrets(&self.base)
    }

    pub(super) fn join(&self, path: &str) -> Result<Url, Failure> {
        self.base.join(path).map_err(|error| Failure::new(FailureKind::Other, error.to_string()))
    }

    /// Whether a URL is of the hub's own scheme, host and port.
    pub(super) fn is_at(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// Redirects do not lead from where nobody can listen to where somebody can.
    pub(super) fn may_lead_to(&self, url: &Url) -> bool {
        matches!(url.scheme(), "http" | "https")
            && (keeps_secrets(url) || !self.keeps_secrets() || self.is_at(url))
    }
}

fn keeps_secrets(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let loopback = host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    url.scheme() == "https" || loopback
}

/// Percent-encodes everything but unreserved characters (RFC 3986 §2.3), and slashes if they separate segments.
pub(super) fn encode(text: &str, slashes: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(byte.into())
            }
            b'/' if slashes => encoded.push('/'),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_stays_with_scheme_host_and_port() {
        let endpoint = Endpoint::parse("https://huggingface.co").unwrap();
        let at = |text| endpoint.is_at(&Url::parse(text).unwrap());
        assert!(at("https://huggingface.co/a/b") && at("https://HUGGINGFACE.co:443/x"));
        for other in [
            "http://huggingface.co/a",
            "https://huggingface.co:444/a",
            "https://cdn.huggingface.co/a",
            "https://huggingface.co.evil.example/a",
            "https://evil.example/https://huggingface.co",
        ] {
            assert!(!at(other), "{other}");
        }
    }

    #[test]
    fn redirects_do_not_leave_encryption() {
        let url = |text| Url::parse(text).unwrap();
        let hub = Endpoint::parse("https://huggingface.co").unwrap();
        assert!(hub.may_lead_to(&url("https://cdn.example/x?sig=1")));
        assert!(
            !hub.may_lead_to(&url("http://cdn.example/x"))
                && !hub.may_lead_to(&url("ftp://cdn.example/x"))
        );
        let local = Endpoint::parse("http://127.0.0.1:8080/hub/").unwrap();
        assert!(local.may_lead_to(&url("http://127.0.0.2:1/x")));
        assert_eq!(local.join("api/x").unwrap().as_str(), "http://127.0.0.1:8080/hub/api/x");
        assert!(!Endpoint::parse("http://10.0.0.1").unwrap().keeps_secrets());
    }

    #[test]
    fn endpoints_hold_no_secrets() {
        for text in ["huggingface.co", "ftp://x", "https://user:secret@x", "https://x/?token=1"] {
            assert!(Endpoint::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(encode("a b/ü#?.bin", true), "a%20b/%C3%BC%23%3F.bin");
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
