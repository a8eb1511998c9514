//! The server as scripts have it: a process that prints the environment of its clients.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use object_store::ObjectStoreExt;
use object_store::aws::AmazonS3Builder;
use object_store::path::Path;

use crate::common::{blocking, no_retries};

/// Ends its process.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_client_in_the_printed_environment_reads() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "content").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_storage-server"));
    command.arg("--dir").arg(dir.path()).args(["--private", "--latency-ms", "50"]);
    let mut server = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(server.0.stdout.take().unwrap()).lines();
    let mut builder = AmazonS3Builder::new().with_bucket_name("bench");
    // the secret is printed last
    for line in lines {
        let line = line.unwrap();
        let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
        builder = builder.with_config(name.to_lowercase().parse().unwrap(), value);
        if name == "AWS_SECRET_ACCESS_KEY" {
            break;
        }
    }
    let store = builder.with_retry(no_retries()).build().unwrap();
    let begun = Instant::now();
    let content = blocking(async { store.get(&Path::from("file")).await?.bytes().await });
    assert_eq!(content.unwrap(), "content");
    assert!(begun.elapsed() >= Duration::from_millis(50));
}
