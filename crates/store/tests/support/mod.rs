//! One object in one bucket, on every port of the server.
#![allow(dead_code, reason = "each test uses its part")]

use longshore_storage_server::{Dialect, Options, Server};
use longshore_store::{Location, Store, StoreOptions};

/// A bucket, and a repository of the hub.
pub(crate) const BUCKET: &str = "bucket";
pub(crate) const REPOSITORY: &str = "org/name";
pub(crate) const NAME: &str = "a.safetensors";

/// Bytes that differ from their neighbours and from those a power of two away.
pub(crate) fn content(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(bytes);
    content
}

/// Serves the content under its name, and something beside it.
pub(crate) fn serve(options: Options, content: &[u8]) -> Server {
    let server = Server::start(options);
    server.put(BUCKET, &format!("models/x/{NAME}"), content.to_vec());
    server.put(BUCKET, "models/x/config.json", "{}");
    server.put(BUCKET, "models/x/deeper/b.safetensors", "b");
    server.put(BUCKET, "models/xx/c.safetensors", "c");
    // what consoles make to show a folder
    server.put(BUCKET, "models/x/", "");
    server.put(REPOSITORY, NAME, content.to_vec());
    server.put(REPOSITORY, "config.json", "{}");
    server.put(REPOSITORY, "deeper/b.safetensors", "b");
    server
}

pub(crate) fn location(dialect: Dialect) -> Location {
    let text = match dialect {
        Dialect::S3 => "s3://bucket/models/x",
        Dialect::Gcs => "gs://bucket/models/x",
        Dialect::Azure => "az://bucket/models/x",
        Dialect::Hub | Dialect::Cdn => REPOSITORY,
    };
    Location::parse(text).ok().flatten().expect("a location")
}

/// The defaults, for a client of this server.
pub(crate) fn options(server: &Server, dialect: Dialect) -> StoreOptions {
    options_with(server, dialect, server.options().private)
}

pub(crate) fn options_with(server: &Server, dialect: Dialect, signed: bool) -> StoreOptions {
    let environment = server.environment_with(dialect, signed).into_iter();
    let settings = environment.map(|(name, value)| (name.to_owned(), value)).collect();
    StoreOptions { settings, ..StoreOptions::default() }
}

pub(crate) fn open(_: &Server, dialect: Dialect, options: &StoreOptions) -> Store {
    Store::open(&location(dialect), options).expect("the store opens")
}
