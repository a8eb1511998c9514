//! The Hugging Face hub over plain HTTP.
//!
//! A revision is resolved to a commit once, with the names, lengths and digests of all its files; everything is read from
//! that commit. Large files lie with another host, to which the hub redirects with a signed URL that holds for a while:
//! such URLs are kept per file and asked for anew when they are refused. The token goes to the hub and nowhere else.
//!
//! **Source:** hub API, `GET /api/models/{repo}/revision/{revision}?blobs=true`; huggingface_hub 1.0 `file_download.py`
//! (`X-Linked-Etag`, `X-Linked-Size`, `X-Repo-Commit`, `X-Error-Code`, relative redirects on one host).

pub(crate) mod cache;
mod link;

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use object_store::HeaderMap;
use reqwest::{Client, Method, Response, Url, redirect::Policy};
use serde::Deserialize;
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use self::link::{Endpoint, encode};
use super::exchange::{Trouble, connection_failure, element, header, wrong_range};
use crate::{
    counters::{Cells, count},
    error::StoreError,
    failure::{Failure, FailureKind},
    http_date,
    location::{Location, MAIN},
    object_info::{Checksum, ChecksumAlgorithm, Identity, ObjectInfo},
    options::StoreOptions,
    source::{Attempt, Body, Source},
    transport::chain,
};

/// One revision of one model.
pub(crate) struct HubSource {
    client: Client,
    endpoint: Endpoint,
    token: Option<String>,
    repository: String,
    revision: String,
    counters: Arc<Cells>,
    /// What the revision was resolved to.
    commit: OnceCell<Commit>,
    places: Mutex<BTreeMap<String, Place>>,
}

#[derive(Debug)]
struct Commit {
    sha: String,
    files: BTreeMap<String, ObjectInfo>,
}

/// Where a file is. Asked of the hub by one request at a time: the others wait and use what that one found.
type Place = Arc<AsyncMutex<Option<Known>>>;

#[derive(Clone)]
enum Known {
    /// With the hub itself.
    Home,
    /// Where it redirects to.
    Elsewhere(Link),
}

/// Where a file was redirected to. The URL may be signed: it is never printed.
#[derive(Clone)]
struct Link {
    url: Url,
    /// What that host calls the content, once it said so.
    etag: Option<String>,
}

/// Where following redirects ended.
struct Followed {
    response: Response,
    /// The address, if it is not the hub's.
    elsewhere: Option<Url>,
    /// What the hub calls the content.
    etag: Option<String>,
    /// How long the hub says that it is.
    bytes: Option<u64>,
}

/// More redirects than this lead nowhere.
const REDIRECTS_MAX: usize = 5;
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// The answer about a model with 100,000 files is some 30 MB.
const ANSWER_MAX: usize = 256 << 20;
/// Errors are far shorter.
const ERROR_MAX: usize = 64 << 10;

impl HubSource {
    pub(crate) fn new(
        location: &Location,
        options: &StoreOptions,
        counters: Arc<Cells>,
    ) -> Result<HubSource, StoreError> {
        let bad =
            |reason: String| StoreError::BadSetting { location: location.to_string(), reason };
        let settings = &options.settings;
        if cache::is_on(settings, "HF_HUB_OFFLINE") {
            return Err(bad(
                "HF_HUB_OFFLINE is set and there is no complete copy in the local cache".to_owned(),
            ));
        }
        let endpoint =
            Endpoint::parse(settings.get("HF_ENDPOINT").unwrap_or("https://huggingface.co"));
        let endpoint = endpoint.map_err(|reason| bad(format!("HF_ENDPOINT: {reason}")))?;
        let token = cache::token(settings).map_err(bad)?;
        if token.is_some() && !endpoint.keeps_secrets() {
            return Err(bad(
                "HF_ENDPOINT is not encrypted, the token could be read on the way: use https, or unset HF_TOKEN".to_owned(),
            ));
        }
        let client = Client::builder()
            .redirect(Policy::none())
            .http1_only()
            .connect_timeout(CONNECT_MAX)
            .read_timeout(options.stall_after.mul_f64(1.25))
            .user_agent(concat!("longshore/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| {
                bad(format!("the HTTP client does not start: {}", chain(&error.without_url())))
            })?;
        Ok(HubSource {
            client,
            endpoint,
            token,
            repository: location.container().to_owned(),
            revision: location.revision().unwrap_or(MAIN).to_owned(),
            counters,
            commit: OnceCell::new(),
            places: Mutex::default(),
        })
    }

    /// The commit, asked for once.
    async fn commit(&self) -> Result<&Commit, Failure> {
        self.commit.get_or_try_init(|| self.resolve_revision()).await
    }

    async fn resolve_revision(&self) -> Result<Commit, Failure> {
        let path =
            format!("api/models/{}/revision/{}", self.repository, encode(&self.revision, false));
        let mut url = self.endpoint.join(&path)?;
        url.set_query(Some("blobs=true"));
        let response = self.follow(url, &Method::GET, None, false).await?.response;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refused(status.as_u16(), response.headers()));
        }
        let answer = collect(response, ANSWER_MAX).await?;
        let told: Told = serde_json::from_slice(&answer).map_err(|error| {
            Failure::new(FailureKind::Garbled, format!("not the answer of a hub: {error}"))
        })?;
        if told.sha.is_empty() || !told.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Failure::new(FailureKind::Garbled, "the hub names no commit"));
        }
        let mut files = BTreeMap::new();
        for file in told.siblings {
            // mirrors may not know of `blobs=true`: then files are asked for one by one, those at the top at least
            let info = match file.info(&told.sha) {
                None if file.rfilename.contains('/') => continue,
                None => {
                    let path = format!(
                        "{}/resolve/{}/{}",
                        self.repository,
                        told.sha,
                        encode(&file.rfilename, true)
                    );
                    self.head(self.endpoint.join(&path)?, &file.rfilename, &told.sha).await?
                }
                Some(info) => info,
            };
            files.insert(file.rfilename, info);
        }
        Ok(Commit { files, sha: told.sha })
    }

    /// Asks for a file: where it was found before, if that still answers, or through the hub.
    async fn file(
        &self,
        object: &ObjectInfo,
        range: Option<&Range<u64>>,
    ) -> Result<Response, Failure> {
        let place = self.place(&object.name);
        let known = place.lock().await.clone();
        let refused = match known {
            Some(Known::Home) => {
                return self.ask_hub(object, range).await.map(|(response, _)| response);
            }
            Some(Known::Elsewhere(link)) => match self.ask_elsewhere(&place, &link, range).await? {
                Some(response) => return Ok(response),
                None => Some(link.url),
            },
            None => None,
        };
        let mut known = place.lock().await;
        // others may have been faster
        if let Some(Known::Elsewhere(link)) = known.clone()
            && Some(&link.url) != refused.as_ref()
        {
            drop(known);
            if let Some(response) = self.ask_elsewhere(&place, &link, range).await? {
                return Ok(response);
            }
            return Err(Failure::new(
                FailureKind::Interrupted,
                "the hub redirects to where nothing is",
            ));
        }
        let (response, link) = self.ask_hub(object, range).await?;
        *known = Some(link.map_or(Known::Home, Known::Elsewhere));
        Ok(response)
    }

    /// Asks the hub, and whom it redirects to.
    async fn ask_hub(
        &self,
        object: &ObjectInfo,
        range: Option<&Range<u64>>,
    ) -> Result<(Response, Option<Link>), Failure> {
        let url = self.file_url(&object.name).await?;
        let Followed { response, elsewhere, etag, .. } =
            self.follow(url, &Method::GET, range, true).await?;
        if let Some(etag) = &etag {
            check_etag(object, etag)?;
        }
        if !response.status().is_success() {
            return Err(match elsewhere {
                Some(_) => refused_elsewhere(response).await,
                None => self.refused(response.status().as_u16(), response.headers()),
            });
        }
        let link = elsewhere.map(|url| Link { url, etag: told_etag(&response) });
        Ok((response, link))
    }

    /// Asks where a file was found before. `None` if that is to be found out anew: signed URLs hold for a while only.
    async fn ask_elsewhere(
        &self,
        place: &Place,
        link: &Link,
        range: Option<&Range<u64>>,
    ) -> Result<Option<Response>, Failure> {
        let response = match self.send(link.url.clone(), &Method::GET, range).await {
            Err(failure) if failure.kind == FailureKind::Connect => {
                forget(place, link).await;
                return Err(failure);
            }
            response => response?,
        };
        match response.status().as_u16() {
            300..=399 | 401 | 403 | 404 | 410 => {
                forget(place, link).await;
                Ok(None)
            }
            400..=599 => Err(refused_elsewhere(response).await),
            _ => match (&link.etag, told_etag(&response)) {
                (Some(before), Some(now)) if *before != now => {
                    let text =
                        format!("it had etag {before} where the hub redirects to, now {now}");
                    Err(Failure::new(FailureKind::Replaced, text))
                }
                _ => Ok(Some(response)),
            },
        }
    }

    async fn file_url(&self, name: &str) -> Result<Url, Failure> {
        let commit = self.commit().await?;
        self.endpoint.join(&format!(
            "{}/resolve/{}/{}",
            self.repository,
            commit.sha,
            encode(name, true)
        ))
    }

    /// What the hub itself says of a file.
    async fn head(&self, url: Url, name: &str, commit: &str) -> Result<ObjectInfo, Failure> {
        let followed = self.follow(url, &Method::HEAD, None, false).await?;
        let (status, headers) = (followed.response.status(), followed.response.headers());
        if !status.is_success() && !status.is_redirection() {
            return Err(self.refused(status.as_u16(), headers));
        }
        let size = followed.bytes.or_else(|| header(headers, "content-length")?.parse().ok());
        let bytes = size.ok_or_else(|| {
            Failure::new(FailureKind::Garbled, "the hub does not say how long the file is")
        })?;
        let identity = identity(followed.etag.as_deref(), commit);
        let published = followed.etag.as_deref().and_then(sha256);
        Ok(ObjectInfo { name: name.to_owned(), bytes, identity, published })
    }

    /// Sends a request and follows redirects, to other hosts too if it may `leave`.
    async fn follow(
        &self,
        mut url: Url,
        method: &Method,
        range: Option<&Range<u64>>,
        leave: bool,
    ) -> Result<Followed, Failure> {
        let (mut etag, mut bytes) = (None, None);
        for _ in 0..=REDIRECTS_MAX {
            let response = self.send(url.clone(), method, range).await?;
            let at_home = self.endpoint.is_at(&url);
            let headers = response.headers();
            let moved = response.status().is_redirection();
            if at_home && (moved || response.status().is_success()) {
                let plain = if moved { None } else { header(headers, "etag") };
                etag = header(headers, "x-linked-etag")
                    .or(plain)
                    .map(plain_tag)
                    .map(str::to_owned)
                    .or(etag);
                bytes =
                    header(headers, "x-linked-size").and_then(|size| size.parse().ok()).or(bytes);
            }
            let elsewhere = (!at_home).then(|| url.clone());
            if !moved {
                return Ok(Followed { response, elsewhere, etag, bytes });
            }
            let target = header(headers, "location").and_then(|target| url.join(target).ok());
            let Some(target) = target else {
                return Err(Failure::new(FailureKind::Garbled, "a redirect without a target"));
            };
            if !leave && !self.endpoint.is_at(&target) {
                return Ok(Followed { response, elsewhere, etag, bytes });
            }
            if !self.endpoint.may_lead_to(&target) {
                let host = target.host_str().unwrap_or_default();
                return Err(Failure::new(
                    FailureKind::Other,
                    format!("redirected to {host}, which is not encrypted"),
                ));
            }
            url = target;
        }
        Err(Failure::new(FailureKind::Other, format!("more than {REDIRECTS_MAX} redirects")))
    }

    /// One exchange. The token goes to the hub's own address only.
    async fn send(
        &self,
        url: Url,
        method: &Method,
        range: Option<&Range<u64>>,
    ) -> Result<Response, Failure> {
        count(&self.counters.requests, 1);
        let host = url.host_str().unwrap_or_default().to_owned();
        let mut request = self.client.request(method.clone(), url.clone());
        if let Some(token) = self.token.as_deref().filter(|_| self.endpoint.is_at(&url)) {
            request = request.bearer_auth(token);
        }
        if let Some(range) = range {
            request = request.header("range", format!("bytes={}-{}", range.start, range.end - 1));
        }
        request.send().await.map_err(|error| client_failure(error, &format!("{host}: ")))
    }

    fn refused(&self, status: u16, headers: &HeaderMap) -> Failure {
        let code = header(headers, "x-error-code").unwrap_or_default();
        let kind = match (status, code) {
            (_, "RepoNotFound") => FailureKind::NoContainer,
            (_, "RevisionNotFound" | "EntryNotFound") => FailureKind::NotFound,
            (401, _) if self.token.is_none() => FailureKind::NoCredentials,
            (401 | 403 | 451, _) => FailureKind::Denied,
            (404 | 410, _) => FailureKind::NotFound,
            (412 | 416, _) => FailureKind::Replaced,
            (429 | 503, _) => FailureKind::Throttled,
            (408 | 425 | 500..=599, _) => FailureKind::Server,
            _ => FailureKind::Other,
        };
        let message = header(headers, "x-error-message").unwrap_or_default();
        let mut failure = Failure::new(kind, [code, message].join(" "));
        failure.status = Some(status);
        failure.retry_after = http_date::retry_after(header(headers, "retry-after"));
        failure
    }

    fn place(&self, name: &str) -> Place {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(places.entry(name.to_owned()).or_default())
    }
}

/// Another request may have found a new one already: that one stays.
async fn forget(place: &Place, link: &Link) {
    let mut known = place.lock().await;
    if matches!(&*known, Some(Known::Elsewhere(current)) if current.url == link.url) {
        *known = None;
    }
}

fn told_etag(response: &Response) -> Option<String> {
    header(response.headers(), "etag").map(|tag| plain_tag(tag).to_owned())
}

impl Source for HubSource {
    fn list(&self) -> Attempt<'_, Vec<ObjectInfo>> {
        async move {
            let files = self.commit().await?.files.values();
            Ok(files.filter(|info| !info.name.contains('/')).cloned().collect())
        }
        .boxed()
    }

    fn info<'a>(&'a self, name: &'a str) -> Attempt<'a, ObjectInfo> {
        async move {
            let known = self.commit().await?.files.get(name).cloned();
            known.ok_or_else(|| Failure::new(FailureKind::NotFound, "the commit has no such file"))
        }
        .boxed()
    }

    fn check<'a>(&'a self, object: &'a ObjectInfo) -> Attempt<'a, ObjectInfo> {
        async move {
            let url = self.file_url(&object.name).await?;
            self.head(url, &object.name, &self.commit().await?.sha).await
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        name: &'a str,
        known: Option<&'a Identity>,
    ) -> Attempt<'a, (ObjectInfo, Body)> {
        async move {
            let info = self.info(name).await?;
            if known.is_some_and(|known| known.etag.is_some() && known.etag == info.identity.etag) {
                return Err(Failure::new(FailureKind::NotModified, "as it was"));
            }
            let response = self.file(&info, None).await?;
            check_length(&info, &response)?;
            Ok((info, body_of(response)))
        }
        .boxed()
    }

    fn open<'a>(&'a self, object: &'a ObjectInfo, range: Range<u64>) -> Attempt<'a, Body> {
        async move {
            let response = self.file(object, Some(&range)).await?;
            check_range(object, &range, &response)?;
            Ok(body_of(response))
        }
        .boxed()
    }
}

impl fmt::Debug for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSource")
            .field("repository", &self.repository)
            .field("revision", &self.revision)
            .finish()
    }
}

/// What the hub tells of a revision.
#[derive(Deserialize)]
struct Told {
    #[serde(default)]
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: Option<u64>,
}

impl Sibling {
    /// `None` where the hub does not tell lengths.
    fn info(&self, commit: &str) -> Option<ObjectInfo> {
        let bytes = self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size)?;
        let etag = self.lfs.as_ref().map(|lfs| lfs.sha256.as_str()).or(self.blob_id.as_deref());
        let published = self.lfs.as_ref().and_then(|lfs| sha256(&lfs.sha256));
        Some(ObjectInfo {
            name: self.rfilename.clone(),
            bytes,
            identity: identity(etag, commit),
            published,
        })
    }
}

fn identity(etag: Option<&str>, commit: &str) -> Identity {
    let etag = etag.map(|etag| format!("\"{etag}\""));
    Identity { etag, version: Some(commit.to_owned()), modified_ms: None }
}

/// The object id of a file in Git LFS is its SHA-256; that of a file in Git itself is shorter.
fn sha256(hex: &str) -> Option<Checksum> {
    let digits: Option<Vec<u8>> =
        hex.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect();
    let value: Vec<u8> = digits?.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    (hex.len() == 64).then_some(Checksum { algorithm: ChecksumAlgorithm::Sha256, value })
}

/// An entity tag without quotes and weakness.
fn plain_tag(tag: &str) -> &str {
    tag.trim_start_matches("W/").trim_matches('"')
}

fn check_etag(object: &ObjectInfo, told: &str) -> Result<(), Failure> {
    match object.identity.etag.as_deref().map(plain_tag) {
        Some(known) if known != told => {
            Err(Failure::new(FailureKind::Replaced, format!("it had etag {known}, now {told}")))
        }
        _ => Ok(()),
    }
}

/// A whole file is as long as it was said to be.
fn check_length(object: &ObjectInfo, response: &Response) -> Result<(), Failure> {
    match response.content_length() {
        Some(bytes) if bytes != object.bytes => {
            let text = format!("a length of {bytes} bytes instead of {} was told", object.bytes);
            Err(Failure::new(FailureKind::WrongRange, text))
        }
        _ => Ok(()),
    }
}

/// `Content-Range` is what was asked for, of a file as long as before (RFC 9110 §14.4).
fn check_range(
    object: &ObjectInfo,
    range: &Range<u64>,
    response: &Response,
) -> Result<(), Failure> {
    let status = response.status().as_u16();
    if status != 206 && range.start == 0 && range.end == object.bytes {
        return check_length(object, response);
    }
    let told = header(response.headers(), "content-range").filter(|_| status == 206);
    let parsed = told.and_then(|told| {
        let (span, size) = told.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = span.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?, size.parse().ok()?))
    });
    if parsed == Some((range.start, range.end, object.bytes)) {
        return Ok(());
    }
    Err(wrong_range(status, response.headers()))
}

/// What another host means, which is an object store in front of or behind a cache.
async fn refused_elsewhere(response: Response) -> Failure {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = collect(response, ERROR_MAX).await.unwrap_or_default();
    let body = String::from_utf8_lossy(&body);
    let code = element(&body, "Code").unwrap_or_default();
    let kind = match (status, code) {
        (400, "RequestTimeout") => FailureKind::Interrupted,
        // the URL is new: one that expired was not asked a second time
        (401 | 403, _) => FailureKind::Denied,
        (404 | 410, _) => FailureKind::NotFound,
        (412 | 416, _) => FailureKind::Replaced,
        (429 | 503, _) => FailureKind::Throttled,
        (408 | 425 | 500..=599, _) => FailureKind::Server,
        _ => FailureKind::Other,
    };
    let message = element(&body, "Message").unwrap_or_default();
    let mut failure = Failure::new(kind, format!("{code} {message} (where the hub redirects to)"));
    failure.status = Some(status);
    failure.retry_after = http_date::retry_after(header(&headers, "retry-after"));
    failure
}

/// A whole answer, unless it is absurdly long.
async fn collect(response: Response, most: usize) -> Result<Vec<u8>, Failure> {
    let mut body = body_of(response);
    let mut answer = Vec::new();
    while let Some(chunk) = body.next().await {
        answer.extend_from_slice(&chunk?);
        if answer.len() > most {
            return Err(Failure::new(
                FailureKind::Other,
                format!("an answer of more than {most} bytes"),
            ));
        }
    }
    Ok(answer)
}

fn body_of(response: Response) -> Body {
    response.bytes_stream().map(|chunk| chunk.map_err(|error| client_failure(error, ""))).boxed()
}

/// The error's URL may be signed.
fn client_failure(error: reqwest::Error, context: &str) -> Failure {
    let trouble = match () {
        () if error.is_connect() => Trouble::Connect,
        () if error.is_timeout() => Trouble::Silence,
        () => Trouble::Other,
    };
    connection_failure(trouble, format!("{context}{}", chain(&error.without_url())))
}
