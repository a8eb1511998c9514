//! Serves a directory as object storage, for benchmarks and for a look by hand.

#![expect(clippy::print_stdout, reason = "what it prints is what scripts evaluate")]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use longshore_storage_server::{Action, At, Dialect, Operation, Options, Rule, Server};
use serde_json::json;

/// Serves a directory as object storage until it is killed, and prints the environment in which clients find it.
///
/// For every line on standard input it prints what it has been asked and has sent since the line before, as JSON.
#[derive(Debug, Parser)]
#[command(name = "storage-server")]
struct Arguments {
    /// The directory whose files are served.
    #[arg(long)]
    dir: PathBuf,
    /// The bucket, container or repository as which it is served.
    #[arg(long, default_value = "bench")]
    bucket: String,
    /// How clients speak to it: s3, gcs, azure or hub.
    #[arg(long, default_value = "s3", value_parser = dialect)]
    dialect: Dialect,
    /// The port; without, a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Threads that serve.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Decides which requests are slow or fail.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Milliseconds by which every answer is later.
    #[arg(long, default_value_t = 0)]
    latency_ms: u64,
    /// The share of the requests for content that are slow.
    #[arg(long, default_value_t = 0.0)]
    slow_share: f64,
    /// Milliseconds by which slow answers are later.
    #[arg(long, default_value_t = 2000)]
    slow_ms: u64,
    /// Bytes per second that one connection gets; 0 for as many as there can be.
    #[arg(long, default_value_t = 0)]
    connection_bytes_per_second: u64,
    /// The share of the requests for content that fail: 500, 503, 429, reset, or cut short, in turn by chance.
    #[arg(long, default_value_t = 0.0)]
    error_share: f64,
    /// Buckets ask for credentials.
    #[arg(long)]
    private: bool,
    /// The hub publishes the true SHA-256 of large files, which takes reading them once.
    #[arg(long)]
    content_digests: bool,
}

fn dialect(name: &str) -> Result<Dialect, String> {
    match name.to_lowercase().as_str() {
        "s3" => Ok(Dialect::S3),
        "gcs" => Ok(Dialect::Gcs),
        "azure" => Ok(Dialect::Azure),
        "hub" => Ok(Dialect::Hub),
        _ => Err("expected s3, gcs, azure or hub".to_owned()),
    }
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let options = Options {
        threads: arguments.threads,
        seed: arguments.seed,
        private: arguments.private,
        content_digests: arguments.content_digests,
        ..Options::default()
    };
    let server = Server::try_start(options.with_port(arguments.dialect, arguments.port))?;
    server.serve(&arguments.bucket, &arguments.dir);
    for rule in rules(&arguments) {
        server.fault(rule);
    }
    for (name, value) in server.environment_with(arguments.dialect, true) {
        println!("export {name}={value}");
    }
    for line in io::stdin().lines() {
        line?;
        let counters = server.counters();
        println!(
            "{}",
            json!({"requests": counters.requests, "sent_bytes": counters.sent_bytes, "concurrent_max": counters.concurrent_max})
        );
        server.clear_log();
    }
    // until a signal ends the process
    loop {
        std::thread::park();
    }
}

fn rules(arguments: &Arguments) -> Vec<Rule> {
    let mut rules = Vec::new();
    if arguments.latency_ms > 0 {
        rules.push(Rule::new(Action::Delay(Duration::from_millis(arguments.latency_ms))));
    }
    if arguments.slow_share > 0.0 {
        let slow = Rule::new(Action::Delay(Duration::from_millis(arguments.slow_ms)));
        rules.push(slow.operation(Operation::Get).share(arguments.slow_share));
    }
    if arguments.connection_bytes_per_second > 0 {
        rules.push(Rule::new(Action::Bandwidth(arguments.connection_bytes_per_second)));
    }
    if arguments.error_share > 0.0 {
        let errors = vec![
            Action::status(500),
            Action::status(503),
            Action::too_many_requests(1),
            Action::Reset { at: Some(At::Middle) },
            Action::Truncate { at: At::Middle },
        ];
        let errors = Rule::mixture(arguments.error_share, errors);
        rules.push(errors.operation(Operation::Get));
    }
    rules
}
