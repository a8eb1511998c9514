//! What is answered, before it becomes a response.

use std::ops::Range;

use crate::content::Body;

/// The status, headers and body of an answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Body,
    /// What of the body is sent.
    pub(crate) range: Range<u64>,
}

impl Reply {
    pub(crate) fn empty(status: u16) -> Self {
        Self::text(status, "text/plain", String::new())
    }

    pub(crate) fn text(status: u16, content_type: &str, text: String) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        let range = 0..text.len() as u64;
        Self { status, headers, body: Body::Memory(text.into()), range }
    }

    pub(crate) fn header(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }
}

/// Why there is no answer, as S3 names it; dialects have names of their own for some.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) status: u16,
    pub(crate) code: String,
    pub(crate) message: String,
    /// Headers, and elements of the error's text.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) elements: Vec<(String, String)>,
}

impl Failure {
    pub(crate) fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        let (headers, elements) = (Vec::new(), Vec::new());
        Self { status, code: code.to_owned(), message: message.into(), headers, elements }
    }

    /// What services answer with this status, or with this code.
    pub(crate) fn usual(status: u16, code: Option<&str>) -> Self {
        let code = code.unwrap_or(match status {
            301 => "PermanentRedirect",
            400 => "InvalidRequest",
            401 => "Unauthorized",
            403 => "AccessDenied",
            404 => "NoSuchKey",
            408 => "RequestTimeout",
            412 => "PreconditionFailed",
            416 => "InvalidRange",
            429 => "TooManyRequests",
            501 => "NotImplemented",
            503 => "SlowDown",
            _ => "InternalError",
        });
        let message = match code {
            "AccessDenied" => "Access Denied",
            "ExpiredToken" => "The provided token has expired.",
            "InvalidAccessKeyId" => {
                "The AWS Access Key Id you provided does not exist in our records."
            }
            "InvalidRange" => "The requested range is not satisfiable",
            "NoSuchBucket" => "The specified bucket does not exist",
            "NoSuchKey" => "The specified key does not exist.",
            "NotImplemented" => "This server only reads",
            "PermanentRedirect" => {
                "The bucket you are attempting to access must be addressed using the specified \
                 endpoint. Please send all future requests to this endpoint."
            }
            "PreconditionFailed" => "At least one of the pre-conditions you specified did not hold",
            "RequestTimeTooSkewed" => {
                "The difference between the request time and the current time is too large."
            }
            "SlowDown" => "Please reduce your request rate.",
            _ => "We encountered an internal error. Please try again.",
        };
        Self::new(status, code, message)
    }

    pub(crate) fn header(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub(crate) fn element(mut self, name: &str, value: impl ToString) -> Self {
        self.elements.push((name.to_owned(), value.to_string()));
        self
    }
}
