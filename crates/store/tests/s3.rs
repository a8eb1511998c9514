//! The whole way: location, store, list, metadata, ranges, against a server of a few lines that speaks S3.
#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use longshore_store::{Identity, Location, Revalidated, Settings, Store, StoreError, StoreOptions};

const NAME: &str = "model-00001.safetensors";
const ETAG: &str = "\"a-1\"";

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// Serves `bucket/models/x/NAME` until the process ends.
fn serve(content: Arc<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let content = Arc::clone(&content);
            thread::spawn(move || connection(stream.unwrap(), &content));
        }
    });
    format!("http://{address}")
}

fn connection(stream: TcpStream, content: &[u8]) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let mut out = stream;
    loop {
        let request = lines.next()?.ok()?;
        let headers: Vec<String> =
            lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            headers.iter().find_map(|line| {
                let (key, value) = line.split_once(": ")?;
                key.eq_ignore_ascii_case(name).then_some(value.to_owned())
            })
        };
        let (head, body) = answer(&request, &header, content);
        let date = "last-modified: Sun, 06 Nov 1994 08:49:37 GMT";
        out.write_all(format!("HTTP/1.1 {head}\r\n{date}\r\n\r\n").as_bytes()).ok()?;
        if !request.starts_with("HEAD") {
            out.write_all(&body).ok()?;
        }
    }
}

fn answer(
    request: &str,
    header: &dyn Fn(&str) -> Option<String>,
    content: &[u8],
) -> (String, Vec<u8>) {
    let target = request.split(' ').nth(1).unwrap_or_default();
    let object = format!("/bucket/models/x/{NAME}");
    if target.starts_with("/bucket?") {
        assert!(
            target.contains("prefix=models%2Fx%2F") && target.contains("delimiter=%2F"),
            "{target}"
        );
        let entry = format!(
            "<Contents><Key>models/x/{NAME}</Key><LastModified>1994-11-06T08:49:37.000Z</LastModified>\
             <ETag>&quot;a-1&quot;</ETag><Size>{}</Size></Contents>",
            content.len()
        );
        let body =
            format!("<ListBucketResult><IsTruncated>false</IsTruncated>{entry}</ListBucketResult>");
        return (format!("200 OK\r\ncontent-length: {}", body.len()), body.into_bytes());
    }
    if target != object {
        let body = "<Error><Code>NoSuchKey</Code><Message>none</Message></Error>";
        return (format!("404 Not Found\r\ncontent-length: {}", body.len()), body.into());
    }
    if header("if-none-match").as_deref() == Some(ETAG) {
        return (format!("304 Not Modified\r\netag: {ETAG}"), Vec::new());
    }
    if header("if-match").is_some_and(|tag| tag != ETAG) {
        return ("412 Precondition Failed\r\ncontent-length: 0".to_owned(), Vec::new());
    }
    let mut common = format!("etag: {ETAG}");
    if header("x-amz-checksum-mode").as_deref() == Some("ENABLED") {
        common.push_str("\r\nx-amz-checksum-crc32c: AAECAw==");
    }
    match header("range") {
        None => {
            (format!("200 OK\r\ncontent-length: {}\r\n{common}", content.len()), content.to_vec())
        }
        Some(range) => {
            let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
            let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
            let end = end.min(content.len() - 1);
            let head = format!(
                "206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{end}/{}\r\n{common}",
                end + 1 - start,
                content.len()
            );
            (head, content[start..=end].to_vec())
        }
    }
}

fn open(endpoint: &str) -> Store {
    let location = Location::parse("S3://bucket/models/x/").unwrap().unwrap();
    let settings = Settings::from([
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
    ]);
    let options =
        StoreOptions { settings, part_bytes: 1 << 20, hedge: false, ..StoreOptions::default() };
    Store::open(&location, &options).unwrap()
}

#[test]
fn a_bucket_is_listed_and_its_objects_are_read() {
    let content = Arc::new(content(5_000_001));
    let store = open(&serve(Arc::clone(&content)));

    let listed = store.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].bytes), (NAME, 5_000_001));

    let info = store.info(NAME).unwrap().unwrap();
    assert_eq!(info.identity, listed[0].identity);
    assert_eq!(info.published.as_ref().unwrap().to_string(), "crc32c:00010203");
    assert_eq!(store.info("absent").unwrap(), None);

    let object = store.object(&listed[0]);
    let mut whole = vec![0; content.len()];
    let report = object.read(0..info.bytes, &mut whole).unwrap();
    assert!(whole == *content);
    assert_eq!((report.bytes, report.requests, report.retries), (5_000_001, 5, 0));

    thread::scope(|scope| {
        for thread in 0..8u64 {
            let (object, content) = (&object, &content);
            scope.spawn(move || {
                for n in 0..20 {
                    let start = (thread * 611_953 + n * 77_777) % 4_000_000;
                    let end = start + 1 + (n * 49_999) % 900_000;
                    let mut part = vec![0; (end - start) as usize];
                    object.read(start..end, &mut part).unwrap();
                    assert!(part == content[start as usize..end as usize]);
                }
            });
        }
    });
    assert!(!object.has_changed().unwrap());
    let counters = store.counters();
    assert_eq!((counters.retries, counters.in_flight, counters.discarded_bytes), (0, 0, 0));
    assert!(!format!("{store:?} {object:?}").contains("hunter2"));
}

#[test]
fn whole_objects_are_fetched_once_and_revalidated() {
    let content = Arc::new(content(300_000));
    let store = open(&serve(Arc::clone(&content)));
    let (bytes, info) = store.get(NAME, 1 << 20).unwrap().unwrap();
    assert!(bytes == *content);
    assert_eq!(store.get("absent", 1 << 20).unwrap(), None);
    assert!(matches!(
        store.get(NAME, 1000),
        Err(StoreError::TooLarge { bytes: 300_000, limit: 1000, .. })
    ));

    assert_eq!(
        store.get_if_changed(NAME, &info.identity, 1 << 20).unwrap(),
        Revalidated::Unchanged
    );
    let other = Identity { etag: Some("\"b\"".to_owned()), ..Identity::default() };
    assert_eq!(
        store.get_if_changed(NAME, &other, 1 << 20).unwrap(),
        Revalidated::Changed(bytes, info.clone())
    );
    assert_eq!(store.get_if_changed("absent", &other, 1 << 20).unwrap(), Revalidated::Gone);
}

#[test]
fn another_content_and_ranges_past_the_end_are_errors() {
    let store = open(&serve(Arc::new(content(1000))));
    let mut info = store.info(NAME).unwrap().unwrap();
    let past = store.object(&info).read(900..1001, &mut [0; 101]).unwrap_err();
    assert!(matches!(past, StoreError::OutOfRange { bytes: 1000, .. }));

    info.identity.etag = Some("\"old\"".to_owned());
    let object = store.object(&info);
    assert!(object.has_changed().unwrap());
    let error = object.read(0..10, &mut [0; 10]).unwrap_err();
    assert!(matches!(error, StoreError::Replaced { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("s3://bucket/models/x/model-00001.safetensors, bytes 0..10"), "{text}");
}

#[test]
fn an_address_where_nobody_is_does_not_take_long() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let start = std::time::Instant::now();
    let error = open(&endpoint).list().unwrap_err();
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    assert!(
        matches!(error, StoreError::GaveUp { .. })
            && error.to_string().contains("listing s3://bucket"),
        "{error}"
    );
}
