//! What the tests of all dialects share.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::{Debug, Write as _};
use std::fs;
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path as FsPath, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::TryStreamExt;
use longshore_storage_server::{Dialect, Options, Server};
use object_store::path::Path;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, RetryConfig};

/// The objects of [`fill`], in the order of their bytes.
pub const NAMES: [&str; 5] = [
    "model/config.json",
    "model/sub/config.json",
    "model/sub/ä é+%&<.json",
    "model/weights-1.safetensors",
    "model/weights-2.safetensors",
];

/// A server with a bucket `models`: files and objects in memory; and what is in `model/weights-1.safetensors`.
pub fn fill(options: Options) -> (Server, Vec<u8>) {
    let server = Server::start(options);
    server.serve("models", files());
    server.put("models", "model/weights-2.safetensors", content());
    server.put("models", "model/sub/ä é+%&<.json", "strange");
    (server, content())
}

pub fn content() -> Vec<u8> {
    (0..1_000_003u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// The directory of the bucket's files, written once.
fn files() -> &'static FsPath {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = FsPath::new(env!("CARGO_TARGET_TMPDIR")).join("storage-server");
        fs::create_dir_all(dir.join("model/sub")).unwrap();
        fs::write(dir.join("model/weights-1.safetensors"), content()).unwrap();
        fs::write(dir.join("model/config.json"), "{}").unwrap();
        fs::write(dir.join("model/sub/config.json"), "").unwrap();
        dir
    })
}

pub fn blocking<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(60), future).await };
    runtime.block_on(limited).expect("done within a minute")
}

/// The first answer counts.
pub fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// An error with its causes.
pub fn client_error<T: Debug>(result: object_store::Result<T>) -> String {
    let error = result.unwrap_err();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

pub async fn names(store: &impl ObjectStore, prefix: Option<&str>) -> Vec<String> {
    let prefix = prefix.map(Path::from);
    let list = store.list(prefix.as_ref());
    let names = list.map_ok(|meta| meta.location.to_string());
    names.try_collect().await.unwrap()
}

/// What readers of objects rely on, in every dialect: content, ranges, ends, lists in pages, conditions.
pub async fn check_reading(store: &impl ObjectStore, server: &Server, content: &[u8]) {
    let path = Path::from("model/weights-1.safetensors");
    let size = content.len() as u64;
    let meta = store.head(&path).await.unwrap();
    assert_eq!(meta.size, size);
    let whole = store.get(&path).await.unwrap();
    assert_eq!(whole.meta.e_tag, meta.e_tag);
    assert_eq!(whole.bytes().await.unwrap(), content);
    for range in [0..1, 5..9, 100_000..400_001, content.len() - 1..content.len()] {
        let asked = range.start as u64..range.end as u64;
        assert_eq!(store.get_range(&path, asked).await.unwrap(), content[range]);
    }
    let end = store.get_range(&path, size - 3..size + 100).await.unwrap();
    assert_eq!(end, content[content.len() - 3..]);
    let error = client_error(store.get_range(&path, size..size + 1).await);
    assert!(error.contains("InvalidRange"), "{error}");
    let nothing = store.get(&Path::from("model/nothing")).await.unwrap_err();
    assert!(matches!(nothing, object_store::Error::NotFound { .. }), "{nothing}");

    assert_eq!(names(store, None).await, NAMES);
    assert_eq!(names(store, Some("model/sub")).await, NAMES[1..3]);
    let level = store.list_with_delimiter(Some(&Path::from("model"))).await.unwrap();
    let prefixes: Vec<&str> = level.common_prefixes.iter().map(Path::as_ref).collect();
    assert_eq!(prefixes, ["model/sub"]);
    assert_eq!(level.objects.len(), 3);
    let strange = Path::parse("model/sub/ä é+%&<.json").unwrap();
    assert_eq!(store.get(&strange).await.unwrap().bytes().await.unwrap(), "strange");

    let if_match = GetOptions {
        range: Some((0..10).into()),
        if_match: meta.e_tag.clone(),
        ..GetOptions::default()
    };
    let read = store.get_opts(&path, if_match.clone()).await.unwrap();
    assert_eq!(read.bytes().await.unwrap(), content[..10]);
    let new = GetOptions { if_none_match: meta.e_tag.clone(), ..GetOptions::default() };
    let same = store.get_opts(&path, new).await.unwrap_err();
    assert!(matches!(same, object_store::Error::NotModified { .. }), "{same}");
    server.replace("models", "model/weights-1.safetensors");
    let replaced = store.get_opts(&path, if_match).await.unwrap_err();
    assert!(matches!(replaced, object_store::Error::Precondition { .. }), "{replaced}");
    assert_ne!(store.head(&path).await.unwrap().e_tag, meta.e_tag);
}

/// What came over a connection, as far as it came.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// A connection by hand.
pub struct Raw(TcpStream);

/// How a body ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Complete,
    Closed,
    Reset,
    /// Nothing for the time that [`Raw::open`] was told.
    Silence,
}

impl Raw {
    pub fn open(server: &Server, dialect: Dialect, silence: Duration) -> Self {
        let address = server.url(dialect).replace("http://", "");
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(silence)).unwrap();
        Self(stream)
    }

    pub fn send(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) {
        let mut request = format!("{method} {target} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| *name == "host") {
            request.push_str("host: 127.0.0.1\r\n");
        }
        for (name, value) in headers {
            let _ = write!(request, "{name}: {value}\r\n");
        }
        self.0.write_all(format!("{request}\r\n").as_bytes()).unwrap();
    }

    /// The answer, as far as it comes, without a body if it is one to HEAD.
    pub fn receive(&mut self, method: &str) -> (Option<Answer>, End) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            match self.read(&mut byte) {
                Ok(_) => head.push(byte[0]),
                Err(end) => return (None, end),
            }
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: BTreeMap<String, String> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        let length: usize = if method == "HEAD" { 0 } else { length };
        let (mut body, mut end) = (Vec::new(), End::Complete);
        let mut buffer = vec![0; 1 << 16];
        while body.len() < length {
            let count = buffer.len().min(length - body.len());
            match self.read(&mut buffer[..count]) {
                Ok(count) => body.extend_from_slice(&buffer[..count]),
                Err(how) => {
                    end = how;
                    break;
                }
            }
        }
        (Some(Answer { status, headers, body }), end)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, End> {
        match self.0.read(buffer) {
            Ok(0) => Err(End::Closed),
            Ok(count) => Ok(count),
            Err(error) => Err(match error.kind() {
                ErrorKind::ConnectionReset => End::Reset,
                ErrorKind::WouldBlock | ErrorKind::TimedOut => End::Silence,
                other => panic!("{other}"),
            }),
        }
    }
}

/// One request on a connection of its own, answered in full.
pub fn ask(
    server: &Server,
    dialect: Dialect,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
) -> Answer {
    let mut raw = Raw::open(server, dialect, Duration::from_secs(20));
    raw.send(method, target, headers);
    match raw.receive(method) {
        (Some(answer), End::Complete) => answer,
        other => panic!("{other:?}"),
    }
}
