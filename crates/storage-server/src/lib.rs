//! Object stores and a model hub in one process, for tests and benchmarks, with whatever goes wrong between a client
//! and a cloud.
//!
//! [`Server::start`] listens on loopback ports, one per [`Dialect`], and serves directories and what is given in memory
//! as buckets. [`Rule`]s say which requests meet which [`Action`]s; [`Server::requests`] and [`Server::counters`] tell
//! what came of it.
//!
//! ```no_run
//! use longshore_storage_server::{Action, At, Dialect, Operation, Options, Rule, Server};
//!
//! let server = Server::start(Options::default());
//! server.serve("models", "/data/models");
//! // every tenth range ends early
//! server.fault(Rule::new(Action::Truncate { at: At::Middle }).operation(Operation::Get).share(0.1));
//! for (name, value) in server.environment(Dialect::S3) {
//!     println!("export {name}={value}"); // s3://models/… is there for a client in this environment
//! }
//! ```
//!
//! | module | from | to |
//! |---|---|---|
//! | `server` | [`Options`] | ports, threads, and what a test says and asks meanwhile |
//! | `serve` | a request | what it is about, what happens to it, what is answered |
//! | `dialect` | path, query, headers | a bucket and a name; headers, lists and errors as the service writes them |
//! | `content` | a bucket and a name | an open file or bytes, an ETag, a generation |
//! | `fault` | what is asked, how often before | actions |
//! | `outgoing`, `connection` | an object, a range, actions | bytes on a socket, where and when they are to be |
//! | `log` | all of it | [`Request`]s and [`Counters`] |
//!
//! The binary `storage-server` is the same for scripts: it serves one directory and prints the environment of clients.
//!
//! # What it does not show
//!
//! TLS, HTTP/2, signatures (that a request names the right key is all that is looked at), writing, and what services
//! do that no reader of models meets.

mod connection;
mod content;
mod dialect;
mod fault;
mod log;
mod options;
mod outgoing;
mod reply;
mod request;
mod serve;
mod server;
mod xml;

pub use fault::{Action, At, Operation, Rule, RuleId};
pub use log::{Counters, Request};
pub use options::{Dialect, Options};
pub use server::Server;
