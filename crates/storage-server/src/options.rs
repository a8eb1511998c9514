use std::time::Duration;

/// A way of speaking to the server. Each has a port of its own; all see the same objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dialect {
    /// Amazon S3: path-style, and virtual-hosted for any host `BUCKET.localhost` or `BUCKET.s3…`.
    S3,
    /// Google Cloud Storage: the XML interface, and listing in the JSON interface.
    Gcs,
    /// Azure Blob Storage: `/CONTAINER/BLOB`, and `/ACCOUNT/CONTAINER/BLOB` as emulators have it.
    Azure,
    /// The Hugging Face hub: a bucket is a repository of models, `ORGANISATION/NAME`.
    Hub,
    /// The host to which [`Dialect::Hub`] redirects for large files.
    Cdn,
}

impl Dialect {
    /// All of them, in the order of their ports.
    pub const ALL: [Self; 5] = [Self::S3, Self::Gcs, Self::Azure, Self::Hub, Self::Cdn];
}

/// What a server is started with. The default is what tests want: free ports, public buckets, long lists in one page.
#[derive(Clone, Debug)]
pub struct Options {
    /// Ports of dialects; each that is not named gets a free one.
    pub ports: Vec<(Dialect, u16)>,
    /// Threads that serve. The content of files that are not in the page cache is read by further ones.
    pub threads: usize,
    /// Decides what [`Rule::share`](crate::Rule::share) and [`Rule::mixture`](crate::Rule::mixture) leave to chance.
    pub seed: u64,
    /// Whether buckets ask for credentials unless told otherwise by
    /// [`Server::set_private`](crate::Server::set_private).
    pub private: bool,
    /// S3: the access key id that requests are signed with. Signatures themselves are not checked.
    pub access_key_id: String,
    /// S3: the secret access key of [`Server::environment`](crate::Server::environment).
    pub secret_access_key: String,
    /// S3: the region of the endpoint and of buckets that are not elsewhere.
    pub region: String,
    /// Azure: the account; its key is [`Options::AZURE_KEY`].
    pub account: String,
    /// GCS and the hub: the bearer token.
    pub token: String,
    /// The most entries in a page of a list.
    pub page_entries_max: usize,
    /// How far the server's clock is ahead. S3 refuses signatures that are off by more than 15 minutes.
    pub clock_ahead: Duration,
    /// S3: for how long credentials of [`Server::environment_of_role`](crate::Server::environment_of_role) work.
    pub credentials_lifetime: Duration,
    /// For how long the URLs work to which the hub redirects.
    pub redirect_lifetime: Duration,
    /// The hub publishes the SHA-256 of each large file, so its first mention reads the file. Without, a digest of
    /// its identity stands in for that of its content: for benchmarks, which check nothing against it.
    pub content_digests: bool,
}

impl Options {
    /// The key of the Azure account.
    pub const AZURE_KEY: &str = "c3RvcmFnZS1zZXJ2ZXItYWNjb3VudC1rZXktMDEyMzQ1Njc4OQ==";

    /// Options with the port of one dialect.
    pub fn with_port(mut self, dialect: Dialect, port: u16) -> Self {
        self.ports.push((dialect, port));
        self
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ports: Vec::new(),
            threads: 2,
            seed: 0,
            private: false,
            access_key_id: "AKIASTORAGESERVER000".to_owned(),
            secret_access_key: "storage-server-secret-access-key-0123456".to_owned(),
            region: "us-east-1".to_owned(),
            account: "storageserver".to_owned(),
            token: "hf_storageServerToken0123456789".to_owned(),
            page_entries_max: 1000,
            clock_ahead: Duration::ZERO,
            credentials_lifetime: Duration::from_secs(3600),
            redirect_lifetime: Duration::from_secs(3600),
            content_digests: true,
        }
    }
}
