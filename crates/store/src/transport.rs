//! What the HTTP client of the object stores is asked and answers, seen from outside: the clients keep from their callers
//! what a failed request is judged by (status, `Retry-After`, `Date`, error codes).
//!
//! A task that makes requests runs inside [`watched`]; the last exchange of that task is then told beside its result.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use futures_util::StreamExt;
use object_store::{
    ClientOptions, HeaderMap,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpService, ReqwestConnector,
    },
};

use crate::counters::{Cells, count};

/// The last exchange of a task.
#[derive(Debug, Clone)]
pub(crate) enum Seen {
    /// A response, with the start of its body where its status is not a success.
    Response { from: From, status: u16, headers: HeaderMap, body: String },
    /// None came.
    Nothing { from: From, kind: HttpErrorKind, text: String },
}

/// Who was asked.
#[derive(Debug, Clone)]
pub(crate) struct From {
    pub(crate) host: String,
    /// For credentials, not for objects.
    pub(crate) credentials: bool,
}

tokio::task_local! {
    static SEEN: Arc<Mutex<Option<Seen>>>;
}

/// Runs `future` and tells the last exchange that it made.
pub(crate) async fn watched<F: Future>(future: F) -> (F::Output, Option<Seen>) {
    let slot = Arc::new(Mutex::new(None));
    let output = SEEN.scope(Arc::clone(&slot), future).await;
    let seen = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    (output, seen)
}

fn note(seen: Seen) {
    // requests outside of `watched` have nobody to tell
    let _ = SEEN.try_with(|slot| *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen));
}

/// Makes the clients that one object store uses. The builders of `object_store` 0.14 ask for the client of the objects last;
/// those before are for credentials.
#[derive(Debug)]
pub(crate) struct WatchedConnector {
    counters: Arc<Cells>,
    clients: Arc<AtomicUsize>,
}

impl WatchedConnector {
    pub(crate) fn new(counters: Arc<Cells>) -> WatchedConnector {
        WatchedConnector { counters, clients: Arc::default() }
    }
}

impl HttpConnector for WatchedConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        let number = self.clients.fetch_add(1, Relaxed) + 1;
        let clients = Arc::clone(&self.clients);
        Ok(HttpClient::new(Watched {
            inner,
            number,
            clients,
            counters: Arc::clone(&self.counters),
        }))
    }
}

#[derive(Debug)]
struct Watched {
    inner: HttpClient,
    number: usize,
    /// How many there are: the last one is for objects.
    clients: Arc<AtomicUsize>,
    counters: Arc<Cells>,
}

/// How much of a failed response is read. Errors of all services are far shorter.
const ERROR_BODY_MAX: usize = 64 << 10;

impl HttpService for Watched {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(self.exchange(request))
    }
}

impl Watched {
    async fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let from = From {
            host: request.uri().host().unwrap_or_default().to_owned(),
            credentials: self.number != self.clients.load(Relaxed),
        };
        count(&self.counters.requests, 1);
        let response = match self.inner.execute(request).await {
            Ok(response) => response,
            Err(error) => {
                note(Seen::Nothing { from, kind: error.kind(), text: chain(&error) });
                return Err(error);
            }
        };
        let status = response.status();
        let headers = response.headers().clone();
        if status.is_success() {
            note(Seen::Response { from, status: status.as_u16(), headers, body: String::new() });
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let mut text = Vec::new();
        let mut chunks = body.bytes_stream();
        // a body that breaks off is no reason to lose the status
        while let Some(Ok(chunk)) = chunks.next().await {
            text.extend_from_slice(&chunk);
            if text.len() > ERROR_BODY_MAX {
                break;
            }
        }
        let body = String::from_utf8_lossy(&text).into_owned();
        note(Seen::Response { from, status: status.as_u16(), headers, body });
        Ok(HttpResponse::from_parts(parts, text.into()))
    }
}

/// An error and its causes, each said once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
