//! The server: threads, ports, and what a test says and asks while it serves.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use crate::connection::Connection;
use crate::content::Content;
use crate::dialect::hub::Hub;
use crate::dialect::s3;
use crate::fault::{Faults, Rule, RuleId};
use crate::log::{Counters, Log, Request};
use crate::options::{Dialect, Options};
use crate::serve::{Shared, serve};

/// A server on the loopback interface. It stops, and its connections end, when it is dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve, without any bucket.
    ///
    /// # Panics
    ///
    /// Where a port is taken, or where there can be no threads.
    pub fn start(options: Options) -> Self {
        Self::try_start(options).expect("a loopback port can be listened on")
    }

    /// Starts to serve, without any bucket.
    ///
    /// # Errors
    ///
    /// Where a port is taken, or where there can be no threads.
    pub fn try_start(options: Options) -> io::Result<Self> {
        let mut listeners = Vec::new();
        for dialect in Dialect::ALL {
            let port = options.ports.iter().find(|(known, _)| *known == dialect);
            let address =
                SocketAddr::from((Ipv4Addr::LOCALHOST, port.map_or(0, |(_, port)| *port)));
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            listeners.push((dialect, listener));
        }
        let mut ports = Vec::new();
        for (dialect, listener) in &listeners {
            ports.push((*dialect, listener.local_addr()?.port()));
        }
        let shared = Arc::new(Shared {
            content: Content::default(),
            faults: Mutex::new(Faults::new(options.seed)),
            log: Arc::new(Log::new()),
            hub: Hub::default(),
            ports,
            options,
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(shared.options.threads.max(1))
            .thread_name("storage-server")
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().spawn(move || {
            runtime.spawn(async move {
                for (dialect, listener) in listeners {
                    tokio::spawn(accept(Arc::clone(&for_thread), dialect, listener));
                }
            });
            // an error says that the server is gone, which is the same
            let _ = stopped.blocking_recv();
            drop(runtime);
        })?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// The URL of a dialect, without a slash at its end.
    pub fn url(&self, dialect: Dialect) -> String {
        self.shared.url(dialect)
    }

    /// What it was started with.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// The environment in which a client finds the server: that of `object_store`'s `from_env`, of boto3, and of what
    /// takes `HF_ENDPOINT`. Credentials are there where buckets are private unless told otherwise; where they are
    /// public, clients are told not to sign.
    pub fn environment(&self, dialect: Dialect) -> Vec<(&'static str, String)> {
        self.environment_with(dialect, self.shared.options.private)
    }

    /// The environment of a client with or without credentials.
    pub fn environment_with(&self, dialect: Dialect, signed: bool) -> Vec<(&'static str, String)> {
        let options = &self.shared.options;
        let (url, yes) = (self.url(dialect), || "true".to_owned());
        let credentials = match dialect {
            Dialect::S3 => vec![
                ("AWS_ACCESS_KEY_ID", options.access_key_id.clone()),
                ("AWS_SECRET_ACCESS_KEY", options.secret_access_key.clone()),
            ],
            Dialect::Gcs => vec![("GOOGLE_BEARER_TOKEN", options.token.clone())],
            Dialect::Azure => vec![("AZURE_STORAGE_ACCOUNT_KEY", Options::AZURE_KEY.to_owned())],
            Dialect::Hub | Dialect::Cdn => vec![("HF_TOKEN", options.token.clone())],
        };
        let unsigned = match dialect {
            Dialect::S3 => vec![("AWS_SKIP_SIGNATURE", yes())],
            Dialect::Gcs => vec![("GOOGLE_SKIP_SIGNATURE", yes())],
            Dialect::Azure => vec![("AZURE_SKIP_SIGNATURE", yes())],
            Dialect::Hub | Dialect::Cdn => Vec::new(),
        };
        let mut environment = match dialect {
            Dialect::S3 => vec![
                ("AWS_ENDPOINT_URL", url),
                ("AWS_REGION", options.region.clone()),
                ("AWS_ALLOW_HTTP", yes()),
            ],
            Dialect::Gcs => vec![("GOOGLE_BASE_URL", url), ("GOOGLE_ALLOW_HTTP", yes())],
            Dialect::Azure => vec![
                ("AZURE_STORAGE_ENDPOINT", url),
                ("AZURE_STORAGE_ACCOUNT_NAME", options.account.clone()),
                ("AZURE_ALLOW_HTTP", yes()),
            ],
            Dialect::Hub | Dialect::Cdn => vec![("HF_ENDPOINT", self.url(Dialect::Hub))],
        };
        environment.extend(if signed { credentials } else { unsigned });
        environment
    }

    /// The environment of a client of S3 that gets credentials as containers do, and new ones before they expire.
    /// `token_file` is to have any text without line breaks.
    pub fn environment_of_role(&self, token_file: &Path) -> Vec<(&'static str, String)> {
        let url = format!("{}/{}", self.url(Dialect::S3), s3::CREDENTIALS);
        let token_file = token_file.display().to_string();
        let mut environment = self.environment_with(Dialect::S3, true);
        environment.retain(|(name, _)| !name.contains("_KEY"));
        environment.push(("AWS_CONTAINER_CREDENTIALS_FULL_URI", url));
        environment.push(("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token_file));
        environment
    }

    /// What must not be in any output: keys, tokens, and the signatures of all redirects so far.
    pub fn secrets(&self) -> Vec<String> {
        let options = &self.shared.options;
        let key = Options::AZURE_KEY.to_owned();
        let mut secrets = vec![options.secret_access_key.clone(), options.token.clone(), key];
        secrets.extend(self.shared.hub.signatures());
        secrets
    }

    /// The commit of a repository's current state, as the hub names it.
    pub fn commit(&self, repository: &str) -> String {
        self.shared.content.current(repository).commit.clone()
    }

    /// Serves the files of a directory, as they are at each request, as a bucket, container or repository. If there is
    /// one of this name, this is its new state; the hub still knows the one before by its commit.
    pub fn serve(&self, bucket: &str, dir: impl AsRef<Path>) {
        self.shared.content.serve(bucket, dir.as_ref());
    }

    /// Serves an object from memory, instead of the file of its name if there is one.
    pub fn put(&self, bucket: &str, object: &str, content: impl Into<Bytes>) {
        let (content, now) = (content.into(), SystemTime::now());
        self.give(bucket, object, |given| {
            given.content = Some((content, now));
            given.removed = false;
        });
    }

    /// Serves an object no more; its file stays.
    pub fn remove(&self, bucket: &str, object: &str) {
        self.give(bucket, object, |given| given.removed = true);
    }

    /// Gives an object another ETag and generation and leaves its content.
    pub fn replace(&self, bucket: &str, object: &str) {
        self.give(bucket, object, |given| given.replaced += 1);
    }

    /// Gives an object this ETag, in quotes where it is sent.
    pub fn set_etag(&self, bucket: &str, object: &str, etag: &str) {
        self.give(bucket, object, |given| given.etag = Some(etag.to_owned()));
    }

    /// Adds a header to each response with the content of an object: a checksum, say.
    pub fn add_header(&self, bucket: &str, object: &str, name: &str, value: &str) {
        let header = (name.to_owned(), value.to_owned());
        self.give(bucket, object, |given| given.headers.push(header));
    }

    fn give(&self, bucket: &str, object: &str, change: impl FnOnce(&mut crate::content::Given)) {
        self.shared.content.current(bucket).give(object, change);
    }

    /// Says whether a bucket asks for credentials.
    pub fn set_private(&self, bucket: &str, private: bool) {
        self.shared.content.change(bucket, |bucket| bucket.private = Some(private));
    }

    /// Says that a bucket is in another region: S3 answers 301, without `Location`.
    pub fn set_region(&self, bucket: &str, region: &str) {
        self.shared.content.change(bucket, |bucket| bucket.region = Some(region.to_owned()));
    }

    /// Adds a rule, after those that are there.
    pub fn fault(&self, rule: Rule) -> RuleId {
        self.faults().add(rule)
    }

    /// Takes a rule back.
    pub fn remove_fault(&self, rule: RuleId) {
        self.faults().remove(rule);
    }

    /// Takes all rules back.
    pub fn clear_faults(&self) {
        self.faults().clear();
    }

    /// How often a rule's action was taken.
    pub fn taken(&self, rule: RuleId) -> u64 {
        self.faults().taken(rule)
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All requests since the start, or since [`Server::clear_log`], in the order in which they came.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.log.requests()
    }

    /// Sums over these requests.
    pub fn counters(&self) -> Counters {
        self.shared.log.counters()
    }

    /// The bytes that were sent of an object's content, by requests that are over.
    pub fn sent_bytes(&self, bucket: &str, object: &str) -> u64 {
        self.shared.log.sent_bytes(bucket, object)
    }

    /// Forgets requests; connections stay counted.
    pub fn clear_log(&self) {
        self.shared.log.clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(shared: Arc<Shared>, dialect: Dialect, listener: std::net::TcpListener) {
    let listener = TcpListener::from_std(listener).expect("the runtime has an IO driver");
    loop {
        // the error is that of one connection, or of too many open files: others follow
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(connect(Arc::clone(&shared), dialect, stream))),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

async fn connect(shared: Arc<Shared>, dialect: Dialect, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let (connection, socket) = Connection::new(stream, &shared.log);
    let service = service_fn(move |request| {
        serve(Arc::clone(&shared), Arc::clone(&connection), dialect, request)
    });
    // errors are those of clients that go away, and of rules
    let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
}
